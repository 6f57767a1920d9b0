"""Experiments files: what they become, and one sentence with file, line and key for every mistake."""

from pathlib import Path

import pytest

from pipeline.config import load_config, preset_names
from pipeline.errors import MedcotError
from pipeline.sweep_file import EXPERIMENTS_DIR, default_folder, load_sweep


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", preset_names(EXPERIMENTS_DIR))
def test_shipped_experiments_load_by_name_and_by_path(name: str) -> None:
    by_name, by_path = load_sweep(name), load_sweep(f"configs/experiments/{name}.yaml")
    assert by_name == by_path
    assert by_name.primary in {experiment.name for experiment in by_name.experiments}
    assert default_folder(by_name) != Path("runs") / name  # where the preset's own run is


def test_the_four_flashcard_experiments_differ_from_the_recipe_in_what_was_published() -> None:
    recipe = load_config("tinyllama-flashcards")
    found = {
        each.name: (
            each.config.training.learning_rate,
            each.config.lora.r,
            each.config.lora.alpha,
            each.config.training.epochs,
        )
        for each in load_sweep("tinyllama-flashcards").experiments
    }
    assert found == {
        "primary": (2e-4, 16, 32, 2),
        "lower-learning-rate": (5e-5, 16, 32, 2),
        "lower-rank": (2e-4, 8, 16, 2),
        "three-epochs": (2e-4, 16, 32, 3),
    }
    for experiment in load_sweep("tinyllama-flashcards").experiments:
        assert (experiment.config.data, experiment.config.seed) == (recipe.data, recipe.seed)


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    sweep = load_sweep(
        write(tmp_path, "config: smollm2-cpu\ngrid: {lora.r: [4, 8], training.learning_rate: [1.0e-3, 1.0e-4]}\n")
    )
    assert [each.name for each in sweep.experiments] == [
        "r-4-learning_rate-0.001", "r-4-learning_rate-0.0001", "r-8-learning_rate-0.001", "r-8-learning_rate-0.0001",
    ]  # fmt: skip
    assert [(e.config.lora.r, e.config.training.learning_rate) for e in sweep.experiments] == [
        (4, 1e-3), (4, 1e-4), (8, 1e-3), (8, 1e-4),
    ]  # fmt: skip
    assert sweep.primary == "r-4-learning_rate-0.001"
    assert len({each.config.name for each in sweep.experiments}) == 4


def test_later_overrides_win_and_the_base_may_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\nlora: {r: 2}\ntraining: {epochs: 9}\n")
    text = "config: base.yaml\noverrides: {lora.r: 4, lora.alpha: 5}\nexperiments:\n"
    text += "  - name: one\n  - {name: two, overrides: {lora.r: 6, seed: 3}}\n"
    one, two = load_sweep(write(tmp_path, text), ["seed=7"]).experiments
    assert (one.config.lora.r, one.config.lora.alpha, one.config.training.epochs, one.config.seed) == (4, 5, 9, 7)
    assert (two.config.lora.r, two.config.seed, dict(two.changes)) == (6, 7, {"lora.r": 6, "seed": 3})


def test_every_fault_of_the_file_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "konfig: x\nconfig: smollm2-cpu\nexperiments:\n  - name: a b\n  - nmae: c\nprimary: 3\n")
    with pytest.raises(MedcotError) as caught:
        load_sweep(path)
    for part in (
        f"{path}:1: unknown key konfig (did you mean config?)",
        f"{path}:4: experiments.name",
        f"{path}:5: unknown key experiments.nmae (did you mean name?)",
        f"{path}:6: primary: input should be a valid string (found 3)",
    ):
        assert part in str(caught.value)


def test_every_wrong_setting_is_told_with_its_line_once(tmp_path: Path) -> None:
    text = "config: smollm2-cpu\nexperiments:\n  - name: one\n    overrides:\n      lora.r: 0\n"
    text += "  - name: two\n    overrides:\n      training.lerning_rate: 1\n      training.epochs: -1\n"
    path = write(tmp_path, text)
    with pytest.raises(MedcotError) as caught:
        load_sweep(path)
    message = str(caught.value)
    assert f"{path}:5: lora.r: input should be greater than or equal to 1 (found 0)" in message
    assert f"{path}:8: unknown key training.lerning_rate (did you mean learning_rate?)" in message
    assert f"{path}:9: training.epochs" in message


def test_a_wrong_common_setting_is_told_once(tmp_path: Path) -> None:
    path = write(tmp_path, "config: smollm2-cpu\noverrides: {lora.r: 0}\nexperiments: [{name: a}, {name: b}]\n")
    with pytest.raises(MedcotError) as caught:
        load_sweep(path)
    assert str(caught.value).count("lora.r") == 1 and f"{path}:2: lora.r" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("BASE", "mine.yaml: give either experiments (a list) or grid"),
        ("BASE\nexperiments: [{name: a}]\ngrid: {seed: [1]}", "give either experiments"),
        ("experiments: [{name: a}]", "config: field required"),
        ("config: nowhere.yaml\nexperiments: [{name: a}]", "mine.yaml:1: config: No preset and no file is called"),
        ("BASE\nexperiments:\n- name: a\n- name: a", "mine.yaml:4: two experiments are called a (the first:"),
        ("BASE\nexperiments: [{name: sweep.html}]", "mine.yaml:2: sweep.html is the name of a file"),
        ("BASE\nprimary: b\nexperiments: [{name: a}]", "mine.yaml:2: primary: no experiment is called b"),
        ("BASE\ngrid:\n  seed: []", "mine.yaml:2: grid: seed has no values"),
        ("BASE\ngrid: {seed: 3}", "mine.yaml:2: grid.seed: input should be a valid tuple"),
        ("BASE\noverrides: {lora: {r: 3}}\nexperiments: [{name: a}]", "mine.yaml:2: overrides: lora is a"),
        ("BASE\noverrides: {seed.x: 3}\nexperiments: [{name: a}]", "mine.yaml:2: seed: input should be"),
        ("- a\n", "must hold settings"),
        ("a: [", "is not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MedcotError) as caught:
        load_sweep(write(tmp_path, text.replace("BASE", "config: smollm2-cpu")))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(MedcotError, match="presets are smollm2-cpu, tinyllama-flashcards"):
        load_sweep("nope")
