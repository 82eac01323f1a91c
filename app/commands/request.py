"""``model-broker request``: a decision asked for from a shell."""

import asyncio
import logging
import os
import socket
import time
import uuid
from typing import Annotated, Any, Final

import orjson
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.adapters.request_reply import RequestReplyClient
from app.commands.failures import failed
from app.domain.errors import BrokerError, RequestRefused
from app.domain.join import Status
from app.domain.requests import Headers, checked_id
from app.durations import parse_duration_ms
from app.ports.request_reply import Reply
from app.settings import Settings

_DECIDED: Final = (Status.COMPLETED, Status.PARTIAL)
_COLOURS: Final = {
    "completed": "green",
    "partial": "yellow",
    "ok": "green",
    "defaulted": "yellow",
    "skipped": "yellow",
}
_REPLY_GRACE_MS: Final = 1_000
_START_WITHIN_S: Final = 8.0
"""Shorter than a gateway's, for a person waits."""
# The client's own log lines repeat what the error says.
logging.getLogger("aiokafka").addHandler(logging.NullHandler())

Members = list[str] | None

request_app = typer.Typer(rich_markup_mode=None, add_completion=False)


@request_app.command(epilog="Example: model-broker request /credit/card --entities applicant_id=17")
def request(
    path: Annotated[str, typer.Argument(help="The path to ask, as /credit/decision.")],
    entities: Annotated[
        Members, typer.Option("--entities", help="NAME=VALUE, or a JSON object. May be repeated.")
    ] = None,
    inputs: Annotated[Members, typer.Option("--inputs", help="NAME=VALUE, or a JSON object. May be repeated.")] = None,
    metadata: Annotated[
        Members, typer.Option("--metadata", help="NAME=VALUE, or a JSON object. May be repeated.")
    ] = None,
    request_id: Annotated[str | None, typer.Option("--request-id", help="Default: a new one.")] = None,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", help="Deadline from now, as 500ms or 2s; default BROKER_DEFAULT_DEADLINE."),
    ] = None,
    header: Annotated[Members, typer.Option("--header", help="NAME=VALUE; a Kafka header. May be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reply's own JSON.")] = False,
) -> None:
    """Send one request and print its reply; exit 0 only for a completed or partial one."""
    settings = Settings()
    try:
        wait_ms = settings.default_deadline if timeout is None else parse_duration_ms(timeout)
        body = {
            "path": path,
            "entities": read_members("--entities", entities),
            "inputs": read_members("--inputs", inputs),
            "metadata": read_members("--metadata", metadata),
        }
        headers = tuple((name, value.encode()) for name, value in (_split("--header", text) for text in header or ()))
        own_id = checked_id(request_id if request_id is not None else str(uuid.uuid4()))
        reply = asyncio.run(_ask(settings, orjson.dumps(body), own_id, wait_ms, headers))
        decision = orjson.loads(reply.value)
    except (ValueError, RequestRefused) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except BrokerError as error:
        raise failed(error) from error
    if as_json:
        typer.echo(reply.value)
    else:
        show_decision(Console(), decision)
    if decision.get("status") not in _DECIDED:
        raise typer.Exit(1)


async def _ask(settings: Settings, body: bytes, request_id: str, wait_ms: int, headers: Headers) -> Reply:
    instance = f"request-{socket.gethostname()}-{os.getpid()}"
    async with RequestReplyClient(settings, instance=instance, start_within_s=_START_WITHIN_S) as client:
        return await client.call(
            body,
            request_id=request_id,
            wait_ms=wait_ms + _REPLY_GRACE_MS,
            deadline_ms=time.time_ns() // 1_000_000 + wait_ms,
            headers=(("content-type", b"application/json"), *headers),
        )


def read_members(option: str, texts: Members) -> dict[str, Any]:
    """An object's members from what an option was given: JSON objects, and NAME=VALUE with JSON values or plain text.

    >>> read_members("--entities", ["applicant_id=17", '{"branch": "A"}', "city=Bonn"])
    {'applicant_id': 17, 'branch': 'A', 'city': 'Bonn'}

    Raises:
        ValueError: neither; the message names the option.
    """
    members: dict[str, Any] = {}
    for text in texts or ():
        if text.lstrip().startswith("{"):
            try:
                members |= orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise ValueError(f"{option} {text}: not a JSON object: {error}") from error
            continue
        name, value = _split(option, text)
        try:
            members[name] = orjson.loads(value)
        except orjson.JSONDecodeError:
            members[name] = value
    return members


def _split(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{option} {text}: write NAME=VALUE")
    return name, value


def show_decision(console: Console, decision: dict[str, Any]) -> None:
    """Print a reply for a reader: how it ended, what was decided, what each task said."""
    status = str(decision["status"])
    heading = Text.assemble((status, f"bold {_COLOURS.get(status, 'red')}"), f"  {decision['latency_ms']} ms")
    console.print(heading)
    facts = Table.grid(padding=(0, 2))
    for name in ("request_id", "execution_id", "path", "route", "rule", "revision"):
        if decision.get(name) is not None:
            facts.add_row(name.replace("_", " "), Text(str(decision[name]), overflow="fold"))
    for name, value in decision["result"].items():
        facts.add_row(f"result.{name}", Text(_plain(value), style="bold"))
    console.print(facts)
    if decision["outputs"]:
        tasks = Table("task", "status", "model", "version", "output", "ms", box=SIMPLE_HEAD)
        for name, task in decision["outputs"].items():
            output = ", ".join(f"{key}={_plain(value)}" for key, value in (task.get("output") or {}).items())
            state = Text(str(task["status"]), style=_COLOURS.get(task["status"], "red"))
            tasks.add_row(name, state, task["model"], task["version"], Text(output), str(task["latency_ms"]))
        console.print(tasks)
    for error in decision["errors"]:
        place = ", ".join(f"{name} {error[name]}" for name in ("task", "feature") if name in error)
        code = Text(error["code"], style="red")
        console.print(code, Text(f"({place}) {error['message']}" if place else error["message"]))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else orjson.dumps(value).decode()
