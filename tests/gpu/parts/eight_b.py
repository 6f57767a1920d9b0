"""An 8B base through every stage of the reference preset, each next to what the plan expected: a call of its own.

The base is random, in NF4; the GPU is the one that is here.
"""

from __future__ import annotations

import random

from cuda_llama import built_folder, put_on_path
from part import Recorder, medcot, perform, run, settings
from plan_check import record_plan
from synthetic import random_base, write_rows

from pipeline.config import load_config
from pipeline.run import STAGES

_PRESET = "deepseek-r1-8b"
_SHORTEST, _LONGEST = 400, 1400
_STEPS = 10
_HELD_OUT = 6
# A model that has learned nothing meets no gate, and its near ties fall either way.
_LEARNED_NOTHING = {"verify.min_top1_agreement": 0.5, "verify.max_logit_nmse": 0.01, "evaluation.gates": "{}"}
_REHEARSAL = {
    "export.imatrix": "none",
    "verify.prompts": 1,
    "evaluation.rows": 2,
    "evaluation.max_new_tokens": 4,
    "bench.repeats": 1,
    "bench.prompt_tokens": 16,
    "bench.generated_tokens": 4,
    "bench.quality_records": 0,
}
_SHORT = {
    "export.imatrix": "none",
    "verify.prompts": 1,
    "evaluation.rows": 6,
    "evaluation.max_new_tokens": 200,
    "bench.repeats": 3,
    "bench.generated_tokens": 64,
    "bench.quality_records": 1,
}


def measure(recorder: Recorder) -> None:
    request = recorder.request
    if built_folder(request).is_dir():
        put_on_path(request)
    base = random_base(request.work, request.rehearse)
    generator = random.Random(0)
    shortest, longest = (100, 160) if request.rehearse else (_SHORTEST, _LONGEST)
    steps = 2 if request.rehearse else _STEPS
    config = load_config(_PRESET)
    lengths = [generator.randint(shortest, longest) for _ in range(config.training.effective_batch * steps + _HELD_OUT)]
    rows = write_rows(request.work / "eight-b-rows.jsonl", config, base, lengths)
    overrides: dict[str, object] = {
        "model.base": base,
        "data.source": rows,
        "data.config": "null",
        "data.limit": "null",
        "data.train_rows": "null",
        "data.duplicates": "keep",
        "data.leakage": "keep",
        "data.eval_rows": _HELD_OUT,
        "training.max_steps": steps,
        "training.report_to": "none",
        **_LEARNED_NOTHING,
        **(_REHEARSAL if request.rehearse else _SHORT),
    }
    run_dir = request.work / "eight-b"
    status = run(medcot("run", _PRESET, "--run-dir", str(run_dir), *settings(overrides)))
    record_plan(recorder, run_dir, gpu_to_itself=True)
    recorder.check("every stage", status == 0, f"exit status {status}")
    finished = [stage.name for stage in STAGES if (run_dir / stage.folder / "manifest.json").is_file()]
    recorder.check("an artifact of every stage", len(finished) == len(STAGES), ", ".join(finished))


if __name__ == "__main__":
    perform(measure)
