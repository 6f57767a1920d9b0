"""Shared by all tests: no hub is asked, and the real tokenizers that lie beside the project."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import signal
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_TOKENIZERS = ROOT.parent / "shared" / "tokenizers"
sys.path[:0] = [str(Path(__file__).parent / each) for each in ("", "gpu", "perf")]
# What the chat remembers of its user (the disclaimer was shown) stays out of the home of who runs the tests.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="medcot-tests-state-")
# A shell makes what it starts in the background deaf to Ctrl-C and Ctrl-\, and the programs under test inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def shared_tokenizer(name: str) -> Path:
    """The folder of a real tokenizer beside the project; skips where there is none."""
    folder = SHARED_TOKENIZERS / name
    if not folder.is_dir():
        pytest.skip(f"../shared/tokenizers/{name} is not beside the project")
    return folder


@pytest.fixture(scope="session")
def r1_tokenizer() -> Path:
    return shared_tokenizer("deepseek-r1-distill-llama-8b")


@pytest.fixture(scope="session")
def tinyllama_tokenizer() -> Path:
    return shared_tokenizer("tinyllama-1.1b-chat")
