"""``model-broker dev up|down|status|prepare``: the embedded stack for a developer, detached from the terminal."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from app.commands.failures import failed
from app.devstack.process import StackError
from app.devstack.stack import ALL, ServiceState, Stack
from app.domain.errors import BrokerError
from app.settings import Settings

DEFAULT_STATE_DIR = Path(".model-broker/dev")

dev_app = typer.Typer(
    name="dev",
    help="Embedded Kafka, Redis, S3 and DynamoDB, without Docker.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

StateDir = Annotated[
    Path, typer.Option("--state-dir", help="Holds the services' data and logs, dev.env, and which processes run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@dev_app.command(
    epilog="Example: model-broker dev up --state-dir /tmp/dev && set -a && . /tmp/dev/dev.env && set +a",
)
def up(
    state_dir: StateDir = DEFAULT_STATE_DIR,
    service: Annotated[
        list[str] | None, typer.Option("--service", help=f"Only these: {', '.join(ALL)}. May be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start the services and leave them running; on a running stack, say so."""
    console = Console(stderr=True)
    progress: Callable[[str], None] = (
        (lambda _: None) if as_json else lambda text: console.print(text, highlight=False, soft_wrap=True)
    )
    try:
        stack = Stack.up(state_dir, services=service or ALL, detached=True, progress=progress)
    except StackError as error:
        raise _failed(error) from error
    if as_json:
        _print_json(_described(stack, stack.status()) | {"was_running": stack.was_running})
        return
    typer.echo("The stack runs already." if stack.was_running else "The stack runs.")
    if stack.ended:
        gone = ", ".join(f"{program.name} (log: {program.log})" for program in stack.ended)
        typer.echo(
            f"Not running: {gone}. Only what started a program starts it again: end the stack, and run that anew."
        )
    typer.echo(f"Use it:  set -a; . {stack.env_file}; set +a")
    typer.echo(f"End it:  model-broker dev down --state-dir {state_dir}")


@dev_app.command(epilog="Example: model-broker dev down --state-dir /tmp/dev")
def down(state_dir: StateDir = DEFAULT_STATE_DIR, as_json: Json = False) -> None:
    """Stop the services of a directory; their data stays for the next `dev up`."""
    try:
        stack = Stack.attach(state_dir)
        stopped = stack.down() if stack is not None else []
    except StackError as error:
        raise _failed(error) from error
    if as_json:
        _print_json({"state_dir": str(state_dir), "stopped": stopped})
    else:
        typer.echo(f"Stopped {', '.join(stopped)}." if stopped else f"Nothing runs in {state_dir}.")


@dev_app.command(epilog="Example: model-broker dev status --state-dir /tmp/dev --json")
def status(state_dir: StateDir = DEFAULT_STATE_DIR, as_json: Json = False) -> None:
    """Say which services run and answer; exit 1 unless all of them do."""
    try:
        stack = Stack.attach(state_dir)
        states = stack.status() if stack is not None else []
    except StackError as error:
        raise _failed(error) from error
    if as_json:
        _print_json(_described(stack, states) if stack is not None else {"state_dir": str(state_dir), "services": []})
    elif not states:
        typer.echo(f"Nothing runs in {state_dir}. Start it: model-broker dev up --state-dir {state_dir}")
    else:
        Console().print(_table(states))
    if not states or not all(state.serving for state in states):
        raise typer.Exit(1)


@dev_app.command(epilog="Example: model-broker dev prepare")
def prepare(as_json: Json = False) -> None:
    """Create the audit's bucket and table, unless they exist, at the AWS endpoints that the environment names."""
    from app.devstack.stores import create_stores  # noqa: PLC0415 - the AWS clients load for seconds, and only here

    try:
        created = asyncio.run(create_stores(Settings()))
    except BrokerError as error:
        raise failed(error) from error
    if as_json:
        _print_json({"created": created})
        return
    for name, new in created.items():
        typer.echo(f"{name}: {'created' if new else 'exists'}")


def _described(stack: Stack, states: list[ServiceState]) -> dict[str, Any]:
    services = [
        {
            "name": state.name,
            "running": state.running,
            "serving": state.serving,
            "pid": state.pid,
            "address": state.address,
            "log": str(state.log),
        }
        for state in states
    ]
    return {
        "state_dir": str(stack.state_dir),
        "env_file": str(stack.env_file),
        "env": stack.env,
        "services": services,
    }


def _table(states: list[ServiceState]) -> Table:
    table = Table("service", "state", "process", "address", box=SIMPLE_HEAD)
    for column in table.columns[3:]:
        column.overflow = "fold"  # an address cut short is no address
    for state in states:
        word = "serving" if state.serving else "runs, does not answer" if state.running else "stopped"
        table.add_row(state.name, word, str(state.pid or "-"), state.address)
    return table


def _failed(error: StackError) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document))
