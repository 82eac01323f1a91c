"""moto's server with a memory: ``python -m app.devstack.moto_server --port N --journal FILE``.

moto forgets everything when its process ends, so a store that was killed would come back empty, which no real one
does. Here every changing request goes through one lock, and those that succeeded are appended to a journal; at the
start the journal is run again before the port opens. Each request draws its identifiers (S3's version ids) from a
seed that the journal keeps, so that they too come back the same.
"""

import argparse
import base64
import io
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, cast

from moto.moto_api._internal import mock_random
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import run_simple

Environ = dict[str, Any]


class StartResponse(Protocol):
    """WSGI's second argument."""

    def __call__(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """Begin the response."""
        ...


WsgiApp = Callable[[Environ, StartResponse], Iterable[bytes]]


class Journaled:
    """A WSGI application whose changes survive the process."""

    def __init__(self, app: WsgiApp, journal: Path) -> None:
        self._app = app
        self._journal = journal
        self._lock = threading.Lock()
        self._changes = 0

    def replay(self) -> int:
        """Run the journal; the number of requests in it. A last line that a kill cut short was never answered."""
        if not self._journal.exists():
            return 0
        whole = 0
        with self._journal.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
                self._changes = entry["change"]
                self._call(entry["environ"], base64.b64decode(entry["body"]), lambda *_: lambda _: None)
                whole += len(line)
        with self._journal.open("rb+") as file:
            file.truncate(whole)
        return self._changes

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request; the response of a change leaves after its journal line."""
        body = read_body(environ)
        begun: list[tuple[str, list[tuple[str, str]]]] = []

        def begin(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            begun.append((status, headers))
            return lambda _: None

        with self._lock:
            self._changes += 1
            response = self._call(environ, body, begin)
            status, headers = begun[-1]
            if environ["REQUEST_METHOD"] not in ("GET", "HEAD") and status.startswith("2"):
                self._append(environ, body)
        start_response(status, headers)
        return response

    def _call(self, environ: Environ, body: bytes, begin: StartResponse) -> list[bytes]:
        mock_random.seed(f"change {self._changes}")
        full: Environ = {
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "SCRIPT_NAME": "",
            **environ,
            "wsgi.input": io.BytesIO(body),
            "CONTENT_LENGTH": str(len(body)),
        }
        # The body is whole here, and its length known: moto is not to look for chunks.
        full.pop("HTTP_TRANSFER_ENCODING", None)
        response = self._app(full, begin)
        try:
            return list(response)
        finally:
            if (close := getattr(response, "close", None)) is not None:
                close()

    def _append(self, environ: Environ, body: bytes) -> None:
        # What is text or a table of text belongs to the request; the rest are this process's streams and sockets.
        kept = {name: value for name, value in environ.items() if isinstance(value, (str, dict))}
        entry = {"change": self._changes, "environ": kept, "body": base64.b64encode(body).decode()}
        with self._journal.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")


def read_body(environ: Environ) -> bytes:
    """The request's body: the server's stream ends with the connection, so the length says where to stop."""
    if environ.get("wsgi.input_terminated"):  # chunked: the server stops at the last chunk
        return bytes(environ["wsgi.input"].read())
    return bytes(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))


def main() -> None:
    """Replay, then serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="moto's server with a journal")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # an access log of each call says nothing here
    app = Journaled(cast(WsgiApp, DomainDispatcherApplication(create_backend_app)), arguments.journal)
    app.replay()
    run_simple("127.0.0.1", arguments.port, cast(Any, app), threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main()
