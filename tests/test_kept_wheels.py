"""Which kept wheels are taken: whole ones of exactly the wanted recipe, and no others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import kept_wheels, platforms
from pipeline.llama_build import Recipe

RECIPE = Recipe("0.3.36", ("-DGGML_CUDA=ON", "-DC=75;80"), "12.8", "cpython-312", "Linux x86_64", ("avx2", "fma"))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_what_is_kept_is_found_by_its_recipe_alone(wheel: Path, tmp_path: Path) -> None:
    near, far = tmp_path / "cache", tmp_path / "drive"
    assert kept_wheels.find(RECIPE, [near, far]) is None
    assert kept_wheels.keep(wheel, RECIPE, [near, far]) == []
    found = kept_wheels.find(RECIPE, [near, far])
    assert found == near / RECIPE.key / wheel.name and found.read_bytes() == wheel.read_bytes()
    assert kept_wheels.find(RECIPE, [tmp_path / "nowhere", far]) == far / RECIPE.key / wheel.name
    assert kept_wheels.find(replace(RECIPE, cuda="13.0"), [near, far]) is None


@pytest.mark.parametrize("harm", ["truncated", "changed", "no record", "broken record", "foreign", "outside"])
def test_a_damaged_or_foreign_wheel_is_none_and_is_replaced(harm: str, wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    kept_wheels.keep(wheel, RECIPE, [place])
    kept, record = place / RECIPE.key / wheel.name, place / RECIPE.key / "recipe.json"
    content = json.loads(record.read_text())
    if harm == "truncated":
        kept.write_bytes(kept.read_bytes()[:-1])
    elif harm == "changed":
        kept.write_bytes(b"x" + kept.read_bytes()[1:])
    elif harm == "no record":  # the machine went while it was copied
        record.unlink()
    elif harm == "broken record":
        record.write_text("[1")
    elif harm == "foreign":
        record.write_text(json.dumps(content | {"recipe": content["recipe"] | {"python": "cpython-313"}}))
    else:
        record.write_text(json.dumps(content | {"file": f"../../{wheel.name}"}))
        kept.unlink()
    assert kept_wheels.find(RECIPE, [place]) is None
    assert kept_wheels.keep(wheel, RECIPE, [place]) == [] and kept_wheels.find(RECIPE, [place]) == kept


def test_a_place_that_takes_nothing_is_told_and_the_others_have_it(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("a file")
    [told] = kept_wheels.keep(wheel, RECIPE, [tmp_path / "full", tmp_path / "cache"])
    assert str(tmp_path / "full") in told and kept_wheels.find(RECIPE, [tmp_path / "cache"]) is not None


def test_an_attached_folder_is_read_where_the_user_names_it(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path / "cache"))
    kaggle = platforms.detect({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, tmp_path)
    monkeypatch.setattr(platforms, "here", lambda: kaggle)
    assert kept_wheels.offered(RECIPE) is None
    attached = tmp_path / "kaggle/input/notebooks/me/my-notebook/wheels"
    kept_wheels.keep(wheel, RECIPE, [attached])
    monkeypatch.delenv("MEDCOT_WHEELS", raising=False)
    assert kept_wheels.find(RECIPE) is None and kept_wheels.offered(RECIPE) == attached
    assert kept_wheels.offered(replace(RECIPE, cuda="13.0")) is None
    monkeypatch.setenv("MEDCOT_WHEELS", str(attached))
    assert kept_wheels.find(RECIPE) == attached / RECIPE.key / wheel.name
    kept_wheels.keep(wheel, RECIPE)
    output = tmp_path / "kaggle/working/wheels" / RECIPE.key
    assert (output / wheel.name).read_bytes() == wheel.read_bytes()
    kept_wheels.forget(RECIPE)
    assert not (tmp_path / "cache/wheels" / RECIPE.key).exists() and not output.exists()
    assert (attached / RECIPE.key).is_dir()
