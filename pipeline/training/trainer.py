"""TRL's trainer with our bookkeeping: what is counted, judged, logged and kept at each step.

Importing this imports trl, so Unsloth has to be imported before (pipeline/training/lora_model.py).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from pipeline import ranks
from pipeline.checkpoints import TrainingProgress, checkpoint_path, disk_errors_told, prune, seal
from pipeline.config import TrainingConfig
from pipeline.errors import MedcotError
from pipeline.progress import TrainingProgressBar
from pipeline.training.batch import evaluation_memory_advice, free_memory, is_out_of_memory
from pipeline.training.held_out import best_of, held_out_loss, out_of_patience
from pipeline.training.lora_model import adapter_in_float32, autocast_asked_of
from pipeline.training.loss_guard import LossGuard, TrainingDiverged
from pipeline.training.metrics_log import MetricsLog
from pipeline.training.rows import lengths_of
from pipeline.training.step_order import StepOrder
from pipeline.training.time_budget import TimeBudget

_STATE_FILES = ("optimizer.pt", "scheduler.pt")  # as transformers calls them


class AdapterTrainer(SFTTrainer):
    """Goes on from ``progress``, logs to ``metrics``, and ends early when the loss, patience or the time demand it.

    ``arguments`` are trainer_arguments(); train_dataset and eval_dataset come from encoded_rows().
    """

    def __init__(
        self,
        settings: TrainingConfig,
        arguments: Mapping[str, Any],
        progress: TrainingProgress,
        metrics: MetricsLog,
        budget: TimeBudget,
        **trainer: Any,
    ) -> None:
        self.settings, self.begun_at, self.metrics_log, self.budget = settings, progress, metrics, budget
        self.tokens_seen = progress.tokens
        self.skipped_steps = progress.skipped_steps
        self.last_whole_step = progress.step
        self.stopped_early = self.out_of_time = False
        self.guard: LossGuard | None = None
        self.loop_seconds = Stopwatch()
        self._bar = TrainingProgressBar()
        self._passes: list[tuple[Any, Any, Any]] = []  # of the step at hand: loss, lines, number of tokens
        super().__init__(args=SFTConfig(**arguments), callbacks=[_Bookkeeping(self, self._bar)], **trainer)
        self.remove_callback(PrinterCallback)
        adapter_in_float32(self.model)

    def seconds_spent(self) -> float:
        """In the training loop, over all sessions."""
        return self.begun_at.seconds + self.loop_seconds.read()

    def tokens_per_second(self) -> float:
        return self.tokens_seen / max(self.seconds_spent(), 1e-9)

    def train(self, **arguments: Any) -> Any:
        self.guard = LossGuard(self.held_out_loss_at(0))
        for row in self.metrics_log.rows:
            self.budget.closing_takes(row.get("eval_seconds", 0.0))
        try:
            with autocast_asked_of(self.accelerator.device.type):
                return super().train(**arguments)
        finally:
            self.loop_seconds.stop()
            self._bar.stop()

    def held_out_loss_at(self, step: int, log: bool = True) -> float:
        """What metrics.jsonl has for ``step``, else what is measured now, with the model as it is.

        Raises TrainingDiverged when it is not finite, and MedcotError when memory is too small for it.
        """
        for point in self.metrics_log.points("eval_loss"):
            if point.step == step:
                return point.loss
        started = time.monotonic()
        loss = self._held_out_loss(step)
        seconds = round(time.monotonic() - started, 3)
        self.budget.closing_takes(seconds)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"The loss on the held-out records is not finite at step {step}: set model.dtype=float32"
                + (" or lower training.learning_rate." if step else ", or choose another model.base.")
            )
        if log:
            self.metrics_log.append({"step": step, "eval_loss": loss, "eval_seconds": seconds})
        return loss

    def _held_out_loss(self, step: int) -> float:
        """With batch_size auto as many rows at once as memory allows: the loss is the same."""
        while True:
            rows = self.args.per_device_eval_batch_size
            try:
                return held_out_loss(self)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.settings.batch_size != "auto" or rows == 1:
                    if self.state.global_step > self.last_whole_step and ranks.world_size() == 1:
                        # The loop evaluates before it saves. Other processes wait for this one's loss meanwhile.
                        self._save_checkpoint(self.model, trial=None)
                    raise MedcotError(
                        f"Not enough memory for the loss on the held-out records with {rows} "
                        f"record{'s' * (rows > 1)} at once: "
                        f"{evaluation_memory_advice(rows, step, self.last_whole_step)}."
                    ) from error
            self.args.per_device_eval_batch_size = rows // 2
            free_memory()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Called by the training loop every ``eval_steps``."""
        step = self.state.global_step
        loss = self.held_out_loss_at(step)
        metrics = {"eval_loss": loss}
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._best_step() == step:
            self.control.should_save = True
        if out_of_patience(self.metrics_log.points("eval_loss"), self.settings.patience):
            self.stopped_early = self.control.should_training_stop = self.control.should_save = True
        return metrics

    def _best_step(self) -> int | None:
        """The step whose checkpoint may become the adapter, beside the last one's."""
        best = best_of(self.metrics_log.points("eval_loss"))
        return best.step if best is not None and self.settings.keep == "best" else None

    def _get_train_sampler(self, train_dataset: Any = None) -> StepOrder:
        return StepOrder(lengths_of(self.train_dataset), self.settings.effective_batch, self.args.seed)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        lines, tokens = inputs.pop("line"), inputs["attention_mask"].sum()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._passes.append((loss, lines, tokens))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The trainer calls this between the last backward pass and the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Here the CPU waits for the GPU, once a step. All processes judge by the same numbers: none goes on alone.
        own = [(float(loss), lines.tolist(), int(tokens)) for loss, lines, tokens in self._passes]
        self._passes.clear()
        passes = [each for passes in ranks.from_all(own) for each in passes]
        self.tokens_seen += sum(tokens for _, _, tokens in passes)
        if self.guard is not None:
            try:
                self.guard.check(
                    self.state.global_step + 1,
                    [loss / ranks.world_size() for loss, _, _ in passes],
                    [lines for _, lines, _ in passes],
                    float(norm),
                    scaled=self.accelerator.scaler is not None,
                )
            except TrainingDiverged as error:
                kept = f"the checkpoint of step {self.last_whole_step} is whole" if self.last_whole_step else "none yet"
                raise TrainingDiverged(f"{error}. Last good checkpoint: {kept}.") from error
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Whole or absent; the checkpoint before it goes when this one is sealed."""
        if self.guard is not None and self.guard.suspicious:
            return
        step, folder = self.state.global_step, Path(self.args.output_dir)
        checkpoint = checkpoint_path(folder, step)
        try:
            with disk_errors_told(f"The checkpoint of step {step}", folder, self.last_whole_step):
                super()._save_checkpoint(model, trial)
                pending = ranks.total(float(self._tr_loss)) / ranks.world_size()
                ranks.wait_for_all()  # each process has written its own random state
                if ranks.is_first():
                    seal(checkpoint, self._progress(pending))
                    prune(folder, self._best_step())
        except BaseException:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        self.last_whole_step = step

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Through main memory. transformers loads to the process's device, and for PyTorch there is no CPU of a number,
        as accelerate gives to processes without GPUs."""
        if checkpoint is not None:
            states = (torch.load(Path(checkpoint) / name, "cpu", weights_only=True) for name in _STATE_FILES)
            self.optimizer.load_state_dict(next(states))
            self.lr_scheduler.load_state_dict(next(states))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """TRL would write one beside every checkpoint; ours comes with the GGUF."""

    def _progress(self, pending_loss: float) -> TrainingProgress:
        return TrainingProgress(
            step=self.state.global_step,
            seconds=self.seconds_spent(),
            tokens=self.tokens_seen,
            planned_steps=self.state.max_steps,
            logged_step=self._globalstep_last_logged,
            pending_loss=pending_loss,
            skipped_steps=self.skipped_steps,
        )

    def take_up_pending_loss(self) -> None:
        """The next logged mean is over all steps since the last logged one, as if training had never stopped."""
        self._tr_loss += self.begun_at.pending_loss
        self._globalstep_last_logged = self.begun_at.logged_step


class Stopwatch:
    """Seconds between start and stop; none before it is started."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._stopped: float | None = None

    def start(self) -> None:
        self._started = time.monotonic()

    def stop(self) -> None:
        self._stopped = time.monotonic()

    def read(self) -> float:
        return 0.0 if self._started is None else (self._stopped or time.monotonic()) - self._started


class _Bookkeeping(TrainerCallback):
    """Progress bar, metrics.jsonl, time budget."""

    def __init__(self, trainer: AdapterTrainer, bar: TrainingProgressBar) -> None:
        self._trainer, self._bar = trainer, bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a checkpoint brings those of the session that wrote it
        self._trainer.take_up_pending_loss()
        every = self._trainer.settings.eval_steps
        if every is not None and state.global_step % every == 0:
            self._trainer.held_out_loss_at(state.global_step)  # where memory was too small for it at the checkpoint
        self._trainer.loop_seconds.start()
        self._trainer.budget.loop_begins()
        self._bar.start(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.skipped_steps += self._trainer.accelerator.optimizer_step_was_skipped
        self._bar.step(state.global_step, self._trainer.tokens_per_second())
        if self._trainer.budget.is_up_after_step() and state.global_step < state.max_steps:
            self._trainer.out_of_time = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:
            return
        self._bar.loss(float(logs["loss"]))
        norm = float(logs["grad_norm"])
        row = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            # Not finite where the gradient scaler has skipped a step; JSON has no such number.
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": self._trainer.tokens_seen,
            "seconds": round(self._trainer.seconds_spent(), 3),
        }
        if self._trainer.accelerator.scaler is not None:
            row["skipped_steps"] = self._trainer.skipped_steps  # from the beginning on, as tokens and seconds are
        self._trainer.metrics_log.append(row)
