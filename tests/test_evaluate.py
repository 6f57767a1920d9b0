import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bench_models import FakeEngine, make_tiny_model

from bench import engines, evaluate
from bench.evaluation_display import print_evaluation
from bench.evaluation_processes import evaluate_one
from bench.gates import raise_if_failed
from bench.held_out import REFERENCE_QUESTIONS, HeldOutRecord, read_records
from bench.record_outcome import EvaluationSettings, measure_likelihood, record_keys
from export.export import export_models
from pipeline.artifacts import Manifest, write_manifest
from pipeline.config import Config
from pipeline.errors import GateFailed, MedcotError
from pipeline.gates import parse_gate
from pipeline.prompts import Example
from pipeline.results import Evaluation, ExportedFile, ExportedModels

EXAMPLES = [
    Example(f"Question {index}?", f"Because of {index}." if index else None, f"Answer {index}.") for index in range(4)
]
RECORDS = [HeldOutRecord(example) for example in EXAMPLES]
SETTINGS = EvaluationSettings(max_new_tokens=60)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "tuned.gguf", tmp_path / "base.gguf"]
    for path in paths:
        path.write_bytes(b"GGUF" + path.name.encode())
    return paths


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeEngine]:
    """The engines behind the two files: the tuned one thinks, the base does not; and what each was asked."""
    fakes = {"tuned.gguf": FakeEngine(), "base.gguf": FakeEngine("no thought", log_probability=-1.5)}
    monkeypatch.setattr(engines, "open_engine", lambda path, settings: fakes[path.name])

    # Fakes live in this process, so the models are evaluated here, one after the other.
    def in_this_process(tasks, roles, trained):  # type: ignore[no-untyped-def]
        for task in tasks:
            evaluate_one(task, range(len(task.records)))

    monkeypatch.setattr(evaluate, "evaluate_side_by_side", in_this_process)
    return fakes


def run(models: list[Path], out_dir: Path, records: list[HeldOutRecord] = RECORDS) -> Evaluation:
    return evaluate.evaluate_models(models, ["tuned", "base"], records, out_dir, SETTINGS)


def test_figures_are_those_of_the_engine(models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path) -> None:
    tuned, base = run(models, tmp_path / "eval").models
    assert (tuned.model, tuned.role, base.role) == ("tuned.gguf", "tuned", "base")
    assert tuned.answer_perplexity.value == pytest.approx(math.exp(0.5))
    assert base.answer_perplexity.value == pytest.approx(math.exp(1.5))
    assert tuned.answer_perplexity.n == 4
    assert tuned.reasoning_perplexity is not None and tuned.reasoning_perplexity.n == 3
    assert (tuned.well_formed.value, base.well_formed.value) == (1.0, 0.0)
    assert tuned.finished.value == 1.0
    assert tuned.mean_new_tokens == len(b"<think>\nbecause\n</think>\n\nso")


def test_likelihoods_are_read_at_the_right_positions(
    models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value i belongs to token i + 1: the first token of the thought counts, none of the prompt does."""
    import numpy as np

    fake = opened["tuned.gguf"]
    prompt, thought, answer = fake.chat_format.encode_parts(EXAMPLES[1])
    values = [-1000.0] * (len(prompt) - 1) + [-1.0] * len(thought) + [-2.0] * len(answer)
    monkeypatch.setattr(fake, "token_log_probabilities", lambda ids: np.array(values))
    outcome = measure_likelihood(fake, "key", RECORDS[1])
    assert (outcome.reasoning_nll, outcome.reasoning_tokens) == (len(thought), len(thought))
    assert (outcome.answer_nll, outcome.answer_tokens) == (2.0 * len(answer), len(answer))


def test_records_that_are_cut_off_in_the_thought_have_no_answer_to_measure(
    models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path
) -> None:
    """As data.too_long=truncate leaves a record whose thought alone is longer than the context."""
    prompt, _, _ = opened["tuned.gguf"].chat_format.encode_parts(EXAMPLES[1])
    cut = EvaluationSettings(max_new_tokens=60, max_record_tokens=len(prompt) + 5)
    found = evaluate.evaluate_models(
        models, ["tuned", "base"], [RECORDS[1]], tmp_path / "eval", cut, [parse_gate("answer_perplexity", "better")]
    )
    assert [model.answer_perplexity for model in found.models] == [None, None]
    assert all(model.reasoning_perplexity is not None and model.reasoning_perplexity.n == 1 for model in found.models)
    assert "answer_perplexity" not in {each.metric for each in found.comparisons}
    assert not found.gates[0].passed and "is not measured" in found.gates[0].detail
    print_evaluation(found)


def test_samples_hold_both_outputs(models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path) -> None:
    samples = run(models, tmp_path / "eval").samples
    assert [sample.kind for sample in samples] == ["reference"] * 3 + ["held-out"] * 3
    assert "metformin" in samples[0].question and "appendicitis" in samples[1].question
    assert samples[2].question == "What is the capital of France?"
    assert [sample.question for sample in samples[3:]] == [example.question for example in EXAMPLES[:3]]
    assert all(sample.heading for sample in samples[:3])
    assert samples[0].outputs == {
        "tuned.gguf": "<think>\nbecause\n</think>\n\nso",
        "base.gguf": "no thought",
    }


def test_an_output_that_reaches_the_limit_is_not_finished(
    models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path
) -> None:
    opened["base.gguf"] = FakeEngine("x" * 100)
    base = run(models, tmp_path / "eval").models[1]
    assert (base.finished.value, base.mean_new_tokens) == (0.0, 60)


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(
    models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path
) -> None:
    whole = run(models, tmp_path / "whole")
    out_dir = tmp_path / "eval"
    run(models, out_dir)
    records = out_dir / "records-tuned.gguf.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    assert len(lines) == len(RECORDS) + len(REFERENCE_QUESTIONS)
    records.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    (out_dir / "records-base.gguf.jsonl").unlink()
    opened["tuned.gguf"].asked.clear()
    assert run(models, out_dir) == whole
    assert [question[len("user\n") :][:10] for question in opened["tuned.gguf"].asked] == [
        "Question 2",
        "Question 3",
        *(question.record.example.question[:10] for question in REFERENCE_QUESTIONS),
    ]
    assert records.read_text().splitlines(keepends=True) == lines


def test_a_finished_evaluation_does_not_open_the_model(
    models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path
) -> None:
    first = run(models, tmp_path / "eval")
    opened.clear()
    assert run(models, tmp_path / "eval") == first


def test_records_of_another_model_or_setting_are_not_taken_up(
    models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path
) -> None:
    run(models, tmp_path / "eval")
    for fake in opened.values():
        fake.asked.clear()
    models[0].write_bytes(b"GGUF another")
    run(models, tmp_path / "eval")
    assert (len(opened["tuned.gguf"].asked), len(opened["base.gguf"].asked)) == (7, 0)
    changed = EvaluationSettings(max_new_tokens=5)
    evaluate.evaluate_models(models, ["tuned", "base"], RECORDS, tmp_path / "eval", changed)
    assert len(opened["base.gguf"].asked) == 7


def test_evaluation_json_is_the_result(models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path) -> None:
    result = run(models, tmp_path / "eval")
    written = (tmp_path / "eval" / "evaluation.json").read_text()
    assert Evaluation.model_validate_json(written) == result


def test_the_command_takes_the_first_of_several_as_base_and_raw_columns(
    models: list[Path],
    opened: dict[str, FakeEngine],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "raw.jsonl"
    rows = [{"Question": f"Q{n}", "Complex_CoT": "because", "Response": "A"} for n in range(5)]
    data.write_text("\n".join(map(json.dumps, rows)))
    result = evaluate.evaluate_files(models[::-1], data, rows=4, max_new_tokens=60)
    assert [(model.model, model.role) for model in result.models] == [
        ("base.gguf", "base"),
        ("tuned.gguf", "tuned"),
    ]
    assert result.models[0].answer_perplexity.n == 4
    assert evaluate.evaluate_files(models[:1], data, rows=1, max_new_tokens=9).models[0].role == "tuned"
    capsys.readouterr()
    print_evaluation(result)
    assert "tuned.gguf" in capsys.readouterr().out.replace("\n", "")


def test_options_are_asked_apart_and_scored_after_the_models_own_thought(
    models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path
) -> None:
    opened["base.gguf"] = FakeEngine("The answer is A.", likely_letter="A")
    record = HeldOutRecord(Example("Which?", "R", "liver"), ("heart", "liver", "lung"), right=1)
    tuned, base = run(models, tmp_path / "eval", [record, *RECORDS]).models
    question = "Which?\n\nA. heart\nB. liver\nC. lung\n\nAnswer with the letter of the right option."
    assert [question in asked for asked in opened["tuned.gguf"].asked[:3]] == [False, True, False]
    assert opened["tuned.gguf"].scored == [f"user\n{question}\nassistant\n<think>\nbecause\n</think>\n\nThe answer is "]
    assert opened["base.gguf"].scored == [f"user\n{question}\nassistant\nThe answer is "]  # it had no thought
    assert tuned.choice_accuracy is not None and base.choice_accuracy is not None
    assert (tuned.choice_accuracy.value, tuned.choice_accuracy.n, base.choice_accuracy.value) == (1, 1, 0)
    assert (tuned.choice_own_thoughts, base.choice_own_thoughts, tuned.choice_chance) == (1, 0, pytest.approx(1 / 3))
    assert tuned.unextracted is not None and base.unextracted is not None and base.generative_accuracy is not None
    assert (tuned.unextracted.value, base.unextracted.value, base.generative_accuracy.value) == (1, 0, 0)
    assert sum(each.records for each in tuned.calibration) == 1


def test_tuned_is_compared_with_base_on_the_same_records(
    models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path
) -> None:
    records = [HeldOutRecord(Example(f"Question {n}?", "why", "so it is")) for n in range(24)]
    found = {each.metric: each for each in run(models, tmp_path / "eval", records).comparisons}
    perplexity, form = found["perplexity"], found["well_formed"]
    assert (perplexity.model, perplexity.reference, perplexity.n) == ("tuned.gguf", "base.gguf", 24)
    assert perplexity.difference == pytest.approx(math.exp(0.5) - math.exp(1.5))
    assert perplexity.verdict == "better" and perplexity.p_value is None
    assert (form.difference, form.verdict, form.p_value) == (1, "better", 2 * 0.5**24)
    assert found["looping"].verdict == "no difference shown"
    assert found["new_tokens"].verdict == "higher"  # neither is better
    assert "choice_accuracy" not in found


def test_a_failed_gate_leaves_the_evaluation_and_names_the_numbers(
    models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path
) -> None:
    gates = [parse_gate("answer_perplexity", "<= 1.2"), parse_gate("format", ">= 0.8")]
    result = evaluate.evaluate_models(models, ["tuned", "base"], RECORDS, tmp_path / "eval", SETTINGS, gates)
    with pytest.raises(
        GateFailed, match=r"1 of 2 gates failed: tuned\.gguf: answer_perplexity must be <= 1\.2 and is 1\.6"
    ):
        raise_if_failed(result)
    assert Evaluation.model_validate_json((tmp_path / "eval" / "evaluation.json").read_bytes()) == result
    assert [gate.passed for gate in result.gates] == [False, True]


def test_a_loop_and_the_length_of_the_thought_are_seen(
    models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path
) -> None:
    opened["base.gguf"] = FakeEngine("<think>\n" + "and so on " * 20)
    tuned, base = run(models, tmp_path / "eval").models
    assert tuned.looping is not None and base.looping is not None and base.answered is not None
    assert (tuned.looping.value, base.looping.value, base.answered.value) == (0, 1, 0)
    assert tuned.thought_tokens is not None and tuned.thought_tokens.value == len("because")
    assert base.rouge_1 is not None and base.rouge_1.value == 0


def test_keys_change_with_all_that_matters(models: list[Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    record = HeldOutRecord(Example("Q", "R", "A"), ("x", "y"), 0)

    def key(path: Path = models[0], record: HeldOutRecord = record, **engine: Any) -> str:
        settings = EvaluationSettings(engine=engines.Settings(**engine))
        return record_keys(path, [record], settings)[0]

    keys = [
        key(),
        key(models[1]),
        key(model),
        key(record=HeldOutRecord(record.example, ("x", "z"), 0)),
        key(record=HeldOutRecord(record.example, ("x", "y"), 1)),
        key(record=HeldOutRecord(Example("Q", None, "A"))),
        key(system="Be brief."),
        key(dtype="float16"),
        key(load_in_4bit=True),
        key(context_tokens=512),
    ]
    (model / "config.json").write_text('{"changed": true}')
    keys.append(key(model))
    assert len(set(keys)) == len(keys)
    assert key(threads=3) == keys[0]  # speed alone


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match=r"Two models are called a\.gguf"):
        run([tmp_path / "a.gguf", tmp_path / "other" / "a.gguf"], tmp_path / "eval")


def test_a_line_ends_at_its_newline_alone(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    row = {"question": "one\u2028two", "reasoning": None, "answer": "three\x85four"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8", newline="")
    assert read_records(path) == [HeldOutRecord(Example("one\u2028two", None, "three\x85four"))]


def test_reading_held_out_records(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    rows = [
        {"question": "Q", "reasoning": "R", "answer": "A", "options": {"A": "x", "B": "y"}, "answer_idx": "B"},
        {"question": "Q2", "reasoning": None, "answer": "A2"},
        {"question": "Q3", "answer": "A3"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_records(path) == [
        HeldOutRecord(Example("Q", "R", "A"), ("x", "y"), 1),
        HeldOutRecord(Example("Q2", None, "A2")),
        HeldOutRecord(Example("Q3", None, "A3")),
    ]
    assert len(read_records(path, 2)) == 2
    assert read_records(path, choice_rows=0)[0].options == ()
    path.write_text('{"question": "Q", "options": ["x", "y"], "answer_idx": "B"}')
    assert read_records(path) == [HeldOutRecord(Example("Q", None, "y"), ("x", "y"), 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no records"),
        ('{"question": "Q", "answer": "A"}\n{"question": "Q"', r"eval\.jsonl:2: expected a JSON object"),
        ("[1, 2]\n", r"eval\.jsonl:1: expected a JSON object"),
        ('{"question": "Q"}\n', r"eval\.jsonl:1: expected an answer, or options"),
        ('{"question": "Q", "options": ["x"], "answer_idx": 0}', r"eval\.jsonl:1: options must be 2 to 26 texts"),
        ('{"question": "Q", "options": ["x", ""], "answer_idx": 0}', r"eval\.jsonl:1: every option must be text"),
        ('{"question": "Q", "options": 7, "answer_idx": 0}', r"eval\.jsonl:1: options must be"),
        (
            '{"question": "Q", "options": ["x", "y"], "answer_idx": "C"}',
            r"eval\.jsonl:1: answer_idx is 'C', and .* A, B",
        ),
        ('{"question": "Q", "options": {"A": "x", "B": "y"}, "answer_idx": [1]}', r"eval\.jsonl:1: answer_idx is"),
        ('{"question": "Q", "answer": " "}\n', r"eval\.jsonl:1: question and answer must be text"),
        ('{"question": "Q", "answer": "A", "reasoning": 3}\n', r"eval\.jsonl:1: question and answer"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(content)
    with pytest.raises(MedcotError, match=message):
        read_records(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match=r"absent\.jsonl cannot be read"):
        read_records(tmp_path / "absent.jsonl")


@pytest.mark.broad
def test_the_stage_on_real_ggufs(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")

    exported = export_models(
        make_tiny_model(tmp_path / "base"), None, tmp_path / "gguf", "tiny", ["F16"], base_quantization="F16"
    )
    finish_artifact(tmp_path / "gguf", exported)
    (tmp_path / "data").mkdir()
    rows: list[dict[str, Any]] = [
        {"question": e.question, "reasoning": e.reasoning, "answer": e.answer} for e in EXAMPLES
    ]
    for row in rows[:2]:
        row |= {"options": {"A": "one", "B": "two"}, "answer_idx": "B"}
    (tmp_path / "data" / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = Config.model_validate(
        {
            "model": {"max_seq_length": 256},
            "evaluation": {"rows": 3, "max_new_tokens": 8, "choice_rows": 1, "gates": {"perplexity": "not worse"}},
        }
    )
    result = evaluate.evaluate(config, {"prepare": tmp_path / "data", "export": tmp_path / "gguf"}, tmp_path / "eval")
    tuned, base = result.models
    assert (tuned.model, base.model) == ("tiny-F16.gguf", "tiny-base-F16.gguf")
    assert tuned.answer_perplexity == base.answer_perplexity  # there was no adapter
    assert tuned.answer_perplexity.n == 3
    assert tuned.answer_perplexity.value > 10  # random weights
    assert tuned.choice_accuracy is not None and tuned.choice_accuracy.n == 1
    assert tuned.brier_score == base.brier_score is not None
    assert {each.difference for each in result.comparisons} == {0}
    assert [gate.passed for gate in result.gates] == [True]
    strict = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"gates": {"perplexity": "better"}})}
    )
    with pytest.raises(GateFailed, match="perplexity must be better than tiny-base-F16"):
        evaluate.evaluate(strict, {"prepare": tmp_path / "data", "export": tmp_path / "gguf"}, tmp_path / "eval")
    assert (tmp_path / "eval" / "evaluation.json").is_file()


def finish_artifact(folder: Path, result: ExportedModels) -> None:
    manifest = Manifest(
        stage="export",
        fingerprint="0" * 64,
        config={},
        inputs={},
        versions={},
        created=datetime.now(UTC).isoformat(),
        seconds=1.0,
        peak_memory_bytes=1,
        files=[],
        result=result.model_dump(mode="json"),
    )
    write_manifest(folder, manifest)


def test_exported_file_type_is_used(tmp_path: Path) -> None:
    """The stage evaluates the file that ships even where others were written."""
    files = [
        ExportedFile(
            name=f"m-{quantization}.gguf",
            role="tuned",
            quantization=quantization,
            size_bytes=1,
            bits_per_weight=1.0,
            tensor_types={},
        )
        for quantization in ("F16", "Q8_0")
    ]
    finish_artifact(
        tmp_path / "gguf",
        ExportedModels(
            architecture="llama",
            parameters=1,
            adapter_matrices_merged=0,
            ship="m-Q8_0.gguf",
            base=None,
            files=files,
        ),
    )
    (tmp_path / "eval.jsonl").write_text('{"question": "Q", "answer": "A"}')
    with pytest.raises(MedcotError, match=r"m-Q8_0\.gguf does not exist"):
        evaluate.evaluate(Config(), {"prepare": tmp_path, "export": tmp_path / "gguf"}, tmp_path / "evaluation")
