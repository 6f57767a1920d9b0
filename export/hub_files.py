"""Files of a hub repository at one commit: byte ranges of them, and whole ones however often the connection breaks.

``huggingface_hub`` gives the endpoint, token, HTTP session and errors. Its own download is not used for shards: it
gives up when a connection is reset, and deletes what has come (``http_get`` and ``_download_to_tmp_and_move`` in
file_download.py, 1.33). A shard has gigabytes, so here a file goes on where it ended, in the same run or the next.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import httpx

from pipeline.errors import MedcotError

# Seconds before each new attempt that has brought nothing; a download that grew starts over with the first.
RETRY_WAITS: tuple[float, ...] = (1, 2, 4, 8, 8)
_PASSING_STATUSES = (408, 429, 500, 502, 503, 504)
# Bytes done and in all, of the file named.
DownloadProgress = Callable[[str, int, int], None]
Explain = Callable[[str, Exception], Exception]
Result = TypeVar("Result")


class HubUnreachable(MedcotError):
    """No answer from the hub: no network, or offline mode."""


@dataclass(frozen=True)
class HubFile:
    """One file at a fixed commit. ``title`` is ``owner/name/file``; ``sha256`` is None for small files in git."""

    title: str
    url: str
    size: int
    sha256: str | None
    headers: Mapping[str, str] = field(repr=False)

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of the file."""

        def attempt() -> bytes:
            content = bytearray()
            with self._response(begin, end) as response:
                if begin and not _is_range_from(response, begin):
                    raise MedcotError(
                        f"{self.title}: the server does not serve parts of files, which reading a base from the hub "
                        "needs. Download the model and give its folder."
                    )
                for chunk in response.iter_raw():
                    content += chunk
                    if len(content) >= end - begin:
                        break
            if len(content) < end - begin:
                raise httpx.RemoteProtocolError(f"the connection ended after {len(content)} of {end - begin} bytes")
            return bytes(content[: end - begin])

        return with_retries(self.title, attempt)

    def download(self, path: Path, progress: DownloadProgress | None = None) -> None:
        """Fetch the file to ``path``, going on with ``<path>.partial``; size and sha256 are checked before it appears.

        Raises MedcotError when the hub stays away, the disk is full, or the file arrives damaged twice.
        """
        partial_path = path.with_name(f"{path.name}.partial")
        try:
            for _ in range(2):
                self._check_room(partial_path)
                with partial_path.open("a+b") as stream:
                    partial = _PartialFile(stream, self.size)
                    self._complete(partial, progress or (lambda title, done, size: None))
                found = partial.digest.hexdigest()
                if self.sha256 in (None, found):
                    partial_path.rename(path)
                    return
                # What an earlier run left may have been damaged: once more, from the start.
                partial_path.unlink()
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
            raise MedcotError(f"{self.title} cannot be stored in {path.parent}: {reason}.") from error
        raise MedcotError(
            f"{self.title} arrived damaged twice: its sha256 is {found}, the hub announces {self.sha256}. "
            "Try again later, or over another connection."
        )

    def _complete(self, partial: _PartialFile, progress: DownloadProgress) -> None:
        failures, furthest = 0, partial.size
        while partial.size < self.size:
            try:
                self._continue(partial, progress)
            except Exception as error:
                failures = 0 if partial.size > furthest else failures + 1
                furthest = max(furthest, partial.size)
                if not _may_pass(error) or failures > len(RETRY_WAITS):
                    raise _explained(self.title, error) from error
                time.sleep(RETRY_WAITS[max(0, failures - 1)])

    def _continue(self, partial: _PartialFile, progress: DownloadProgress) -> None:
        with self._response(partial.size, self.size) as response:
            if partial.size and not _is_range_from(response, partial.size):
                partial.restart()
            for chunk in response.iter_raw():
                if partial.size + len(chunk) > self.size:
                    raise MedcotError(f"{self.title} is longer than the {self.size} bytes that the hub announces.")
                partial.append(chunk)
                progress(self.title, partial.size, self.size)
        if partial.size < self.size:
            raise httpx.RemoteProtocolError(f"the connection ended after {partial.size} of {self.size} bytes")

    @contextmanager
    def _response(self, begin: int, end: int) -> Iterator[httpx.Response]:
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import get_session, hf_raise_for_status

        # Each attempt asks the hub anew: the storage address that it redirects to is signed for a limited time.
        headers = {**self.headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", self.url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            yield response

    def _check_room(self, partial: Path) -> None:
        missing = self.size - (partial.stat().st_size if partial.exists() else 0)
        free = shutil.disk_usage(partial.parent).free
        if free < missing:
            raise MedcotError(
                f"{partial.parent} has {free / 1e9:.2f} GB free and {self.title} needs {missing / 1e9:.2f} GB: "
                f"free {(missing - free) / 1e9:.2f} GB, or set MEDCOT_CACHE to a folder on another disk."
            )


class _PartialFile:
    """What has come of a file so far, and the hash of it."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.size = 0
        stream.seek(0)
        while chunk := stream.read(1 << 20):
            self.digest.update(chunk)
            self.size += len(chunk)
        if self.size > limit:
            self.restart()

    def append(self, chunk: bytes) -> None:
        self._stream.write(chunk)
        self.digest.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self._stream.truncate(0)
        self.digest = hashlib.sha256()
        self.size = 0


class HubRepository:
    """The files of a model repository at the commit that ``revision`` names now.

    Raises HubUnreachable without an answer, MedcotError where the repository is absent, private or gated.
    """

    def __init__(self, name: str, revision: str | None = None, *, endpoint: str | None = None) -> None:
        from huggingface_hub import HfApi, hf_hub_url

        api = HfApi(endpoint=endpoint)
        info = with_retries(name, lambda: api.model_info(name, revision=revision, files_metadata=True))
        self.name = name
        self.commit: str = info.sha
        self.files: dict[str, HubFile] = {}
        headers = _request_headers()
        for sibling in info.siblings or ():
            if sibling.size is None:
                raise MedcotError(f"{name}: the hub does not tell the size of {sibling.rfilename}.")
            self.files[sibling.rfilename] = HubFile(
                f"{name}/{sibling.rfilename}",
                hf_hub_url(name, sibling.rfilename, revision=self.commit, endpoint=endpoint),
                sibling.size,
                sibling.lfs.sha256 if sibling.lfs else None,
                headers,
            )


def with_retries(
    title: str,
    attempt: Callable[[], Result],
    *,
    waits: Sequence[float] | None = None,
    explained: Explain | None = None,
) -> Result:
    """What ``attempt`` returns, tried again after failures that pass; MedcotError says why it stays impossible.

    ``waits`` are the seconds between attempts [default: RETRY_WAITS]; ``explained`` makes the sentence, of ``title``
    and the error [default: as for what is fetched].
    """
    remaining = iter(RETRY_WAITS if waits is None else waits)
    while True:
        try:
            return attempt()
        except Exception as error:
            wait = next(remaining, None) if _may_pass(error) else None
            if wait is None:
                raise (explained or _explained)(title, error) from error
            time.sleep(wait)


def _request_headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    headers: dict[str, str] = build_hf_headers(library_name="medcot")
    return headers


def _is_range_from(response: httpx.Response, begin: int) -> bool:
    """Whether a part came, from the right byte on; a server that serves no parts answers 200 with the whole file."""
    if response.status_code != httpx.codes.PARTIAL_CONTENT:
        return False
    found = response.headers.get("Content-Range", "")
    if not found.startswith(f"bytes {begin}-"):
        raise MedcotError(f"{response.url.host} answered with another part of the file ({found}) than bytes {begin}-.")
    return True


def _may_pass(error: Exception) -> bool:
    if isinstance(error, httpx.TransportError):
        return True
    response = getattr(error, "response", None)
    return response is not None and response.status_code in _PASSING_STATUSES


def _explained(title: str, error: Exception) -> Exception:
    """The error as a sentence for people; one that is no matter of the hub stays what it is."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachable(f"{title} cannot be fetched: offline mode is on (HF_HUB_OFFLINE). Unset it to download.")
    if isinstance(error, httpx.TransportError):
        detail = str(error).strip() or type(error).__name__
        return HubUnreachable(f"{title} cannot be fetched, the hub does not answer ({detail}). Run it again to go on.")
    if isinstance(error, GatedRepoError):
        return MedcotError(f"{title} is gated: accept its terms on the hub's page, then log in with 'hf auth login'.")
    if isinstance(error, RepositoryNotFoundError):
        return MedcotError(
            f"{title} is not on the hub, or is private: check the name; for a private one log in with 'hf auth login'."
        )
    if isinstance(error, RevisionNotFoundError):
        return MedcotError(f"{title} has no such revision on the hub: name a branch, a tag or a commit of it.")
    if isinstance(error, RemoteEntryNotFoundError):
        return MedcotError(f"{title} is not on the hub (404), although its repository lists it: try again later.")
    if isinstance(error, HFValidationError):
        return MedcotError(f"'{title}' is no hub id: name it as owner/name.")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        advice = {401: " Log in with 'hf auth login'.", 403: " The token may not read it."}.get(status, "")
        return MedcotError(f"{title} cannot be fetched: the hub answers with status {status}.{advice}")
    return error
