"""Models on held-out records, several at once, each in a process of its own; every record is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

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
from bench.evaluation_summary import Role
from bench.evaluation_task import EvaluationTask, answers
from bench.kept_records import answers_path, append, likelihoods_path, read_lines, records_path
from bench.record_outcome import Likelihood, RecordOutcome, WrittenAnswer, measure_answer, measure_likelihood
from bench.transformers_answers import TrainedModel, answer_with_transformers
from pipeline.errors import MedcotError
from pipeline.hardware import usable_cores
from pipeline.processes import end_with_parent
from pipeline.results import EngineName

POLL_SECONDS = 0.5
_TURN_SECONDS = 120  # in which a model's likelihoods are measured before it is another's turn
_NO_RECORDS = range(0)


def evaluate_side_by_side(
    tasks: Sequence[EvaluationTask], roles: Sequence[Role], trained: TrainedModel | None = None
) -> None:
    """Each model in a process of its own, several at once where memory allows, the cores shared among them.

    Two models with one thread each are done sooner than one after the other with two threads (LOG.md,
    2026-11-22), and a model that makes libllama abort takes only its own process with it. What they find is in the
    files of kept_records. With ``trained`` the answers are written under transformers, while the GGUFs' likelihoods are
    measured. Models that cannot be held at once take turns where there is a time limit, which so finds them about
    equally far.
    """
    paths, limit = [task.path for task in tasks], tasks[0].limit
    workers = side_by_side(paths, tasks[0].settings.engine)
    threads = tasks[0].settings.engine.threads or max(1, usable_cores() // workers)
    tasks = [
        replace(task, settings=replace(task.settings, engine=replace(task.settings.engine, threads=threads)))
        for task in tasks
    ]
    pool = ProcessPoolExecutor(workers + (trained is not None), get_context("spawn"), initializer=end_with_parent)
    with pool, _progress() as progress, _ended_on_an_error():
        work = _Work(pool, progress, tasks)
        if trained is not None:
            work.begin(
                # When one process of a pool dies all are ended, and which it was is not known.
                "The process that answered under transformers, or one that measured likelihoods next to it, was ended "
                "by the system, most often because memory ran out: let llama.cpp answer (evaluation.engine=llama.cpp).",
                answer_with_transformers,
                trained,
                tasks,
                roles,
            )
        if limit.is_set and workers < len(tasks):
            while not limit.is_up() and any(unscored(task) for task in tasks):
                work.wave(evaluate_one, _NO_RECORDS, _TURN_SECONDS)
            for part in tasks[0].rounds if trained is None else ():
                work.wave(evaluate_one, part)
        else:
            work.wave(evaluate_one, range(len(tasks[0].records)) if trained is None else _NO_RECORDS)
        if trained is not None:
            work.wait_for_all()
            work.wave(complete_answers)


@contextmanager
def _ended_on_an_error() -> Iterator[None]:
    """The pool would wait for whatever still runs, an hour of answers perhaps; what is known is in the files."""
    try:
        yield
    except BaseException:
        for process in active_children():
            process.terminate()
        raise


class _Work:
    """Calls in processes of their own, waited for while the progress is shown."""

    def __init__(self, pool: ProcessPoolExecutor, progress: Progress, tasks: Sequence[EvaluationTask]) -> None:
        self._pool = pool
        self._progress = progress
        self._tasks = tasks
        self._bars = [progress.add_task(task.path.name, total=len(task.records)) for task in tasks]
        self._begun: dict[Future[None], str] = {}

    def begin(self, died: str, function: Callable[..., None], *arguments: Any) -> Future[None]:
        """``died`` is the error's text when the process is gone."""
        future = self._pool.submit(function, *arguments)
        self._begun[future] = died
        return future

    def wave(self, function: Callable[..., None], *arguments: Any) -> None:
        """``function(task, *arguments)`` for every task; back when all of them are done."""
        self._wait(
            [
                self.begin(
                    f"The process that evaluated {task.path} was ended by the system or by llama.cpp itself: the file "
                    "is damaged, or memory ran out. Check it with medcot chat, or evaluate one model at a time.",
                    function,
                    task,
                    *arguments,
                )
                for task in self._tasks
            ]
        )

    def wait_for_all(self) -> None:
        self._wait(list(self._begun))

    def _wait(self, futures: Sequence[Future[None]]) -> None:
        """Raises the error of whatever has failed, one of ``futures`` or not."""
        failed = False
        while not failed and not all(future.done() for future in futures):
            wait(futures, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for task, bar in zip(self._tasks, self._bars, strict=True):
                self._progress.update(bar, completed=_answered(task))
            failed = any(future.done() and future.exception() for future in self._begun)
        for future, died in self._begun.items():
            try:
                if future.done() or future in futures:
                    future.result()
            except BrokenProcessPool as error:
                raise MedcotError(died) from error


def side_by_side(paths: Sequence[Path], engine: engines.Settings) -> int:
    """How many models to hold at once: as many as there are cores, if half of the free memory takes their files."""
    if engine.gpu_layers or not all(path.is_file() for path in paths):
        return 1  # a GPU's cores and memory are one model's; under transformers memory is not the file's size
    fits = sum(path.stat().st_size for path in paths) < psutil.virtual_memory().available / 2
    return min(len(paths), usable_cores()) if fits else 1


def known_likelihoods(task: EvaluationTask) -> dict[str, Likelihood]:
    return {
        **read_lines(records_path(task.out_dir, task.path), RecordOutcome, task.keys),
        **read_lines(likelihoods_path(task.out_dir, task.path), Likelihood, task.keys),
    }


def unscored(task: EvaluationTask) -> list[int]:
    """Indices of the records whose likelihood is not known yet."""
    known = known_likelihoods(task)
    return [index for index, key in enumerate(task.keys) if key not in known]


def _answered(task: EvaluationTask) -> int:
    """Answers under transformers are in a file of their own first."""
    files = (records_path(task.out_dir, task.path), answers_path(task.out_dir, task.path))
    return max(path.read_bytes().count(b"\n") if path.is_file() else 0 for path in files)


def evaluate_one(task: EvaluationTask, part: Sequence[int], turn_seconds: float | None = None) -> None:
    """One model in this process: likelihoods of all records, then answers to those in ``part``, as far as missing.

    Likelihoods come first, because they take little of the time and decide most. Ends at the task's limit, or with the
    model's turn.
    """
    outcomes = read_lines(records_path(task.out_dir, task.path), RecordOutcome, task.keys)
    scored = known_likelihoods(task)
    to_score = unscored(task)
    unanswered = {index for index in part if task.keys[index] not in outcomes}
    if task.limit.is_up() or not (to_score or unanswered):
        return
    with engines.open_engine(task.path, task.settings.engine) as engine:
        # From here on: a turn that loading takes up would never measure anything.
        limit = task.limit if turn_seconds is None else task.limit.at_most(turn_seconds)
        for index in to_score:
            if limit.is_up():
                return
            key = task.keys[index]
            scored[key] = measure_likelihood(engine, key, task.records[index], task.settings.max_record_tokens)
            append(likelihoods_path(task.out_dir, task.path), scored[key])
        # transformers answers short questions first, so that the time limit would leave gaps all over the records.
        for some in task.rounds if engine.name == "transformers" else [part]:
            waiting = [index for index in some if index in unanswered]
            for index, new, chosen in answers(task, waiting, engine.chat_format, engine.generate_many):
                written = WrittenAnswer(key=task.keys[index], new=new, chosen=chosen)
                _append_outcome(task, index, engine, scored[written.key], written, engine.name)


def complete_answers(task: EvaluationTask) -> None:
    """Add the GGUF's own measures to what transformers has written for it; options are scored until the limit."""
    outcomes = read_lines(records_path(task.out_dir, task.path), RecordOutcome, task.keys)
    scored = read_lines(likelihoods_path(task.out_dir, task.path), Likelihood, task.keys)
    written = read_lines(answers_path(task.out_dir, task.path), WrittenAnswer, task.keys)
    waiting = [
        index
        for index, key in enumerate(task.keys)
        if key in written and key in scored and key not in outcomes
        and not (task.records[index].options and task.limit.is_up())
    ]  # fmt: skip
    if not waiting:
        return
    with engines.open_engine(task.path, task.settings.engine) as engine:
        for index in waiting:
            if not (task.records[index].options and task.limit.is_up()):
                key = task.keys[index]
                _append_outcome(task, index, engine, scored[key], written[key], "transformers")


def _append_outcome(
    task: EvaluationTask,
    index: int,
    engine: engines.Engine,
    likelihood: Likelihood,
    written: WrittenAnswer,
    written_by: EngineName,
) -> None:
    outcome = measure_answer(engine, likelihood, task.records[index], written, task.settings.max_new_tokens, written_by)
    append(records_path(task.out_dir, task.path), outcome)


def _progress() -> Progress:
    return Progress(
        TextColumn("evaluate {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
