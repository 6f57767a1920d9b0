"""As much of W&B's server as its client needs to record a run: what arrives is kept, and can be resumed."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """``history``: a list of rows for each run id; ``exit_codes``: how each session of a run ended."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.config: dict[str, dict[str, Any]] = {}
        self.exit_codes: dict[str, list[int]] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client drops its connections when it is done."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def query(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to one GraphQL operation of the client."""
        project = {"id": "project", "name": "medcot", "entity": {"id": "entity", "name": "someone"}}
        if operation == "UpsertBucket":
            run_id = variables["name"]
            self.history.setdefault(run_id, [])
            if variables["config"]:
                self.config[run_id] = json.loads(variables["config"])
            run = {"id": run_id, "name": run_id, "displayName": run_id, "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": run | {"historyLineCount": 0}, "inserted": True}}
        if operation == "RunResumeStatus" and variables["name"] in self.history:
            return {"model": project | {"bucket": self._resumable(variables["name"])}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def _resumable(self, run_id: str) -> dict[str, Any]:
        rows = self.history[run_id]
        return {
            "id": run_id,
            "name": run_id,
            "displayName": run_id,
            "summaryMetrics": json.dumps(rows[-1]),
            "historyLineCount": len(rows),
            "historyTail": json.dumps([json.dumps(rows[-1])]),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "config": json.dumps(self.config[run_id]),
            "tags": [],
            "notes": "",
            "wandbConfig": "{}",
        }

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        """What the client sends of a run while it lasts."""
        chunk = (body.get("files") or {}).get("wandb-history.jsonl")
        if chunk is not None:
            rows = self.history[run_id]
            rows[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
        if body.get("complete"):
            self.exit_codes.setdefault(run_id, []).append(body["exitcode"])


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            request = json.loads(body)
            self._answer({"data": self.server.query(request["operationName"], request["variables"])})
            return
        if self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        self._answer({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        return gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body

    def _answer(self, value: dict[str, Any]) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
