"""Whether a pool is limited by memory bandwidth or by arithmetic: the roofline model.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model", CACM 52(4), 2009: a kernel of I FLOP
per byte can reach at most min(peak, I * bandwidth), so it is memory-bound below the ridge peak / bandwidth. I comes
from the engines' own estimate of their work, peak and bandwidth from NVIDIA's data sheets.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wattlock_api.base import decimal_string
from wattlock_api.constants import RooflineVerdict
from wattlock_api.policystatus import Roofline

from wattlock_operator.reports import NodeGpu, NodeInstance, number


@dataclass(frozen=True)
class Peak:
    """Data-sheet numbers of a GPU product."""

    teraflops: float
    """Dense BF16 tensor-core peak in TFLOP/s. Data sheets print twice that for Hopper: with sparsity."""
    terabytes_per_second: float
    """Memory bandwidth in TB/s."""

    @property
    def ridge(self) -> float:
        """FLOP per byte at which the GPU turns from memory-bound to compute-bound."""
        return self.teraflops / self.terabytes_per_second


#: By product as NVML names it. NVIDIA's data sheets, under nvidia.com/en-us/data-center/: h200 (SXM 1,979 TFLOPS with
#: sparsity, NVL 1,671; 4.8 TB/s), h100 (SXM 1,979, 3.35 TB/s; NVL 1,671, 3.9 TB/s; PCIe, 2022: 1,513, 2 TB/s), a100
#: (312 dense; 80 GB SXM 2,039 GB/s, 80 GB PCIe 1,935 GB/s, 40 GB 1,555 GB/s). For the H200 SXM arXiv 2605.11999 names
#: the same ridge, about 206 FLOP/byte.
PEAKS: Mapping[str, Peak] = {
    "NVIDIA H200": Peak(989.5, 4.8),
    "NVIDIA H200 NVL": Peak(835.5, 4.8),
    "NVIDIA H100 80GB HBM3": Peak(989.5, 3.35),
    "NVIDIA H100 NVL": Peak(835.5, 3.9),
    "NVIDIA H100 PCIe": Peak(756.5, 2.0),
    "NVIDIA A100-SXM4-80GB": Peak(312.0, 2.039),
    "NVIDIA A100 80GB PCIe": Peak(312.0, 1.935),
    "NVIDIA A100-SXM4-40GB": Peak(312.0, 1.555),
    "NVIDIA A100-PCIE-40GB": Peak(312.0, 1.555),
}


def find_roofline(gpus: Iterable[NodeGpu], instances: Sequence[NodeInstance]) -> Roofline | None:
    """Return the arithmetic intensity of a pool and what it means; None where no engine estimates its work.

    Operations and bytes are summed over GPUs before they are divided: an instance counts by its work.
    """
    gpus = tuple(gpus)
    held = Counter(entry.gpu.instance for entry in gpus)
    flops = moved = 0.0
    for item in instances:
        each = item.instance
        if each.estimated_gigaflops is not None and each.estimated_gigabytes is not None:
            flops += number(each.estimated_gigaflops) * max(1, held[each.instance])
            moved += number(each.estimated_gigabytes) * max(1, held[each.instance])
    if flops <= 0 or moved <= 0:
        return None
    return judge(min(flops / moved, 1e9), frozenset(entry.gpu.product for entry in gpus))


def judge(intensity: float, products: frozenset[str]) -> Roofline:
    """Return the verdict on an intensity in FLOP per byte, for GPUs of these products."""
    said = f"{intensity:.1f} FLOP/byte"
    unknown = sorted(product for product in products if product not in PEAKS)
    ridges = sorted(PEAKS[product].ridge for product in products if product in PEAKS)
    ridge: float | None = ridges[0] if ridges and not unknown else None
    if ridge is None:
        verdict = RooflineVerdict.UNKNOWN
        names = ", ".join(name or "not told yet" for name in unknown[:3]) or "not told yet"
        message = f"{said}; peak and bandwidth of the GPU are not known here ({names})"
    elif intensity < ridge:
        verdict = RooflineVerdict.MEMORY_BOUND
        message = f"{said}, below the ridge of {ridge:.0f}: memory bandwidth limits the pool, not the SM clock"
    elif intensity >= ridges[-1]:
        verdict = RooflineVerdict.COMPUTE_BOUND
        message = (
            f"{said}, not below the ridge of {ridges[-1]:.0f} (dense BF16; FP8 has twice that): arithmetic limits the "
            "pool, and a lower SM clock slows it"
        )
    else:
        verdict = RooflineVerdict.UNKNOWN
        message = f"{said}, between the ridges of the pool's GPUs ({ridge:.0f} and {ridges[-1]:.0f})"
    return Roofline(
        arithmetic_intensity=decimal_string(intensity, 2),
        ridge=None if ridge is None else decimal_string(ridge, 1),
        verdict=verdict,
        message=message[:1024],
    )
