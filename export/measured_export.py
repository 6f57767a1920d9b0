"""Export under ``--imatrix auto|none|FILE``; ``auto`` exports once to measure the matrix, then with it.

The first file is a Q4_K_M made without an importance matrix. It is measured and removed before the real files are
written, so the disk never holds both. Measuring on it instead of on a 16-bit file, three times as large, changes the
importance matrix no more than other text does (LOG.md).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from export.ggml import IGNORES_IMPORTANCE
from export.importance import DEFAULT_TOKENS, Progress, measure_importance, training_sequences
from export.importance_file import AUTO, NONE, ImportanceMatrix, read_importance, write_importance
from export.quant_types import file_type
from pipeline.adapter_recipe import read_recipe
from pipeline.artifacts import sha256_json
from pipeline.errors import MedcotError
from pipeline.file_lock import try_lock
from pipeline.results import ExportedModels

_MEASURED_TYPE = "Q4_K_M"
_SCRATCH_NAME = ".imatrix"
_SAMPLE_CASES = 1000  # more than there are


@dataclass(frozen=True)
class MeasuringText:
    """Token ids to measure on, and the name of where they come from."""

    sequences: list[list[int]]
    dataset: str


class Exporter(Protocol):
    """``export_models`` with everything given but this."""

    def __call__(
        self,
        out_dir: Path,
        quantizations: Sequence[str],
        base_quantization: str | None,
        importance: ImportanceMatrix | None,
    ) -> ExportedModels: ...


def export_with_imatrix(
    imatrix: str,
    export: Exporter,
    out_dir: Path,
    name: str,
    quantizations: Sequence[str],
    base_quantization: str | None,
    text: Callable[[], MeasuringText],
    model: Callable[[], str],
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> ExportedModels:
    """Export as ``imatrix`` says: ``auto`` measures on ``text()``, ``none`` does without, anything else is a file.

    What ``auto`` measured is stored as ``<name>.imatrix.gguf`` beside the files and taken from there when the same
    ``model()`` (its fingerprint) is exported again with the same text; where no wanted type has a use for it, nothing
    is measured. The base's file is quantized with the tuned model's matrix, so that the two differ by the training
    alone. Raises MedcotError.
    """
    if imatrix != AUTO:
        importance = None if imatrix == NONE else read_importance(Path(imatrix))
        return export(out_dir, quantizations, base_quantization, importance)
    wanted = {file_type(each).default for each in (*quantizations, *filter(None, [base_quantization]))}
    if wanted <= IGNORES_IMPORTANCE:
        return export(out_dir, quantizations, base_quantization, None)
    path = out_dir / f"{name}.imatrix.gguf"
    chosen = text()
    made_of = sha256_json([model(), chosen.sequences, chosen.dataset])
    importance = _measured_before(path, made_of)
    if importance is None:
        with _scratch(out_dir / _SCRATCH_NAME) as scratch:
            first = export(scratch, [_MEASURED_TYPE], None, None)
            measured = measure_importance(scratch / first.ship, chosen.sequences, [chosen.dataset], progress=progress)
        importance = write_importance(path, replace(measured, measured_from=made_of))
    else:
        announce(f"The importance matrix in {path} is of this model and text: taken as it is.")
    return export(out_dir, quantizations, base_quantization, importance)


def measuring_text(
    tokenizer: Path, records: Path | None, system: str | None = None, *, tokens: int = DEFAULT_TOKENS
) -> MeasuringText:
    """So many tokens of ``records`` (a train.jsonl of the prepare stage), else of the packaged cases.

    ``tokenizer`` is the folder whose tokenizer and chat template trained, and whose medcot.json gives the system
    prompt where ``system`` is None.
    """
    from pipeline.base_model import load_chat_format
    from pipeline.prepare import load_examples
    from pipeline.sources import sample_examples

    examples = sample_examples(_SAMPLE_CASES) if records is None else load_examples(records)
    recipe = read_recipe(tokenizer)
    system = recipe.system if system is None and recipe else system
    sequences = training_sequences(load_chat_format(tokenizer, system), examples, tokens=tokens)
    return MeasuringText(sequences, records.name if records else "medcot's packaged cases")


def _measured_before(path: Path, made_of: str) -> ImportanceMatrix | None:
    """What an earlier, perhaps interrupted, export measured; None where it is of something else or cannot be read."""
    with suppress(MedcotError):
        found = read_importance(path)
        if found.measured_from == made_of:
            return found
    return None


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder of one export at a time, which is gone afterwards; MedcotError where another one holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise MedcotError(f"{folder} cannot be written: {error.strerror}.") from error
    try:
        if not try_lock(descriptor):
            raise MedcotError(
                f"Another export is measuring in {folder.parent}: wait until it is done or choose another folder."
            )
        _empty(folder)  # a killed export's
        try:
            yield folder
        finally:
            _empty(folder)
            folder.rmdir()
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    try:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise MedcotError(f"{folder} cannot be emptied: {error.strerror}; delete it yourself.") from error
