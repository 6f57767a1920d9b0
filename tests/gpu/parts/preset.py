"""The embedded preset from data to report on the GPU, with the gates that it has on a CPU."""

from __future__ import annotations

from pathlib import Path

from part import Recorder, medcot, perform, run, settings
from plan_check import record_plan
from synthetic import random_base, write_rows

from pipeline.artifacts import Artifact, read_manifest
from pipeline.config import load_config
from pipeline.results import Evaluation, TrainedAdapter, Verification
from pipeline.run import stage_named

# A model that has learned nothing meets no gate, and its near ties fall either way.
_REHEARSAL = {
    "data.eval_rows": 2,
    "training.max_steps": 3,
    "training.checkpoint_steps": 2,
    "export.imatrix": "none",
    "verify.prompts": 1,
    "verify.min_top1_agreement": 0.5,
    "verify.max_logit_nmse": 0.01,
    "evaluation.rows": 2,
    "evaluation.max_new_tokens": 4,
    "evaluation.gates": "{}",
}


def measure(recorder: Recorder) -> None:
    request = recorder.request
    run_dir = request.work / "preset"
    overrides: dict[str, object] = {"training.report_to": "none"}
    if request.rehearse:
        base = random_base(request.work, rehearse=True)
        rows = write_rows(request.work / "preset-rows.jsonl", load_config("smollm2-cpu"), base, [120] * 12)
        overrides |= {**_REHEARSAL, "model.base": base, "data.source": rows, "data.duplicates": "keep"}
        overrides |= {"data.leakage": "keep"}
    command = medcot("run", "smollm2-cpu", "--run-dir", str(run_dir), *settings(overrides))
    # What comes after the gates has nothing of a GPU's to rehearse.
    status = run([*command, "--until", "evaluate"] if request.rehearse else command)
    recorder.check("every stage and every gate of the preset", status == 0, f"exit status {status}")
    record_plan(recorder, run_dir)
    _training(recorder, run_dir)
    if read_manifest(run_dir / stage_named("verify").folder) is not None:
        verified = Artifact.load(run_dir / stage_named("verify").folder, Verification).result
        recorder.figure("logit error (NMSE)", verified.logit_nmse or 0.0)
    if read_manifest(run_dir / stage_named("evaluate").folder) is not None:
        for model in Artifact.load(run_dir / stage_named("evaluate").folder, Evaluation).result.models:
            recorder.figure(f"in the form, {model.role}", model.well_formed.value)


def _training(recorder: Recorder, run_dir: Path) -> None:
    folder = run_dir / stage_named("train").folder
    if read_manifest(folder) is None:
        return
    trained = Artifact.load(folder, TrainedAdapter).result
    if not recorder.request.rehearse:
        import torch

        name = torch.cuda.get_device_name(0)
        recorder.check("training was on the GPU", name in trained.device, f"{trained.device}, {trained.dtype}")
        wanted = "bfloat16" if torch.cuda.get_device_capability(0) >= (8, 0) else "float16"
        recorder.check("computation type", trained.dtype == wanted, f"{trained.dtype}, {wanted} is native")
    recorder.check(
        "held-out loss falls",
        trained.eval_loss_after < trained.eval_loss_before or recorder.request.rehearse,
        f"{trained.eval_loss_before:.3f} to {trained.eval_loss_after:.3f}",
    )
    recorder.figure("training", trained.tokens_per_second, "tokens/s")


if __name__ == "__main__":
    perform(measure)
