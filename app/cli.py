"""The command line: thin commands over what the other modules do."""

import socket
import sys
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Annotated

import structlog
import typer
from pydantic import ValidationError

from app import __version__
from app import main as root
from app.agents.worker import run_worker
from app.audit_commands import decision_app
from app.devstack.commands import dev_app
from app.dlt_commands import dlt_app
from app.domain.errors import BrokerError, ConfigurationError
from app.observability import configure_logging
from app.registry_commands import add_registry_commands
from app.request_commands import gateway, request
from app.settings import Settings
from app.topics_commands import topics_app

log = structlog.get_logger()
app = typer.Typer(
    name="model-broker",
    help="Model decisions: routed, joined, recorded. Settings come from BROKER_* environment variables.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(dev_app, name="dev")
app.add_typer(topics_app, name="topics")
app.add_typer(decision_app, name="decision")
app.add_typer(dlt_app, name="dlt")
add_registry_commands(app)
app.command("request", epilog="Example: model-broker request /credit/card --entities applicant_id=17")(request)
app.command("gateway", epilog="Example: model-broker gateway --http-port 8080")(gateway)


class Role(StrEnum):
    """What a worker process does."""

    DECIDE = "decide"
    FEATURES = "features"
    AUDIT = "audit"
    POOL = "pool"


@app.command(epilog="Example: model-broker worker decide --instance decide-0 --http-port 8081")
def worker(
    role: Annotated[Role, typer.Argument(help="What this process does.")],
    instance: Annotated[
        str | None,
        typer.Option(help="Names this process: client id, static group membership; default: host name and role."),
    ] = None,
    http_port: Annotated[
        int, typer.Option(help="Port of /metrics, /livez and /readyz; 0 takes any and prints it.")
    ] = 0,
    pool: Annotated[str | None, typer.Option(help="Of role pool: the pool whose tasks it answers.")] = None,
    runner: Annotated[str | None, typer.Option(help="Of role pool: module:factory of the models it runs.")] = None,
) -> None:
    """Run one worker until SIGTERM; start more, with other instance names, to share the load."""
    name = instance or f"{socket.gethostname()}-{role}"
    if (role is Role.POOL) != (pool is not None and runner is not None):
        raise typer.BadParameter("--pool and --runner go with role pool, both of them, and with no other role")

    async def run() -> int:
        settings = Settings()
        configure_logging(settings)
        if role is Role.POOL:
            assert pool is not None  # noqa: S101 - checked above
            assert runner is not None  # noqa: S101 - checked above
            return await root.run_pool(settings, instance=name, http_port=http_port, name=pool, runner=runner)
        runs: dict[Role, Callable[..., Awaitable[int]]] = {
            Role.DECIDE: root.run_decide,
            Role.FEATURES: root.run_features,
            Role.AUDIT: root.run_audit,
        }
        return await runs[role](settings, instance=name, http_port=http_port)

    raise typer.Exit(run_worker(run))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; what stops it becomes one line and a non-zero exit code."""
    try:
        app()
    except ValidationError as error:
        said = "; ".join(
            f"BROKER_{'.'.join(str(part) for part in detail['loc']).upper()}: {detail['msg']}"
            for detail in error.errors()
        )
        print(f"error: settings: {said}", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigurationError) else 1) from error


if __name__ == "__main__":
    main()
