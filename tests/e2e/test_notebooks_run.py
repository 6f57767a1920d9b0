"""Both notebooks from the first cell to the last, as a service's kernel would run them, with the embedded preset.

Kaggle's makes a run, scaled down; Colab's goes on from its copy on another machine, as after a session that was killed.
What is installed is used as it is, and the repository that they clone is made of this working tree.
"""

import os
import shlex
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
NAME = "smollm2-cpu"
QUICK = (
    "data.eval_rows=4", "training.max_steps=2", "export.quantizations=[Q4_K_M]", "export.include_base=false",
    "export.imatrix=none", "verify.prompts=1", "evaluation.rows=2", "evaluation.max_new_tokens=16",
    "evaluation.choice_rows=0", "evaluation.gates={}", "bench.transformers=false", "bench.repeats=1",
    "bench.prompt_tokens=16", "bench.generated_tokens=4", "bench.depths=[0]", "bench.quality_records=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository of this working tree as it is, changes that are not committed included."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(
        ROOT,
        folder,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns(".git", ".venv", "runs", "tmp", ".hypothesis", ".*_cache"),
    )
    identity = ["-c", "user.name=medcot", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--message", "as it is"]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    return folder


def execute(name: str, folder: Path, repository: Path, keep: Path) -> dict[str, str]:
    """Run a notebook on a machine whose files are in ``folder``; what each code cell showed, by the cell's id."""
    import nbclient
    import nbformat

    changes = [argument for change in QUICK for argument in ("--set", change)]
    environ = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MEDCOT_REPOSITORY": f"file://{repository}",
        "MEDCOT_FOLDER": str(folder / "medcot"),
        "MEDCOT_RUNS": str(folder / "runs"),
        "MEDCOT_PRESET": NAME,
        "MEDCOT_ARGS": shlex.join([*changes, "--keep", str(keep)]),
        "MEDCOT_SETUP": "none",
        "MEDCOT_PYTHON": sys.executable,
        "IPYTHONDIR": str(folder / "ipython"),
    }
    folder.mkdir()
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        book, timeout=1200, startup_timeout=300, iopub_timeout=60, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environ)
    return {cell.id: "".join(map(shown, cell.outputs)) for cell in book.cells if cell.cell_type == "code"}


def shown(output: Any) -> str:
    if output.output_type == "stream":
        return str(output.text)
    return str(output.data.get("text/html", output.data["text/plain"]))


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("machines")
    return {name: execute(name, folder / name, repository, folder / "drive") for name in ("kaggle", "colab")}


def test_kaggles_notebook_makes_a_run_and_shows_it(machines: dict[str, dict[str, str]]) -> None:
    shows = machines["kaggle"]
    assert "train: started" in shows["run"] and "Chat with it:" in shows["run"], shows["run"][-3000:]
    assert "The GGUF is ready and verified" in shows["run"] and "evaluate: started" not in shows["run"]
    assert "Not evaluated yet" in unescape(shows["report"]) and shows["report"].startswith("<div><iframe srcdoc=")
    assert f"href='runs/{NAME}/gguf/{NAME}-Q4_K_M.gguf'" in shows["download"]
    assert shows["publish"] == shows["publish-figures"] == ""
    assert " tokens in " in shows["ask"], shows["ask"]
    assert "verify: up to date" in shows["evaluate"] and "bench: started" in shows["evaluate"], shows["evaluate"][
        -3000:
    ]
    whole = unescape(shows["whole-report"])
    assert f"{NAME}-Q4_K_M.gguf" in whole and "Not evaluated yet" not in whole


def test_colabs_notebook_goes_on_from_the_copy_of_a_session_that_is_gone(machines: dict[str, dict[str, str]]) -> None:
    shows = machines["colab"]
    assert "has no Google Drive to mount" in shows["drive"]
    assert "keep: resumed from" in shows["run"] and "Everything is up to date" in shows["run"], shows["run"][-3000:]
    assert "Everything is up to date" in shows["evaluate"], shows["evaluate"][-3000:]
    assert shows["report"] == shows["whole-report"] == machines["kaggle"]["whole-report"]
    assert " tokens in " in shows["ask"], shows["ask"]
