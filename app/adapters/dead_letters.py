"""Dead letters: a record that cannot be handled, as it came, with where it lay and what was wrong beside it.

Topic, partition and headers are those of Spring for Apache Kafka's ``DeadLetterPublishingRecoverer`` (numbers big
endian, text UTF-8), so its tools read ours. A record that was sent again and failed again carries the latest account
only. The source record is acknowledged after its dead letter is.
"""

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from app.domain.errors import RecordTooLarge
from app.domain.requests import InboundRecord
from app.ports.log import OutboundRecord, Publisher

SUFFIX: Final = "-dlt"
HEADER_PREFIX: Final = "kafka_dlt-"
ORIGINAL_TOPIC: Final = "kafka_dlt-original-topic"
ORIGINAL_PARTITION: Final = "kafka_dlt-original-partition"
ORIGINAL_OFFSET: Final = "kafka_dlt-original-offset"
ORIGINAL_TIMESTAMP: Final = "kafka_dlt-original-timestamp"
ORIGINAL_TIMESTAMP_TYPE: Final = "kafka_dlt-original-timestamp-type"
ORIGINAL_CONSUMER_GROUP: Final = "kafka_dlt-original-consumer-group"
EXCEPTION_FQCN: Final = "kafka_dlt-exception-fqcn"
EXCEPTION_MESSAGE: Final = "kafka_dlt-exception-message"
VALUE_BYTES_DROPPED: Final = "kafka_dlt-value-bytes-dropped"
"""Decimal text; ours, on a dead letter whose value does not fit into Kafka beside its headers."""
REASON_CHARACTERS_MAX: Final = 1_000
KEY_BYTES_MAX: Final = 1_024
"""Of a dead letter without its value, where the key may be what is too large."""


def dead_letter(record: InboundRecord, reason: str, kind: str, group: str) -> OutboundRecord:
    """The dead letter of ``record``: same partition of ``<topic>-dlt``, original key, value and headers.

    ``reason`` says what was wrong, ``kind`` names it for programs (an error code or an exception's name), ``group`` is
    the consumer group that gave up.
    """
    return OutboundRecord(
        record.topic + SUFFIX,
        record.value,
        record.key,
        record.partition,
        (
            *((name, value) for name, value in record.headers if not name.startswith(HEADER_PREFIX)),
            (ORIGINAL_TOPIC, record.topic.encode()),
            (ORIGINAL_PARTITION, struct.pack(">i", record.partition)),
            (ORIGINAL_OFFSET, struct.pack(">q", record.offset)),
            (ORIGINAL_TIMESTAMP, struct.pack(">q", record.timestamp_ms)),
            (ORIGINAL_TIMESTAMP_TYPE, b"CREATE_TIME"),
            (ORIGINAL_CONSUMER_GROUP, group.encode()),
            (EXCEPTION_FQCN, kind.encode()),
            (EXCEPTION_MESSAGE, reason[:REASON_CHARACTERS_MAX].encode(errors="replace")),
        ),
    )


async def publish_dead_letters(publisher: Publisher, letters: Sequence[OutboundRecord]) -> None:
    """Publish ``letters`` and wait until each is acknowledged.

    One that Kafka takes no more, now that headers have been added to it, is sent without its value: the headers say
    where the original lies. Some letters may be there twice then.

    Raises:
        PublishFailed: some were not acknowledged; publishing all again is safe.
    """
    try:
        await publisher.publish(letters)
    except RecordTooLarge:
        for letter in letters:
            try:
                await publisher.publish([letter])
            except RecordTooLarge:
                await publisher.publish([_without_value(letter)])


def _without_value(letter: OutboundRecord) -> OutboundRecord:
    size = len(letter.value or b"")
    own = tuple((name, value) for name, value in letter.headers if name.startswith(HEADER_PREFIX))
    key = letter.key[:KEY_BYTES_MAX] if letter.key else None
    return replace(letter, value=None, key=key, headers=(*own, (VALUE_BYTES_DROPPED, b"%d" % size)))
