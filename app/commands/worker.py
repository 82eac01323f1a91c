"""``model-broker worker``: one worker process of a role."""

import socket
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Annotated

import typer

from app import main as root
from app.agents.worker import run_worker
from app.commands.options import Instance, MetricsPort
from app.observability import configure_logging
from app.settings import Settings

worker_app = typer.Typer(rich_markup_mode=None, add_completion=False)


class Role(StrEnum):
    """What a worker process does."""

    DECIDE = "decide"
    FEATURES = "features"
    AUDIT = "audit"
    POOL = "pool"
    ROLLOUTS = "rollouts"


@worker_app.command(epilog="Example: model-broker worker decide --instance decide-0 --http-port 8081")
def worker(
    role: Annotated[Role, typer.Argument(help="What this process does.")],
    instance: Instance = None,
    http_port: MetricsPort = 0,
    pool: Annotated[str | None, typer.Option(help="Of role pool: the pool whose tasks it answers.")] = None,
    runner: Annotated[str | None, typer.Option(help="Of role pool: module:factory of the models it runs.")] = None,
) -> None:
    """Run one worker until SIGTERM; start more, with other instance names, to share the load."""
    name = instance or f"{socket.gethostname()}-{role}"
    given = [option is not None for option in (pool, runner)]
    if any(given) if role is not Role.POOL else not all(given):
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
            Role.ROLLOUTS: root.run_rollouts,
        }
        return await runs[role](settings, instance=name, http_port=http_port)

    raise typer.Exit(run_worker(run))
