"""The presets of the published runs, trained as they are: only the model's size, the data and the steps are smaller.

Their recipes are written down here once more, from the published runs, so that a preset cannot drift from its own.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import ROOT, shared_tokenizer
from safetensors.numpy import load_file
from test_model_size import LLAMA_8B, TINYLLAMA
from test_tracking import expected, recorded_offline, tensorboard_scalars
from tiny_models import save_model
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.artifacts import TRACKING_NAME
from pipeline.config import load_config
from pipeline.model_size import ModelSize
from pipeline.training.lora_model import count_parameters

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 2


@dataclass(frozen=True)
class Recipe:
    """A published run, and how much of it is trained here."""

    preset: str
    tokenizer: str
    architecture: dict[str, int]
    trainable: int
    lora: dict[str, Any]
    arguments: dict[str, Any]
    in_4bit: bool
    small: dict[str, int]  # of the random model: heads in the real one's proportions
    settings: list[str]
    steps: int
    learning_rate_at_10: float  # nine steps lie before the tenth
    environment: dict[str, str] = field(default_factory=dict)


R1 = Recipe(
    preset="deepseek-r1-8b",
    tokenizer="deepseek-r1-distill-llama-8b",
    architecture=LLAMA_8B,
    trainable=41_943_040,
    lora={"r": 16, "lora_alpha": 16, "lora_dropout": 0.0},
    arguments={
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "weight_decay": 0.01,
        # Unsloth has no 8-bit optimizer on a CPU.
        "optim": "adamw_8bit" if torch.cuda.is_available() else "adamw_torch_fused",
        "logging_steps": 10,
        "seed": 3407,
    },
    in_4bit=True,
    small={"hidden": 128, "feed_forward": 448, "heads": 8, "kv_heads": 2, "vocabulary": 128_256},
    settings=["training.max_steps=12", "data.config=null", "data.train_rows=40", "data.eval_rows=4"],
    steps=12,
    learning_rate_at_10=2e-4 * (12 - 9) / (12 - 5),
    environment={"WANDB_MODE": "offline"},
)
FLASHCARDS = Recipe(
    preset="tinyllama-flashcards",
    tokenizer="tinyllama-1.1b-chat",
    architecture=TINYLLAMA,
    trainable=12_615_680,
    lora={"r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    arguments={
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "num_train_epochs": 2,
        "seed": 42,
    },
    in_4bit=False,
    small={"hidden": 128, "feed_forward": 352, "heads": 8, "kv_heads": 1, "vocabulary": 32_000},
    settings=["data.train_rows=96", "data.eval_rows=8", "training.report_to=tensorboard"],
    steps=2 * 96 // 16,
    learning_rate_at_10=2e-4 * (1 + math.cos(math.pi * (9 - 1) / (12 - 1))) / 2,  # 5 % of 12 steps: one to warm up
)
BOTH = pytest.mark.parametrize("recipe", [R1, FLASHCARDS], ids=lambda recipe: recipe.preset)


@BOTH
def test_peft_trains_as_many_parameters_of_the_real_model_as_published(recipe: Recipe) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**recipe.architecture))
        settings = peft.LoraConfig(**recipe.lora, target_modules=PROJECTIONS)
        trainable, total = count_parameters(peft.get_peft_model(model, settings))
    size = ModelSize.from_config(recipe.architecture)
    assert trainable == recipe.trainable == size.trained(load_config(recipe.preset).lora)
    assert total - trainable == size.parameters


# The stages as the driver calls them, and what Unsloth and TRL made of the arguments they were given.
TRAIN = """
import json, sys, tempfile
from pathlib import Path
from pipeline.training.lora_model import import_unsloth
import_unsloth(Path(tempfile.mkdtemp()))
from pipeline.config import load_config
from pipeline.prepare import prepare
from pipeline.train import train
from pipeline.training import trainer

class Observed(trainer.AdapterTrainer):
    def train(self, **arguments):
        lora = self.model.peft_config["default"].to_dict()
        record = {
            "arguments": self.args.to_dict(),
            "lora": {key: lora[key] for key in ("r", "lora_alpha", "lora_dropout")},
            "target_modules": sorted(lora["target_modules"]),
            "weights": sorted({type(each).__name__ for name, each in self.model.named_modules()
                               if name.endswith("q_proj.base_layer")}),
        }
        (folder / "observed.json").write_text(json.dumps(record, default=str))
        return super().train(**arguments)

trainer.AdapterTrainer = Observed
folder, preset, *settings = sys.argv[1:]
folder = Path(folder)
config = load_config(preset, settings)
for name in ("data", "adapter"):
    (folder / name).mkdir()
prepare(config, {}, folder / "data")
result = train(config, {"prepare": folder / "data"}, folder / "adapter")
(folder / "result.json").write_text(result.model_dump_json())
"""


def small_model(recipe: Recipe, folder: Path) -> Path:
    """Random weights under the real tokenizer."""
    source = shared_tokenizer(recipe.tokenizer)
    save_model(folder, layers=LAYERS, tied=False, **recipe.small)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def records(recipe: Recipe, path: Path) -> Path:
    columns = load_config(recipe.preset).data.columns
    with path.open("w") as stream:
        for n in range(150):
            row = {columns.question: f"What is the dose of drug {n * n} for {n} kg?", columns.answer: f"{n * 7} mg."}
            if columns.reasoning is not None:
                row[columns.reasoning] = f"Seven milligrams a kilogram, and the weight is {n} kg."
            stream.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module", params=[R1, FLASHCARDS], ids=lambda recipe: recipe.preset)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    recipe: Recipe = request.param
    folder = tmp_path_factory.mktemp(recipe.preset)
    base = small_model(recipe, folder / "base")
    data = records(recipe, folder / "rows.jsonl")
    settings = [f"model.base={base}", f"data.source={data}", *recipe.settings]
    outcome = subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder), recipe.preset, *settings],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | recipe.environment,
    )
    assert outcome.returncode == 0, outcome.stderr
    return recipe, folder


@pytest.mark.e2e
def test_the_trainer_is_given_the_published_recipe(trained: tuple[Recipe, Path]) -> None:
    recipe, folder = trained
    observed = json.loads((folder / "observed.json").read_text())
    assert {name: observed["arguments"][name] for name in recipe.arguments} == recipe.arguments
    assert observed["lora"] == recipe.lora and observed["target_modules"] == sorted(PROJECTIONS)
    assert observed["weights"] == ["Linear4bit" if recipe.in_4bit else "Linear"]


@pytest.mark.e2e
def test_every_matrix_of_the_seven_projections_is_trained(trained: tuple[Recipe, Path]) -> None:
    recipe, folder = trained
    result = json.loads((folder / "result.json").read_text())
    size = ModelSize.of(folder / "base")
    assert result["trainable_parameters"] == size.trained(load_config(recipe.preset).lora)
    matrices = load_file(folder / "adapter" / "adapter_model.safetensors")
    moved = {name for name, values in matrices.items() if "lora_B" in name and abs(values).max() > 0}
    assert len(moved) == LAYERS * len(PROJECTIONS) and len(matrices) == 2 * len(moved)
    assert result["eval_loss_after"] < result["eval_loss_before"]


@pytest.mark.e2e
def test_steps_and_learning_rate_follow_the_schedule(trained: tuple[Recipe, Path]) -> None:
    recipe, folder = trained
    rows = [json.loads(line) for line in (folder / "adapter" / "metrics.jsonl").read_text().splitlines()]
    [logged] = [row for row in rows if "loss" in row]
    assert logged["step"] == 10 and logged["learning_rate"] == pytest.approx(recipe.learning_rate_at_10)
    assert rows[-1]["step"] == recipe.steps and "eval_loss" in rows[-1]


@pytest.mark.e2e
def test_the_trackers_hold_every_row_of_metrics_jsonl(trained: tuple[Recipe, Path]) -> None:
    recipe, folder = trained
    rows = [json.loads(line) for line in (folder / "adapter" / "metrics.jsonl").read_text().splitlines()]
    tracking = folder / "adapter" / TRACKING_NAME
    if recipe is R1:
        history, configuration, _ = recorded_offline(tracking)
        assert configuration["lora"] == load_config(recipe.preset).lora.model_dump(mode="json")
    else:
        history, _ = tensorboard_scalars(tracking)
    assert history == {step: pytest.approx(row, rel=1e-6) for step, row in expected(rows).items()}
