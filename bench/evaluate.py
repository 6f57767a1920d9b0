"""Base against tuned on held-out records: likelihood and wording of the reference, form, loops, multiple choice.

    medcot evaluate base-Q4_K_M.gguf tuned-Q4_K_M.gguf --data runs/smollm2-cpu/data/eval.jsonl

Every record's outcome is written as soon as it is known: an interrupted evaluation continues where it stopped.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import engines
from bench.evaluation_processes import evaluate_side_by_side
from bench.evaluation_summary import Measured, Role, compare, summarize
from bench.evaluation_task import EvaluationTask
from bench.gates import check_gates, raise_if_failed
from bench.held_out import REFERENCE_QUESTIONS, HeldOutRecord, read_records
from bench.kept_records import KeptRecords, answers_by_engine, remove_unusable, remove_working_files
from bench.record_outcome import EvaluationSettings, record_keys
from bench.text_metrics import bleu_signature
from bench.transformers_answers import TrainedModel
from pipeline.answer_engine import answer_engine
from pipeline.artifacts import Artifact, write_json
from pipeline.base_model import local_base
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.gates import Gate
from pipeline.hardware import may_have_gpu
from pipeline.results import Comparison, EngineName, Evaluation, EvaluationEndedEarly, ExportedModels, Sample
from pipeline.time_limit import NO_LIMIT, TimeLimit

HELD_OUT_SAMPLES = 3


def evaluate(config: Config, inputs: dict[str, Path], out_dir: Path) -> Evaluation:
    """The stage: the GGUF that ships and the base in the same quantization, on the first held-out records.

    Raises GateFailed when ``evaluation.gates`` are not met; ``evaluation.json`` and the records stay then.
    """
    limit = TimeLimit.starting_now(config.evaluation.max_minutes)
    exported = Artifact.load(inputs["export"], ExportedModels)
    models: list[tuple[Path, Role]] = [(exported.path / exported.result.ship, "tuned")]
    if exported.result.base is not None:
        models.append((exported.path / exported.result.base, "base"))
    gpu_layers = engines.all_layers_where_possible()
    settings = stage_settings(config, gpu_layers)
    records = stage_records(config, inputs["prepare"])
    choice = answer_engine(
        config.evaluation.engine,
        has_gpu=_pytorch_has_gpu(),
        llama_on_gpu=gpu_layers != 0,
        kept=answers_by_engine([path for path, _ in models], records, out_dir, settings),
    )
    trained = None
    if choice.value == "transformers":
        trained = TrainedModel(
            local_base(config.model.base, config.model.revision),
            inputs["train"],
            config.model.dtype,
            config.model.load_in_4bit,
        )
    evaluation = evaluate_models(
        [path for path, _ in models],
        [role for _, role in models],
        records,
        out_dir,
        settings,
        config.evaluation.parsed_gates,
        limit=limit,
        trained=trained,
        engine_reason=choice.reason,
    )
    raise_if_failed(evaluation)
    return evaluation


def _pytorch_has_gpu() -> bool:
    if not may_have_gpu():
        return False
    import torch

    return torch.cuda.is_available()


def stage_settings(config: Config, gpu_layers: int = 0) -> EvaluationSettings:
    """How the stage evaluates; its records are known by it, wherever they were computed."""
    return EvaluationSettings(
        max_new_tokens=config.evaluation.max_new_tokens,
        max_record_tokens=config.truncated_at,
        seed=config.seed,
        engine=engines.Settings(
            context_tokens=config.model.max_seq_length + config.evaluation.max_new_tokens,
            system=config.prompt.system,
            gpu_layers=gpu_layers,
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
    max_minutes: float | None = None,
) -> Evaluation:
    """The command: the first of several models is the base, the others are compared with it.

    Without ``out_dir`` the records are not kept, so a break means beginning again.
    """
    limit = TimeLimit.starting_now(max_minutes)
    roles: list[Role] = ["base" if index == 0 and len(paths) > 1 else "tuned" for index in range(len(paths))]
    records = read_records(data, rows, choice_rows)
    gpu_layers = engines.all_layers_where_possible() if any(path.is_file() for path in paths) else 0
    settings = EvaluationSettings(max_new_tokens=max_new_tokens, engine=engines.Settings(gpu_layers=gpu_layers))
    if out_dir is not None:
        return evaluate_models(paths, roles, records, out_dir, settings, gates, limit=limit)
    with tempfile.TemporaryDirectory() as folder:
        return evaluate_models(paths, roles, records, Path(folder), settings, gates, limit=limit)


def evaluate_models(
    paths: Sequence[Path],
    roles: Sequence[Role],
    records: Sequence[HeldOutRecord],
    out_dir: Path,
    settings: EvaluationSettings,
    gates: Sequence[Gate] = (),
    *,
    limit: TimeLimit = NO_LIMIT,
    trained: TrainedModel | None = None,
    engine_reason: str | None = None,
) -> Evaluation:
    """Evaluate each model on all records and write ``evaluation.json``; gates are told, not raised.

    Where ``limit`` ends it, every model is cut to the same first records, so that pairs stay pairs; what was answered
    beyond them is kept. With ``trained`` its answers take the place of the GGUFs' own. Raises MedcotError when the
    limit leaves nothing to tell.
    """
    engines.check_distinct_names(paths)
    out_dir.mkdir(parents=True, exist_ok=True)
    # The reference questions come last: they are part of no figure.
    asked = [*records, *(question.record for question in REFERENCE_QUESTIONS)]
    tasks = [
        EvaluationTask(path, asked, record_keys(path, asked, settings), out_dir, settings, limit) for path in paths
    ]
    engine_names: list[EngineName] = [
        "transformers" if trained is not None or path.is_dir() else "llama.cpp" for path in paths
    ]
    for task, engine in zip(tasks, engine_names, strict=True):
        removed = remove_unusable(out_dir, task.path, task.keys, engine)
        if removed:
            print(
                f"evaluate: {removed} kept answers of {task.path.name} were written by "
                f"{'llama.cpp' if engine == 'transformers' else 'transformers'}; {engine} answers now, and is asked "
                "these records again",
                file=sys.stderr,
            )
    evaluate_side_by_side(tasks, roles, trained)
    kept = [KeptRecords.read(task) for task in tasks]
    for task, each in zip(tasks, kept, strict=True):
        if each.complete:
            remove_working_files(out_dir, task.path)
    ended_early = _ended_early(kept, len(records), limit)
    scored, answered = (len(records),) * 2 if ended_early is None else (ended_early.scored, ended_early.answered)
    measured = [Measured(each.scored[:scored], each.answered[:answered]) for each in kept]
    names = [path.name for path in paths]
    models = [
        summarize(name, role, each, settings.seed, engine)
        for name, role, each, engine in zip(names, roles, measured, engine_names, strict=True)
    ]
    comparisons = _compare_with_base(names, roles, measured, settings.seed)
    evaluation = Evaluation(
        models=models,
        samples=_samples(asked, dict(zip(names, kept, strict=True))),
        comparisons=comparisons,
        gates=check_gates(gates, models, comparisons, ended_early),
        bleu_signature=bleu_signature(),
        engine_reason=engine_reason,
        ended_early=ended_early,
    )
    write_json(out_dir / "evaluation.json", evaluation.model_dump(mode="json"))
    return evaluation


def _ended_early(kept: Sequence[KeptRecords], records: int, limit: TimeLimit) -> EvaluationEndedEarly | None:
    """The first records that all models have, if those are not all; raises MedcotError if there are none."""
    if all(each.complete for each in kept) or limit.minutes is None:
        return None
    scored, answered = min(len(each.scored) for each in kept), min(len(each.answered) for each in kept)
    if scored == 0:
        raise MedcotError(
            f"evaluation.max_minutes={limit.minutes:g} ended the evaluation before any record was measured: raise it; "
            "what was measured of single models is kept."
        )
    return EvaluationEndedEarly(
        minutes=limit.minutes, records=records, scored=min(scored, records), answered=min(answered, records)
    )


def _compare_with_base(
    names: Sequence[str], roles: Sequence[Role], measured: Sequence[Measured], seed: int
) -> list[Comparison]:
    if "base" not in roles:
        return []
    base = roles.index("base")
    return [
        comparison
        for number, name in enumerate(names)
        if number != base
        for comparison in compare(name, measured[number], names[base], measured[base], seed)
    ]


def _samples(asked: Sequence[HeldOutRecord], kept: Mapping[str, KeptRecords]) -> list[Sample]:
    """The reference questions and the first held-out records that every model has answered, with every output."""
    held_out = len(asked) - len(REFERENCE_QUESTIONS)
    headings = {held_out + index: question.heading for index, question in enumerate(REFERENCE_QUESTIONS)}
    samples = []
    for index in (*headings, *range(min(HELD_OUT_SAMPLES, held_out))):
        outputs = {name: outcome.output for name, each in kept.items() if (outcome := each.outcomes[index]) is not None}
        if len(outputs) == len(kept):
            samples.append(
                Sample(
                    question=asked[index].example.question,
                    reference=asked[index].example.answer,
                    outputs=outputs,
                    kind="reference" if index in headings else "held-out",
                    heading=headings.get(index, ""),
                )
            )
    return samples
