"""What the binding hands over, in forms that the simulated driver does not produce."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from wattlock_agent.gpu import nvml
from wattlock_agent.gpu.base import GpuError, GpuFault
from wattlock_agent.gpu.fields import limiters, supported_clocks

DATA = Path(__file__).parents[2] / "data"


def field(field_id: int, result: int, value_type: int = 3, **values: float) -> Any:
    union = {"dVal": 0.0, "uiVal": 0, "ulVal": 0, "ullVal": 0, "sllVal": 0, "siVal": 0, "usVal": 0} | values
    return SimpleNamespace(fieldId=field_id, nvmlReturn=result, valueType=value_type, value=SimpleNamespace(**union))


def values_of(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> dict[int, int | None]:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetFieldValues", lambda handle, ids: list(answers))
    return nvml.NvmlDriver()._field_values(nvml._Gpu("GPU-1", handle=None), nvml._FIELDS)


def test_a_field_that_the_gpu_lacks_is_absent_and_one_that_stumbles_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = (field(74, 0, ullVal=5), field(269, 3), field(270, 2), field(271, 999), field(79, 10))
    assert values_of(monkeypatch, *answers) == {74: 5, 271: None, 79: None}


@pytest.mark.parametrize(
    ("value_type", "member", "value", "expected"),
    [
        (0, "dVal", 2.5, 2),
        (1, "uiVal", 512_000, 512_000),
        (2, "ulVal", 7, 7),
        (3, "ullVal", 2**64 - 1, 2**64 - 1),
        (4, "sllVal", -1, None),
        (5, "siVal", 9, 9),
        (6, "usVal", 3, 3),
        (77, "ullVal", 3, None),
    ],
)
def test_each_type_of_value_is_read_from_its_own_member(
    monkeypatch: pytest.MonkeyPatch, value_type: int, member: str, value: float, expected: int | None
) -> None:
    assert values_of(monkeypatch, field(186, 0, value_type, **{member: value})) == {186: expected}


@pytest.mark.parametrize(
    ("code", "fault"), [(15, GpuFault.GPU_LOST), (18, GpuFault.DRIVER_MISMATCH), (1, GpuFault.NO_DRIVER)]
)
def test_a_field_can_tell_that_the_gpu_is_gone(monkeypatch: pytest.MonkeyPatch, code: int, fault: GpuFault) -> None:
    with pytest.raises(GpuError) as caught:
        values_of(monkeypatch, field(74, code))
    assert caught.value.fault is fault


def test_the_abandoned_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pynvml, "_nvmlGetFunctionPointer")
    with pytest.raises(GpuError, match="nvidia-ml-py") as caught:
        nvml.NvmlDriver().open()
    assert caught.value.fault is GpuFault.NO_DRIVER


def test_a_function_that_the_binding_lacks_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pynvml, "nvmlDeviceResetGpuLockedClocks")
    with pytest.raises(GpuError) as caught:
        nvml._call("nvmlDeviceResetGpuLockedClocks", "GPU-1", None)
    assert caught.value.fault is GpuFault.NOT_SUPPORTED


def test_a_string_that_the_binding_cannot_decode_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: b"\xff".decode())
    with pytest.raises(GpuError):
        nvml._call("nvmlDeviceGetName", "GPU-1", None)


@pytest.mark.parametrize(("raw", "text"), [(b"NVIDIA H200\0", "NVIDIA H200"), ("NVIDIA\n H200 ", "NVIDIA H200")])
def test_strings_are_text_whatever_the_binding_gives(raw: str | bytes, text: str) -> None:
    assert nvml._text(raw) == text


@pytest.mark.parametrize("product", ["h100", "h200"])
def test_the_recorded_answers_of_real_gpus_give_all_clocks_and_limiters(product: str) -> None:
    answers = json.loads((DATA / f"nvidia-{product}-inventory.json").read_text())
    lists = {int(name.split(".")[1]): tuple(a["ok"]) for name, a in answers.items() if name.startswith("SupportedGr")}
    assert len(lists) == 2
    assert supported_clocks(lists) == tuple(range(345, 1981, 15))
    ids = {
        number: answers[f"Field.NVML_FI_DEV_{name}"]["ok"]
        for number, name in RECORDED_FIELDS.items()
        if "ok" in answers[f"Field.NVML_FI_DEV_{name}"]
    }
    assert None not in vars(limiters(ids)).values()


RECORDED_FIELDS = {
    74: "PERF_POLICY_POWER",
    77: "PERF_POLICY_BOARD_LIMIT",
    79: "PERF_POLICY_RELIABILITY",
    269: "CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN",
    270: "CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN",
    271: "CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN",
}
