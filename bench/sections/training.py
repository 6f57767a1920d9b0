"""How the adapter was trained, beside published runs of the recipe."""

from __future__ import annotations

from collections.abc import Sequence

from bench.loss_chart import describe_loss, loss_curve
from bench.page import Chart, Section, Table, duration, percent
from pipeline.config import ReferenceRun
from pipeline.results import TrainedAdapter


def training_section(trained: TrainedAdapter | None, references: Sequence[ReferenceRun]) -> Section | None:
    if trained is None:
        return None
    change = 1 - trained.eval_loss_after / trained.eval_loss_before if trained.eval_loss_before else 0.0
    share = trained.trainable_parameters / trained.total_parameters
    rows: tuple[tuple[str, ...], ...] = (
        ("Base", trained.base),
        *((("Gradient checkpointing", trained.gradient_checkpointing),) if trained.gradient_checkpointing else ()),
        ("Device", f"{trained.device}, {trained.dtype}{', base in 4 bit' if trained.load_in_4bit else ''}"),
        (
            "Trained",
            f"{trained.trainable_parameters:,} of {trained.total_parameters:,} parameters ({100 * share:.2f} %)",
        ),
        (
            "Steps",
            f"{_steps(trained)} in {duration(trained.train_seconds)}, {trained.tokens_per_second:.0f} tokens/s",
        ),
        (
            "Held-out loss",
            f"{trained.eval_loss_before:.3f} before, {trained.eval_loss_after:.3f} after "
            f"({percent(abs(change))} {'lower' if change >= 0 else 'higher'})",
        ),
    )
    if trained.resumed_from_step is not None:
        rows = (*rows, ("Resumed", f"from step {trained.resumed_from_step}"))
    published = (_published_losses(trained, references),) if references else ()
    return Section(
        "Training",
        tables=(Table(("", ""), "ll", rows), *published),
        charts=(Chart(lambda: loss_curve(trained, references), describe_loss(trained, references)),),
    )


def _steps(trained: TrainedAdapter) -> str:
    if trained.stopped_early:
        return f"{trained.steps} of {trained.planned_steps}, then no further gain on the held-out records,"
    return str(trained.steps) if trained.finished else f"{trained.steps} of {trained.planned_steps} so far"


def _published_losses(trained: TrainedAdapter, references: Sequence[ReferenceRun]) -> Table:
    """Our training loss beside the published ones, at the steps that they were published for."""
    ours = {point.step: point.loss for point in trained.train_loss}

    def row(step: int) -> tuple[str, ...]:
        losses = [ours.get(step), *(run.loss.get(step) for run in references)]
        return (str(step), *("" if loss is None else f"{loss:.3f}" for loss in losses))

    steps = sorted({step for run in references for step in run.loss})
    header = ("Training loss at step", "This run", *(run.name for run in references))
    return Table(header, "r" * len(header), tuple(row(step) for step in steps))
