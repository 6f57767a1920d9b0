"""Answers of the tuned model and its base under transformers, for a GPU that the installed llama.cpp cannot use.

One model is loaded for both: the base as it was trained on, with the adapter switched on or off. Prompts, control
tokens and the tokens that end an answer are those of the GGUFs, whose vocabularies are read without their weights; so
the two ways of answering differ in nothing but who multiplies the matrices, and with which weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bench.engines import Dtype, TransformersEngine
from bench.evaluation_task import EvaluationTask, answers
from bench.kept_records import answers_path, append, read_lines, records_path
from bench.record_outcome import RecordOutcome, WrittenAnswer
from pipeline.errors import MedcotError
from pipeline.hardware import compute_dtype, detect

if TYPE_CHECKING:
    from export.gguf_model import GgufModel

# Of the time limit, where options are scored by the GGUFs after the answers that they follow.
_SHARE_BEFORE_CHOICES = 0.9


@dataclass(frozen=True)
class TrainedModel:
    """Folders of base and adapter, and how the base's weights are held: in NF4 (on a GPU), or in ``dtype``."""

    base: Path
    adapter: Path
    dtype: Dtype = "auto"
    load_in_4bit: bool = False


def answer_with_transformers(
    trained: TrainedModel, tasks: Sequence[EvaluationTask], roles: Sequence[Literal["tuned", "base"]]
) -> None:
    """Write the missing answers of each task's GGUF into its file; in turns where there is a time limit.

    Raises MedcotError where the model cannot be loaded or memory does not suffice for a single prompt.
    """
    import torch

    limit = tasks[0].limit
    if any(record.options for record in tasks[0].records):
        limit = limit.first(_SHARE_BEFORE_CHOICES)
    known = [
        {*read_lines(records_path(task.out_dir, task.path), RecordOutcome, task.keys),
         *read_lines(answers_path(task.out_dir, task.path), WrittenAnswer, task.keys)}
        for task in tasks
    ]  # fmt: skip
    if all(known[number].issuperset(task.keys) for number, task in enumerate(tasks)) or limit.is_up():
        return
    with ExitStack() as stack:
        ggufs = [stack.enter_context(_vocabulary(task.path)) for task in tasks]
        try:
            engine = TransformersEngine(
                trained.base,
                trained.adapter,
                replace(tasks[0].settings.engine, dtype=_dtype(trained), load_in_4bit=trained.load_in_4bit),
                merge_adapter=False,
                end_ids=[token for token in range(ggufs[0].n_vocab) if ggufs[0].is_end_of_generation(token)],
            )
        except torch.OutOfMemoryError as error:
            raise MedcotError(
                f"Not enough GPU memory to load {trained.base} under transformers: let llama.cpp answer "
                "(evaluation.engine=llama.cpp)."
            ) from error
        stack.enter_context(engine)
        for part in tasks[0].rounds:
            for task, role, gguf, done in zip(tasks, roles, ggufs, known, strict=True):
                waiting = [index for index in part if task.keys[index] not in done]
                with engine.base_only() if role == "base" else nullcontext():
                    limited = replace(task, limit=limit)
                    for index, new, chosen in answers(limited, waiting, gguf.chat_format, engine.generate_many):
                        written = WrittenAnswer(key=task.keys[index], new=new, chosen=chosen)
                        append(answers_path(task.out_dir, task.path), written)


def _dtype(trained: TrainedModel) -> Dtype:
    """On a GPU what training computes in: a T4 has no bfloat16, whatever the checkpoint is stored in."""
    hardware = detect(trained.adapter)
    if trained.dtype != "auto" or hardware.device == "cpu":
        return trained.dtype
    found: Dtype = "bfloat16" if compute_dtype("auto", hardware).value == "bfloat16" else "float16"
    return found


def _vocabulary(path: Path) -> GgufModel:
    """The file without its weights."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    from export.gguf_model import GgufModel

    # llama.cpp warns that a file without its weights was trained on 0 tokens of context.
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    try:
        return GgufModel(path, llama=llama_cpp.Llama(str(path), vocab_only=True, verbose=False))
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
