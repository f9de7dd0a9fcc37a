"""The server of ``stackwise watch``: a page about one run for browsers on this machine. It changes nothing."""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
import socketserver
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from stackwise.tracking.live import LiveRun

__all__ = ["WatchServer"]


class WatchServer(ThreadingHTTPServer):
    """Serves ``/`` (the page), ``/report`` (its body) and ``/state.json`` (the figures of this moment)."""

    daemon_threads = True

    def __init__(self, run: LiveRun, host: str, port: int) -> None:
        """Listens once it is made; ``port`` 0 takes a free one. OSError where the address is taken or not ours."""
        self.run, self.host = run, host
        self.nonce = secrets.token_urlsafe(16)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the network for the name of this host
        self.server_name, self.server_port = self.host, int(self.server_address[1])

    def server_close(self) -> None:
        super().server_close()
        self.run.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def answers_to(self, header: str) -> bool:
        """Whether a Host header names this server, and not a foreign name that was made to point here.

        An address in digits cannot have been: a page of another site has a name.
        """
        name = header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header
        name = name.strip("[]").lower()
        if name in ("localhost", self.host.lower()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    server_version, sys_version = "StackWise", ""
    timeout = 30  # seconds for a browser to say what it wants

    def do_GET(self) -> None:
        if not self.server.answers_to(self.headers.get("Host", "")):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "this name is not one of this server\n")
            return
        path = self.path.partition("?")[0]
        try:
            if path == "/":
                self._send(HTTPStatus.OK, "text/html", self.server.run.whole_page(self.server.nonce))
            elif path == "/report":
                version, body = self.server.run.page()
                self._send(HTTPStatus.OK, "text/html", body, {"X-Version": version})
            elif path == "/state.json":
                self._send(HTTPStatus.OK, "application/json", json.dumps(self.server.run.state()))
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is /, /report and /state.json\n")
        except OSError as error:
            if isinstance(error, ConnectionError):
                raise
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error}\n")

    do_HEAD = do_GET

    def _send(self, status: HTTPStatus, kind: str, content: str, more: dict[str, str] | None = None) -> None:
        data = content.encode("utf-8", errors="backslashreplace")
        self.send_response(status)
        policy = (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{self.server.nonce}'; connect-src 'self'; "
            "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        )
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(data)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": policy,
            **(more or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not worth a line."""
