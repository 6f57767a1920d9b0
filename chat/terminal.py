"""Chat with a GGUF in a terminal, or let it answer one question in a script.

medcot chat runs/smollm2-cpu/gguf/smollm2-cpu-Q4_K_M.gguf
echo "What causes gout?" | medcot chat FILE.gguf > answer.txt
"""

from __future__ import annotations

import importlib
import signal
import sys
import textwrap
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

from chat.commands import Commands, thought_budget
from chat.disclaimer import disclaimer_to_show
from chat.display import StreamingDisplay, Streams, harmless, turn_as_json, write
from chat.proof import prove
from chat.safety import RedFlagWatch
from chat.session import ChatModel, Sampling, Session
from chat.turn import Event
from pipeline.errors import MedcotError

DEFAULT_MAX_NEW_TOKENS = 1024
DEFAULT_SEED = 0
_SHOWN_SYSTEM = 45  # characters of the system prompt, so that its line fits 80 columns


def run_chat(
    path: Path,
    prompt: str | None,
    *,
    n_ctx: int = 4096,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    think: str | None = None,
    system: str | None = None,
    threads: int | None = None,
    show_thought: bool = True,
    as_json: bool = False,
    history: Path | None = None,
    emergency_number: str | None = None,
    country: str | None = None,
    red_flags: Path | None = None,
) -> None:
    """Answer ``prompt``, or what is piped into standard input, or else converse until the user ends it.

    ``n_ctx`` is capped to the context the model was trained for (tokens). ``think`` is on, off or a number of tokens.
    The conversation in ``history`` is gone on with, with its settings where this call leaves them None, and written
    there after every turn. Where standard output is no terminal it gets the answer alone; the thought and all else go
    to standard error. An interrupt of a single answer is raised as KeyboardInterrupt after what was said is printed.
    ``red_flags`` replaces the packaged rules that look for emergencies in what is asked; numbers in their warnings are
    as ``numbers_for`` has it.
    """
    streams = Streams.standard()
    question = prompt if prompt is not None else _piped_question()
    if as_json and question is None:
        raise MedcotError("--json answers one question: give it with --prompt or through standard input.")
    if question is not None and not question.strip():
        raise MedcotError("The question is empty: give it with --prompt or through standard input.")
    budget = None if think is None else thought_budget(think)
    watch = RedFlagWatch.load(red_flags, emergency_number, country)
    if question is not None:
        _warn(question, watch, streams)
    if not as_json:
        for text in filter(None, disclaimer_to_show()):
            streams.note(text)
    with open_model(path, n_ctx, threads, None if as_json else streams) as model:
        session = Session(model, Sampling.for_model(model, seed=DEFAULT_SEED), DEFAULT_MAX_NEW_TOKENS)
        chat = _Chat(session, streams, watch, path.name, history, folded=not show_thought, as_json=as_json)
        chat.commands.load_history()
        kept = session.sampling
        session.sampling = Sampling(
            temperature=kept.temperature if temperature is None else temperature,
            top_p=kept.top_p if top_p is None else top_p,
            seed=kept.seed if seed is None else seed,
        )
        session.max_new_tokens = max_new_tokens or session.max_new_tokens
        session.thought_budget = session.thought_budget if think is None else budget
        if system is not None:
            session.set_system(system)
        if question is None:
            chat.converse()
        else:
            chat.answer_one(_as_text(question))


@contextmanager
def open_model(path: Path, n_ctx: int, threads: int | None, streams: Streams | None = None) -> Iterator[ChatModel]:
    """Prove the file in a child process, saying so where that is new, then load it into this one."""

    def announce() -> None:
        if streams is not None:
            streams.note(f"Checking {path.name}, because it is new here ...")

    proof = prove(path, announce)
    # llama.cpp comes into this process only now: a build that dies on this CPU has died in the child.
    from export.gguf_model import GgufModel

    with GgufModel(path, n_ctx=min(n_ctx, proof.context_length or n_ctx), n_threads=threads) as model:
        yield model


class _Chat:
    """One conversation with its streams: reads lines, shows answers."""

    def __init__(
        self,
        session: Session,
        streams: Streams,
        watch: RedFlagWatch,
        model_name: str,
        history: Path | None,
        *,
        folded: bool,
        as_json: bool,
    ) -> None:
        self._session = session
        self._streams = streams
        self._watch = watch
        self._model_name = model_name
        self._as_json = as_json
        self.commands = Commands(session, streams, model_name, self._retry, history, folded)

    def answer_one(self, question: str) -> None:
        """Answer and end; raises KeyboardInterrupt when the answer was interrupted."""
        if not self._answer(self._session.ask(question)):
            raise KeyboardInterrupt

    def converse(self) -> None:
        """Read questions and commands until one of them, or the end of the input, ends it."""
        with suppress(ImportError):
            importlib.import_module("readline")  # gives input() line editing and recall
        self._streams.note("/help lists the commands, /quit ends.")
        if self._session.system is not None:
            shown = textwrap.shorten(self._session.system, _SHOWN_SYSTEM, placeholder=" ...")
            self._streams.note(f"System prompt: {shown} (/system shows it)")
        while not self.commands.ended:
            try:
                line = _as_text(_read_line(self._streams)).strip()
            except EOFError:
                write(self._streams.status, "\n")
                return
            except KeyboardInterrupt:
                self._streams.note("\n/quit or Ctrl-D ends.")
                continue
            try:
                if line and not self.commands.run(line):
                    _warn(line, self._watch, self._streams)
                    self._answer(self._session.ask(line))
            except MedcotError as error:
                self._streams.note(str(error))

    def _retry(self) -> None:
        self._answer(self._session.retry())

    def _answer(self, events: Generator[Event, None, None]) -> bool:
        """Show one turn; False when it was interrupted (what was said stays in the history)."""
        display = None if self._as_json else StreamingDisplay(self._streams, self.commands.folded)
        with _keys(self._session), closing(events):
            try:
                for event in events:
                    if display is not None:
                        display.show(event)
            except KeyboardInterrupt:  # a second one, before the first has stopped the answer
                events.close()
                if display is not None and self._session.history:
                    display.end(self._session.history[-1])
        if not self._session.history:
            return False
        turn = self._session.history[-1]
        if self._as_json:
            write(self._streams.answer, turn_as_json(self._model_name, turn, self._watch) + "\n")
        self.commands.save_history()
        return turn.finished != "stopped"


@contextmanager
def _keys(session: Session) -> Iterator[None]:
    """While an answer is made Ctrl-C stops it (a second one at once), and Ctrl-\\ closes its thought."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        session.stop()

    def answer_now(_number: int, _frame: FrameType | None) -> None:
        session.answer_now()

    handlers = {signal.SIGINT: stop}
    if hasattr(signal, "SIGQUIT"):  # not on Windows
        handlers[signal.SIGQUIT] = answer_now
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn(question: str, watch: RedFlagWatch, streams: Streams) -> None:
    told = watch.warning(question)
    if told is not None:
        write(streams.status, harmless(told) + "\n", "bold red")


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
