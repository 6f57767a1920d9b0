"""What the parts train on where no real model or data can be: random weights in R1-8B's shape, rows of a set length."""

from __future__ import annotations

import fcntl
import json
import random
from pathlib import Path

from pipeline.base_model import load_chat_format
from pipeline.errors import MedcotError
from pipeline.prompts import ChatFormat, Example

_WORDS = ("fever", "pain", "cough", "renal", "acute", "chronic", "dose", "pressure", "lesion", "biopsy", "onset")
_FINISHED = "finished"


def random_base(work: Path, rehearse: bool) -> Path:
    """Folder of a model with random weights in NF4, in DeepSeek-R1-Distill-Llama-8B's shape; made once in ``work``.

    It is made where a GPU is, a layer at a time; another process that asks meanwhile waits. In a rehearsal it is a
    model of two narrow layers in the same proportions.
    """
    folder = work / "random-base"
    with (work / "random-base.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _FINISHED).is_file():
            import torch
            from random_checkpoint import configuration, save_base, save_tokenizer

            device = "cuda" if torch.cuda.is_available() else "cpu"
            config = configuration(2, hidden=512, vocabulary=512) if rehearse else configuration(32)
            save_base(folder, config, nf4=True, device=device)
            save_tokenizer(folder, config.vocab_size)
            (folder / _FINISHED).touch()
    return folder


def write_rows(path: Path, base: Path, tokens: int, count: int) -> Path:
    """``count`` records of exactly ``tokens`` tokens each in ``base``'s format, a quarter of them the question."""
    chat_format = load_chat_format(base)
    generator = random.Random(tokens)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            example = _example(chat_format, generator, tokens)
            row = {"Question": example.question, "Complex_CoT": example.reasoning, "Response": example.answer}
            stream.write(json.dumps(row) + "\n")
    return path


def _example(chat_format: ChatFormat, generator: random.Random, tokens: int) -> Example:
    """The vocabulary of random_checkpoint.py has a token for each letter, so a length is made by adding letters."""

    def text(letters: int) -> str:
        written = ""
        while len(written) < letters:
            written += generator.choice(_WORDS) + " "
        return written[: letters - 1] + "."

    question, reasoning = text(tokens // 4), text(tokens // 4)
    fixed = len(chat_format.encode(Example(question, reasoning, "x")).input_ids) - 1
    example = Example(question, reasoning, text(max(1, tokens - fixed)))
    found = len(chat_format.encode(example).input_ids)
    if found != tokens:
        raise MedcotError(f"A record of {tokens} tokens came out with {found}: the format takes more.")
    return example
