"""What an agent takes from its stream: all that has arrived, as far as there are slots, while the flow is on."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import faust
import pytest
from faust.types import TP
from faust.types.tuples import ConsumerMessage

from app.adapters.faust_app import create_app
from app.agents.delivery import Intake
from app.domain.requests import InboundRecord
from app.settings import Settings

REQUESTS = TP("requests", 3)


class Stream:
    """A stream over a channel's queue, which gives each event a turn of the loop, as Faust's do."""

    def __init__(self, app: faust.App) -> None:
        self.channel = app.channel()
        self.given: list[int] = []

    def noack(self) -> "Stream":
        return self

    async def events(self) -> AsyncIterator[Any]:
        while True:
            await asyncio.sleep(0)
            event = await self.channel.queue.get()
            self.given.append(event.message.offset)
            yield event


class Rig:
    """An intake that reads a stream; ``begun`` are the offsets whose handling has begun, ``go`` lets them end."""

    def __init__(self, app: faust.App, in_flight_max: int) -> None:
        self.app = app
        self.stream = Stream(app)
        self.intake = Intake(app, in_flight_max=in_flight_max)
        self.begun: list[int] = []
        self.go = asyncio.Event()
        self.stray: set[int] = set()
        self.reading = asyncio.create_task(self.intake.each(cast(Any, self.stream), self._handle))

    async def _handle(self, record: InboundRecord) -> None:
        self.begun.append(record.offset)
        await self.go.wait()
        if record.offset in self.stray:
            waited_for = asyncio.get_running_loop().create_future()
            waited_for.cancel()
            await waited_for

    def arrive(self, *offsets: int) -> None:
        """Records come in, all in one fetch."""
        for offset in offsets:
            message = ConsumerMessage(
                REQUESTS.topic, REQUESTS.partition, offset, 1.5, 0, None, b"k", b"v", None, tp=REQUESTS,
                generation_id=self.app.consumer_generation_id,
            )  # fmt: skip
            event = faust.Event(self.app, b"k", b"v", None, cast(Any, message))
            self.stream.channel.queue.put_nowait(cast(Any, event))


@pytest.fixture
async def app(tmp_path: Path) -> faust.App:
    """An app that is not started; its flow is on."""
    app = create_app(Settings(data_dir=tmp_path), role="decide", instance="decide-0")
    app.flow_control.resume()
    return app


async def _turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_has_arrived_is_taken_together(app: faust.App) -> None:
    """Events that came in one fetch begin in one turn of the loop, in their order, and are finished as any."""
    rig = Rig(app, in_flight_max=8)
    rig.arrive(10, 11, 12, 13)
    await _turns()
    assert rig.begun == [10, 11, 12, 13]
    assert rig.stream.given == [10]
    rig.go.set()
    await _turns()
    assert rig.intake.finished == {REQUESTS: 14}
    rig.reading.cancel()


async def test_slots_bound_what_is_taken(app: faust.App) -> None:
    """What has no slot stays in the queue, where Faust sees it and pauses the partition."""
    rig = Rig(app, in_flight_max=2)
    rig.arrive(10, 11, 12, 13, 14)
    await _turns()
    assert rig.begun == [10, 11]
    assert rig.stream.channel.queue.qsize() == 2
    rig.go.set()
    await _turns(20)
    assert rig.begun == [10, 11, 12, 13, 14]
    rig.reading.cancel()


async def test_nothing_is_taken_past_the_stream_while_the_flow_is_off(app: faust.App) -> None:
    """While a rebalance runs, what is queued is left to Faust, which skips it."""
    rig = Rig(app, in_flight_max=8)
    app.flow_control.suspend()
    rig.arrive(10, 11)
    await _turns(2)
    assert len(rig.stream.given) <= 1
    await _turns()
    assert rig.stream.given == [10, 11]
    rig.reading.cancel()


async def test_a_stray_cancellation_is_a_crash_and_the_end_of_a_worker_is_none(
    app: faust.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event whose handling was cancelled by what it waited for would be held back for ever, without a word."""
    crashes: list[BaseException] = []

    async def crash(reason: BaseException) -> None:
        crashes.append(reason)

    monkeypatch.setattr(app, "crash", crash)
    rig = Rig(app, in_flight_max=8)
    rig.stray = {10}
    rig.arrive(10)
    await _turns()
    rig.go.set()
    await _turns()
    assert [type(each) for each in crashes] == [RuntimeError]
    assert rig.intake.finished == {}
    rig.go.clear()
    rig.arrive(11)
    await _turns()
    await rig.intake.close()
    assert len(crashes) == 1
    rig.reading.cancel()
