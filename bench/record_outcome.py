"""What one model did on one held-out record, and the file that keeps it, so that a break costs one record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from bench import engines
from bench.engines import Engine
from bench.held_out import HeldOutRecord
from bench.multiple_choice import ChoiceOutcome, measure_choice
from bench.text_metrics import bleu_counts, rouge
from pipeline.artifacts import sha256_file, sha256_json, write_text
from pipeline.base_model import base_identity
from pipeline.loops import ending_cycle
from pipeline.results import Measurement
from pipeline.thought import parse_output

_FORMAT = 2  # raise when the same inputs give another outcome, so that older lines are measured again


@dataclass(frozen=True)
class EvaluationSettings:
    """A reference is measured up to ``max_record_tokens``, prompt included, as it would be trained on; None: all."""

    max_new_tokens: int = 1024
    max_record_tokens: int | None = None
    seed: int = 0
    engine: engines.Settings = field(default_factory=engines.Settings)


class RecordOutcome(Measurement):
    """A line of ``records-<model>.jsonl``; likelihoods in nats, summed; ``bleu_counts`` as in text_metrics."""

    key: str
    reasoning_nll: float
    reasoning_tokens: int
    answer_nll: float
    answer_tokens: int
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


def measure_record(
    engine: Engine,
    key: str,
    record: HeldOutRecord,
    new: Sequence[int],
    max_new_tokens: int,
    chosen: Sequence[int] | None = None,
    max_record_tokens: int | None = None,
) -> RecordOutcome:
    """Likelihood of the reference's thought and answer given the prompt; form and wording of its own output.

    ``new`` is what the model wrote when asked the question, ``chosen`` when asked with the options.
    """
    chat_format, reference = engine.chat_format, record.example.answer
    prompt, thought, answer = chat_format.encode_parts(record.example, max_record_tokens)
    log_probabilities = engine.token_log_probabilities([*prompt, *thought, *answer])
    # Value i belongs to id i + 1.
    of_thought = log_probabilities[len(prompt) - 1 : len(prompt) - 1 + len(thought)]
    of_answer = log_probabilities[len(prompt) - 1 + len(thought) :]
    output = engine.text(new)
    parsed = parse_output(output, chat_format.opens_thought)
    scores = rouge(parsed.answer, reference)
    return RecordOutcome(
        key=key,
        reasoning_nll=float(-of_thought.sum()),
        reasoning_tokens=len(thought),
        answer_nll=float(-of_answer.sum()),
        answer_tokens=len(answer),
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
        choice=None if chosen is None else measure_choice(engine, record, chosen),
    )


def record_keys(path: Path, records: Sequence[HeldOutRecord], settings: EvaluationSettings) -> list[str]:
    """Hashes of all that an outcome depends on, the record's place included: no stale line is taken up."""
    engine = asdict(replace(settings.engine, threads=None))
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


def _model_identity(path: Path) -> object:
    """A GGUF by its content; a folder by its files' sizes and times, and an adapter's by its base's as well."""
    if path.is_file():
        return sha256_file(path)
    identity = [base_identity(str(path), None)]
    if (path / engines.ADAPTER_CONFIG).is_file():
        identity.append(base_identity(str(engines.base_of_adapter(path)), None))
    return identity


def records_path(out_dir: Path, model: Path) -> Path:
    return out_dir / f"records-{model.name}.jsonl"


def finished_records(path: Path, keys: set[str]) -> dict[str, RecordOutcome]:
    """Outcomes of an interrupted evaluation; half-written lines and those of another one are removed."""
    records: dict[str, RecordOutcome] = {}
    if not path.is_file():
        return records
    for line in path.read_bytes().splitlines():
        try:
            record = RecordOutcome.model_validate_json(line)
        except ValidationError:
            continue
        if record.key in keys:
            records[record.key] = record
    write_text(path, "".join(record.model_dump_json() + "\n" for record in records.values()))
    return records
