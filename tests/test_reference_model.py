"""The widened reference computes what a model loaded in 32 bit computes, and holds no second copy of the weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import save_adapter, save_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from export.reference_model import load_reference

IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("settings", [None, {}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_logits_are_those_of_32_bit_weights(tmp_path: Path, dtype: torch.dtype, settings: dict | None) -> None:
    base = save_model(tmp_path / "base", dtype=dtype, tied=False)
    adapter = None if settings is None else save_adapter(tmp_path / "adapter", base, **settings)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        expected = PeftModel.from_pretrained(expected, adapter)
    found = logits(load_reference(base, adapter))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(expected.eval()), rtol=1e-5, atol=1e-5)


def test_added_tokens_make_the_base_larger(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tied=False, layers=1)
    adapter = save_adapter(tmp_path / "adapter", base, tokens=420)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected.resize_token_embeddings(420)
    expected = PeftModel.from_pretrained(expected, adapter)
    found = logits(load_reference(base, adapter))
    assert found.shape[-1] == 420
    torch.testing.assert_close(found, logits(expected.eval()), rtol=1e-5, atol=1e-5)


def test_a_4_bit_base_is_widened_from_its_codes(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", hidden=128, heads=4, tied=False)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    four_bit = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.bfloat16)
    four_bit.save_pretrained(tmp_path / "nf4")
    found = logits(load_reference(tmp_path / "nf4", None))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4").dequantize().float()
    # bitsandbytes rounds to bfloat16 there, so only nearly equal; and far from what was quantized.
    original = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval())
    expected = logits(plain.eval())
    error = ((found - expected).square().sum() / expected.square().sum()).item()
    assert error < 1e-3 < ((found - original).square().sum() / original.square().sum()).item()
    # An adapter on such a base is computed beside it, as on any other.
    adapter = save_adapter(tmp_path / "adapter", base)
    adapted = logits(load_reference(tmp_path / "nf4", adapter))
    expected_adapted = logits(PeftModel.from_pretrained(plain, adapter).eval())
    error = ((adapted - expected_adapted).square().sum() / expected_adapted.square().sum()).item()
    assert error < 1e-3 < ((adapted - found).square().sum() / found.square().sum()).item()


@pytest.mark.broad
def test_the_weights_stay_mapped(tmp_path: Path) -> None:
    """A base of 100 MB in 16 bit takes less than half of that in memory of the process's own."""
    base = save_model(tmp_path / "base", hidden=512, feed_forward=2048, layers=10, heads=8, vocabulary=8000, tied=False)
    program = f"""
import torch
from pathlib import Path
from export.reference_model import load_reference
def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
import transformers.models.llama.modeling_llama
before = own()
model = load_reference(Path({str(base)!r}), None)
with torch.inference_mode():
    model(torch.arange(8)[None])
print(sum(p.numel() for p in model.parameters()) * 2 // 1024, own() - before)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    weights, own = map(int, output.split())
    assert weights > 80_000 and own < weights / 2
