"""The first lines: which file to use, whether it is what was trained, whether tuning helped, where it runs."""

from __future__ import annotations

from bench.page import Line, byte_size, percent
from bench.run_folder import Run
from bench.sections.evaluation import by_role, metrics
from pipeline.results import Evaluation


def decide(run: Run) -> list[Line]:
    """What the reader came for: which file to use, whether it is what was trained, whether tuning helped."""
    return [_which_file(run), _is_verified(run), *_tuned_against_base(run.evaluated)]


def _which_file(run: Run) -> Line:
    if run.exported is None:
        return Line("There is no GGUF yet: the export stage has not finished.", "bad")
    shipped = next(file for file in run.exported.files if file.name == run.exported.ship)
    size = f"{shipped.quantization}, {byte_size(shipped.size_bytes)}, {shipped.bits_per_weight:.2f} bits per weight"
    if run.verified is not None and not run.verified.passed:
        return Line(f"Do not use {shipped.name} ({size}) before the failed checks below are understood.", "bad")
    return Line(f"Use {shipped.name} ({size}).", "good")


def _is_verified(run: Run) -> Line:
    if run.verified is None:
        return Line("Not verified: nothing shows yet that the GGUF says what the trained model says.", "bad")
    failed = [check.name for check in run.verified.checks if not check.passed]
    if failed or not run.verified.passed:
        return Line(f"Verification failed: {', '.join(failed) or 'see below'}.", "bad")
    return Line(
        f"Verified: all {len(run.verified.checks)} checks passed; the most likely next token agrees with the "
        f"trained model at {percent(run.verified.top1_agreement)} of {run.verified.positions:,} positions.",
        "good",
    )


def _tuned_against_base(evaluation: Evaluation | None) -> list[Line]:
    if evaluation is None:
        return [Line("Not evaluated: whether the tuned model beats its base is not known.", "bad")]
    tuned, base = by_role(evaluation)
    if tuned is None or base is None:
        return [Line("Only one model was evaluated, so there is no comparison of tuned and base.")]
    lines = []
    for metric in metrics(tuned, base):
        if metric.decisive:
            verdict, tone = metric.verdict
            numbers = f"{metric.show(metric.tuned)} against {metric.show(metric.base)}"
            lines.append(Line(f"{metric.name}: {verdict}, {numbers}.", tone))
    return lines
