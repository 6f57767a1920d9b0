"""Answers under transformers in place of the GGUFs' own: the same tokens from the same weights, and never mixed."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_models import Clock, make_adapter, make_tiny_model
from test_evaluate import finish_artifact

from bench import engines, evaluate, evaluation_processes, evaluation_task
from bench.evaluation_display import print_evaluation
from bench.evaluation_processes import complete_answers, evaluate_one
from bench.evaluation_task import EvaluationTask
from bench.held_out import REFERENCE_QUESTIONS, HeldOutRecord
from bench.kept_records import answers_by_engine, answers_path, likelihoods_path, records_path
from bench.record_outcome import EvaluationSettings, record_keys
from bench.transformers_answers import TrainedModel, answer_with_transformers
from export.export import export_models
from pipeline.answer_engine import answer_engine
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.prompts import Example
from pipeline.results import ExportedFile, ExportedModels
from pipeline.time_limit import TimeLimit

pytest.importorskip("llama_cpp")

RECORDS = [
    HeldOutRecord(Example(f"What is {number}? " * (1 + 7 * number % 11), f"Because of {number}.", f"It is {number}."))
    for number in range(9)
]
RECORDS[2] = HeldOutRecord(RECORDS[2].example, ("heart", "liver", "lung"), right=1)
SETTINGS = EvaluationSettings(max_new_tokens=16, engine=engines.Settings(context_tokens=512, threads=1))
ROLES = ("tuned", "base")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("trained")
    base = make_tiny_model(folder / "base")
    # What a model's own configuration asks for when it samples has no part in an evaluation.
    (base / "generation_config.json").write_text(json.dumps({"repetition_penalty": 5.0, "do_sample": True, "top_k": 7}))
    return TrainedModel(base, make_adapter(base, folder / "adapter"))


@pytest.fixture(scope="module")
def ggufs(trained: TrainedModel) -> list[Path]:
    """In 32 bit, the tuned model's and its base's."""
    folder = trained.base.parent / "gguf"
    export_models(trained.base, trained.adapter, folder, "tiny", ["F32"], base_quantization="F32")
    return [folder / "tiny-F32.gguf", folder / "tiny-base-F32.gguf"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's two waves one after the other, without the processes."""

    def side_by_side(tasks: list[EvaluationTask], roles: Any, trained: TrainedModel | None = None) -> None:
        for task in tasks:
            evaluate_one(task, range(0) if trained else range(len(task.records)))
        if trained is not None:
            answer_with_transformers(trained, tasks, roles)
            for task in tasks:
                complete_answers(task)

    monkeypatch.setattr(evaluate, "evaluate_side_by_side", side_by_side)


@pytest.fixture
def exact_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values in 32 bit: of random weights many tokens are equally likely but for 16 bits' rounding."""
    import llama_cpp

    defaults = llama_cpp.llama_context_default_params

    def in_32_bit() -> Any:
        parameters = defaults()
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds queries to 16 bits
        return parameters

    monkeypatch.setattr(llama_cpp, "llama_context_default_params", in_32_bit)


def lines(path: Path) -> dict[str, dict[str, Any]]:
    """By key: a batch's order is not the files'."""
    return {line["key"]: line for line in map(json.loads, path.read_text().splitlines())}


@pytest.mark.usefixtures("in_this_process", "exact_cache")
def test_transformers_writes_what_the_ggufs_write(trained: TrainedModel, ggufs: list[Path], tmp_path: Path) -> None:
    by_llama = evaluate.evaluate_models(ggufs, ROLES, RECORDS, tmp_path / "llama", SETTINGS)
    result = evaluate.evaluate_models(
        ggufs, ROLES, RECORDS, tmp_path / "both", SETTINGS, trained=trained, engine_reason="asked for"
    )
    for gguf in ggufs:
        theirs = lines(records_path(tmp_path / "llama", gguf))
        ours = lines(records_path(tmp_path / "both", gguf))
        assert len(ours) == len(RECORDS) + len(REFERENCE_QUESTIONS)
        assert {line.pop("engine") for line in ours.values()} == {"transformers"}
        assert ours == theirs  # outputs token for token, and the GGUFs' likelihoods, those of the options included
    assert [model.engine for model in by_llama.models] == ["llama.cpp"] * 2
    assert [model.engine for model in result.models] == ["transformers"] * 2
    assert result.samples == by_llama.samples and result.comparisons == by_llama.comparisons
    tuned, base = (lines(records_path(tmp_path / "both", gguf)) for gguf in ggufs)
    assert {line["output"] for line in tuned.values()} != {line["output"] for line in base.values()}
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "evaluation.json", "records-tiny-F32.gguf.jsonl", "records-tiny-base-F32.gguf.jsonl"
    ]  # fmt: skip


def test_without_the_adapter_it_is_the_base_and_a_batch_writes_what_each_prompt_alone_does(
    trained: TrainedModel,
) -> None:
    with (
        engines.TransformersEngine(trained.base, trained.adapter, SETTINGS.engine, merge_adapter=False) as both,
        engines.TransformersEngine(trained.base, trained.adapter, SETTINGS.engine) as merged,
        engines.TransformersEngine(trained.base, None, SETTINGS.engine) as base,
    ):
        prompts = [both.chat_format.question_ids(record.example.question) for record in RECORDS]
        with both.base_only():
            found = dict(both.generate_many(prompts, 12))
        assert [found[index] for index in range(len(prompts))] == [base.generate(ids, 12) for ids in prompts]
        found = dict(both.generate_many(prompts, 12))
        assert [found[index] for index in range(len(prompts))] == [both.generate(ids, 12) for ids in prompts]
        assert found == dict(merged.generate_many(prompts, 12))


@pytest.mark.usefixtures("in_this_process")
def test_a_killed_evaluation_continues_and_no_record_is_answered_twice(
    trained: TrainedModel, ggufs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    generate = engines.TransformersEngine._generate_together

    def watched(self: Any, prompts: Any, *arguments: Any) -> Any:
        asked.append(len(prompts))
        if sum(asked) > 12:
            raise KeyboardInterrupt
        return generate(self, prompts, *arguments)

    monkeypatch.setattr(engines.TransformersEngine, "_generate_together", watched)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate_models(ggufs, ROLES, RECORDS, tmp_path, SETTINGS, trained=trained)
    kept = sum(len(lines(path)) for path in tmp_path.glob("answers-*"))
    assert 8 <= kept <= 12
    asked.clear()
    monkeypatch.setattr(
        engines.TransformersEngine,
        "_generate_together",
        lambda self, prompts, *rest: (asked.append(len(prompts)), generate(self, prompts, *rest))[1],
    )
    evaluate.evaluate_models(ggufs, ROLES, RECORDS, tmp_path, SETTINGS, trained=trained)
    prompts = 2 * (len(RECORDS) + 1 + len(REFERENCE_QUESTIONS))  # one has options and is asked twice
    assert prompts - kept - 1 <= sum(asked) <= prompts - kept


@pytest.mark.usefixtures("in_this_process")
def test_another_engines_answers_are_not_taken_up_but_likelihoods_are(
    trained: TrainedModel, ggufs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    evaluate.evaluate_models(ggufs, ROLES, RECORDS, tmp_path, SETTINGS)
    monkeypatch.setattr(evaluation_processes, "measure_likelihood", lambda *_: pytest.fail("it is known already"))
    result = evaluate.evaluate_models(ggufs, ROLES, RECORDS, tmp_path, SETTINGS, trained=trained)
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("evaluate:")] == [
        f"evaluate: {len(RECORDS) + len(REFERENCE_QUESTIONS)} kept answers of {gguf.name} were written by llama.cpp; "
        "transformers answers now, and is asked these records again"
        for gguf in ggufs
    ]
    assert {line["engine"] for gguf in ggufs for line in lines(records_path(tmp_path, gguf)).values()} == {
        "transformers"
    }
    assert result.models[0].answer_perplexity.n == len(RECORDS)
    assert not any(likelihoods_path(tmp_path, gguf).exists() or answers_path(tmp_path, gguf).exists() for gguf in ggufs)


@pytest.mark.usefixtures("in_this_process")
def test_what_an_interrupted_evaluation_kept_decides_who_continues(
    trained: TrainedModel, ggufs: list[Path], tmp_path: Path
) -> None:
    """A session with another build of llama.cpp asks no record again."""
    records = len(RECORDS) + len(REFERENCE_QUESTIONS)
    for engine, given in (("llama.cpp", None), ("transformers", trained)):
        folder = tmp_path / engine
        evaluate.evaluate_models(ggufs, ROLES, RECORDS, folder, SETTINGS, trained=given)
        kept = answers_by_engine(ggufs, [*RECORDS, *(each.record for each in REFERENCE_QUESTIONS)], folder, SETTINGS)
        assert {name: count for name, count in kept.items() if count} == {engine: 2 * records}
        for llama_on_gpu in (True, False):
            choice = answer_engine("auto", has_gpu=True, llama_on_gpu=llama_on_gpu, kept=kept)
            assert choice.value == engine and f"the {2 * records} answers that are kept" in choice.reason
    assert answer_engine("auto", has_gpu=False, llama_on_gpu=False, kept=kept).value == "llama.cpp"
    assert answers_by_engine(ggufs, RECORDS, tmp_path / "empty", SETTINGS) == {}


@pytest.mark.usefixtures("in_this_process")
def test_the_time_limit_cuts_both_to_the_same_records(
    trained: TrainedModel, ggufs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is moved on by a second for every token of a batch; two records are a round."""
    clock = Clock()
    generate = engines.TransformersEngine._generate_together

    def timed(self: Any, prompts: Any, max_new_tokens: int, limit: TimeLimit) -> Any:
        written = generate(self, prompts, max_new_tokens, limit)
        clock.now += max_new_tokens
        return [None if limit.is_up() else new for new in written]

    monkeypatch.setattr(engines.TransformersEngine, "_generate_together", timed)
    monkeypatch.setattr(evaluation_task, "_ROUND", 2)
    limit = TimeLimit.starting_now(120 / 60, clock)  # 108 seconds: six rounds of 16, and nine tenths of a seventh
    result = evaluate.evaluate_models(ggufs, ROLES, RECORDS, tmp_path, SETTINGS, trained=trained, limit=limit)
    assert result.ended_early is not None
    assert (result.ended_early.scored, result.ended_early.answered) == (len(RECORDS), 6)
    assert {each.n for each in result.comparisons if each.metric == "rouge_l"} == {6}
    assert all(model.choice_accuracy is not None and model.choice_accuracy.n == 1 for model in result.models)
    whole = evaluate.evaluate_models(ggufs, ROLES, RECORDS, tmp_path, SETTINGS, trained=trained)
    assert whole.ended_early is None and whole.models[0].answer_perplexity.n == len(RECORDS)


@pytest.mark.broad
def test_the_stage_answers_under_transformers_where_it_is_told_to(
    trained: TrainedModel, ggufs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With real processes, one of them for transformers."""
    tuned, base = (
        ExportedFile(
            name=gguf.name, role=role, quantization="F32", size_bytes=1, bits_per_weight=32.0, tensor_types={}
        )
        for gguf, role in zip(ggufs, ROLES, strict=True)
    )  # fmt: skip
    exported = ExportedModels(
        architecture="llama", parameters=1, adapter_matrices_merged=1, ship=tuned.name, base=base.name,
        files=[tuned, base],
    )  # fmt: skip
    finish_artifact(ggufs[0].parent, exported)
    (tmp_path / "eval.jsonl").write_text(
        '{"question": "What is 1?", "reasoning": "It is one.", "answer": "One."}\n' * 2
    )
    config = Config.model_validate(
        {
            "model": {"base": str(trained.base), "max_seq_length": 256, "load_in_4bit": True},
            "evaluation": {"rows": 2, "max_new_tokens": 8, "engine": "transformers"},
        }
    )
    inputs = {"prepare": tmp_path, "export": ggufs[0].parent, "train": trained.adapter}
    result = evaluate.evaluate(config, inputs, tmp_path / "eval")
    assert [model.engine for model in result.models] == ["transformers"] * 2
    print_evaluation(result)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Answers were written under transformers, by base and adapter and by the base alone" in shown
    assert "(set by evaluation.engine=transformers)" in shown


@pytest.mark.parametrize(
    ("requested", "has_gpu", "llama_on_gpu", "engine"),
    [
        ("auto", False, False, "llama.cpp"),
        ("auto", False, True, "llama.cpp"),
        ("auto", True, True, "llama.cpp"),
        ("auto", True, False, "transformers"),
        ("llama.cpp", True, False, "llama.cpp"),
        ("transformers", False, True, "transformers"),
    ],
)
def test_the_engine_is_chosen_with_a_reason(requested: Any, has_gpu: bool, llama_on_gpu: bool, engine: str) -> None:
    choice = answer_engine(requested, has_gpu=has_gpu, llama_on_gpu=llama_on_gpu)
    assert choice.value == engine and choice.reason
    if requested != "auto":
        assert f"evaluation.engine={requested}" in choice.reason


def test_too_little_memory_for_one_prompt_is_one_sentence(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with engines.TransformersEngine(trained.base, None, SETTINGS.engine) as engine:
        monkeypatch.setattr(engine._model, "generate", refuse)
        with pytest.raises(MedcotError, match=r"Not enough memory to answer .*evaluation\.engine=llama\.cpp"):
            engine.generate([5, 6, 7], 4)


def test_keys_of_records_do_not_depend_on_the_engine(ggufs: list[Path]) -> None:
    """So that stored records are found again on another machine; what wrote them is said in each."""
    on_gpu = EvaluationSettings(max_new_tokens=16, engine=engines.Settings(context_tokens=512, gpu_layers=-1))
    assert record_keys(ggufs[0], RECORDS, on_gpu) == record_keys(ggufs[0], RECORDS, SETTINGS)
