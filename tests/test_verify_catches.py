"""Every way in which an export goes wrong is caught, by the check that is about it, with the first difference named."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from tiny_models import CHATML, save_adapter, save_model

from export import architecture, tokenizer_metadata
from export import export as export_module
from export.verify import raise_if_failed, verify_exported, verify_gguf
from pipeline.config import VerifyConfig
from pipeline.errors import GateFailed
from pipeline.prompts import Example
from pipeline.results import Check, ExportedModels, Verification

pytestmark = pytest.mark.broad


EXAMPLES = [
    Example("A 54-year-old has chest pain. What next?", "Think of the heart first.", "An ECG."),
    Example("Is </think> 250 mg\n\n  of <|im_end|> metformin enough?", "It depends on the kidney.", "Often."),
]
THRESHOLDS = VerifyConfig.model_validate({"min_top1_agreement": 0.95})  # random logits lie close together
# Slow rotations are what such a scaling changes; within 32 positions they are among those of a tiny head too.
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclasses.dataclass(frozen=True)
class Exported:
    base: Path
    adapter: Path
    folder: Path
    models: ExportedModels

    @property
    def f16(self) -> Path:
        return self.folder / "m-F16.gguf"

    def verify(self, gguf: Path) -> Verification:
        return verify_gguf(gguf, self.base, self.adapter, EXAMPLES, THRESHOLDS, threads=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("models")
    base = save_model(folder / "base", layers=2, rope_parameters=SCALED)
    adapter = save_adapter(folder / "adapter", base)
    models = export_module.export_models(base, adapter, folder / "gguf", "m", ["F16", "Q8_0"], "Q8_0")
    return Exported(base, adapter, folder / "gguf", models)


def failed(result: Verification) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks if not check.passed}


def found(result: Verification, name: str) -> Check:
    return next(check for check in result.checks if check.name == name)


Breaking = Callable[[Exported, Path, pytest.MonkeyPatch], Path]


def exporting(break_it: Callable[[pytest.MonkeyPatch], None]) -> Breaking:
    """The file of an exporter of which a part is broken."""

    def export(exported: Exported, folder: Path, patch: pytest.MonkeyPatch) -> Path:
        break_it(patch)
        export_module.export_models(exported.base, exported.adapter, folder, "m", ["F16"])
        return folder / "m-F16.gguf"

    return export


def without_adapter(exported: Exported, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    export_module.export_models(exported.base, None, folder, "m", ["F16"])
    return folder / "m-F16.gguf"


def vocabulary(change: Callable[[tokenizer_metadata.Vocabulary], dict[str, object]]) -> Breaking:
    def break_it(patch: pytest.MonkeyPatch) -> None:
        read = tokenizer_metadata.read_vocabulary

        def broken(folder: Path, size: int) -> tokenizer_metadata.Vocabulary:
            right = read(folder, size)
            return dataclasses.replace(right, **change(right))

        patch.setattr(export_module, "read_vocabulary", broken)

    return exporting(break_it)


def shifted(right: tokenizer_metadata.Vocabulary) -> dict[str, object]:
    """All ordinary tokens one place further."""
    ordinary = [index for index, kind in enumerate(right.types) if kind is TokenType.NORMAL]
    tokens = list(right.tokens)
    for index, source in zip(ordinary, [ordinary[-1], *ordinary], strict=False):
        tokens[index] = right.tokens[source]
    return {"tokens": tokens}


def editing(change: Callable[[GGUFReader], None], of: str = "m-F16.gguf") -> Breaking:
    """The right file with numbers changed in place."""

    def edit(exported: Exported, folder: Path, patch: pytest.MonkeyPatch) -> Path:
        folder.mkdir(exist_ok=True)
        path = shutil.copy(exported.folder / of, folder / of)
        reader = GGUFReader(path, "r+")
        change(reader)
        reader.data.flush()
        return Path(path)

    return edit


def with_number(key: str, value: float) -> Breaking:
    def change(reader: GGUFReader) -> None:
        field = reader.fields[key]
        field.parts[field.data[0]][0] = value

    return editing(change)


def with_text(key: str, value: str) -> Breaking:
    def edit(exported: Exported, folder: Path, patch: pytest.MonkeyPatch) -> Path:
        details = {key: MetadataDetails(GGUFValueType.STRING, value)}
        copy_with_new_metadata(GGUFReader(exported.f16), GGUFWriter(folder / "m.gguf", "llama"), details, [])
        return folder / "m.gguf"

    return edit


def tensor_times(name: str, factor: float, of: str = "m-F16.gguf") -> Breaking:
    def change(reader: GGUFReader) -> None:
        tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
        tensor.data[:] = tensor.data * factor

    return editing(change, of)


def truncated(exported: Exported, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    path = folder / "m.gguf"
    path.write_bytes(exported.f16.read_bytes()[:-5000])
    return path


FIRST_TOKEN = r"first at token \d+ of conversation 1: after '.+' comes .+ instead of "
BREAKINGS: dict[str, tuple[Breaking, str, str]] = {
    "adapter not merged": (
        without_adapter,
        "adapter",
        r"the adapter is not merged: KL divergence [\d.]+ from the tuned",
    ),
    "alpha ignored": (
        exporting(lambda patch: patch.setattr("export.lora._scale", lambda module, rank, config: 1.0)),
        "logit error",
        FIRST_TOKEN,
    ),
    "q and k rows not permuted": (
        exporting(
            lambda patch: patch.setattr(
                architecture, "_rotary_order", lambda heads, head_dim: np.arange(heads * head_dim)
            )
        ),
        "logit error",
        FIRST_TOKEN,
    ),
    "wrong rope base": (with_number("llama.rope.freq_base", 500_000.0), "logit error", FIRST_TOKEN),
    "rope scaling dropped": (
        exporting(
            lambda patch: patch.setattr(
                architecture.Architecture, "_rope_factors", lambda self: np.ones(self.head_dim // 2, np.float32)
            )
        ),
        "logit error",
        FIRST_TOKEN,
    ),
    "one tensor zeroed": (tensor_times("blk.1.attn_output.weight", 0.0), "logit error", FIRST_TOKEN),
    "one norm off": (tensor_times("blk.1.ffn_norm.weight", 1.1), "logit error", FIRST_TOKEN),
    "wrong pre-tokenizer": (
        with_text("tokenizer.ggml.pre", "llama-bpe"),
        "token ids: whole texts",
        r"^'.+', from token \d+ on, becomes \[.+\], in training \[",
    ),
    "token order shifted": (
        vocabulary(shifted),
        "token ids: whole texts",
        r"^\"The patient's BP .+\", from token 0 on, becomes \[.+\], in training \[",
    ),
    "wrong eos": (
        with_number("tokenizer.ggml.eos_token_id", 1),
        "BOS and EOS",
        r"EOS is '<\|im_start\|>', in training '<\|im_end\|>'",
    ),
    "bos added": (
        with_number("tokenizer.ggml.add_bos_token", True),
        "BOS and EOS",
        "adding BOS is True, in training False",
    ),
    "template swapped": (
        with_text("tokenizer.chat_template", CHATML.replace("assistant", "model")),
        "rendered templates",
        r"^\(user\) reads '.*model.*' at character \d+, in training '.*assistant",
    ),
    "truncated": (truncated, "loads", "cannot be loaded by llama.cpp"),
}


@pytest.mark.parametrize("broken", BREAKINGS)
def test_a_broken_export_is_caught(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    break_it, caught_by, told = BREAKINGS[broken]
    path = break_it(exported, tmp_path, monkeypatch)
    monkeypatch.undo()
    result = exported.verify(path)
    faults = failed(result)
    assert re.search(told, faults[caught_by]), faults
    with pytest.raises(GateFailed, match="The GGUF is not the trained model"):
        raise_if_failed(result)


def test_a_right_export_passes_with_all_its_files(exported: Exported) -> None:
    result = verify_exported(
        exported.folder, exported.models, exported.base, exported.adapter, EXAMPLES, THRESHOLDS, threads=1
    )
    assert failed(result) == {}
    raise_if_failed(result)
    exact, quantized, base = result.files
    assert (exact.name, exact.quantization, exact.reference) == ("m-F16.gguf", "F16", "base + adapter in 32 bit")
    assert (quantized.quantization, quantized.reference) == ("Q8_0", "m-F16.gguf")
    assert (base.name, base.reference) == ("m-base-Q8_0.gguf", "base in 32 bit")
    assert 0 < exact.mean_kl < quantized.mean_kl < 0.01 and quantized.mean_kl <= quantized.p99_kl
    assert quantized.tensor_error is not None and 0.004 < quantized.tensor_error < 0.01
    assert exact.positions == quantized.positions == result.positions > base.positions > 30


def test_broken_further_files_are_each_caught(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among right files: a tensor zeroed, the adapter missing, the adapter in the base, cut short, another template."""
    folder = tmp_path / "gguf"
    shutil.copytree(exported.folder, folder)
    right = {file.name: file for file in exported.models.files}

    def further(source: Path, name: str, role: str = "tuned") -> str:
        shutil.copy(source, folder / name)
        files.append(right["m-Q8_0.gguf"].model_copy(update={"name": name, "role": role}))
        return name

    files = list(right.values())
    zeroed = tensor_times("blk.1.attn_output.weight", 0, "m-Q8_0.gguf")(exported, tmp_path / "zeroed", monkeypatch)
    further(zeroed, "zeroed.gguf")
    further(exported.folder / "m-base-Q8_0.gguf", "unmerged.gguf")
    further(exported.folder / "m-Q8_0.gguf", "base-with-adapter.gguf", "base")
    further(truncated(exported, tmp_path, monkeypatch), "short.gguf")
    template = with_text("tokenizer.chat_template", CHATML.replace("assistant", "model"))
    further(template(exported, tmp_path, monkeypatch), "template.gguf")
    models = exported.models.model_copy(update={"files": files})
    result = verify_exported(folder, models, exported.base, exported.adapter, EXAMPLES[:1], THRESHOLDS, threads=1)
    faults = failed(result)
    assert "blk.1.attn_output.weight (Q8_0) differs by 1 of its size, limit" in faults["weights of zeroed.gguf"]
    assert "mean KL divergence" in faults["logits of unmerged.gguf"]
    assert "mean KL divergence" in faults["logits of base-with-adapter.gguf"]
    assert "cannot be loaded by llama.cpp" in faults["vocabulary of short.gguf"]
    assert "changed after export" in faults["vocabulary of template.gguf"]
    assert not any(name.endswith(tuple(right)) for name in faults)
