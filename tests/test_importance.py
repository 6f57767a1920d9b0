"""The importance matrix: measured as transformers computes it, stored and used as llama.cpp does."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from tiny_models import read_metadata, read_tensors, save_model, tensor_bytes
from transformers import LlamaForCausalLM

from export import ggml_tensor
from export.export import export_models
from export.ggml import IGNORES_IMPORTANCE
from export.gguf_model import GgufModel
from export.importance import measure_importance, training_sequences
from export.importance_file import Activations, ImportanceMatrix, read_importance, write_importance
from export.importance_probe import REQUEST_NAME, Request, SquareSums, _Evaluator
from export.quantizers.quantize import quantize
from pipeline.errors import MedcotError
from pipeline.prompts import Example

pytestmark = pytest.mark.broad


ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_sequences(lengths: list[int], seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 250, length).tolist() for length in lengths]


def sums_under_transformers(base: Path, sequences: list[list[int]]) -> dict[str, np.ndarray]:
    """Sums of squares of every linear layer's input, in float64, by GGUF name."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    sums: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        if part in PARTS:
            key = f"blk.{layer}.{PARTS[part]}.weight"

            def add(_: object, inputs: tuple[torch.Tensor], key: str = key) -> None:
                squares = inputs[0][0].double().square().sum(dim=0).numpy()
                sums[key] = sums.get(key, 0) + squares

            module.register_forward_pre_hook(add)
    with torch.no_grad():
        for sequence in sequences:
            model(torch.tensor([sequence]))
    return sums


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("importance") / "base")


@pytest.fixture(scope="module")
def model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("importance") / "out"
    export_models(base, None, out, "m", ["F32"])
    return out / "m-F32.gguf"


# --- measuring


def test_the_sums_are_those_of_transformers(base: Path, model: Path) -> None:
    sequences = random_sequences([150, 7, 260])
    done: list[tuple[int, int]] = []
    measured = measure_importance(
        model, sequences, ["train.jsonl"], threads=1, progress=lambda *each: done.append(each)
    )
    expected = sums_under_transformers(base, sequences)
    assert set(measured.matrices) == set(expected) and len(expected) == 21
    for name, matrix in measured.matrices.items():
        # llama.cpp keeps keys and values in 16 bit.
        error = np.linalg.norm(matrix.square_sums - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-3, (name, error)
        np.testing.assert_allclose(matrix.square_sums, expected[name], rtol=5e-3, err_msg=name)
        assert matrix.tokens == 417
    assert done == [(0, 417), (150, 417), (157, 417), (417, 417)]
    assert (measured.datasets, measured.chunk_size, measured.chunk_count) == (("train.jsonl",), 260, 1)


def test_each_sequence_begins_from_an_empty_context(model: Path) -> None:
    first, second = random_sequences([40, 30])

    def sums(evaluated: list[list[int]]) -> ImportanceMatrix:
        collected = SquareSums()
        with GgufModel(model, n_ctx=128, n_threads=1) as loaded:
            evaluator = _Evaluator(loaded, 40, 1, collected)
            for sequence in evaluated:
                evaluator.evaluate(sequence)
            evaluator.close()
        return collected.result([], 40)

    together, one, other = sums([first, second]), sums([first]), sums([second])
    assert len(together.matrices) == 21
    for name, matrix in together.matrices.items():
        parts = one.matrices[name].square_sums + other.matrices[name].square_sums
        np.testing.assert_allclose(matrix.square_sums, parts, rtol=1e-5)


def test_memory_does_not_grow_with_the_text(model: Path, tmp_path: Path) -> None:
    def peak_kilobytes(repeats: int) -> int:
        request = Request(gguf=model, sequences=random_sequences([256]) * repeats, datasets=[], threads=1)
        (tmp_path / REQUEST_NAME).write_text(request.model_dump_json())
        command = [sys.executable, "-m", "export.importance_probe", str(tmp_path)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        return usage.ru_maxrss

    # The activations of 30 x 256 tokens before 21 matrices would be 50 MB.
    assert peak_kilobytes(30) - peak_kilobytes(1) < 15_000


def test_what_a_callback_raises_is_raised(model: Path) -> None:
    class Failing(SquareSums):
        def _add(self, product: ggml_tensor.GgmlTensor) -> None:
            raise KeyboardInterrupt

    with GgufModel(model, n_ctx=128, n_threads=1) as loaded:
        evaluator = _Evaluator(loaded, 20, 1, Failing())
        try:
            with pytest.raises(KeyboardInterrupt):
                evaluator.evaluate(list(range(20)))
        finally:
            evaluator.close()


def test_another_layout_of_ggmls_tensor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml_tensor.check_layout()

    # As if a field had been added behind the strides.
    before, after = ggml_tensor.GgmlTensor._fields_[:4], ggml_tensor.GgmlTensor._fields_[4:]
    fields = [*before, ("added", ctypes.c_int64), *after]
    shifted = type("Shifted", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(ggml_tensor, "GgmlTensor", shifted)
    ggml_tensor.check_layout.cache_clear()
    try:
        with pytest.raises(MedcotError, match="install the pinned version"):
            ggml_tensor.check_layout()
    finally:
        ggml_tensor.check_layout.cache_clear()


def test_models_that_cannot_be_measured(model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:200_000])
    with pytest.raises(MedcotError, match=r"importance matrix of .*cut\.gguf cannot be measured: .*truncated"):
        measure_importance(cut, [[1, 2, 3]], [], threads=1)
    with pytest.raises(MedcotError, match=r"none\.gguf does not exist"):
        measure_importance(tmp_path / "none.gguf", [[1]], [])
    for sequences in ([], [[1], []]):
        with pytest.raises(MedcotError, match="at least one sequence"):
            measure_importance(model, sequences, [])
    with pytest.raises(MedcotError, match="could not evaluate tokens 0"):
        measure_importance(model, [[1, 10**6]], [], threads=1)


def test_text_is_whole_examples_up_to_a_limit(model: Path) -> None:
    examples = [Example(f"Question {i}?", f"Thought {i}. " * 5, f"Answer {i}.") for i in range(20)]
    with GgufModel(model, n_ctx=128, n_threads=1) as loaded:
        chat_format = loaded.chat_format
        whole = {tuple(chat_format.encode(example).input_ids) for example in examples}
        everything = training_sequences(chat_format, examples, tokens=4096)
        assert {tuple(sequence) for sequence in everything} == whole
        assert everything == training_sequences(chat_format, examples, tokens=4096)
        assert everything != training_sequences(chat_format, examples, tokens=4096, seed=1)
        some = training_sequences(chat_format, examples, tokens=150)
        assert sum(map(len, some)) == 150 and [tuple(each) in whole for each in some[:-1]].count(False) == 0
        cut = training_sequences(chat_format, examples, max_length=10)
        assert [sequence[:10] for sequence in everything] == cut
        with pytest.raises(MedcotError, match="no text to measure"):
            training_sequences(chat_format, [])


# --- the file


@pytest.fixture
def small() -> ImportanceMatrix:
    values = np.array([0.5, 2.0, 0.0, 8.0], dtype=np.float32)
    return ImportanceMatrix(
        {"blk.1.ffn_up.weight": Activations(values, 1024), "blk.0.ffn_up.weight": Activations(2 * values, 1030)},
        ("train.jsonl",),
        512,
    )


SHAPES = {"token_embd.weight": (9, 4), "blk.0.ffn_up.weight": (7, 4), "blk.1.ffn_up.weight": (7, 4), "x.weight": (4,)}


def test_the_file_is_llama_imatrix_format_and_reads_back(small: ImportanceMatrix, tmp_path: Path) -> None:
    path = tmp_path / "m.imatrix.gguf"
    assert write_importance(path, small).path == path
    assert read_metadata(path) == {
        "general.type": "imatrix",
        "imatrix.datasets": ["train.jsonl"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    tensors = read_tensors(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "blk.0.ffn_up.weight.in_sum2": (4, 1),
        "blk.0.ffn_up.weight.counts": (1, 1),
        "blk.1.ffn_up.weight.in_sum2": (4, 1),
        "blk.1.ffn_up.weight.counts": (1, 1),
    }
    again = read_importance(path)
    assert (again.datasets, again.chunk_size, again.chunk_count) == (small.datasets, 512, 2)
    mean = again.of("blk.1.ffn_up.weight")
    assert mean is not None and mean.tolist() == [0.5 / 1024, 2.0 / 1024, 0.0, 8.0 / 1024]
    assert again.of("token_embd.weight") is None
    again.check_fits(SHAPES)
    assert list(tmp_path.iterdir()) == [path]


def test_a_quantized_gguf_says_what_guided_it(small: ImportanceMatrix, tmp_path: Path) -> None:
    stored = write_importance(tmp_path / "m.imatrix.gguf", small)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    stored.add_metadata(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_metadata(tmp_path / "model.gguf")
    assert {key: value for key, value in metadata.items() if key.startswith("quantize.")} == {
        "quantize.imatrix.file": "m.imatrix.gguf",
        "quantize.imatrix.dataset": "train.jsonl",
        "quantize.imatrix.entries_count": 2,
        "quantize.imatrix.chunks_count": 2,
    }


def test_a_matrix_without_tokens_weighs_all_columns_alike() -> None:
    assert Activations(np.zeros(3, dtype=np.float32), 0).mean_squares.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**SHAPES, "blk.1.ffn_up.weight": (7, 8)}, r"blk\.1\.ffn_up\.weight has 4 columns in it and 8 in the model"),
        ({key: SHAPES[key] for key in list(SHAPES)[:2]}, r"it has blk\.1\.ffn_up\.weight, which the model has not"),
        ({**SHAPES, "blk.2.ffn_up.weight": (7, 4)}, r"it lacks blk\.2\.ffn_up\.weight"),
    ],
)
def test_another_models_file_is_refused(
    small: ImportanceMatrix, shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    stored = write_importance(tmp_path / "m.gguf", small)
    with pytest.raises(MedcotError, match=r"m\.gguf was measured on another model: " + message):
        stored.check_fits(shapes)


def write_raw(path: Path, tensors: dict[str, np.ndarray], **metadata: str | int) -> None:
    writer = gguf.GGUFWriter(path, "none")
    for key, value in metadata.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key.replace("__", "."), value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SUMS = np.ones((1, 4), dtype=np.float32)
COUNTS = np.ones((1, 1), dtype=np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.in_sum2": SUMS}, "has sums for a but no counts"),
        ({"a.in_sum2": SUMS.astype(np.float16), "a.counts": COUNTS}, "a is not in float32"),
        ({"a.in_sum2": np.ones((2, 4), np.float32), "a.counts": np.ones((2, 1), np.float32)}, "counts for 2 experts"),
        ({"a.in_sum2": SUMS * np.nan, "a.counts": COUNTS}, "negative or not finite"),
        ({"a.in_sum2": -SUMS, "a.counts": COUNTS}, "negative or not finite"),
        ({"a.weight": SUMS}, "holds no activations"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "m.gguf"
    write_raw(path, tensors, general__type="imatrix", imatrix__chunk_size=512)
    with pytest.raises(MedcotError, match=message):
        read_importance(path)


def test_files_that_are_something_else(model: Path, small: ImportanceMatrix, tmp_path: Path) -> None:
    legacy = tmp_path / "old.dat"
    legacy.write_bytes(b"\x02\x00\x00\x00\x13\x00\x00\x00blk.0.ffn_up.weight")
    with pytest.raises(MedcotError, match=r"older \.dat format becomes one with: llama-imatrix --in-file"):
        read_importance(legacy)
    with pytest.raises(MedcotError, match="is a GGUF of type model, not an importance matrix"):
        read_importance(model)
    with pytest.raises(MedcotError, match="does not exist: --imatrix takes auto, none"):
        read_importance(tmp_path / "absent.gguf")
    with pytest.raises(MedcotError, match="cannot be read"):
        read_importance(tmp_path)
    whole = tmp_path / "whole.gguf"
    write_importance(whole, small)
    for length in (whole.stat().st_size - 30, 200, 30, 10):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(MedcotError, match="damaged or cut short"):
            read_importance(cut)
    write_raw(tmp_path / "bare.gguf", {"a.in_sum2": SUMS, "a.counts": COUNTS}, general__type="imatrix")
    with pytest.raises(MedcotError, match=r"lacks imatrix\.chunk_size"):
        read_importance(tmp_path / "bare.gguf")


# --- quantizing

_QUANTIZE = """
import ctypes, json, sys
from pathlib import Path
import llama_cpp, numpy as np
from export.importance_file import read_importance
source, importance, jobs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
matrix = read_importance(Path(importance))
values = {name: np.ascontiguousarray(matrix.of(name)) for name in matrix.matrices}
entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
for entry, (name, array) in zip(entries, values.items()):
    entry.name, entry.size = name.encode(), array.size
    entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
for target, number in jobs.items():
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = number, 1
    parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        sys.exit(f"llama_model_quantize failed for {target}")
"""
QUANTIZATIONS = ["Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "Q5_K_M", "Q6_K", "Q4_0"]


@pytest.fixture(scope="module", params=[256, 64], ids=["K-quants", "narrow types"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with m-F32.gguf, imatrix.gguf and what libllama makes of them, <QUANTIZATION>.gguf."""
    folder = tmp_path_factory.mktemp("quantized")
    base = save_model(folder / "base", hidden=request.param, feed_forward=256, layers=2)
    export_models(base, None, folder, "m", ["F32"])
    source, importance = folder / "m-F32.gguf", folder / "imatrix.gguf"
    random = np.random.default_rng(0)
    matrices = {
        name: Activations(np.exp(random.normal(size=tensor.shape[0])).astype(np.float32), 100)
        for name, tensor in read_tensors(source).items()
        if name.startswith("blk.") and len(tensor.shape) == 2
    }
    write_importance(importance, ImportanceMatrix(matrices, ("random",), 100))
    jobs = {str(folder / f"{name}.gguf"): getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}") for name in QUANTIZATIONS}
    command = [sys.executable, "-c", _QUANTIZE, str(source), str(importance), json.dumps(jobs)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_bytes_are_those_of_libllama(quantized: Path, name: str) -> None:
    importance = read_importance(quantized / "imatrix.gguf")
    plain = read_tensors(quantized / "m-F32.gguf")
    for key, expected in read_tensors(quantized / f"{name}.gguf").items():
        ggml_type = expected.tensor_type
        if ggml_type is T.F32:
            continue
        rows, weights = np.asarray(plain[key].data), importance.of(key)
        ours = quantize(rows, ggml_type, weights).reshape(-1)
        assert np.array_equal(ours, tensor_bytes(expected)), (key, ggml_type.name)
        if weights is not None and ggml_type is not T.Q8_0:
            # Without the importance matrix the bytes are others, so the reference was made with it.
            assert not np.array_equal(quantize(rows, ggml_type).reshape(-1), ours), (key, ggml_type.name)


def dequantized_error(rows: np.ndarray, ggml_type: T, weights: np.ndarray, importance: np.ndarray | None) -> float:
    values = gguf.dequantize(quantize(rows, ggml_type, importance), ggml_type)
    return float((np.square(values - rows) * weights).sum())


@pytest.mark.parametrize("ggml_type", [T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.Q4_0, T.Q5_0, T.Q5_1, T.IQ4_XS])
def test_the_weighted_error_becomes_smaller(ggml_type: T) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(64, 512)).astype(np.float32)
    weights = np.exp(random.normal(scale=1.5, size=512)).astype(np.float32)
    assert dequantized_error(rows, ggml_type, weights, weights) < dequantized_error(rows, ggml_type, weights, None)


def test_some_types_ignore_it() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    weights = np.arange(64, dtype=np.float32)
    for ggml_type in IGNORES_IMPORTANCE:
        assert np.array_equal(quantize(rows, ggml_type, weights), quantize(rows, ggml_type))


def test_importance_of_the_wrong_shape_or_missing_is_refused() -> None:
    rows = np.ones((2, 256), dtype=np.float32)
    with pytest.raises(ValueError, match=r"shape \(255,\) for 256 columns"):
        quantize(rows, T.Q4_K, np.ones(255, dtype=np.float32))
    with pytest.raises(ValueError, match="IQ2_XXS needs an importance matrix"):
        quantize(rows, T.IQ2_XXS)
