"""Trains a few steps in one of three ways in a process of its own: a JSON request comes in, a JSON result goes out.

    python -m bench.training_probe < request.json

``medcot`` is the train stage. ``unsloth`` calls Unsloth as its notebooks do, ``trl`` is plain TRL + PEFT
(https://github.com/unslothai/notebooks, https://huggingface.co/docs/trl/sft_trainer); both get the stage's own
arguments, token ids and labels.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from bench.turns import wait_for_turns
from pipeline.base_model import load_tokenizer, local_base
from pipeline.config import Config
from pipeline.hardware import compute_dtype, detect
from pipeline.memory import peak_memory_bytes
from pipeline.prepare import TRAIN_FILE, load_examples
from pipeline.processes import run_as_child
from pipeline.prompts import ChatFormat
from pipeline.run import load_run_config, stage_inputs, stage_named
from pipeline.training.lora_model import adapter_in_float32, import_unsloth
from pipeline.vocabulary import TransformersVocabulary

Way = Literal["medcot", "unsloth", "trl"]


class TrainingRequest(BaseModel):
    """``run_dir`` holds a finished prepare stage, ``out_dir`` is where this training writes, result.json included.

    ``turn`` are the two open descriptors of bench/turns.py, where this training takes turns with others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    way: Way
    run_dir: Path
    out_dir: Path
    turn: tuple[int, int] | None = None


class TimedSteps(BaseModel):
    """Of each optimizer step its loss (nats per token) and the seconds since training began when it was logged.

    Where the training took turns with others the seconds are its own, up to each step's end.
    ``tokens`` counts the tokens up to each step, padding left out; the way that does not count them has none.
    ``peak_gpu_bytes`` is what PyTorch had allocated at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    way: Way
    seconds: list[float]
    losses: list[float]
    tokens: list[int]
    peak_memory_bytes: int
    peak_gpu_bytes: int


RESULT_NAME = "result.json"


def measure(request: TrainingRequest) -> TimedSteps:
    train = {"medcot": _train_stage, "unsloth": _train_with_unsloth, "trl": _train_with_trl}[request.way]
    if request.way != "trl":
        import_unsloth(request.out_dir / "unsloth")
    own_seconds = None if request.turn is None else wait_for_turns(*request.turn)
    rows = train(load_run_config(request.run_dir), request.run_dir, request.out_dir)
    import torch

    return TimedSteps(
        way=request.way,
        seconds=[row["seconds"] for row in rows] if own_seconds is None else list(itertools.accumulate(own_seconds)),
        losses=[row["loss"] for row in rows],
        tokens=[row["tokens"] for row in rows if "tokens" in row],
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    )


def _train_stage(config: Config, run_dir: Path, out_dir: Path) -> list[dict[str, Any]]:
    from pipeline.train import METRICS_FILE

    stage = stage_named("train")
    stage.load()(config, stage_inputs(stage, run_dir), out_dir)
    rows = [json.loads(line) for line in (out_dir / METRICS_FILE).read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def _train_with_unsloth(config: Config, run_dir: Path, out_dir: Path) -> list[dict[str, Any]]:
    import torch
    from unsloth import FastLanguageModel

    checkpointing: bool | str = "unsloth" if config.training.gradient_checkpointing is not False else False
    model, _ = FastLanguageModel.from_pretrained(
        str(local_base(config.model.base, config.model.revision)),
        max_seq_length=config.model.max_seq_length,
        dtype=getattr(torch, _dtype(config, out_dir)),
        load_in_4bit=config.model.load_in_4bit,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        use_gradient_checkpointing=checkpointing,
        random_state=config.seed,
    )
    return _train(model, config, run_dir, out_dir)


def _train_with_trl(config: Config, run_dir: Path, out_dir: Path) -> list[dict[str, Any]]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, _dtype(config, out_dir))
    model = AutoModelForCausalLM.from_pretrained(
        local_base(config.model.base, config.model.revision),
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        if config.model.load_in_4bit
        else None,
    )
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        task_type="CAUSAL_LM",
    )
    return _train(model, config, run_dir, out_dir, peft_config=lora)


def _train(model: Any, config: Config, run_dir: Path, out_dir: Path, **trainer_settings: Any) -> list[dict[str, Any]]:
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from pipeline.training.arguments import trainer_arguments

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[dict[str, Any]] = []
            self.started = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:
                self.rows.append({"seconds": time.monotonic() - self.started, "loss": float(logs["loss"])})

    tokenizer = load_tokenizer(local_base(config.model.base, config.model.revision))
    chat_format = ChatFormat(tokenizer.chat_template, TransformersVocabulary(tokenizer), config.prompt.system)
    examples = load_examples(stage_inputs(stage_named("train"), run_dir)["prepare"] / TRAIN_FILE)
    encoded = (chat_format.encode(example, config.truncated_at) for example in examples)
    rows = [
        {"input_ids": row.input_ids, "labels": row.labels, "attention_mask": [1] * len(row.input_ids)}
        for row in encoded
    ]
    clock = Clock()
    ours = trainer_arguments(config, out_dir / "checkpoints", _dtype(config, out_dir), model.device.type == "cpu")
    if "unsloth" not in sys.modules and model.device.type == "cpu":
        # TRL 1.15's own loss needs Triton, which is not there on a CPU; this is the model's, from all logits.
        SFTTrainer.compute_loss = Trainer.compute_loss
        ours["optim"] = "adamw_torch_fused"  # what Unsloth puts in place of 8-bit optimizers there
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**ours),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[clock],
        **trainer_settings,
    )
    if ours["fp16"]:
        adapter_in_float32(trainer.model)  # TRL makes it bfloat16, which float16's GradScaler cannot take
    trainer.train()
    return clock.rows


def _dtype(config: Config, out_dir: Path) -> str:
    return compute_dtype(config.model.dtype, detect(out_dir)).value


def _work(request: TrainingRequest) -> None:
    result = measure(request)
    (request.out_dir / RESULT_NAME).write_text(result.model_dump_json())


if __name__ == "__main__":
    os.environ["MEDCOT_DEBUG"] = "1"  # what goes wrong in a comparison is for whoever made it
    asked = TrainingRequest.model_validate_json(sys.stdin.read())
    sys.exit(run_as_child(f"training by {asked.way}", asked.out_dir, lambda: _work(asked)))
