"""Who may use a GPU's memory, and when: export and verify never, training until it ends, evaluation in batches."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_adapter, save_model

from bench import engines
from bench.evaluate import stage_settings
from bench.evaluation_processes import side_by_side
from export import gguf_model
from pipeline import run as driver
from pipeline import stage_process
from pipeline.config import load_config

ROOT = Path(__file__).resolve().parent.parent


def test_only_training_evaluation_and_benchmark_see_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sees = set()
    for stage in driver.STAGES:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        stage_process._begin(stage.name)
        if os.environ["CUDA_VISIBLE_DEVICES"] == "0,1":
            sees.add(stage.name)
        else:
            assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert sees == {"train", "evaluate", "bench"}


EXPORT = """
import os, sys
from pipeline.cli import cli
cli.main(sys.argv[1:], standalone_mode=False)
assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "bitsandbytes", "transformers"}))
"""


def test_export_imports_nothing_that_could_use_a_gpu(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", hidden=256, feed_forward=512, layers=1)
    adapter = save_adapter(tmp_path / "adapter", base)
    arguments = ["export", "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "gguf")]
    arguments += ["--quant", "Q4_K_M", "--no-verify"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-c", EXPORT, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_stage_has_ended_with_all_its_memory_before_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(0.1)"
    (tmp_path / "trains.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    driver._child("train", ["trains"], {})
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


@pytest.mark.parametrize(("supported", "layers", "at_once"), [(True, -1, 1), (False, 0, 2)])
def test_evaluation_has_all_layers_on_a_gpu_one_model_at_a_time(
    supported: bool, layers: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_model, "supports_gpu", lambda: supported)
    monkeypatch.setattr("bench.evaluation_processes.usable_cores", lambda: 2)
    settings = stage_settings(load_config("smollm2-cpu"), engines.all_layers_where_possible())
    assert settings.engine.gpu_layers == layers
    files = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for file in files:
        file.write_bytes(b"GGUF")
    assert side_by_side(files, settings.engine) == at_once


@pytest.fixture(scope="module")
def under_transformers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = save_model(tmp_path_factory.mktemp("batches") / "base", layers=1)
    with engines.TransformersEngine(base, None, engines.Settings(threads=1)) as engine:
        yield engine


def test_a_gpus_batch_gives_what_each_prompt_gives_alone(
    under_transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch of a GPU on the CPU: 16 prompts of different lengths, padded on the left."""
    monkeypatch.setitem(engines._BATCH, "cpu", engines._BATCH["cuda"])
    sizes = watch_batches(under_transformers, monkeypatch)
    prompts = [under_transformers.chat_format.question_ids("Why? " * count) for count in range(1, 20)]
    together = dict(under_transformers.generate_many(prompts, 8))
    assert sizes == [16, 3]
    assert [together[index] for index in range(19)] == [under_transformers.generate(ids, 8) for ids in prompts]


def test_a_batch_too_large_for_the_memory_is_halved(under_transformers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines._BATCH, "cpu", 16)
    sizes = watch_batches(under_transformers, monkeypatch, at_most=4)
    prompts = [under_transformers.chat_format.question_ids("Why? " * count) for count in range(1, 11)]
    together = dict(under_transformers.generate_many(prompts, 4))
    assert sizes == [10, 5, 2, 2, 2, 2, 2]
    assert [together[index] for index in range(10)] == [under_transformers.generate(ids, 4) for ids in prompts]


def watch_batches(engine: Any, monkeypatch: pytest.MonkeyPatch, at_most: int = 1000) -> list[int]:
    """The sizes of the batches asked for; more than ``at_most`` are refused as a GPU's memory would."""
    import torch

    sizes: list[int] = []
    generate = engine._model.generate

    def watched(ids: Any, **settings: Any) -> Any:
        if ids.shape[0] > 1:
            sizes.append(ids.shape[0])
        if ids.shape[0] > at_most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(ids, **settings)

    monkeypatch.setattr(engine._model, "generate", watched)
    return sizes
