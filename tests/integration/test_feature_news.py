"""What an outlook says will change nothing, held against what Redis does with the same rows."""

import random
import uuid
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from app.adapters.feast_codec import row_key
from app.adapters.redis_feast import RedisFeatureStore
from app.domain.document_parts import ValueType
from app.domain.errors import StoreUnavailable
from app.domain.feature_news import Outlook
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, Fetched, ViewNeed

NAMES = ("a", "b", "c")
TYPES: tuple[ValueType, ...] = ("INT64",) * 3


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisFeatureStore]:
    """The store."""
    made = RedisFeatureStore(redis_url)
    yield made
    await made.close()


@pytest.fixture
def project() -> str:
    """A project that no other test knows."""
    return f"p{uuid.uuid4().hex}"


def entity(project: str, number: int) -> EntityKey:
    """One of its entities."""
    return EntityKey(project, ("applicant_id",), (number,), ("INT64",))


def any_row(key: EntityKey, dice: random.Random, *, tombstones: bool) -> FeatureRow:
    """An update of some features, or a tombstone, of one of few times."""
    time_ms = 1_000 * dice.randint(1, 6) + dice.choice((0, 0, 500))
    if tombstones and dice.random() < 0.3:
        return FeatureRow("v", key, (), (), (), time_ms, NAMES, tombstone=True)
    names = tuple(dice.sample(NAMES, dice.randint(1, 3)))
    others = tuple(name for name in NAMES if name not in names)
    values = tuple(dice.randint(0, 1) for _ in names)
    return FeatureRow("v", key, names, values, TYPES[: len(names)], time_ms, others)


@pytest.mark.parametrize("seed", range(4))
async def test_an_outlook_says_what_redis_will_do(store: RedisFeatureStore, project: str, seed: int) -> None:
    """After any updates and tombstones, and for any rows of a load: those that change nothing, and no others."""
    dice = random.Random(seed)
    outdated = 0
    for number in range(60):
        key = entity(project, number)
        await store.write([any_row(key, dice, tombstones=True) for _ in range(dice.randint(0, 4))])
        [stored] = await store.stored([ViewNeed("v", key, NAMES, TYPES)], 5_000)
        outlook = Outlook()
        for _ in range(6):
            row, before = any_row(key, dice, tombstones=False), outlook.outdated_rows
            outlook.see(b"key", row, stored)
            written = await store.write([row])
            assert outlook.outdated_rows - before == 1 - written, (number, row, stored)
        outdated += outlook.outdated_rows
    assert outdated > 60


async def test_rows_that_are_not_there_and_what_is_none(store: RedisFeatureStore, project: str, redis_url: str) -> None:
    """In the order of the question; what stands in a row's place says nothing, and is told when it is written."""
    keys = [entity(project, number) for number in range(3)]
    await store.write([FeatureRow("v", keys[1], ("a",), (7,), ("INT64",), 5_000)])
    client: Redis = Redis.from_url(redis_url)
    await client.set(row_key(keys[2]), b"text")
    try:
        found = await store.stored([ViewNeed("v", key, ("a",), ("INT64",)) for key in keys], 5_000)
    finally:
        await client.delete(row_key(keys[2]))
        await client.aclose()
    assert [each.latest_ms for each in found] == [None, 5_000, None]
    assert found[1].features == {"a": Fetched(FeatureStatus.PRESENT, 7, 5_000)}


async def test_a_redis_that_is_away_is_told() -> None:
    """Nothing is taken for not being there."""
    store = RedisFeatureStore("redis://127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable):
        await store.stored([ViewNeed("v", entity("p", 1), ("a",), ("INT64",))], 1_000)
    await store.close()
