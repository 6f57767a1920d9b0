"""What one model did on one held-out record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from pydantic import Field

from bench import engines
from bench.engines import Engine
from bench.held_out import HeldOutRecord
from bench.multiple_choice import ChoiceOutcome, measure_choice
from bench.text_metrics import bleu_counts, rouge
from pipeline.artifacts import sha256_file, sha256_json
from pipeline.base_model import base_identity
from pipeline.loops import ending_cycle
from pipeline.results import EngineName, Measurement
from pipeline.thought import parse_output

_FORMAT = 2  # raise when the same inputs give another outcome, so that older lines are measured again


@dataclass(frozen=True)
class EvaluationSettings:
    """A reference is measured up to ``max_record_tokens``, prompt included, as it would be trained on; None: all."""

    max_new_tokens: int = 1024
    max_record_tokens: int | None = None
    seed: int = 0
    engine: engines.Settings = field(default_factory=engines.Settings)


class Likelihood(Measurement):
    """Of a record's reference thought and answer given the prompt, in nats, summed."""

    key: str
    reasoning_nll: float
    reasoning_tokens: int
    answer_nll: float
    answer_tokens: int


class RecordOutcome(Likelihood):
    """A line of ``records-<model>.jsonl``; ``bleu_counts`` as in text_metrics, ``engine`` wrote the output."""

    output: str
    answer: str
    thought_tokens: int | None
    well_formed: bool
    closed_thought: bool
    looping: bool
    finished: bool
    new_tokens: int
    rouge_1: float
    rouge_2: float
    rouge_l: float
    bleu_counts: list[int]
    choice: ChoiceOutcome | None = None
    engine: EngineName = Field(default="llama.cpp", exclude_if=lambda engine: engine == "llama.cpp")


class WrittenAnswer(Measurement):
    """Token ids that transformers wrote for a record's question, and for the question with options where it has any."""

    key: str
    new: list[int]
    chosen: list[int] | None


def measure_likelihood(
    engine: Engine, key: str, record: HeldOutRecord, max_record_tokens: int | None = None
) -> Likelihood:
    """Likelihood of the reference's thought and answer given the prompt, cut where training cut such records."""
    prompt, thought, answer = engine.chat_format.encode_parts(record.example, max_record_tokens)
    log_probabilities = engine.token_log_probabilities([*prompt, *thought, *answer])
    # Value i belongs to id i + 1.
    of_thought = log_probabilities[len(prompt) - 1 : len(prompt) - 1 + len(thought)]
    of_answer = log_probabilities[len(prompt) - 1 + len(thought) :]
    return Likelihood(
        key=key,
        reasoning_nll=float(-of_thought.sum()),
        reasoning_tokens=len(thought),
        answer_nll=float(-of_answer.sum()),
        answer_tokens=len(answer),
    )


def measure_answer(
    engine: Engine,
    likelihood: Likelihood,
    record: HeldOutRecord,
    written: WrittenAnswer,
    max_new_tokens: int,
    written_by: EngineName,
) -> RecordOutcome:
    """Form and wording of what was written; ``engine`` is the evaluated model's, whoever wrote it."""
    chat_format, reference, new = engine.chat_format, record.example.answer, written.new
    output = engine.text(new)
    parsed = parse_output(output, chat_format.opens_thought)
    scores = rouge(parsed.answer, reference)
    return RecordOutcome(
        **likelihood.model_dump(),
        output=output,
        answer=parsed.answer,
        thought_tokens=len(chat_format.vocabulary.encode_text(parsed.thought, "text")) if parsed.thought else None,
        well_formed=parsed.well_formed,
        closed_thought=parsed.one_thought,
        looping=ending_cycle(new) is not None,
        finished=len(new) < max_new_tokens,
        new_tokens=len(new),
        rouge_1=scores.rouge_1,
        rouge_2=scores.rouge_2,
        rouge_l=scores.rouge_l,
        bleu_counts=[int(count) for count in bleu_counts(parsed.answer, reference)],
        choice=None if written.chosen is None else measure_choice(engine, record, written.chosen),
        engine=written_by,
    )


def record_keys(path: Path, records: Sequence[HeldOutRecord], settings: EvaluationSettings) -> list[str]:
    """Hashes of all that an outcome depends on, the record's place included: no stale line is taken up.

    The GPU is no part of them, as the threads are not: an evaluation continues, and is compared, on another machine.
    """
    engine = asdict(replace(settings.engine, threads=None, gpu_layers=0))
    shared = [_FORMAT, _model_identity(path), settings.max_new_tokens, settings.max_record_tokens, engine]
    return [
        sha256_json(
            [
                shared,
                index,
                record.example.question,
                record.example.reasoning,
                record.example.answer,
                record.options,
                record.right,
            ]
        )[:24]
        for index, record in enumerate(records)
    ]


@lru_cache(maxsize=8)
def _content(path: Path, size: int, changed_ns: int) -> str:
    """Once a process: a resumed evaluation asks for the same gigabytes before it chooses its engine, and after."""
    return sha256_file(path)


def _model_identity(path: Path) -> object:
    """A GGUF by its content; a folder by its files' sizes and times, and an adapter's by its base's as well."""
    if path.is_file():
        state = path.stat()
        return _content(path, state.st_size, state.st_mtime_ns)
    identity = [base_identity(str(path), None)]
    if (path / engines.ADAPTER_CONFIG).is_file():
        identity.append(base_identity(str(engines.base_of_adapter(path)), None))
    return identity
