"""The gateway as a process: one port for callers, probes and metrics; a drain when it is told to end.

On SIGTERM it stops accepting and answers what it has begun, for as long as ``BROKER_DRAIN_TIMEOUT`` allows.
"""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import structlog
import uvicorn

from app.adapters.clock import SystemClock
from app.adapters.request_reply import RequestReplyClient
from app.domain.errors import ConfigurationError
from app.gateway.application import create_app
from app.ports.decision_reader import DecisionReader
from app.settings import Settings

KEEP_ALIVE_S: Final = 75
"""Longer than load balancers keep an idle connection (60 s by habit), so that they are the ones to close it."""

_log = structlog.get_logger()


async def run(
    settings: Settings, reader: DecisionReader, *, instance: str, host: str = "127.0.0.1", port: int = 8080
) -> None:
    """Serve until SIGTERM or SIGINT; ``port`` 0 takes any, and the log says which.

    Raises:
        ConfigurationError: Kafka does not answer, its topics are not there, or the port is taken.
    """
    listener = _listen(host, port)
    with listener:
        async with RequestReplyClient(settings, instance=instance) as client:
            app = create_app(client, reader, settings, SystemClock())
            server = uvicorn.Server(
                uvicorn.Config(
                    app,
                    log_config=None,
                    access_log=False,
                    lifespan="off",
                    server_header=False,
                    timeout_keep_alive=KEEP_ALIVE_S,
                    timeout_graceful_shutdown=settings.drain_timeout // 1_000,
                )
            )
            address, bound_port = listener.getsockname()[:2]
            _log.info("gateway serves", instance=instance, host=address, port=bound_port)
            print(f"gateway {instance} serves on http://{address}:{bound_port}", flush=True)
            with _signals_end_quietly():
                await server.serve(sockets=[listener])
    _log.info("gateway ended", instance=instance)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port} ({error}): name another with --http-port") from error


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more when it has drained; the process then ends in good order."""

    def ignore(_number: int, _frame: FrameType | None) -> None:
        return None

    before = {number: signal.signal(number, ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
