"""``model-broker rollouts``: how far rollouts are, and an operator's word on them.

An order is the next revision, published by compare-and-swap as the rollouts worker does it, and a record in the audit.
Where something else was published meanwhile, the order is held against what is there now and given again.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import orjson
import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.adapters.changelog import entry_key
from app.adapters.kafka import KafkaPublisher
from app.adapters.record_codec import encode_record
from app.adapters.registry_topic import POINTER_DELETED, Head, publish_revision, read_head
from app.adapters.rollout_records import audit_record
from app.adapters.topic_reader import read_topic
from app.adapters.topics import REGISTRY_TOPIC, ROLLOUT_WINDOWS
from app.commands.failures import failed
from app.commands.pace import PACE, Pace
from app.domain.errors import BrokerError, ConfigurationError, DocumentsRefused, PublisherFenced, RevisionConflict
from app.domain.registry import Revision, restated
from app.domain.rollout_stats import StepStats
from app.domain.rollouts import (
    Order,
    RolloutName,
    Running,
    action_of,
    judge_in,
    moved,
    obey,
    rollouts_in,
    step_record,
)
from app.domain.windows import check_window, step_stats
from app.durations import format_duration, spoken_duration
from app.settings import Settings

rollouts_app = typer.Typer(
    name="rollouts",
    help="Rollouts: how far they are, and an operator's word on them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

_ATTEMPTS: Final = 5
_STATE_STYLES: Final = {"progressing": "cyan", "paused": "yellow", "promoted": "green", "aborted": "red"}

Name = Annotated[str, typer.Argument(metavar="ROUTE/RULE/TASK", help="The rollout, as `rollouts list` names it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@rollouts_app.command("list", epilog="Example: model-broker rollouts list --json")
def list_rollouts(
    name: Annotated[str | None, typer.Argument(metavar="ROUTE/RULE/TASK", help="Only this rollout.")] = None,
    as_json: Json = False,
) -> None:
    """Show each rollout's state, step and percent, and what its step has seen so far."""
    settings = Settings()
    try:
        _, revision = _in_force(settings)
        found = _rollouts(revision) if name is None else [_named(revision, name)]
        windows = _windows(settings) if found else {}
    except BrokerError as error:
        raise failed(error, as_json=as_json) from error
    now_ms = time.time_ns() // 1_000_000
    stats = {running.name: step_stats(windows.values(), running.step_id) for running in found}
    if as_json:
        documents = [_document(revision, running, stats[running.name], now_ms) for running in found]
        typer.echo(orjson.dumps({"revision": revision.id, "rollouts": documents}))
    elif found:
        Console(highlight=False).print(told(revision, found, stats, now_ms))
    else:
        typer.echo("No rollouts: give a task `rollout` in its route and apply.")


@rollouts_app.command(epilog="Example: model-broker rollouts pause credit-decision/default/pd")
def pause(name: Name, as_json: Json = False) -> None:
    """Keep a rollout at its step until it is resumed; its bounds are not held against it meanwhile."""
    _order(name, "pause", as_json=as_json)


@rollouts_app.command(epilog="Example: model-broker rollouts resume credit-decision/default/pd")
def resume(name: Name, as_json: Json = False) -> None:
    """Let a paused rollout go on; its step begins anew."""
    _order(name, "resume", as_json=as_json)


@rollouts_app.command(epilog="Example: model-broker rollouts abort credit-decision/default/pd")
def abort(name: Name, as_json: Json = False) -> None:
    """Take a rollout back: the version of before serves all again, also after a promotion."""
    _order(name, "abort", as_json=as_json)


@rollouts_app.command(epilog="Example: model-broker rollouts promote credit-decision/default/pd")
def promote(name: Name, as_json: Json = False) -> None:
    """Let the new version serve all at once."""
    _order(name, "promote", as_json=as_json)


def _order(name: str, order: Order, *, as_json: bool) -> None:
    try:
        before, after, revision = give_order(Settings(), name, order)
    except BrokerError as error:
        raise failed(error, as_json=as_json) from error
    if as_json:
        document = {"rollout": name, "from": before.status.state, "to": after.status.state, "percent": after.percent}
        typer.echo(orjson.dumps(document | {"revision": revision}))
    else:
        typer.echo(
            f"{name}: {before.status.state} at {before.percent} % → {after.status.state} at {after.percent} %, "
            f"by revision {revision}"
        )


def give_order(settings: Settings, name: str, order: Order, *, pace: Pace = PACE) -> tuple[Running, Running, str]:
    """Give an order: the rollout before and after, and the revision that says so.

    Raises:
        BrokerError: the order makes no sense as the rollout stands, or nothing could be published.
    """
    for attempt in range(_ATTEMPTS):
        head, current = _in_force(settings)
        before = _named(current, name)
        now_ms = pace.now_ms()
        try:
            status = obey(before, order, now_ms)
        except ValueError as error:
            raise BrokerError(str(error)) from error
        revision = restated(current, moved(current.documents, before.name, status))
        try:
            message = f"rollout {before.name}: {order} by operator"
            publish_revision(settings, revision, expected=head, now_ms=now_ms, message=message)
        except RevisionConflict as error:
            if attempt == _ATTEMPTS - 1:
                raise
            if isinstance(error, PublisherFenced):
                pace.step_aside(attempt)
            continue
        (after,) = (each for each in rollouts_in(revision.documents) if each.name == before.name)
        asyncio.run(_tell(settings, after, revision.id, current.id))
        return before, after, revision.id
    raise AssertionError("the last attempt returns or raises")


async def _tell(settings: Settings, after: Running, revision: str, previous: str) -> None:
    """The audit record of an order; the rollouts worker writes it where this fails."""
    record = step_record(
        after, revision=revision, previous=previous, stats=None, source_topic=settings.topic(REGISTRY_TOPIC)
    )
    out = audit_record(settings.topic("inference.audit"), record.execution_id, record.request_id, encode_record(record))
    try:
        async with KafkaPublisher(settings, client_id="rollouts-command") as publisher:
            await publisher.publish([out])
    except BrokerError as error:
        typer.echo(
            f"warning: done, but not yet told in the audit ({error}): the rollouts worker will tell it", err=True
        )


def _in_force(settings: Settings) -> tuple[Head, Revision]:
    """What the topic ends in, and the revision that workers go by.

    Raises:
        ConfigurationError: nothing was published yet; or as ``read_head``.
        DocumentsRefused: nothing that was published is sound.
        StoreUnavailable: as ``read_head``.
    """
    head = read_head(settings)
    if head.last_good is None:
        if head.faults:
            raise DocumentsRefused(head.faults)
        said = POINTER_DELETED if head.deleted else "no revision was published yet: `model-broker apply -f DIR`"
        raise ConfigurationError(said)
    if head.refusal is not None:
        typer.echo(f"warning: {head.refusal}; this is of the last good one, {head.last_good.id}", err=True)
    return head, head.last_good


def _rollouts(revision: Revision) -> list[Running]:
    return sorted(rollouts_in(revision.documents), key=lambda running: running.name)


def _named(revision: Revision, name: str) -> Running:
    try:
        wanted = RolloutName.read(name)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    found = _rollouts(revision)
    for running in found:
        if running.name == wanted:
            return running
    known = ", ".join(str(running.name) for running in found) or "none"
    raise ConfigurationError(f"no rollout {name} in {revision.id}; there is {known}")


def _windows(settings: Settings) -> Mapping[int, Mapping[str, bytes]]:
    """The entries of every partition, as they are now."""
    partitions: dict[int, dict[str, bytes]] = {}
    for record in read_topic(settings, settings.topic(ROLLOUT_WINDOWS)):
        entries = partitions.setdefault(record.partition, {})
        key = entry_key(record.topic, record.partition, record.offset, record.key, record.value, check_window)
        if key is None:
            continue
        if record.value is None:
            entries.pop(key, None)
        else:
            entries[key] = record.value
    return partitions


def _document(revision: Revision, running: Running, stats: StepStats, now_ms: int) -> dict[str, Any]:
    status = running.status
    return {
        "rollout": str(running.name),
        "to": running.rollout.to,
        "state": status.state,
        "action": action_of(status),
        "step": status.step,
        "steps": running.rollout.steps,
        "percent": running.percent,
        "since": status.since,
        "reason": status.reason,
        "stats": stats.summary(),
        "verdict": _verdict(revision, running, stats, now_ms),
    }


def _verdict(revision: Revision, running: Running, stats: StepStats, now_ms: int) -> str | None:
    rollout, status = running.rollout, running.status
    if status.state != "progressing":
        return None
    verdict, ends_ms = judge_in(revision, running, stats, now_ms), status.since + rollout.every
    if now_ms < ends_ms and verdict != judge_in(revision, running, stats, ends_ms):
        # Only time is waited for.
        return f"{spoken_duration(ends_ms - now_ms)} of {spoken_duration(rollout.every)} left"
    return verdict.reason


def how_far(step: int, steps: Sequence[int], percent: int) -> str:
    """Where a rollout is, for people; ``step`` counts from 0.

    >>> how_far(1, (20, 100), 100)
    'step 2 of 2, 100 %'
    """
    return f"step {step + 1} of {len(steps)}, {percent} %"


def told(
    revision: Revision, found: Sequence[Running], stats: Mapping[RolloutName, StepStats], now_ms: int
) -> RenderableType:
    """Each rollout in a few lines that any terminal has room for: how far it is, what it saw, what comes of that."""
    parts: list[RenderableType] = []
    for running in found:
        status, seen = running.status, stats[running.name]
        since = datetime.fromtimestamp(status.since / 1_000, UTC).isoformat(timespec="seconds")
        saw = [f"{seen.decisions} decisions", f"{seen.errors} errors"]
        if seen.unjudged:
            saw.append(f"{seen.unjudged} unjudged")
        if seen.compared:
            saw.append(f"{seen.flips} of {seen.compared} flips")
        p99_ms = seen.latencies.quantile_ms(0.99)
        if p99_ms is not None:
            saw.append(f"p99 {format_duration(max(1, round(p99_ms)))}")
        step = f"{how_far(status.step, running.rollout.steps, running.percent)}, since {since}"
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("  state", Text.assemble((status.state, _STATE_STYLES[status.state]), f": {step}"))
        if status.state in ("progressing", "paused"):
            # Of this step; one that has ended is told by its reason.
            grid.add_row("  seen", Text(", ".join(saw)))
        said = _verdict(revision, running, seen, now_ms)
        if said is not None:
            grid.add_row("  judged", Text(said))
        elif status.reason:
            grid.add_row("  why", Text(status.reason))
        title = Text.assemble((str(running.name), "bold"), f" to version {running.rollout.to}", overflow="fold")
        parts += [title, grid]
    return Group(*parts)
