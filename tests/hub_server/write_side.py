"""What the hub answers to those who write: who they are, new repositories, Git LFS, and commits.

After huggingface_hub 1.33 (hf_api.py, _commit_api.py, lfs.py) and the Git LFS batch API:
https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4

import yaml

from hub_server.exchange import Exchange
from hub_server.hashes import git_hash, is_large, sha256
from hub_server.read_side import ReadSide
from hub_server.records import WriteFault, WriteStep

_NAME = r"(?P<name>[^/]+/[^/]+)"
_PIECE_BYTES = 1 << 16
_ROUTES: tuple[tuple[re.Pattern[str], WriteStep], ...] = (
    (re.compile("/api/repos/create"), "create"),
    (re.compile("/api/validate-yaml"), "validate"),
    (re.compile(rf"/api/models/{_NAME}/preupload/main"), "preupload"),
    (re.compile(rf"/{_NAME}\.git/info/lfs/objects/batch"), "batch"),
    (re.compile(rf"/{_NAME}\.git/info/lfs/complete/(?P<oid>\w+)"), "complete"),
    (re.compile(rf"/{_NAME}\.git/info/lfs/verify"), "verify"),
    (re.compile(rf"/api/models/{_NAME}/commit/main"), "commit"),
)
_PART = re.compile(r"/storage-upload/(?P<oid>\w+)")


class _Refused(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class WriteSide(ReadSide, Exchange):
    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self.logged_path()
            self._step("whoami", self._whoami)
        else:
            super().do_GET()

    def do_POST(self) -> None:
        path, query = self.logged_path()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for pattern, step in _ROUTES:
            if match := pattern.fullmatch(path):
                groups = match.groupdict()
                handle = getattr(self, f"_{step}")
                values = [json.loads(line) for line in body.splitlines()] if step == "commit" else json.loads(body)
                arguments = [*groups.values(), *([parse_qs(query)] if step == "complete" else []), values]
                self._step(step, handle, *arguments)
                return
        self.send_refusal(404)

    def do_PUT(self) -> None:
        path, query = self.logged_path()
        match = _PART.fullmatch(path)
        parameters = parse_qs(query)
        if match is None or "signature" not in parameters:
            self.send_refusal(403)
            return
        oid, upload, part = match["oid"], parameters["upload"][0], int(parameters["part"][0])
        fault = self.hub.take_write_fault("part")
        if fault.before is not None:
            fault.before()
        content = self._read_content(oid, fault)
        if content is None:
            self.hang_up(reset=True)
        elif fault.status is not None:
            self._refuse(fault)
        else:
            self.hub.parts.setdefault(upload, {})[part] = content
            if part == 0 and not self._store(upload, oid):
                self.send_json({"error": "The content has another hash."}, 400)
                return
            self.send(200, b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def _read_content(self, oid: str, fault: WriteFault) -> bytes | None:
        """What comes, piece by piece; None where it ends too early, or is to."""
        content, wanted = bytearray(), int(self.headers["Content-Length"])
        until = wanted if fault.drop_after is None else min(fault.drop_after, wanted)
        while len(content) < until:
            try:
                piece = self.rfile.read(min(_PIECE_BYTES, until - len(content)))
            except ConnectionError:
                piece = b""
            if not piece:
                return None
            content += piece
            with self.hub.lock:
                self.hub.received[oid] += len(piece)
        if until < wanted:
            if fault.then is not None:
                fault.then()
            return None
        return bytes(content)

    def _store(self, upload: str, oid: str) -> bool:
        """Whether the parts that have come are the file; then it is in the storage."""
        parts = self.hub.parts.pop(upload)
        content = b"".join(parts[number] for number in sorted(parts))
        if hashlib.sha256(content).hexdigest() != oid:
            return False
        path = self.hub.stored(oid)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return True

    def _step(self, step: WriteStep, handle: Callable[..., Any], *arguments: Any) -> None:
        fault = self.hub.take_write_fault(step)
        if fault.before is not None:
            fault.before()
        if fault.status is not None:
            self._refuse(fault)
            return
        try:
            answer = handle(*arguments)
        except _Refused as refused:
            self.send_json({"error": str(refused)}, refused.status, refused.headers)
            return
        if fault.lost:
            self.hang_up(reset=True)
        else:
            self.send_json(answer)

    def _refuse(self, fault: WriteFault) -> None:
        wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        self.send_json({"error": fault.message} if fault.message else {}, fault.status or 500, wait)

    def _may_write(self, name: str) -> None:
        account = self.hub.accounts.get(self.token or "")
        if account is None or not account.owns(name) or account.role == "read" or not account.writes:
            raise _Refused(403, "You don't have the required permissions to write here")
        if name not in self.hub.repositories:
            raise _Refused(404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})

    def _whoami(self) -> Any:
        account = self.hub.accounts.get(self.token or "")
        if account is None:
            raise _Refused(401, "", **{"X-Error-Message": "Invalid credentials in Authorization header"})
        return {
            "type": "user",
            "name": account.name,
            "orgs": [{"name": name} for name in account.organizations],
            "auth": {"type": "access_token", "accessToken": {"displayName": "tests", "role": account.role}},
        }

    def _create(self, asked: dict[str, Any]) -> Any:
        name = f"{asked['organization']}/{asked['name']}"
        account = self.hub.accounts.get(self.token or "")
        if account is None or not account.owns(name) or account.role == "read" or not account.writes:
            raise _Refused(403, "You don't have the rights to create a model under this namespace")
        if name in self.hub.repositories:
            raise _Refused(409, "You already created this model repo")
        self.hub.create(name, private=asked.get("visibility") == "private")
        return {"url": f"{self.hub.endpoint}/{name}", "name": name}

    def _validate(self, asked: dict[str, Any]) -> Any:
        _, _, rest = asked["content"].partition("---\n")
        front_matter, found, _ = rest.partition("\n---\n")
        if not found or not isinstance(yaml.safe_load(front_matter), dict):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        return {"errors": [], "warnings": []}

    def _preupload(self, name: str, asked: dict[str, Any]) -> Any:
        self._may_write(name)
        there = self.hub.repositories[name].files()
        return {"files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _oid(there.get(file["path"])),
            }
            for file in asked["files"]
        ]}  # fmt: skip

    def _batch(self, name: str, asked: dict[str, Any]) -> Any:
        self._may_write(name)
        return {"transfer": "multipart", "objects": [
            each if self.hub.stored(each["oid"]).is_file() else each | {"actions": self._actions(name, **each)}
            for each in asked["objects"]
        ]}  # fmt: skip

    def _actions(self, name: str, oid: str, size: int) -> Any:
        upload = uuid4().hex
        address = f"{self.hub.storage}/storage-upload/{oid}?signature=valid&upload={upload}&part="
        git = f"{self.hub.endpoint}/{name}.git/info/lfs"
        verify = {"href": f"{git}/verify"}
        if size <= self.hub.part_bytes:
            return {"upload": {"href": f"{address}0"}, "verify": verify}
        numbers = range(1, -(-size // self.hub.part_bytes) + 1)
        header = {
            "chunk_size": str(self.hub.part_bytes),
            **{f"{number:05}": f"{address}{number}" for number in numbers},
        }
        return {"upload": {"href": f"{git}/complete/{oid}?upload={upload}", "header": header}, "verify": verify}

    def _complete(self, name: str, oid: str, query: dict[str, list[str]], asked: dict[str, Any]) -> Any:
        upload = query["upload"][0]
        parts = self.hub.parts.get(upload, {})
        told = [(part["partNumber"], part["etag"].strip('"')) for part in asked["parts"]]
        if told != [(number, hashlib.md5(parts[number]).hexdigest()) for number in sorted(parts)]:
            raise _Refused(400, "The parts are not those that came.")
        if not self._store(upload, oid):
            raise _Refused(400, "The content has another hash.")
        return {}

    def _verify(self, name: str, asked: dict[str, Any]) -> Any:
        self._may_write(name)
        path = self.hub.stored(asked["oid"])
        if not path.is_file() or path.stat().st_size != asked["size"]:
            raise _Refused(404, "There is no such content.")
        return {}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> Any:
        self._may_write(name)
        header, *changes = lines
        with self.hub.lock:
            parent = header["value"].get("parentCommit")
            if parent not in (None, self.hub.repositories[name].commit):
                raise _Refused(412, "A commit has happened since. Please refresh and try again.")
            files: dict[str, bytes | Path] = {}
            deleted = []
            for change in changes:
                path = change["value"]["path"]
                if change["key"] == "file":
                    files[path] = base64.b64decode(change["value"]["content"])
                elif change["key"] == "lfsFile":
                    files[path] = self.hub.stored(change["value"]["oid"])
                    if not self.hub.stored(change["value"]["oid"]).is_file():
                        raise _Refused(400, f"The content of {path} has not come.")
                elif change["key"] == "deletedFile":
                    deleted.append(path)
            self.hub.change(name, header["value"]["summary"], files, tuple(deleted))
            commit = self.hub.repositories[name].commit
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}"}


def _oid(path: Path | None) -> str | None:
    if path is None:
        return None
    return sha256(path) if is_large(path.name) else git_hash(path)
