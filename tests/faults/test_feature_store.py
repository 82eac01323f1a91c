"""The feature store's faults, as a decide worker meets them: through the near cache and the breaker, on real Redis."""

import asyncio
import time
import tracemalloc
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.adapters.clock import SystemClock
from app.adapters.feast_codec import feature_field, row_key
from app.adapters.near_cache import CachedFeatureStore
from app.adapters.redis_feast import RedisFeatureStore
from app.domain.breaker import BreakerPolicy
from app.domain.errors import Code, StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, TaskInputs, ViewNeed, resolve, unavailable
from app.domain.version_documents import FeatureContract
from app.domain.view_documents import FeatureViewSpec
from tests.support.redis_servers import Server, servers, until
from tests.support.registry_documents import request

PRESENT, STALE, ERROR = FeatureStatus.PRESENT, FeatureStatus.STALE, FeatureStatus.ERROR
SLACK_S = 1.0  # what a busy machine adds to a bound
POLICY = BreakerPolicy(failures=3, failing_ms=50, open_ms=300, trial_ms=300)
LARGE = 5 * 1024 * 1024


def view(**cache: str) -> FeatureViewSpec:
    """A view of two features."""
    document: dict[str, Any] = {
        "entities": ({"name": "id", "type": "INT64"},),
        "features": ({"name": "a", "type": "INT64"}, {"name": "b", "type": "STRING"}),
        "source": {"type": "redis", "project": "p"},
    }
    return FeatureViewSpec.model_validate(document | ({"cache": cache} if cache else {}))


VIEWS = {"v": view(ttl="50ms", negativeTtl="10s"), "w": view(ttl="50ms", staleIfError="1h"), "hot": view(ttl="1h")}


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Redis of this module's own."""
    with servers(tmp_path_factory.mktemp("redis"), 1) as (server,):
        yield server


@pytest.fixture
def server(standing: Server) -> Iterator[Server]:
    """It, running and not held up."""
    yield standing
    standing.resume()
    standing.start()


@asynccontextmanager
async def worker(
    url: str, *, fetch_timeout_ms: int = 150
) -> AsyncIterator[tuple[CachedFeatureStore, RedisFeatureStore]]:
    """What a decide worker reads by, and what a features worker writes by."""
    store = RedisFeatureStore(url, write_timeout_ms=1_000, breaker=POLICY)
    cached = CachedFeatureStore(
        store,
        views=lambda: VIEWS,
        clock=SystemClock(),
        entries_max=1_000,
        bytes_max=10_000_000,
        fetch_timeout_ms=fetch_timeout_ms,
    )
    try:
        yield cached, store
    finally:
        await cached.close()


def key() -> EntityKey:
    """An entity that no other test knows."""
    return EntityKey("p", ("id",), (uuid.uuid4().int >> 66,), ("INT64",))


def need(key: EntityKey, view: str = "v") -> ViewNeed:
    """Both features of a view."""
    return ViewNeed(view, key, ("a", "b"), ("INT64", "STRING"))


def row(key: EntityKey, value: int, time_ms: int, view: str = "v") -> FeatureRow:
    """Values for them."""
    return FeatureRow(view, key, ("a", "b"), (value, "text"), ("INT64", "STRING"), time_ms)


def inputs(found: Any, *contracts: dict[str, Any]) -> TaskInputs:
    """What a model is given under contracts, now."""
    made = [FeatureContract.model_validate(contract) for contract in contracts]
    return resolve(made, VIEWS, request(), found, int(time.time() * 1000))


async def test_while_redis_is_away_the_cache_answers_inside_max_age(server: Server) -> None:
    """By each contract: inside its maxAge PRESENT from the cache, past it STALE, without one unavailable unless the
    view allows it. Back again, Redis is read within the breaker's open time."""
    subject, event_ms = key(), int(time.time() * 1000) - 60_000
    async with worker(server.url) as (cached, store):
        await store.write([row(subject, 7, event_ms), row(subject, 8, event_ms, "w")])
        needs = [need(subject), need(subject, "w")]
        await cached.fetch(needs, 5_000)
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(0.06)
        for _ in range(5):
            started = time.monotonic()
            found = await cached.fetch(needs, 1_000)
            assert time.monotonic() - started < 0.5 + SLACK_S
            await asyncio.sleep(0.03)
        within, old, unbound, allowed, soft = inputs(
            found,
            {"ref": "v.a", "required": True, "maxAge": "1h"},
            {"ref": "v.a", "required": True, "maxAge": "30s"},
            {"ref": "v.b", "required": True},
            {"ref": "w.a", "required": True},
            {"ref": "v.b", "default": "none"},
        ).features
        assert (within.status, within.value, within.source, within.event_time_ms) == (PRESENT, 7, "cache", event_ms)
        assert old.status is STALE
        assert (unbound.status, allowed.status, allowed.value) == (ERROR, PRESENT, 8)
        assert (soft.status, soft.value) == (FeatureStatus.DEFAULTED, "none")
        broken = inputs(found, {"ref": "v.b", "required": True}).problems
        assert [problem.code for problem in broken] == [Code.FEATURES_UNAVAILABLE]
        with pytest.raises(StoreUnavailable):
            await cached.fetch([need(key())], 1_000)
        await asyncio.to_thread(server.start)
        await store.write([row(subject, 9, event_ms + 1)])
        async with asyncio.timeout(5):
            while (await cached.fetch(needs, 1_000))["v", "a"].value != 9:
                pass


async def test_an_update_while_redis_is_away_leaves_the_row_to_serve(server: Server) -> None:
    """A materializer cannot write it: inside a maxAge the row serves on, and is not used again once Redis is back."""
    subject, event_ms = key(), int(time.time() * 1000) - 60_000
    async with worker(server.url) as (cached, store):
        await store.write([row(subject, 7, event_ms, "hot")])
        await cached.fetch([need(subject, "hot")], 5_000)
        await asyncio.to_thread(server.kill)
        cached.invalidate("hot", subject, ("a", "b"), event_ms + 1, position=None)
        for _ in range(5):
            found = await cached.fetch([need(subject, "hot")], 1_000)
            within, unbound = inputs(
                found, {"ref": "hot.a", "required": True, "maxAge": "1h"}, {"ref": "hot.b", "required": True}
            ).features
            assert (within.status, within.value, within.source) == (PRESENT, 7, "cache")
            assert unbound.status is ERROR
        await asyncio.to_thread(server.start)
        await store.write([row(subject, 8, event_ms + 1, "hot")])
        async with asyncio.timeout(5):
            while (await cached.fetch([need(subject, "hot")], 1_000))["hot", "a"].value != 8:
                pass


async def test_a_hanging_redis_is_soon_left_alone(server: Server) -> None:
    """Each fetch ends within its time; after a few of them no fetch waits at all; once it answers it is used again."""
    async with worker(server.url) as (cached, store):
        subjects = [key() for _ in range(4)]
        await store.write([row(subject, 7, 1) for subject in subjects])
        server.pause()
        for subject in subjects:
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await cached.fetch([need(subject)], 1_000)
            assert time.monotonic() - started < 0.15 + SLACK_S
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="left alone"):
            await cached.fetch([need(subjects[0])], 1_000)
        assert time.monotonic() - started < 0.1
        server.resume()
        async with asyncio.timeout(5):
            while True:
                try:
                    found = await cached.fetch([need(subjects[0])], 1_000)
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.02)
        assert found["v", "a"].value == 7


async def test_a_slow_redis_costs_what_it_takes(server: Server) -> None:
    """CLIENT PAUSE for less than a fetch may take: late, and right, and no breaker opens."""
    subject = key()
    async with worker(server.url, fetch_timeout_ms=3_000) as (cached, store):
        await store.write([row(subject, 7, 1)])
        with server.client() as client:
            client.execute_command("CLIENT", "PAUSE", 200, "ALL")
        started = time.monotonic()
        assert (await cached.fetch([need(subject)], 3_000))["v", "a"].value == 7
        assert 0.05 < time.monotonic() - started < 0.2 + SLACK_S


async def test_a_hot_key_is_one_round_trip(server: Server) -> None:
    """A thousand requests for one row at once read Redis once."""
    subject = key()
    async with worker(server.url, fetch_timeout_ms=5_000) as (cached, store):
        await store.write([row(subject, 7, 1, "hot")])
        with server.client() as client:
            client.config_resetstat()
            answers = await asyncio.gather(*(cached.fetch([need(subject, "hot")], 5_000) for _ in range(1_000)))
            assert client.info("commandstats")["cmdstat_hmget"]["calls"] == 1
        assert {answer["hot", "a"].value for answer in answers} == {7}


async def test_a_value_of_5_mb_is_an_error_and_holds_up_nobody(server: Server) -> None:
    """It is told apart from its neighbours, is not kept in memory, and other rows are read meanwhile."""
    large, others = key(), [key() for _ in range(50)]
    async with worker(server.url, fetch_timeout_ms=5_000) as (cached, store):
        await store.write([row(each, 7, 1) for each in (large, *others)])
        with server.client() as client:
            client.hset(row_key(large), feature_field("v", "b"), b"\x12" + bytes(LARGE))
        await cached.fetch([need(others[0])], 5_000)
        tracemalloc.start()
        try:
            reading = asyncio.create_task(cached.fetch([need(large)], 5_000))
            slowest = 0.0
            for other in others:
                started = time.monotonic()
                assert (await cached.fetch([need(other)], 5_000))["v", "a"].value == 7
                slowest = max(slowest, time.monotonic() - started)
            found = await reading
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (found["v", "a"].value, found["v", "b"].status) == (7, ERROR)
        assert found["v", "b"].reason == f"stored value is too large: {LARGE + 1} bytes, and 65536 are allowed"
        assert slowest < 0.5
        assert peak < 8 * LARGE
        assert kept < LARGE
        started = time.monotonic()
        assert (await cached.fetch([need(large)], 5_000))["v", "b"].source == "cache"
        assert time.monotonic() - started < 0.1


async def test_a_poisoned_value_costs_itself(server: Server) -> None:
    """Bytes that are no value are an ERROR with the reason, from the store and from the cache; the rest is right."""
    subject, other = key(), key()
    async with worker(server.url, fetch_timeout_ms=5_000) as (cached, store):
        await store.write([row(subject, 7, 1), row(other, 8, 1, "w")])
        with server.client() as client:
            client.hset(row_key(subject), feature_field("v", "b"), b"\xff\x00\xff")
        for source in ("redis", "cache"):
            found = await cached.fetch([need(subject), need(other, "w")], 5_000)
            assert (found["v", "b"].status, found["v", "b"].source) == (ERROR, source)
            assert "damaged" in str(found["v", "b"].reason)
            assert (found["v", "a"].value, found["w", "a"].value) == (7, 8)


async def test_a_failover_is_unavailable_until_it_is_over(tmp_path: Path) -> None:
    """A master that was replaced refuses writes, a replica without its master refuses reads: both are said as what
    they are. What was promoted serves both."""
    subject = key()
    with servers(tmp_path, 2) as (first, second), first.client() as old, second.client() as new:
        new.config_set("replica-serve-stale-data", "no")
        new.replicaof("127.0.0.1", first.port)
        until(lambda: new.info("replication")["master_link_status"] == "up")
        async with worker(first.url) as (_, writer), worker(second.url) as (cached, store):
            assert await writer.write([row(subject, 7, 1)]) == 1
            await asyncio.to_thread(until, lambda: new.dbsize() == 1)
            assert (await cached.fetch([need(subject)], 1_000))["v", "a"].value == 7
            await asyncio.to_thread(first.kill)
            await asyncio.to_thread(until, lambda: new.info("replication")["master_link_status"] == "down")
            with pytest.raises(StoreUnavailable, match="MASTERDOWN"):
                await store.fetch([need(key())], 1_000)
            stale = (await cached.fetch([need(subject)], 1_000))["v", "a"]
            assert (stale.value, stale.source) == (7, "cache")
            new.replicaof("NO", "ONE")
            assert await store.write([row(subject, 8, 2)]) == 1
            await asyncio.sleep(0.06)
            assert (await cached.fetch([need(subject)], 1_000))["v", "a"].value == 8
            await asyncio.to_thread(first.start)
            old.replicaof("127.0.0.1", second.port)
            with pytest.raises(StoreUnavailable, match="READONLY"):
                await writer.write([row(subject, 9, 3)])


def refuses(reply: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    """A server that takes connections as Redis does and answers every command about rows with ``reply``."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while words := await read_command(reader):
            known = {b"HELLO": b"%1\r\n+proto\r\n:3\r\n", b"HMGET": reply}
            writer.write(known.get(words[0].upper(), b"+OK\r\n"))
        writer.close()

    return serve


async def read_command(reader: asyncio.StreamReader) -> list[bytes]:
    head = await reader.readline()
    words = []
    for _ in range(int(head[1:] or b"0")):
        size = int((await reader.readline())[1:])
        words.append((await reader.readexactly(size + 2))[:-2])
    return words


@pytest.mark.parametrize(
    "reply",
    [
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n",
        b"-CLUSTERDOWN Hash slot not served\r\n",
        b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
        b"-NOAUTH Authentication required.\r\n",
        b"-MOVED 7 127.0.0.1:1\r\n",
        b"-ASK 7 127.0.0.1:1\r\n",
        b"-ERR anything else\r\n",
        b"?what is this\r\n",
        b"*4\r\n$1\r\n",
        b"",
    ],
    ids=lambda reply: reply[:12].decode().strip() or "nothing",
)
async def test_whatever_a_server_says_instead_of_a_row_is_unavailable(reply: bytes) -> None:
    """Refusals, redirects into nowhere, and bytes that are no answer: bounded time, and never a value."""
    server = await asyncio.start_server(refuses(reply), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with worker(f"redis://127.0.0.1:{port}/0") as (_, store):
            started = time.monotonic()
            try:
                found = dict(await store.fetch([need(key())], 300))
            except StoreUnavailable:
                found = unavailable([need(key())])
            assert found == unavailable([need(key())])
            assert time.monotonic() - started < 0.3 + SLACK_S
    finally:
        server.close()


async def test_nodes_that_send_a_request_in_circles_are_left() -> None:
    """Two nodes that each name the other end in a refusal after a bounded number of redirects."""
    replies: dict[str, bytes] = {}

    def circling(name: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await refuses(replies[name])(reader, writer)

        return serve

    first, second = [await asyncio.start_server(circling(name), "127.0.0.1", 0) for name in ("first", "second")]
    ports = [each.sockets[0].getsockname()[1] for each in (first, second)]
    replies["first"] = b"-MOVED 7 127.0.0.1:%d\r\n" % ports[1]
    replies["second"] = b"-MOVED 7 127.0.0.1:%d\r\n" % ports[0]
    try:
        async with worker(f"redis://127.0.0.1:{ports[0]}/0") as (_, store):
            with pytest.raises(StoreUnavailable, match="MOVED"):
                await store.fetch([need(key())], 3_000)
    finally:
        first.close()
        second.close()
