"""Whole exports from other bases than a 16-bit folder: the same bytes as from that folder."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import Fault, HubServer
from safetensors.torch import save_file
from tiny_models import save_adapter, save_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from export import hub_files
from export.export import export_models, open_model
from pipeline.errors import MedcotError


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.gguf"))}


@pytest.mark.parametrize("double", [True, False])
def test_a_four_bit_base_is_exported_as_its_dequantized_self(double: bool, tmp_path: Path) -> None:
    """The reference is the same model, dequantized by bitsandbytes and saved in 32 bit."""
    plain = save_model(tmp_path / "plain", hidden=128, feed_forward=192, tied=False, dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", plain)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = LlamaForCausalLM.from_pretrained(plain, quantization_config=quantization, dtype=torch.float32)
    bases = {name: tmp_path / name for name in ("four_bit", "dequantized")}
    for folder in bases.values():
        shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    model.save_pretrained(bases["four_bit"], max_shard_size="60KB")
    assert len(list(bases["four_bit"].glob("*.safetensors"))) > 3
    save_file(
        {name: value.clone() for name, value in model.dequantize(dtype=torch.float32).state_dict().items()},
        bases["dequantized"] / "model.safetensors",
    )
    for name, folder in bases.items():
        export_models(folder, adapter, tmp_path / f"{name}-out", "m", ["F32", "Q4_K_M"], "Q8_0")
    found, expected = (tensor_files(tmp_path / f"{name}-out") for name in bases)
    assert len(expected) == 3 and found == expected


def test_a_base_on_the_hub_gives_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model(tmp_path / "base", max_shard_size="100KB")
    adapter = save_adapter(tmp_path / "adapter", base)
    export_models(base, adapter, tmp_path / "local", "m", ["F16", "Q4_K_M"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "scratch"))
    monkeypatch.setattr(hub_files, "RETRY_WAITS", (0.0,))
    with HubServer() as hub:
        hub.add("someone/base", base)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        hub.misbehave(Fault(".safetensors", drop_after=30_000, from_byte=1, times=5))
        folder, weights = open_model("someone/base")
        with weights:
            on_disk: list[int] = []

            def count_shards(*_: object) -> None:
                on_disk.append(len(list((tmp_path / "scratch").rglob("*.safetensors*"))))

            export_models(
                folder, adapter, tmp_path / "streamed", "m", ["F16", "Q4_K_M"], progress=count_shards, weights=weights
            )
            assert max(on_disk) == 1, "several threads, one shard"
            # A second pass over the same base, as for an importance matrix, fetches the shards again.
            export_models(folder, adapter, tmp_path / "again", "m", ["F16"], weights=weights)
            assert (tmp_path / "again" / "m-F16.gguf").read_bytes() == (
                tmp_path / "streamed" / "m-F16.gguf"
            ).read_bytes()
        assert tensor_files(tmp_path / "streamed") == tensor_files(tmp_path / "local")
        assert not list((tmp_path / "cache").rglob("*.safetensors")), "no shard in the hub's cache"
        assert [path.name for path in (tmp_path / "scratch").rglob("*")] == ["shards", "someone--base.lock"]

        shard = sorted(base.glob("*.safetensors"))[2]
        hub.misbehave(Fault(shard.name, flip=shard.stat().st_size - 1))
        folder, weights = open_model("someone/base")
        with pytest.raises(MedcotError, match=f"{shard.name} arrived damaged twice"), weights:
            export_models(folder, adapter, tmp_path / "broken", "m", ["F16"], weights=weights)
        assert not list((tmp_path / "broken").rglob("*.gguf*"))
    huggingface_hub.close_session()


def test_other_quantizations_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(MedcotError, match=r"is quantized by gptq\. Export reads"):
        export_models(base, None, tmp_path / "out", "m", ["F16"])
    assert not (tmp_path / "out").exists()
