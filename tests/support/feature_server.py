"""A feature server on a real socket that speaks Feast's format over rows in memory; and Feast's own, where it is.

Feast is not among the project's dependencies. It is found where it is importable, or where the environment's
``BROKER_TEST_FEAST_PYTHON`` names a Python that has it.
"""

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson
from aiohttp import web

from tests.support.model_server import ModelServer, respond, serving

DATA: Final = Path(__file__).resolve().parent.parent / "data"
EXCHANGES: Final[Mapping[str, Any]] = orjson.loads((DATA / "feast_exchanges.json").read_bytes())
NO_FEAST: Final = "feast is not importable here; set BROKER_TEST_FEAST_PYTHON to a Python that has it"
_EPOCH: Final = "1970-01-01T00:00:00Z"
_STARTED_WITHIN_S: Final = 60.0


@dataclass(slots=True)
class FeatureServer:
    """Rows by entity's key and feature: value and event time. ``broken``: an answer in place of every other."""

    served: ModelServer
    rows: dict[tuple[Any, str], tuple[Any, int]] = field(default_factory=dict)
    broken: web.Response | None = None
    delay_s: float = 0.0

    @property
    def url(self) -> str:
        """Its address."""
        return self.served.url

    @property
    def asked(self) -> list[list[str]]:
        """The features of each request so far."""
        return [call.body["features"] for call in self.served.calls]

    def put(self, view: str, key: Any, time_ms: int, **values: Any) -> None:
        """Store a row."""
        self.rows |= {(key, f"{view}:{name}"): (value, time_ms) for name, value in values.items()}

    async def answer(self, _: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        """What Feast's own server answers: the key's column first, a value that there is not as a null at the epoch."""
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.broken is not None:
            return web.Response(status=self.broken.status, body=self.broken.body, content_type="application/json")
        assert body["full_feature_names"] is True
        ((entity, (key,)),) = body["entities"].items()
        return respond(orjson.loads(self.table(key, body["features"], entity)))

    def table(self, key: Any, features: list[str], entity: str = "applicant_id") -> bytes:
        """The body of a sound answer."""
        names, results = [entity], [_column(key, _EPOCH)]
        for feature in features:
            names.append(feature.replace(":", "__"))
            value, time_ms = self.rows.get((key, feature), (None, 0))
            results.append(
                _column(value, datetime.fromtimestamp(time_ms / 1000, UTC).isoformat().replace("+00:00", "Z"))
            )
        return orjson.dumps({"results": results, "metadata": {"feature_names": names}})


def _column(value: Any, time: str) -> dict[str, Any]:
    return {"values": [value], "statuses": ["PRESENT"], "event_timestamps": [time]}


@asynccontextmanager
async def feature_server() -> AsyncIterator[FeatureServer]:
    """A server without rows."""

    async def answer(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        return await made.answer(request, body)

    async with serving(answer) as served:
        made = FeatureServer(served)
        yield made


def feast_python() -> str | None:
    """A Python that has Feast's SDK, if there is one."""
    if named := os.environ.get("BROKER_TEST_FEAST_PYTHON"):
        return named
    return sys.executable if importlib.util.find_spec("feast") is not None else None


@asynccontextmanager
async def feast_server(python: str) -> AsyncIterator[str]:
    """Feast's own server with the features of the exchanges, in a process of its own; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(DATA / "make_feast_exchanges.py")
    process = subprocess.Popen([python, script, "--serve", str(port)])  # noqa: ASYNC220 - it takes no time to start one
    try:
        until = time.monotonic() + _STARTED_WITHIN_S
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            except OSError:
                assert process.poll() is None, "Feast's server ended before it listened"
                assert time.monotonic() < until, "Feast's server does not listen"
                await asyncio.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)
