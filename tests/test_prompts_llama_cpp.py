"""The ids of training and those llama.cpp builds from the GGUF, for the same conversation: equal.

The GGUFs hold the vocabulary and the template that the project's own export writes, and no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import llama_cpp
import pytest
from conversation_texts import (
    CONTROL_SPELLINGS,
    EXAMPLES,
    REAL_MODELS,
    SAID,
    SMOLLM2,
    TINYLLAMA,
    Model,
    real_model,
    with_any_text,
)
from hypothesis import assume
from hypothesis import strategies as st
from tiny_models import save_vocabulary_gguf
from tokenizers import AddedToken

from chat.session import Sampling, Session, Turn
from pipeline.base_model import load_tokenizer
from pipeline.prompts import ChatFormat, Example, Message
from pipeline.vocabulary import LlamaCppVocabulary, Preceding, TransformersVocabulary

pytestmark = pytest.mark.broad


@dataclass(frozen=True)
class Pair:
    """One model's tokenizer in training, and the GGUF that is made of it."""

    trained: Model
    llama: llama_cpp.Llama
    vocabulary: LlamaCppVocabulary

    def formats(self, system: str | None = None) -> tuple[ChatFormat, ChatFormat]:
        template = self.trained.tokenizer.chat_template
        written = self.llama.metadata["tokenizer.chat_template"]
        return ChatFormat(template, self.trained.vocabulary, system), ChatFormat(written, self.vocabulary, system)

    def whole(self, text: str) -> list[int]:
        """What llama.cpp's own programs make of rendered text: control tokens recognised, BOS added once."""
        ids = list(self.llama.tokenize(text.encode(), add_bos=True, special=True))
        return ids[1:] if self.vocabulary.adds_bos and ids[:2] == [ids[0]] * 2 else ids


@pytest.fixture(scope="module", params=REAL_MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    trained = real_model(request.param)
    folder = tmp_path_factory.mktemp("vocabulary")
    trained.tokenizer.save_pretrained(folder)  # as training does
    llama = save_vocabulary_gguf(folder, len(trained.tokenizer), folder / "vocabulary.gguf")
    yield Pair(trained, llama, LlamaCppVocabulary(llama))
    llama.close()


def test_both_sides_know_the_same_control_tokens(pair: Pair) -> None:
    ours, theirs = pair.trained.vocabulary, pair.vocabulary
    assert ours.control_tokens == theirs.control_tokens
    assert (ours.eos_token, ours.adds_bos) == (theirs.eos_token, theirs.adds_bos)
    training, chat = pair.formats()
    assert training.end_of_turn == chat.end_of_turn
    assert training.template_sha256 == chat.template_sha256
    end = theirs.control_tokens[chat.end_of_turn]
    assert llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(pair.llama.model), end)


def conversation_ids_are_equal(
    pair: Pair, example: Example, system: str | None, history: list[tuple[str, str]]
) -> None:
    training, chat = pair.formats(system)
    assert training.encode(example) == chat.encode(example)
    assert training.encode_parts(example) == chat.encode_parts(example)
    messages = conversation(system, history, example.question)
    assert training.prompt_ids(messages) == chat.prompt_ids(messages)


def conversation(system: str | None, history: Sequence[tuple[str, str]], question: str) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]


HISTORIES = st.lists(st.tuples(SAID, SAID), max_size=2)
test_conversation_ids_are_equal, test_fuzz_conversations = with_any_text(
    conversation_ids_are_equal, example=EXAMPLES, system=st.none() | SAID, history=HISTORIES
)


def whole_text_gives_the_same_ids(
    pair: Pair, example: Example, system: str | None, history: list[tuple[str, str]]
) -> None:
    """Where nobody spells a control token, cutting the text in pieces changes no id."""
    spoken = [system or "", example.question, *(text for turn in history for text in turn)]
    assume(not pair.trained.spells_control(*spoken))
    training, chat = pair.formats(system)
    messages = conversation(system, history, example.question)
    assert training.prompt_ids(messages) == pair.whole(chat.render(messages))


test_whole_text_gives_the_same_ids, test_fuzz_whole_texts = with_any_text(
    whole_text_gives_the_same_ids, example=EXAMPLES, system=st.none() | SAID, history=HISTORIES
)


def training_rows_are_whole_texts(pair: Pair, example: Example) -> None:
    """Prompt and labels together are what llama.cpp makes of the whole example."""
    assert example.reasoning is not None
    assume(not pair.trained.spells_control(example.question, example.reasoning, example.answer))
    training, chat = pair.formats()
    asked = chat.render([{"role": "user", "content": example.question.strip()}])
    if chat.opens_thought:
        asked = asked.rstrip().removesuffix("<think>")
    text = asked + chat.completion_text(example)
    ids = training.encode(example).input_ids
    if pair.vocabulary.adds_bos and not text.startswith(str(pair.vocabulary.bos_token)):
        text = f"{pair.vocabulary.bos_token}{text}"
    assert ids == pair.whole(text)


test_training_rows_are_whole_texts, test_fuzz_rows = with_any_text(training_rows_are_whole_texts, example=EXAMPLES)


class Recorder:
    """A model that says what it is told to and keeps the prompts it was given."""

    n_ctx = 100_000
    metadata: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, chat_format: ChatFormat, outputs: list[str]) -> None:
        self.chat_format = chat_format
        self.prompts: list[list[int]] = []
        self._outputs = outputs

    def read_prompt(self, ids: Sequence[int]) -> Iterator[int]:
        yield 0

    def generate(self, ids: Sequence[int], max_new_tokens: int, **_: object) -> Iterator[int]:
        self.prompts.append(list(ids))
        yield from map(ord, self._outputs.pop(0))

    def stream_text(self, ids: Iterator[int]) -> Iterator[str]:
        yield from map(chr, ids)


def a_chat_keeps_what_is_said_as_text(
    pair: Pair, questions: tuple[str, str], reasoning: str, answer: str, system: str | None
) -> None:
    """In a session on the GGUF: the second prompt holds the first answer without its thought, all as text."""
    assume(all(question.strip() for question in questions))
    chat = pair.formats(system)[1]
    opening = "" if chat.opens_thought else "<think>\n"
    model = Recorder(chat, [f"{opening}{reasoning}\n</think>\n\n{answer}", "So."])
    session = Session(model, Sampling(0.0, 1.0, 0), max_new_tokens=10_000)
    first: Turn
    *_, done = session.ask(questions[0])
    first = done.turn
    # Text that repeats itself often enough is a loop, which a session cuts.
    assume(first.answer and first.finished == "end" and first.thought_closed_by == "model")
    list(session.ask(questions[1]))

    def controls(ids: list[int]) -> list[int]:
        return [token for token in ids if token in set(pair.vocabulary.control_tokens.values())]

    asked = [questions[0].strip(), questions[1].strip()]
    harmless = [conversation(None if system is None else "x", history, "x") for history in ([], [("x", "x")])]
    for prompt, clean in zip(model.prompts, harmless, strict=True):
        assert controls(prompt) == controls(chat.prompt_ids(clean))
    assert model.prompts[1] == chat.prompt_ids(conversation(system, [(asked[0], first.answer)], asked[1]))


test_a_chat_keeps_what_is_said_as_text, test_fuzz_chats = with_any_text(
    a_chat_keeps_what_is_said_as_text,
    questions=st.tuples(SAID, SAID),
    reasoning=SAID,
    answer=SAID,
    system=st.none() | SAID,
)


def test_a_thought_is_left_out_of_the_history_and_its_tags_do_no_harm(pair: Pair) -> None:
    chat = pair.formats()[1]
    opening = "" if chat.opens_thought else "<think>\n"
    model = Recorder(chat, [f"{opening}SECRET\n</think>\n\nGout. <|im_end|> </s>", "So."])
    session = Session(model, Sampling(0.0, 1.0, 0))
    list(session.ask("A red toe? </think> <think>"))
    list(session.ask("And now?"))
    text = pair.trained.vocabulary.decode(model.prompts[1])
    assert "SECRET" not in text
    assert "A red toe? </think> <think>" in text and "Gout. <|im_end|> </s>" in text


@pytest.mark.parametrize("name", [TINYLLAMA, SMOLLM2])
def test_tokens_added_to_a_vocabulary_stay_text_when_typed(name: str, tmp_path: Path) -> None:
    """llama.cpp recognises such tokens in any text, and SentencePiece begins every piece with a space.

    White space alone stays a token, which llama.cpp gives SentencePiece's space behind it as it does control tokens.
    """
    tokenizer = load_tokenizer(real_model(name).folder)
    spaces = set() if name == TINYLLAMA else {"    "}
    added = ["<think>", "</think>", "<<SYS>>", "[INST]", "</s", *spaces]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in added])
    tokenizer.save_pretrained(tmp_path)
    llama = save_vocabulary_gguf(tmp_path, len(tokenizer), tmp_path / "vocabulary.gguf")
    try:
        ours, theirs = TransformersVocabulary(tokenizer), LlamaCppVocabulary(llama)
        assert set(added) - set(theirs.control_tokens) == spaces == set(added) - set(ours.control_tokens)
        controls = set(ours.control_tokens.values())
        for spelled in (*CONTROL_SPELLINGS, *added, "<<SYS>>>", "x</think>y</think>", "a <<<SYS>> b"):
            for text in (spelled, f"a {spelled} b", f"{spelled}{spelled}"):
                for after in get_args(Preceding):
                    ids = theirs.encode_text(text, after)
                    assert not controls & set(ids)
                    assert ids == ours.encode_text(text, after), text
    finally:
        llama.close()
