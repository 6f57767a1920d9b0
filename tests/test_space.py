"""A Space's folder: what is in it, what it replaces, and that it is written whole or not at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from click.testing import CliRunner
from hub_server import HubServer
from tiny_models import save_gguf

from chat import space, space_app
from chat.space import page_modules, write_space
from chat.space_app import SETTINGS_FILE, SpaceModel, read_settings
from chat.space_requirements import pinned_packages, requirements_text
from pipeline.cli import cli
from pipeline.errors import MedcotError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("space")).rename(tmp_path_factory.getbasetemp() / "small.gguf")


def front_matter(folder: Path) -> dict[str, object]:
    _, block, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return dict(yaml.safe_load(block))


def test_the_folder_is_a_space(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "space"
    written = write_space(folder, model, title='Gout: a "talk"', thought_budget=100)
    matter = front_matter(folder)
    assert (matter["title"], matter["sdk"], matter["app_file"]) == ('Gout: a "talk"', "gradio", "app.py")
    assert f"gradio=={matter['sdk_version']}\n" in (folder / "requirements.txt").read_text()
    assert (folder / "small.gguf").samefile(model)
    assert "*.gguf filter=lfs" in (folder / ".gitattributes").read_text()
    settings = read_settings(folder)
    assert settings.models == written.models and settings.thought_budget == 100
    assert written.file_bytes == model.stat().st_size and written.code_bytes > 100_000
    assert "license" not in matter and "name the hub's id of it with --license" in written.notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["space"]


def test_two_models_of_one_name_stand_side_by_side(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / model.name
    other.parent.mkdir()
    shutil.copyfile(model, other)
    written = write_space(tmp_path / "space", model, other)
    assert [each.file for each in written.models] == ["base-small.gguf", "small.gguf"]
    assert all((tmp_path / "space" / each.file).is_file() for each in written.models)


def test_a_model_on_the_hub_is_named_and_not_copied(model: Path, tmp_path: Path) -> None:
    written = write_space(tmp_path / "space", model, model_repo="ann/gout", license_id="llama3.1")
    matter = front_matter(tmp_path / "space")
    assert (matter["models"], matter["license"]) == (["ann/gout"], "llama3.1")
    assert matter["preload_from_hub"] == ["ann/gout small.gguf"]
    assert not list((tmp_path / "space").glob("*.gguf")) and written.file_bytes == 0
    with pytest.raises(MedcotError, match=r"'gout' is no repository of the hub: write owner/name"):
        write_space(tmp_path / "other", model, model_repo="gout")


def test_our_own_folder_is_replaced_and_its_git_kept(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "space"
    (folder / ".git").mkdir(parents=True)  # a repository that is still empty
    (folder / ".git" / "HEAD").write_text("ref")
    write_space(folder, model)
    write_space(folder, model, title="Again")
    assert front_matter(folder)["title"] == "Again"
    assert (folder / ".git" / "HEAD").read_text() == "ref"


@pytest.mark.parametrize(
    ("name", "message"), [("README.md", "README.md in it was changed"), ("chat/own.py", "chat/own.py in it was added")]
)
def test_what_someone_did_to_the_folder_is_not_lost(model: Path, tmp_path: Path, name: str, message: str) -> None:
    folder = tmp_path / "space"
    write_space(folder, model)
    (folder / name).write_text("mine")
    with pytest.raises(MedcotError, match=f"would be replaced, and {message}"):
        write_space(folder, model)
    assert (folder / name).read_text() == "mine"


def test_a_folder_of_others_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(MedcotError, match=r"holds other files \(thesis.txt\): name a new folder"):
        write_space(tmp_path, model)
    with pytest.raises(MedcotError, match="is a file"):
        write_space(tmp_path / "thesis.txt", model)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / SETTINGS_FILE).write_text("{}")
    with pytest.raises(MedcotError, match="cannot be read as the settings of a Space"):
        write_space(tmp_path / "odd", model)


def test_a_model_that_is_none_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    for name, message in [("missing.gguf", "does not exist"), ("torn.gguf", "cannot be loaded|died")]:
        with pytest.raises(MedcotError, match=message):
            write_space(tmp_path / "space", tmp_path / name)
    assert not (tmp_path / "space").exists()


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(MedcotError, match="is full: free some space; nothing was written"):
        write_space(tmp_path / "space", model)
    monkeypatch.undo()
    monkeypatch.setattr(os, "link", other_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(MedcotError, match=r"takes .* GB and the disk has 0.00 GB free"):
        write_space(tmp_path / "space", model)
    assert list(tmp_path.iterdir()) == []


def test_what_free_hardware_cannot_hold_is_said() -> None:
    eight = [SpaceModel(name="x", file="x.gguf", size_bytes=8 * 10**9, sha256="", repo=None)] * 2
    notes = list(space._notes(eight, None, None))
    assert "16.0 GB and the free hardware has 16 GB" in notes[0]
    assert "--model-repo" in notes[1] and "--license" in notes[2]
    assert not list(space._notes(eight[:1], "ann/gout", "mit"))


@pytest.mark.broad
def test_the_code_in_the_folder_is_complete(tmp_path: Path) -> None:
    """Its modules import from the folder alone, and without what the page does not install."""
    modules = [path for path in page_modules() if path.name != "__init__.py"]
    assert Path("chat/web.py") in modules and Path("chat/proof.py") in modules
    assert not {"cli.py", "train.py", "api.py", "space.py"} & {path.name for path in modules}
    space._copy_code(tmp_path)
    names = [str(path.with_suffix("")).replace("/", ".") for path in modules]
    code = f"import {', '.join(names)}, sys; print({{'torch', 'gguf', 'bench'}} & set(sys.modules))"
    child = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (child.stdout, child.returncode) == ("set()\n", 0), child.stderr


def test_every_package_of_the_page_is_pinned_as_for_the_laptop() -> None:
    text = requirements_text()
    laptop = (ROOT / "requirements-chat.txt").read_text().lower().replace("_", "-").splitlines()
    assert {f"{name}=={version}" for name, version in pinned_packages()} <= set(laptop)
    names = [name for name, _ in pinned_packages()]
    assert {"gradio", "llama-cpp-python", "huggingface-hub", "numpy", "starlette"} <= set(names)
    assert len(names) == len(set(names)) == text.count("==")
    assert not {"torch", "transformers", "openai", "pytest"} & set(names)
    assert 'llama-cpp-python==0.3.36 --config-settings="cmake.define.GGML_NATIVE=OFF"' in text


def test_a_file_that_did_not_come_along_is_said(model: Path, tmp_path: Path) -> None:
    write_space(tmp_path / "space", model)
    file = tmp_path / "space" / "small.gguf"
    file.unlink()
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(MedcotError, match="missing or not whole: fetch it with `git lfs pull`"):
        space_app.run(tmp_path / "space")


def test_a_model_on_the_hub_is_fetched_and_recognised(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_space(tmp_path / "space", model, model_repo="ann/gout")
    (wanted,) = read_settings(tmp_path / "space").models
    (tmp_path / "repo").mkdir()
    with HubServer() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        with pytest.raises(MedcotError, match=r"small.gguf could not be fetched from ann/gout \(.+\)"):
            space_app.local_file(tmp_path, wanted)
        shutil.copyfile(model, tmp_path / "repo" / "small.gguf")
        hub.add("ann/gout", tmp_path / "repo")
        assert space_app.local_file(tmp_path, wanted).read_bytes() == model.read_bytes()
        other = wanted.model_copy(update={"sha256": "0" * 64})
        with pytest.raises(MedcotError, match="not the file this Space was made for"):
            space_app.local_file(tmp_path, other)


def test_the_command_says_what_it_wrote(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "space"
    done = CliRunner().invoke(cli, ["space", str(folder), "--gguf", str(model), "--license", "mit"])
    assert done.exit_code == 0 and f"{folder}  " in done.output and "MB in all" in done.output
    done = CliRunner().invoke(cli, ["space", str(folder), "--gguf", str(model), "--model-repo", "ann/gout", "--json"])
    document = json.loads(done.stdout)
    assert document["file_bytes"] == 0 and document["models"][0]["repo"] == "ann/gout"
