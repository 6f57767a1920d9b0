"""Preflight: what a run would do, whether it can, and proof that the reasoning is in the labels.

    medcot plan smollm2-cpu

A first cut: steps and tokens are exact, disk and memory are lower bounds from the model's size; times are not
estimated yet.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.base_model import load_tokenizer, local_base
from pipeline.config import Config
from pipeline.hardware import GIBIBYTE, compute_dtype, detect
from pipeline.prepare import distribution, select
from pipeline.prompts import IGNORED_LABEL, ChatFormat, Example
from pipeline.results import Distribution
from pipeline.vocabulary import TransformersVocabulary

BYTES_16_BIT = 2.0
BYTES_4_BIT = 0.56  # NF4 with its double-quantized scales
OPTIMIZER_BYTES_PER_TRAINED = 16.0  # 32-bit weight, gradient and two moments


class Fragment(BaseModel):
    """A stretch of the example that is wholly inside or outside the loss."""

    model_config = ConfigDict(frozen=True)
    text: str
    in_loss: bool


class Plan(BaseModel):
    """What ``medcot plan`` found; ``problems`` is empty when the run can start."""

    model_config = ConfigDict(frozen=True)
    name: str
    machine: str
    dtype: str
    dtype_reason: str
    usable_records: int
    rejected_records: int
    train_rows: int
    steps: int
    tokens_per_example: Distribution
    tokens_trained: int
    parameters: int
    memory_needed_bytes: int
    memory_available_bytes: int
    disk_needed_bytes: int
    disk_free_bytes: int
    example: list[Fragment]
    verdict: str
    problems: list[str]


def make_plan(config: Config) -> Plan:
    """Look at data, model and machine without training; raises MedcotError where they cannot be read."""
    base = local_base(config.model.base, config.model.revision, weights=False)
    tokenizer = load_tokenizer(base)
    vocabulary = TransformersVocabulary(tokenizer)
    chat_format = ChatFormat(tokenizer.chat_template, vocabulary, config.prompt.system)
    records, rejects = select(config, chat_format)
    hardware = detect(Path.cwd())
    dtype = compute_dtype(config.model.dtype, hardware)
    available = max(len(records) - config.data.eval_rows, 0)
    train_rows = available if config.data.train_rows is None else min(available, config.data.train_rows)
    batch = config.training.batch_size * config.training.gradient_accumulation
    steps = config.training.max_steps or math.ceil(config.training.epochs * math.ceil(train_rows / batch))
    tokens = distribution([record.tokens for record in records] or [0])
    parameters, trained = _parameters(json.loads((base / "config.json").read_text()), config)
    weights = parameters * (BYTES_4_BIT if config.model.load_in_4bit else BYTES_16_BIT)
    memory_needed = int(weights + trained * OPTIMIZER_BYTES_PER_TRAINED)
    memory_available = hardware.gpu_memory_bytes or hardware.available_memory_bytes
    # The 16-bit GGUF is the largest file, the shipped one and the base's of its type come on top.
    disk_needed = int(parameters * (BYTES_16_BIT + 2 * 0.61) + trained * OPTIMIZER_BYTES_PER_TRAINED)
    problems = []
    if train_rows < 1:
        problems.append(
            f"{config.data.source} has {len(records)} usable records and data.eval_rows holds out "
            f"{config.data.eval_rows}: lower data.eval_rows"
        )
    if memory_needed > memory_available:
        problems.append(
            f"the model needs at least {memory_needed / GIBIBYTE:.1f} GiB and {memory_available / GIBIBYTE:.1f} are "
            "there: set model.load_in_4bit=true or choose a smaller model.base"
        )
    if disk_needed > hardware.free_disk_bytes:
        problems.append(
            f"the run writes about {disk_needed / GIBIBYTE:.1f} GiB and {hardware.free_disk_bytes / GIBIBYTE:.1f} are "
            "free: leave F16 out of export.quantizations or free some space"
        )
    fragments: list[Fragment] = []
    verdict = "no usable record to show"
    if records:
        fragments = loss_mask(chat_format, vocabulary, records[0].example)
        faults = [fault for record in records if (fault := label_fault(chat_format, vocabulary, record.example))]
        verdict = (
            f"reasoning, answer and end of turn are in the loss of all {len(records)} records"
            if not faults
            else f"{len(faults)} of {len(records)} records: {faults[0]}"
        )
        problems += faults[:1]
    return Plan(
        name=config.name,
        machine=", ".join(hardware.gpu_names) or f"{hardware.cpu}, {hardware.cores} cores",
        dtype=dtype.value,
        dtype_reason=dtype.reason,
        usable_records=len(records),
        rejected_records=len(rejects),
        train_rows=train_rows,
        steps=steps,
        tokens_per_example=tokens,
        tokens_trained=round(steps * batch * tokens.median),
        parameters=parameters,
        memory_needed_bytes=memory_needed,
        memory_available_bytes=memory_available,
        disk_needed_bytes=disk_needed,
        disk_free_bytes=hardware.free_disk_bytes,
        example=fragments,
        verdict=verdict,
        problems=problems,
    )


def loss_mask(chat_format: ChatFormat, vocabulary: TransformersVocabulary, example: Example) -> list[Fragment]:
    """The example's text in two fragments: the prompt outside the loss, the completion inside."""
    encoded = chat_format.encode(example)
    masked = encoded.labels.count(IGNORED_LABEL)
    prompt = vocabulary.decode(encoded.input_ids[:masked])
    completion = vocabulary.decode(encoded.completion_ids)
    return [Fragment(text=prompt, in_loss=False), Fragment(text=completion, in_loss=True)]


def label_fault(chat_format: ChatFormat, vocabulary: TransformersVocabulary, example: Example) -> str | None:
    """What of the example the loss would not see, as the decoded labels show it; None when all is there."""
    labelled = vocabulary.decode(chat_format.encode(example).completion_ids)
    if labelled != chat_format.completion_text(example):
        return f"the labels say {labelled!r:.120} instead of the completion"
    return None


def print_plan(plan: Plan) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    rows = {
        "machine": plan.machine,
        "computation": f"{plan.dtype}: {plan.dtype_reason}",
        "records": f"{plan.usable_records} usable, {plan.rejected_records} rejected, {plan.train_rows} to train on",
        "tokens": f"{plan.tokens_per_example.median:.0f} an example (longest {plan.tokens_per_example.maximum:.0f})",
        "training": f"{plan.steps} steps, about {plan.tokens_trained:,} tokens",
        "parameters": f"{plan.parameters:,}",
        "memory": _needed(plan.memory_needed_bytes, plan.memory_available_bytes),
        "disk": _needed(plan.disk_needed_bytes, plan.disk_free_bytes),
        "labels": plan.verdict,
    }
    for name, value in rows.items():
        console.print(f"{name:12} {value}", markup=False)
    if plan.example:
        console.print("\nOne example; what the loss sees is green:")
        text = Text()
        for fragment in plan.example:
            text.append(fragment.text, style="green" if fragment.in_loss else "dim")
        console.print(text)


def _needed(needed: int, available: int) -> str:
    return f"at least {needed / GIBIBYTE:.1f} GiB of {available / GIBIBYTE:.1f} GiB"


def _parameters(architecture: dict[str, Any], config: Config) -> tuple[int, int]:
    """(all, trained by LoRA) parameters of a Llama-shaped model, from its config.json."""
    hidden = architecture["hidden_size"]
    feed_forward = architecture["intermediate_size"]
    layers = architecture["num_hidden_layers"]
    heads = architecture["num_attention_heads"]
    head_dim = architecture.get("head_dim") or hidden // heads
    kv = head_dim * architecture.get("num_key_value_heads", heads)
    query = head_dim * heads
    shapes = {
        "q_proj": (hidden, query),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, feed_forward),
        "up_proj": (hidden, feed_forward),
        "down_proj": (feed_forward, hidden),
    }
    per_layer = sum(rows * columns for rows, columns in shapes.values()) + 2 * hidden
    embeddings = architecture["vocab_size"] * hidden * (1 if architecture.get("tie_word_embeddings") else 2)
    trained = sum(sum(shapes[name]) * config.lora.r for name in config.lora.target_modules if name in shapes)
    return layers * per_layer + embeddings + hidden, layers * trained
