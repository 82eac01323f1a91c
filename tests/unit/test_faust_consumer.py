"""What a worker's consumer fetches and commits, where Faust's and aiokafka's own ways would lose records."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faust
import pytest
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    GroupCoordinatorNotAvailableError,
    InconsistentGroupProtocolError,
    InvalidSessionTimeoutError,
    KafkaError,
)
from faust.transport.drivers.aiokafka import Consumer
from faust.types import TP
from faust.types.tuples import ConsumerMessage
from pydantic import ValidationError

from app.adapters import faust_app
from app.adapters.faust_app import committable, create_app
from app.domain.errors import ConfigurationError
from app.settings import Settings

REQUESTS = TP("requests", 3)


@pytest.fixture
async def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[faust.App]:
    """An app that is not started; the loops that its consumer's threads would close end with the test."""
    loops: list[asyncio.AbstractEventLoop] = []
    begin = faust_app._ConsumerThread.__init__

    def note(thread: faust_app._ConsumerThread, *args: Any, **kwargs: Any) -> None:
        begin(thread, *args, **kwargs)
        loops.append(thread.thread_loop)

    monkeypatch.setattr(faust_app._ConsumerThread, "__init__", note)
    yield create_app(Settings(data_dir=tmp_path), role="decide", instance="decide-0")
    for loop in loops:
        loop.close()


def message(offset: int) -> ConsumerMessage:
    """A record of the partition, as the consumer hands it to a stream."""
    return ConsumerMessage(
        REQUESTS.topic, REQUESTS.partition, offset, time.time(), 0, None, b"", b"", None, tp=REQUESTS
    )


def due(app: faust.App) -> Mapping[TP, int]:
    """What the next commit would say."""
    consumer: Any = app.consumer
    offsets: Mapping[TP, int] = consumer._filter_committable_offsets(consumer._filter_tps_with_pending_acks())
    return offsets


async def test_what_a_stream_skips_is_not_committed(app: faust.App) -> None:
    """Faust acknowledges events that it skips when it stops; the unfinished one before them stays uncommitted."""
    consumer: Any = app.consumer
    consumer._committed_offset[REQUESTS] = 287
    skipped = message(288)
    skipped.incref()
    skipped.ack(consumer)
    assert due(app) == {}
    committable(app)[REQUESTS] = 287
    assert due(app) == {REQUESTS: 287}


async def test_a_commit_that_failed_is_tried_again(app: faust.App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a confirmed offset counts as committed."""
    consumer: Any = app.consumer
    outcomes = [False, True]

    async def commit(_: object, offsets: Mapping[TP, int]) -> bool:
        return outcomes.pop(0)

    monkeypatch.setattr(Consumer, "_commit", commit)
    committable(app)[REQUESTS] = 300
    for expected in ({REQUESTS: 300}, {REQUESTS: 300}, {}):
        offsets = due(app)
        assert offsets == expected
        if offsets:
            await consumer._commit(offsets)
            consumer._committed_offset.update(offsets)


def test_no_active_partition_is_not_every_partition() -> None:
    """aiokafka hands over all partitions where it is given none; what it is given is never empty, and follows."""
    live: set[TP] = set()
    active = faust_app._Active(live)
    assert bool(active)
    assert REQUESTS not in active
    live.add(REQUESTS)
    assert REQUESTS in active


async def test_nothing_is_fetched_for_streams_before_the_seek(app: faust.App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions are resumed, sought, and only then fetched; a rebalance in between begins anew."""
    consumer: Any = app.consumer

    async def seek(_: object) -> None:
        return None

    monkeypatch.setattr(Consumer, "perform_seek", seek)
    consumer._active_partitions = {REQUESTS}
    consumer.pause_partitions([REQUESTS])
    consumer.resume_partitions([REQUESTS])
    consumer.resume_flow()
    assert consumer._get_active_partitions() == set()
    await consumer.perform_seek()
    consumer.pause_partitions([REQUESTS])
    consumer.resume_flow()
    assert consumer._get_active_partitions() == set()
    consumer.resume_partitions([REQUESTS])
    await consumer.perform_seek()
    consumer.resume_flow()
    assert consumer._get_active_partitions() == {REQUESTS}


async def _put(handed: list[str]) -> None:
    handed.append("here")


async def test_a_record_is_handed_over_without_tasks(app: faust.App) -> None:
    """Where the flow is on and there is room, a record goes to its channel in the same turn of the loop."""
    app.flow_control.resume()
    consumer: Any = app.consumer
    handed: list[str] = []
    handing = consumer.wait_first(_put(handed), consumer.suspend_flow.wait())
    with pytest.raises(StopIteration) as ended:
        handing.send(None)
    assert handed == ["here"]
    assert ended.value.value.stopped is False


async def test_a_record_that_cannot_be_decoded_is_no_silence(app: faust.App) -> None:
    """What handing over raises, the consumer learns."""
    app.flow_control.resume()
    consumer: Any = app.consumer

    async def fail() -> None:
        raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"):
        await consumer.wait_first(fail(), consumer.suspend_flow.wait())


@pytest.mark.parametrize("obstacle", ["flow", "room"])
async def test_a_rebalance_interrupts_a_record_that_waits(app: faust.App, obstacle: str) -> None:
    """A record that waits for the flow, or for room in a queue, is left when the flow is suspended."""
    consumer: Any = app.consumer
    topic: Any = app.topic("requests")
    app.topics.add(topic)
    if obstacle == "room":
        app.flow_control.resume()
        while not topic.queue.full():
            topic.queue.put_nowait(object())
    waiting = asyncio.ensure_future(consumer.wait_first(asyncio.Event().wait(), consumer.suspend_flow.wait()))
    await asyncio.sleep(0)
    assert not waiting.done()
    consumer.suspend_flow.set()
    async with asyncio.timeout(5):
        await waiting


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (InvalidSessionTimeoutError(), "Kafka refuses a session timeout of 6 s for group decide: set BROKER_SESSION"),
        (InconsistentGroupProtocolError(), "group decide is used by consumers of another kind"),
        (GroupAuthorizationFailedError("decide"), "does not let this process join group decide"),
    ],
)
async def test_what_keeps_a_worker_out_of_its_group_says_what_to_mend(
    app: faust.App, cause: KafkaError, said: str
) -> None:
    """aiokafka wraps it in its own words, and gives up; anything else is a crash as it is."""
    wrapped = KafkaError("Unexpected error during coordination")
    wrapped.__cause__ = cause
    failure = faust_app.join_failure(wrapped, app)
    assert isinstance(failure, ConfigurationError)
    assert said in str(failure)
    other = KafkaError("Unexpected error during coordination")
    assert faust_app.join_failure(other, app) is other


async def test_a_consumer_that_gave_its_group_up_crashes_the_worker(
    app: faust.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of aiokafka's coordination reaches the app; a cancelled one is a worker that stops."""
    crashes: list[BaseException] = []

    async def crash(reason: BaseException) -> None:
        crashes.append(reason)

    monkeypatch.setattr(app, "crash", crash)
    app.loop = asyncio.get_running_loop()
    consumer: Any = app.consumer
    thread: Any = consumer._new_consumer_thread()
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    for each in (ended, stopped):
        each.add_done_callback(thread._on_coordination_ended)
    thread._on_coordination_failed(GroupCoordinatorNotAvailableError())  # aiokafka tries again by itself
    stopped.cancel()
    ended.set_exception(KafkaError("it is over"))
    await asyncio.sleep(0.01)
    assert [str(each) for each in crashes] == ["KafkaError: it is over"]


@pytest.mark.parametrize(("fetched", "said"), [(True, "has not started processing"), (False, "has not sent fetch")])
async def test_fausts_watch_over_streams_is_off(
    app: faust.App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, fetched: bool, said: str
) -> None:
    """It sees none of the records that go into a stream, and alarms at each that a partition has yet to hand over."""
    state = SimpleNamespace(highwater=8, position=7, timestamp=time.time() * 1_000 if fetched else None)
    assignment = SimpleNamespace(active=True, state_value=lambda _: state)
    subscription = SimpleNamespace(subscription=SimpleNamespace(assignment=assignment))
    consumer: Any = app.consumer
    thread: Any = consumer._new_consumer_thread()
    thread._consumer = SimpleNamespace(_fetcher=SimpleNamespace(_subscriptions=subscription))
    thread.time_started = time.monotonic() - 3_600
    consumer._thread = thread
    monkeypatch.setattr(consumer, "assignment", lambda: {REQUESTS})
    monkeypatch.setattr(app.topics, "acks_enabled_for", lambda _: True)
    with caplog.at_level("ERROR"):
        await consumer.verify_all_partitions_active()
        consumer.verify_recovery_event_path(time.monotonic(), REQUESTS)
        assert caplog.records == []
        thread.verify_event_path(time.monotonic(), REQUESTS)
    assert said in caplog.text  # what it would have said


@pytest.mark.parametrize("text", ["1ms", "999ms", "91s", "1h"])
def test_a_session_timeout_has_bounds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """One that no group would take, or that outlasts every request, is refused at the start."""
    monkeypatch.setenv("BROKER_SESSION_TIMEOUT", text)
    with pytest.raises(ValidationError, match="from 1s to 90s"):
        Settings()
