"""What the data are like, from their first records: the basis of a plan, before anything is prepared."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from pipeline.config import Config
from pipeline.distributions import distribution
from pipeline.prompts import ChatFormat
from pipeline.records import Record, Rejected, usable_record
from pipeline.results import Distribution
from pipeline.sources import count_hint, read_rows
from pipeline.stage_estimate import Workload

_SURVEYED_ROWS, _SURVEY_SECONDS = 2000, 3.0


class Survey(BaseModel):
    """What the first records of the source are like; ``complete`` says that they are all of them."""

    model_config = ConfigDict(frozen=True)
    read: int
    usable: int
    reasons: dict[str, int]
    complete: bool
    tokens: Distribution | None


def survey_records(config: Config, chat_format: ChatFormat) -> tuple[list[Record], Survey]:
    """Usable records among the first ones, as ``prepare`` will see them but for duplicates and leakage."""
    records: list[Record] = []
    reasons: Counter[str] = Counter()
    read, complete = 0, True
    started = time.monotonic()
    for row in itertools.islice(read_rows(config.data), _SURVEYED_ROWS + 1):
        if read == _SURVEYED_ROWS or (read >= 100 and time.monotonic() - started > _SURVEY_SECONDS):
            complete = False
            break
        read += 1
        try:
            records.append(usable_record(row, config, chat_format))
        except Rejected as rejection:
            reasons[rejection.reason] += 1
    tokens = distribution([record.tokens.whole for record in records]) if records else None
    survey = Survey(
        read=read, usable=len(records), reasons=dict(reasons.most_common()), complete=complete, tokens=tokens
    )
    return records, survey


def workload_of(config: Config, records: Sequence[Record], survey: Survey) -> Workload:
    """What the whole data set amounts to, from the surveyed part of it."""
    data = config.data
    known = data.train_rows + data.eval_rows if data.train_rows is not None else None
    if survey.complete:
        rows = survey.read
        usable = survey.usable
    else:
        rows = data.limit or known or count_hint(data) or survey.read
        usable = int(rows * survey.usable / max(1, survey.read))
    available = max(0, usable - data.eval_rows)
    counts = [record.tokens for record in records]
    count = max(1, len(counts))
    return Workload(
        rows=rows,
        train_rows=available if data.train_rows is None else min(available, data.train_rows),
        eval_rows=min(data.eval_rows, usable),
        mean_tokens=sum(each.whole for each in counts) / count,
        mean_completion_tokens=sum(each.thought + each.answer for each in counts) / count,
        longest_tokens=max((each.whole for each in counts), default=0),
        share_with_options=sum(record.options is not None for record in records) / count,
    )
