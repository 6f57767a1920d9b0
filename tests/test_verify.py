"""Verification passes what is right and catches what is wrong."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_models import SHARED, save_adapter, save_model
from transformers import AutoTokenizer

from export import architecture, tokenizer_metadata, verify, weights
from export import export as export_module
from export.verify import raise_if_failed, verify_gguf
from pipeline.config import Config, VerifyConfig
from pipeline.errors import GateFailed
from pipeline.prompts import Example
from pipeline.results import Verification

EXAMPLES = [
    Example("A 54-year-old has chest pain. What next?", "Think of the heart first.", "An ECG."),
    Example("Is </think> 250 mg\n\n  of <|im_end|> metformin enough?", "It depends on the kidney.", "Often."),
]
THRESHOLDS = VerifyConfig.model_validate({"min_top1_agreement": 0.95})  # random logits lie close together


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = save_model(folder / "base")
    return base, save_adapter(folder / "adapter", base)


def verified(models: tuple[Path, Path], folder: Path, quantization: str = "F16") -> Verification:
    base, adapter = models
    export_module.export_models(base, adapter, folder, "m", [quantization])
    return verify_gguf(folder / f"m-{quantization}.gguf", base, adapter, EXAMPLES, THRESHOLDS)


def failed_checks(result: Verification) -> list[str]:
    return [check.name for check in result.checks if not check.passed]


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
def test_a_right_export_passes(models: tuple[Path, Path], tmp_path: Path, quantization: str) -> None:
    result = verified(models, tmp_path, quantization)
    assert failed_checks(result) == []
    assert result.passed and result.positions > 50
    assert result.logit_nmse < (0.01 if quantization == "Q8_0" else 1e-5)
    raise_if_failed(result)


def replaced(**fields: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Break the vocabulary that is written."""

    def break_it(patch: pytest.MonkeyPatch) -> None:
        read = tokenizer_metadata.read_vocabulary

        def broken(folder: Path, size: int) -> tokenizer_metadata.Vocabulary:
            return dataclasses.replace(read(folder, size), **fields)

        patch.setattr(export_module, "read_vocabulary", broken)

    return break_it


def rows_in_hf_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(architecture, "_rotary_order", lambda heads, head_dim: np.arange(heads * head_dim))


def alpha_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("export.lora._scale", lambda module, rank, config: 1.0)


def wrong_rope_base(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(architecture, "_rope_parameters", lambda config: {"rope_type": "default", "rope_theta": 5e5})


def one_tensor_zeroed(patch: pytest.MonkeyPatch) -> None:
    rows = weights.BaseWeights.rows

    def zeroed(self: weights.BaseWeights, name: str, chosen: Any) -> weights.FloatRows:
        return rows(self, name, chosen) * np.float32(name != "model.layers.1.self_attn.o_proj.weight")

    patch.setattr(weights.BaseWeights, "rows", zeroed)


@pytest.mark.parametrize(
    ("break_it", "caught_by"),
    [
        (alpha_ignored, "logit error"),
        (rows_in_hf_order, "logit error"),
        (wrong_rope_base, "logit error"),
        (one_tensor_zeroed, "logit error"),
        (replaced(special_ids={"bos": 1, "eos": 1, "unk": 0}), "BOS and EOS"),
        (replaced(add_bos=True), "BOS and EOS"),
        (replaced(pre="llama-bpe"), "token ids: whole texts"),
        (
            replaced(chat_template="{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"),
            "rendered templates",
        ),
    ],
    ids=["alpha", "q and k rows", "rope base", "zeroed", "eos", "added bos", "pre-tokenizer", "template"],
)
def test_a_broken_export_is_caught(
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], None],
    caught_by: str,
) -> None:
    break_it(monkeypatch)
    result = verified(models, tmp_path)
    assert caught_by in failed_checks(result)
    assert not result.passed
    with pytest.raises(GateFailed, match="The GGUF is not the trained model"):
        raise_if_failed(result)


def test_an_unmerged_adapter_is_caught(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = models
    export_module.export_models(base, None, tmp_path, "m", ["F16"])
    result = verify_gguf(tmp_path / "m-F16.gguf", base, adapter, EXAMPLES, THRESHOLDS)
    assert "logit error" in failed_checks(result)
    assert verify_gguf(tmp_path / "m-F16.gguf", base, None, EXAMPLES, THRESHOLDS).passed


def test_a_file_that_llama_cpp_cannot_use_is_a_failed_check(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = models
    export_module.export_models(base, adapter, tmp_path, "m", ["F16"])
    path = tmp_path / "m-F16.gguf"
    path.write_bytes(path.read_bytes()[:-5000])
    result = verify_gguf(path, base, adapter, EXAMPLES, THRESHOLDS)
    assert failed_checks(result) == ["loads"]
    assert "cannot be loaded by llama.cpp" in result.checks[0].detail


def test_a_child_that_dies_is_a_failed_check(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary of the wrong kind makes libllama abort the process on the first text."""
    base, _ = models
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    replaced(model="llama", pre="default", merges=None, scores=[0.0] * size)(monkeypatch)
    result = verified(models, tmp_path)
    assert failed_checks(result) == ["loads"]
    assert "died (signal" in result.checks[0].detail


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real tokenizers is not here")
@pytest.mark.parametrize(
    ("tokenizer", "size"), [("deepseek-r1-distill-llama-8b", 128256), ("tinyllama-1.1b-chat", 32000)]
)
def test_real_tokenizers_verify(tokenizer: str, size: int, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", vocabulary=size, layers=1, hidden=32, feed_forward=64, tied=False)
    AutoTokenizer.from_pretrained(SHARED / "tokenizers" / tokenizer).save_pretrained(base)  # as training does
    export_module.export_models(base, None, tmp_path, "m", ["F16"])
    result = verify_gguf(tmp_path / "m-F16.gguf", base, None, EXAMPLES[:1], THRESHOLDS)
    assert [(check.name, check.detail) for check in result.checks if not check.passed] == []


def test_the_stages_work_together(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = models
    config = Config.model_validate(
        {
            "name": "m",
            "model": {"base": str(base)},
            "export": {"quantizations": ["F16", "Q8_0"], "ship": "Q8_0"},
            "verify": THRESHOLDS.model_dump() | {"prompts": 1},
        }
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data/eval.jsonl").write_text(
        "".join(json.dumps(dataclasses.asdict(example)) + "\n" for example in EXAMPLES)
    )
    exported = export_module.export(config, {"train": adapter}, tmp_path / "gguf")
    assert exported.ship == "m-Q8_0.gguf" and exported.base == "m-base-Q8_0.gguf"
    monkeypatch.setattr(verify.Artifact, "load", lambda path, kind: SimpleNamespace(result=exported))
    inputs = {"train": adapter, "export": tmp_path / "gguf", "prepare": tmp_path / "data"}
    result = verify.verify(config, inputs, tmp_path / "verify")
    assert result.passed
    names = [check.name for check in result.checks]
    assert "vocabulary of m-Q8_0.gguf" in names and "vocabulary of m-base-Q8_0.gguf" in names
    written = Verification.model_validate_json((tmp_path / "verify/verification.json").read_bytes())
    assert written == result
    export_module.export_models(base, None, tmp_path / "gguf", "m", ["F16"])
    with pytest.raises(GateFailed, match=r"logit error: normalized square error .* limit 0.0001"):
        verify.verify(config, inputs, tmp_path / "verify")
    assert not Verification.model_validate_json((tmp_path / "verify/verification.json").read_bytes()).passed
