"""Which engine writes an evaluation's answers, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pipeline.hardware import Choice
from pipeline.results import EngineName


def answer_engine(
    requested: Literal["auto", "llama.cpp", "transformers"],
    *,
    has_gpu: bool,
    llama_on_gpu: bool,
    kept: Mapping[EngineName, int] | None = None,
) -> Choice:
    """llama.cpp runs the file that ships; without its GPU an 8B answers for half a day on a hosted machine's cores.

    ``has_gpu``: PyTorch can compute on one; ``llama_on_gpu``: the installed llama-cpp-python offloads to it; ``kept``:
    how many answers of an interrupted evaluation each engine has written, which another engine could not continue.
    """
    if requested != "auto":
        return Choice(requested, f"set by evaluation.engine={requested}")
    possible: list[EngineName] = ["llama.cpp", "transformers"] if has_gpu else ["llama.cpp"]
    wrote = max(possible, key=lambda name: (kept or {}).get(name, 0))
    if kept and kept.get(wrote):
        return Choice(wrote, f"it wrote the {kept[wrote]} answers that are kept")
    if not has_gpu:
        return Choice("llama.cpp", "there is no GPU")
    if llama_on_gpu:
        return Choice("llama.cpp", "the installed llama.cpp computes on the GPU")
    return Choice("transformers", "there is a GPU, and the installed llama.cpp cannot use it")
