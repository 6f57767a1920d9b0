"""``medcot doctor`` on machines that are not these tests' own: what it finds missing, and what it tells to do."""

import http.server
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import doctor, platforms
from pipeline.hardware import has_kernels
from pipeline.llama_background import State
from pipeline.llama_build import cpu_recipe
from pipeline.machines import MACHINES
from pipeline.platforms import detect

ROOT = Path(__file__).resolve().parent.parent
# What the CUDA 12.8 builds of PyTorch 2.10 have kernels for: https://github.com/Kaggle/docker-python/issues/1546
CU128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
KAGGLE = detect({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, Path("/nowhere"))
HOME = detect({}, Path("/nowhere"))
HEADING = "| NVIDIA-SMI 550.90.07    Driver Version: 550.90.07    CUDA Version: 12.4     |"


def bin_with(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub that answers, if not with a page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((7, 5), CU128, True),
        ((6, 0), CU128, False),
        ((8, 9), CU128, True),  # machine code of the same major version, from a smaller minor one
        ((10, 3), CU128, True),
        ((11, 0), CU128, False),
        ((11, 0), (*CU128, "compute_120"), False),
        ((12, 1), (*CU128, "compute_120"), True),
        ((9, 0), ("sm_90a",), True),
        ((6, 0), (), True),
    ],
)
def test_which_gpus_a_pytorch_has_kernels_for(
    capability: tuple[int, int], architectures: tuple[str, ...], fits: bool
) -> None:
    assert has_kernels(capability, architectures) is fits


def test_each_gpu_is_told_and_one_too_old_for_this_pytorch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 0))
    [p100] = doctor._gpus(KAGGLE, replace(MACHINES["kaggle-p100"], gpu_architectures=CU128))
    assert p100.name == "GPU 0" and p100.value == "Tesla P100-PCIE-16GB, 16.0 GiB, compute capability 6.0"
    assert p100.problem == f"this PyTorch has kernels for {', '.join(CU128)} alone"
    assert p100.fix is not None and "GPU T4 x2" in p100.fix
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    both = doctor._gpus(KAGGLE, replace(MACHINES["kaggle-t4x2"], gpu_architectures=CU128))
    assert [gpu.name for gpu in both] == ["GPU 0", "GPU 1"] and not any(gpu.problem for gpu in both)


def test_a_session_without_gpu_is_told_the_setting_and_a_tpu_that_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = replace(MACHINES["kaggle-t4"], gpu_names=(), gpu_memory_bytes=0, gpu_capability=None)
    [gpu] = doctor._gpus(KAGGLE, bare)
    assert gpu.hint == "this session has no GPU" and gpu.fix == platforms.KAGGLE.gpu_setting and gpu.problem is None
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-8")
    [gpu] = doctor._gpus(KAGGLE, bare)
    assert gpu.hint == "this session has no GPU, and medcot does not use its TPU"
    [at_home] = doctor._gpus(HOME, bare)
    assert at_home.hint is None


@pytest.mark.parametrize(
    ("cuda", "problem"), [(None, "CPU build"), ("13.0", "its CUDA 13.0 may be newer than the driver")]
)
def test_a_driver_that_pytorch_does_not_fit_is_a_problem(
    cuda: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("PATH", bin_with(tmp_path, "nvidia-smi", f'#!/bin/sh\necho "{HEADING}"\n'))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert doctor.driver_versions() == ("550.90.07", "12.4")
    bare = replace(MACHINES["kaggle-t4"], gpu_names=())
    finding = doctor._driver(bare)
    assert finding.value.startswith("driver 550.90.07, for CUDA up to 12.4; PyTorch ")
    assert finding.problem is not None and problem in finding.problem
    assert finding.fix is not None and finding.fix.endswith("/whl/cu124")
    assert doctor._driver(MACHINES["kaggle-t4"]).problem is None


def test_a_driver_that_fails_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", bin_with(tmp_path, "nvidia-smi", f'#!/bin/sh\necho "{HEADING}"\nexit 9\n'))
    assert doctor.driver_versions() is None


def test_the_hub_is_asked_where_hf_endpoint_says(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"{hub}/")
    assert doctor._hub(HOME).value == f"{hub} answers"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    silent = doctor._hub(KAGGLE)
    assert silent.value.startswith("http://127.0.0.1:1 does not answer") and silent.problem is None
    assert silent.hint is not None and silent.fix == platforms.KAGGLE.internet_setting
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "is not asked" in doctor._hub(HOME).value


def test_a_token_is_found_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert doctor._hub_token().value == "is there"


def test_without_compiler_only_what_is_still_to_be_built_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    finding = doctor._compiler(built=False)
    assert finding.problem is not None and finding.fix == "apt-get install -y gcc g++"
    assert doctor._compiler(built=True).problem is None


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"running": True}, None),
        ({"built": True}, None),
        ({}, "nothing compiles it now; medcot run starts it again where it is needed"),
        ({"failed": "nvcc fatal: no; log: /l"}, "nvcc fatal: no; log: /l"),
    ],
    ids=["compiling", "built", "ended", "failed"],
)
def test_the_build_in_the_background_is_told_with_what_mends_it(changes: dict[str, Any], hint: str | None) -> None:
    state = State("llama-cpp-python 0.3.36 with CUDA 12.8", False, False, (57, 212), None, Path("/l"))
    [finding] = doctor._background_build(replace(state, **changes))
    assert "with CUDA 12.8: 57 of 212 objects; log /l" in finding.value
    assert finding.hint == hint and finding.problem is None
    assert finding.fix is None if hint is None else "pipeline.llama_background start" in str(finding.fix)
    assert doctor._background_build(None) == []


def test_the_installed_build_is_told_and_next_to_an_idle_gpu_how_to_have_another() -> None:
    at_rest = doctor._llama_cpp(replace(MACHINES["kaggle-t4"], gpu_names=()))
    assert at_rest.value.startswith("CPU build, without GPU offload") and at_rest.hint is None
    idle = doctor._llama_cpp(MACHINES["kaggle-t4"])
    assert idle.hint == "GGUFs run on the CPU next to this GPU" and "llama_background start" in str(idle.fix)


def test_a_build_that_does_not_load_is_compiled_again_as_set_up_compiles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LLAMA_PROBE", "raise SystemExit(1)")
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    finding = doctor._llama_cpp(replace(MACHINES["kaggle-t4"], gpu_names=()))
    assert finding.problem == "llama-cpp-python does not load (exit status 1)"
    arguments, *command = shlex.split(str(finding.fix))
    recipe = cpu_recipe(ROOT / "requirements-cpu.txt")
    assert shlex.split(arguments.removeprefix("CMAKE_ARGS=")) == list(recipe.cmake_arguments)
    assert command[-1] == f"llama_cpp_python=={recipe.version}"


def test_on_kaggle_the_whole_examination_is_one_document(tmp_path: Path) -> None:
    places = {name: str(tmp_path) for name in ("MEDCOT_CACHE", "TMPDIR", "HF_HOME")}
    environ = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_secret"}
    outcome = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "doctor", "--json"],
        env=os.environ | places | environ | {"MEDCOT_RUNS": str(tmp_path / "runs")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    findings = {finding["name"]: finding for finding in json.loads(outcome.stdout)}
    assert findings["platform"]["value"].startswith("Kaggle, Python 3")
    assert "12 hours" in findings["session"]["value"] and "Save Version" in findings["runs"]["value"]
    assert str(tmp_path / "runs") in findings["runs"]["value"] and str(tmp_path) in findings["cache"]["value"]
    assert "GPU offload" in findings["llama.cpp build"]["value"]
    assert "hf_secret" not in outcome.stdout + outcome.stderr
    assert (outcome.returncode == 0) == all(finding["problem"] is None for finding in findings.values())
