"""Measures one model in a process of its own: a JSON request comes in, a JSON result is the last line out.

    python -m bench.speed_probe < request.json

The process is the unit of measurement: its peak memory is the model's alone, and a library that aborts on a
broken file takes nothing else with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from bench import child, engines
from bench.cold_load import ColdLoad, cold_load
from bench.energy import energy_meter, gpu_memory_used
from bench.gguf_weights import weights_of
from pipeline.config import KvType
from pipeline.errors import MedcotError
from pipeline.memory import peak_memory_bytes
from pipeline.results import Energy, LlamaCppSettings, Speed, SpeedTest
from pipeline.time_limit import TimeLimit

# A question of ordinary length, so that the time to the first token is that of a person's first turn.
QUESTION = (
    "A 58-year-old man with type 2 diabetes and hypertension has had crushing chest pain for forty minutes, "
    "with sweating and nausea. What is the most likely diagnosis, and what should be done first?"
)


Kind = Literal["prompt", "generation"]
Measured = TypeVar("Measured")
_LEAST_CONTEXT = 512  # room for the question and the beginning of its answer


class ProbeRequest(BaseModel):
    """What to measure; ``label`` is the name the result carries, ``depths`` are those beyond 0.

    ``seconds`` limits the time: then there may be fewer repeats, down to one, and no other depth than 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    label: str
    path: Path
    adapter: Path | None = None
    threads: int
    prompt_tokens: int
    generated_tokens: int
    repeats: int
    depths: tuple[int, ...] = ()
    context_tokens: int | None = None
    flash_attention: bool = False
    kv_type: KvType = "f16"
    gpu_layers: int = 0
    seed: int = 0
    system: str | None = None
    dtype: engines.Dtype = "auto"
    load_in_4bit: bool = False
    seconds: float | None = None

    @property
    def is_gguf(self) -> bool:
        return not self.path.is_dir()

    @property
    def needed_context(self) -> int:
        return needed_context(self.depths, self.prompt_tokens, self.generated_tokens, self.context_tokens)


def needed_context(depths: Sequence[int], prompt_tokens: int, generated_tokens: int, context_tokens: int | None) -> int:
    """llama-bench's: depth and the longest test, with room for a real answer; a set one has to hold that."""
    needed = max(depths, default=0) + max(prompt_tokens, generated_tokens, _LEAST_CONTEXT)
    if context_tokens is not None and context_tokens < needed:
        raise MedcotError(
            f"{needed} tokens (the deepest test) do not fit the context of {context_tokens}: "
            "give a larger one, or smaller depths."
        )
    return context_tokens or needed


def measure(request: ProbeRequest, clock: Callable[[], float] = time.monotonic) -> Speed:
    """Speeds by llama-bench's conventions: random ids, one warm-up, then ``repeats`` values of each.

    Prompt speed is that of ``prompt_tokens`` ids evaluated together, generation speed that of ``generated_tokens``
    ids evaluated one by one, sampling excluded, both behind each depth. What a person waits for is timed with real
    answers to one question. Loading excludes importing the library.
    """
    limit = TimeLimit.starting_now(None if request.seconds is None else request.seconds / 60, clock)
    _import_library(request)
    open_engine = _opener(request)
    weights = weights_of(request.path) if request.is_gguf else None
    cold = _cold_load(request, open_engine)
    gpu_before = gpu_memory_used()
    started = time.perf_counter()
    with open_engine() as engine:
        load_seconds = time.perf_counter() - started
        bench = _Tests(request, engine, limit)
        bench.warm_up()
        prompt, generation = bench.speed("prompt", 0, share=1 / 3), bench.speed("generation", 0, share=1 / 2)
        if limit.is_set:
            # What a person waits comes before other depths, which may be left out.
            answers, deeper = bench.answers(share=2 / 3), bench.deeper()
        else:
            deeper, answers = bench.deeper(), bench.answers()
        return Speed(
            model=request.label,
            engine=engine.name,
            weights=engine.weights,
            file_bytes=engine.file_bytes,
            load_seconds=load_seconds,
            prompt_tokens=request.prompt_tokens,
            prompt_tokens_per_second=prompt.tokens_per_second,
            generated_tokens=request.generated_tokens,
            generated_tokens_per_second=generation.tokens_per_second,
            time_to_first_token_seconds=[times[0] for times in answers],
            inter_token_seconds=[float(gap) for times in answers for gap in np.diff(times)],
            deeper=deeper,
            energy=bench.energy(),
            bits_per_weight=weights.bits_per_weight if weights else None,
            bytes_per_token=engine.bytes_per_token,
            cold_load_seconds=cold.seconds,
            cold_load_note=cold.note,
            threads=request.threads,
            llama_cpp=_llama_cpp_settings(request),
            notes=_notes(request, engine),
            peak_gpu_bytes=_peak_gpu_bytes(engine, gpu_before),
            peak_memory_bytes=peak_memory_bytes(),
        )


class _Tests:
    """The measurements of one loaded model; ids are drawn anew for each, the same in every run."""

    def __init__(self, request: ProbeRequest, engine: engines.Engine, limit: TimeLimit) -> None:
        self._request = request
        self._engine = engine
        self._limit = limit
        self._random = np.random.default_rng(request.seed)

    def warm_up(self) -> None:
        self._engine.prompt_seconds(self._ids(self._request.prompt_tokens), 1)
        self._engine.decode_seconds(self._ids(1), 1)

    def deeper(self) -> list[SpeedTest]:
        """Prompt and generation at each other depth than 0, as far as the time allows."""
        kinds: tuple[Kind, ...] = ("prompt", "generation")
        tests = [(kind, depth) for depth in self._request.depths for kind in kinds]
        return [
            self.speed(kind, depth, share=1 / (len(tests) - number))
            for number, (kind, depth) in enumerate(tests)
            if not self._limit.is_up()
        ]

    def speed(self, kind: Kind, depth: int, share: float) -> SpeedTest:
        """``share`` of the time that is left is this test's, where there is a limit."""
        if kind == "prompt":
            tokens, timed = self._request.prompt_tokens, self._engine.prompt_seconds
        else:
            tokens, timed = self._request.generated_tokens, self._engine.decode_seconds
        ids, before = self._ids(tokens), self._ids(depth)
        if self._limit.is_set:
            seconds = self._as_often_as_time_allows(lambda _: timed(ids, 1, before)[0], share)
        else:
            seconds = timed(ids, self._request.repeats, before)
        return SpeedTest(kind=kind, tokens=tokens, depth=depth, tokens_per_second=[tokens / each for each in seconds])

    def answers(self, share: float = 1.0) -> list[list[float]]:
        """Per repeat the seconds from the question to each token of an answer, each answer from another seed."""
        question = self._engine.chat_format.question_ids(QUESTION)
        room = max(self._request.generated_tokens, 2)  # two tokens have one time between them
        return self._as_often_as_time_allows(
            lambda repeat: self._engine.answer_times(question, room, self._request.seed + repeat), share
        )

    def _as_often_as_time_allows(self, measured: Callable[[int], Measured], share: float) -> list[Measured]:
        """All repeats, or as many as end in this share of the time that is left; at least one."""
        limit = self._limit.first(share)
        found: list[Measured] = []
        longest = 0.0
        for repeat in range(self._request.repeats):
            if found and limit.is_up(longest):
                break
            started = limit.clock()
            found.append(measured(repeat))
            longest = max(longest, limit.clock() - started)
        return found

    def energy(self) -> Energy:
        meter = energy_meter(on_gpu=self._engine.on_gpu)
        if meter.joules is None:
            return Energy(joules_per_token=None, source=meter.source)
        if self._limit.is_up():
            return Energy(joules_per_token=None, source="not measured: bench.max_minutes left no time")
        ids = self._ids(self._request.generated_tokens)
        joules = meter.of(partial(self._engine.decode_seconds, ids, self._request.repeats))
        if joules is None:
            return Energy(joules_per_token=None, source=f"not measured: the counter ran over ({meter.source})")
        return Energy(joules_per_token=joules / (len(ids) * self._request.repeats), source=meter.source)

    def _ids(self, count: int) -> list[int]:
        return [int(token) for token in self._random.integers(0, self._engine.vocabulary_size, count)]


def _opener(request: ProbeRequest) -> Callable[[], engines.Engine]:
    settings = engines.Settings(
        context_tokens=request.needed_context,
        threads=request.threads,
        system=request.system,
        dtype=request.dtype,
        load_in_4bit=request.load_in_4bit,
        flash_attention=request.flash_attention,
        kv_type=request.kv_type,
        gpu_layers=request.gpu_layers,
    )
    if request.adapter is not None:
        return partial(engines.TransformersEngine, request.path, request.adapter, settings)
    return partial(engines.open_engine, request.path, settings)


def _cold_load(request: ProbeRequest, open_engine: Callable[[], engines.Engine]) -> ColdLoad:
    if not request.is_gguf:
        return ColdLoad(None, "cold loads are measured of GGUFs only")
    return cold_load(request.path, lambda: open_engine().close())


def _llama_cpp_settings(request: ProbeRequest) -> LlamaCppSettings | None:
    if not request.is_gguf:
        return None
    return LlamaCppSettings(
        context_tokens=request.needed_context,
        flash_attention=request.flash_attention,
        kv_type=request.kv_type,
        gpu_layers=request.gpu_layers,
    )


def _notes(request: ProbeRequest, engine: engines.Engine) -> list[str]:
    notes = []
    if request.load_in_4bit and not engine.on_gpu:
        notes.append(f"4 bit under transformers needs an NVIDIA GPU: measured in {engine.weights} instead.")
    if request.is_gguf and request.gpu_layers and not engine.on_gpu:
        notes.append("This llama-cpp-python was built without GPU support: no layer is on a GPU.")
    return notes


def _peak_gpu_bytes(engine: engines.Engine, used_before: int | None) -> int | None:
    """Of PyTorch its allocator's peak; of llama.cpp, which allocates all when it loads, what the GPU's use grew by."""
    if not engine.on_gpu:
        return None
    if engine.name == "transformers":
        import torch

        return int(torch.cuda.max_memory_reserved())
    used = gpu_memory_used()
    return None if used is None or used_before is None else used - used_before


def _import_library(request: ProbeRequest) -> None:
    if request.is_gguf:
        import export.gguf_model  # noqa: F401
    else:
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers.models.auto  # noqa: F401


if __name__ == "__main__":
    sys.exit(child.answer(ProbeRequest, measure))
