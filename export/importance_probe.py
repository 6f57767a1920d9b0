"""The child process of ``export/importance.py``: evaluates sequences with one GGUF and sums up what its matrices see.

    python -m export.importance_probe FOLDER

reads FOLDER/request.json, prints the number of tokens done after each sequence, and writes FOLDER/imatrix.gguf. It
is a process of its own because libllama aborts on some broken files, and because the model's memory goes with it.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from export import ggml_tensor
from export.gguf_model import GgufModel
from export.importance_file import Activations, ImportanceMatrix, write_importance
from pipeline.errors import MedcotError
from pipeline.processes import end_with_parent

REQUEST_NAME = "request.json"
RESULT_NAME = "imatrix.gguf"
# Tokens evaluated together. llama.cpp holds a logit for each of them and each word of the vocabulary:
# 128 x 128,256 are 66 MB. Larger batches were not faster (SmolLM2-135M, one core).
_BATCH = 128


class Request(BaseModel):
    gguf: Path
    sequences: list[list[int]]
    datasets: list[str]
    threads: int


def main(folder: Path) -> None:
    end_with_parent()
    request = Request.model_validate_json((folder / REQUEST_NAME).read_bytes())
    ggml_tensor.check_layout()
    sums = SquareSums()
    longest = max(map(len, request.sequences))
    with GgufModel(request.gguf, n_ctx=_BATCH, n_threads=request.threads) as model:
        evaluator = _Evaluator(model, longest, request.threads, sums)
        done = 0
        try:
            for sequence in request.sequences:
                evaluator.evaluate(sequence)
                done += len(sequence)
                print(done, flush=True)
        finally:
            evaluator.close()
    write_importance(folder / RESULT_NAME, sums.result(request.datasets, longest))


class SquareSums:
    """Sums of squares of the activations by matrix, in float64 [columns], taken as llama.cpp evaluates.

    The sums of an 8B model take 10 MB. ``error`` is what a callback raised, since it cannot raise through C.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._tokens: Counter[str] = Counter()

    def callback(self, address: int, ask: bool, _: Any) -> bool:
        """``ggml_backend_sched_eval_callback``: first asked whether a result matters, then called when it is there."""
        try:
            if ask:
                return ggml_tensor.is_product(address) and self._is_wanted(ggml_tensor.at(address))
            self._add(ggml_tensor.at(address))
        except BaseException as error:
            self.error = self.error or error
            return False  # ends the evaluation
        return True

    def result(self, datasets: list[str], chunk_size: int) -> ImportanceMatrix:
        if not self._sums:
            raise MedcotError("llama.cpp evaluated the text without a product of a layer's matrix: nothing to measure.")
        for name, sums in self._sums.items():
            if not np.isfinite(sums).all():
                raise MedcotError(f"the activations before {name} are not finite: the model computes NaN or infinity.")
        return ImportanceMatrix(
            {name: Activations(sums.astype(np.float32), self._tokens[name]) for name, sums in self._sums.items()},
            tuple(datasets),
            chunk_size,
        )

    @staticmethod
    def _is_wanted(product: ggml_tensor.GgmlTensor) -> bool:
        """Matrices of layers, as llama-imatrix has it; attention's products have no weight."""
        name = ggml_tensor.weight_name(product)
        return name.startswith("blk.") and product.operands[1].contents.type == ggml_tensor.F32

    def _add(self, product: ggml_tensor.GgmlTensor) -> None:
        name = ggml_tensor.weight_name(product)
        activations = ggml_tensor.matrix(product.operands[1].contents)
        squares = np.square(activations).sum(axis=0, dtype=np.float64)
        if name in self._sums:
            self._sums[name] += squares
        else:
            self._sums[name] = squares
        self._tokens[name] += len(activations)


class _Evaluator:
    """A llama.cpp context whose evaluations call back."""

    def __init__(self, model: GgufModel, length: int, threads: int, sums: SquareSums) -> None:
        self._sums = sums
        self._path = model.path
        # Kept as an attribute: the context holds only the address.
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(sums.callback)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = length
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.cb_eval = self._callback
        self._context = llama_cpp.llama_init_from_model(model._llama.model, parameters)
        if not self._context:
            raise MedcotError(f"llama.cpp has no memory for a context of {length} tokens of {model.path}.")
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def evaluate(self, sequence: list[int]) -> None:
        """One sequence from an empty context; its activations go to the sums."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        for start in range(0, len(sequence), _BATCH):
            part = sequence[start : start + _BATCH]
            self._batch.n_tokens = len(part)
            for row, token in enumerate(part):
                self._batch.token[row] = token
                self._batch.pos[row] = start + row
                self._batch.n_seq_id[row] = 1
                self._batch.seq_id[row][0] = 0
                # llama.cpp leaves the last layer out for tokens whose logits are not wanted.
                self._batch.logits[row] = 1
            status = llama_cpp.llama_decode(self._context, self._batch)
            if self._sums.error is not None:
                raise self._sums.error
            if status != 0:
                raise MedcotError(f"llama.cpp could not evaluate tokens {start}.. of {self._path} (status {status}).")

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except MedcotError as error:
        sys.exit(str(error))
