"""How well the red-flag rules do on hand-written sentences, and the tables that say so.

    python tests/red_flag_accuracy.py [RULES.yaml]

In ``tests/data``: the tuning sentences are what the rules were adjusted on. The held-out ones were written before there
were rules, and no rule was changed because of one of them; but rules and sentences were written within an hour by one
author, who remembers words. The unseen ones were written afterwards, against finished rules, in other words, and
tell best what to expect; whoever changes a rule because of one moves it to the tuning sentences and writes another.
All are in English and invented.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chat.safety import RedFlag, find_red_flags, load_rules

DATA = Path(__file__).resolve().parent / "data"
SETS = ("tuning", "held_out", "unseen")


@dataclass(frozen=True)
class Sentence:
    """``expected`` groups must be flagged, ``allowed`` ones (with a ? in the file) may be."""

    kind: str
    expected: frozenset[str]
    allowed: frozenset[str]
    text: str


@dataclass(frozen=True)
class Judged:
    sentence: Sentence
    flags: tuple[RedFlag, ...]

    @property
    def found(self) -> frozenset[str]:
        return frozenset(flag.id for flag in self.flags)


@dataclass(frozen=True)
class Accuracy:
    """Counts of right alarms, needless alarms and missed ones."""

    right: int
    needless: int
    missed: int

    @property
    def precision(self) -> float:
        return self.right / (self.right + self.needless) if self.right + self.needless else 1.0

    @property
    def recall(self) -> float:
        return self.right / (self.right + self.missed) if self.right + self.missed else 1.0

    def __str__(self) -> str:
        return (
            f"precision {self.precision:6.1%}  recall {self.recall:6.1%}  "
            f"({self.right} right, {self.needless} needless, {self.missed} missed)"
        )


def read_sentences(name: str) -> list[Sentence]:
    with (DATA / f"red_flag_sentences_{name}.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [_sentence(row["kind"], row["groups"].split(), row["text"]) for row in rows]


def judge(name: str, rules_file: Path | None = None) -> list[Judged]:
    rules = load_rules(rules_file)
    return [Judged(sentence, tuple(find_red_flags(sentence.text, rules))) for sentence in read_sentences(name)]


def alarms(judged: Judged) -> list[RedFlag]:
    return [flag for flag in judged.flags if flag.form == "alarm"]


def by_sentence(judged: Sequence[Judged]) -> Accuracy:
    """A sentence that should alarm is right when one of its own groups does; any alarm in another is needless."""
    return Accuracy(
        right=sum(bool(each.found & each.sentence.expected) for each in judged),
        needless=sum(bool(each.found) for each in judged if not each.sentence.expected),
        missed=sum(not each.found & each.sentence.expected for each in judged if each.sentence.expected),
    )


def by_group(judged: Sequence[Judged]) -> dict[str, Accuracy]:
    groups = sorted({group for each in judged for group in each.found | each.sentence.expected})
    return {
        group: Accuracy(
            right=sum(group in each.found & each.sentence.expected for each in judged),
            needless=sum(group in each.found - each.sentence.expected - each.sentence.allowed for each in judged),
            missed=sum(group in each.sentence.expected - each.found for each in judged),
        )
        for group in groups
    }


def _sentence(kind: str, groups: Sequence[str], text: str) -> Sentence:
    expected = frozenset(group for group in groups if not group.endswith("?"))
    return Sentence(kind, expected, frozenset(group.rstrip("?") for group in groups) - expected, text)


def print_table(name: str, judged: Sequence[Judged]) -> None:
    print(f"\n{name}: {len(judged)} sentences")
    print(f"  {'alarm or none':22}{by_sentence(judged)}")
    for kind in dict.fromkeys(each.sentence.kind for each in judged):
        of_kind = [each for each in judged if each.sentence.kind == kind]
        flagged = sum(bool(each.flags) for each in of_kind)
        print(f"    {kind:20}{flagged} of {len(of_kind)} flagged")
    groups = by_group(judged)
    total = Accuracy(
        sum(each.right for each in groups.values()),
        sum(each.needless for each in groups.values()),
        sum(each.missed for each in groups.values()),
    )
    print(f"  {'which group':22}{total}")
    for group, accuracy in groups.items():
        print(f"    {group:20}{accuracy}")
    for each in judged:
        missed = each.sentence.expected - each.found
        needless = each.found - each.sentence.expected - each.sentence.allowed
        if missed or needless:
            print(f"  missed {sorted(missed)}, needless {sorted(needless)}: {each.sentence.text}")


def main() -> None:
    rules_file = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    for name in SETS:
        print_table(name, judge(name, rules_file))


if __name__ == "__main__":
    main()
