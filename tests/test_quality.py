"""Which file the others are held against, and what is said where nothing can be compared."""

import subprocess
from pathlib import Path

import psutil
import pytest
from test_recommendation import speed_of
from tiny_models import save_model

from bench import quality
from bench.quality import QualityRequest, candidates, compare_files, measure_quality
from export.export import export_models
from pipeline.errors import MedcotError
from pipeline.results import Speed

EXAMPLES = [("Is 5 mg enough?", "Probably it is.", "Yes, it is."), ("And 10 mg?", None, "No.")]


def file_of(name: str, bits: float) -> tuple[Path, Speed]:
    return Path(name), speed_of(name, 1, 1).model_copy(update={"bits_per_weight": bits})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp")
    out = tmp_path_factory.mktemp("quality")
    export_models(save_model(out / "base"), None, out, "m", ["F16", "Q4_0"])
    return out


def request_of(folder: Path, **changes: object) -> QualityRequest:
    request = QualityRequest(
        reference=folder / "m-F16.gguf", models=[folder / "m-Q4_0.gguf"], examples=EXAMPLES, context_tokens=256,
        threads=1,
    )  # fmt: skip
    return request.model_copy(update=changes)


def test_the_most_exact_file_is_the_reference() -> None:
    found = candidates([file_of("Q4", 4.9), file_of("BF16", 16.0), file_of("F16", 16.0), file_of("Q8", 8.5)])
    assert found.reference == Path("F16")
    assert sorted(found.others) == [Path("BF16"), Path("Q4"), Path("Q8")]
    coarse = candidates([file_of("Q4", 4.9), file_of("Q6", 6.6)])
    assert coarse.reference is None and "Q6, has 6.6 bits per weight" in str(coarse.note)
    alone = candidates([file_of("F16", 16.0)])
    assert alone.reference is None and "one only" in str(alone.note)


def test_reasoning_and_answer_are_told_apart(folder: Path) -> None:
    exact, coarse = compare_files(request_of(folder)).files
    assert (exact.model, coarse.model, coarse.reference) == ("m-F16.gguf", "m-Q4_0.gguf", "m-F16.gguf")
    assert exact.whole.mean_kl.value == exact.whole.p99_kl == 0.0
    assert coarse.reasoning is not None
    assert coarse.records == coarse.answer.perplexity.n == 2 and coarse.reasoning.perplexity.n == 1
    assert coarse.whole.tokens == coarse.reasoning.tokens + coarse.answer.tokens
    # The whole is the mean over the parts' tokens.
    together = sum(part.tokens * part.mean_kl.value for part in (coarse.reasoning, coarse.answer))
    assert coarse.whole.mean_kl.value == pytest.approx(together / coarse.whole.tokens)
    assert 0 < coarse.whole.mean_kl.value < coarse.whole.p99_kl


def test_records_that_do_not_fit_are_left_out(folder: Path) -> None:
    long = ("Why?", "because " * 400, "So.")
    assert compare_files(request_of(folder, examples=[*EXAMPLES, long])).files[0].records == 2
    with pytest.raises(MedcotError, match="No held-out record fits 256 tokens"):
        compare_files(request_of(folder, examples=[long]))


def test_too_little_memory_is_said_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=100_000)
    monkeypatch.setattr(quality.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(MedcotError, match=r"m-F16\.gguf and another file take .* GB together"):
        measure_quality(request_of(folder))
