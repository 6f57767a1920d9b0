"""Prompts are the ids that transformers makes of the whole rendered conversation, on both sides of an export.

Around control tokens that is not a matter of course: SentencePiece's space and added tokens that swallow white space.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import shared_tokenizer
from tiny_models import TEXT, save_adapter, save_model, save_vocabulary_gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from export.export import export_models
from export.tokenizer_metadata import read_vocabulary
from export.verify import verify_gguf
from pipeline.base_model import load_tokenizer
from pipeline.config import VerifyConfig
from pipeline.labels import label_verdict
from pipeline.prompts import ChatFormat, Example
from pipeline.vocabulary import LlamaCppVocabulary, TransformersVocabulary

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = LLAMA2.replace(" [/INST]", "[/INST]")
TINYLLAMA = (
    "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LSTRIP = PHI3.replace("'<|end|>\n'", "'  <|end|>\n'")
RSTRIPPED = [
    AddedToken(text, special=True, normalized=False, rstrip=True) for text in ("<|user|>", "<|assistant|>", "<|end|>")
]
LSTRIPPED = [
    AddedToken("<|end|>", special=True, normalized=False, lstrip=True),
    AddedToken("<|user|>", special=False, normalized=False),
]
INST = [AddedToken(text, special=True, normalized=False) for text in ("[INST]", "[/INST]")]
TEMPLATES = {
    "Llama 2": (LLAMA2, []),
    "Mistral v0.3": (MISTRAL, INST),
    "TinyLlama": (TINYLLAMA, []),
    "Phi-3": (PHI3, RSTRIPPED),
    "lstrip": (LSTRIP, LSTRIPPED),
}
SPACES = ("each", "always", "first", "none", "byte-level")
CONTENTS = ("What is sepsis?", " two  words ", "\n\tx", "▁a", "5 mg,\n\n twice\n", "\u3000wide\x1f", "胸痛 😀")


def save_tokenizer(folder: Path, spaces: str, template: str, controls: list[AddedToken]) -> Path:
    """A tokenizer of SentencePiece's kind, spaces put as ``spaces`` says, or a byte-level one; both put BOS first."""
    trained = Tokenizer(models.BPE())
    byte_level = spaces == "byte-level"
    trained.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Metaspace()
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trained.train_from_iterator(TEXT * 4, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    trained.save(str(folder / "trained.json"))
    model = json.loads((folder / "trained.json").read_text())["model"]
    special = ["<unk>", "<s>", "</s>", *([] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)])]
    texts = dict.fromkeys([*special, *sorted(model["vocab"], key=model["vocab"].get)])
    vocabulary = {text: index for index, text in enumerate(texts)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges)
        if byte_level
        else models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    if byte_level:
        tokenizer.pre_tokenizer, tokenizer.decoder = trained.pre_tokenizer, decoders.ByteLevel()
    else:
        replaced = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if spaces == "each":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced])
        elif spaces == "none":
            tokenizer.normalizer = replaced
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens(controls)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    fast.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Sides:
    tokenizer: PreTrainedTokenizerFast
    training: ChatFormat
    chat: ChatFormat

    def transformers_ids(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Of the whole text, with the BOS that the tokenizer puts before it unless the template has."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return self.tokenizer(text, add_special_tokens=not text.startswith("<s>")).input_ids


@pytest.fixture(scope="module", params=[f"{name}, {spaces}" for name in TEMPLATES for spaces in SPACES])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    name, spaces = request.param.split(", ")
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), spaces, *TEMPLATES[name])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    llama = save_vocabulary_gguf(folder, len(tokenizer), folder / "vocabulary.gguf")
    yield Sides(
        tokenizer,
        ChatFormat(tokenizer.chat_template, TransformersVocabulary(tokenizer)),
        ChatFormat(tokenizer.chat_template, LlamaCppVocabulary(llama)),
    )
    llama.close()


def test_prompts_are_transformers_own_on_both_sides(sides: Sides) -> None:
    for content in CONTENTS:
        for answer in CONTENTS:
            asked = [{"role": "user", "content": content}]
            for messages in (asked, [*asked, {"role": "assistant", "content": answer}, *asked]):
                expected = sides.transformers_ids(messages)
                assert sides.training.prompt_ids(messages) == expected, messages
                assert sides.chat.prompt_ids(messages) == expected, messages


def test_examples_go_on_from_their_prompts_alike_on_both_sides(sides: Sides) -> None:
    for content in CONTENTS:
        example = Example("What is it?", None, content)
        encoded = sides.training.encode(example)
        assert encoded == sides.chat.encode(example)
        assert encoded.prompt_ids == sides.transformers_ids([{"role": "user", "content": "What is it?"}])
    assert sides.training.empty_thought_ids() == sides.chat.empty_thought_ids()


def test_the_preflight_finds_the_completions_in_the_labels(sides: Sides) -> None:
    vocabulary = sides.training.vocabulary
    assert isinstance(vocabulary, TransformersVocabulary)
    examples = [Example("What is it?", None, "An infection."), Example("Why?", "Fever.", "Sepsis.")]
    verdict, fault = label_verdict(sides.training, vocabulary, examples)
    assert fault is None, verdict


def test_what_is_typed_stays_text(sides: Sides) -> None:
    for text in ("<|end|>\n<|user|>\nx", "</s>", "[/INST] x", "\ue020control\ue021x", "<s> <|assistant|>"):
        for chat in (sides.training, sides.chat):
            controls = set(chat.vocabulary.control_tokens.values())
            typed, clean = (
                [token for token in chat.prompt_ids([{"role": "user", "content": content}]) if token in controls]
                for content in (text, "x")
            )
            assert typed == clean


def test_a_tokenizer_that_reads_its_template_otherwise_is_refused_by_the_preflight(tmp_path: Path) -> None:
    """An added token that only counts as a word of its own is text where a content touches it."""
    word = AddedToken("USER", special=True, normalized=False, single_word=True)
    template = TINYLLAMA.replace("'<|' + m['role'] + '|>\n'", "'USER'")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_tokenizer(tmp_path, "first", template, [word]))
    vocabulary = TransformersVocabulary(tokenizer)
    verdict, fault = label_verdict(ChatFormat(template, vocabulary), vocabulary, [Example("Why?", None, "So.")])
    assert fault == verdict and "single_word" in verdict and "use another model.base" in verdict


@pytest.mark.parametrize("spaces", ["first", "byte-level"])
def test_export_tells_what_other_programs_do_and_verify_accepts_it(tmp_path: Path, spaces: str) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    save_tokenizer(folder, spaces, PHI3, RSTRIPPED)
    save_model(folder, vocabulary=len(PreTrainedTokenizerFast.from_pretrained(folder)))
    adapter = save_adapter(tmp_path / "adapter", folder)
    exported = export_models(folder, adapter, tmp_path / "gguf", "m", ["F16"])
    told = [text for text in exported.warnings if "llama.cpp" in text]
    assert any("<|user|> and 2 more" in text for text in told)
    assert any("puts a space before" in text for text in told) == (spaces == "first")
    example = Example("Is 5 mg\n enough?", None, "It is.")
    result = verify_gguf(tmp_path / "gguf" / exported.ship, folder, adapter, [example], VerifyConfig())
    assert [check.detail for check in result.checks if not check.passed] == []
    if spaces == "byte-level":
        assert "swallow" not in told[0]
        assert any("texts are left out" in check.detail for check in result.checks)


@pytest.mark.broad
def test_tinyllama_s_ids_are_those_of_the_tokenizer_that_transformers_makes(tmp_path: Path) -> None:
    """Of its tokenizer.model, with ``legacy: false``: no space behind control tokens."""
    folder = shared_tokenizer("tinyllama-1.1b-chat")
    theirs, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    llama = save_vocabulary_gguf(folder, len(tokenizer), tmp_path / "vocabulary.gguf")
    training = ChatFormat(tokenizer.chat_template, TransformersVocabulary(tokenizer))
    chat = ChatFormat(tokenizer.chat_template, LlamaCppVocabulary(llama))
    for content in (*CONTENTS, "What is </think> it?"):
        asked = {"role": "user", "content": content}
        for messages in ([asked], [{"role": "system", "content": "Be brief."}, asked, said(content), asked]):
            whole, transformers_whole = (
                each.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
                for each in (tokenizer, theirs)
            )
            assert training.prompt_ids(messages) == chat.prompt_ids(messages) == [tokenizer.bos_token_id, *whole]
            # Runs of spaces it merges by id instead of by score: otherwise than SentencePiece.
            assert whole == transformers_whole or "  " in content
    assert training.encode(Example("Why?", None, " So.")) == chat.encode(Example("Why?", None, " So."))
    llama.close()


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_the_ordinary_vocabulary_has_no_keys_of_ours(tmp_path: Path) -> None:
    save_model(tmp_path)
    vocabulary = read_vocabulary(tmp_path, 10_000)
    assert (vocabulary.space_scheme, vocabulary.strips_left, vocabulary.strips_right) == (None, (), ())
