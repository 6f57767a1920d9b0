"""tests/gpu/run.sh without a GPU: its orchestration with real child processes, and the whole of it as a rehearsal."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import packages
import pytest
from machine import parse_gpu
from parts.gguf import recipe_or_reason
from schedule import PARTS, Part, Suite, missing_for

from bench.gpu_results import PartResult, markdown, read_results
from pipeline.errors import MedcotError

ROOT = Path(__file__).resolve().parent.parent
FAKES = {
    "passes": "recorder.figure('speed', 1); recorder.figure('speed', 2, 'x/s'); recorder.check('c', True, 'fine')",
    "fails": "recorder.check('first', True, 'fine'); recorder.check('second', False, '3 is not 4')",
    "breaks": "raise MedcotError('the model is gone')",
    "crashes": "recorder.figure('speed', 1); {}['x']",
    "skips": "raise Skipped('not built: there is no nvcc')",
    "dies": "import os; print('last words'); os.kill(os.getpid(), 11)",
    "hangs": (
        "import subprocess; recorder.figure('speed', 3); "
        "subprocess.run(['sh', '-c', 'echo $$ > ' + str(recorder.request.work / 'pid') + '; sleep 600'])"
    ),
    "checks nothing": "pass",
}
PREPARED = "recorder.check('prepared', (recorder.request.work / 'made').read_text() == 'yes', 'by another process')"


def fake(folder: Path, name: str, body: str, prepare: str = "None") -> Part:
    module = "fake_" + name.replace(" ", "_")
    (folder / f"{module}.py").write_text(
        "from part import *\n"
        f"def measure(recorder):\n    {body}\n"
        f"if __name__ == '__main__':\n    perform(measure, {prepare})\n"
    )
    hangs = name == "hangs"
    seconds = 30 if hangs else 120  # enough to import what the parts import, on a busy machine too
    return Part(name, f"the part that {name}", seconds, least=0, needs=("json",), alone=hangs, module=module)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, PartResult], list[int], Path]:
    """Every way for a part to end; how many results had been told each time; the work folder."""
    folder = tmp_path_factory.mktemp("fakes")
    parts = [fake(folder, name, body) for name, body in FAKES.items()]
    parts.append(Part("lacks", "no such module", 60, 0, needs=("json", "no_such_module_anywhere")))
    told: list[int] = []
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{folder}:{path}"
    try:
        suite = Suite(parts, folder / "work", 200.0, False, None, lambda results: told.append(len(results)))
        results = suite.run()
    finally:
        os.environ["PYTHONPATH"] = path
    assert [result.part for result in results] == [part.name for part in parts]
    return {result.part: result for result in results}, told, folder / "work"


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("passes", "passed", None),
        ("fails", "failed", "second: 3 is not 4"),
        ("breaks", "failed", "the model is gone"),
        ("crashes", "failed", "KeyError: 'x'"),
        ("skips", "skipped", "not built: there is no nvcc"),
        ("dies", "failed", "its process was ended by SIGSEGV: last words"),
        ("hangs", "unfinished", "its time was up"),
        ("checks nothing", "failed", "nothing was checked"),
        ("lacks", "skipped", "not installed: no_such_module_anywhere"),
    ],
)
@pytest.mark.broad
def test_how_a_part_ends_is_told_and_stops_no_other(
    outcomes: tuple[dict[str, PartResult], list[int], Path], name: str, status: str, reason: str | None
) -> None:
    result = outcomes[0][name]
    assert (result.status, result.reason) == (status, reason)


@pytest.mark.broad
def test_what_was_measured_stays(outcomes: tuple[dict[str, PartResult], list[int], Path]) -> None:
    results = outcomes[0]
    assert [str(figure) for figure in results["passes"].figures] == ["speed 2 x/s"]
    assert [str(figure) for figure in results["crashes"].figures] == ["speed 1"]
    assert [str(figure) for figure in results["hangs"].figures] == ["speed 3"]
    assert [check.passed for check in results["fails"].checks] == [True, False]
    assert outcomes[1] == list(range(1, len(FAKES) + 2))


@pytest.mark.broad
def test_what_a_killed_part_has_started_ends_with_it(
    outcomes: tuple[dict[str, PartResult], list[int], Path],
) -> None:
    pid = int((outcomes[2] / "pid").read_text())
    until = time.monotonic() + 5
    while _is_alive(pid):
        assert time.monotonic() < until
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.broad
def test_a_part_waits_for_what_it_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    prepared = fake(tmp_path, "prepared", PREPARED, "lambda request: (request.work / 'made').write_text('yes')")
    part = Part(**{**prepared.__dict__, "alone": True, "prepares": True})
    (tmp_path / "work").mkdir()
    results = Suite([part], tmp_path / "work", 60.0, False, None, lambda results: None).run()
    assert [(result.status, result.reason) for result in results] == [("passed", None)]


def test_a_part_for_which_too_little_time_is_left_is_not_begun(tmp_path: Path) -> None:
    part = Part("late", "late", seconds=60, least=40, needs=())
    results = Suite([part], tmp_path, 30.0, False, None, lambda results: None).run()
    assert results[0].status == "skipped" and results[0].reason is not None
    assert re.fullmatch(r"2\d s were left, and it needs 40", results[0].reason)


def test_the_parts_fit_into_nine_minutes_and_find_their_packages_here() -> None:
    assert sum(part.least for part in PARTS if part.alone) + max(part.least for part in PARTS) < 530
    assert {part.name: missing_for(part, rehearse=False) for part in PARTS} == {part.name: [] for part in PARTS}


def test_the_drivers_answer_is_read() -> None:
    line = "NVIDIA H100 80GB HBM3, 81559, 580.159.04, 9.0\n"
    assert parse_gpu(line + line) == ["NVIDIA H100 80GB HBM3", "81559", "580.159.04", "9.0"]
    assert parse_gpu("") is None and parse_gpu("No devices were found\n") is None


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    done = run_suite("--out", str(tmp_path / "out"), path=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: There is no NVIDIA GPU") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def run_suite(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    # Several parts at once with two threads each would wait for each other in busy loops.
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    if path:  # no nvidia-smi there
        environment["PATH"] = f"{path}:/usr/bin:/bin"
    return subprocess.run(
        [ROOT / "tests" / "gpu" / "run.sh", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.mark.e2e
def test_a_rehearsal_runs_and_is_no_result_of_a_gpu(tmp_path: Path) -> None:
    """Without preset and resume, which tests/e2e/test_pipeline.py and tests/test_train_survives.py have on the CPU."""
    parts = ["agreement", "training", "gguf"]
    only = [word for part in parts for word in ("--only", part)]
    done = run_suite("--rehearse", *only, "--out", str(tmp_path))
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stderr + log[-6000:]
    results = read_results(tmp_path / "rehearsal.json")
    assert json.loads(done.stdout) == results.model_dump(mode="json")
    assert [(part.part, part.status) for part in results.parts] == [(part, "passed") for part in parts]
    figures = {figure.name: figure.value for part in results.parts for figure in part.figures}
    assert min(figures["medcot, 128 tokens"], figures["TRL + PEFT, 128 tokens"]) > 0
    assert "medcot over TRL + PEFT, 128 tokens" in figures
    checks = {check.name for part in results.parts for check in part.checks}
    assert "mean loss over all steps" in checks
    assert "8B in NF4, training speed" in done.stderr
    with pytest.raises(MedcotError, match="rehearsal"):
        markdown([results])


def test_a_build_needs_a_card_a_compiler_and_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, text in {"nvidia-smi": "exit 9", "nvcc": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    assert recipe_or_reason(None) == (None, "there is no NVIDIA GPU")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 9.0\n")
    assert recipe_or_reason(None) == (None, f"{tmp_path / 'nvcc'} does not run")
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'release 13.0, V13.0.88'\n")
    assert recipe_or_reason(None) == (None, "no source distribution of llama-cpp-python was given (--llama-source)")
    assert recipe_or_reason(tmp_path / "absent") == (None, f"{tmp_path / 'absent'} is no file")
    recipe, reason = recipe_or_reason(tmp_path / "nvcc")
    assert recipe is not None and "-DCMAKE_CUDA_ARCHITECTURES=90" in recipe.cmake_arguments and reason == ""


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
    with pytest.raises(SystemExit, match=r"packages\.01-of-03 is missing"):
        packages.unpack(tmp_path / "there", [pieces[0], pieces[2]])


def test_what_is_compiled_for_this_python_is_not_copied(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="compiled for this Python"):
        packages.copy_distribution("pydantic_core", tmp_path, "130")
