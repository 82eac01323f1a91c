"""Reading a topic from a moment to its end as it is now, for commands: no group, nothing committed, bounded waits."""

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from app.adapters.topics import CONNECT_WITHIN_S, refused_by_kafka
from app.domain.errors import ConfigurationError, StoreUnavailable
from app.domain.requests import InboundRecord
from app.settings import Settings

_librdkafka = logging.getLogger(f"{__name__}.librdkafka")
_librdkafka.addHandler(logging.NullHandler())
_librdkafka.propagate = False

Progress = Callable[[int, int], None]
"""Called with how many offsets were passed by, and of how many."""
_BATCH: Final = 1_000
_POLL_S: Final = 0.5


def read_topic(
    settings: Settings,
    topic: str,
    *,
    since_ms: int | None = None,
    since: Mapping[int, int] | None = None,
    progress: Progress | None = None,
    timeout_s: float = 30.0,
) -> Iterator[InboundRecord]:
    """The records of ``topic`` (full name) since ``since_ms`` (epoch; None: all), up to the end as it is at the start.

    ``since``: offsets by partition instead, as ``ends_of`` gave them.

    Raises:
        ConfigurationError: Kafka does not answer at all, or there is no such topic.
        StoreUnavailable: Kafka stops answering, or sends nothing more for ``timeout_s``.
    """
    with _consumer(settings, topic) as consumer:
        yield from _records(consumer, settings, topic, since_ms, since, progress, timeout_s)


def ends_of(settings: Settings, topic: str, *, timeout_s: float = 30.0) -> dict[int, int]:
    """Where each partition of ``topic`` (full name) ends now. Raises as ``read_topic`` does."""
    return {partition: end for partition, (_, end) in marks_of(settings, topic, timeout_s=timeout_s).items()}


def marks_of(settings: Settings, topic: str, *, timeout_s: float = 30.0) -> dict[int, tuple[int, int]]:
    """Where each partition of ``topic`` (full name) begins and ends now. Raises as ``read_topic`` does."""
    with _consumer(settings, topic) as consumer:
        return _marks(consumer, topic, _partitions(consumer, settings, topic), timeout_s)


@contextmanager
def _consumer(settings: Settings, topic: str) -> Iterator[Consumer]:
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka_bootstrap,
            # The client wants a group's name even where partitions are assigned by hand and nothing is committed.
            "group.id": f"{topic}.reader.{uuid.uuid4()}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        },
        logger=_librdkafka,
    )
    try:
        yield consumer
    except KafkaException as error:
        raise StoreUnavailable(
            f"Kafka at {settings.kafka_bootstrap}: reading {topic}: {error.args[0].str()}; "
            "is it running, and is BROKER_KAFKA_BOOTSTRAP right?"
        ) from error
    finally:
        consumer.close()


def _partitions(consumer: Consumer, settings: Settings, topic: str) -> list[int]:
    try:
        known = consumer.list_topics(topic, timeout=CONNECT_WITHIN_S).topics[topic]
    except KafkaException as error:
        raise refused_by_kafka(settings.kafka_bootstrap, f"reading {topic}", error) from error
    if known.error is not None:
        raise ConfigurationError(f"no topic {topic}: create it with `model-broker topics apply`")
    return sorted(known.partitions)


def _records(
    consumer: Consumer,
    settings: Settings,
    topic: str,
    since_ms: int | None,
    since: Mapping[int, int] | None,
    progress: Progress | None,
    timeout_s: float,
) -> Iterator[InboundRecord]:
    partitions = _partitions(consumer, settings, topic)
    starts, left = _starts(consumer, topic, partitions, since_ms, since, timeout_s)
    total, passed = (
        sum(end - at for at, end in zip(starts.values(), left.values(), strict=True)),
        dict.fromkeys(left, 0),
    )
    left = {partition: end for partition, end in left.items() if starts[partition] < end}
    if progress is not None:
        progress(0, total)
    consumer.assign([TopicPartition(topic, partition, starts[partition]) for partition in left])
    silent_s = 0.0
    while left:
        messages: list[Any] = consumer.consume(_BATCH, _POLL_S)
        silent_s = 0.0 if messages else silent_s + _POLL_S
        if silent_s >= timeout_s:
            raise StoreUnavailable(f"reading {topic}: nothing came for {timeout_s:.0f} s")
        for message in messages:
            error, partition = message.error(), message.partition()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    left.pop(partition, None)
                elif not error.retriable():
                    raise KafkaException(error)
                continue
            if partition not in left:
                continue
            offset = message.offset()
            passed[partition] = min(offset + 1, left[partition]) - starts[partition]
            if offset < left[partition]:
                yield InboundRecord(
                    topic,
                    partition,
                    offset,
                    message.timestamp()[1],
                    message.key(),
                    message.value(),
                    tuple((name, value or b"") for name, value in message.headers() or ()),
                )
            if offset + 1 >= left[partition]:
                del left[partition]
        if progress is not None:
            progress(sum(passed.values()), total)


def _starts(
    consumer: Consumer,
    topic: str,
    partitions: list[int],
    since_ms: int | None,
    since: Mapping[int, int] | None,
    timeout_s: float,
) -> tuple[dict[int, int], dict[int, int]]:
    """Where to begin and where to end, by partition."""
    marks = _marks(consumer, topic, partitions, timeout_s)
    ends = {partition: high for partition, (_, high) in marks.items()}
    starts = {partition: low for partition, (low, _) in marks.items()}
    if since_ms is not None:
        asked = [TopicPartition(topic, partition, since_ms) for partition in partitions]
        for found in consumer.offsets_for_times(asked, timeout=timeout_s):
            # A negative offset: nothing is as young as that.
            starts[found.partition] = found.offset if found.offset >= 0 else ends[found.partition]
    if since is not None:
        starts = {at: min(max(low, since.get(at, low)), ends[at]) for at, low in starts.items()}
    return starts, ends


def _marks(consumer: Consumer, topic: str, partitions: list[int], timeout_s: float) -> dict[int, tuple[int, int]]:
    return {
        partition: consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=timeout_s)
        for partition in partitions
    }
