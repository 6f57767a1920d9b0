"""Our training step against calling Unsloth directly and against plain TRL + PEFT: tokens/s and peak memory.

    python -m bench.training [--preset smollm2-cpu] [--steps 40] [--repeats N]

The same model, data, batches in the same order and arguments, each training in a process of its own. All three are
loaded at once and take turns step by step in changing order, so that a slow moment of the machine hits them alike. With
--repeats they train one after another instead, for a GPU that has no room for three models. Loading, held-out loss,
checkpoints and the first steps are left out of the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click
import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from bench.speed import machine_name
from bench.statistics import percentile
from bench.training_probe import RESULT_NAME, TimedSteps, TrainingRequest, Way
from bench.turns import Turn
from pipeline.artifacts import package_versions
from pipeline.config import DEFAULT_PRESET, load_config
from pipeline.errors import GateFailed, MedcotError
from pipeline.hardware import detect
from pipeline.processes import with_our_packages
from pipeline.run import run, stage_named

WAYS: tuple[Way, ...] = get_args(Way)
NAMES: dict[Way, str] = {"medcot": "medcot", "unsloth": "Unsloth directly", "trl": "TRL + PEFT"}
WARM_UP = 2  # steps: kernels are chosen and memory is taken for the first time
SLOWER_AT_MOST = 0.03  # than Unsloth directly
_LOG_NAME = "log.txt"
# The ways round differently (adapter in 32 or 16 bit, fused kernels); other batches differ by more.
_SAME_FIRST_LOSS = 0.02


Measured = dict[Way, list[TimedSteps]]  # one a repeat


class WaySpeed(BaseModel):
    """One speed a timed step where the ways took turns, else one a repeat, in order; of the rest one a repeat."""

    model_config = ConfigDict(frozen=True)
    way: Way
    tokens_per_second: list[float] = Field(description="Padding left out; higher is better.")
    peak_memory_bytes: list[int] = Field(description="Largest resident set of the process.")
    peak_gpu_bytes: list[int] = Field(description="Allocated by PyTorch at most; 0 without a GPU.")
    losses: list[float] = Field(description="Of each step, in the first repeat (nats per token).")


class TrainingComparison(BaseModel):
    """``steps`` include the first ``warm_up``, which are not timed."""

    model_config = ConfigDict(frozen=True)
    machine: str
    threads: str | None = Field(description="OMP_NUM_THREADS, where it is set.")
    preset: str
    overrides: list[str]
    versions: dict[str, str]
    steps: int
    warm_up: int
    in_turns: bool = Field(description="Step by step, all three loaded at once; else one training after another.")
    ways: list[WaySpeed]

    def ratios(self, way: Way, to: Way) -> list[float]:
        """Tokens/s of one way over another's, step by step or repeat by repeat."""
        speeds = {each.way: each.tokens_per_second for each in self.ways}
        return [one / other for one, other in zip(speeds[way], speeds[to], strict=True)]


def compare(preset: str, overrides: Sequence[str], steps: int, repeats: int | None, folder: Path) -> TrainingComparison:
    """Train each way in ``folder``, in turns or else ``repeats`` times. Raises MedcotError when a way fails."""
    run_dir = prepare_run(preset, overrides, steps, folder / "run")
    measured = _in_turns(run_dir, folder, steps) if repeats is None else _repeated(run_dir, folder, repeats)
    tokens = measured["medcot"][0].tokens
    require_same_batches(measured)
    return TrainingComparison(
        machine=_machine(folder),
        threads=os.environ.get("OMP_NUM_THREADS"),
        preset=preset,
        overrides=list(overrides),
        versions=package_versions(stage_named("train").packages),
        steps=steps,
        warm_up=WARM_UP,
        in_turns=repeats is None,
        ways=[way_speed(way, measured[way], tokens, by_step=repeats is None) for way in WAYS],
    )


def prepare_run(preset: str, overrides: Sequence[str], steps: int, run_dir: Path) -> Path:
    """A run in ``run_dir`` whose data are prepared for a training of ``steps``, each of them logged."""
    settings = [
        *overrides,
        "data.eval_rows=1",  # only the stage evaluates; its memory must not be the evaluation's
        f"training.max_steps={steps}",
        f"training.checkpoint_steps={steps + 1}",
        "training.logging_steps=1",
        "training.processes=1",
        "training.report_to=none",
    ]
    run(load_config(preset, settings), run_dir, until="prepare", plan_first=False)
    return run_dir


def _in_turns(run_dir: Path, folder: Path, steps: int) -> Measured:
    turns = {way: Turn.make() for way in WAYS}
    with ExitStack() as stack:
        trainings = {}
        for way, turn in turns.items():
            request = TrainingRequest(way=way, run_dir=run_dir, out_dir=_folder_for(way, folder), turn=turn.childs)
            trainings[way] = stack.enter_context(_training(request))
            turn.started()
            if not turn.wait():  # loaded, and before its first step
                raise trainings[way].ended_early(0)
        for step in track(range(steps), "steps", console=Console(stderr=True)):
            for way in _rotated(step):
                if not turns[way].take():
                    raise trainings[way].ended_early(step)
        for turn in turns.values():
            turn.end()
        return {way: [training.result()] for way, training in trainings.items()}


def _repeated(run_dir: Path, folder: Path, repeats: int) -> Measured:
    measured: Measured = {way: [] for way in WAYS}
    console = Console(stderr=True)
    for repeat in range(repeats):
        for way in _rotated(repeat):
            console.print(f"repeat {repeat + 1}/{repeats}: {NAMES[way]}", highlight=False)
            out_dir = _folder_for(f"{way}-{repeat}", folder)
            measured[way].append(train_one_way(TrainingRequest(way=way, run_dir=run_dir, out_dir=out_dir)))
    return measured


def _rotated(number: int) -> tuple[Way, ...]:
    first = number % len(WAYS)
    return (*WAYS[first:], *WAYS[:first])


def _folder_for(name: str, folder: Path) -> Path:
    (folder / name).mkdir()
    return folder / name


def train_one_way(request: TrainingRequest) -> TimedSteps:
    """Train in a process of its own; raises MedcotError when that fails."""
    with _training(request) as training:
        return training.result()


@dataclass(frozen=True)
class _Training:
    """A child that trains; ``result`` waits for it and raises MedcotError when it failed."""

    request: TrainingRequest
    process: subprocess.Popen[str]

    def ended_early(self, steps: int) -> MedcotError:
        """Why it ended after so many steps; raises MedcotError itself when the training failed."""
        self.result()
        return MedcotError(f"Training by {NAMES[self.request.way]} ended after {steps} steps: compare fewer.")

    def result(self) -> TimedSteps:
        status = self.process.wait()
        if status != 0:
            log = (self.request.out_dir / _LOG_NAME).read_text(errors="replace")
            last = (log.strip().splitlines() or ["no message"])[-1]
            raise MedcotError(f"Training by {NAMES[self.request.way]} failed (status {status}): {last:.300}")
        return TimedSteps.model_validate_json((self.request.out_dir / RESULT_NAME).read_bytes())


@contextmanager
def _training(request: TrainingRequest) -> Iterator[_Training]:
    # What run.py sets for the stage is part of our way; the others run in the user's environment.
    own = stage_named("train").environment if request.way == "medcot" else {}
    with (request.out_dir / _LOG_NAME).open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.training_probe"],
            stdin=subprocess.PIPE,
            text=True,
            stdout=stream,
            stderr=stream,
            env={**own, **with_our_packages()},
            pass_fds=request.turn or (),
        )
    with process:
        try:
            assert process.stdin is not None
            process.stdin.write(request.model_dump_json())
            process.stdin.close()
            yield _Training(request, process)
        finally:
            process.kill()


def require_same_batches(measured: dict[Way, list[TimedSteps]]) -> None:
    first = {way: each[0].losses[0] for way, each in measured.items()}
    for way, loss in first.items():
        if abs(loss / first["medcot"] - 1) > _SAME_FIRST_LOSS:
            raise MedcotError(
                f"The first step's loss is {first['medcot']:.4f} by medcot and {loss:.4f} by {NAMES[way]}: they did "
                "not train on the same batch, and their speeds cannot be compared."
            )


def way_speed(way: Way, repeats: Sequence[TimedSteps], tokens: Sequence[int], *, by_step: bool = False) -> WaySpeed:
    """Of each repeat as a whole or, ``by_step``, of each timed step; ``tokens`` up to each step."""
    if by_step:
        speeds = [
            float(speed) for each in repeats for speed in (np.diff(tokens) / np.diff(each.seconds))[WARM_UP - 1 :]
        ]
    else:
        timed = tokens[-1] - tokens[WARM_UP - 1]
        speeds = [timed / (each.seconds[-1] - each.seconds[WARM_UP - 1]) for each in repeats]
    return WaySpeed(
        way=way,
        tokens_per_second=speeds,
        peak_memory_bytes=[each.peak_memory_bytes for each in repeats],
        peak_gpu_bytes=[each.peak_gpu_bytes for each in repeats],
        losses=repeats[0].losses,
    )


def _machine(folder: Path) -> str:
    return ", ".join([*detect(folder).gpu_names, machine_name()])


def print_comparison(comparison: TrainingComparison, *, on_error: bool = False) -> None:
    """One row a way, medians and the range of the repeats, on standard output or standard error."""
    table = Table(Column("training by", no_wrap=True), "tokens/s", "over Unsloth", "memory, MB", "GPU, MB")
    for each in comparison.ways:
        table.add_row(
            NAMES[each.way],
            _spread(each.tokens_per_second, ".1f"),
            _spread(comparison.ratios(each.way, "unsloth"), ".3f"),
            f"{max(each.peak_memory_bytes) / 1e6:.0f}",
            f"{max(each.peak_gpu_bytes) / 1e6:.0f}" if any(each.peak_gpu_bytes) else "-",
        )
    timed, values = comparison.steps - comparison.warm_up, len(comparison.ways[0].tokens_per_second)
    how = "in turns, median of steps" if comparison.in_turns else f"median of {values} repeats"
    console = Console(stderr=on_error)
    console.print(table)
    console.print(
        f"{comparison.machine}; {comparison.preset}, {timed} of {comparison.steps} steps timed, {how} (quartiles)",
        highlight=False,
    )


def _spread(values: Sequence[float], form: str) -> str:
    middle, low, high = (percentile(values, share) for share in (0.5, 0.25, 0.75))
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def require_not_slower(comparison: TrainingComparison) -> None:
    """Raises GateFailed when our step is slower than Unsloth's by more than SLOWER_AT_MOST, by the median ratio."""
    ratio = percentile(comparison.ratios("medcot", "unsloth"), 0.5)
    if ratio < 1 - SLOWER_AT_MOST:
        raise GateFailed(
            f"Training reaches {ratio:.3f} of the tokens/s of calling Unsloth directly; {1 - SLOWER_AT_MOST} is wanted."
        )


@click.command()
@click.option("--preset", default=DEFAULT_PRESET, show_default=True, help="A preset's name or a YAML file.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting; may be repeated.")
@click.option("--steps", type=click.IntRange(WARM_UP + 1), default=40, show_default=True, help="Optimizer steps.")
@click.option(
    "--repeats", type=click.IntRange(1), help="Train one after another, each way so many times [default: in turns]."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; the table on standard error.")
@click.option("--check", is_flag=True, help=f"Exit 3 when slower than Unsloth by more than {SLOWER_AT_MOST:.0%}.")
def main(preset: str, overrides: tuple[str, ...], steps: int, repeats: int | None, as_json: bool, check: bool) -> None:
    """Compare the speed of our training step with Unsloth's and with TRL + PEFT's.

    Example: python -m bench.training --steps 40 --check
    """
    try:
        with tempfile.TemporaryDirectory(prefix="medcot-bench-") as folder:
            comparison = compare(preset, overrides, steps, repeats, Path(folder))
        print_comparison(comparison, on_error=as_json)
        if as_json:
            click.echo(comparison.model_dump_json(indent=2))
        if check:
            require_not_slower(comparison)
    except MedcotError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
