"""Stage 2: fine-tune LoRA adapters on the completions alone.

    medcot run --only train

Token ids and labels come from ``pipeline/prompts.py``; the trainer is told to leave them as they are. The same
path serves GPUs and, since Unsloth 2026.10, the CPU. Training goes on from its last whole checkpoint, with the data
order, random numbers, optimizer and loss curve of a training that was never stopped.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import ranks
from pipeline.artifacts import CHECKPOINTS_NAME, SCRATCH_NAME, TRACKING_NAME
from pipeline.base_model import load_tokenizer, local_base
from pipeline.checkpoints import (
    TrainingProgress,
    checkpoint_path,
    disk_errors_told,
    latest_whole,
    remove_after,
    whole,
)
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.estimate import Estimator
from pipeline.gradient_checkpointing import TURNED_ON, keep_on, session_choice, with_checkpointing
from pipeline.hardware import Choice, Hardware, compute_dtype, detect
from pipeline.model_size import ModelSize
from pipeline.prepare import EVAL_FILE, TRAIN_FILE
from pipeline.prompts import ChatFormat
from pipeline.results import LossPoint, TrainedAdapter
from pipeline.stage_estimate import Workload
from pipeline.tracking import track
from pipeline.training.arguments import trainer_arguments
from pipeline.training.batch import Batch, first_batch, free_memory, is_out_of_memory, keep_batch, memory_advice
from pipeline.training.gradient_scaler import is_tolerable, require_a_step_taken, skipped_steps_sentence
from pipeline.training.held_out import best_of, out_of_patience
from pipeline.training.lora_model import (
    adapter_weights,
    count_parameters,
    import_unsloth,
    load_checkpoint_weights,
    load_lora_model,
    save_adapter,
    set_adapter_weights,
    turn_on_checkpointing,
)
from pipeline.training.metrics_log import MetricsLog
from pipeline.training.rows import Collator, TokenCounts, encoded_rows
from pipeline.training.time_budget import TimeBudget
from pipeline.vocabulary import TransformersVocabulary

if TYPE_CHECKING:
    from pipeline.training.trainer import AdapterTrainer

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Trainee:
    """What stays the same when training is begun again with a smaller batch."""

    config: Config
    model: Any
    tokenizer: Any
    train_rows: Any
    eval_rows: Any
    hardware: Hardware
    dtype: str
    out_dir: Path
    budget: TimeBudget
    checkpointing: Choice

    @property
    def checkpoints(self) -> Path:
        return self.out_dir / CHECKPOINTS_NAME


def train(config: Config, inputs: dict[str, Path], out_dir: Path) -> TrainedAdapter:
    """Train on ``inputs["prepare"]`` and leave adapter, tokenizer and metrics.jsonl in ``out_dir``.

    Goes on from the last whole checkpoint in ``out_dir/checkpoints`` if there is one. A result that is not
    ``finished`` keeps that folder for the next session. Raises TrainingDiverged, or MedcotError when memory or disk
    do not suffice.
    """
    budget = TimeBudget(config.training.max_minutes)
    import_unsloth(out_dir / SCRATCH_NAME / "unsloth")
    base = local_base(config.model.base, config.model.revision)
    tokenizer = load_tokenizer(base)
    chat_format = ChatFormat(tokenizer.chat_template, TransformersVocabulary(tokenizer), config.prompt.system)
    # Each process encodes for itself: on another machine there is no file of the first.
    scratch = out_dir / SCRATCH_NAME / f"rank{ranks.rank()}"
    limit = config.truncated_at
    train_rows, counts = encoded_rows(chat_format, inputs["prepare"] / TRAIN_FILE, scratch / "train.arrow", limit)
    eval_rows, _ = encoded_rows(chat_format, inputs["prepare"] / EVAL_FILE, scratch / "eval.arrow", limit)
    hardware = detect(out_dir)
    dtype = compute_dtype(config.model.dtype, hardware).value
    estimator = _estimator(config, base, counts, len(eval_rows), hardware, dtype)
    checkpointing = ranks.from_first(session_choice(config, out_dir / CHECKPOINTS_NAME, estimator.checkpointing))
    batch = first_batch(config.training, out_dir / CHECKPOINTS_NAME, lambda: estimator.batch_size)
    chosen = with_checkpointing(config, checkpointing.value == "on")
    model = _load_model(chosen, base, dtype)
    trainee = Trainee(chosen, model, tokenizer, train_rows, eval_rows, hardware, dtype, out_dir, budget, checkpointing)
    result = _train_in_memory(trainee, batch, may_checkpoint=config.training.gradient_checkpointing == "auto")
    shutil.rmtree(out_dir / SCRATCH_NAME, ignore_errors=True)
    return result


def _load_model(config: Config, base: Path, dtype: str) -> Any:
    try:
        return load_lora_model(config, base, dtype)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = "choose a smaller model.base" if config.model.load_in_4bit else "set model.load_in_4bit=true"
        raise MedcotError(f"Not enough memory to load {config.model.base}: {advice}.") from error


def _estimator(
    config: Config, base: Path, counts: TokenCounts, eval_rows: int, hardware: Hardware, dtype: str
) -> Estimator:
    """For memory alone: neither the CPU's speed nor what a completion takes has a part in it."""
    work = Workload(
        rows=counts.rows + eval_rows,
        train_rows=counts.rows,
        eval_rows=eval_rows,
        mean_tokens=counts.mean,
        mean_completion_tokens=counts.mean,
        longest_tokens=counts.longest,
    )
    return Estimator(config, ModelSize.of(base), work, hardware, cpu_gflops=1.0, dtype=dtype, base_is_here=True)


def _train_in_memory(trainee: Trainee, batch: Batch, may_checkpoint: bool) -> TrainedAdapter:
    """Train with ``batch``; with one process begin again in less memory if need be.

    That is first with gradient checkpointing where ``may_checkpoint`` and it is off, then, with batch_size auto, with a
    smaller batch.
    """
    config = trainee.config
    automatic = config.training.batch_size == "auto"
    untrained = adapter_weights(trainee.model) if automatic or may_checkpoint else {}
    while True:
        may_checkpoint = may_checkpoint and trainee.checkpointing.value == "off"
        try:
            return _train(trainee, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            smaller = batch.smaller() if automatic else None
            if may_checkpoint:
                keep_on(trainee.checkpoints)
                if ranks.world_size() > 1:
                    raise MedcotError(
                        "Not enough memory to train without gradient checkpointing: the same command continues with it."
                    ) from error
            elif smaller is None:
                found = latest_whole(trainee.checkpoints)
                raise MedcotError(
                    f"Not enough memory to train with {batch.size} example{'s' * (batch.size > 1)} at once: "
                    f"{memory_advice(config, batch, found[1].step if found else 0)}."
                ) from error
            else:
                keep_batch(smaller, trainee.checkpoints)
                if ranks.world_size() > 1:
                    # The others wait for this one in the middle of a step, and can only be ended.
                    raise MedcotError(
                        f"Not enough memory to train with {batch.size} examples at once: the same command continues "
                        f"with {smaller.size}."
                    ) from error
        # Not before the exception is gone, whose frames hold the tensors of the step.
        if may_checkpoint:
            _announce("train: not enough memory without gradient checkpointing, continues with it")
            trainee = replace(trainee, config=with_checkpointing(config, True), checkpointing=TURNED_ON)
            turn_on_checkpointing(trainee.model)
        elif smaller is not None:
            _announce(f"train: not enough memory for {batch.size} examples at once, continues with {smaller.size}")
            batch = smaller
        trainee.model.zero_grad(set_to_none=True)
        set_adapter_weights(trainee.model, untrained)
        free_memory()


def _train(trainee: Trainee, batch: Batch) -> TrainedAdapter:
    """One attempt, from the last whole checkpoint or the beginning to the end or until the time is up."""
    from pipeline.training.trainer import AdapterTrainer

    config, out_dir = trainee.config, trainee.out_dir
    found = latest_whole(trainee.checkpoints)
    progress = found[1] if found else TrainingProgress(0, 0.0, 0)
    ranks.wait_for_all()
    if ranks.is_first():
        remove_after(trainee.checkpoints, progress.step)
    metrics = MetricsLog(out_dir / METRICS_FILE, progress.step)
    on_cpu = trainee.model.device.type == "cpu"
    with track(config, out_dir / TRACKING_NAME, tuple(metrics.rows), _announce) as metrics.follow:
        trainer = AdapterTrainer(
            settings=config.training,
            arguments=trainer_arguments(config, trainee.checkpoints, trainee.dtype, on_cpu, batch),
            progress=progress,
            metrics=metrics,
            budget=trainee.budget,
            model=trainee.model,
            train_dataset=trainee.train_rows,
            eval_dataset=trainee.eval_rows,
            processing_class=trainee.tokenizer,
            data_collator=Collator(trainee.tokenizer),
        )
        ending = _go_on(trainer, found[0] if found else None)
        if ending.finished:
            require_a_step_taken(trainer.skipped_steps, ending.steps)
        last = LossPoint(step=ending.steps, loss=trainer.held_out_loss_at(ending.steps, log=ending.finished))
    kept = _kept_evaluation(trainee, metrics, last)
    if kept.step != last.step:
        load_checkpoint_weights(trainer.model, checkpoint_path(trainee.checkpoints, kept.step))
    if ranks.is_first():
        with disk_errors_told("The adapter", out_dir, trainer.last_whole_step):
            save_adapter(config, trainer.model, trainee.tokenizer, out_dir)
    if not ending.finished:
        _announce(
            f"train: time is up at step {ending.steps} of {ending.planned_steps}; the same command resumes it there"
        )
    skipped = skipped_steps_sentence(trainer.skipped_steps, ending.steps)
    if skipped is not None:
        tolerable = is_tolerable(trainer.skipped_steps, ending.steps)
        _announce(f"train: {'' if tolerable else 'warning: '}{skipped}")
    trainable, total = count_parameters(trainer.model)
    return TrainedAdapter(
        base=config.model.base,
        **asdict(ending),
        kept_step=kept.step,
        trainable_parameters=trainable,
        total_parameters=total,
        train_loss=metrics.points("loss"),
        eval_loss=metrics.points("eval_loss"),
        eval_loss_before=trainer.held_out_loss_at(0),
        eval_loss_after=kept.loss,
        tokens_per_second=trainer.tokens_per_second(),
        train_seconds=trainer.seconds_spent(),
        resumed_from_step=progress.step if found else None,
        batch_size=batch.size,
        gradient_accumulation=batch.accumulation,
        skipped_steps=trainer.skipped_steps,
        gradient_checkpointing=f"{trainee.checkpointing.value}: {trainee.checkpointing.reason}",
        device=", ".join(trainee.hardware.gpu_names) or trainee.hardware.cpu,
        dtype=trainee.dtype,
        load_in_4bit=config.model.load_in_4bit,
    )


@dataclass(frozen=True)
class Ending:
    """Where a session has brought the training, in the words of TrainedAdapter."""

    steps: int
    planned_steps: int
    stopped_early: bool
    finished: bool


def _go_on(trainer: AdapterTrainer, checkpoint: Path | None) -> Ending:
    """The training loop, unless only what comes after it is missing."""
    progress = trainer.begun_at
    impatient = out_of_patience(trainer.metrics_log.points("eval_loss"), trainer.settings.patience)
    if checkpoint is not None and (impatient or progress.step == progress.planned_steps):
        load_checkpoint_weights(trainer.model, checkpoint)
        return Ending(progress.step, progress.planned_steps, stopped_early=impatient, finished=True)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return Ending(
        trainer.state.global_step,
        trainer.state.max_steps,
        stopped_early=trainer.stopped_early,
        finished=trainer.stopped_early or not trainer.out_of_time,
    )


def _kept_evaluation(trainee: Trainee, metrics: MetricsLog, last: LossPoint) -> LossPoint:
    """The evaluation of the adapter to keep; an earlier one only where its checkpoint is still whole."""
    if trainee.config.training.keep == "last":
        return last
    best = best_of([*metrics.points("eval_loss"), last])
    if best is None or best.loss == last.loss or whole(checkpoint_path(trainee.checkpoints, best.step)) is None:
        return last
    return best


def _announce(text: str) -> None:
    if ranks.is_first():
        print(text, file=sys.stderr)
