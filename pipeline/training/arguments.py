"""The trainer's arguments that a configuration stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.training.batch import Batch


def trainer_arguments(
    config: Config, output_dir: Path, dtype: str, on_cpu: bool, batch: Batch | None = None
) -> dict[str, Any]:
    """The SFTConfig arguments; ``batch`` is this process's share, where it is not simply the configured one."""
    training = config.training
    if batch is None:
        size = training.effective_batch if training.batch_size == "auto" else training.batch_size
        batch = Batch(size, training.effective_batch // size)
    return {
        "output_dir": str(output_dir),
        "max_steps": training.max_steps or -1,
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": batch.size,
        "per_device_eval_batch_size": (
            min(training.eval_batch_size, batch.size) if training.batch_size == "auto" else training.eval_batch_size
        ),
        "gradient_accumulation_steps": batch.accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        # transformers 5 reads a value below 1 as a share of all steps.
        "warmup_steps": training.warmup_steps or training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "optim": training.optimizer,
        "gradient_checkpointing": training.gradient_checkpointing is not False,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": on_cpu,
        "seed": config.seed,
        "logging_steps": training.logging_steps,
        "logging_nan_inf_filter": False,  # LossGuard looks for them; filtered, they would never be seen
        "save_strategy": "steps",
        "save_steps": training.checkpoint_steps,
        "save_total_limit": None,  # pipeline/checkpoints.py prunes when the newest is known to be whole
        "eval_strategy": "no" if training.eval_steps is None else "steps",
        "eval_steps": training.eval_steps,
        "report_to": "none",  # pipeline/tracking.py follows metrics.jsonl
        "run_name": config.name,
        "disable_tqdm": True,
        # The rows are token ids and labels already; nothing may be added, cut or masked again.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "max_length": None,
        "packing": False,
    }
