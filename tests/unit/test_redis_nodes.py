"""A node's breaker: what counts as Redis's failure, and what is the caller's own haste."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from app.adapters.redis_nodes import RedisNode, pack
from app.domain.breaker import COUNTED_FROM_MS, BreakerPolicy, BreakerState
from app.domain.errors import StoreUnavailable


@pytest.fixture
async def node() -> AsyncIterator[RedisNode]:
    """Of a server that takes connections and never says a word; two failures open its breaker."""
    ended = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ended.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    made = RedisNode(
        {"host": host, "port": port}, connections_max=4, policy=BreakerPolicy(failures=2, failing_ms=0, open_ms=30)
    )
    yield made
    await made.close()
    ended.set()
    server.close()


async def fail(node: RedisNode, timeout_ms: int) -> BreakerState:
    """Ask in vain; the breaker's state after it."""
    with pytest.raises(StoreUnavailable):
        await node.ask([pack((b"PING",))], timeout_ms, guarded=True)
    return node._breaker.state


async def test_impatient_callers_do_not_open_the_breaker(node: RedisNode) -> None:
    """However many have only some milliseconds left; silence of a reasonable length does."""
    assert {await fail(node, 5) for _ in range(10)} == {BreakerState.CLOSED}
    assert await fail(node, COUNTED_FROM_MS) is BreakerState.CLOSED
    assert await fail(node, COUNTED_FROM_MS) is BreakerState.OPEN


async def test_a_trial_in_haste_leaves_an_open_breaker_open(node: RedisNode) -> None:
    """It must not stay half-open, for nobody would know of the trial's end."""
    for _ in range(2):
        await fail(node, COUNTED_FROM_MS)
    await asyncio.sleep(0.04)
    assert await fail(node, 5) is BreakerState.OPEN
