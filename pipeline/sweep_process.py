"""One experiment's run in a process of its own: ``python -m pipeline.sweep_process RUN_DIR UNTIL`` (by sweep.py).

A process of its own can be given a GPU, and an error in it is that experiment's alone. It is an ordinary run:
``medcot run RUN_DIR/config.yaml --run-dir RUN_DIR`` goes on with it. What it says is in ``run.log``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.processes import PARENT_VARIABLE, ended_by_signal, run_as_child, with_our_packages
from pipeline.run import FolderBusy, StageFailed, load_run_config, run

LOG_NAME = "run.log"
# The process of a machine that was lost, or of a sweep that was killed, holds its folder until it notices.
_BUSY_SECONDS = 60.0
_STOP_SECONDS = 10.0


class ExperimentProcess:
    """A run that has been started in ``run_dir`` (which holds its config.yaml), up to and with stage ``until``.

    ``environment`` is added to this process's own.
    """

    def __init__(self, run_dir: Path, until: str, environment: Mapping[str, str]) -> None:
        self.run_dir = run_dir
        self._log = run_dir / LOG_NAME
        with self._log.open("ab") as stream:
            self._begin = self._told = stream.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.sweep_process", str(run_dir), until],
                env={**with_our_packages(), **environment, PARENT_VARIABLE: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )

    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> None:
        self._process.wait()

    def stop(self) -> None:
        """End it; its stages end with it."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def new_lines(self) -> list[str]:
        """Whole lines of its log since the last call."""
        text = _read_from(self._log, self._told)
        whole = text[: text.rfind(b"\n") + 1]
        self._told += len(whole)
        return whole.decode(errors="replace").splitlines()

    def failure(self) -> str | None:
        """Why the ended process failed, in one line; None when it did not."""
        status = self._process.returncode
        if status == 0:
            return None
        if status < 0:
            return ended_by_signal(self.run_dir.name, -status)
        lines = [line for line in _read_from(self._log, self._begin).decode(errors="replace").splitlines() if line]
        told = [line for line in lines if line.startswith("Error")]
        return (told or lines or [f"ended with exit status {status}"])[-1]


def _read_from(path: Path, offset: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read()


def go_on(run_dir: Path, until: str) -> int:
    """Bring the run up to date, as soon as nobody else works in its folder; returns the exit status."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            run(load_run_config(run_dir), run_dir, until=until, announce=_say)
        except FolderBusy:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        except StageFailed as error:
            return error.exit_status  # the stage has said why
        else:
            return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    folder, last_stage = Path(sys.argv[1]), sys.argv[2]
    sys.exit(run_as_child(folder.name, folder, lambda: go_on(folder, last_stage)))
