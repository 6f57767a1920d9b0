"""Conversations of several users over one queue: order, places, stopping, retrying, and nothing seen of each other."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from chat_models import ScriptedModel
from tiny_models import save_model

from chat.safety import RedFlagWatch
from chat.web_conversation import Controls, Conversation, WebModel, WebSettings
from chat.web_queue import AnswerQueue, Exchange
from export.export import export_models
from export.gguf_model import GgufModel
from pipeline.errors import MedcotError

WATCH = RedFlagWatch.load(emergency_number="112")
CONTROLS = Controls(0.6, 200, None)
WAIT = 30  # seconds, far more than anything here takes


class GatedModel(ScriptedModel):
    """Says its first character, then waits until it is let go."""

    def __init__(self, outputs: Sequence[str]) -> None:
        super().__init__(outputs)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def generate(self, ids: Sequence[int], max_new_tokens: int, **sampling: object) -> Iterator[int]:
        for token in super().generate(ids, max_new_tokens, **sampling):  # type: ignore[arg-type]
            yield token
            self.begun.set()
            assert self.go_on.wait(WAIT)


@contextmanager
def conversations(*models: ScriptedModel | GgufModel, seed: int | None = 1) -> Iterator[Callable[[], Conversation]]:
    """Begins conversations with these models, over one queue."""
    queue = AnswerQueue()
    named = [WebModel(f"model {number}", model) for number, model in enumerate(models)]
    try:
        yield lambda: Conversation(named, WebSettings(WATCH, seed=seed), queue)
    finally:
        for model in models:
            if isinstance(model, GatedModel):
                model.go_on.set()
        queue.close()


def finish(exchange: Exchange) -> list[str]:
    """The answers, or what went wrong."""
    deadline = threading.Event()
    for _ in range(WAIT * 100):
        if exchange.finished:
            break
        deadline.wait(0.01)
    return [each.problem or each.answer for each in exchange.generations]


def test_questions_are_answered_in_their_order_and_know_their_place() -> None:
    model = GatedModel(["one", "two", "three"])
    with conversations(model) as begin:
        users = [begin(), begin(), begin()]
        exchanges = [user.ask(f"question {number}", CONTROLS) for number, user in enumerate(users)]
        assert model.begun.wait(WAIT)
        assert [user.place() for user in users] == [0, 1, 2]
        assert [each.generations[0].state for each in exchanges][1:] == ["waiting", "waiting"]
        model.go_on.set()
        assert [finish(each) for each in exchanges] == [["one"], ["two"], ["three"]]
        assert [user.place() for user in users] == [0, 0, 0]
    for number, prompt in enumerate(model.prompts):
        assert [f"question {other}" in prompt for other in range(3)] == [other == number for other in range(3)]


def test_who_stops_while_waiting_leaves_the_line_and_is_never_asked() -> None:
    model = GatedModel(["one", "three"])
    with conversations(model) as begin:
        users = [begin(), begin(), begin()]
        exchanges = [user.ask(f"question {number}", CONTROLS) for number, user in enumerate(users)]
        assert model.begun.wait(WAIT)
        users[1].stop()
        assert exchanges[1].finished and users[2].place() == 1
        assert "Stopped" in (exchanges[1].generations[0].problem or "")
        model.go_on.set()
        assert finish(exchanges[2]) == ["three"]
    assert not any("question 1" in prompt for prompt in model.prompts)


def test_stopping_ends_the_answer_under_way_and_the_columns_after_it() -> None:
    first, second = GatedModel(["a long answer"]), ScriptedModel(["never said"])
    with conversations(first, second) as begin:
        user = begin()
        exchange = user.ask("x", CONTROLS)
        assert first.begun.wait(WAIT)
        user.stop()
        first.go_on.set()
        answer, problem = finish(exchange)
    assert 0 < len(answer) < len("a long answer")
    assert exchange.generations[0].turn is not None and exchange.generations[0].turn.finished == "stopped"
    assert "Stopped" in problem and second.prompts == []


def test_answer_now_closes_the_thought_under_way() -> None:
    model = GatedModel(["<think>On and on and on", "So."])
    with conversations(model) as begin:
        user = begin()
        exchange = user.ask("x", CONTROLS)
        assert model.begun.wait(WAIT)
        user.answer_now()
        model.go_on.set()
        finish(exchange)
    turn = exchange.generations[0].turn
    assert turn is not None and (turn.answer, turn.thought_closed_by) == ("So.", "user")


def test_a_second_question_has_to_wait_for_the_first() -> None:
    model = GatedModel(["one"])
    with conversations(model) as begin:
        user = begin()
        user.ask("x", CONTROLS)
        for again in (lambda: user.ask("y", CONTROLS), lambda: user.retry(CONTROLS)):
            with pytest.raises(MedcotError, match="still being answered"):
                again()


def test_what_cannot_be_asked() -> None:
    with conversations(ScriptedModel([])) as begin:
        with pytest.raises(MedcotError, match="Write a question"):
            begin().ask(" \n", CONTROLS)
        with pytest.raises(MedcotError, match="no question yet"):
            begin().retry(CONTROLS)


def test_retry_takes_the_place_of_the_last_answer_with_the_next_seed() -> None:
    model = ScriptedModel(["first", "second", "third"])
    with conversations(model, seed=2**31 - 1) as begin:
        user = begin()
        finish(user.ask("x", CONTROLS))
        exchange = user.retry(CONTROLS)
        assert (finish(exchange), exchange.seed, len(user.exchanges)) == (["second"], 0, 1)
        finish(user.ask("y", CONTROLS))
    assert "second" in model.prompts[2] and "first" not in model.prompts[2]


def test_retry_asks_anew_where_there_was_no_answer() -> None:
    model = ScriptedModel(["So."], n_ctx=500)
    with conversations(model) as begin:
        user = begin()
        assert "shorten it" in finish(user.ask("x" * 400, CONTROLS))[0]
        assert finish(user.retry(Controls(0.6, 20, None))) == ["So."]


def test_the_sliders_reach_both_models_with_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [ScriptedModel(["<think>Long"] * 2 + ["So."] * 2), ScriptedModel(["So."])]
    asked = []
    for model in models:

        def generate(ids: Sequence[int], limit: int, model: ScriptedModel = model, **sampling: object) -> Iterator[int]:
            asked.append((limit, sampling))
            return ScriptedModel.generate(model, ids, limit, **sampling)  # type: ignore[arg-type]

        monkeypatch.setattr(model, "generate", generate)
    with conversations(*models, seed=None) as begin:
        exchange = begin().ask("x", Controls(0.9, 50, 6))
        finish(exchange)
    assert {(sampling["temperature"], sampling["seed"]) for _, sampling in asked} == {(0.9, exchange.seed)}
    assert asked[0][0] == 50
    turn = exchange.generations[0].turn
    assert turn is not None and turn.thought_closed_by == "budget"


def test_a_fault_in_one_answer_leaves_the_queue_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScriptedModel([])
    with conversations(model) as begin:
        user = begin()
        assert "through a fault" in finish(user.ask("x", CONTROLS))[0]  # the script is empty: IndexError
        model._outputs.append("So.")
        assert finish(user.ask("y", CONTROLS)) == ["So."]


def test_an_emergency_is_named_whatever_the_model_says() -> None:
    with conversations(ScriptedModel(["It is nothing."])) as begin:
        exchange = begin().ask("I have crushing chest pain", CONTROLS)
        assert exchange.warning is not None and "Call 112 now" in exchange.warning


def test_closing_stops_who_waits_and_who_is_answered() -> None:
    model = GatedModel(["a long answer"])
    with suppress(AssertionError), conversations(model) as begin:
        exchanges = [begin().ask("x", CONTROLS), begin().ask("y", CONTROLS)]
        assert model.begun.wait(WAIT)
    assert all(exchange.finished for exchange in exchanges)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    export_models(save_model(folder / "base", hidden=64), None, folder, "m", ["F32"])
    return folder / "m-F32.gguf"


def test_users_who_share_a_cache_get_what_each_would_get_alone(tiny_gguf: Path) -> None:
    """Turns of two users take turns in one llama.cpp context; neither may see anything of the other."""
    questions = [("The patient has gout.", "And now?"), ("The patient has a fever.", "And then?")]
    controls = Controls(0.1, 24, None)
    with GgufModel(tiny_gguf, n_ctx=256, n_threads=1) as model:
        alone = []
        for asked in questions:
            with conversations(model) as begin:
                user = begin()
                alone.append([finish(user.ask(question, controls)) for question in asked])
        with conversations(model) as begin:
            users = [begin(), begin()]
            mixed: list[list[list[str]]] = [[], []]
            for turn in (0, 1):
                for user, asked, told in zip(users, questions, mixed, strict=True):
                    told.append(finish(user.ask(asked[turn], controls)))
    assert mixed == alone
    assert alone[0] != alone[1]
