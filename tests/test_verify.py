"""Verification passes what is right, measures what it says, and works in its stage; what it catches is in
``test_verify_catches.py``.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import LlamaFileType
from tiny_models import SHARED, save_adapter, save_model

from export import export as export_module
from export import tokenizer_metadata, verify, verify_logits
from export.quant_types import FILE_TYPES
from export.verify import raise_if_failed, verify_gguf
from export.verify_child import ask
from export.verify_limits import MEASURED, LogitLimits, limits_of, type_name
from export.verify_logits import Disagreement, LogitComparison, probability
from export.verify_predictions import Distances, Ending, adapter_check, end_of_turn_check, logit_checks
from export.verify_probe import Answer, logits_path
from export.verify_reference import Reference
from pipeline.base_model import load_tokenizer
from pipeline.config import Config, VerifyConfig
from pipeline.errors import GateFailed, MedcotError
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
    return verify_gguf(folder / f"m-{quantization}.gguf", base, adapter, EXAMPLES, THRESHOLDS, threads=1)


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


@pytest.mark.broad
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real tokenizers is not here")
@pytest.mark.parametrize(
    ("tokenizer", "size"), [("deepseek-r1-distill-llama-8b", 128256), ("tinyllama-1.1b-chat", 32000)]
)
def test_real_tokenizers_verify(tokenizer: str, size: int, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", vocabulary=size, layers=1, hidden=32, feed_forward=64, tied=False)
    load_tokenizer(SHARED / "tokenizers" / tokenizer).save_pretrained(base)  # as training does
    export_module.export_models(base, None, tmp_path, "m", ["F16"])
    result = verify_gguf(tmp_path / "m-F16.gguf", base, None, EXAMPLES[:1], THRESHOLDS, threads=1)
    assert [(check.name, check.detail) for check in result.checks if not check.passed] == []


@pytest.mark.broad
def test_the_stages_work_together(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = models
    config = Config.model_validate(
        {
            "name": "m",
            "model": {"base": str(base)},
            "export": {"quantizations": ["F16", "Q8_0"], "ship": "Q8_0"},
            "verify": THRESHOLDS.model_dump() | {"prompts": 1, "max_new_tokens": 4},
        }
    )
    (tmp_path / "data").mkdir()
    for name, examples in (("eval", EXAMPLES), ("train", EXAMPLES[::-1])):
        lines = [json.dumps(dataclasses.asdict(example)) + "\n" for example in examples]
        (tmp_path / f"data/{name}.jsonl").write_text("".join(lines))
    exported = export_module.export(config, {"train": adapter}, tmp_path / "gguf")
    assert exported.ship == "m-Q8_0.gguf" and exported.base == "m-base-Q8_0.gguf"
    monkeypatch.setattr(verify.Artifact, "load", lambda path, kind: SimpleNamespace(result=exported))
    inputs = {"train": adapter, "export": tmp_path / "gguf", "prepare": tmp_path / "data"}
    result = verify.verify(config, inputs, tmp_path / "verify")
    assert result.passed
    names = [check.name for check in result.checks]
    assert "vocabulary of m-Q8_0.gguf" in names and "vocabulary of m-base-Q8_0.gguf" in names
    assert [file.name for file in result.files] == ["m-F16.gguf", "m-Q8_0.gguf", "m-base-Q8_0.gguf"]
    details = {check.name: check.detail for check in result.checks}
    assert details["token ids: training prompts"].endswith("ids of 3 texts are equal")  # one held out, two trained
    ending = details["end of turn"]
    assert re.search(r"it answers a question in [0-4] tokens (and ends|without an end)$", ending)
    written = Verification.model_validate_json((tmp_path / "verify/verification.json").read_bytes())
    assert written == result
    export_module.export_models(base, None, tmp_path / "gguf", "m", ["F16"])
    with pytest.raises(GateFailed, match=r"logit error: normalized square error .* limit 0.0001"):
        verify.verify(config, inputs, tmp_path / "verify")
    assert not Verification.model_validate_json((tmp_path / "verify/verification.json").read_bytes()).passed


def test_divergence_is_the_sum_over_the_vocabulary() -> None:
    """KL of two known distributions; blocks of positions add up to what the whole gives."""
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    expected, found = np.log([p, p, p]).astype(np.float32) + 3, np.log([p, q, q[::-1]]).astype(np.float32) - 2
    comparison = LogitComparison()
    comparison.add(expected[:2], found[:2], 0)
    comparison.add(expected[2:], found[2:], 1)
    of_q = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(comparison.kl, [0, of_q, 0], atol=1e-6)
    assert (comparison.positions, comparison.agreeing) == (3, 2)
    assert comparison.first_disagreement == Disagreement(sequence=0, position=1, expected=0, found=2)
    assert comparison.p99_kl == pytest.approx(0.98 * of_q, rel=1e-5)
    wide = expected.astype(np.float64)
    assert comparison.nmse == pytest.approx(np.square(wide - found).sum() / np.square(wide).sum())
    assert probability(found[1], 2) == pytest.approx(0.5)


def test_a_large_vocabulary_is_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    expected, found = generator.normal(size=(2, 37, 11)).astype(np.float32)
    whole, parts = LogitComparison(), LogitComparison()
    whole.add(expected, found)
    monkeypatch.setattr(verify_logits, "_BLOCK_LOGITS", 44)
    parts.add(expected, found)
    np.testing.assert_allclose(parts.kl, whole.kl)
    assert (parts.agreeing, parts.first_disagreement) == (whole.agreeing, whole.first_disagreement)
    assert parts.nmse == pytest.approx(whole.nmse)


def test_logits_that_are_no_numbers_fail() -> None:
    comparison = LogitComparison()
    comparison.add(np.ones((1, 3), np.float32), np.full((1, 3), np.nan, np.float32))
    checks = logit_checks(comparison, limits_of(1, THRESHOLDS), [[0]], str)
    assert [(check.passed, check.detail) for check in checks] == [(False, "the logits are not finite")]


ANSWER = Answer.model_construct(stop_ids=[2], answer_tokens=None, answer_ended=False)
F16, Q4_0 = limits_of(1, THRESHOLDS), limits_of(2, THRESHOLDS)


@pytest.mark.parametrize(
    ("found", "stop", "limits", "passed"),
    [
        ([2, 2, 2, 2], 2, F16, True),
        ([2, 2, 2, 7], 2, F16, False),
        ([2, 2, 7, 7], 2, Q4_0, True),  # quantization may change some
        ([2, 7, 7, 7], 2, Q4_0, False),
        ([2, 2, 2, 2], 3, Q4_0, False),  # llama.cpp would go on behind the end of the turn
    ],
)
def test_turns_have_to_end_where_the_model_ends_them(
    found: list[int], stop: int, limits: LogitLimits, passed: bool
) -> None:
    endings = [Ending(end=2, probability=0.95, found=token) for token in found]
    unsure = Ending(end=2, probability=0.6, found=7)
    answer = ANSWER.model_copy(update={"stop_ids": [stop]})
    check = end_of_turn_check([unsure, *endings], answer, limits, str)
    assert check.passed is passed
    if not passed:
        assert re.search(r"first in conversation [2-5]: the model writes '\[2\]' \(probability 0.950\)", check.detail)
    assert end_of_turn_check([unsure], answer, limits, str).passed  # a model that was hardly trained


def test_an_adapter_that_changes_nothing_is_not_missed() -> None:
    untrained = Distances(from_tuned=0.011, from_base=0.010, between=1e-6)
    assert "not to be seen" in adapter_check("tuned", untrained, Q4_0).detail
    assert adapter_check("tuned", untrained, Q4_0).passed and adapter_check("base", untrained, Q4_0).passed
    trained = Distances(from_tuned=0.02, from_base=0.5, between=0.5)
    assert adapter_check("tuned", trained, Q4_0).passed
    assert adapter_check("base", trained, Q4_0).detail.startswith("the adapter is in the base")
    # As measured on SmolLM2: within Q2_K's limit of divergence, and yet without its adapter.
    unmerged = Distances(from_tuned=1.15, from_base=0.635, between=0.83)
    assert not adapter_check("tuned", unmerged, limits_of(LlamaFileType.MOSTLY_Q2_K, THRESHOLDS)).passed


def test_limits_are_wider_than_what_was_measured_and_narrower_than_a_model_without_its_adapter() -> None:
    for number, measured in MEASURED.items():
        limits = limits_of(number, THRESHOLDS)
        assert limits.max_mean_kl is not None
        assert max(measured.smollm2_kl, measured.llama3_8b_kl) * 2 < limits.max_mean_kl
        assert limits.min_top1 < measured.smollm2_top1
    written = {each.number for each in FILE_TYPES.values() if each.default.name not in ("F32", "F16", "BF16")}
    assert written == set(MEASURED)
    assert limits_of(1, THRESHOLDS).min_top1 == 0.95 and limits_of(32, VerifyConfig.model_validate({})).min_top1 < 0.98
    assert limits_of(-1, THRESHOLDS) == limits_of(LlamaFileType.MOSTLY_Q2_K, THRESHOLDS)
    assert (type_name(15), type_name(0), type_name(-1)) == ("Q4_K_M", "F32", "type -1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is imitated by /dev/full, which only Linux has")
def test_a_full_disk_is_not_the_ggufs_fault(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = models
    export_module.export_models(base, adapter, tmp_path, "m", ["F16"])
    request = Reference(base, adapter, None).request(tmp_path / "m-F16.gguf", EXAMPLES, ["a"], 0, 1)
    folder = tmp_path / "probe"
    folder.mkdir()
    logits_path(folder, 0).symlink_to("/dev/full")
    with pytest.raises(MedcotError, match=r"logits to compare need .* GB .*No space left on device.*TMPDIR") as caught:
        ask(request, folder)
    assert not isinstance(caught.value, GateFailed)


def test_long_conversations_keep_their_end(models: tuple[Path, Path]) -> None:
    base, adapter = models
    long = Example("Why?", "Because. " * 400, "An ECG.")
    request = Reference(base, adapter, None).request(Path("m.gguf"), [long], ["a"], 0, 1)
    ids = request.evaluate[0]
    assert len(ids) == 512
    control = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    assert ids[-1] == next(token["id"] for token in control if token["content"] == "<|im_end|>")


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [4, 5]}]
)
def test_the_reference_without_its_adapter_is_the_base(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = save_model(tmp_path / "base", layers=1, tied="modules_to_save" not in settings)
    reference = Reference(base, save_adapter(tmp_path / "adapter", base, **settings), None)
    ids = list(range(3, 40))
    tuned = reference.logits(ids)
    untuned = Reference(base, None, None).logits(ids)
    np.testing.assert_allclose(reference.logits(ids, adapted=False), untuned, atol=1e-6)
    assert np.abs(tuned - untuned).max() > 0.1
    np.testing.assert_array_equal(reference.logits(ids), tuned)
