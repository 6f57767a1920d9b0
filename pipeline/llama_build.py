"""How llama-cpp-python is compiled: with which CMake arguments, and by which pip call. The only place that knows.

    recipe = wanted(requirements).recipe             for the cards and the compilers that this machine has
    source = fetch_source(recipe.version, folder)
    build = Build(recipe, source, folder)            compiles from now on, in a process of its own
    wheel = build.wait()                             raises MedcotError with the compiler's last words

CUDA's part takes 33 minutes of processor time for one architecture, next to 8 for all else (LOG.md); who waits for it
is in pipeline/llama_background.py. Standard library only: set-up asks.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.errors import MedcotError
from pipeline.platforms import nvidia_smi

PACKAGE = "llama_cpp_python"
LIBRARY = "llama_cpp/lib/libggml-cuda.so"  # in a wheel with CUDA
_CUDA_HOME = Path("/usr/local/cuda")
_BYTES_PER_JOB = 2 * 2**30  # nvcc's largest: a quantized matrix product's templates
# Multimodal support is left out: it doubles the compile time, and medcot talks text.
_ARGUMENTS = ("-DLLAVA_BUILD=OFF",)
# FlashAttention's kernels are half of the work and nothing here asks for them; NCCL would tie the wheel to a library of
# the image.
_CUDA_ARGUMENTS = ("-DGGML_CUDA=ON", "-DGGML_CUDA_FA=OFF", "-DGGML_CUDA_NCCL=OFF")
# GCC 12.2 drops stores that AMX's tile configuration needs (its header declares the 64-byte operand as 8 bytes), and
# llama.cpp then dies of a general protection fault on CPUs with AMX (LOG.md). So AMX is left out of the build; laptops
# have none anyway.
_WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
# llama.cpp is compiled for the processor it is compiled on (GGML_NATIVE): these of its abilities make a difference.
_INSTRUCTIONS = re.compile(r"^(avx|amx|fma$|f16c$|bmi2$|sse4_2$|sve|i8mm$|asimddp$|asimdhp$)")
_NICENESS = 10
_PROGRESS = re.compile(rb"\[(\d+)/(\d+)\]")  # ninja's


@dataclass(frozen=True)
class Recipe:
    """Everything that a wheel depends on: two machines with equal recipes can share one."""

    version: str
    cmake_arguments: tuple[str, ...]
    cuda: str | None
    """The toolkit's release, such as 12.8: the wheel needs its runtime library. None: for the CPU only."""
    python: str
    system: str
    instructions: tuple[str, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        return f"llama-cpp-python {self.version} {f'with CUDA {self.cuda}' if self.cuda else 'for the CPU'}"


@dataclass(frozen=True)
class Wanted:
    """The build for this machine, and where there is a GPU that it does not use, the reason."""

    recipe: Recipe
    why_no_cuda: str | None = None


def wanted(requirements: Path, environ: Mapping[str, str] = os.environ, cuda_home: Path = _CUDA_HOME) -> Wanted:
    """What to build here; ``requirements`` is the file that pins the version, ``CMAKE_ARGS`` the user's own arguments.

    With CUDA where a card and nvcc are, for each distinct architecture among the cards.
    """
    on_cpu = cpu_recipe(requirements, environ)
    cards = architectures()
    if not cards:
        return Wanted(on_cpu)
    nvcc = find_nvcc(cuda_home)
    if nvcc is None:
        return Wanted(on_cpu, f"there is no CUDA compiler (nvcc), neither on PATH nor in {cuda_home / 'bin'}")
    release = cuda_release(nvcc)
    if release is None:
        return Wanted(on_cpu, f"{nvcc} does not run")
    return Wanted(with_cuda(on_cpu, cards, nvcc, release))


def cpu_recipe(requirements: Path, environ: Mapping[str, str] = os.environ) -> Recipe:
    """The build without CUDA. Raises MedcotError when ``requirements`` does not pin the version."""
    pin = re.search(rf"^{PACKAGE}==(\S+)", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    if pin is None:
        raise MedcotError(f"{requirements} does not pin {PACKAGE}: restore the file.")
    flags = " ".join(_WITHOUT_AMX)
    amx = (f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}") if _compiler_knows(_WITHOUT_AMX, environ) else ()
    return Recipe(
        version=pin[1],
        cmake_arguments=(*_ARGUMENTS, *amx, *shlex.split(environ.get("CMAKE_ARGS", ""))),
        cuda=None,
        python=f"{sys.implementation.cache_tag}",
        system=" ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        instructions=_instructions(),
    )


def with_cuda(on_cpu: Recipe, cards: Sequence[str], nvcc: Path, release: str) -> Recipe:
    """The same build with CUDA for these architectures ("75"); the user's own arguments still come last."""
    cuda = (*_CUDA_ARGUMENTS, f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(cards)}", f"-DCMAKE_CUDA_COMPILER={nvcc}")
    return replace(on_cpu, cmake_arguments=(*cuda, *on_cpu.cmake_arguments), cuda=release)


def architectures() -> tuple[str, ...]:
    """Of the cards that the driver tells of, each once: ("75", "80") for a T4 and an A100."""
    told = nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader") or ""
    found = {"".join(line.split(".")) for line in told.split() if re.fullmatch(r"\d+\.\d", line)}
    return tuple(sorted(found, key=int))


def find_nvcc(cuda_home: Path = _CUDA_HOME) -> Path | None:
    """CUDA's compiler: on PATH, or where CUDA's packages put it (Kaggle and Colab leave that off PATH)."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=str(cuda_home / "bin"))
    return Path(found) if found else None


def cuda_release(nvcc: Path) -> str | None:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+\.\d+)", told.stdout)
    return release[1] if told.returncode == 0 and release else None


def _compiler_knows(flags: Sequence[str], environ: Mapping[str, str]) -> bool:
    compiler = shlex.split(environ.get("CC") or "cc")
    if not shutil.which(compiler[0]):
        return False
    return (
        subprocess.run(
            [*compiler, *flags, "-x", "c", "-c", "-o", os.devnull, "-"],
            input=b"int main(void){return 0;}",
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )


def _instructions() -> tuple[str, ...]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return tuple(sorted(set(filter(_INSTRUCTIONS.match, value.split()))))
    return (platform.processor(),)


def jobs() -> int:
    """How many compilers at once: as many as there are processors, and memory for."""
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        processors = os.cpu_count() or 1
    with suppress(OSError):
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        if available:
            return max(1, min(processors, int(available[1]) * 1024 // _BYTES_PER_JOB))
    return processors


def fetch_source(version: str, folder: Path) -> Path:
    """llama-cpp-python's source distribution, unpacked inside ``folder``.

    Raises MedcotError with pip's last words when it cannot be fetched.
    """
    unpacked = folder / f"{PACKAGE}-{version}"
    if unpacked.is_dir():
        return unpacked
    folder.mkdir(parents=True, exist_ok=True)
    # Without a build's isolation pip could not even ask it for its name: scikit-build-core is fetched with it.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    told = subprocess.run(
        [*command, "--dest", str(folder), f"{PACKAGE}=={version}"], capture_output=True, text=True, check=False
    )
    archive = next(folder.glob(f"{PACKAGE}-{version}.tar.gz"), None)
    if told.returncode != 0 or archive is None:
        words = told.stderr.strip().splitlines() or ["pip said nothing"]
        raise MedcotError(f"its source distribution cannot be fetched ({words[-1][:200]})")
    partial = folder / "unpacking"
    with tarfile.open(archive) as packed:
        packed.extractall(partial, filter="data")
    (partial / unpacked.name).rename(unpacked)
    archive.unlink()
    return unpacked


def give_way() -> None:
    """This process and all that it starts get what others leave, and a tenth where they leave nothing.

    To be called in a session of its own: Linux shares processors among sessions first (sched(7), autogroup), so that
    niceness alone would leave half of them.
    """
    os.nice(_NICENESS)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_NICENESS))


class Build:
    """A build under way; its wheel lies in ``folder``. ``nice`` gives it a low priority."""

    def __init__(
        self,
        recipe: Recipe,
        source: Path,
        folder: Path,
        *,
        log: Path | None = None,
        parallel: int | None = None,
        nice: bool = False,
        pip_options: Sequence[str] = (),
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """``source`` is the source distribution, packed or unpacked.

        What a build has compiled in ``folder`` serves the next one there, when both are of one unpacked source: after
        the build for the CPU, one with CUDA compiles its own part and libllama, not ggml. ``pip_options`` are for a
        machine that can fetch nothing (--no-index --no-build-isolation); ``log`` gets what it says [default: in
        ``folder``].
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe = recipe
        self.log = log or folder / f"{recipe.key}.log"
        self._wheels = folder / recipe.key
        shutil.rmtree(self._wheels, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir", *pip_options]
        command += ["--config-settings", f"build-dir={folder / 'objects'}", "--wheel-dir", str(self._wheels)]
        priority = ["nice", "-n", str(_NICENESS)] if nice and shutil.which("nice") else []
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(
                [*priority, *command, str(source)],
                env={
                    **environ,
                    "CMAKE_ARGS": shlex.join(recipe.cmake_arguments),
                    "CMAKE_BUILD_PARALLEL_LEVEL": str(parallel or jobs()),
                },
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                process_group=0,  # so that all that pip starts can be ended together
            )

    def wait(self, seconds: float | None = None) -> Path:
        """The wheel. Raises MedcotError when the build fails or takes longer; it is ended however this returns."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            minutes = (seconds or 0) / 60
            raise MedcotError(f"it was not finished after {minutes:.0f} minutes; log: {self.log}") from error
        finally:
            self.end()
        if status != 0:
            raise MedcotError(f"{last_error(self.log)}; log: {self.log}")
        return next(self._wheels.glob("*.whl"))

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def progress(log: Path) -> tuple[int, int] | None:
    """How many objects of how many are compiled, by the end of a build's log; None where it does not say."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 65536))
            found = _PROGRESS.findall(stream.read())
    except OSError:
        return None
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def last_error(log: Path) -> str:
    """The line of a failed build's log that tells most: the first error after CMake's or the compiler's beginning."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for pattern in (r"fatal error:|: error:|nvcc fatal", r"CMake Error", r"Error:|^ERROR|^error"):
        for line in lines:
            if re.search(pattern, line):
                return line[:200]
    return lines[-1][:200] if lines else "pip said nothing"
