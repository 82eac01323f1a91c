"""The lease on a membership, the table that keeps to it, and the settings that Faust must not find by itself."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import faust
import pytest
from faust.types import TP, EventT

from app.adapters.faust_app import create_app
from app.adapters.faust_table import DurableTable
from app.adapters.membership import Membership, membership
from app.adapters.record_codec import EntryState, encode_entry, entry_yields
from app.domain.decisions import DecisionRecord, Kind
from app.domain.errors import NotOwner
from app.domain.requests import InboundRecord, RequestId
from app.ports.log import OutboundRecord
from app.settings import Settings

CHANGELOG = "joins-changelog"


class Clock:
    """A monotonic clock that is turned by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_lasts_from_the_last_answered_heartbeat() -> None:
    """It counts from the sending, and stands again with the next answer."""
    clock = Clock()
    lease = Membership(6.0, clock)
    assert lease.stands
    assert lease.join("m-1", 1)
    sent = lease.now()
    clock.now += 5.0
    lease.confirm(sent)
    assert lease.stands
    clock.now += 1.0
    assert not lease.stands
    lease.confirm(lease.now())
    assert lease.stands


def test_who_has_left_writes_no_more() -> None:
    """Not for the rest of its lease, nor when a heartbeat is answered that was under way: another may own by now."""
    clock = Clock()
    lease = Membership(6.0, clock)
    lease.join("m-1", 1)
    lease.leave()
    assert not lease.stands
    lease.confirm(lease.now())
    assert not lease.stands


def test_who_is_expelled_again_and_again_is_not_alone() -> None:
    """Three comebacks within a minute; a few over a longer time are bad luck."""
    clock = Clock()
    lease = Membership(6.0, clock)
    assert [lease.join(f"m-{number}", number) for number in range(4)] == [True, True, True, False]
    patient = Membership(6.0, clock)
    for number in range(9):
        clock.now += 30.0
        assert patient.join(f"m-{number}", number)
        assert patient.join(f"m-{number}", number)


def anything(key: str, entry: bytes) -> None:
    """A table that takes whatever its changelog holds."""


def test_who_stood_still_was_expelled_for_it_and_has_no_twin() -> None:
    """However often: only who is expelled while its lease runs shares its name."""
    clock = Clock()
    stalled, twin = Membership(6.0, clock), Membership(6.0, clock)
    for number in range(9):
        assert stalled.join(f"m-{number}", number)
        clock.now += 7.0
        stalled.refuse()
    said = []
    for number in range(4):
        said.append(twin.join(f"m-{number}", number))
        clock.now += 1.0
        twin.refuse()
        clock.now += 7.0  # a rejoin may take longer than the lease
        twin.refuse()
    assert said == [True, True, True, False]


class Offsets:
    """A publisher that counts."""

    def __init__(self) -> None:
        self.sent: list[OutboundRecord] = []

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See ``ports.log.Publisher``."""
        self.sent += records
        return [len(self.sent) + number for number in range(len(records))]


@pytest.fixture
def app(tmp_path: Path) -> faust.App:
    """An app that is never started."""
    return create_app(Settings(data_dir=tmp_path), role="decide", instance="one")


async def settle(app: faust.App, table: DurableTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebalance that gives partition 0."""
    mine = {TP(CHANGELOG, 0)}

    class Consumer:
        def assignment(self) -> set[TP]:
            return mine

    monkeypatch.setattr(app, "_consumer", Consumer(), raising=False)
    await app.on_partitions_revoked.send(set())
    await table._store.on_rebalance(mine, set(), mine)
    await app.on_partitions_assigned.send(mine)
    await app.on_rebalance_complete.send()


async def test_whoever_was_expelled_counts_everything_as_gained(
    app: faust.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain rebalance keeps what was kept; one under another member id gains all, and forgets nothing."""
    gains: list[frozenset[int]] = []
    table = DurableTable(app, name="joins", changelog=CHANGELOG, publisher=Offsets(), read=anything)
    table.on_ownership(lambda owned, gained: gains.append(gained))
    lease = membership(app)
    lease.join("m-1", 1)
    await settle(app, table, monkeypatch)
    await table.put(0, "r", b"entry")
    lease.join("m-1", 1)
    await settle(app, table, monkeypatch)
    assert table.get(0, "r") == b"entry"
    lease.join("m-2", 3)
    await settle(app, table, monkeypatch)
    assert table.get(0, "r") == b"entry"
    assert gains == [{0}, set(), {0}]


async def test_nothing_is_written_past_the_lease(app: faust.App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write waits until the group has answered again; partitions that are another's by then are not written."""
    clock = Clock()
    publisher = Offsets()
    table = DurableTable(app, name="joins", changelog=CHANGELOG, publisher=publisher, read=anything)
    lease = membership(app)
    monkeypatch.setattr(lease, "_clock", clock)
    lease.join("m-1", 1)
    await settle(app, table, monkeypatch)
    clock.now += lease._lease_s
    write = asyncio.ensure_future(table.put(0, "r", b"late"))
    await asyncio.sleep(0.1)
    assert not publisher.sent
    assert not write.done()
    lease.confirm(clock.now)
    await asyncio.wait_for(write, 5)
    clock.now += lease._lease_s
    write = asyncio.ensure_future(table.put(1, "r", b"another's"))
    lease.join("m-2", 3)
    with pytest.raises(NotOwner):
        await asyncio.wait_for(write, 5)


class HeldUp(Offsets):
    """A publisher whose process stands still before Kafka has what it was given: it is acknowledged at offset 9."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = asyncio.Event()

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See ``ports.log.Publisher``."""
        await self.goes_on.wait()
        return [9]


async def test_what_kafka_gets_after_the_lease_hides_nothing_from_recovery(
    app: faust.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another owner wrote before it is still to be read: recovery begins where reading ended."""
    clock, publisher = Clock(), HeldUp()
    table = DurableTable(app, name="joins", changelog=CHANGELOG, publisher=publisher, read=anything)
    lease, tp = membership(app), TP(CHANGELOG, 0)
    monkeypatch.setattr(lease, "_clock", clock)
    lease.join("m-1", 1)
    await settle(app, table, monkeypatch)
    table._store.apply(tp, 3, b"q", b"read", 1)
    write = asyncio.ensure_future(table.put(0, "r", b"held"))
    await asyncio.sleep(0)
    clock.now += lease._lease_s
    publisher.goes_on.set()
    await asyncio.sleep(0.1)
    assert not write.done()
    assert table._store.persisted_offset(tp) == 3
    assert table.get(0, "r") is None
    # Expelled: it comes back as another member, and recovery reads the other's entry, then its own late one.
    lease.join("m-2", 3)
    table._store.apply(tp, 8, b"r", b"another's", 2)
    await settle(app, table, monkeypatch)
    await asyncio.wait_for(write, 5)
    assert table._store.persisted_offset(tp) == 9


def entry(state: EntryState, decided_ms: int | None, execution: str) -> bytes:
    """An entry of the joins table."""
    source = InboundRecord("inference.requests", 0, 1, 0, None, b"{}", ())
    record = DecisionRecord(
        Kind.DECISION,
        RequestId("r"),
        execution,
        source,
        "application/json",
        "0" * 64,
        0,
        9,
        "one",
        decided_ms=decided_ms,
    )
    return encode_entry(state, record, b"")


def test_a_decision_yields_to_itself_alone(app: faust.App) -> None:
    """Not to a join that pends again, nor to another decision; deleted, it makes room."""
    table = DurableTable(
        app, name="joins", changelog=CHANGELOG, publisher=Offsets(), read=anything, yields=entry_yields
    )
    store = table._store
    tp = TP(CHANGELOG, 0)
    pending, decided = entry(EntryState.PENDING, None, "a"), entry(EntryState.DECIDED, 5, "a")
    completed, other = entry(EntryState.COMPLETED, 5, "a"), entry(EntryState.COMPLETED, 6, "b")
    held = []
    for offset, value in enumerate([pending, pending, decided, completed, pending, other, None, other]):
        store.apply(tp, offset, b"r", value, 1)
        held.append(store.partitions[0].get(b"r", (0, 0, None))[2])
    assert held == [pending, pending, decided, completed, completed, completed, None, other]


def test_an_earlier_owners_late_write_never_stands(app: faust.App) -> None:
    """Whether it lies behind what its successor wrote or before it, decides, pends or deletes."""
    table = DurableTable(
        app, name="joins", changelog=CHANGELOG, publisher=Offsets(), read=anything, yields=entry_yields
    )
    late, pending, decided = (
        entry(EntryState.COMPLETED, 5, "late"),
        entry(EntryState.PENDING, None, "mine"),
        entry(EntryState.COMPLETED, 6, "mine"),
    )
    histories: list[list[tuple[int, bytes | None]]] = [
        [(2, pending), (1, late), (2, decided)],
        [(1, late), (2, pending), (2, decided)],
        [(2, pending), (2, decided), (1, late)],
        [(2, pending), (2, decided), (1, None)],
        [(1, pending), (2, decided), (1, pending)],
    ]
    for partition, history in enumerate(histories):
        records = [
            SimpleNamespace(
                tp=TP(CHANGELOG, partition),
                offset=offset,
                key=b"r",
                value=value,
                headers=(("epoch", str(epoch).encode()),),
            )
            for offset, (epoch, value) in enumerate(history)
        ]
        events = [cast(EventT[Any], SimpleNamespace(message=record)) for record in records]
        table._store.apply_changelog_batch(events, lambda key: key, lambda value: value)
        assert table.get(partition, "r") == decided, history


async def test_each_ownership_has_an_epoch_above_the_ones_before(
    app: faust.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group's generation, unless the log is ahead of it, as where the group was deleted; what is kept keeps its."""
    publisher = Offsets()
    table = DurableTable(app, name="joins", changelog=CHANGELOG, publisher=publisher, read=anything)
    for member, generation in (("m-1", 4), ("m-1", 5), ("m-2", 7), ("m-3", 1)):
        membership(app).join(member, generation)
        await settle(app, table, monkeypatch)
        await table.put(0, "r", b"entry")
    assert [dict(record.headers)["epoch"] for record in publisher.sent] == [b"4", b"4", b"7", b"8"]


def test_entries_without_an_epoch_are_the_first(app: faust.App) -> None:
    """A changelog of before, or a record that somebody else wrote, stops no recovery."""
    store = DurableTable(app, name="joins", changelog=CHANGELOG, publisher=Offsets(), read=anything)._store
    for offset, headers in enumerate([None, (), (("epoch", b"x"),)]):
        message = SimpleNamespace(tp=TP(CHANGELOG, 0), offset=offset, key=b"r", value=b"%d" % offset, headers=headers)
        event = cast(EventT[Any], SimpleNamespace(message=message))
        store.apply_changelog_batch([event], lambda key: key, lambda value: value)
    assert store.partitions[0][b"r"] == (2, 0, b"2")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BROKER_SESSION_TIMEOUT", "10s"),
        ("BROKER_COMMIT_INTERVAL", "500ms"),
        ("BROKER_CLIENT_ID", "not mine"),
        ("APP_VERSION", "2.0"),
        ("APP_ENV_PREFIX", "X"),
        ("CONSUMER_AUTO_OFFSET_RESET", "latest"),
        ("PROCESSING_GUARANTEE", "exactly_once"),
        ("STREAM_BUFFER_MAXSIZE", "1"),
    ],
)
def test_faust_takes_nothing_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    """Neither settings of ours in its own units nor what a container has for other reasons."""
    monkeypatch.setenv(name, value)
    conf = create_app(Settings(data_dir=tmp_path), role="decide", instance="one").conf
    assert conf.consumer_auto_offset_reset == "earliest"
    assert conf.stream_buffer_maxsize == 1_024
    assert conf.broker_client_id == "one"
    assert conf.broker_session_timeout == (10.0 if name == "BROKER_SESSION_TIMEOUT" else 6.0)
    assert str(conf.processing_guarantee.value) == "at_least_once"
