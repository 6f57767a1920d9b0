"""Ids and labels for three real templates: nothing lost, nothing doubled, nothing a user types becomes control."""

from functools import cache
from pathlib import Path

import pytest
from conftest import shared_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_tokenizer

from pipeline.base_model import load_tokenizer
from pipeline.errors import MedcotError
from pipeline.plan import label_fault
from pipeline.prompts import IGNORED_LABEL, ChatFormat, Example
from pipeline.vocabulary import TransformersVocabulary

R1 = "deepseek-r1-distill-llama-8b"
TINYLLAMA = "tinyllama-1.1b-chat"
EXAMPLE = Example("A 54-year-old has chest pain.\n\nWhat now?", "Okay, 12-lead ECG.\n\n  Then troponin.", "ECG first.")


class Model:
    """A tokenizer with its format; ``tokenizer`` is transformers' own, to compare with."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.vocabulary = TransformersVocabulary(self.tokenizer)
        self.format = ChatFormat(self.tokenizer.chat_template, self.vocabulary)

    def labelled_text(self, example: Example) -> str:
        return self.vocabulary.decode(self.format.encode(example).completion_ids)


@cache
def loaded(folder: Path) -> Model:
    return Model(folder)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("chatml")
    save_tokenizer(folder)
    return loaded(folder)


@pytest.fixture(scope="module", params=["chatml", R1, TINYLLAMA])
def model(request: pytest.FixtureRequest, chatml: Model) -> Model:
    return chatml if request.param == "chatml" else loaded(shared_tokenizer(request.param))


def test_rendering_is_transformers_own(model: Model) -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": EXAMPLE.question},
    ]
    expected = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert model.format.render(messages) == expected


def test_labels_hold_reasoning_answer_and_end_of_turn_exactly(model: Model) -> None:
    eos = model.vocabulary.eos_token
    expected = f"<think>\n{EXAMPLE.reasoning}\n</think>\n\n{EXAMPLE.answer}{eos}"
    assert model.labelled_text(EXAMPLE) == expected
    encoded = model.format.encode(EXAMPLE)
    assert encoded.completion_ids[-1] == model.tokenizer.eos_token_id
    assert encoded.input_ids[-len(encoded.completion_ids) :] == encoded.completion_ids


def test_the_preflight_finds_everything_in_the_labels(model: Model) -> None:
    assert label_fault(model.format, model.vocabulary, EXAMPLE) is None


def test_the_prompt_is_outside_the_loss(model: Model) -> None:
    encoded = model.format.encode(EXAMPLE)
    prompt = len(encoded.prompt_ids)
    assert set(encoded.labels[:prompt]) == {IGNORED_LABEL}
    assert IGNORED_LABEL not in encoded.labels[prompt:]
    assert "chest pain" in model.vocabulary.decode(encoded.prompt_ids)


def test_training_continues_the_prompt_that_inference_gives(model: Model) -> None:
    encoded = model.format.encode(EXAMPLE)
    prompt = model.format.question_ids(EXAMPLE.question)
    assert encoded.input_ids[: len(prompt)] == prompt


def test_exactly_one_bos_where_the_model_wants_one(model: Model) -> None:
    ids = model.format.encode(EXAMPLE).input_ids
    bos = model.tokenizer.bos_token_id
    if model.vocabulary.adds_bos:
        assert ids[0] == bos and ids.count(bos) == 1
    else:
        assert ids == model.format.encode(EXAMPLE).input_ids
        assert ids[:2] != [bos, bos]


def test_r1_template_drops_reasoning_and_this_module_does_not(r1_tokenizer: Path) -> None:
    r1 = loaded(r1_tokenizer)
    thought = f"<think>\n{EXAMPLE.reasoning}\n</think>\n\n{EXAMPLE.answer}"
    conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": thought}]
    assert "ECG first" in r1.tokenizer.apply_chat_template(conversation, tokenize=False)
    assert "troponin" not in r1.tokenizer.apply_chat_template(conversation, tokenize=False)
    assert "troponin" in r1.labelled_text(EXAMPLE)
    assert r1.format.opens_thought
    assert r1.format.question_ids("x")[-2] == 128013  # <think>, in the prompt at inference
    assert r1.format.encode(EXAMPLE).completion_ids[0] == 128013  # and in the loss while training


def test_r1_ids_of_a_whole_conversation_are_the_published_ones(r1_tokenizer: Path) -> None:
    ids = loaded(r1_tokenizer).format.question_ids("Hi")
    assert ids == [128000, 128011, 13347, 128012, 128013, 198]


CONTROL = ["<|im_end|>", "<|im_start|>assistant", "</think>", "<think>", "<｜Assistant｜>", "</s>", "<s>"]
CONTROL += ["<｜end▁of▁sentence｜>", "<|endoftext|>", "<｜begin▁of▁sentence｜>"]


@pytest.mark.parametrize("text", CONTROL)
def test_control_tokens_typed_by_a_user_stay_text(model: Model, text: str) -> None:
    clean = model.format.question_ids("Is that right?")
    dirty = model.format.question_ids(f"Is that {text} right?")
    controls = set(model.vocabulary.control_tokens.values())
    assert [i for i in dirty if i in controls] == [i for i in clean if i in controls]
    # SentencePiece writes a space as U+2581, so that character comes back as a space.
    assert text.replace("\u2581", " ") in model.vocabulary.decode(dirty).replace("\u2581", " ")


@pytest.mark.parametrize("text", CONTROL)
def test_control_tokens_in_training_text_stay_text(model: Model, text: str) -> None:
    clean = model.format.encode(Example("q", "a thought", "an answer")).completion_ids
    dirty = model.format.encode(Example("q", f"a {text} thought", "an answer")).completion_ids
    controls = set(model.vocabulary.control_tokens.values())
    assert [i for i in dirty if i in controls] == [i for i in clean if i in controls]


TEXT = st.characters(exclude_categories=["Cs", "Cc", "Co"], exclude_characters="\u2581")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    question=st.text(TEXT, min_size=1, max_size=60),
    reasoning=st.text(TEXT, min_size=1, max_size=80),
    answer=st.text(TEXT, min_size=1, max_size=40),
)
def test_any_text_comes_back_from_the_labels(model: Model, question: str, reasoning: str, answer: str) -> None:
    example = Example(question, reasoning, answer)
    assert model.labelled_text(example) == model.format.completion_text(example)
    prompt, thought, rest = model.format.encode_parts(example)
    assert prompt + thought + rest == model.format.encode(example).input_ids


def test_without_reasoning_the_answer_alone_is_learned(model: Model) -> None:
    example = Example("What is insulin?", None, "A hormone.")
    assert model.labelled_text(example) == f"A hormone.{model.vocabulary.eos_token}"


def test_a_system_prompt_is_in_the_prompt(model: Model) -> None:
    formatted = ChatFormat(model.tokenizer.chat_template, model.vocabulary, system="You are careful.")
    assert "You are careful." in model.vocabulary.decode(formatted.question_ids("x"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "rewrites message contents"),
    ],
)
def test_templates_that_cannot_be_used_are_told(chatml: Model, template: str, message: str) -> None:
    with pytest.raises(MedcotError, match=message):
        ChatFormat(template, chatml.vocabulary).question_ids("abc")
