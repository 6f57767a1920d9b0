"""The presets on the machines that they are for: hours, the GGUF, memory of small cards, advice that works."""

import re
from pathlib import Path

import pytest
from preset_bases import preset_here

from pipeline.config import PRESETS_DIR
from pipeline.hardware import GIBIBYTE
from pipeline.machines import MACHINES
from pipeline.plan import Plan, Subject, make_plan

HOURS = {"deepseek-r1-8b": 3.0}  # in all; the others 1.5
PRESETS = sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))
T4_MACHINES = ("kaggle-t4", "kaggle-t4x2", "colab-t4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets")


_SUBJECTS: dict[tuple[str, str], Subject] = {}  # read once: a tokenizer of 128,256 entries takes seconds


def plan_of(preset: str, machine: str, folder: Path, *overrides: str) -> Plan:
    config = preset_here(preset, folder, *overrides)
    read_as = (preset, f"{config.model.max_seq_length} {config.data.too_long}")
    if read_as not in _SUBJECTS:
        _SUBJECTS[read_as] = Subject.of(config)
    return make_plan(config, hardware=MACHINES[machine], subject=_SUBJECTS[read_as])


@pytest.mark.parametrize("machine", T4_MACHINES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_done_in_one_sitting_and_its_gguf_early(preset: str, machine: str, folder: Path) -> None:
    plan = plan_of(preset, machine, folder)
    assert plan.problems == []
    timeline = plan.timeline
    assert timeline.setup is not None and timeline.gguf_seconds is not None and timeline.seconds is not None
    # The packages that set-up installs come before the run's first second.
    assert (timeline.setup.packages + timeline.seconds) / 3600 < HOURS.get(preset, 1.5)
    assert (timeline.setup.packages + timeline.gguf_seconds) / 3600 < 2
    assert timeline.gguf_seconds < timeline.seconds


def test_a_base_that_has_to_be_downloaded_is_part_of_the_time(folder: Path) -> None:
    """Planned for another machine, nothing is taken to be there: 16 GB at 50 MB/s are five minutes."""
    train = next(stage for stage in plan_of("deepseek-r1-8b", "kaggle-t4", folder).stages if stage.stage == "train")
    assert train.cache_bytes == pytest.approx(16.06e9, rel=0.01)
    assert train.seconds is not None and train.seconds > 321 + 1181, "the published training took 1,181 s"


def test_what_a_limit_leaves_unmeasured_is_told(folder: Path) -> None:
    notes = plan_of("deepseek-r1-8b", "colab-t4", folder, "evaluation.max_minutes=2").notes
    [evaluation] = [note for note in notes if note.startswith("evaluation.max_minutes ends evaluate after 2 of about")]
    share = re.search(r"with about (\d+)% of its records", evaluation)
    assert share is not None and 5 < int(share[1]) < 50


def test_an_8b_model_fits_12_gigabytes_as_it_is(folder: Path) -> None:
    """Unsloth's table: QLoRA of 8B with 12 GB for 21,848 tokens at batch 1 (docs.unsloth.ai, benchmarks)."""
    plan = plan_of("deepseek-r1-8b", "rtx-3060-12gb", folder)
    assert plan.problems == []


@pytest.mark.parametrize(
    ("machine", "overrides"),
    [
        ("rtx-4060-8gb", []),
        ("rtx-4060-8gb", ["training.eval_batch_size=1", "training.batch_size=8", "training.gradient_accumulation=1"]),
        ("rtx-3060-12gb", ["training.batch_size=64", "training.gradient_accumulation=1"]),
        ("rtx-3060-12gb", ["training.gradient_checkpointing=false"]),
        ("kaggle-t4", ["model.load_in_4bit=false"]),
        ("colab-t4", ["training.eval_batch_size=64"]),
        ("kaggle-t4", ["export.quantizations=[F16, Q8_0, Q4_K_M]"]),
        ("colab-t4", ["bench.transformers=true"]),
    ],
)
def test_advice_that_is_followed_makes_it_fit(machine: str, overrides: list[str], folder: Path) -> None:
    plan = plan_of("deepseek-r1-8b", machine, folder, *overrides)
    assert plan.problems
    advice = [setting for problem in plan.problems for setting in re.findall(r"--set (\S+)", problem)]
    assert all("--set" in problem for problem in plan.problems), plan.problems
    assert plan_of("deepseek-r1-8b", machine, folder, *overrides, *advice).problems == []


def test_eight_gigabytes_are_told_to_take_shorter_examples_one_at_a_time(folder: Path) -> None:
    [problem] = plan_of("deepseek-r1-8b", "rtx-4060-8gb", folder).problems
    assert re.match(r"train needs about [\d.]+ GiB of GPU memory and 7\.6 GiB are there: --set", problem)
    settings = dict(setting.split("=") for setting in re.findall(r"--set (\S+)", problem))
    assert settings["training.eval_batch_size"] == "1" and settings["data.too_long"] == "cut"
    assert 256 <= int(settings["model.max_seq_length"]) < 1024


def test_the_held_out_evaluation_is_in_the_estimate(folder: Path) -> None:
    """Of 4 x 1,024 tokens and more: the logits of 1,024 positions in three copies, on top of a layer's activations."""
    large, small = (
        next(stage for stage in plan.stages if stage.stage == "train").gpu_memory_bytes / GIBIBYTE
        for plan in (
            plan_of("deepseek-r1-8b", "kaggle-t4", folder, f"training.eval_batch_size={rows}") for rows in (4, 1)
        )
    )
    assert 1.4 < 3 * 4 * 128256 * 1024 / GIBIBYTE < 1.5 and 8 < small < large < 9.5
