"""Reads that share an exchange: at once when Redis is idle, together when it is busy, each with its own answers."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.redis_nodes import RedisNode
from app.adapters.redis_sharing import COMMANDS_MAX, EXCHANGES_MAX, SharedExchanges
from app.domain.breaker import BreakerPolicy
from app.domain.errors import StoreUnavailable
from tests.support.virtual_time import VirtualLoop, in_virtual_time

EXCHANGE_S = 0.01


class Redis:
    """Answers each command with itself, after 10 ms; ``down`` fails whole exchanges."""

    def __init__(self) -> None:
        self.exchanges: list[list[bytes]] = []
        self.running = self.peak = 0
        self.down = False

    async def __call__(self, commands: Sequence[bytes], timeout_ms: int) -> list[Any]:
        self.exchanges.append(list(commands))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await asyncio.sleep(EXCHANGE_S)
        except TimeoutError as error:
            raise StoreUnavailable("too slow") from error
        finally:
            self.running -= 1
        if self.down:
            raise StoreUnavailable("connection reset")
        return list(commands)


def reads(
    shared: SharedExchanges, *wanted: Sequence[bytes], timeout_ms: int = 1_000
) -> "list[asyncio.Task[list[Any]]]":
    """All reads at the same moment."""
    return [asyncio.create_task(shared.ask(commands, timeout_ms)) for commands in wanted]


@in_virtual_time
async def test_reads_that_come_while_redis_is_busy_go_together() -> None:
    """The first reads go alone and at once; those that come meanwhile share an exchange, and get their own answers."""
    redis = Redis()
    wanted = [[b"a"], [b"b"], [b"c", b"d"], [b"e"]]
    assert await asyncio.gather(*reads(SharedExchanges(redis), *wanted)) == wanted
    assert redis.exchanges == [[b"a"], [b"b"], [b"c", b"d", b"e"]]
    assert asyncio.get_running_loop().time() == 2 * EXCHANGE_S


@in_virtual_time
async def test_an_exchange_is_bounded() -> None:
    """However many reads wait, an exchange takes no more commands than Redis answers in one go."""
    redis = Redis()
    wanted = [[b"%d" % number] for number in range(COMMANDS_MAX + 10)]
    assert await asyncio.gather(*reads(SharedExchanges(redis), *wanted)) == wanted
    assert [len(each) for each in redis.exchanges] == [1, 1, COMMANDS_MAX, 8]
    assert redis.peak == EXCHANGES_MAX


@in_virtual_time
async def test_each_read_has_its_own_time_limit() -> None:
    """One that cannot wait ends when its time is over, unsent where it still waited; the others do not notice."""
    redis = Redis()
    shared = SharedExchanges(redis)
    patient, hasty = reads(shared, [b"a"], [b"b"], [b"c"]), reads(shared, [b"d"], timeout_ms=4)
    with pytest.raises(StoreUnavailable, match="did not answer within 4 ms"):
        await hasty[0]
    assert asyncio.get_running_loop().time() == pytest.approx(0.004)
    assert await asyncio.gather(*patient) == [[b"a"], [b"b"], [b"c"]]
    assert redis.exchanges == [[b"a"], [b"b"], [b"c"]]


@in_virtual_time
async def test_a_broken_exchange_fails_all_that_share_it_and_no_other() -> None:
    """Each of its reads learns that Redis cannot be used; later ones are asked anew."""
    redis = Redis()
    shared = SharedExchanges(redis)
    redis.down = True
    outcomes = await asyncio.gather(*reads(shared, [b"a"], [b"b"], [b"c"], [b"d"]), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["connection reset"] * 4
    redis.down = False
    assert await shared.ask([b"e"], 1_000) == [b"e"]


@in_virtual_time
async def test_an_error_that_nobody_foresaw_ends_each_read_and_cancels_none() -> None:
    """Whatever breaks an exchange, those that shared it learn that Redis cannot be used, and the next one goes on."""
    redis = Redis()

    async def breaking(commands: Sequence[bytes], timeout_ms: int) -> list[Any]:
        answers = await redis(commands, timeout_ms)
        if len(commands) > 1:
            raise RuntimeError("the handler is closed")
        return answers

    shared = SharedExchanges(breaking)
    outcomes = await asyncio.gather(*reads(shared, [b"a"], [b"b"], [b"c"], [b"d"]), return_exceptions=True)
    assert outcomes[:2] == [[b"a"], [b"b"]]
    for outcome in outcomes[2:]:
        assert isinstance(outcome, StoreUnavailable)
        assert "the handler is closed" in str(outcome)
    assert await shared.ask([b"e"], 1_000) == [b"e"]


async def test_a_transport_that_was_closed_is_a_dead_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """What uvloop says of a write to a closed transport is no OSError: it is tried anew, and then given up."""
    tries: list[Sequence[bytes]] = []

    async def exchange(_: RedisNode, commands: Sequence[bytes]) -> list[Any]:
        tries.append(commands)
        if len(tries) != 2:
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
        return list(commands)

    monkeypatch.setattr(RedisNode, "_exchange", exchange)
    node = RedisNode({"host": "127.0.0.1", "port": 1}, connections_max=1, policy=BreakerPolicy(failures=5, open_ms=100))
    assert await node.ask([b"a"], 1_000, guarded=True) == [b"a"]
    with pytest.raises(StoreUnavailable, match="the handler is closed"):
        await node.ask([b"b"], 1_000, guarded=True)
    assert len(tries) == 4
    await node.close()


@in_virtual_time
async def test_who_stops_waiting_takes_nothing_from_the_others() -> None:
    """A cancelled read is not sent, or its answers are dropped; its neighbours get theirs."""
    redis = Redis()
    shared = SharedExchanges(redis)
    running = reads(shared, [b"a"], [b"b"], [b"c"], [b"d"], [b"e"])
    await asyncio.sleep(EXCHANGE_S / 2)
    running[0].cancel()
    running[2].cancel()
    await asyncio.sleep(EXCHANGE_S)
    running[3].cancel()
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert [each for each in outcomes if not isinstance(each, BaseException)] == [[b"b"], [b"e"]]
    assert redis.exchanges == [[b"a"], [b"b"], [b"d", b"e"]]


@in_virtual_time
async def test_closing_leaves_nobody_waiting() -> None:
    """Reads that wait when the store closes are given up."""
    shared = SharedExchanges(Redis())
    running = reads(shared, [b"a"], [b"b"], [b"c"])
    await asyncio.sleep(EXCHANGE_S / 2)
    running[0].cancel()
    await asyncio.sleep(EXCHANGE_S / 4)
    later = reads(shared, [b"d"])
    await asyncio.sleep(0)
    await shared.close()
    outcomes = await asyncio.gather(running[2], *later, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 3), st.integers(1, 50), st.one_of(st.none(), st.integers(0, 30))),
        max_size=20,
    )
)
def test_each_read_gets_its_own_answers(comers: Sequence[tuple[int, int, int, int | None]]) -> None:
    """Whatever comes when, and whoever gives up: a read's answers are those to its own commands."""

    async def come(shared: SharedExchanges, number: int) -> None:
        at_ms, count, timeout_ms, patience_ms = comers[number]
        commands = [b"%d/%d" % (number, place) for place in range(count)]
        await asyncio.sleep(at_ms / 1000)
        try:
            async with asyncio.timeout(None if patience_ms is None else patience_ms / 1000):
                assert await shared.ask(commands, timeout_ms) == commands
        except TimeoutError:
            return
        except StoreUnavailable:
            assert asyncio.get_running_loop().time() * 1000 == pytest.approx(at_ms + timeout_ms)

    async def run() -> None:
        redis = Redis()
        shared = SharedExchanges(redis)
        await asyncio.gather(*(come(shared, number) for number in range(len(comers))))
        assert redis.peak <= EXCHANGES_MAX

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(run())
