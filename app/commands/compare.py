"""``model-broker compare``: how a task's shadows would have decided, from the audit's log.

Scores are compared where champion and shadow both answered; a decision flips where the route's result, with the
shadow's answer in the champion's place, would have been another.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import orjson
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from app.adapters.avro import AvroCodec
from app.adapters.topic_reader import read_topic
from app.commands.failures import failed
from app.domain.comparison_stats import Account, Comparison
from app.domain.decisions import Kind
from app.domain.errors import BrokerError, ConfigurationError
from app.domain.requests import InboundRecord
from app.durations import format_duration, parse_duration_ms
from app.settings import Settings

compare_app = typer.Typer(rich_markup_mode=None, add_completion=False)

_RECALLED_MAX: Final = 100_000
_PSI_NOTED: Final = 0.1
_PSI_ALARMING: Final = 0.25


@dataclass(slots=True)
class Compared:
    """One shadow version's comparison, and the versions that it ran beside."""

    comparison: Comparison = field(default_factory=Comparison)
    champions: set[str] = field(default_factory=set)


@compare_app.command("compare", epilog="Example: model-broker compare credit-decision pd --since 24h")
def compare(
    route: Annotated[str, typer.Argument(help="The route's name.")],
    task: Annotated[str, typer.Argument(help="The task whose shadows to compare.")],
    since: Annotated[str, typer.Option(help="How far back to look: 30m, 1h, 7d.")] = "1h",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Compare a task's shadows with what they shadow, overall and by segment; exit 1 where there is nothing."""
    try:
        try:
            since_ms = parse_duration_ms(since)
        except ValueError as error:
            raise ConfigurationError(f"--since: {error}") from error
        found = collect(_recorded(Settings(), time.time_ns() // 1_000_000 - since_ms), route, task)
    except BrokerError as error:
        raise failed(error) from error
    if as_json:
        typer.echo(orjson.dumps(_document(route, task, since_ms, found), option=orjson.OPT_INDENT_2).decode())
    elif found:
        _print(route, task, since_ms, found)
    if not found:
        typer.echo(
            f"error: no shadow of {route}/{task} is recorded in the last {format_duration(since_ms)}: has the task "
            "`shadow` in the current revision, and did requests come? A longer --since looks further back",
            err=True,
        )
        raise typer.Exit(1)


def collect(records: Iterable[InboundRecord], route: str, task: str) -> dict[str, Compared]:
    """The comparisons of a route's task, by shadow version; a record that is there twice counts once."""
    codec = AvroCodec("AuditRecord")
    found: dict[str, Compared] = {}
    recalled: dict[str, None] = {}
    for record in records:
        if ("kind", Kind.SHADOW.encode()) not in record.headers or record.value is None:
            continue
        try:
            content = codec.decode(record.value)
            evidence = orjson.loads(content["evidence"] or b"null")
        except (ValueError, KeyError):
            continue  # the audit worker buries it and says so
        if content["route"] != route or not isinstance(evidence, dict) or evidence.get("task") != task:
            continue
        if content["execution_id"] in recalled:
            continue
        recalled[content["execution_id"]] = None
        if len(recalled) > _RECALLED_MAX:
            del recalled[next(iter(recalled))]
        compared = found.setdefault(str(evidence.get("shadow")), Compared())
        compared.comparison.feed(evidence)
        compared.champions.add(str(evidence.get("champion")))
    return found


def _recorded(settings: Settings, since_ms: int) -> Iterable[InboundRecord]:
    topic = settings.topic("inference.audit")
    if not sys.stderr.isatty():
        yield from read_topic(settings, topic, since_ms=since_ms)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        reading = bar.add_task(f"reading {topic}", total=None)
        yield from read_topic(
            settings,
            topic,
            since_ms=since_ms,
            progress=lambda passed, total: bar.update(reading, completed=passed, total=total or 1),
        )


def _document(route: str, task: str, since_ms: int, found: dict[str, Compared]) -> dict[str, Any]:
    return {
        "route": route,
        "task": task,
        "since_ms": since_ms,
        "shadows": [
            {"version": version, "champions": sorted(each.champions), **each.comparison.summary()}
            for version, each in sorted(found.items())
        ],
    }


def _print(route: str, task: str, since_ms: int, found: dict[str, Compared]) -> None:
    console = Console(highlight=False)
    for version, each in sorted(found.items()):
        champions = ", ".join(sorted(each.champions))
        title = f"{route}/{task}: version {version} beside {champions}, the last {format_duration(since_ms)}"
        console.print(Text(title, style="bold"))
        console.print(results_table(each.comparison))
        console.print(scores_table(each.comparison))


def results_table(comparison: Comparison) -> Table:
    """How often the result would have been another, overall and by segment."""
    table = _figures("segment", "decisions", "failed", "compared", "flips", "flip rate", "p99")
    for name, account in _rows(comparison):
        p99 = account.latencies.quantile_ms(0.99)
        table.add_row(
            name,
            str(account.count),
            Text(str(account.failed), style="red" if account.failed else ""),
            str(account.compared),
            str(account.flips),
            "-" if account.flip_rate is None else f"{account.flip_rate:.2%}",
            "-" if p99 is None else f"{p99:.1f} ms",
        )
    return table


def scores_table(comparison: Comparison) -> Table:
    """How far each numeric output is off, overall and by segment; an output is a line below its segment's."""
    table = _figures("segment, output", "pairs", "mean diff.", "mean abs.", "largest", "PSI")
    for name, account in _rows(comparison):
        if account.outputs:
            table.add_row(name)
        for output, pairs in sorted(account.outputs.items()):
            index = pairs.psi
            style = "" if index is None or index < _PSI_NOTED else "yellow" if index < _PSI_ALARMING else "red"
            table.add_row(
                Text(f"  {output}"),
                str(pairs.count),
                f"{pairs.mean_difference or 0:+.4g}",
                f"{pairs.mean_absolute_difference or 0:.4g}",
                f"{pairs.largest:.4g}",
                Text("-" if index is None else f"{index:.3f}", style=style),
            )
    return table


def _figures(first: str, *headings: str) -> Table:
    """A table of figures that leaves most of 80 columns to the names; figures are never broken."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _rows(comparison: Comparison) -> list[tuple[Text, Account]]:
    segments = [(Text(name or '""'), comparison.segments[name]) for name in sorted(comparison.segments)]
    return [(Text("all", style="bold"), comparison.overall), *segments]
