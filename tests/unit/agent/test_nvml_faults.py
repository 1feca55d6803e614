"""The table of NVML return codes, without a driver."""

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wattlock_agent.gpu.base import GpuFault
from wattlock_agent.gpu.faults import KNOWN_CODES, fault_of, gpu_error

CODES = sorted({code for name, code in vars(pynvml).items() if name.startswith("NVML_ERROR_")})


def test_every_code_of_the_binding_is_in_the_table() -> None:
    assert set(CODES) <= KNOWN_CODES


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (pynvml.NVML_ERROR_UNINITIALIZED, GpuFault.NO_DRIVER),
        (pynvml.NVML_ERROR_INVALID_ARGUMENT, GpuFault.INVALID_ARGUMENT),
        (pynvml.NVML_ERROR_NOT_SUPPORTED, GpuFault.NOT_SUPPORTED),
        (pynvml.NVML_ERROR_NO_PERMISSION, GpuFault.NO_PERMISSION),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, GpuFault.NO_DRIVER),
        (pynvml.NVML_ERROR_TIMEOUT, GpuFault.TRANSIENT),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, GpuFault.NO_DRIVER),
        (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, GpuFault.NOT_SUPPORTED),
        (pynvml.NVML_ERROR_GPU_IS_LOST, GpuFault.GPU_LOST),
        (pynvml.NVML_ERROR_RESET_REQUIRED, GpuFault.GPU_LOST),
        (pynvml.NVML_ERROR_OPERATING_SYSTEM, GpuFault.NO_PERMISSION),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, GpuFault.DRIVER_MISMATCH),
        (pynvml.NVML_ERROR_NOT_READY, GpuFault.TRANSIENT),
        (pynvml.NVML_ERROR_UNKNOWN, GpuFault.TRANSIENT),
    ],
)
def test_a_code_leads_to_what_the_agent_does_about_it(code: int, fault: GpuFault) -> None:
    assert fault_of(code) is fault


@given(st.integers().filter(lambda code: code not in KNOWN_CODES))
def test_a_code_of_a_later_driver_is_tried_again(code: int) -> None:
    assert fault_of(code) is GpuFault.TRANSIENT
    assert str(code) in str(gpu_error(code, "nvmlInit", None))


@pytest.mark.parametrize("code", CODES)
def test_the_message_names_the_call_the_gpu_and_a_remedy(code: int) -> None:
    error = gpu_error(code, "nvmlDeviceGetName", "GPU-1")
    assert str(error).startswith("nvmlDeviceGetName on GPU-1: ")
    assert "; " in str(error)
    assert (error.call, error.uuid, error.fault) == ("nvmlDeviceGetName", "GPU-1", fault_of(code))
