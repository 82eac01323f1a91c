"""The ledger: the joins table, the audit topic and the reply topics, written in the one order that keeps the promises.

For a decision: the table's entry, acknowledged; then the audit record, acknowledged; then the reply. The entry comes
first and alone, so whatever was decided twice by a crash in between was decided once as far as anyone can see: the
record and the reply are always made from the entry that stands. Nothing is told of an entry before it is certain that
it was acknowledged while the partition was ours. Where Kafka does not answer, each step is tried again for as long as
the partition is ours.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import structlog
from prometheus_client import Counter

from app.adapters.dead_letters import dead_letter, publish_dead_letters
from app.adapters.record_codec import (
    EntryHeader,
    EntryState,
    decode_record,
    encode_entry,
    encode_record,
    entry_record,
    read_entry_header,
)
from app.domain.decisions import DecisionRecord, shrink, what_is_large
from app.domain.errors import PublishFailed, RecordTooLarge
from app.domain.requests import InboundRecord, ReplyAddress
from app.observability import labelled
from app.ports.clock import Clock
from app.ports.log import JoinTable, OutboundRecord, Replies
from app.settings import Settings

log = structlog.get_logger()

_REPLIES = Counter("broker_replies", "Replies by fate: sent, repeated, undeliverable", ["fate"])
_replies = labelled(_REPLIES)
_RETRIES = Counter("broker_publish_retries", "Writes that Kafka did not acknowledge at once", ["what"])
_RETRY_DELAYS_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_KEY_BYTES_MAX: Final = 10_000
_T = TypeVar("_T")
Check = Callable[[], None]
"""Raises NotOwner where whoever writes has lost the right to, though the partition may be back by now."""


class OwnedTable(JoinTable, Protocol):
    """A joins table that knows which partitions are ours."""

    async def settled(self, partition: int) -> None:
        """Wait while a rebalance runs; NotOwner unless ``partition`` is ours after it."""
        ...


@dataclass(frozen=True, slots=True)
class Recipient:
    """Who gets a reply: an address, and the trace it belongs to."""

    address: ReplyAddress | None
    traceparent: bytes | None
    key: bytes | None


class Ledger:
    """Writes and finds what is durable of a request. ``group`` is the consumer group that dead letters name."""

    def __init__(self, *, table: OwnedTable, replies: Replies, settings: Settings, clock: Clock, group: str) -> None:
        self._table = table
        self._replies = replies
        self._clock = clock
        self._group = group
        self._audit_topic = settings.topic("inference.audit")
        self._entry_bytes_max = settings.record_bytes_max - 1_024

    async def owned(self, partition: int) -> None:
        """Wait while a rebalance runs; NotOwner where the partition went away."""
        await self._table.settled(partition)

    def find(self, partition: int, request_id: str) -> EntryHeader | None:
        """What stands for a request id, without decoding it."""
        entry = self._table.get(partition, request_id)
        return None if entry is None else read_entry_header(entry)

    def read(self, partition: int, request_id: str) -> DecisionRecord | None:
        """The record that stands for a request id."""
        entry = self._table.get(partition, request_id)
        return None if entry is None else decode_record(entry_record(entry))

    async def pend(self, record: DecisionRecord, look_ms: int, check: Check) -> None:
        """Make a pending join durable, with when to look at it again; RecordTooLarge where it does not fit."""
        encoded = encode_record(record)
        if len(encoded) > self._entry_bytes_max:
            said = f"a pending join of {len(encoded)} bytes, and {self._entry_bytes_max} are allowed"
            raise RecordTooLarge(f"{said}: {what_is_large(record)}")
        entry = encode_entry(EntryState.PENDING, record, encoded, look_ms)
        await self._put(record, entry, check)

    async def decide(
        self, record: DecisionRecord, recipients: Sequence[Recipient], check: Check, *, acknowledged: bool
    ) -> DecisionRecord:
        """Make a decision durable, record it, and reply; the record as it stands.

        ``acknowledged`` says that the request's offset may be committed already, so nobody would redeliver it: the
        entry then stays DECIDED until record and reply are out, and a worker that finds it so sends them.
        """
        record, encoded = self._fitted(record)
        state = EntryState.DECIDED if acknowledged else EntryState.COMPLETED
        await self._put(record, encode_entry(state, record, encoded), check)
        await self._announce(record, encoded, recipients)
        if acknowledged:
            await self._put(record, encode_entry(EntryState.COMPLETED, record, encoded))
        return record

    async def refuse(self, record: DecisionRecord, recipient: Recipient) -> None:
        """Record and answer a request that was turned away beside the decision that has its id."""
        record, encoded = self._fitted(record)
        await self._announce(record, encoded, [recipient])

    def _fitted(self, record: DecisionRecord) -> tuple[DecisionRecord, bytes]:
        encoded = encode_record(record)
        if len(encoded) > self._entry_bytes_max:
            record = shrink(record, self._entry_bytes_max, self._clock.now_ms())
            encoded = encode_record(record)
        return record, encoded

    async def _announce(self, record: DecisionRecord, encoded: bytes, recipients: Sequence[Recipient]) -> None:
        """Send the audit record, and once it is acknowledged, the replies."""
        await self.audit(record, encoded)
        for recipient in recipients:
            await self.reply(record, recipient, fate="sent")

    async def announce_again(self, partition: int, request_id: str, recipients: Sequence[Recipient]) -> None:
        """Send what stands in the table again, byte for byte, and settle a DECIDED entry."""
        entry = self._table.get(partition, request_id)
        if entry is None:
            return
        encoded = entry_record(entry)
        record = decode_record(encoded)
        await self.audit(record, encoded)
        for recipient in recipients:
            await self.reply(record, recipient, fate="repeated")
        if read_entry_header(entry).state is EntryState.DECIDED:
            await self._put(record, encode_entry(EntryState.COMPLETED, record, encoded))

    async def audit(self, record: DecisionRecord, encoded: bytes) -> None:
        """Send a record to the audit topic, in its request's partition."""
        headers = (
            ("request-id", record.request_id.encode()),
            ("execution-id", record.execution_id.encode()),
            ("kind", str(record.kind).encode()),
            ("status", str(record.status).encode()),
        )
        key, partition = record.request_id.encode(), record.source.partition
        out = OutboundRecord(self._audit_topic, encoded, key, partition, headers)
        await self._publish("audit", partition, [out])

    async def reply(self, record: DecisionRecord, recipient: Recipient, *, fate: str) -> None:
        """Send the reply to one recipient; where its topic went away, say so and go on, for the record stands."""
        address = recipient.address
        if address is None or record.reply is None:
            return
        headers = [
            *address.correlation,
            ("request-id", record.request_id.encode()),
            ("execution-id", record.execution_id.encode()),
            ("status", str(record.status).encode()),
            ("content-type", b"application/json"),
        ]
        if recipient.traceparent is not None:
            headers.append(("traceparent", recipient.traceparent))
        # A key is the caller's, of any size; the reply must go out whatever it is.
        key = recipient.key if recipient.key is None or len(recipient.key) <= _KEY_BYTES_MAX else None
        out = OutboundRecord(address.topic, record.reply, key, address.partition, tuple(headers))
        try:
            await self._publish("reply", record.source.partition, [out], deliverable=address)
        except (PublishFailed, RecordTooLarge) as error:
            fate = "undeliverable"
            log.warning("reply_undeliverable", request_id=record.request_id, topic=address.topic, reason=str(error))
        _replies(fate).inc()

    async def bury(self, record: InboundRecord, reason: str, kind: str) -> None:
        """Copy a record that cannot be handled to its dead-letter topic."""
        letter = dead_letter(record, reason, kind, self._group)
        await self._insist("dead_letter", record.partition, lambda: publish_dead_letters(self._replies, [letter]))

    async def forget(self, partition: int, request_id: str, header: EntryHeader) -> None:
        """Delete an entry whose window has passed, unless another one stands there by now."""

        async def write() -> None:
            await self._table.settled(partition)
            if self.find(partition, request_id) == header:
                await self._table.put(partition, request_id, None)

        await self._insist("joins", partition, write)

    async def dispatch(self, partition: int, record: OutboundRecord, wanted: Callable[[], bool]) -> bool:
        """Send a task to its pool; False where it was not ``wanted`` any more before Kafka took it."""

        async def write() -> bool:
            if not wanted():
                return False
            await self._replies.publish([record])
            return True

        return await self._insist("task", partition, write)

    async def _put(self, record: DecisionRecord, entry: bytes, check: Check | None = None) -> None:
        partition = record.source.partition

        async def write() -> None:
            await self._table.settled(partition)
            if check is not None:
                # Nothing yields between this and the producer, so what holds here holds for the write.
                check()
            await self._table.put(partition, record.request_id, entry)
            if check is not None:
                # The partition is ours, but perhaps again: another Live stands for the request then.
                check()

        await self._insist("joins", partition, write)

    async def _publish(
        self,
        what: str,
        partition: int,
        records: Sequence[OutboundRecord],
        deliverable: ReplyAddress | None = None,
    ) -> None:
        await self._insist(what, partition, lambda: self._replies.publish(records), deliverable)

    async def _insist(
        self,
        what: str,
        partition: int,
        write: Callable[[], Awaitable[_T]],
        deliverable: ReplyAddress | None = None,
    ) -> _T:
        attempt = 0
        while True:
            try:
                return await write()
            except PublishFailed as error:
                if deliverable is not None and not await self._replies.has_partition(
                    deliverable.topic, deliverable.partition
                ):
                    raise
                delay = _RETRY_DELAYS_S[min(attempt, len(_RETRY_DELAYS_S) - 1)]
                attempt += 1
                _RETRIES.labels(what).inc()
                log.warning("publish_retried", what=what, partition=partition, attempt=attempt, reason=str(error))
                await asyncio.sleep(delay)
                await self._table.settled(partition)
