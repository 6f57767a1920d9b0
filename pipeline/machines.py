"""Machines that a run can be planned for without being on them.

Figures: Kaggle's documentation (https://www.kaggle.com/docs/notebooks) and what its and Colab's free machines report
of themselves; both services change them without notice.
"""

from __future__ import annotations

from pipeline.errors import MedcotError
from pipeline.hardware import GIBIBYTE, Hardware
from pipeline.platforms import COLAB, KAGGLE

_T4_MEMORY = int(14.6 * GIBIBYTE)  # of 16 GB, what CUDA reports as total


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
        one_disk=platform == COLAB.name,
        gpu_names=(gpu,) * gpus,
        gpu_memory_bytes=_T4_MEMORY if gpu == "Tesla T4" else 16 * GIBIBYTE,
        gpu_capability=capability,
        platform=platform,
    )


MACHINES: dict[str, Hardware] = {
    "kaggle-t4": _cloud(KAGGLE.name, 1, "Tesla T4", (7, 5), 29, 2, 19.5, 60),
    "kaggle-t4x2": _cloud(KAGGLE.name, 2, "Tesla T4", (7, 5), 29, 2, 19.5, 60),
    "kaggle-p100": _cloud(KAGGLE.name, 1, "Tesla P100-PCIE-16GB", (6, 0), 29, 2, 19.5, 60),
    "colab-t4": _cloud(COLAB.name, 1, "Tesla T4", (7, 5), 12.7, 1, 70, 70),
}


def machine_named(name: str) -> Hardware:
    try:
        return MACHINES[name]
    except KeyError:
        raise MedcotError(f"There is no machine '{name}' to plan for: {', '.join(MACHINES)}.") from None
