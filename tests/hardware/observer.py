"""Reads the power of one GPU every 20 ms, independently of the agent: no code of the agent runs here.

Appends "seconds since boot, instantaneous mW, averaged mW, energy mJ, SM MHz, event reasons" to a CSV file until
SIGTERM. The energy column is read once a second only: that call costs 4 ms.
usage: observer.py UUID FILE
"""

import csv
import signal
import sys
import time
from pathlib import Path

import pynvml
from readonly import give_up_capabilities, guard

PERIOD_SECONDS = 0.02
_ENERGY_PERIOD_SECONDS = 1.0
_POWER_INSTANT_FIELD = 186
_GPU_SCOPE = 0
_SM = 1


def main(uuid: str, path: Path) -> int:
    """Sample until SIGTERM."""
    stop = False

    def end(*_: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, end)
    guard(pynvml)
    give_up_capabilities()
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    due = energy_due = time.clock_gettime(time.CLOCK_BOOTTIME)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("t", "instant_mw", "average_mw", "energy_mj", "sm_mhz", "reasons"))
        while not stop:
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            power = pynvml.nvmlDeviceGetFieldValues(handle, [(_POWER_INSTANT_FIELD, _GPU_SCOPE)])[0]
            instant = power.value.uiVal if power.nvmlReturn == 0 else ""
            average = pynvml.nvmlDeviceGetPowerUsage(handle)
            clock = pynvml.nvmlDeviceGetClockInfo(handle, _SM)
            reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            energy: object = ""
            if now >= energy_due:
                energy_due = now + _ENERGY_PERIOD_SECONDS
                energy = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            rows.writerow((f"{now:.4f}", instant, average, energy, clock, reasons))
            due = max(due + PERIOD_SECONDS, time.clock_gettime(time.CLOCK_BOOTTIME))
            time.sleep(max(0.0, due - time.clock_gettime(time.CLOCK_BOOTTIME)))
    pynvml.nvmlShutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
