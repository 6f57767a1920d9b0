"""The outcomes of the held-out records that a run's evaluation has kept, in order: what a paired comparison needs."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from bench.evaluate import stage_records, stage_settings
from bench.held_out import HeldOutRecord
from bench.kept_records import records_path
from bench.record_outcome import RecordOutcome, record_keys
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.results import Evaluation


def stored_outcomes(
    config: Config, data: Path, model: Path, evaluation: Path, evaluated: Evaluation
) -> list[tuple[HeldOutRecord, RecordOutcome]]:
    """``data``, ``evaluation``: the stages' folders; ``model``: the GGUF, which records are known by.

    Those that ``evaluated`` has answers to: the first ones, where its time limit ended it. Raises MedcotError when they
    are not all there.
    """
    path = records_path(evaluation, model)
    try:
        records = stage_records(config, data)
        if evaluated.ended_early is not None:
            records = records[: evaluated.ended_early.answered]
        lines = path.read_bytes().splitlines()
        outcomes = {outcome.key: outcome for outcome in map(RecordOutcome.model_validate_json, lines)}
        keys = record_keys(model, records, stage_settings(config))
        return [(record, outcomes[key]) for record, key in zip(records, keys, strict=True)]
    except (ValidationError, KeyError, OSError) as error:
        raise MedcotError(f"{path} does not hold the evaluated records: delete {evaluation} and run again.") from error
