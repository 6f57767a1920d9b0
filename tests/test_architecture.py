"""Every architecture that export writes: its tensors and metadata against transformers, llama.cpp and its converter."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared_tokenizer
from gguf import GGMLQuantizationType, RopeScalingType
from tiny_models import (
    llama_cpp_logits,
    read_metadata,
    read_tensors,
    save_adapter,
    save_model,
    save_tokenizer,
)
from transformers import AutoModelForCausalLM

from export import tokenizer_metadata, verify
from export.architecture import LlamaArchitecture, Qwen2Architecture, read_architecture
from export.export import export_models
from pipeline.config import VerifyConfig
from pipeline.errors import MedcotError
from pipeline.sources import sample_examples

IDS = [1, 17, 203, 5, 99, 340, 12, 12, 77, 250, 31, 8, 301, 64, 2, 150, 45, 9, 222, 130] * 4
LLAMA3_SCALING = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_SCALING = {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, object]] = {
    "llama, tied": {"tied": True},
    "llama, untied, wide heads": {"tied": False, "head_dim": 24},
    "llama, biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "llama 3 scaling": {"rope_parameters": LLAMA3_SCALING},
    "llama, linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama, yarn scaling": {"rope_parameters": YARN_SCALING},
    "qwen2, tied": {"architecture": "qwen2", "tied": True},
    "qwen2, untied, one key-value head": {"architecture": "qwen2", "tied": False, "kv_heads": 1},
    "qwen2, yarn scaling": {"architecture": "qwen2", "rope_parameters": YARN_SCALING},
    "mistral, untied, wide heads": {"architecture": "mistral", "tied": False, "head_dim": 24},
}


def transformers_logits(base: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("model", MODELS)
def test_llama_cpp_computes_what_transformers_computes(model: str, tmp_path: Path) -> None:
    """Row order, biases, rotary scaling, head sizes: a mistake in any of them shows in the logits."""
    base = save_model(tmp_path / "base", **{"dtype": torch.float32, "hidden": 64, **MODELS[model]})  # type: ignore[arg-type]
    export_models(base, None, tmp_path, "m", ["F32"])
    ours, theirs = llama_cpp_logits(tmp_path / "m-F32.gguf", IDS), transformers_logits(base)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_llama3_rope_factors_give_transformers_frequencies(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
    }  # fmt: skip
    base = save_model(tmp_path / "base", hidden=256, rope_parameters=scaling)
    export_models(base, None, tmp_path, "m", ["F16"])
    factors = read_tensors(tmp_path / "m-F16.gguf")["rope_freqs.weight"].data
    expected = AutoModelForCausalLM.from_pretrained(base).model.rotary_emb.inv_freq.numpy()
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / factors, expected, rtol=1e-5)
    assert read_metadata(tmp_path / "m-F16.gguf")["llama.rope.freq_base"] == 500000.0


def test_qwen2_metadata_and_tensors(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", architecture="qwen2", tied=False, layers=2)
    export_models(base, None, tmp_path, "m", ["F16"])
    metadata = read_metadata(tmp_path / "m-F16.gguf")
    assert {key: value for key, value in metadata.items() if key.startswith("qwen2.")} == {
        "qwen2.block_count": 2, "qwen2.context_length": 1024, "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 160, "qwen2.attention.head_count": 4, "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 10000.0, "qwen2.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }  # fmt: skip
    assert metadata["general.architecture"] == "qwen2"
    tensors = read_tensors(tmp_path / "m-F16.gguf")
    biases = {name for name in tensors if name.endswith(".bias")}
    assert biases == {f"blk.{layer}.attn_{part}.bias" for layer in (0, 1) for part in "qkv"}
    assert {tensors[name].tensor_type for name in biases} == {GGMLQuantizationType.F32}


def test_mistral_is_a_llama_and_says_that_its_window_is_lost(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", architecture="mistral", layers=1, sliding_window=512, head_dim=24)
    result = export_models(base, None, tmp_path, "m", ["F16"])
    metadata = read_metadata(tmp_path / "m-F16.gguf")
    assert metadata["general.architecture"] == result.architecture == "llama"
    assert metadata["llama.attention.key_length"] == metadata["llama.rope.dimension_count"] == 24
    assert not [key for key in metadata if "sliding" in key]
    assert len(result.warnings) == 1 and "last 512 tokens" in result.warnings[0]
    wide = save_model(tmp_path / "wide", architecture="mistral", layers=1, sliding_window=4096)
    assert export_models(wide, None, tmp_path / "wide-out", "m", ["F16"]).warnings == []


def test_yarn_metadata(tmp_path: Path) -> None:
    scaling = {**YARN_SCALING, "beta_fast": 16.0}
    base = save_model(tmp_path / "base", architecture="qwen2", layers=1, rope_parameters=scaling)
    export_models(base, None, tmp_path, "m", ["F16"])
    metadata = read_metadata(tmp_path / "m-F16.gguf")
    assert metadata["qwen2.rope.scaling.type"] == RopeScalingType.YARN.value
    assert metadata["qwen2.rope.scaling.factor"] == 4.0
    assert metadata["qwen2.rope.scaling.original_context_length"] == 64
    assert metadata["qwen2.rope.scaling.yarn_beta_fast"] == 16.0


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel; export writes .*Qwen2"),
        ("llama", {"architectures": []}, "architecture none; export writes LlamaForCausalLM"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type=dynamic"),
        ("qwen2", {"rope_parameters": LLAMA3_SCALING}, "rope_type=llama3; export writes Qwen2ForCausalLM"),
        ("qwen2", {"head_dim": 24}, "head_dim=24"),
        ("qwen2", {"rope_parameters": {**YARN_SCALING, "attention_factor": 1.2}}, "attention_factor=1.2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("llama", {"num_hidden_layers": "three"}, "num_hidden_layers must be a positive integer"),
        ("llama", {"num_key_value_heads": 3}, "4 heads .* cannot share 3 key-value heads"),
        ("mistral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "lacks the number factor"),
    ],
)
def test_what_cannot_be_written_is_said(
    tmp_path: Path, architecture: str, config: dict[str, object], message: str
) -> None:
    base = save_model(tmp_path / "base", architecture=architecture, layers=1)
    settings = json.loads((base / "config.json").read_text()) | config
    (base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(MedcotError, match=message):
        export_models(base, None, tmp_path / "out", "m", ["F16"])
    assert not (tmp_path / "out").exists()


def test_seventy_billion_is_known_by_its_layers() -> None:
    """llama.cpp's test differs: every Qwen2 of 80 layers, and of Llamas those with grouped heads."""
    config = {"num_hidden_layers": 80, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
              "num_key_value_heads": 4, "vocab_size": 100}  # fmt: skip
    assert Qwen2Architecture(config, Path()).shape.is_70b
    assert not LlamaArchitecture(config, Path()).shape.is_70b
    assert LlamaArchitecture({**config, "num_key_value_heads": 2}, Path()).shape.is_70b


_CONVERT = """
import sys
from pathlib import Path
source, folder, out, own_tokenizer = sys.argv[1:]
sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32"]
sys.path[:0] = [source, source + "/gguf-py"]
from conversion import base
# The converter knows tokenizers by a hash of what they make of a text; the tests' own tokenizer is none of them.
if own_tokenizer == "True":
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
import runpy
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""
# What the converter reads off the folder's name or the model card, and keys that say nothing to llama.cpp.
_OF_NO_MATTER = ("general.name", "general.size_label", "general.finetune", "general.basename", "general.license",
                 "general.sampling", "general.quantization_version", "general.version", "general.organization",
                 "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_sep_token",
                 "medcot.")  # fmt: skip


def convert(base: Path, out: Path, *, own_tokenizer: bool) -> None:
    """llama.cpp's converter; MEDCOT_LLAMA_CPP is a source tree of llama.cpp (as in llama-cpp-python's sdist)."""
    source = os.environ.get("MEDCOT_LLAMA_CPP")
    if not source:
        pytest.skip("MEDCOT_LLAMA_CPP names no llama.cpp source tree with convert_hf_to_gguf.py")
    arguments = [source, str(base), str(out), str(own_tokenizer)]
    done = subprocess.run([sys.executable, "-c", _CONVERT, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_metadata(ours: Path, theirs: Path) -> None:
    our_metadata, metadata = (
        {key: value for key, value in read_metadata(path).items() if not key.startswith(_OF_NO_MATTER)}
        for path in (ours, theirs)
    )
    # Where the tokenizer does not say, the converter writes nothing and llama.cpp takes False for such a vocabulary.
    assert our_metadata == {"tokenizer.ggml.add_bos_token": False} | metadata


@pytest.mark.e2e
@pytest.mark.parametrize("model", MODELS)
def test_llama_cpps_converter_writes_the_same(model: str, tmp_path: Path) -> None:
    """Every tensor and every key."""
    base = save_model(tmp_path / "base", **{"dtype": torch.float16, **MODELS[model]})  # type: ignore[arg-type]
    export_models(base, None, tmp_path, "m", ["F32"])
    ours, theirs = tmp_path / "m-F32.gguf", tmp_path / "theirs.gguf"
    convert(base, theirs, own_tokenizer=True)
    our_tensors, their_tensors = read_tensors(ours), read_tensors(theirs)
    assert set(our_tensors) == set(their_tensors)
    for name, tensor in their_tensors.items():
        np.testing.assert_allclose(our_tensors[name].data, tensor.data, rtol=1e-6, err_msg=name)
    assert_same_metadata(ours, theirs)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("tokenizer", "size", "ids"),
    [
        ("deepseek-r1-distill-llama-8b", 128256, {"bos": 128000, "eos": 128001}),
        ("tinyllama-1.1b-chat", 32000, {"bos": 1, "eos": 2, "pad": 2, "unk": 0}),
    ],
)
def test_llama_cpps_converter_writes_the_same_vocabulary(
    tokenizer: str, size: int, ids: dict[str, int], tmp_path: Path
) -> None:
    """The real tokenizers: every token, type, score, merge and special id."""
    numbered = {f"{role}_token_id": number for role, number in ids.items()}
    base = save_model(tmp_path / "base", hidden=32, layers=1, vocabulary=size, **numbered)  # type: ignore[arg-type]
    for path in shared_tokenizer(tokenizer).glob("token*"):
        shutil.copyfile(path, base / path.name)
    export_models(base, None, tmp_path, "m", ["F32"])
    convert(base, tmp_path / "theirs.gguf", own_tokenizer=False)
    assert_same_metadata(tmp_path / "m-F32.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize(
    ("split", "adds_bos", "pre"),
    [
        (tokenizer_metadata._QWEN2_SPLIT, False, "qwen2"),
        (tokenizer_metadata._QWEN2_SPLIT, True, "deepseek-r1-qwen"),
        (tokenizer_metadata._LLAMA3_SPLIT, True, "llama-bpe"),
        (tokenizer_metadata._TEKKEN_SPLIT, True, "tekken"),
    ],
)
def test_the_rule_that_cuts_text_has_llama_cpps_name(split: str, adds_bos: bool, pre: str, tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path, split, adds_bos=adds_bos)
    vocabulary = tokenizer_metadata.read_vocabulary(tmp_path, size)
    assert (vocabulary.pre, vocabulary.add_bos, vocabulary.add_eos) == (pre, adds_bos, False)


@pytest.mark.parametrize(
    ("architecture", "split"),
    [("qwen2", tokenizer_metadata._QWEN2_SPLIT), ("mistral", tokenizer_metadata._TEKKEN_SPLIT)],
    ids=["R1-Distill-Qwen", "Mistral Nemo"],
)
def test_a_family_with_its_tokenizer_passes_verification(architecture: str, split: str, tmp_path: Path) -> None:
    """Tokens, template and logits, as the verify stage compares them; the texts include accents that Qwen2 composes."""
    assert any(unicodedata.normalize("NFC", text) != text for text in verify.STRESS_TEXTS)
    size = save_tokenizer(tmp_path / "base", split, adds_bos=True, composes=architecture == "qwen2")
    base = save_model(tmp_path / "base", architecture=architecture, vocabulary=size, layers=1)
    adapter = save_adapter(tmp_path / "adapter", base)
    warnings = export_models(base, adapter, tmp_path, "m", ["F16"]).warnings
    assert [("NFC" in text) for text in warnings] == ([True, False] if architecture == "qwen2" else [False])
    assert ("medcot.normalizer" in read_metadata(tmp_path / "m-F16.gguf")) == (architecture == "qwen2")
    result = verify.verify_gguf(
        tmp_path / "m-F16.gguf", base, adapter, sample_examples(2), VerifyConfig.model_validate({"prompts": 2})
    )
    assert [f"{check.name}: {check.detail}" for check in result.checks if not check.passed] == []


def test_ids_that_only_the_model_numbers(tmp_path: Path) -> None:
    """Qwen2's tokenizer names no BOS, its config.json does; an adapter's folder holds the tokenizer alone."""
    base = save_model(tmp_path / "base", architecture="qwen2", layers=1, bos_token_id=7)
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"bos_token": None}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    adapter = save_adapter(tmp_path / "adapter", base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).write_bytes((base / name).read_bytes())
    export_models(base, adapter, tmp_path, "m", ["F16"])
    metadata = read_metadata(tmp_path / "m-F16.gguf")
    assert metadata["tokenizer.ggml.bos_token_id"] == 7
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_the_shape_that_types_depend_on(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", architecture="qwen2", layers=1, heads=4, kv_heads=1)
    shape = read_architecture(base).shape
    assert (shape.heads_per_kv_head, shape.architecture, shape.tied_embeddings) == (4, "qwen2", True)
