"""Kafka out: one idempotent producer a process, every record acknowledged by all in-sync replicas before it counts."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    UnknownTopicOrPartitionError,
)

from app.domain.errors import ConfigurationError, PublishFailed, RecordTooLarge
from app.ports.log import OutboundRecord
from app.settings import Settings

_LOOKUP_TIMEOUT_S: Final = 2.0
_ABSENT_FOR_S: Final = 10.0
_ABSENT_MAX: Final = 1_000


class KafkaPublisher:
    """``ports.log.Publisher`` over aiokafka. An async context manager: it connects on entry and flushes on exit."""

    def __init__(self, settings: Settings, *, client_id: str) -> None:
        self._bootstrap = settings.kafka_bootstrap
        # The producer's own bound is on the encoded request; keys and headers need a little room beside the value.
        self._producer = AIOKafkaProducer(
            bootstrap_servers=settings.kafka_bootstrap,
            client_id=client_id,
            enable_idempotence=True,
            acks="all",
            linger_ms=0,
            max_request_size=settings.record_bytes_max + 24_000,
            request_timeout_ms=30_000,
        )
        self._value_bytes_max = settings.record_bytes_max
        self._absent: dict[str, float] = {}

    async def __aenter__(self) -> Self:
        try:
            await self._producer.start()
        except KafkaError as error:
            raise ConfigurationError(
                f"Kafka does not answer at {self._bootstrap} ({error}): start it or set BROKER_KAFKA_BOOTSTRAP"
            ) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._producer.stop()

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See ``ports.log.Publisher``."""
        for record in records:
            if record.value is not None and len(record.value) > self._value_bytes_max:
                raise RecordTooLarge(
                    f"a record for {record.topic} has {len(record.value)} bytes; {self._value_bytes_max} are allowed"
                )
        try:
            sent = [
                await self._producer.send(
                    record.topic,
                    record.value,
                    key=record.key,
                    partition=record.partition,
                    headers=list(record.headers),
                )
                for record in records
            ]
            written = [await delivery for delivery in sent] if len(sent) < 3 else await asyncio.gather(*sent)
        except (MessageSizeTooLargeError, RecordListTooLargeError) as error:
            raise RecordTooLarge(f"Kafka refuses a record of {records[0].topic}: {error}") from error
        except (KafkaError, UnknownTopicOrPartitionError, AssertionError) as error:
            topics = ", ".join(sorted({record.topic for record in records}))
            raise PublishFailed(f"Kafka did not acknowledge a record for {topics}: {error!r}") from error
        return [metadata.offset for metadata in written]

    async def has_partition(self, topic: str, partition: int | None) -> bool:
        """Whether ``topic`` exists (and has ``partition``); a no is remembered for a while, for looking up costs."""
        known = self._producer.client.cluster.partitions_for_topic(topic)
        if known is None:
            loop = asyncio.get_running_loop()
            if self._absent.get(topic, 0.0) > loop.time():
                return False
            try:
                known = await asyncio.wait_for(self._producer.partitions_for(topic), _LOOKUP_TIMEOUT_S)
            except (KafkaError, TimeoutError):
                if len(self._absent) >= _ABSENT_MAX:
                    self._absent.clear()
                self._absent[topic] = loop.time() + _ABSENT_FOR_S
                return False
        return partition is None or partition in known
