"""The driver: the stages in order, each in a process of its own, skipped when up to date.

    medcot run smollm2-cpu --set training.max_steps=30

A stage is a function ``stage(config, inputs, out_dir) -> result``; this module gives it the folders of the
artifacts it is made from, and turns what it leaves into an artifact (``pipeline/stage_process.py`` writes the
manifest). A process of its own gives every stage its own peak memory and returns all of it, the GPU's included.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pipeline import __version__, llama_background, ranks, results
from pipeline.artifacts import (
    CHECKPOINTS_NAME,
    FAILURE_NAME,
    IN_PROGRESS_NAME,
    MANIFEST_NAME,
    Manifest,
    changed_files,
    fingerprint,
    left_behind,
    package_versions,
    read_in_progress,
    read_manifest,
    sha256_file,
    write_json,
    write_text,
)
from pipeline.base_model import base_identity
from pipeline.bring_back import CONFIG_NAME as CONFIG_NAME
from pipeline.config import Config, load_config
from pipeline.errors import GateFailed, MedcotError
from pipeline.failure import FILE_VARIABLE, write_failure
from pipeline.file_lock import try_lock
from pipeline.free_settings import settings_of_the_adapter
from pipeline.kept_copy import kept_copy
from pipeline.processes import PARENT_VARIABLE, ended_by_signal, with_our_packages
from pipeline.sources import source_identity
from pipeline.stage_progress import records
from pipeline.time_limit import is_raised

PARTIAL = "--partial"  # tells a stage's process to make do with what inputs there are
LOCK_NAME = ".lock"
LLAMA_CPP = "llama-cpp-python"  # among a stage's packages
_BASE = ("model.base", "model.revision")
_NOTHING_TO_PLAN = frozenset({"prepare", "report"})  # seconds, and no more than the plan itself would take


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    ``function`` is "module:name", imported only in the stage's process; ``settings`` are the dotted keys of the
    configuration that its output depends on, but for those of them in ``free``; ``packages`` the distributions
    whose versions matter; ``environment`` what its process finds set unless the user has set it; ``module`` is what
    its process runs; ``on_gpu`` says that it may see a GPU, whose memory the others leave to whoever needs it;
    ``check`` is "module:name" of what says before the run what the stage would refuse (pipeline/feasibility.py).
    """

    name: str
    function: str
    folder: str
    inputs: tuple[str, ...]
    settings: tuple[str, ...]
    packages: tuple[str, ...]
    result: type[BaseModel]
    environment: Mapping[str, str] = field(default_factory=dict)
    module: str = "pipeline.stage_process"
    free: tuple[str, ...] = ()
    on_gpu: bool = False
    check: str | None = None

    def load(self) -> Callable[[Config, dict[str, Path], Path], BaseModel]:
        module, _, name = self.function.partition(":")
        function: Callable[[Config, dict[str, Path], Path], BaseModel] = getattr(importlib.import_module(module), name)
        return function


STAGES = (
    Stage(
        name="prepare",
        function="pipeline.prepare:prepare",
        folder="data",
        inputs=(),
        settings=("seed", "data", "prompt", "model.max_seq_length", *_BASE),
        packages=("tokenizers", "datasets"),
        result=results.PreparedData,
    ),
    Stage(
        name="train",
        function="pipeline.train:train",
        folder="adapter",
        inputs=("prepare",),
        settings=("seed", "model", "prompt", "lora", "training"),
        packages=("unsloth", "trl", "peft", "transformers", "torch", "bitsandbytes"),
        result=results.TrainedAdapter,
        # glibc maps every large tensor anew and returns it to the system at once; kept, a CPU step is 8 % faster
        # (LOG.md, 2026-11-22).
        environment={"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"},
        module="pipeline.launch",
        on_gpu=True,
    ),
    Stage(
        name="export",
        function="export.export:export",
        folder="gguf",
        inputs=("prepare", "train"),
        settings=("name", "export", *_BASE),
        packages=("gguf", "llama-cpp-python"),
        result=results.ExportedModels,
        check="export.feasibility:export_problems",
    ),
    Stage(
        name="verify",
        function="export.verify:verify",
        folder="verify",
        inputs=("prepare", "train", "export"),
        settings=("verify", "prompt", *_BASE),
        packages=("llama-cpp-python", "transformers", "peft", "torch"),
        result=results.Verification,
    ),
    Stage(
        name="evaluate",
        function="bench.evaluate:evaluate",
        folder="eval",
        # The adapter is for answers under transformers (pipeline/answer_engine.py); it is an input of export too, so it
        # costs nothing here. Which engine is taken depends on the machine, as training's device does, and is no part of
        # the fingerprint: the result names it, and a run that is brought home from a GPU stays finished.
        inputs=("prepare", "train", "export"),
        settings=("seed", "evaluation", "prompt"),
        free=("evaluation.max_minutes",),
        packages=("llama-cpp-python", "rouge-score", "sacrebleu"),
        result=results.Evaluation,
        on_gpu=True,
        check="bench.feasibility:evaluation_problems",
    ),
    Stage(
        name="bench",
        function="bench.speed:bench",
        folder="bench",
        inputs=("prepare", "train", "export", "evaluate"),
        settings=("seed", "bench", "prompt.system", "model.max_seq_length", *_BASE),
        free=("bench.max_minutes",),
        packages=("llama-cpp-python", "transformers", "torch"),
        result=results.Benchmark,
        on_gpu=True,
        check="bench.feasibility:bench_problems",
    ),
    Stage(
        name="report",
        function="bench.report:report",
        folder="report",
        inputs=("prepare", "train", "export", "verify", "evaluate", "bench"),
        settings=("name", "report"),
        packages=("matplotlib", "jinja2"),
        result=results.Report,
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


@dataclass(frozen=True)
class StageIdentity:
    """Everything a stage's output depends on."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.stage, self.config, self.inputs, self.versions)


Status = Literal["made", "up to date", "resumed"]


@dataclass(frozen=True)
class StageOutcome:
    stage: Stage
    status: Status
    manifest: Manifest
    path: Path


@dataclass(frozen=True)
class RunOutcome:
    run_dir: Path
    stages: list[StageOutcome]

    @property
    def shipped_gguf(self) -> Path | None:
        """The GGUF to chat with, when the export stage was part of this run."""
        for outcome in self.stages:
            if outcome.stage.name == "export":
                return outcome.path / outcome.manifest.result["ship"]
        return None


def stage_named(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def run(
    config: Config,
    run_dir: Path,
    *,
    only: str | None = None,
    until: str | None = None,
    force: Sequence[str] = (),
    plan_first: bool = True,
    keep: Path | None = None,
    first_report: bool = False,
    announce: Callable[[str], None] = lambda text: None,
) -> RunOutcome:
    """Bring the run in ``run_dir`` up to date and say what was done; ``keep`` gets a copy that outlives the machine.

    Before the first stage that has work to do comes the plan: a run that cannot fit is not begun.
    Raises MedcotError when a stage fails or cannot fit; finished artifacts stay. When a gate fails (exit status 3) the
    report is written all the same, of what is there; with ``first_report`` also as soon as the GGUF is verified.
    """
    chosen = _chosen(only, until)
    if ranks.world_size() > 1 and only != "train":
        raise MedcotError(
            "Of the stages only training runs on several processes: start it under torchrun with --only train, and the "
            "others without torchrun."
        )
    if not ranks.is_first():
        # The first process has the run's folder to itself; its training tells the others what to do.
        _run_in_process(chosen[0], run_dir)
        return RunOutcome(run_dir, [])
    with locked(run_dir), kept_copy(run_dir, keep, announce) as copy_now:
        write_text(run_dir / CONFIG_NAME, config.to_yaml())
        if "verify" in force and left_behind(run_dir / stage_named("export").folder):
            force = [*force, "export"]  # it verifies all files
        outcomes: list[StageOutcome] = []
        planned = not plan_first
        for index, stage in enumerate(chosen):
            if LLAMA_CPP in stage.packages:
                llama_background.wait_for_build(False, announce)
            state = _examine(stage, config, run_dir, stage.name in force)
            if state.finished is not None:
                announce(f"{stage.name}: up to date")
                outcomes.append(StageOutcome(stage, "up to date", state.finished, run_dir / stage.folder))
                if ranks.world_size() > 1:
                    _run_in_process(stage, run_dir)  # tells the other machines, which wait for it
            else:
                ahead = [each.name for each in chosen[index:]]
                if not planned and not _NOTHING_TO_PLAN.issuperset(ahead):
                    announce("plan: looking at the data, the model and this machine")
                    _child("plan", ["pipeline.plan_process", str(run_dir), *ahead], {})
                    planned = True
                try:
                    outcomes.append(_make(stage, state, run_dir, stage.name in force, announce))
                except StageFailed as failure:
                    if failure.exit_status == GateFailed.exit_status and (first_report or chosen[-1].name == "report"):
                        _report_on_what_is_there(run_dir, "", "shows what failed, and what is there", announce)
                    raise
            if stage.name == "verify" and first_report:
                _report_first(run_dir, outcomes[-1].manifest, index + 1 < len(chosen), announce)
                copy_now()
    return RunOutcome(run_dir, outcomes)


def _report_first(run_dir: Path, verified: Manifest, evaluates: bool, announce: Callable[[str], None]) -> None:
    """The GGUF is whole and proven: say where it is, with a report, hours before it is evaluated."""
    folder, expected = run_dir / stage_named("report").folder, f"first {verified.digest}"
    report = read_manifest(folder)
    if report is not None and report.inputs.get("verify") == verified.digest:
        return  # the whole report is there
    if read_in_progress(folder).get("fingerprint") != expected or not any(folder.glob("*.html")):
        _report_on_what_is_there(run_dir, expected, "is the first report, without evaluation and benchmark", announce)
    gguf = run_dir / stage_named("export").folder
    exported = read_manifest(gguf)
    if exported is None:
        return
    gguf /= exported.result["ship"]
    announce(
        f"The GGUF is ready and verified: {gguf} ({gguf.stat().st_size / 1e9:.2f} GB). "
        + ("It can be taken or published while it is evaluated" if evaluates else "It is not evaluated yet")
        + "; medcot publish says so on its card."
    )


def _report_on_what_is_there(run_dir: Path, expected: str, what: str, announce: Callable[[str], None]) -> None:
    """Write the report of a run that is not finished: no artifact, so that the next run makes it again."""
    stage = stage_named("report")
    _start_folder(run_dir / stage.folder, expected, force=True)
    try:
        _child(stage.name, [stage.module, stage.name, str(run_dir), PARTIAL], {})
        announce(f"report: {run_dir / stage.folder} {what}")
    except StageFailed:
        pass  # its process has told what went wrong; what the run ends with is something else
    except MedcotError as error:
        announce(f"report: {error}")


def start_again(folder: Path) -> None:
    """Empty an artifact's folder and mark it as under way; raises MedcotError when others' files are in it."""
    _start_folder(folder, expected="", force=True)


def stage_inputs(stage: Stage, run_dir: Path) -> dict[str, Path]:
    return {name: run_dir / stage_named(name).folder for name in stage.inputs}


def stage_config(stage: Stage, config: Config) -> dict[str, Any]:
    """The part of the configuration, and of the world outside, that the stage's output depends on."""
    values = config.model_dump(mode="json")
    for key in stage.free:
        section, _, name = key.partition(".")
        del values[section][name]
    picked: dict[str, Any] = {}
    for key in stage.settings:
        value = values
        for part in key.split("."):
            value = value[part]
        picked[key] = value
    if "training" in picked:
        picked["training"] = settings_of_the_adapter(config.training)
    if "model.base" in picked or "model" in picked:
        picked["base"] = base_identity(config.model.base, config.model.revision)
    if "data" in picked:
        picked["records"] = source_identity(config.data)
    if "export" in picked:
        # Its content, and the name that GGUFs note, not where it lies; training text is an input of the stage.
        matrix = Path(config.export.imatrix)
        picked["imatrix"] = sha256_file(matrix) if matrix.is_file() else None
        picked["export"]["imatrix"] = matrix.name
        if config.export.imatrix != "auto":
            del picked["export"]["imatrix_tokens"]  # nothing is measured
    return picked


def stage_versions(stage: Stage) -> dict[str, str]:
    return {"medcot": __version__, **package_versions(stage.packages)}


def _chosen(only: str | None, until: str | None) -> list[Stage]:
    if only is not None:
        return [stage_named(only)]
    if until is not None:
        return list(STAGES[: STAGE_NAMES.index(until) + 1])
    return list(STAGES)


@dataclass(frozen=True)
class _State:
    """What a stage's folder holds: the finished artifact if it is up to date, else why it is made again.

    ``unfinished``: an artifact that ran out of time, and that the stage continues from.
    """

    expected: str
    finished: Manifest | None
    why: str | None
    unfinished: bool = False


def _examine(stage: Stage, config: Config, run_dir: Path, force: bool) -> _State:
    folder = run_dir / stage.folder
    expected = identify(stage, config, run_dir).fingerprint
    manifest = read_manifest(folder)
    if manifest is None or force:
        return _State(expected, None, None)
    if _is_unfinished(manifest, expected, config):
        return _State(expected, None, None, unfinished=True)
    damaged = changed_files(folder, manifest)
    if stage.name == "export" and damaged and _is_verified(config, run_dir):
        damaged = [path for path in damaged if path not in left_behind(folder)]
    if damaged:
        return _State(expected, None, f"{damaged[0]} is missing or changed")
    if manifest.fingerprint != expected:
        return _State(expected, None, "its settings, inputs or versions changed")
    return _State(expected, manifest, None)


def _is_verified(config: Config, run_dir: Path) -> bool:
    """Whether nothing asks any more for the GGUFs that a copy has left behind."""
    stage = stage_named("verify")
    manifest = read_manifest(run_dir / stage.folder)
    return manifest is not None and manifest.fingerprint == identify(stage, config, run_dir).fingerprint


def finished_artifact(stage: Stage, config: Config, run_dir: Path) -> Manifest | None:
    """The manifest of the stage's artifact if that is up to date; raises MedcotError when an input is not finished."""
    return _examine(stage, config, run_dir, force=False).finished


def _is_unfinished(manifest: Manifest, expected: str, config: Config) -> bool:
    """Whether it ran out of time: good for the later stages, and continued by the next run.

    Training continues in any case, evaluation and benchmark once their limit is raised.
    """
    ran_out = not manifest.result.get("finished", True) or is_raised(manifest.result, manifest.stage, config)
    return manifest.fingerprint == expected and ran_out


def _make(stage: Stage, state: _State, run_dir: Path, force: bool, announce: Callable[[str], None]) -> StageOutcome:
    folder = run_dir / stage.folder
    if state.why:
        announce(f"{stage.name}: {state.why}, made again")
    status = _start_folder(folder, state.expected, force, state.unfinished, stage_versions(stage))
    with llama_background.llama_cpp(stage.on_gpu, announce) if LLAMA_CPP in stage.packages else nullcontext():
        announce(f"{stage.name}: {'started' if status == 'made' else status}")
        _run_in_process(stage, run_dir)
    made = read_manifest(folder)
    if made is None:
        raise MedcotError(f"{stage.name} ended without writing {folder / MANIFEST_NAME}: run it again with --debug.")
    if made.result.get("finished", True):
        # Not before the manifest stands: a kill in between would cost the whole training.
        shutil.rmtree(folder / CHECKPOINTS_NAME, ignore_errors=True)
    return StageOutcome(stage, status, made, folder)


def identify(stage: Stage, config: Config, run_dir: Path) -> StageIdentity:
    """What the stage's output would be made of now; raises MedcotError when an input is not finished."""
    digests = {}
    for name, path in stage_inputs(stage, run_dir).items():
        manifest = read_manifest(path)
        if manifest is None:
            raise MedcotError(f"{stage.name} needs the artifact of {name}, and {path} holds none: run {name} first.")
        digests[name] = manifest.digest
    return StageIdentity(stage.name, stage_config(stage, config), digests, stage_versions(stage))


def _start_folder(
    folder: Path, expected: str, force: bool, unfinished: bool = False, versions: Mapping[str, str] | None = None
) -> Status:
    """Keep what an interrupted or unfinished attempt at the same thing left, else begin with an empty folder.

    Evaluated records of the same ``versions`` stay in any case: each is known by all that it depends on, so that other
    gates or more rows cost no answer twice.
    """
    work = {"fingerprint": expected, "versions": versions}
    manifest = read_manifest(folder)
    if unfinished:
        # In this order: a kill in between leaves both, which is as good.
        write_json(folder / IN_PROGRESS_NAME, work)
        (folder / MANIFEST_NAME).unlink()
    if read_in_progress(folder).get("fingerprint") == expected and not force:
        for name in (FAILURE_NAME, MANIFEST_NAME):  # a manifest is of other work, whose removal was cut off
            (folder / name).unlink(missing_ok=True)
        return "resumed"
    if folder.exists():
        if not is_ours(folder):
            raise MedcotError(
                f"{folder} holds files that medcot did not make: choose another --run-dir or empty that folder."
            )
        made_with = manifest.versions if manifest is not None else read_in_progress(folder).get("versions")
        if records(folder) and made_with == versions and not force:
            write_json(folder / IN_PROGRESS_NAME, work)
            for path in {*folder.iterdir()} - {folder / IN_PROGRESS_NAME, *records(folder)}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return "made"
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(folder / IN_PROGRESS_NAME, work)
    return "made"


def is_ours(folder: Path) -> bool:
    """Whether a folder is an artifact, finished or not, or empty: it may be made again."""
    made = (folder / IN_PROGRESS_NAME).is_file() or (folder / MANIFEST_NAME).is_file()
    return made or not any(folder.iterdir())


def _run_in_process(stage: Stage, run_dir: Path) -> None:
    failure = run_dir / stage.folder / FAILURE_NAME if ranks.is_first() else None
    _child(stage.name, [stage.module, stage.name, str(run_dir)], stage.environment, failure)


def _child(
    name: str, module_and_arguments: Sequence[str], environment: Mapping[str, str], failure: Path | None = None
) -> None:
    """Run one of our modules in a process of its own; what it has told the user is not told again.

    Why it failed is left in the file ``failure``, for the report.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *module_and_arguments],
        env={
            **environment,
            **with_our_packages(),
            PARENT_VARIABLE: str(os.getpid()),
            FILE_VARIABLE: "" if failure is None else str(failure),
        },
    )
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # The child got the same Ctrl-C from the terminal; give it a moment to end by itself.
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if status < 0:
        ended = ended_by_signal(name, -status)
        if failure is not None:
            with suppress(OSError):  # a full disk, perhaps; the error is told all the same
                write_failure(failure, ended, 1)
        raise MedcotError(ended)
    if status != 0:
        raise StageFailed(name, status)


class StageFailed(MedcotError):
    """A stage's process has told the user what went wrong; only its exit status is left to pass on."""

    def __init__(self, stage: str, exit_status: int) -> None:
        super().__init__(f"{stage} failed")
        self.already_told = True
        self.exit_status = exit_status


class FolderBusy(MedcotError):
    """Another process works in the folder."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep two runs out of one folder; the lock goes with the process, however it ends. Raises FolderBusy."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        stream = (run_dir / LOCK_NAME).open("w")
    except OSError as error:
        raise MedcotError(f"{run_dir} cannot be written ({error.strerror}): choose another --run-dir.") from error
    with stream:
        if not try_lock(stream):
            raise FolderBusy(f"Another medcot run is at work in {run_dir}: wait for it or choose another folder.")
        yield


def load_run_config(run_dir: Path) -> Config:
    return load_config(str(run_dir / CONFIG_NAME))
