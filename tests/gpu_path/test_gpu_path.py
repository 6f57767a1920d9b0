"""What Unsloth runs on a GPU, run on the CPU: its losses are those of transformers and peft, on one and two processes,
in 32 and 16 bit; a gradient scaler survives a kill, and its skipped steps are counted; its kernels compile for a T4.

    pytest -m gpupath
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import save_model
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.base_model import load_tokenizer
from pipeline.config import Config, load_config
from pipeline.prepare import load_examples
from pipeline.prompts import ChatFormat
from pipeline.results import TrainedAdapter
from pipeline.training.lora_model import autocast_asked_of
from pipeline.vocabulary import TransformersVocabulary

sys.path.insert(0, str(Path(__file__).parent))
from triton_wheel import NotFetched, triton_folder

pytestmark = pytest.mark.gpupath

HERE = Path(__file__).parent
SECONDS = 1200  # after which a process is taken to hang; each takes a minute or two
SETTINGS = (
    "name=tiny", "training.report_to=none", "model.load_in_4bit=false", "training.gradient_checkpointing=false",
    "training.batch_size=1", "training.gradient_accumulation=2", "training.eval_batch_size=1", "lora.r=4",
    # Every step sees both records, so that their order has no part in it.
    "training.optimizer=adamw_torch", "training.weight_decay=0", "training.schedule=constant",
    "training.warmup_steps=0", "training.learning_rate=0.002", "training.logging_steps=1",
)  # fmt: skip
FLOAT32_STEPS, FLOAT16_STEPS, SCALED_STEPS = 3, 2, 8
FLOAT32 = ("model.dtype=float32", f"training.max_steps={FLOAT32_STEPS}", "training.checkpoint_steps=50")
FLOAT16 = ("model.dtype=float16", f"training.max_steps={FLOAT16_STEPS}", "training.checkpoint_steps=50")
SCALED = ("model.dtype=float16", f"training.max_steps={SCALED_STEPS}", "training.checkpoint_steps=2")
SCALE = 2.0**18  # overflows now and then: steps are skipped before and after the kill, and some are not
QUESTIONS = {"train": ["1?", "Is 2?"], "eval": ["3?", "4?"]}


class GpuPath:
    """A tiny base, two records to train on and two held out, and what was trained of them on the emulated GPU."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.base = save_model(folder / "base", hidden=64, feed_forward=128, layers=1, heads=2, dtype=torch.float32)
        self.data = folder / "data"
        self.data.mkdir()
        for name, questions in QUESTIONS.items():
            rows = [{"question": question, "reasoning": "I.", "answer": "A."} for question in questions]
            (self.data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def job(self, name: str, settings: tuple[str, ...], **more: Any) -> dict[str, Any]:
        return {
            "out": str(self.folder / name),
            "data": str(self.data),
            "settings": [f"model.base={self.base}", *SETTINGS, *settings],
            **more,
        }

    def start(self, name: str, launcher: list[str], chains: list[list[dict[str, Any]]]) -> subprocess.Popen[str]:
        jobs = self.folder / f"{name}.json"
        jobs.write_text(json.dumps(chains))
        command = [sys.executable, *launcher, str(HERE / "train_jobs.py"), str(jobs)]
        with (self.folder / f"{name}.output").open("w") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=self.environment)

    def messages(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def status(self, name: str) -> int:
        return int((self.folder / f"{name}.status").read_text())

    def result(self, name: str) -> TrainedAdapter:
        assert self.status(name) == 0, self.messages(name)
        return TrainedAdapter.model_validate_json((self.folder / name / "result.json").read_bytes())

    def rows(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl without what differs from one time to the next."""
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def ended(process: subprocess.Popen[str]) -> int:
    try:
        return process.wait(SECONDS)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    try:
        triton = triton_folder()
    except NotFetched as error:
        pytest.skip(str(error))
    paths = os.pathsep.join([str(HERE.parent.parent), str(triton)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def gpu(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> GpuPath:
    """All trainings: what imports Unsloth once trains in forks, and then two processes under torchrun."""
    made = GpuPath(tmp_path_factory.mktemp("gpu"), environment)
    interrupted = made.job("resumed", SCALED, plain=True, scale=SCALE)
    chains = [
        [made.job("float32", FLOAT32)],
        [
            made.job("float16", FLOAT16, scale=2.0**10),
            made.job("whole", SCALED, plain=True, scale=SCALE),
            {**interrupted, "killed_at": 5},
            interrupted,
            made.job("skipped", SCALED, plain=True, scale=1e12),
        ],
    ]
    assert ended(made.start("jobs", [], chains)) == 0, (made.folder / "jobs.output").read_text()[-3000:]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    status = ended(made.start("together", torchrun, [[made.job("two", FLOAT32)]]))
    (made.folder / "two.status").write_text(str(status))
    return made


@pytest.fixture(scope="module")
def plain(gpu: GpuPath) -> tuple[list[float], list[float]]:
    """Training losses by step, and held-out losses before and after, of transformers and peft without Unsloth."""
    config = load_config(None, gpu.job("plain", FLOAT32)["settings"])
    rows = {name: list(_encoded(config, gpu.base, gpu.data / f"{name}.jsonl")) for name in QUESTIONS}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gpu.base, dtype=torch.float32),
        LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            target_modules=list(config.lora.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    set_peft_model_state_dict(model, load_file(gpu.folder / "float32" / "untrained.safetensors"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.training.learning_rate, weight_decay=0.0)

    def loss_on(name: str) -> torch.Tensor:
        tokens = sum(int((labels[:, 1:] != -100).sum()) for _, labels in rows[name])
        summed = [
            nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="sum")
            for ids, labels in rows[name]
        ]
        return torch.stack(summed).sum() / tokens

    losses, held_out = [], [float(loss_on("eval").detach())]
    for _ in range(FLOAT32_STEPS):
        loss = loss_on("train")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    held_out.append(float(loss_on("eval").detach()))
    return losses, held_out


def _encoded(config: Config, base: Path, records: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    tokenizer = load_tokenizer(base)
    chat_format = ChatFormat(tokenizer.chat_template, TransformersVocabulary(tokenizer), config.prompt.system)
    for row in map(chat_format.encode, load_examples(records)):
        yield torch.tensor([row.input_ids]), torch.tensor([row.labels])


def train_losses(result: TrainedAdapter) -> list[float]:
    return [point.loss for point in result.train_loss]


def test_in_32_bit_the_losses_are_those_of_transformers_and_peft(
    gpu: GpuPath, plain: tuple[list[float], list[float]]
) -> None:
    losses, (before, after) = plain
    result = gpu.result("float32")
    assert train_losses(result) == pytest.approx(losses, rel=1e-6)
    assert (result.eval_loss_before, result.eval_loss_after) == pytest.approx((before, after), rel=1e-6)
    assert losses[-1] < losses[0] and result.skipped_steps == 0
    assert "skipped_steps" not in gpu.rows("float32")[1]


def test_in_16_bit_with_autocast_and_scaler_they_are_so_within_rounding(
    gpu: GpuPath, plain: tuple[list[float], list[float]]
) -> None:
    """float16 has 11 significant bits, 5e-4 in each number; of a mean over tokens less is left, here 5e-5."""
    result = gpu.result("float16")
    assert train_losses(result) == pytest.approx(plain[0][:FLOAT16_STEPS], rel=2e-4)
    assert result.eval_loss_before == pytest.approx(plain[1][0], rel=2e-4)
    assert result.skipped_steps == 0 and gpu.rows("float16")[-2]["skipped_steps"] == 0
    assert "patched 1 layers with 1 QKV layers, 1 O layers and 1 MLP layers" in gpu.messages("float16")


def test_two_processes_train_what_one_does(gpu: GpuPath) -> None:
    one, two = gpu.result("float32"), gpu.result("two")
    assert train_losses(two) == pytest.approx(train_losses(one), rel=1e-6)
    assert two.eval_loss_after == pytest.approx(one.eval_loss_after, rel=1e-6)
    assert (two.batch_size, two.gradient_accumulation) == (1, 1)


def test_killed_under_a_gradient_scaler_it_ends_as_the_undisturbed_one(gpu: GpuPath) -> None:
    assert int((gpu.folder / "resumed.killed.status").read_text()) == -9
    whole, resumed = gpu.result("whole"), gpu.result("resumed")
    assert (whole.resumed_from_step, resumed.resumed_from_step) == (None, 4)
    name = "adapter_model.safetensors"
    assert (gpu.folder / "resumed" / name).read_bytes() == (gpu.folder / "whole" / name).read_bytes()
    assert gpu.rows("resumed") == gpu.rows("whole")
    assert resumed.skipped_steps == whole.skipped_steps


def test_skipped_steps_are_counted_logged_and_told(gpu: GpuPath) -> None:
    skipped = gpu.result("whole").skipped_steps
    assert 0 < skipped < SCALED_STEPS
    logged = [row for row in gpu.rows("whole") if "loss" in row]
    assert logged[-1]["skipped_steps"] == skipped
    # A skipped step is one whose gradients were not finite, and the only kind.
    overflows = [row["grad_norm"] is None for row in logged]
    assert [row["skipped_steps"] for row in logged] == [sum(overflows[: index + 1]) for index in range(len(logged))]
    too_many = "warning: " if skipped > SCALED_STEPS / 5 else ""
    assert f"train: {too_many}{skipped} of {SCALED_STEPS} steps were skipped by the gradient scaler" in gpu.messages(
        "whole"
    )


def test_a_training_that_skipped_every_step_is_an_error(gpu: GpuPath) -> None:
    assert gpu.status("skipped") == 1
    told = [line for line in gpu.messages("skipped").splitlines() if line.startswith("Error in train:")]
    assert len(told) == 1 and told[0].startswith("Error in train: Nothing was trained, because gradients overflowed")
    assert f"the gradient scaler skipped all {SCALED_STEPS} steps: raise training.max_steps" in told[0]
    assert not (gpu.folder / "skipped" / "adapter_model.safetensors").exists()


def test_the_kernels_compile_for_a_t4(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "compiled_kernels.py")]
    fresh = {**environment, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=fresh, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert len(kernels) == 6
    assert all(kernel["machine code"] > 0 and kernel["shared memory"] <= 65_536 for kernel in kernels.values())


@pytest.mark.parametrize(("device", "expected"), [("cpu", 2.0), ("cuda", 3.0)])
def test_torch_compile_sees_which_device_is_asked_about_autocast(device: str, expected: float) -> None:
    def ask_without_a_device(numbers: torch.Tensor) -> torch.Tensor:
        return numbers + 1 if torch.is_autocast_enabled() else numbers + 2

    def ask_about_the_cpu(numbers: torch.Tensor) -> torch.Tensor:
        return numbers + 1 if torch.is_autocast_enabled("cpu") else numbers + 2

    torch._dynamo.reset()
    with autocast_asked_of(device), torch.autocast("cpu", dtype=torch.bfloat16):
        for function, value in ((ask_without_a_device, expected), (ask_about_the_cpu, 2.0)):
            compiled = torch.compile(function, backend="eager", fullgraph=True)
            assert function(torch.ones(1)).tolist() == compiled(torch.ones(1)).tolist() == [value]
