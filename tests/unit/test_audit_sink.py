"""The audit sink: what becomes of a batch, and of what must not happen."""

import asyncio
from collections.abc import Sequence

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.adapters.audit_reader import AuditReader
from app.agents.audit import AuditSink
from app.domain.errors import EvidenceDamaged, StoreUnavailable
from app.domain.requests import InboundRecord
from app.ports.record_sink import StoredObject
from tests.support.audit_records import audit_record, audit_value, malformed
from tests.support.memory_audit import MemoryObjectStore, MemoryPointerTable, MemoryPublisher, away_for


class Sink:
    """A sink over stores in memory."""

    def __init__(self) -> None:
        self.objects = MemoryObjectStore()
        self.pointers = MemoryPointerTable()
        self.publisher = MemoryPublisher()
        self.reader = AuditReader(self.objects, self.pointers)
        self.restart()

    def restart(self) -> None:
        self.agent = AuditSink(
            objects=self.objects,
            pointers=self.pointers,
            publisher=self.publisher,
            group="audit",
            retry_delays_s=(0.001,),
        )

    async def take(self, *records: InboundRecord) -> None:
        await self.agent.handle(records[0].partition, records)

    def keys(self) -> list[str]:
        return sorted(key.rsplit("/", 1)[1] for key in self.objects.stored)


@pytest.fixture
def sink() -> Sink:
    """A sink that nothing has been given yet."""
    return Sink()


def alarms(what: str) -> float:
    value = REGISTRY.get_sample_value("broker_audit_conflicts_total", {"what": what})
    assert value is not None
    return value


def start(offset: int) -> str:
    return f"{offset:020d}.avro.zst"


async def test_a_batch_becomes_one_object_and_a_pointer_each(sink: Sink) -> None:
    """Records are found by request id, as they were sent."""
    records = [audit_record(offset) for offset in range(5, 9)]
    await sink.take(*records)
    assert sink.keys() == [start(5)]
    for record in records:
        found = await sink.reader.find(record.key.decode() if record.key else "")
        assert found is not None
        assert found["request_id"] == (record.key or b"").decode()
    assert await sink.reader.find("nobody") is None


async def test_a_replay_writes_nothing(sink: Sink) -> None:
    """The same batch again, by a new process, finds everything there."""
    records = [audit_record(offset) for offset in range(4)]
    await sink.take(*records)
    before = dict(sink.pointers.items), dict(sink.objects.stored)
    sink.restart()
    await sink.take(*records)
    assert (sink.pointers.items, sink.objects.stored) == before


async def test_a_longer_replay_goes_on_after_the_stored_object(sink: Sink) -> None:
    """What is new gets an object of its own, named after its first offset; chains of objects are followed."""
    records = [audit_record(offset) for offset in range(10)]
    await sink.take(*records[:3])
    await sink.take(*records[3:5])
    sink.restart()
    await sink.take(*records)
    assert sink.keys() == [start(0), start(3), start(5)]
    assert len(sink.pointers.items) == 10


async def test_a_shorter_replay_stays_in_the_stored_object(sink: Sink) -> None:
    """Smaller batches than before make no smaller objects."""
    records = [audit_record(offset) for offset in range(10)]
    await sink.take(*records)
    sink.pointers.items.clear()
    sink.restart()
    for record in records:
        await sink.take(record)
    assert sink.keys() == [start(0)]
    assert len(sink.pointers.items) == 10
    assert (await sink.reader.verify()).sound


async def test_malformed_records_become_dead_letters_and_the_others_evidence(sink: Sink) -> None:
    """A record that names no decision is buried as it came; the object holds the others."""
    records = [audit_record(0), malformed(audit_record(1)), audit_record(2)]
    await sink.take(*records)
    assert [letter.topic for letter in sink.publisher.published] == ["inference.audit-dlt"]
    assert sink.publisher.published[0].value == records[1].value
    assert sorted(pointer.source for pointer in sink.pointers.items.values()) == [
        "inference.audit/0/0",
        "inference.audit/0/2",
    ]


async def test_a_batch_of_malformed_records_makes_no_object(sink: Sink) -> None:
    """Nothing to keep, nothing written but dead letters."""
    await sink.take(malformed(audit_record(0)), malformed(audit_record(1)))
    assert sink.keys() == []
    assert len(sink.publisher.published) == 2


async def test_a_record_that_comes_twice_in_a_batch_counts_once(sink: Sink) -> None:
    """A stream that repeats itself, or goes back, does no harm."""
    await sink.take(audit_record(1), audit_record(0), audit_record(1))
    assert sink.keys() == [start(0)]
    assert len(sink.pointers.items) == 2


async def test_a_decision_told_twice_is_a_duplicate(sink: Sink) -> None:
    """The same bytes at another offset: the first place stands, nobody is alarmed."""
    before = alarms("decision")
    await sink.take(audit_record(0, "r", "e"), audit_record(1, "r", "e"))
    await sink.take(audit_record(2, "r", "e"))
    assert [pointer.source for pointer in await sink.reader.pointers("r")] == ["inference.audit/0/0"]
    assert alarms("decision") == before


async def test_two_decisions_of_one_request_raise_the_alarm(sink: Sink) -> None:
    """The first stands, the second is kept beside it, and each telling is shouted about."""
    before = alarms("decision")
    with capture_logs() as logs:
        await sink.take(audit_record(0, "r", "first"), audit_record(1, "r", "second"))
        sink.restart()
        await sink.take(audit_record(0, "r", "first"), audit_record(1, "r", "second"))
    assert [(pointer.sort_key, pointer.execution_id) for pointer in await sink.reader.pointers("r")] == [
        ("DECISION", "first"),
        ("CONFLICT#second", "second"),
    ]
    assert alarms("decision") == before + 2
    assert [(log["request_id"], log["log_level"]) for log in logs if log["event"] == "audit_decision_conflict"] == [
        ("r", "error")
    ] * 2
    found = await sink.reader.find("r")
    assert found is not None
    assert found["execution_id"] == "first"
    assert (await sink.reader.verify()).items == 2


async def test_a_conflict_whose_answer_got_lost_is_not_silent(sink: Sink) -> None:
    """The second decision is kept and the table's answer lost: the next attempt meets its own item, and alarms."""
    await sink.take(audit_record(0, "r", "first"))
    before = alarms("decision")
    calls = iter(range(100))

    def lose_the_second_answer(when: str, operation: str) -> None:
        if when == "after" and next(calls) == 1:
            raise StoreUnavailable("the answer got lost")

    sink.pointers.fault = lose_the_second_answer
    await sink.take(audit_record(1, "r", "second"))
    assert [pointer.sort_key for pointer in await sink.reader.pointers("r")] == ["DECISION", "CONFLICT#second"]
    assert alarms("decision") == before + 1


async def test_a_third_telling_has_a_place_too(sink: Sink) -> None:
    """However many differing records of one execution come, none is lost."""
    before = alarms("decision")
    await sink.take(*(audit_record(offset, "r", "e", note=str(offset)) for offset in range(4)))
    keys = [pointer.sort_key for pointer in await sink.reader.pointers("r")]
    assert keys[:2] == ["DECISION", "CONFLICT#e"]
    assert len(set(keys)) == 4
    assert alarms("decision") == before + 3


async def test_a_refusal_told_in_other_words_is_kept_without_alarm(sink: Sink) -> None:
    """A crash makes a refusal be told again with other times; both are kept and no decision is in doubt."""
    before = alarms("decision")
    await sink.take(
        audit_record(0, "r", "e"),
        audit_record(1, "r", "no", kind="refusal"),
        audit_record(2, "r", "no", kind="refusal", note="again"),
    )
    keys = [pointer.sort_key for pointer in await sink.reader.pointers("r")]
    assert keys[:2] == ["DECISION", "REFUSAL#no"]
    assert keys[2].startswith("REFUSAL#no#")
    assert alarms("decision") == before


@pytest.mark.parametrize("kind", ["shadow", "rollout"])
async def test_what_stands_beside_decisions_is_pointed_to_and_alarms_nobody(sink: Sink, kind: str) -> None:
    """Shadows of a decision and steps of a rollout have places of their own, told once, again, or in other words."""
    before = alarms("decision")
    records = [
        audit_record(0, "r", "e"),
        audit_record(1, "r", "one", kind=kind),
        audit_record(2, "r", "two", kind=kind),
    ]
    again = audit_record(3, "r", "one", kind=kind)
    other = audit_record(4, "r", "one", kind=kind, note="in other words")
    await sink.take(*records, again)
    await sink.take(other)
    keys = [pointer.sort_key for pointer in await sink.reader.pointers("r")]
    name = kind.upper()
    assert keys[:2] == ["DECISION", f"{name}#one"]
    assert keys[2].startswith(f"{name}#one#")
    assert keys[3:] == [f"{name}#two"]
    assert alarms("decision") == before
    assert (await sink.reader.verify()).sound


async def test_an_object_that_contradicts_the_log_is_left_and_gone_beside(sink: Sink) -> None:
    """A topic that was made anew: the old evidence stays, the new is kept beside it, and it is shouted about."""
    old = [audit_record(offset, f"old-{offset}") for offset in range(4)]
    await sink.take(*old)
    stood = dict(sink.objects.stored)
    before = alarms("object")
    sink.restart()
    new = [audit_record(offset, f"new-{offset}") for offset in range(2)]
    with capture_logs() as logs:
        await sink.take(*new)
        await sink.take(*new)
    assert {key: sink.objects.stored[key] for key in stood} == stood
    assert len(sink.objects.stored) == 2
    assert alarms("object") == before + 2
    assert {log["log_level"] for log in logs if log["event"] == "audit_object_conflict"} == {"error"}
    report = await sink.reader.verify(
        [f"{age}-{offset}" for age, count in (("old", 4), ("new", 2)) for offset in range(count)]
    )
    assert report.sound
    assert (report.objects, report.items) == (2, 6)


async def test_a_topic_made_anew_under_a_running_worker_raises_the_alarm(sink: Sink) -> None:
    """What the worker remembers of an object is held against the log like the object itself."""
    await sink.take(*(audit_record(offset) for offset in range(6)))
    sink.restart()
    await sink.take(audit_record(0))
    before = alarms("object")
    await sink.take(audit_record(2, "new"))
    assert alarms("object") == before + 1
    assert (await sink.reader.verify(["new"])).sound


async def test_an_unreadable_object_is_left_and_gone_beside(sink: Sink) -> None:
    """Somebody else's file under our name is not touched, and the batch is kept."""
    await sink.take(audit_record(0))
    (key,) = sink.objects.stored
    sink.objects.stored[key] = (b"somebody else's", StoredObject("v9", {}))
    sink.pointers.items.clear()
    sink.restart()
    await sink.take(audit_record(0))
    assert sink.objects.stored[key][0] == b"somebody else's"
    assert (await sink.reader.verify(["request-0-0"])).sound


@pytest.mark.parametrize("store", ["objects", "pointers"])
async def test_a_store_that_is_away_is_waited_for(sink: Sink, store: str) -> None:
    """Nothing is dropped: the batch is done when the store is back, and the wait was visible."""
    victim = sink.objects if store == "objects" else sink.pointers
    victim.fault = away_for(5)
    with capture_logs() as logs:
        await asyncio.wait_for(sink.take(audit_record(0), audit_record(1)), 5)
    waits = [log for log in logs if log["event"] == "audit_batch_waits"]
    assert len(waits) == 5
    assert REGISTRY.get_sample_value("broker_audit_batches_waiting", {"dependency": waits[0]["dependency"]}) == 0
    assert (await sink.reader.verify(["request-0-0", "request-0-1"])).sound


async def test_verify_names_what_is_missing_and_what_is_damaged(sink: Sink) -> None:
    """A flipped bit, a lost object and a decision that never came are told apart, each by its request id."""
    await sink.take(*(audit_record(offset) for offset in range(3)))
    await sink.take(audit_record(0, partition=1))
    first, second = sorted(sink.objects.stored)
    body, stored = sink.objects.stored[first]
    pointer = sink.pointers.items["request-0-1", "DECISION"]
    at = pointer.start + pointer.length // 2
    sink.objects.stored[first] = (body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :], stored)
    del sink.objects.stored[second]
    report = await sink.reader.verify(["request-0-0", "request-0-1", "request-1-0", "nobody"])
    assert not report.sound
    assert (report.objects, report.items, report.missing) == (2, 3, ("nobody",))
    assert [fault.split(":")[0] for fault in report.faults] == ["request-0-1", "request-1-0"]
    for damaged in ("request-0-1", "request-1-0"):
        with pytest.raises(EvidenceDamaged, match=damaged):
            await sink.reader.find(damaged)


async def test_a_pointer_to_another_record_is_a_fault(sink: Sink) -> None:
    """A range that holds sound bytes of somebody else's decision does not prove this one."""
    await sink.take(audit_record(0, "r", "e"), audit_record(1, "s", "e"))
    other = sink.pointers.items["s", "DECISION"]
    mine = sink.pointers.items["r", "DECISION"]
    sink.pointers.items["r", "DECISION"] = type(mine)(
        **{name: getattr(mine if name == "request_id" else other, name) for name in type(mine).__slots__}
    )
    assert len((await sink.reader.verify()).faults) == 1


def values(records: Sequence[InboundRecord]) -> list[bytes | None]:
    return [record.value for record in records]


def test_records_of_the_same_words_are_the_same_bytes() -> None:
    """The tests' own records are deterministic, which the duplicates above rest on."""
    assert audit_value("r", "e") == audit_value("r", "e")
    assert values([audit_record(1, "r")]) == values([audit_record(2, "r")])
