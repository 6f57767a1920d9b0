"""What this machine has, and what follows from it: each choice comes with its reason."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline import platforms
from pipeline.llama_background import will_offload

MEBIBYTE = 2**20
GIBIBYTE = 2**30


@dataclass(frozen=True)
class Choice:
    """A setting that was left to the program, and why it is what it is."""

    value: str
    reason: str


@dataclass(frozen=True)
class Hardware:
    """Sizes in bytes; ``gpu_names`` is empty on a machine without a usable GPU.

    ``free_disk_bytes`` is what is free for the run, ``cache_disk_bytes`` what is free for downloads; ``one_disk``
    says that both are the same space; ``gpu_architectures`` are those that the installed PyTorch has kernels for, such
    as sm_75 (empty where that is not known). ``llama_on_gpu``: the installed llama-cpp-python computes on the GPU.
    ``cpu_gflops`` is the CPU's float32 matrix product on a machine that is planned for from elsewhere; on this one it
    is measured.
    """

    cpu: str
    cores: int
    memory_bytes: int
    available_memory_bytes: int
    free_disk_bytes: int
    cache_disk_bytes: int
    one_disk: bool
    gpu_names: tuple[str, ...]
    gpu_memory_bytes: int
    gpu_capability: tuple[int, int] | None
    platform: str
    gpu_architectures: tuple[str, ...] = ()
    llama_on_gpu: bool = False
    cpu_gflops: float | None = None

    @property
    def device(self) -> str:
        return "cuda" if self.gpu_names else "cpu"


def detect(folder: Path, cache: Path | None = None) -> Hardware:
    """Look at this machine; ``folder`` is where the run will write, ``cache`` where downloads go (default: home).

    Of folders that do not exist yet the nearest existing parent is measured.
    """
    run_disk, cache_disk = _existing(folder), _existing(cache or Path.home())
    memory = psutil.virtual_memory()
    names: tuple[str, ...] = ()
    gpu_memory = 0
    capability = None
    architectures: tuple[str, ...] = ()
    if may_have_gpu():
        import torch

        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            names = tuple(torch.cuda.get_device_name(index) for index in range(count))
            gpu_memory = torch.cuda.get_device_properties(0).total_memory
            capability = torch.cuda.get_device_capability(0)
            architectures = tuple(torch.cuda.get_arch_list())
    return Hardware(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_bytes=memory.total,
        available_memory_bytes=memory.available,
        free_disk_bytes=shutil.disk_usage(run_disk).free,
        cache_disk_bytes=shutil.disk_usage(cache_disk).free,
        one_disk=run_disk.stat().st_dev == cache_disk.stat().st_dev,
        gpu_names=names,
        gpu_memory_bytes=gpu_memory,
        gpu_capability=capability,
        platform=platforms.here().name,
        gpu_architectures=architectures,
        llama_on_gpu=bool(names) and will_offload(),
    )


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def usable_cores() -> int:
    """Physical cores that this process may run on: a second thread on a core slows llama.cpp down."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def compute_dtype(requested: str, hardware: Hardware) -> Choice:
    """The computation type of training: as configured, or what the hardware does natively."""
    if requested != "auto":
        return Choice(requested, "set by model.dtype")
    if hardware.device == "cpu":
        flags = _cpu_flags()
        native = flags & {"amx_bf16", "avx512_bf16", "bf16"}
        if native:
            return Choice("bfloat16", f"this CPU multiplies bfloat16 natively ({', '.join(sorted(native))})")
        return Choice("float32", "this CPU would emulate 16-bit arithmetic")
    if hardware.gpu_capability is not None and hardware.gpu_capability >= (8, 0):
        return Choice("bfloat16", f"{hardware.gpu_names[0]} has bfloat16 (compute capability >= 8.0)")
    return Choice("float16", f"{hardware.gpu_names[0]} has no bfloat16 (compute capability below 8.0)")


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a PyTorch built for these architectures computes on such a GPU; True where they are not known.

    Machine code (sm_75) runs on its own major version from its minor version on, portable code (compute_90) on
    everything newer: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#application-compatibility
    """
    if not architectures:
        return True
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = "".join(filter(str.isdigit, number))
        if not digits:
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and built <= capability:
            return True
        if kind == "sm" and built[0] == capability[0] and built <= capability:
            return True
    return False


def may_have_gpu() -> bool:
    """Whether there is a driver; importing torch takes seconds, so it is only asked where there is."""
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists() or bool(shutil.which("nvidia-smi"))


def hide_gpu() -> None:
    """Called before a library looks for one: this process and its children compute on the CPU, in 32 bit.

    A CUDA build of llama.cpp takes a GPU's memory and computes prompts there in 16 bit even with no layer on it, and
    transformers puts a base that is stored in 4 bit on a GPU unasked.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":", 1)[0].strip().lower() in ("flags", "features"):
                return set(line.split(":", 1)[1].lower().split())
    except OSError:
        pass
    return set()
