"""What the chat prints where: in a pipe, as JSON, in a terminal; and how it ends."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chat_models import ScriptedModel
from terminal_screen import Screen, in_terminal, plain

from chat import terminal
from chat.disclaimer import DISCLAIMER
from chat.display import harmless
from pipeline.errors import MedcotError

MODEL = Path("model.gguf")
OUTPUT = "<think>\nUric acid.\n</think>\n\nGout."
ROOT = Path(__file__).resolve().parent.parent


def use(monkeypatch: pytest.MonkeyPatch, model: ScriptedModel) -> None:
    @contextmanager
    def open_model(*_: object) -> Iterator[ScriptedModel]:
        yield model

    monkeypatch.setattr(terminal, "open_model", open_model)


def pipe_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_in_a_pipe_standard_output_gets_the_answer_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, ScriptedModel([OUTPUT]))
    terminal.run_chat(MODEL, "A red toe?")
    out, err = capsys.readouterr()
    assert out == "Gout.\n"
    assert DISCLAIMER in err
    assert "Thought\nUric acid.\n" in err
    assert "tokens/s" in err and "first token after" in err


def test_in_a_pipe_an_answer_taken_up_again_is_one_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, ScriptedModel(["<think>a</think>b<think>c</think>d"]))
    terminal.run_chat(MODEL, "x")
    assert capsys.readouterr().out == "b\n\nd\n"


def test_a_piped_question_is_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = ScriptedModel([OUTPUT])
    use(monkeypatch, model)
    pipe_in(monkeypatch, b"A red toe,\nand 39\xb0C?\n")
    terminal.run_chat(MODEL, None)
    assert capsys.readouterr().out == "Gout.\n"
    assert "user\nA red toe,\nand 39\N{REPLACEMENT CHARACTER}C?[[" in model.prompts[0]


def test_a_hidden_thought_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use(monkeypatch, ScriptedModel([OUTPUT]))
    terminal.run_chat(MODEL, "A red toe?", show_thought=False)
    out, err = capsys.readouterr()
    assert out == "Gout.\n"
    assert "Uric" not in err


@pytest.mark.parametrize(("asked", "shown"), [(None, True), ("", False), ("Be\nbrief. " * 20, True)])
def test_a_system_prompt_is_told_of_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str | None, shown: bool
) -> None:
    use(monkeypatch, ScriptedModel([], system="You are a careful physician. " * 9))
    terminal_input = io.StringIO("")
    monkeypatch.setattr(terminal_input, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal_input)
    terminal.run_chat(MODEL, None, system=asked)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("System prompt: ")]
    assert len(lines) == shown
    assert all(line.endswith("... (/system shows it)") and len(line) <= 80 for line in lines)


def test_json_is_one_document_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, ScriptedModel([OUTPUT + " \x1b[2J 38 °C"]))
    terminal.run_chat(MODEL, " A red toe? ", as_json=True)
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    answer = json.loads(out)
    assert answer.pop("seconds") >= 0 and answer.pop("tokens_per_second") > 0
    assert min(answer.pop(f"{part}_seconds") for part in ("thought", "answer")) >= 0
    assert answer.pop("time_to_first_token") >= 0
    prompt_tokens = answer.pop("prompt_tokens")
    assert answer == {
        "model": "model.gguf",
        "question": "A red toe?",
        "red_flags": [],
        "thought": "Uric acid.",
        "answer": "Gout. \x1b[2J 38 °C",
        "tokens": len(OUTPUT) + 11,
        "thought_tokens": len("<think>\nUric acid.\n</think>"),
        "answer_tokens": len("\n\nGout. \x1b[2J 38 °C"),
        "reused_tokens": 0,
        "context_tokens": prompt_tokens + len(OUTPUT) + 11,
        "context_size": 10_000,
        "seed": answer["seed"],
        "thought_closed_by": "model",
        "finished": "end",
    }


def test_json_tells_of_red_flags_in_the_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, ScriptedModel([OUTPUT]))
    terminal.run_chat(MODEL, "I can't breathe", as_json=True, emergency_number="0118 999")
    (flag,) = json.loads(capsys.readouterr().out)["red_flags"]
    assert flag["quote"] == "can't breathe" and flag["form"] == "alarm" and flag["id"] and flag["title"]
    assert "0118 999" in flag["message"] and "{" not in flag["message"]


def test_an_interrupt_prints_what_was_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(ScriptedModel):
        def generate(self, *_: Any, **__: Any) -> Iterator[int]:
            yield from map(ord, "Gout")
            raise KeyboardInterrupt

    use(monkeypatch, Interrupted([]))
    with pytest.raises(KeyboardInterrupt):
        terminal.run_chat(MODEL, "x")
    out, err = capsys.readouterr()
    assert out == "Gout\n" and "stopped" in err
    with pytest.raises(KeyboardInterrupt):
        terminal.run_chat(MODEL, "x", as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["answer"], answer["finished"]) == ("Gout", "stopped")


def test_model_text_is_neither_markup_nor_an_escape_sequence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(
        monkeypatch,
        ScriptedModel(["<think>[bold]\x1b]0;title\x07</think>[red]x[/red] :smile: \x1b[31m\x9b2J\r\n\ty"]),
    )
    terminal.run_chat(MODEL, "x")
    out, err = capsys.readouterr()
    assert out == "[red]x[/red] :smile: ␛[31m\N{REPLACEMENT CHARACTER}2J\n\ty\n"
    assert "[bold]␛]0;title␇" in err
    assert not set(out + err) & {"\x1b", "\x9b", "\x07", "\r"}


def test_every_control_character_but_tab_and_newline_is_made_harmless() -> None:
    text = "".join(map(chr, range(0x100)))
    assert {c for c in harmless(text) if ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0} == {"\t", "\n"}
    assert harmless("Fièvre ≥ 39 °C, 心臓 🫀") == "Fièvre ≥ 39 °C, 心臓 🫀"


@pytest.mark.parametrize(("prompt", "piped"), [("", b"x"), (" \n", b"x"), (None, b"\n")])
def test_an_empty_question_is_refused(monkeypatch: pytest.MonkeyPatch, prompt: str | None, piped: bytes) -> None:
    pipe_in(monkeypatch, piped)
    with pytest.raises(MedcotError, match="question is empty"):
        terminal.run_chat(MODEL, prompt)


def test_a_context_beyond_the_models_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    import export.gguf_model
    from chat.proof import Proof

    opened = []

    @contextmanager
    def model(path: Path, *, n_ctx: int, n_threads: int | None) -> Iterator[None]:
        opened.append(n_ctx)
        yield

    monkeypatch.setattr(export.gguf_model, "GgufModel", model)
    for context_length in (2048, 131072, None):
        monkeypatch.setattr(terminal, "prove", lambda *_, length=context_length: Proof(context_length=length))
        with terminal.open_model(MODEL, 4096, None):
            pass
    assert opened == [2048, 4096, 4096]


# A chat in a process of its own; its model counts without end where it is asked to, or in its thought.
CHAT = """
import sys, time
from contextlib import contextmanager
from chat import terminal
from chat_models import ScriptedModel
from pipeline.cli import main

class Model(ScriptedModel):
    def generate(self, ids, max_new_tokens, *, seed, **sampling):
        conversation = "".join(chr(i) for i in ids if i < 0x110000)
        _, _, rest = conversation.rpartition("user\\n")
        question, _, said = rest.partition("assistant\\n")
        endless = "".join(f"{number} " for number in range(1, 50_000))
        if "</think>" in said:
            output = "At once."
        elif "endless" in question or "ponder" in question:
            output = endless if "endless" in question else "<think>" + endless
        else:
            output = f"<think>[Uric] acid</think>*Gout*, try {seed}."
        for token in map(ord, output):
            if output.endswith(endless):
                time.sleep(0.001)
            yield token

@contextmanager
def open_model(*_):
    yield Model([], n_ctx=1_000_000)

terminal.open_model = open_model
sys.argv[1:] = ["chat", "model.gguf", "--max-new-tokens", "200000", *sys.argv[1:]]
main()
"""


def start_chat(*arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
    search_path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": search_path, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen([sys.executable, "-c", CHAT, *arguments], env=environment, **streams)


@pytest.fixture
def conversation(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Screen]]:
    with in_terminal(lambda **streams: start_chat("--history", str(tmp_path / "kept.json"), **streams)) as running:
        yield running


def test_a_conversation_in_a_terminal(conversation: tuple[subprocess.Popen[bytes], Screen], tmp_path: Path) -> None:
    chat, screen = conversation
    kept = tmp_path / "kept.json"

    def say(line: str, wanted: str = "\n> ") -> str:
        screen.type(line)
        return plain(screen.wait_for(wanted.replace("\n", "\r\n")))

    assert "not medical advice" in screen.wait_for("\r\n> ")
    screen.type("A red toe?")
    shown = screen.wait_for("\r\n> ")
    assert "\x1b[2mU\x1b[0m" in shown  # the thought is dimmed
    assert "*Gout*" in shown and "\x1b[3mGout\x1b[0m, try 0." in shown  # as it came, and then as Markdown
    assert "Thought\n[Uric] acid\n· thought 26 tokens, 0 s\n" in plain(shown)
    assert re.search(r"\[[\d.]+ tokens/s, \d+ tokens in .*, context \d+ of 1,000,000 \(0%\)\]\n", plain(shown))

    assert "try 1." in say("/retry") and "try 2." in say("/retry")
    assert len(json.loads(kept.read_text())["turns"]) == 1
    assert "temperature 0.3, top_p 0.95, max_tokens 200000, seed 0" in say("/set temperature 0.3")
    assert "try 7." in say("/set seed 7") + say("A red toe?")

    screen.type("endless")
    screen.wait_for("7 8 9 10")
    screen.type("\x03", end="")
    assert "stopped]" in screen.wait_for("\r\n> ")
    screen.type("ponder")
    screen.wait_for("\x1b[2m 8")
    screen.type("\x1c", end="")
    assert re.search(r"· thought \d+ tokens, 0 s, ended by you\n\n.*\rAt once\.\n\n", plain(screen.wait_for("\r\n> ")))

    assert "as one line" in say("/fold")
    folded = say("A red toe?")
    assert "Thought\n" not in folded and "· thought 26 tokens, 0 s (/thought shows it)\n" in folded
    assert "[Uric] acid\n" in say("/thought")
    assert "left out" in say("/think off")
    assert "At once." in say("A red toe?")
    assert "no last thought" in say("/thought")
    assert "ended after 30 tokens" in say("/think 30")
    assert "ended by its budget" in say("ponder")

    copied = base64.b64encode(b"At once.").decode()
    screen.type("/copy")
    assert f"\x1b]52;c;{copied}\x07" in screen.wait_for("\r\n> ")
    assert "System prompt: Be brief." in say("/system Be brief.")
    assert "no system prompt" in say("/system none")
    other = tmp_path / "other.json"
    assert f"Saved 7 turns to {other}." in say(f"/save {other}").replace("\n", "")
    assert "A new conversation." in say("/new")
    assert json.loads(kept.read_text())["turns"] == []
    assert "Going on with 7 turns" in say(f"/load {other}").replace("\n", "")
    assert json.loads(kept.read_text()) == json.loads(other.read_text())
    assert "cannot be read" in say("/load /nowhere")
    assert "holds no conversation" in say(f"/save {__file__}")
    assert "no command /nonsense" in say("/nonsense x")
    assert "Ctrl-\\" in say("/help")
    # Python's readline may lose an interrupt between printing the prompt and waiting for keys: users press again.
    assert any(screen.interrupt_shows("/quit or Ctrl-D ends.") for _ in range(10))
    screen.wait_for("\r\n> ")
    screen.type("/quit")
    assert chat.wait(10) == 0


def test_the_end_of_input_ends_the_conversation(
    conversation: tuple[subprocess.Popen[bytes], Screen],
) -> None:
    chat, screen = conversation
    screen.wait_for("> ")
    screen.type("\x04", end="")
    assert chat.wait(10) == 0


def test_a_reader_that_goes_away_ends_the_answer_quietly() -> None:
    chat = start_chat("--prompt", "endless", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert chat.stdout is not None and chat.stderr is not None
    assert chat.stdout.read(4) == b"1 2 "
    chat.stdout.close()
    errors = chat.stderr.read().decode()
    assert chat.wait(10) in (0, 1)
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    chat.stderr.close()
