import json
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from bench_models import FakeEngine, make_tiny_model

from bench import engines, evaluate
from export.export import export_models
from pipeline.artifacts import Manifest, write_manifest
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.prompts import Example
from pipeline.results import Evaluation, ExportedFile, ExportedModels

EXAMPLES = [
    Example(f"Question {index}?", f"Because of {index}." if index else None, f"Answer {index}.") for index in range(4)
]
SETTINGS = evaluate.EvaluationSettings(max_new_tokens=60)


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
    def in_this_process(paths, examples, out_dir, settings):  # type: ignore[no-untyped-def]
        return {path.name: evaluate.evaluate_one(path, examples, out_dir, settings) for path in paths}

    monkeypatch.setattr(evaluate, "_evaluate_side_by_side", in_this_process)
    return fakes


def run(models: list[Path], out_dir: Path, examples: list[Example] = EXAMPLES) -> Evaluation:
    return evaluate.evaluate_models(models, ["tuned", "base"], examples, out_dir, SETTINGS)


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
    outcome = evaluate.measure_record(fake, "key", EXAMPLES[1], [1, 2], 60)
    assert (outcome.reasoning_nll, outcome.reasoning_tokens) == (len(thought), len(thought))
    assert (outcome.answer_nll, outcome.answer_tokens) == (2.0 * len(answer), len(answer))


def test_samples_hold_both_outputs(models: list[Path], opened: dict[str, FakeEngine], tmp_path: Path) -> None:
    samples = run(models, tmp_path / "eval").samples
    assert [sample.question for sample in samples] == [example.question for example in EXAMPLES[:3]]
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
    records.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    (out_dir / "records-base.gguf.jsonl").unlink()
    opened["tuned.gguf"].asked.clear()
    assert run(models, out_dir) == whole
    assert [question[len("user\n") :][:10] for question in opened["tuned.gguf"].asked] == [
        "Question 2",
        "Question 3",
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
    assert (len(opened["tuned.gguf"].asked), len(opened["base.gguf"].asked)) == (4, 0)
    changed = evaluate.EvaluationSettings(max_new_tokens=5)
    evaluate.evaluate_models(models, ["tuned", "base"], EXAMPLES, tmp_path / "eval", changed)
    assert len(opened["base.gguf"].asked) == 4


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
    evaluate.print_evaluation(result)
    assert "tuned.gguf" in capsys.readouterr().out.replace("\n", "")


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match=r"Two models are called a\.gguf"):
        run([tmp_path / "a.gguf", tmp_path / "other" / "a.gguf"], tmp_path / "eval")


def test_reading_held_out_records(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    rows = [
        {"question": "Q", "reasoning": "R", "answer": "A", "options": {"A": "x"}, "answer_idx": "A"},
        {"question": "Q2", "reasoning": None, "answer": "A2"},
        {"question": "Q3", "answer": "A3"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert evaluate.read_examples(path) == [
        Example("Q", "R", "A"),
        Example("Q2", None, "A2"),
        Example("Q3", None, "A3"),
    ]
    assert len(evaluate.read_examples(path, 2)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no records"),
        ('{"question": "Q", "answer": "A"}\n{"question": "Q"', r"eval\.jsonl:2: expected a JSON object"),
        ("[1, 2]\n", r"eval\.jsonl:1: expected a JSON object"),
        ('{"question": "Q"}\n', r"eval\.jsonl:1: expected"),
        ('{"question": "Q", "answer": " "}\n', r"eval\.jsonl:1: question and answer must be text"),
        ('{"question": "Q", "answer": "A", "reasoning": 3}\n', r"eval\.jsonl:1: question and answer"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(content)
    with pytest.raises(MedcotError, match=message):
        evaluate.read_examples(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match=r"absent\.jsonl cannot be read"):
        evaluate.read_examples(tmp_path / "absent.jsonl")


def test_the_stage_on_real_ggufs(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")

    exported = export_models(
        make_tiny_model(tmp_path / "base"), None, tmp_path / "gguf", "tiny", ["F16"], base_quantization="F16"
    )
    finish_artifact(tmp_path / "gguf", exported)
    (tmp_path / "data").mkdir()
    rows = [{"question": e.question, "reasoning": e.reasoning, "answer": e.answer} for e in EXAMPLES]
    (tmp_path / "data" / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = Config.model_validate({"model": {"max_seq_length": 256}, "evaluation": {"rows": 3, "max_new_tokens": 8}})
    result = evaluate.evaluate(config, {"prepare": tmp_path / "data", "export": tmp_path / "gguf"}, tmp_path / "eval")
    tuned, base = result.models
    assert (tuned.model, base.model) == ("tiny-F16.gguf", "tiny-base-F16.gguf")
    assert tuned.answer_perplexity == base.answer_perplexity  # there was no adapter
    assert tuned.answer_perplexity.n == 3
    assert tuned.answer_perplexity.value > 10  # random weights


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
