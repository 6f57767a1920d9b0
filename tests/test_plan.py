"""The preflight on tiny models: what it counts, what it shows, and what it refuses with which setting."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_model_size import LLAMA_8B
from tiny_models import save_model

from pipeline.cli import cli
from pipeline.config import Config, load_config
from pipeline.errors import MedcotError
from pipeline.hardware import GIBIBYTE, Hardware
from pipeline.labels import label_verdict
from pipeline.machines import MACHINES, machine_named
from pipeline.plan import Plan, make_plan, raise_if_impossible
from pipeline.plan_display import print_plan
from pipeline.prompts import EncodedExample, Example


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that says it is an 8B model; it has no weights."""
    base = save_model(tmp_path_factory.mktemp("large"))
    (base / "model.safetensors").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | LLAMA_8B | {"head_dim": None, "tie_word_embeddings": False}))
    return base


def configured(base: Path, *overrides: str) -> Config:
    return load_config(None, [f"model.base={base}", "model.max_seq_length=4096", *overrides])


def plan_for(base: Path, machine: Hardware, *overrides: str) -> Plan:
    return make_plan(configured(base, *overrides), hardware=machine)


def test_a_plan_counts_steps_and_shows_the_mask(base: Path) -> None:
    overrides = ["training.max_steps=null", "training.epochs=2", "training.batch_size=3"]
    plan = make_plan(configured(base, *overrides))
    assert plan.problems == []
    assert (plan.workload.train_rows, plan.workload.eval_rows, plan.survey.complete) == (126, 24, True)
    assert plan.steps == 2 * -(-126 // 3)
    prompt, completion = plan.example
    assert not prompt.in_loss and completion.in_loss
    assert completion.text.startswith("<think>\n") and completion.text.endswith("<|im_end|>")
    # All 150 on an idle machine: the survey ends after three seconds.
    assert re.match(r"reasoning, answer and end of turn are in the loss of all 1\d\d records", plan.verdict)
    assert [stage.stage for stage in plan.stages][:3] == ["prepare", "train", "export"]
    assert all(stage.memory_bytes > 0 for stage in plan.stages)


def test_a_label_without_the_reasoning_is_found(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What R1's own template does to training data: the thought is gone from the labels."""
    from pipeline.base_model import load_chat_format
    from pipeline.prompts import ChatFormat

    chat_format = load_chat_format(base)
    whole = chat_format.encode

    def without_thought(self: ChatFormat, example: Example, *limit: int | None) -> EncodedExample:
        return whole(Example(example.question, None, example.answer), *limit)

    monkeypatch.setattr(ChatFormat, "encode", without_thought)
    verdict, fault = label_verdict(chat_format, chat_format.vocabulary, [Example("q", "because", "a")])  # type: ignore[arg-type]
    assert fault is not None and verdict == fault and "instead of the completion" in fault
    plan = make_plan(configured(base))
    with pytest.raises(MedcotError, match=r"(\d+) of \1 records: the labels say .* use another model.base"):
        raise_if_impossible(plan)


@pytest.mark.parametrize(
    ("overrides", "machine", "message"),
    [
        (["model.load_in_4bit=false"], "kaggle-t4", r"train needs .* of GPU memory .*: --set model.load_in_4bit=true"),
        (
            ["training.batch_size=64", "training.gradient_checkpointing=true"],
            "kaggle-t4",
            r"--set training.batch_size=\d+ --set training.gradient_accumulation=\d+",
        ),
        ([], "kaggle-p100", r"compute capability 6.0 and Unsloth needs 7.0"),
        (
            ["export.quantizations=[F16, Q8_0, Q4_K_M]"],
            "kaggle-t4",
            r"the run takes .*: --set export.quantizations=\[Q8_0,Q4_K_M\]",
        ),
        (["bench.transformers=true"], "colab-t4", r"bench needs .*: --set bench.transformers=false"),
    ],
)
def test_what_cannot_fit_names_the_setting(large: Path, overrides: list[str], machine: str, message: str) -> None:
    plan = plan_for(large, MACHINES[machine], *overrides)
    with pytest.raises(MedcotError, match=message):
        raise_if_impossible(plan)


def test_the_8b_preset_fits_a_kaggle_t4(large: Path) -> None:
    config = load_config("deepseek-r1-8b", [f"model.base={large}", "data.source=sample", "data.limit=150"])
    small = config.model_copy(
        update={"data": config.data.model_copy(update={"train_rows": 100, "config": None, "split": "train"})}
    )
    plan = make_plan(small, hardware=MACHINES["kaggle-t4"])
    assert plan.problems == []
    assert any("Kaggle ends a session" in note for note in plan.notes)
    choices = {choice.name: choice for choice in plan.choices}
    assert choices["computation"].value == "float16" and "no bfloat16" in choices["computation"].reason
    assert "8.0" in choices["attention"].reason and choices["batch"].value == "2 x 4"


def test_stages_that_are_not_run_are_not_asked_for(large: Path) -> None:
    config = configured(large, "model.load_in_4bit=false")
    plan = make_plan(config, hardware=MACHINES["kaggle-t4"], stages=["prepare"])
    assert plan.problems == [] and [stage.stage for stage in plan.stages] == ["prepare"]


def test_a_full_disk_is_known_before(base: Path) -> None:
    crowded = replace(MACHINES["colab-t4"], free_disk_bytes=1000, cache_disk_bytes=1000)
    plan = plan_for(base, crowded)
    assert any("the run with its downloads takes about" in problem for problem in plan.problems)


def test_a_session_without_gpu_is_told_where_to_get_one(base: Path) -> None:
    bare = replace(MACHINES["colab-t4"], gpu_names=(), gpu_memory_bytes=0, gpu_capability=None)
    assert (
        "this session has no GPU: choose a T4 (on Colab: Runtime, Change runtime type, T4 GPU)"
        in plan_for(base, bare).notes
    )


def test_a_gpu_that_this_pytorch_has_no_kernels_for_is_a_problem(base: Path) -> None:
    volta = replace(MACHINES["kaggle-t4"], gpu_names=("Tesla V100",), gpu_capability=(7, 0))
    assert plan_for(base, volta).problems == []
    [problem] = plan_for(base, replace(volta, gpu_architectures=("sm_75", "sm_80"))).problems
    assert problem.startswith(
        "Tesla V100 has compute capability 7.0 and this PyTorch has kernels for sm_75, sm_80 only"
    )


def test_two_gpus_are_told(base: Path) -> None:
    plan = plan_for(base, MACHINES["kaggle-t4x2"], "training.batch_size=2")
    assert "2 of 2 GPUs train, a process each" in plan.choices[0].reason


def test_too_few_records_name_the_setting(base: Path) -> None:
    plan = make_plan(configured(base, "data.train_rows=140"))
    assert any("lower data.train_rows or data.eval_rows" in problem for problem in plan.problems)


@pytest.mark.broad
def test_a_large_source_is_judged_by_its_first_records(base: Path, tmp_path: Path) -> None:
    row = {"Question": "q", "Complex_CoT": "Okay.", "Response": "a"}
    source = tmp_path / "many.jsonl"
    with source.open("w") as stream:
        for number in range(5000):
            stream.write(json.dumps(row | {"Question": f"What is finding {number}?"}) + "\n")
    plan = make_plan(configured(base, f"data.source={source}", "data.train_rows=4000"))
    assert not plan.survey.complete and plan.survey.read <= 2000
    assert plan.workload.train_rows == 4000 and "there are more" in plan.notes[0]
    assert plan.problems == []


def test_an_unknown_machine_lists_the_known_ones() -> None:
    with pytest.raises(MedcotError, match="kaggle-t4, kaggle-t4x2"):
        machine_named("kagle")


def test_without_colour_the_mask_is_bracketed(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(make_plan(configured(base)))
    text = capsys.readouterr().out
    assert text.count("⟦") == 2 and "⟦<think>" in text and "<|im_end|>⟧" in text
    assert "there is" in text and "verify" in text


@pytest.mark.broad
def test_a_run_that_cannot_fit_is_not_begun(base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "run", "--set", f"model.base={base}", "--until", "train"]
    command += ["--set", "data.eval_rows=150", "--run-dir", str(tmp_path), "--json"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr.count("Error in plan: ") == 1 and "lower data.train_rows" in outcome.stderr
    assert not (tmp_path / "data").exists() and (tmp_path / "plan.json").is_file()


def test_plan_json_is_one_document_and_exits_with_the_verdict(base: Path) -> None:
    arguments = ["plan", "--set", f"model.base={base}", "--set", "model.max_seq_length=4096", "--json"]
    outcome = CliRunner().invoke(cli, [*arguments, "--machine", "kaggle-p100"])
    assert isinstance(outcome.exception, MedcotError) and "compute capability 6.0" in str(outcome.exception)
    plan = Plan.model_validate_json(outcome.stdout)
    assert len(plan.problems) == 1 and plan.gpu_memory_bytes == 16 * GIBIBYTE
