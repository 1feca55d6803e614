"""The kubelet client against a real gRPC server on a unix socket."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.base import KubeletError, PodName
from wattlock_agent.holders.devices import DeviceClaim
from wattlock_agent.holders.podresources import LIST_METHOD, MAX_MESSAGE_BYTES, PodResources
from wattlock_agent.holders.podresources_pb2 import ListPodResourcesResponse

ROOT = Path(__file__).parents[3]
GPU = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
GPUS = (GpuIdentity(GPU, 0, 0, "NVIDIA H200", (345, 1980), mig_enabled=False, virtual=False),)
DECODE = PodName("llm", "decode-0")

Handler = Callable[[bytes, grpc.ServicerContext], bytes]

# What a kubelet sends, byte by byte, so that a wrong field number of ours cannot agree with itself: pod "decode-0" in
# "llm", container "vllm", two entries of nvidia.com/gpu; fields that we do not read (topology, cpu_ids) between.
RECORDED = bytes.fromhex(
    "0a5c" "0a08" + b"decode-0".hex() + "1203" + b"llm".hex() + "1a4b" "0a04" + b"vllm".hex() +
    "121e" "0a0e" + b"nvidia.com/gpu".hex() + "1204" + b"0::1".hex() + "1a06" "0a04" "08ffff03"
    "1215" "0a0e" + b"nvidia.com/gpu".hex() + "1203" + b"abc".hex() +
    "1a0c" + "0102030405060708090a0b0c"
)  # fmt: skip


@contextmanager
def kubelet(socket: Path, handler: Handler) -> Iterator[None]:
    server = grpc.server(ThreadPoolExecutor(2))
    method = grpc.unary_unary_rpc_method_handler(handler)
    service, name = LIST_METHOD.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: method}),))
    server.add_insecure_port(f"unix://{socket}")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


def answers(content: bytes) -> Handler:
    return lambda request, context: content


def fails(code: grpc.StatusCode) -> Handler:
    def handler(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(code, "because")
        raise AssertionError("abort does not return")

    return handler


@pytest.fixture
def client(tmp_path: Path) -> Iterator[PodResources]:
    client = PodResources(tmp_path / "kubelet.sock", timeout_seconds=1.0)
    yield client
    client.close()


def page(device_id: str) -> bytes:
    return ListPodResourcesResponse(
        pod_resources=[
            {
                "name": "decode-0",
                "namespace": "llm",
                "containers": [
                    {"name": "c", "devices": [{"resource_name": "nvidia.com/gpu", "device_ids": [device_id]}]}
                ],
            }
        ]
    ).SerializeToString()


def test_what_the_kubelet_sends_on_the_wire_is_understood(client: PodResources, tmp_path: Path) -> None:
    with kubelet(tmp_path / "kubelet.sock", answers(RECORDED)):
        assert client.claims() == [
            DeviceClaim(DECODE, "nvidia.com/gpu", ("0::1",)),
            DeviceClaim(DECODE, "nvidia.com/gpu", ("abc",)),
        ]


def test_holders_are_found_and_the_request_is_empty(client: PodResources, tmp_path: Path) -> None:
    requests = []

    def handler(request: bytes, context: grpc.ServicerContext) -> bytes:
        requests.append(request)
        return page(GPU)

    with kubelet(tmp_path / "kubelet.sock", handler):
        assert client.holders(GPUS).pods == {GPU: (DECODE,)}
        assert client.holders(()).unknown == {DECODE: (GPU,)}
    assert requests == [b"", b""]


def test_a_node_without_pods_has_no_holders(client: PodResources, tmp_path: Path) -> None:
    with kubelet(tmp_path / "kubelet.sock", answers(b"")):
        assert client.holders(GPUS).pods == {}


def test_a_restarted_kubelet_is_found_again_by_its_path(client: PodResources, tmp_path: Path) -> None:
    path = tmp_path / "kubelet.sock"
    with pytest.raises(KubeletError):
        client.claims()
    with kubelet(path, answers(page(GPU))):
        assert client.holders(GPUS).pods == {GPU: (DECODE,)}
    path.unlink(missing_ok=True)
    started = time.monotonic()
    for _ in range(20):  # as many failures as would drive gRPC's own back-off to its greatest
        with pytest.raises(KubeletError):
            client.claims()
    with kubelet(path, answers(page("0"))):
        found = None
        while found is None and time.monotonic() - started < 2:
            with suppress(KubeletError):  # gRPC may still be at an attempt of before
                found = client.holders(GPUS)
    assert found is not None
    assert found.pods == {GPU: (DECODE,)}


def test_no_kubelet_says_what_to_mount(client: PodResources, tmp_path: Path) -> None:
    with pytest.raises(KubeletError, match="mount the host's directory") as caught:
        client.claims()
    assert str(tmp_path / "kubelet.sock") in str(caught.value)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "limits the rate"),
        (grpc.StatusCode.UNIMPLEMENTED, "older than"),
        (grpc.StatusCode.PERMISSION_DENIED, "uid 0"),
        (grpc.StatusCode.INTERNAL, "kubelet's log"),
    ],
)
def test_refusals_of_the_kubelet_are_explained(
    client: PodResources, tmp_path: Path, code: grpc.StatusCode, remedy: str
) -> None:
    with kubelet(tmp_path / "kubelet.sock", fails(code)), pytest.raises(KubeletError, match=remedy) as caught:
        client.claims()
    assert "because" in str(caught.value)


def test_a_kubelet_that_hangs_is_left_at_the_time_out(tmp_path: Path) -> None:
    client = PodResources(tmp_path / "kubelet.sock", timeout_seconds=0.2)

    def hang(request: bytes, context: grpc.ServicerContext) -> bytes:
        while context.is_active():
            time.sleep(0.01)
        return b""

    with kubelet(tmp_path / "kubelet.sock", hang), pytest.raises(KubeletError, match="overloaded"):
        client.claims()
    client.close()


def test_an_answer_that_is_no_list_is_refused(client: PodResources, tmp_path: Path) -> None:
    with kubelet(tmp_path / "kubelet.sock", answers(b"\xff\xff\xff")), pytest.raises(KubeletError, match="no PodRes"):
        client.claims()


def test_an_answer_beyond_the_bound_is_refused(client: PodResources, tmp_path: Path) -> None:
    with (
        kubelet(tmp_path / "kubelet.sock", answers(b"\0" * (MAX_MESSAGE_BYTES + 1))),
        pytest.raises(KubeletError, match="16 MiB"),
    ):
        client.claims()


def test_another_program_on_the_socket_is_an_error(client: PodResources, tmp_path: Path) -> None:
    (tmp_path / "kubelet.sock").write_text("not a socket")
    with pytest.raises(KubeletError):
        client.claims()


def test_the_generated_modules_are_up_to_date() -> None:
    program = [sys.executable, str(ROOT / "agent" / "generate_protos.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
