"""The device plugin against a registration server that acts as the kubelet."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from wattlock_simulator.device_plugin import DevicePlugin, PluginSettings
from wattlock_simulator.proto import deviceplugin_pb2 as api

UUIDS = ("GPU-a", "GPU-b")


class Kubelet:
    """The registration half of a kubelet; ``restart`` clears the directory as a real one does."""

    def __init__(self, directory):
        self.directory = directory
        self.registrations = queue.Queue()
        self._server = None
        self.restart()

    def restart(self):
        self.stop()
        for path in self.directory.iterdir():
            path.unlink()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2))

        def register(request, context):
            self.registrations.put(request)
            return api.Empty()

        handler = grpc.unary_unary_rpc_method_handler(
            register,
            request_deserializer=api.RegisterRequest.FromString,
            response_serializer=api.Empty.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("v1beta1.Registration", {"Register": handler}),)
        )
        self._server.add_insecure_port(f"unix:{self.directory}/kubelet.sock")
        self._server.start()

    def stop(self):
        if self._server:
            self._server.stop(None).wait()


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "dp").mkdir()
    return tmp_path / "dp"


@pytest.fixture
def kubelet(directory):
    kubelet = Kubelet(directory)
    yield kubelet
    kubelet.stop()


@pytest.fixture
def plugin(directory, tmp_path):
    settings = PluginSettings(UUIDS, tmp_path / "in", tmp_path / "on-host", kubelet_directory=directory)
    plugin = DevicePlugin(settings)
    thread = threading.Thread(target=plugin.run)
    thread.start()
    yield plugin
    plugin.stop()
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def channel(kubelet, plugin, directory):
    registration = kubelet.registrations.get(timeout=10)
    with grpc.insecure_channel(f"unix:{directory}/{registration.endpoint}") as channel:
        yield channel


def test_registers_the_gpus_as_nvidia_devices(kubelet, plugin):
    registration = kubelet.registrations.get(timeout=10)
    assert (registration.version, registration.resource_name) == ("v1beta1", "nvidia.com/gpu")
    assert "/" not in registration.endpoint


def test_lists_all_gpus_as_healthy_and_keeps_the_stream_open(channel):
    watch = channel.unary_stream(
        "/v1beta1.DevicePlugin/ListAndWatch",
        request_serializer=api.Empty.SerializeToString,
        response_deserializer=api.ListAndWatchResponse.FromString,
    )(api.Empty(), timeout=10)
    assert [(d.ID, d.health) for d in next(watch).devices] == [(u, "Healthy") for u in UUIDS]
    assert watch.is_active()
    watch.cancel()


def allocate(channel, *ids):
    call = channel.unary_unary(
        "/v1beta1.DevicePlugin/Allocate",
        request_serializer=api.AllocateRequest.SerializeToString,
        response_deserializer=api.AllocateResponse.FromString,
    )
    request = api.AllocateRequest(container_requests=[api.ContainerAllocateRequest(devicesIDs=ids)])
    return call(request, timeout=10).container_responses[0]


def test_a_container_gets_uuids_and_the_driver_directory(channel, tmp_path):
    response = allocate(channel, "GPU-b", "GPU-a")
    assert response.envs["NVIDIA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    assert response.envs["WATTLOCK_SIMULATOR_DIR"] == str(tmp_path / "in")
    mount = response.mounts[0]
    assert (mount.container_path, mount.host_path) == (str(tmp_path / "in"), str(tmp_path / "on-host"))
    assert not mount.read_only


def test_a_gpu_that_is_not_ours_is_refused(channel):
    with pytest.raises(grpc.RpcError, match="no such GPU: GPU-x"):
        allocate(channel, "GPU-x")


def test_registers_again_when_the_kubelet_restarts(kubelet, plugin):
    kubelet.registrations.get(timeout=10)
    kubelet.restart()
    assert kubelet.registrations.get(timeout=10).resource_name == "nvidia.com/gpu"


def test_waits_for_a_kubelet_that_is_not_there_yet(plugin, directory):
    kubelet = Kubelet(directory)
    try:
        assert kubelet.registrations.get(timeout=10).endpoint
    finally:
        kubelet.stop()
