"""The laptop's chat needs no PyTorch and no training library: it runs where they cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

from chat_models import small_model

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = (
    *(
        "torch",
        "transformers",
        "peft",
        "trl",
        "unsloth",
        "datasets",
        "tokenizers",
        "numba",
        "llvmlite",
        "gguf",
        "bench",
    ),
)

CHAT = """
import json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

path, *forbidden = sys.argv[1:]

class Forbid(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in forbidden:
            raise ModuleNotFoundError(f"{name} must not be imported by the chat", name=name)

sys.meta_path.insert(0, Forbid())
from chat.terminal import run_chat

assert "llama_cpp" not in sys.modules, "llama.cpp is loaded before the file is proven"
run_chat(Path(path), "What is gout?", max_new_tokens=8, n_ctx=256, threads=1, as_json=True)
present = sorted(set(forbidden) & {name.partition(".")[0] for name in sys.modules})
print(json.dumps(present), file=sys.stderr)
"""


def test_chat_runs_without_the_training_libraries(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    chat = subprocess.run(
        [sys.executable, "-c", CHAT, str(small_model()), *FORBIDDEN],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert chat.returncode == 0, chat.stderr
    assert json.loads(chat.stdout)["answer"]
    assert json.loads(chat.stderr) == []
