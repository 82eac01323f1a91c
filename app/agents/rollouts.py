"""The rollouts worker: audit records in; windows of what new versions and shadows did, and rollouts that move, out.

Every worker counts the records of its partitions into a windowed table (``app.domain.windows``): each rollout's step,
and each shadow's comparisons. The worker that owns partition 0 also judges, once a second: it follows everybody's
windows, holds each rollout's step against its bounds, and moves it by publishing the next revision.

**The revision is the truth.** A step is in the revision and changes by compare-and-swap, so two workers that both
believe to be the one cannot both move it, and one that starts again finds the step where it is. A decision counts for
the step of the revision that it was made under, at whatever time it is read.

**Every step is told in the audit.** The record is written to the table before its revision is published, and sent
after; one that was published and not told, because the worker died in between, is sent again, the same bytes under the
same id. What others moved (``apply`` begins rollouts, operators pause them) is told when nobody else does. Records of
rollouts go to partition 0, so the worker that judges reads there which of them are told.

A rollout goes on only when everything that the log held at the end of its step is counted; it is taken back as soon as
a bound is broken for certain.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, cast

import faust
import orjson
import structlog
from faust.types import StreamT
from prometheus_client import Counter, Gauge

from app.adapters.record_codec import decode_record, encode_record
from app.adapters.rollout_records import JUDGING_PARTITION, audit_record
from app.agents.delivery import Intake
from app.domain.comparison_stats import OTHER, SEGMENTS_MAX, Comparison
from app.domain.decisions import DecisionRecord, Kind
from app.domain.errors import DocumentsRefused, NotOwner, PublishFailed, RevisionConflict, StoreUnavailable
from app.domain.registry import Revision, compile_revision
from app.domain.requests import InboundRecord
from app.domain.rollouts import (
    Abort,
    RolloutName,
    Running,
    Stay,
    StepStats,
    action_of,
    follow,
    judge,
    moved,
    record_id,
    rollouts_in,
    step_record,
)
from app.domain.windows import (
    ShadowName,
    comparisons,
    oldest_kept,
    read_entry,
    read_intent,
    read_shadow_key,
    shadow_key,
    step_key,
    step_stats,
    window_start,
    write_entry,
    write_intent,
)
from app.ports.clock import Clock
from app.ports.log import JoinTable, Publisher
from app.ports.registry import Registry

log = structlog.get_logger()

BATCH_RECORDS_MAX: Final = 1_000
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
BATCH_WAIT_MS: Final = 250
"""A window is written once a batch; a quarter of a second is little beside any step."""
TICK_S: Final = 1.0
REGISTRY_GRACE_MS: Final = 5_000
"""A revision reaches every worker well within this of its publication; a decision made under it may come earlier."""
TELL_AFTER_MS: Final = 5_000
"""Who moved a rollout tells of it within this, unless it died."""
_SHOW_EVERY_MS: Final = 5_000
_MARK_KEPT_MS: Final = 60_000
_REGISTRY_POLL_S: Final = 0.1
_RETRY_DELAYS_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_REVISIONS_KNOWN_MAX: Final = 64
_RECALLED_MAX: Final = 20_000
_ALL: Final = "all"

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
_FLIP_RATE = Gauge(
    "broker_shadow_flip_rate",
    "The share of decisions that a shadow would have changed, of the last hour",
    ["route", "task", "version", "segment"],
)
_PSI = Gauge(
    "broker_shadow_psi",
    "The population stability index of a shadow's scores against the champion's, of the last hour",
    ["route", "task", "version", "segment", "output"],
)
_DIFFERENCE = Gauge(
    "broker_shadow_score_difference",
    "How far a shadow's score lies from the champion's on average, of the last hour",
    ["route", "task", "version", "segment", "output"],
)
_PERCENT = Gauge(
    "broker_rollout_percent",
    "The part of the subjects that a rollout's version has",
    ["route", "rule", "task", "version"],
)
_SHADOW_GAUGES: Final = (_FLIP_RATE, _PSI, _DIFFERENCE)
_STEPS = Counter("broker_rollout_steps", "Steps of rollouts that this worker made, by what was done", ["action"])


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


class AllWindows(Protocol):
    """The windows of every partition, and how far the log is counted."""

    @property
    def partitions(self) -> Mapping[int, Mapping[str, bytes]]:
        """Every partition's entries, by key."""
        ...

    async def ends(self) -> Mapping[int, int]:
        """Where the log ends in each partition. Raises StoreUnavailable."""
        ...

    async def reached(self, ends: Mapping[int, int]) -> bool:
        """Whether all records before ``ends`` are counted and the windows that count them are here.

        Raises:
            StoreUnavailable: Kafka does not say.
        """
        ...


# --- counting ---------------------------------------------------------------------------------------------------------


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
            if record.offset > account.offset and stats.feed_decision(task, running.rollout.to):
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
        segments = [_ALL]
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
        while revision_id not in self._known:
            # An old revision is compiled for it, which takes a while.
            revision = await asyncio.to_thread(self._registry.get, revision_id)
            if revision is not None:
                return self._rollouts(revision)
            if not 0 <= self._clock.now_ms() - record.timestamp_ms < REGISTRY_GRACE_MS:
                return self._know(revision_id, {})
            await asyncio.sleep(_REGISTRY_POLL_S)
        return self._known[revision_id]

    def _rollouts(self, revision: Revision) -> Mapping[RolloutName, Running]:
        known = self._known.get(revision.id)
        if known is None:
            known = self._know(revision.id, {each.name: each for each in rollouts_in(revision.documents)})
        return known

    def _know(self, revision_id: str, rollouts: Mapping[RolloutName, Running]) -> Mapping[RolloutName, Running]:
        self._known[revision_id] = rollouts
        if len(self._known) > _REVISIONS_KNOWN_MAX:
            self._known.popitem(last=False)
        return rollouts


# --- judging ----------------------------------------------------------------------------------------------------------


class Judge:
    """Moves rollouts, on the worker that owns partition 0.

    ``publish_revision(revision, expected, now_ms, message)`` publishes by compare-and-swap; it blocks, and is run in a
    thread.
    """

    def __init__(
        self,
        *,
        table: WindowTable,
        windows: AllWindows,
        registry: Registry,
        publisher: Publisher,
        publish_revision: Callable[[Revision, str, int, str], None],
        clock: Clock,
        audit_topic: str,
        registry_topic: str,
    ) -> None:
        self._table = table
        self._windows = windows
        self._registry = registry
        self._publisher = publisher
        self._publish_revision = publish_revision
        self._clock = clock
        self._audit_topic = audit_topic
        self._registry_topic = registry_topic
        self._fences: dict[str, Mapping[int, int]] = {}
        self._tell_at: dict[str, int] = {}
        self._intended: dict[str, int] = {}
        self._shown_ms = 0

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.tick()
            except (StoreUnavailable, PublishFailed, NotOwner, DocumentsRefused) as error:
                log.warning("rollouts_wait", reason=str(error))

    async def tick(self) -> None:
        """Look at every rollout once, and move one of them at most: the next one needs the next revision.

        Raises:
            StoreUnavailable, PublishFailed, NotOwner, DocumentsRefused: what was begun is taken up by a later tick,
                here or elsewhere.
        """
        await self._purge()
        revision = self._registry.current
        if revision is None or not (self._table.recovered and self._table.owns(JUDGING_PARTITION)):
            self._fences.clear()
            self._tell_at.clear()
            self._intended.clear()
            self._shown_ms = 0
            _clear(_PERCENT, *_SHADOW_GAUGES)
            return
        rollouts = tuple(rollouts_in(revision.documents))
        self._show(rollouts)
        await self._tell(revision, rollouts)
        current = {running.step_id for running in rollouts}
        for identity in self._fences.keys() - current:
            del self._fences[identity]
        for running in rollouts:
            if await self._moves(revision, running):
                return

    async def _moves(self, revision: Revision, running: Running) -> bool:
        stats = step_stats(self._windows.partitions.values(), running.step_id)
        verdict = judge(running.rollout, running.status, stats, self._clock.now_ms())
        if not isinstance(verdict, Stay | Abort):
            # Going on is judged by all that the log held when the step's time was up, not by what was counted by then.
            fence = self._fences.get(running.step_id)
            if fence is None:
                self._fences[running.step_id] = await self._windows.ends()
                return False
            if not await self._windows.reached(fence):
                return False
            stats = step_stats(self._windows.partitions.values(), running.step_id)
            verdict = judge(running.rollout, running.status, stats, self._clock.now_ms())
        if isinstance(verdict, Stay):
            self._fences.pop(running.step_id, None)
            return False
        now_ms = self._clock.now_ms()
        return await self._move(revision, replace(running, status=follow(running, verdict, now_ms)), stats, now_ms)

    async def _move(self, revision: Revision, after: Running, stats: StepStats, now_ms: int) -> bool:
        following = await asyncio.to_thread(compile_revision, moved(revision.documents, after.name, after.status))
        record = step_record(
            after, revision=following.id, previous=revision.id, stats=stats, source_topic=self._registry_topic
        )
        encoded = encode_record(record)
        await self._table.put(JUDGING_PARTITION, f"intent|{record.execution_id}", write_intent(following.id, encoded))
        self._intended[record.execution_id] = now_ms
        try:
            message = f"rollout {after.name}: {action_of(after.status)}, {after.percent} %: {after.status.reason}"
            await asyncio.to_thread(self._publish_revision, following, revision.id, now_ms, message)
        except RevisionConflict as error:
            log.info("rollout_overtaken", rollout=str(after.name), reason=str(error))
            return True
        log.info(
            "rollout_moved",
            rollout=str(after.name),
            action=action_of(after.status),
            step=after.status.step,
            percent=after.percent,
            reason=after.status.reason,
            revision=following.id,
            previous=revision.id,
        )
        _STEPS.labels(action_of(after.status)).inc()
        await self._send(record.execution_id, record.request_id, encoded)
        return True

    # --- telling ------------------------------------------------------------------------------------------------------

    async def _tell(self, revision: Revision, rollouts: Sequence[Running]) -> None:
        """Send what was published and is not told in the audit: our own records first, then others' in our words."""
        now_ms = self._clock.now_ms()
        entries = dict(self._table.entries(JUDGING_PARTITION))
        current = {record_id(running.name, running.status): running for running in rollouts}
        for identity in self._tell_at.keys() - current.keys():
            del self._tell_at[identity]
        for identity in [each for each in self._intended if f"intent|{each}" not in entries]:
            del self._intended[identity]
        for key, entry in entries.items():
            kind, _, identity = key.partition("|")
            if kind == "told" and identity not in current:
                # What is told may be of a revision that is not here yet.
                if now_ms - int(entry) >= _MARK_KEPT_MS:
                    await self._table.put(JUDGING_PARTITION, key, None)
            elif kind == "intent" and f"told|{identity}" not in entries:
                await self._tell_intended(key, identity, entry, identity in current, now_ms)
        for identity, running in current.items():
            if f"told|{identity}" in entries or f"intent|{identity}" in entries:
                self._tell_at.pop(identity, None)
                continue
            # Nobody but this worker tells of a start; who gives an order tells of it.
            begins = action_of(running.status) == "start"
            if now_ms >= self._tell_at.setdefault(identity, now_ms if begins else now_ms + TELL_AFTER_MS):
                record = step_record(
                    running, revision=revision.id, previous=None, stats=None, source_topic=self._registry_topic
                )
                await self._send(identity, record.request_id, encode_record(record))
                self._tell_at[identity] = now_ms + TELL_AFTER_MS

    async def _tell_intended(self, key: str, identity: str, entry: bytes, holds: bool, now_ms: int) -> None:
        """An intent that is not told: send it once it is known to be published, forget it if it never was."""
        since = self._intended.setdefault(identity, now_ms)
        if now_ms - since < TELL_AFTER_MS:
            return
        published, encoded = read_intent(entry)
        if holds or await asyncio.to_thread(self._registry.get, published) is not None:
            await self._send(identity, decode_record(encoded).request_id, encoded)
            self._intended[identity] = now_ms
        elif now_ms - since >= _MARK_KEPT_MS:
            await self._table.put(JUDGING_PARTITION, key, None)
            del self._intended[identity]

    async def _send(self, identity: str, request_id: str, encoded: bytes) -> None:
        await self._publisher.publish([audit_record(self._audit_topic, identity, request_id, encoded)])

    # --- keeping house ------------------------------------------------------------------------------------------------

    async def _purge(self) -> None:
        """Delete windows of our partitions that nobody will ask for."""
        revision = self._registry.current
        if revision is None or not self._table.recovered:
            return
        steps = {step_key(running.step_id) for running in rollouts_in(revision.documents)}
        oldest = oldest_kept(self._clock.now_ms())
        for partition in self._windows.partitions:
            if not self._table.owns(partition):
                continue
            for key, _ in list(self._table.entries(partition)):
                named = read_shadow_key(key)
                if (key.startswith("step|") and key not in steps) or (named is not None and named[1] < oldest):
                    await self._table.put(partition, key, None)

    def _show(self, rollouts: Iterable[Running]) -> None:
        _clear(_PERCENT)
        for running in rollouts:
            name = running.name
            _PERCENT.labels(name.route, name.rule, name.task, running.rollout.to).set(running.percent)
        now_ms = self._clock.now_ms()
        if now_ms - self._shown_ms < _SHOW_EVERY_MS:
            return
        self._shown_ms = now_ms
        found = comparisons(self._windows.partitions.values(), oldest_kept(now_ms))
        _clear(*_SHADOW_GAUGES)
        for shadow, comparison in found.items():
            for segment, account in ((_ALL, comparison.overall), *comparison.segments.items()):
                labels = (shadow.route, shadow.task, shadow.version, segment)
                if account.flip_rate is not None:
                    _FLIP_RATE.labels(*labels).set(account.flip_rate)
                for output, pairs in account.outputs.items():
                    if pairs.psi is not None:
                        _PSI.labels(*labels, output).set(pairs.psi)
                    _DIFFERENCE.labels(*labels, output).set(pairs.mean_difference or 0.0)


def _clear(*gauges: Gauge) -> None:
    for gauge in gauges:
        gauge.clear()


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
