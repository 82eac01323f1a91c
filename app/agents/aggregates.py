"""Windowed aggregates in the features worker: a view's updates in, its computed features out.

Each entity has one entry in a durable table, in the partition that its updates come in: tiles, and the offset up to
which they count (``app.domain.aggregates``). A batch's entries are written, and acknowledged by Kafka, before the batch
is; so a worker that dies loses no event, and what comes again is counted already.

**Values are true as of a moment**, which is their event time: that of the computation. It only grows, and the entry
keeps it, so that in the store the newer computation wins whoever made it. A window slides as time passes: ``run``
recomputes, once a second, the entries of which a tile leaves a window, or whose values have not been written for
long. It takes ``KEYS_A_TICK`` at most. Who gains a partition recomputes all its entries, for the worker before may
have died between an entry and the store.

One entity's updates must lie in one partition, so they need the entity as their record's key: two partitions would
each count a part. Records without a key are refused, and an entity that is seen in two partitions is told.
"""

import asyncio
import hashlib
import heapq
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import orjson
import structlog
from prometheus_client import Counter, Gauge

from app.domain.aggregates import Event, Outcome, Plan, State, is_state, read_state, write_state
from app.domain.errors import NotOwner, PublishFailed, RowsRefused, StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey
from app.domain.requests import InboundRecord
from app.domain.view_documents import FeatureViewSpec
from app.ports.clock import Clock
from app.ports.feature_store import FeatureWriter
from app.ports.log import JoinTable

log = structlog.get_logger()

UPDATE_ID_HEADER: Final = "update-id"
KEYS_A_TICK: Final = 2_000
TICK_S: Final = 1.0
_KEYS_AT_ONCE: Final = 200
"""Between two batches of recomputations the event loop is free for what arrives."""
_RETRY_MS: Final = 1_000
_ORPHANS_KEPT_MS: Final = 7 * 86_400_000
"""As long as updates are kept: a view that comes back later can be loaded again."""
_ORPHANS_CHECKED_MS: Final = 3_600_000
_ID_LENGTH_MAX: Final = 64

_EVENTS = Counter(
    "broker_feature_events",
    "Updates of views with aggregates, by outcome: counted, late, duplicate, again",
    ["outcome"],
)
_COMPUTED = Counter("broker_feature_aggregates", "Entities whose aggregates were computed, by cause", ["cause"])
_SPLIT = Counter("broker_feature_aggregates_split", "Entities with updates in several partitions: aggregates are wrong")
_OVERDUE = Gauge("broker_feature_aggregates_overdue", "Entities whose aggregates should have been computed by now")

Views = Callable[[], Mapping[str, FeatureViewSpec] | None]
_Put = tuple[str, bytes | None, int]
"""An entry to write: its key, itself (None deletes it), and when it is due."""


class AggregatesTable(JoinTable, Protocol):
    """The durable table of entries, of the partitions that this worker owns."""

    def owns(self, partition: int) -> bool:
        """Whether the partition is this worker's."""
        ...

    async def settled(self, partition: int) -> None:
        """Wait while a rebalance runs; NotOwner unless the partition is ours after it."""
        ...

    def entries(self, partition: int) -> Iterable[tuple[str, bytes]]:
        """The entries of one partition."""
        ...


def entry_key(view: str, key: EntityKey) -> str:
    """The table's key of an entity's entry.

    >>> entry_key("applicant", EntityKey("credit", ("applicant_id",), (17,), ("INT64",)))
    '["applicant","credit",17]'
    """
    return orjson.dumps([view, key.project, *key.values]).decode()


def _parts(text: str) -> tuple[str, str, list[Any]]:
    """View, project and entity of an entry's key; ValueError for what ``entry_key`` does not write."""
    found = orjson.loads(text)
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(each, str) for each in found[:2]):
        raise ValueError("a key is a JSON list: view, project and entity")
    return found[0], found[1], found[2:]


def check_entry(text: str, entry: bytes) -> None:
    """That these are a key and an entry of the table, as far as recovery looks; ValueError where they are not."""
    _parts(text)
    if not is_state(entry):
        raise ValueError("an entry is a compressed state")


def _read_key(text: str, views: Mapping[str, FeatureViewSpec]) -> tuple[str, FeatureViewSpec, EntityKey] | None:
    """What an entry is of; None where the registry has no such view any more, or there never was one."""
    try:
        name, project, values = _parts(text)
    except ValueError:
        return None
    view = views.get(name)
    if view is None or view.plan is None or view.project != project:
        return None
    entities = view.sorted_entities
    if len(entities) != len(values):
        return None
    names, types = tuple(each.name for each in entities), tuple(each.type for each in entities)
    return name, view, EntityKey(project, names, tuple(values), types)


class Aggregates:
    """The aggregates of the partitions that this worker owns; ``views`` are the registry's, None while unknown."""

    def __init__(self, *, table: AggregatesTable, writer: FeatureWriter, views: Views, clock: Clock) -> None:
        self._table = table
        self._writer = writer
        self._views = views
        self._clock = clock
        self._locks: dict[int, asyncio.Lock] = {}
        self._due: dict[int, dict[str, int]] = {}
        self._queue: dict[int, list[tuple[int, str]]] = {}

    # --- what arrives -------------------------------------------------------------------------------------------------

    async def count(self, partition: int, updates: Sequence[tuple[InboundRecord, FeatureRow]]) -> list[FeatureRow]:
        """Count a batch's updates; returns the rows to store once the table has their entries.

        Doing it again, with the same batch, counts nothing twice and returns the rows anew.

        Raises:
            NotOwner, PublishFailed: see ``ports.log.JoinTable``.
        """
        views = self._views() or {}
        by_entry: dict[str, list[tuple[InboundRecord, FeatureRow]]] = {}
        for record, row in updates:
            view = views.get(row.view)
            if view is not None and view.plan is not None:
                by_entry.setdefault(entry_key(row.view, row.key), []).append((record, row))
        if not by_entry:
            return []
        outcomes: Tally[Outcome] = Tally()
        rows: list[FeatureRow] = []
        async with self._lock(partition):
            await self._table.settled(partition)
            puts: list[_Put] = []
            for text, entity_updates in by_entry.items():
                row = entity_updates[0][1]
                plan = _plan_of(views[row.view])
                # Of an entry that cannot be read nothing is known, and it is told that its aggregates begin anew.
                state = self._state(partition, text, new=True) or State()
                for record, update in entity_updates:
                    outcomes[_feed(plan, state, record, update)] += 1
                computed, due_ms = self._compute(plan, views[row.view], row.view, row.key, state)
                rows.append(computed)
                puts.append((text, write_state(state), due_ms))
            await self._put(partition, puts)
        for outcome, number in outcomes.items():
            _EVENTS.labels(outcome).inc(number)
        _COMPUTED.labels("update").inc(len(rows))
        if outcomes[Outcome.LATE]:
            log.warning("feature_events_late", partition=partition, late=outcomes[Outcome.LATE])
        return rows

    def _lock(self, partition: int) -> asyncio.Lock:
        return self._locks.setdefault(partition, asyncio.Lock())

    def _state(self, partition: int, text: str, *, new: bool) -> State | None:
        """The entry's state; None, and a line in the log, where it cannot be read."""
        entry = self._table.get(partition, text)
        if entry is None:
            if new:
                self._tell_if_split(partition, text)
            return State()
        try:
            return read_state(entry)
        except ValueError as error:
            log.error(  # noqa: TRY400 - what was read says more than where
                "aggregates_entry_unreadable",
                partition=partition,
                entry=text,
                reason=str(error),
                hint="the store keeps the entity's last values until its next update, which counts from nothing: send "
                "the updates of its windows again",
            )
            return None

    def _tell_if_split(self, partition: int, text: str) -> None:
        for other in self._due:
            if other != partition and self._table.get(other, text) is not None:
                _SPLIT.inc()
                log.warning(
                    "aggregates_split",
                    entry=text,
                    partitions=sorted((partition, other)),
                    hint="updates of one entity need one record key, the entity's",
                )
                return

    def _compute(
        self, plan: Plan, view: FeatureViewSpec, name: str, key: EntityKey, state: State
    ) -> tuple[FeatureRow, int]:
        """The row of a state as of now, and when it has to be computed anew."""
        as_of_ms = plan.as_of_ms(state, self._clock.now_ms())
        values = plan.values(state, as_of_ms)
        state.written_ms = as_of_ms
        due_ms = plan.due_ms(state, as_of_ms)
        if state.deleted:
            # The tombstone itself keeps out what is older, of the view's other features; this only takes away.
            row = FeatureRow(name, key, (), (), (), as_of_ms, plan.names, tombstone=True, guards=False, ttl_ms=view.ttl)
        else:
            row = FeatureRow(name, key, plan.names, values, plan.types, as_of_ms, tuple(view.declared), ttl_ms=view.ttl)
        return row, due_ms

    async def _put(self, partition: int, puts: Sequence[_Put]) -> None:
        """Write entries, together; each is on the schedule once it is written."""
        done = await asyncio.gather(
            *(self._table.put(partition, text, entry) for text, entry, _ in puts), return_exceptions=True
        )
        for (text, entry, due_ms), failed in zip(puts, done, strict=True):
            if failed is None:
                self._schedule(partition, text, None if entry is None else due_ms)
        for failed in done:
            if failed is not None:
                raise failed

    # --- what time does -----------------------------------------------------------------------------------------------

    def on_ownership(self, owned: frozenset[int], gained: frozenset[int]) -> None:
        """Follow a rebalance: what is gained is due at once."""
        for partition in set(self._due) - owned:
            del self._due[partition], self._queue[partition]
        now_ms = self._clock.now_ms()
        for partition in gained:
            self._due[partition], self._queue[partition] = {}, []
            for text, _ in self._table.entries(partition):
                self._schedule(partition, text, now_ms)
        for partition in owned - set(self._due):
            self._due[partition], self._queue[partition] = {}, []

    def _schedule(self, partition: int, text: str, due_ms: int | None) -> None:
        due = self._due.get(partition)
        if due is None:
            return
        if due_ms is None:
            due.pop(text, None)
            return
        due[text] = due_ms
        queue = self._queue[partition]
        heapq.heappush(queue, (due_ms, text))
        if len(queue) > 4 * len(due) + 1_000:
            # Entries that change often leave their earlier places behind.
            self._queue[partition] = [(at, each) for each, at in due.items()]
            heapq.heapify(self._queue[partition])

    def _take_due(self, partition: int, now_ms: int, most: int) -> list[str]:
        due, queue, taken = self._due[partition], self._queue[partition], list[str]()
        while queue and queue[0][0] <= now_ms and len(taken) < most:
            at, text = heapq.heappop(queue)
            if due.get(text) == at:
                del due[text]
                taken.append(text)
        return taken

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            await self.tick()

    async def tick(self) -> int:
        """Recompute what is due, ``KEYS_A_TICK`` entries at most; how many there were. What fails is due again soon."""
        now_ms, views, left = self._clock.now_ms(), self._views(), KEYS_A_TICK
        if views is None:
            return 0
        for partition in tuple(self._due):
            while left and partition in self._due:
                texts = self._take_due(partition, now_ms, min(left, _KEYS_AT_ONCE))
                if not texts:
                    break
                left -= len(texts)
                try:
                    await self._recompute(partition, texts, views)
                except NotOwner:
                    break
                except (StoreUnavailable, PublishFailed) as error:
                    log.warning("aggregates_wait", partition=partition, reason=str(error))
                    for text in texts:
                        self._schedule(partition, text, now_ms + _RETRY_MS)
                    break
        waiting = any(queue and queue[0][0] <= now_ms for queue in self._queue.values())
        _OVERDUE.set(sum(at <= now_ms for due in self._due.values() for at in due.values()) if waiting else 0)
        return KEYS_A_TICK - left

    async def _recompute(self, partition: int, texts: Sequence[str], views: Mapping[str, FeatureViewSpec]) -> None:
        async with self._lock(partition):
            await self._table.settled(partition)
            rows: list[FeatureRow] = []
            puts: list[_Put] = []
            over: list[_Put] = []
            for text in texts:
                if self._table.get(partition, text) is None:
                    continue
                state = self._state(partition, text, new=False)
                if state is None:
                    # To compute from nothing would put zeros over what is true; its next update has to.
                    continue
                found = _read_key(text, views)
                if found is None:
                    # A view may come back by a rollback, so its entries stay as long as any may matter.
                    self._put_off(partition, text, state, over)
                    continue
                name, view, key = found
                plan = _plan_of(view)
                row, due_ms = self._compute(plan, view, name, key, state)
                rows.append(row)
                if plan.over(state, state.written_ms):
                    over.append((text, None, 0))
                else:
                    puts.append((text, write_state(state), due_ms))
            await self._put(partition, puts)
            if rows:
                try:
                    await self._writer.write(rows)
                except RowsRefused as error:
                    # The next computation tries them again; until then they are stale, and are refused as such.
                    log.error("feature_aggregates_refused", partition=partition, reason=str(error))  # noqa: TRY400
            # Only now, for an entry that is gone is never computed again.
            await self._put(partition, over)
        _COMPUTED.labels("time").inc(len(rows))

    def _put_off(self, partition: int, text: str, state: State, over: list[_Put]) -> None:
        now_ms = self._clock.now_ms()
        if now_ms - max(state.written_ms, state.watermark_ms) > _ORPHANS_KEPT_MS:
            over.append((text, None, 0))
        else:
            self._schedule(partition, text, now_ms + _ORPHANS_CHECKED_MS)


def _plan_of(view: FeatureViewSpec) -> Plan:
    assert view.plan is not None  # noqa: S101 - only views with aggregates have entries
    return view.plan


def _feed(plan: Plan, state: State, record: InboundRecord, update: FeatureRow) -> Outcome:
    if update.tombstone:
        return plan.delete(state, record.offset, update.event_time_ms)
    values: dict[str, Any] = dict(zip(update.names, update.values, strict=True))
    return plan.feed(state, Event(record.offset, update.event_time_ms, values, _update_id(record)))


def _update_id(record: InboundRecord) -> str | None:
    given = next((value for name, value in record.headers if name == UPDATE_ID_HEADER), b"")
    if len(given) > _ID_LENGTH_MAX:
        return hashlib.blake2b(given, digest_size=_ID_LENGTH_MAX // 2).hexdigest()
    return given.decode(errors="backslashreplace") or None
