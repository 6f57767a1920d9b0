"""GGUF files under temporary names, complete and durable step by step, and all renamed together at the end.

A step is one tensor in all files that hold it. Now and then, while the next steps are written, the files are synced
and the journal (``export/journal.py``) is told how many steps they hold; the same export goes on from there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from export.gguf_file import GgufFile, GgufPlan
from export.journal import Journal, Unfinished, locked_journal, partial_path, sync_folder
from pipeline.errors import MedcotError

# How much a kill may cost: what was written since the last sync. Syncing more often would keep a slow disk waiting.
_SYNC_BYTES = 256 << 20
_SYNC_SECONDS = 5.0


@dataclass(frozen=True)
class PartialFile:
    """One file to write: its final path, its plan, and how many of its tensors are complete after each step.

    ``tensors_after`` begins with 0 for no step.
    """

    path: Path
    plan: GgufPlan
    tensors_after: Sequence[int]

    @property
    def partial(self) -> Path:
        return partial_path(self.path)

    @property
    def total_steps(self) -> int:
        return len(self.tensors_after) - 1

    def size_after(self, steps: int) -> int:
        return self.plan.offset(self.tensors_after[steps])


class PartialFiles:
    """The files being written, from ``steps`` on; made by ``open_partial_files``. Methods raise OSError."""

    def __init__(
        self, outputs: Sequence[PartialFile], journal: Journal, steps: int, stack: ExitStack, *, to_rename: bool
    ) -> None:
        self.outputs = outputs
        self.steps = steps
        self.total_steps = outputs[0].total_steps
        self._journal = journal
        self._journaled = steps
        self.files: list[GgufFile] = []
        # Where a finished export was killed while it renamed, some files are no longer there to write to.
        for output in () if to_rename else outputs:
            file = GgufFile(output.plan, output.partial, output.tensors_after[steps])
            stack.callback(file.close)
            self.files.append(file)
        self._sync_thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sync"))
        self._syncing: Future[None] | None = None
        sync_folder(journal.folder)
        self._synced_at, self._synced_bytes = time.monotonic(), self.written

    @property
    def written(self) -> int:
        """Bytes in all files."""
        return sum(file.size for file in self.files)

    @property
    def planned(self) -> int:
        return sum(output.plan.size for output in self.outputs)

    def step_done(self) -> None:
        """All files hold the next tensor; from time to time begin to make that durable."""
        self.steps += 1
        now, written = time.monotonic(), self.written
        due = written - self._synced_bytes >= _SYNC_BYTES or now - self._synced_at >= _SYNC_SECONDS
        if due and (self._syncing is None or self._syncing.done()):
            self._await_sync()
            self._synced_at, self._synced_bytes = now, written
            # Beside the next tensors: a sync takes as long as the disk needs for 256 MB.
            self._syncing = self._sync_thread.submit(self._sync, self.steps)

    def keep(self) -> int:
        """Leave every complete step to the next attempt at this export; returns how many steps are kept.

        On a disk that is full or broken those that the journal vouches for already.
        """
        with suppress(OSError):
            for output, file in zip(self.outputs, self.files, strict=False):
                # First, because it frees the room that a line of the journal takes.
                file.cut(output.tensors_after[self.steps])
            self._await_sync()
            if self.steps > self._journaled:
                self._sync(self.steps)
        return self.kept()

    def kept(self) -> int:
        """How many steps the journal vouches for."""
        if self._syncing is not None:
            wait([self._syncing])
        return self._journaled

    def remove(self) -> None:
        """Give up: nothing of the files stays."""
        self.kept()  # no sync may write to the journal after it is gone
        for output in self.outputs:
            output.partial.unlink(missing_ok=True)
        self._journal.remove()

    def publish(self) -> None:
        """Give all files their names. Killed in between, the same export finds which have theirs already."""
        if self.files:
            self._await_sync()
            for file in self.files:
                file.finish()
                file.sync()
            inodes = {output.path.name: output.partial.stat().st_ino for output in self.outputs}
            self._journal.record(self.steps, inodes)
            self._journaled = self.steps
        for output in self.outputs:
            if output.partial.exists():
                output.partial.replace(output.path)
        sync_folder(self._journal.folder)
        self._journal.remove()

    def _await_sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def _sync(self, steps: int) -> None:
        for file in self.files:
            file.sync()
        self._journal.record(steps)
        self._journaled = steps


@contextmanager
def open_partial_files(
    outputs: Sequence[PartialFile], fingerprint: str, announce: Callable[[str], None]
) -> Iterator[PartialFiles]:
    """The files in one folder, as far as an attempt with the same ``fingerprint`` made them, else from the start.

    Raises MedcotError where another export is at work in the folder or its disk has too little room. Leaving closes
    the files and keeps what they hold, unless they were published or removed.
    """
    folder = outputs[0].path.parent
    with locked_journal(folder) as journal, ExitStack() as stack:
        steps = None
        try:
            unfinished = journal.read()
            steps = _usable_steps(unfinished, outputs, fingerprint)
            to_rename = bool(steps and unfinished and unfinished.inodes)
            if unfinished is not None and unfinished.steps and steps is None:
                announce(f"The unfinished export in {folder} was of other inputs or settings: begun anew.")
            if not steps:
                _remove_leftovers(outputs, unfinished)
            if not to_rename:
                _check_room(folder, outputs)
            if steps:
                journal.go_on()
            else:
                journal.begin(fingerprint, [output.path.name for output in outputs])
            files = PartialFiles(outputs, journal, steps or 0, stack, to_rename=to_rename)
        except OSError as error:
            if not steps:
                _remove_leftovers(outputs, None)
                journal.remove()
            raise MedcotError(f"{folder} cannot be written: {error.strerror}.") from error
        if steps:
            written = sum(output.size_after(steps) for output in outputs)
            announce(
                f"Going on behind tensor {steps} of {files.total_steps}: {written / 1e9:.2f} of "
                f"{files.planned / 1e9:.2f} GB are written."
            )
        yield files


def _usable_steps(unfinished: Unfinished | None, outputs: Sequence[PartialFile], fingerprint: str) -> int | None:
    """How many steps of this export are in the partial files; None where what lies there is of no use."""
    names = tuple(output.path.name for output in outputs)
    if unfinished is None or (unfinished.fingerprint, unfinished.files) != (fingerprint, names):
        return None
    steps = unfinished.steps
    if not 0 < steps <= outputs[0].total_steps:
        return 0
    whole = all(
        _is_begun(output, output.partial, steps)
        or (output.path.name in unfinished.inodes and _is_published(output, unfinished.inodes[output.path.name]))
        for output in outputs
    )
    return steps if whole else None


def _is_begun(output: PartialFile, path: Path, steps: int) -> bool:
    if not path.is_file() or path.stat().st_size < output.size_after(steps):
        return False
    with path.open("rb") as stream:
        return stream.read(len(output.plan.head)) == output.plan.head


def _is_published(output: PartialFile, inode: int) -> bool:
    """Whether the file with the final name is the one that was about to get it, and not an older one."""
    if not output.path.is_file() or output.partial.exists():
        return False
    found = output.path.stat()
    return found.st_ino == inode and found.st_size == output.plan.size


def _remove_leftovers(outputs: Sequence[PartialFile], unfinished: Unfinished | None) -> None:
    folder = outputs[0].path.parent
    names = {output.path.name for output in outputs} | set(unfinished.files if unfinished else ())
    for name in names:
        partial_path(folder / name).unlink(missing_ok=True)


def _check_room(folder: Path, outputs: Sequence[PartialFile]) -> None:
    """Raise MedcotError unless the disk has room for what is still to be written."""
    free = shutil.disk_usage(folder).free
    needed = missing_bytes(outputs)
    if free < needed:
        raise MedcotError(
            f"{folder} has {free / 1e9:.2f} GB free and the files need {needed / 1e9:.2f} GB: "
            f"free {(needed - free) / 1e9:.2f} GB or ask for fewer quantizations."
        )


def missing_bytes(outputs: Sequence[PartialFile]) -> int:
    """What the partial files have yet to grow."""
    there = sum(output.partial.stat().st_size for output in outputs if output.partial.exists())
    return max(0, sum(output.plan.size for output in outputs) - there)
