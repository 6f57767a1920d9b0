"""Base against tuned on held-out records: likelihood and wording of the reference, form, loops, multiple choice.

    medcot evaluate base-Q4_K_M.gguf tuned-Q4_K_M.gguf --data runs/smollm2-cpu/data/eval.jsonl

Every record's outcome is written as soon as it is known: an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import engines
from bench.evaluation_processes import evaluate_side_by_side
from bench.evaluation_summary import Role, compare, summarize
from bench.gates import check_gates, raise_if_failed
from bench.held_out import REFERENCE_QUESTIONS, HeldOutRecord, read_records
from bench.record_outcome import EvaluationSettings, RecordOutcome
from bench.text_metrics import bleu_signature
from pipeline.artifacts import Artifact, write_json
from pipeline.config import Config
from pipeline.gates import Gate
from pipeline.results import Comparison, Evaluation, ExportedModels, Sample

HELD_OUT_SAMPLES = 3


def evaluate(config: Config, inputs: dict[str, Path], out_dir: Path) -> Evaluation:
    """The stage: the GGUF that ships and the base in the same quantization, on the first held-out records.

    Raises GateFailed when ``evaluation.gates`` are not met; ``evaluation.json`` and the records stay then.
    """
    exported = Artifact.load(inputs["export"], ExportedModels)
    models: list[tuple[Path, Role]] = [(exported.path / exported.result.ship, "tuned")]
    if exported.result.base is not None:
        models.append((exported.path / exported.result.base, "base"))
    paths, roles = [path for path, _ in models], [role for _, role in models]
    evaluation = evaluate_models(
        paths,
        roles,
        stage_records(config, inputs["prepare"]),
        out_dir,
        stage_settings(config),
        config.evaluation.parsed_gates,
    )
    raise_if_failed(evaluation)
    return evaluation


def stage_settings(config: Config) -> EvaluationSettings:
    """How the stage evaluates; its records are known by it."""
    return EvaluationSettings(
        max_new_tokens=config.evaluation.max_new_tokens,
        max_record_tokens=config.truncated_at,
        seed=config.seed,
        engine=engines.Settings(
            context_tokens=config.model.max_seq_length + config.evaluation.max_new_tokens,
            system=config.prompt.system,
            gpu_layers=engines.all_layers_where_possible(),
        ),
    )


def stage_records(config: Config, data: Path) -> list[HeldOutRecord]:
    """What the stage evaluates on, from the folder that prepare wrote."""
    return read_records(data / "eval.jsonl", config.evaluation.rows, config.evaluation.choice_rows)


def evaluate_files(
    paths: Sequence[Path],
    data: Path,
    *,
    rows: int,
    max_new_tokens: int,
    choice_rows: int | None = None,
    gates: Sequence[Gate] = (),
    out_dir: Path | None = None,
) -> Evaluation:
    """The command: the first of several models is the base, the others are compared with it.

    Without ``out_dir`` the records are not kept, so a break means beginning again.
    """
    roles: list[Role] = ["base" if index == 0 and len(paths) > 1 else "tuned" for index in range(len(paths))]
    records = read_records(data, rows, choice_rows)
    gpu_layers = engines.all_layers_where_possible() if any(path.is_file() for path in paths) else 0
    settings = EvaluationSettings(max_new_tokens=max_new_tokens, engine=engines.Settings(gpu_layers=gpu_layers))
    if out_dir is not None:
        return evaluate_models(paths, roles, records, out_dir, settings, gates)
    with tempfile.TemporaryDirectory() as folder:
        return evaluate_models(paths, roles, records, Path(folder), settings, gates)


def evaluate_models(
    paths: Sequence[Path],
    roles: Sequence[Role],
    records: Sequence[HeldOutRecord],
    out_dir: Path,
    settings: EvaluationSettings,
    gates: Sequence[Gate] = (),
) -> Evaluation:
    """Evaluate each model on all records and write ``evaluation.json``; gates are told, not raised."""
    engines.check_distinct_names(paths)
    out_dir.mkdir(parents=True, exist_ok=True)
    asked = [*records, *(question.record for question in REFERENCE_QUESTIONS)]
    answered = evaluate_side_by_side(paths, asked, out_dir, settings)
    outcomes = {name: outcome[: len(records)] for name, outcome in answered.items()}
    models = [
        summarize(path.name, role, outcomes[path.name], settings.seed) for path, role in zip(paths, roles, strict=True)
    ]
    comparisons = _compare_with_base(paths, roles, outcomes, settings.seed)
    evaluation = Evaluation(
        models=models,
        samples=_samples(asked, answered),
        comparisons=comparisons,
        gates=check_gates(gates, models, comparisons),
        bleu_signature=bleu_signature(),
    )
    write_json(out_dir / "evaluation.json", evaluation.model_dump(mode="json"))
    return evaluation


def _compare_with_base(
    paths: Sequence[Path], roles: Sequence[Role], outcomes: dict[str, list[RecordOutcome]], seed: int
) -> list[Comparison]:
    names = [path.name for path in paths]
    base = next((name for name, role in zip(names, roles, strict=True) if role == "base"), None)
    if base is None:
        return []
    return [
        comparison
        for name in names
        if name != base
        for comparison in compare(name, outcomes[name], base, outcomes[base], seed)
    ]


def _samples(asked: Sequence[HeldOutRecord], answered: dict[str, list[RecordOutcome]]) -> list[Sample]:
    """The reference questions and the first held-out records, with every model's output."""
    held_out = len(asked) - len(REFERENCE_QUESTIONS)

    def outputs(index: int) -> dict[str, str]:
        return {name: outcomes[index].output for name, outcomes in answered.items()}

    references = [
        Sample(
            question=question.record.example.question,
            reference=question.record.example.answer,
            outputs=outputs(held_out + index),
            kind="reference",
            heading=question.heading,
        )
        for index, question in enumerate(REFERENCE_QUESTIONS)
    ]
    return [
        *references,
        *(
            Sample(question=record.example.question, reference=record.example.answer, outputs=outputs(index))
            for index, record in enumerate(asked[: min(HELD_OUT_SAMPLES, held_out)])
        ),
    ]
