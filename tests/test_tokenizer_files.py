"""One tokenizer for every stage: tokenizer.json as it stands, conversions proven, the default template everywhere."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from conftest import ROOT, shared_tokenizer
from tiny_models import CHATML, TEXT, save_adapter, save_model, save_tokenizer
from tokenizers import Tokenizer

from export import tokenizer_metadata
from export.export import tokenizer_folder
from export.tokenizer_metadata import read_vocabulary
from pipeline.base_model import load_tokenizer, local_base
from pipeline.errors import MedcotError
from pipeline.tokenizer_conversion import PROBE_TEXTS
from pipeline.tokenizer_files import complete_tokenizer, default_chat_template, numbered_tokens, special_token_ids
from pipeline.vocabulary import TransformersVocabulary

R1 = "deepseek-r1-distill-llama-8b"
OTHER = "{% for m in messages %}OTHER {{ m.content }}{% endfor %}"


def change(folder: Path, name: str = "tokenizer_config.json", **entries: Any) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in (values | entries).items() if value is not None}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A byte-level tokenizer whose conversions have a cache of their own."""
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "cache"))
    save_tokenizer(tmp_path / "model", tokenizer_metadata._QWEN2_SPLIT, composes=True)
    return tmp_path / "model"


def ids(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer(text, add_special_tokens=False).input_ids for text in PROBE_TEXTS]


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast", None])
def test_the_class_that_the_configuration_names_changes_nothing(folder: Path, named: str | None) -> None:
    described = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(folder, tokenizer_class=named)
    assert ids(folder) == [described.encode(text, add_special_tokens=False).ids for text in PROBE_TEXTS]
    assert complete_tokenizer(folder) == folder


def test_r1s_ids_are_llama_cpps_reference_cases() -> None:
    """With the hub's tokenizer_class, LlamaTokenizerFast, in the folder's tokenizer_config.json."""
    folder = shared_tokenizer(R1)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizerFast"
    texts = (folder / "golden_inputs.txt").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    golden = [list(map(int, line.split())) for line in (folder / "golden_ids.txt").read_text().splitlines()]
    vocabulary = TransformersVocabulary(load_tokenizer(folder))
    assert len(golden) > 40
    assert [vocabulary.encode_text(text, "nothing") for text in texts[: len(golden)]] == golden


def test_an_adapters_folder_is_read_like_a_base(folder: Path, tmp_path: Path) -> None:
    """R1-Distill-Qwen's adapters, saved by transformers 4: no config.json, and LlamaTokenizerFast once more."""
    base = save_model(tmp_path / "base", layers=1)
    adapter = save_adapter(tmp_path / "adapter", base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(folder / name, adapter / name)
    change(adapter, tokenizer_class="LlamaTokenizerFast")
    assert tokenizer_folder(base, adapter) == adapter
    assert ids(adapter) == ids(folder)


@pytest.mark.parametrize(
    ("named", "model_type"), [("Qwen2Tokenizer", None), ("Qwen2TokenizerFast", None), (None, "qwen2")]
)
def test_vocab_json_and_merges_txt_become_one_tokenizer(
    folder: Path, named: str | None, model_type: str | None
) -> None:
    expected, description = ids(folder), json.loads((folder / "tokenizer.json").read_text())
    before = read_vocabulary(folder, 401)
    merges = [" ".join(merge) for merge in description["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(description["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    change(folder, "added_tokens.json", **{"<think>": len(description["model"]["vocab"])})
    (folder / "tokenizer.json").unlink()
    change(folder, tokenizer_class=named)
    if model_type:
        change(folder, "config.json", model_type=model_type)
    assert ids(folder) == expected
    after = read_vocabulary(folder, 401)
    assert (after.tokens, after.types, after.merges, after.pre, after.normalizer) == (
        before.tokens, before.types, before.merges, before.pre, before.normalizer,
    )  # fmt: skip
    made = complete_tokenizer(folder)
    assert made != folder and made == complete_tokenizer(folder)
    change(folder, tokenizer_class="LlamaTokenizer")
    change(folder, "config.json", model_type="llama")
    with pytest.raises(MedcotError, match=r"how text is cut before merging: copy tokenizer\.json"):
        load_tokenizer(folder)


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    """A real SentencePiece model with no tokenizer.json, as old repositories have it."""
    import sentencepiece

    written = io.BytesIO()
    lines = [line for text in TEXT * 8 for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, minloglevel=2, hard_vocab_limit=False,
        **{"vocab_size": 420, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
           "remove_extra_whitespaces": False, **options},
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHATML}
    change(folder, tokenizer_class="LlamaTokenizer", **names)
    return folder


@pytest.fixture
def sentencepiece_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "cache"))
    return sentencepiece_model(tmp_path / "pieces")


def test_a_sentencepiece_model_alone_keeps_its_own_ids(sentencepiece_folder: Path) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    assert ids(sentencepiece_folder) == [reference.EncodeAsIds(text) for text in PROBE_TEXTS]
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert tokenizer("x").input_ids[0] == reference.bos_id()
    for text in PROBE_TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize(("legacy", "behind"), [(None, "\u2581x"), (True, "\u2581x"), (False, "x")])
def test_a_space_behind_a_control_token_is_as_legacy_says(
    legacy: bool | None, behind: str, sentencepiece_folder: Path
) -> None:
    change(sentencepiece_folder, legacy=legacy)
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert tokenizer.tokenize("x</s>x", add_special_tokens=False)[0].startswith("\u2581")
    assert "".join(tokenizer.tokenize("x</s>x", add_special_tokens=False)).endswith("</s>" + behind)


def test_added_tokens_json_counts_beside_a_sentencepiece_model(sentencepiece_folder: Path) -> None:
    first = len(load_tokenizer(sentencepiece_folder))
    change(sentencepiece_folder, "added_tokens.json", **{"<|im_start|>": first, "<|im_end|>": first + 1})
    change(sentencepiece_folder, "special_tokens_map.json", eos_token="<|im_end|>")
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [first, first + 1]
    assert tokenizer.eos_token == "<|im_end|>"
    vocabulary = read_vocabulary(sentencepiece_folder, first + 2)
    assert vocabulary.tokens[first:] == ["<|im_start|>", "<|im_end|>"]
    assert vocabulary.special_ids["eos"] == first + 1
    change(sentencepiece_folder, "added_tokens.json", **{"<|im_end|>": first + 7})
    with pytest.raises(MedcotError, match=rf"'<\|im_end\|>' the id {first + 7}, and the vocabulary next to it"):
        load_tokenizer(sentencepiece_folder)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 330, "byte_fallback": False}, "is not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites characters first"),
        ({"remove_extra_whitespaces": True}, "would become other tokens than SentencePiece makes of it"),
    ],
)
def test_a_sentencepiece_model_that_no_tokenizer_json_equals_is_refused(
    options: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "cache"))
    folder = sentencepiece_model(tmp_path / "pieces", **options)
    with pytest.raises(MedcotError, match=reason):
        load_tokenizer(folder)
    assert not list((tmp_path / "cache" / "tokenizers").iterdir())


def test_tokens_that_only_the_configuration_adds_get_their_ids(folder: Path) -> None:
    size = len(load_tokenizer(folder))
    added = json.loads((folder / "tokenizer_config.json").read_text()).get("added_tokens_decoder", {})
    token = {"content": "<tool>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    change(folder, added_tokens_decoder={**added, str(size): token})
    assert load_tokenizer(folder).convert_tokens_to_ids("<tool>") == size
    assert read_vocabulary(folder, size + 3).tokens[size] == "<tool>"
    change(folder, added_tokens_decoder={"no number": token})
    with pytest.raises(MedcotError, match="added token 'no number'"):
        numbered_tokens(folder)


def test_a_named_token_is_cut_out_of_text_though_tokenizer_json_does_not_list_it(folder: Path) -> None:
    description = json.loads((folder / "tokenizer.json").read_text())
    description["added_tokens"] = [each for each in description["added_tokens"] if each["content"] != "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = load_tokenizer(folder)
    assert tokenizer("x<|im_end|>").input_ids[-1] == 2 == TransformersVocabulary(tokenizer).control_tokens["<|im_end|>"]
    assert read_vocabulary(folder, 401).types[2] is gguf.TokenType.CONTROL


def test_the_special_tokens_map_counts_as_transformers_counts_it(folder: Path) -> None:
    """It replaces what the configuration says, unless that numbers its added tokens."""
    known = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    change(folder, "special_tokens_map.json", eos_token={"content": "<|endoftext|>", "lstrip": False})
    change(folder, added_tokens_decoder=None, eos_token="<|im_end|>")
    assert load_tokenizer(folder).eos_token == "<|endoftext|>"
    assert special_token_ids(folder, known)["eos"] == 0 == read_vocabulary(folder, 401).special_ids["eos"]
    change(folder, added_tokens_decoder={"2": {"content": "<|im_end|>", "special": True}})
    assert load_tokenizer(folder).eos_token == "<|im_end|>"
    assert special_token_ids(folder, known)["eos"] == 2 == read_vocabulary(folder, 401).special_ids["eos"]


def test_a_special_token_without_an_id_is_refused_by_every_stage(folder: Path) -> None:
    change(folder, pad_token="[PAD]")
    for read in (load_tokenizer, lambda path: read_vocabulary(path, 401)):
        with pytest.raises(MedcotError, match=r"pad_token is '\[PAD\]', which is not in the vocabulary"):
            read(folder)


def test_a_length_that_was_saved_with_the_tokenizer_cuts_nothing(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "chest pain " * 40
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert TransformersVocabulary(load_tokenizer(folder)).encode_text(text, "nothing") == expected


def templates(folder: Path, form: str) -> None:
    """Two templates, the default one being ChatML, in one of the forms of transformers."""
    path = folder / "chat_template.jinja"
    if form == "list":
        path.unlink()
        listed = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": CHATML}]
        change(folder, chat_template=listed)
    else:
        path.write_text(CHATML)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER)


@pytest.mark.parametrize("form", ["list", "folder"])
def test_of_several_templates_the_default_is_taken_everywhere(folder: Path, form: str) -> None:
    templates(folder, form)
    assert default_chat_template(folder) == CHATML
    assert load_tokenizer(folder).chat_template == CHATML
    assert read_vocabulary(folder, 401).chat_template == CHATML


def test_templates_without_a_default_are_named(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    change(folder, chat_template=[{"name": "rag", "template": OTHER}, {"name": "tool_use", "template": OTHER}])
    with pytest.raises(MedcotError, match="has the chat templates rag, tool_use, and none called default"):
        load_tokenizer(folder)
    change(folder, chat_template="")
    with pytest.raises(MedcotError, match="has no chat template"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{}", "describes no vocabulary"),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}', "has no text or no id"),
        ("tokenizer.json", '{"model": {"vo', "is not valid JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "a whole number and a text are expected"),
        ("added_tokens.json", '{"x": "y"}', "a whole number and a text are expected"),
        ("special_tokens_map.json", "[]", "holds a JSON list"),
    ],
)
def test_a_damaged_file_is_named_by_every_stage(name: str, content: str, reason: str, folder: Path) -> None:
    if name != "tokenizer_config.json":
        change(folder, added_tokens_decoder=None)
    (folder / name).write_text(content)
    for read in (load_tokenizer, lambda path: read_vocabulary(path, 401)):
        with pytest.raises(MedcotError, match=f"{name}.*{reason}"):
            read(folder)


def test_a_folder_without_any_vocabulary_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(MedcotError, match=r"no tokenizer.json, no tokenizer.model and no vocab.json with merges.txt"):
        load_tokenizer(tmp_path)


def hub_cache(home: Path, repository: str, source: Path) -> Path:
    """``source`` as the hub's client keeps a downloaded snapshot of ``repository``."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(source, folder / "snapshots" / commit)
    return folder / "snapshots" / commit


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("revision", ["0123456789abcdef0123456789abcdef01234567", None])
def test_a_cached_snapshot_serves_without_the_hub_also_by_its_commit(
    revision: str | None, offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")  # nobody answers there
    with pytest.raises(MedcotError, match="owner/model is not in the local cache and the hub cannot be reached"):
        local_base("owner/model", revision)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    cached = hub_cache(tmp_path, "owner/model", tmp_path / "base")
    assert local_base("owner/model", revision) == cached


@pytest.mark.e2e
def test_r1_by_its_hub_id_out_of_a_local_cache(tmp_path: Path) -> None:
    """Plan, training, export and verification under the preset's own model id: nothing is asked of the hub."""
    base = save_model(
        tmp_path / "base", tied=False, layers=1, hidden=64, feed_forward=160, heads=2, kv_heads=1, vocabulary=128_256,
        bos_token_id=128_000, eos_token_id=128_001,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared_tokenizer(R1) / name, base / name)
    hub_cache(tmp_path / "home", "unsloth/DeepSeek-R1-Distill-Llama-8B", base)
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as stream:
        for n in range(40):
            row = {"Question": f"What is dose {n * n}?", "Complex_CoT": f"Seven mg a kg: {n} kg.", "Response": f"{n}."}
            stream.write(json.dumps(row) + "\n")
    small = {
        "data.source": rows, "data.config": "null", "data.train_rows": 16, "data.eval_rows": 4, "training.max_steps": 2,
        "export.quantizations": "[F16, Q4_K_M]", "export.imatrix": "none", "verify.prompts": 1,
    }  # fmt: skip
    settings = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for command in (["plan", "deepseek-r1-8b"], ["run", "deepseek-r1-8b", "--until", "verify"]):
        outcome = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *command, *settings, "--run-dir", str(tmp_path / "run")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            timeout=560,
        )
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    saved = json.loads((tmp_path / "run" / "adapter" / "tokenizer_config.json").read_text())
    assert "Llama" not in saved["tokenizer_class"]
