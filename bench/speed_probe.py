"""Measures one model in a process of its own: a JSON request comes in, a JSON result is the last line out.

    python -m bench.speed_probe < request.json

The process is the unit of measurement: its peak memory is the model's alone, and a library that aborts on a
broken file takes nothing else with it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from bench import engines
from pipeline.errors import MedcotError
from pipeline.memory import peak_memory_bytes
from pipeline.processes import end_with_parent
from pipeline.results import Speed

# A question of ordinary length, so that the time to the first token is that of a person's first turn.
QUESTION = (
    "A 58-year-old man with type 2 diabetes and hypertension has had crushing chest pain for forty minutes, "
    "with sweating and nausea. What is the most likely diagnosis, and what should be done first?"
)


class ProbeRequest(BaseModel):
    """What to measure; ``label`` is the name the result carries."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    label: str
    path: Path
    adapter: Path | None = None
    threads: int
    prompt_tokens: int
    generated_tokens: int
    repeats: int
    seed: int = 0
    system: str | None = None
    dtype: engines.Dtype = "auto"
    load_in_4bit: bool = False


def measure(request: ProbeRequest) -> Speed:
    """Speeds by llama-bench's conventions: random ids, one warm-up, then ``repeats`` values of each.

    Prompt speed is that of ``prompt_tokens`` ids evaluated together, generation speed that of
    ``generated_tokens`` ids evaluated one by one from an empty context, sampling excluded. Loading excludes
    importing the library.
    """
    _import_library(request.path)
    started = time.perf_counter()
    with _open(request) as engine:
        load_seconds = time.perf_counter() - started
        question = engine.chat_format.question_ids(QUESTION)
        random = np.random.default_rng(request.seed)

        def ids(count: int) -> list[int]:
            return [int(token) for token in random.integers(0, engine.vocabulary_size, count)]

        engine.prompt_seconds(ids(request.prompt_tokens))
        engine.decode_seconds(ids(min(8, request.generated_tokens)))
        repeats = range(request.repeats)
        return Speed(
            model=request.label,
            engine=engine.name,
            weights=engine.weights,
            file_bytes=engine.file_bytes,
            load_seconds=load_seconds,
            prompt_tokens=request.prompt_tokens,
            prompt_tokens_per_second=[
                request.prompt_tokens / engine.prompt_seconds(ids(request.prompt_tokens)) for _ in repeats
            ],
            generated_tokens=request.generated_tokens,
            generated_tokens_per_second=[
                request.generated_tokens / engine.decode_seconds(ids(request.generated_tokens)) for _ in repeats
            ],
            time_to_first_token_seconds=[engine.prompt_seconds(question) for _ in repeats],
            peak_memory_bytes=peak_memory_bytes(),
        )


def _open(request: ProbeRequest) -> engines.Engine:
    settings = engines.Settings(
        context_tokens=max(request.prompt_tokens, request.generated_tokens, 512) + 64,
        threads=request.threads,
        system=request.system,
        dtype=request.dtype,
        load_in_4bit=request.load_in_4bit,
    )
    if request.adapter is not None:
        return engines.TransformersEngine(request.path, request.adapter, settings)
    return engines.open_engine(request.path, settings)


def _import_library(path: Path) -> None:
    if path.is_dir():
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers.models.auto  # noqa: F401
    else:
        import export.gguf_model  # noqa: F401


def main() -> int:
    end_with_parent()
    try:
        speed = measure(ProbeRequest.model_validate_json(sys.stdin.read()))
    except MedcotError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print(speed.model_dump_json(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
