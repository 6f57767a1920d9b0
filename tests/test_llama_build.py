"""With which arguments llama-cpp-python is compiled: for the cards that nvidia-smi names and the nvcc that is there."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import llama_build
from pipeline.errors import MedcotError
from pipeline.llama_build import Build, Recipe, cpu_recipe, last_error, progress, wanted

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements-gpu.txt"
NVCC = "#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n"


class Tools:
    """A folder that is all of PATH but for the C compiler's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, text: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)
        return self.folder / name

    def cards(self, *capabilities: str) -> None:
        lines = "\\n".join(capabilities)
        self.put("nvidia-smi", f'#!/bin/sh\n[ "$1" = --query-gpu=compute_cap ] && printf "{lines}\\n"\n')


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    made = Tools(tmp_path / "bin")
    made.put("nvidia-smi", "#!/bin/sh\nexit 9\n")  # also where the tests' machine has one
    return made


@pytest.mark.parametrize(
    ("capabilities", "architectures"),
    [(("7.5",), "75"), (("7.5", "7.5"), "75"), (("8.0", "7.5"), "75;80"), (("12.0", "9.0"), "90;120")],
    ids=["T4", "two T4", "A100 and T4", "two digits"],
)
def test_each_distinct_card_has_its_architecture(
    capabilities: tuple[str, ...], architectures: str, tools: Tools, tmp_path: Path
) -> None:
    tools.cards(*capabilities)
    nvcc = tools.put("nvcc", NVCC)
    found = wanted(REQUIREMENTS, os.environ, tmp_path / "nowhere")
    assert found.why_no_cuda is None and found.recipe.cuda == "12.8"
    arguments = found.recipe.cmake_arguments
    assert {"-DGGML_CUDA=ON", "-DGGML_CUDA_FA=OFF", f"-DCMAKE_CUDA_COMPILER={nvcc}"} <= set(arguments)
    assert [a for a in arguments if "ARCHITECTURES" in a] == [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
    assert set(cpu_recipe(REQUIREMENTS).cmake_arguments) < set(arguments)


def test_nvcc_is_found_where_the_images_have_it(tools: Tools, tmp_path: Path) -> None:
    tools.cards("7.5")
    nvcc = Tools(tmp_path / "cuda/bin").put("nvcc", NVCC)
    recipe = wanted(REQUIREMENTS, os.environ, tmp_path / "cuda").recipe
    assert f"-DCMAKE_CUDA_COMPILER={nvcc}" in recipe.cmake_arguments


def test_without_a_compiler_that_runs_the_build_is_for_the_cpu_and_the_reason_is_told(
    tools: Tools, tmp_path: Path
) -> None:
    tools.cards("7.5")
    found = wanted(REQUIREMENTS, os.environ, tmp_path / "nowhere")
    assert found.recipe == cpu_recipe(REQUIREMENTS) and found.recipe.cuda is None
    assert found.why_no_cuda is not None and "no CUDA compiler (nvcc)" in found.why_no_cuda
    broken = tools.put("nvcc", "#!/bin/sh\nexit 1\n")
    assert wanted(REQUIREMENTS, os.environ, tmp_path / "nowhere").why_no_cuda == f"{broken} does not run"


def test_a_machine_without_cards_needs_no_reason(tools: Tools, tmp_path: Path) -> None:
    tools.put("nvcc", NVCC)
    found = wanted(REQUIREMENTS, os.environ, tmp_path / "nowhere")
    assert found.recipe.cuda is None and found.why_no_cuda is None


def test_amx_is_left_out_where_the_compiler_knows_it_and_the_users_arguments_come_last(tools: Tools) -> None:
    tools.put("knows", "#!/bin/sh\nexit 0\n")
    tools.put("knows-not", "#!/bin/sh\nexit 1\n")
    known = cpu_recipe(REQUIREMENTS, {"CC": "knows", "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DX='a b'"}).cmake_arguments
    assert "-DCMAKE_C_FLAGS=-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" in known
    assert known[-2:] == ("-DGGML_NATIVE=OFF", "-DX=a b")
    assert cpu_recipe(REQUIREMENTS, {"CC": "knows-not"}).cmake_arguments == ("-DLLAVA_BUILD=OFF",)


def test_whatever_makes_another_wheel_makes_another_key(tools: Tools) -> None:
    recipe = Recipe("0.3.36", ("-DA=ON",), "12.8", "cpython-312", "Linux x86_64 glibc 2.35", ("avx2",))
    others = [
        replace(recipe, version="0.3.37"),
        replace(recipe, cmake_arguments=("-DA=OFF",)),
        replace(recipe, cuda="13.0"),
        replace(recipe, python="cpython-313"),
        replace(recipe, system="Linux x86_64 glibc 2.39"),
        replace(recipe, instructions=("avx2", "avx512f")),
    ]
    assert len({each.key for each in [recipe, *others]}) == 7
    assert replace(recipe).key == recipe.key


def test_a_file_without_the_pin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("torch\n")
    with pytest.raises(MedcotError, match="does not pin llama_cpp_python"):
        cpu_recipe(tmp_path / "requirements.txt")


def test_of_a_log_the_compilers_words_are_told_and_how_far_it_came(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert progress(log) is None
    log.write_text("  [1/212] Building C object a.o\n  [57/212] Building CUDA object b.o\n")
    assert progress(log) == (57, 212)
    log.write_text(
        "  [57/212] x\n  FAILED: b.o\n  nvcc fatal   : Unsupported gpu architecture 'compute_70'\n"
        "  *** CMake build failed\n  error: subprocess-exited-with-error\nERROR: Failed building wheel\n"
    )
    assert last_error(log) == "nvcc fatal   : Unsupported gpu architecture 'compute_70'"


@pytest.mark.broad
@pytest.mark.parametrize(("code", "works"), [("", True), ("raise SystemExit('error: no compiler')", False)])
def test_pip_builds_with_the_recipes_arguments_or_says_why_not(tmp_path: Path, code: str, works: bool) -> None:
    """A small package in llama-cpp-python's place, built by the same command; setuptools ignores CMake's folder."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "setup.py").write_text(
        f"{code}\nimport os\nfrom setuptools import setup\nopen('told', 'w').write(os.environ['CMAKE_ARGS'])\n"
        "setup(name='small', py_modules=['small'])\n"
    )
    (source / "small.py").write_text("")
    recipe = Recipe("1", ("-DA=ON", "-DB=x y", "-DC=75;80"), None, "", "", ())
    build = Build(recipe, source, tmp_path / "work", pip_options=("--no-index", "--no-build-isolation"))
    if works:
        assert build.wait(120).name.startswith("small-")
        assert (source / "told").read_text() == "-DA=ON '-DB=x y' '-DC=75;80'"
    else:
        with pytest.raises(MedcotError, match=r"no compiler.*; log: .*\.log"):
            build.wait(120)


def test_a_build_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/__init__.py").touch()  # without it the real pip is found first
    (tmp_path / "pip/__main__.py").write_text("import time; print('begun', flush=True); time.sleep(600)")
    build = Build(
        Recipe("1", (), None, "", "", ()),
        tmp_path,
        tmp_path / "work",
        environ=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    with pytest.raises(MedcotError, match="not finished after"):
        build.wait(1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(build._process.pid, 0)
    assert llama_build.jobs() >= 1
