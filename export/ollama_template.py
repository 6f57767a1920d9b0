"""A Jinja chat template as the Go template that Ollama wants.

What a template writes around the messages is read off a rendered conversation; put together again, it must give what
the Jinja template gives for other conversations, or there is no Go template. So no list of known models is needed, and
none is mistaken for another.

Formats: https://docs.ollama.com/template and https://pkg.go.dev/text/template
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from pipeline.chat_template import THINK_CLOSE, THINK_OPEN, ChatTemplate, Message
from pipeline.errors import MedcotError

_SYSTEM, _QUESTION, _ANSWER, _NEXT = "\ue010sys\ue011", "\ue010ask\ue011", "\ue010say\ue011", "\ue010next\ue011"


@dataclass(frozen=True)
class TurnTexts:
    """What a chat template writes around the contents of a conversation, the system prompt before all others.

    ``before_system`` and ``after_system`` are None where the template has no such place for a system prompt;
    ``asking`` stands behind the last question and ends with the generation prompt.
    """

    opening: str
    before_system: str | None
    after_system: str | None
    before_answer: str
    after_answer: str
    asking: str

    def conversation(self, messages: Sequence[Message]) -> str:
        """``messages`` as text: perhaps a system prompt, then questions and answers by turns, a question last."""
        contents = [message["content"] for message in messages]
        text = self.opening
        if messages[0]["role"] == "system":
            text = f"{self.before_system}{contents.pop(0)}{self.after_system}"
        for index, content in enumerate(contents[:-1]):
            text += content + (self.before_answer if index % 2 == 0 else self.after_answer)
        return text + contents[-1] + self.asking

    def without_bos(self, bos: str) -> TurnTexts:
        """The same without the BOS that a template writes first: llama.cpp puts one there by itself."""
        before = None if self.before_system is None else self.before_system.removeprefix(bos)
        return replace(self, opening=self.opening.removeprefix(bos), before_system=before)

    def with_default_system(self, system: str) -> TurnTexts:
        """The same with ``system`` where a conversation brings no system prompt of its own."""
        return replace(self, opening=f"{self.before_system}{system}{self.after_system}")


def turn_texts(template: ChatTemplate) -> TurnTexts | None:
    """Read a template's texts; None for one that does more than put fixed texts around the messages.

    Raises MedcotError for a template that refuses a question, an answer and another question.
    """
    now = datetime.now()  # one moment for all: some templates write the date
    asked = _message("user", _QUESTION), _message("assistant", _ANSWER), _message("user", _NEXT)
    found = _around(template.render(asked, now=now), _QUESTION, _ANSWER, _NEXT)
    if found is None:
        return None
    opening, before_answer, after_answer, asking = found
    turns = TurnTexts(opening, None, None, before_answer, after_answer, asking)
    if not _agrees(turns, template, [], now):
        return None
    system = [_message("system", _SYSTEM)]
    try:
        with_system = _around(template.render([*system, asked[0]], now=now), _SYSTEM, _QUESTION)
        if with_system is None:
            return turns
        complete = replace(turns, before_system=with_system[0], after_system=with_system[1])
        return complete if _agrees(complete, template, system, now) else turns
    except MedcotError:
        # Gemma's and the first Mistral templates refuse a system prompt.
        return turns


def go_template(turns: TurnTexts) -> str:
    """The Go template, which Ollama runs with ``.System`` and ``.Messages``; it adds nothing to the texts.

    Where the generation prompt opens the thought, ``.Thinking`` tells Ollama the tags, so that it takes the thought
    out of the answer, and out of the history as R1's Jinja template does (ollama/ollama, thinking/template.go).
    """
    start = _literal(turns.opening)
    if turns.before_system is not None and turns.after_system is not None:
        system = f"{_literal(turns.before_system)}{{{{ .System }}}}{_literal(turns.after_system)}"
        start = f"{{{{ if .System }}}}{system}{{{{ else }}}}{start}{{{{ end }}}}"
    thought = ""
    if turns.asking.rstrip().endswith(THINK_OPEN):
        thought = f"{{{{ if and $last .Thinking }}}}{THINK_OPEN}\n{{{{ .Thinking }}}}\n{THINK_CLOSE}\n\n{{{{ end }}}}"
    answer = _literal(turns.asking)
    if turns.asking != turns.before_answer:
        answer = f"{{{{ if $last }}}}{answer}{{{{ else }}}}{_literal(turns.before_answer)}{{{{ end }}}}"
    return (
        f"{start}{{{{ range $index, $message := .Messages }}}}"
        "{{ $last := eq (len (slice $.Messages $index)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{answer}'
        f'{{{{ else if eq .Role "assistant" }}}}{thought}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{_literal(turns.after_answer)}{{{{ end }}}}"
        "{{ end }}{{ end }}"
    )


def is_plain(text: str) -> bool:
    """Whether a Modelfile can hold ``text`` between triple quotes.

    A line that ends in triple quotes ends the value, and Ollama's reader drops what Go calls unprintable, a
    no-break space among it (ollama/ollama, parser/parser.go). There is no escape.
    """
    return '"""' not in text and all(character.isprintable() or character in "\n\t" for character in text)


def _agrees(turns: TurnTexts, template: ChatTemplate, system: Sequence[Message], now: datetime) -> bool:
    """Whether the texts give what the template gives, for contents and lengths they were not read from."""
    talk = [_message(role, f"{role} {turn}: 5 mg,\n\ntwice.") for turn in range(3) for role in ("user", "assistant")]
    return all(
        turns.conversation([*system, *talk[:length]]) == template.render([*system, *talk[:length]], now=now)
        for length in (1, 3, 5)
    )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _around(text: str, *contents: str) -> tuple[str, ...] | None:
    """The texts before, between and behind ``contents``; None unless each is there once and in this order."""
    parts = re.split("|".join(map(re.escape, contents)), text)
    return tuple(parts) if "".join(map("".join, zip(parts, [*contents, ""], strict=False))) == text else None


def _literal(text: str) -> str:
    """``text`` for a Go template inside a Modelfile: what either would take for its own becomes a Go string."""

    def safe(match: re.Match[str]) -> str:
        found = match[0]
        if found.isprintable() and found[0] != "{" and not found.startswith('"""'):
            return found
        escaped = "".join(f"\\U{ord(character):08x}" for character in found)
        return f'{{{{ "{escaped}" }}}}'

    return re.sub(r'\{+|"{3,}|[^\n\t]', safe, text)
