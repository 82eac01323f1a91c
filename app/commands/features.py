"""``model-broker features load|get|check``: values into the store from files, and what the store holds, looked at."""

import asyncio
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from app.adapters.dead_letters import SUFFIX
from app.adapters.feast_keys import sample_keys
from app.adapters.feature_files import FeatureFile, FileRow, format_of
from app.adapters.feature_load import (
    UPDATES_TOPIC,
    Journal,
    await_stored,
    begin_anew,
    publish,
    refuse_oversized,
    refused_updates,
)
from app.adapters.redis_feast import RedisFeatureStore
from app.adapters.registry_topic import read_published
from app.commands.failures import failed
from app.commands.stored_rows import BYTES_AT_ONCE, ROWS_AT_ONCE, StoredRows, redis_answers
from app.domain.aggregates import IDS_MAX
from app.domain.errors import BrokerError, ConfigurationError
from app.domain.feature_check import STORED_STATUSES, Finding, findings_of, judge_all, need_of
from app.domain.feature_news import Outlook, Standing
from app.domain.feature_rows import (
    Occurrences,
    RowReader,
    RowRefused,
    Update,
    entity_text,
    read_entity,
    row_reader,
)
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, Fetched, FetchedFeatures, Value, ViewNeed, within_ttl
from app.domain.registry import Revision
from app.domain.view_documents import FeatureViewSpec, HttpSource, RedisSource
from app.durations import format_duration, parse_duration_ms
from app.settings import Settings

features_app = typer.Typer(
    name="features",
    help="Features: load them from files, look at them, check what models need.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

FAULTS_SHOWN_MAX: Final = 20
_KEYS_AT_ONCE: Final = 100
_FETCH_TIMEOUT_MS: Final = 10_000
_PROGRESS_EVERY: Final = 1_000
_INTERRUPTED: Final = 130
"""The exit code of what Ctrl-C ended, as shells have it."""
_STYLES: Final = {
    FeatureStatus.PRESENT: "green",
    FeatureStatus.NULL: "yellow",
    FeatureStatus.MISSING: "red",
    FeatureStatus.STALE: "yellow",
    FeatureStatus.ERROR: "bold red",
}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


class _RowsRefused(BrokerError):
    """Rows of a file cannot be loaded; the message lists the first ones."""


@dataclass(slots=True)
class _Faults:
    """How many rows have one, and the first of them: where, and what."""

    count: int = 0
    shown: list[tuple[str, str]] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        if len(self.shown) < FAULTS_SHOWN_MAX:
            self.shown.append((place, reason))

    def listed(self) -> str:
        """A line for each that is shown."""
        more = f"\n  and {self.count - len(self.shown)} more" if self.count > len(self.shown) else ""
        return "".join(f"\n  {place}: {reason}" for place, reason in self.shown) + more


# --- load -------------------------------------------------------------------------------------------------------------


@features_app.command(
    epilog="Example: model-broker features load applicants.csv --view applicant --map id=applicant_id --event-time asof"
)
def load(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="CSV with a header, JSON lines, Parquet.")],
    view: Annotated[str, typer.Option("--view", help="The FeatureView that its rows are of.")],
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="COLUMN=FEATURE", help="Also for entities; @row is the row's number, from 1."),
    ] = None,
    event_time: Annotated[
        str | None, typer.Option("--event-time", metavar="COLUMN", help="Where each row's event time is.")
    ] = None,
    event_time_value: Annotated[
        str | None, typer.Option("--event-time-value", metavar="ISO", help="That of all rows.")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="csv, jsonl or parquet; default: by the file's name.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every row, and publish nothing.")] = False,
    timeout: Annotated[str, typer.Option("--timeout", help="How long to wait while nothing more is stored.")] = "60s",
    as_json: Json = False,
) -> None:
    """Publish a file's rows as updates of a view, and wait until the features workers have stored them.

    Nothing is published unless every row is sound. A load that was interrupted goes on where it was when it is run
    again; one that is run twice changes nothing. Rows that change nothing, for what the store has is as new, are told.
    Exit code 1 where rows are not sound, or not stored.
    """
    settings = Settings()
    started = time.monotonic()
    now_ms = time.time_ns() // 1_000_000
    interrupted = "nothing was published by this run; run the same command again"
    try:
        waits_s = _duration_ms("--timeout", timeout) / 1_000
        time_ms = _time_of_all(event_time, event_time_value)
        spec = _stored_view(_current(settings), view)
        mapped = _mapping(mapping or [])
        options = {"view": view, "map": mapped, "time": event_time, "value": event_time_value}
        journal = _journal(settings, file, options)
        with FeatureFile(file, format_of(file, format_)) as rows:
            _tell_unnamed(rows)
            reader, ignored = row_reader(
                view, spec, rows.header, mapping=mapped, time_column=event_time, time_ms=time_ms, text=rows.text
            )
            outlook = Outlook(None if spec.plan is None else spec.lateness)
            resumed = journal.rows
            with StoredRows(settings, view, spec, _features_asked(spec, reader)) as stored:
                looked = _Look(stored, outlook, resumed)
                with _progress("checking rows") as advance:
                    total = _check(rows, reader, settings, now_ms, looked, advance)
            _tell_outlook(outlook, total, view, spec)
            refused = _Faults()
            if not dry_run:
                interrupted = "run the same command again, and it goes on where it was"
                refused = _publish_and_wait(settings, rows, reader, journal, now_ms, total, waits_s)
    except BrokerError as error:
        raise failed(error) from error
    except KeyboardInterrupt as error:
        typer.echo(f"interrupted: {interrupted}", err=True)
        raise typer.Exit(_INTERRUPTED) from error
    elapsed_s = time.monotonic() - started
    if as_json:
        summary = {
            "file": str(file),
            "view": view,
            "rows": total,
            "published": 0 if dry_run else total - resumed,
            "resumed_after": resumed,
            "stored": not dry_run and not refused.count,
            "dry_run": dry_run,
            "ignored_columns": ignored,
            "stored_before": outlook.stored_before,
            "outdated_rows": outlook.outdated_rows,
            "outdated": {str(each): outlook.outdated[each] for each in Standing if each is not Standing.NEWS},
            "late_rows": outlook.late_rows,
            "crowded_entities": outlook.crowded,
            "refused_rows": refused.count,
            "refused": [{"place": place, "reason": reason} for place, reason in refused.shown],
            "seconds": round(elapsed_s, 3),
        }
        typer.echo(orjson.dumps(summary))
    else:
        if ignored:
            typer.echo(f"Not loaded, for view {view} has no such features: {', '.join(ignored)}.")
        if dry_run:
            typer.echo(f"{total:,} rows of {file.name} are sound. Nothing was published.")
        else:
            went_on = f", of which {resumed:,} were published before" if resumed else ""
            through = total - refused.count
            typer.echo(f"{through:,} rows of {file.name} are stored in view {view}{went_on} ({elapsed_s:.1f} s).")
        if outlook.outdated_rows and not outlook.outdated[Standing.CONFLICTING]:
            typer.echo(f"{_capital(outlook.told(total))}.")
    if refused.count:
        letters = settings.topic(UPDATES_TOPIC) + SUFFIX
        raise failed(
            _RowsRefused(
                f"{refused.count} of {total} rows of {file} are not stored: the features workers refused them, and "
                f"they lie in {letters}. Mend what is said and load the file again, or redrive them:{refused.listed()}"
            )
        )


def _journal(settings: Settings, file: Path, options: Mapping[str, Any]) -> Journal:
    journal = Journal.open(settings, file, **options)
    why = begin_anew(settings, journal)
    if why is not None:
        typer.echo(f"note: this load begins anew, from the first row: {why}", err=True)
    return journal


def _tell_unnamed(file: FeatureFile) -> None:
    if file.unnamed:
        places = ", ".join(map(str, file.unnamed))
        said = (
            f"columns {places} have no names and are"
            if len(file.unnamed) > 1
            else f"column {places} has no name and is"
        )
        typer.echo(f"note: {file.path}: {said} left out", err=True)


def _features_asked(spec: FeatureViewSpec, reader: RowReader) -> list[str]:
    """Of which features the store is asked: those of the file, and for aggregates all that tell of an event."""
    loaded = set(reader.columns.values())
    return [name for name in spec.declared if spec.plan is not None or name in loaded]


class _Look:
    """Holds rows against the store, a batch at a time, in the file's order.

    Rows up to ``published`` were counted, or told, by the load that is resumed: aggregates have moved on since.
    """

    def __init__(self, stored: StoredRows, outlook: Outlook, published: int) -> None:
        self._stored = stored
        self._outlook = outlook
        self._published = published if outlook.lateness_ms is not None else 0
        self._waiting: list[tuple[int, bytes, FeatureRow]] = []
        self._bytes = 0

    def see(self, number: int, update: Update, row: FeatureRow) -> None:
        """The next row."""
        self._waiting.append((number, update.key, row))
        self._bytes += len(update.value)
        if len(self._waiting) >= ROWS_AT_ONCE or self._bytes >= BYTES_AT_ONCE:
            self.end()

    def end(self) -> None:
        """Look at those that wait."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        found = self._stored.of([row.key for number, _, row in waiting if number > self._published])
        for number, key, row in waiting:
            self._outlook.see(key, row, found.get(row.key) if number > self._published else None)


def _check(
    rows: FeatureFile,
    reader: RowReader,
    settings: Settings,
    now_ms: int,
    look: _Look,
    advance: "_Advance",
) -> int:
    total, faults = 0, _Faults()
    for row in rows.rows():
        total = row.number
        try:
            update, made = _update(row, reader, now_ms)
            refuse_oversized(update, made, settings)
            if not faults.count:
                look.see(row.number, update, made)
        except RowRefused as error:
            faults.add(row.place, reader.told(str(error)))
        if not total % _PROGRESS_EVERY:
            advance(total)
    if faults.count:
        raise _RowsRefused(
            f"{faults.count} of {total} rows of {rows.path} cannot be loaded, so nothing was published:"
            + faults.listed()
        )
    look.end()
    return total


def _tell_outlook(outlook: Outlook, total: int, view: str, spec: FeatureViewSpec) -> None:
    """Before anything is published: what is late, and what corrects nothing though it seems meant to."""
    if outlook.late_rows:
        before = (
            "; the store has rows of this file as they are, so an earlier load may have counted these"
            if outlook.stored_before
            else ". Load rows in order of time, and before newer ones come, or declare a larger lateness"
        )
        typer.echo(
            f"{'note' if outlook.stored_before else 'warning'}: at least {outlook.late_rows:,} of {total:,} rows are "
            f"more than the lateness of view {view} ({format_duration(spec.lateness)}) behind what the store or an "
            f"earlier row has of their entity: aggregates do not count them{before}",
            err=True,
        )
    elif outlook.stored_before and outlook.lateness_ms is not None:
        typer.echo(
            f"note: the store has at least {outlook.stored_before:,} of {total:,} rows as they are: aggregates do not "
            "count again those that a load brought, whatever its order and format; those that a producer sent they do",
            err=True,
        )
    if outlook.crowded:
        typer.echo(
            f"warning: {outlook.crowded:,} entities of the file have more than {IDS_MAX:,} rows each: of more than "
            f"that within the lateness of view {view} ({format_duration(spec.lateness)}), or of one moment, aggregates "
            "do not count all",
            err=True,
        )
    if outlook.outdated[Standing.CONFLICTING]:
        typer.echo(f"warning: {outlook.told(total)}", err=True)


def _publish_and_wait(
    settings: Settings,
    rows: FeatureFile,
    reader: RowReader,
    journal: Journal,
    now_ms: int,
    total: int,
    waits_s: float,
) -> _Faults:
    """Publish what the journal does not have, and wait until it is stored; the rows that workers refused."""
    updates = (update for _, update in _updates(rows, reader, now_ms))
    with _progress("publishing", total) as advance:
        publish(settings, islice(updates, journal.rows, None), journal, advance)
    ends = dict(journal.ends)
    with _progress("stored", sum(ends.values())) as advance:
        await_stored(settings, ends, waits_s, lambda left: advance(sum(ends.values()) - left))
    refused = _refused_rows(rows, reader, now_ms, refused_updates(settings, journal))
    journal.remove()
    return refused


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _update(row: FileRow, reader: RowReader, now_ms: int) -> tuple[Update, FeatureRow]:
    if row.fault is not None:
        raise RowRefused(row.fault)
    return reader.read(row.number, row.cells, now_ms)


def _refused_rows(rows: FeatureFile, reader: RowReader, now_ms: int, reasons: Mapping[bytes, str]) -> _Faults:
    """The rows whose updates are among those that were refused."""
    refused = _Faults()
    if reasons:
        for row, update in _updates(rows, reader, now_ms):
            if update.id in reasons:
                refused.add(row.place, reasons[update.id])
    return refused


def _updates(rows: FeatureFile, reader: RowReader, now_ms: int) -> Iterator[tuple[FileRow, Update]]:
    """Each row's update. Aggregates count by ids, so where there are some, rows that say the same have their own."""
    same = None if reader.spec.plan is None else Occurrences()
    for row in rows.rows():
        try:
            update = _update(row, reader, now_ms)[0]
            yield row, update if same is None else same.numbered(update)
        except RowRefused as error:
            raise ConfigurationError(f"{rows.path} has changed while it was loaded: {row.place}: {error}") from error


def _mapping(given: Sequence[str]) -> dict[str, str]:
    mapped = {}
    for each in given:
        column, equals, target = each.rpartition("=")
        if not equals or not column or not target:
            raise ConfigurationError(f"--map {each}: write COLUMN=FEATURE")
        mapped[column] = target
    return mapped


def _time_of_all(column: str | None, value: str | None) -> int | None:
    """The event time of every row, None where each has its own.

    There is no default: with the moment of the load, a second load of the same file would be news, and win.
    """
    if (column is None) == (value is None):
        raise ConfigurationError(
            "a load names the time that its values are of, so that loading twice is loading once: give either "
            "--event-time COLUMN, or --event-time-value ISO for all rows"
        )
    return None if value is None else _moment(value)


def _moment(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(f"--event-time-value {text}: write ISO 8601, as 2026-01-31T00:00:00Z") from error
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000)


def _duration_ms(option: str, text: str) -> int:
    try:
        return parse_duration_ms(text)
    except ValueError as error:
        raise ConfigurationError(f"{option}: {error}") from error


class _Advance:
    """Tells a progress bar how far something is."""

    def __init__(self, bar: Progress, label: str, total: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task(label, total=total)

    def __call__(self, done: int) -> None:
        self._bar.update(self._task, completed=done)


@contextmanager
def _progress(label: str, total: int | None = None) -> Iterator[_Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        yield _Advance(bar, label, total)


# --- get --------------------------------------------------------------------------------------------------------------


@features_app.command(epilog="Example: model-broker features get applicant applicant_id=17")
def get(
    view: Annotated[str, typer.Argument(help="A FeatureView of the registry.")],
    key: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="The entity, each of its join keys.")],
    as_json: Json = False,
) -> None:
    """Show what the store holds of one entity: values, with their status and age. Exit code 1 if it holds nothing."""
    settings = Settings()
    try:
        spec = _kept_view(_current(settings), view)
        try:
            given = named_values(key, [entity.name for entity in spec.entities])
            entity = read_entity(spec, view, given, text=True)
        except RowRefused as error:
            raise ConfigurationError(str(error)) from error
        need = ViewNeed(view, entity, tuple(spec.types), tuple(spec.types.values()))
        [fetched] = asyncio.run(_fetch(settings, [need]))
    except BrokerError as error:
        raise failed(error) from error
    now_ms = time.time_ns() // 1_000_000
    found = {name: within_ttl(fetched[view, name], spec.ttl, now_ms) for name in spec.types}
    if as_json:
        document = {
            "view": view,
            "entity": dict(zip(entity.names, entity.values, strict=True)),
            "features": [_feature_json(name, spec, each, now_ms) for name, each in found.items()],
        }
        typer.echo(orjson.dumps(document))
    else:
        _print_features(spec, found, now_ms)
    if all(each.status is FeatureStatus.MISSING for each in found.values()):
        typer.echo(f"error: the store holds nothing of {entity_text(entity)} in view {view}", err=True)
        raise typer.Exit(1)


def named_values(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Join keys by name: an argument each, or as one with commas between, as updates are keyed.

    >>> named_values(["branch=3,iban=DE,1"], ["iban", "branch"]), named_values(["iban=DE,1"], ["iban"])
    ({'branch': '3', 'iban': 'DE,1'}, {'iban': 'DE,1'})
    """
    # Values may have commas too: one parts two keys only where keys are fewer than names, and a name follows.
    between = re.compile(rf",(?=(?:{'|'.join(map(re.escape, names))})=)")
    parts = given if len(given) >= len(names) else [part for each in given for part in between.split(each)]
    found: dict[str, str] = {}
    for name, value in map(_named_value, parts):
        if name in found:
            raise ConfigurationError(f"{name} is given twice: {found[name]} and {value}")
        found[name] = value
    return found


def _named_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigurationError(f"{text}: write NAME=VALUE, as applicant_id=17")
    return name, value


def _feature_json(name: str, spec: FeatureViewSpec, found: Fetched, now_ms: int) -> dict[str, Any]:
    return {
        "feature": name,
        "type": spec.types[name],
        "status": found.status,
        "value": _plain(found.value),
        "event_time": _iso(found.event_time_ms),
        "age_ms": None if found.event_time_ms is None else now_ms - found.event_time_ms,
        "reason": found.reason,
    }


def _plain(value: Value) -> Any:
    """A value as JSON has it, bytes in hexadecimal digits.

    >>> _plain((b"\\x00\\xff", None)), _plain(1.5)
    (['00ff', None], 1.5)
    """
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value.hex() if isinstance(value, bytes) else value


def _print_features(spec: FeatureViewSpec, fetched: Mapping[str, Fetched], now_ms: int) -> None:
    table = Table("feature", "value", "type", "status", "age", "event time (UTC)", box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for name, found in fetched.items():
        value = "-" if found.value is None else _plain(found.value)
        status = Text(str(found.status), style=_STYLES[found.status])
        if found.reason:
            status.append(f": {found.reason}", style="default")
        time_ms = found.event_time_ms
        table.add_row(
            name,
            Text(str(value)[:200]),
            spec.types[name],
            status,
            "-" if time_ms is None else _age(now_ms - time_ms),
            (_iso(time_ms) or "-")[:19].replace("T", " "),
        )
    Console(highlight=False).print(table)


def _iso(time_ms: int | None) -> str | None:
    if time_ms is None:
        return None
    try:
        return datetime.fromtimestamp(time_ms / 1_000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None


def _age(age_ms: int) -> str:
    """An age in two figures.

    >>> _age(1_500), _age(90 * 60_000), _age(-3)
    ('1s', '90m', '0s')
    """
    units = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
    limits = {"s": 100, "m": 100, "h": 49, "d": 10**9}
    for unit, size in units.items():
        if age_ms < limits[unit] * size:
            break
    return f"{max(0, age_ms) // size}{unit}"


# --- check ------------------------------------------------------------------------------------------------------------


@features_app.command(epilog="Example: model-broker features check --view applicant --sample 500 --tolerate 1")
def check(
    view: Annotated[str | None, typer.Option("--view", help="Only this one; default: all that versions need.")] = None,
    sample: Annotated[
        int, typer.Option("--sample", min=1, max=100_000, help="Entities of each view to look at.")
    ] = 200,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", exists=True, dir_okay=False, help="These entities instead: a file of their columns."),
    ] = None,
    tolerate: Annotated[
        float, typer.Option("--tolerate", min=0, max=100, help="Percent of entities that may violate a contract.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Hold what model versions need against what the store has. Exit code 1 where requests would be rejected or
    referred to a person.
    """
    settings = Settings()
    try:
        if keys is not None and view is None:
            raise ConfigurationError("--keys names entities of one view: say which by --view")
        revision = _current(settings)
        if view is not None:
            _stored_view(revision, view)
        stored = {name: spec for name, spec in revision.views.items() if _is_stored(spec)}
        versions = revision.versions.values()
        needed = findings_of(versions, stored, revision.computations, view)
        asked = {name: spec for name, spec in revision.views.items() if isinstance(spec.source, HttpSource)}
        unchecked = sorted(findings_of(versions, asked, revision.computations, view))
        for name, findings in needed.items():
            entities = _keys_of(keys, name, stored[name]) if keys else _sample_of(settings, stored[name], sample)
            asyncio.run(_judge(settings, findings, entities, stored[name].ttl))
    except BrokerError as error:
        raise failed(error) from error
    findings = [each for found in needed.values() for each in found]
    empty = [name for name, found in needed.items() if not found[0].sampled]
    tolerated = tolerate / 100
    violated = [each for each in findings if each.rejected_by(tolerated) or each.referred_by(tolerated)]
    if as_json:
        document = {
            "revision": revision.id,
            "tolerated_percent": tolerate,
            "features": [_finding_json(each, tolerated) for each in findings],
            "views_without_entities": empty,
            "views_not_checked": unchecked,
            "sound": not violated,
        }
        typer.echo(orjson.dumps(document))
    else:
        _print_findings(findings, violated, empty, unchecked, tolerated)
    if violated:
        raise typer.Exit(1)


def _sample_of(settings: Settings, spec: FeatureViewSpec, most: int) -> list[EntityKey]:
    entities = [(entity.name, entity.type) for entity in spec.sorted_entities]
    with redis_answers():
        return sample_keys(
            settings.redis_url,
            spec.project,
            most,
            lambda key: list(zip(key.names, key.types, strict=True)) == entities,
        )


def _keys_of(path: Path, view: str, spec: FeatureViewSpec) -> list[EntityKey]:
    found: dict[EntityKey, None] = {}
    names = [entity.name for entity in spec.entities]
    with FeatureFile(path, format_of(path, None)) as rows:
        _tell_unnamed(rows)
        for row in rows.rows():
            try:
                if row.fault is not None:
                    raise RowRefused(row.fault)
                given = {name: row.cells[name] for name in names if name in row.cells}
                found[read_entity(spec, view, given, text=rows.text)] = None
            except RowRefused as error:
                raise ConfigurationError(f"{path}, {row.place}: {error}") from error
    return list(found)


async def _judge(
    settings: Settings, findings: Sequence[Finding], entities: Sequence[EntityKey], ttl_ms: int | None
) -> None:
    fetched = await _fetch(settings, [need_of(findings, key) for key in entities])
    now_ms = time.time_ns() // 1_000_000
    for each in fetched:
        judge_all(findings, each, ttl_ms, now_ms)


async def _fetch(settings: Settings, needs: Sequence[ViewNeed]) -> list[FetchedFeatures]:
    """What the store holds for each need, a hundred at a time."""
    store = RedisFeatureStore(settings.redis_url, value_bytes_max=settings.feature_value_bytes_max)
    found: list[FetchedFeatures] = []
    try:
        with redis_answers():
            await store.ping()
            for start in range(0, len(needs), _KEYS_AT_ONCE):
                part = needs[start : start + _KEYS_AT_ONCE]
                found += await asyncio.gather(*(store.fetch([need], _FETCH_TIMEOUT_MS) for need in part))
    finally:
        await store.close()
    return found


def _finding_json(finding: Finding, tolerated: float) -> dict[str, Any]:
    return {
        "ref": f"{finding.view}.{finding.feature}",
        "max_age_ms": finding.max_age_ms,
        "required_by": finding.required_by,
        "optional_for": finding.optional_for,
        "entities": finding.sampled,
        "statuses": {str(status): finding.statuses[status] for status in STORED_STATUSES},
        "would_reject": finding.rejected_by(tolerated),
        "would_refer": finding.referred_by(tolerated),
    }


def _print_findings(
    findings: Sequence[Finding],
    violated: Sequence[Finding],
    empty: Sequence[str],
    unchecked: Sequence[str],
    tolerated: float,
) -> None:
    console = Console(highlight=False)
    short = {FeatureStatus.PRESENT: "PRES", FeatureStatus.MISSING: "MISS"}
    heads = [short.get(status, str(status)) + " %" for status in STORED_STATUSES]
    table = Table("feature", "needed", *heads, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[2:]:
        column.justify = "right"
    table.columns[0].overflow = "fold"
    for finding in findings:
        bound = "" if finding.max_age_ms is None else f" within {format_duration(finding.max_age_ms)}"
        needed = "required" if finding.required_by else "optional"
        shares = [f"{100 * finding.share(status):.1f}" if finding.sampled else "-" for status in STORED_STATUSES]
        style = "red" if finding in violated else ""
        table.add_row(f"{finding.view}.{finding.feature}{bound}", needed, *shares, style=style)
    console.print(table)
    for view, sampled in {finding.view: finding.sampled for finding in findings}.items():
        console.print(f"{sampled} entities of view {view} were looked at.", soft_wrap=True)
    for name in empty:
        console.print(f"View {name}: the store knows no entity of it.", style="yellow")
    for name in unchecked:
        console.print(f"View {name} was not checked: a feature server is asked for it.", style="yellow")
    for does, versions_of in (("reject", Finding.rejected_by), ("refer", Finding.referred_by)):
        for version in sorted({version for each in violated for version in versions_of(each, tolerated)}):
            refs = {f"{each.view}.{each.feature}": None for each in violated if version in versions_of(each, tolerated)}
            console.print(Text(f"{version} would {does} requests for want of {', '.join(refs)}", style="red"))
    if not findings:
        console.print("No model version needs a stored feature.")
    elif not violated:
        of_stored = " of stored views" if unchecked else ""
        console.print(f"What versions require{of_stored} is there.", style="green")


# --- the registry -----------------------------------------------------------------------------------------------------


def _current(settings: Settings) -> Revision:
    published = read_published(settings)
    if published is None:
        raise ConfigurationError("no registry revision is published: run `model-broker apply -f DIR`")
    return published.revision


def _is_stored(spec: FeatureViewSpec) -> bool:
    return isinstance(spec.source, RedisSource)


def _stored_view(revision: Revision, name: str) -> FeatureViewSpec:
    spec = _view(revision, name)
    if spec.on_demand is not None:
        raise ConfigurationError(f"view {name} is not stored: its features are computed for each request")
    if not _is_stored(spec):
        raise ConfigurationError(
            f"view {name} is a feature server's: only views of source redis are loaded and checked"
        )
    return spec


def _kept_view(revision: Revision, name: str) -> FeatureViewSpec:
    """A view of which Redis has rows: stored there, or kept of what a feature server said."""
    spec = _view(revision, name)
    if isinstance(spec.source, HttpSource):
        if spec.source.write_back is None:
            raise ConfigurationError(
                f"view {name} is a feature server's, and without writeBack nothing of it is stored"
            )
        return spec.model_copy(update={"source": RedisSource(type="redis", project=spec.project)})
    return _stored_view(revision, name)


def _view(revision: Revision, name: str) -> FeatureViewSpec:
    spec = revision.views.get(name)
    if spec is None:
        known = ", ".join(sorted(revision.views)) or "none"
        raise ConfigurationError(f"there is no FeatureView {name}: the registry has {known}")
    return spec
