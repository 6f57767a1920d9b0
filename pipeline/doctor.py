"""``medcot doctor``: what this machine has, what is missing, and the command that fixes it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.base_model import cache_dir
from pipeline.hardware import GIBIBYTE, compute_dtype, detect

TRAINING_PACKAGES = ("torch", "unsloth", "transformers", "trl", "peft", "bitsandbytes", "datasets", "gguf")
CHAT_PACKAGES = ("llama-cpp-python", "jinja2", "rich")
_LLAMA_PROBE = "import llama_cpp; llama_cpp.llama_backend_init(); print(llama_cpp.llama_print_system_info().decode())"


class Finding(BaseModel):
    """One line of the examination; ``problem`` says what is wrong and ``fix`` which command mends it."""

    model_config = ConfigDict(frozen=True)
    name: str
    value: str
    problem: str | None = None
    fix: str | None = None


def examine() -> list[Finding]:
    hardware = detect(Path.cwd())
    dtype = compute_dtype("auto", hardware)
    gpu = ", ".join(hardware.gpu_names) or "none: training uses the CPU (small models only)"
    findings = [
        Finding(name="platform", value=f"{hardware.platform}, Python {sys.version.split()[0]}"),
        Finding(name="processor", value=f"{hardware.cpu}, {hardware.cores} cores"),
        Finding(
            name="memory",
            value=f"{hardware.memory_bytes / GIBIBYTE:.1f} GiB, {hardware.available_memory_bytes / GIBIBYTE:.1f} free",
        ),
        Finding(name="disk", value=f"{hardware.free_disk_bytes / GIBIBYTE:.1f} GiB free in {Path.cwd()}"),
        Finding(name="GPU", value=gpu),
        Finding(name="computation", value=f"{dtype.value}: {dtype.reason}"),
        Finding(name="cache", value=str(cache_dir())),
    ]
    requirements = "requirements-gpu.txt" if hardware.gpu_names else "requirements-cpu.txt"
    no_deps = "" if hardware.gpu_names else "--no-deps "
    findings += [_package(name, f"pip install {no_deps}-r {requirements}") for name in TRAINING_PACKAGES]
    findings += [_package(name, "pip install -r requirements-chat.txt") for name in CHAT_PACKAGES]
    findings.append(_llama_cpp())
    return findings


def print_findings(findings: list[Finding]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for finding in findings:
        mark = "[red]missing[/red]" if finding.problem else "[green]ok[/green]     "
        console.print(f"{mark} {finding.name:18}", end="")
        console.print(finding.value, markup=False, soft_wrap=True)
        if finding.problem:
            console.print(f"        {finding.problem}. Fix: {finding.fix}", markup=False, soft_wrap=True)


def _package(name: str, fix: str) -> Finding:
    try:
        return Finding(name=name, value=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, value="-", problem=f"{name} is not installed", fix=fix)


def _llama_cpp() -> Finding:
    """Whether the compiled library loads on this processor, asked in a child process: a wrong build kills it."""
    outcome = subprocess.run([sys.executable, "-c", _LLAMA_PROBE], capture_output=True, text=True, check=False)
    if outcome.returncode == 0:
        return Finding(name="llama.cpp build", value=outcome.stdout.strip().rstrip("| "))
    return Finding(
        name="llama.cpp build",
        value="-",
        problem=f"llama-cpp-python does not load (exit status {outcome.returncode})",
        fix="pip install --no-deps --force-reinstall --no-cache-dir llama-cpp-python",
    )
