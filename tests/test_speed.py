import subprocess
import sys
from pathlib import Path

import pytest
from bench_models import FakeEngine, make_adapter, make_tiny_model

from bench import engines, speed, speed_probe
from export.export import export_models
from pipeline.config import BenchConfig
from pipeline.errors import MedcotError
from pipeline.results import Benchmark

SETTINGS = BenchConfig.model_validate({"prompt_tokens": 32, "generated_tokens": 8, "repeats": 2})


def request_for(path: Path, adapter: Path | None = None) -> speed_probe.ProbeRequest:
    return speed_probe.ProbeRequest(
        label="tiny", path=path, adapter=adapter, threads=1, prompt_tokens=32, generated_tokens=8, repeats=2
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "base")


def test_speeds_are_tokens_over_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fake takes half a second for a prompt and two for decoding."""
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(engines, "open_engine", lambda path, settings: FakeEngine())
    measured = speed_probe.measure(request_for(tmp_path / "tiny.gguf"))
    assert measured.prompt_tokens_per_second == [64.0, 64.0]
    assert measured.generated_tokens_per_second == [4.0, 4.0]
    assert measured.time_to_first_token_seconds == [0.5, 0.5]
    assert (measured.model, measured.weights, measured.file_bytes) == ("tiny", "F16", 1000)


def test_a_gguf_is_measured_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")

    exported = export_models(base, None, tmp_path / "gguf", "tiny", ["F16"])
    gguf = tmp_path / "gguf" / exported.ship
    ballast = bytearray(400_000_000)  # in this process: it must not show in the child's peak
    ballast[::4096] = b"x" * len(ballast[::4096])
    result = speed.bench_models([gguf], SETTINGS, tmp_path / "bench", threads=1)
    del ballast
    measured = result.models[0]
    assert (measured.engine, measured.weights) == ("llama.cpp", "F16")
    assert measured.file_bytes == gguf.stat().st_size
    assert len(measured.prompt_tokens_per_second) == len(measured.generated_tokens_per_second) == 2
    assert len(measured.time_to_first_token_seconds) == 2
    assert min(measured.prompt_tokens_per_second + measured.generated_tokens_per_second) > 0
    assert measured.load_seconds > 0
    assert 10_000_000 < measured.peak_memory_bytes < 400_000_000
    assert result.threads == 1
    assert "cores" in result.machine
    speed.print_benchmark(result)
    assert Benchmark.model_validate_json((tmp_path / "bench" / "benchmark.json").read_text()) == result


def test_base_and_adapter_are_measured_under_transformers(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    measured = speed_probe.measure(request_for(base, adapter))
    assert (measured.engine, measured.weights) == ("transformers", "float32")
    weights = [base / "model.safetensors", adapter / "adapter_model.safetensors"]
    assert measured.file_bytes == sum(path.stat().st_size for path in weights)
    assert min(measured.generated_tokens_per_second) > 0


def test_an_error_in_the_child_is_one_sentence_that_names_the_model(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(MedcotError, match=r"^Measuring broken\.gguf failed: .*is not a GGUF") as caught:
        speed.bench_models([path], SETTINGS, None)
    assert "\n" not in str(caught.value)
    with pytest.raises(MedcotError, match=r"absent\.gguf does not exist"):
        speed.bench_models([tmp_path / "absent.gguf"], SETTINGS, None)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed, most often for want of memory"),
        ("import os; os.abort()", "died of SIGABRT"),
        ("import sys; sys.exit(3)", "no message"),
        ("print('not json')", "gave no result"),
    ],
)
def test_a_child_that_dies_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str
) -> None:
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real([sys.executable, "-c", script], **options))
    with pytest.raises(MedcotError, match=f"Measuring tiny .*{message}"):
        speed.probe(request_for(tmp_path / "tiny.gguf"))
