"""The audit sink under crashes: whatever dies, and however the replay is cut, each record ends in one pointed place."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.agents.audit import AuditSink
from app.domain.audit import KEY_PREFIX, cut
from app.domain.decisions import Kind
from app.domain.requests import InboundRecord
from tests.support.audit_records import audit_record, malformed
from tests.support.memory_audit import Crash, MemoryObjectStore, MemoryPointerTable, MemoryPublisher, fails_at


class World:
    """The log of one partition, its committed offset, and the stores: what outlives a process."""

    def __init__(self, log: Sequence[InboundRecord]) -> None:
        self.log = log
        self.committed = 0
        self.objects = MemoryObjectStore()
        self.pointers = MemoryPointerTable()
        self.publisher = MemoryPublisher()

    def sink(self) -> AuditSink:
        """A process that has just started."""
        return AuditSink(
            objects=self.objects,
            pointers=self.pointers,
            publisher=self.publisher,
            group="audit",
            retry_delays_s=(0.0,),
        )

    async def run(self, sizes: Sequence[int], *, commits: Sequence[bool] = ()) -> None:
        """Consume from the committed offset in batches of ``sizes``; a commit may be skipped, as one is by a crash."""
        sink = self.sink()
        at = self.committed
        for turn, size in enumerate(sizes):
            batch = self.log[at : at + size]
            if not batch:
                return
            await sink.handle(0, batch)
            at += len(batch)
            if turn >= len(commits) or commits[turn]:
                self.committed = at

    def check(self) -> None:
        """Each well-formed record has one pointer, that leads to its bytes; each malformed one a dead letter."""
        good = {record.headers[0][1].decode(): record.value for record in self.log if record.headers}
        assert len(self.pointers.items) == len(good)
        for (request_id, _), pointer in self.pointers.items.items():
            body, stored = self.objects.stored[pointer.object_key]
            assert pointer.object_version == stored.version
            assert cut(body[pointer.start : pointer.start + pointer.length], pointer.sha256) == good[request_id]
        bad = {record.value for record in self.log if not record.headers}
        assert {letter.value for letter in self.publisher.published} == bad
        assert not [key for key in self.objects.stored if "conflict" in key]


LOG = 24
logs = st.lists(st.tuples(st.booleans(), st.sampled_from(Kind)), min_size=LOG, max_size=LOG).map(
    lambda drawn: [
        malformed(audit_record(3 * offset, kind=kind))
        if flaw and offset % 3 == 0
        else audit_record(3 * offset, kind=kind)
        for offset, (flaw, kind) in enumerate(drawn)
    ]
)
cuts = st.lists(st.integers(1, LOG), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    log=logs,
    lives=st.lists(
        st.tuples(
            cuts, st.lists(st.booleans(), max_size=8), st.sampled_from(["objects", "pointers"]), st.integers(0, 40)
        ),
        max_size=4,
    ),
    last=st.integers(1, LOG),
)
def test_any_crash_then_any_replay(log: list[InboundRecord], lives: list[Any], last: int) -> None:
    """Lives that end at any point of any store's work, with any batch boundaries, leave the same evidence as one.

    Nothing is overwritten (each object stays as its first writer left it) and nothing is taken for a conflict.
    """
    world = World(log)
    seen: dict[str, bytes] = {}
    for sizes, commits, victim, turn in lives:
        store = world.objects if victim == "objects" else world.pointers
        store.fault = fails_at(turn, Crash())
        with contextlib.suppress(Crash):
            asyncio.run(world.run(sizes, commits=commits))
        world.objects.fault = world.pointers.fault = lambda _when, _operation: None
        for key, body in seen.items():
            assert world.objects.stored[key][0] == body
        seen |= {key: body for key, (body, _) in world.objects.stored.items()}
    asyncio.run(world.run([last] * LOG))
    world.check()
    assert all(key.startswith(KEY_PREFIX) for key in world.objects.stored)


@settings(max_examples=60, deadline=None)
@given(log=logs, one=cuts, other=cuts)
def test_two_owners_at_once(log: list[InboundRecord], one: list[int], other: list[int]) -> None:
    """A worker that does not know that it lost the partition does no harm to the one that has it."""
    world = World(log)

    async def both() -> None:
        await asyncio.gather(world.run([*one, LOG]), world.run([*other, LOG]))

    asyncio.run(both())
    world.committed = 0
    asyncio.run(world.run([LOG]))
    world.check()
