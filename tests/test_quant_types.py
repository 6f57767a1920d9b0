"""Types and bytes of every tensor against libllama's own quantizer."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import quantize_with_libllama, read_metadata, read_tensors, save_model, tensor_bytes

from export.export import export_models
from export.quant_types import FILE_TYPES, ModelShape, file_type, tensor_type
from pipeline.errors import MedcotError

QUANTIZED = [name for name in FILE_TYPES if name != "F32"]
# 256 fits every type; 96 needs the types with blocks of 32; 40 fits none and stays at 16 bit.
SHAPES = {
    "wide, tied": {"hidden": 256, "feed_forward": 256, "layers": 2, "tied": True},
    "wide, untied, grouped": {"hidden": 256, "feed_forward": 256, "layers": 2, "tied": False, "kv_heads": 1},
    "odd, tied": {"hidden": 96, "feed_forward": 288, "layers": 4, "tied": True},
    "odder, untied": {"hidden": 40, "feed_forward": 256, "layers": 3, "tied": False},
    "deep": {"hidden": 32, "feed_forward": 256, "heads": 4, "layers": 17, "tied": False, "kv_heads": 1},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_types_and_bytes_are_libllamas(shape: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", **SHAPES[shape])
    export_models(base, None, tmp_path / "ours", "m", ["F32", *QUANTIZED])
    jobs = [(str(tmp_path / f"{name}.gguf"), int(FILE_TYPES[name].number)) for name in QUANTIZED]
    quantize_with_libllama(tmp_path / "ours" / "m-F32.gguf", jobs)
    for name in QUANTIZED:
        ours, theirs = tmp_path / "ours" / f"m-{name}.gguf", tmp_path / f"{name}.gguf"
        our_tensors, their_tensors = read_tensors(ours), read_tensors(theirs)
        assert {key: tensor.tensor_type.name for key, tensor in our_tensors.items()} == {
            key: tensor.tensor_type.name for key, tensor in their_tensors.items()
        }, name
        for key, tensor in our_tensors.items():
            assert np.array_equal(tensor_bytes(tensor), tensor_bytes(their_tensors[key])), (name, key)
    assert read_metadata(tmp_path / "ours" / "m-Q4_K_M.gguf") == read_metadata(tmp_path / "Q4_K_M.gguf")


def test_a_70b_shape_spends_more_on_attn_v() -> None:
    q4 = file_type("q4_k_m")
    chosen = [
        tensor_type(q4, "blk.20.attn_v.weight", (1024, 8192), ModelShape(80, 64, kv_heads, False)).name
        for kv_heads in (8, 64)
    ]
    assert chosen == ["Q5_K", "Q4_K"]


def test_unknown_quantization_lists_those_that_work() -> None:
    with pytest.raises(MedcotError, match=r"Q9_Z is no quantization.*Q4_K_M"):
        file_type("Q9_Z")
