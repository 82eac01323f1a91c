"""The command line. It names every command and loads only the one that is asked for, so that each starts at once."""

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from pydantic_core import ValidationError
from typer.core import TyperGroup

from app import __version__
from app.commands.failures import exit_code
from app.domain.errors import BrokerError


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command is, ``module:typer app`` in ``app.commands``, and its line in the help."""

    place: str
    help: str


COMMANDS = {
    "demo": Command(
        "demo:demo_app", "Run the whole broker here, decide on real loan applications, show what happened."
    ),
    "dev": Command("dev:dev_app", "Embedded Kafka, Redis, S3 and DynamoDB, without Docker."),
    "topics": Command("topics:topics_app", "Kafka's topics, as the documents in topics/ declare them."),
    "apply": Command("registry:registry_app", "Make documents the registry: validate, show changes, publish."),
    "get": Command("registry:registry_app", "Show the registry's documents."),
    "baseline": Command(
        "baseline:baseline_app", "Write how a version's training inputs are distributed, to watch skew."
    ),
    "history": Command("history:history_app", "List the revisions that were published, the newest first."),
    "rollback": Command("history:history_app", "Publish an old revision's documents as the next revision."),
    "explain": Command("explain:explain_app", "Say what would happen to a request, without running it."),
    "worker": Command("worker:worker_app", "Run one worker until SIGTERM: decide, features, audit, pool or rollouts."),
    "gateway": Command("gateway:gateway_app", "Serve decisions over HTTP until SIGTERM."),
    "request": Command("request:request_app", "Send one request and print its reply."),
    "decision": Command("decision:decision_app", "Recorded decisions."),
    "rollouts": Command("rollouts:rollouts_app", "How far rollouts are; pause, resume, abort or promote one."),
    "compare": Command("compare:compare_app", "Compare a task's shadows with what they shadow."),
    "features": Command(
        "features:features_app", "Features: load them from files, look at them, check what models need."
    ),
    "dlt": Command("dlt:dlt_app", "Dead letters: records that could not be handled."),
}


class Commands(TyperGroup):
    """The group of ``COMMANDS``, each imported when it is run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, imported; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].place.partition(":")
        found = typer.main.get_command(getattr(import_module(f"app.commands.{module}"), attribute))
        if isinstance(found, TyperGroup) and cmd_name in found.commands:  # an app of several commands of this level
            return found.commands[cmd_name]
        return found

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Their names and lines, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in COMMANDS.items()])


app = typer.Typer(
    name="model-broker",
    cls=Commands,
    help="Model decisions: routed, joined, recorded. Settings come from BROKER_* environment variables.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if any(name.upper().startswith("BROKER_") for name in os.environ):
        from app.settings import unknown_names  # noqa: PLC0415 - costs what a version or a help need not wait for

        if unknown := unknown_names(os.environ):
            said = f"no such setting: {', '.join(unknown)}; docs/operations.md lists those that there are"
            typer.echo(f"warning: settings: {said}", err=True)


def main() -> None:
    """Run the command line; what stops it becomes one line and a non-zero exit code."""
    try:
        app()
    except ValidationError as error:
        said = "; ".join(
            f"BROKER_{'.'.join(str(part) for part in detail['loc']).upper()}: "
            + detail["msg"].removeprefix("Value error, ")
            for detail in error.errors()
        )
        print(f"error: settings: {said}", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from error


if __name__ == "__main__":
    main()
