"""``model-broker gateway``: decisions over HTTP."""

import asyncio
import socket
from typing import Annotated

import typer
import uvloop

from app.adapters.audit_reader import AuditReader
from app.adapters.dynamodb import DynamoPointerTable
from app.adapters.s3 import S3ObjectStore
from app.commands.failures import failed
from app.commands.options import Instance, ServicePort
from app.domain.errors import BrokerError
from app.gateway.server import run
from app.observability import configure_logging
from app.settings import Settings

gateway_app = typer.Typer(rich_markup_mode=None, add_completion=False)


@gateway_app.command(epilog="Example: model-broker gateway --http-port 8080")
def gateway(
    instance: Instance = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    http_port: ServicePort = 8080,
) -> None:
    """Serve decisions over HTTP until SIGTERM; metrics and probes are on the same port."""
    settings = Settings()
    configure_logging(settings)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, instance or f"{socket.gethostname()}-gateway", host, http_port))
    except BrokerError as error:
        raise failed(error) from error


async def _serve(settings: Settings, instance: str, host: str, port: int) -> None:
    async with S3ObjectStore(settings.audit_bucket) as objects, DynamoPointerTable(settings.audit_table) as table:
        await run(settings, AuditReader(objects, table), instance=instance, host=host, port=port)
