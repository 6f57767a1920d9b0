"""The settings that make a run fit where it does not: ``--set`` options, tried on the estimate before they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pipeline.config import Config
from pipeline.estimate import Estimator
from pipeline.file_sizes import UNQUANTIZED
from pipeline.training_memory import TrainingMemory

Settings = dict[str, Any]
_SHORTEST = 256  # tokens; a shorter example has no room for question, thought and answer
_STEP = 64


def training_advice(estimator: Estimator, there: float) -> str:
    """How training fits ``there`` bytes, with what it learns changed least; a smaller base where nothing helps."""
    for settings in _training_changes(estimator.training_memory, there):
        changed = _changed(estimator.training_memory, settings)
        if changed.peak(changed.batch_size) <= there:
            return options(settings)
    return "choose a smaller model.base"


def disk_advice(estimator: Estimator, needed: float, free: float) -> str:
    """Which files to leave out so that ``needed`` bytes become at most ``free``."""
    config = estimator.config
    saved = 0.0
    kept = list(config.export.quantizations)
    settings: Settings = {}
    for name in sorted(kept, key=lambda name: (name.upper() not in UNQUANTIZED, -estimator.file_bytes(name))):
        if name == config.export.ship:
            continue
        kept.remove(name)
        saved += estimator.file_bytes(name)
        settings["export.quantizations"] = list(kept)
        if needed - saved <= free:
            return options(settings)
    # The base's file is what relative gates compare with.
    if config.export.include_base and not any(gate.needs_reference for gate in config.evaluation.parsed_gates):
        settings["export.include_base"] = False
        if needed - saved - estimator.file_bytes(config.export.ship) <= free:
            return options(settings)
    return "free some space or choose another --run-dir"


def options(settings: Settings) -> str:
    """``--set key=value`` for each, as a shell takes them."""
    return " ".join(f"--set {key}={_text(value)}" for key, value in settings.items())


def _training_changes(memory: TrainingMemory, there: float) -> Iterator[Settings]:
    """Sets of changes, those first that change the adapter least: a change comes after all sets of those before it."""
    training, model = memory.config.training, memory.config.model
    changes: list[Callable[[TrainingMemory], Settings]] = []
    if training.eval_batch_size > 1:
        changes.append(lambda _: {"training.eval_batch_size": 1})
    if memory.batch_size > 1:
        changes.append(lambda memory: _smaller_batch(memory, there))
    if not training.gradient_checkpointing:
        changes.append(lambda _: {"training.gradient_checkpointing": True})
    if not model.load_in_4bit:
        changes.append(lambda _: {"model.load_in_4bit": True})
    changes.append(lambda memory: _shorter(memory, there))
    for chosen in range(1, 1 << len(changes)):
        settings: Settings = {}
        for place, change in enumerate(changes):
            if chosen >> place & 1:
                settings |= change(_changed(memory, settings))
        yield settings


def _smaller_batch(memory: TrainingMemory, there: float) -> Settings:
    """The largest batch that fits, with the same examples a step; a batch of one where none does."""
    examples = memory.config.training.effective_batch
    sizes = [size for size in range(memory.batch_size - 1, 0, -1) if examples % size == 0]
    size = next((size for size in sizes if _with_batch(memory, size).peak(size) <= there), 1)
    return {"training.batch_size": size, "training.gradient_accumulation": examples // size}


def _shorter(memory: TrainingMemory, there: float) -> Settings:
    """The longest examples that fit; the reasoning of longer ones is cut."""
    batch = memory.batch_size
    lengths = range((memory.longest - 1) // _STEP * _STEP, _SHORTEST - 1, -_STEP)
    length = next((each for each in lengths if replace(memory, longest=each).peak(batch) <= there), _SHORTEST)
    settings: Settings = {"model.max_seq_length": length}
    if memory.config.data.too_long == "drop":
        settings["data.too_long"] = "cut"
    return settings


def _with_batch(memory: TrainingMemory, size: int) -> TrainingMemory:
    examples = memory.config.training.effective_batch
    return _changed(memory, {"training.batch_size": size, "training.gradient_accumulation": examples // size})


def _changed(memory: TrainingMemory, settings: Settings) -> TrainingMemory:
    values = memory.config.model_dump()
    for key, value in settings.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    longest = min(memory.longest, settings.get("model.max_seq_length", memory.longest))
    return replace(memory, config=Config.model_validate(values), longest=longest)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)
