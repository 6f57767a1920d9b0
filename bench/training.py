"""Our training step against calling Unsloth directly and against plain TRL + PEFT: tokens/s and peak memory.

    python -m bench.training [--preset smollm2-cpu] [--steps 12] [--repeats 5]

The same model, data, batches in the same order and arguments; each training in a process of its own, one after another
in changing order, so that a slow minute of the machine does not hit one way alone. Loading, held-out loss, checkpoints
and the first steps are left out of the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import click
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from bench.speed import machine_name
from bench.statistics import percentile
from bench.training_probe import RESULT_NAME, TimedSteps, TrainingRequest, Way
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
# The ways round differently (adapter in 32 or 16 bit, fused kernels); other batches differ by more.
_SAME_FIRST_LOSS = 0.02


class WaySpeed(BaseModel):
    """One value a repeat, in the order of the repeats."""

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
    ways: list[WaySpeed]

    def ratios(self, way: Way, to: Way) -> list[float]:
        """Tokens/s of one way over another's, repeat by repeat."""
        speeds = {each.way: each.tokens_per_second for each in self.ways}
        return [one / other for one, other in zip(speeds[way], speeds[to], strict=True)]


def compare(preset: str, overrides: Sequence[str], steps: int, repeats: int, folder: Path) -> TrainingComparison:
    """Train ``repeats`` times each way in ``folder``. Raises MedcotError when a way fails."""
    run_dir = prepare_run(preset, overrides, steps, folder / "run")
    measured: dict[Way, list[TimedSteps]] = {way: [] for way in WAYS}
    console = Console(stderr=True)
    for repeat in range(repeats):
        first = repeat % len(WAYS)
        for way in (*WAYS[first:], *WAYS[:first]):
            console.print(f"repeat {repeat + 1}/{repeats}: {NAMES[way]}", highlight=False)
            out_dir = folder / f"{way}-{repeat}"
            out_dir.mkdir()
            measured[way].append(train_one_way(TrainingRequest(way=way, run_dir=run_dir, out_dir=out_dir)))
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
        ways=[way_speed(way, measured[way], tokens) for way in WAYS],
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


def train_one_way(request: TrainingRequest) -> TimedSteps:
    """Train in a process of its own; raises MedcotError when that fails."""
    # What run.py sets for the stage is part of our way; the others run in the user's environment.
    own = stage_named("train").environment if request.way == "medcot" else {}
    log = request.out_dir / "log.txt"
    with log.open("w") as stream:
        status = subprocess.run(
            [sys.executable, "-m", "bench.training_probe"],
            input=request.model_dump_json(),
            text=True,
            stdout=stream,
            stderr=stream,
            env={**own, **with_our_packages()},
            check=False,
        ).returncode
    if status != 0:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise MedcotError(f"Training by {NAMES[request.way]} failed (status {status}): {last:.300}")
    return TimedSteps.model_validate_json((request.out_dir / RESULT_NAME).read_bytes())


def require_same_batches(measured: dict[Way, list[TimedSteps]]) -> None:
    first = {way: each[0].losses[0] for way, each in measured.items()}
    for way, loss in first.items():
        if abs(loss / first["medcot"] - 1) > _SAME_FIRST_LOSS:
            raise MedcotError(
                f"The first step's loss is {first['medcot']:.4f} by medcot and {loss:.4f} by {NAMES[way]}: they did "
                "not train on the same batch, and their speeds cannot be compared."
            )


def way_speed(way: Way, repeats: Sequence[TimedSteps], tokens: Sequence[int]) -> WaySpeed:
    timed = tokens[-1] - tokens[WARM_UP - 1]
    return WaySpeed(
        way=way,
        tokens_per_second=[timed / (each.seconds[-1] - each.seconds[WARM_UP - 1]) for each in repeats],
        peak_memory_bytes=[each.peak_memory_bytes for each in repeats],
        peak_gpu_bytes=[each.peak_gpu_bytes for each in repeats],
        losses=repeats[0].losses,
    )


def _machine(folder: Path) -> str:
    return ", ".join([*detect(folder).gpu_names, machine_name()])


def print_comparison(comparison: TrainingComparison, *, on_error: bool = False) -> None:
    """One row a way, medians and the range of the repeats, on standard output or standard error."""
    table = Table("training by", "tokens/s", "over Unsloth directly", "peak memory, MB", "GPU, MB")
    for each in comparison.ways:
        table.add_row(
            NAMES[each.way],
            _spread(each.tokens_per_second, ".1f"),
            _spread(comparison.ratios(each.way, "unsloth"), ".3f"),
            f"{max(each.peak_memory_bytes) / 1e6:.0f}",
            f"{max(each.peak_gpu_bytes) / 1e6:.0f}" if any(each.peak_gpu_bytes) else "-",
        )
    timed, repeats = comparison.steps - comparison.warm_up, len(comparison.ways[0].tokens_per_second)
    console = Console(stderr=on_error)
    console.print(table)
    console.print(
        f"{comparison.machine}; {comparison.preset}, {timed} of {comparison.steps} steps timed, median of {repeats} "
        "(least to most)",
        highlight=False,
    )


def _spread(values: Sequence[float], form: str) -> str:
    return f"{percentile(values, 0.5):{form}} ({min(values):{form}} to {max(values):{form}})"


def require_not_slower(comparison: TrainingComparison) -> None:
    """Raises GateFailed when our step is slower than Unsloth's by more than SLOWER_AT_MOST."""
    ratio = percentile(comparison.ratios("medcot", "unsloth"), 0.5)
    if ratio < 1 - SLOWER_AT_MOST:
        raise GateFailed(
            f"Training reaches {ratio:.3f} of the tokens/s of calling Unsloth directly; {1 - SLOWER_AT_MOST} is wanted."
        )


@click.command()
@click.option("--preset", default=DEFAULT_PRESET, show_default=True, help="A preset's name or a YAML file.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting; may be repeated.")
@click.option("--steps", type=click.IntRange(WARM_UP + 1), default=12, show_default=True, help="Optimizer steps.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Trainings of each way.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; the table on standard error.")
@click.option("--check", is_flag=True, help=f"Exit 3 when slower than Unsloth by more than {SLOWER_AT_MOST:.0%}.")
def main(preset: str, overrides: tuple[str, ...], steps: int, repeats: int, as_json: bool, check: bool) -> None:
    """Compare the speed of our training step with Unsloth's and with TRL + PEFT's.

    Example: python -m bench.training --steps 12 --repeats 5
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
