"""Following ``features.updates`` for the near cache: what changes in the store is forgotten here.

Every decide worker reads all partitions from their ends on, without a group: each has a cache of its own. What lies
before may still be on its way to the store, and the cache is told where it ends. Should Kafka be away, reading goes on
where it was, and until then cached rows end by their ttl; a worker is no less ready for it.

While the cache waits for those, or for updates that aggregates follow, the materializer's group is asked for its
offsets: it commits an update when Redis has acknowledged the rows, and what is computed of them. Where Kafka does not
say, nothing is told.
"""

import asyncio
from collections.abc import Mapping
from typing import Final

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from prometheus_client import Counter, Gauge

from app.adapters.kafka_clients import REQUEST_TIMEOUT_MS, close_clients
from app.adapters.update_announcer import Follows, UpdateAnnouncer, Views
from app.ports.clock import Clock

log = structlog.get_logger()

_POLL_MS: Final = 200
_CHECK_EVERY_MS: Final = 2_000
_CHECK_WITHIN_S: Final = 5.0
_PARTITIONS_EVERY_MS: Final = 60_000
"""How soon a new partition is noticed; it is read from its beginning."""
_START_WITHIN_S: Final = 30.0
_RETRY_S: Final = 1.0
_OFFSETS_EVERY_S: Final = 0.2
"""A materializer commits every half a second or so (``BROKER_COMMIT_INTERVAL``); together less than one second."""

_FOLLOWING = Gauge(
    "broker_feature_cache_following", "Whether the near cache hears of updates: 1; 0 while Kafka does not answer"
)
_BEHIND = Gauge("broker_feature_cache_updates_behind", "Updates that the near cache has not heard of yet")
_UNREAD = Counter(
    "broker_feature_cache_offsets_unread",
    "Attempts to learn what the features workers have committed that brought nothing",
)


class UpdateFollower:
    """Tells ``cache`` of each update in ``topic`` that concerns a view with a ``cache``, and, as long as it waits for
    that, what ``group`` has materialized (full names)."""

    def __init__(
        self, cache: Follows, *, bootstrap: str, topic: str, group: str, client_id: str, views: Views, clock: Clock
    ) -> None:
        self._cache = cache
        self._bootstrap = bootstrap
        self._topic = topic
        self._group = group
        self._client_id = client_id
        self._announcer = UpdateAnnouncer(cache, views=views, clock=clock)
        self._clock = clock

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self._bootstrap,
                client_id=f"{self._client_id}-features",
                enable_auto_commit=False,
                auto_offset_reset="latest",
                request_timeout_ms=REQUEST_TIMEOUT_MS,
            )
            admin = AIOKafkaAdminClient(bootstrap_servers=self._bootstrap, client_id=f"{self._client_id}-partitions")
            learning: asyncio.Task[None] | None = None
            try:
                async with asyncio.timeout(_START_WITHIN_S):
                    await admin.start()
                    await consumer.start()
                learning = asyncio.create_task(self._learn(consumer, admin), name="materialized-offsets")
                while True:
                    await self._assign(consumer, await self._partitions(admin))
                    await self._follow(consumer, admin, learning)
            except (KafkaError, TimeoutError) as error:
                log.warning("feature_updates_not_followed", topic=self._topic, reason=repr(error))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                log.warning("feature_updates_not_followed", topic=self._topic, reason="a task of the client's ended")
            finally:
                _FOLLOWING.set(0)
                if learning is not None:
                    learning.cancel()
                    await asyncio.gather(learning, return_exceptions=True)
                await close_clients(consumer.stop(), admin.close())
            await asyncio.sleep(_RETRY_S)

    async def _partitions(self, admin: AIOKafkaAdminClient) -> list[TopicPartition]:
        async with asyncio.timeout(_CHECK_WITHIN_S):
            # All topics: asking for one that is not there can make it.
            topics = await admin.describe_topics()
        found = next((each for each in topics if each["topic"] == self._topic), None)
        if found is None or not found["partitions"]:
            raise UnknownTopicOrPartitionError(f"{self._topic}: create it with `model-broker topics apply`")
        return sorted(TopicPartition(self._topic, each["partition"]) for each in found["partitions"])

    async def _assign(self, consumer: AIOKafkaConsumer, partitions: list[TopicPartition]) -> None:
        consumer.assign(partitions)
        async with asyncio.timeout(_START_WITHIN_S):
            ends = await consumer.end_offsets(partitions)
            firsts = await consumer.beginning_offsets(partitions)
        self._announcer.assign(_by_partition(firsts), _by_partition(ends))
        for tp in partitions:
            consumer.seek(tp, self._announcer.positions[tp.partition])
        _FOLLOWING.set(1)

    async def _follow(
        self, consumer: AIOKafkaConsumer, admin: AIOKafkaAdminClient, learning: "asyncio.Task[None]"
    ) -> None:
        """Read until the topic has more partitions than are read."""
        counted_ms = checked_ms = self._clock.steady_ms()
        while True:
            if learning.done():
                await learning
            read = await consumer.getmany(timeout_ms=_POLL_MS)
            self._announcer.notice()
            for tp, records in read.items():
                await self._announcer.tell(tp.partition, records)
            now_ms = self._clock.steady_ms()
            if now_ms - checked_ms >= _CHECK_EVERY_MS:
                checked_ms = now_ms
                # Kafka's absence does not show in what it sends.
                async with asyncio.timeout(_CHECK_WITHIN_S):
                    ends = await consumer.end_offsets(consumer.assignment())
                positions = self._announcer.positions
                _BEHIND.set(sum(max(0, end - positions[tp.partition]) for tp, end in ends.items()))
            if now_ms - counted_ms >= _PARTITIONS_EVERY_MS:
                counted_ms = now_ms
                if len(await self._partitions(admin)) > len(self._announcer.positions):
                    return

    async def _learn(self, consumer: AIOKafkaConsumer, admin: AIOKafkaAdminClient) -> None:
        """Tell the cache how far the materializer is, while it waits for that."""
        coordinator: int | None = None
        told = True
        while True:
            await asyncio.sleep(_OFFSETS_EVERY_S)
            announced = self._cache.awaits()
            if announced is None or not _ends(consumer):
                continue
            reason = "the group has committed nothing in the topic"
            offsets: dict[int, int] = {}
            try:
                async with asyncio.timeout(_CHECK_WITHIN_S):
                    if coordinator is None:
                        coordinator = await admin.find_coordinator(self._group)
                    found = await admin.list_consumer_group_offsets(self._group, coordinator)
                # What is past a partition's end is of a topic that was there before this one.
                ends = _ends(consumer)
                offsets = {tp.partition: each.offset for tp, each in found.items() if each.offset <= ends.get(tp, -1)}
            except (KafkaError, OSError, TimeoutError) as error:
                reason = repr(error)
            if offsets:
                self._cache.materialized(announced, offsets)
                told = True
                continue
            # An answer without offsets may be that of a broker that coordinates the group no more.
            coordinator = None
            _UNREAD.inc()
            if told:
                told = False
                log.warning("materialized_offsets_unknown", group=self._group, topic=self._topic, reason=reason)
            await asyncio.sleep(_RETRY_S)


def _ends(consumer: AIOKafkaConsumer) -> dict[TopicPartition, int]:
    """Where the partitions end from which a fetch has returned."""
    return {tp: end for tp in consumer.assignment() if (end := consumer.highwater(tp)) is not None}


def _by_partition(offsets: Mapping[TopicPartition, int]) -> dict[int, int]:
    return {tp.partition: offset for tp, offset in offsets.items()}
