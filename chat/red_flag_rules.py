"""The red-flag rules as their YAML file holds them, and as they are searched for.

``chat/data/red_flags.yaml`` explains at its top how rules are written; it is meant to be edited by clinicians.
"""

from __future__ import annotations

import itertools
import reprlib
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from chat.phrases import Phrase, PhraseFinder, parse_run
from pipeline.errors import MedcotError
from pipeline.yaml_errors import YAML_ERRORS

PACKAGED_RULES = Path(__file__).parent / "data" / "red_flags.yaml"
DEPTH = 5  # groups -> a group -> in_context -> somewhere -> a phrase
PLACEHOLDERS = {"emergency_number", "crisis_line"}

# libyaml's parser is ten times as fast, and the chat starts with this file; the loader is the safe one in both.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Location = tuple[int | str, ...]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InContext(_Section):
    """Patterns that count only where one of the phrases of ``somewhere`` is in the same text."""

    somewhere: tuple[Text, ...] = Field(min_length=1)
    any_of: tuple[Text, ...] = Field(min_length=1)


class GroupText(_Section):
    """One emergency in the file. ``always`` counts also in questions, stories and after a negation."""

    id: str = Field(pattern=r"^[a-z]+(-[a-z]+)*$")
    title: Text
    message: Text
    any_of: tuple[Text, ...] = ()
    always: tuple[Text, ...] = ()
    in_context: InContext | None = None


class CueTexts(_Section):
    """Phrases that tell how a sentence is meant; the file says what each list does."""

    negations: tuple[Text, ...]
    listing_negations: tuple[Text, ...]
    no_negations: tuple[Text, ...]
    clause_starts: tuple[Text, ...]
    contrasts: tuple[Text, ...]
    introductions: tuple[Text, ...]
    past: tuple[Text, ...]
    current: tuple[Text, ...]
    hypothetical: tuple[Text, ...]
    fillers: tuple[Text, ...]
    question_openings: tuple[Text, ...]
    question_phrases: tuple[Text, ...]
    personal: tuple[Text, ...]
    impersonal: tuple[Text, ...]
    study: tuple[Text, ...]
    first_person: tuple[Text, ...]
    vignette_people: tuple[Text, ...]
    vignette_events: tuple[Text, ...]
    exam_questions: tuple[Text, ...]


class Numbers(_Section):
    """What to call: the emergency number, and where a person in a crisis of mind finds someone to talk to."""

    emergency_number: Text
    crisis_line: Text


class RulesText(_Section):
    """The whole file."""

    review: Text
    default_numbers: Numbers
    numbers_by_country: dict[Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$")], Numbers]
    lists: dict[str, tuple[Text, ...]]
    cues: CueTexts
    groups: tuple[GroupText, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Pattern:
    """Phrases that must all occur near each other."""

    phrases: tuple[Phrase, ...]


@dataclass(frozen=True)
class Group:
    """One emergency, ready to be searched for."""

    id: str
    title: str
    message: str
    any_of: tuple[Pattern, ...]
    always: tuple[Pattern, ...]
    somewhere: tuple[Phrase, ...]
    any_of_in_context: tuple[Pattern, ...]

    def phrases(self) -> Iterator[Phrase]:
        yield from self.somewhere
        for pattern in (*self.any_of, *self.always, *self.any_of_in_context):
            yield from pattern.phrases


@dataclass(frozen=True)
class Cues:
    """``CueTexts``, ready to be searched for. A gap in a phrase skips no negating word."""

    phrases: Mapping[str, tuple[Phrase, ...]]
    negating_words: frozenset[str]


@dataclass(frozen=True)
class Rules:
    """All that ``chat.safety.find_red_flags`` needs, and the numbers for its messages."""

    review: str
    default_numbers: Numbers
    numbers_by_country: Mapping[str, Numbers]
    cues: Cues
    groups: tuple[Group, ...]

    @cached_property
    def finder(self) -> PhraseFinder:
        of_cues = itertools.chain.from_iterable(self.cues.phrases.values())
        of_groups = itertools.chain.from_iterable(group.phrases() for group in self.groups)
        return PhraseFinder([*of_cues, *of_groups], self.cues.negating_words)


def load_rules(path: Path | None = None) -> Rules:
    """Read the packaged rules, or those in ``path``.

    Raises MedcotError that lists every problem with its file, line and key.
    """
    path = path or PACKAGED_RULES
    root, values = _read_yaml(path)
    problems = [f"{path}:{line}: {key}: written twice" for key, line in _repeated_keys(root)]
    try:
        text = RulesText.model_validate(values)
    except ValidationError as error:
        problems += [_explain(path, root, detail) for detail in error.errors()]
        raise MedcotError("; ".join(problems)) from error
    compiler = _Compiler(path, root, text)
    rules = compiler.rules()
    problems += compiler.problems
    if problems:
        raise MedcotError("; ".join(problems))
    return rules


class _Compiler:
    """Parses every phrase of the file, and collects what is wrong with them."""

    def __init__(self, path: Path, root: yaml.Node, text: RulesText) -> None:
        self._path = path
        self._root = root
        self._text = text
        self._known: dict[str, Phrase] = {}
        self.problems: list[str] = []

    def rules(self) -> Rules:
        text = self._text
        for name, runs in text.lists.items():
            for index, run in enumerate(runs):
                with self._complaining(("lists", name, index)):
                    parse_run(run)
        return Rules(
            review=text.review,
            default_numbers=text.default_numbers,
            numbers_by_country=text.numbers_by_country,
            cues=self._cues(),
            groups=tuple(self._group(index, group) for index, group in enumerate(text.groups)),
        )

    def _cues(self) -> Cues:
        phrases = {name: self._phrases(texts, ("cues", name)) for name, texts in self._text.cues}
        negating = (*phrases["negations"], *phrases["listing_negations"])
        return Cues(phrases, frozenset(word for phrase in negating for word in phrase.first_words()))

    def _group(self, index: int, group: GroupText) -> Group:
        here: Location = ("groups", index)
        if group.id in [other.id for other in self._text.groups[:index]]:
            self._complain((*here, "id"), f"another group is called {group.id}")
        if not (group.any_of or group.always or group.in_context):
            self._complain(here, f"{group.id} has no pattern: give it any_of, always or in_context")
        self._check_placeholders(group.message, (*here, "message"))
        context = group.in_context
        return Group(
            id=group.id,
            title=group.title,
            message=group.message,
            any_of=self._patterns(group.any_of, (*here, "any_of")),
            always=self._patterns(group.always, (*here, "always")),
            somewhere=self._phrases(context.somewhere if context else (), (*here, "in_context", "somewhere")),
            any_of_in_context=self._patterns(context.any_of if context else (), (*here, "in_context", "any_of")),
        )

    def _patterns(self, texts: Sequence[str], here: Location) -> tuple[Pattern, ...]:
        patterns = []
        for index, text in enumerate(texts):
            with self._complaining((*here, index)):
                patterns.append(Pattern(tuple(self._phrase(part) for part in text.split(" + "))))
        return tuple(patterns)

    def _phrases(self, texts: Sequence[str], here: Location) -> tuple[Phrase, ...]:
        return tuple(pattern.phrases[0] for pattern in self._patterns(texts, here))

    def _phrase(self, text: str) -> Phrase:
        # Many patterns share a phrase, which is then searched for once.
        if text not in self._known:
            self._known[text] = Phrase.parse(text, self._text.lists)
        return self._known[text]

    def _check_placeholders(self, message: str, here: Location) -> None:
        names: set[str] = set()
        with self._complaining(here):
            names = {name for _, name, _, _ in string.Formatter().parse(message) if name is not None}
        for name in sorted(names - PLACEHOLDERS):
            self._complain(
                here, f"there is no {{{name}}}: write {' or '.join(f'{{{p}}}' for p in sorted(PLACEHOLDERS))}"
            )

    @contextmanager
    def _complaining(self, here: Location) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self._complain(here, str(error))

    def _complain(self, here: Location, what: str) -> None:
        self.problems.append(f"{self._path}:{_line(self._root, here)}: {_key(here)}: {what}")


def _read_yaml(path: Path) -> tuple[yaml.Node, Any]:
    try:
        loader = _LOADER(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        values = None if root is None else loader.construct_document(root)
    except OSError as error:
        raise MedcotError(f"The red-flag rules {path} cannot be read: {error.strerror}.") from error
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise MedcotError(f"{where} is not valid YAML: {reason}.") from error
    if not isinstance(root, yaml.MappingNode):
        raise MedcotError(
            f"{path} must hold red-flag rules as 'key: value' lines; start from a copy of the packaged ones."
        )
    return root, values


def _repeated_keys(node: yaml.Node, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    # An alias can make a node contain itself; no rule lies deeper than this.
    if depth > DEPTH:
        return
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value, start=1):
            yield from _repeated_keys(item, f"{prefix}{index}.", depth + 1)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                yield f"{prefix}{key.value}", key.start_mark.line + 1
            seen.add(key.value)
            yield from _repeated_keys(value, f"{prefix}{key.value}.", depth + 1)


def _explain(path: Path, root: yaml.Node, detail: Any) -> str:
    location: Location = detail["loc"]
    where = f"{path}:{_line(root, location)}: {_key(location)}"
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    if detail["type"] == "string_type":
        return f"{where}: must be text, so write it in quotes (found {reprlib.repr(detail['input'])})"
    return f"{where}: {detail['msg'][0].lower()}{detail['msg'][1:]} (found {reprlib.repr(detail['input']):.80})"


def _line(node: yaml.Node, location: Location) -> int:
    """The line of what ``location`` leads to, or of the last part of the way that is there."""
    line = node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _key(location: Location) -> str:
    return ".".join(str(part + 1 if isinstance(part, int) else part) for part in location)
