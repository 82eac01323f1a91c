"""The last writer by event time wins, feature by feature, in memory and in Redis, in whatever order rows arrive."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.adapters.feast_codec import row_key
from app.adapters.redis_feast import RedisFeatureStore
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, Fetched, Value, ViewNeed
from tests.support.memory_feature_store import MemoryFeatureStore

NAMES = ("a", "b", "c")
DAY_MS = 86_400_000
PRESENT, MISSING = FeatureStatus.PRESENT, FeatureStatus.MISSING
Store = MemoryFeatureStore | RedisFeatureStore


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """A store; the tests keep apart by their own project."""
    made: Store = (
        MemoryFeatureStore() if request.param == "memory" else RedisFeatureStore(request.getfixturevalue("redis_url"))
    )
    yield made
    await made.close()


@pytest.fixture
def client(redis_url: str) -> Iterator["redis.Redis"]:
    """Redis itself."""
    with redis.Redis.from_url(redis_url) as made:
        yield made


def new_key() -> EntityKey:
    """An entity that no other test knows."""
    return EntityKey(f"p{uuid.uuid4().hex}", ("id",), (17,), ("INT64",))


def row(
    key: EntityKey, time_ms: int, values: Mapping[str, Value], *, view: str = "v", ttl: int | None = None
) -> FeatureRow:
    """New values of some of ``NAMES``."""
    kept = tuple(name for name in NAMES if name not in values)
    return FeatureRow(
        view, key, tuple(values), tuple(values.values()), ("INT64",) * len(values), time_ms, kept, ttl_ms=ttl
    )


def tombstone(key: EntityKey, time_ms: int, *, view: str = "v", guards: bool = True) -> FeatureRow:
    """The end of all of ``NAMES``."""
    return FeatureRow(view, key, (), (), (), time_ms, NAMES, tombstone=True, guards=guards)


async def read(store: Store, key: EntityKey, view: str = "v") -> tuple[Fetched, ...]:
    """The features of ``NAMES``."""
    found = await store.fetch([ViewNeed(view, key, NAMES, ("INT64",) * 3)], 5_000)
    return tuple(found[view, name] for name in NAMES)


@dataclass(frozen=True)
class Write:
    """One row to come: values by feature, or None for a tombstone."""

    time_ms: int
    values: Mapping[str, Value] | None


def latest(writes: Sequence[Write]) -> tuple[Fetched, ...]:
    """What stands in the end, by the times alone."""
    deleted_ms = max((write.time_ms for write in writes if write.values is None), default=-1)
    found = []
    for name in NAMES:
        own = [(w.time_ms, w.values[name]) for w in writes if w.values and name in w.values and w.time_ms > deleted_ms]
        time_ms, value = max(own, key=lambda each: each[0], default=(None, None))
        status = MISSING if time_ms is None else PRESENT if value is not None else FeatureStatus.NULL
        found.append(Fetched(status, value, time_ms))
    return tuple(found)


VALUES = st.dictionaries(st.sampled_from(NAMES), st.none() | st.integers(-(2**63), 2**63 - 1), min_size=1)
TIMES = st.lists(st.integers(1, 2_000_000_000_000) | st.integers(1, 3_000), min_size=1, max_size=8, unique=True)
WRITES = TIMES.flatmap(
    lambda times: st.tuples(*(st.builds(Write, st.just(time), st.none() | VALUES) for time in times))
).flatmap(st.permutations)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=WRITES, batches=st.lists(st.booleans(), min_size=8, max_size=8), twice=st.booleans())
def test_the_latest_of_each_feature_stands_in_any_order(
    redis_url: str, writes: Sequence[Write], batches: Sequence[bool], twice: bool
) -> None:
    """Whole and partial updates, nulls and tombstones, in any order and any batches, also when all come twice."""

    async def run(store: Store) -> None:
        key = new_key()
        rows = [
            tombstone(key, write.time_ms) if write.values is None else row(key, write.time_ms, write.values)
            for write in writes
        ]
        batch: list[FeatureRow] = []
        for each, ends in zip(rows, batches, strict=False):
            batch.append(each)
            if ends:
                await store.write(batch)
                batch = []
        await store.write(batch)
        if twice:
            assert await store.write(rows) == 0
        assert await read(store, key) == latest(writes)
        await store.close()

    asyncio.run(run(MemoryFeatureStore()))
    asyncio.run(run(RedisFeatureStore(redis_url)))


async def test_a_tombstone_deletes_and_is_not_undone(store: Store) -> None:
    """All values go; older rows, and those of its own time, stay out; newer ones come in."""
    key = new_key()
    await store.write([row(key, 1_000, {"a": 1, "b": 2})])
    assert await store.write([tombstone(key, 2_000)]) == 1
    assert await read(store, key) == (Fetched(MISSING),) * 3
    assert await store.write([row(key, 1_500, {"a": 3}), row(key, 2_000, {"b": 4, "c": 5}), tombstone(key, 2_000)]) == 0
    assert await read(store, key) == (Fetched(MISSING),) * 3
    assert await store.write([row(key, 2_001, {"a": 6})]) == 1
    assert await store.write([row(key, 1_999, {"b": 7})]) == 0
    assert (await read(store, key))[:2] == (Fetched(PRESENT, 6, 2_001), Fetched(MISSING))


async def test_a_late_tombstone_spares_what_is_newer(store: Store) -> None:
    """It deletes what is as old as itself, and of another view nothing."""
    key = new_key()
    await store.write([row(key, 1_000, {"a": 1, "b": 2, "c": 3}), row(key, 1_000, {"a": 9}, view="w")])
    await store.write([row(key, 3_000, {"a": 4})])
    assert await store.write([tombstone(key, 2_000)]) == 1
    assert await read(store, key) == (Fetched(PRESENT, 4, 3_000), Fetched(MISSING), Fetched(MISSING))
    assert (await read(store, key, "w"))[0] == Fetched(PRESENT, 9, 1_000)


async def test_a_tombstone_that_does_not_guard(store: Store) -> None:
    """What is deleted without a guard may be written again with any time."""
    key = new_key()
    await store.write([row(key, 1_000, {"a": 1, "b": 2})])
    assert await store.write([tombstone(key, 2_000, guards=False)]) == 1
    assert await read(store, key) == (Fetched(MISSING),) * 3
    assert await store.write([row(key, 1_500, {"a": 3})]) == 1
    assert (await read(store, key))[0] == Fetched(PRESENT, 3, 1_500)


async def test_a_feature_that_is_new_can_be_filled_in(store: Store) -> None:
    """A feature that the view never held is taken with an older time than its neighbours have."""
    key = new_key()
    await store.write([row(key, 5_000, {"a": 1, "b": 2})])
    assert await store.write([row(key, 1_000, {"b": 0, "c": 3})]) == 1
    assert await read(store, key) == (
        Fetched(PRESENT, 1, 5_000),
        Fetched(PRESENT, 2, 5_000),
        Fetched(PRESENT, 3, 1_000),
    )


@pytest.mark.parametrize("base_ms", [1_000, 1_700_000_000_250, 40_000_000_000_000])
async def test_whole_rows_are_told_apart_to_the_millisecond(store: Store, base_ms: int) -> None:
    """Of whole rows the later stands: by a day, a second or a millisecond; the same time again changes nothing."""
    key = new_key()

    async def written(time_ms: int) -> int:
        return await store.write([row(key, time_ms, dict.fromkeys(NAMES, time_ms))])

    assert [await written(base_ms + later) for later in (0, 0, 1, 1, 1_001, 1_000, DAY_MS, 1_002)] == [
        1, 0, 1, 0, 1, 0, 1, 0,
    ]  # fmt: skip
    assert await read(store, key) == (Fetched(PRESENT, base_ms + DAY_MS, base_ms + DAY_MS),) * 3


async def test_a_whole_row_renews_what_had_times_of_its_own(store: Store) -> None:
    """After partial updates and a tombstone a whole row is everything, and a late one nothing."""
    key, base_ms = new_key(), 1_700_000_000_000
    await store.write([row(key, base_ms, {"a": 1, "b": 1, "c": 1}), row(key, base_ms + 5_000, {"a": 2})])
    assert await store.write([row(key, base_ms + 9_000, {"a": 3, "b": 3, "c": 3})]) == 1
    assert await read(store, key) == (Fetched(PRESENT, 3, base_ms + 9_000),) * 3
    assert (
        await store.write([tombstone(key, base_ms + 20_000), row(key, base_ms + 15_000, {"a": 4, "b": 4, "c": 4})]) == 1
    )
    assert await read(store, key) == (Fetched(MISSING),) * 3
    assert await store.write([row(key, base_ms + 21_000, {"a": 5, "b": 5, "c": 5})]) == 1
    assert await read(store, key) == (Fetched(PRESENT, 5, base_ms + 21_000),) * 3


# --- ttl, in Redis ----------------------------------------------------------------------------------------------------


def left_ms(client: "redis.Redis", key: EntityKey) -> int:
    """How long the row lives on; -1 for good, -2 not at all."""
    return int(client.pttl(row_key(key)))


def now_ms(client: "redis.Redis") -> int:
    """Redis' own time."""
    seconds, micros = client.time()
    return int(seconds) * 1_000 + int(micros) // 1_000


def about(given_ms: int, expected_ms: int) -> bool:
    """Within what a test takes."""
    return expected_ms - 60_000 < given_ms <= expected_ms


async def test_a_row_lives_as_long_as_its_longest_view(redis_url: str, client: "redis.Redis") -> None:
    """Its end moves to the latest of its views', never to an earlier one; each counts from its event time."""
    store, key, now = RedisFeatureStore(redis_url), new_key(), now_ms(client)
    await store.write([row(key, now, {"a": 1}, ttl=DAY_MS)])
    assert about(left_ms(client, key), DAY_MS)
    await store.write([row(key, now - DAY_MS, {"a": 1}, view="w", ttl=30 * DAY_MS)])
    assert about(left_ms(client, key), 29 * DAY_MS)
    await store.write([row(key, now + 1, {"a": 1}, ttl=DAY_MS)])
    assert about(left_ms(client, key), 29 * DAY_MS)
    await store.close()


async def test_a_view_without_ttl_keeps_the_row(redis_url: str, client: "redis.Redis") -> None:
    """Whichever is written first; and what another writer keeps in the row stays too."""
    store, now = RedisFeatureStore(redis_url), now_ms(client)
    first, last, foreign = new_key(), new_key(), new_key()
    await store.write([row(first, now, {"a": 1}), row(first, now, {"a": 1}, view="w", ttl=DAY_MS)])
    await store.write([row(last, now, {"a": 1}, view="w", ttl=DAY_MS), row(last, now, {"a": 1})])
    client.hset(row_key(foreign), "_ts:other", b"\x08\x01")
    await store.write([row(foreign, now, {"a": 1}, ttl=DAY_MS)])
    assert [left_ms(client, key) for key in (first, last, foreign)] == [-1, -1, -1]
    await store.close()


async def test_whole_rows_move_the_end_too(redis_url: str, client: "redis.Redis") -> None:
    """A later whole row lives on by its own ttl, for good once the view has none, and ends again once it has one; what
    another writer keeps in a row keeps it."""
    store, key, foreign, now = RedisFeatureStore(redis_url), new_key(), new_key(), now_ms(client)
    whole = dict.fromkeys(NAMES, 1)
    await store.write([row(key, now - 5_000, whole, ttl=DAY_MS)])
    assert about(left_ms(client, key), DAY_MS)
    await store.write([row(key, now, whole, ttl=2 * DAY_MS)])
    assert about(left_ms(client, key), 2 * DAY_MS)
    await store.write([row(key, now + 5_000, whole)])
    assert left_ms(client, key) == -1
    await store.write([row(key, now + 10_000, whole, ttl=DAY_MS)])
    assert about(left_ms(client, key), DAY_MS + 10_000)
    client.hset(row_key(foreign), "_ts:other", b"\x08\x01")
    await store.write([row(foreign, now, whole, ttl=DAY_MS), row(foreign, now + 5_000, whole, ttl=DAY_MS)])
    assert left_ms(client, foreign) == -1
    await store.close()


async def test_a_whole_row_takes_away_the_list_of_times(redis_url: str, client: "redis.Redis") -> None:
    """Features that have one time again need no list of times beside them."""
    store, key, now = RedisFeatureStore(redis_url), new_key(), now_ms(client)
    await store.write([row(key, now - 9_000, dict.fromkeys(NAMES, 1)), row(key, now - 5_000, {"a": 2})])
    assert client.hexists(row_key(key), "_at:v")
    await store.write([row(key, now, dict.fromkeys(NAMES, 3))])
    assert not client.hexists(row_key(key), "_at:v")
    await store.close()


async def test_a_ttl_that_is_declared_later_takes_hold(redis_url: str, client: "redis.Redis") -> None:
    """A row that only this view uses begins to expire with its next write, tombstones among them."""
    store, key, now = RedisFeatureStore(redis_url), new_key(), now_ms(client)
    await store.write([row(key, now - 1, {"a": 1, "b": 2})])
    assert left_ms(client, key) == -1
    await store.write([row(key, now, {"a": 1}, ttl=DAY_MS)])
    assert about(left_ms(client, key), DAY_MS)
    await store.close()


async def test_what_is_past_its_ttl_on_arrival_is_not_kept(redis_url: str, client: "redis.Redis") -> None:
    """A row of its own ends at once; one that another view keeps takes the value, which reads as STALE."""
    store, key, shared, now = RedisFeatureStore(redis_url), new_key(), new_key(), now_ms(client)
    await store.write([row(shared, now, {"a": 1}, view="w")])
    old = [row(each, now - 2 * DAY_MS, {"a": 1}, ttl=DAY_MS) for each in (key, shared)]
    await store.write(old)
    assert (left_ms(client, key), left_ms(client, shared)) == (-2, -1)
    await store.close()
