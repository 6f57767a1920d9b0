"""``medcot doctor``: what this machine has, what is missing, and the command that fixes it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline import llama_background, platforms
from pipeline.cache import cache_dir
from pipeline.hardware import GIBIBYTE, Hardware, compute_dtype, detect, has_kernels
from pipeline.llama_build import PACKAGE, cpu_recipe
from pipeline.llama_install import has_cuda
from pipeline.platforms import Platform

TRAINING_PACKAGES = ("torch", "unsloth", "transformers", "trl", "peft", "bitsandbytes", "datasets", "gguf")
CHAT_PACKAGES = ("llama-cpp-python", "jinja2", "rich")
_LLAMA_PROBE = (
    "import llama_cpp; llama_cpp.llama_backend_init(); print(llama_cpp.llama_supports_gpu_offload());"
    "print(llama_cpp.llama_print_system_info().decode())"
)
_ROOT = Path(__file__).resolve().parent.parent
_SECONDS_TO_ANSWER = 3
# scripts/setup.sh keeps the PyTorch that is there; a bare pip install may not.
_BESIDE_TORCH = f"bash {_ROOT / 'scripts' / 'setup.sh'}"


class Finding(BaseModel):
    """One line of the examination.

    ``problem`` says what is missing of what a command needs, ``hint`` what would be better; ``fix`` is the command or
    the setting for either.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    value: str
    problem: str | None = None
    hint: str | None = None
    fix: str | None = None


def examine() -> list[Finding]:
    platform = platforms.here()
    hardware = detect(platform.runs, cache_dir())
    dtype = compute_dtype("auto", hardware)
    beside_torch = platform.service is not None or bool(hardware.gpu_names)
    training_fix = _BESIDE_TORCH if beside_torch else "pip install --no-deps -r requirements-cpu.txt"
    chat_fix = _BESIDE_TORCH if beside_torch else "pip install -r requirements-chat.txt"
    to_come = llama_background.state()
    awaited = to_come is not None and to_come.failed is None and importlib.util.find_spec("llama_cpp") is None
    llama = [] if awaited else [_llama_cpp(hardware, to_come)]
    chat_packages = [name for name in CHAT_PACKAGES if not (awaited and name == "llama-cpp-python")]
    return [
        Finding(name="platform", value=f"{platform.name}, Python {sys.version.split()[0]}"),
        *_session(platform),
        Finding(name="processor", value=f"{hardware.cpu}, {hardware.cores} cores"),
        Finding(
            name="memory",
            value=f"{hardware.memory_bytes / GIBIBYTE:.1f} GiB, {hardware.available_memory_bytes / GIBIBYTE:.1f} free",
        ),
        *_folders(platform, hardware),
        *_gpus(platform, hardware),
        _driver(hardware),
        Finding(name="computation", value=f"{dtype.value}: {dtype.reason}"),
        _hub(platform),
        _hub_token(),
        *(_package(name, training_fix) for name in TRAINING_PACKAGES),
        *(_package(name, chat_fix) for name in chat_packages),
        _compiler(built=not any(finding.problem for finding in llama)),
        *llama,
        *_background_build(to_come),
    ]


def print_findings(findings: list[Finding]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for finding in findings:
        mark = "[green]ok[/green]     "
        if finding.problem:
            mark = "[red]missing[/red]"
        elif finding.hint:
            mark = "[yellow]hint[/yellow]   "
        console.print(f"{mark} {finding.name:18}", end="")
        console.print(finding.value, markup=False, soft_wrap=True)
        if said := finding.problem or finding.hint:
            fix = f" Fix: {finding.fix}" if finding.fix else ""
            console.print(f"        {said}.{fix}", markup=False, soft_wrap=True)


def _session(platform: Platform) -> list[Finding]:
    if platform.service is None:
        return []
    return [Finding(name="session", value=platform.service.limits)]


def _folders(platform: Platform, hardware: Hardware) -> list[Finding]:
    """Where runs and downloads go, the room there, and what becomes of it."""
    runs = Path.cwd() / platform.runs
    free = f"{hardware.free_disk_bytes / GIBIBYTE:.1f} GiB free"
    cache, room = cache_dir(), hardware.cache_disk_bytes / GIBIBYTE
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return [
        Finding(
            name="runs",
            value=f"{runs}, {free}; {platform.persistence}",
            hint=platform.to_keep and "nothing is kept",
            fix=platform.to_keep,
        ),
        Finding(name="cache", value=f"{cache}, {room:.1f} GiB free; the hub's downloads: {hub}"),
    ]


def _gpus(platform: Platform, hardware: Hardware) -> list[Finding]:
    if not hardware.gpu_names:
        value = "none: training uses the CPU (small models only)"
        if platform.service is None:
            return [Finding(name="GPU", value=value)]
        hint = platforms.no_gpu_sentence(os.environ)
        return [Finding(name="GPU", value=value, hint=hint, fix=platform.service.gpu_setting)]
    import torch

    findings = []
    for index, name in enumerate(hardware.gpu_names):
        memory = torch.cuda.get_device_properties(index).total_memory / GIBIBYTE
        major, minor = torch.cuda.get_device_capability(index)
        fits = has_kernels((major, minor), hardware.gpu_architectures)
        built = ", ".join(hardware.gpu_architectures)
        findings.append(
            Finding(
                name=f"GPU {index}",
                value=f"{name}, {memory:.1f} GiB, compute capability {major}.{minor}",
                problem=None if fits else f"this PyTorch has kernels for {built} alone",
                fix=None if fits else (platform.service or platforms.KAGGLE).gpu_setting,
            )
        )
    return findings


def _driver(hardware: Hardware) -> Finding:
    """The driver's CUDA beside PyTorch's: a PyTorch built for a newer CUDA than the driver's sees no GPU."""
    driver = driver_versions()
    if driver is None:
        return Finding(name="CUDA", value="no NVIDIA driver answers")
    version, newest = driver
    value = f"driver {version}, for CUDA up to {newest}"
    try:
        import torch
    except ImportError:
        return Finding(name="CUDA", value=value, problem="PyTorch does not import", fix=_BESIDE_TORCH)
    value += f"; PyTorch {torch.__version__} is built for CUDA {torch.version.cuda or 'none'}"
    if hardware.gpu_names:
        return Finding(name="CUDA", value=value)
    index = "https://download.pytorch.org/whl/cu" + "".join(newest.split(".")[:2])
    if torch.version.cuda is None:
        problem = "there is a GPU, and this PyTorch is a CPU build"
    else:
        problem = f"PyTorch does not see the GPU: its CUDA {torch.version.cuda} may be newer than the driver"
    return Finding(
        name="CUDA", value=value, problem=problem, fix=f"pip install --force-reinstall torch --index-url {index}"
    )


def driver_versions() -> tuple[str, str] | None:
    """The NVIDIA driver's version and the newest CUDA it runs, as nvidia-smi's heading tells; None without one."""
    heading = platforms.nvidia_smi() or ""
    driver = re.search(r"Driver Version:\s*([\d.]+)", heading)
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*([\d.]+)", heading)
    return (driver[1], cuda[1]) if driver and cuda else None


def _hub(platform: Platform) -> Finding:
    """Whether the hub answers; it is not asked where it must not be."""
    import urllib.error
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(name="hub", value=f"{endpoint} is not asked: HF_HUB_OFFLINE is set")
    try:
        request = urllib.request.Request(f"{endpoint}/", method="HEAD")
        with urllib.request.urlopen(request, timeout=_SECONDS_TO_ANSWER):
            pass
    except urllib.error.HTTPError:
        pass  # it answers, if not with a page
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return Finding(
            name="hub",
            value=f"{endpoint} does not answer ({reason})",
            hint="models and data sets on the hub cannot be fetched; the default preset needs none",
            fix=platform.service.internet_setting if platform.service else "connect, or set HF_ENDPOINT to a mirror",
        )
    return Finding(name="hub", value=f"{endpoint} answers")


def _hub_token() -> Finding:
    """Whether there is one; it is never shown."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return Finding(name="hub token", value="not known: huggingface_hub is not installed")
    if get_token():
        return Finding(name="hub token", value="is there")
    return Finding(name="hub token", value="none: only private and gated models and `medcot publish` need one")


def _package(name: str, fix: str) -> Finding:
    try:
        return Finding(name=name, value=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, value="-", problem=f"{name} is not installed", fix=fix)


def _compiler(built: bool) -> Finding:
    """What llama-cpp-python is compiled with; once it is built, nothing needs it."""
    found = [shutil.which(os.environ.get(variable, usual)) for variable, usual in (("CC", "cc"), ("CXX", "c++"))]
    value = ", ".join(filter(None, found)) or "none"
    if all(found) or built:
        return Finding(name="compiler", value=value)
    missing = "no C and C++ compiler is there to build llama-cpp-python"
    return Finding(name="compiler", value=value, problem=missing, fix="apt-get install -y gcc g++")


def _background_build(state: llama_background.State | None) -> list[Finding]:
    """What set-up compiles in the background on a GPU machine, while it is not installed."""
    if state is None:
        return []
    done = f"{state.done[0]} of {state.done[1]} objects; " if state.done else ""
    value = f"{state.title}: {done}log {state.log}"
    if state.failed:
        return [Finding(name="llama.cpp to come", value=value, hint=state.failed, fix=llama_background.START_AGAIN)]
    if not state.running and not state.built:
        hint = "nothing compiles it now; medcot run starts it again where it is needed"
        return [Finding(name="llama.cpp to come", value=value, hint=hint, fix=llama_background.START_AGAIN)]
    how = "compiled, installed when it is needed" if state.built else "being compiled"
    return [Finding(name="llama.cpp to come", value=f"{how}: {value}")]


def _llama_again() -> str:
    """Compiled as set-up compiles it, also where only the chat is installed, and nothing that set-up proves it with."""
    recipe = cpu_recipe(_ROOT / "requirements-cpu.txt")
    arguments = shlex.quote(shlex.join(recipe.cmake_arguments))
    return (
        f"CMAKE_ARGS={arguments} {sys.executable} -m pip install --no-deps --force-reinstall --no-cache-dir "
        f"{PACKAGE}=={recipe.version}"
    )


def _llama_cpp(hardware: Hardware, to_come: llama_background.State | None = None) -> Finding:
    """Whether the compiled library loads on this processor, asked in a child process: a wrong build kills it."""
    outcome = subprocess.run([sys.executable, "-c", _LLAMA_PROBE], capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        return Finding(
            name="llama.cpp build",
            value="-",
            problem=f"llama-cpp-python does not load (exit status {outcome.returncode})",
            fix=llama_background.START_AGAIN if hardware.gpu_names or to_come else _llama_again(),
        )
    offloads, _, system = outcome.stdout.partition("\n")
    on_gpu = offloads == "True"
    unused = hardware.gpu_names and not on_gpu and to_come is None
    return Finding(
        name="llama.cpp build",
        value=f"{'CUDA' if has_cuda() else 'GPU' if on_gpu else 'CPU'} build, "
        f"{'with' if on_gpu else 'without'} GPU offload; "
        f"{system.strip().rstrip('| ')}",
        hint="GGUFs run on the CPU next to this GPU" if unused else None,
        fix=llama_background.START_AGAIN if unused else None,
    )
