"""The Kubernetes API over plain requests: a few verbs, JSON in and out, a timeout on every call.

Blocking: the operator calls it from worker threads.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import kubernetes
import urllib3
from wattlock_api.answers import Body, UnreadableAnswerError, read_bounded, retry_after_seconds
from wattlock_api.constants import API_VERSION, GROUP, OPERATOR_FIELD_MANAGER, VERSION

Json = dict[str, Any]

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
#: From the head of an answer to its end.
WHOLE_SECONDS = 60.0
#: Bounds what an answer takes in memory, several times as much once it is parsed. More than any single object has: etcd
#: takes 1.5 MiB, which may be some times as much in JSON, where a byte can have an escape of six.
MAX_ANSWER_BYTES = 16 * 1024 * 1024
#: Objects of a page of a list. A hundred usual pods have a megabyte; a tenant can make pods of 1.5 MiB.
PAGE = 100
#: Pages of a list that are asked for before it is given up as endless.
MAX_PAGES = 10_000

_GROUP_PATH = f"/apis/{GROUP}/{VERSION}"
POLICIES = f"{_GROUP_PATH}/energypolicies"
NODE_ENERGIES = f"{_GROUP_PATH}/nodeenergies"
PROFILES = f"{_GROUP_PATH}/clockprofiles"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
PODS = "/api/v1/pods"
NODES = "/api/v1/nodes"


class KubeError(Exception):
    """A call to the API server failed. The message names the call and what the server said."""

    def __init__(self, message: str, status: int | None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None when there was no (whole) answer."""
        self.retry_after_seconds = retry_after_seconds
        """For how long the API server wants to be left alone, where it says so."""

    @property
    def ends_pass(self) -> bool:
        """Whether there is no point in asking for anything else now: no answer, or overload."""
        return self.status is None or self.status in (429, 503) or self.retry_after_seconds is not None


class TooLongError(KubeError):
    """The answer has more bytes than we read. A smaller page of the same list may have fewer."""


class OvertakenError(KubeError):
    """A JSON patch was refused because a test in it failed: the object is not what it was."""


class _Counted:
    """The body of an answer, and how much of it was read."""

    def __init__(self, body: Body) -> None:
        self._body, self.size = body, 0

    def read1(self, amt: int) -> bytes:
        part = self._body.read1(amt)
        self.size += len(part)
        return part


@dataclass(frozen=True)
class Kube:
    """A connection to the API server."""

    client: Any

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Json:
        """Send a request and return the object of the answer.

        Raises:
            TooLongError: the answer is too long.
            KubeError: no answer, or one that is no success.
        """
        full = path + ("?" + urlencode(query) if query else "")
        headers = {"Accept": "application/json", "Content-Type": content_type}
        if body is not None and content_type.endswith("yaml"):
            body = json.dumps(body)  # JSON is YAML; the client encodes only what it calls JSON
        try:
            arguments = self.client.param_serialize(
                method, full, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            answer = self.client.call_api(*arguments, _request_timeout=(CONNECT_SECONDS, READ_SECONDS))
            with answer.response:  # closed unless read to its end, which leaves the connection for the next request
                counted = _Counted(answer.response)
                try:
                    content = read_bounded(counted, MAX_ANSWER_BYTES, WHOLE_SECONDS)
                except UnreadableAnswerError as error:
                    if counted.size <= MAX_ANSWER_BYTES:  # it takes too long
                        raise
                    raise TooLongError(f"{method} {path}: {error}", None) from error
        except (urllib3.exceptions.HTTPError, OSError, kubernetes.client.ApiException) as error:
            raise KubeError(f"{method} {path}: no answer from the API server ({error})"[:500], None) from error
        try:
            parsed = json.loads(content)
        except ValueError:
            parsed = None
        if not 200 <= answer.status < 300:
            message = parsed.get("message", "") if isinstance(parsed, dict) else ""
            wait_seconds = retry_after_seconds(answer.headers)
            raise KubeError(f"{method} {path}: HTTP {answer.status}: {message}"[:1000], answer.status, wait_seconds)
        if not isinstance(parsed, dict):
            raise KubeError(f"{method} {path}: HTTP {answer.status}, but the answer is no JSON object", answer.status)
        return parsed

    def get(self, path: str) -> Json | None:
        """Return an object, or None when there is none.

        Raises:
            KubeError: any other failure.
        """
        try:
            body = self.request("GET", path)
        except KubeError as error:
            if error.status == 404:
                return None
            raise
        if not isinstance(body.get("metadata"), dict):
            raise KubeError(f"GET {path}: the answer is no object of the API", 200)
        return body

    def list_all(self, path: str, label_selector: str = "") -> Iterator[Json]:
        """Yield the objects of a collection, page by page.

        A page that is too long is asked for again with half the objects, down to one: somebody who makes many large
        objects must not keep us from reading the others. The limit may change on the way, for a continue token holds
        the version of the list and where to go on, and nothing else (apiserver, pkg/storage/continue.go).

        Raises:
            KubeError: a page failed; what was yielded before is not the whole.
        """
        query = {"labelSelector": label_selector} if label_selector else {}
        limit = PAGE
        for _ in range(MAX_PAGES):
            try:
                page = self.request("GET", path, query | {"limit": str(limit)})
            except TooLongError:
                if limit == 1:
                    raise
                limit //= 2
                continue
            limit = min(2 * limit, PAGE)  # what comes next may be small again
            metadata, items = page.get("metadata"), page.get("items", [] if "kind" in page else None)
            # An answer that is something else must not pass for an empty list: everything would seem to be gone.
            if not isinstance(metadata, dict) or not isinstance(items, list) or not all(map(_is_object, items)):
                raise KubeError(f"GET {path}: the answer is no list of the API", 200)
            yield from items
            proceed = metadata.get("continue")
            if not proceed:
                return
            query["continue"] = proceed
            del page, items  # not in memory beside the next one
        raise KubeError(f"GET {path}: the list has no end after {MAX_PAGES} pages", None)

    def apply(self, path: str, manifest: Mapping[str, Any]) -> Json:
        """Create or change an object by server-side apply, as the owner of the fields.

        Raises:
            KubeError: it failed.
        """
        query = {"fieldManager": OPERATOR_FIELD_MANAGER, "force": "true"}
        return self.request("PATCH", path, query, dict(manifest), "application/apply-patch+yaml")

    def merge(self, path: str, patch: Mapping[str, Any]) -> Json:
        """Change fields of an object by a JSON merge patch.

        Raises:
            KubeError: it failed.
        """
        query = {"fieldManager": OPERATOR_FIELD_MANAGER}
        return self.request("PATCH", path, query, dict(patch), "application/merge-patch+json")

    def create(self, path: str, manifest: Mapping[str, Any]) -> Json:
        """Create an object in a collection.

        Raises:
            KubeError: it failed; with status 409 where there is one of its name.
        """
        return self.request("POST", path, {"fieldManager": OPERATOR_FIELD_MANAGER}, dict(manifest))

    def amend(self, path: str, operations: Sequence[Mapping[str, Any]]) -> Json:
        """Change an object by a JSON patch (RFC 6902), whole or not at all: its tests are made by the API server.

        Raises:
            OvertakenError: a test failed.
            KubeError: any other failure.
        """
        query = {"fieldManager": OPERATOR_FIELD_MANAGER}
        try:
            return self.request("PATCH", path, query, list(operations), "application/json-patch+json")
        except KubeError as error:
            # All that the API server says of a patch that does not fit; what its schema refuses reads otherwise.
            if error.status == 422 and "the server rejected our request" in str(error):
                raise OvertakenError(str(error), error.status) from error
            raise

    def delete(self, path: str, uid: str = "") -> None:
        """Delete an object; one that is gone already is fine. With a UID: that very object only.

        Raises:
            KubeError: it failed.
        """
        body: Json = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            self.request("DELETE", path, body=body)
        except KubeError as error:
            if error.status != 404:
                raise


def _is_object(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("metadata"), dict)


def connect() -> Kube:
    """Connect with the pod's service account, or with KUBECONFIG outside of a cluster.

    Raises:
        kubernetes.config.ConfigException: there is neither.
    """
    loader: Any = kubernetes.config
    configuration = kubernetes.client.Configuration()
    try:
        loader.load_incluster_config(client_configuration=configuration)
    except loader.ConfigException:
        loader.load_kube_config(client_configuration=configuration)
    configuration.retries = urllib3.Retry(total=1, connect=1, read=0, redirect=0, status=0)
    return Kube(kubernetes.client.ApiClient(configuration))


def node_energy_path(node: str) -> str:
    """Return the path of a NodeEnergy."""
    return f"{NODE_ENERGIES}/{quote(node)}"


def policy_path(namespace: str, name: str) -> str:
    """Return the path of an EnergyPolicy."""
    return f"{_GROUP_PATH}/namespaces/{quote(namespace)}/energypolicies/{quote(name)}"


def profile_path(name: str) -> str:
    """Return the path of a ClockProfile."""
    return f"{PROFILES}/{quote(name)}"


def daemon_sets_path(namespace: str, name: str = "") -> str:
    """Return the path of a DaemonSet, or of all of a namespace."""
    return f"/apis/apps/v1/namespaces/{quote(namespace)}/daemonsets" + (f"/{quote(name)}" if name else "")


def lease_path(namespace: str, name: str = "") -> str:
    """Return the path of a Lease, or of all of a namespace."""
    return f"/apis/coordination.k8s.io/v1/namespaces/{quote(namespace)}/leases" + (f"/{quote(name)}" if name else "")


def manifest(kind: str, name: str, namespace: str = "") -> Json:
    """Return the beginning of an object of our API group."""
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": metadata}
