"""What a user types behind a slash: settings, files, and looking at what was said."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from chat.conversation_file import Conversation, read_conversation, write_conversation
from chat.display import Streams, harmless, write
from chat.session import SEEDS, Session
from pipeline.errors import MedcotError

HELP = """\
/retry              ask the last question again, with another seed
/thought            show the last thought
/fold on|off        show thoughts as one line, or whole
/think on|off|N     let the model think, leave the thought out, or close it after N tokens
/system [TEXT]      show the system prompt, or set it; /system none, /system default
/set [NAME VALUE]   show the settings, or change one: temperature, top_p, max_tokens, seed
/save [FILE]        write the conversation; /load FILE goes on with one
/copy               the last answer to the clipboard, through the terminal
/new                forget the conversation
/help               show this
/stop, Ctrl-C       stop an answer
Ctrl-\\              end the thought under way and have the answer now
/quit, Ctrl-D       end"""

_COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)
# What terminals take at most: xterm about 100,000 characters of base64.
_LONGEST_COPY = 74_000


@dataclass
class Commands:
    """Carries out commands of a conversation; ``retry`` is the one that answers, ``history`` the file it is kept in."""

    session: Session
    streams: Streams
    model_name: str
    retry: Callable[[], None]
    history: Path | None = None
    folded: bool = False
    ended: bool = field(default=False, init=False)

    def run(self, line: str) -> bool:
        """Carry out ``line`` if it is a command, True then. Raises MedcotError with the sentence to show."""
        found = _COMMAND.fullmatch(line)
        if found is None:
            return False
        name, argument = found[1], (found[2] or "").strip()
        action = self._actions().get(name)
        if action is None:
            raise MedcotError(f"There is no command {name}: /help lists them.")
        action(argument)
        return True

    def _actions(self) -> dict[str, Callable[[str], None]]:
        return {
            "/retry": self._retry,
            "/thought": self._show_thought,
            "/fold": self._fold,
            "/think": self._think,
            "/system": self._system,
            "/set": self._set,
            "/save": self._save,
            "/load": self._load,
            "/copy": self._copy,
            "/new": self._new,
            "/help": lambda _: self.streams.note(HELP),
            "/stop": lambda _: self.streams.note("Nothing is being answered: Ctrl-C stops an answer under way."),
            "/quit": self._quit,
        }

    def save_history(self) -> None:
        """Write the conversation to the file that was named for it, if one was."""
        if self.history is not None:
            write_conversation(self.history, Conversation.of(self.session, self.model_name))

    def load_history(self) -> None:
        """Go on with the conversation in that file, if there is one by now."""
        if self.history is not None and self.history.exists():
            self._resume(self.history)

    def _retry(self, _: str) -> None:
        if self.session.history and self.session.sampling.temperature == 0:
            self.streams.note("At temperature 0 every try says the same: /set temperature 0.6")
        self.retry()

    def _quit(self, _: str) -> None:
        self.ended = True

    def _new(self, _: str) -> None:
        self.session.clear()
        self.streams.note("A new conversation.")
        self.save_history()

    def _show_thought(self, _: str) -> None:
        thought = self.session.history[-1].thought if self.session.history else None
        if not thought:
            raise MedcotError("There is no last thought to show.")
        write(self.streams.status, harmless(thought) + "\n", "dim")

    def _fold(self, argument: str) -> None:
        self.folded = _one_of(argument or ("off" if self.folded else "on"), "/fold", {"on": True, "off": False})
        self.streams.note("Thoughts are shown as one line." if self.folded else "Thoughts are shown whole.")

    def _think(self, argument: str) -> None:
        if argument:
            self.session.thought_budget = thought_budget(argument)
        budget = self.session.thought_budget
        self.streams.note(
            {None: "Thoughts have no limit of their own.", 0: "Thoughts are left out."}.get(
                budget, f"Thoughts are ended after {budget} tokens."
            )
        )

    def _system(self, argument: str) -> None:
        if argument:
            self.session.set_system({"none": "", "default": None}.get(argument, argument))
        system = self.session.system
        self.streams.note("There is no system prompt." if system is None else f"System prompt: {system}")

    def _set(self, argument: str) -> None:
        if argument:
            name, _, value = argument.partition(" ")
            change_setting(self.session, name, value.strip())
        sampling = self.session.sampling
        self.streams.note(
            f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, "
            f"max_tokens {self.session.max_new_tokens}, seed {sampling.seed}"
        )

    def _save(self, argument: str) -> None:
        path = Path(argument).expanduser() if argument else self.history
        if path is None:
            raise MedcotError("Name the file: /save FILE")
        if path.exists():
            read_conversation(path)  # what is no conversation is not written over
        write_conversation(path, Conversation.of(self.session, self.model_name))
        self.streams.note(f"Saved {_turns(self.session)} to {path}.")

    def _load(self, argument: str) -> None:
        if not argument:
            raise MedcotError("Name the file: /load FILE")
        self._resume(Path(argument).expanduser())
        self.save_history()

    def _resume(self, path: Path) -> None:
        conversation = read_conversation(path)
        conversation.resume(self.session)
        other = "" if conversation.model == self.model_name else f", with {conversation.model}"
        self.streams.note(f"Going on with {_turns(self.session)} from {path}{other}.")

    def _copy(self, _: str) -> None:
        answer = self.session.history[-1].answer if self.session.history else ""
        if not answer:
            raise MedcotError("There is no last answer to copy.")
        if not self.streams.in_terminal:
            raise MedcotError("There is no terminal to copy through: standard output goes elsewhere.")
        encoded = base64.b64encode(answer.encode()).decode()
        # OSC 52: https://invisible-island.net/xterm/ctlseqs/ctlseqs.html
        write(self.streams.answer, f"\x1b]52;c;{encoded}\x07")
        limit = "; it is long, and some take no more than 74,000" if len(encoded) > _LONGEST_COPY else ""
        self.streams.note(
            f"Handed {len(answer):,} characters to the terminal's clipboard (OSC 52, which not every terminal "
            f"obeys{limit})."
        )


def thought_budget(text: str) -> int | None:
    """on: None; off: 0; else a number of tokens. Raises MedcotError."""
    if text in ("on", "off"):
        return None if text == "on" else 0
    return int(_number(text, "The thought's budget", 1, 1_000_000, whole=True, instead="on, off or a number of tokens"))


def change_setting(session: Session, name: str, value: str) -> None:
    """Change one setting of the session by its name; raises MedcotError, with nothing changed."""
    match name:
        case "temperature":
            session.sampling = replace(session.sampling, temperature=_number(value, name, 0, 2))
        case "top_p":
            session.sampling = replace(session.sampling, top_p=_number(value, name, 0, 1))
        case "seed":
            session.sampling = replace(session.sampling, seed=int(_number(value, name, 0, SEEDS - 1, whole=True)))
        case "max_tokens":
            session.max_new_tokens = int(_number(value, name, 1, 1_000_000, whole=True))
        case _:
            raise MedcotError(f"There is no setting {name!r:.40}: temperature, top_p, max_tokens or seed.")


def _number(text: str, name: str, low: float, high: float, *, whole: bool = False, instead: str | None = None) -> float:
    try:
        value = float(int(text) if whole else float(text))
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        wanted = instead or f"a {'whole ' if whole else ''}number from {low:g} to {high:,}"
        raise MedcotError(f"{name} is {wanted}, not {text!r:.40}.")
    return value


def _one_of(text: str, name: str, values: dict[str, bool]) -> bool:
    if text not in values:
        raise MedcotError(f"{name} is {' or '.join(values)}, not {text!r:.40}.")
    return values[text]


def _turns(session: Session) -> str:
    count = len(session.forgotten) + len(session.history)
    return "1 turn" if count == 1 else f"{count} turns"
