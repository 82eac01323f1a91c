"""A broker of one line: it answers requests from Kafka as a test tells it to."""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from tests.support.request_reply import reply_members

Behaviour = Callable[[dict[str, Any], dict[str, bytes]], Awaitable[dict[str, Any] | None]]


async def complete(request: dict[str, Any], headers: dict[str, bytes]) -> dict[str, Any] | None:
    """Answer with a completed decision that echoes the inputs."""
    return reply_members("completed", request_id=headers["request-id"].decode(), result=request.get("inputs", {}))


class Responder:
    """Consumes the request topic and answers each request by ``behaviour``; None answers nothing."""

    def __init__(self, bootstrap: str, prefix: str, behaviour: Behaviour = complete) -> None:
        self.behaviour = behaviour
        self.records: list[Any] = []
        self._producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
        self._consumer = AIOKafkaConsumer(
            f"{prefix}inference.requests",
            bootstrap_servers=bootstrap,
            auto_offset_reset="earliest",
            metadata_max_age_ms=2_000,
        )
        self._task: asyncio.Task[None] | None = None
        self._answers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self._producer.start()
        await self._consumer.start()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [self._task, *self._answers]
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        await self._consumer.stop()
        await self._producer.stop()

    async def _run(self) -> None:
        async for record in self._consumer:
            self.records.append(record)
            task = asyncio.create_task(self._answer(record))
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)

    async def _answer(self, record: Any) -> None:
        headers = dict(record.headers)
        reply = await self.behaviour(orjson.loads(record.value), headers)
        if reply is not None and "kafka_replyTopic" in headers:
            await self.reply(headers, reply)

    async def reply(self, headers: dict[str, bytes], reply: dict[str, Any]) -> None:
        """Write a reply to the address that a request's headers hold."""
        partition = headers.get("kafka_replyPartition")
        await self._producer.send_and_wait(
            headers["kafka_replyTopic"].decode(),
            orjson.dumps(reply),
            partition=None if partition is None else struct.unpack(">i", partition)[0],
            headers=[
                ("kafka_correlationId", headers["kafka_correlationId"]),
                ("request-id", reply["request_id"].encode()),
                ("status", reply["status"].encode()),
            ],
        )
