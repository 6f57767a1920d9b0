"""Models on held-out records: each in a process of its own, several at once, every record kept at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench import engines
from bench.engines import Engine
from bench.held_out import HeldOutRecord
from bench.multiple_choice import choice_question
from bench.record_outcome import (
    EvaluationSettings,
    RecordOutcome,
    finished_records,
    measure_record,
    record_keys,
    records_path,
)
from pipeline.errors import MedcotError
from pipeline.hardware import usable_cores
from pipeline.processes import end_with_parent

POLL_SECONDS = 0.5


def evaluate_side_by_side(
    paths: Sequence[Path], records: Sequence[HeldOutRecord], out_dir: Path, settings: EvaluationSettings
) -> dict[str, list[RecordOutcome]]:
    """Each model in a process of its own, several at once where memory allows, the cores shared among them.

    Two models with one thread each are done sooner than one after the other with two threads (LOG.md,
    2026-11-22), and a model that makes libllama abort takes only its own process with it.
    """
    workers = side_by_side(paths, settings.engine)
    shared = replace(settings.engine, threads=settings.engine.threads or max(1, usable_cores() // workers))
    settings = replace(settings, engine=shared)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent)
    with pool, _progress() as progress:
        futures = {pool.submit(evaluate_one, path, records, out_dir, settings): path for path in paths}
        tasks = {path: progress.add_task(path.name, total=len(records)) for path in paths}
        while not all(future.done() for future in futures):
            wait(futures, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for path, task in tasks.items():
                progress.update(task, completed=_lines(records_path(out_dir, path)))
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


def side_by_side(paths: Sequence[Path], engine: engines.Settings) -> int:
    """How many models to hold at once: as many as there are cores, if half of the free memory takes their files."""
    if engine.gpu_layers or not all(path.is_file() for path in paths):
        return 1  # a GPU's cores and memory are one model's; under transformers memory is not the file's size
    fits = sum(path.stat().st_size for path in paths) < psutil.virtual_memory().available / 2
    return min(len(paths), usable_cores()) if fits else 1


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def evaluate_one(
    path: Path, records: Sequence[HeldOutRecord], out_dir: Path, settings: EvaluationSettings
) -> list[RecordOutcome]:
    """One model on all records, in this process; outcomes that ``out_dir`` holds already are taken over."""
    keys = record_keys(path, records, settings)
    file = records_path(out_dir, path)
    known = finished_records(file, set(keys))
    if all(key in known for key in keys):
        return [known[key] for key in keys]
    with engines.open_engine(path, settings.engine) as engine, file.open("a", encoding="utf-8") as stream:
        missing = [(key, record) for key, record in zip(keys, records, strict=True) if key not in known]
        for index, answered, chosen in _answers(engine, [record for _, record in missing], settings.max_new_tokens):
            key, record = missing[index]
            known[key] = measure_record(
                engine, key, record, answered, settings.max_new_tokens, chosen, settings.max_record_tokens
            )
            stream.write(known[key].model_dump_json() + "\n")
            stream.flush()
    return [known[key] for key in keys]


def _answers(
    engine: Engine, records: Sequence[HeldOutRecord], max_new_tokens: int
) -> Iterator[tuple[int, list[int], list[int] | None]]:
    """(index, ids written for the question, for the question with options or None) as each record is complete."""
    asked = [(index, False, record.example.question) for index, record in enumerate(records)]
    asked += [(index, True, choice_question(record)) for index, record in enumerate(records) if record.options]
    # A record's two questions stay together, so that a break costs few records.
    asked.sort(key=lambda question: question[:2])
    prompts = [engine.chat_format.question_ids(text) for _, _, text in asked]
    written: dict[int, dict[bool, list[int]]] = {}
    for place, new in engine.generate_many(prompts, max_new_tokens):
        index, with_options, _ = asked[place]
        answers = written.setdefault(index, {})
        answers[with_options] = new
        if len(answers) == 1 + bool(records[index].options):
            yield index, answers[False], answers.get(True)
            del written[index]


def _progress() -> Progress:
    return Progress(
        TextColumn("evaluate {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
