"""Red flags: fixed rules that find a possible emergency in what a user writes, whatever the model makes of it.

    rules = load_rules()
    flags = find_red_flags("I can't breathe", rules)
    print(warning(flags, rules, numbers_for(rules)))

    watch = RedFlagWatch.load()  # rules and numbers together, as the chat's frontends use them
    print(watch.warning("I can't breathe"))

The rules are words in a file (``chat/data/red_flags.yaml``); nothing is learned, and nothing is sent anywhere.
They miss emergencies and alarm without need: of emergencies told in words that nobody thought of when the rules were
written, they found four in ten (``python tests/red_flag_accuracy.py``). No flag never means no emergency.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chat.emergency_numbers import numbers_for
from chat.phrases import Hit, Phrase
from chat.plain_words import split_words
from chat.red_flag_rules import Group, Numbers, Pattern, Rules, load_rules
from chat.statements import Statements

__all__ = ["RedFlag", "RedFlagWatch", "find_red_flags", "load_rules", "warning"]

ADVICE = "Do not wait for the model's answer. Where another emergency number holds, call that."
NEAR = 15  # words between the phrases of one pattern, also across sentences

Form = Literal["alarm", "reminder"]


@dataclass(frozen=True)
class RedFlagWatch:
    """Rules with the numbers that their warnings name: what a terminal, a page or a server looks at a question with."""

    rules: Rules
    numbers: Numbers

    @classmethod
    def load(
        cls, rules_file: Path | None = None, emergency_number: str | None = None, country: str | None = None
    ) -> RedFlagWatch:
        """The packaged rules unless others are named; numbers as ``numbers_for`` finds them. Raises MedcotError."""
        rules = load_rules(rules_file)
        return cls(rules, numbers_for(rules, emergency_number, country))

    def flags(self, question: str) -> list[RedFlag]:
        return find_red_flags(question, self.rules)

    def warning(self, question: str) -> str | None:
        """What to show above the answer, whatever it says; see ``warning``."""
        return warning(self.flags(question), self.rules, self.numbers)

    def message(self, flag: RedFlag) -> str:
        """What to do about it, with the numbers to call."""
        return flag.message.format(**dict(self.numbers))


@dataclass(frozen=True)
class RedFlag:
    """A possible emergency, and the words that say so.

    ``form`` is "reminder" where the text reads like a case from an examination. ``message`` still has placeholders
    for the numbers of ``chat.emergency_numbers``; ``warning`` fills them.
    """

    id: str
    title: str
    message: str
    quote: str
    form: Form


def find_red_flags(text: str, rules: Rules) -> list[RedFlag]:
    """The emergencies that ``text`` may tell of, in the order of the rules, each once.

    Takes time linear in the length of ``text``.
    """
    words = split_words(text)
    hits = rules.finder.find(words)
    cues = {
        name: [hit for phrase in phrases for hit in hits.get(phrase, ())]
        for name, phrases in rules.cues.phrases.items()
    }
    red_flags = {phrase: hits[phrase] for group in rules.groups for phrase in group.phrases() if phrase in hits}
    if not red_flags:
        return []
    statements = Statements(words, cues, (hit for found in red_flags.values() for hit in found))
    asserted = {phrase: [hit for hit in found if statements.asserts(hit)] for phrase, found in red_flags.items()}
    form: Form = "reminder" if statements.is_vignette() else "alarm"
    found = ((group, _first_match(group, red_flags, asserted)) for group in rules.groups)
    return [
        RedFlag(group.id, group.title, group.message, words.quote(match.start, match.end), form)
        for group, match in found
        if match is not None
    ]


def warning(flags: Sequence[RedFlag], rules: Rules, numbers: Numbers) -> str | None:
    """What to show above the model's answer, as plain lines; None without flags.

    Quotes the user: whoever shows it makes it harmless in a terminal or a page.
    """
    if not flags:
        return None
    if all(flag.form == "reminder" for flag in flags):
        titles = ", ".join(flag.title.lower() for flag in flags)
        return f"If this is no case to study but someone now ({titles}): call {numbers.emergency_number}."
    lines = []
    for flag in flags:
        lines += [f'{flag.title.upper()} (you wrote "{_shorten(flag.quote)}")', flag.message.format(**dict(numbers))]
    return "\n".join([*lines, ADVICE, f"[A fixed rule says this, not the model. {rules.review}]"])


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _first_match(
    group: Group, red_flags: Mapping[Phrase, Sequence[Hit]], asserted: Mapping[Phrase, Sequence[Hit]]
) -> Hit | None:
    in_context = any(asserted.get(phrase) for phrase in group.somewhere)
    return (
        _match_any(group.any_of, asserted)
        or (_match_any(group.any_of_in_context, asserted) if in_context else None)
        or _match_any(group.always, red_flags)
    )


def _match_any(patterns: Iterable[Pattern], hits: Mapping[Phrase, Sequence[Hit]]) -> Hit | None:
    matches = (_match(pattern, hits) for pattern in patterns)
    return next((match for match in matches if match is not None), None)


def _match(pattern: Pattern, hits: Mapping[Phrase, Sequence[Hit]]) -> Hit | None:
    """The words around the first hit of the pattern's first phrase that has a hit of every other one near it."""
    first, *others = (hits.get(phrase, ()) for phrase in pattern.phrases)
    for hit in first:
        near = [_nearest(hit, candidates) for candidates in others]
        found = [hit, *(other for other in near if other is not None)]
        if len(found) == len(pattern.phrases):
            return Hit(min(each.start for each in found), max(each.end for each in found))
    return None


def _nearest(hit: Hit, candidates: Sequence[Hit]) -> Hit | None:
    """The first of ``candidates`` that is near ``hit`` and shares no word with it."""
    for index in range(bisect_left(candidates, Hit(hit.start - NEAR, 0)), len(candidates)):
        candidate = candidates[index]
        if candidate.start > hit.end + NEAR:
            return None
        if candidate.end <= hit.start or candidate.start >= hit.end:
            return candidate
    return None
