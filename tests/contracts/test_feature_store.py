"""What every feature store does, in memory, in Redis and in a Redis Cluster."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from app.adapters.redis_feast import RedisFeatureStore
from app.domain.document_parts import ValueType
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, Fetched, Value, ViewNeed
from tests.support.memory_feature_store import MemoryFeatureStore
from tests.support.redis_servers import RedisCluster, redis_cluster

PRESENT, NULL, MISSING, ERROR = FeatureStatus.PRESENT, FeatureStatus.NULL, FeatureStatus.MISSING, FeatureStatus.ERROR
SCALARS: dict[ValueType, Value] = {
    "STRING": "ż",
    "BYTES": b"\x00\xff",
    "INT32": -7,
    "INT64": 2**62,
    "DOUBLE": 0.1,
    "FLOAT": 0.5,
    "BOOL": False,
    "UNIX_TIMESTAMP": 1_700_000_000,
}
LISTS: dict[ValueType, Value] = {
    "STRING_LIST": ("ż", ""),
    "BYTES_LIST": (b"\x00\xff", b""),
    "INT32_LIST": (-7, 0),
    "INT64_LIST": (2**62, -1),
    "DOUBLE_LIST": (0.1, None),
    "FLOAT_LIST": (),
    "BOOL_LIST": (True, False),
    "UNIX_TIMESTAMP_LIST": (None, 5),
}
TYPES = (*SCALARS, *LISTS)
NAMES = tuple(type_.lower() for type_ in TYPES)
VALUES = (*SCALARS.values(), *LISTS.values())
Store = MemoryFeatureStore | RedisFeatureStore


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three masters."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(params=["memory", "redis", "cluster"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """A store; the tests keep apart by their own project."""
    made: Store
    match request.param:
        case "memory":
            made = MemoryFeatureStore()
        case "redis":
            made = RedisFeatureStore(request.getfixturevalue("redis_url"), connections_max=4)
        case _:
            url = request.getfixturevalue("cluster").masters[1].url
            made = RedisFeatureStore(url, connections_max=4)
    yield made
    await made.close()


@pytest.fixture
def key() -> EntityKey:
    """An entity that no other test knows."""
    return EntityKey(f"p{uuid.uuid4().hex}", ("applicant_id",), (17,), ("INT64",))


def row(key: EntityKey, time_ms: int, view: str = "v", **values: Value) -> FeatureRow:
    """A row of INT64 features of a view that has ``a`` and ``b``."""
    kept = tuple(name for name in ("a", "b") if name not in values)
    return FeatureRow(view, key, tuple(values), tuple(values.values()), ("INT64",) * len(values), time_ms, kept)


async def read(store: Store, key: EntityKey, view: str = "v") -> tuple[Fetched, Fetched]:
    """Features ``a`` and ``b``."""
    found = await store.fetch([ViewNeed(view, key, ("a", "b"), ("INT64", "INT64"))], 5_000)
    return found[view, "a"], found[view, "b"]


async def test_every_type_comes_back(store: Store, key: EntityKey) -> None:
    """Values of all types, lists too, are read as they were written, with their event time to the millisecond."""
    assert await store.write([FeatureRow("v", key, NAMES, VALUES, TYPES, 1_700_000_000_123)]) == 1
    found = await store.fetch([ViewNeed("v", key, NAMES, TYPES)], 5_000)
    assert found == {
        ("v", name): Fetched(PRESENT, value, 1_700_000_000_123) for name, value in zip(NAMES, VALUES, strict=True)
    }


async def test_null_and_missing_differ(store: Store, key: EntityKey) -> None:
    """A written null is NULL; what was never written is MISSING, and so is all of an unknown entity."""
    await store.write([row(key, 1_000, a=None)])
    a, b = await read(store, key)
    assert (a.status, a.event_time_ms, b.status) == (NULL, 1_000, MISSING)
    stranger = EntityKey(key.project, key.names, (18,), key.types)
    assert [found.status for found in await read(store, stranger)] == [MISSING, MISSING]


async def test_another_declared_type_is_coerced_or_an_error(store: Store, key: EntityKey) -> None:
    """A whole number serves where a DOUBLE is declared; where STRING is, it is an ERROR with a reason."""
    await store.write([row(key, 1_000, a=3, b=4)])
    found = await store.fetch([ViewNeed("v", key, ("a", "b"), ("DOUBLE", "STRING"))], 5_000)
    assert (found["v", "a"].status, found["v", "a"].value) == (PRESENT, 3.0)
    assert found["v", "b"].status is ERROR
    assert found["v", "b"].reason


async def test_the_later_event_wins(store: Store, key: EntityKey) -> None:
    """An older row, or one of the same time, changes nothing, in whatever order rows arrive."""
    assert await store.write([row(key, 2_000, a=2, b=2)]) == 1
    assert await store.write([row(key, 1_999, a=1, b=1), row(key, 2_000, a=9, b=9)]) == 0
    assert await read(store, key) == (Fetched(PRESENT, 2, 2_000), Fetched(PRESENT, 2, 2_000))
    assert await store.write([row(key, 2_001, a=3, b=3), row(key, 1, a=0, b=0)]) == 1
    assert (await read(store, key))[0] == Fetched(PRESENT, 3, 2_001)


async def test_the_epoch_guards_nothing(store: Store, key: EntityKey) -> None:
    """A row stored with event time 0 is replaced by any other, also of time 0."""
    assert await store.write([row(key, 0, a=1, b=1)]) == 1
    assert await store.write([row(key, 0, a=2, b=2)]) == 1
    assert (await read(store, key))[0] == Fetched(PRESENT, 2, 0)
    assert await store.write([row(key, 1, a=3, b=3)]) == 1


async def test_kept_features_keep_their_age(store: Store, key: EntityKey) -> None:
    """A partial update leaves its neighbours' values and times, through several of them; a whole one renews all."""
    await store.write([row(key, 1_000, a=1, b=1)])
    await store.write([row(key, 2_000, a=2)])
    assert await read(store, key) == (Fetched(PRESENT, 2, 2_000), Fetched(PRESENT, 1, 1_000))
    await store.write([row(key, 3_000, a=3)])
    assert await read(store, key) == (Fetched(PRESENT, 3, 3_000), Fetched(PRESENT, 1, 1_000))
    await store.write([row(key, 4_000, b=4)])
    assert await read(store, key) == (Fetched(PRESENT, 3, 3_000), Fetched(PRESENT, 4, 4_000))
    await store.write([row(key, 5_000, a=5, b=5)])
    assert await read(store, key) == (Fetched(PRESENT, 5, 5_000), Fetched(PRESENT, 5, 5_000))


async def test_views_of_one_entity_have_their_own_times(store: Store, key: EntityKey) -> None:
    """Two views share an entity's row and neither its times nor its names."""
    await store.write([row(key, 2_000, "v", a=1, b=2), row(key, 1_000, "w", a=3, b=4)])
    needs = [ViewNeed(view, key, ("a", "b"), ("INT64", "INT64")) for view in ("v", "w")]
    found = await store.fetch(needs, 5_000)
    assert [(found[view, "a"].value, found[view, "a"].event_time_ms) for view in ("v", "w")] == [(1, 2_000), (3, 1_000)]


async def test_many_entities_in_one_fetch(store: Store, key: EntityKey) -> None:
    """Needs of different entities, text and compound keys among them, do not mix."""
    branch = EntityKey(key.project, ("branch", "iban"), (3, "ż"), ("INT32", "STRING"))
    await store.write([row(key, 1_000, "v", a=1, b=1), row(branch, 2_000, "w", a=2, b=2)])
    needs = [ViewNeed("w", branch, ("b",), ("INT64",)), ViewNeed("v", key, ("a",), ("INT64",))]
    found = await store.fetch(needs, 5_000)
    assert found == {("w", "b"): Fetched(PRESENT, 2, 2_000), ("v", "a"): Fetched(PRESENT, 1, 1_000)}


async def test_concurrent_fetches_do_not_mix(store: Store, key: EntityKey) -> None:
    """Far more fetches at once than connections: each gets its own entity's values."""
    keys = [EntityKey(key.project, key.names, (number,), key.types) for number in range(100)]
    await store.write([row(each, 1_000, a=number, b=-number) for number, each in enumerate(keys)])
    found = await asyncio.gather(*(read(store, each) for each in keys))
    assert [(a.value, b.value) for a, b in found] == [(number, -number) for number in range(100)]


async def test_nothing_asked_nothing_answered(store: Store) -> None:
    """Empty needs and empty batches are no round trip and no fault."""
    assert await store.fetch([], 5_000) == {}
    assert await store.write([]) == 0
    await store.ping()
