"""How medcot's processes behave: children end with their parent and in one sentence, libraries keep quiet."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline import ranks
from pipeline.errors import MedcotError
from pipeline.failure import FILE_VARIABLE, write_failure

PR_SET_PDEATHSIG = 1  # prctl(2)
PARENT_VARIABLE = "MEDCOT_PARENT"  # process id, set by a parent for its child
# Set by pipeline/launch.py for the processes of one training: of what several of them say it tells the user one.
TOLD_BY_PARENT_VARIABLE = "MEDCOT_TOLD_BY_PARENT"
# torchrun's: where a process leaves why it failed, as JSON.
# https://docs.pytorch.org/docs/stable/elastic/errors.html
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def with_our_packages() -> dict[str, str]:
    """This process's environment for a child that runs one of our modules with ``python -m``, whatever its folder."""
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def end_with_parent() -> None:
    """Called in a child: when its parent is killed, so is it. An orphan would go on writing into a run's folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may have been killed while this process was still starting; then no signal comes any more.
        if int(os.environ.pop(PARENT_VARIABLE, os.getppid())) != os.getppid():
            os.kill(os.getpid(), signal.SIGKILL)


def quiet_libraries() -> None:
    """Called first in a process: keep what libraries say about themselves out of a user's log."""
    # bitsandbytes regrets at import that an optional kernel package is absent; nothing is lost without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars would fill a log file with half lines


def run_as_child(name: str, run_dir: Path, work: Callable[[], int | None]) -> int:
    """Do the work of a process that run.py started and return its exit status (0 for None).

    Every error becomes one sentence on standard error.
    """
    end_with_parent()
    quiet_libraries()
    # Libraries print to standard output; under --json that belongs to the result alone. Of several processes that
    # train together they would say everything once each.
    os.dup2(2 if ranks.is_first() else os.open(os.devnull, os.O_WRONLY), 1)
    try:
        return work() or 0
    except MedcotError as error:
        return _complain(name, str(error), error.exit_status, foreseen=True)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = f"The disk is full ({error.filename or run_dir}): free some space; the same command goes on."
        else:
            message = f"{error.filename or run_dir}: {error.strerror or error}"
        return _complain(name, message, 1)
    except MemoryError:
        return _complain(name, "Out of memory: lower training.batch_size or model.max_seq_length.", 1)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{type(error).__name__}: {first_line} (an error of medcot or a library; --debug shows where)"
        return _complain(name, message, 1)


def ended_by_signal(name: str, number: int) -> str:
    """The sentence about a child that a signal has ended."""
    reason = " (often: out of memory)" if number == signal.SIGKILL else ""
    signal_name = signal.Signals(number).name
    return f"{name} was ended by {signal_name}{reason}: the same command goes on from where it was."


def _complain(name: str, message: str, status: int, *, foreseen: bool = False) -> int:
    if os.environ.get("MEDCOT_DEBUG"):
        traceback.print_exc()
    error_file = os.environ.get(ERROR_FILE_VARIABLE)
    if error_file:
        now = time.time()
        details = {"py_callstack": message, "timestamp": str(int(now)), "time": now, "foreseen": foreseen}
        Path(error_file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))
    if TOLD_BY_PARENT_VARIABLE not in os.environ:
        tell_failure(name, message, status)
    return status


def tell_failure(name: str, message: str, status: int) -> None:
    """To the user, and for the report where run.py has said into which file."""
    print(f"Error in {name}: {message}", file=sys.stderr)
    path = os.environ.get(FILE_VARIABLE)
    # Without its folder there is no attempt that the failure could belong to; a full disk may refuse even this.
    if path and Path(path).parent.is_dir():
        with suppress(OSError):
            write_failure(Path(path), message, status)
