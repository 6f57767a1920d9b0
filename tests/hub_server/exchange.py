"""Requests and answers over HTTP, and how a connection breaks."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from hub_server.records import Request

if TYPE_CHECKING:
    from hub_server.hub import HubServer


class Dropped(Exception):
    """The connection is to break here."""

    def __init__(self, reset: bool) -> None:
        self.reset = reset


class Exchange(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait 40 ms for an acknowledgement

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the tests' output; ``requests`` is the log."""

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def logged_path(self) -> tuple[str, str]:
        """Path and query of the request, which is in the log now."""
        address = urlsplit(self.path)
        path = unquote(address.path)
        host = self.headers.get("Host", "").partition(":")[0]
        self.hub.requests.append(Request(self.command, path, host, self.headers.get("Range"), self.token))
        return path, address.query

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send_refusal(self, status: int, code: str | None = None) -> None:
        self.send(status, b"", {"X-Error-Code": code} if code else {})

    def send(self, status: int, body: bytes | Iterator[bytes], headers: dict[str, str]) -> None:
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
        except Dropped as dropped:
            self.hang_up(reset=dropped.reset)
        except (BrokenPipeError, ConnectionResetError):
            # A client that has read enough hangs up: that is its right.
            self.close_connection = True

    def hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # Closing with a linger time of zero sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
