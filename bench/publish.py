"""``medcot publish OWNER/NAME``: a run to a model repository of the Hugging Face Hub.

Large files go first, one after the other, into the hub's storage, where nobody sees them; then one commit shows all of
them together, so no reader meets a model card whose GGUF is missing. The same command goes on after an interruption:
what is there with the same hash is not sent again. Visibility is never changed, and what medcot did not write is never
deleted (files of the same names are replaced; git keeps the old ones): medcot-publish.json there says what it wrote.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from bench.model_repository import Doubtful, ModelRepository, Stored
from bench.page import byte_size
from bench.publication import FileState, Publication, PublishedFile
from bench.published_files import Upload, run_files
from bench.run_folder import Run, open_run
from bench.sections.decision import is_verified
from export import hub_files
from pipeline import __version__, platforms
from pipeline.artifacts import sha256_file
from pipeline.errors import GateFailed, MedcotError
from pipeline.results import Measurement

RECORD_PATH = "medcot-publish.json"
_MEASURED_LATER = ("evaluate", "bench")
_NOT_EVALUATED_YET = (
    "This model is not evaluated yet, and its card says so: when medcot run has evaluated it, the same command adds "
    "the figures."
)
_HUBS_OWN = frozenset({".gitattributes"})  # the hub puts it into every new repository


class PublishedRecord(Measurement):
    """medcot-publish.json; ``files`` has the hashes by which the hub may know each file but itself."""

    format: int = 1
    made_by: str
    run: str
    files: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Change:
    """What it takes to bring the repository to the files to publish."""

    to_send: list[Upload]
    to_delete: list[str]
    left_alone: list[str]

    @property
    def is_none(self) -> bool:
        return not self.to_send and not self.to_delete


def only_run() -> Path:
    """The run in this machine's folder of runs, where there is one only; raises MedcotError."""
    runs = platforms.here().runs
    found = sorted(path.parent for path in runs.glob("*/config.yaml"))
    if len(found) == 1:
        return found[0]
    told = f"there are {', '.join(map(str, found))}" if found else f"there is none in {runs}/"
    raise MedcotError(f"Name the run's folder with --run-dir: {told}.")


def publish(
    name: str,
    run_dir: Path,
    *,
    ggufs: Sequence[str] = (),
    all_ggufs: bool = False,
    adapter: bool = True,
    report: bool = True,
    public: bool = False,
    unverified: bool = False,
    dry_run: bool = False,
    announce: Callable[[str], None] = lambda text: None,
) -> Publication:
    """Publish the run in ``run_dir`` as ``name`` (owner/name); a dry run sends and writes nothing, here or there.

    Raises MedcotError for a run or a repository that it cannot be done with, GateFailed for a run that a gate has
    stopped unless ``unverified``.
    """
    repository = ModelRepository(name, patient=not dry_run)
    config, run = open_run(run_dir)
    _check_run(run, unverified)
    uploads = run_files(config, run, run_dir, name, ggufs=ggufs, all_ggufs=all_ggufs, adapter=adapter, report=report)
    uploads.append(_record(config.name, uploads))
    notes = [_NOT_EVALUATED_YET] if run.states["evaluate"].pending else []
    if dry_run:
        return _dry_run(repository, uploads, public, notes)
    repository.check_token()
    before = repository.look()
    # Before anything is made there.
    _check_unchanged(uploads if before is None else before.missing(uploads))
    if before is None:
        repository.create(private=not public)
    stored = before or repository.look()
    if stored is None:
        raise MedcotError(f"{name} was made, and the token may not see it: take one that may read it too.")
    _check_visibility(repository, stored, public)
    change, commit = _change(repository, stored, uploads), stored.commit
    if not change.is_none:
        for upload in change.to_send:
            _send(repository, upload, announce)
        announce(f"Making one commit of {len(change.to_send)} files ...")
        commit = _commit(repository, uploads, f"medcot publish: {config.name}", public)
    return _publication(
        repository, uploads, change, "sent", public=public, existed=before is not None, dry_run=False, commit=commit,
        notes=notes,
    )  # fmt: skip


def _check_run(run: Run, unverified: bool) -> None:
    for stage in ("train", "export"):
        state = run.states[stage]
        if state.name != "done":
            reason = f" ({state.reason})" if state.reason else ""
            raise MedcotError(
                f"There is nothing whole to publish; {stage}: {state.name}{reason}. Run medcot run first."
            )
    if unverified:
        return
    for stage, state in run.states.items():
        if stage in _MEASURED_LATER and state.pending:
            continue  # the GGUF is published first, its figures by the same command afterwards
        told = f"{stage}: {state.name}. {state.reason}".rstrip(". ")
        if state.name == "gate failed":
            raise GateFailed(f"A gate stopped this run. {told}. To publish it with that on its card: --unverified.")
        if state.name not in ("done", "not run"):
            raise MedcotError(f"{told}. Run medcot run first, or publish it with that on its card: --unverified.")
    if run.verified is None:
        raise MedcotError(
            "Nothing shows yet that the GGUF is what was trained (verify: not run). Run medcot run first, or publish "
            "it with that on its card: --unverified."
        )
    if not is_verified(run.verified):
        raise GateFailed("The verification failed. To publish the run with that on its card: --unverified.")


def _check_unchanged(uploads: Sequence[Upload]) -> None:
    """Raises MedcotError for a file of the run that is not what its manifest says."""
    for upload in uploads:
        if not isinstance(upload.content, bytes) and sha256_file(upload.content) != upload.sha256:
            raise MedcotError(f"{upload.content} was changed since the run made it: medcot run makes it again.")


def _record(run_name: str, uploads: Sequence[Upload]) -> Upload:
    record = PublishedRecord(
        made_by=f"medcot {__version__}",
        run=run_name,
        files={upload.path: upload.identities for upload in uploads},
    )
    return Upload.made(RECORD_PATH, "record", record.model_dump_json(indent=2) + "\n")


def _check_visibility(repository: ModelRepository, stored: Stored, public: bool) -> None:
    if stored.private and public:
        raise MedcotError(
            f"{repository.name} is private, and medcot does not change that: make it public on "
            f"{repository.url}/settings, or leave --public out."
        )
    if not stored.private and not public:
        raise MedcotError(
            f"{repository.name} is public, everyone would see what is published: add --public if that is meant, or "
            "name another repository."
        )


def _change(repository: ModelRepository, stored: Stored, uploads: Sequence[Upload]) -> _Change:
    paths = {upload.path for upload in uploads}
    ours = _written_before(repository, stored)
    to_delete = sorted(
        path for path, file in stored.files.items() if path not in paths and file.identity in ours.get(path, ())
    )
    return _Change(
        to_send=stored.missing(uploads),
        to_delete=to_delete,
        left_alone=sorted(set(stored.files) - paths - _HUBS_OWN - set(to_delete)),
    )


def _written_before(repository: ModelRepository, stored: Stored) -> dict[str, tuple[str, ...]]:
    """The files of earlier calls with their hashes; what someone has changed since has another one."""
    if RECORD_PATH not in stored.files:
        return {}
    try:
        return PublishedRecord.model_validate_json(repository.read(RECORD_PATH, stored.commit)).files
    except ValidationError:
        return {}  # of another version, or not ours: then nothing is known to be


def _send(repository: ModelRepository, upload: Upload, announce: Callable[[str], None]) -> None:
    """Send a file of the run; what was made here goes with the commit."""
    if isinstance(upload.content, bytes):
        return
    announce(f"{upload.path}: {byte_size(upload.size)}")
    before = upload.content.stat()
    try:
        repository.send(upload)
    finally:
        # Also where the hub refused it: this is the reason then.
        after = upload.content.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise MedcotError(f"{upload.content} was changed while it was sent: nothing was published. Run it again.")


def _commit(repository: ModelRepository, uploads: Sequence[Upload], message: str, public: bool) -> str:
    """The commit that has everything: made now, or found where the answer to an attempt was lost."""
    waits = iter(hub_files.RETRY_WAITS)
    while True:
        stored = repository.look()
        if stored is None:
            raise MedcotError(f"{repository.name} was deleted meanwhile: run it again.")
        _check_visibility(repository, stored, public)
        change = _change(repository, stored, uploads)
        if change.is_none:
            return stored.commit
        try:
            commit = repository.commit(change.to_send, change.to_delete, stored.commit, message)
            break
        except Doubtful:
            wait = next(waits, None)
            if wait is None:
                raise
            time.sleep(wait)
    made = repository.look(commit)
    missing = [upload.path for upload in uploads] if made is None else [each.path for each in made.missing(uploads)]
    if missing:
        raise MedcotError(f"The hub took the commit, and {missing[0]} is not in it as it was sent: run it again.")
    return commit


def _dry_run(repository: ModelRepository, uploads: list[Upload], public: bool, told: Sequence[str]) -> Publication:
    notes = list(told)
    change, existed = _Change(uploads, [], []), None
    try:
        stored = repository.look()
        if stored is not None:
            existed, change = True, _change(repository, stored, uploads)
            _check_visibility(repository, stored, public)
        repository.check_token()
        existed = existed or False
    except MedcotError as error:
        notes.append(str(error))
    if existed is None:
        notes.append("What is there already is not known.")
    state: FileState = "not known" if existed is None else "to send"
    return _publication(
        repository, uploads, change, state, public=public, existed=existed, dry_run=True, commit=None, notes=notes
    )


def _publication(
    repository: ModelRepository,
    uploads: Sequence[Upload],
    change: _Change,
    state: FileState,
    *,
    public: bool,
    existed: bool | None,
    dry_run: bool,
    commit: str | None,
    notes: Sequence[str] = (),
) -> Publication:
    files = [
        PublishedFile(
            path=upload.path,
            kind=upload.kind,
            size_bytes=upload.size,
            sha256=upload.sha256,
            holds_data=upload.holds_data,
            state=state if upload in change.to_send else "there already",
        )
        for upload in uploads
    ]
    return Publication(
        repository=repository.name,
        url=repository.url,
        visibility="public" if public else "private",
        dry_run=dry_run,
        existed=existed,
        commit=commit,
        files=files,
        total_bytes=sum(upload.size for upload in uploads),
        bytes_to_send=None if existed is None else sum(upload.size for upload in change.to_send),
        deleted=change.to_delete,
        left_alone=change.left_alone,
        notes=list(notes),
    )
