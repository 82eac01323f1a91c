"""``model-broker decision``: what was decided and why, from the audit itself.

The record is read where it ends up, in S3 by its pointer in DynamoDB, and shown only if its SHA-256 is the pointer's.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from app.adapters.audit_reader import AuditReader
from app.adapters.dynamodb import DynamoPointerTable
from app.adapters.s3 import S3ObjectStore
from app.commands.failures import failed
from app.domain.audit import DECISION, Pointer
from app.domain.audit_view import readable
from app.domain.decisions import Kind
from app.domain.dispatch import TaskStatus
from app.domain.errors import BrokerError
from app.settings import Settings

decision_app = typer.Typer(
    name="decision", help="Recorded decisions.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)

_STATUS_STYLES = {
    "completed": "green",
    "ok": "green",
    "partial": "yellow",
    "defaulted": "yellow",
    "skipped": "yellow",
    "PRESENT": "green",
}
_BESIDE_SHOWN_MAX = 100
_UNITS_MS = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000))


@decision_app.callback()
def decision() -> None:
    """Recorded decisions."""


@decision_app.command(epilog="Example: model-broker decision show b7c0ffee --json")
def show(
    request_id: Annotated[str, typer.Argument(help="The request's id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Show a decision: where it came from, what was routed, fetched, asked and answered.

    Of an id that was only refused: why, and what to do. Of rollout/ROUTE/RULE/TASK: the steps of that rollout, and what
    each was judged by. Exit 1 if nothing is recorded.
    """
    try:
        record, beside, pointers = asyncio.run(_find(Settings(), request_id))
    except BrokerError as error:
        raise failed(error) from error
    shadows = [each for each in beside if each["kind"] == Kind.SHADOW]
    refusals, steps = (
        sorted((each for each in beside if each["kind"] == kind), key=lambda each: int(each["received_ms"]))
        for kind in (Kind.REFUSAL, Kind.ROLLOUT)
    )
    if as_json and (record is not None or pointers):
        items = list(map(_item, pointers))
        document = {"record": record, "refusals": refusals, "shadows": shadows, "rollout": steps, "items": items}
        typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
    elif record is not None or pointers:
        Console().print(describe(record, pointers, shadows, steps, refusals))
    if record is None and not steps and not refusals:
        typer.echo(
            f"error: no decision of request {request_id} is recorded; one that was just made appears within seconds",
            err=True,
        )
        raise typer.Exit(1)


async def _find(
    settings: Settings, request_id: str
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], Sequence[Pointer]]:
    async with (
        S3ObjectStore(settings.audit_bucket) as objects,
        DynamoPointerTable(settings.audit_table) as table,
    ):
        reader = AuditReader(objects, table)
        pointers = await reader.pointers(request_id)
        decided = next((pointer for pointer in pointers if pointer.sort_key == DECISION), None)
        told = [pointer for pointer in pointers if pointer.kind != Kind.DECISION]
        latest = sorted(told, key=lambda pointer: pointer.recorded_ms)[-_BESIDE_SHOWN_MAX:]
        beside = [readable(await reader.read(pointer)) for pointer in latest]
        return None if decided is None else readable(await reader.read(decided)), beside, pointers


def describe(
    record: Mapping[str, Any] | None,
    pointers: Sequence[Pointer],
    shadows: Sequence[Mapping[str, Any]] = (),
    steps: Sequence[Mapping[str, Any]] = (),
    refusals: Sequence[Mapping[str, Any]] = (),
) -> RenderableType:
    """A decision's account for a terminal.

    ``record``, ``shadows``, a rollout's ``steps`` and what was refused under the id, all as ``readable`` gives.
    """
    parts: list[RenderableType] = []
    if record is not None:
        parts.append(_summary(record))
        for task in record["tasks"]:
            parts += _task(task, record["received_ms"])
        parts += map(_problem, record["problems"] or ())
        reply = record["reply"]
        told = reply if isinstance(reply, dict) else {}
        if told.get("result"):
            parts.append(Text.assemble(("\nresult  ", "bold"), _compact(told["result"])))
        if "reasons" in told:
            parts.append(Text.assemble(("reasons  ", "bold"), ", ".join(told["reasons"]) or "none"))
        parts += [Text("\nreply", style="bold"), Text(_compact(reply))]
    if refusals:
        parts += _refusals(refusals, decided=record is not None)
    if shadows:
        parts.append(_shadows(shadows))
    if steps:
        parts.append(_steps(steps))
    parts.append(_places(pointers))
    return Group(*parts)


def _problem(problem: Mapping[str, Any]) -> Text:
    where = " ".join(f"{name} {problem[name]}" for name in ("task", "feature") if problem.get(name))
    return Text(f"{problem['code']}{f' ({where})' if where else ''}: {problem['message']}", style="red")


def _refusals(refusals: Sequence[Mapping[str, Any]], *, decided: bool) -> list[RenderableType]:
    """What was turned away under the id, the first one first, and what to do about it."""
    parts: list[RenderableType] = []
    for refusal in refusals:
        source = refusal["source"]
        place = f"{source['topic']}/{source['partition']}/{source['offset']}"
        title = Text("\nrefused", style="bold")
        parts.append(title.append(f"  {place} of {_moment(source['timestamp_ms'])}", style="not bold"))
        parts += map(_problem, refusal["problems"] or ())
    if not decided:
        said = (
            "Nothing was decided under this id: mend what is told above, and send the request again under the same id."
        )
        parts.append(Text(said))
    return parts


def _summary(record: Mapping[str, Any]) -> Table:
    source = record["source"]
    took = (record["decided_ms"] or record["received_ms"]) - record["received_ms"]
    grid = Table.grid(padding=(0, 2))
    for name, value in (
        ("request", record["request_id"]),
        ("execution", f"{record['execution_id']} by {record['instance']}"),
        ("status", _status(record["status"])),
        ("path", record["path"]),
        ("route, rule", f"{record['route'] or '-'}, {record['rule'] or '-'}"),
        ("revision", record["revision"]),
        ("decided", f"{_moment(record['decided_ms'])}, {took} ms after it arrived"),
        ("from", f"{source['topic']}/{source['partition']}/{source['offset']} of {_moment(source['timestamp_ms'])}"),
        ("asked", _compact(source["value"])),
    ):
        grid.add_row(Text(name, style="bold"), value if isinstance(value, Text) else Text(str(value or "-")))
    return grid


def _task(task: Mapping[str, Any], received_ms: int) -> list[RenderableType]:
    title = Text(f"\n{task['name']}", style="bold")
    title.append(f"  {_chosen(task)}", style="not bold")
    parts: list[RenderableType] = [title, Text(f"digest {task['digest']}", style="dim")]
    if task.get("experiment"):
        parts.append(Text(f"experiment {task['experiment']}, arm {_drawn(task)}"))
    for earlier in task.get("earlier") or ():
        parts.append(Text(f"instead of {_chosen(earlier)}:"))
        parts += (Padding(each, (0, 0, 0, 2)) for each in _answer(earlier["result"]))
    features = Table("feature", "value", "status", "age", "source", box=SIMPLE_HEAD)
    for feature in task["features"]:
        event_ms = feature.get("event_time_ms")
        said = _status(feature["status"])
        if feature.get("reason"):
            said.append(f": {feature['reason']}", style="default")
        features.add_row(
            Text(feature["ref"]),
            Text(_compact(feature["value"])),
            said,
            "-" if event_ms is None else age(received_ms - event_ms),
            Text(str(feature["source"])),
        )
    if task["features"]:
        parts.append(features)
    return parts + _answer(task["result"])


def _chosen(task: Mapping[str, Any]) -> str:
    return f"{task['model']} {task['version']}, by {task['selected_by']}, {task['backend']}"


def _drawn(task: Mapping[str, Any]) -> str:
    """The arm that was drawn: the version that served, or the first that it stood in for."""
    first = next(iter(task.get("earlier") or ()), task)
    return str(first["version"])


def _answer(result: Mapping[str, Any] | None) -> list[RenderableType]:
    """What a version was asked, and what became of it."""
    if result is None:
        return [Text("no result", style="dim")]
    line = _status(result["status"])
    if result["status"] == TaskStatus.SKIPPED:
        line.append(f": {result['reason']}" if result.get("reason") else "", style="default")
    else:
        line.append(f" {_compact(result['output'])} in {result['latency_ms']:.1f} ms", style="default")
    parts: list[RenderableType] = [line]
    for attempt in result["attempts"]:
        shared = f", shared by {attempt['rows']} rows" if attempt["rows"] > 1 else ""
        told = f"  {attempt['endpoint']}: {attempt['outcome']}, {attempt['latency_ms']:.1f} ms{shared}"
        parts.append(Text(told, style="dim"))
    if result["problem"]:
        parts.append(Text(f"  {result['problem']['code']}: {result['problem']['message']}", style="red"))
    return parts


def _shadows(shadows: Sequence[Mapping[str, Any]]) -> Table:
    """What ran beside the decision and would have said."""
    table = Table("shadow", "would have said", "result", "flips", "segment", box=SIMPLE_HEAD)
    for shadow in shadows:
        told = shadow["evidence"] if isinstance(shadow.get("evidence"), dict) else {}
        outputs, result = told.get("outputs") or {}, told.get("result") or {}
        problem = next((task["result"]["problem"] for task in shadow["tasks"] if task["result"]), None)
        said = outputs.get("shadow")
        flips = {True: Text("yes", style="red"), False: Text("no"), None: Text("-")}[told.get("flipped")]
        table.add_row(
            Text(f"{told.get('task', '-')} {told.get('shadow', '-')}"),
            Text(_compact(said) if said is not None else (problem or {}).get("code", "-")),
            Text("-" if result.get("shadow") is None else _compact(result["shadow"])),
            flips,
            Text(str(told.get("segment") or "-")),
        )
    return table


def _steps(steps: Sequence[Mapping[str, Any]]) -> Table:
    """How a rollout went, the first step first."""
    table = Table("when", "action", "step", "percent", "because", box=SIMPLE_HEAD)
    for column in table.columns:
        column.no_wrap = column.header != "because"
    for step in steps:
        told = step["evidence"] if isinstance(step.get("evidence"), dict) else {}
        stats = told.get("stats") or {}
        seen = ", ".join(f"{stats[name]} {name}" for name in ("decisions", "errors", "flips") if name in stats)
        because = "; ".join(said for said in (str(told.get("reason") or ""), seen and f"seen: {seen}") if said)
        table.add_row(
            _moment(step["received_ms"]),
            Text(str(told.get("action", "-"))),
            *(str(told.get(name, "-")) for name in ("step", "percent")),
            Text(because or "-"),
        )
    return table


def _places(pointers: Sequence[Pointer]) -> Table:
    table = Table("recorded as", "object", "bytes", "SHA-256", box=SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"  # a name cut short is no name
    for pointer in pointers:
        place = f"s3://{pointer.bucket}/{pointer.object_key}"
        table.add_row(pointer.sort_key, place, f"{pointer.start}+{pointer.length}", pointer.sha256)
    return table


def age(milliseconds: int) -> str:
    """Roughly how long, in the two largest units.

    >>> age(90_000), age(93_600_000), age(400)
    ('1m 30s', '1d 2h', '400ms')
    """
    if milliseconds < 1_000:
        return f"{milliseconds}ms"
    words: list[str] = []
    rest = milliseconds
    for unit, size in _UNITS_MS:
        if rest >= size:
            words.append(f"{rest // size}{unit}")
            rest %= size
    return " ".join(words[:2])


def _moment(milliseconds: int | None) -> str:
    if milliseconds is None:
        return "-"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def _status(status: str | None) -> Text:
    return Text(status or "-", style=_STATUS_STYLES.get(status or "", "red"))


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _item(pointer: Pointer) -> dict[str, Any]:
    return {name: getattr(pointer, name) for name in Pointer.__slots__}
