"""What an export takes over from training, what ``medcot export`` verifies, and the progress that people see."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_models import CHATML, read_metadata, save_adapter, save_model

from export import stream
from export.export import export_models
from export.tokenizer_metadata import read_vocabulary
from pipeline import progress
from pipeline.adapter_recipe import RECIPE_NAME, AdapterRecipe, write_recipe
from pipeline.chat_template import template_sha256
from pipeline.cli import cli
from pipeline.errors import GateFailed, MedcotError
from pipeline.progress import ExportProgressBar


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return with_tokenizer(save_adapter(tmp_path / "adapter", base), base)


def with_tokenizer(adapter: Path, base: Path, template: str = CHATML) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_bytes((base / name).read_bytes())
    (adapter / "chat_template.jinja").write_text(template)
    return adapter


def medcot(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def test_a_trained_adapter_brings_its_system_prompt(base: Path, adapter: Path, tmp_path: Path) -> None:
    recipe = AdapterRecipe(base="b", template_sha256=template_sha256(CHATML), system="Answer as a physician.")
    write_recipe(adapter, recipe)
    result = export_models(base, adapter, tmp_path / "out", "m", ["F16"])
    assert not [warning for warning in result.warnings if RECIPE_NAME in warning]
    assert read_metadata(tmp_path / "out/m-F16.gguf")["medcot.system_prompt"] == "Answer as a physician."
    assert "Answer as a physician." in (tmp_path / "out/Modelfile").read_text()
    export_models(base, adapter, tmp_path / "other", "m", ["F16"], system="Be brief.")
    assert read_metadata(tmp_path / "other/m-F16.gguf")["medcot.system_prompt"] == "Be brief."


def test_another_template_than_in_training_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    write_recipe(adapter, AdapterRecipe(base="b", template_sha256=template_sha256(CHATML), system=None))
    (adapter / "chat_template.jinja").write_text(CHATML + " ")
    with pytest.raises(MedcotError, match=r"chat template in .*adapter is not the one it was trained with"):
        export_models(base, adapter, tmp_path / "out", "m", ["F16"])
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_recipe_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = export_models(base, adapter, tmp_path / "out", "m", ["F16"])
    assert f"{adapter} has no medcot.json: its chat template is not compared." in result.warnings


def test_the_end_of_turn_is_in_the_metadata_where_it_is_not_eos(base: Path, adapter: Path, tmp_path: Path) -> None:
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    assert "eot" not in read_vocabulary(base, size).special_ids
    with_tokenizer(adapter, base, CHATML.replace("<|im_end|>", "<think>"))
    vocabulary = read_vocabulary(adapter, size)
    assert vocabulary.tokens[vocabulary.special_ids["eot"]] == "<think>"
    assert vocabulary.tokens[vocabulary.special_ids["eos"]] == "<|im_end|>"
    export_models(base, adapter, tmp_path / "out", "m", ["F16"])
    metadata = read_metadata(tmp_path / "out/m-F16.gguf")
    assert metadata["tokenizer.ggml.eot_token_id"] == vocabulary.special_ids["eot"]


def test_the_command_verifies_what_it_wrote(base: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = ("--base", base, "--adapter", adapter, "--quant", "Q8_0", "--quant", "F16", "--json", "--out")
    done = medcot(*arguments, tmp_path / "out")
    assert done.exit_code == 0, done.output
    verification = json.loads(done.stdout)["verification"]
    assert verification["passed"] and verification["logit_nmse"] < 1e-4
    assert "Verified: the trained model (" in done.stderr

    without = medcot(*arguments, tmp_path / "without", "--no-verify")
    assert json.loads(without.stdout)["verification"] is None and "erified" not in without.stderr
    combined = medcot("--base", base, "--adapter", f"{adapter}=0.5", "--out", tmp_path / "half", "--quant", "F16")
    assert combined.exit_code == 0
    assert "Not verified: the reference takes one adapter with weight 1, not a combination." in combined.stderr


def test_a_file_that_is_not_the_model_fails_the_gate(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = stream.quantize

    def noisy(rows: np.ndarray, ggml_type: object, importance: object) -> np.ndarray:
        changed = rows + np.random.default_rng(0).normal(0, 0.05, rows.shape).astype(np.float32)
        return quantize(changed, ggml_type, importance)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "quantize", noisy)
    done = medcot("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--quant", "F16")
    assert isinstance(done.exception, GateFailed) and done.exception.exit_status == 3
    assert "FAILED  " in done.stderr and "Verified" not in done.stderr


def test_progress_without_a_terminal(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExportProgressBar() as bar:
        bar.written("blk.0.attn_q.weight", 500_000_000, 2_000_000_000)
    assert capsys.readouterr().err.strip() == "", "a short export has no lines"
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0.0)
    seconds = iter(range(100, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with ExportProgressBar() as bar:
        bar.written("blk.0.attn_q.weight", 500_000_000, 2_000_000_000)
        bar.written("blk.0.attn_k.weight", 1_000_000_000, 2_000_000_000)
        bar.fetched("owner/name/model.safetensors", 100, 2_000_000_000)
        bar.measured(3, 10)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.strip()] == [
        "export: blk.0.attn_q.weight, 0.50 of 2.00 GB, 0 MB/s, -:-- left",
        "export: blk.0.attn_k.weight, 1.00 of 2.00 GB, 50 MB/s, 0:20 left",
        "export: fetching owner/name/model.safetensors, 0.00 of 2.00 GB, 0 MB/s, -:-- left",
        "export: importance matrix, 3 of 10, -:-- left",
    ]
