"""The chat template's hash and the system prompt travel with adapter and GGUF, and a swapped template is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from peft import LoraConfig, get_peft_model
from tiny_models import CHATML, save_model
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.engines import LlamaCppEngine, Settings, TransformersEngine
from bench.evaluation_processes import evaluate_one
from bench.held_out import HeldOutRecord
from bench.record_outcome import EvaluationSettings
from bench.speed_probe import ProbeRequest, measure
from chat import proof
from export.export import export_models
from export.gguf_model import GgufModel
from export.recipe_metadata import SYSTEM_KEY, TEMPLATE_KEY, check_recorded_template
from export.verify import verify_gguf
from pipeline.adapter_recipe import RECIPE_NAME, AdapterRecipe, check_template, read_recipe, write_recipe
from pipeline.chat_template import template_sha256
from pipeline.config import Config, VerifyConfig
from pipeline.errors import MedcotError
from pipeline.prompts import Example
from pipeline.results import Check
from pipeline.training.lora_model import save_adapter

pytestmark = pytest.mark.broad


SYSTEM = "You are a careful physician."
EXAMPLES = [Example("A 54-year-old has chest pain. What next?", "Think of the heart first.", "An ECG.")]
THRESHOLDS = VerifyConfig.model_validate({"min_top1_agreement": 0.95})
SWAPPED = CHATML.replace("assistant", "model")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), layers=1)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as training saves it, on its untrained weights."""
    folder = tmp_path_factory.mktemp("adapter")
    config = Config.model_validate({"name": "m", "model": {"base": str(base)}, "prompt": {"system": SYSTEM}})
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    save_adapter(config, model, AutoTokenizer.from_pretrained(base), folder)
    return folder


@pytest.fixture(scope="module")
def exported(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    export_models(base, adapter, folder, "m", ["F16"], system=SYSTEM)
    return folder / "m-F16.gguf"


def with_metadata(source: Path, target: Path, changes: dict[str, str], removed: tuple[str, ...] = ()) -> Path:
    """The file as gguf-py's own metadata editor rewrites it."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    details = {key: MetadataDetails(GGUFValueType.STRING, value) for key, value in changes.items()}
    copy_with_new_metadata(reader, writer, details, list(removed))
    return target


@pytest.fixture(scope="module")
def swapped(exported: Path) -> Path:
    return with_metadata(exported, exported.with_name("swapped.gguf"), {"tokenizer.chat_template": SWAPPED})


@pytest.fixture(scope="module")
def from_elsewhere(exported: Path) -> Path:
    return with_metadata(exported, exported.with_name("elsewhere.gguf"), {}, (TEMPLATE_KEY, SYSTEM_KEY))


def check_of(gguf: Path, base: Path, adapter: Path | None, name: str = "chat template") -> Check:
    result = verify_gguf(gguf, base, adapter, EXAMPLES, THRESHOLDS)
    return next(check for check in result.checks if check.name == name)


def test_training_leaves_its_recipe_beside_the_adapter(base: Path, adapter: Path) -> None:
    trained = template_sha256(AutoTokenizer.from_pretrained(base).chat_template)
    assert read_recipe(adapter) == AdapterRecipe(base=str(base), template_sha256=trained, system=SYSTEM)
    saved_again = AutoTokenizer.from_pretrained(adapter).chat_template
    check_template(read_recipe(adapter), saved_again, str(adapter))
    with pytest.raises(MedcotError, match=r"chat template in .*adapter.* is not the one it was trained with"):
        check_template(read_recipe(adapter), SWAPPED, str(adapter))


def test_an_adapter_from_elsewhere_has_no_recipe_and_nothing_is_compared(tmp_path: Path) -> None:
    assert read_recipe(None) is None
    assert read_recipe(tmp_path) is None
    check_template(None, SWAPPED, "anywhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the file: Invalid JSON"),
        ('{"format": 2, "base": "b", "template_sha256": "0", "system": null}', "another version of medcot .format: "),
        ('{"format": 1, "base": "b", "system": null}', "template_sha256: Field required"),
    ],
)
def test_a_damaged_recipe_is_told_in_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / RECIPE_NAME).write_text(content)
    with pytest.raises(MedcotError, match=message) as caught:
        read_recipe(tmp_path)
    assert str(tmp_path / RECIPE_NAME) in str(caught.value) and "\n" not in str(caught.value)


def test_a_gguf_says_which_prompts_it_was_trained_with(exported: Path, adapter: Path) -> None:
    recipe = read_recipe(adapter)
    assert recipe is not None
    with GgufModel(exported, n_ctx=256, n_threads=1) as model:
        assert model.metadata[TEMPLATE_KEY] == recipe.template_sha256
        assert model.chat_format.system == SYSTEM
        assert SYSTEM in model.text(model.chat_format.question_ids("x"))
    with GgufModel(exported, n_ctx=256, n_threads=1, system="Be brief.") as model:
        assert model.chat_format.system == "Be brief."
    with GgufModel(exported, n_ctx=256, n_threads=1, system="") as model:
        assert model.chat_format.system is None


def test_a_swapped_template_is_found_wherever_the_file_is_used(
    swapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = r"chat template in .*swapped\.gguf is not the one it was trained with .*changed after export"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(MedcotError, match=told):  # chat
        proof.prove(swapped)
    settings = EvaluationSettings(max_new_tokens=4, engine=Settings(context_tokens=256, threads=1))
    with pytest.raises(MedcotError, match=told):
        evaluate_one(swapped, [HeldOutRecord(example) for example in EXAMPLES], tmp_path, settings)
    request = ProbeRequest(label="x", path=swapped, threads=1, prompt_tokens=8, generated_tokens=4, repeats=1)
    with pytest.raises(MedcotError, match=told):  # bench
        measure(request)


def test_a_file_without_a_record_is_taken_as_it_is(from_elsewhere: Path) -> None:
    with LlamaCppEngine(from_elsewhere, Settings(context_tokens=256, threads=1)) as engine:
        assert engine.chat_format.system is None
        assert engine.chat_format.question_ids("x")
    check_recorded_template(from_elsewhere, SWAPPED, {})


def test_verify_compares_the_file_its_record_and_the_training(
    exported: Path, swapped: Path, from_elsewhere: Path, base: Path, adapter: Path
) -> None:
    right = check_of(exported, base, adapter)
    assert right.passed and "as the file records; as the adapter records" in right.detail
    wrong = check_of(swapped, base, adapter)
    assert not wrong.passed
    assert "changed after export" in wrong.detail and "in training it was" in wrong.detail
    unrecorded = check_of(from_elsewhere, base, None)
    assert unrecorded.passed
    assert "the file records none" in unrecorded.detail and "adapter's folder records none" in unrecorded.detail


def test_verify_finds_a_system_prompt_other_than_in_training(exported: Path, base: Path, adapter: Path) -> None:
    path = with_metadata(exported, exported.with_name("system.gguf"), {SYSTEM_KEY: "You are a pirate."})
    assert "pirate" in check_of(path, base, adapter).detail
    assert not check_of(path, base, adapter).passed
    without = with_metadata(exported, exported.with_name("without.gguf"), {}, (SYSTEM_KEY,))
    assert "the file's system prompt is None, in training 'You are a" in check_of(without, base, adapter).detail


def test_an_adapter_whose_tokenizer_was_changed_is_not_measured(base: Path, adapter: Path, tmp_path: Path) -> None:
    changed = tmp_path / "adapter"
    changed.mkdir()
    for file in adapter.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "chat_template.jinja").write_text(SWAPPED)
    with (
        TransformersEngine(base, changed, Settings(threads=1)) as engine,
        pytest.raises(MedcotError, match=r"chat template in .*adapter is not the one it was trained with"),
    ):
        _ = engine.chat_format
    with TransformersEngine(base, adapter, Settings(threads=1)) as engine:
        assert engine.chat_format.system == SYSTEM


def test_both_engines_end_a_turn_where_the_template_does(base: Path, tmp_path: Path) -> None:
    """Even with a token that neither the model's configuration nor llama.cpp ends on."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "<think>"))
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    end = next(token["id"] for token in tokens if token["content"] == "<think>")
    with TransformersEngine(folder, None, Settings(threads=1)) as engine:
        assert engine.chat_format.end_of_turn == "<think>"
        first = engine.generate(engine.chat_format.question_ids("x"), 1)[0]
        assert {end} < engine._end_ids and first not in engine._end_ids
    export_models(folder, None, tmp_path, "m", ["F16"])
    with GgufModel(tmp_path / "m-F16.gguf", n_ctx=256, n_threads=1) as model:
        assert model.is_end_of_generation(end)
        others = set(range(model.n_vocab)) - {end}
        assert all(model.is_end_of_generation(token) == model.llama_cpp_stops_at(token) for token in others)


def test_recipes_are_written_whole(tmp_path: Path) -> None:
    recipe = AdapterRecipe(base="b", template_sha256="0" * 64, system=None)
    write_recipe(tmp_path, recipe)
    assert read_recipe(tmp_path) == recipe
    assert [path.name for path in tmp_path.iterdir()] == [RECIPE_NAME]
