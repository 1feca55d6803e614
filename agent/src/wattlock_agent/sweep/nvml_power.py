"""The NVIDIA driver with power limits: the only place in Wattlock that writes them."""

from wattlock_agent.gpu.nvml import NvmlDriver
from wattlock_agent.sweep.levers import PowerLimits


class NvmlSweepDriver(NvmlDriver):
    """``SweepDriver`` on NVML. Like its base not thread-safe."""

    def power_limits(self, uuid: str) -> PowerLimits:
        """Return the limit that is set, and the range that the board takes.

        The limit that is *set* and not the enforced one, which may be lower for other reasons and would then be made
        the set one when it is restored.

        Raises:
            GpuError: the GPU does not tell.
        """
        low_mw, high_mw = self._ask(uuid, "nvmlDeviceGetPowerManagementLimitConstraints")
        return PowerLimits(int(self._ask(uuid, "nvmlDeviceGetPowerManagementLimit")), int(low_mw), int(high_mw))

    def set_power_limit(self, uuid: str, limit_mw: int) -> None:
        """Set the power limit in mW; it holds until the driver is unloaded.

        Raises:
            GpuError: nothing was changed.
        """
        self._ask(uuid, "nvmlDeviceSetPowerManagementLimit", limit_mw)
