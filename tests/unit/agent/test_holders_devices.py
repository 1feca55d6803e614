"""Reading of the kubelet's device ids: every known form, and never a guess."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_agent.gpu.base import GpuIdentity
from wattlock_agent.holders.base import Holders, PodName
from wattlock_agent.holders.devices import DeviceClaim, find_holders

A = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
B = "GPU-bbbbbbbb-0000-0000-0000-000000000000"
DECODE = PodName("llm", "decode-0")
OTHER = PodName("llm", "decode-1")


def gpu(uuid: str, index: int, minor: int | None, mig: bool = False) -> GpuIdentity:
    return GpuIdentity(uuid, index, minor, "NVIDIA H200", (345, 1980), mig, virtual=False)


# Index and minor differ on purpose: the kernel numbers device files in another order than NVML.
GPUS = (gpu(A, 0, 1), gpu(B, 1, 0))


def claim(*ids: str, pod: PodName = DECODE, resource: str = "nvidia.com/gpu") -> DeviceClaim:
    return DeviceClaim(pod, resource, ids)


@pytest.mark.parametrize(
    ("device_id", "uuid", "shared"),
    [
        (A, A, False),
        (f"{A}::0", A, True),
        (f"{A}::11", A, True),
        (f"MIG-{A}/7/0", A, True),
        ("nvidia0", B, False),
        ("nvidia1", A, False),
        ("nvidia0/gi1", B, True),
        ("nvidia0/vgpu3", B, True),
        ("nvidia0/gi1/vgpu0", B, True),
        ("0", A, False),
        ("1", B, False),
        ("0::2", A, True),
        ("1:0", B, True),
    ],
)
def test_a_known_form_names_its_gpu(device_id: str, uuid: str, shared: bool) -> None:
    assert find_holders([claim(device_id)], GPUS) == Holders({uuid: (DECODE,)}, frozenset({uuid} if shared else ()), {})


@pytest.mark.parametrize(
    "device_id",
    [
        "GPU-cccccccc-0000-0000-0000-000000000000",
        f"{A}::",
        f"{A}::x",
        f"{A}::1::2",
        f"{A} ",
        A.lower(),
        A[:-1],
        "MIG-cccccccc-0000-0000-0000-000000000000",
        "MIG-GPU-cccccccc/1/0",
        "nvidia9",
        "nvidia0/",
        "nvidia0/gi",
        "nvidia-0",
        "7",
        "-1",
        "٠",
        "",
        "gpu-0",
    ],
)
def test_any_other_id_is_unknown_and_attributed_to_nothing(device_id: str) -> None:
    assert find_holders([claim(device_id)], GPUS) == Holders({}, frozenset(), {DECODE: (device_id,)})


def test_a_device_file_is_unknown_where_the_minor_number_is() -> None:
    holders = find_holders([claim("nvidia0")], (gpu(A, 0, None),))
    assert holders.pods == {}
    assert holders.unknown == {DECODE: ("nvidia0",)}


def test_all_entries_of_all_containers_are_collected() -> None:
    # The kubelet of 1.36 lists two GPUs of one container as two entries of the same resource.
    holders = find_holders([claim(A), claim(B), claim(A, pod=OTHER)], GPUS)
    assert holders.pods == {A: (DECODE, OTHER), B: (DECODE,)}
    assert holders.shared == frozenset()


def test_a_pod_with_two_shares_of_one_gpu_holds_it_once_and_shared() -> None:
    holders = find_holders([claim(f"{A}::0", f"{A}::1")], GPUS)
    assert holders.pods == {A: (DECODE,)}
    assert holders.shared == {A}


@pytest.mark.parametrize("resource", ["nvidia.com/gpu.shared", "nvidia.com/mig-1g.10gb"])
def test_the_resource_name_alone_can_tell_of_sharing(resource: str) -> None:
    assert find_holders([claim(A, resource=resource)], GPUS).shared == {A}


def test_a_gpu_in_mig_mode_is_shared_whoever_holds_it() -> None:
    gpus = (gpu(A, 0, 0, mig=True), gpu(B, 1, 1))
    mig = "MIG-12345678-0000-0000-0000-000000000000"
    holders = find_holders([claim(mig, resource="nvidia.com/mig-1g.10gb"), claim(B, pod=OTHER)], gpus)
    assert holders == Holders({B: (OTHER,)}, frozenset({A}), {DECODE: (mig,)})


def test_devices_that_are_no_gpus_are_left_out() -> None:
    claims = [claim("0", resource="nvidia.com/hostdev"), claim("card0", resource="amd.com/gpu"), claim(resource="x/y")]
    assert find_holders(claims, GPUS) == Holders({}, frozenset(), {})


def test_a_renamed_resource_still_holds_the_gpu_that_its_uuid_names() -> None:
    assert find_holders([claim(A, resource="nvidia.com/h200")], GPUS).pods == {A: (DECODE,)}
    lost = "GPU-cccccccc-0000-0000-0000-000000000000"
    assert find_holders([claim(lost, resource="nvidia.com/h200")], GPUS).unknown == {DECODE: (lost,)}


IDS = st.one_of(
    st.sampled_from([A, B, f"{A}::0", "nvidia0", "nvidia1/gi0", "0", "1::1", "MIG-x", "nvidia7"]), st.text(max_size=50)
)
CLAIMS = st.lists(
    st.builds(
        DeviceClaim,
        st.sampled_from([DECODE, OTHER]),
        st.sampled_from(["nvidia.com/gpu", "nvidia.com/gpu.shared", "nvidia.com/mig-x"]),
        st.lists(IDS, max_size=4).map(tuple),
    ),
    max_size=6,
)


@given(CLAIMS)
def test_every_gpu_device_is_held_or_unknown_and_the_order_does_not_matter(claims: list[DeviceClaim]) -> None:
    holders = find_holders(claims, GPUS)
    assert holders == find_holders(reversed(claims), GPUS)
    assert set(holders.pods) <= {A, B}
    for each in claims:
        for device_id in each.device_ids:
            held = any(each.pod in pods for pods in holders.pods.values())
            assert held or device_id in holders.unknown[each.pod]
