from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Config, load_config, preset_names
from pipeline.errors import MedcotError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_hold_only_what_differs_from_the_defaults(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    stated = yaml.safe_load(Path(f"configs/{name}.yaml").read_text())
    defaults = Config.model_validate({}).model_dump(mode="json")
    for section, values in stated.items():
        if isinstance(values, dict):
            kept = {key: value for key, value in values.items() if not isinstance(value, dict)}
            # The reference recipes name their published values even where a default agrees with them.
            if name == "smollm2-cpu":
                assert all(defaults[section][key] != value for key, value in kept.items() if key != "source"), section


def test_reference_run_is_the_published_recipe() -> None:
    config = load_config("deepseek-r1-8b")
    assert (config.lora.r, len(config.lora.target_modules)) == (16, 7)
    assert (config.training.max_steps, config.training.logging_steps, config.data.train_rows) == (60, 10, 500)


def test_flashcards_are_the_published_recipe() -> None:
    config = load_config("tinyllama-flashcards")
    assert (config.data.train_rows, config.data.eval_rows, config.seed) == (3000, 200, 42)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
    training = config.training
    assert (training.learning_rate, training.schedule, training.warmup_ratio) == (2e-4, "cosine", 0.05)
    assert (training.epochs, training.batch_size, training.gradient_accumulation) == (2, 4, 4)
    assert config.model.max_seq_length == 512 and not config.model.load_in_4bit
    assert (config.data.min_characters, config.data.too_long, config.truncated_at) == (5, "truncate", 512)
    assert config.prompt.system == (
        "You are a knowledgeable and helpful medical assistant. Answer medical questions accurately and concisely "
        "based on established medical knowledge. Always advise consulting a healthcare professional for personal "
        "medical decisions."
    )
    assert (config.training.gradient_checkpointing, config.training.warmup_steps) == ("auto", 0)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("prompt.system=' '", "the system prompt is empty; null is none"),
        ("training.gradient_checkpointing=2", "true, false or auto"),
        ("data.too_long=shorten", "'drop', 'cut' or 'truncate'"),
    ],
)
def test_what_a_recipe_cannot_be_set_to(setting: str, told: str) -> None:
    with pytest.raises(MedcotError, match=told):
        load_config(None, [setting])


def test_every_error_is_told_at_once_with_file_line_and_key(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: -1\ntraining:\n  lerning_rate: 1\n  batch_size: many\nlora: {r: 0}\n")
    with pytest.raises(MedcotError) as caught:
        load_config(path, ["bench.repeats=none", "nonsense"])
    message = str(caught.value)
    for part in (
        f"{path}:1: seed",
        f"{path}:3: unknown key training.lerning_rate (did you mean learning_rate?)",
        f"{path}:4: training.batch_size",
        f"{path}:5: lora.r",
        "--set bench.repeats=none: bench.repeats",
        "--set nonsense: write it as key=value",
    ):
        assert part in message


def test_a_key_set_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match="seed is set twice"):
        load_config(write(tmp_path, "seed: 1\nname: a\nseed: 2\n"))


def test_overrides_win_and_numbers_may_be_written_as_people_do() -> None:
    config = load_config(None, ["training.learning_rate=1e-4", "data.columns.reasoning=null", "name=other"])
    assert (config.training.learning_rate, config.data.columns.reasoning, config.name) == (1e-4, None, "other")


def test_shipped_quantization_must_be_written() -> None:
    with pytest.raises(MedcotError, match="Q8_0, which is not among"):
        load_config(None, ["export.ship=Q8_0"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "key: value"),
        ("\x00", "not valid YAML"),
        ("a: &a [*a]\n", "unknown key"),
    ],
)
def test_files_that_are_not_configurations(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(MedcotError, match=expected):
        load_config(write(tmp_path, text))


def test_unknown_names_list_the_presets(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match="presets are deepseek-r1-8b, smollm2-cpu, tinyllama-flashcards"):
        load_config("no-such-preset")
    with pytest.raises(MedcotError, match="is a folder"):
        load_config(str(tmp_path))


def test_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config("tinyllama-flashcards")
    assert load_config(write(tmp_path, config.to_yaml())) == config


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_one_error(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            load_config(str(path))
        except MedcotError as error:
            assert str(error)
