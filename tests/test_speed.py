import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from bench_models import FakeEngine, make_adapter, make_tiny_model
from tiny_models import read_tensors, save_model

from bench import engines, speed, speed_probe
from bench.benchmark_display import print_benchmark
from bench.gguf_weights import is_model, weights_of
from export.export import export_models
from pipeline.config import BenchConfig
from pipeline.errors import MedcotError
from pipeline.results import AnswerLength, Benchmark, Estimate, Evaluation, MemoryBandwidth, ModelEvaluation, SpeedTest

SETTINGS = BenchConfig.model_validate(
    {"prompt_tokens": 32, "generated_tokens": 8, "repeats": 2, "threads": 1, "depths": (0, 16)}
)


def request_for(path: Path, adapter: Path | None = None, **changes: object) -> speed_probe.ProbeRequest:
    request = speed_probe.ProbeRequest(
        label="tiny", path=path, adapter=adapter, threads=1, prompt_tokens=32, generated_tokens=8, repeats=2
    )
    return request.model_copy(update=changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def ggufs(base: Path) -> Path:
    """A folder with tiny-F16.gguf and tiny-Q4_0.gguf, and the manifest-less rest of an export."""
    pytest.importorskip("llama_cpp")
    folder = base.parent / "run" / "gguf"
    export_models(base, None, folder, "tiny", ["F16", "Q4_0"])
    return folder


def test_speeds_are_tokens_over_time(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """The fake takes half a second for a prompt, two for decoding and a quarter from one token to the next."""
    monkeypatch.setattr(engines, "open_engine", lambda path, settings: FakeEngine())
    measured = speed_probe.measure(request_for(base, depths=(16,)))
    assert measured.prompt_tokens_per_second == [64.0, 64.0]
    assert measured.generated_tokens_per_second == [4.0, 4.0]
    assert measured.time_to_first_token_seconds == [0.5, 0.5]
    assert measured.inter_token_seconds == [0.25] * 14
    assert [test.name for test in measured.tests] == ["pp32", "tg8", "pp32 @ d16", "tg8 @ d16"]
    assert (measured.model, measured.weights, measured.file_bytes) == ("tiny", "F16", 1000)


def test_mean_and_deviation_are_llama_bench_s() -> None:
    test = SpeedTest(kind="prompt", tokens=512, depth=4096, tokens_per_second=[10.0, 12.0, 17.0])
    assert (test.name, test.mean) == ("pp512 @ d4096", 13.0)
    assert test.standard_deviation == pytest.approx(13**0.5)  # (9 + 1 + 16) / (3 - 1)
    assert test.model_copy(update={"tokens_per_second": [10.0]}).standard_deviation == 0.0


def test_what_a_person_waits_for_and_the_roofline(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setattr(engines, "open_engine", lambda path, settings: FakeEngine())
    measured = speed_probe.measure(request_for(base))
    length = AnswerLength(thought_tokens=30, answer_tokens=10, source="given")
    assert measured.seconds_to_answer(length) == pytest.approx(0.5 + 40 / 4)
    without = measured.model_copy(update={"inter_token_seconds": [], "generated_tokens_per_second": [8.0]})
    assert without.seconds_to_answer(length) == pytest.approx(0.5 + 40 / 8)
    bandwidth = MemoryBandwidth(threads=1, array_bytes=1, bytes_per_second=[30_000.0, 36_000.0])
    benchmark = Benchmark(machine="", threads=1, models=[measured], bandwidth=bandwidth)
    assert benchmark.roofline_share(measured) == pytest.approx(0.1)  # 4 tokens/s of 900 bytes
    assert benchmark.roofline_share(measured.model_copy(update={"bytes_per_token": None})) is None


def test_lengths_are_those_of_the_evaluated_answers() -> None:
    one = Estimate(value=1.0, low=1.0, high=1.0, n=24)
    model = ModelEvaluation(
        model="tuned.gguf", role="tuned", answer_perplexity=one, reasoning_perplexity=None, well_formed=one,
        finished=one, mean_new_tokens=120.0, thought_tokens=one.model_copy(update={"value": 90.0}),
    )  # fmt: skip
    evaluation = Evaluation(models=[model], samples=[])
    found = speed.answer_length(evaluation, "tuned.gguf")
    assert found is not None and (found.thought_tokens, found.answer_tokens) == (90.0, 30.0)
    assert "24 evaluated answers" in found.source
    assert speed.answer_length(evaluation, "other.gguf") is None


@pytest.mark.broad
def test_ggufs_are_measured_in_processes_of_their_own(
    ggufs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"question": "Is 5 mg enough?", "reasoning": "Probably it is.", "answer": "Yes, it is."}
    data = ggufs.parent / "data" / "eval.jsonl"  # where a run has its held-out records
    data.parent.mkdir(exist_ok=True)
    data.write_text((json.dumps(record) + "\n") * 3)
    paths = [ggufs / "tiny-Q4_0.gguf", ggufs / "tiny-F16.gguf"]
    ballast = bytearray(400_000_000)  # in this process: it must not show in the child's peak
    ballast[::4096] = b"x" * len(ballast[::4096])
    result = speed.bench_models(paths, SETTINGS, tmp_path / "bench")
    del ballast
    for measured, path, weights, bits in zip(result.models, paths, ("Q4_0", "F16"), (4.5, 16.0), strict=True):
        assert (measured.engine, measured.weights, measured.threads) == ("llama.cpp", weights, 1)
        assert measured.file_bytes == path.stat().st_size
        assert measured.bits_per_weight is not None and bits <= measured.bits_per_weight < 2 * bits
        assert [test.name for test in measured.tests] == ["pp32", "tg8", "pp32 @ d16", "tg8 @ d16"]
        assert all(len(test.tokens_per_second) == 2 and min(test.tokens_per_second) > 0 for test in measured.tests)
        assert len(measured.time_to_first_token_seconds) == 2
        assert measured.load_seconds > 0
        assert 10_000_000 < measured.peak_memory_bytes < 400_000_000
    assert result.threads == 1 and "cores" in result.machine
    assert "ggml" in result.versions["llama.cpp"] and result.versions["llama-cpp-python"]
    exact, coarse = result.quality
    assert (exact.model, coarse.model, coarse.reference) == ("tiny-F16.gguf", "tiny-Q4_0.gguf", "tiny-F16.gguf")
    assert exact.whole.mean_kl.value == 0.0 and exact.whole.top1_agreement.value == 1.0
    assert coarse.whole.mean_kl.value > 0 and coarse.records == 3 and coarse.reasoning is not None
    assert coarse.whole.tokens == coarse.reasoning.tokens + coarse.answer.tokens
    assert result.recommendation is not None and result.recommendation.model in {path.name for path in paths}
    print_benchmark(result)
    shown = capsys.readouterr().out
    assert "Recommendation:" in shown and "pp32 @ d16" in shown and "tiny-Q4_0.gguf" in shown
    assert Benchmark.model_validate_json((tmp_path / "bench" / "benchmark.json").read_text()) == result


def test_weights_read_for_a_token_are_all_but_an_untied_embedding(tmp_path: Path) -> None:
    for tied in (True, False):
        base = save_model(tmp_path / f"base-{tied}", layers=1, tied=tied)
        export_models(base, None, tmp_path / f"gguf-{tied}", "m", ["F16"])
        path = tmp_path / f"gguf-{tied}" / "m-F16.gguf"
        tensors = read_tensors(path)
        every = sum(int(tensor.n_bytes) for tensor in tensors.values())
        embedding = int(tensors["token_embd.weight"].n_bytes)
        assert ("output.weight" in tensors) is not tied
        assert weights_of(path).bytes_per_token == (every if tied else every - embedding)
        # 16 bit but for the norms, which are in 32
        assert 16 < weights_of(path).bits_per_weight < 16.5


def test_what_is_no_model_is_left_out_of_a_folder(ggufs: Path) -> None:
    adapter = ggufs / "adapter.gguf"
    writer = gguf.GGUFWriter(adapter, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert not is_model(adapter) and is_model(ggufs / "tiny-F16.gguf")
    with pytest.raises(MedcotError, match=r"adapter\.gguf: no model"):
        speed.bench_models([adapter], SETTINGS, None)


def test_a_context_too_small_for_the_depth_is_refused() -> None:
    request = request_for(Path("m.gguf"), depths=(1000,), context_tokens=1024)
    with pytest.raises(MedcotError, match=r"1512 tokens .* do not fit the context of 1024"):
        _ = request.needed_context


def test_base_and_adapter_are_measured_under_transformers(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    measured = speed_probe.measure(request_for(base, adapter))
    assert (measured.engine, measured.weights) == ("transformers", "float32")
    weights = [base / "model.safetensors", adapter / "adapter_model.safetensors"]
    assert measured.file_bytes == sum(path.stat().st_size for path in weights)
    assert min(measured.generated_tokens_per_second) > 0
    assert len(measured.time_to_first_token_seconds) == 2 and measured.cold_load_seconds is None
    assert measured.notes == []
    # In 32 bit as on the disk; the embedding is the output matrix too, and the adapter is merged.
    assert measured.bytes_per_token == pytest.approx((base / "model.safetensors").stat().st_size, rel=0.05)


def test_four_bit_without_a_gpu_is_said(base: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    measured = speed_probe.measure(request_for(base, load_in_4bit=True, repeats=1))
    assert measured.weights == "float32"
    assert measured.notes == ["4 bit under transformers needs an NVIDIA GPU: measured in float32 instead."]


def test_an_error_in_the_child_is_one_sentence_that_names_the_model(ggufs: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(MedcotError, match=r"^Measuring broken\.gguf failed: .*is not a GGUF") as caught:
        speed.bench_models([path], SETTINGS, None)
    assert "\n" not in str(caught.value)
    whole = (ggufs / "tiny-F16.gguf").read_bytes()
    for length in (100, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(MedcotError, match=r"^Measuring cut\.gguf failed: .*cut\.gguf is truncated or damaged"):
            speed.bench_models([tmp_path / "cut.gguf"], SETTINGS, None)
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
