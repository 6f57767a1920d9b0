"""What a turn costs does not grow with the history that the model has seen: counted by llama.cpp itself.

The small real model's own template keeps answers as they were said; behind one like R1's the thought is gone from the
history, so the last answer is read once more, and nothing before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import llama_cpp
import pytest
from chat_models import small_model

from chat.session import Done, Forgotten, Reading, Sampling, Session, Turn
from export.gguf_model import PROMPT_PART, GgufModel
from pipeline.prompts import ChatFormat

GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=0)
# Two questions of the same length, whatever the turn.
LONG = "Here is the history of a patient. " + "The patient reports pain in the left knee after walking. " * 12
SHORT = "And what should the patient do next?"
# R1's way with SmolLM2's control tokens.
R1_WAY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user\n{{ m['content'] }}<|im_end|>"
    "{% else %}<|im_start|>assistant\n{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def loaded() -> Iterator[GgufModel]:
    # One thread: several spin while they wait for each other, which takes forever on a busy machine.
    with GgufModel(small_model(), n_ctx=512, n_threads=1) as model:
        yield model


@pytest.fixture(params=["its own template", "R1's way"])
def model(request: pytest.FixtureRequest, loaded: GgufModel, monkeypatch: pytest.MonkeyPatch) -> GgufModel:
    own = loaded.chat_format
    if request.param == "R1's way":
        monkeypatch.setitem(vars(loaded), "chat_format", ChatFormat(R1_WAY, own.vocabulary))
    return loaded


def counted(session: Session, question: str) -> tuple[Turn, int]:
    """A turn, and how many tokens llama.cpp evaluated for it."""
    assert isinstance(session.model, GgufModel)
    context = session.model._llama.ctx
    llama_cpp.llama_perf_context_reset(context)
    (*_, done) = session.ask(question)
    figures = llama_cpp.llama_perf_context(context)
    assert isinstance(done, Done)
    return done.turn, figures.n_p_eval + figures.n_eval


@pytest.mark.broad
def test_a_turn_reads_what_is_new_and_nothing_else(model: GgufModel) -> None:
    session = Session(model, GREEDY, max_new_tokens=12, thought_budget=5)
    turns = [counted(session, LONG), *(counted(session, SHORT) for _ in range(3))]
    for turn, evaluated in turns:
        forced = turn.context_tokens - turn.prompt_tokens - turn.tokens
        assert (forced > 0) == (turn.thought_closed_by == "budget")
        # The last token is evaluated only where another is asked for, such as the end of the turn.
        unread = 0 if turn.finished == "end" else 1
        assert evaluated == turn.prompt_tokens - turn.reused_tokens + turn.tokens + forced - unread
    read = [turn.prompt_tokens - turn.reused_tokens for turn, _ in turns]
    print(f"prompt tokens {[turn.prompt_tokens for turn, _ in turns]}, of them read {read}")
    question = len(model.chat_format.question_ids(SHORT))
    for (turn, _), (before, _), new in zip(turns[1:], turns, read[1:], strict=False):
        assert turn.prompt_tokens > before.prompt_tokens > 100
        assert new <= question + before.answer_tokens + 8


@pytest.mark.broad
def test_what_the_cache_holds_changes_no_token(model: GgufModel) -> None:
    session = Session(model, GREEDY, max_new_tokens=8, thought_budget=4)
    for question in (LONG, SHORT):
        counted(session, question)
    with_cache, _ = counted(session, SHORT)
    assert with_cache.reused_tokens > 150
    del session.history[-1]
    for _ in model.logits([0], chunk=1):  # clears the cache
        pass
    without, _ = counted(session, SHORT)
    assert without.reused_tokens == 0
    assert (without.thought, without.answer) == (with_cache.thought, with_cache.answer)


@pytest.mark.broad
def test_a_long_prompt_is_read_in_parts_between_which_it_can_be_stopped_and_taken_up(model: GgufModel) -> None:
    session = Session(model, GREEDY, max_new_tokens=4)
    for _ in model.logits([0], chunk=1):
        pass
    events = session.ask(LONG)
    first = next(events)
    assert isinstance(first, Reading) and first.tokens == PROMPT_PART < first.prompt_tokens
    session.stop()
    (done,) = events
    assert isinstance(done, Done) and (done.turn.finished, done.turn.tokens) == ("stopped", 0)
    again, _ = counted(session, LONG)
    assert again.reused_tokens == PROMPT_PART and again.tokens == 4


@pytest.mark.broad
def test_a_full_context_forgets_and_answers(model: GgufModel) -> None:
    session = Session(model, GREEDY, max_new_tokens=6, thought_budget=0)
    forgotten = []
    for _ in range(4):
        for event in session.ask(LONG):
            if isinstance(event, Forgotten):
                forgotten += event.turns
        assert session.history[-1].context_tokens <= model.n_ctx
        assert session.history[-1].answer
    assert forgotten and len(forgotten) + len(session.history) == 4
