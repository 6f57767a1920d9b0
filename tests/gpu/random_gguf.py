"""The random 8B model as a GGUF in Q4_K_M, exported on the CPU."""

from __future__ import annotations

import fcntl
from pathlib import Path

from part import Request, medcot, run
from synthetic import random_base

from pipeline.errors import MedcotError


def random_gguf(request: Request) -> Path:
    """Made once in ``request.work``; another process that asks meanwhile waits."""
    folder = request.work / "random-gguf"
    with (request.work / "random-gguf.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*-Q4_K_M.gguf")):
            base = random_base(request.work, request.rehearse)
            command = medcot("export", "--base", str(base), "--out", str(folder), "--quant", "Q4_K_M")
            if run([*command, "--imatrix", "none", "--no-verify"]) != 0:
                raise MedcotError("The random model could not be exported; the log says why.")
    return next(folder.glob("*-Q4_K_M.gguf"))
