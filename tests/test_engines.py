from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bench_models import make_adapter, make_tiny_model
from random_checkpoint import configuration, save_base
from random_checkpoint import save_tokenizer as save_random_tokenizer

from bench import engines
from export.export import export_models
from pipeline.errors import MedcotError
from pipeline.hardware import usable_cores
from pipeline.prompts import Example

EXAMPLE = Example(
    "What is metformin for?",
    "It lowers the production of glucose in the liver, so it treats high glucose.",
    "Type 2 diabetes.",
)
SETTINGS = engines.Settings(context_tokens=512, threads=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base, base.parent / "adapter")


@pytest.fixture(scope="module")
def gguf(base: Path, adapter: Path) -> Path:
    pytest.importorskip("llama_cpp")

    out_dir = base.parent / "gguf"
    exported = export_models(base, adapter, out_dir, "tiny", ["F16"])
    return out_dir / exported.ship


@pytest.fixture(scope="module")
def under_transformers(base: Path, adapter: Path) -> Iterator[engines.Engine]:
    with engines.TransformersEngine(base, adapter, SETTINGS) as engine:
        yield engine


@pytest.fixture(scope="module")
def under_llama_cpp(gguf: Path) -> Iterator[engines.Engine]:
    with engines.LlamaCppEngine(gguf, SETTINGS) as engine:
        yield engine


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1] * 7])
def test_target_log_probabilities_do_not_depend_on_the_blocks(sizes: list[int]) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 30, (7, 11)).astype(np.float32)
    ids = [int(token) for token in random.integers(0, 11, 7)]
    blocks = np.split(logits, np.cumsum(sizes)[:-1])
    expected = [float(logits[i, ids[i + 1]]) - np.logaddexp.reduce(logits[i].astype(np.float64)) for i in range(6)]
    assert engines.target_log_probabilities(blocks, ids) == pytest.approx(expected, abs=1e-5)


def test_engines_agree_on_ids_and_likelihoods(
    under_transformers: engines.Engine, under_llama_cpp: engines.Engine
) -> None:
    ids = under_transformers.chat_format.encode(EXAMPLE).input_ids
    assert under_llama_cpp.chat_format.encode(EXAMPLE).input_ids == ids
    assert len(ids) > 64  # more than one block
    reference = under_transformers.token_log_probabilities(ids)
    found = under_llama_cpp.token_log_probabilities(ids)
    assert reference.shape == found.shape == (len(ids) - 1,)
    # 16-bit weights against 32-bit ones
    assert np.abs(found - reference).mean() < 0.02


def test_transformers_likelihoods_equal_one_whole_forward_pass(base: Path, adapter: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with engines.TransformersEngine(base, adapter, SETTINGS) as engine:
        ids = engine.chat_format.encode(EXAMPLE).input_ids
        found = engine.token_log_probabilities(ids)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.inference_mode():
        logits = PeftModel.from_pretrained(model, adapter)(torch.tensor([ids])).logits[0]
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(len(ids) - 1), ids[1:]]
    assert found == pytest.approx(expected.numpy(), abs=1e-4)


def test_the_adapter_changes_the_model(base: Path, under_transformers: engines.Engine) -> None:
    ids = under_transformers.chat_format.encode(EXAMPLE).input_ids
    with engines.open_engine(base, SETTINGS) as without:
        change = without.token_log_probabilities(ids) - under_transformers.token_log_probabilities(ids)
    assert np.abs(change).max() > 0.1


@pytest.mark.parametrize("which", ["under_transformers", "under_llama_cpp"])
def test_generation_is_greedy_bounded_and_repeatable(which: str, request: pytest.FixtureRequest) -> None:
    engine: engines.Engine = request.getfixturevalue(which)
    prompt = engine.chat_format.question_ids("What is metformin for?")
    written = engine.generate(prompt, 12)
    assert written == engine.generate(prompt, 12)
    assert len(written) <= 12
    end = engine.chat_format.vocabulary.control_tokens[engine.chat_format.vocabulary.eos_token]
    assert end not in written
    first = [engine.generate(prompt, 1)[0]] if written else []
    # No other token is likelier than the one that greedy decoding takes.
    chosen = engine.token_log_probabilities([*prompt, *first])[-1]
    others = [engine.token_log_probabilities([*prompt, token])[-1] for token in range(0, 300, 20)]
    assert chosen >= max(others)


@pytest.mark.parametrize("which", ["under_transformers", "under_llama_cpp"])
def test_next_log_probabilities_are_those_of_one_token_more(which: str, request: pytest.FixtureRequest) -> None:
    engine: engines.Engine = request.getfixturevalue(which)
    prompt = engine.chat_format.encode(EXAMPLE).input_ids  # more than one block
    found = engine.next_log_probabilities(prompt)
    assert found.shape == (engine.vocabulary_size,)
    assert np.exp(found.astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)
    for token in (0, 7, int(found.argmax())):
        assert found[token] == pytest.approx(engine.token_log_probabilities([*prompt, token])[-1], abs=1e-4)


@pytest.mark.parametrize("which", ["under_transformers", "under_llama_cpp"])
def test_many_prompts_together_give_what_each_gives_alone(which: str, request: pytest.FixtureRequest) -> None:
    engine: engines.Engine = request.getfixturevalue(which)
    # More prompts than slots, of different lengths.
    prompts = [engine.chat_format.question_ids("What? " * count) for count in range(1, 20)]
    together = dict(engine.generate_many(prompts, 10))
    assert sorted(together) == list(range(len(prompts)))
    assert [together[index] for index in sorted(together)] == [engine.generate(prompt, 10) for prompt in prompts]
    assert list(engine.generate_many([], 10)) == []


@pytest.mark.parametrize(
    ("length", "slots"),
    [
        (1000, 7),  # 131,072 bytes a token in Llama 3's 8B shape
        (4000, 1),
        (100_000, 1),
        (100, 16),
    ],
)
def test_slots_keep_keys_and_values_within_a_gigabyte(length: int, slots: int) -> None:
    parallel_decoding = pytest.importorskip("bench.parallel_decoding")
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": "32",
        "llama.embedding_length": "4096",
        "llama.attention.head_count": "32",
        "llama.attention.head_count_kv": "8",
    }
    assert parallel_decoding.slots_that_fit(metadata, length) == slots


@pytest.mark.parametrize("which", ["under_transformers", "under_llama_cpp"])
def test_text_and_timings(which: str, request: pytest.FixtureRequest) -> None:
    engine: engines.Engine = request.getfixturevalue(which)
    ids = engine.chat_format.encode(EXAMPLE).input_ids
    assert engine.text(ids).endswith("Type 2 diabetes.<|im_end|>")
    for before in ([], ids[:7]):
        assert len(engine.prompt_seconds(ids, 2, before)) == len(engine.decode_seconds(ids[:5], 2, before)) == 2
    prompt = engine.chat_format.question_ids("What is metformin for?")
    times = engine.answer_times(prompt, 6, 0)
    assert 1 <= len(times) <= 6 and times == sorted(times) and times[0] > 0
    # Timing leaves nothing behind that a later answer would see.
    assert engine.generate(prompt, 6) == engine.generate(prompt, 6)
    assert max(ids) < engine.vocabulary_size
    assert engine.file_bytes > 100_000


def test_weights_are_labelled(under_transformers: engines.Engine, under_llama_cpp: engines.Engine) -> None:
    assert (under_transformers.name, under_transformers.weights) == ("transformers", "float32")
    assert (under_llama_cpp.name, under_llama_cpp.weights) == ("llama.cpp", "F16")


def test_an_adapter_folder_finds_its_base(adapter: Path, under_transformers: engines.Engine) -> None:
    ids = under_transformers.chat_format.encode(EXAMPLE).input_ids
    with engines.open_engine(adapter, SETTINGS) as engine:
        assert np.array_equal(engine.token_log_probabilities(ids), under_transformers.token_log_probabilities(ids))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match="is no model"):
        engines.open_engine(tmp_path, SETTINGS)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(MedcotError, match="does not name its base"):
        engines.open_engine(tmp_path, SETTINGS)
    with pytest.raises(MedcotError, match="does not exist"):
        engines.open_engine(tmp_path / "absent.gguf", SETTINGS)


def test_a_prompt_that_does_not_fit_is_an_error(under_llama_cpp: engines.Engine) -> None:
    with pytest.raises(MedcotError, match="512"):
        under_llama_cpp.token_log_probabilities([5] * 600)


def test_usable_cores_is_at_least_one_and_at_most_all() -> None:
    import os

    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_a_base_that_is_stored_in_4_bit_is_read_as_it_is_stored(tmp_path: Path) -> None:
    save_base(tmp_path, configuration(1, hidden=512, vocabulary=512), nf4=True)
    save_random_tokenizer(tmp_path, 512)
    with engines.open_engine(tmp_path, engines.Settings(threads=1)) as engine:
        ids = engine.chat_format.question_ids("Why?")
        assert len(engine.generate(ids, 4)) == 4
        assert np.isfinite(engine.token_log_probabilities(ids)).all()
