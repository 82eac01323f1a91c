"""The near cache hears of updates, on real Kafka and Redis: within a second of their materialization, and again after
Kafka was away."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from prometheus_client import REGISTRY

from app.adapters import update_announcer, update_follower
from app.adapters.avro import AvroCodec
from app.adapters.clock import SystemClock
from app.adapters.near_cache import CachedFeatureStore
from app.adapters.redis_feast import RedisFeatureStore
from app.adapters.topics import AGGREGATES_CHANGELOG
from app.adapters.update_follower import UpdateFollower
from app.domain.features import EntityKey, Fetched, ViewNeed
from app.domain.near_cache import Position
from app.domain.view_documents import CacheSpec, FeatureViewSpec
from app.ports.clock import Clock
from app.settings import Settings
from tests.integration.test_features_worker import running_worker
from tests.support.stack import ServiceStack

WITHIN_S = 90.0
SEEN_WITHIN_S = 1.0
PLAIN = FeatureViewSpec.model_validate_json(
    """{"entities": [{"name": "applicant_id", "type": "INT64"}], "features": [{"name": "age", "type": "INT64"}],
        "source": {"type": "redis", "project": "worker"}}"""
)
WIDER = FeatureViewSpec.model_validate_json(
    """{"entities": [{"name": "applicant_id", "type": "INT64"}],
        "features": [{"name": "age", "type": "INT64"}, {"name": "height", "type": "INT64"}],
        "source": {"type": "redis", "project": "worker"}, "cache": {"ttl": "1h"}}"""
)
VIEWS = {
    "applicant": PLAIN.model_copy(update={"cache": CacheSpec.model_validate({"ttl": "1h"})}),
    "plain": PLAIN,
    "summed": FeatureViewSpec.model_validate_json(
        orjson.dumps(
            {
                **orjson.loads(PLAIN.model_dump_json(by_alias=True, exclude_unset=True)),
                "aggregate": {"of": "age", "op": "sum", "windows": ["1h"]},
                "cache": {"ttl": "1h"},
            }
        )
    ),
}


def update(applicant: int, age: object, event_ms: int, view: str = "applicant") -> dict[str, object]:
    """A FeatureUpdate."""
    return {
        "project": "worker",
        "view": view,
        "entities": {"applicant_id": applicant},
        "values": {"age": age},
        "event_time": event_ms,
    }


def need(applicant: int) -> ViewNeed:
    """The applicant's age."""
    return ViewNeed("applicant", EntityKey("worker", ("applicant_id",), (applicant,), ("INT64",)), ("age",), ("INT64",))


def following() -> bool:
    return REGISTRY.get_sample_value("broker_feature_cache_following") == 1


class Heard:
    """A cache that only notes what it is told."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, object, Sequence[str] | None, int]] = []
        self.positions: list[Position] = []
        self.before: list[Mapping[int, int]] = []
        self.concerned: list[Collection[str] | None] = []
        self.awaited: int | None = None
        self.materialized_offsets: list[tuple[int, Mapping[int, int]]] = []

    def invalidate(
        self,
        view: str,
        key: EntityKey,
        features: Sequence[str] | None,
        event_time_ms: int,
        *,
        position: Position | None,
    ) -> None:
        """See Follows."""
        assert (position is not None) == (view == "summed")
        self.updates.append((view, key.values[0], features, event_time_ms))
        if position is not None:
            self.positions.append(position)

    def unheard(self, offsets: Mapping[int, int], views: Collection[str] | None = None) -> None:
        """See Follows."""
        self.before.append(offsets)
        self.concerned.append(views)

    def before_of(self, view: str | None) -> list[Mapping[int, int]]:
        """What was told of rows of this view alone, or of any rows (None)."""
        told = zip(self.before, self.concerned, strict=True)
        return [offsets for offsets, views in told if (view in views if views else view is None)]

    def awaits(self) -> int | None:
        """See Follows."""
        return self.awaited

    def materialized(self, announced: int, offsets: Mapping[int, int]) -> None:
        """See Follows."""
        self.materialized_offsets.append((announced, offsets))


@pytest.fixture
async def admin(kafka_bootstrap: str) -> AsyncIterator[AIOKafkaAdminClient]:
    """Makes topics."""
    made = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def producer(kafka_bootstrap: str) -> AsyncIterator[AIOKafkaProducer]:
    """Sends updates."""
    made = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, acks="all")
    await made.start()
    yield made
    await made.stop()


def follower(
    cache: Heard | CachedFeatureStore, bootstrap: str, topic: str, views: Mapping[str, FeatureViewSpec] = VIEWS
) -> UpdateFollower:
    """A follower of ``topic`` under the views above."""
    return UpdateFollower(
        cache,
        bootstrap=bootstrap,
        topic=topic,
        group=topic.removesuffix(".updates"),
        client_id="test",
        views=lambda: dict(views),
        clock=SystemClock(),
    )


def cached_store(redis_url: str, clock: Clock, views: Mapping[str, FeatureViewSpec] = VIEWS) -> CachedFeatureStore:
    """The near cache before a Redis."""
    return CachedFeatureStore(
        RedisFeatureStore(redis_url),
        views=lambda: views,
        clock=clock,
        entries_max=100,
        bytes_max=1_000_000,
        fetch_timeout_ms=5_000,
    )


async def until(holds: Callable[[], object]) -> None:
    """Wait; the caller bounds it."""
    while not holds():  # noqa: ASYNC110 - what the follower does has no event to wait for
        await asyncio.sleep(0.02)


async def test_a_materialized_value_is_seen_within_a_second(
    stack: ServiceStack,
    kafka_bootstrap: str,
    redis_url: str,
    topic_prefix: str,
    tmp_path: Path,
    admin: AIOKafkaAdminClient,
    producer: AIOKafkaProducer,
) -> None:
    """A row that is asked for all the time, and so cached all the time, shows each update within a second of the
    store; between updates it comes from the cache."""
    settings = Settings(
        kafka_bootstrap=kafka_bootstrap, redis_url=redis_url, topic_prefix=topic_prefix, data_dir=tmp_path
    )
    topic = settings.topic("features.updates")
    await admin.create_topics([NewTopic(name, 2, 1) for name in (topic, f"{topic}-dlt")])
    store = RedisFeatureStore(redis_url)
    cached = cached_store(redis_url, SystemClock())
    asked = need(uuid.uuid4().int >> 66)
    applicant = asked.key.values[0]
    run = asyncio.create_task(follower(cached, kafka_bootstrap, topic).run())

    async def seen(by: CachedFeatureStore | RedisFeatureStore, value: int) -> Fetched:
        while (found := (await by.fetch([asked], 5_000))["applicant", "age"]).value != value:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)
        return found

    try:
        async with running_worker(settings, store), asyncio.timeout(WITHIN_S):
            await until(following)
            await cached.fetch([asked], 5_000)
            for number in range(1, 6):
                body = update(int(applicant), number, time.time_ns() // 1_000_000)
                watching = asyncio.create_task(seen(cached, number))
                await producer.send_and_wait(topic, orjson.dumps(body))
                await seen(store, number)
                stored = time.monotonic()
                await watching
                assert time.monotonic() - stored < SEEN_WITHIN_S
                assert (await cached.fetch([asked], 5_000))["applicant", "age"].source == "cache"
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await cached.close()
        await store.close()


async def test_an_update_that_overtakes_its_revision_is_seen_within_a_second(
    stack: ServiceStack,
    kafka_bootstrap: str,
    redis_url: str,
    topic_prefix: str,
    tmp_path: Path,
    admin: AIOKafkaAdminClient,
    producer: AIOKafkaProducer,
) -> None:
    """It has a feature that a later revision declares: the decide worker cannot read it when it comes, and the features
    worker waits for the revision and stores it. A row that was cached before is read anew, and kept again."""
    settings = Settings(
        kafka_bootstrap=kafka_bootstrap, redis_url=redis_url, topic_prefix=topic_prefix, data_dir=tmp_path
    )
    topic, views = settings.topic("features.updates"), {"applicant": VIEWS["applicant"]}
    await admin.create_topics([NewTopic(name, 1, 1) for name in (topic, f"{topic}-dlt")])
    store, cached = RedisFeatureStore(redis_url), cached_store(redis_url, SystemClock(), views)
    asked = need(uuid.uuid4().int >> 66)
    applicant = int(asked.key.values[0])
    run = asyncio.create_task(follower(cached, kafka_bootstrap, topic, views).run())

    async def until_read(by: CachedFeatureStore | RedisFeatureStore, value: int, source: str) -> None:
        while True:
            found = (await by.fetch([asked], 5_000))["applicant", "age"]
            if (found.value, found.source) == (value, source):
                return
            await asyncio.sleep(0.005)

    try:
        async with running_worker(settings, store, views), asyncio.timeout(WITHIN_S):
            await until(following)
            await producer.send_and_wait(topic, orjson.dumps(update(applicant, 1, time.time_ns() // 1_000_000)))
            await until_read(cached, 1, "cache")
            early = update(applicant, 2, time.time_ns() // 1_000_000) | {"values": {"age": 2, "height": 180}}
            await producer.send_and_wait(topic, orjson.dumps(early))
            await asyncio.sleep(0.5)
            await until_read(cached, 1, "cache")
            views["applicant"] = WIDER
            await until_read(store, 2, "redis")
            stored = time.monotonic()
            await until_read(cached, 2, "redis")
            assert time.monotonic() - stored < SEEN_WITHIN_S
            await until_read(cached, 2, "cache")
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await cached.close()
        await store.close()


class LateClock(SystemClock):
    """A clock that can be set ahead."""

    ahead_ms = 0

    def now_ms(self) -> int:
        """See Clock."""
        return super().now_ms() + self.ahead_ms


async def test_an_aggregate_is_seen_within_a_second_however_late_its_update_is(
    stack: ServiceStack,
    kafka_bootstrap: str,
    redis_url: str,
    topic_prefix: str,
    tmp_path: Path,
    admin: AIOKafkaAdminClient,
    producer: AIOKafkaProducer,
) -> None:
    """While the materializer is away, for longer than an update takes as a rule, the old sum is read each time and not
    kept, nor by a worker that starts meanwhile. Once it is back the new one is given out as soon as it is stored, and
    kept soon after."""
    settings = Settings(
        kafka_bootstrap=kafka_bootstrap, redis_url=redis_url, topic_prefix=topic_prefix, data_dir=tmp_path
    )
    topic = settings.topic("features.updates")
    await admin.create_topics(
        [NewTopic(name, 2, 1) for name in (topic, f"{topic}-dlt", settings.topic(AGGREGATES_CHANGELOG))]
    )
    clock, store = LateClock(), RedisFeatureStore(redis_url)
    cached, started_late = cached_store(redis_url, clock), cached_store(redis_url, clock)
    applicant = uuid.uuid4().int >> 66
    asked = ViewNeed("summed", need(applicant).key, ("age_sum_1h",), ("DOUBLE",))
    runs = [asyncio.create_task(follower(cached, kafka_bootstrap, topic).run())]

    async def read(by: CachedFeatureStore | RedisFeatureStore) -> tuple[object, str]:
        found = (await by.fetch([asked], 5_000))["summed", "age_sum_1h"]
        return found.value, found.source

    async def until_read(by: CachedFeatureStore | RedisFeatureStore, *expected: object) -> None:
        while (await read(by))[: len(expected)] != expected:  # noqa: ASYNC110 - Redis has no event to wait for
            await asyncio.sleep(0.01)

    async def send(age: int) -> None:
        body = orjson.dumps(update(applicant, age, time.time_ns() // 1_000_000, "summed"))
        await producer.send_and_wait(topic, body, key=b"%d" % applicant)

    try:
        async with asyncio.timeout(2 * WITHIN_S):
            await until(following)
            async with running_worker(settings, store, VIEWS):
                await send(1)
                await until_read(cached, 1.0, "cache")
            await send(2)
            await until_read(cached, 1.0, "redis")
            clock.ahead_ms = 6_000
            assert [await read(cached) for _ in range(3)] == [(1.0, "redis")] * 3
            runs.append(asyncio.create_task(follower(started_late, kafka_bootstrap, topic).run()))
            await until(lambda: started_late.awaits() is not None)
            assert [await read(started_late) for _ in range(3)] == [(1.0, "redis")] * 3
            async with running_worker(settings, store, VIEWS):
                await until_read(store, 3.0)
                stored = time.monotonic()
                for each in (cached, started_late):
                    await until_read(each, 3.0)
                assert time.monotonic() - stored < SEEN_WITHIN_S
                for each in (cached, started_late):
                    await until_read(each, 3.0, "cache")
    finally:
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        await cached.close()
        await started_late.close()
        await store.close()


async def test_what_is_materialized_is_asked_for_while_it_is_waited_for(
    kafka_bootstrap: str, topic_prefix: str, admin: AIOKafkaAdminClient, producer: AIOKafkaProducer
) -> None:
    """Nothing is told where nothing is waited for, where the group has committed nothing, or what the topic does not
    have, as it was made anew since; then each partition's offset."""
    topic, heard = f"{topic_prefix}features.updates", Heard()
    group = AIOKafkaConsumer(
        bootstrap_servers=kafka_bootstrap, group_id=f"{topic_prefix}features", enable_auto_commit=False
    )
    await group.start()
    await admin.create_topics([NewTopic(topic, 2, 1)])
    run = asyncio.create_task(follower(heard, kafka_bootstrap, topic).run())

    def unread() -> float:
        return REGISTRY.get_sample_value("broker_feature_cache_offsets_unread_total") or 0.0

    try:
        async with asyncio.timeout(WITHIN_S):
            await until(following)
            for _ in range(3):
                await producer.send_and_wait(topic, orjson.dumps(update(1, 7, 1_000, "summed")), partition=1)
            await until(lambda: len(heard.positions) == 3)
            assert heard.positions == [(1, 0), (1, 1), (1, 2)]
            before = unread()
            heard.awaited = 3
            await until(lambda: unread() > before)
            group.assign([TopicPartition(topic, number) for number in range(2)])
            await group.commit({TopicPartition(topic, 1): 700})
            before = unread()
            await until(lambda: unread() > before + 1)
            assert not heard.materialized_offsets
            await group.commit({TopicPartition(topic, 1): 2, TopicPartition(topic, 0): 0})
            await until(lambda: heard.materialized_offsets)
            heard.awaited = None
            assert heard.materialized_offsets[0] == (3, {0: 0, 1: 2})
            told = len(heard.materialized_offsets)
            await asyncio.sleep(0.5)
            assert len(heard.materialized_offsets) <= told + 1
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await group.stop()


async def test_what_was_read_before_a_view_changed_is_waited_for(
    kafka_bootstrap: str,
    topic_prefix: str,
    admin: AIOKafkaAdminClient,
    producer: AIOKafkaProducer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within a second of the revision, and once more when no worker can be behind it any more; also without a new
    update. A partition that nothing has come to is not waited for."""
    monkeypatch.setattr(update_announcer, "SETTLED_MS", 1_000)
    topic, heard, views = f"{topic_prefix}features.updates", Heard(), dict(VIEWS)
    await admin.create_topics([NewTopic(topic, 2, 1)])
    run = asyncio.create_task(follower(heard, kafka_bootstrap, topic, views).run())
    try:
        async with asyncio.timeout(WITHIN_S):
            await until(following)
            await producer.send_and_wait(topic, orjson.dumps(update(1, 7, 1_000, "plain")), partition=1)
            await producer.send_and_wait(topic, orjson.dumps(update(1, 7, 1_000)), partition=1)
            await until(lambda: heard.updates)
            assert heard.before_of("plain") == []
            views["plain"] = VIEWS["applicant"]
            async with asyncio.timeout(SEEN_WITHIN_S):
                await until(lambda: len(heard.before_of("plain")) == 1)
            await producer.send_and_wait(topic, orjson.dumps(update(1, 8, 1_000, "plain")), partition=1)
            await until(lambda: len(heard.before_of("plain")) == 2)
            assert heard.before_of("plain") == [{1: 2}, {1: 3}]
            assert heard.before_of("other") == []
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)


async def test_what_concerns_no_cached_row_is_passed_over(
    kafka_bootstrap: str,
    topic_prefix: str,
    admin: AIOKafkaAdminClient,
    producer: AIOKafkaProducer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """JSON and Avro of both generations are read; other views, malformed updates and what came before the start are not
    told. A topic that is made later, and partitions that are added, are found."""
    monkeypatch.setattr(update_follower, "_PARTITIONS_EVERY_MS", 500)
    monkeypatch.setattr(update_follower, "_CHECK_EVERY_MS", 100)
    topic, heard = f"{topic_prefix}features.updates", Heard()
    run = asyncio.create_task(follower(heard, kafka_bootstrap, topic).run())
    try:
        async with asyncio.timeout(WITHIN_S):
            await asyncio.sleep(0.2)
            await admin.create_topics([NewTopic(topic, 1, 1)])
            await until(following)
            for value in (
                b"",
                b"{",
                b"[1]",
                b'{"view": ["applicant"]}',
                b"\xc3\x01 not avro",
                orjson.dumps(update(1, "text", 1_000)),
                orjson.dumps(update(2, 7, 1_000, "plain")),
                orjson.dumps(update(3, 7, 1_000, "unknown")),
                orjson.dumps(update(4, 7, 1_000)),
            ):
                await producer.send_and_wait(topic, value or None, key=b"k")
            # As Avro has it: event times are timestamps, values a union.
            await producer.send_and_wait(topic, AvroCodec("FeatureUpdate").encode(update(5, 7, 2_000)))
            earlier = AvroCodec("FeatureUpdate-1").encode(update(9, 7, 2_200))
            await producer.send_and_wait(topic, earlier)
            deleted = update(7, 7, 2_500) | {"values": None}
            await producer.send_and_wait(topic, orjson.dumps(deleted))
            await producer.send_and_wait(topic, orjson.dumps(update(8, 7, 2_600, "summed")))
            await until(lambda: len(heard.updates) >= 5)
            assert heard.updates == [
                ("applicant", 4, ("age",), 1_000),
                ("applicant", 5, ("age",), 2_000),
                ("applicant", 9, ("age",), 2_200),
                ("applicant", 7, None, 2_500),
                ("summed", 8, ("age",), 2_600),
            ]
            await admin.create_partitions({topic: NewPartitions(2)})
            other = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap)
            await other.start()
            await other.send_and_wait(topic, orjson.dumps(update(6, 7, 3_000)), partition=1)
            await other.stop()
            await until(lambda: len(heard.updates) >= 6)
            assert heard.updates[-1] == ("applicant", 6, ("age",), 3_000)
            assert heard.positions == [(0, 12)]
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
    assert not following()


async def test_after_kafka_was_away_nothing_is_missed(
    stack: ServiceStack,
    kafka_bootstrap: str,
    topic_prefix: str,
    admin: AIOKafkaAdminClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Meanwhile the metric says that updates are not heard of; then reading goes on where it was. What came before the
    start is told once, as what is not heard of."""
    monkeypatch.setattr(update_follower, "_CHECK_EVERY_MS", 200)
    monkeypatch.setattr(update_follower, "_CHECK_WITHIN_S", 1.0)
    topic, heard = f"{topic_prefix}features.updates", Heard()
    await admin.create_topics([NewTopic(topic, 2, 1)])
    producer = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap)
    await producer.start()
    await producer.send_and_wait(topic, orjson.dumps(update(2, 7, 1_000)), partition=1)
    await producer.stop()
    run = asyncio.create_task(follower(heard, kafka_bootstrap, topic).run())
    try:
        async with asyncio.timeout(WITHIN_S):
            await until(following)
            await asyncio.to_thread(stack.kafka.kill)
            try:
                await until(lambda: not following())
            finally:
                await asyncio.to_thread(stack.kafka.start)
            producer = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap)
            await producer.start()
            await producer.send_and_wait(topic, orjson.dumps(update(1, 7, 1_000)))
            await producer.stop()
            await until(lambda: heard.updates)
        assert heard.updates == [("applicant", 1, ("age",), 1_000)]
        assert heard.before_of(None) == [{1: 1}]
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
