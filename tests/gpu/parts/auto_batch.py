"""training.batch_size=auto at 8B under 8 GB: the batch that is chosen, and the one that is left after running out."""

from __future__ import annotations

from pathlib import Path

from one_training import OneTraining
from part import Recorder, Request, perform
from smaller_card import EIGHT_GB, EIGHT_OF_24_GB, Card
from synthetic import prepared_run, random_base
from training_record import train_and_record

_PRESET = "deepseek-r1-8b"
_LENGTH, _REHEARSED_LENGTH = 2048, 128
_STEPS = 2
_STEP_EXAMPLES = 8
_HELD_OUT = 1
_CARDS: dict[str, Card] = {"8 GB": EIGHT_GB, "8 of 24 GB": EIGHT_OF_24_GB}


def measure(recorder: Recorder) -> None:
    request = recorder.request
    run_dir = _prepared(request)
    requests = [
        OneTraining(name=name, run_dir=run_dir, out_dir=request.work / "auto-batch" / f"trained-{index}", card=card)
        for index, (name, card) in enumerate(_CARDS.items())
    ]
    for name, done in train_and_record(recorder, requests).items():
        size, times = done.trained.batch_size or 0, done.trained.gradient_accumulation or 0
        recorder.figure(f"{name}: batch", size)
        recorder.check(f"{name}: examples of a step", size * times == _STEP_EXAMPLES, f"{size} x {times}")
        if _CARDS[name] is EIGHT_OF_24_GB and not request.rehearse:
            # By the card's size all eight fit, by the memory that is there they do not.
            recorder.check(f"{name}: a smaller batch after running out of memory", size < _STEP_EXAMPLES, f"{size}")


def _prepared(request: Request) -> Path:
    length = _REHEARSED_LENGTH if request.rehearse else _LENGTH
    overrides = {
        "model.max_seq_length": length,
        "data.eval_rows": _HELD_OUT,
        "training.max_steps": _STEPS,
        "training.batch_size": "auto",
        "training.step_examples": _STEP_EXAMPLES,
    }
    base = random_base(request.work, request.rehearse)
    return prepared_run(request, "auto-batch", _PRESET, overrides, base, [length] * (_STEP_EXAMPLES * _STEPS + 1))


if __name__ == "__main__":
    perform(measure)
