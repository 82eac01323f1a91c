"""A caller of the broker by hand: raw records with any headers out, raw replies in."""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from app.domain.requests import Headers
from tests.support.cluster import PARTITIONS, Cluster

_POLL_S: Final = 0.05
_POLL_MS: Final = 200


class Caller:
    """Sends requests and reads the replies of a topic of its own, from its start. An async context manager."""

    def __init__(self, cluster: Cluster) -> None:
        self._settings = cluster.settings
        self.topic = f"{self._settings.topic_prefix}{uuid.uuid4().hex[:8]}.replies"
        self._seen: list[Any] = []

    async def __aenter__(self) -> Self:
        bootstrap = self._settings.kafka_bootstrap
        self._admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        self._producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False
        )
        await self._admin.start()
        await self._admin.create_topics([NewTopic(self.topic, PARTITIONS, 1)])
        await self._producer.start()
        await self._consumer.start()
        self._consumer.assign([TopicPartition(self.topic, number) for number in range(PARTITIONS)])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._consumer.stop()
        await self._producer.stop()
        await self._admin.close()

    def spring(self, correlation: bytes | None = None) -> Headers:
        """The headers that Spring's replying template sends by default."""
        return (
            ("kafka_replyTopic", self.topic.encode()),
            ("kafka_correlationId", correlation or uuid.uuid4().bytes),
        )

    async def send(self, body: Mapping[str, Any] | bytes, headers: Headers, *, key: bytes = b"subject-7") -> Any:
        """Put one request on the request topic; where it lies."""
        value = body if isinstance(body, bytes) else orjson.dumps(body)
        topic = self._settings.topic("inference.requests")
        return await self._producer.send_and_wait(topic, value, key=key, headers=list(headers))

    async def replies(self, count: int, within_s: float = 60.0) -> Sequence[Any]:
        """The first ``count`` replies that this caller ever got, by time; AssertionError names those that came."""
        try:
            async with asyncio.timeout(within_s):
                while len(self._seen) < count:
                    for records in (await self._consumer.getmany(timeout_ms=_POLL_MS)).values():
                        self._seen += records
        except TimeoutError:
            came = [(dict(record.headers), record.value) for record in self._seen]
            raise AssertionError(f"{len(came)} replies instead of {count}: {came}") from None
        return sorted(self._seen, key=lambda record: record.timestamp)

    async def reply(self, headers: Headers, within_s: float = 60.0) -> Any:
        """The reply that carries the correlation of ``headers``."""
        end, wanted = time.monotonic() + within_s, correlation_of(headers)
        while True:
            for record in self._seen:
                if correlation_of(record.headers) == wanted:
                    return record
            await self.replies(len(self._seen) + 1, end - time.monotonic())

    async def ask(self, body: Mapping[str, Any] | bytes, headers: Headers | None = None, **more: Any) -> Any:
        """Send one request and wait for its reply."""
        headers = headers or self.spring()
        await self.send(body, headers, **more)
        return await self.reply(headers)

    async def until_acknowledged(self, within_s: float = 30.0) -> None:
        """Wait until the decide workers have acknowledged every request there is."""
        topic = self._settings.topic("inference.requests")
        partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        async with asyncio.timeout(within_s):
            while True:
                committed = await self._admin.list_consumer_group_offsets(f"{self._settings.topic_prefix}decide")
                ends = await self._consumer.end_offsets(partitions)
                if all(ends[at] <= (committed[at].offset if at in committed else 0) for at in partitions):
                    return
                await asyncio.sleep(_POLL_S)


def correlation_of(headers: Sequence[tuple[str, bytes]]) -> bytes:
    """The correlation id, by either convention."""
    return next(value for name, value in headers if name in ("kafka_correlationId", "correlation_id"))


def request(path: str, x: float, *, request_id: str | None = None, subject: str = "subject-7") -> dict[str, Any]:
    """A request's body."""
    return {
        "request_id": request_id or f"r-{uuid.uuid4()}",
        "path": path,
        "entities": {"subject_id": subject},
        "inputs": {"x": x},
    }
