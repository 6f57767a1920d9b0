"""The machine that the parts run on, as its driver and Git know it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil

from bench.gpu_results import GpuMachine
from pipeline.hardware import cpu_name, usable_cores
from pipeline.platforms import nvidia_smi

ROOT = Path(__file__).resolve().parents[2]
_GPU_FIELDS = "name,memory.total,driver_version,compute_cap"


def _first_gpu() -> list[str] | None:
    return parse_gpu(nvidia_smi(f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits") or "")


def parse_gpu(text: str) -> list[str] | None:
    """Name, MiB, driver, compute capability of the first line."""
    fields = [value.strip() for value in (text.strip().splitlines() or [""])[0].split(",")]
    return fields if len(fields) == 4 and fields[1].isdigit() else None


def this_machine() -> GpuMachine:
    gpu = _first_gpu()
    return GpuMachine(
        gpu=gpu[0] if gpu else None,
        gpu_memory_bytes=int(gpu[1]) * 2**20 if gpu else None,
        driver=gpu[2] if gpu else None,
        compute_capability=gpu[3] if gpu else None,
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
    )


def commit_of_this_tree() -> str | None:
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
