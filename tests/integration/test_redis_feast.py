"""The feature store on real Redis: Feast's own rows, broken rows, and a server that hangs or dies."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from app.adapters.feast_codec import feature_field, row_key
from app.adapters.redis_feast import RedisFeatureStore
from app.domain.breaker import BreakerPolicy
from app.domain.errors import RowsRefused, StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, ViewNeed
from tests.support.feast_rows import feast_rows
from tests.support.stack import ServiceStack

SLACK_S = 2.0  # what a busy machine adds to a timeout


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisFeatureStore]:
    """A store with few connections, a short bound for writes, and a breaker that never opens."""
    never = BreakerPolicy(failures=1_000_000)
    made = RedisFeatureStore(redis_url, connections_max=2, write_timeout_ms=1_000, breaker=never)
    yield made
    await made.close()


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    """Redis as others use it."""
    made: Redis = Redis.from_url(redis_url)
    yield made
    await made.aclose()


@pytest.fixture
def key() -> EntityKey:
    """An entity that no other test knows."""
    return EntityKey(f"p{uuid.uuid4().hex}", ("applicant_id",), (17,), ("INT64",))


def need(key: EntityKey) -> ViewNeed:
    """Feature ``a`` of view ``v``."""
    return ViewNeed("v", key, ("a",), ("INT64",))


def row(key: EntityKey, time_ms: int, a: int) -> FeatureRow:
    """A value for it."""
    return FeatureRow("v", key, ("a",), (a,), ("INT64",), time_ms)


async def test_rows_of_feast_are_read_and_guarded(store: RedisFeatureStore, client: Redis) -> None:
    """Hashes that Feast wrote are read with their times, and an older update of ours does not replace them."""
    for stored in feast_rows():
        await client.delete(stored.stored_key)
        for field, data in stored.stored_hash.items():
            await client.hset(stored.stored_key, field, data)
        name, (type_, value) = next(iter(stored.values.items()))
        wanted = ViewNeed(stored.view, stored.key, (name,), (type_,))
        found = (await store.fetch([wanted], 5_000))[stored.view, name]
        assert (found.value, found.event_time_ms) == (value, stored.event_time_ms)
        older = FeatureRow(stored.view, stored.key, (name,), (value,), (type_,), max(0, stored.event_time_ms))
        # The epoch and what lies before it guard nothing, in Feast as here.
        assert await store.write([older]) == (0 if stored.event_time_ms > 0 else 1)
        await client.delete(stored.stored_key)


async def test_a_time_that_feast_has_renewed_is_believed(
    store: RedisFeatureStore, client: Redis, key: EntityKey
) -> None:
    """After another writer replaced a partly updated row, the older times noted beside it no longer count."""
    both = FeatureRow("v", key, ("a", "b"), (1, 1), ("INT64", "INT64"), 1_000)
    await store.write([both, FeatureRow("v", key, ("b",), (2,), ("INT64",), 2_000, kept=("a",))])
    assert (await store.fetch([need(key)], 5_000))["v", "a"].event_time_ms == 1_000
    await client.hset(row_key(key), "_ts:v", b"\x08\x09")
    assert (await store.fetch([need(key)], 5_000))["v", "a"].event_time_ms == 9_000


async def test_foreign_content_is_an_error_of_that_value(
    store: RedisFeatureStore, client: Redis, key: EntityKey
) -> None:
    """Garbage in a field, or a key that is no hash, costs that value and not the others."""
    other = EntityKey(key.project, key.names, (18,), key.types)
    await store.write([row(key, 1_000, 1)])
    await client.hset(row_key(key), feature_field("v", "a"), b"\xff\xff")
    await client.set(row_key(other), b"text")
    found = await store.fetch([need(key), ViewNeed("w", other, ("a",), ("INT64",))], 5_000)
    assert [found[view, "a"].status for view in ("v", "w")] == [FeatureStatus.ERROR, FeatureStatus.ERROR]
    assert all(value.reason for value in found.values())
    assert (await store.fetch([need(EntityKey(key.project, key.names, (19,), key.types))], 5_000))[
        "v", "a"
    ].value is None


async def test_what_stands_in_a_row_s_place_costs_that_row(
    store: RedisFeatureStore, client: Redis, key: EntityKey
) -> None:
    """A key of another type, or a list of times that cannot be read, refuses its own row; the others are stored."""
    keys = [EntityKey(key.project, key.names, (number,), key.types) for number in range(4)]
    await client.set(row_key(keys[1]), b"text")
    await store.write([row(keys[2], 1_000, 0)])
    stored = await client.hget(row_key(keys[2]), "_ts:v")
    assert isinstance(stored, bytes)
    await client.hset(row_key(keys[2]), "_at:v", bytes((len(stored),)) + stored + b"abcd")
    with pytest.raises(RowsRefused, match="no row of features") as raised:
        await store.write([row(each, 2_000, number)._replace(kept=("b",)) for number, each in enumerate(keys)])
    assert (sorted(raised.value.refused), raised.value.written) == ([1, 2], 2)
    found = [(await store.fetch([need(each)], 5_000))["v", "a"].value for each in (keys[0], keys[3])]
    assert found == [0, 3]


async def test_a_value_that_no_fetch_takes_is_not_stored(redis_url: str, key: EntityKey) -> None:
    """The bound is the reader's own, in stored bytes: what is at it is read, and what is above it refuses its row."""
    store = RedisFeatureStore(redis_url, value_bytes_max=200)
    keys = [EntityKey(key.project, key.names, (number,), key.types) for number in range(3)]
    texts = ["a" * 198, "a" * 197, "b"]
    rows = [
        FeatureRow("v", each, ("n", "t"), (1, text), ("INT64", "STRING"), 1_000)
        for each, text in zip(keys, texts, strict=True)
    ]
    with pytest.raises(RowsRefused) as raised:
        await store.write(rows)
    assert (list(raised.value.refused), raised.value.written) == ([0], 2)
    said = raised.value.refused[0]
    assert said.startswith("view v: a value cannot be stored: t has 201 bytes, and 200 are allowed")
    assert "BROKER_FEATURE_VALUE_BYTES_MAX" in said
    for each, text in zip(keys, (None, *texts[1:]), strict=True):
        found = await store.fetch([ViewNeed("v", each, ("t",), ("STRING",))], 5_000)
        assert found["v", "t"].value == text
    await store.close()


async def test_of_concurrent_writers_the_latest_event_wins(redis_url: str, key: EntityKey) -> None:
    """Two workers that write one row's history at once, each in its own order, leave the last event."""
    stores = [RedisFeatureStore(redis_url, connections_max=2) for _ in range(2)]
    forward = [row(key, time_ms, time_ms) for time_ms in range(1, 200)]
    try:
        await asyncio.gather(
            *(stores[0].write([each]) for each in forward), *(stores[1].write([each]) for each in reversed(forward))
        )
        found = (await stores[0].fetch([need(key)], 5_000))["v", "a"]
        assert (found.value, found.event_time_ms) == (199, 199)
    finally:
        for each in stores:
            await each.close()


async def test_a_hanging_server_costs_the_timeout_and_mixes_nothing(
    stack: ServiceStack, store: RedisFeatureStore, key: EntityKey
) -> None:
    """While Redis hangs, fetches and writes end in StoreUnavailable within their bound; after it, answers are right."""
    keys = [EntityKey(key.project, key.names, (number,), key.types) for number in range(10)]
    await store.write([row(each, 1_000, number) for number, each in enumerate(keys)])
    stack.redis.pause()
    try:
        started = time.monotonic()
        answers = await asyncio.gather(
            *(store.fetch([need(each)], 200) for each in keys), store.write([row(key, 1, 1)]), return_exceptions=True
        )
        assert time.monotonic() - started < 1.0 + SLACK_S
        assert all(isinstance(answer, StoreUnavailable) for answer in answers)
    finally:
        stack.redis.resume()
    found = [await store.fetch([need(each)], 5_000) for each in keys]
    assert [each["v", "a"].value for each in found] == list(range(10))


async def test_a_dead_server_is_unavailable_and_its_return_is_used(
    stack: ServiceStack, store: RedisFeatureStore, key: EntityKey
) -> None:
    """With Redis gone every call says so at once; with Redis back the next call works, scripts included."""
    await store.write([row(key, 1_000, 1)])
    await asyncio.to_thread(stack.redis.kill)
    try:
        for attempt in (store.ping(), store.write([row(key, 2_000, 2)]), store.fetch([need(key)], 500)):
            with pytest.raises(StoreUnavailable, match="Redis"):
                await attempt
    finally:
        await asyncio.to_thread(stack.redis.start)
    assert await store.write([row(key, 2_000, 2)]) == 1
    assert (await store.fetch([need(key)], 5_000))["v", "a"].value == 2
