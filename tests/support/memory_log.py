"""Kafka in memory: partitions that outlive processes, a producer that can be made to fail, and the joins table.

A write takes its place in the log when it is sent, as an idempotent producer's writes do, and is acknowledged a little
later. ``Fate`` says what else may become of it.
"""

import asyncio
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from app.adapters.record_codec import EntryHeader, read_entry_header
from app.domain.errors import NotOwner, PublishFailed, RecordTooLarge
from app.domain.requests import InboundRecord
from app.ports.clock import Clock
from app.ports.log import OutboundRecord

ACKNOWLEDGED_AFTER_S: Final = 0.002
HELD_FOR_S: Final = 0.2


class Fate(Enum):
    """What becomes of a write."""

    WRITTEN = "written"
    SLOW = "slow"
    """Written, and acknowledged long after."""
    HELD = "held"
    """Held in the producer while the process stands still: written long after, whoever owns the partition by then."""
    LOST = "lost"
    """Not written; the producer gives up."""
    UNACKNOWLEDGED = "unacknowledged"
    """Written; the producer gives up all the same."""
    KILLED_BEFORE = "killed before"
    """The process dies, and the write with it."""
    KILLED_AFTER = "killed after"
    """The process dies once the write is in the log."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A record in the log: ``order`` is its place among all records of all topics."""

    topic: str
    partition: int
    offset: int
    time_ms: int
    order: int
    record: OutboundRecord

    def inbound(self) -> InboundRecord:
        """The record as a consumer gets it."""
        out = self.record
        return InboundRecord(self.topic, self.partition, self.offset, self.time_ms, out.key, out.value, out.headers)


class MemoryLog:
    """Topics of one partition count; what is in them stays. ``slow_topics_s``: so long it takes to learn of a topic."""

    def __init__(self, clock: Clock, topics: Sequence[str], partitions: int = 2) -> None:
        self._clock = clock
        self.partitions = partitions
        self.topics: dict[str, list[list[Stored]]] = {topic: [[] for _ in range(partitions)] for topic in topics}
        self.listeners: list[Callable[[], None]] = []
        self.slow_topics_s = 0.0
        self._order = 0

    def append(self, record: OutboundRecord) -> Stored:
        """Write a record; without a partition its key chooses."""
        partition = record.partition
        if partition is None:
            partition = zlib.crc32(record.key or b"") % self.partitions
        lane = self.topics[record.topic][partition]
        stored = Stored(record.topic, partition, len(lane), self._clock.now_ms(), self._order, record)
        self._order += 1
        lane.append(stored)
        for listener in self.listeners:
            listener()
        return stored

    def records(self, topic: str) -> list[Stored]:
        """All records of a topic, in the order they were written."""
        return sorted((stored for lane in self.topics[topic] for stored in lane), key=lambda stored: stored.order)


class MemoryPublisher:
    """``ports.log.Replies`` of one process over a log. ``kill`` ends the process; after it nothing is written."""

    def __init__(self, log: MemoryLog, *, kill: Callable[[], None] | None = None, bytes_max: int = 1_000_000) -> None:
        self._log = log
        self._kill = kill
        self._bytes_max = bytes_max
        self.fates: deque[Fate] = deque()
        """Of the next writes, in order; then all goes well."""
        self.dead = False

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See ``ports.log.Publisher``."""
        offsets: list[int] = []
        failed, delay_s = "", ACKNOWLEDGED_AFTER_S
        for record in records:
            if len(record.value or b"") > self._bytes_max:
                raise RecordTooLarge(f"a record of {len(record.value or b'')} bytes")
        for record in records:
            fate = self.fates.popleft() if self.fates and not self.dead else Fate.WRITTEN
            if fate is Fate.KILLED_BEFORE:
                await self._die()
            if self.dead:
                await asyncio.get_running_loop().create_future()
            if record.topic not in self._log.topics:
                failed = f"no topic {record.topic}"
            elif fate is Fate.LOST:
                failed = "lost"
            elif fate is Fate.HELD:
                await asyncio.sleep(HELD_FOR_S)
                if self.dead:
                    await asyncio.get_running_loop().create_future()
                offsets.append(self._log.append(record).offset)
            else:
                offsets.append(self._log.append(record).offset)
            if fate is Fate.KILLED_AFTER:
                await self._die()
            if fate is Fate.UNACKNOWLEDGED:
                failed = "unacknowledged"
            if fate is Fate.SLOW:
                delay_s = 0.3
        await asyncio.sleep(delay_s)
        if failed:
            raise PublishFailed(failed)
        return offsets

    async def _die(self) -> None:
        assert self._kill is not None
        self._kill()
        await asyncio.get_running_loop().create_future()

    async def has_partition(self, topic: str, partition: int | None) -> bool:
        """See ``ports.log.Replies``."""
        if self._log.slow_topics_s:
            await asyncio.sleep(self._log.slow_topics_s)
        return topic in self._log.topics and (partition is None or partition < self._log.partitions)


class MemoryTable:
    """``DurableTable`` over a log: what is recovered is what the changelog holds when a partition is gained."""

    def __init__(self, log: MemoryLog, changelog: str, publisher: MemoryPublisher) -> None:
        self._log = log
        self._changelog = changelog
        self._publisher = publisher
        self._settled = asyncio.Event()
        self._owned: frozenset[int] = frozenset()
        self._entries: dict[int, dict[str, tuple[int, bytes]]] = {}

    def revoke(self) -> None:
        """A rebalance begins."""
        self._settled.clear()

    def assign(self, owned: frozenset[int]) -> frozenset[int]:
        """A rebalance has settled; the partitions gained."""
        gained, self._owned = owned - self._owned, owned
        self._entries = {partition: entries for partition, entries in self._entries.items() if partition in owned}
        for partition in gained:
            self._entries[partition] = {}
            for stored in self._log.topics[self._changelog][partition]:
                assert stored.record.key is not None
                self._apply(partition, stored.record.key.decode(), stored.offset, stored.record.value)
        self._settled.set()
        return gained

    def _apply(self, partition: int, request_id: str, offset: int, entry: bytes | None) -> None:
        entries = self._entries.setdefault(partition, {})
        if request_id in entries and offset <= entries[request_id][0]:
            return
        if entry is None:
            entries.pop(request_id, None)
        else:
            entries[request_id] = (offset, entry)

    async def settled(self, partition: int) -> None:
        """See ``OwnedTable``."""
        await self._settled.wait()
        if partition not in self._owned:
            raise NotOwner(f"partition {partition} belongs to another worker")

    def get(self, partition: int, request_id: str) -> bytes | None:
        """See ``ports.log.JoinTable``."""
        entry = self._entries.get(partition, {}).get(request_id)
        return None if entry is None else entry[1]

    def entries(self, partition: int) -> Iterator[tuple[str, EntryHeader]]:
        """A partition's entries, as the decider wants them."""
        for request_id, (_, entry) in list(self._entries.get(partition, {}).items()):
            yield request_id, read_entry_header(entry)

    async def put(self, partition: int, request_id: str, entry: bytes | None) -> None:
        """See ``ports.log.JoinTable``."""
        await self.settled(partition)
        record = OutboundRecord(self._changelog, entry, request_id.encode(), partition)
        (offset,) = await self._publisher.publish([record])
        await self.settled(partition)
        self._apply(partition, request_id, offset, entry)
