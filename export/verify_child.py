"""Runs ``export/verify_probe.py`` on one GGUF in a child process, because libllama aborts on some broken files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from export.verify_probe import ANSWER_NAME, NO_ROOM_STATUS, REQUEST_NAME, Answer, Request
from pipeline.errors import MedcotError
from pipeline.processes import with_our_packages

_TIMEOUT_SECONDS = 3600
_KILLED = 9


def ask(request: Request, folder: Path) -> Answer | str:
    """The child's answer, its logits being in ``folder``; or the sentence that says what is wrong with the GGUF.

    Raises MedcotError where this machine is at fault: no room for the logits, or the child was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REQUEST_NAME).write_text(request.model_dump_json(), encoding="utf-8")
    try:
        child = subprocess.run(
            [sys.executable, "-m", "export.verify_probe", str(folder)],
            env=with_our_packages(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"llama.cpp did not finish with {request.gguf} in {_TIMEOUT_SECONDS // 60} minutes."
    if child.returncode == 0:
        return Answer.model_validate_json((folder / ANSWER_NAME).read_bytes())
    last_words = next(reversed(child.stderr.decode(errors="replace").strip().splitlines()), "no message")
    if child.returncode == NO_ROOM_STATUS:
        raise MedcotError(last_words)
    if child.returncode == -_KILLED:
        raise MedcotError(
            f"The process that verified {request.gguf} was killed, which mostly means too little memory: close other "
            "programs, or verify fewer or smaller files."
        )
    if child.returncode < 0:
        return f"llama.cpp died (signal {-child.returncode}) on {request.gguf}: {last_words}"
    return f"llama.cpp cannot use {request.gguf}: {last_words}"
