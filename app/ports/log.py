"""The log that everything durable goes through: records out, acknowledged; and the table of joins behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from app.domain.requests import Headers


@dataclass(frozen=True, slots=True)
class OutboundRecord:
    """A record to publish; ``partition`` None lets the key choose."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    partition: int | None = None
    headers: Headers = ()


class Publisher(Protocol):
    """Publishes records and waits for all in-sync replicas to acknowledge them."""

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """All of ``records``, together; returns their offsets when each is acknowledged.

        Raises:
            RecordTooLarge: a record exceeds what Kafka takes; the others may have been written.
            PublishFailed: a record was not acknowledged in time; it may or may not have been written.
        """
        ...


class Replies(Publisher, Protocol):
    """A publisher that also knows which topics there are: callers name theirs."""

    async def has_partition(self, topic: str, partition: int | None) -> bool:
        """Whether the topic exists, and the partition where one is named."""
        ...


class JoinTable(Protocol):
    """The durable table of joins: one entry a request id, each in the partition of its request."""

    def get(self, partition: int, request_id: str) -> bytes | None:
        """The entry, or None."""
        ...

    async def put(self, partition: int, request_id: str, entry: bytes | None) -> None:
        """Write an entry (None deletes it); returns when Kafka has acknowledged it.

        Raises:
            NotOwner: the partition is another worker's; what Kafka may have of the entry, its owner may not have read,
                and it is to be told to nobody.
            RecordTooLarge, PublishFailed: as ``Publisher.publish``.
        """
        ...
