"""The server itself: its repositories, its storage, its log and the faults that are due."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_server.hashes import commit_of
from hub_server.read_side import ReadSide
from hub_server.records import Account, Commit, Fault, Repository, Request, WriteFault, WriteStep
from hub_server.write_side import WriteSide


@dataclass
class HubServer:
    """``token`` opens private and gated repositories. ``requests`` is the log of what was asked.

    With ``root``, a folder, and ``accounts`` by their tokens it can be written to: ``commits`` are those made,
    ``received`` counts the bytes of each large file's content by its SHA-256, also of uploads that broke. A file of
    more than ``part_bytes`` comes in parts.
    """

    token: str = "hf_let_me_in"
    root: Path | None = None
    accounts: dict[str, Account] = field(default_factory=dict)
    part_bytes: int = 1 << 20
    requests: list[Request] = field(default_factory=list)
    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    write_faults: list[WriteFault] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    received: Counter[str] = field(default_factory=Counter)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __enter__(self) -> HubServer:
        hub_server = self

        class Handler(WriteSide, ReadSide):
            hub = hub_server

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
        self.repositories[name] = Repository(folder, commit_of(folder), private, gated)
        return self.repositories[name].commit

    def create(self, name: str, *, private: bool) -> None:
        """A new repository, with the file that the hub puts into it."""
        assert self.root is not None
        folder = self.root / name
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.gguf filter=lfs diff=lfs merge=lfs -text\n")
        self.add(name, folder, private=private)

    def change(self, name: str, summary: str, files: dict[str, bytes | Path], deleted: tuple[str, ...] = ()) -> None:
        """A commit: all of it is there, or nothing of it."""
        with self.lock:
            repository = self.repositories[name]
            for path, content in files.items():
                target = repository.folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, target)
                else:
                    target.write_bytes(content)
            for path in deleted:
                (repository.folder / path).unlink()
            self.add(name, repository.folder, private=repository.private, gated=repository.gated)
            self.commits.append(Commit(name, summary, frozenset(self.repositories[name].files())))

    def stored(self, oid: str) -> Path:
        """Where the content of a large file lies once it has come whole."""
        assert self.root is not None
        return self.root / ".storage" / oid

    def misbehave(self, *faults: Fault) -> None:
        self.faults.extend(faults)

    def misbehave_in_writing(self, *faults: WriteFault) -> None:
        self.write_faults.extend(faults)

    def behave(self) -> None:
        self.faults.clear()
        self.write_faults.clear()

    def content_requests(self, file: str) -> list[Request]:
        """Requests for the bytes of a large file, in order."""
        return [request for request in self.requests if request.path.startswith("/storage/") and file in request.path]

    def take_fault(self, file: str, first_byte: int, *, api: bool = False) -> Fault:
        """The fault that is due now, used up once; one without any fault when all is well."""
        with self.lock:
            for fault in self.faults:
                due = fault.times is None or fault.times > 0
                if due and fault.api == api and file.endswith(fault.file) and first_byte >= fault.from_byte:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return Fault()

    def take_write_fault(self, step: WriteStep) -> WriteFault:
        with self.lock:
            for fault in self.write_faults:
                if fault.step == step and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return WriteFault(step)
