"""What the parts train on where no real model or data can be: models of random weights, rows of a set length."""

from __future__ import annotations

import fcntl
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from part import Request

from pipeline.base_model import load_chat_format
from pipeline.config import Config, load_config
from pipeline.errors import MedcotError
from pipeline.prompts import ChatFormat, Example
from pipeline.run import run

if TYPE_CHECKING:
    from transformers import LlamaConfig

Kind = Literal["r1-nf4", "r1-16-bit", "tinyllama"]
_WORDS = ("fever", "pain", "cough", "renal", "acute", "chronic", "dose", "pressure", "lesion", "biopsy", "onset")
_FINISHED = "finished"


def random_base(work: Path, rehearse: bool, kind: Kind = "r1-nf4") -> Path:
    """Folder of a model with random weights, made once in ``work``.

    It has R1-Distill-Llama-8B's shape in NF4 or, with the same weights, in 16 bit, or TinyLlama-1.1B's in 16 bit.

    It is made where a GPU is, a layer at a time; another process that asks meanwhile waits. In a rehearsal it is a
    model of two narrow layers in the same proportions.
    """
    folder = work / f"random-{kind}"
    with (work / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _FINISHED).is_file():
            import torch
            from random_checkpoint import save_base, save_tokenizer

            device = "cuda" if torch.cuda.is_available() else "cpu"
            config = _shape(kind, rehearse)
            save_base(folder, config, nf4=kind == "r1-nf4", device=device)
            save_tokenizer(folder, config.vocab_size)
            (folder / _FINISHED).touch()
    return folder


def _shape(kind: Kind, rehearse: bool) -> LlamaConfig:
    from random_checkpoint import configuration
    from transformers import LlamaConfig

    if kind != "tinyllama":
        return configuration(2, hidden=512, vocabulary=512) if rehearse else configuration(32)
    return LlamaConfig(
        vocab_size=512 if rehearse else 32000,
        hidden_size=256 if rehearse else 2048,
        intermediate_size=704 if rehearse else 5632,
        num_hidden_layers=2 if rehearse else 22,
        num_attention_heads=4 if rehearse else 32,
        num_key_value_heads=1 if rehearse else 4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def prepared_run(
    request: Request,
    name: str,
    preset: str,
    overrides: Mapping[str, object],
    base: Path | None = None,
    lengths: Sequence[int] = (),
) -> Path:
    """A run of ``preset`` whose prepare stage is finished, made once: on its own base and records, or on ``base`` and
    records of these token lengths, of which the last ``data.eval_rows`` are held out.

    Every step is logged.
    """
    folder = request.work / name
    run_dir = folder / "run"
    if run_dir.is_dir():
        return run_dir
    folder.mkdir()
    settings: dict[str, object] = {
        "training.checkpoint_steps": 10_000,
        "training.logging_steps": 1,
        "training.processes": 1,
        "training.report_to": "none",
        **overrides,
    }
    if base is not None:
        settings |= {
            "model.base": base,
            "data.source": folder / "rows.jsonl",
            "data.config": "null",
            "data.limit": "null",
            "data.train_rows": "null",
            "data.shuffle": "false",
            "data.duplicates": "keep",
            "data.leakage": "keep",
        }
    config = load_config(preset, [f"{key}={value}" for key, value in settings.items()])
    if base is not None:
        write_rows(folder / "rows.jsonl", config, base, lengths)
    run(config, run_dir, until="prepare", plan_first=False)
    return run_dir


def write_rows(path: Path, config: Config, base: Path, lengths: Sequence[int]) -> Path:
    """A record of exactly so many tokens for each of ``lengths``, in ``base``'s format and ``config``'s columns."""
    chat_format = load_chat_format(base, config.prompt.system)
    columns = config.data.columns
    generator = random.Random(len(lengths))
    with path.open("w", encoding="utf-8") as stream:
        for tokens in lengths:
            example = _example(chat_format, generator, tokens, reasons=columns.reasoning is not None)
            row: dict[str, str | None] = {columns.question: example.question, columns.answer: example.answer}
            if columns.reasoning is not None:
                row[columns.reasoning] = example.reasoning
            stream.write(json.dumps(row) + "\n")
    return path


def _example(chat_format: ChatFormat, generator: random.Random, tokens: int, reasons: bool) -> Example:
    """The vocabulary of random_checkpoint.py has a token for each letter, so a length is made by adding letters."""

    def text(letters: int) -> str:
        written = ""
        while len(written) < letters:
            written += generator.choice(_WORDS) + " "
        return written[: letters - 1] + "."

    question, reasoning = text(tokens // 4), text(tokens // 4) if reasons else None
    fixed = len(chat_format.encode(Example(question, reasoning, "x")).input_ids) - 1
    example = Example(question, reasoning, text(max(1, tokens - fixed)))
    found = len(chat_format.encode(example).input_ids)
    if found != tokens:
        raise MedcotError(f"A record of {tokens} tokens came out with {found}: the format takes more.")
    return example
