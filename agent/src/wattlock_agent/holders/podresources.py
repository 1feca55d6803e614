"""Asks the kubelet which devices its pods have (PodResources API, method List).

Only the messages are generated: the one method is called by its name, so no generated gRPC stub is needed.
"""

from collections.abc import Sequence
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.base import Holders, KubeletError, PodName
from wattlock_agent.holders.devices import DeviceClaim, find_holders
from wattlock_agent.holders.podresources_pb2 import ListPodResourcesRequest, ListPodResourcesResponse

DEFAULT_SOCKET = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
LIST_METHOD = "/v1.PodResourcesLister/List"
TIMEOUT_SECONDS = 10.0
#: Both limits are those of other clients of this API; the answer lists every container of the node.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # For a unix socket gRPC would send the escaped path as the authority, which Go's HTTP/2 server refuses.
    ("grpc.default_authority", "localhost"),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)

_MOUNT = "mount the host's directory (not the socket, which a kubelet restart replaces)"
_REMEDIES = {
    grpc.StatusCode.UNAVAILABLE: f"check that the kubelet runs and {_MOUNT}; the agent must be uid 0 to open it",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the kubelet is overloaded; see its log",
    grpc.StatusCode.UNIMPLEMENTED: "the kubelet is older than Kubernetes 1.20 or this is not its pod-resources socket",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "the kubelet limits the rate, or the answer is larger than 16 MiB",
    grpc.StatusCode.PERMISSION_DENIED: "the agent must be uid 0; on SELinux hosts it may need another type",
}


def parse_claims(content: bytes) -> list[DeviceClaim]:
    """Return the devices of all containers in an answer of the kubelet.

    Raises:
        DecodeError: it is none.
    """
    return [
        DeviceClaim(PodName(pod.namespace, pod.name), devices.resource_name, tuple(devices.device_ids))
        for pod in ListPodResourcesResponse.FromString(content).pod_resources
        for container in pod.containers
        for devices in container.devices
    ]


class PodResources:
    """Client of the kubelet. One thread at a time. Survives restarts of the kubelet: the path is opened anew."""

    def __init__(self, socket: Path = DEFAULT_SOCKET, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._socket = socket
        self._timeout_seconds = timeout_seconds
        self._channel: grpc.Channel | None = None

    def holders(self, gpus: Sequence[GpuIdentity]) -> Holders:
        """Return who holds which of ``gpus``; blocks for the time-out at most.

        Raises:
            KubeletError: no usable answer; what is known from before is out of date.
        """
        return find_holders(self.claims(), gpus)

    def claims(self) -> list[DeviceClaim]:
        """Return the devices of all containers on the node, without those given by dynamic resource allocation.

        Older kubelets list pods that have ended as well.

        Raises:
            KubeletError: no usable answer.
        """
        content = self._list()
        try:
            return parse_claims(content)
        except DecodeError as error:
            self.close()
            raise KubeletError(
                f"the answer on {self._socket} is no PodResources list; is this the kubelet's pod-resources socket?"
            ) from error

    def close(self) -> None:
        """Close the connection; a later call opens it again."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _list(self) -> bytes:
        if self._channel is None:
            self._channel = grpc.insecure_channel(f"unix://{self._socket.absolute()}", options=_OPTIONS)
        call: grpc.UnaryUnaryMultiCallable[ListPodResourcesRequest, bytes] = self._channel.unary_unary(
            LIST_METHOD,
            request_serializer=ListPodResourcesRequest.SerializeToString,
            # Parsed below: gRPC would turn a parse error into a log line and an INTERNAL status without a reason.
            response_deserializer=None,
        )
        try:
            return call(ListPodResourcesRequest(), timeout=self._timeout_seconds)
        except grpc.RpcError as error:
            # A new channel next time: this one would wait longer after each failure, up to two minutes.
            self.close()
            raise self._error(error) from error

    def _error(self, error: grpc.RpcError) -> KubeletError:
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        details = (error.details() or "" if isinstance(error, grpc.Call) else str(error))[:200]
        remedy = _REMEDIES.get(code, "see the kubelet's log")
        return KubeletError(f"the kubelet does not answer on {self._socket} ({code.name}: {details}): {remedy}")
