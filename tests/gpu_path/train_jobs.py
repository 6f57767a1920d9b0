"""Trains on the emulated GPU: ``python train_jobs.py JOBS.json``; the train stage, in forks of one process.

JOBS.json holds chains of jobs (conftest.py makes them): a chain's jobs follow each other, two chains run at a time.
Under torchrun it holds one job, and every process of torchrun's trains it. A job leaves in its ``out`` the adapter,
the weights that it began with (``untrained.safetensors``) and ``result.json``, next to it a log and the exit status.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from emulated_gpu import autocast_in_float16, import_unsloth_for_cuda
from safetensors.torch import save_file

from pipeline import ranks
from pipeline.artifacts import write_json
from pipeline.config import Config, load_config
from pipeline.processes import end_with_parent, run_as_child

AT_ONCE = 2


def perform(job: dict[str, Any]) -> int:
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    if ranks.is_first():
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
    return run_as_child("train", out, lambda: _train(job, out))


def _train(job: dict[str, Any], out: Path) -> None:
    import pipeline.train
    from pipeline.training import trainer as trainer_module
    from pipeline.training.lora_model import adapter_weights

    if job.get("scale"):
        autocast_in_float16(job["scale"], growth_interval=2)
    load = plain_lora_model if job.get("plain") else pipeline.train.load_lora_model

    def load_and_keep(*given: Any) -> Any:
        model = load(*given)
        if ranks.is_first() and not (out / "untrained.safetensors").exists():
            save_file(adapter_weights(model), out / "untrained.safetensors")
        return model

    pipeline.train.load_lora_model = load_and_keep
    norm_of = trainer_module.AdapterTrainer._get_grad_norm

    def grad_norm(trainer: Any, *given: Any, **named: Any) -> Any:
        norm = norm_of(trainer, *given, **named)
        if trainer.state.global_step + 1 == job.get("killed_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        return norm

    trainer_module.AdapterTrainer._get_grad_norm = grad_norm
    ranks.join_group()
    config = load_config(None, job["settings"])
    result = pipeline.train.train(config, {"prepare": Path(job["data"])}, out)
    if ranks.is_first():
        write_json(out / "result.json", result.model_dump(mode="json"))
    ranks.leave_group()


def plain_lora_model(config: Config, base: Path, dtype: str) -> Any:
    """transformers and peft without Unsloth's kernels, which take seconds a row in Triton's interpreter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(config.seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False),
        LoraConfig(r=config.lora.r, target_modules=list(config.lora.target_modules), task_type="CAUSAL_LM"),
    )
    # What Unsloth's trainer finds on a model that Unsloth has loaded.
    model.max_seq_length = config.model.max_seq_length
    model.for_training = lambda use_gradient_checkpointing=None: model.train()
    model.for_inference = model.eval
    return model


def run_chains(chains: list[list[dict[str, Any]]]) -> None:
    running: set[int] = set()
    for chain in chains:
        if len(running) == AT_ONCE:
            running.discard(os.wait()[0])
        pid = os.fork()
        if pid == 0:
            end_with_parent()
            _run_chain(chain)
            os._exit(0)
        running.add(pid)
    for pid in running:
        os.waitpid(pid, 0)


def _run_chain(chain: list[dict[str, Any]]) -> None:
    for job in chain:
        pid = os.fork()
        if pid == 0:
            os._exit(perform(job))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out = Path(job["out"])
        out.with_suffix(".status").write_text(str(status))
        if job.get("killed_at"):
            out.with_suffix(".log").rename(out.with_suffix(".killed.log"))
            out.with_suffix(".status").rename(out.with_suffix(".killed.status"))


if __name__ == "__main__":
    chains = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    import_unsloth_for_cuda(Path(sys.argv[1]).with_suffix(f".generated{ranks.rank()}"))
    import pipeline.training.trainer  # noqa: F401  (before the forks)

    if ranks.world_size() > 1:
        sys.exit(perform(chains[0][0]))
    run_chains(chains)
