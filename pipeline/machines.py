"""Machines that a run can be planned for without being on them, and the quotas of those that have some.

Figures: Kaggle's documentation (https://www.kaggle.com/docs/notebooks) and what its and Colab's free machines report
of themselves; both services change them without notice.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import MedcotError
from pipeline.hardware import GIBIBYTE, Hardware

_T4_MEMORY = int(14.6 * GIBIBYTE)  # of 16 GB, what CUDA reports as total


@dataclass(frozen=True)
class Quota:
    """What a service takes away: hours until the session ends, and the sentence that says so."""

    session_hours: float
    note: str


_KAGGLE = Quota(12, "Kaggle ends a session after 12 hours and keeps 19.5 GiB of /kaggle/working")
_COLAB = Quota(12, "free Colab ends a session after at most 12 hours, often earlier, and keeps nothing")


def _cloud(
    platform: str, gpus: int, gpu: str, capability: tuple[int, int], ram: float, cores: int, disk: float, cache: float
) -> Hardware:
    return Hardware(
        cpu="Intel(R) Xeon(R) CPU @ 2.00GHz",
        cores=cores,
        memory_bytes=int(ram * GIBIBYTE),
        available_memory_bytes=int((ram - 1.2) * GIBIBYTE),  # the notebook server and the system
        free_disk_bytes=int(disk * GIBIBYTE),
        cache_disk_bytes=int(cache * GIBIBYTE),
        one_disk=platform == "Colab",
        gpu_names=(gpu,) * gpus,
        gpu_memory_bytes=_T4_MEMORY if gpu == "Tesla T4" else 16 * GIBIBYTE,
        gpu_capability=capability,
        platform=platform,
    )


MACHINES: dict[str, Hardware] = {
    "kaggle-t4": _cloud("Kaggle", 1, "Tesla T4", (7, 5), 29, 2, 19.5, 60),
    "kaggle-t4x2": _cloud("Kaggle", 2, "Tesla T4", (7, 5), 29, 2, 19.5, 60),
    "kaggle-p100": _cloud("Kaggle", 1, "Tesla P100-PCIE-16GB", (6, 0), 29, 2, 19.5, 60),
    "colab-t4": _cloud("Colab", 1, "Tesla T4", (7, 5), 12.7, 1, 70, 70),
}


def machine_named(name: str) -> Hardware:
    try:
        return MACHINES[name]
    except KeyError:
        raise MedcotError(f"There is no machine '{name}' to plan for: {', '.join(MACHINES)}.") from None


def quota(platform: str) -> Quota | None:
    return {"Kaggle": _KAGGLE, "Colab": _COLAB}.get(platform)
