"""The real train stage (Unsloth, TRL, bitsandbytes) on a tiny random model: what moves, what is kept, what survives."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import save_model

from pipeline.artifacts import Artifact
from pipeline.checkpoints import SEAL_NAME
from pipeline.config import load_config
from pipeline.results import TrainedAdapter
from pipeline.training.arguments import trainer_arguments

trained = pytest.mark.e2e  # these train, in processes of their own

STEPS = 6
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("base"), hidden=128, feed_forward=256, layers=2)
    rows = [{"Question": f"Is {n} even?", "Complex_CoT": f"I halve {n}.", "Response": "Yes."} for n in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(base: Path, run_dir: Path) -> list[str]:
    settings = [
        f"model.base={base}",
        "name=tiny",
        f"data.source={base / 'rows.jsonl'}",
        "data.eval_rows=2",
        f"training.max_steps={STEPS}",
        "training.checkpoint_steps=2",
        "training.logging_steps=1",
        "training.batch_size=1",
        "lora.dropout=0.1",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "pipeline.cli", "run", *flags, "--until", "train", "--run-dir", str(run_dir)]


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(base, run_dir), check=True, capture_output=True)
    return run_dir / "adapter"


def losses(adapter: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@trained
def test_every_lora_matrix_moved_and_the_adapter_names_its_base(undisturbed: Path, base: Path) -> None:
    matrices = load_file(undisturbed / "adapter_model.safetensors")
    assert {value.dtype for value in matrices.values()} == {np.dtype(np.float32)}
    assert len(matrices) == 2 * len(MODULES) * 2  # layers x projections x (A, B)
    # B starts at zero, so a B that is not zero has been trained; and then A has had a gradient too.
    assert all(np.abs(value).max() > 0 for name, value in matrices.items() if "lora_B" in name)
    settings = json.loads((undisturbed / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert (settings["r"], settings["lora_alpha"]) == (16, 32)


@trained
def test_the_result_says_what_was_trained(undisturbed: Path) -> None:
    result = Artifact.load(undisturbed, TrainedAdapter).result
    shapes = {"q": 128 + 128, "k": 128 + 64, "v": 128 + 64, "o": 128 + 128, "gate": 384, "up": 384, "down": 384}
    assert result.trainable_parameters == 16 * sum(shapes.values()) * 2
    assert result.steps == STEPS and result.resumed_from_step is None and result.load_in_4bit
    assert [point.step for point in result.train_loss] == list(range(1, STEPS + 1))
    assert all(math.isfinite(point.loss) for point in result.train_loss)
    assert result.eval_loss_after < result.eval_loss_before
    assert result.tokens_per_second > 0


@trained
def test_what_is_left_is_the_artifact_and_nothing_else(undisturbed: Path) -> None:
    assert not (undisturbed / "checkpoints").exists() and not (undisturbed / "in_progress.json").exists()
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "metrics.jsonl"} <= {
        path.name for path in undisturbed.iterdir()
    }


@trained
def test_a_killed_training_ends_as_the_undisturbed_one(base: Path, undisturbed: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(base, tmp_path), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "adapter" / "checkpoints").glob(f"*/{SEAL_NAME}")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was sealed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the stage's process is ended by the kernel when its parent dies
    assert not (tmp_path / "adapter" / "manifest.json").exists(), "it finished before it was killed"
    outcome = subprocess.run(command(base, tmp_path), capture_output=True, text=True, check=True)
    assert "train: resumed" in outcome.stderr
    assert Artifact.load(tmp_path / "adapter", TrainedAdapter).result.resumed_from_step in (2, 4, 6)
    assert losses(tmp_path / "adapter") == losses(undisturbed)
    expected = load_file(undisturbed / "adapter_model.safetensors")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("preset", ["smollm2-cpu", "deepseek-r1-8b", "tinyllama-flashcards"])
def test_presets_give_arguments_that_the_installed_trainer_takes(preset: str, tmp_path: Path) -> None:
    import dataclasses

    from trl import SFTConfig

    arguments = trainer_arguments(load_config(preset), tmp_path, "float32", on_cpu=True)
    assert set(arguments) <= {field.name for field in dataclasses.fields(SFTConfig)}
    assert arguments["dataset_kwargs"] == {"skip_prepare_dataset": True}
