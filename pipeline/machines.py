"""Machines that a run can be planned for without being on them.

Figures: Kaggle's documentation (https://www.kaggle.com/docs/notebooks) and what its and Colab's free machines report
of themselves, which both services change without notice; makers' data sheets for a desktop's.
"""

from __future__ import annotations

from pipeline.errors import MedcotError
from pipeline.hardware import GIBIBYTE, Hardware
from pipeline.platforms import COLAB, KAGGLE

_T4_MEMORY = int(14.6 * GIBIBYTE)  # of 16 GB, what CUDA reports as total
# Physical cores: Kaggle lends two, as four processors, free Colab one, as two. They are Google's N1 machines: 2.0 to
# 2.2 GHz Xeons that may lack AVX-512 (https://cloud.google.com/compute/docs/cpu-platforms), so 32 float32 operations a
# cycle at 2.0 GHz, of which a large matrix product reaches four fifths.
_CLOUD_CORE_GFLOPS = 0.8 * 32 * 2.0
# The same of a desktop's core with AVX2 at 4 GHz.
_DESKTOP_CORE_GFLOPS = 0.8 * 32 * 4.0


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
        llama_on_gpu=True,  # both services' images bring CUDA's compiler, so set-up builds llama.cpp with CUDA
        cpu_gflops=cores * _CLOUD_CORE_GFLOPS,
    )


def _desktop(cpu: str, cores: int, ram: float, gpu: str, gpu_memory: float) -> Hardware:
    """Without CUDA's compiler, which a driver does not bring: llama.cpp is built for the CPU."""
    return Hardware(
        cpu=cpu,
        cores=cores,
        memory_bytes=int(ram * GIBIBYTE),
        available_memory_bytes=int((ram - 4) * GIBIBYTE),  # a desktop with a browser
        free_disk_bytes=200 * GIBIBYTE,
        cache_disk_bytes=200 * GIBIBYTE,
        one_disk=True,
        gpu_names=(gpu,),
        gpu_memory_bytes=int((gpu_memory - 0.4) * GIBIBYTE),  # the screen's share
        gpu_capability=(8, 9) if "RTX 40" in gpu else (8, 6),
        platform="Linux x86_64",
        cpu_gflops=cores * _DESKTOP_CORE_GFLOPS,
    )


MACHINES: dict[str, Hardware] = {
    "kaggle-t4": _cloud(KAGGLE.name, 1, "Tesla T4", (7, 5), 29, 2, 19.5, 60),
    "kaggle-t4x2": _cloud(KAGGLE.name, 2, "Tesla T4", (7, 5), 29, 2, 19.5, 60),
    "kaggle-p100": _cloud(KAGGLE.name, 1, "Tesla P100-PCIE-16GB", (6, 0), 29, 2, 19.5, 60),
    "colab-t4": _cloud(COLAB.name, 1, "Tesla T4", (7, 5), 12.7, 1, 70, 70),
    "rtx-3060-12gb": _desktop("AMD Ryzen 5 5600", 6, 32, "NVIDIA GeForce RTX 3060", 12),
    "rtx-4060-8gb": _desktop("Intel(R) Core(TM) i5-12400F", 6, 16, "NVIDIA GeForce RTX 4060", 8),
}


def machine_named(name: str) -> Hardware:
    try:
        return MACHINES[name]
    except KeyError:
        raise MedcotError(f"There is no machine '{name}' to plan for: {', '.join(MACHINES)}.") from None
