"""A Space's folder in an environment made from its own requirements alone: started as Spaces start it, it answers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_models import small_model

from chat.space import write_space

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "space"
    write_space(folder, small_model(), title="Small", max_new_tokens=64)
    return folder


@pytest.fixture(scope="module")
def python(folder: Path) -> Path:
    """The interpreter of a new environment; pip's cache has the llama-cpp-python that scripts/setup.sh compiled."""
    environment = folder.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    installed = subprocess.run(
        [*pip, "-r", str(folder / "requirements.txt")], capture_output=True, text=True, check=False
    )
    assert installed.returncode == 0, installed.stderr
    return python


def test_the_space_answers_in_a_browser(folder: Path, python: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    # Nothing of the environment that the tests run in, so that nothing but the folder and its packages helps.
    bare = {"PATH": os.environ["PATH"], "HOME": str(folder.parent), "GRADIO_SERVER_PORT": "0", "MEDCOT_COUNTRY": "DE"}
    app = subprocess.Popen([str(python), "app.py"], cwd=folder, env=bare, stdout=subprocess.PIPE, text=True)
    assert app.stdout is not None
    try:
        said = app.stdout.readline()
        assert said.startswith("The page is at http://"), said
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(said.split()[-1])
            page.locator("#question textarea").fill("I have crushing chest pain. What is gout?")
            page.locator("#question textarea").press("Enter")
            page.get_by_text("tokens/s").first.wait_for(timeout=60_000)
            shown = page.locator("#current").inner_text()
            browser.close()
        assert "Call 112 now" in shown  # the numbers of the country that the Space's variable names
        answer = shown.rpartition("tokens/s")[0]
        assert len(answer.split()) > 30
    finally:
        app.terminate()
        app.wait(10)
