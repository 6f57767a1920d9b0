"""Several runs that differ in some settings: each an ordinary run in OUT/<experiment>, prepared data made once.

    medcot sweep configs/experiments/tinyllama-flashcards.yaml

Runs skip what is done, so a sweep that was killed goes on with the same command, and one that failed in part tries
that part again. ``bench/sweep_result.py`` reads what they measured.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import MANIFEST_NAME, Manifest, write_text
from pipeline.errors import MedcotError
from pipeline.run import CONFIG_NAME, finished_artifact, identify, is_ours, locked, stage_named
from pipeline.sweep_file import Experiment, Sweep
from pipeline.sweep_machine import gpu_slots, run_here

LAST_STAGE = "evaluate"  # the table's text metrics; an export that fails verification before it has no figures
_PREPARE = stage_named("prepare")


@dataclass(frozen=True)
class ExperimentOutcome:
    """``failure`` is one sentence, or None when all of the run's stages are up to date."""

    experiment: Experiment
    run_dir: Path
    failure: str | None


def run_sweep(
    sweep: Sweep, out: Path, *, ray_address: str | None = None, announce: Callable[[str], None] = lambda text: None
) -> list[ExperimentOutcome]:
    """Bring every experiment's run in ``out`` up to date, on this machine or on a Ray cluster ("local" starts one).

    A failed experiment does not keep the others from running. Raises MedcotError when nothing can be begun.
    """
    out = out.resolve()  # the runs' processes, and those on other machines, have folders of their own
    with locked(out):
        folders = {experiment.name: out / experiment.name for experiment in sweep.experiments}
        for experiment in sweep.experiments:
            write_text(folders[experiment.name] / CONFIG_NAME, experiment.config.to_yaml())
        failures = _prepare_once(sweep.experiments, folders, announce)
        ready = [folder for folder in folders.values() if folder not in failures]
        if ray_address is None:
            failures |= run_here(ready, LAST_STAGE, gpu_slots(), announce)
        else:
            from pipeline.sweep_ray import run_on_ray

            failures |= run_on_ray(ready, LAST_STAGE, ray_address, out, announce)
    return [
        ExperimentOutcome(experiment, folders[experiment.name], failures[folders[experiment.name]])
        for experiment in sweep.experiments
    ]


def _prepare_once(
    experiments: Sequence[Experiment], folders: dict[str, Path], announce: Callable[[str], None]
) -> dict[Path, str | None]:
    """Prepared data in every run's folder, made once for all that want the same; gives those that failed, and why."""
    failures: dict[Path, str | None] = {}
    alike: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        try:
            wanted = identify(_PREPARE, experiment.config, folders[experiment.name]).fingerprint
        except MedcotError as error:
            failures[folders[experiment.name]] = f"Error in prepare: {error}"
        else:
            alike.setdefault(wanted, []).append(experiment)
    for group in alike.values():
        has_it = [each for each in group if finished_artifact(_PREPARE, each.config, folders[each.name])]
        first = (has_it or group)[0]
        if not has_it:
            [failure] = run_here([folders[first.name]], _PREPARE.name, [{}], announce).values()
            if failure is not None:
                failures |= {folders[each.name]: failure for each in group}
                continue
        manifest = finished_artifact(_PREPARE, first.config, folders[first.name])
        for each in group:
            if manifest is not None and each not in has_it and each is not first:
                _share(folders[first.name], manifest, folders[each.name])
                announce(f"{each.name}: data of {first.name}")
    return failures


def _share(source: Path, manifest: Manifest, target: Path) -> None:
    """Give another run the same prepared data: its files linked where the file system can, the manifest as it is.

    The manifest names files relative to itself and says nothing about the run, so it stays valid. No stage changes
    a file of an artifact in place; one that is made again is a new file, and the other runs keep theirs.
    """
    final = target / _PREPARE.folder
    if final.exists() and not is_ours(final):
        return  # the run itself refuses such a folder, and says so
    whole = target / f".{_PREPARE.folder}.tmp"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    for name in [*(record.path for record in manifest.files), MANIFEST_NAME]:
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        _link(source / _PREPARE.folder / name, whole / name)
    if final.exists():
        shutil.rmtree(final)
    whole.rename(final)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
