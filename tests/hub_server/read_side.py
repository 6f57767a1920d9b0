"""What the hub answers to those who read: descriptions of repositories, and files or parts of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

from hub_server.exchange import Dropped, Exchange
from hub_server.hashes import PIECE_BYTES, git_hash, is_large, sha256
from hub_server.records import Fault, Repository

_COMMIT = r"(?P<revision>[^/]+)"
_NAME = r"(?P<name>[^/]+/[^/]+)"
_INFO = re.compile(rf"/api/models/{_NAME}(/revision/{_COMMIT})?")
_TREE = re.compile(rf"/api/models/{_NAME}/tree/{_COMMIT}(/.*)?")
_RESOLVE = re.compile(rf"/{_NAME}/resolve/{_COMMIT}/(?P<file>.+)")
_STORAGE = re.compile(rf"/storage/{_NAME}/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class ReadSide(Exchange):
    def do_GET(self) -> None:
        path, query = self.logged_path()
        if match := _STORAGE.fullmatch(path):
            self._send_content(match["name"], match["file"], signed="signature" in parse_qs(query))
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match["name"], match["revision"], match["file"])
        elif match := _TREE.fullmatch(path):
            self._describe(match["name"], match["revision"], tree=True)
        elif match := _INFO.fullmatch(path):
            self._describe(match["name"], match["revision"], tree=False)
        else:
            self.send_refusal(404)

    do_HEAD = do_GET

    def _repository(self, name: str, revision: str | None) -> Repository | None:
        """The repository as the one who asks may see it; else the refusal is already sent."""
        repository = self.hub.repositories.get(name)
        account = self.hub.accounts.get(self.token or "")
        admitted = self.token == self.hub.token or (account is not None and account.owns(name))
        if repository is None or (repository.private and not admitted):
            self.send_refusal(401, "RepoNotFound")
        elif repository.gated and not admitted:
            self.send_refusal(403, "GatedRepo")
        elif revision not in (None, "main", repository.commit):
            self.send_refusal(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _describe(self, name: str, revision: str | None, *, tree: bool) -> None:
        fault = self.hub.take_fault("", 0, api=True)
        if fault.status is not None:
            self.send_refusal(fault.status)
            return
        repository = self._repository(name, revision)
        if repository is None:
            return
        entries = [(file, path, is_large(file)) for file, path in repository.files().items()]
        if tree:
            self.send_json(
                [
                    {"type": "file", "path": file, "size": path.stat().st_size, "oid": git_hash(path)}
                    | ({"lfs": _lfs(path) | {"oid": sha256(path)}} if large else {})
                    for file, path, large in entries
                ]
            )
            return
        siblings = [
            {"rfilename": file, "size": path.stat().st_size, "blobId": git_hash(path)}
            | ({"lfs": _lfs(path)} if large else {})
            for file, path, large in entries
        ]
        self.send_json({"id": name, "sha": repository.commit, "private": repository.private, "siblings": siblings})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        path = repository.files().get(file)
        if path is None:
            self.send_refusal(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if not is_large(file):
            self._send_part(file, path, headers | {"ETag": f'"{git_hash(path)}"'})
            return
        headers |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-Etag": f'"{sha256(path)}"'}
        location = f"{self.hub.storage}/storage/{name}/{file}?signature=valid"
        self.send(302, b"", headers | {"Location": location})

    def _send_content(self, name: str, file: str, *, signed: bool) -> None:
        if not signed:
            self.send_refusal(403)
            return
        path = self.hub.repositories[name].folder / file
        self._send_part(file, path, {"ETag": f'"{sha256(path)}"', "Accept-Ranges": "bytes"})

    def _send_part(self, file: str, path: Path, headers: dict[str, str]) -> None:
        """Answer with the file or the part asked for, as the fault of the moment has it."""
        asked = _RANGE.fullmatch(self.headers.get("Range") or "")
        fault = self.hub.take_fault(file, int(asked[1]) if asked else 0)
        if fault.status is not None:
            self.send_refusal(fault.status)
            return
        size = path.stat().st_size if fault.keep is None else fault.keep
        status, first, last = 200, 0, size
        if asked and not fault.ignore_ranges:
            status, first = 206, int(asked[1])
            last = min(size, int(asked[2]) + 1) if asked[2] else size
            if first >= size:
                self.send(416, b"", headers | {"Content-Range": f"bytes */{size}"})
                return
            headers = headers | {"Content-Range": f"bytes {first}-{last - 1}/{size}"}
        self.send(status, _parts(path, first, last, fault), headers | {"Content-Length": str(last - first)})


def _parts(path: Path, first: int, last: int, fault: Fault) -> Iterator[bytes]:
    """Bytes [first, last) of a file, piece by piece, as the fault has them."""
    end = last if fault.drop_after is None else min(last, first + fault.drop_after)
    with path.open("rb") as stream:
        stream.seek(first)
        for begin in range(first, end, PIECE_BYTES):
            part = bytearray(stream.read(min(PIECE_BYTES, end - begin)))
            if fault.flip is not None and begin <= fault.flip < begin + len(part):
                part[fault.flip - begin] ^= 0xFF
            yield bytes(part)
    if end < last:
        raise Dropped(fault.reset)


def _lfs(path: Path) -> dict[str, object]:
    return {"size": path.stat().st_size, "sha256": sha256(path), "pointerSize": 130}
