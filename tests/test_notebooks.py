"""The notebooks as files: valid, without outputs, alike, calling what exists; and what pipeline/notebook.py shows.

tests/e2e/test_notebooks_run.py executes them.
"""

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import nbformat
import pytest

from pipeline import notebook
from pipeline.cli import cli
from pipeline.config import preset_names
from pipeline.errors import MedcotError
from pipeline.platforms import COLAB, KAGGLE, Platform, detect
from pipeline.run import stage_named

ROOT = Path(__file__).resolve().parent.parent
PATHS = {name: ROOT / "notebooks" / f"{name}.ipynb" for name in ("kaggle", "colab")}
COLABS_OWN = {"drive", "about-drive"}


@pytest.fixture(scope="module")
def books() -> dict[str, Any]:
    return {name: nbformat.read(path, as_version=nbformat.NO_CONVERT) for name, path in PATHS.items()}


def sources(book: Any) -> dict[str, str]:
    return {cell.id: cell.source for cell in book.cells if cell.cell_type == "code"}


@pytest.mark.parametrize("name", PATHS)
def test_a_notebook_is_valid_and_was_not_run(name: str, books: dict[str, Any]) -> None:
    book = books[name]
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert PATHS[name].read_text(encoding="utf-8") == nbformat.writes(book) + "\n", "not as Jupyter saves it"


def test_both_ask_for_a_gpu_and_kaggle_for_the_internet(books: dict[str, Any]) -> None:
    kaggle = books["kaggle"].metadata.kaggle
    assert kaggle.accelerator == "nvidiaTeslaT4" and kaggle.isGpuEnabled and kaggle.isInternetEnabled
    assert books["colab"].metadata.accelerator == "GPU" and books["colab"].metadata.colab.gpuType == "T4"


def test_both_take_the_same_steps(books: dict[str, Any]) -> None:
    kaggle, colab = sources(books["kaggle"]), sources(books["colab"])
    assert [step for step in colab if step not in COLABS_OWN] == list(kaggle)
    folders = {"/kaggle/temp/medcot": "FOLDER", "/content/medcot": "FOLDER"}
    for step, source in kaggle.items():
        one, other = source, colab[step]
        for folder, word in folders.items():
            one, other = one.replace(folder, word), other.replace(folder, word)
        assert one == other, step
    assert re.findall(r"^!\./run_pipeline\.sh.*", "\n".join(kaggle.values()), re.M) == [
        "!./run_pipeline.sh {PRESET} --until verify --first-report {ARGUMENTS}",
        "!./run_pipeline.sh {PRESET} {ARGUMENTS}",
    ]


@pytest.mark.parametrize("name", PATHS)
def test_the_file_can_be_taken_before_it_is_evaluated(name: str, books: dict[str, Any]) -> None:
    steps = list(sources(books[name]))
    handed_out = ["run", "report", "download", "publish", "ask"]
    assert steps[-8:] == [*handed_out, "evaluate", "whole-report", "publish-figures"]
    told = {cell.id: cell.source for cell in books[name].cells if cell.cell_type == "markdown"}
    assert "GGUF **within 2 hours**" in told["about-run"] and "**within 3 hours**" in told["about-evaluate"]


def test_the_preset_exists(books: dict[str, Any]) -> None:
    [preset] = re.findall(r'"MEDCOT_PRESET", "([^"]+)"', sources(books["kaggle"])["settings"])
    assert preset in preset_names()


@pytest.mark.parametrize("name", PATHS)
def test_every_command_has_the_options_it_is_called_with(name: str, books: dict[str, Any]) -> None:
    called = set()
    for source in sources(books[name]).values():
        for line in re.findall(r"^\s*!(.+)$", source, re.M):
            arguments = shlex.split(re.sub(r"\{[^{}]*\}", "x", line))
            if arguments[:3] == ["python", "-m", "pipeline.cli"]:
                arguments = arguments[3:]
            elif arguments[0] == "./run_pipeline.sh":
                arguments = ["run", *arguments[1:-1]]  # the last stands for options of any kind
            else:
                assert arguments[0] == "git", line
                continue
            command = cli.get_command(click.Context(cli), arguments[0])
            if command is None and arguments[0] == "publish":
                pytest.skip("medcot publish is not here yet")
            assert command is not None, line
            command.make_parser(click.Context(command)).parse_args(list(arguments[1:]))
            called.add(arguments[0])
    assert called == {"run", "publish", "chat"}


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of two files, where stages put them."""
    monkeypatch.setenv("MEDCOT_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "runs" / "tiny"
    exported, reported = folder / stage_named("export").folder, folder / stage_named("report").folder
    exported.mkdir(parents=True)
    (exported / "tiny-Q4_K_M.gguf").write_bytes(b"GGUF")
    (exported / "manifest.json").write_text(json.dumps({"result": {"ship": "tiny-Q4_K_M.gguf"}}))
    reported.mkdir()
    (reported / "report.html").write_text('<p class="a">gut & "groß"</p>', encoding="utf-8")
    return folder


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a notebook would show, as HTML."""
    shown: list[str] = []
    import IPython.display

    monkeypatch.setattr(IPython.display, "display", lambda thing: shown.append(thing._repr_html_()))
    return shown


def platform(name: str, run_dir: Path) -> Platform:
    environ = {"KAGGLE_KERNEL_RUN_TYPE": "x"} if name == KAGGLE.name else {"COLAB_RELEASE_TAG": "x"}
    return detect(environ | {"MEDCOT_RUNS": str(run_dir.parent)}, Path("/nowhere"))


def service_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """A module that only the service's kernel has."""
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_the_report_is_shown_in_a_frame(run_dir: Path, displayed: list[str]) -> None:
    notebook.show_report("tiny")
    assert displayed[0].startswith(
        '<div><iframe srcdoc="&lt;p class=&quot;a&quot;&gt;gut &amp; &quot;groß&quot;&lt;/p&gt;"'
    )


def test_kaggle_gets_a_link_from_its_working_folder(run_dir: Path, displayed: list[str]) -> None:
    here = Path.cwd()
    notebook.offer_download("tiny", platform(KAGGLE.name, run_dir))
    assert "href='runs/tiny/gguf/tiny-Q4_K_M.gguf'" in displayed[0] and Path.cwd() == here


def test_colab_downloads(run_dir: Path, displayed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded: list[str] = []
    service_module(monkeypatch, "google.colab", files=SimpleNamespace(download=downloaded.append))
    notebook.offer_download("tiny", platform(COLAB.name, run_dir))
    assert downloaded == [str(run_dir / "gguf" / "tiny-Q4_K_M.gguf")] and displayed == []


def test_a_run_that_failed_is_told_in_one_sentence(run_dir: Path) -> None:
    with pytest.raises(MedcotError, match=r"no .*report\.html: the run above did not come to its report"):
        notebook.show_report("other")
    with pytest.raises(MedcotError, match="did not come to its export"):
        notebook.shipped_gguf("other")


def test_drive_is_mounted_on_colab_alone(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted: list[str] = []
    service_module(monkeypatch, "google.colab", drive=SimpleNamespace(mount=mounted.append))
    notebook.keep_on_drive(platform(KAGGLE.name, run_dir))
    assert mounted == [] and "Kaggle has no Google Drive to mount" in capsys.readouterr().out
    notebook.keep_on_drive(platform(COLAB.name, run_dir))
    assert mounted == ["/content/drive"]


def test_the_hubs_token_comes_from_the_notebooks_secrets(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")  # and is put back as it was

    def refuse(name: str) -> str:
        raise ConnectionError(f"{name} is not allowed")

    service_module(monkeypatch, "google.colab", userdata=SimpleNamespace(get=refuse))
    with pytest.raises(MedcotError, match=r"ConnectionError: HF_TOKEN is not allowed\): add the secret HF_TOKEN"):
        notebook.use_hub_token(platform(COLAB.name, run_dir))
    client = SimpleNamespace(get_secret=lambda name: f"secret {name}")
    service_module(monkeypatch, "kaggle_secrets", UserSecretsClient=lambda: client)
    notebook.use_hub_token(platform(KAGGLE.name, run_dir))
    import os

    assert os.environ["HF_TOKEN"] == "secret HF_TOKEN"
