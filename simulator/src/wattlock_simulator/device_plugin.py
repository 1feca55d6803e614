"""Device plugin: registers the simulated GPUs with the real kubelet as ``nvidia.com/gpu``.

Scheduling, device assignment and the PodResources API are then the kubelet's own. A container that gets GPUs gets
their UUIDs in ``NVIDIA_VISIBLE_DEVICES`` and the simulator's directory as a mount: that is its driver.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc

from wattlock_simulator.proto import deviceplugin_pb2 as api

_log = logging.getLogger(__name__)

API_VERSION = "v1beta1"
KUBELET_DIRECTORY = Path("/var/lib/kubelet/device-plugins")
ENDPOINT = "wattlock-simulator.sock"
_CALL_TIMEOUT_SECONDS = 5.0
_CHECK_SECONDS = 1.0
_STOP_GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class PluginSettings:
    """What the plugin offers and where.

    Attributes:
        uuids: the GPUs.
        directory: the simulator's directory as containers see it.
        host_directory: the same directory on the host.
        kubelet_directory: where ``kubelet.sock`` and the plugins' sockets lie.
        resource_name: name of the extended resource.
    """

    uuids: tuple[str, ...]
    directory: Path
    host_directory: Path
    kubelet_directory: Path = KUBELET_DIRECTORY
    resource_name: str = "nvidia.com/gpu"

    @property
    def socket(self) -> Path:
        """The plugin's own socket."""
        return self.kubelet_directory / ENDPOINT

    @property
    def kubelet_socket(self) -> Path:
        """The kubelet's registration socket."""
        return self.kubelet_directory / "kubelet.sock"


def allocation(settings: PluginSettings, device_ids: Sequence[str]) -> api.ContainerAllocateResponse:
    """What a container gets for its GPUs."""
    directory = str(settings.directory)
    return api.ContainerAllocateResponse(
        envs={"NVIDIA_VISIBLE_DEVICES": ",".join(device_ids), "WATTLOCK_SIMULATOR_DIR": directory},
        mounts=[api.Mount(container_path=directory, host_path=str(settings.host_directory), read_only=False)],
    )


class DevicePlugin:
    """Serves the plugin API and keeps the registration alive over restarts of the kubelet."""

    def __init__(self, settings: PluginSettings) -> None:
        self._settings = settings
        self._stop = threading.Event()

    def run(self) -> None:
        """Serves until ``stop``; blocks. Any failure is logged and tried again."""
        while not self._stop.is_set():
            try:
                self._serve_once()
            except (OSError, RuntimeError, grpc.RpcError) as error:
                _log.warning("device plugin: %s; trying again", error)
                self._stop.wait(_CHECK_SECONDS)

    def stop(self) -> None:
        """Ends ``run``."""
        self._stop.set()

    def _serve_once(self) -> None:
        """Serves and registers, until the kubelet restarts (it clears its directory) or we are stopped."""
        settings = self._settings
        settings.socket.unlink(missing_ok=True)
        ended = threading.Event()
        server = grpc.server(ThreadPoolExecutor(max_workers=4, thread_name_prefix="device-plugin"))
        server.add_generic_rpc_handlers((self._handlers(ended),))
        server.add_insecure_port(f"unix:{settings.socket}")
        server.start()
        try:
            kubelet = self._kubelet_identity()
            self._register()
            _log.info("registered %d x %s", len(settings.uuids), settings.resource_name)
            while not self._stop.wait(_CHECK_SECONDS):
                if not settings.socket.exists() or self._kubelet_identity() != kubelet:
                    _log.info("the kubelet restarted: registering again")
                    return
        finally:
            ended.set()
            server.stop(_STOP_GRACE_SECONDS).wait()

    def _kubelet_identity(self) -> tuple[int, int]:
        status = self._settings.kubelet_socket.stat()
        return status.st_ino, status.st_ctime_ns

    def _register(self) -> None:
        request = api.RegisterRequest(
            version=API_VERSION, endpoint=ENDPOINT, resource_name=self._settings.resource_name
        )
        with grpc.insecure_channel(f"unix:{self._settings.kubelet_socket}") as channel:
            call = channel.unary_unary(
                f"/{API_VERSION}.Registration/Register",
                request_serializer=api.RegisterRequest.SerializeToString,
                response_deserializer=api.Empty.FromString,
            )
            call(request, timeout=_CALL_TIMEOUT_SECONDS)

    def _handlers(self, ended: threading.Event) -> grpc.GenericRpcHandler:
        def options(request: api.Empty, context: grpc.ServicerContext) -> api.DevicePluginOptions:
            del request, context
            return api.DevicePluginOptions()

        def watch(request: api.Empty, context: grpc.ServicerContext) -> Iterator[api.ListAndWatchResponse]:
            del request
            devices = [api.Device(ID=uuid, health="Healthy") for uuid in self._settings.uuids]
            yield api.ListAndWatchResponse(devices=devices)
            while context.is_active() and not ended.wait(_CHECK_SECONDS):
                pass

        def allocate(request: api.AllocateRequest, context: grpc.ServicerContext) -> api.AllocateResponse:
            for container in request.container_requests:
                unknown = sorted(set(container.devicesIDs) - set(self._settings.uuids))
                if unknown:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no such GPU: {', '.join(unknown)}")
            return api.AllocateResponse(
                container_responses=[allocation(self._settings, c.devicesIDs) for c in request.container_requests]
            )

        return grpc.method_handlers_generic_handler(
            f"{API_VERSION}.DevicePlugin",
            {
                "GetDevicePluginOptions": grpc.unary_unary_rpc_method_handler(
                    options,
                    request_deserializer=api.Empty.FromString,
                    response_serializer=api.DevicePluginOptions.SerializeToString,
                ),
                "ListAndWatch": grpc.unary_stream_rpc_method_handler(
                    watch,
                    request_deserializer=api.Empty.FromString,
                    response_serializer=api.ListAndWatchResponse.SerializeToString,
                ),
                "Allocate": grpc.unary_unary_rpc_method_handler(
                    allocate,
                    request_deserializer=api.AllocateRequest.FromString,
                    response_serializer=api.AllocateResponse.SerializeToString,
                ),
            },
        )
