"""Logits of a GGUF at every position, in a process of its own: on the GPU or, hidden from it, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from bench import child
from pipeline.errors import MedcotError
from pipeline.hardware import hide_gpu


class LogitsRequest(BaseModel):
    """``tokens`` ids, drawn from the vocabulary; ``out`` gets the logits [tokens, vocabulary] (NumPy, float32)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    gguf: Path
    tokens: int
    threads: int
    on_gpu: bool
    out: Path


class LogitsResult(BaseModel):
    positions: int


def work(request: LogitsRequest) -> LogitsResult:
    if not request.on_gpu:
        hide_gpu()  # a CUDA build would read prompts there even with no layer on it
    from export.gguf_model import GgufModel, supports_gpu

    if request.on_gpu and not supports_gpu():
        raise MedcotError("this llama-cpp-python cannot put layers on a GPU.")
    layers = -1 if request.on_gpu else 0
    with GgufModel(request.gguf, n_ctx=512, n_threads=request.threads, n_gpu_layers=layers) as model:
        ids = np.random.default_rng(0).integers(0, model.n_vocab, request.tokens).tolist()
        logits = np.concatenate([block.copy() for block in model.logits(ids)])
    np.save(request.out, logits)
    return LogitsResult(positions=len(logits))


if __name__ == "__main__":
    sys.exit(child.answer(LogitsRequest, work))
