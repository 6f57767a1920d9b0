"""Chat with a GGUF in a terminal, or let it answer one question in a script.

medcot chat runs/smollm2-cpu/gguf/smollm2-cpu-Q4_K_M.gguf
echo "What causes gout?" | medcot chat FILE.gguf > answer.txt
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from chat.disclaimer import disclaimer_to_show
from chat.display import StreamingDisplay, Streams, harmless, turn_as_json, write
from chat.proof import known_proof, prove
from chat.safety import RedFlagWatch
from chat.session import ChatModel, Sampling, Session
from pipeline.errors import MedcotError

HELP = """\
/new    forget the conversation
/help   show this
/quit   end (Ctrl-D too); Ctrl-C stops an answer"""


def run_chat(
    path: Path,
    prompt: str | None,
    *,
    n_ctx: int = 4096,
    max_new_tokens: int = 1024,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    threads: int | None = None,
    show_thought: bool = True,
    as_json: bool = False,
    emergency_number: str | None = None,
    country: str | None = None,
    red_flags: Path | None = None,
) -> None:
    """Answer ``prompt``, or what is piped into standard input, or else converse until the user ends it.

    ``n_ctx`` is capped to the context the model was trained for (tokens). Where standard output is no
    terminal it gets the answer alone; the thought and all else go to standard error. An interrupt of a single
    answer is raised as KeyboardInterrupt after what was said is printed. ``red_flags`` replaces the packaged rules
    that look for emergencies in what is asked; numbers in their warnings are as ``numbers_for`` has it.
    """
    streams = Streams.standard()
    question = prompt if prompt is not None else _piped_question()
    if as_json and question is None:
        raise MedcotError("--json answers one question: give it with --prompt or through standard input.")
    if question is not None and not question.strip():
        raise MedcotError("The question is empty: give it with --prompt or through standard input.")
    watch = RedFlagWatch.load(red_flags, emergency_number, country)
    if question is not None:
        _warn(question, watch, streams)
    if not as_json:
        for text in filter(None, disclaimer_to_show()):
            streams.note(text)
        if known_proof(path) is None:
            streams.note(f"Checking {path.name}, because it is new here ...")
    with open_model(path, n_ctx, threads) as model:
        sampling = Sampling.for_model(model, temperature=temperature, top_p=top_p, seed=seed)
        session = Session(model, sampling, max_new_tokens)
        if question is None:
            _converse(session, streams, show_thought, watch)
        elif as_json:
            _answer_as_json(session, _as_text(question), path.name, streams, watch)
        elif not _answer(session, _as_text(question), streams, show_thought):
            raise KeyboardInterrupt


@contextmanager
def open_model(path: Path, n_ctx: int, threads: int | None) -> Iterator[ChatModel]:
    """Prove the file in a child process, then load it into this one."""
    proof = prove(path)
    # llama.cpp comes into this process only now: a build that dies on this CPU has died in the child.
    from export.gguf_model import GgufModel

    with GgufModel(path, n_ctx=min(n_ctx, proof.context_length or n_ctx), n_threads=threads) as model:
        yield model


def _warn(question: str, watch: RedFlagWatch, streams: Streams) -> None:
    told = watch.warning(question)
    if told is not None:
        write(streams.status, harmless(told) + "\n", "bold red")


def _converse(session: Session, streams: Streams, show_thought: bool, watch: RedFlagWatch) -> None:
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() line editing and recall
    streams.note("/help lists the commands, /quit ends.")
    while True:
        try:
            line = _read_line(streams).strip()
        except EOFError:
            write(streams.status, "\n")
            return
        except KeyboardInterrupt:
            streams.note("\n/quit or Ctrl-D ends.")
            continue
        match line:
            case "":
                continue
            case "/quit":
                return
            case "/new":
                session.clear()
                streams.note("A new conversation.")
            case "/help":
                streams.note(HELP)
            case command if command.startswith("/") and " " not in command:
                streams.note(f"There is no command {command}.\n{HELP}")
            case _:
                _warn(line, watch, streams)
                try:
                    _answer(session, _as_text(line), streams, show_thought)
                except MedcotError as error:
                    streams.note(str(error))


def _answer(session: Session, question: str, streams: Streams, show_thought: bool) -> bool:
    """Stream one answer; False when it was interrupted (what was said stays in the history)."""
    display = StreamingDisplay(streams, show_thought)
    with closing(session.ask(question)) as events:
        try:
            for event in events:
                display.show(event)
            return True
        except KeyboardInterrupt:
            events.close()
            if session.history:
                display.end(session.history[-1])
            return False


def _answer_as_json(session: Session, question: str, model_name: str, streams: Streams, watch: RedFlagWatch) -> None:
    with closing(session.ask(question)) as events:
        try:
            for _ in events:
                pass
        finally:
            events.close()
            if session.history:
                write(streams.answer, turn_as_json(model_name, session.history[-1], watch) + "\n")


def _read_line(streams: Streams) -> str:
    if streams.in_terminal:
        return input("\n> ")
    write(streams.status, "\n> ")
    return input()


def _piped_question() -> str | None:
    """What is piped into standard input; None when that is a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")


def _as_text(typed: str) -> str:
    """Bytes that were not UTF-8 arrive from the command line as lone surrogates, which no tokenizer takes."""
    return typed.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
