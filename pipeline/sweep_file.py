"""Experiments files: one configuration, and what each experiment changes in it.

    config: tinyllama-flashcards          # a preset, or a YAML file beside this one
    overrides: {export.include_base: false}
    experiments:
      - name: primary
      - name: low-rank
        overrides: {lora.r: 8, lora.alpha: 16}

Instead of ``experiments``, ``grid: {lora.r: [8, 16], training.learning_rate: [1.0e-4, 2.0e-4]}`` makes one experiment
of every combination. Overrides are written as for ``--set``: a dotted key and its value.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from pipeline import platforms
from pipeline.config import (
    PRESETS_DIR,
    Config,
    Override,
    Section,
    Settings,
    load_config,
    preset_names,
    raise_all,
    read_settings,
    settings_path,
)
from pipeline.errors import MedcotError

EXPERIMENTS_DIR = PRESETS_DIR / "experiments"
# What a sweep writes beside its experiments' folders: sweep.html, sweep.md, sweep.json.
RESULT_STEM = "sweep"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class _Changes(Section):
    overrides: dict[str, Any] = Field({}, description="Dotted key -> value, as for --set.")

    @field_validator("overrides")
    @classmethod
    def _are_dotted(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        for key, value in overrides.items():
            if isinstance(value, dict):  # it would replace the whole section, the base's other settings with it
                raise ValueError(f"{key} is a section; write its settings with dots, for example training.epochs: 3")
        return overrides


class NamedExperiment(_Changes):
    """One experiment of a list."""

    name: str = Field(max_length=60, pattern=_NAME, description="Names the experiment's folder.")


class ExperimentsFile(_Changes):
    """What an experiments file may hold."""

    name: str = Field(max_length=60, pattern=_NAME, description="Names the sweep; its folder is runs/<name>-sweep.")
    config: str = Field(min_length=1, description="Preset or YAML file that all experiments start from.")
    primary: str | None = Field(None, description="The experiment that the others are compared with [the first].")
    experiments: tuple[NamedExperiment, ...] = ()
    grid: dict[str, tuple[Any, ...]] = Field({}, description="Dotted key -> values; every combination is run.")

    @field_validator("grid")
    @classmethod
    def _has_values(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in grid.items():
            if not values:
                raise ValueError(f"{key} has no values")
        return grid


@dataclass(frozen=True)
class Experiment:
    """One run of a sweep; ``changes`` are its own overrides, without those common to all."""

    name: str
    config: Config
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    name: str
    primary: str
    experiments: tuple[Experiment, ...]


@dataclass(frozen=True)
class _Draft:
    """An experiment before its configuration is resolved; ``origin`` is the place of its name or of the grid."""

    name: str
    origin: str
    changes: tuple[Override, ...]


def load_sweep(name_or_path: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read an experiments file; ``overrides`` (``key=value``) apply to all experiments, after its own.

    Raises MedcotError listing every problem with its file, line and key.
    """
    settings = read_settings(settings_path(name_or_path, EXPERIMENTS_DIR))
    file = settings.validated(ExperimentsFile)
    drafts = list(_listed(file, settings) if file.experiments else _combined(file, settings))
    raise_all(list(_faults(file, settings, drafts)))
    base = _base_path(file, settings)
    # An experiment that is worse than its base is a row of the table, not a failure.
    no_gates = Override("evaluation.gates", {}, "a sweep")
    common = [no_gates, *_changes(file.overrides, ("overrides",), settings)]
    # Alone first: what is wrong for all is told once.
    load_config(base, [*common, *overrides])
    experiments, problems = [], []
    for draft in drafts:
        name = Override("name", f"{file.name}-{draft.name}", draft.origin)
        try:
            config = load_config(base, [*common, *draft.changes, name, *overrides])
        except MedcotError as error:
            problems.append(str(error))
        else:
            experiments.append(Experiment(draft.name, config, {each.key: each.value for each in draft.changes}))
    raise_all(list(dict.fromkeys(problems)))
    return Sweep(file.name, file.primary or drafts[0].name, tuple(experiments))


def _listed(file: ExperimentsFile, settings: Settings) -> Iterator[_Draft]:
    for index, experiment in enumerate(file.experiments):
        place = ("experiments", index)
        changes = _changes(experiment.overrides, (*place, "overrides"), settings)
        yield _Draft(experiment.name, settings.origin(*place, "name"), changes)


def _combined(file: ExperimentsFile, settings: Settings) -> Iterator[_Draft]:
    for values in itertools.product(*file.grid.values()):
        point = dict(zip(file.grid, values, strict=True))
        if point:
            yield _Draft(_point_name(point), settings.origin("grid"), _changes(point, ("grid",), settings))


def _point_name(point: Mapping[str, Any]) -> str:
    """What differs, for people: ``learning_rate-0.001-r-8``."""
    text = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in point.items())
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")[:60]


def _changes(values: Mapping[str, Any], place: tuple[str | int, ...], settings: Settings) -> tuple[Override, ...]:
    return tuple(Override(key, value, settings.origin(*place, key)) for key, value in values.items())


def _faults(file: ExperimentsFile, settings: Settings, drafts: Sequence[_Draft]) -> Iterator[str]:
    """What the schema cannot say."""
    if bool(file.experiments) == bool(file.grid):
        yield f"{settings.path}: give either experiments (a list) or grid (a list of values for each key)"
    first: dict[str, str] = {}
    for draft in drafts:
        if draft.name in first:
            yield f"{draft.origin}: two experiments are called {draft.name} (the first: {first[draft.name]})"
        if draft.name.startswith(f"{RESULT_STEM}."):
            yield f"{draft.origin}: {draft.name} is the name of a file of the result; choose another"
        first.setdefault(draft.name, draft.origin)
    if file.primary is not None and file.primary not in first:
        there_are = ", ".join(first)
        yield f"{settings.origin('primary')}: primary: no experiment is called {file.primary} (there are {there_are})"


def _base_path(file: ExperimentsFile, settings: Settings) -> str:
    if file.config in preset_names():
        return file.config
    try:
        return str(settings_path(str(settings.path.parent / file.config)))
    except MedcotError as error:
        raise MedcotError(f"{settings.origin('config')}: config: {error}") from error


def default_folder(sweep: Sweep) -> Path:
    """Not ``runs/<name>``: a preset's own run is there."""
    return platforms.here().runs / f"{sweep.name}-sweep"
