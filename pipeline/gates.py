"""Regression gates: what an evaluation must show for a run to go on, ``evaluation.gates`` or ``--gate``.

answer_perplexity: better      # than the base, with 95 % confidence
rouge_l: not worse
format: ">= 0.8"               # the value itself
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pipeline.metrics import METRICS, Metric

_NAMES: dict[str, Metric] = {metric.key: metric for metric in METRICS}
_NAMES["format"] = _NAMES["well_formed"]
_LIMIT = re.compile(r"(>=|<=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")
_COMMAND_LINE = re.compile(r"\s*(\w+)\s*=?\s*(\S.*)", re.DOTALL)


@dataclass(frozen=True)
class Gate:
    """``limit`` is for >= and <=; better and not worse hold against the base instead."""

    metric: Metric
    relation: Literal["better", "not worse", ">=", "<="]
    limit: float | None = None

    @property
    def needs_reference(self) -> bool:
        return self.limit is None

    @property
    def unmeasured(self) -> str:
        """What is said of a gate whose metric has no value."""
        lacking = {
            "reasoning": "no record has reasoning (data.columns.reasoning)",
            "options": "no record is asked with options (data.columns.options, evaluation.choice_rows)",
        }
        why = lacking[self.metric.needs] if self.metric.needs else "no record has what it takes"
        return f"{self.metric.key} must be {self.condition} and is not measured, since {why}"

    @property
    def condition(self) -> str:
        return self.relation if self.limit is None else f"{self.relation} {self.limit:g}"


def parse_gate(name: str, condition: str) -> Gate:
    """Raises ValueError saying in one sentence what is wrong."""
    metric = _NAMES.get(name)
    if metric is None:
        raise ValueError(f"there is no metric {name}: gates name {', '.join(each.key for each in METRICS)}, or format")
    condition = " ".join(condition.split())
    if condition in ("better", "not worse"):
        if metric.better is None:
            raise ValueError(f"{name} is neither better high nor low: give it a limit such as '<= 500'")
        return Gate(metric, "better" if condition == "better" else "not worse")
    found = _LIMIT.fullmatch(condition)
    if found is None:
        raise ValueError(f"{name}: {condition!r} is no condition: write better, not worse, '>= NUMBER' or '<= NUMBER'")
    return Gate(metric, ">=" if found[1] == ">=" else "<=", float(found[2]))


def split_gate(text: str) -> tuple[str, str]:
    """``metric=condition``, ``metric>=0.8`` or ``metric<=12`` of a command line; raises ValueError."""
    found = _COMMAND_LINE.fullmatch(text)
    if found is None:
        raise ValueError("write it as METRIC=CONDITION, for example answer_perplexity=better")
    return found[1], found[2]
