"""The feature store on a real Redis Cluster: found out by itself, followed while slots move, half of it away."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from redis.crc import key_slot

from app.adapters.feast_codec import row_key
from app.adapters.feast_keys import sample_keys
from app.adapters.redis_feast import RedisFeatureStore
from app.commands.stored_rows import StoredRows
from app.domain.errors import ConfigurationError, StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import UNAVAILABLE, EntityKey, FeatureStatus, ViewNeed
from app.domain.view_documents import FeatureViewSpec
from app.settings import Settings
from tests.support.redis_servers import WORDS, RedisCluster, redis_cluster, servers
from tests.support.stack import ServiceStack


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three masters."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
async def store(cluster: RedisCluster) -> AsyncIterator[RedisFeatureStore]:
    """A store that has been told of one master."""
    made = RedisFeatureStore(cluster.masters[0].url, connections_max=8)
    await made.ping()
    yield made
    await made.close()


def keys(count: int) -> list[EntityKey]:
    """Entities that no other test knows."""
    project = f"p{uuid.uuid4().hex}"
    return [EntityKey(project, ("id",), (number,), ("INT64",)) for number in range(count)]


def need(key: EntityKey, number: int = 0) -> ViewNeed:
    """Feature ``a`` of a view."""
    return ViewNeed(f"v{number}", key, ("a",), ("INT64",))


def row(key: EntityKey, time_ms: int, value: int, number: int = 0) -> FeatureRow:
    """A value for it."""
    return FeatureRow(f"v{number}", key, ("a",), (value,), ("INT64",), time_ms)


def redirects(kind: str) -> float:
    return REGISTRY.get_sample_value("broker_feature_redirects_total", {"kind": kind}) or 0.0


def test_a_command_says_nothing_of_a_cluster_s_slots(cluster: RedisCluster, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is what a worker logs; the standard output of a command is its answer, and may be JSON."""
    view = FeatureViewSpec.model_validate_json(
        """{"entities": [{"name": "id", "type": "INT64"}], "features": [{"name": "a", "type": "INT64"}],
            "source": {"type": "redis", "project": "p"}}"""
    )
    asked = keys(50)
    with StoredRows(Settings(redis_url=cluster.masters[0].url), "v0", view, ["a"]) as stored:
        found = stored.of(asked)
    assert [found[key].latest_ms for key in asked] == [None] * 50
    assert capsys.readouterr().out == ""


async def test_a_fetch_over_all_shards_is_one_pipeline_to_each(cluster: RedisCluster, store: RedisFeatureStore) -> None:
    """Views of thirty entities are asked of the masters that have them, each once, and nothing is redirected."""
    mine = keys(30)
    await store.write([row(key, 1_000, number, number) for number, key in enumerate(mine)])
    before = redirects("moved")
    for client in cluster.clients:
        client.config_resetstat()
    found = await store.fetch([need(key, number) for number, key in enumerate(mine)], 5_000)
    assert [found[f"v{number}", "a"].value for number in range(30)] == list(range(30))
    assert redirects("moved") == before
    calls = [client.info("commandstats").get("cmdstat_hmget", {}).get("calls", 0) for client in cluster.clients]
    owners = [cluster.owner(key_slot(row_key(key))) for key in mine]
    assert calls == [owners.count(number) for number in range(3)]


async def test_a_sample_of_keys_is_of_all_shards(cluster: RedisCluster, store: RedisFeatureStore) -> None:
    """Whether one node is named or several, of which one is away; and a cluster that is away is told as such."""
    mine = keys(30)
    await store.write([row(key, 1_000, 1) for key in mine])
    for urls in (cluster.masters[0].url, f"redis://127.0.0.1:1, {cluster.masters[1].url}"):
        assert set(sample_keys(urls, mine[0].project, 100, lambda _: True)) == set(mine)
    with pytest.raises(StoreUnavailable):
        sample_keys("redis://127.0.0.1:1,redis://127.0.0.1:2", mine[0].project, 100, lambda _: True)


async def test_without_a_look_beforehand_the_first_redirect_tells(cluster: RedisCluster) -> None:
    """A store that was never pinged learns from MOVED that this is a cluster; soon nothing is redirected any more."""
    store = RedisFeatureStore(cluster.masters[2].url)
    mine = keys(12)
    before = redirects("moved")
    try:
        assert await store.write([row(key, 1_000, number) for number, key in enumerate(mine)]) == 12
        assert redirects("moved") > before
        async with asyncio.timeout(10):
            while True:
                before = redirects("moved")
                found = [await store.fetch([need(key)], 5_000) for key in mine]
                assert [each["v0", "a"].value for each in found] == list(range(12))
                if redirects("moved") == before:
                    break
    finally:
        await store.close()


async def test_a_slot_that_moves_is_followed(cluster: RedisCluster, store: RedisFeatureStore) -> None:
    """Reads and writes of a slot go on through all of its move: ASK while it moves, MOVED once it has."""
    [key] = keys(1)
    slot = key_slot(row_key(key))
    source = cluster.owner(slot)
    target = (source + 1) % 3
    await store.write([row(key, 1_000, 1)])
    stop = asyncio.Event()

    async def reader() -> list[int]:
        seen: list[int] = []
        while not stop.is_set():
            found = (await store.fetch([need(key)], 5_000))["v0", "a"]
            assert found.status is FeatureStatus.PRESENT
            assert isinstance(found.value, int)
            seen.append(found.value)
        return seen

    reading = [asyncio.create_task(reader()) for _ in range(4)]
    asked, moved = redirects("ask"), redirects("moved")
    await asyncio.to_thread(cluster.begin_move, slot, source, target)
    assert await store.write([row(key, 2_000, 2)]) == 1
    assert await asyncio.to_thread(cluster.move_keys, slot, source, target) == 1
    assert (await store.fetch([need(key)], 5_000))["v0", "a"].value == 2
    assert await store.write([row(key, 3_000, 3)]) == 1
    assert redirects("ask") > asked
    await asyncio.to_thread(cluster.end_move, slot, target)
    assert await store.write([row(key, 4_000, 4)]) == 1
    assert (await store.fetch([need(key)], 5_000))["v0", "a"].value == 4
    assert redirects("moved") > moved
    stop.set()
    for seen in await asyncio.gather(*reading):
        assert seen
        assert seen == sorted(seen)
    await asyncio.to_thread(cluster.begin_move, slot, target, source)
    await asyncio.to_thread(cluster.move_keys, slot, target, source)
    await asyncio.to_thread(cluster.end_move, slot, source)


async def test_one_master_away_costs_its_rows_only(cluster: RedisCluster, store: RedisFeatureStore) -> None:
    """The frozen master's rows are unavailable, the others' are there, and soon nobody waits for it any more."""
    mine = keys(12)
    await store.write([row(key, 1_000, number, number) for number, key in enumerate(mine)])
    needs = [need(key, number) for number, key in enumerate(mine)]
    frozen = {number for number, key in enumerate(mine) if cluster.owner(key_slot(row_key(key))) == 1}
    assert 0 < len(frozen) < 12
    cluster.masters[1].pause()
    try:
        for _ in range(8):
            found = await store.fetch(needs, 500)
            for number in range(12):
                value = found[f"v{number}", "a"]
                if number in frozen:
                    assert (value.status, value.reason) == (FeatureStatus.ERROR, UNAVAILABLE)
                else:
                    assert value.value == number
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="left alone"):
            await store.fetch([needs[min(frozen)]], 5_000)
        assert time.monotonic() - started < 1.0
        await store.ping()
    finally:
        cluster.masters[1].resume()
    async with asyncio.timeout(10):
        while (await store.fetch(needs, 5_000))[f"v{min(frozen)}", "a"].value is None:
            pass


async def test_what_is_promoted_takes_its_masters_place(tmp_path: Path) -> None:
    """A master dies and the cluster promotes its replica: the rows are unavailable meanwhile, and then read and written
    there, without anybody having been told."""
    with (
        redis_cluster(tmp_path / "masters") as cluster,
        servers(tmp_path / "replica", 1, *WORDS, bus=True) as (replica,),
    ):
        await asyncio.to_thread(cluster.replicate, 1, replica)
        store = RedisFeatureStore(cluster.masters[0].url)
        mine = [key for key in keys(30) if cluster.owner(key_slot(row_key(key))) == 1][:3]
        try:
            await store.ping()
            await store.write([row(key, 1_000, number, number) for number, key in enumerate(mine)])
            with cluster.clients[1] as client:
                await asyncio.to_thread(client.execute_command, "WAIT", 1, 5_000)
            await asyncio.to_thread(cluster.masters[1].kill)
            needs = [need(key, number) for number, key in enumerate(mine)]
            with pytest.raises(StoreUnavailable):
                await store.fetch(needs, 200)
            async with asyncio.timeout(30):
                while True:
                    try:
                        found = await store.fetch(needs, 200)
                        break
                    except StoreUnavailable:
                        await asyncio.sleep(0.1)
            assert [found[f"v{number}", "a"].value for number in range(3)] == [0, 1, 2]
            assert await store.write([row(mine[0], 2_000, 9)]) == 1
        finally:
            await store.close()


async def test_several_seeds_find_a_cluster_and_nothing_else(cluster: RedisCluster, stack: ServiceStack) -> None:
    """Of several servers named, one that answers is enough; servers that are no cluster's are refused."""
    store = RedisFeatureStore(f"redis://127.0.0.1:1/0,{cluster.masters[1].url}")
    [key] = keys(1)
    try:
        assert await store.write([row(key, 1_000, 7)]) == 1
        assert (await store.fetch([need(key)], 5_000))["v0", "a"].value == 7
    finally:
        await store.close()
    url = stack.env["BROKER_REDIS_URL"]
    store = RedisFeatureStore(f"{url},{url}")
    try:
        with pytest.raises(ConfigurationError, match="name one"):
            await store.ping()
    finally:
        await store.close()
