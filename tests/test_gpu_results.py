"""The document of a GPU and the README's table of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_results import (
    BEGIN,
    END,
    NOT_RUN,
    Figure,
    GpuMachine,
    GpuResults,
    PartResult,
    Status,
    file_name,
    markdown,
    measured,
    put_between_markers,
    read_results,
)
from pipeline.errors import MedcotError
from pipeline.results import Check

MACHINE = GpuMachine(
    gpu="NVIDIA H100 80GB HBM3",
    gpu_memory_bytes=85_520_809_984,
    compute_capability="9.0",
    driver="580.1",
    cpu="Xeon",
    cores=16,
    memory_bytes=10**11,
)


def part(status: Status = "passed", reason: str | None = None, **more: object) -> PartResult:
    return PartResult.model_validate({"part": "p", "title": "a | b", "status": status, "reason": reason, **more})


def document(*parts: PartResult, rehearsal: bool = False, machine: GpuMachine = MACHINE) -> GpuResults:
    return GpuResults(
        schema_version=1,
        created="2026-11-22T15:00:00+00:00",
        rehearsal=rehearsal,
        machine=machine,
        versions={"torch": "2.11.0"},
        commit="abc",
        command="tests/gpu/run.sh",
        seconds=512.3,
        parts=list(parts),
    )


def test_the_table_names_the_gpu_the_outcomes_and_the_figures() -> None:
    figures = (Figure(name="speed", value=6543.21, unit="tokens/s"), Figure(name="ratio", value=1.8765))
    table = markdown([document(part(figures=figures), part("skipped", "trl is\nmissing"))])
    assert table.splitlines() == [
        "NVIDIA H100 80GB HBM3, 80 GiB, driver 580.1, PyTorch 2.11.0, 2026-11-22, 512 s in all:",
        "",
        "| part | outcome | measured |",
        "| --- | --- | --- |",
        "| a \\| b | passed | speed 6,543 tokens/s; ratio 1.88 |",
        "| a \\| b | skipped: trl is missing | - |",
    ]


def test_a_planned_figure_stands_in_the_measured_one() -> None:
    figures = [
        Figure(name="train", value=61, unit="s"),
        Figure(name="train, planned", value=27.4, unit="s"),
        Figure(name="report, planned", value=2, unit="s"),
        Figure(name="batch", value=8),
    ]
    assert measured(figures) == ["train 61 s (planned 27.4)", "report, planned 2 s", "batch 8"]


def test_without_a_result_the_table_says_that_it_has_not_run() -> None:
    assert markdown([]) == NOT_RUN


def test_a_rehearsal_is_no_result() -> None:
    with pytest.raises(MedcotError, match="says nothing about a GPU"):
        markdown([document(part(), rehearsal=True)])


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        (["passed", "skipped", "unfinished"], 0),
        (["passed", "failed"], 3),
        (["skipped"], 1),
        (["unfinished"], 1),
        ([], 1),
    ],
)
def test_the_exit_status_tells_whether_a_check_failed(statuses: list[Status], status: int) -> None:
    assert document(*(part(each) for each in statuses)).exit_status == status


def test_a_document_is_read_back_and_another_refused(tmp_path: Path) -> None:
    path = tmp_path / file_name(MACHINE)
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    assert file_name(MACHINE, ["eight_b"]) == "nvidia-h100-80gb-hbm3-eight-b.json"
    written = document(part(checks=(Check(name="c", passed=True, detail="d"),)))
    path.write_text(written.model_dump_json())
    assert read_results(path) == written
    path.write_text(written.model_dump_json().replace('"schema_version":1', '"schema_version":2'))
    with pytest.raises(MedcotError, match=r"no GPU results of schema 1 \(schema_version: "):
        read_results(path)
    with pytest.raises(MedcotError, match="cannot be read"):
        read_results(tmp_path / "absent.json")


def test_the_table_takes_the_place_between_the_markers(tmp_path: Path) -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert put_between_markers(text, "new", "README.md") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(MedcotError, match=r"README\.md has no"):
        put_between_markers(f"{END} {BEGIN}", "new", "README.md")
    result, readme = tmp_path / "gpu.json", tmp_path / "README.md"
    result.write_text(document(part()).model_dump_json())
    readme.write_text(text)
    command = [sys.executable, "-m", "bench.gpu_results", str(result), "--write", str(readme)]
    subprocess.run(command, check=True)
    assert "| a \\| b | passed | - |" in readme.read_text()
    outcome = subprocess.run([*command[:3], str(readme)], capture_output=True, text=True, check=False)
    assert outcome.returncode == 1 and outcome.stderr.startswith("Error: ") and "Traceback" not in outcome.stderr


def test_what_is_committed_can_be_shown_and_the_readme_shows_it() -> None:
    root = Path(__file__).resolve().parent.parent
    table = markdown([read_results(path) for path in sorted((root / "bench" / "results").glob("*.json"))])
    readme = (root / "README.md").read_text(encoding="utf-8")
    if BEGIN not in readme:
        pytest.skip("the README has no table of GPU results")
    assert put_between_markers(readme, table, "README.md") == readme
