"""What each quantization lost: perplexity, divergence and agreement against the most exact file, on held-out text.

    python -m bench.quality < request.json

Models are evaluated side by side, a block of positions at a time, so no logits are stored.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from bench import child
from bench.divergence import REFERENCE, Divergence, compare, summarize
from pipeline.errors import MedcotError
from pipeline.prompts import Example
from pipeline.results import FileQuality, Measurement, Speed
from pipeline.time_limit import TimeLimit

# Below this a file is itself too far from the model to hold others against it (Q6_K has 6.6, Q8_0 8.5).
_MIN_REFERENCE_BITS = 8.0
_KEPT_FREE = 0.1  # of the memory that is free, for keys, values and logits


class QualityRequest(BaseModel):
    """Compare ``models`` with ``reference`` on examples; longer ones than ``context_tokens`` are left out.

    ``seconds`` limits the time, and so the number of examples, down to one; ``at_most`` limits that number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    reference: Path
    models: list[Path]
    examples: list[tuple[str, str | None, str]]
    context_tokens: int
    threads: int
    gpu_layers: int = 0
    system: str | None = None
    seconds: float | None = None
    at_most: int | None = None


class Qualities(Measurement):
    """The reference first; ``fitting`` is how many examples are not too long."""

    files: list[FileQuality]
    fitting: int


@dataclass(frozen=True)
class Candidates:
    """The file to hold the others against; None with the reason where there is none."""

    reference: Path | None
    others: list[Path]
    note: str | None


def candidates(files: Sequence[tuple[Path, Speed]]) -> Candidates:
    """The most exact of several files of one model, measured already, and the others."""
    if len(files) < 2:
        return Candidates(None, [], "quality is measured between several files of one model: there is one only")
    ordered = sorted(files, key=lambda file: (-(file[1].bits_per_weight or 0), file[1].weights == "BF16"))
    path, most_exact = ordered[0]
    if (most_exact.bits_per_weight or 0) < _MIN_REFERENCE_BITS:
        return Candidates(
            None,
            [],
            f"the most exact file, {path.name}, has {most_exact.bits_per_weight:.1f} bits per weight: too few to hold "
            "others against it; export F16 or Q8_0 too",
        )
    return Candidates(path, [other for other, _ in ordered[1:]], None)


def measure_quality(request: QualityRequest) -> Qualities:
    """In a child process; several files at once where memory takes them, else one after the other.

    Raises MedcotError, also where the reference and one file do not fit the memory together.
    """
    free = psutil.virtual_memory().available * (1 - _KEPT_FREE)
    sizes = {path: path.stat().st_size for path in request.models}
    reference = request.reference.stat().st_size
    if reference + max(sizes.values()) > free:
        raise MedcotError(
            f"{request.reference.name} and another file take {(reference + max(sizes.values())) / 1e9:.1f} GB together "
            f"and {free / 1e9:.1f} GB are free: close programs, or compare on a larger machine."
        )
    together = reference + sum(sizes.values()) < free
    groups = [request.models] if together else [[path] for path in request.models]
    seconds = None if request.seconds is None else request.seconds / len(groups)
    results: Qualities | None = None
    for models in groups:
        # The first one's time says how many records all are compared on.
        update = {"seconds": seconds} if results is None else {"seconds": None, "at_most": results.files[0].records}
        asked = request.model_copy(update={"models": models, **update})
        found = child.ask("bench.quality", asked, Qualities, f"Comparing with {request.reference.name}")
        files = found.files if results is None else [*results.files, *found.files[1:]]
        results = found.model_copy(update={"files": files})
    assert results is not None
    return results


def compare_files(request: QualityRequest, clock: Callable[[], float] = time.monotonic) -> Qualities:
    """The child's work."""
    from export.gguf_model import GgufModel

    limit = TimeLimit.starting_now(None if request.seconds is None else request.seconds / 60, clock)
    with ExitStack() as stack:

        def opened(path: Path) -> GgufModel:
            return stack.enter_context(
                GgufModel(
                    path,
                    n_ctx=request.context_tokens,
                    n_threads=request.threads,
                    n_gpu_layers=request.gpu_layers,
                    system=request.system,
                )
            )

        reference = opened(request.reference)
        models = {path.name: opened(path) for path in request.models}
        encoded = [reference.chat_format.encode_parts(Example(*example)) for example in request.examples]
        fitting = [parts for parts in encoded if sum(map(len, parts)) <= reference.n_ctx]
        if not fitting:
            raise MedcotError(f"No held-out record fits {reference.n_ctx} tokens: give a larger context.")
        records: dict[str, list[_Record]] = {name: [] for name in (REFERENCE, *models)}
        longest = 0.0
        for number, (prompt, thought, answer) in enumerate(fitting[: request.at_most]):
            if number and limit.is_up(longest):
                break
            started = clock()
            for name, found in compare(reference, models, [*prompt, *thought, *answer], len(prompt)).items():
                records[name].append(_Record(found, len(thought)))
            longest = max(longest, clock() - started)
    named = {request.reference.name: records.pop(REFERENCE), **records}
    return Qualities(
        files=[_summary(name, request.reference.name, each) for name, each in named.items()], fitting=len(fitting)
    )


@dataclass(frozen=True)
class _Record:
    """A thought, of so many tokens, and the answer behind it."""

    whole: Divergence
    thought_tokens: int

    @property
    def thought(self) -> Divergence:
        return self.whole[: self.thought_tokens]

    @property
    def answer(self) -> Divergence:
        return self.whole[self.thought_tokens :]


def _summary(model: str, reference: str, records: Sequence[_Record]) -> FileQuality:
    with_thought = [record.thought for record in records if record.thought_tokens]
    return FileQuality(
        model=model,
        reference=reference,
        records=len(records),
        whole=summarize([record.whole for record in records]),
        reasoning=summarize(with_thought) if with_thought else None,
        answer=summarize([record.answer for record in records]),
    )


if __name__ == "__main__":
    sys.exit(child.answer(QualityRequest, compare_files))
