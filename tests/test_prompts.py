"""Ids and labels for three real models: nothing lost, nothing doubled, nothing a user types becomes control."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conversation_texts import (
    CONTROL_SPELLINGS,
    EXAMPLES,
    REAL_MODELS,
    SAID,
    SMOLLM2,
    TEXT,
    WITHOUT_BYTES,
    Model,
    loaded,
    real_model,
    with_any_text,
)
from hypothesis import strategies as st
from tiny_models import save_tokenizer
from tokenizers import AddedToken

from pipeline.prompts import IGNORED_LABEL, ChatFormat, Example
from pipeline.vocabulary import TransformersVocabulary

EXAMPLE = Example("A 54-year-old has chest pain.\n\nWhat now?", "Okay, 12-lead ECG.\n\n  Then troponin.", "ECG first.")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("chatml")
    save_tokenizer(folder)
    return loaded(folder)


@pytest.fixture(scope="module", params=["tiny ChatML", *REAL_MODELS])
def model(request: pytest.FixtureRequest, chatml: Model) -> Model:
    return chatml if request.param == "tiny ChatML" else real_model(request.param)


def labelled_text(model: Model, example: Example) -> str:
    return model.vocabulary.decode(model.format.encode(example).completion_ids)


def test_rendering_is_transformers_own(model: Model) -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": EXAMPLE.question},
    ]
    expected = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert model.format.render(messages) == expected


def test_the_prompt_is_outside_the_loss_and_the_completion_inside(model: Model) -> None:
    encoded = model.format.encode(EXAMPLE)
    prompt = len(encoded.prompt_ids)
    assert set(encoded.labels[:prompt]) == {IGNORED_LABEL}
    assert encoded.labels[prompt:] == encoded.input_ids[prompt:] == encoded.completion_ids
    assert "chest pain" in model.vocabulary.decode(encoded.prompt_ids)
    assert encoded.completion_ids[-1] == model.tokenizer.eos_token_id


def test_training_continues_the_prompt_that_inference_gives(model: Model) -> None:
    encoded = model.format.encode(EXAMPLE)
    prompt = model.format.question_ids(EXAMPLE.question)
    assert encoded.input_ids[: len(prompt)] == prompt


def test_r1_template_drops_reasoning_and_this_module_does_not(r1_tokenizer: Path) -> None:
    r1 = loaded(r1_tokenizer)
    thought = f"<think>\n{EXAMPLE.reasoning}\n</think>\n\n{EXAMPLE.answer}"
    conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": thought}]
    assert "ECG first" in r1.tokenizer.apply_chat_template(conversation, tokenize=False)
    assert "troponin" not in r1.tokenizer.apply_chat_template(conversation, tokenize=False)
    assert "troponin" in labelled_text(r1, EXAMPLE)
    assert r1.format.opens_thought
    assert r1.format.question_ids("x")[-2] == 128013  # <think>, in the prompt at inference
    assert r1.format.encode(EXAMPLE).completion_ids[0] == 128013  # and in the loss while training


def test_r1_ids_of_a_whole_conversation_are_the_published_ones(r1_tokenizer: Path) -> None:
    ids = loaded(r1_tokenizer).format.question_ids("Hi")
    assert ids == [128000, 128011, 13347, 128012, 128013, 198]


def labels_give_everything_back(model: Model, example: Example) -> None:
    """Reasoning, answer and end of turn, exactly: SentencePiece alone cannot tell U+2581 from a space."""
    encoded = model.format.encode(example)
    assert example.reasoning is not None
    text = f"<think>\n{example.reasoning.strip()}\n</think>\n\n{example.answer.strip()}{model.tokenizer.eos_token}"
    expected = text.replace("\u2581", " ") if model.tokenizer.convert_tokens_to_ids("<0x0A>") == 13 else text
    assert model.vocabulary.decode(encoded.completion_ids) == expected
    assert model.vocabulary.representable(model.format.completion_text(example)) == expected
    prompt, thought, answer = model.format.encode_parts(example)
    assert prompt + thought + answer == encoded.input_ids
    inference = model.format.question_ids(example.question)
    if model.format.opens_thought:
        assert inference[-2:] == encoded.completion_ids[:2]
        inference = inference[:-2]
    assert prompt == inference


test_labels_give_everything_back, test_fuzz_labels = with_any_text(labels_give_everything_back, example=EXAMPLES)


def bos_is_there_once_where_the_model_wants_one(model: Model, example: Example, system: str | None) -> None:
    formatted = ChatFormat(model.tokenizer.chat_template, model.vocabulary, system)
    ids, bos = formatted.encode(example).input_ids, model.tokenizer.bos_token_id
    if model.tokenizer("x").input_ids[0] == bos:
        assert ids[0] == bos and ids.count(bos) == 1
        assert formatted.question_ids(example.question).count(bos) == 1
    else:
        # ChatML models name <|im_start|> as BOS, which opens turns; none is put before the template's own.
        turns = formatted.render([{"role": "user", "content": "x"}]).count(model.tokenizer.bos_token)
        assert ids.count(bos) == turns + (system is not None and "SmolLM" not in model.tokenizer.chat_template)


test_bos_is_there_once_where_wanted, test_fuzz_bos = with_any_text(
    bos_is_there_once_where_the_model_wants_one, example=EXAMPLES, system=st.none() | SAID
)


def without_prefixes(text: str) -> str:
    """TinyLlama's text without the BOS its template leaves out, and without the spaces that begin pieces of text.

    llama.cpp puts one before whatever follows a control token, and prompts are what llama.cpp builds.
    """
    return text.removeprefix("<s> ").replace("</s> \n", "</s>\n")


def nothing_said_becomes_control(
    model: Model, example: Example, system: str | None, history: list[tuple[str, str]], tail: str
) -> None:
    """In no role: the control ids are those of the same conversation about nothing."""

    def conversation(shown: Callable[[str], str]) -> list[dict[str, str]]:
        messages = [] if system is None else [{"role": "system", "content": shown(system)}]
        for question, answer in history:
            messages.append({"role": "user", "content": shown(question)})
            messages.append({"role": "assistant", "content": shown(answer)})
        return [*messages, {"role": "user", "content": shown(example.question + tail)}]

    dirty = model.format.prompt_ids(conversation(lambda text: text))
    clean = model.format.prompt_ids(conversation(lambda text: "x"))
    assert model.control_ids(dirty) == model.control_ids(clean)
    hostile = model.format.encode(example).input_ids
    assert model.control_ids(hostile) == model.control_ids(model.format.encode(Example("x", "x", "x")).input_ids)
    rendered = model.format.render(conversation(lambda text: text))
    assert without_prefixes(model.vocabulary.decode(dirty)) == without_prefixes(
        model.vocabulary.representable(rendered)
    )


test_nothing_said_becomes_control, test_fuzz_control = with_any_text(
    nothing_said_becomes_control,
    example=EXAMPLES,
    system=st.none() | SAID,
    history=st.lists(st.tuples(SAID, SAID), max_size=3),
    tail=TEXT,
)


@pytest.mark.parametrize("text", CONTROL_SPELLINGS)
def test_every_spelling_is_there_as_text(model: Model, text: str) -> None:
    ids = model.format.question_ids(f"Is that {text} right?")
    assert model.control_ids(ids) == model.control_ids(model.format.question_ids("Is that right?"))
    assert model.vocabulary.representable(f"that {text} right") in model.vocabulary.decode(ids)


@pytest.mark.parametrize("character", [*WITHOUT_BYTES, "\U00040000"])
def test_what_smollm2_cannot_write_is_seen_by_the_preflight(character: str) -> None:
    smollm2 = real_model(SMOLLM2)
    example = Example("q", f"a{character}b", "c")
    completion = smollm2.vocabulary.representable(smollm2.format.completion_text(example))
    assert character in completion
    assert labelled_text(smollm2, example) != completion


def test_without_reasoning_the_answer_alone_is_learned(model: Model) -> None:
    """But for R1, whose generation prompt opens a thought: it is closed at once, as inference will find it."""
    example = Example("What is insulin?", None, "A hormone.")
    empty = "<think>\n</think>\n\n" if model.format.opens_thought else ""
    assert labelled_text(model, example) == f"{empty}A hormone.{model.tokenizer.eos_token}"
    assert model.vocabulary.decode(model.format.encode_parts(example)[1]) == empty
    prompt = model.format.question_ids(example.question)
    assert model.format.encode(example).input_ids[: len(prompt)] == prompt


def test_a_system_prompt_is_in_the_prompt(model: Model) -> None:
    formatted = ChatFormat(model.tokenizer.chat_template, model.vocabulary, system="You are careful.")
    assert "You are careful." in model.vocabulary.decode(formatted.question_ids("x"))


def test_added_tokens_of_white_space_are_text_and_not_control(tmp_path: Path) -> None:
    """Some vocabularies have runs of spaces as added tokens: the model was trained to read them in any text."""
    save_tokenizer(tmp_path)
    tokenizer = loaded(tmp_path).tokenizer
    tokenizer.add_tokens([AddedToken("    ", normalized=False, special=False)])
    indent = tokenizer.convert_tokens_to_ids("    ")
    vocabulary = TransformersVocabulary(tokenizer)
    assert "    " not in vocabulary.control_tokens
    assert indent in ChatFormat(tokenizer.chat_template, vocabulary).question_ids("def f():\n    pass")
