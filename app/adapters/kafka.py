"""Kafka out: one idempotent producer a process, every record acknowledged by all in-sync replicas before it counts.

librdkafka does the work in threads of its own: a decision makes three records in as many partitions, and batching and
sending them in Python costs a worker more than everything else it does (bench/, docs/adr). Deliveries come back in
one thread and enter the event loop together.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

from confluent_kafka import KafkaError, KafkaException, Producer

from app.domain.errors import ConfigurationError, PublisherBroken, PublishFailed, RecordTooLarge
from app.ports.log import OutboundRecord
from app.settings import Settings

_DELIVERY_TIMEOUT_MS: Final = 30_000
_FLUSH_WITHIN_S: Final = 2.0
"""A broker that is killed and comes back refuses sends for about 12 s; past this bound the caller decides."""
_LOOKUP_TIMEOUT_S: Final = 2.0
_KNOWN_FOR_S: Final = 60.0
_ABSENT_FOR_S: Final = 5.0
_LOOKED_UP_MAX: Final = 1_000
_CONNECT_TIMEOUT_S: Final = 10.0
_FULL_WAIT_S: Final = 0.01
_TOO_LARGE: Final = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})

Delivery = tuple["asyncio.Future[int]", int | PublishFailed | RecordTooLarge | PublisherBroken]


class KafkaPublisher:
    """``ports.log.Replies`` over librdkafka. An async context manager: it connects on entry and flushes on exit."""

    def __init__(self, settings: Settings, *, client_id: str) -> None:
        self._bootstrap = settings.kafka_bootstrap
        self._value_bytes_max = settings.record_bytes_max
        self._configuration: dict[str, Any] = {
            "bootstrap.servers": settings.kafka_bootstrap,
            "client.id": client_id,
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": 0,
            "delivery.timeout.ms": _DELIVERY_TIMEOUT_MS,
            # Keys and headers need a little room beside the value.
            "message.max.bytes": settings.record_bytes_max + 24_000,
            "partitioner": "murmur2_random",
            "topic.metadata.propagation.max.ms": 2_000,
            "reconnect.backoff.max.ms": 1_000,
            "socket.nagle.disable": True,
            "allow.auto.create.topics": False,
            "logger": logging.getLogger("librdkafka"),
        }
        self._looked_up: dict[str, tuple[int, float]] = {}
        self._delivered: deque[Delivery] = deque()
        self._waking = False
        self._ended = threading.Event()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._producer = Producer(self._configuration)
        try:
            await asyncio.to_thread(self._producer.list_topics, timeout=_CONNECT_TIMEOUT_S)
        except KafkaException as error:
            raise ConfigurationError(
                f"Kafka does not answer at {self._bootstrap} ({error.args[0].str()}): start it or set "
                "BROKER_KAFKA_BOOTSTRAP"
            ) from error
        self._poller = threading.Thread(target=self._poll, name="kafka-deliveries", daemon=True)
        self._poller.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whoever published waits for the acknowledgement: what is still here is of work that was cancelled.
        await asyncio.to_thread(self._producer.flush, _FLUSH_WITHIN_S)
        self._ended.set()
        await asyncio.to_thread(self._poller.join, 5.0)

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See ``ports.log.Publisher``."""
        for record in records:
            if record.value is not None and len(record.value) > self._value_bytes_max:
                raise RecordTooLarge(
                    f"a record for {record.topic} has {len(record.value)} bytes; {self._value_bytes_max} are allowed"
                )
        deliveries = []
        for record in records:
            delivery: asyncio.Future[int] = self._loop.create_future()
            await self._produce(record, delivery)
            deliveries.append(delivery)
        if len(deliveries) == 1:
            return (await deliveries[0],)
        # Each one is looked at, so that no failure goes unread; the first is raised.
        outcomes = await asyncio.gather(*deliveries, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, int)]

    async def _produce(self, record: OutboundRecord, delivery: "asyncio.Future[int]") -> None:
        give_up = self._loop.time() + _DELIVERY_TIMEOUT_MS / 1000
        topic = record.topic

        def delivered(error: KafkaError | None, message: Any) -> None:
            outcome: int | PublishFailed | RecordTooLarge | PublisherBroken
            outcome = message.offset() if error is None else _failure(topic, error)
            self._delivered.append((delivery, outcome))

        while True:
            try:
                self._producer.produce(
                    topic,
                    record.value,
                    record.key,
                    -1 if record.partition is None else record.partition,
                    delivered,
                    headers=list(record.headers),
                )
            except BufferError as error:
                if self._loop.time() > give_up:
                    raise PublishFailed(f"the producer's queue is full: Kafka takes nothing for {topic}") from error
                await asyncio.sleep(_FULL_WAIT_S)
            except KafkaException as error:
                raise _failure(topic, error.args[0]) from error
            else:
                return

    def _poll(self) -> None:
        """The deliveries' thread: whatever came since the last turn enters the event loop as one call."""
        while not self._ended.is_set():
            self._producer.poll(0.1)
            if self._delivered and not self._waking:
                self._waking = True
                try:
                    self._loop.call_soon_threadsafe(self._resolve)
                except RuntimeError:
                    # The loop has closed: nobody waits any more.
                    return

    def _resolve(self) -> None:
        self._waking = False
        while self._delivered:
            delivery, outcome = self._delivered.popleft()
            if delivery.done():
                continue
            if isinstance(outcome, int):
                delivery.set_result(outcome)
            else:
                delivery.set_exception(outcome)

    async def has_partition(self, topic: str, partition: int | None) -> bool:
        """Whether ``topic`` exists (and has ``partition``); the answer is remembered for a while."""
        count, until = self._looked_up.get(topic, (0, 0.0))
        if until < time.monotonic():
            count = await asyncio.to_thread(self._partition_count, topic)
            if len(self._looked_up) >= _LOOKED_UP_MAX:
                self._looked_up.clear()
            self._looked_up[topic] = (count, time.monotonic() + (_KNOWN_FOR_S if count else _ABSENT_FOR_S))
        return count > 0 if partition is None else partition < count

    def _partition_count(self, topic: str) -> int:
        try:
            found = self._producer.list_topics(topic, timeout=_LOOKUP_TIMEOUT_S).topics.get(topic)
        except (ValueError, RuntimeError):
            # librdkafka takes no such name.
            return 0
        except KafkaException:
            # Not knowing is no reason to refuse: the write itself will say.
            return self._looked_up.get(topic, (2**31 - 1, 0.0))[0]
        return 0 if found is None or found.error is not None else len(found.partitions)


def _failure(topic: str, error: KafkaError) -> PublishFailed | RecordTooLarge | PublisherBroken:
    if error.fatal():
        return PublisherBroken(f"the producer cannot go on: {error.str()}; restart this process")
    if error.code() in _TOO_LARGE:
        return RecordTooLarge(f"Kafka refuses a record of {topic}: {error.str()}")
    return PublishFailed(f"Kafka did not acknowledge a record for {topic}: {error.str()}")
