"""A small client of the Kubernetes API: get, merge patch and watch, each bounded in time and size.

The agent needs three requests. The official client would bring its models for the whole of Kubernetes into memory.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import urllib3
from wattlock_api.answers import read_bounded, retry_after_seconds

_log = logging.getLogger(__name__)

Json = dict[str, Any]

CONNECT_TIMEOUT_SECONDS = 3.0
#: A server under load may need long. Nothing waits for it: orders are followed and GPUs released meanwhile.
READ_TIMEOUT_SECONDS = 30.0
#: From the head of an answer to its end.
WHOLE_SECONDS = 60.0
#: Bookmarks come every minute on a silent watch.
WATCH_READ_TIMEOUT_SECONDS = 90.0
WATCH_SECONDS = 290
MAX_BODY_BYTES = 8 * 1024 * 1024
TOKEN_SECONDS = 60.0
_CHUNK_BYTES = 64 * 1024


class ApiError(Exception):
    """The API server did not do what was asked. ``status`` is 0 where it did not answer."""

    def __init__(self, message: str, status: int = 0, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_seconds = retry_after_seconds
        """For how long it wants to be left alone, where it says so."""


class ApiClient:
    """Requests with the service account that the kubelet mounted. One thread at a time."""

    def __init__(self, server: str, service_account_directory: Path) -> None:
        """``server`` is the base URL, e.g. https://10.96.0.1:443."""
        self._server = server
        self._token_path = service_account_directory / "token"
        self._token = ""
        self._token_read_at_seconds = float("-inf")
        self._pool = urllib3.PoolManager(
            num_pools=1,
            maxsize=1,
            retries=False,
            cert_reqs="CERT_REQUIRED",
            ca_certs=str(service_account_directory / "ca.crt"),
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_SECONDS, read=READ_TIMEOUT_SECONDS),
        )

    def get(self, path: str) -> Json | None:
        """Return an object, ``None`` when it does not exist.

        Raises:
            ApiError: no usable answer.
        """
        found = self.get_dated(path)
        return None if found is None else found[0]

    def get_dated(self, path: str) -> tuple[Json, float | None] | None:
        """Return an object and what time it was by the server's clock, in seconds since 1970 (whole ones).

        Raises:
            ApiError: no usable answer.
        """
        try:
            body, headers = self._request("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        if not isinstance(body.get("metadata"), dict):
            # Something else must not pass for an object without orders.
            raise ApiError(f"GET {path}: the answer is no object of the API")
        try:
            return body, parsedate_to_datetime(headers.get("Date", "")).timestamp()
        except ValueError:
            return body, None

    def merge_patch(self, path: str, body: Json) -> None:
        """Patch an object; lists are replaced as a whole.

        Raises:
            ApiError: refused or no answer.
        """
        self._request("PATCH", path, json.dumps(body).encode(), {"Content-Type": "application/merge-patch+json"})

    def watch(self, path: str) -> Iterator[Json]:
        """Yield the events of a watch until the server ends it (after some minutes).

        Raises:
            ApiError: refused, broken off or silent for longer than the server's bookmarks allow.
        """
        response = self._send("GET", path, None, {}, WATCH_READ_TIMEOUT_SECONDS)
        try:
            line = b""
            for chunk in response.stream(_CHUNK_BYTES):
                *complete, line = (line + chunk).split(b"\n")
                if len(line) > MAX_BODY_BYTES:
                    raise ApiError(f"watch {path}: an event of more than {MAX_BODY_BYTES} bytes")
                for text in complete:
                    if text.strip():
                        yield _parse(text, path)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiError(f"watch {path} broken off: {_brief(error)}") from error
        finally:
            response.close()

    def close(self) -> None:
        """Close the connection."""
        self._pool.clear()

    def _request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> tuple[Json, Mapping[str, str]]:
        response = self._send(method, path, body, headers, READ_TIMEOUT_SECONDS)
        try:
            content = read_bounded(response, MAX_BODY_BYTES, WHOLE_SECONDS)
            response.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            response.close()
            raise ApiError(f"{method} {path}: {_brief(error)}") from error
        return _parse(content, path), response.headers

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], read_timeout_seconds: float
    ) -> urllib3.BaseHTTPResponse:
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_SECONDS, read=read_timeout_seconds)
        all_headers = {"Authorization": f"Bearer {self._bearer()}", "Accept": "application/json", **headers}
        try:
            response = self._pool.request(
                method,
                self._server + path,
                body=body,
                headers=all_headers,
                timeout=timeout,
                preload_content=False,
                redirect=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiError(f"{method} {path}: the API server does not answer: {_brief(error)}") from error
        if response.status >= 300:
            try:
                text = response.read(2048).decode(errors="replace")
            except (urllib3.exceptions.HTTPError, OSError):
                text = ""
            response.close()
            if response.status == 401:
                self._token_read_at_seconds = float("-inf")
            wait_seconds = retry_after_seconds(response.headers)
            raise ApiError(f"{method} {path}: {response.status} {_message(text)}", response.status, wait_seconds)
        return response

    def _bearer(self) -> str:
        """Return the token; the kubelet replaces it long before it expires."""
        if time.monotonic() - self._token_read_at_seconds >= TOKEN_SECONDS:
            try:
                self._token = self._token_path.read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ApiError(f"cannot read the service account's token: {error}") from error
            self._token_read_at_seconds = time.monotonic()
        return self._token


def _parse(content: bytes, path: str) -> Json:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ApiError(f"{path}: the answer is no JSON") from error
    if not isinstance(parsed, dict):
        raise ApiError(f"{path}: the answer is no object")
    return parsed


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
