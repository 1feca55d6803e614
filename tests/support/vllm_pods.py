"""A real vLLM in both roles as pods, its pages read past Wattlock, and clients of it."""

import json
import os
import random
import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PORT = 8000
#: vLLM for CPU keeps KV data in blocks of so many tokens. ExampleConnector passes on whole blocks of a prompt, and
#: finds them only where the prompt has at least two tokens more (align_to_block_size): decode computes those two.
BLOCK_TOKENS = 128
PROMPT_TOKENS = 2 * BLOCK_TOKENS + 2
#: Of 66 tokens decode computes 2 as prompt: far from the 10 % at which it counts as prefill.
OUTPUT_TOKENS = 64
#: An overloaded vLLM on two cores takes its time.
_TIMEOUT_SECONDS = 60.0


def installed() -> str:
    """Return the folder that vLLM is installed in."""
    command = [ROOT / "dev/vllm/install", "--path"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def deployment(role: str) -> dict[str, Any]:
    """Return the Deployment of a role, as dev/vllm has it."""
    text = (ROOT / "dev/vllm/deployment.yaml").read_text()
    values = {
        "@ROLE@": role,
        "@KV_ROLE@": {"prefill": "kv_producer", "decode": "kv_consumer"}[role],
        "@VLLM@": installed(),
        # Beside the cluster's state, so that it goes with the cluster.
        "@KV@": str(Path(os.environ["KUBECONFIG"]).resolve().parent / "kv"),
    }
    for name, value in values.items():
        text = text.replace(name, value)
    filled: dict[str, Any] = yaml.safe_load(text)
    return filled


@dataclass(frozen=True)
class VllmPage:
    """vLLM's own counters, read by the test itself."""

    unix_seconds: float
    """Middle of the time that reading took."""
    generated_tokens: float
    prompt_tokens: float
    """All prompt tokens, whoever computed them."""
    computed_tokens: float
    """Prompt tokens that it computed itself."""
    transferred_tokens: float
    """Prompt tokens whose KV data came from the other instance."""
    latency_sum_seconds: float
    latency_count: float
    waiting: float


_SERIES = re.compile(r"^(vllm:[a-z_]+)\{([^}]*)\} (\S+)$", re.MULTILINE)


def read_page(address: str, port: int = PORT) -> VllmPage:
    """Read and parse the page of a pod or process, by other means than the agent's."""
    started = time.time()
    with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=_TIMEOUT_SECONDS) as answer:
        text = answer.read().decode()
    at = (started + time.time()) / 2

    def total(name: str, label: str = "") -> float:
        found = [float(value) for series, labels, value in _SERIES.findall(text) if series == name and label in labels]
        assert found, f"vLLM's page has no {name} with {label!r}"
        return sum(found)

    return VllmPage(
        unix_seconds=at,
        generated_tokens=total("vllm:generation_tokens_total"),
        prompt_tokens=total("vllm:prompt_tokens_total"),
        computed_tokens=total("vllm:prompt_tokens_by_source_total", 'source="local_compute"'),
        transferred_tokens=total("vllm:prompt_tokens_by_source_total", 'source="external_kv_transfer"'),
        latency_sum_seconds=total("vllm:inter_token_latency_seconds_sum"),
        latency_count=total("vllm:inter_token_latency_seconds_count"),
        waiting=total("vllm:num_requests_waiting"),
    )


def complete(address: str, prompt: list[int], output_tokens: int) -> None:
    """Let a pod complete a prompt of token ids."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://{address}:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
        usage = json.load(answer)["usage"]
    assert usage["completion_tokens"] == output_tokens


def new_prompt(tokens: int = PROMPT_TOKENS) -> list[int]:
    """Return a prompt that no instance has seen, past the three special tokens."""
    return [random.randrange(3, 512) for _ in range(tokens)]


@dataclass
class Traffic:
    """What clients did."""

    requests: int = 0
    failures: int = 0


@contextmanager
def clients(
    prefill: str, decode: str, number: int = 2, pause_seconds: float = 0.2, *, skip_prefill: bool = False
) -> Iterator[Traffic]:
    """Run clients that pass prompts through prefill to decode, as a router does; failures are counted, not raised.

    ``skip_prefill``: they send long prompts straight to decode and want few tokens, so that decode does prefill's work.
    """
    traffic = Traffic()
    stop = threading.Event()
    lock = threading.Lock()

    def ask() -> None:
        if skip_prefill:
            complete(decode, new_prompt(1000), 4)
            return
        prompt = new_prompt()
        complete(prefill, prompt, 1)
        complete(decode, prompt, OUTPUT_TOKENS)

    def run() -> None:
        while not stop.wait(pause_seconds):
            try:
                ask()
                failed = 0
            except (OSError, urllib.error.URLError, ValueError):
                failed = 1
            with lock:
                traffic.requests += 1
                traffic.failures += failed

    threads = [threading.Thread(target=run, name=f"client-{index}") for index in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield traffic
    finally:
        stop.set()
        for thread in threads:
            thread.join(2 * _TIMEOUT_SECONDS + 10)
