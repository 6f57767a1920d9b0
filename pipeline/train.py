"""Stage 2: fine-tune LoRA adapters on the completions alone. The only importer of unsloth and trl.

    medcot run --only train

Token ids and labels come from ``pipeline/prompts.py``; the trainer is told to leave them as they are. The same
path serves GPUs and, since Unsloth 2026.10, the CPU.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.adapter_recipe import AdapterRecipe, write_recipe
from pipeline.artifacts import write_text
from pipeline.base_model import load_tokenizer, local_base
from pipeline.chat_template import template_sha256
from pipeline.checkpoints import TrainingProgress, latest_whole, seal
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.hardware import compute_dtype, detect
from pipeline.prepare import EVAL_FILE, TRAIN_FILE, load_examples
from pipeline.progress import TrainingProgressBar
from pipeline.prompts import IGNORED_LABEL, ChatFormat, EncodedExample, Example
from pipeline.results import LossPoint, TrainedAdapter
from pipeline.vocabulary import TransformersVocabulary

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_DIR = "checkpoints"
_LOSS_POSITIONS = 128  # of the held-out loss at a time
KEPT_CHECKPOINTS = 2  # the newest may be torn by a kill; the one before it is then used


def train(config: Config, inputs: dict[str, Path], out_dir: Path) -> TrainedAdapter:
    """Train on ``inputs["prepare"]`` and leave adapter, tokenizer and metrics.jsonl in ``out_dir``.

    Goes on from the last whole checkpoint in ``out_dir/checkpoints`` if there is one.
    """
    _import_unsloth()
    base = local_base(config.model.base, config.model.revision)
    tokenizer = load_tokenizer(base)
    chat_format = ChatFormat(tokenizer.chat_template, TransformersVocabulary(tokenizer), config.prompt.system)
    train_rows = encode_all(chat_format, load_examples(inputs["prepare"] / TRAIN_FILE))
    eval_rows = encode_all(chat_format, load_examples(inputs["prepare"] / EVAL_FILE))
    hardware = detect(out_dir)
    dtype = compute_dtype(config.model.dtype, hardware)
    model = _lora_model(config, base, dtype.value)
    metrics = MetricsLog(out_dir / METRICS_FILE)
    checkpoint = latest_whole(out_dir / CHECKPOINTS_DIR)
    progress = checkpoint[1] if checkpoint else TrainingProgress(0, 0.0, 0)
    metrics.keep_until(progress.step)
    trainer = _trainer(config, model, tokenizer, train_rows, eval_rows, out_dir, metrics, progress, dtype.value)

    before = metrics.eval_loss(step=0)
    if before is None:
        before = _held_out_loss(trainer)
        metrics.append({"step": 0, "eval_loss": before})
    trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
    after = _held_out_loss(trainer)
    metrics.append({"step": trainer.state.global_step, "eval_loss": after})
    _save_adapter(config, trainer.model, tokenizer, out_dir)
    shutil.rmtree(out_dir / CHECKPOINTS_DIR, ignore_errors=True)
    trainable, total = count_parameters(trainer.model)
    return TrainedAdapter(
        base=config.model.base,
        steps=trainer.state.global_step,
        trainable_parameters=trainable,
        total_parameters=total,
        train_loss=[LossPoint(step=row["step"], loss=row["loss"]) for row in metrics.rows() if "loss" in row],
        eval_loss_before=before,
        eval_loss_after=after,
        tokens_per_second=trainer.tokens_seen / max(trainer.seconds_spent(), 1e-9),
        train_seconds=trainer.seconds_spent(),
        resumed_from_step=progress.step if checkpoint else None,
        device=", ".join(hardware.gpu_names) or hardware.cpu,
        dtype=dtype.value,
        load_in_4bit=config.model.load_in_4bit,
    )


def encode_all(chat_format: ChatFormat, examples: Sequence[Example]) -> list[EncodedExample]:
    """Ids and labels of every example, in order."""
    return [chat_format.encode(example) for example in examples]


def count_parameters(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts its logical elements, not its packed bytes."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += math.prod(state.shape) if state is not None else parameter.numel()
    return trainable, total


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended and flushed as training goes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """Every whole line; the last one may be torn by a kill and is then left out."""
        rows = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return rows

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def keep_until(self, step: int) -> None:
        """Forget what was logged after ``step``: those steps are trained again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def eval_loss(self, step: int) -> float | None:
        return next((row["eval_loss"] for row in self.rows() if row["step"] == step and "eval_loss" in row), None)


def trainer_arguments(config: Config, output_dir: Path, dtype: str, on_cpu: bool) -> dict[str, Any]:
    """The SFTConfig arguments that a configuration stands for."""
    training = config.training
    return {
        "output_dir": str(output_dir),
        "max_steps": training.max_steps or -1,
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        # transformers 5 reads a value below 1 as a share of all steps.
        "warmup_steps": training.warmup_steps or training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "optim": training.optimizer,
        "gradient_checkpointing": training.gradient_checkpointing,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": on_cpu,
        "seed": config.seed,
        "logging_steps": training.logging_steps,
        "save_strategy": "steps",
        "save_steps": training.checkpoint_steps,
        "save_total_limit": KEPT_CHECKPOINTS,
        "eval_strategy": "no",
        "report_to": training.report_to,
        "run_name": config.name,
        "disable_tqdm": True,
        # The rows are token ids and labels already; nothing may be added, cut or masked again.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "max_length": None,
        "packing": False,
    }


def _import_unsloth() -> None:
    """Unsloth patches transformers, trl and peft, so it has to be imported before them."""
    try:
        import unsloth  # noqa: F401
    except ImportError as error:
        raise MedcotError(
            f"Unsloth is not usable here ({error}): install requirements-gpu.txt, "
            "or requirements-cpu.txt on a machine without a GPU."
        ) from error


def _lora_model(config: Config, base: Path, dtype: str) -> Any:
    import torch
    from unsloth import FastLanguageModel

    checkpointing: bool | str = "unsloth" if config.training.gradient_checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        str(base),
        max_seq_length=config.model.max_seq_length,
        dtype=getattr(torch, dtype),
        load_in_4bit=config.model.load_in_4bit,
        use_gradient_checkpointing=checkpointing,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        use_gradient_checkpointing=checkpointing,
        random_state=config.seed,
        max_seq_length=config.model.max_seq_length,
    )


def _trainer(
    config: Config,
    model: Any,
    tokenizer: Any,
    train_rows: Sequence[EncodedExample],
    eval_rows: Sequence[EncodedExample],
    out_dir: Path,
    metrics: MetricsLog,
    progress: TrainingProgress,
    dtype: str,
) -> Any:
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class CountingTrainer(SFTTrainer):
        """Counts the tokens it trains on (padding left out) and the seconds in the loop, over all sessions."""

        tokens_seen = progress.tokens
        started = 0.0

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.tokens_seen += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **kwargs)

        def seconds_spent(self) -> float:
            return progress.seconds + (self.finished or time.monotonic()) - self.started

        finished = 0.0

    class Bookkeeping(TrainerCallback):
        """Progress bar, metrics.jsonl, sealed checkpoints."""

        def __init__(self) -> None:
            self.bar = TrainingProgressBar()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.started = time.monotonic()
            self.bar.start(state.max_steps, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.step(state.global_step, trainer.tokens_seen / max(trainer.seconds_spent(), 1e-9))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" not in logs:
                return
            self.bar.loss(float(logs["loss"]))
            metrics.append(
                {
                    "step": state.global_step,
                    "loss": float(logs["loss"]),
                    "learning_rate": float(logs["learning_rate"]),
                    "grad_norm": float(logs["grad_norm"]),
                    "tokens": trainer.tokens_seen,
                    "seconds": round(trainer.seconds_spent(), 3),
                }
            )

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seal(
                out_dir / CHECKPOINTS_DIR / f"checkpoint-{state.global_step}",
                TrainingProgress(state.global_step, trainer.seconds_spent(), trainer.tokens_seen),
            )

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.finished = time.monotonic()
            self.bar.stop()

    trainer = CountingTrainer(
        model=model,
        args=SFTConfig(**trainer_arguments(config, out_dir / CHECKPOINTS_DIR, dtype, model.device.type == "cpu")),
        train_dataset=Dataset.from_list([_row(example) for example in train_rows]),
        eval_dataset=Dataset.from_list([_row(example) for example in eval_rows]),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[Bookkeeping()],
    )
    trainer.remove_callback(PrinterCallback)
    # TRL casts the adapter of a 4-bit model to bfloat16, and peft casts it back to float32 when a checkpoint is
    # loaded: a resumed training would not be the same one. In bfloat16 small updates are lost besides.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _row(example: EncodedExample) -> dict[str, list[int]]:
    return {
        "input_ids": example.input_ids,
        "labels": example.labels,
        "attention_mask": [1] * len(example.input_ids),
    }


def _held_out_loss(trainer: Any) -> float:
    """Mean negative log-likelihood per labelled token of the held-out rows (nats)."""
    import torch

    loss = tokens = 0.0
    trainer.model.eval()
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            shifted = inputs["labels"][:, 1:]
            # In pieces: the 32-bit copies of all logits at once were a third of the whole training's peak memory.
            for start in range(0, shifted.shape[1], _LOSS_POSITIONS):
                piece = slice(start, min(start + _LOSS_POSITIONS, shifted.shape[1]))
                loss += float(
                    torch.nn.functional.cross_entropy(
                        logits[:, piece].flatten(0, 1).float(), shifted[:, piece].flatten(), reduction="sum"
                    )
                )
            tokens += int((shifted != IGNORED_LABEL).sum())
    return loss / tokens


def _save_adapter(config: Config, model: Any, tokenizer: Any, out_dir: Path) -> None:
    """Adapter, tokenizer and recipe; the adapter names its base as configured, not as a folder of this machine."""
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    path = out_dir / "adapter_config.json"
    adapter_config = json.loads(path.read_text())
    adapter_config["base_model_name_or_path"] = config.model.base
    write_text(path, json.dumps(adapter_config, indent=2, sort_keys=True) + "\n")
    (out_dir / "README.md").unlink(missing_ok=True)  # peft's empty model card
    write_recipe(
        out_dir,
        AdapterRecipe(
            base=config.model.base,
            template_sha256=template_sha256(tokenizer.chat_template),
            system=config.prompt.system,
        ),
    )
