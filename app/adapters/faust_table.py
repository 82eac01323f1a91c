"""DurableTable: Faust's table with writes that are acknowledged by Kafka before they count.

Faust's own table fires its changelog records and forgets them, and writes only inside an event. This one keeps what
Faust does well, recovery and hand-over of partitions, and writes through the process's idempotent producer: ``put``
returns once the changelog has the entry. The partition is explicit, so timers may write. Local entries remember their
changelog offset, so that a replay during a rebalance cannot put an older entry over a newer one.

Nothing is written while the membership's lease is over, and what was sent before counts only once it stands again. A
process that was expelled meanwhile comes back as another member: it reads what was written since, and counts every
partition as gained, for others wrote there.

What a frozen process had handed to its producer goes out all the same, behind what its successor wrote. So each entry
carries the epoch of its writer's ownership, as Kafka's own log does with its leaders' epochs (KIP-101): of two entries
of one key, that of the earlier owner never stands.

A changelog is a topic like any other: whoever may write to it can put there what no worker of ours wrote. Such a record
is told and passed by, so that it neither ends the worker nor takes the place of an entry.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import faust
from faust.stores.memory import Store
from faust.types import TP, EventT
from faust.types.stores import StoreT
from prometheus_client import Gauge

from app.adapters.changelog import EPOCH_HEADER, ReadEntry, entry_epoch, entry_key
from app.adapters.membership import membership
from app.domain.errors import NotOwner
from app.ports.log import OutboundRecord, Publisher

_ENTRIES = Gauge("broker_join_entries", "Entries of the joins table held by this worker")
_LEASE_POLL_S: Final = 0.05
_SETTLE_TIMEOUT_S: Final = 120.0
"""A rebalance and its recovery take seconds; past this bound the work is left to whoever owns the partition."""


class _Held(NamedTuple):
    """An entry, and the changelog offset and the epoch in which it was written."""

    offset: int
    epoch: int
    value: bytes


class PartitionedStore(Store[bytes, bytes]):
    """Entries by partition, each with where and by which owner it was written; Faust recovers into it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.partitions: dict[int, dict[bytes, _Held]] = {}
        self.epochs: dict[int, int] = {}
        """The highest epoch that wrote into each partition."""
        self.yields: Callable[[bytes, bytes], bool] = lambda held, entry: True
        self.read: ReadEntry = lambda key, entry: None
        self._applied: dict[TP, int] = {}

    def apply(self, tp: TP, offset: int, key: bytes, value: bytes | None, epoch: int) -> None:
        """One changelog record, unless a later one of its key is here already, or what is here does not yield to it."""
        entries = self.partitions.setdefault(tp.partition, {})
        held = entries.get(key)
        if held is None or (offset > held.offset and self._gives_way(held, value, epoch)):
            if value is None:
                entries.pop(key, None)
            else:
                entries[key] = _Held(offset, epoch, value)
        self.epochs[tp.partition] = max(epoch, self.epochs.get(tp.partition, 0))
        self._applied[tp] = max(offset, self._applied.get(tp, -1))

    def _gives_way(self, held: _Held, value: bytes | None, epoch: int) -> bool:
        if epoch != held.epoch:
            # Whoever owned the partition later had read all that its predecessors did before they lost it.
            return epoch > held.epoch
        return value is None or self.yields(held.value, value)

    def apply_changelog_batch(
        self, batch: Iterable[EventT[Any]], to_key: Callable[[Any], Any], to_value: Callable[[Any], Any]
    ) -> None:
        """What recovery read, in offset order."""
        for event in batch:
            message = event.message
            tp, offset, value = message.tp, message.offset, message.value
            key = entry_key(tp.topic, tp.partition, offset, message.key, value, self.read)
            if key is None:
                self._applied[tp] = max(offset, self._applied.get(tp, -1))
            else:
                self.apply(tp, offset, key.encode(), value, entry_epoch(message.headers))

    def persisted_offset(self, tp: TP) -> int | None:
        """Recovery of a partition that stayed here begins after what is applied."""
        return self._applied.get(tp)

    async def on_rebalance(
        self, assigned: set[TP], revoked: set[TP], newly_assigned: set[TP], generation_id: int = 0
    ) -> None:
        """Forget partitions that went to another worker: they change there."""
        topic = self.table.changelog_topic.get_topic_name()
        kept = {tp.partition for tp in assigned if tp.topic == topic}
        for partition in set(self.partitions) - kept:
            del self.partitions[partition]
        for partition in set(self.epochs) - kept:
            del self.epochs[partition]
        for tp in set(self._applied) - assigned:
            del self._applied[tp]

    async def on_recovery_completed(self, active_tps: set[TP], standby_tps: set[TP]) -> None:
        """Nothing: ``on_rebalance`` has forgotten what is not ours."""

    def _clear(self) -> None:
        self.partitions.clear()
        self.epochs.clear()
        self._applied.clear()


class _RecoveredTable(faust.Table[bytes, bytes]):
    """The part that Faust sees: a table to recover."""

    def _new_store(self) -> StoreT[bytes, bytes]:
        return PartitionedStore("memory://", self.app, self, table_name=self.name, loop=self.loop)


class DurableTable:
    """``ports.log.JoinTable`` over the compacted topic ``changelog``; made before the app starts.

    ``yields`` says of two entries of one key whether the one that is held yields to the later one; ``read`` raises
    ValueError for a key and value that no worker writes.
    """

    def __init__(
        self,
        app: faust.App,
        *,
        name: str,
        changelog: str,
        publisher: Publisher,
        read: ReadEntry,
        yields: Callable[[bytes, bytes], bool] | None = None,
    ) -> None:
        self._app = app
        self._membership = membership(app)
        self._member = ""
        self._topic = changelog
        self._publisher = publisher
        topic = app.topic(
            changelog,
            key_type=bytes,
            value_type=bytes,
            key_serializer="raw",
            value_serializer="raw",
            acks=False,
            internal=True,
            allow_empty=True,
            maxsize=131_072,
        )
        self._table = _RecoveredTable(app, name=name, key_type=bytes, value_type=bytes, changelog_topic=topic)
        app.tables.add(self._table)
        self._store.read = read
        if yields is not None:
            self._store.yields = yields
        self._settled = asyncio.Event()
        self._owned: frozenset[int] = frozenset()
        self._epochs: dict[int, int] = {}
        self._listeners: list[Callable[[frozenset[int], frozenset[int]], None]] = []
        app.on_partitions_revoked.connect(self._on_revoked)
        app.on_partitions_assigned.connect(self._on_assigned)
        app.on_rebalance_complete.connect(self._on_settled)
        _ENTRIES.set_function(lambda: sum(len(entries) for entries in self._store.partitions.values()))

    def on_ownership(self, listener: Callable[[frozenset[int], frozenset[int]], None]) -> None:
        """Call ``listener(owned, gained)`` after each rebalance, once the gained partitions are recovered."""
        self._listeners.append(listener)

    @property
    def _store(self) -> PartitionedStore:
        store = self._table.data
        assert isinstance(store, PartitionedStore)  # noqa: S101 - what _new_store makes
        return store

    async def _on_revoked(self, *_: object, **__: object) -> None:
        self._settled.clear()

    async def _on_assigned(self, *args: Any, **_: object) -> None:
        # Another rebalance may come before this one settles: what was away in between counts as gained anew.
        assigned: Iterable[TP] = args[-1]
        if self._membership.member_id != self._member:
            self._member = self._membership.member_id
            self._owned = frozenset()
        self._owned &= {tp.partition for tp in assigned if tp.topic == self._topic}

    async def _on_settled(self, *_: object, **__: object) -> None:
        assigned = self._app.consumer.assignment()
        owned = frozenset(tp.partition for tp in assigned if tp.topic == self._topic)
        gained, self._owned = owned - self._owned, owned
        for partition in gained:
            # The group's generation tells owners apart that read the same log; what the log says, a group made anew.
            self._epochs[partition] = max(self._membership.generation, self._store.epochs.get(partition, 0) + 1)
        self._settled.set()
        for listener in self._listeners:
            listener(owned, gained)

    @property
    def _standing(self) -> bool:
        return self._settled.is_set() and self._membership.stands

    @property
    def recovered(self) -> bool:
        """Whether an assignment stands and its entries are all here."""
        return self._settled.is_set()

    def owns(self, partition: int) -> bool:
        """Whether the last settled assignment holds ``partition``."""
        return partition in self._owned

    async def settled(self, partition: int) -> None:
        """Wait while a rebalance runs or the lease is over; NotOwner unless the partition is ours after it."""
        if not self._standing:
            try:
                async with asyncio.timeout(_SETTLE_TIMEOUT_S):
                    while not self._standing:
                        await self._settled.wait()
                        if not self._membership.stands:
                            await asyncio.sleep(_LEASE_POLL_S)
            except TimeoutError as error:
                raise NotOwner(f"the assignment is unsettled for {_SETTLE_TIMEOUT_S:.0f} s") from error
        if partition not in self._owned:
            raise NotOwner(f"partition {partition} belongs to another worker")

    def get(self, partition: int, request_id: str) -> bytes | None:
        """See ``ports.log.JoinTable``."""
        entry = self._store.partitions.get(partition, {}).get(request_id.encode())
        return entry.value if entry is not None else None

    def entries(self, partition: int) -> Iterator[tuple[str, bytes]]:
        """The entries of one partition: request id and value."""
        for key, held in self._store.partitions.get(partition, {}).items():
            yield key.decode(), held.value

    async def put(self, partition: int, request_id: str, entry: bytes | None) -> None:
        """See ``ports.log.JoinTable``."""
        await self.settled(partition)
        key, epoch = request_id.encode(), self._epochs[partition]
        headers = ((EPOCH_HEADER, str(epoch).encode()),)
        (offset,) = await self._publisher.publish([OutboundRecord(self._topic, entry, key, partition, headers)])
        # What a process that stood still had in its producer is sent once it goes on, and lies behind what the owner
        # since then wrote. To apply it now would be to say that all before it is read, and recovery would pass it by.
        await self.settled(partition)
        self._store.apply(TP(self._topic, partition), offset, key, entry, epoch)
