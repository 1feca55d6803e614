"""Memory-bound or compute-bound: the ridge of each GPU, and what is said without one."""

import pytest
from operator_worlds import gpu, instance
from wattlock_operator.reports import NodeGpu, NodeInstance
from wattlock_operator.roofline import PEAKS, find_roofline, judge

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def held(name, product=H200, count=1):
    return [NodeGpu("n1", gpu(index, name, product=product, instance=name), False) for index in range(count)]


def working(name, gigaflops, gigabytes):
    entry = instance(name, estimated_gigaflops=gigaflops, estimated_gigabytes=gigabytes)
    return NodeInstance("n1", entry, False)


def verdict(intensity, *products):
    found = judge(intensity, frozenset(products))
    return found.verdict.value, found.ridge


def test_the_ridge_of_an_h200_is_what_the_paper_says():
    assert PEAKS[H200].ridge == pytest.approx(206, abs=0.5)


def test_the_ridge_parts_memory_bound_from_compute_bound():
    assert verdict(2.8, H200) == ("MemoryBound", "206.1")
    assert verdict(206.0, H200) == ("MemoryBound", "206.1")
    assert verdict(206.2, H200) == ("ComputeBound", "206.1")
    assert verdict(250, H100) == ("MemoryBound", "295.4")


def test_a_gpu_without_data_sheet_numbers_gets_the_intensity_and_no_verdict():
    found = judge(12.346, frozenset({"NVIDIA GB300"}))
    assert (found.verdict.value, found.ridge, found.arithmetic_intensity) == ("Unknown", None, "12.35")
    assert "NVIDIA GB300" in found.message
    assert verdict(12.3) == ("Unknown", None)
    assert verdict(12.3, H200, "NVIDIA GB300") == ("Unknown", None)


def test_a_pool_of_different_gpus_is_judged_only_where_they_agree():
    assert verdict(100, H100, H200)[0] == "MemoryBound"
    assert verdict(250, H100, H200)[0] == "Unknown"
    assert verdict(300, H100, H200)[0] == "ComputeBound"


def test_operations_and_bytes_are_summed_before_they_are_divided():
    gpus = [*held("d0", count=3), *held("d1")]
    found = find_roofline(gpus, [working("d0", "100", "10"), working("d1", "5000", "10")])
    assert float(found.arithmetic_intensity) == pytest.approx((3 * 100 + 5000) / (3 * 10 + 10))


def test_the_recorded_engine_is_memory_bound():
    # Rates of the two recorded vLLM pages: 18.426 GFLOP and 6.617 GB in 5.0217 s (tests/data).
    found = find_roofline(held("d0"), [working("d0", "3.669283", "1.317743")])
    assert (found.arithmetic_intensity, found.verdict.value) == ("2.78", "MemoryBound")


@pytest.mark.parametrize("work", [(None, None), ("0", "0"), ("5", "0"), ("5", None)])
def test_without_an_estimate_nothing_is_said(work):
    assert find_roofline(held("d0"), [working("d0", *work)]) is None
    assert find_roofline([], []) is None


def test_absurd_estimates_still_fit_into_the_status():
    assert find_roofline(held("d0"), [working("d0", "999999999999", "0.000001")]).verdict.value == "ComputeBound"
