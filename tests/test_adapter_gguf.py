"""The adapter alone: llama.cpp, given the base's GGUF and it, computes what it computes from the merged GGUF."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import llama_cpp_logits, read_metadata, read_tensors, save_adapter, save_model

from export.export import export_models
from export.merged_weights import WeightedAdapter
from pipeline.errors import MedcotError

pytestmark = pytest.mark.broad


IDS = [1, 17, 203, 5, 99, 340, 12, 12, 77, 250, 31, 8, 301, 64, 2, 150]


@pytest.mark.parametrize(
    ("architecture", "adapter_type", "lora"),
    [
        ("llama", "F16", {}),
        ("llama", "F32", {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
        ("qwen2", "F32", {"target_modules": ["q_proj", "k_proj", "lm_head"]}),
    ],
    ids=["llama", "llama, rsLoRA and patterns", "qwen2, output"],
)
def test_base_and_adapter_are_the_merged_model(
    architecture: str, adapter_type: str, lora: dict[str, object], tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", architecture=architecture, tied=False, layers=2, dtype=torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, **lora)
    result = export_models(base, adapter, tmp_path, "m", ["F32"], "F32", adapter_gguf=adapter_type)  # type: ignore[arg-type]
    assert result.adapter_gguf == "m-adapter.gguf"
    plain = llama_cpp_logits(tmp_path / "m-base-F32.gguf", IDS)
    merged = llama_cpp_logits(tmp_path / "m-F32.gguf", IDS)
    beside = llama_cpp_logits(tmp_path / "m-base-F32.gguf", IDS, (tmp_path / "m-adapter.gguf",))
    assert np.abs(merged - plain).max() > 0.5
    np.testing.assert_allclose(beside, merged, atol=1e-4 if adapter_type == "F32" else 2e-2)


def test_several_adapters_become_one(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", layers=2, dtype=torch.float32)
    first = save_adapter(tmp_path / "first", base)
    second = save_adapter(tmp_path / "second", base, seed=2, r=2, use_rslora=True, target_modules=["q_proj"])
    adapters = [WeightedAdapter(first, 0.5), WeightedAdapter(second, 2.0)]
    export_models(base, adapters, tmp_path, "m", ["F32"], "F32", adapter_gguf="F32")
    tensors = read_tensors(tmp_path / "m-adapter.gguf")
    assert tensors["blk.0.attn_q.weight.lora_a"].data.shape == (6, 64)
    assert tensors["blk.0.attn_k.weight.lora_b"].data.shape == (32, 4)
    beside = llama_cpp_logits(tmp_path / "m-base-F32.gguf", IDS, (tmp_path / "m-adapter.gguf",))
    np.testing.assert_allclose(beside, llama_cpp_logits(tmp_path / "m-F32.gguf", IDS), atol=1e-4)


def test_metadata(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", layers=1)
    adapter = save_adapter(tmp_path / "adapter", base)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{base}"', '"owner/model-1b"'))
    export_models(base, adapter, tmp_path, "m", ["F16"], adapter_gguf="F16", given_as="owner/model-1b")
    metadata = read_metadata(tmp_path / "m-adapter.gguf")
    assert {key: metadata[key] for key in metadata if not key.startswith("general.quant")} == {
        "general.architecture": "llama", "general.type": "adapter", "general.name": "m adapter",
        "adapter.type": "lora", "adapter.lora.alpha": 8.0, "general.base_model.count": 1,
        "general.base_model.0.name": "model-1b",
        "general.base_model.0.repo_url": "https://huggingface.co/owner/model-1b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, "trains DoRA magnitudes .*, which llama.cpp cannot take from an adapter GGUF"),
        ({"modules_to_save": ["norm"]}, r"trains whole tensors \(model\..*norm\.weight\)"),
        ({"target_modules": ["lm_head"]}, r"trains embeddings \(lm_head\.weight\)"),
        ({"trainable_token_indices": [4]}, "trains single tokens"),
    ],
)
def test_what_llama_cpp_cannot_adapt_is_said_before_anything_is_written(
    lora: dict[str, object], message: str, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", layers=1)
    adapter = save_adapter(tmp_path / "adapter", base, **lora)
    with pytest.raises(MedcotError, match=message):
        export_models(base, adapter, tmp_path / "out", "m", ["F16"], adapter_gguf="F32")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MedcotError, match="no adapter is given"):
        export_models(base, None, tmp_path / "out", "m", ["F16"], adapter_gguf="F32")


_CONVERT = """
import runpy, sys
source, base, adapter, out = sys.argv[1:]
sys.argv = ["convert_lora_to_gguf.py", "--base", base, "--outfile", out, "--outtype", "f32", adapter]
sys.path[:0] = [source, source + "/gguf-py"]
runpy.run_path(source + "/convert_lora_to_gguf.py", run_name="__main__")
"""


@pytest.mark.e2e
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_llama_cpps_converter_writes_the_same(architecture: str, tmp_path: Path) -> None:
    """Every matrix byte for byte; MEDCOT_LLAMA_CPP is a source tree of llama.cpp (in llama-cpp-python's sdist)."""
    source = os.environ.get("MEDCOT_LLAMA_CPP")
    if not source:
        pytest.skip("MEDCOT_LLAMA_CPP names no llama.cpp source tree with convert_lora_to_gguf.py")
    base = save_model(tmp_path / "base", architecture=architecture, layers=2)
    adapter = save_adapter(tmp_path / "adapter", base, rank_pattern={"v_proj": 2})
    export_models(base, adapter, tmp_path, "m", ["F32"], adapter_gguf="F32")
    arguments = [source, str(base), str(adapter), str(tmp_path / "theirs.gguf")]
    done = subprocess.run([sys.executable, "-c", _CONVERT, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = read_tensors(tmp_path / "m-adapter.gguf"), read_tensors(tmp_path / "theirs.gguf")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name].data, tensor.data), name
    our_metadata, metadata = read_metadata(tmp_path / "m-adapter.gguf"), read_metadata(tmp_path / "theirs.gguf")
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert our_metadata[key] == metadata[key]
