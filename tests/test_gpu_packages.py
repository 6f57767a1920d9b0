"""What a GPU machine that can fetch nothing is given: packages in pieces, and llama.cpp with CUDA, built there."""

import os
import subprocess
import zipfile
from pathlib import Path

import packages
import pytest
from cuda_llama import CudaBuild, built_folder, recipe_for
from part import Request

from pipeline.errors import MedcotError
from pipeline.llama_build import cpu_recipe

ROOT = Path(__file__).resolve().parent.parent


def request_with(tmp_path: Path, source: Path | None) -> Request:
    return Request(
        part="gguf",
        title="gguf",
        work=tmp_path,
        out=tmp_path,
        result=tmp_path / "result.json",
        seconds=60,
        rehearse=True,
        source=source,
    )


def test_a_build_with_cuda_needs_a_gpu_a_compiler_and_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MedcotError, match="there is no NVIDIA GPU"):
        recipe_for(None)
    for name, answer in {"nvidia-smi": "9.0", "nvcc": "Cuda compilation tools, release 13.0, V13.0.88"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(MedcotError, match=r"no source distribution of llama-cpp-python was given \(--llama-source\)"):
        recipe_for(None)
    with pytest.raises(MedcotError, match=r"absent\.tar\.gz is no file"):
        recipe_for(tmp_path / "absent.tar.gz")
    recipe = recipe_for(tmp_path / "nvcc")
    assert recipe.cuda == "13.0" and "-DCMAKE_CUDA_ARCHITECTURES=90" in recipe.cmake_arguments


@pytest.mark.broad
@pytest.mark.parametrize(("code", "works"), [("", True), ("raise SystemExit('no compiler')", False)])
def test_a_build_is_there_whole_or_not_at_all(tmp_path: Path, code: str, works: bool) -> None:
    """A small package in llama-cpp-python's place, built by the same command."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "setup.py").write_text(
        f"{code}\nfrom setuptools import setup\nsetup(name='small', version='1', py_modules=['small'])\n"
    )
    (source / "small.py").write_text("import os\nARGUMENTS = ''\n")
    request = request_with(tmp_path, source)
    build = CudaBuild(request, cpu_recipe(ROOT / "requirements-gpu.txt"))
    if works:
        wheel, seconds = build.wait()
        assert wheel.suffix == ".whl" and seconds > 0
        assert (built_folder(request) / "small.py").is_file()
    else:
        with pytest.raises(MedcotError, match=r"no compiler|error"):
            build.wait()
        assert not built_folder(request).exists()


def test_packages_are_cut_into_pieces_and_put_together_again(tmp_path: Path) -> None:
    site, out = tmp_path / "site", tmp_path / "out"
    site.mkdir()
    packages.copy_distribution("bitsandbytes", site, "130")
    assert (site / "bitsandbytes" / "libbitsandbytes_cuda130.so").is_file()
    libraries = sorted(path.name for path in site.rglob("libbitsandbytes_*.so"))
    assert libraries == ["libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"]
    content = os.urandom(100_000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "random").write_bytes(content)
    archive = tmp_path / "a.tar.gz"
    subprocess.run(["tar", "czf", archive, "-C", tmp_path / "in", "."], check=True)
    pieces = packages.cut(archive, out, 40_000)
    assert [piece.parent.name for piece in pieces] == ["00", "01", "02"]
    packages.unpack(tmp_path / "there", pieces[::-1])
    assert (tmp_path / "there" / "random").read_bytes() == content
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("llama_cpp/lib/libggml-cuda.so", content)
    packages.unpack(tmp_path / "built", packages.cut(tmp_path / "a.whl", tmp_path / "llama-cuda", 40_000))
    assert (tmp_path / "built" / "llama_cpp" / "lib" / "libggml-cuda.so").read_bytes() == content
    with pytest.raises(SystemExit, match=r"packages\.01-of-03 is missing"):
        packages.unpack(tmp_path / "there", [pieces[0], pieces[2]])


def test_what_is_compiled_for_this_python_is_not_copied(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="compiled for this Python"):
        packages.copy_distribution("pydantic_core", tmp_path, "130")
