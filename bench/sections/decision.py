"""The first lines: which file to use, whether it is what was trained, whether tuning helped, how fast it is."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.page import Line, byte_size, percent
from bench.run_folder import Run
from bench.sections.evaluation import (
    by_role,
    comparison_of,
    conditions,
    show,
    show_verdict,
    tone_of,
    tuned_model,
    value_of,
)
from bench.sections.speed import seconds
from pipeline.metrics import METRIC_BY_KEY, MetricKey
from pipeline.results import Benchmark, Evaluation, ExportedFile, ExportedModels, Speed, TrainedAdapter, Verification
from pipeline.training.gradient_scaler import is_tolerable, skipped_steps_sentence

# What a reader decides by; the others are in the table below.
_DECISIVE: tuple[MetricKey, ...] = ("answer_perplexity", "well_formed", "choice_accuracy", "generative_accuracy")


def decide(run: Run) -> list[Line]:
    shipped = shipped_file(run.exported)
    return [
        _which_file(run, shipped),
        *_failures(run),
        *_skipped_steps(run.trained),
        _is_verified(run),
        *_tuned_against_base(run.evaluated, run.exported),
        *_speed(run.benchmarked, shipped),
        *_recommendation(run.benchmarked, shipped),
    ]


def shipped_file(exported: ExportedModels | None) -> ExportedFile | None:
    if exported is None:
        return None
    return next((file for file in exported.files if file.name == exported.ship), None)


def speed_of(benchmark: Benchmark | None, file: ExportedFile | None) -> Speed | None:
    if benchmark is None or file is None:
        return None
    return next((speed for speed in benchmark.models if speed.model == file.name), None)


def is_verified(verification: Verification) -> bool:
    return verification.passed and all(check.passed for check in verification.checks)


def _which_file(run: Run, shipped: ExportedFile | None) -> Line:
    if shipped is None:
        return Line("There is no GGUF to use: the export stage has no result.", "bad")
    size = f"{shipped.quantization}, {byte_size(shipped.size_bytes)}, {shipped.bits_per_weight:.2f} bits per weight"
    if run.verified is not None and not is_verified(run.verified):
        return Line(f"Do not use {shipped.name} ({size}): it is not what was trained.", "bad")
    if any(state.name == "gate failed" for state in run.states.values()):
        return Line(f"Do not use {shipped.name} ({size}) before the failed gate below is understood.", "bad")
    if run.verified is None:
        return Line(f"{shipped.name} ({size}) is there, but nothing shows yet that it is what was trained.", "bad")
    return Line(f"Use {shipped.name} ({size}).", "good")


def _failures(run: Run) -> Iterator[Line]:
    for stage, state in run.states.items():
        if state.failed:
            yield Line(f"{stage}: {state.name}. {state.reason}.", "bad")


def _skipped_steps(trained: TrainedAdapter | None) -> Iterator[Line]:
    """A warning; what is tolerable is told in the section on training."""
    if trained is not None and not is_tolerable(trained.skipped_steps, trained.steps):
        yield Line(skipped_steps_sentence(trained.skipped_steps, trained.steps) or "", "bad")


def _is_verified(run: Run) -> Line:
    if run.verified is None:
        return Line("Not verified: nothing shows yet that the GGUF says what the trained model says.", "bad")
    failed = [check.name for check in run.verified.checks if not check.passed]
    if not is_verified(run.verified):
        return Line(f"Verification failed: {', '.join(failed) or 'see below'}.", "bad")
    return Line(
        f"Verified: all {len(run.verified.checks)} checks passed; the most likely next token agrees with the "
        f"trained model at {percent(run.verified.top1_agreement)} of {run.verified.positions:,} positions.",
        "good",
    )


def _tuned_against_base(evaluation: Evaluation | None, exported: ExportedModels | None) -> Iterator[Line]:
    if evaluation is None:
        yield Line("Not evaluated: whether the tuned model beats its base is not known.", "bad")
        return
    base, _ = by_role(evaluation)
    tuned = tuned_model(evaluation, exported)
    if tuned is None or base is None:
        yield Line("Only one model was evaluated, so there is no comparison of tuned and base.")
        return
    for key in _DECISIVE:
        ours, theirs = value_of(tuned, key), value_of(base, key)
        if ours is None or theirs is None or (key == "well_formed" and tuned.reasoning_perplexity is None):
            continue  # data without reasoning asks for no thought
        metric, comparison = METRIC_BY_KEY[key], comparison_of(evaluation, tuned.model, key)
        numbers = f"{show(metric, ours)} against {show(metric, theirs)} of the base"
        yield Line(f"{metric.name}: {show_verdict(comparison)}, {numbers}.", tone_of(comparison))
    if tuned.engine != "llama.cpp" or evaluation.ended_early is not None:
        for sentence in conditions(evaluation):
            yield Line(sentence)


def _speed(benchmark: Benchmark | None, shipped: ExportedFile | None) -> Iterator[Line]:
    measured = speed_of(benchmark, shipped)
    if benchmark is None or measured is None:
        if benchmark is None:
            yield Line("Speed was not measured.")
        return
    pace = statistics.fmean(measured.generated_tokens_per_second)
    first = statistics.median(measured.time_to_first_token_seconds)
    text = f"Speed: {pace:,.0f} tokens a second, the first after {seconds(first)}"
    if benchmark.answer_length is not None:
        whole = measured.seconds_to_answer(benchmark.answer_length)
        text += f"; thought and answer of usual length are there after {seconds(whole)}"
    yield Line(f"{text} (measured on {benchmark.machine}).")
    memory = f"it took {byte_size(measured.peak_memory_bytes)} of memory"
    if measured.peak_gpu_bytes is not None:
        memory += f" and {byte_size(measured.peak_gpu_bytes)} of the GPU's"
    where = "It runs wherever llama.cpp does (medcot chat, Ollama), without network, with or without a GPU"
    yield Line(f"{where}; {memory}.")


def _recommendation(benchmark: Benchmark | None, shipped: ExportedFile | None) -> Iterator[Line]:
    found = None if benchmark is None else benchmark.recommendation
    if found is None:
        return
    if found.model is None:
        yield Line(f"Recommended by the benchmark: {found.reason}")
    elif shipped is not None and found.model == shipped.name:
        yield Line("Of the files measured it is the smallest inside the budgets of quality and memory.", "good")
    else:
        yield Line(f"The benchmark recommends {found.model}: the smallest inside the budgets of quality and memory.")
