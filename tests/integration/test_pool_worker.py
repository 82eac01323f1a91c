"""The pool worker on real Kafka: each task answered where its join is, across a worker's end in mid-flow."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from app.adapters.clock import SystemClock
from app.adapters.faust_app import create_app
from app.adapters.kafka import KafkaPublisher
from app.adapters.task_codec import QueuedResult, decode_result, encode_task
from app.agents.pool import attach
from app.domain.errors import Code
from app.domain.features import Value
from app.ports.model_backend import ModelRunner
from app.settings import Settings
from tests.support.models import row_of, version_of

WITHIN_S = 150.0
PARTITIONS = 4
TASKS = 300


class Doubler:
    """Answers `y`, twice `x`, once its gate is open."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate = gate
        self.entered = threading.Event()
        self.calls = 0
        self.rows: list[Value] = []

    def predict(self, model: str, version: str, columns: Mapping[str, Sequence[Value]]) -> Mapping[str, Sequence[Any]]:
        """Twice `x`, in a call that takes as long as a small model's."""
        self.entered.set()
        if self.gate is not None:
            self.gate.wait(WITHIN_S)
        time.sleep(0.002)
        self.calls += 1
        self.rows.extend(columns["x"])
        return {"y": [2 * value for value in columns["x"]]}  # type: ignore[operator]  # x is a number here


@dataclass(slots=True)
class Wire:
    """The topics of one test, and both ends of them."""

    settings: Settings
    tasks: str
    results: str
    producer: AIOKafkaProducer
    results_in: AIOKafkaConsumer
    letters_in: AIOKafkaConsumer
    admin: AIOKafkaAdminClient

    async def send(self, x: int, *, within_ms: int = 60_000) -> None:
        """Put a task on the topic; its answer belongs in partition ``x`` modulo ``PARTITIONS``."""
        row = row_of({"x": x}, request_id=f"r-{x}", within_ms=within_ms)
        value = encode_task(row, version_of(), x % PARTITIONS, int(time.time() * 1000))
        await self.producer.send(self.tasks, value, key=f"r-{x}".encode())

    async def answers(self, count: int) -> list[QueuedResult]:
        """Results, until ``count`` requests are answered; each lies where its task said."""
        found: list[QueuedResult] = []
        while len({result.request_id for result in found}) < count:
            record = await self.results_in.getone()
            result = decode_result(record.value)
            assert record.partition == int(result.request_id[2:]) % PARTITIONS
            assert record.key == result.request_id.encode()
            found.append(result)
        return found

    async def committed(self) -> int:
        """Tasks that the group has acknowledged."""
        offsets = await self.admin.list_consumer_group_offsets(f"{self.settings.topic_prefix}pool")
        return sum(offset.offset for offset in offsets.values())


@pytest.fixture
async def wire(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> AsyncIterator[Wire]:
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic_prefix=topic_prefix, data_dir=tmp_path)
    tasks, results = settings.topic("inference.tasks.default"), settings.topic("inference.results")
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
    producer = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, acks="all")
    results_in, letters_in = (
        AIOKafkaConsumer(topic, bootstrap_servers=kafka_bootstrap, auto_offset_reset="earliest")
        for topic in (results, f"{tasks}-dlt")
    )
    await admin.start()
    await admin.create_topics([NewTopic(name, PARTITIONS, 1) for name in (tasks, results, f"{tasks}-dlt")])
    for part in (producer, results_in, letters_in):
        await part.start()
    yield Wire(settings, tasks, results, producer, results_in, letters_in, admin)
    for part in (results_in, letters_in, producer):
        await part.stop()
    await admin.close()


@asynccontextmanager
async def running(wire: Wire, runner: ModelRunner, *, drain: bool = True) -> AsyncIterator[None]:
    """A pool worker, in this process; without ``drain`` it ends in mid-flow."""
    app = create_app(wire.settings, role="pool", instance="pool-test")
    async with KafkaPublisher(wire.settings, client_id="pool-test") as publisher:
        intake = attach(
            app,
            topic=wire.tasks,
            results_topic=wire.results,
            runner=runner,
            publisher=publisher,
            clock=SystemClock(),
            settings=wire.settings,
            instance="pool-test",
            group=app.conf.id,
        )
        start = asyncio.create_task(app.start())
        try:
            yield
            if drain:
                assert await intake.drain(WITHIN_S)
        finally:
            await asyncio.wait_for(app.stop(), WITHIN_S)
            await intake.close()
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)


async def test_each_task_is_answered_and_acknowledged(wire: Wire) -> None:
    """Tasks share calls, an expired one is answered and not run, noise is dead-lettered; all are committed."""
    runner = Doubler()
    async with asyncio.timeout(WITHIN_S):
        await wire.producer.send(wire.tasks, b"noise", key=b"bad", partition=1)
        await wire.send(TASKS, within_ms=-1)
        for x in range(TASKS):
            await wire.send(x)
        await wire.producer.flush()
        async with running(wire, runner):
            results = await wire.answers(TASKS + 1)
            letter = await wire.letters_in.getone()
    assert len(results) == TASKS + 1
    by_id = {result.request_id: result.answer for result in results}
    expired = by_id.pop(f"r-{TASKS}")  # type: ignore[call-overload]  # a request id is text
    assert expired.problem is not None
    assert expired.problem.code is Code.DEADLINE_EXCEEDED
    assert {request_id: answer.outputs for request_id, answer in by_id.items()} == {
        f"r-{x}": {"y": 2 * x} for x in range(TASKS)
    }
    assert sorted(runner.rows, key=int) == list(range(TASKS))  # type: ignore[arg-type]  # rows are numbers here
    assert runner.calls < TASKS
    assert (letter.key, letter.value, letter.partition) == (b"bad", b"noise", 1)
    assert await wire.committed() == TASKS + 2


async def test_a_worker_that_ends_in_mid_flow_loses_nothing(wire: Wire) -> None:
    """What a worker had taken and not answered is answered by the next; nothing of it was committed."""
    gate = threading.Event()
    held = Doubler(gate)
    async with asyncio.timeout(WITHIN_S):
        for x in range(20):
            await wire.send(x)
        await wire.producer.flush()
        async with running(wire, held, drain=False):
            assert await asyncio.to_thread(held.entered.wait, WITHIN_S)
        assert await wire.committed() <= 0
        async with running(wire, Doubler()):
            results = await wire.answers(20)
        gate.set()
    assert {result.request_id for result in results} == {f"r-{x}" for x in range(20)}
    assert await wire.committed() == 20
