"""Two ranks that share one GPU, over gloo, against one process: the same losses on the same examples.

NCCL refuses two ranks on one GPU, so what two GPUs say to each other is not tested here.
"""

from __future__ import annotations

from pathlib import Path

from one_training import OneTraining
from part import Recorder, Request, perform
from synthetic import prepared_run, random_base
from training_record import train_and_record

_PRESET = "smollm2-cpu"
_LENGTHS = (100, 140)  # of a rehearsal; else the preset's own records
_STEPS, _REHEARSED_STEPS = 12, 3
_STEP_EXAMPLES = 8
_HELD_OUT = 4
_TOLERANCE = 0.01  # of a loss: halves of a step's gradient are added in another order


def measure(recorder: Recorder) -> None:
    request = recorder.request
    run_dir = _prepared(request)
    folder = request.work / "two-ranks"
    requests = [
        OneTraining(name=name, run_dir=run_dir, out_dir=folder / f"trained-{count}", processes=count)
        for count, name in ((1, "one process"), (2, "two ranks"))
    ]
    results = train_and_record(recorder, requests)
    if len(results) < len(requests):
        return
    one, two = results.values()
    apart = max(abs(b.loss / a.loss - 1) for a, b in zip(one.steps, two.steps, strict=True))
    recorder.figure("largest difference of a step's loss", apart)
    recorder.check("the same losses", apart <= _TOLERANCE, f"at most {apart:.2%} apart ({_TOLERANCE:.0%})")
    before = abs(two.trained.eval_loss_before / one.trained.eval_loss_before - 1)
    recorder.check("the same held-out loss before training", before <= _TOLERANCE, f"{before:.3%} apart")
    tokens = (one.steps[-1].tokens, two.steps[-1].tokens)
    recorder.check("as many tokens", tokens[0] == tokens[1], f"{tokens[0]:,} and {tokens[1]:,}")


def _prepared(request: Request) -> Path:
    steps = _REHEARSED_STEPS if request.rehearse else _STEPS
    overrides = {
        "data.eval_rows": _HELD_OUT,
        "training.max_steps": steps,
        "training.batch_size": _STEP_EXAMPLES // 2,
        "training.gradient_accumulation": 2,
        "training.learning_rate": 1e-3,
    }
    if not request.rehearse:
        return prepared_run(request, "two-ranks", _PRESET, overrides)
    base = random_base(request.work, rehearse=True)
    lengths = [_LENGTHS[index % len(_LENGTHS)] for index in range(_STEP_EXAMPLES * steps + _HELD_OUT)]
    return prepared_run(request, "two-ranks", _PRESET, overrides, base, lengths)


if __name__ == "__main__":
    perform(measure)
