"""What the parts record of a training: speed, memory next to the plan's, skipped steps; and what is checked of all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from one_training import OneTraining, TrainedOnce, train_together
from part import Recorder
from smaller_card import Card

from bench.gpu_results import PLANNED
from pipeline.errors import MedcotError


def train_and_record(recorder: Recorder, requests: Sequence[OneTraining]) -> dict[str, TrainedOnce]:
    """Train all at the same time; the results by name, without those that failed, for which a check says why."""
    results: dict[str, TrainedOnce] = {}
    for request, done in zip(requests, train_together(requests), strict=True):
        if isinstance(done, MedcotError):
            recorder.check(f"{request.name}: training", False, str(done))
        else:
            _record(recorder, request.name, done, request.card)
            results[request.name] = done
    return results


def _record(recorder: Recorder, name: str, done: TrainedOnce, card: Card | None) -> None:
    """Figures named after ``name``; checks that it trained, within the memory that ``card`` has."""
    trained = done.trained
    losses = [step.loss for step in done.steps]
    recorder.figure(f"{name}: training", trained.tokens_per_second, "tokens/s")
    recorder.figure(f"{name}: stage", done.seconds, "s")
    if done.planned_seconds is not None:
        recorder.figure(f"{name}: stage{PLANNED}", done.planned_seconds, "s")
    if done.gpu_reserved_bytes:
        recorder.figure(f"{name}: GPU memory allocated", done.gpu_allocated_bytes / 1e9, "GB")
        recorder.figure(f"{name}: GPU memory reserved", done.gpu_reserved_bytes / 1e9, "GB")
        recorder.figure(f"{name}: GPU memory{PLANNED}", done.planned_gpu_bytes / 1e9, "GB")
    recorder.figure(f"{name}: memory", done.memory_bytes / 1e9, "GB")
    recorder.figure(f"{name}: memory{PLANNED}", done.planned_memory_bytes / 1e9, "GB")
    recorder.figure(f"{name}: skipped steps", trained.skipped_steps)
    recorder.figure(f"{name}: held-out loss before", trained.eval_loss_before, "nats")
    recorder.figure(f"{name}: held-out loss after", trained.eval_loss_after, "nats")
    recorder.check(
        f"{name}: every step is logged with a finite loss",
        len(losses) == trained.steps == trained.planned_steps and all(map(math.isfinite, losses)),
        f"{len(losses)} losses of {trained.planned_steps} steps, {losses[0]:.3f} to {losses[-1]:.3f}",
    )
    recorder.check(
        f"{name}: not every step is skipped",
        trained.skipped_steps < len(losses),
        f"{trained.skipped_steps} of {len(losses)} skipped by the gradient scaler",
    )
    recorder.check(
        f"{name}: the plan lets it start", not done.plan_problems, "; ".join(done.plan_problems) or "no problem"
    )
    if card is not None and not recorder.request.rehearse:
        recorder.check(
            f"{name}: within the card's memory",
            0 < done.gpu_reserved_bytes <= card.usable_bytes,
            f"{done.gpu_reserved_bytes / 1e9:.2f} of {card.usable_bytes / 1e9:.2f} GB reserved",
        )
        wanted = "bfloat16" if card.capability >= (8, 0) else "float16"
        recorder.check(f"{name}: computation type", trained.dtype == wanted, f"{trained.dtype}, {wanted} is wanted")
