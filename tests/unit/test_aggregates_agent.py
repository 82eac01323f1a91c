"""The features worker's aggregates, in memory: whatever dies when, each event counts once; windows slide by time."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.agents.aggregates import Aggregates, entry_key
from app.agents.features import FeatureUpdates
from app.domain.aggregates import State, write_state
from app.domain.errors import NotOwner, PublishFailed, StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, Fetched, ViewNeed
from app.domain.requests import InboundRecord
from app.domain.view_documents import FeatureViewSpec
from app.ports.log import OutboundRecord
from tests.support.memory_audit import Crash
from tests.support.memory_feature_store import MemoryFeatureStore
from tests.support.request_reply import FixedClock
from tests.support.virtual_time import in_virtual_time

HOUR_MS = 3_600_000
VIEW = FeatureViewSpec.model_validate_json(
    """{"entities": [{"name": "id", "type": "INT64"}], "features": [{"name": "amount", "type": "DOUBLE"}],
        "source": {"type": "redis", "project": "p"},
        "aggregate": [{"of": "amount", "op": "sum", "windows": ["1h", "24h"]}, {"op": "count", "windows": ["1h"]}]}"""
)
NAMES = tuple(VIEW.types)
MISSING = Fetched(FeatureStatus.MISSING)


@dataclass
class World:
    """What outlives a worker: the log, the table, the store. ``dies_at`` counts its writes, of either kind."""

    clock: FixedClock = field(default_factory=FixedClock)
    store: MemoryFeatureStore = field(default_factory=MemoryFeatureStore)
    entries: dict[int, dict[str, bytes]] = field(default_factory=lambda: {0: {}, 1: {}})
    log: list[InboundRecord] = field(default_factory=list)
    letters: list[OutboundRecord] = field(default_factory=list)
    committed: int = 0
    dies_at: int | None = None
    after: bool = False

    def send(self, amount: float | None, *, ago_ms: int = 0, id_: str | None = None, values: Any = ...) -> None:
        """An update of entity 17."""
        body = {
            "project": "p",
            "view": "v",
            "entities": {"id": 17},
            "values": {"amount": amount} if values is ... else values,
            "event_time": self.clock.now - ago_ms,
        }
        headers = (("update-id", id_.encode()),) if id_ else ()
        value = orjson.dumps(body)
        self.log.append(InboundRecord("features.updates", 0, len(self.log), self.clock.now, b"17", value, headers))

    def write(self) -> Any:
        """A context in which a write may be a worker's last."""
        return _Write(self)

    async def features(self) -> dict[str, Fetched]:
        """What the store holds of entity 17."""
        key = EntityKey("p", ("id",), (17,), ("INT64",))
        found = await self.store.fetch([ViewNeed("v", key, NAMES, tuple(VIEW.types.values()))], 1)
        return {name: found["v", name] for name in NAMES}

    async def values(self) -> list[Any]:
        """Their values."""
        return [each.value for each in (await self.features()).values()]


@dataclass
class _Write:
    world: World

    def __enter__(self) -> None:
        if self.world.dies_at == 0 and not self.world.after:
            self.world.dies_at = None
            raise Crash

    def __exit__(self, *_: object) -> None:
        if self.world.dies_at == 0:
            self.world.dies_at = None
            raise Crash
        if self.world.dies_at is not None:
            self.world.dies_at -= 1


@dataclass
class Table:
    """The durable table."""

    world: World
    refuses: list[Exception] = field(default_factory=list)

    def owns(self, partition: int) -> bool:
        """All."""
        return True

    async def settled(self, partition: int) -> None:
        """At once."""

    def get(self, partition: int, request_id: str) -> bytes | None:
        """See ports.log.JoinTable."""
        return self.world.entries[partition].get(request_id)

    def entries(self, partition: int) -> Iterable[tuple[str, bytes]]:
        """All of a partition."""
        return self.world.entries[partition].items()

    async def put(self, partition: int, request_id: str, entry: bytes | None) -> None:
        """See ports.log.JoinTable."""
        if self.refuses:
            raise self.refuses.pop()
        with self.world.write():
            if entry is None:
                self.world.entries[partition].pop(request_id, None)
            else:
                self.world.entries[partition][request_id] = entry


@dataclass
class Writer:
    """The store, whose writes may be a worker's last."""

    world: World

    async def write(self, rows: Sequence[FeatureRow]) -> int:
        """See FeatureWriter."""
        with self.world.write():
            return await self.world.store.write(rows)


@dataclass
class Letters:
    """The dead-letter topic."""

    world: World

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See Publisher."""
        self.world.letters += records
        return range(len(records))


class Worker:
    """One life of a worker, which owns partition 0 and 1."""

    def __init__(self, world: World, views: dict[str, FeatureViewSpec] | None = None) -> None:
        self.world = world
        self.views = {"v": VIEW} if views is None else views
        self.table = Table(world)
        self.aggregates = Aggregates(
            table=self.table, writer=Writer(world), views=lambda: self.views, clock=world.clock
        )
        self.updates = FeatureUpdates(
            writer=Writer(world),
            publisher=Letters(world),
            views=lambda: self.views,
            group="features",
            clock=world.clock,
            aggregates=self.aggregates,
            retry_delays_s=(0.0,),
        )
        self.aggregates.on_ownership(frozenset((0, 1)), frozenset((0, 1)))

    async def work(self, most: int = 1_000, *, partition: int = 0) -> None:
        """Handle what is not committed."""
        batch = self.world.log[self.world.committed :][:most]
        if batch:
            await self.updates.handle(partition, batch)
            self.world.committed += len(batch)


async def test_values_are_written_beside_the_update_s_own() -> None:
    """The update's features have its time; the aggregates have that of their computation."""
    world = World()
    world.send(2.0, ago_ms=90_000)
    world.send(3.0, ago_ms=60_000)
    await Worker(world).work()
    assert await world.values() == [3.0, 5.0, 5.0, 2]
    found = await world.features()
    assert found["amount"].event_time_ms == world.clock.now - 60_000
    assert found["count_1h"].event_time_ms == world.clock.now


async def test_an_entry_that_cannot_be_read_is_told_and_not_computed_from() -> None:
    """The store keeps its last values, and no tick takes the entry away; its next update counts from nothing."""
    world = World()
    world.send(2.0)
    await Worker(world).work()
    text = entry_key("v", EntityKey("p", ("id",), (17,), ("INT64",)))
    reply = b'{"request_id":"r","status":"completed"}'
    world.entries[0] |= {text: reply, "17": reply, "[]": reply}
    world.entries[1]["17"] = write_state(State(written_ms=world.clock.now))
    world.clock.now += 2 * HOUR_MS
    worker = Worker(world)
    with capture_logs() as logs:
        await worker.aggregates.tick()
        await worker.aggregates.tick()
    assert sorted((each["event"], each["entry"]) for each in logs) == [
        ("aggregates_entry_unreadable", each) for each in sorted((text, "17", "[]"))
    ]
    assert await world.values() == [2.0, 2.0, 2.0, 1]
    assert world.entries[0][text] == reply
    world.send(5.0)
    with capture_logs() as logs:
        await worker.work()
    assert ("aggregates_entry_unreadable", text) in [(each["event"], each.get("entry")) for each in logs]
    assert await world.values() == [5.0, 5.0, 5.0, 1]


async def test_a_window_slides_with_no_new_event() -> None:
    """A tick writes what left a window, and nothing before; in the end the entry goes, and zero stays."""
    world = World()
    world.send(2.0)
    worker = Worker(world)
    await worker.work()
    assert await worker.aggregates.tick() == 0
    world.clock.now += HOUR_MS - 1
    await worker.aggregates.tick()
    assert (await world.values())[1:] == [2.0, 2.0, 1]
    world.clock.now += 60_001
    assert await worker.aggregates.tick() == 1
    assert await world.values() == [2.0, 0.0, 2.0, 0]
    assert (await world.features())["amount_sum_24h"].event_time_ms == world.clock.now
    world.clock.now += 24 * HOUR_MS
    await worker.aggregates.tick()
    assert await world.values() == [2.0, 0.0, 0.0, 0]
    assert world.entries[0] == {}
    world.clock.now += 24 * HOUR_MS
    assert await worker.aggregates.tick() == 0


async def test_what_stands_is_written_anew_so_that_its_age_is_true() -> None:
    """While an entity has events in a window its values are never older than the window's tile."""
    world = World()
    world.send(2.0)
    worker = Worker(world)
    await worker.work()
    for _ in range(8):
        world.clock.now += 900_000
        await worker.aggregates.tick()
        assert (await world.features())["amount_sum_24h"].event_time_ms == world.clock.now


async def test_clocks_that_differ_do_not_lose_a_value() -> None:
    """A worker whose clock is behind still writes a newer computation than the one before it."""
    world = World()
    world.send(2.0)
    await Worker(world).work()
    world.clock.now -= 60_000
    world.send(3.0)
    await Worker(world).work()
    assert await world.values() == [2.0, 5.0, 5.0, 2]


async def test_a_tombstone_takes_the_aggregates_too() -> None:
    """Nothing is left of the entity, older updates stay out, and newer ones begin anew."""
    world = World()
    worker = Worker(world)
    world.send(2.0, ago_ms=200_000)
    world.send(None, ago_ms=100_000, values=None)
    await worker.work()
    assert list((await world.features()).values()) == [MISSING] * 4
    world.send(4.0, ago_ms=150_000)
    world.send(5.0, ago_ms=50_000)
    await worker.work()
    assert await world.values() == [5.0, 5.0, 5.0, 1]


async def test_a_tombstone_of_a_moment_ahead() -> None:
    """A producer's clock is a minute ahead: the aggregates go all the same, and come back with a newer event."""
    world = World()
    worker = Worker(world)
    world.send(2.0)
    world.send(None, ago_ms=-60_000, values=None)
    await worker.work()
    assert list((await world.features()).values()) == [MISSING] * 4
    world.send(5.0, ago_ms=-61_000)
    await worker.work()
    assert await world.values() == [5.0, 5.0, 5.0, 1]


async def test_an_id_counts_once_and_late_events_do_not() -> None:
    """Duplicates within the lateness are known by their id; what is later than it is not counted."""
    world = World()
    worker = Worker(world)
    for _ in range(3):
        world.send(2.0, id_="a" * 100)
    world.send(1.0, ago_ms=HOUR_MS + 1)
    await worker.work()
    world.send(2.0, id_="a" * 100)
    await worker.work()
    assert await world.values() == [2.0, 2.0, 2.0, 1]


async def test_a_record_without_a_key_is_refused() -> None:
    """It could lie in any partition, each of which would count a part."""
    world = World()
    world.send(2.0)
    [record] = world.log
    world.log = [InboundRecord(record.topic, 0, 0, record.timestamp_ms, None, record.value, ())]
    await Worker(world).work()
    [letter] = world.letters
    assert b"has no key" in dict(letter.headers)["kafka_dlt-exception-message"]
    assert await world.values() == [None] * 4


async def test_an_entity_in_two_partitions_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever keys updates otherwise sees it in the log."""
    world = World()
    worker = Worker(world)
    world.send(2.0)
    await worker.work()
    world.send(2.0)
    await worker.work(partition=1)
    assert "aggregates_split" in capsys.readouterr().out


@in_virtual_time
async def test_a_batch_waits_for_the_table() -> None:
    """While Kafka refuses entries the batch is tried again, and nothing counts twice."""
    world = World()
    worker = Worker(world)
    worker.table.refuses = [PublishFailed("away"), PublishFailed("away")]
    world.send(2.0)
    await worker.work()
    assert await world.values() == [2.0, 2.0, 2.0, 1]
    worker.table.refuses = [NotOwner("another's")]
    world.send(2.0)
    with pytest.raises(NotOwner):
        await worker.work()


async def test_a_tick_survives_what_is_away() -> None:
    """What could not be written is due again a second later; a partition that is lost is left alone."""
    world = World()
    worker = Worker(world)
    world.send(2.0)
    await worker.work()
    world.clock.now += HOUR_MS + 60_000
    world.store.available = False
    await worker.aggregates.tick()
    world.store.available = True
    assert await worker.aggregates.tick() == 0
    world.clock.now += 1_000
    assert await worker.aggregates.tick() == 1
    assert (await world.values())[1:] == [0.0, 2.0, 0]
    worker.aggregates.on_ownership(frozenset(), frozenset())
    world.clock.now += 48 * HOUR_MS
    assert await worker.aggregates.tick() == 0


async def test_a_view_that_is_gone_keeps_its_entries_for_a_while() -> None:
    """A rollback finds them; after a week they are dropped."""
    world = World()
    world.send(2.0)
    await Worker(world).work()
    without = Worker(world, {})
    world.clock.now += HOUR_MS
    await without.aggregates.tick()
    assert len(world.entries[0]) == 1
    world.clock.now += 8 * 24 * HOUR_MS
    await without.aggregates.tick()
    assert world.entries[0] == {}


async def test_a_damaged_entry_begins_anew() -> None:
    """It is told, and does not stop the worker."""
    world = World()
    world.entries[0][entry_key("v", EntityKey("p", ("id",), (17,), ("INT64",)))] = b"?"
    world.send(2.0)
    await Worker(world).work()
    assert await world.values() == [2.0, 2.0, 2.0, 1]


async def _lives(amounts: Sequence[int], lives: Sequence[tuple[int, int, bool, int]]) -> None:
    world = World()
    start = world.clock.now
    for number, amount in enumerate(amounts):
        world.send(float(amount), ago_ms=1_000 * number)
    for most, dies_at, after, passes_ms in lives:
        world.dies_at, world.after = dies_at, after
        try:
            worker = Worker(world)
            await worker.work(most)
            world.clock.now += passes_ms
            await worker.aggregates.tick()
            await worker.work(most)
        except (Crash, StoreUnavailable):
            pass
    world.dies_at = None
    last = Worker(world)
    await last.work()
    await last.aggregates.tick()
    total = float(sum(amounts))
    in_hour = world.clock.now < start - len(amounts) * 1_000 + HOUR_MS
    found = await world.values()
    assert found[2] == total
    if in_hour:
        assert found[1:] == [total, total, len(amounts)]
    assert found[0] == float(amounts[0])


@settings(max_examples=120, deadline=None)
@given(
    amounts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    lives=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.booleans(), st.integers(0, 700_000)), max_size=8),
)
def test_each_event_counts_once_whatever_dies_when(
    amounts: Sequence[int], lives: Sequence[tuple[int, int, bool, int]]
) -> None:
    """Workers die before or after any write, again and again; the last one ends with the exact sums."""
    asyncio.run(_lives(amounts, lives))
