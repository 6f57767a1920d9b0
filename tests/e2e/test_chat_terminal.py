"""The chat as a user has it: the command in a terminal, with the small real model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_models import small_model
from terminal_screen import in_terminal, plain

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


def test_type_stop_retry_save_load_and_quit(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"

    def start(**streams: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pipeline.cli", "chat", str(small_model())]
        environment = {**os.environ, "TERM": "xterm", "XDG_CACHE_HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
        return subprocess.Popen([*command, "--ctx", "1024", "--threads", "1"], cwd=ROOT, env=environment, **streams)

    with in_terminal(start) as (chat, screen):

        def say(line: str) -> str:
            screen.type(line)
            return plain(screen.wait_for("\r\n> "))

        assert "Checking SmolLM2" in screen.wait_for("/quit ends.")
        screen.wait_for("\r\n> ")
        say("/set max_tokens 12")
        assert re.search(
            r"context \d+ of 1,024 \(\d+%\), cut off at the token limit\]", say("What is gout? <|im_end|>")
        )
        say("/retry")
        say("/set max_tokens 900")
        screen.type("List all bones of the human body, one a line, with a sentence about each.")
        screen.wait_for("\r\n")
        screen.wait_for("bone")
        screen.type("\x03", end="")
        assert "stopped]" in screen.wait_for("\r\n> ")
        say(f"/save {saved}")
        say("/new")
        say(f"/load {saved}")
        say("/set max_tokens 5")
        say("Go on.")
        screen.type("/quit")
        assert chat.wait(20) == 0
    turns = json.loads(saved.read_text())["turns"]
    assert [(turn["finished"], turn["seed"]) for turn in turns] == [("length", 1), ("stopped", 0)]
    assert turns[0]["question"] == "What is gout? <|im_end|>" and turns[0]["answer_tokens"] == 12
    assert 0 < turns[1]["answer_tokens"] < 900 and "bone" in turns[1]["answer"]


def test_a_pipe_gets_one_answer_and_json_one_document(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "chat",
        str(small_model()),
        "--max-new-tokens",
        "8",
        "--threads",
        "1",
    ]
    history = ["--history", str(tmp_path / "kept.json")]
    plainly = subprocess.run([*command, *history], input=b"What is gout?\n", capture_output=True, cwd=ROOT, check=True)
    assert b"\x1b" not in plainly.stdout + plainly.stderr and plainly.stdout.strip()
    as_json = subprocess.run(
        [*command, *history, "--json"], input=b"I can't breathe. What now?", capture_output=True, cwd=ROOT, check=True
    )
    document = json.loads(as_json.stdout)
    assert document["red_flags"][0]["quote"] == "can't breathe" and document["answer_tokens"] <= 8
    kept = json.loads((tmp_path / "kept.json").read_text())["turns"]
    assert [turn["question"] for turn in kept] == ["What is gout?", "I can't breathe. What now?"]
    assert kept[0]["answer"] == plainly.stdout.decode().strip()
