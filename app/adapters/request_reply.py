"""Request-reply over Kafka: a request goes to ``inference.requests``, its reply comes back on one partition.

The reply partition is read without a consumer group: which one is this instance's follows from its name, so it is the
same after a restart, and no rebalance ever stands between a request and its reply. Instances may share a partition;
each takes the replies whose correlation ids it gave out. Reading starts before the first request can be sent.

A caller waits within its bound and no longer. What then comes is late: counted, and dropped.
"""

import asyncio
import hashlib
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from prometheus_client import Counter, Gauge

from app.adapters.kafka_clients import close_clients
from app.domain.errors import (
    ConfigurationError,
    PublishFailed,
    RecordTooLarge,
    RepliesFull,
    ReplyTimeout,
    StoreUnavailable,
)
from app.domain.requests import Headers
from app.ports.request_reply import Reply
from app.settings import Settings

CORRELATION_HEADER: Final = "kafka_correlationId"

_START_WITHIN_S: Final = 20.0
_PING_WITHIN_S: Final = 2.0
_READ_WAIT_MS: Final = 1_000
_READ_RETRY_S: Final = 0.5
_ABANDONED_MAX: Final = 4_096

_log = structlog.get_logger()
_replies = Counter(
    "broker_replies_received",
    "Replies read from the reply partition: matched to a caller, late (the caller had gone), or of another instance.",
    ["outcome"],
)
_pending_gauge = Gauge("broker_replies_pending", "Callers that wait for a reply now.")


def partition_of(instance: str, partitions: int) -> int:
    """The reply partition of an instance: the same for the same name.

    >>> partition_of("gateway-0", 8) == partition_of("gateway-0", 8)
    True
    """
    return int.from_bytes(hashlib.sha256(instance.encode()).digest()[:8], "big") % partitions


class RequestReplyClient:
    """``ports.request_reply.RequestReply`` over aiokafka; entering it connects and starts to read."""

    def __init__(self, settings: Settings, *, instance: str, start_within_s: float = _START_WITHIN_S) -> None:
        self._start_within_s = start_within_s
        self._bootstrap = settings.kafka_bootstrap
        self._instance = instance
        self._requests = settings.topic("inference.requests")
        self._replies = settings.topic("inference.replies")
        self._pending_max = settings.replies_pending_max
        self._pending: dict[bytes, asyncio.Future[Reply]] = {}
        self._abandoned: dict[bytes, None] = {}
        self._reply_to: list[tuple[str, bytes]] = []
        self._reader: asyncio.Task[None] | None = None
        self._producer = AIOKafkaProducer(
            bootstrap_servers=settings.kafka_bootstrap,
            client_id=instance,
            # A request sent twice by a retry is one decision, so the cheaper producer without sequence numbers serves.
            acks="all",
            linger_ms=0,
            max_request_size=settings.record_bytes_max,
            request_timeout_ms=30_000,
        )
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=settings.kafka_bootstrap,
            client_id=instance,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="latest",
        )

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(self._start_within_s):
                await self._producer.start()
                await self._consumer.start()
                await self._assign()
        except (KafkaError, TimeoutError) as error:
            await self._stop()
            raise ConfigurationError(
                f"Kafka does not answer at {self._bootstrap} ({error!r}): start it or set BROKER_KAFKA_BOOTSTRAP"
            ) from error
        except BaseException:
            await self._stop()
            raise
        self._reader = asyncio.create_task(self._read(), name="replies")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _assign(self) -> None:
        topics = await self._consumer.topics()
        for topic in (self._requests, self._replies):
            if topic not in topics:
                raise ConfigurationError(
                    f"topic {topic} does not exist at {self._bootstrap}: run `model-broker topics apply`"
                )
        partitions = await self._producer.partitions_for(self._replies)
        await self._producer.partitions_for(self._requests)
        mine = TopicPartition(self._replies, partition_of(self._instance, len(partitions)))
        self._consumer.assign([mine])
        await self._consumer.seek_to_end(mine)
        await self._consumer.position(mine)
        self._reply_to = [
            ("kafka_replyTopic", self._replies.encode()),
            ("kafka_replyPartition", struct.pack(">i", mine.partition)),
        ]

    async def _stop(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        # What is still to be sent has no caller left to wait for it.
        await close_clients(self._consumer.stop(), self._producer.stop())

    async def call(
        self, body: bytes, *, request_id: str, wait_ms: int, deadline_ms: int | None = None, headers: Headers = ()
    ) -> Reply:
        """See ``ports.request_reply.RequestReply``."""
        correlation = uuid.uuid4().bytes
        with self._place(correlation) as waiter:
            delivery: asyncio.Future[Any] | None = None
            try:
                async with asyncio.timeout(wait_ms / 1_000):
                    reply_to = ((CORRELATION_HEADER, correlation), *self._reply_to)
                    delivery = await self._send(body, request_id, deadline_ms, (*reply_to, *headers))
                    delivery.add_done_callback(lambda done: _pass_failure(done, waiter))
                    return await waiter
            except TimeoutError as error:
                if delivery is None or not delivery.done():
                    raise _unacknowledged(request_id, wait_ms) from error
                self._abandon(correlation)
                raise ReplyTimeout(
                    f"request {request_id} is accepted, and no reply came within {wait_ms} ms: ask again with this "
                    "request id"
                ) from error

    async def submit(
        self, body: bytes, *, request_id: str, wait_ms: int, deadline_ms: int | None = None, headers: Headers = ()
    ) -> None:
        """See ``ports.request_reply.RequestReply``."""
        with self._place(uuid.uuid4().bytes):
            try:
                async with asyncio.timeout(wait_ms / 1_000):
                    await (await self._send(body, request_id, deadline_ms, headers))
            except TimeoutError as error:
                raise _unacknowledged(request_id, wait_ms) from error
            except KafkaError as error:
                raise PublishFailed(f"Kafka did not accept request {request_id}: {error!r}") from error

    async def ping(self) -> None:
        """See ``ports.request_reply.RequestReply``."""
        if not self.alive:
            raise StoreUnavailable("replies are no longer read: restart this process")
        try:
            async with asyncio.timeout(_PING_WITHIN_S):
                await self._consumer.topics()
        except (KafkaError, TimeoutError) as error:
            raise StoreUnavailable(f"Kafka does not answer at {self._bootstrap}: {error!r}") from error

    @property
    def alive(self) -> bool:
        """See ``ports.request_reply.RequestReply``."""
        return self._reader is not None and not self._reader.done()

    @property
    def pending(self) -> int:
        """How many wait for a reply or an acknowledgement."""
        return len(self._pending)

    @contextmanager
    def _place(self, correlation: bytes) -> Iterator[asyncio.Future[Reply]]:
        if len(self._pending) >= self._pending_max:
            raise RepliesFull(f"{self._pending_max} requests wait for replies already: come back in a moment")
        waiter: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending[correlation] = waiter
        _pending_gauge.inc()
        try:
            yield waiter
        finally:
            del self._pending[correlation]
            _pending_gauge.dec()

    async def _send(
        self, body: bytes, request_id: str, deadline_ms: int | None, headers: Headers
    ) -> asyncio.Future[Any]:
        record_headers = [("request-id", request_id.encode()), *headers]
        if deadline_ms is not None:
            record_headers.append(("deadline-ms", b"%d" % deadline_ms))
        try:
            # The id as the key: a retry meets the partition that knows the first attempt.
            delivery: asyncio.Future[Any] = await self._producer.send(
                self._requests, body, key=request_id.encode(), headers=record_headers
            )
        except MessageSizeTooLargeError as error:
            raise RecordTooLarge(f"request {request_id} has {len(body)} bytes: send fewer") from error
        except KafkaError as error:
            raise PublishFailed(f"Kafka did not accept request {request_id}: {error!r}") from error
        return delivery

    def _abandon(self, correlation: bytes) -> None:
        while len(self._abandoned) >= _ABANDONED_MAX:
            del self._abandoned[next(iter(self._abandoned))]
        self._abandoned[correlation] = None

    async def _read(self) -> None:
        while True:
            try:
                batches = await self._consumer.getmany(timeout_ms=_READ_WAIT_MS)
            except KafkaError as error:
                _log.warning("replies cannot be read, trying again", error=repr(error))
                await asyncio.sleep(_READ_RETRY_S)
                continue
            for records in batches.values():
                for record in records:
                    self._match(record)

    def _match(self, record: Any) -> None:
        correlation = next((value for key, value in record.headers if key == CORRELATION_HEADER), b"")
        waiter = self._pending.get(correlation)
        if waiter is not None and not waiter.done():
            waiter.set_result(Reply(record.value or b"", tuple(record.headers)))
            _replies.labels("matched").inc()
        elif correlation in self._abandoned:
            del self._abandoned[correlation]
            _replies.labels("late").inc()
        else:
            _replies.labels("unknown").inc()


def _unacknowledged(request_id: str, wait_ms: int) -> PublishFailed:
    return PublishFailed(
        f"Kafka did not acknowledge request {request_id} within {wait_ms} ms; it may or may not be decided: ask again "
        "with this request id"
    )


def _pass_failure(delivery: "asyncio.Future[Any]", waiter: "asyncio.Future[Reply]") -> None:
    """A request that Kafka refuses ends its caller's wait at once."""
    error = None if delivery.cancelled() else delivery.exception()
    if error is not None and not waiter.done():
        failure = PublishFailed(f"Kafka did not accept the request: {error!r}")
        failure.__cause__ = error
        waiter.set_exception(failure)
