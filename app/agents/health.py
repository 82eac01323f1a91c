"""Every process's HTTP face to its operators: ``/metrics``, ``/livez``, ``/readyz``.

Live says that restarting would not help; ready says that work sent here would be done. Both answer 200 or 503 with
JSON that names what is wrong.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from app.domain.errors import BrokerError, ConfigurationError

_CHECK_TIMEOUT_S: Final = 2.0

Check = Callable[[], Awaitable[None]]


async def failing(checks: Mapping[str, Check]) -> dict[str, str]:
    """What each failing check says; a check that does not answer in time fails."""

    async def run(check: Check) -> str | None:
        try:
            await asyncio.wait_for(check(), _CHECK_TIMEOUT_S)
        except BrokerError as error:
            return str(error)
        except TimeoutError:
            return f"no answer within {_CHECK_TIMEOUT_S:.0f} s"
        return None

    said = await asyncio.gather(*(run(check) for check in checks.values()))
    return {name: reason for name, reason in zip(checks, said, strict=True) if reason is not None}


class HealthServer:
    """Serves on ``port`` (0: any free one, in ``port`` after start)."""

    def __init__(self, *, port: int, live: Callable[[], str | None], ready_checks: Mapping[str, Check]) -> None:
        self.port = port
        self._live = live
        self._checks = ready_checks
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen; ConfigurationError where the port is taken."""
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, "0.0.0.0", self.port).start()  # noqa: S104 - probes come from outside
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigurationError(
                f"port {self.port} cannot be served ({error}): choose another --http-port"
            ) from error
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        # Thousands of series take a tenth of a second to write, in which requests would stand still.
        body = await asyncio.to_thread(generate_latest, REGISTRY)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _livez(self, _: web.Request) -> web.Response:
        fault = self._live()
        return web.json_response({"live": fault is None, "fault": fault}, status=200 if fault is None else 503)

    async def _readyz(self, _: web.Request) -> web.Response:
        faults = await failing(self._checks)
        return web.json_response({"ready": not faults, "faults": faults}, status=503 if faults else 200)
