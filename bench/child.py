"""A measurement in a process of its own: a JSON request goes in, a JSON result is the last line that comes out.

Its peak memory is its own, and a library that aborts on a broken file takes nothing else with it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import MedcotError
from pipeline.processes import end_with_parent, with_our_packages

Request = TypeVar("Request", bound=BaseModel)
Result = TypeVar("Result", bound=BaseModel)


def ask(module: str, request: BaseModel, result: type[Result], what: str) -> Result:
    """Run ``python -m module`` on the request; MedcotError says that ``what`` failed, and why."""
    child = subprocess.run(
        [sys.executable, "-m", module],
        input=request.model_dump_json(),
        capture_output=True,
        text=True,
        env=with_our_packages(),
        check=False,
    )
    last_line = (child.stdout.strip().splitlines() or [""])[-1]
    if child.returncode == 0:
        try:
            return result.model_validate_json(last_line)
        except ValidationError as error:
            raise MedcotError(f"{what} gave no result (last line: {last_line!r:.80}).") from error
    raise MedcotError(f"{what} failed: {_reason(child)}")


def answer(request: type[Request], work: Callable[[Request], BaseModel]) -> int:
    """The child's side: the exit status, the result printed."""
    end_with_parent()
    try:
        result = work(request.model_validate_json(sys.stdin.read()))
    except MedcotError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print(result.model_dump_json(), flush=True)
    return 0


def _reason(child: subprocess.CompletedProcess[str]) -> str:
    said = (child.stderr.strip().splitlines() or ["no message"])[-1]
    if child.returncode >= 0:
        return said
    number = -child.returncode
    if number == signal.SIGKILL:
        return "the process was killed, most often for want of memory: close programs or take a smaller model."
    return f"the process died of {signal.Signals(number).name}; the file may be damaged ({said:.200})."
