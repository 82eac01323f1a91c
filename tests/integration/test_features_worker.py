"""The features worker on real Kafka and Redis: updates arrive, a dead Redis loses none, bad ones are buried."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from app.adapters.clock import SystemClock
from app.adapters.faust_app import create_app
from app.adapters.faust_table import DurableTable
from app.adapters.kafka import KafkaPublisher
from app.adapters.redis_feast import RedisFeatureStore
from app.adapters.topics import AGGREGATES_CHANGELOG
from app.agents.aggregates import Aggregates, check_entry
from app.agents.features import attach
from app.domain.features import EntityKey, Value, ViewNeed
from app.domain.view_documents import FeatureViewSpec
from app.settings import Settings
from tests.support.stack import ServiceStack

VIEW = FeatureViewSpec.model_validate_json(
    """{"entities": [{"name": "applicant_id", "type": "INT64"}], "features": [{"name": "age", "type": "INT64"}],
        "source": {"type": "redis", "project": "worker"}}"""
)
WITHIN_S = 150.0
APPLICANTS = 200


def update(applicant: int, age: object) -> bytes:
    """An applicant's FeatureUpdate."""
    return orjson.dumps(
        {
            "project": "worker",
            "view": "applicant",
            "entities": {"applicant_id": applicant},
            "values": {"age": age},
            "event_time": 1_700_000_000_000,
        }
    )


async def ages(store: RedisFeatureStore) -> list[Value]:
    """What the store holds of all applicants."""
    found = [
        await store.fetch(
            [
                ViewNeed(
                    "applicant", EntityKey("worker", ("applicant_id",), (number,), ("INT64",)), ("age",), ("INT64",)
                )
            ],
            5_000,
        )
        for number in range(APPLICANTS)
    ]
    return [each["applicant", "age"].value for each in found]


async def until_stored(store: RedisFeatureStore, count: int) -> None:
    """Wait for the first ``count`` applicants' ages; the caller bounds it."""
    while (await ages(store))[:count] != list(range(count)):  # noqa: ASYNC110 - Redis has no event to wait for
        await asyncio.sleep(0.05)


@asynccontextmanager
async def running_worker(
    settings: Settings, store: RedisFeatureStore, views: Mapping[str, FeatureViewSpec] | None = None
) -> AsyncIterator[None]:
    """The features worker, in this process; ``views`` instead of the one above."""
    known = views or {"applicant": VIEW}
    app = create_app(settings, role="features", instance="features-test")
    async with KafkaPublisher(settings, client_id="features-test") as publisher:
        table = DurableTable(
            app,
            name="aggregates",
            changelog=settings.topic(AGGREGATES_CHANGELOG),
            publisher=publisher,
            read=check_entry,
        )
        aggregates = Aggregates(table=table, writer=store, views=lambda: known, clock=SystemClock())
        table.on_ownership(aggregates.on_ownership)
        intake = attach(
            app,
            topic=settings.topic("features.updates"),
            writer=store,
            publisher=publisher,
            views=lambda: known,
            group=app.conf.id,
            clock=SystemClock(),
            aggregates=aggregates,
        )
        start = asyncio.create_task(app.start())
        try:
            yield
        finally:
            await asyncio.wait_for(app.stop(), WITHIN_S)
            await intake.close()
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)


async def test_updates_reach_the_store_through_its_absence(
    stack: ServiceStack, kafka_bootstrap: str, redis_url: str, topic_prefix: str, tmp_path: Path
) -> None:
    """Updates sent while Redis is dead are stored when it is back; a malformed one is in the dead-letter topic."""
    settings = Settings(
        kafka_bootstrap=kafka_bootstrap, redis_url=redis_url, topic_prefix=topic_prefix, data_dir=tmp_path
    )
    topic, changelog = settings.topic("features.updates"), settings.topic(AGGREGATES_CHANGELOG)
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(name, 2, 1) for name in (topic, f"{topic}-dlt", changelog)])
    producer = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, acks="all")
    await producer.start()
    # What somebody else wrote into the worker's state, as a reply does that was let into it, ends no worker.
    for key in (b"17", b"\xff", b"applicant"):
        await producer.send_and_wait(changelog, b'{"request_id":"r","status":"completed"}', key=key)
    letters = AIOKafkaConsumer(f"{topic}-dlt", bootstrap_servers=kafka_bootstrap, auto_offset_reset="earliest")
    await letters.start()
    store = RedisFeatureStore(redis_url)
    try:
        async with running_worker(settings, store), asyncio.timeout(WITHIN_S):
            for number in range(APPLICANTS // 2):
                await producer.send(topic, update(number, number), key=b"%d" % number)
            await producer.flush()
            await until_stored(store, APPLICANTS // 2)
            await asyncio.to_thread(stack.redis.kill)
            try:
                await producer.send_and_wait(topic, update(0, "old"), key=b"bad", partition=1)
                for number in range(APPLICANTS // 2, APPLICANTS):
                    await producer.send(topic, update(number, number), key=b"%d" % number)
                await producer.flush()
            finally:
                await asyncio.to_thread(stack.redis.start)
            await until_stored(store, APPLICANTS)
            letter = await letters.getone()
        headers = dict(letter.headers)
        assert (letter.key, letter.value, letter.partition) == (b"bad", update(0, "old"), 1)
        assert headers["kafka_dlt-original-topic"] == topic.encode()
        assert headers["kafka_dlt-original-partition"] == b"\x00\x00\x00\x01"
        assert headers["kafka_dlt-original-consumer-group"] == f"{topic_prefix}features".encode()
        assert b"values.age" in headers["kafka_dlt-exception-message"]
        # What is acknowledged is committed on the way out: a next worker has nothing to do again.
        committed = await admin.list_consumer_group_offsets(f"{topic_prefix}features")
        assert sum(offset.offset for offset in committed.values()) == APPLICANTS + 1
    finally:
        await store.close()
        await letters.stop()
        await producer.stop()
        await admin.close()
