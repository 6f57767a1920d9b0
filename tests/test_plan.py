import json
from pathlib import Path

import pytest
from tiny_models import save_model

from pipeline.config import load_config
from pipeline.plan import _parameters, make_plan

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("architecture", "preset", "total", "trained"),
    [
        (LLAMA_8B, "deepseek-r1-8b", 8_030_261_248, 41_943_040),
        (TINYLLAMA, "tinyllama-flashcards", 1_100_048_384, 12_615_680),
    ],
)
def test_parameter_counts_are_the_published_ones(
    architecture: dict[str, int], preset: str, total: int, trained: int
) -> None:
    assert _parameters(architecture, load_config(preset)) == (total, trained)


def test_a_plan_shows_the_mask_and_counts_steps(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    overrides = [
        f"model.base={base}",
        "model.max_seq_length=8192",
        "training.max_steps=null",
        "training.epochs=2",
        "training.batch_size=3",
    ]
    plan = make_plan(load_config(None, overrides))
    assert plan.problems == []
    assert plan.steps == 2 * -(-plan.train_rows // 3)
    prompt, completion = plan.example
    assert not prompt.in_loss and completion.in_loss
    assert completion.text.startswith("<think>\n") and completion.text.endswith("<|im_end|>")
    assert plan.verdict == f"reasoning, answer and end of turn are in the loss of all {plan.usable_records} records"


def test_a_run_that_cannot_fit_names_the_setting(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | LLAMA_8B | {"num_hidden_layers": 3200}
    (base / "config.json").write_text(json.dumps(config))
    plan = make_plan(load_config(None, [f"model.base={base}", "model.load_in_4bit=false"]))
    assert any("model.load_in_4bit=true" in problem for problem in plan.problems)
