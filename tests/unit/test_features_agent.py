"""The features worker's batches: stored or buried, never dropped."""

import asyncio
from collections.abc import Mapping, Sequence

import orjson
import pytest

from app.adapters.avro import AvroCodec
from app.agents.features import FeatureUpdates
from app.domain.errors import PublishFailed, RowsRefused, StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, Value, ViewNeed
from app.domain.graces import Graces
from app.domain.requests import InboundRecord
from app.domain.view_documents import FeatureViewSpec
from app.ports.log import OutboundRecord
from tests.support.memory_feature_store import MemoryFeatureStore

NOW_MS = 1_700_000_000_000
VIEW = FeatureViewSpec.model_validate_json(
    """{"entities": [{"name": "applicant_id", "type": "INT64"}], "features": [{"name": "age", "type": "INT64"}],
        "source": {"type": "redis", "project": "credit"}}"""
)
KEY = EntityKey("credit", ("applicant_id",), (17,), ("INT64",))


class StillClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.ms = NOW_MS

    def now_ms(self) -> int:
        """See Clock."""
        return self.ms

    def steady_ms(self) -> float:
        """See Clock."""
        return self.ms


class FailingLog:
    """A publisher that refuses the first ``failures`` times."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.records: list[OutboundRecord] = []

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See Publisher."""
        if self.failures:
            self.failures -= 1
            raise PublishFailed("the broker is away")
        self.records += records
        return range(len(records))


class FlakyStore(MemoryFeatureStore):
    """A store that refuses the first ``failures`` writes."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    async def write(self, rows: Sequence[FeatureRow]) -> int:
        """See FeatureWriter."""
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("switched off")
        return await super().write(rows)


class BlockedStore(MemoryFeatureStore):
    """A store in which something that is no row stands in the place of applicant 18."""

    async def write(self, rows: Sequence[FeatureRow]) -> int:
        """See FeatureWriter."""
        sound = [row for row in rows if row.key.values != (18,)]
        written = await super().write(sound)
        if len(sound) < len(rows):
            raise RowsRefused({rows.index(row): "no row" for row in rows if row not in sound}, written)
        return written


def body(age: object = 41, *, view: str = "applicant", time_ms: int = NOW_MS) -> dict[str, object]:
    """An update of applicant 17."""
    return {
        "project": "credit",
        "view": view,
        "entities": {"applicant_id": 17},
        "values": {"age": age},
        "event_time": time_ms,
    }


def record(value: bytes | None, offset: int = 0, timestamp_ms: int = NOW_MS - 60_000) -> InboundRecord:
    """A record of the updates topic."""
    return InboundRecord("features.updates", 0, offset, timestamp_ms, b"k", value, ())


def worker(
    store: MemoryFeatureStore,
    log: FailingLog,
    views: dict[str, FeatureViewSpec] | None = None,
    clock: StillClock | None = None,
) -> FeatureUpdates:
    """A worker under the registry ``views``; the one view where that is None."""
    known: Mapping[str, FeatureViewSpec] = {"applicant": VIEW} if views is None else views
    return FeatureUpdates(
        writer=store,
        publisher=log,
        views=lambda: known or None,
        group="features",
        clock=clock or StillClock(),
        retry_delays_s=(0.0,),
    )


async def age_of(store: MemoryFeatureStore) -> Value:
    """What the store says."""
    return (await store.fetch([ViewNeed("applicant", KEY, ("age",), ("INT64",))], 1))["applicant", "age"].value


async def test_json_and_avro_are_stored() -> None:
    """Both encodings of an update become the same row; the later event time stands."""
    store, log = MemoryFeatureStore(), FailingLog()
    avro = AvroCodec("FeatureUpdate").encode(body(42, time_ms=NOW_MS + 1))
    await worker(store, log).handle(0, [record(avro), record(orjson.dumps(body(41)), 1)])
    assert await age_of(store) == 42
    assert log.records == []


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"\xff\xfe",
        b"[1]",
        b"{}",
        b"\xc3\x01garbage",
        orjson.dumps(body("old")),
        orjson.dumps(body(view="x")),
        orjson.dumps(body(time_ms=NOW_MS + 3_600_000)),
    ],
)
async def test_what_cannot_be_stored_is_buried_and_holds_up_nobody(value: bytes | None) -> None:
    """A bad record in the middle of a batch goes to the dead-letter topic as it came; its neighbours are stored."""
    store, log = MemoryFeatureStore(), FailingLog()
    good = [record(orjson.dumps(body(age, time_ms=NOW_MS + age)), age) for age in (1, 3)]
    await worker(store, log).handle(0, [good[0], record(value, 2), good[1]])
    assert await age_of(store) == 3
    [letter] = log.records
    assert (letter.topic, letter.value, letter.partition) == ("features.updates-dlt", value, 0)
    assert dict(letter.headers)["kafka_dlt-original-offset"] == (2).to_bytes(8, "big")
    assert dict(letter.headers)["kafka_dlt-exception-message"]


async def test_a_row_that_no_repetition_stores_is_buried() -> None:
    """An entity's place in the store that others have taken costs its own update, and neither the batch nor its end."""
    store, log = BlockedStore(), FailingLog()
    blocked = orjson.dumps(body(7) | {"entities": {"applicant_id": 18}})
    batch = [record(b"?", 1), record(orjson.dumps(body(41)), 2), record(blocked, 3)]
    async with asyncio.timeout(5):
        await worker(store, log).handle(0, batch)
    assert await age_of(store) == 41
    assert [letter.value for letter in log.records] == [b"?", blocked]
    assert dict(log.records[1].headers)["kafka_dlt-exception-message"] == b"no row"


async def test_a_batch_waits_for_its_store_and_its_log() -> None:
    """While the store or Kafka refuses, the batch is tried again; it returns when both have acknowledged."""
    store, log = FlakyStore(failures=7), FailingLog(failures=7)
    await worker(store, log).handle(0, [record(orjson.dumps(body(41))), record(b"?", 1)])
    assert await age_of(store) == 41
    assert len(log.records) == 1


async def test_an_update_waits_for_the_revision_it_overtook() -> None:
    """A young update of an unknown view is stored once the registry knows the view."""
    store, log, views = MemoryFeatureStore(), FailingLog(), dict[str, FeatureViewSpec]()
    updates = worker(store, log, views)
    batch = asyncio.create_task(updates.handle(0, [record(orjson.dumps(body()), timestamp_ms=NOW_MS)]))
    await asyncio.sleep(0)
    assert not batch.done()
    views["other"] = VIEW
    await asyncio.sleep(0)
    views["applicant"] = VIEW
    await asyncio.wait_for(batch, 5)
    assert await age_of(store) == 41
    assert log.records == []


async def test_an_update_of_a_clock_ahead_waits_too() -> None:
    """As far ahead as event times may be, and for no longer than any other; past that it is buried at once."""
    for ahead_ms, waits in ((1, True), (300_000, True), (300_001, False)):
        store, log, clock = MemoryFeatureStore(), FailingLog(), StillClock()
        updates = worker(store, log, {"other": VIEW}, clock)
        early = record(orjson.dumps(body()), timestamp_ms=NOW_MS + ahead_ms)
        batch = asyncio.create_task(updates.handle(0, [early]))
        await asyncio.sleep(0.01)
        assert batch.done() is not waits
        clock.ms += 5_000
        await asyncio.wait_for(batch, 5)
        assert len(log.records) == 1


async def test_an_old_backlog_of_wrong_names_leaves_new_ones_their_grace() -> None:
    """It waits for nothing, so it spends nothing, and fills no memory of names."""
    store, log, clock, views = MemoryFeatureStore(), FailingLog(), StillClock(), {"other": VIEW}
    updates = worker(store, log, views, clock)
    for at in range(60):
        clock.ms += 100
        wrong = [
            record(orjson.dumps(body(view=f"wrong{at}-{each}")), timestamp_ms=NOW_MS - 600_000) for each in range(20)
        ]
        await asyncio.wait_for(updates.handle(0, wrong), 5)
    batch = asyncio.create_task(updates.handle(0, [record(orjson.dumps(body()), timestamp_ms=clock.ms)]))
    await asyncio.sleep(0.01)
    assert not batch.done()
    views["applicant"] = VIEW
    await asyncio.wait_for(batch, 5)
    assert await age_of(store) == 41


async def test_the_wait_for_a_revision_ends() -> None:
    """When the registry has not learnt the view by the end of the grace, the update is buried."""
    store, log, clock = MemoryFeatureStore(), FailingLog(), StillClock()
    updates = worker(store, log, {"other": VIEW}, clock)
    batch = asyncio.create_task(updates.handle(0, [record(orjson.dumps(body()), timestamp_ms=NOW_MS)]))
    await asyncio.sleep(0)
    assert not batch.done()
    clock.ms += 5_000
    await asyncio.wait_for(batch, 5)
    assert len(log.records) == 1


async def test_a_wrong_name_holds_up_the_others_once() -> None:
    """A producer that goes on with a view that there is not costs its partition one grace; the others go on at once."""
    store, log, clock = MemoryFeatureStore(), FailingLog(), StillClock()
    updates = worker(store, log, clock=clock)

    def batch(number: int) -> list[InboundRecord]:
        wrong = [
            body(view="aplicant"),
            body() | {"values": {"agee": 1}},
            body() | {"project": "debit"},
        ]
        sound = body(number, time_ms=NOW_MS + number)
        return [record(orjson.dumps(each), at, clock.ms) for at, each in enumerate([*wrong, sound])]

    first = asyncio.create_task(updates.handle(0, batch(1)))
    await asyncio.sleep(0)
    assert not first.done()
    clock.ms += 5_000
    await asyncio.wait_for(first, 5)
    for number in range(2, 5):
        clock.ms += 30_000
        await asyncio.wait_for(updates.handle(0, batch(number)), 0.05)
        assert await age_of(store) == number
    assert len(log.records) == 3 * 4
    clock.ms += 60_000
    again = asyncio.create_task(updates.handle(0, batch(9)))
    await asyncio.sleep(0)
    assert not again.done()
    clock.ms += 5_000
    await asyncio.wait_for(again, 5)


async def test_a_wrong_name_is_known_at_once_once_it_is_right() -> None:
    """A name whose grace is over is stored as soon as a revision declares it."""
    store, log, clock = MemoryFeatureStore(), FailingLog(), StillClock()
    views = {"other": VIEW}
    updates = worker(store, log, views, clock)
    first = asyncio.create_task(updates.handle(0, [record(orjson.dumps(body(1)), timestamp_ms=NOW_MS)]))
    await asyncio.sleep(0)
    clock.ms += 5_000
    await asyncio.wait_for(first, 5)
    views["applicant"] = VIEW
    await asyncio.wait_for(updates.handle(0, [record(orjson.dumps(body(2)), 1, clock.ms)]), 0.05)
    assert await age_of(store) == 2


def test_ever_new_names_share_one_grace() -> None:
    """A producer whose names have a date in them holds nobody up for longer than one of a fixed name."""
    graces = Graces(5_000, forgotten_ms=60_000)
    waited = [graces.ask(f"v{at // 1_000}", at) for at in range(0, 60_000, 100)]
    assert waited == [at <= 5_000 - 100 for at in range(0, 60_000, 100)]
    # Once nobody has waited for a minute, the next name may be an oversight again.
    assert graces.ask("new", 64_800) is False
    assert graces.ask("newer", 65_000) is True


def test_a_name_that_comes_to_be_known_leaves_others_their_grace() -> None:
    """Only time that was waited counts."""
    graces = Graces(5_000, forgotten_ms=60_000)
    assert all(graces.ask("a", at) for at in range(0, 1_000, 100))
    assert all(graces.ask("b", at) for at in range(30_000, 34_000, 100))
    assert not all(graces.ask("c", at) for at in range(40_000, 41_000, 100))


def test_who_does_not_wait_spends_no_grace_and_keeps_what_is_known() -> None:
    """Neither the time that all share nor a name's place; but a name that goes on being asked for gets no second
    grace."""
    graces = Graces(5_000, forgotten_ms=60_000, names_max=1)
    assert not any(graces.ask(f"v{at}", at, waits=False) for at in range(0, 10_000, 100))
    assert [graces.ask("a", at) for at in range(10_000, 15_200, 100)] == [
        at < 15_000 for at in range(10_000, 15_200, 100)
    ]
    assert not any(graces.ask("a", at, waits=False) for at in range(20_000, 200_000, 10_000))
    assert graces.ask("a", 210_000) is False
    assert not graces.ask("a", 280_000, waits=False)
    assert graces.ask("a", 280_001) is True


def test_graces_are_bounded() -> None:
    """Ever new names get no grace once too many are remembered; forgotten ones make room."""
    graces = Graces(5_000, forgotten_ms=60_000, names_max=2)
    assert [graces.ask(name, 0) for name in "abc"] == [True, True, False]
    assert graces.ask("a", 59_000) is False
    assert graces.ask("c", 61_000) is True
    assert graces.ask("d", 61_000) is False
    assert graces.ask("a", 61_000) is False
