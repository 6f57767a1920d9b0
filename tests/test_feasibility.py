"""What a later stage refuses the plan refuses first, in the same words."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import save_model

from bench.gates import check_gates
from bench.speed_probe import ProbeRequest
from export.export import export_models
from export.importance_file import Activations, ImportanceMatrix, read_importance, write_importance
from pipeline.config import load_config
from pipeline.errors import MedcotError
from pipeline.machines import MACHINES
from pipeline.plan import make_plan, raise_if_impossible
from pipeline.results import ModelEvaluation


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base")


def told_by_plan(base: Path, *overrides: str) -> list[str]:
    """The plan's problems; those that keep it from being made are its error."""
    config = load_config(None, [f"model.base={base}", "model.max_seq_length=4096", *overrides])
    try:
        return make_plan(config, hardware=MACHINES["kaggle-t4"]).problems
    except MedcotError as error:
        return [str(error).removesuffix(".")]


def told_by(work: Callable[[], object]) -> str:
    with pytest.raises(MedcotError) as caught:
        work()
    return str(caught.value).removesuffix(".")


def change_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_weights(base: Path, change: Callable[[dict[str, object]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def of_another_split(base: Path) -> None:
    path = base / "tokenizer.json"
    description = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}|\s+"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    path.write_text(json.dumps(description))


FIRST_MATRIX = "model.layers.0.self_attn.q_proj.weight"
BASES: dict[str, Callable[[Path], object]] = {
    "architecture": lambda base: change_json(base / "config.json", architectures=["Phi3ForCausalLM"]),
    "architecture of another kind": lambda base: change_json(
        base / "config.json", architectures=["GPT2LMHeadModel"], hidden_size=None, num_hidden_layers=None
    ),
    "rotary scaling": lambda base: change_json(
        base / "config.json", rope_parameters=None, rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 4.0}
    ),
    "rotary scaling without its number": lambda base: change_json(
        base / "config.json", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    ),
    "quantized base": lambda base: change_json(base / "config.json", quantization_config={"quant_method": "fp8"}),
    "activation": lambda base: change_json(base / "config.json", hidden_act="gelu"),
    "vocabulary smaller than the tokenizer": lambda base: change_json(base / "config.json", vocab_size=100),
    "another pre-tokenizer": of_another_split,
    "a tensor that is missing": lambda base: change_weights(base, lambda tensors: tensors.pop(FIRST_MATRIX)),
    "a tensor too many": lambda base: change_weights(
        base, lambda tensors: tensors.update({FIRST_MATRIX + "_scale": tensors["model.norm.weight"].copy()})
    ),
    "a git-lfs pointer": lambda base: (base / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_export_refuses_is_refused_by_the_plan(case: str, base: Path, tmp_path: Path) -> None:
    assert told_by_plan(base) == []
    BASES[case](base)
    exported = told_by(lambda: export_models(base, None, tmp_path / "gguf", "m", ["F16"]))
    assert exported in told_by_plan(base), "which tells all at once"


def test_a_base_without_a_chat_template_is_refused_by_the_plan(base: Path) -> None:
    (base / "chat_template.jinja").unlink()
    [problem] = told_by_plan(base)
    assert "has no chat template" in problem


def test_a_type_that_export_does_not_write_is_refused_by_the_plan(base: Path, tmp_path: Path) -> None:
    exported = told_by(lambda: export_models(base, None, tmp_path / "gguf", "m", ["Q4_K_X"]))
    assert told_by_plan(base, "export.quantizations=[Q4_K_X]", "export.ship=Q4_K_X") == [exported]


def test_an_importance_matrix_is_read_and_compared_by_the_plan(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    missing = told_by(lambda: read_importance(path))
    assert told_by_plan(base, f"export.imatrix={path}") == [missing]
    other = save_model(tmp_path / "other", layers=1)
    tensors = {
        f"blk.0.{name}.weight": Activations(load_file(other / "model.safetensors")["model.norm.weight"] ** 2, 9)
        for name in ("attn_q", "attn_k")
    }
    write_importance(path, ImportanceMatrix(tensors, ("text",), 512))
    importance = read_importance(path)
    exported = told_by(lambda: export_models(base, None, tmp_path / "gguf", "m", ["Q8_0"], importance=importance))
    assert told_by_plan(base, f"export.imatrix={path}") == [exported]


@pytest.mark.parametrize(
    ("gate", "overrides"),
    [
        ("choice_accuracy", ["evaluation.choice_rows=0"]),
        ("choice_accuracy", ["data.columns.options=null"]),
        ("reasoning_perplexity", ["data.columns.reasoning=null"]),
    ],
)
def test_a_gate_on_what_the_data_cannot_show_is_refused_by_the_plan(
    gate: str, overrides: list[str], base: Path
) -> None:
    gates = [f"evaluation.gates={{{gate}: '<= 9'}}"]
    assert told_by_plan(base, *gates) == []
    config = load_config(None, gates)
    unmeasured = ModelEvaluation.model_construct(model="m", role="tuned", **{gate: None})
    [outcome] = check_gates(config.evaluation.parsed_gates, [unmeasured], [])
    assert not outcome.passed and outcome.detail.startswith(f"{gate} must be <= 9 and is not measured, since no record")
    assert told_by_plan(base, *gates, *overrides) == [outcome.detail]


def test_a_speed_test_that_does_not_fit_its_context_is_refused_by_the_plan(base: Path) -> None:
    request = ProbeRequest(
        label="m",
        path=base,
        threads=1,
        prompt_tokens=64,
        generated_tokens=8,
        repeats=1,
        depths=(512,),
        context_tokens=600,
    )
    probed = told_by(lambda: request.needed_context)
    overrides = [
        "bench.prompt_tokens=64",
        "bench.generated_tokens=8",
        "bench.depths=[0, 512]",
        "bench.context_tokens=600",
    ]
    assert told_by_plan(base, *overrides) == [probed]


def test_lora_on_modules_that_the_model_lacks_is_refused_by_the_plan(base: Path) -> None:
    [problem] = told_by_plan(base, "lora.target_modules=[q_proj, query_key_value]")
    assert problem.startswith("lora.target_modules names query_key_value, which this model does not have: choose among")


def test_stages_that_do_not_run_are_not_asked(base: Path) -> None:
    change_json(base / "config.json", architectures=["Phi3ForCausalLM"])
    config = load_config(None, [f"model.base={base}", "model.max_seq_length=4096"])
    assert make_plan(config, hardware=MACHINES["kaggle-t4"], stages=["prepare", "train"]).problems == []
    with pytest.raises(MedcotError, match="names the architecture Phi3ForCausalLM"):
        raise_if_impossible(make_plan(config, hardware=MACHINES["kaggle-t4"]))
