"""Estimates against recorded runs of the default and against published figures."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_model_size import LLAMA_2_7B, LLAMA_8B, LLAMA_70B, TINYLLAMA

from pipeline.config import Config, load_config
from pipeline.estimate import Estimator
from pipeline.hardware import Hardware
from pipeline.machines import MACHINES
from pipeline.model_size import ModelSize
from pipeline.speeds import measure_cpu_gflops
from pipeline.stage_estimate import Workload

GB = 1e9
T4 = MACHINES["kaggle-t4"]
MEASURED = json.loads((Path(__file__).parent / "data" / "measured_runs.json").read_text())


def estimator(config: Config, architecture: dict[str, int], work: Workload, hardware: Hardware = T4) -> Estimator:
    size = ModelSize.from_config(architecture)
    return Estimator(config, size, work, hardware, 60.0, "float16", base_is_here=True)


def workload(tokens: float, longest: int | None = None, rows: int = 1000) -> Workload:
    return Workload(
        rows=rows,
        train_rows=rows,
        eval_rows=50,
        mean_tokens=tokens,
        mean_completion_tokens=tokens * 0.7,
        longest_tokens=longest or int(tokens),
    )


# docs.unsloth.ai/basics/unsloth-benchmarks: the longest context that fits, QLoRA with rank 32 on all linear layers,
# batch 1, gradient checkpointing.
@pytest.mark.parametrize(
    ("architecture", "gigabytes", "tokens"),
    [
        (LLAMA_8B, 8, 2_972),
        (LLAMA_8B, 12, 21_848),
        (LLAMA_8B, 16, 40_724),
        (LLAMA_8B, 24, 78_475),
        (LLAMA_8B, 80, 342_733),
        (LLAMA_70B, 48, 12_106),
        (LLAMA_70B, 80, 89_389),
    ],
)
def test_gpu_memory_is_within_a_quarter_of_unsloth_s_table(
    architecture: dict[str, int], gigabytes: float, tokens: int
) -> None:
    config = load_config("deepseek-r1-8b", ["lora.r=32", "training.batch_size=1", "model.max_seq_length=131072"])
    estimated = estimator(config, architecture, workload(tokens)).training_memory.in_step(1) / GB
    assert estimated == pytest.approx(gigabytes, rel=0.25)


# huggingface.co/blog/unsloth-trl: Llama-2 7B, QLoRA with rank 16, batch 2, on a T4; Alpaca's examples are short.
def test_gpu_memory_is_within_a_quarter_of_a_published_t4_run() -> None:
    estimated = estimator(load_config("deepseek-r1-8b"), LLAMA_2_7B, workload(150, 512)).training_memory.in_step(2) / GB
    assert estimated == pytest.approx(6.4, rel=0.25)


# The TinyLlama flashcard project: 3,000 records, 2 epochs, batch 4 x 4 on a T4 in 17.6 minutes; a card with its
# template is about 110 tokens long.
def test_training_time_is_within_a_half_of_the_published_t4_run() -> None:
    config = load_config("tinyllama-flashcards")
    stage = estimator(config, TINYLLAMA, workload(110, 250, rows=3000)).train()
    assert stage.seconds is not None
    assert 1 / 1.5 < stage.seconds / (17.6 * 60) < 1.5


def test_two_gpus_share_the_work_of_a_step() -> None:
    config = load_config("tinyllama-flashcards")
    one, two = (
        estimator(config, TINYLLAMA, workload(110, 250, rows=3000), MACHINES[name]).train().seconds
        for name in ("kaggle-t4", "kaggle-t4x2")
    )
    assert one is not None and two is not None
    assert 0.5 * one < two < 0.6 * one, "loading takes as long as before"


def test_the_8b_preset_fits_a_t4_and_a_batch_of_64_does_not() -> None:
    memory = estimator(load_config("deepseek-r1-8b"), LLAMA_8B, workload(750, 2048)).training_memory
    small, large = memory.peak(2), memory.peak(64)
    assert 6 * GB < small < T4.gpu_memory_bytes < large


@pytest.mark.parametrize("run", MEASURED["runs"], ids=lambda run: run["name"])
def test_recorded_runs_of_the_default_are_estimated(run: dict[str, Any]) -> None:
    """Time within a factor of 1.5, memory within a quarter, for every stage that takes longer than 15 seconds."""
    hardware = Hardware(**MEASURED["hardware"] | {"gpu_names": (), "gpu_capability": None})
    config = load_config("smollm2-cpu", run["overrides"])
    size = ModelSize.from_config(MEASURED["architecture"])
    work = Workload(**run["workload"])
    estimates = Estimator(config, size, work, hardware, run["cpu_gflops"], run["dtype"], base_is_here=True).stages()
    measured = run["stages"]
    for estimate in estimates:
        if estimate.stage not in measured:
            continue
        seconds, memory = measured[estimate.stage]["seconds"], measured[estimate.stage]["peak_memory_bytes"]
        assert estimate.memory_bytes == pytest.approx(memory, rel=0.25), estimate.stage
        if seconds is not None and seconds > 15:
            assert estimate.seconds is not None
            assert 1 / 1.5 < estimate.seconds / seconds < 1.5, estimate.stage


def test_the_cpu_s_speed_is_measured_and_plausible() -> None:
    assert 1 < measure_cpu_gflops(0.05) < 20_000


def test_an_unknown_gpu_has_no_time_and_still_memory() -> None:
    from dataclasses import replace

    stage = estimator(
        load_config("deepseek-r1-8b"), LLAMA_8B, workload(750), replace(T4, gpu_names=("Quux 9",))
    ).train()
    assert stage.seconds is None and stage.gpu_memory_bytes > 5 * GB
