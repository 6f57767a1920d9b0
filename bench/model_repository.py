"""A model repository of the Hugging Face Hub as one who writes into it sees it; ``huggingface_hub`` does the requests.

Files go by plain Git LFS, not by Xet. A file that has arrived whole is known by its SHA-256 and never sent again; one
that was cut off begins anew (Xet would keep pieces of it, and speaks to a storage that no test here can stand for).
HF_HUB_DISABLE_XET=0 asks for Xet all the same.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from bench.published_files import Upload
from export import hub_files
from pipeline import __version__
from pipeline.errors import MedcotError

_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_CONFLICTS = (409, 412)
_SECONDS_TO_ANSWER = 300
_TIMEOUT = httpx.Timeout(_SECONDS_TO_ANSWER, connect=20)  # the library's own client waits for ever
Result = TypeVar("Result")


class Doubtful(MedcotError):
    """A commit of which it is not known whether it was made, or that another one came before."""


@dataclass(frozen=True)
class StoredFile:
    """A file there; ``identity`` is the SHA-256 of a large one, the blob's name in git of others."""

    size: int
    identity: str


@dataclass(frozen=True)
class Stored:
    """What the repository holds at ``commit``."""

    commit: str
    private: bool
    files: dict[str, StoredFile]

    def missing(self, uploads: Sequence[Upload]) -> list[Upload]:
        """Those that are not there, or with another content."""
        return [upload for upload in uploads if not self._holds(upload)]

    def _holds(self, upload: Upload) -> bool:
        there = self.files.get(upload.path)
        return there is not None and there.size == upload.size and there.identity in upload.identities


class ModelRepository:
    """``name`` is owner/name; raises MedcotError for one that cannot be. One who is not ``patient`` asks only once."""

    def __init__(self, name: str, *, patient: bool = True) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise MedcotError(f"{name!r:.120} is no name of a repository: {str(error).split(': ')[0]}.") from error
        if "/" not in name:
            raise MedcotError(f"{name!r} names no owner: write OWNER/NAME, with your user name or organization.")
        self.name = name
        self._waits = hub_files.RETRY_WAITS if patient else ()
        self._api = HfApi(library_name="medcot", library_version=__version__)
        self._sent: dict[str, Any] = {}  # the library's operations, by path: what they sent is not asked for again

    @property
    def url(self) -> str:
        return f"{self._api.endpoint}/{self.name}"

    def check_token(self) -> None:
        """Raises MedcotError without a token, and for one that cannot write under this owner's name."""
        from huggingface_hub import get_token

        if get_token() is None:
            raise MedcotError(
                f"There is no token of the hub: set HF_TOKEN to one that may write ({_TOKENS_PAGE}), or run 'hf auth "
                "login'."
            )
        account = self._patiently(self._api.whoami)
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise MedcotError(
                f"The token of {account['name']} may only read: make one with write permission ({_TOKENS_PAGE}) and "
                "set HF_TOKEN to it, or run 'hf auth login'."
            )
        owners = [account["name"], *(each["name"] for each in account.get("orgs", []))]
        owner = self.name.partition("/")[0]
        if owner.lower() not in map(str.lower, owners):
            names = ", ".join(owners)
            raise MedcotError(f"The token cannot write under {owner}: it is for {names}. Name one of those.")

    def look(self, commit: str | None = None) -> Stored | None:
        """What is there now, or was at ``commit``; None for no such repository, or none that the token may see."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        def attempt() -> Any:
            try:
                return self._api.model_info(self.name, revision=commit, files_metadata=True, timeout=_SECONDS_TO_ANSWER)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        info = self._patiently(attempt)
        if info is None:
            return None
        files = {
            each.rfilename: StoredFile(each.size, each.lfs.sha256 if each.lfs else each.blob_id)
            for each in info.siblings or ()
        }
        return Stored(info.sha, bool(info.private), files)

    def read(self, path: str, commit: str) -> bytes:
        """A small file's content."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def attempt() -> bytes:
            url = hf_hub_url(self.name, path, revision=commit, endpoint=self._api.endpoint)
            response = get_session().get(url, headers=build_hf_headers(library_name="medcot"))
            hf_raise_for_status(response)
            return bytes(response.content)

        return self._patiently(attempt)

    def create(self, *, private: bool) -> None:
        self._patiently(lambda: self._api.create_repo(self.name, private=private, exist_ok=True))

    def send(self, upload: Upload) -> None:
        """Put a large file's content into the hub's storage, unless it is there already. No reader sees it yet."""
        operation = _operation(upload)
        with _plain_lfs(), self._explaining():
            # One file a call: the storage's signed addresses live for minutes, and a file may take longer.
            self._api.preupload_lfs_files(self.name, [operation], num_threads=1, free_memory=False)
        self._sent[upload.path] = operation

    def commit(self, uploads: Sequence[Upload], obsolete: Sequence[str], parent: str, message: str) -> str:
        """Make one commit of all of it on top of ``parent``; gives its name. Raises Doubtful where one should look."""
        from huggingface_hub import CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        additions = [self._sent.get(upload.path) or _operation(upload) for upload in uploads]
        operations = [*additions, *map(CommitOperationDelete, obsolete)]
        with _plain_lfs(), self._explaining():
            try:
                made = self._api.create_commit(
                    self.name, operations, commit_message=message, parent_commit=parent, num_threads=1
                )
            except (httpx.TransportError, json.JSONDecodeError) as error:
                raise Doubtful(str(_explained(self.name, error))) from error
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status in _CONFLICTS:
                    raise Doubtful(f"Someone else writes to {self.name} all the time ({status}): try later.") from error
                if status >= 500:
                    raise Doubtful(str(_explained(self.name, error))) from error
                raise
        return str(made.oid)

    def _patiently(self, attempt: Callable[[], Result]) -> Result:
        _end_waiting()
        return hub_files.with_retries(self.name, attempt, waits=self._waits, explained=_explained)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Errors of the hub become sentences; what the library logs of its retries stays out of the user's log."""
        _end_waiting()
        log = logging.getLogger("huggingface_hub")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            yield
        except MedcotError:
            raise
        except Exception as error:
            told = _explained(self.name, error)
            if told is error:
                raise
            raise told from error
        finally:
            log.setLevel(level)


def _end_waiting() -> None:
    """Have the library's client give up a connection that nothing comes through any more."""
    from huggingface_hub.utils import get_session

    get_session().timeout = _TIMEOUT


def _operation(upload: Upload) -> Any:
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(upload.path, upload.content)
    # As the run's manifest has it: not read a second time. The hub refuses content with another hash.
    operation.upload_info.sha256 = bytes.fromhex(upload.sha256)
    return operation


@contextmanager
def _plain_lfs() -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    # The library reads the variable when it is imported, which may have been long ago.
    constants.HF_HUB_DISABLE_XET = before if "HF_HUB_DISABLE_XET" in os.environ else True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _explained(name: str, error: Exception) -> Exception:
    """The error as a sentence for people; one that is no matter of the hub stays what it is."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, httpx.TransportError | HfHubHTTPError | OfflineModeIsEnabled):
        cause = cause.__cause__  # the library wraps what happens to a large file in a RuntimeError
    if isinstance(cause, OfflineModeIsEnabled):
        return MedcotError("Offline mode is on (HF_HUB_OFFLINE): unset it to reach the hub.")
    if isinstance(cause, httpx.TransportError):
        detail = str(cause).strip() or type(cause).__name__
        return MedcotError(f"The hub does not answer ({detail}): the same command goes on with what is still missing.")
    if isinstance(cause, RepositoryNotFoundError):
        return _refused(name, 404, _said(cause))  # which the hub may call 401
    if (
        isinstance(cause, HfHubHTTPError)
        and cause.response.status_code == 403
        and cause.response.request.method == "PUT"  # a piece to the storage, not a request to the hub
    ):
        return MedcotError(
            "The hub's storage does not take the upload any more (403): its signed address may have run out. The same "
            "command begins this file again; HF_HUB_DISABLE_XET=0 keeps pieces of it."
        )
    if isinstance(cause, HfHubHTTPError):
        return _refused(name, cause.response.status_code, _said(cause))
    if isinstance(error, json.JSONDecodeError):
        return MedcotError(
            "The hub's answer cannot be read (trouble of its own, or a login page in between): later the same command "
            "goes on."
        )
    if isinstance(error, ValueError):
        return MedcotError(f"The hub refused what was sent to {name}: {' '.join(str(error).split())}")
    return error


def _said(error: Any) -> str:
    """The hub's own words, on one line and with a full stop."""
    words = " ".join((error.server_message or "").split())
    return f" It says: {words.rstrip('.')}." if words else ""


def _refused(name: str, status: int, said: str) -> MedcotError:
    if status == 401:
        return MedcotError(
            f"The hub does not accept the token (401).{said} Make one with write permission ({_TOKENS_PAGE}) and set "
            "HF_TOKEN to it, or run 'hf auth login'."
        )
    if status in (402, 413, 507) or (status == 403 and ("storage" in said.lower() or "quota" in said.lower())):
        return MedcotError(
            f"The hub has no room for this ({status}).{said} Delete repositories that you do not need, publish fewer "
            "files, or take a larger plan; the same command goes on."
        )
    if status == 403:
        return MedcotError(
            f"The token may not write to {name} (403).{said} Take one with write permission for it ({_TOKENS_PAGE})."
        )
    if status == 404:
        return MedcotError(f"{name} is not there, or the token may not see it (404).{said} Check the name.")
    if status == 429:
        return MedcotError(f"The hub asks for a pause (429).{said} Some minutes later the same command goes on.")
    if status >= 500:
        return MedcotError(f"The hub has trouble of its own ({status}).{said} Later the same command goes on.")
    return MedcotError(f"The hub refuses to write to {name} ({status}).{said}")
