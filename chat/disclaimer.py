"""The disclaimer: one line at every start, in full the first time, and again when its text has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pipeline.artifacts import write_text

DISCLAIMER = "A research model, not a doctor: what it says is not medical advice and may be wrong."
FULL_DISCLAIMER = f"""\
{DISCLAIMER}
It was not tested on patients and must not decide about a diagnosis, a medicine or a dose. What sounds certain may be
invented. Fixed rules look for emergencies in what you write and warn you; they were not reviewed by clinicians and
miss emergencies: no warning does not mean that there is none. When in doubt, ask a doctor or call your emergency
number. What you write stays on this computer."""


def disclaimer_to_show() -> tuple[str, str | None]:
    """The disclaimer for this start; in full, and remembered as shown, unless that was done before.

    The second text is what to tell the user when it could not be remembered.
    """
    if _was_shown():
        return DISCLAIMER, None
    try:
        write_text(_state_file(), _fingerprint() + "\n")
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        reason = getattr(error, "strerror", None) or str(error)
        return FULL_DISCLAIMER, f"This will be shown again, because it could not be noted as read: {reason}."
    return FULL_DISCLAIMER, None


def _was_shown() -> bool:
    try:
        return _state_file().read_text(encoding="utf-8").strip() == _fingerprint()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return False


def _state_file() -> Path:
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path("~/.local/state").expanduser()) / "medcot" / "disclaimer-shown"


def _fingerprint() -> str:
    return hashlib.sha256(FULL_DISCLAIMER.encode()).hexdigest()
