"""Following ``features.updates`` for the near cache: what changes in the store is forgotten here.

Every decide worker reads all partitions from their ends on, without a group: each has a cache of its own. An update is
read as the materializer reads it, so what that refuses takes nothing away. Should Kafka be away, reading goes on where
it was, and until then cached rows end by their ttl; a worker is no less ready for it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

import orjson
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from prometheus_client import Gauge

from app.adapters.avro import AvroCodec
from app.domain.documents import FeatureViewSpec
from app.domain.feature_updates import UpdateRefused, read_update
from app.domain.features import EntityKey
from app.ports.clock import Clock

log = structlog.get_logger()

_POLL_MS: Final = 200
_CHECK_EVERY_MS: Final = 2_000
_CHECK_WITHIN_S: Final = 5.0
_METADATA_AGE_MS: Final = 60_000
"""How soon a new partition is noticed; it is read from its beginning."""
_STOP_WITHIN_S: Final = 5.0
_START_WITHIN_S: Final = 30.0
_RETRY_S: Final = 1.0
_AT_ONCE: Final = 50
"""Updates that are read before others have their turn on the event loop."""
_AVRO_MAGIC: Final = b"\xc3\x01"

_FOLLOWING = Gauge(
    "broker_feature_cache_following", "Whether the near cache hears of updates: 1; 0 while Kafka does not answer"
)
_BEHIND = Gauge("broker_feature_cache_updates_behind", "Updates that the near cache has not heard of yet")

Views = Callable[[], Mapping[str, FeatureViewSpec] | None]


class Invalidates(Protocol):
    """What wants to hear of updates."""

    def invalidate(self, view: str, key: EntityKey, event_time_ms: int) -> None:
        """A row of ``view`` changes."""
        ...


class UpdateFollower:
    """Tells ``cache`` of each update in ``topic`` (full name) that concerns a view with a ``cache``."""

    def __init__(
        self, cache: Invalidates, *, bootstrap: str, topic: str, client_id: str, views: Views, clock: Clock
    ) -> None:
        self._cache = cache
        self._bootstrap = bootstrap
        self._topic = topic
        self._client_id = client_id
        self._views = views
        self._clock = clock
        self._codec = AvroCodec("FeatureUpdate")
        self._positions: dict[TopicPartition, int] = {}
        self._checked_ms = float("-inf")

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self._bootstrap,
                client_id=f"{self._client_id}-features",
                enable_auto_commit=False,
                auto_offset_reset="latest",
                metadata_max_age_ms=_METADATA_AGE_MS,
            )
            try:
                async with asyncio.timeout(_START_WITHIN_S):
                    await consumer.start()
                while True:
                    await self._assign(consumer)
                    await self._follow(consumer)
            except (KafkaError, TimeoutError) as error:
                log.warning("feature_updates_not_followed", topic=self._topic, reason=repr(error))
            finally:
                _FOLLOWING.set(0)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_STOP_WITHIN_S):
                        await consumer.stop()
            await asyncio.sleep(_RETRY_S)

    async def _assign(self, consumer: AIOKafkaConsumer) -> None:
        """Take all partitions: known ones from where they were, later ones from their beginning, all at first from
        their ends."""
        numbers = consumer.partitions_for_topic(self._topic)
        if not numbers:
            raise UnknownTopicOrPartitionError(self._topic)
        partitions = [TopicPartition(self._topic, number) for number in sorted(numbers)]
        consumer.assign(partitions)
        async with asyncio.timeout(_START_WITHIN_S):
            ends = await consumer.end_offsets(partitions)
            firsts = await consumer.beginning_offsets(partitions)
        later = bool(self._positions)
        for tp in partitions:
            start = self._positions.get(tp, firsts[tp] if later else ends[tp])
            # A topic that was made anew has neither more nor less than it has.
            self._positions[tp] = min(max(start, firsts[tp]), ends[tp])
            consumer.seek(tp, self._positions[tp])
        _FOLLOWING.set(1)

    async def _follow(self, consumer: AIOKafkaConsumer) -> None:
        """Read until the topic has more partitions than are read."""
        while True:
            for tp, records in (await consumer.getmany(timeout_ms=_POLL_MS)).items():
                await self._tell(record.value for record in records)
                self._positions[tp] = records[-1].offset + 1
            if self._clock.steady_ms() - self._checked_ms >= _CHECK_EVERY_MS:
                self._checked_ms = self._clock.steady_ms()
                async with asyncio.timeout(_CHECK_WITHIN_S):
                    ends = await consumer.end_offsets(list(self._positions))
                _BEHIND.set(sum(max(0, end - self._positions[tp]) for tp, end in ends.items()))
                if len(consumer.partitions_for_topic(self._topic) or ()) > len(self._positions):
                    return

    async def _tell(self, values: Iterable[bytes | None]) -> None:
        views = self._views() or {}
        if not any(view.cache for view in views.values()):
            return
        for number, value in enumerate(values, 1):
            self._tell_one(value, views)
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)

    def _tell_one(self, value: bytes | None, views: Mapping[str, FeatureViewSpec]) -> None:
        if not value:
            return
        try:
            body: Any = self._codec.decode(value) if value.startswith(_AVRO_MAGIC) else orjson.loads(value)
            view = views.get(body["view"])
            if view is None or view.cache is None:
                return
            row = read_update(body, views, self._clock.now_ms())
        except (ValueError, TypeError, KeyError, UpdateRefused):
            # The materializer says what is wrong with it.
            return
        self._cache.invalidate(row.view, row.key, row.event_time_ms)
