"""When gradient checkpointing is on, and why: as set, or by what the memory needs."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_model_size import LLAMA_8B, TINYLLAMA

from pipeline.choices import training_choices
from pipeline.config import load_config
from pipeline.estimate import Estimator, Workload
from pipeline.gradient_checkpointing import TURNED_ON, keep_on, session_choice
from pipeline.hardware import GIBIBYTE, Choice
from pipeline.machines import MACHINES
from pipeline.model_size import ModelSize
from pipeline.training.arguments import trainer_arguments

T4 = MACHINES["kaggle-t4"]
CARDS = Workload(
    rows=3200, train_rows=3000, eval_rows=200, mean_tokens=170, mean_completion_tokens=90, longest_tokens=512
)


def estimator(preset: str, architecture: dict[str, int], gibibytes: float, *overrides: str) -> Estimator:
    card = replace(T4, gpu_memory_bytes=int(gibibytes * GIBIBYTE))
    config = load_config(preset, list(overrides))
    return Estimator(config, ModelSize.from_config(architecture), CARDS, card, 60.0, "float16", base_is_here=True)


def test_tinyllama_recomputes_only_where_its_card_needs_it() -> None:
    large, small = (estimator("tinyllama-flashcards", TINYLLAMA, size) for size in (15, 6))
    assert (large.checkpointing.value, small.checkpointing.value) == ("off", "on")
    assert "which fits into 15.0 GiB" in large.checkpointing.reason
    assert "is too much for 6.0 GiB" in small.checkpointing.reason
    faster, slower = large.train(), small.train()
    assert faster.seconds is not None and slower.seconds is not None and faster.seconds < 0.9 * slower.seconds
    assert slower.gpu_memory_bytes < 6 * GIBIBYTE < faster.gpu_memory_bytes < 0.8 * 15 * GIBIBYTE
    for each, value in ((large, "off"), (small, "on")):
        choices = training_choices(load_config("tinyllama-flashcards"), T4, Choice("float16", ""), each, 1)
        assert [(c.value, "gradient_checkpointing=auto" in c.reason) for c in choices if "checkpointing" in c.name] == [
            (value, True)
        ]


def test_what_is_set_holds_whatever_the_card() -> None:
    assert estimator("deepseek-r1-8b", LLAMA_8B, 80).checkpointing.value == "on"
    off = estimator("tinyllama-flashcards", TINYLLAMA, 2, "training.gradient_checkpointing=false")
    assert off.checkpointing == Choice("off", "set by training.gradient_checkpointing")
    auto_batch = ["training.batch_size=auto", "training.step_examples=64"]
    assert estimator("tinyllama-flashcards", TINYLLAMA, 15, *auto_batch).checkpointing.value == "off"


@pytest.mark.parametrize("value", ["true", "auto", "false"])
def test_the_trainer_gets_a_switch(value: str, tmp_path: Path) -> None:
    config = load_config("tinyllama-flashcards", [f"training.gradient_checkpointing={value}"])
    arguments = trainer_arguments(config, tmp_path, "float32", True)
    assert arguments["gradient_checkpointing"] is (value != "false")


def test_a_session_that_ran_out_of_memory_is_remembered_where_auto_chooses(tmp_path: Path) -> None:
    auto, off = load_config("tinyllama-flashcards"), load_config(None, ["training.gradient_checkpointing=false"])
    chosen = Choice("off", "it fits")
    assert session_choice(auto, tmp_path, chosen) == chosen
    keep_on(tmp_path)
    assert session_choice(auto, tmp_path, chosen) == TURNED_ON
    assert session_choice(off, tmp_path, chosen) == chosen
