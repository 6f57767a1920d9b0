"""``evaluation.max_minutes``: ends in time, with pairs that stay pairs, and nothing is answered twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from bench_models import Clock, FakeEngine

from bench import engines, evaluate, evaluation_processes, evaluation_task
from bench.evaluation_display import print_evaluation
from bench.evaluation_processes import evaluate_one
from bench.evaluation_task import EvaluationTask
from bench.held_out import REFERENCE_QUESTIONS, HeldOutRecord
from bench.kept_records import KeptRecords
from bench.record_outcome import EvaluationSettings
from bench.sections.evaluation import evaluation_section
from pipeline.errors import MedcotError
from pipeline.gates import parse_gate
from pipeline.prompts import Example
from pipeline.results import EngineName, Evaluation
from pipeline.time_limit import NO_LIMIT, TimeLimit

RECORDS = [HeldOutRecord(Example(f"Question {number}?", "why", "so it is")) for number in range(4)]
SETTINGS = EvaluationSettings(max_new_tokens=60)
ROLES = ("tuned", "base")


class InThisProcess:
    """Stands in for the pool of processes: fakes live in this one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        future: Future[None] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "tuned.gguf", tmp_path / "base.gguf"]
    for path in paths:
        path.write_bytes(b"GGUF" + path.name.encode())
    return paths


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> dict[str, FakeEngine]:
    """Two models that cannot be held at once, given two records at a time; an answer of either takes a minute."""
    fakes = {
        "tuned.gguf": FakeEngine(clock=clock),
        "base.gguf": FakeEngine("no thought", log_probability=-1.5, clock=clock),
    }
    monkeypatch.setattr(engines, "open_engine", lambda path, settings: fakes[path.name])
    monkeypatch.setattr(evaluation_processes, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(evaluation_processes, "side_by_side", lambda paths, engine: 1)
    monkeypatch.setattr(evaluation_task, "_ROUND", 2)
    return fakes


def run(models: list[Path], out_dir: Path, clock: Clock, minutes: float | None, *gates: str) -> Evaluation:
    return evaluate.evaluate_models(
        models, ROLES, RECORDS, out_dir, SETTINGS, [parse_gate("answer_perplexity", gate) for gate in gates],
        limit=TimeLimit.starting_now(minutes, clock),
    )  # fmt: skip


def asked(opened: dict[str, FakeEngine]) -> Counter[tuple[str, str]]:
    return Counter((name, question.split("\n")[1]) for name, fake in opened.items() for question in fake.asked)


def test_both_models_are_cut_to_the_same_records(
    models: list[Path], opened: dict[str, FakeEngine], clock: Clock, tmp_path: Path
) -> None:
    """The fifth minute ends before the tuned model has answered a third record; a fourth is not begun."""
    result = run(models, tmp_path / "eval", clock, 5, "better")
    assert clock.now == 300
    found = result.ended_early
    assert found is not None and (found.records, found.scored, found.answered) == (4, 4, 2)
    assert found.sentence == ("Ended after 2 of 4 records; likelihoods are those of all 4: evaluation.max_minutes=5.")
    for model in result.models:
        assert model.answer_perplexity.n == 4
        assert model.well_formed is not None and model.well_formed.n == 2
        assert model.rouge_l is not None and model.rouge_l.n == 2
    numbers = {comparison.metric: comparison.n for comparison in result.comparisons}
    assert (numbers["answer_perplexity"], numbers["well_formed"]) == (4, 2)
    assert [sample.question for sample in result.samples] == ["Question 0?", "Question 1?"]
    assert "on 4 records" in result.gates[0].detail
    ended = "(ended early: evaluation.max_minutes=5, of 4 records; with a larger limit the same command continues)"
    assert result.gates[0].detail.endswith(ended)


def test_the_reader_is_told_how_few(
    models: list[Path], opened: dict[str, FakeEngine], clock: Clock, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    result = run(models, tmp_path / "eval", clock, 5)
    print_evaluation(result)
    section = evaluation_section(result)
    assert result.ended_early is not None and section is not None
    assert result.ended_early.sentence in " ".join(capsys.readouterr().out.split())
    assert result.ended_early.sentence in section.text
    rows = {row[0]: row[-1] for table in section.tables for row in table.rows}
    assert (rows["ROUGE-L of the answer ↑"], rows["Perplexity of the reference answer ↓"]) == ("2", "4")


def test_a_folder_under_transformers_is_answered_from_the_first_record_on(
    opened: dict[str, FakeEngine], clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LastFirst(FakeEngine):
        name: EngineName = "transformers"

        def generate_many(
            self, prompts: Sequence[Sequence[int]], max_new_tokens: int, limit: TimeLimit = NO_LIMIT
        ) -> Iterator[tuple[int, list[int]]]:
            for index, new in super().generate_many(prompts[::-1], max_new_tokens, limit):
                yield len(prompts) - 1 - index, new

    monkeypatch.setattr(engines, "open_engine", lambda *_: LastFirst(clock=clock))
    keys = [f"key {number}" for number in range(len(RECORDS))]
    task = EvaluationTask(tmp_path / "folder", RECORDS, keys, tmp_path, SETTINGS, TimeLimit.starting_now(3.5, clock))
    evaluate_one(task, range(len(RECORDS)))
    assert [each.key for each in KeptRecords.read(task).answered] == keys[:2]  # a third one is the fourth record's


@pytest.mark.parametrize("later", [60, None])
def test_a_raised_limit_answers_the_rest_alone(
    models: list[Path], opened: dict[str, FakeEngine], clock: Clock, tmp_path: Path, later: float | None
) -> None:
    out_dir = tmp_path / "eval"
    run(models, out_dir, clock, 5)
    cut_off = ("tuned.gguf", "Question 2?")
    first = asked(opened)
    assert first == {(name, f"Question {number}?"): 1 for name in ("tuned.gguf", "base.gguf") for number in (0, 1)} | {
        cut_off: 1
    }
    whole = run(models, out_dir, clock, later)
    assert whole.ended_early is None
    both = asked(opened)
    assert both.pop(cut_off) == 2  # its first answer was not whole
    assert len(both) == 2 * (len(RECORDS) + len(REFERENCE_QUESTIONS)) - 1 and set(both.values()) == {1}
    assert whole == run(models, tmp_path / "another", clock, None)
    assert sorted(path.name for path in out_dir.iterdir()) == [
        "evaluation.json", "records-base.gguf.jsonl", "records-tuned.gguf.jsonl"
    ]  # fmt: skip


def test_after_a_kill_no_record_is_answered_twice(
    models: list[Path], opened: dict[str, FakeEngine], clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_dir = tmp_path / "eval"
    real, scored = evaluation_processes.append, Counter[str]()

    def append(path: Path, line: Any) -> None:
        """Ends the process after the third answer's line, in the middle of the fourth's."""
        scored[path.name] += 1
        if scored["records-tuned.gguf.jsonl"] == 4:
            path.open("a").write(line.model_dump_json()[:50])
            raise RuntimeError("killed")
        real(path, line)

    monkeypatch.setattr(evaluation_processes, "append", append)
    with pytest.raises(RuntimeError, match="killed"):
        run(models, out_dir, clock, None)
    assert scored["likelihoods-tuned.gguf.jsonl"] == len(RECORDS) + len(REFERENCE_QUESTIONS)
    monkeypatch.setattr(evaluation_processes, "append", real)
    monkeypatch.setattr(opened["tuned.gguf"], "token_log_probabilities", lambda ids: pytest.fail("it is known already"))
    before = len(opened["tuned.gguf"].asked)
    assert before == 4
    result = run(models, out_dir, clock, 60)
    assert len(opened["tuned.gguf"].asked) - before == len(RECORDS) + len(REFERENCE_QUESTIONS) - 3
    assert result.ended_early is None and result.models[0].answer_perplexity.value == pytest.approx(math.exp(0.5))


def test_likelihoods_take_turns_and_come_before_any_answer(
    models: list[Path], opened: dict[str, FakeEngine], clock: Clock, tmp_path: Path
) -> None:
    """A likelihood takes 50 seconds and a turn at least two minutes: three of each model are there after five."""
    for fake in opened.values():
        fake.seconds_a_likelihood = 50
    found = run(models, tmp_path / "eval", clock, 5)
    assert not asked(opened)
    assert found.ended_early is not None
    assert (found.ended_early.scored, found.ended_early.answered) == (3, 0)
    assert found.ended_early.sentence == (
        "Ended after 0 of 4 records; likelihoods are those of 3: evaluation.max_minutes=5."
    )
    assert [model.answer_perplexity.n for model in found.models] == [3, 3]
    assert found.models[0].well_formed is None and found.samples == []
    assert {each.metric for each in found.comparisons} == {"perplexity", "reasoning_perplexity", "answer_perplexity"}
    print_evaluation(found)
    assert evaluation_section(found) is not None


def test_a_model_that_takes_longer_to_load_than_a_turn_is_measured(
    models: list[Path], opened: dict[str, FakeEngine], clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of several gigabytes from a slow disk."""

    def load(path: Path, settings: engines.Settings) -> FakeEngine:
        clock.now += 1.5 * evaluation_processes._TURN_SECONDS
        return opened[path.name]

    monkeypatch.setattr(engines, "open_engine", load)
    found = run(models, tmp_path / "eval", clock, 10)
    assert found.ended_early is not None and found.ended_early.scored == len(RECORDS)


def test_a_limit_that_leaves_nothing_says_so(
    models: list[Path], opened: dict[str, FakeEngine], clock: Clock, tmp_path: Path
) -> None:
    opened["tuned.gguf"].seconds_a_likelihood = 90
    with pytest.raises(MedcotError, match=r"evaluation\.max_minutes=1 ended the evaluation before any record .*raise"):
        run(models, tmp_path / "eval", clock, 1)


def test_only_the_reference_questions_may_be_missing(
    models: list[Path], opened: dict[str, FakeEngine], clock: Clock, tmp_path: Path
) -> None:
    found = run(models, tmp_path / "eval", clock, 9)
    assert found.ended_early is not None and found.ended_early.answered == len(RECORDS)
    assert found.ended_early.sentence == "Ended before the reference questions were answered: evaluation.max_minutes=9."
    assert found.models == run(models, tmp_path / "whole", clock, None).models


def test_a_real_generation_stops_between_two_tokens(tmp_path: Path) -> None:
    """Under both engines: a clock that each look at moves on by a second, and answers of at most 40 tokens."""
    pytest.importorskip("llama_cpp")
    from bench_models import make_tiny_model

    from export.export import export_models

    class Ticking(Clock):
        def __call__(self) -> float:
            self.now += 1
            return self.now

    base = make_tiny_model(tmp_path / "base")
    gguf = tmp_path / "gguf" / export_models(base, None, tmp_path / "gguf", "tiny", ["F16"]).ship
    settings = engines.Settings(context_tokens=256, threads=1)
    for path in (gguf, base):
        with engines.open_engine(path, settings) as engine:
            prompts = [engine.chat_format.question_ids("Why? " * count) for count in range(1, 25)]
            whole = [engine.generate(ids, 40) for ids in prompts]
            clock = Ticking()
            found = dict(engine.generate_many(prompts, 40, TimeLimit.starting_now(1.5, clock)))
            assert 0 < len(found) < len(prompts)
            assert all(len(whole[index]) == len(new) for index, new in found.items())
            assert clock.now < 100  # 90 seconds, and what was looked at after them
            clock = Ticking()
            assert not dict(engine.generate_many(prompts[:1], 40, TimeLimit.starting_now(0.1, clock)))
