"""What this machine's llama-cpp-python can do, told without importing it."""

import importlib
import sys
from pathlib import Path

import pytest

from pipeline.hardware import detect
from pipeline.llama_install import has_cuda


@pytest.mark.parametrize(("library", "on_gpu"), [("libggml-cuda.so", True), ("libggml-cpu.so", False)])
def test_a_build_with_cuda_is_known_by_its_files(
    library: str, on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "lib" / library).touch()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert has_cuda() is on_gpu


def test_without_a_gpu_llama_cpp_is_not_on_one(tmp_path: Path) -> None:
    here = detect(tmp_path)
    assert not here.llama_on_gpu or here.gpu_names
    assert here.cpu_gflops is None, "measured when a plan needs it"
