"""Request-reply over real Kafka: what is on the wire, who gets which reply, and what happens when there is none."""

import asyncio
import re
import struct
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest
from prometheus_client import REGISTRY

from app.adapters.request_reply import RequestReplyClient, partition_of
from app.adapters.topics import TopicAdmin, read_documents, wanted_topics
from app.domain.errors import ConfigurationError, PublishFailed, RecordTooLarge, RepliesFull, ReplyTimeout
from app.domain.requests import read_address
from app.settings import Settings
from tests.support.responder import Responder, complete
from tests.support.stack import ServiceStack

BODY = b'{"path": "/a", "inputs": {"x": 1}}'
WAIT_MS = 15_000


@pytest.fixture
def settings(kafka_bootstrap: str, topic_prefix: str) -> Settings:
    made = Settings(kafka_bootstrap=kafka_bootstrap, topic_prefix=topic_prefix, partitions=4)
    wanted = [
        topic
        for topic in wanted_topics(read_documents(), made, ())
        if topic.name in (made.topic("inference.requests"), made.topic("inference.replies"))
    ]
    TopicAdmin(made).apply(wanted)
    return made


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[RequestReplyClient]:
    async with RequestReplyClient(settings, instance="gateway-0") as client:
        yield client


@pytest.fixture
async def responder(settings: Settings) -> AsyncIterator[Responder]:
    async with Responder(settings.kafka_bootstrap, settings.topic_prefix) as responder:
        yield responder


async def silent(request: dict[str, Any], headers: dict[str, bytes]) -> None:
    """Answer nothing."""


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Wait until the condition holds; the bound is the test's failure."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.02)


def counted(outcome: str) -> float:
    """Replies counted with this outcome so far."""
    return REGISTRY.get_sample_value("broker_replies_received_total", {"outcome": outcome}) or 0.0


async def test_wire(client: RequestReplyClient, responder: Responder) -> None:
    """A request carries Spring's headers byte for byte, its id as key, and its deadline as decimal text."""
    reply = await client.call(
        BODY, request_id="r-1", wait_ms=WAIT_MS, deadline_ms=1_700_000_000_123, headers=(("priority", b"high"),)
    )
    assert orjson.loads(reply.value)["result"] == {"x": 1}
    assert reply.header("request-id") == "r-1"
    record = responder.records[0]
    headers = dict(record.headers)
    assert (record.key, record.value) == (b"r-1", BODY)
    assert len(headers["kafka_correlationId"]) == 16
    assert headers["kafka_correlationId"][6] >> 4 == 4  # a UUID of version 4, raw
    assert headers["kafka_replyPartition"] == struct.pack(">i", partition_of("gateway-0", 4))
    assert headers["kafka_replyTopic"].decode().endswith("inference.replies")
    assert headers["deadline-ms"] == b"1700000000123"
    assert headers["request-id"] == b"r-1"
    assert headers["priority"] == b"high"
    address = read_address(tuple(record.headers))
    assert address is not None
    assert address.partition == partition_of("gateway-0", 4)


async def test_many_callers(client: RequestReplyClient, responder: Responder) -> None:
    """Each of many concurrent callers gets its own reply, and no place is kept after it."""

    async def one(number: int) -> None:
        body = orjson.dumps({"path": "/a", "inputs": {"number": number}})
        reply = await client.call(body, request_id=f"r-{number}", wait_ms=WAIT_MS)
        assert orjson.loads(reply.value)["result"] == {"number": number}

    started = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(500)))
    print(f"500 concurrent calls in {time.perf_counter() - started:.2f} s")
    assert client.pending == 0


async def test_shared_partition(settings: Settings, responder: Responder) -> None:
    """Instances that share a reply partition each get their own replies."""
    names = [f"gateway-{number}" for number in range(50)]
    first = names[0]
    second = next(name for name in names[1:] if partition_of(name, 4) == partition_of(first, 4))
    async with (
        RequestReplyClient(settings, instance=first) as one,
        RequestReplyClient(settings, instance=second) as two,
    ):
        replies = await asyncio.gather(
            *(each.call(BODY, request_id=f"{number}", wait_ms=WAIT_MS) for number, each in enumerate([one, two] * 20))
        )
    assert [orjson.loads(reply.value)["request_id"] for reply in replies] == [str(number) for number in range(40)]


async def test_no_reply(client: RequestReplyClient, responder: Responder) -> None:
    """A caller waits no longer than it said; the reply that comes after that is counted as late and dropped."""
    responder.behaviour = silent
    await client.ping()
    before = counted("late")
    with pytest.raises(ReplyTimeout, match="r-late"):
        await client.call(BODY, request_id="r-late", wait_ms=1_000)
    assert client.pending == 0
    await eventually(lambda: len(responder.records) == 1)
    headers = dict(responder.records[0].headers)
    answer = await complete({}, headers)
    assert answer is not None
    await responder.reply(headers, answer)
    await eventually(lambda: counted("late") == before + 1)
    unknown = counted("unknown")
    await responder.reply(headers, answer)
    await eventually(lambda: counted("unknown") == unknown + 1)
    responder.behaviour = complete
    assert await client.call(BODY, request_id="r-next", wait_ms=WAIT_MS)


async def test_full(settings: Settings, responder: Responder) -> None:
    """As many may wait as the settings say; the next is refused at once, and served when there is room."""
    responder.behaviour = silent
    bounded = settings.model_copy(update={"replies_pending_max": 2})
    async with RequestReplyClient(bounded, instance="gateway-0") as client:
        waiting = [
            asyncio.create_task(client.call(BODY, request_id=f"w-{number}", wait_ms=WAIT_MS)) for number in range(2)
        ]
        await eventually(lambda: client.pending == 2)
        with pytest.raises(RepliesFull):
            await client.call(BODY, request_id="third", wait_ms=WAIT_MS)
        with pytest.raises(RepliesFull):
            await client.submit(BODY, request_id="third", wait_ms=WAIT_MS)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert client.pending == 0
        responder.behaviour = complete
        assert await client.call(BODY, request_id="fourth", wait_ms=WAIT_MS)


async def test_submit(client: RequestReplyClient, responder: Responder) -> None:
    """A submitted request is in Kafka when the call returns, and names no reply address."""
    await client.submit(BODY, request_id="s-1", wait_ms=WAIT_MS)
    await eventually(lambda: len(responder.records) == 1)
    record = responder.records[0]
    assert read_address(tuple(record.headers)) is None
    assert dict(record.headers)["request-id"] == b"s-1"
    assert client.pending == 0


async def test_too_large(client: RequestReplyClient, settings: Settings) -> None:
    """A body that Kafka would not take is refused before it is sent."""
    with pytest.raises(RecordTooLarge):
        await client.call(b"x" * (settings.record_bytes_max + 1), request_id="r-1", wait_ms=WAIT_MS)
    assert client.pending == 0


async def test_topics_missing(kafka_bootstrap: str, topic_prefix: str) -> None:
    """Without its topics a client does not start, and says what to run."""
    with pytest.raises(ConfigurationError, match="topics apply"):
        async with RequestReplyClient(
            Settings(kafka_bootstrap=kafka_bootstrap, topic_prefix=topic_prefix), instance="gateway-0"
        ):
            pass


async def test_kafka_absent() -> None:
    """Without Kafka a client does not start, and names the address and the setting."""
    with pytest.raises(ConfigurationError, match=re.escape("127.0.0.1:9")):
        async with RequestReplyClient(Settings(kafka_bootstrap="127.0.0.1:9"), instance="gateway-0"):
            pass


async def test_broker_restart(stack: ServiceStack, client: RequestReplyClient, responder: Responder) -> None:
    """While Kafka is away calls end within their bound and say so; when it is back, calls go through again."""
    assert await client.call(BODY, request_id="before", wait_ms=WAIT_MS)
    await asyncio.to_thread(stack.kafka.stop)
    try:
        started = time.perf_counter()
        with pytest.raises((PublishFailed, ReplyTimeout)):
            await client.call(BODY, request_id="while", wait_ms=1_500)
        assert time.perf_counter() - started < 3
    finally:
        await asyncio.to_thread(stack.kafka.start)
    async with asyncio.timeout(60):
        for attempt in range(60):
            try:
                await client.call(BODY, request_id=f"after-{attempt}", wait_ms=1_000)
                break
            except (PublishFailed, ReplyTimeout):
                continue
    await client.ping()
    assert client.alive
    assert await client.call(BODY, request_id="again", wait_ms=WAIT_MS)


def test_partition_is_stable() -> None:
    """A restarted instance reads where it read before; many instances spread over all partitions."""
    assert partition_of("gateway-0", 8) == partition_of("gateway-0", 8)
    spread = {partition_of(f"gateway-{number}", 8) for number in range(100)}
    assert spread == set(range(8))
