"""Synthetic decode and prefill on one GPU, with the metrics page of a serving engine. Needs PyTorch and nothing else.

A decoder stack with random weights in bf16: 36 layers, width 2560, grouped-query attention (32 query and 8 KV heads of
128), SwiGLU of 9728; no embedding. Decode steps run as a CUDA graph at a fixed context. The model is small so that
any data-center GPU holds it; what matters is what bounds it: memory in decode, compute in prefill.

Reads commands from standard input, one a line, and answers each with one line of JSON:
    decode PAGE BATCHES CONTEXT SECONDS   one token for each sequence of a batch in each step
    prefill PAGE TOKENS SECONDS           one forward pass over TOKENS in each step
    quit
BATCHES are sizes with commas between them, the largest first: the first one that fits into the GPU's memory is run.
PAGE is ``decode`` or ``prefill``: the metrics page on which the tokens are counted. The answer to a command holds
[seconds since boot, steps] after every group of steps, so that any window can be cut out afterwards.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, FEED = 36, 2560, 32, 8, 128, 9728
_GROUP_SECONDS = 0.05
_CACHE_BYTES_PER_TOKEN_AND_LAYER = 2 * KV_HEADS * HEAD * 2  # keys and values in bf16
#: Besides the cache: activations, workspaces, the CUDA graph. Not all of it is PyTorch's, whose error could be caught.
_SPARE_BYTES = 2 << 30


class Page:
    """Counters of one serving engine, under vLLM's names."""

    def __init__(self) -> None:
        self.generated = self.computed = self.transferred = self.steps = 0
        self.latency_seconds = 0.0
        self.lock = threading.Lock()

    def text(self) -> bytes:
        """Return the page in Prometheus' text format."""
        label = 'engine="0",model_name="synthetic"'
        with self.lock:
            prompt = self.computed + self.transferred
            return "\n".join(
                (
                    f"vllm:generation_tokens_total{{{label}}} {self.generated}",
                    f"vllm:prompt_tokens_total{{{label}}} {prompt}",
                    f'vllm:prompt_tokens_by_source_total{{{label},source="local_compute"}} {self.computed}',
                    f'vllm:prompt_tokens_by_source_total{{{label},source="external_kv_transfer"}} {self.transferred}',
                    f"vllm:inter_token_latency_seconds_sum{{{label}}} {self.latency_seconds:.6f}",
                    f"vllm:inter_token_latency_seconds_count{{{label}}} {self.generated}",
                    f"vllm:num_requests_running{{{label}}} 1",
                    f"vllm:num_requests_waiting{{{label}}} 0",
                    "",
                )
            ).encode()


def serve(pages: dict[str, Page]) -> int:
    """Serve /NAME/metrics for each page on a free port of this machine; returns the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path.strip("/").partition("/")[0])
            body = page.text() if page else b"no such page\n"
            self.send_response(200 if page else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


class Stack:
    """The decoder stack."""

    def __init__(self, layers: int) -> None:
        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * rows**-0.5

        self.layers = [
            (
                weight(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD),
                weight(HEADS * HEAD, WIDTH),
                weight(WIDTH, 2 * FEED),
                weight(FEED, WIDTH),
            )
            for _ in range(layers)
        ]

    def forward(self, x: torch.Tensor, cache: list[tuple[torch.Tensor, torch.Tensor]] | None) -> torch.Tensor:
        """Return the output for [sequences, tokens, WIDTH]; with a cache each token attends to all of it."""
        batch, tokens, _ = x.shape
        for number, (attend_in, attend_out, feed_in, feed_out) in enumerate(self.layers):
            projected = rms_norm(x, (WIDTH,)) @ attend_in
            q, k, v = projected.view(batch, tokens, -1, HEAD).transpose(1, 2).split((HEADS, KV_HEADS, KV_HEADS), 1)
            if cache is not None:
                k, v = cache[number]
            seen = scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
            x = x + seen.transpose(1, 2).reshape(batch, tokens, HEADS * HEAD) @ attend_out
            gate, up = (rms_norm(x, (WIDTH,)) @ feed_in).chunk(2, -1)
            x = x + (silu(gate) * up) @ feed_out
        return x


def fitting_batch(batches: Sequence[int], context: int, layers: int, free_bytes: int) -> int | None:
    """Return the first batch whose cache fits into the free memory, or None."""
    each_bytes = context * layers * _CACHE_BYTES_PER_TOKEN_AND_LAYER
    return next((batch for batch in batches if batch * each_bytes + _SPARE_BYTES <= free_bytes), None)


def decode_step(stack: Stack, batch: int, context: int) -> Callable[[], None]:
    """Return one decode step, recorded as a CUDA graph. Raises torch.OutOfMemoryError."""
    shape = (batch, KV_HEADS, context, HEAD)
    cache = [
        (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16),
            torch.randn(shape, device="cuda", dtype=torch.bfloat16),
        )
        for _ in stack.layers
    ]
    x = torch.randn(batch, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            stack.forward(x, cache)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stack.forward(x, cache)
    return graph.replay


def prefill_step(stack: Stack, tokens: int) -> Callable[[], None]:
    """Return one forward pass over a prompt."""
    x = torch.randn(1, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        stack.forward(x, None)

    return step


def run(step: Callable[[], None], seconds: float, count: Callable[[int, float], None]) -> list[tuple[float, int]]:
    """Repeat a step for a time, in groups that end with a synchronisation; returns the progress."""
    step()
    torch.cuda.synchronize()
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    step()
    torch.cuda.synchronize()
    group = max(1, round(_GROUP_SECONDS / max(1e-4, time.clock_gettime(time.CLOCK_BOOTTIME) - began)))
    started = before = time.clock_gettime(time.CLOCK_BOOTTIME)
    done, progress = 0, [(started, 0)]
    while before - started < seconds:
        for _ in range(group):
            step()
        torch.cuda.synchronize()
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        done += group
        progress.append((now, done))
        count(group, now - before)
        before = now
    return progress


def main() -> int:
    """Serve commands until ``quit`` or the end of the input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=LAYERS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    pages = {"decode": Page(), "prefill": Page()}
    port = serve(pages)
    stack = Stack(options.layers)
    torch.cuda.synchronize()
    device = torch.cuda.get_device_properties(0)
    answer: dict[str, object] = {
        "port": port,
        "torch": torch.__version__,
        "uuid": str(getattr(device, "uuid", "")),
        "parameters": sum(each.numel() for layer in stack.layers for each in layer),
    }
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "quit":
            break
        page, note = pages[rest[0]], ""
        try:
            if verb == "decode":
                batches = [int(each) for each in rest[1].split(",")]
                context, seconds = int(rest[2]), float(rest[3])
                batch = fitting_batch(batches, context, options.layers, torch.cuda.mem_get_info()[0])
                if batch is None:
                    raise torch.OutOfMemoryError
                if batch != batches[0]:
                    note = f"batch {batches[0]} does not fit into the GPU's memory"

                def count_decode(steps: int, took_seconds: float, page: Page = page, batch: int = batch) -> None:
                    with page.lock:
                        page.generated += steps * batch
                        page.latency_seconds += took_seconds * batch

                step, tokens, count = decode_step(stack, batch, context), batch, count_decode
                with page.lock:
                    page.transferred += batch * context
            else:
                tokens, seconds = int(rest[1]), float(rest[2])

                def count_prefill(steps: int, took_seconds: float, page: Page = page, tokens: int = tokens) -> None:
                    with page.lock:
                        page.computed += steps * tokens
                        page.generated += steps

                step, count = prefill_step(stack, tokens), count_prefill
            progress = run(step, seconds, count)
            print(json.dumps({"tokensPerStep": tokens, "progress": progress, "note": note}), flush=True)
        except torch.OutOfMemoryError:
            print(json.dumps({"error": "does not fit into the GPU's memory"}), flush=True)
        step = count = None  # type: ignore[assignment]
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
