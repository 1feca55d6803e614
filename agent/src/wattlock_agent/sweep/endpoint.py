"""The endpoint under test: its address, its model, and how many tokens it has made."""

import http.client
import json
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from wattlock_api import boottime

from wattlock_agent.serving.base import ScrapeFailure, ServingCounters, is_restart
from wattlock_agent.serving.scrape import Scraper

_CONNECT_SECONDS = 10.0
_MAX_ANSWER_BYTES = 1 << 20
_PAGE_SECONDS = 10.0


class EndpointError(Exception):
    """The endpoint cannot be used. The message says what to check."""


class EngineRestartedError(EndpointError):
    """The engine began anew: its caches are cold, and what follows is another measurement."""


@dataclass(frozen=True)
class Endpoint:
    """Where requests go."""

    scheme: str
    host: str
    port: int
    prefix: str
    """Path before ``/v1``."""

    @property
    def url(self) -> str:
        """Base URL without ``/v1``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"

    def connect(self, timeout_seconds: float) -> http.client.HTTPConnection:
        """Return a connection, not opened yet, of which each read waits so long at most."""
        if self.scheme == "https":
            return http.client.HTTPSConnection(
                self.host, self.port, timeout=timeout_seconds, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout_seconds)


def parse_endpoint(url: str) -> Endpoint:
    """Return the endpoint at a URL, with or without ``/v1`` at its end.

    Raises:
        EndpointError: no http or https URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise EndpointError(f"{url!r}: {error}; write e.g. http://127.0.0.1:8000") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise EndpointError(f"{url!r} is no base URL of an endpoint: write e.g. http://127.0.0.1:8000")
    return Endpoint(parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1").rstrip("/"))


def headers() -> dict[str, str]:
    """Return the headers of requests; the endpoint's key comes from OPENAI_API_KEY, as with OpenAI's own client."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


def served_model(endpoint: Endpoint) -> str:
    """Ask for the name of the first model that the endpoint serves.

    Raises:
        EndpointError: it does not tell.
    """
    try:
        return str(_models(endpoint)[0]["id"])
    except (LookupError, TypeError):
        raise EndpointError(f"{endpoint.url}/v1/models: no list of models in the answer; give --model") from None


def served_tokenizer(endpoint: Endpoint, model: str) -> str | None:
    """Ask where the files of a model come from, its tokenizer among them.

    vLLM tells what it was started with as ``root`` of the model, a name of the hub or a folder. With
    ``--served-model-name`` the model's own name is neither. A folder may be on another machine or in a container.

    Returns:
        a name or a folder of this machine; ``None`` where the model's name must do.
    """
    try:
        (root,) = {str(each["root"]) for each in _models(endpoint) if each["id"] == model}
    except (EndpointError, ValueError, LookupError, TypeError):
        return None
    return root if not Path(root).is_absolute() or Path(root).is_dir() else None


def _models(endpoint: Endpoint) -> Any:
    """Return the list of models, of whatever form.

    Raises:
        EndpointError: no answer, or no list in it.
    """
    url = f"{endpoint.url}/v1/models"
    connection = endpoint.connect(_CONNECT_SECONDS)
    try:
        connection.request("GET", f"{endpoint.prefix}/v1/models", headers=headers())
        response = connection.getresponse()
        body = response.read(_MAX_ANSWER_BYTES)
        if response.status != http.HTTPStatus.OK:
            raise EndpointError(f"{url}: HTTP {response.status}; is it an OpenAI-compatible endpoint?")
        return json.loads(body)["data"]
    except (OSError, http.client.HTTPException) as error:
        raise EndpointError(f"{url}: {error}; check that the engine runs and listens there") from None
    except (ValueError, RecursionError, LookupError, TypeError):
        raise EndpointError(f"{url}: no list of models in the answer; give --model") from None
    finally:
        connection.close()


@dataclass(frozen=True)
class Tokens:
    """Tokens made so far, at one moment by the clock of ``boottime``."""

    at_seconds: float
    generated: float
    prompt: float
    """Prompt tokens that the endpoint computed itself."""
    took_seconds: float = 0.0
    """Between question and answer: the counts are of some moment in it, ``at_seconds`` is its middle."""


class TokenSource(Protocol):
    """Tells how many tokens the endpoint has made."""

    def read(self) -> Tokens:
        """Return the counts of this moment. Raises EndpointError."""


class MetricsTokens:
    """The engine's own counters: the most exact, as they move with every step."""

    def __init__(self, url: str, scrape: Callable[[str], ServingCounters | ScrapeFailure] | None = None) -> None:
        """``url`` has a literal address, see ``metrics_url``."""
        self._url = url
        self._scrape = scrape or Scraper(total_timeout_seconds=_PAGE_SECONDS).scrape
        self._before: ServingCounters | None = None

    def page(self) -> ServingCounters:
        """Return the page.

        Raises:
            EndpointError: no page, no token counters, or the engine was restarted since the last call.
        """
        page = self._scrape(self._url)
        if isinstance(page, ScrapeFailure):
            raise EndpointError(page.message)
        if page.generated_tokens is None:
            raise EndpointError(f"{self._url}: no counter of generated tokens; leave --metrics-url out")
        before, self._before = self._before, page
        if before is not None and is_restart(before, page):
            raise EngineRestartedError(f"{self._url}: the engine was restarted during the sweep; see its log")
        return page

    def read(self) -> Tokens:
        """As TokenSource; blocks for 10 s at most."""
        before_seconds = boottime.now_seconds()
        page = self.page()
        took_seconds = boottime.now_seconds() - before_seconds
        prompt = page.prompt_tokens if page.computed_prompt_tokens is None else page.computed_prompt_tokens
        at_seconds = before_seconds + took_seconds / 2
        return Tokens(at_seconds, page.generated_tokens or 0.0, prompt or 0.0, took_seconds)


def metrics_url(endpoint: Endpoint, given: str | None) -> str:
    """Return the URL of the engine's metrics with a literal address, which is what the scraper takes.

    Args:
        endpoint: its host is asked where no URL is given.
        given: what was asked for.

    Raises:
        EndpointError: no plain http URL, or its host has no address.
    """
    url = given or f"http://{endpoint.url.partition('://')[2]}/metrics"
    parts = urlsplit(url)
    try:
        port = parts.port or 80
        found = socket.getaddrinfo(parts.hostname or "", port, type=socket.SOCK_STREAM)
    except (ValueError, OSError) as error:
        raise EndpointError(f"{url}: {error}; give --metrics-url as http://ADDRESS:PORT/metrics") from None
    address = str(found[0][4][0])
    return f"http://{f'[{address}]' if ':' in address else address}:{port}{parts.path or '/metrics'}"
