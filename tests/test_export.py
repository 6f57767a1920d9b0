"""Merging, reading and writing: what export_models makes of tiny random models, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import TokenType
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import SHARED, read_metadata, read_tensors, save_adapter, save_model, tensor_bytes
from transformers import LlamaForCausalLM

from export import export as export_module
from export.architecture import read_architecture
from export.export import export_models
from export.tokenizer_metadata import read_vocabulary
from pipeline.errors import MedcotError

PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.weight"


def as_hf_stores_it(name: str, values: np.ndarray, heads: int = 4, kv_heads: int = 2) -> np.ndarray:
    """Undo the rotary interleaving of q and k: pairs (i, i + head_dim / 2) go back to two halves."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return values
    count = heads if ".attn_q." in name else kv_heads
    return values.reshape(count, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def merged_by_peft(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return {key: value.numpy() for key, value in model.merge_and_unload().state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("model") / "adapter", base)


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ({"tied": True}, {}),
        ({"tied": False, "dtype": torch.bfloat16, "head_dim": 24}, {"use_rslora": True}),
        (
            {"dtype": torch.float32},
            {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        ),
    ],
    ids=["tied, F16", "untied, BF16, rsLoRA", "F32, patterns"],
)
def test_merged_weights_are_pefts(model: dict[str, object], lora: dict[str, object], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", **model)
    adapter = save_adapter(tmp_path / "adapter", base, **lora)
    result = export_models(base, adapter, tmp_path / "out", "m", ["F32"], "F32")
    expected = merged_by_peft(base, adapter)
    original = load_file(base / "model.safetensors")
    tuned, untuned = read_tensors(tmp_path / "out/m-F32.gguf"), read_tensors(tmp_path / "out/m-base-F32.gguf")
    tied = bool(model.get("tied", True))
    assert {hf_name(name) for name in tuned} == set(expected) - ({"lm_head.weight"} if tied else set())
    for name, tensor in tuned.items():
        np.testing.assert_allclose(as_hf_stores_it(name, tensor.data), expected[hf_name(name)], atol=1e-6, rtol=1e-5)
        plain = original[hf_name(name)].float().numpy()
        assert np.array_equal(as_hf_stores_it(name, untuned[name].data), plain)
    assert result.adapter_matrices_merged == 21
    assert [file.role for file in result.files] == ["tuned", "base"]
    assert result.base == "m-base-F32.gguf"


def test_shards_and_one_file_give_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    sharded = save_model(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for name, folder in (("one", base), ("many", sharded)):
        export_models(folder, adapter, tmp_path / name, "m", ["Q4_K_M"])
    assert (tmp_path / "one/m-Q4_K_M.gguf").read_bytes() == (tmp_path / "many/m-Q4_K_M.gguf").read_bytes()


def test_small_blocks_of_rows_give_the_same_bytes(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_models(base, adapter, tmp_path / "whole", "m", ["F16", "Q8_0"])
    monkeypatch.setattr(export_module, "_BLOCK_WEIGHTS", 700)
    export_models(base, adapter, tmp_path / "blocks", "m", ["F16", "Q8_0"])
    for name in ("m-F16.gguf", "m-Q8_0.gguf"):
        whole, blocks = read_tensors(tmp_path / "whole" / name), read_tensors(tmp_path / "blocks" / name)
        for key, tensor in whole.items():
            same = tensor_bytes(tensor) == tensor_bytes(blocks[key])
            # BLAS may sum a small product in another order, so a value may round to its other neighbour.
            assert same.mean() > 0.999, (name, key)


def test_llama3_rope_factors_give_transformers_frequencies(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
    }  # fmt: skip
    base = save_model(tmp_path / "base", hidden=256, rope_parameters=scaling)
    export_models(base, None, tmp_path, "m", ["F16"])
    factors = read_tensors(tmp_path / "m-F16.gguf")["rope_freqs.weight"].data
    expected = LlamaForCausalLM.from_pretrained(base).model.rotary_emb.inv_freq.numpy()
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / factors, expected, rtol=1e-5)
    assert read_metadata(tmp_path / "m-F16.gguf")["llama.rope.freq_base"] == 500000.0


def test_metadata_of_a_byte_level_vocabulary(base: Path, tmp_path: Path) -> None:
    export_models(base, None, tmp_path, "m", ["F16"])
    metadata = read_metadata(tmp_path / "m-F16.gguf")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, list)
    kinds = dict(zip(tokens, types, strict=True))
    assert kinds["<|im_end|>"] == TokenType.CONTROL
    assert kinds["<think>"] == TokenType.USER_DEFINED
    assert [kinds[f"[PAD{len(tokens) - n}]"] for n in (1, 5)] == [TokenType.UNUSED] * 2
    assert tokens[metadata["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"  # type: ignore[call-overload]
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert "im_start" in (tmp_path / "Modelfile").read_text()


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real tokenizers is not here")
def test_real_tokenizers_are_recognised() -> None:
    r1 = read_vocabulary(SHARED / "tokenizers/deepseek-r1-distill-llama-8b", 128256)
    assert (r1.model, r1.pre, r1.add_bos, r1.add_eos) == ("gpt2", "llama-bpe", True, False)
    assert r1.special_ids == {"bos": 128000, "eos": 128001, "pad": 128001}
    assert r1.types[128011:128015] == [TokenType.CONTROL] * 2 + [TokenType.USER_DEFINED] * 2
    tiny = read_vocabulary(SHARED / "tokenizers/tinyllama-1.1b-chat", 32000)
    assert (tiny.model, tiny.pre, tiny.add_bos, tiny.add_space_prefix) == ("llama", "default", True, True)
    assert tiny.types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert tiny.special_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}


def copy_of(base: Path, folder: Path, **config: object) -> Path:
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if config:
        settings = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def change_weights(folder: Path, change: object) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path, metadata={"format": "pt"})


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def remove_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.2.mlp.down_proj.weight"]


def add_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)


def to_bytes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)


def grow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(161, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, "up_proj.weight holds NaN"),
        (remove_tensor, "no tensor model.layers.2.mlp.down_proj.weight"),
        (add_tensor, "no place for, such as model.layers.0.self_attn.q_proj.bias"),
        (to_bytes, "model.norm.weight is stored as I8"),
        (grow, r"shape \[161, 64\], config.json says \[160, 64\]"),
    ],
)
def test_bad_weights_are_one_sentence(base: Path, tmp_path: Path, change: object, message: str) -> None:
    broken = copy_of(base, tmp_path / "broken")
    change_weights(broken, change)
    with pytest.raises(MedcotError, match=message):
        export_models(broken, None, tmp_path / "out", "m", ["F16"])
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))


def test_truncated_and_missing_files(base: Path, tmp_path: Path) -> None:
    broken = copy_of(base, tmp_path / "broken")
    path = broken / "model.safetensors"
    whole = path.read_bytes()
    for length, message in (
        (len(whole) - 100, "is truncated: it has"),
        (100, "is truncated or"),
        (3, "truncated or"),
    ):
        path.write_bytes(whole[:length])
        with pytest.raises(MedcotError, match=message):
            export_models(broken, None, tmp_path / "out", "m", ["F16"])
    path.unlink()
    with pytest.raises(MedcotError, match=r"lacks model.safetensors \(found"):
        export_models(broken, None, tmp_path / "out", "m", ["F16"])
    sharded = save_model(tmp_path / "sharded", max_shard_size="100KB")
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(MedcotError, match="lacks model-00002-of"):
        export_models(sharded, None, tmp_path / "out", "m", ["F16"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; export writes LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantized \(bitsandbytes\)"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type=yarn"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers must be a positive integer"),
    ],
)
def test_what_cannot_be_written_is_said(base: Path, tmp_path: Path, config: dict[str, object], message: str) -> None:
    with pytest.raises(MedcotError, match=message):
        read_architecture(copy_of(base, tmp_path / "other", **config))


def test_adapters_that_do_not_fit(base: Path, adapter: Path, tmp_path: Path) -> None:
    wider = save_model(tmp_path / "wider", feed_forward=192)
    shallower = save_model(tmp_path / "shallower", layers=2)
    for other, message in (
        (wider, "another model: its change to .* has shape"),
        (shallower, "which the base lacks"),
    ):
        with pytest.raises(MedcotError, match=message):
            export_models(other, adapter, tmp_path / "out", "m", ["F16"])
    dora = save_adapter(tmp_path / "dora", base, use_dora=True)
    with pytest.raises(MedcotError, match="uses use_dora"):
        export_models(base, dora, tmp_path / "out", "m", ["F16"])
    saved = save_adapter(tmp_path / "saved", base, modules_to_save=["lm_head"])
    with pytest.raises(MedcotError, match="uses modules_to_save"):
        export_models(base, saved, tmp_path / "out", "m", ["F16"])
    with pytest.raises(MedcotError, match=r"holds no adapter_config\.json"):
        export_models(base, tmp_path, tmp_path / "out", "m", ["F16"])


def test_a_failure_in_the_middle_leaves_what_was_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "m-F16.gguf").write_bytes(b"earlier")
    quantize, calls = export_module.quantize, 0

    def full_disk(rows: np.ndarray, ggml_type: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(28, "No space left on device")
        return quantize(rows, ggml_type)  # type: ignore[arg-type]

    monkeypatch.setattr(export_module, "quantize", full_disk)
    with pytest.raises(MedcotError, match="the disk is full"):
        export_models(base, None, out, "m", ["F16", "Q8_0"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"m-F16.gguf": b"earlier"}


def test_killed_export_leaves_no_file_and_the_next_one_cleans_up(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import os, signal, sys; from pathlib import Path; from export import export as e\n"
        "kill = lambda tensor, done, total: done > total // 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "e.export_models(Path(sys.argv[1]), None, Path(sys.argv[2]), 'm', ['F16'], None, kill)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(export_module.__file__).parent.parent)}
    killed = subprocess.run([sys.executable, "-c", code, str(base), str(out)], check=False, env=environment)
    assert killed.returncode == -9
    assert [path.suffix for path in out.iterdir()] == [".tmp"]
    export_models(base, None, out, "m", ["F16"])
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "m-F16.gguf"]


def test_weights_too_large_for_f16_are_named(base: Path, tmp_path: Path) -> None:
    large = copy_of(base, tmp_path / "large")

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].float()
        tensors[name][0, 0] = 1e6

    change_weights(large, enlarge)
    with pytest.raises(MedcotError, match=r"blk\.1\.ffn_up\.weight: a weight of magnitude 1e\+06 does not fit F16"):
        export_models(large, None, tmp_path / "out", "m", ["F16"])
    export_models(large, None, tmp_path / "out", "m", ["BF16"])
