"""Base against tuned on held-out records: perplexity of the reference, and what the model writes itself.

    medcot evaluate base-Q4_K_M.gguf tuned-Q4_K_M.gguf --data runs/smollm2-cpu/data/eval.jsonl

Every record's outcome is written as soon as it is known: an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import psutil
from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bench import engines, statistics
from bench.engines import Engine
from pipeline.artifacts import Artifact, sha256_file, sha256_json, write_json, write_text
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.hardware import usable_cores
from pipeline.processes import end_with_parent
from pipeline.prompts import Example
from pipeline.results import Estimate, Evaluation, ExportedModels, Measurement, ModelEvaluation, Sample
from pipeline.thought import parse_output

Role = Literal["tuned", "base"]
SAMPLES = 3
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class EvaluationSettings:
    max_new_tokens: int = 1024
    seed: int = 0
    engine: engines.Settings = field(default_factory=engines.Settings)


class RecordOutcome(Measurement):
    """One model on one record, a line of ``records-<model>.jsonl``; likelihoods in nats, summed."""

    key: str
    reasoning_nll: float
    reasoning_tokens: int
    answer_nll: float
    answer_tokens: int
    output: str
    well_formed: bool
    finished: bool
    new_tokens: int


def evaluate(config: Config, inputs: dict[str, Path], out_dir: Path) -> Evaluation:
    """The stage: the GGUF that ships and the base in the same quantization, on the first held-out records."""
    exported = Artifact.load(inputs["export"], ExportedModels)
    models: list[tuple[Path, Role]] = [(exported.path / exported.result.ship, "tuned")]
    if exported.result.base is not None:
        models.append((exported.path / exported.result.base, "base"))
    examples = read_examples(inputs["prepare"] / "eval.jsonl", config.evaluation.rows)
    paths, roles = [path for path, _ in models], [role for _, role in models]
    return evaluate_models(paths, roles, examples, out_dir, stage_settings(config))


def stage_settings(config: Config) -> EvaluationSettings:
    """How the stage evaluates; its records are known by it."""
    return EvaluationSettings(
        max_new_tokens=config.evaluation.max_new_tokens,
        seed=config.seed,
        engine=engines.Settings(
            context_tokens=config.model.max_seq_length + config.evaluation.max_new_tokens,
            system=config.prompt.system,
        ),
    )


def evaluate_files(
    paths: Sequence[Path], data: Path, *, rows: int, max_new_tokens: int, out_dir: Path | None = None
) -> Evaluation:
    """The command: the first of several models is the base, the others are compared with it.

    Without ``out_dir`` the records are not kept, so a break means beginning again.
    """
    roles: list[Role] = ["base" if index == 0 and len(paths) > 1 else "tuned" for index in range(len(paths))]
    examples = read_examples(data, rows)
    settings = EvaluationSettings(max_new_tokens=max_new_tokens)
    if out_dir is not None:
        return evaluate_models(paths, roles, examples, out_dir, settings)
    with tempfile.TemporaryDirectory() as folder:
        return evaluate_models(paths, roles, examples, Path(folder), settings)


def print_evaluation(evaluation: Evaluation) -> None:
    """One row a model on standard output, 95 % intervals in brackets."""
    table = Table("model", "answer perplexity", "reasoning perplexity", "well-formed", "ended itself", "records")
    for model in evaluation.models:
        table.add_row(
            model.model,
            _with_interval(model.answer_perplexity),
            _with_interval(model.reasoning_perplexity) if model.reasoning_perplexity else "-",
            _with_interval(model.well_formed),
            _with_interval(model.finished),
            str(model.answer_perplexity.n),
        )
    Console().print(table)


def _with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def evaluate_models(
    paths: Sequence[Path],
    roles: Sequence[Role],
    examples: Sequence[Example],
    out_dir: Path,
    settings: EvaluationSettings,
) -> Evaluation:
    """Evaluate each model on all examples and write ``evaluation.json`` beside the records."""
    _check_distinct_names(paths)
    out_dir.mkdir(parents=True, exist_ok=True)
    outcomes = _evaluate_side_by_side(paths, examples, out_dir, settings)
    models = [
        summarize(path.name, role, outcomes[path.name], settings.seed) for path, role in zip(paths, roles, strict=True)
    ]
    samples = [
        Sample(
            question=example.question,
            reference=example.answer,
            outputs={name: records[index].output for name, records in outcomes.items()},
        )
        for index, example in enumerate(examples[:SAMPLES])
    ]
    evaluation = Evaluation(models=models, samples=samples)
    write_json(out_dir / "evaluation.json", evaluation.model_dump(mode="json"))
    return evaluation


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """Held-out records: one JSON object a line with question, reasoning (or null) and answer.

    The columns of the raw data set (Question, Complex_CoT, Response) are understood as well.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MedcotError(f"{path} cannot be read ({error}): name a JSONL file of held-out records.") from error
    examples: list[Example] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and (limit is None or len(examples) < limit):
            examples.append(_example(line, f"{path}:{number}"))
    if not examples:
        raise MedcotError(f"{path} holds no records: name a JSONL file of held-out records.")
    return examples


def _example(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
        if "question" in row:
            question, reasoning, answer = row["question"], row.get("reasoning"), row["answer"]
        else:
            question, reasoning, answer = row["Question"], row.get("Complex_CoT"), row["Response"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise MedcotError(f"{where}: expected a JSON object with question, answer and perhaps reasoning.") from error
    if not all(isinstance(text, str) and text.strip() for text in (question, answer)) or not (
        reasoning is None or isinstance(reasoning, str)
    ):
        raise MedcotError(f"{where}: question and answer must be text that is not empty, reasoning text or null.")
    return Example(question, reasoning or None, answer)


def _evaluate_side_by_side(
    paths: Sequence[Path], examples: Sequence[Example], out_dir: Path, settings: EvaluationSettings
) -> dict[str, list[RecordOutcome]]:
    """Each model in a process of its own, several at once where memory allows, the cores shared among them.

    Two models with one thread each are done sooner than one after the other with two threads (LOG.md,
    2026-11-22), and a model that makes libllama abort takes only its own process with it.
    """
    workers = _side_by_side(paths)
    shared = replace(settings.engine, threads=settings.engine.threads or max(1, usable_cores() // workers))
    settings = replace(settings, engine=shared)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent)
    with pool, _progress() as progress:
        futures = {pool.submit(evaluate_one, path, examples, out_dir, settings): path for path in paths}
        tasks = {path: progress.add_task(path.name, total=len(examples)) for path in paths}
        while not all(future.done() for future in futures):
            wait(futures, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for path, task in tasks.items():
                progress.update(task, completed=_lines(_records_path(out_dir, path)))
            if any(future.done() and future.exception() for future in futures):
                break
        outcomes = {}
        for future, path in futures.items():
            try:
                outcomes[path.name] = future.result()
            except BrokenProcessPool as error:
                raise MedcotError(
                    f"The process that evaluated {path} was ended by the system or by llama.cpp itself: the file is "
                    "damaged, or memory ran out. Check it with medcot chat, or evaluate one model at a time."
                ) from error
    return outcomes


def _side_by_side(paths: Sequence[Path]) -> int:
    """How many models to hold at once: as many as there are cores, if half of the free memory takes their files."""
    if not all(path.is_file() for path in paths):
        return 1  # a model under transformers: its memory is not its file's size
    fits = sum(path.stat().st_size for path in paths) < psutil.virtual_memory().available / 2
    return min(len(paths), usable_cores()) if fits else 1


def _records_path(out_dir: Path, model: Path) -> Path:
    return out_dir / f"records-{model.name}.jsonl"


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def evaluate_one(
    path: Path, examples: Sequence[Example], out_dir: Path, settings: EvaluationSettings
) -> list[RecordOutcome]:
    """One model on all examples, in this process; outcomes that ``out_dir`` holds already are taken over."""
    keys = record_keys(path, examples, settings)
    records_path = _records_path(out_dir, path)
    known = _finished_records(records_path, set(keys))
    if all(key in known for key in keys):
        return [known[key] for key in keys]
    with (
        engines.open_engine(path, settings.engine) as engine,
        records_path.open("a", encoding="utf-8") as stream,
    ):
        missing = [(key, example) for key, example in zip(keys, examples, strict=True) if key not in known]
        prompts = [engine.chat_format.question_ids(example.question) for _, example in missing]
        for index, new in engine.generate_many(prompts, settings.max_new_tokens):
            key, example = missing[index]
            known[key] = outcome = measure_record(engine, key, example, new, settings.max_new_tokens)
            stream.write(outcome.model_dump_json() + "\n")
            stream.flush()
    return [known[key] for key in keys]


def measure_record(
    engine: Engine, key: str, example: Example, new: Sequence[int], max_new_tokens: int
) -> RecordOutcome:
    """Likelihood of the reference's thought and answer given the prompt; the form of its own output."""
    prompt, thought, answer = engine.chat_format.encode_parts(example)
    log_probabilities = engine.token_log_probabilities([*prompt, *thought, *answer])
    # Value i belongs to id i + 1.
    of_thought = log_probabilities[len(prompt) - 1 : len(prompt) - 1 + len(thought)]
    of_answer = log_probabilities[len(prompt) - 1 + len(thought) :]
    output = engine.text(new)
    return RecordOutcome(
        key=key,
        reasoning_nll=float(-of_thought.sum()),
        reasoning_tokens=len(thought),
        answer_nll=float(-of_answer.sum()),
        answer_tokens=len(answer),
        output=output,
        well_formed=parse_output(output, engine.chat_format.opens_thought).well_formed,
        finished=len(new) < max_new_tokens,
        new_tokens=len(new),
    )


def summarize(model: str, role: Role, records: Sequence[RecordOutcome], seed: int) -> ModelEvaluation:
    with_thought = [record for record in records if record.reasoning_tokens]
    n = len(records)
    return ModelEvaluation(
        model=model,
        role=role,
        answer_perplexity=statistics.perplexity(
            [record.answer_nll for record in records], [record.answer_tokens for record in records], seed
        ),
        reasoning_perplexity=statistics.perplexity(
            [record.reasoning_nll for record in with_thought],
            [record.reasoning_tokens for record in with_thought],
            seed,
        )
        if with_thought
        else None,
        well_formed=statistics.wilson(sum(record.well_formed for record in records), n),
        finished=statistics.wilson(sum(record.finished for record in records), n),
        mean_new_tokens=sum(record.new_tokens for record in records) / n,
    )


def record_keys(path: Path, examples: Sequence[Example], settings: EvaluationSettings) -> list[str]:
    """Hashes of all that an outcome depends on, the record's place included: no stale line is taken up."""
    model = sha256_file(path) if path.is_file() else str(path.resolve())
    shared = [model, settings.max_new_tokens, settings.engine.system, settings.engine.context_tokens]
    return [
        sha256_json([shared, index, example.question, example.reasoning, example.answer])[:24]
        for index, example in enumerate(examples)
    ]


def _finished_records(path: Path, keys: set[str]) -> dict[str, RecordOutcome]:
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


def _check_distinct_names(paths: Sequence[Path]) -> None:
    names = [path.name for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MedcotError(f"Two models are called {twice[0]}: rename one, since results go by the file's name.")


def _progress() -> Progress:
    return Progress(
        TextColumn("evaluate {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
