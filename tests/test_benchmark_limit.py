"""``bench.max_minutes``: every file is measured once at least, what matters less is left out and named."""

import functools
from pathlib import Path

import pytest
from bench_models import Clock, FakeEngine
from test_recommendation import speed_of
from tiny_models import save_model

from bench import engines, speed
from bench.benchmark_display import print_benchmark
from bench.quality import Qualities, QualityRequest, compare_files
from bench.sections.speed import speed_section
from bench.speed_probe import ProbeRequest, measure
from export.export import export_models
from pipeline.config import BenchConfig
from pipeline.results import Benchmark, Speed
from pipeline.time_limit import TimeLimit

REPEATS = 5


def request_for(**changes: object) -> ProbeRequest:
    request = ProbeRequest(
        label="m", path=Path(), threads=1, prompt_tokens=32, generated_tokens=8, repeats=REPEATS, depths=(16,)
    )
    return request.model_copy(update=changes)


@pytest.mark.parametrize(
    ("seconds", "repeats", "depths"),
    [
        (None, (5, 5, 5), 2),
        (1000, (5, 5, 5), 2),
        (20, (5, 3, 2), 2),  # 17.5 s after the warm-up: 5.8 for prompts, half of 15 for decoding, 6 of 9 for answers
        (3, (1, 1, 1), 0),  # one of each is measured in any case
    ],
)
def test_there_are_as_many_repeats_as_time_allows(
    seconds: float | None, repeats: tuple[int, ...], depths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake takes half a second for a prompt, two for decoding, and 2.25 for an answer."""
    clock = Clock()
    monkeypatch.setattr(engines, "open_engine", lambda path, settings: FakeEngine(clock=clock))
    found = measure(request_for(seconds=seconds), clock)
    counted = (found.prompt_tokens_per_second, found.generated_tokens_per_second, found.time_to_first_token_seconds)
    assert tuple(map(len, counted)) == repeats
    assert len(found.deeper) == depths
    assert found.prompt_tokens_per_second[0] == 64 and found.time_to_first_token_seconds[0] == 0.5
    if seconds is not None and seconds > 10:
        assert clock.now <= seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    limit = type("Limit", (), {"starting_now": staticmethod(functools.partial(TimeLimit.starting_now, clock=clock))})
    monkeypatch.setattr(speed, "TimeLimit", limit)
    return clock


def bench_three(
    clock: Clock, minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Benchmark, dict[str, float | None]]:
    """Two files and a folder that each take all of their time, 30 seconds at least; what each was given."""
    given: dict[str, float | None] = {}

    def probe(request: ProbeRequest) -> Speed:
        given[request.label] = request.seconds
        clock.now += max(30, request.seconds or 0)
        repeats = 1 if (request.seconds or 0) < 60 else request.repeats
        measured = speed_of(request.label, 1, 1)
        lists = ("prompt_tokens_per_second", "generated_tokens_per_second", "time_to_first_token_seconds")
        return measured.model_copy(update={name: [1.0] * repeats for name in lists})

    def measure_quality(request: QualityRequest) -> Qualities:
        given["quality"] = request.seconds
        raise AssertionError("quality comes last")

    paths = [tmp_path / name for name in ("a.gguf", "b.gguf", "folder")]
    for path in paths[:2]:
        path.write_bytes(b"GGUF")
    paths[2].mkdir()
    data = tmp_path / "eval.jsonl"
    data.write_text('{"question": "Q", "answer": "A"}\n')
    monkeypatch.setattr(speed, "probe", probe)
    monkeypatch.setattr(speed, "is_model", lambda path: True)
    monkeypatch.setattr(speed, "measure_quality", measure_quality)
    settings = BenchConfig.model_validate({"max_minutes": minutes, "repeats": REPEATS})
    return speed.bench_models(paths, settings, None, data=data), given


def test_what_comes_last_is_left_out(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, given = bench_three(clock, 1, tmp_path, monkeypatch)
    assert given == {"a.gguf": 15, "b.gguf": 10}  # a quarter of a minute, then a third of what a.gguf has left
    assert [each.model for each in result.models] == ["a.gguf", "b.gguf"]
    assert result.ended_early is not None
    assert result.ended_early.sentence == (
        "Ended early, bench.max_minutes=1; left out: a.gguf: 1 of 5 repeats; b.gguf: 1 of 5 repeats; folder; quality."
    )
    assert result.quality == [] and result.quality_note == "not measured: bench.max_minutes=1 left no time"
    print_benchmark(result)
    section = speed_section(result)
    assert section is not None and result.ended_early.sentence in section.text
    assert "Ended early, bench.max_minutes=1; left out: a.gguf" in " ".join(capsys.readouterr().out.split())


def test_quality_ends_in_time_on_the_same_records_for_all(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    out = tmp_path / "gguf"
    export_models(save_model(tmp_path / "base"), None, out, "m", ["F16", "Q4_0"])
    request = QualityRequest(
        reference=out / "m-F16.gguf", models=[out / "m-Q4_0.gguf"], context_tokens=256, threads=1,
        examples=[(f"Is {number} mg enough?", None, "Yes, it is.") for number in range(5)],
    )  # fmt: skip

    class Ticking(Clock):
        def __call__(self) -> float:
            self.now += 1
            return self.now

    found = compare_files(request.model_copy(update={"seconds": 7}), Ticking())
    assert found.fitting == 5 and 1 <= found.files[0].records < 5
    assert {file.records for file in found.files} == {found.files[0].records}
    assert compare_files(request.model_copy(update={"at_most": 2})).files[0].records == 2
    assert compare_files(request).files[1].records == 5
