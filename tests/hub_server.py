"""A small model hub on this machine: real HTTP, local folders as repositories, and failures on demand.

Speaks what huggingface_hub 1.33 asks for when it reads: model info (with sizes and LFS hashes), the tree listing, and
``resolve`` with its headers. Large files are redirected, as on the real hub, to a storage host with signed addresses;
here that is the same server under its other name (``localhost`` instead of ``127.0.0.1``), so that a token sent
there would show in ``requests``.

    with HubServer() as hub:
        hub.add("owner/name", folder)
        hub.misbehave(Fault("model.safetensors", drop_after=1000, times=2))
        ... HF_ENDPOINT=hub.endpoint ...
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf")
_PIECE_BYTES = 1 << 20
_COMMIT = r"(?P<revision>[^/]+)"
_NAME = r"(?P<name>[^/]+/[^/]+)"
_INFO = re.compile(rf"/api/models/{_NAME}(/revision/{_COMMIT})?")
_TREE = re.compile(rf"/api/models/{_NAME}/tree/{_COMMIT}(/.*)?")
_RESOLVE = re.compile(rf"/{_NAME}/resolve/{_COMMIT}/(?P<file>.+)")
_STORAGE = re.compile(rf"/storage/{_NAME}/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Fault:
    """How requests for the content of files whose name ends with ``file`` go wrong, ``times`` times (None: always).

    ``drop_after``: the connection breaks after so many bytes, by a reset where ``reset``, else by a plain end.
    ``status``: the answer is that error. ``api``: a request for the repository's description fails instead.
    ``ignore_ranges``: the whole file comes, whatever part is asked for. ``keep``: the server has only the first so
    many bytes. ``flip``: the byte at this place of the file is wrong. ``from_byte``: only requests from there on fail.
    """

    file: str = ""
    times: int | None = None
    drop_after: int | None = None
    reset: bool = False
    status: int | None = None
    api: bool = False
    ignore_ranges: bool = False
    keep: int | None = None
    flip: int | None = None
    from_byte: int = 0


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    host: str
    byte_range: str | None
    token: str | None


@dataclass(frozen=True)
class Repository:
    folder: Path
    commit: str
    private: bool
    gated: bool

    def files(self) -> dict[str, Path]:
        return {
            path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*")) if path.is_file()
        }


@dataclass
class HubServer:
    """The server; ``token`` opens private and gated repositories. ``requests`` is the log of what was asked."""

    token: str = "hf_let_me_in"
    requests: list[Request] = field(default_factory=list)
    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_HubHandler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self._server.server_port}"

    def add(self, name: str, folder: Path, *, private: bool = False, gated: bool = False) -> str:
        """Serve a folder as ``owner/name``; returns its commit. Add it again after a change of its files."""
        digest = hashlib.sha1()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder).as_posix()} {_git_hash(path)}\n".encode())
        self.repositories[name] = Repository(folder, digest.hexdigest(), private, gated)
        return digest.hexdigest()

    def misbehave(self, *faults: Fault) -> None:
        self.faults.extend(faults)

    def behave(self) -> None:
        self.faults.clear()

    def content_requests(self, file: str) -> list[Request]:
        """Requests for the bytes of a large file, in order."""
        return [request for request in self.requests if request.path.startswith("/storage/") and file in request.path]

    def take_fault(self, file: str, first_byte: int, *, api: bool = False) -> Fault:
        """The fault that is due now, used up once; one without any fault when all is well."""
        with self._lock:
            for fault in self.faults:
                due = fault.times is None or fault.times > 0
                if due and fault.api == api and file.endswith(fault.file) and first_byte >= fault.from_byte:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return Fault()


class _Dropped(Exception):
    """The connection is to break here."""

    def __init__(self, reset: bool) -> None:
        self.reset = reset


class _HubHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.hub.requests.append(
            Request(
                self.command,
                path,
                self.headers.get("Host", "").partition(":")[0],
                self.headers.get("Range"),
                (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None,
            )
        )
        if match := _STORAGE.fullmatch(path):
            self._send_content(match["name"], match["file"], signed="signature" in parse_qs(address.query))
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match["name"], match["revision"], match["file"])
        elif match := _TREE.fullmatch(path):
            self._describe(match["name"], match["revision"], tree=True)
        elif match := _INFO.fullmatch(path):
            self._describe(match["name"], match["revision"], tree=False)
        else:
            self._send_error(404)

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the tests' output; ``requests`` is the log."""

    def _repository(self, name: str, revision: str | None) -> Repository | None:
        """The repository as the one who asks may see it; else the refusal is already sent."""
        repository = self.hub.repositories.get(name)
        admitted = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repository is None or (repository.private and not admitted):
            self._send_error(401, "RepoNotFound")
        elif repository.gated and not admitted:
            self._send_error(403, "GatedRepo")
        elif revision not in (None, "main", repository.commit):
            self._send_error(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _describe(self, name: str, revision: str | None, *, tree: bool) -> None:
        fault = self.hub.take_fault("", 0, api=True)
        if fault.status is not None:
            self._send_error(fault.status)
            return
        repository = self._repository(name, revision)
        if repository is None:
            return
        entries = [(file, path, _is_large(file)) for file, path in repository.files().items()]
        if tree:
            self._send_json(
                [
                    {"type": "file", "path": file, "size": path.stat().st_size, "oid": _git_hash(path)}
                    | ({"lfs": _lfs(path) | {"oid": _sha256(path)}} if large else {})
                    for file, path, large in entries
                ]
            )
            return
        siblings = [
            {"rfilename": file, "size": path.stat().st_size, "blobId": _git_hash(path)}
            | ({"lfs": _lfs(path)} if large else {})
            for file, path, large in entries
        ]
        self._send_json({"id": name, "sha": repository.commit, "private": repository.private, "siblings": siblings})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        path = repository.files().get(file)
        if path is None:
            self._send_error(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if not _is_large(file):
            self._send_part(file, path, headers | {"ETag": f'"{_git_hash(path)}"'})
            return
        headers |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-Etag": f'"{_sha256(path)}"'}
        location = f"{self.hub.storage}/storage/{name}/{file}?signature=valid"
        self._send(302, b"", headers | {"Location": location})

    def _send_content(self, name: str, file: str, *, signed: bool) -> None:
        if not signed:
            self._send_error(403)
            return
        path = self.hub.repositories[name].folder / file
        self._send_part(file, path, {"ETag": f'"{_sha256(path)}"', "Accept-Ranges": "bytes"})

    def _send_part(self, file: str, path: Path, headers: dict[str, str]) -> None:
        """Answer with the file or the part asked for, as the fault of the moment has it."""
        asked = _RANGE.fullmatch(self.headers.get("Range") or "")
        fault = self.hub.take_fault(file, int(asked[1]) if asked else 0)
        if fault.status is not None:
            self._send_error(fault.status)
            return
        size = path.stat().st_size if fault.keep is None else fault.keep
        status, first, last = 200, 0, size
        if asked and not fault.ignore_ranges:
            status, first = 206, int(asked[1])
            last = min(size, int(asked[2]) + 1) if asked[2] else size
            if first >= size:
                self._send(416, b"", headers | {"Content-Range": f"bytes */{size}"})
                return
            headers = headers | {"Content-Range": f"bytes {first}-{last - 1}/{size}"}
        self._send(status, _parts(path, first, last, fault), headers | {"Content-Length": str(last - first)})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_error(self, status: int, code: str | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes | Iterator[bytes], headers: dict[str, str]) -> None:
        """Answer; a body that ends before its Content-Length is a connection that breaks."""
        if isinstance(body, bytes):
            headers = headers | {"Content-Length": str(len(body))}
            body = iter([body])
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for part in body:
                self.wfile.write(part)
        except _Dropped as dropped:
            self._hang_up(reset=dropped.reset)
        except (BrokenPipeError, ConnectionResetError):
            # A client that has read enough hangs up: that is its right.
            self.close_connection = True

    def _hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # Closing with a linger time of zero sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _is_large(file: str) -> bool:
    return file.endswith(LARGE_SUFFIXES)


def _parts(path: Path, first: int, last: int, fault: Fault) -> Iterator[bytes]:
    """Bytes [first, last) of a file, piece by piece, as the fault has them."""
    end = last if fault.drop_after is None else min(last, first + fault.drop_after)
    with path.open("rb") as stream:
        stream.seek(first)
        for begin in range(first, end, _PIECE_BYTES):
            part = bytearray(stream.read(min(_PIECE_BYTES, end - begin)))
            if fault.flip is not None and begin <= fault.flip < begin + len(part):
                part[fault.flip - begin] ^= 0xFF
            yield bytes(part)
    if end < last:
        raise _Dropped(fault.reset)


def _sha256(path: Path) -> str:
    return _file_hash(path, path.stat().st_mtime_ns, "sha256", b"")


def _git_hash(path: Path) -> str:
    return _file_hash(path, path.stat().st_mtime_ns, "sha1", b"blob %d\0" % path.stat().st_size)


@cache
def _file_hash(path: Path, changed: int, algorithm: str, prefix: bytes) -> str:
    digest = hashlib.new(algorithm, prefix)
    with path.open("rb") as stream:
        while part := stream.read(_PIECE_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _lfs(path: Path) -> dict[str, object]:
    return {"size": path.stat().st_size, "sha256": _sha256(path), "pointerSize": 130}
