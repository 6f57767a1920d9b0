"""The TinyLlama preset in TinyLlama-1.1B's shape as a T4 trains it: with dropout and, if time allows, without."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

from one_training import OneTraining
from part import Recorder, Request, perform
from smaller_card import T4
from synthetic import prepared_run, random_base
from training_record import train_and_record

from pipeline.config import load_config

_PRESET = "tinyllama-flashcards"
_SHORTEST, _LONGEST = 120, 512
_REHEARSED_SHORTEST, _REHEARSED_LONGEST = 100, 128
_TURN = 20  # tokens around a system prompt, which the made-up vocabulary spells letter by letter
_STEPS, _REHEARSED_STEPS = 12, 2
_HELD_OUT = 8
_SPARE = 1.2


def measure(recorder: Recorder) -> None:
    request = recorder.request
    begun = time.monotonic()
    for name, dropout in (("with dropout", True), ("without dropout", False)):
        took = time.monotonic() - begun
        if not dropout and recorder.seconds_left() < _SPARE * took:
            continue
        out_dir = request.work / f"tinyllama-{'with' if dropout else 'without'}" / "trained"
        one = OneTraining(name=name, run_dir=_prepared(request, dropout), out_dir=out_dir, card=T4)
        if not train_and_record(recorder, [one]):
            return
        adapter = json.loads((out_dir / "adapter_config.json").read_text())
        wanted = load_config(_PRESET).lora.dropout if dropout else 0.0
        recorder.check(f"{name}: dropout", adapter["lora_dropout"] == wanted, f"{adapter['lora_dropout']}")


def _prepared(request: Request, dropout: bool) -> Path:
    shortest, longest, steps = _SHORTEST, _LONGEST, _STEPS
    if request.rehearse:
        shortest, longest, steps = _REHEARSED_SHORTEST, _REHEARSED_LONGEST, _REHEARSED_STEPS
    config = load_config(_PRESET)
    system = len(config.prompt.system) + _TURN if config.prompt.system else 0
    generator = random.Random(0)
    rows = config.training.effective_batch * steps + _HELD_OUT
    lengths = [generator.randint(shortest, longest) + system for _ in range(rows)]
    overrides: dict[str, object] = {
        "model.max_seq_length": longest + system,
        "data.eval_rows": _HELD_OUT,
        "training.max_steps": steps,
    }
    if not dropout:
        overrides["lora.dropout"] = 0.0
    base = random_base(request.work, request.rehearse, "tinyllama")
    return prepared_run(request, f"tinyllama-{'with' if dropout else 'without'}", _PRESET, overrides, base, lengths)


if __name__ == "__main__":
    perform(measure)
