"""tests/gpu/run.sh without a GPU: its orchestration with real child processes, and the whole of it as a rehearsal."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from machine import parse_gpu
from part_list import PARTS, Part, least_seconds, missing_for, most_important
from schedule import Setting, Suite

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
        "command = 'echo $$ > ' + str(recorder.request.work / 'pid') + '; sleep 600'; "
        "subprocess.run(['sh', '-c', command], process_group=0)"
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
        setting = Setting(folder / "work", folder / "out", seconds=200.0)
        results = Suite(parts, setting, lambda results: told.append(len(results))).run()
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
    results = Suite([part], Setting(tmp_path / "work", tmp_path, seconds=60.0), lambda results: None).run()
    assert [(result.status, result.reason) for result in results] == [("passed", None)]


def test_the_least_important_is_left_out_when_time_is_short_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "work").mkdir()
    vital = fake(tmp_path, "passes", FAKES["passes"])
    parts = [
        Part(**{**vital.__dict__, "name": "dear", "least": 200, "importance": 2, "alone": True}),
        Part(**{**vital.__dict__, "least": 20, "importance": 1, "alone": True}),
        Part(**{**vital.__dict__, "name": "cheap", "least": 10, "importance": 3, "alone": True}),
    ]
    results = Suite(parts, Setting(tmp_path / "work", tmp_path, seconds=120.0), lambda results: None).run()
    assert [(result.part, result.status) for result in results] == [
        ("dear", "skipped"),
        ("passes", "passed"),
        ("cheap", "passed"),
    ]
    assert results[0].reason is not None
    left, _, how = results[0].reason.partition(" s were left, ")
    assert how == "and it needs 200 next to the 30 s of other parts; --only dear runs it by itself"
    assert 110 <= float(left) < 120


def test_what_runs_together_takes_as_long_as_the_gpus_memory_makes_it() -> None:
    parts = [Part(name, name, 60, 40, (), gpu_gb=15) for name in "abcd"]
    assert least_seconds(parts, None) == 40
    assert least_seconds(parts, 141 * 10**9) == 40
    assert least_seconds(parts, 15 * 10**9) == 160
    assert [part.name for part in most_important(parts, 100, 15 * 10**9)] == ["a", "b"]


@pytest.mark.broad
@pytest.mark.parametrize(("gpu_gb", "at_once"), [(40, 2), (16, 1)])
def test_parts_wait_for_each_other_where_the_gpus_memory_holds_too_few(
    gpu_gb: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "work").mkdir()
    body = (
        "import time; at = recorder.request.work / recorder.request.part; at.touch(); time.sleep(3); "
        "others = len(list(recorder.request.work.glob('p?'))); at.unlink(); recorder.figure('at once', others); "
        "recorder.check('c', True, 'fine')"
    )
    part = fake(tmp_path, "waits", body)
    parts = [Part(**{**part.__dict__, "name": name, "gpu_gb": 15.0}) for name in ("p1", "p2")]
    setting = Setting(tmp_path / "work", tmp_path, seconds=100.0, gpu_bytes=gpu_gb * 10**9)
    results = Suite(parts, setting, lambda results: None).run()
    assert [result.status for result in results] == ["passed", "passed"]
    assert max(figure.value for result in results for figure in result.figures) == at_once


def test_the_parts_fit_into_nine_minutes_and_find_their_packages_here() -> None:
    default = [part for part in PARTS if not part.asked]
    assert most_important(default, 525, 141 * 10**9) == sorted(default, key=lambda part: part.importance)
    assert [part.name for part in PARTS if part.asked] == ["build", "eight_b"]
    importances = [part.importance for part in default]
    assert sorted(importances) == list(range(1, len(default) + 1))
    assert max(part.seconds for part in PARTS if part.asked) < 600
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
    results = read_results(tmp_path / "rehearsal-agreement-training-gguf.json")
    assert json.loads(done.stdout) == results.model_dump(mode="json")
    assert [(part.part, part.status) for part in results.parts] == [(part, "passed") for part in parts]
    figures = {figure.name: figure.value for part in results.parts for figure in part.figures}
    assert min(figures["medcot, 128 tokens"], figures["TRL + PEFT, 128 tokens"]) > 0
    assert "medcot over TRL + PEFT, 128 tokens" in figures
    checks = {check.name for part in results.parts for check in part.checks}
    assert {"mean loss over all steps", "the CPU's logits", "medcot evaluate"} <= checks
    with tarfile.open(tmp_path / "measurements.tar.gz") as archive:
        assert {"pip-freeze.txt", "nvidia-smi.txt", "parts/gguf/result.json"} <= set(archive.getnames())
    assert "8B in NF4, training speed" in done.stderr
    with pytest.raises(MedcotError, match="rehearsal"):
        markdown([results])
