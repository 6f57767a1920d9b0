"""A run on Colab that is killed while it evaluates, and resumed by a machine that has nothing but Drive.

The platform is Colab's with its folders elsewhere, the model tiny and random, its training played; everything else is
real: the stages, the GGUFs under llama.cpp, the copy in Drive and the kill.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_report import measurements
from tiny_models import save_adapter, save_model

from pipeline import run as driver
from pipeline.artifacts import (
    Artifact,
    FileRecord,
    Manifest,
    artifact_files,
    read_manifest,
    sha256_file,
    write_manifest,
)
from pipeline.config import Config
from pipeline.results import Benchmark, Evaluation

pytestmark = pytest.mark.e2e

# Colab as pipeline/platforms.py finds it, below a root of its own.
SESSION = """
import os, sys
from pathlib import Path
from pipeline import platforms
root = Path(sys.argv.pop(1))
platforms.here = lambda: platforms.detect(os.environ, root)
from pipeline.cli import main
main()
"""
NAME, ROWS = "tiny", 12
SHIPPED, BASE = f"{NAME}-Q8_0.gguf", f"{NAME}-base-Q8_0.gguf"
MARK = 0.987654321  # a ROUGE that no answer of a random model has


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [
        {
            "Question": f"Patient {n} has pain. What is it?",
            "Complex_CoT": f"Case {n} is plain.",
            "Response": f"It is {n}.",
        }
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "name": NAME,
        "model": {"base": str(save_model(folder / "base", layers=2)), "max_seq_length": 256},
        "data": {
            "source": str(folder / "rows.jsonl"), "eval_rows": ROWS, "near_duplicate_similarity": 1.0,
            "leakage": "keep",
        },
        "export": {"quantizations": ["F16", "Q8_0"], "ship": "Q8_0", "imatrix": "none"},
        "verify": {"prompts": 1},
        "evaluation": {"rows": ROWS, "max_new_tokens": 400},
        "bench": {
            "transformers": False, "repeats": 1, "prompt_tokens": 8, "generated_tokens": 4, "quality_records": 0,
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def session(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", SESSION, str(root), "run", *arguments, "--no-plan"]


def environment() -> dict[str, str]:
    return {**os.environ, "COLAB_RELEASE_TAG": "release-colab", "PYTHONPATH": str(Path.cwd())}


def train(config: Config, run_dir: Path) -> None:
    """What the stage would leave, with an adapter of random changes."""
    stage = driver.stage_named("train")
    folder = save_adapter(run_dir / stage.folder, Path(config.model.base))
    identity = driver.identify(stage, config, run_dir)
    files = [
        FileRecord(path=path.name, size=path.stat().st_size, sha256=sha256_file(path))
        for path in artifact_files(folder)
    ]
    manifest = Manifest(
        stage=stage.name, fingerprint=identity.fingerprint, config=identity.config, inputs=identity.inputs,
        versions=identity.versions, created="2026-11-30T10:00:00+00:00", seconds=1.0, peak_memory_bytes=1, files=files,
        result=measurements()["train"].model_dump(mode="json"),
    )  # fmt: skip
    write_manifest(folder, manifest)


def evaluated(folder: Path) -> dict[str, list[str]]:
    """The whole lines of each model's records."""
    return {
        path.name: [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for path in (folder / "eval").glob("records-*.jsonl")
    }


def test_killed_while_it_evaluates_nothing_is_done_twice(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "machine"
    drive = root / "content/drive/MyDrive"
    drive.mkdir(parents=True)
    run_dir, copy = root / "content/runs" / NAME, drive / "medcot" / NAME

    subprocess.run(session(root, str(config), "--until", "prepare"), env=environment(), check=True, capture_output=True)
    train(driver.load_run_config(run_dir), run_dir)
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(
            session(root, str(config)), env=environment(), stderr=log, stdout=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 240
            while sum(map(len, evaluated(copy).values())) < 6 or not (copy / "report/report.html").is_file():
                assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "first.log").read_text()
                time.sleep(0.05)
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    told = (tmp_path / "first.log").read_text()
    assert "The GGUF is ready and verified" in told and f"keep: {copy / 'gguf' / SHIPPED} is whole" in told
    assert read_manifest(run_dir / "eval") is None, "it was done before it was killed"
    print({name: len(lines) for name, lines in evaluated(run_dir).items()}, "of which Drive has", end=" ")
    print({name: len(lines) for name, lines in evaluated(copy).items()})

    shutil.rmtree(root / "content/runs")  # the machine goes; Drive stays, its files as they were
    kept = {}
    for name, lines in evaluated(copy).items():
        kept[name] = [json.dumps(json.loads(line) | {"rouge_l": MARK}) + "\n" for line in lines]
        (copy / "eval" / name).write_text("".join(kept[name]) + '{"key": "torn')
    ggufs = {name: sha256_file(copy / "gguf" / name) for name in (SHIPPED, BASE)}
    assert not (copy / "gguf" / f"{NAME}-F16.gguf").exists()

    second = subprocess.run(
        session(root, str(config)), env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"keep: resumed from {copy}" in second.stderr
    for stage in ("prepare", "train", "export", "verify"):
        assert f"{stage}: up to date" in second.stderr and f"{stage}: started" not in second.stderr, second.stderr
    assert {name: sha256_file(run_dir / "gguf" / name) for name in (SHIPPED, BASE)} == ggufs
    for name, lines in evaluated(run_dir).items():
        records = [json.loads(line) for line in lines]
        assert len({record["key"] for record in records}) == len(records) == ROWS + 3  # and the reference questions
        assert [record["key"] for record in records if record["rouge_l"] == MARK] == [
            json.loads(line)["key"] for line in kept.get(name, [])
        ], "a record was answered again"
    result = Artifact.load(run_dir / "eval", Evaluation).result
    assert {model.model for model in result.models} == {SHIPPED, BASE}
    measured = Artifact.load(run_dir / "bench", Benchmark).result
    assert {model.model for model in measured.models} == {SHIPPED, BASE}  # of the files that came back
    assert read_manifest(copy / "eval") == read_manifest(run_dir / "eval")
    assert read_manifest(copy / "report") == read_manifest(run_dir / "report") is not None
