"""Questions answered by one engine, in a process of its own: how many tokens in how many seconds."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from bench import child, engines
from bench.energy import gpu_memory_used
from bench.speed_probe import QUESTION


class AnswerRequest(BaseModel):
    """``questions`` of about the same length are asked together; a folder is answered under transformers."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: Path
    threads: int
    questions: int
    max_new_tokens: int


class AnswerResult(BaseModel):
    """``tokens`` were written in ``seconds``, prompts read included and loading not."""

    engine: str
    weights: str
    on_gpu: bool
    load_seconds: float
    tokens: int
    seconds: float
    gpu_bytes: int | None


def work(request: AnswerRequest) -> AnswerResult:
    layers = 0 if request.model.is_dir() else engines.all_layers_where_possible()
    settings = engines.Settings(threads=request.threads, load_in_4bit=request.model.is_dir(), gpu_layers=layers)
    before = gpu_memory_used()
    started = time.monotonic()
    with engines.open_engine(request.model, settings) as engine:
        loaded = time.monotonic()
        prompts = [engine.chat_format.question_ids(f"Case {number}. {QUESTION}") for number in range(request.questions)]
        written = [ids for _, ids in engine.generate_many(prompts, request.max_new_tokens)]
        ended, after = time.monotonic(), gpu_memory_used()
        return AnswerResult(
            engine=engine.name,
            weights=engine.weights,
            on_gpu=engine.on_gpu,
            load_seconds=loaded - started,
            tokens=sum(map(len, written)),
            seconds=ended - loaded,
            gpu_bytes=None if before is None or after is None else after - before,
        )


if __name__ == "__main__":
    sys.exit(child.answer(AnswerRequest, work))
