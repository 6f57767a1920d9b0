"""Joules that work took, where the system counts them: the processor's by RAPL, NVIDIA's GPUs by NVML.

https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")
_NVML_LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class EnergyMeter:
    """``joules()`` is a counter, of which differences mean something; None where there is none, ``source`` says why."""

    source: str
    joules: Callable[[], float] | None

    def of(self, work: Callable[[], object]) -> float | None:
        """Joules while ``work`` ran, those of whatever else ran included."""
        if self.joules is None:
            return None
        before = self.joules()
        work()
        used = self.joules() - before
        return used if used > 0 else None  # a counter that ran over


def energy_meter(*, on_gpu: bool, powercap: Path = _POWERCAP) -> EnergyMeter:
    return _gpu_meter() if on_gpu else _processor_meter(powercap)


def gpu_memory_used() -> int | None:
    """Bytes of the first GPU that are in use by all processes; None without NVIDIA's driver."""
    device = _first_gpu()
    if device is None:
        return None
    library, handle = device
    memory = (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
    return int(memory[2]) if library.nvmlDeviceGetMemoryInfo(handle, memory) == 0 else None


def _processor_meter(powercap: Path) -> EnergyMeter:
    # intel-rapl:0 is a package; intel-rapl:0:0, a part of it, would be counted twice. AMD's has the same name.
    counters = sorted(powercap.glob("intel-rapl:[0-9]/energy_uj"))
    if not counters:
        return EnergyMeter(
            f"not measured: this system shows no energy counter of its processor (no RAPL in {powercap})", None
        )

    def joules() -> float:
        return sum(int(counter.read_text()) for counter in counters) / 1e6

    try:
        joules()
    except OSError as error:
        return EnergyMeter(f"not measured: {error.filename} may be read by root only", None)
    return EnergyMeter(f"RAPL, {len(counters)} processor package(s), all that ran meanwhile included", joules)


def _gpu_meter() -> EnergyMeter:
    device = _first_gpu()
    if device is None:
        return EnergyMeter(f"not measured: NVIDIA's {_NVML_LIBRARY} is not here", None)
    library, handle = device
    millijoules = ctypes.c_ulonglong()

    def read() -> int:
        status: int = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return status

    if read() != 0:
        return EnergyMeter("not measured: this GPU counts no energy (NVIDIA's do from Volta on)", None)

    def joules() -> float:
        read()
        return millijoules.value / 1e3

    return EnergyMeter("NVML, the whole first GPU", joules)


def _first_gpu() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    try:
        library = ctypes.CDLL(_NVML_LIBRARY)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) != 0:
        return None
    return library, handle
