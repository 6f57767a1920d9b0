"""What a training session can go through: kill -9, a damaged checkpoint, a full disk, too little time, memory, sense.

Each test trains the real way (Unsloth, TRL, bitsandbytes) on a tiny random model, in forks of one process.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import save_model
from training_server import Ended, Trainings
from transformers import AutoModelForCausalLM

from pipeline.base_model import load_tokenizer
from pipeline.checkpoints import KEPT, SEAL_NAME, latest_whole
from pipeline.prepare import load_examples
from pipeline.prompts import ChatFormat
from pipeline.results import TrainedAdapter
from pipeline.vocabulary import TransformersVocabulary

pytestmark = pytest.mark.e2e

# More than four epochs; checkpoints, logged rows and evaluations fall on different steps.
STEPS = 22
SETTINGS = [
    f"training.max_steps={STEPS}",
    "training.batch_size=1",
    "training.gradient_accumulation=2",
    "training.checkpoint_steps=3",
    "training.logging_steps=2",
    "training.eval_steps=5",
    "training.keep=last",
    "lora.dropout=0.1",
]
RARE = "😀"


def write_rows(folder: Path, train: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in (("train", train), ("eval", [f"Is {n} odd?" for n in range(3)])):
        rows = [{"question": question, "reasoning": "I halve it.", "answer": "Yes."} for question in questions]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), hidden=64, feed_forward=128, layers=1)


@pytest.fixture(scope="module")
def trainings(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    server = Trainings(base, write_rows(tmp_path_factory.mktemp("data"), [f"Is {n} even?" for n in range(9)]))
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "adapter"
    succeeded(trainings.run(out, SETTINGS))
    return out


def succeeded(ended: Ended) -> None:
    assert ended.status == 0, ended.messages


def result(out: Path) -> TrainedAdapter:
    return TrainedAdapter.model_validate_json((out / "result.json").read_bytes())


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(out: Path, expected: Path) -> None:
    """Equal but for the time that it took."""

    def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in ("seconds", "eval_seconds")} for row in rows]

    assert without_seconds(metrics(out)) == without_seconds(metrics(expected))
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (expected / name).read_bytes()
    same = {"steps", "planned_steps", "train_loss", "eval_loss", "eval_loss_before", "eval_loss_after", "kept_step"}
    assert result(out).model_dump(include=same) == result(expected).model_dump(include=same)


def at_step(out: Path, step: int, act: Callable[[int], None]) -> Callable[[int], None]:
    """Something to do to the process as soon as metrics.jsonl has reached ``step``."""

    def wait(pid: int) -> None:
        deadline = time.monotonic() + 300
        while not (out / "metrics.jsonl").is_file() or not any(row["step"] >= step for row in whole_rows(out)):
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.005)
        act(pid)

    return wait


def whole_rows(out: Path) -> list[dict[str, Any]]:
    text = (out / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_every_row_is_logged_once_and_in_order(undisturbed: Path) -> None:
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, STEPS + 1, 2))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 5, 10, 15, 20, STEPS]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert result(undisturbed).finished and result(undisturbed).kept_step == STEPS
    assert not (undisturbed / "scratch").exists()


def test_killed_at_random_moments_it_ends_as_the_undisturbed_one(
    trainings: Trainings, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed six times; between two of them the newest checkpoint is cut short, as by a disk that lost its cache."""
    out = tmp_path / "adapter"
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    checkpoints = out / "checkpoints"
    for number, about in enumerate((0, 4, 8, 12, 16, 20)):

        def kill(pid: int) -> None:
            time.sleep(moments.uniform(0, 0.3))
            os.kill(pid, signal.SIGKILL)

        ended = trainings.run(out, SETTINGS, meanwhile=at_step(out, moments.randint(about, about + 1), kill))
        assert ended.status == -signal.SIGKILL, f"seed {seed}: {ended.messages}"
        sealed = list(checkpoints.glob(f"*/{SEAL_NAME}"))
        assert len(sealed) <= KEPT + 1
        if number == 3:
            newest, progress = latest_whole(checkpoints) or (None, None)
            assert newest is not None and progress is not None and len(sealed) >= 2
            os.truncate(newest / "optimizer.pt", 100)
            found = latest_whole(checkpoints)
            assert found is not None and found[1].step < progress.step
    succeeded(trainings.run(out, SETTINGS))
    assert result(out).resumed_from_step is not None
    assert_same_training(out, undisturbed)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(
    trainings: Trainings, undisturbed: Path, tmp_path: Path
) -> None:
    """The limit on a file's size stands for the disk: the library that writes fails in the same place."""
    out = tmp_path / "adapter"

    def fill_the_disk(pid: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, 20_000))

    ended = trainings.run(out, SETTINGS, meanwhile=at_step(out, 4, fill_the_disk))
    found = latest_whole(out / "checkpoints")
    assert ended.status == 1 and found is not None
    assert f"and the same command goes on from step {found[1].step}, whose checkpoint is whole." in ended.messages
    assert ended.messages.count("Error in train:") == 1 and "cannot be written to" in ended.messages
    assert [path.name for path in (out / "checkpoints").iterdir() if not (path / SEAL_NAME).is_file()] == []
    succeeded(trainings.run(out, SETTINGS))
    assert result(out).resumed_from_step == found[1].step
    assert_same_training(out, undisturbed)


def test_when_the_time_is_up_there_is_an_adapter_and_the_next_session_goes_on(
    trainings: Trainings, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    for session in (1, 2):
        ended = trainings.run(out, [*SETTINGS, "training.max_minutes=0.0001"])
        succeeded(ended)
        partial = result(out)
        assert (partial.steps, partial.planned_steps, partial.finished) == (session, STEPS, False)
        assert f"time is up at step {session} of {STEPS}" in ended.messages
        assert partial.resumed_from_step == (None if session == 1 else 1)
        weights = load_file(out / "adapter_model.safetensors")
        # The first step of a warm-up has learning rate 0, and B is 0 before the second.
        moved = [bool(abs(value).max() > 0) for name, value in weights.items() if "lora_B" in name]
        assert moved == [session > 1] * len(moved)
        saved = out / "checkpoints" / f"checkpoint-{session}" / "adapter_model.safetensors"
        assert saved.read_bytes() == (out / "adapter_model.safetensors").read_bytes()
    succeeded(trainings.run(out, SETTINGS))
    assert_same_training(out, undisturbed)


def test_a_session_that_ends_behind_the_last_step_trains_none_too_many(
    trainings: Trainings, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    shutil.copytree(undisturbed, out)
    for name in ("adapter_model.safetensors", "result.json"):
        (out / name).unlink()
    succeeded(trainings.run(out, SETTINGS))
    assert result(out).resumed_from_step == STEPS
    assert_same_training(out, undisturbed)


def test_patience_ends_it_and_the_best_adapter_is_kept(trainings: Trainings, tmp_path: Path) -> None:
    settings = [
        "training.batch_size=1", "training.gradient_accumulation=2", "training.learning_rate=0.02",
        "training.schedule=constant", "training.warmup_steps=0", "training.checkpoint_steps=50",
    ]  # fmt: skip
    out = tmp_path / "early"
    early = ["training.max_steps=60", "training.eval_steps=2", "training.patience=3"]
    succeeded(trainings.run(out, [*settings, *early]))
    found = result(out)
    points = found.eval_loss
    best = min(points[1:], key=lambda point: point.loss)
    assert found.stopped_early and found.finished
    assert found.steps == points[-1].step == best.step + 2 * 3 < 60
    assert (found.kept_step, found.eval_loss_after) == (best.step, best.loss)
    until_best = tmp_path / "until best"
    succeeded(trainings.run(until_best, [*settings, f"training.max_steps={best.step}", "training.keep=last"]))
    kept, expected = (load_file(each / "adapter_model.safetensors") for each in (out, until_best))
    assert all((kept[name] == expected[name]).all() for name in expected)


def fit(base: Path, data: Path) -> None:
    """Teach a model its training data: a loss near zero has far to rise."""
    tokenizer = load_tokenizer(base)
    chat_format = ChatFormat(tokenizer.chat_template, TransformersVocabulary(tokenizer), None)
    rows = [chat_format.encode(example) for example in load_examples(data / "train.jsonl")]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for row in rows * 6:
        model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base)


def test_a_loss_that_explodes_is_stopped_with_step_and_records(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", hidden=64, feed_forward=128, layers=1)
    data = write_rows(tmp_path / "data", [f"Is {n} even?" for n in range(9)])
    fit(base, data)
    settings = [
        "training.max_steps=60", "training.batch_size=2", "training.gradient_accumulation=1",
        "training.checkpoint_steps=1", "training.logging_steps=1", "lora.alpha=100000",
        "training.learning_rate=1.0", "training.schedule=constant", "training.warmup_steps=0",
    ]  # fmt: skip
    out = tmp_path / "adapter"
    server = Trainings(base, data)
    ended = server.run(out, settings)
    server.close()
    assert ended.status == 1 and ended.messages.count("Error in train:") == 1
    told = re.search(
        r"above (\d+\.\d) for 5 steps and is (\d+\.\d) at step (\d+), in lines \d+, \d+ of train.jsonl: "
        r"lower training.learning_rate",
        ended.messages,
    )
    assert told is not None, ended.messages
    limit = 2 * metrics(out)[0]["eval_loss"] + 1
    assert float(told[1]) == pytest.approx(limit, abs=0.05) and float(told[2]) > limit
    # The checkpoint to go on from is the one before the loss rose.
    losses = {row["step"]: row["loss"] for row in metrics(out) if "loss" in row}
    last_low = max((step for step, loss in losses.items() if loss <= limit), default=0)
    found = latest_whole(out / "checkpoints")
    assert found is not None and found[1].step == last_low < int(told[3]) - 4
    assert f"the checkpoint of step {last_low} is whole" in ended.messages


@pytest.fixture(scope="module")
def long_examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    """A model whose activations of eight examples take half a gigabyte, and those of one fit anywhere."""
    base = save_model(tmp_path_factory.mktemp("wide"), hidden=64, feed_forward=4096, layers=1)
    questions = [f"Is {n} even? " + "Think twice. " * 60 for n in range(16)]
    server = Trainings(base, write_rows(tmp_path_factory.mktemp("long"), questions))
    yield server
    server.close()


WIDE = ["model.dtype=float32", "training.eval_batch_size=1", "training.max_steps=2", "training.logging_steps=1",
        "training.warmup_steps=0"]  # fmt: skip
LITTLE_MEMORY = 350 * 2**20


def test_too_little_memory_names_the_setting(long_examples: Trainings, tmp_path: Path) -> None:
    settings = [*WIDE, "training.batch_size=8", "training.gradient_accumulation=1"]
    ended = long_examples.run(tmp_path / "adapter", settings, memory_bytes=LITTLE_MEMORY)
    assert ended.status == 1 and ended.messages.count("Error in train:") == 1
    assert "Memory does not suffice to train with 8 example(s) at once" in ended.messages
    assert (
        "set training.batch_size=4 and training.gradient_accumulation=2, or training.batch_size=auto" in ended.messages
    )


def test_batch_size_auto_lowers_itself_and_keeps_the_effective_batch(long_examples: Trainings, tmp_path: Path) -> None:
    out, roomy = tmp_path / "little", tmp_path / "roomy"
    automatic = [*WIDE, "training.batch_size=auto", "training.step_examples=8"]
    ended = long_examples.run(out, [*automatic, "training.max_minutes=0.0001"], memory_bytes=LITTLE_MEMORY)
    succeeded(ended)
    lowered = result(out)
    assert lowered.batch_size is not None and lowered.gradient_accumulation is not None
    assert lowered.batch_size < 8 and lowered.batch_size * lowered.gradient_accumulation == 8
    assert "memory does not suffice for 8 examples at once, goes on with 4" in ended.messages
    # The next session has all the memory there is, and keeps to the batch.
    succeeded(long_examples.run(out, automatic))
    assert (result(out).batch_size, result(out).resumed_from_step) == (lowered.batch_size, 1)
    succeeded(long_examples.run(roomy, [*WIDE, "training.batch_size=8", "training.gradient_accumulation=1"]))
    losses = [[point.loss for point in result(each).train_loss] for each in (out, roomy)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_auto_turns_gradient_checkpointing_on_when_memory_runs_out(tmp_path: Path) -> None:
    """Eight layers' activations at once do not fit, one layer's do; the training is the same."""
    deep = save_model(tmp_path / "deep", hidden=64, feed_forward=2048, layers=8)
    questions = [f"Is {n} even? " + "Think twice. " * 60 for n in range(8)]
    server = Trainings(deep, write_rows(tmp_path / "data", questions))
    settings = [*WIDE, "training.batch_size=2", "training.gradient_accumulation=1"]
    settings.append("training.gradient_checkpointing=auto")
    tight, roomy = tmp_path / "tight", tmp_path / "roomy"
    succeeded(server.run(roomy, settings))
    ended = server.run(tight, [*settings, "training.max_minutes=0.0001"], memory_bytes=800 * 2**20)
    succeeded(ended)
    assert "not enough memory without gradient checkpointing, continues with it" in ended.messages
    succeeded(server.run(tight, settings))  # the next session has memory, and keeps to it
    server.close()
    assert str(result(roomy).gradient_checkpointing).startswith("off: ")
    assert "there was not enough memory" in str(result(tight).gradient_checkpointing)
    assert result(tight).resumed_from_step == 1
    losses = [[point.loss for point in result(out).train_loss] for out in (roomy, tight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_record_whose_loss_is_not_finite_is_named(tmp_path: Path) -> None:
    """Its only rare character has an embedding that is not a number."""
    broken = save_model(tmp_path / "base", hidden=64, feed_forward=128, layers=1, tied=False)
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.float16)
    tokenizer = load_tokenizer(broken)
    plain = set(tokenizer("Is 0123456789 even? odd? I halve it. Yes. Is it?").input_ids)
    rare = [token for token in tokenizer(RARE).input_ids if token not in plain]
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = float("nan")
    model.save_pretrained(broken)
    questions = [f"Is {n} even?" for n in range(9)]
    questions[6] += RARE
    server = Trainings(broken, write_rows(tmp_path / "data", questions))
    out = tmp_path / "adapter"
    settings = [*SETTINGS, "training.checkpoint_steps=1"]
    ended = server.run(out, settings)
    server.close()
    assert ended.status == 1 and ended.messages.count("Error in train:") == 1
    found = latest_whole(out / "checkpoints")
    step = found[1].step + 1 if found else 1
    assert f"The loss is not finite at step {step}, in line 7 of train.jsonl" in ended.messages
