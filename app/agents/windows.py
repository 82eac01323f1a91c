"""What a rollouts worker counts: audit records in; windows of what new versions and shadows did, out.

Every worker counts the records of its partitions into a windowed table (``app.domain.windows``): each rollout's step,
and each shadow's comparisons. A decision counts for the step of the revision that it was made under, at whatever time
it is read; an entry remembers up to which offset it counts, so a record that comes again counts once.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, cast

import faust
import orjson
import structlog
from faust.types import StreamT
from prometheus_client import Counter

from app.adapters.record_codec import decode_record
from app.adapters.rollout_records import JUDGING_PARTITION
from app.agents.delivery import Intake
from app.domain.comparison_stats import OTHER, SEGMENTS_MAX, Comparison
from app.domain.decisions import DecisionRecord, Kind
from app.domain.errors import PublishFailed
from app.domain.registry import Revision
from app.domain.requests import InboundRecord
from app.domain.rollout_stats import StepStats
from app.domain.rollouts import RolloutName, Running, rollouts_in
from app.domain.windows import (
    ShadowName,
    oldest_kept,
    read_entry,
    shadow_key,
    step_key,
    window_start,
    write_entry,
)
from app.ports.clock import Clock
from app.ports.log import JoinTable
from app.ports.registry import Registry

log = structlog.get_logger()

BATCH_RECORDS_MAX: Final = 1_000
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
BATCH_WAIT_MS: Final = 250
"""A window is written once a batch; a quarter of a second is little beside any step."""
REGISTRY_GRACE_MS: Final = 5_000
"""A revision reaches every worker well within this of its publication; a decision made under it may come earlier."""
ALL: Final = "all"
"""The segment that every comparison is of."""
_REGISTRY_POLL_S: Final = 0.1
_RETRY_DELAYS_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_Kept = TypeVar("_Kept")
_REVISIONS_KNOWN_MAX: Final = 64
_RECALLED_MAX: Final = 20_000

_COMPARED = Counter(
    "broker_shadow_compared",
    "Decisions compared with what a shadow would have made of them; segment all: every one",
    ["route", "task", "version", "segment"],
)
_FLIPS = Counter(
    "broker_shadow_flips",
    "Decisions that a shadow would have changed; segment all: every one",
    ["route", "task", "version", "segment"],
)


class WindowTable(JoinTable, Protocol):
    """The durable table of windows, of the partitions that this worker owns."""

    @property
    def recovered(self) -> bool:
        """Whether an assignment stands and its entries are all here."""
        ...

    def owns(self, partition: int) -> bool:
        """Whether the partition is this worker's."""
        ...

    async def settled(self, partition: int) -> None:
        """Wait while a rebalance runs; NotOwner unless the partition is ours after it."""
        ...

    def entries(self, partition: int) -> Iterable[tuple[str, bytes]]:
        """The entries of one partition."""
        ...


@dataclass(slots=True)
class _Account:
    """An entry that a batch changes: what it holds, and up to which offset."""

    offset: int
    content: StepStats | Comparison
    touched: bool = False


class Windows:
    """Counts a partition's records, a batch at a time, into the table."""

    def __init__(self, *, table: WindowTable, registry: Registry, clock: Clock) -> None:
        self._table = table
        self._registry = registry
        self._clock = clock
        self._known: OrderedDict[str, Mapping[RolloutName, Running]] = OrderedDict()
        self._unknown: OrderedDict[str, None] = OrderedDict()
        self._segments: dict[ShadowName, set[str]] = {}
        self._recalled: dict[int, OrderedDict[str, None]] = {}

    async def handle(self, partition: int, records: Sequence[InboundRecord]) -> None:
        """Count a batch; returns when the table has it. Raises NotOwner."""
        await self._table.settled(partition)
        accounts: dict[str, _Account] = {}
        told: list[str] = []
        fresh: dict[str, None] = {}
        for record in records:
            kind = next((value for name, value in record.headers if name == "kind"), b"")
            if kind not in (b"decision", b"shadow", b"rollout") or record.value is None:
                continue
            if kind == b"rollout":
                told.append(next((value for name, value in record.headers if name == "execution-id"), b"").decode())
                continue
            if kind == b"decision" and not self._rolls_out():
                continue
            try:
                decoded = decode_record(record.value)
            except ValueError as error:
                # The audit worker buries what it cannot keep; here it only does not count.
                log.warning("audit_record_unreadable", position=record.position, reason=str(error))
                continue
            if decoded.execution_id in self._recalled.get(partition, ()) or decoded.execution_id in fresh:
                continue
            fresh[decoded.execution_id] = None
            if decoded.kind is Kind.SHADOW:
                await self._count_shadow(partition, record, decoded, accounts)
            else:
                await self._count_decision(partition, record, decoded, accounts)
        await self._write(partition, accounts, told)
        self._recall(partition, fresh)

    def _rolls_out(self) -> bool:
        current = self._registry.current
        return current is None or any(
            running.status.state == "progressing" for running in self._rollouts(current).values()
        )

    async def _count_decision(
        self, partition: int, record: InboundRecord, decision: DecisionRecord, accounts: dict[str, _Account]
    ) -> None:
        if not decision.tasks or decision.route is None or decision.rule is None:
            return
        for task in decision.tasks:
            name = RolloutName(decision.route, decision.rule, task.name)
            running = await self._running(name, decision.revision, record)
            if running is None:
                continue
            account = self._account(partition, step_key(running.step_id), accounts, StepStats)
            stats = cast(StepStats, account.content)
            if record.offset > account.offset and stats.feed_decision(task, running.terms, decision.problems):
                account.offset, account.touched = record.offset, True

    async def _count_shadow(
        self, partition: int, record: InboundRecord, shadow: DecisionRecord, accounts: dict[str, _Account]
    ) -> None:
        try:
            evidence = orjson.loads(shadow.evidence or b"null")
        except orjson.JSONDecodeError:
            evidence = None
        if not isinstance(evidence, dict) or shadow.route is None or shadow.rule is None:
            return
        task, version = str(evidence.get("task")), str(evidence.get("shadow"))
        running = await self._running(RolloutName(shadow.route, shadow.rule, task), shadow.revision, record)
        if running is not None and running.rollout.to == version:
            account = self._account(partition, step_key(running.step_id), accounts, StepStats)
            stats = cast(StepStats, account.content)
            if record.offset > account.offset and stats.feed_shadow(evidence):
                account.offset, account.touched = record.offset, True
        if record.timestamp_ms < oldest_kept(self._clock.now_ms()):
            return
        shadow_name = ShadowName(shadow.route, task, version)
        key = shadow_key(shadow_name, window_start(record.timestamp_ms))
        account = self._account(partition, key, accounts, Comparison)
        if record.offset > account.offset:
            cast(Comparison, account.content).feed(evidence)
            account.offset, account.touched = record.offset, True
            self._meter(shadow_name, evidence)

    def _account(
        self, partition: int, key: str, accounts: dict[str, _Account], kind: type[StepStats] | type[Comparison]
    ) -> _Account:
        account = accounts.get(key)
        if account is None:
            entry = self._table.get(partition, key)
            if entry is None:
                account = _Account(-1, kind())
            else:
                offset, content = read_entry(entry)
                account = _Account(offset, kind.from_json(content))
            accounts[key] = account
        return account

    async def _write(self, partition: int, accounts: Mapping[str, _Account], told: Sequence[str]) -> None:
        puts: dict[str, bytes | None] = {
            key: write_entry(account.offset, account.content.as_json())
            for key, account in accounts.items()
            if account.touched
        }
        if partition == JUDGING_PARTITION:
            for identity in told:
                if self._table.get(partition, f"told|{identity}") is None:
                    puts[f"told|{identity}"] = str(self._clock.now_ms()).encode()
                if self._table.get(partition, f"intent|{identity}") is not None:
                    puts[f"intent|{identity}"] = None
        for key, entry in puts.items():
            await _until_published(lambda: self._table.put(partition, key, entry))  # noqa: B023 - awaited before they change

    def _recall(self, partition: int, identities: Iterable[str]) -> None:
        recalled = self._recalled.setdefault(partition, OrderedDict())
        for identity in identities:
            recalled[identity] = None
        while len(recalled) > _RECALLED_MAX:
            recalled.popitem(last=False)

    def _meter(self, name: ShadowName, evidence: Mapping[str, Any]) -> None:
        flipped = evidence.get("flipped")
        if not isinstance(flipped, bool):
            return
        segments = [ALL]
        segment = evidence.get("segment")
        if isinstance(segment, str):
            known = self._segments.setdefault(name, set())
            if segment in known or len(known) < SEGMENTS_MAX:
                known.add(segment)
            segments.append(segment if segment in known else OTHER)
        for each in segments:
            _COMPARED.labels(name.route, name.task, name.version, each).inc()
            _FLIPS.labels(name.route, name.task, name.version, each).inc(flipped)

    # --- which step a record belongs to -------------------------------------------------------------------------------

    async def _running(self, name: RolloutName, revision_id: str | None, record: InboundRecord) -> Running | None:
        """The rollout in the step that the record's revision has it in; None unless that is its step by now."""
        current = self._registry.current
        if revision_id is None or current is None:
            return None
        made_under = await self._rollouts_of(revision_id, record)
        running = made_under.get(name)
        if running is None or running.status.state != "progressing":
            return None
        now = self._rollouts(self._registry.current or current).get(name)
        return running if now is not None and now.step_id == running.step_id else None

    async def _rollouts_of(self, revision_id: str, record: InboundRecord) -> Mapping[RolloutName, Running]:
        # A record can reach us before the revision that it names, by a clock that is ahead of ours, too.
        give_up_ms = min(record.timestamp_ms, self._clock.now_ms()) + REGISTRY_GRACE_MS
        while revision_id not in self._known:
            # An old revision is compiled for it, which takes a while.
            revision = await asyncio.to_thread(self._registry.get, revision_id)
            if revision is not None:
                return self._rollouts(revision)
            if revision_id in self._unknown or self._clock.now_ms() >= give_up_ms:
                # Looked up again for each record, but not waited for again: it may come yet.
                _keep(self._unknown, revision_id, None)
                return {}
            await asyncio.sleep(_REGISTRY_POLL_S)
        return self._known[revision_id]

    def _rollouts(self, revision: Revision) -> Mapping[RolloutName, Running]:
        known = self._known.get(revision.id)
        if known is None:
            known = {each.name: each for each in rollouts_in(revision.documents)}
            _keep(self._known, revision.id, known)
        return known


def _keep(known: OrderedDict[str, _Kept], revision_id: str, value: _Kept) -> None:
    known[revision_id] = value
    if len(known) > _REVISIONS_KNOWN_MAX:
        known.popitem(last=False)


async def _until_published(attempt: Callable[[], Awaitable[None]]) -> None:
    """The attempt, however often it takes while the partition is ours."""
    failures = 0
    while True:
        try:
            await attempt()
        except PublishFailed as error:
            delay_s = _RETRY_DELAYS_S[min(failures, len(_RETRY_DELAYS_S) - 1)]
            failures += 1
            log.warning("window_waits", reason=str(error), retry_in_s=delay_s)
            await asyncio.sleep(delay_s)
        else:
            return


def attach(app: faust.App, *, topic: str, windows: Windows) -> Intake:
    """Add the rollouts agent to ``app``; ``topic`` is a full name. Returns its intake, to be drained."""
    intake = Intake(app, in_flight_max=2 * BATCH_RECORDS_MAX)

    async def rollouts(stream: StreamT[Any]) -> None:
        await intake.batches(
            cast(faust.Stream[bytes], stream),
            windows.handle,
            records_max=BATCH_RECORDS_MAX,
            bytes_max=BATCH_BYTES_MAX,
            wait_ms=BATCH_WAIT_MS,
        )

    channel = app.topic(topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
    app.agent(channel, name="rollouts")(rollouts)
    return intake
