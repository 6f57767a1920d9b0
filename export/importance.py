"""Importance matrix: which columns of each matrix the model's activations make large, on the user's own text.

    medcot export --base BASE --adapter DIR --out DIR --quant Q4_K_M --imatrix auto

A quantizer's error in column i of a matrix reaches the output multiplied with activation i, so the mean square
of that activation is the weight of the column's error (llama.cpp pull request 4861; ``tools/imatrix``). It is
measured by llama.cpp on a GGUF of the merged model: mapped from the disk, so that an 8B model needs no 16 GB.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import gguf

from export.gguf_model import check_is_gguf
from export.importance_file import ImportanceMatrix, read_importance
from export.importance_probe import REQUEST_NAME, RESULT_NAME, Request
from pipeline.config import ExportConfig
from pipeline.errors import MedcotError
from pipeline.hardware import usable_cores
from pipeline.processes import with_our_packages
from pipeline.prompts import ChatFormat, Example

# Called with the tokens done and their total.
Progress = Callable[[int, int], None]
# Enough: 1,098 tokens gained as much as 16,525 (SmolLM2-135M, Q3_K_M; LOG.md), and every token is one evaluation of
# the model, on the CPU where llama.cpp was built for it.
DEFAULT_TOKENS: int = ExportConfig.model_fields["imatrix_tokens"].default
MAX_LENGTH = 512  # tokens of one example; the rest of a longer one is left out


def training_sequences(
    chat_format: ChatFormat,
    examples: Sequence[Example],
    *,
    tokens: int = DEFAULT_TOKENS,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
) -> list[list[int]]:
    """Ids of whole examples (prompt, thought, answer) in random order until there are ``tokens`` of them.

    Each begins as a conversation does, since that is what the model will see; an example longer than
    ``max_length`` is cut there. Raises MedcotError when there is none.
    """
    order = list(examples)
    random.Random(seed).shuffle(order)
    sequences: list[list[int]] = []
    left = tokens
    for example in order:
        if left <= 0:
            break
        ids = chat_format.encode(example).input_ids[: min(max_length, left)]
        sequences.append(ids)
        left -= len(ids)
    if not sequences:
        raise MedcotError("There is no text to measure the importance matrix on: give training records.")
    return sequences


def measure_importance(
    model: Path,
    sequences: Sequence[Sequence[int]],
    datasets: Sequence[str],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ImportanceMatrix:
    """Mean squares of the activations before every matrix of ``model``'s layers over ``sequences`` of token ids.

    ``model`` is a GGUF of any type; ``datasets`` name the text in the result. Every sequence is evaluated from
    an empty context. llama.cpp runs in a child process, whose memory is the mapped model, the keys and values
    of the longest sequence and 128 rows of logits. Raises MedcotError.
    """
    check_is_gguf(model)
    if not sequences or not all(sequences):
        raise MedcotError("An importance matrix needs at least one sequence, and each at least one token.")
    request = Request(
        gguf=model.absolute(),
        sequences=[list(sequence) for sequence in sequences],
        datasets=list(datasets),
        threads=threads or usable_cores(),
    )
    with tempfile.TemporaryDirectory(prefix="medcot-imatrix-") as folder:
        (Path(folder) / REQUEST_NAME).write_text(request.model_dump_json(), encoding="utf-8")
        _run_probe(Path(folder), model, sum(map(len, sequences)), progress or (lambda done, total: None))
        result = replace(read_importance(Path(folder) / RESULT_NAME), path=None)
    # Proves that names and widths were read from the right places of llama.cpp's memory.
    result.check_fits(_tensor_shapes(model))
    return result


def _run_probe(folder: Path, model: Path, total: int, progress: Progress) -> None:
    with (
        # A pipe that nobody reads while the other one is read would block the child.
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            [sys.executable, "-m", "export.importance_probe", str(folder)],
            env=with_our_packages(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        ) as child,
    ):
        try:
            progress(0, total)
            assert child.stdout is not None
            for line in child.stdout:
                progress(int(line), total)
        except BaseException:
            child.kill()
            raise
        status = child.wait()
        if status:
            last = _last_line(complaints)
            reason = f"llama.cpp died (signal {-status}): {last}" if status < 0 else last
            raise MedcotError(f"The importance matrix of {model} cannot be measured: {reason}")


def _last_line(stream: BinaryIO) -> str:
    stream.seek(0)
    lines = stream.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _tensor_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    return {
        tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in gguf.GGUFReader(model).tensors
    }
