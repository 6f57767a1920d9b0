"""Where a training's metrics go besides metrics.jsonl: Weights & Biases, online or offline, or TensorBoard.

    medcot run --set training.report_to=wandb
    WANDB_MODE=offline WANDB_PROJECT=cases medcot run

metrics.jsonl is the record; a tracker shows its rows under the names that transformers' callbacks give them, so that
our curves lie beside those of other trainers. The callbacks themselves are not used: they begin another run whenever
training resumes, ask for an API key at the keyboard, and do not see the held-out losses that the stage measures itself.

Whatever a tracker does, training goes on, and one sentence says what happened.
"""

from __future__ import annotations

import os
import secrets
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.artifacts import write_text
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.ranks import is_first

CONNECT_SECONDS = 30  # for W&B's server to answer
FINISH_SECONDS = 120  # for what is not uploaded yet when training is over; `wandb sync` sends the rest
_WANDB_ID_FILE = "wandb_run_id"
# What each WANDB_MODE means; W&B still takes two older names.
_WANDB_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}

Row = Mapping[str, Any]
Announce = Callable[[str], None]
Destination = Literal["none", "wandb", "wandb-offline", "tensorboard"]


class Tracker(Protocol):
    """Takes rows of metrics.jsonl (``step`` and numbers) in order."""

    def log(self, row: Row) -> None: ...

    def close(self, failed: bool) -> None: ...

    def abandon(self) -> None:
        """Called once after a failure of the others; raises nothing."""


@contextmanager
def track(config: Config, folder: Path, history: Sequence[Row], announce: Announce) -> Iterator[Callable[[Row], None]]:
    """Yield the function that passes a row on to the configured tracker; without one it does nothing.

    ``history`` is what a resumed training keeps of metrics.jsonl, and reaches the tracker first; ``folder`` holds the
    tracker's files, and W&B's run id from one session to the next.
    """
    tracker = _Unfailing(announce)
    if is_first():
        tracker.open(lambda: open_tracker(config, folder, history, announce))
    try:
        yield tracker.log
    except BaseException:
        tracker.close(failed=True)
        raise
    tracker.close(failed=False)


def open_tracker(config: Config, folder: Path, history: Sequence[Row], announce: Announce) -> Tracker | None:
    """The configured tracker, which has got ``history`` already; raises whatever it fails with."""
    where = destination(config.training.report_to, os.environ)
    if where == "none":
        return None
    folder.mkdir(parents=True, exist_ok=True)
    if where == "tensorboard":
        return TensorBoard(config, folder, history, announce)
    return WeightsAndBiases(config, folder, history, where == "wandb-offline", announce)


def destination(report_to: str, environment: Mapping[str, str]) -> Destination:
    """Where ``training.report_to`` and W&B's variables send the metrics: of the two, the one that tells less holds.

    ``auto`` is W&B where WANDB_MODE or WANDB_PROJECT is set. WANDB_DISABLED is transformers' variable, the others are
    https://docs.wandb.ai/models/track/environment-variables. Raises MedcotError for a mode that W&B does not know.
    """
    if report_to == "auto":
        report_to = "wandb" if environment.get("WANDB_MODE") or environment.get("WANDB_PROJECT") else "none"
    if report_to == "none":
        return "none"
    if report_to == "tensorboard":
        return "tensorboard"
    name = environment.get("WANDB_MODE") or "online"
    mode = _WANDB_MODES.get(name)
    if mode is None:
        raise MedcotError(f"WANDB_MODE is {name!r}, but W&B knows {', '.join(_WANDB_MODES)}")
    if mode == "disabled" or environment.get("WANDB_DISABLED", "").lower() in ("1", "true"):
        return "none"
    return "wandb-offline" if mode == "offline" or report_to == "wandb-offline" else "wandb"


class _Unfailing:
    """A tracker for as long as it works: its first failure ends it and is told, and training goes on."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._tracker: Tracker | None = None

    def open(self, make: Callable[[], Tracker | None]) -> None:
        with self._told():
            self._tracker = make()

    def log(self, row: Row) -> None:
        if self._tracker is not None:
            with self._told():
                self._tracker.log(row)

    def close(self, failed: bool) -> None:
        if self._tracker is not None:
            with self._told():
                self._tracker.close(failed)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a server, other processes and a disk: no shorter list would be complete
            tracker, self._tracker = self._tracker, None
            if tracker is not None:
                tracker.abandon()
            reason = str(error) if isinstance(error, MedcotError) else f"the tracker failed ({_one_line(error)})"
            self._announce(f"train: {reason}; training goes on without it, and metrics.jsonl has everything")


class WeightsAndBiases:
    """One W&B run for one training, however many sessions it takes.

    Offline, every session records the run from its beginning: W&B cannot go on with an offline recording
    (https://github.com/wandb/wandb/issues/3841), and when two of one run are uploaded, the second replaces the first.
    """

    def __init__(self, config: Config, folder: Path, history: Sequence[Row], offline: bool, announce: Announce) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MedcotError(f"W&B is not installed ({error}): pip install wandb") from error

        wandb.setup(wandb.Settings(silent=True))
        run_id = _wandb_run_id(folder)
        connected = None if offline else _connect(config, folder, run_id, announce)
        self._run = connected or _begin(config, folder, run_id, mode="offline")
        recording = Path(self._run.dir).parent
        if connected:
            announce(f"train: W&B shows it at {self._run.url}")
        else:
            announce(f"train: W&B records offline; to upload it later: wandb sync {recording}")
        # The server has the rows before this step from an earlier session.
        self._next_step = self._run.starting_step
        for row in history:
            self.log(row)
        for earlier in (folder / "wandb").glob(f"offline-run-*-{run_id}"):
            if earlier != recording:
                shutil.rmtree(earlier)

    def log(self, row: Row) -> None:
        if row["step"] >= self._next_step:
            self._next_step = row["step"]
            self._run.log({**_named(row), "train/global_step": row["step"]}, step=row["step"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def abandon(self) -> None:
        import wandb

        # Otherwise W&B's hook at the end of the process prints how it failed once more; so does this, to nobody.
        with suppress(Exception):
            wandb.teardown()


def _connect(config: Config, folder: Path, run_id: str, announce: Announce) -> Any:
    """The run on W&B's server, or None, with the reason told."""
    import wandb

    try:
        # Asked for here because wandb.init would ask at the keyboard, for as long as nobody answers.
        if not wandb.login(prompt=False, verify=False):
            announce("train: W&B has no API key here: set WANDB_API_KEY, or run 'wandb login' once")
            return None
        return _begin(config, folder, run_id, mode="online", resume="allow")
    except (wandb.errors.Error, TimeoutError, OSError) as error:
        announce(f"train: W&B cannot be used online ({_one_line(error)})")
        wandb.teardown()  # the failed attempt keeps the run's id to itself
        return None


def _begin(config: Config, folder: Path, run_id: str, **settings: Any) -> Any:
    import wandb

    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "medcot"),
        name=os.environ.get("WANDB_NAME", config.name),
        id=run_id,
        dir=folder,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(
            silent=True,  # its own summary of every loss would bury ours
            console="off",
            init_timeout=CONNECT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        ),
        **settings,
    )


def _wandb_run_id(folder: Path) -> str:
    """The id that this training has had from its first session on."""
    kept = folder / _WANDB_ID_FILE
    if not kept.is_file():
        write_text(kept, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    return kept.read_text(encoding="utf-8")


class TensorBoard:
    """Event files in ``folder/tensorboard``, written anew by every session, for a kill loses what is not flushed."""

    def __init__(self, config: Config, folder: Path, history: Sequence[Row], announce: Announce) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MedcotError(f"TensorBoard is not installed ({error}): pip install tensorboard") from error

        events = folder / "tensorboard"
        shutil.rmtree(events, ignore_errors=True)
        self._writer = SummaryWriter(str(events))
        # TensorBoard shows text as Markdown, where four spaces make a block of code.
        self._writer.add_text("configuration", textwrap.indent(config.to_yaml(), "    "))
        for row in history:
            self.log(row)
        announce(f"train: to see it: tensorboard --logdir {events}")

    def log(self, row: Row) -> None:
        for name, value in _named(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()

    def abandon(self) -> None:
        """The writer's thread ends with the process."""


def _named(row: Row) -> dict[str, float]:
    """A row's numbers under the names of transformers' callbacks: ``train/loss``, ``eval/loss``."""
    return {
        f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float)
    }


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
