"""The near cache before a store: one fetch a key and a request, each within its own time, and what is left when the
store is away."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from prometheus_client import REGISTRY

from app.adapters import near_cache
from app.adapters.near_cache import CachedFeatureStore
from app.domain.errors import StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import UNAVAILABLE, EntityKey, FeatureStatus, Fetched, FetchedFeatures, ViewNeed, unavailable
from app.domain.view_documents import FeatureViewSpec, HttpSource
from tests.support.memory_feature_store import MemoryFeatureStore
from tests.support.virtual_time import VirtualClock, in_virtual_time

PRESENT, MISSING = FeatureStatus.PRESENT, FeatureStatus.MISSING


class CountedStore(MemoryFeatureStore):
    """A store that takes its time, counts, and loses some rows' shard."""

    def __init__(self, takes_s: float = 0.01) -> None:
        super().__init__()
        self.takes_s = takes_s
        self.asked: list[tuple[ViewNeed, ...]] = []
        self.lost: set[EntityKey] = set()

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        """See FeatureStore."""
        self.asked.append(tuple(needs))
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await asyncio.sleep(self.takes_s)
        except TimeoutError as error:
            raise StoreUnavailable("too slow") from error
        found: Mapping[tuple[str, str], Fetched] = await super().fetch(needs, timeout_ms)
        return {**found, **unavailable(need for need in needs if need.key in self.lost)}


def view(**cache: str) -> FeatureViewSpec:
    """A view with one feature."""
    document: dict[str, Any] = {
        "entities": ({"name": "id", "type": "INT64"},),
        "features": ({"name": "a", "type": "INT64"},),
        "source": {"type": "redis", "project": "p"},
    }
    return FeatureViewSpec.model_validate(document | ({"cache": cache} if cache else {}))


VIEWS = {"plain": view(), "kept": view(ttl="10s", negativeTtl="1s"), "also": view(ttl="10s", staleIfError="1h")}


def need(number: int = 1, name: str = "kept") -> ViewNeed:
    """Feature ``a`` of a view for an applicant."""
    return ViewNeed(name, EntityKey("p", ("id",), (number,), ("INT64",)), ("a",), ("INT64",))


class World:
    """A cached store in virtual time; ``now_ms`` is its clock's."""

    def __init__(self, takes_s: float = 0.01, entries: int = 1_000) -> None:
        self.clock = VirtualClock(asyncio.get_running_loop())
        self.store = CountedStore(takes_s)
        self.cached = CachedFeatureStore(
            self.store,
            views=lambda: VIEWS,
            clock=self.clock,
            entries_max=entries,
            bytes_max=1_000_000,
            fetch_timeout_ms=1_000,
        )

    async def write(self, value: int, time_ms: int, *needs: ViewNeed) -> None:
        """Store a value for each."""
        await self.store.write(
            [FeatureRow(each.view, each.key, ("a",), (value,), ("INT64",), time_ms) for each in needs]
        )

    async def read(self, *needs: ViewNeed, timeout_ms: int = 500) -> list[Fetched]:
        """Their values."""
        found = await self.cached.fetch(needs or (need(),), timeout_ms)
        return [found[each.view, "a"] for each in needs or (need(),)]


def lookups(outcome: str) -> float:
    return REGISTRY.get_sample_value("broker_feature_cache_lookups_total", {"outcome": outcome}) or 0.0


@in_virtual_time
async def test_a_row_is_read_once_in_its_ttl() -> None:
    """The first value is the store's, the next are the cache's with the same event time; after the ttl it is read."""
    world = World()
    await world.write(7, 5, need())
    [first] = await world.read()
    [second] = await world.read()
    assert (first.value, first.source, first.fetched_ms) == (7, "redis", None)
    assert (second.value, second.source, second.event_time_ms) == (7, "cache", 5)
    assert second.fetched_ms is not None
    assert len(world.store.asked) == 1
    await asyncio.sleep(11)
    assert (await world.read())[0].source == "redis"
    assert len(world.store.asked) == 2


@in_virtual_time
async def test_a_row_too_old_for_a_contract_is_read_again() -> None:
    """Inside its ttl, for Redis may have a newer one by now."""
    world = World()
    strict = need()._replace(max_age_ms=3_000)
    await world.write(1, world.clock.now_ms(), need())
    await world.read(strict)
    await asyncio.sleep(2)
    assert (await world.read(strict))[0].source == "cache"
    await asyncio.sleep(2)
    await world.write(2, world.clock.now_ms(), need())
    assert [(each.value, each.source) for each in await world.read(strict)] == [(2, "redis")]


@in_virtual_time
async def test_views_without_cache_are_read_each_time() -> None:
    """And what is read of all views, cached or not, is read in one fetch."""
    world = World()
    await world.write(7, 5, need(name="plain"), need(), need(name="also"))
    for _ in range(2):
        assert [each.value for each in await world.read(need(name="plain"), need(), need(name="also"))] == [7, 7, 7]
    assert [{each.view for each in asked} for asked in world.store.asked] == [{"plain", "kept", "also"}, {"plain"}]


@in_virtual_time
async def test_rows_that_are_not_there_are_asked_for_again_sooner() -> None:
    """MISSING lasts for negativeTtl; of a view without one it is asked for each time."""
    world = World()
    before = lookups("negative")
    for _ in range(2):
        assert [each.status for each in await world.read(need(), need(name="also"))] == [MISSING, MISSING]
    assert [len(asked) for asked in world.store.asked] == [2, 1]
    assert lookups("negative") == before + 1
    await asyncio.sleep(1.1)
    await world.write(7, 5, need())
    assert (await world.read())[0].value == 7


@in_virtual_time
async def test_a_thousand_requests_for_a_row_are_one_fetch() -> None:
    """All of them get its value, one read from the store and the others with it."""
    world, before = World(), lookups("shared")
    await world.write(7, 5, need())
    answers = await asyncio.gather(*(world.read() for _ in range(1_000)))
    assert {answer[0].value for answer in answers} == {7}
    assert len(world.store.asked) == 1
    assert lookups("shared") == before + 999


@in_virtual_time
async def test_who_began_a_fetch_may_leave() -> None:
    """The first request is cancelled, the second runs out of time, the third gets the value of the same fetch."""
    world = World(takes_s=0.2)
    await world.write(7, 5, need())
    first = asyncio.create_task(world.read())
    await asyncio.sleep(0.01)
    second, third = asyncio.create_task(world.read(timeout_ms=50)), asyncio.create_task(world.read())
    await asyncio.sleep(0.01)
    first.cancel()
    started_ms = world.clock.steady_ms()
    with pytest.raises(StoreUnavailable, match="within the request's time"):
        await second
    assert world.clock.steady_ms() - started_ms <= 50
    assert (await third)[0].value == 7
    assert len(world.store.asked) == 1
    assert first.cancelled()


@in_virtual_time
async def test_a_request_waits_for_several_fetches_at_once() -> None:
    """Rows that two other requests are fetching, and one of its own: three fetches, one row each."""
    world = World(takes_s=0.1)
    await world.write(7, 5, need(), need(name="also"), need(name="plain"))
    others = [asyncio.create_task(world.read(each)) for each in (need(), need(name="also"))]
    await asyncio.sleep(0.05)
    started_ms = world.clock.steady_ms()
    mine = await world.read(need(), need(name="also"), need(name="plain"))
    assert world.clock.steady_ms() - started_ms == pytest.approx(100)
    assert [each.value for each in mine] == [7, 7, 7]
    assert [len(asked) for asked in world.store.asked] == [1, 1, 1]
    await asyncio.gather(*others)


@in_virtual_time
async def test_an_update_is_seen_as_soon_as_it_is_there() -> None:
    """Between its announcement and its arrival the old value is read and not kept; then the new one is, and kept."""
    world = World()
    await world.write(1, 1_000, need())
    await world.read()
    world.cached.invalidate("kept", need().key, ("a",), 2_000, position=None)
    for _ in range(2):
        [old] = await world.read()
        assert (old.value, old.source) == (1, "redis")
    await world.write(2, 2_000, need())
    assert [(await world.read())[0].source for _ in range(2)] == ["redis", "cache"]
    assert (await world.read())[0].value == 2


@in_virtual_time
async def test_an_update_that_comes_while_its_row_is_fetched_is_not_missed() -> None:
    """A fetch that began before it brings the old value, which is not kept."""
    world = World(takes_s=0.1)
    await world.write(1, 1_000, need())
    reading = asyncio.create_task(world.read())
    await asyncio.sleep(0.05)
    world.cached.invalidate("kept", need().key, ("a",), 2_000, position=None)
    assert (await reading)[0].value == 1
    await world.write(2, 2_000, need())
    assert (await world.read())[0].value == 2


class SlowAnswer(CountedStore):
    """A store that reads at once, and answers late."""

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        """See FeatureStore."""
        takes_s, self.takes_s = self.takes_s, 0.0
        found = await super().fetch(needs, timeout_ms)
        self.takes_s = takes_s
        await asyncio.sleep(takes_s)
        return found


@in_virtual_time
async def test_aggregates_are_kept_once_their_update_is_known_to_be_there() -> None:
    """Not before, however late the materializer is, and not what was asked for before that was known, though its answer
    comes after."""
    world = World()
    world.store = SlowAnswer(0.1)
    world.cached._store = world.store
    await world.write(1, 1_000, need())
    await world.read()
    world.cached.invalidate("kept", need().key, ("b",), 2_000, position=(0, 7))
    await asyncio.sleep(8)
    assert [(await world.read())[0].source for _ in range(2)] == ["redis", "redis"]
    reading = asyncio.create_task(world.read())
    await asyncio.sleep(0.05)
    await world.write(2, 1_001, need())
    announced = world.cached.awaits()
    assert announced is not None
    world.cached.materialized(announced, {0: 8})
    assert world.cached.awaits() is None
    assert (await reading)[0].value == 1
    for source in ("redis", "cache"):
        [new] = await world.read()
        assert (new.value, new.source) == (2, source)


@in_virtual_time
async def test_while_the_store_is_away_rows_past_their_ttl_serve() -> None:
    """With what they are: from the cache, and overdue where only a maxAge can allow them; the others are
    unavailable."""
    world = World()
    rows = need(), need(name="also")
    await world.write(7, 5, *rows)
    await world.read(*rows)
    await asyncio.sleep(60)
    world.store.available = False
    before = lookups("stale")
    kept, also, unknown = await world.read(*rows, need(name="plain"))
    assert (kept.value, kept.source, kept.overdue) == (7, "cache", True)
    assert (also.value, also.source, also.overdue) == (7, "cache", False)
    assert unknown.reason == UNAVAILABLE
    assert lookups("stale") == before + 2
    await asyncio.sleep(3_600)
    assert (await world.read(need(name="also")))[0].overdue
    with pytest.raises(StoreUnavailable):
        await world.read(need(2), need(name="plain"))
    world.store.available = True
    assert (await world.read())[0].source == "redis"


@in_virtual_time
async def test_an_update_during_an_outage_leaves_the_row_to_fall_back_on() -> None:
    """As one past its ttl, however new it is: without staleIfError only a maxAge allows it. Nothing of it is served
    once the store answers, and a row that is read before its update arrives serves the next outage."""
    world = World()
    rows = need(), need(name="also")
    await world.write(1, 1_000, *rows)
    await world.read(*rows)
    world.store.available = False
    for each in rows:
        world.cached.invalidate(each.view, each.key, ("a",), 2_000, position=None)
    for _ in range(3):
        kept, also = await world.read(*rows)
        assert (kept.value, kept.source, kept.event_time_ms, kept.overdue) == (1, "cache", 1_000, True)
        assert (also.value, also.source, also.event_time_ms, also.overdue) == (1, "cache", 1_000, False)
    world.store.available = True
    await world.write(2, 1_500, *rows)
    assert [(each.value, each.source) for each in await world.read(*rows)] == [(2, "redis")] * 2
    world.store.available = False
    assert [(each.value, each.source) for each in await world.read(*rows)] == [(2, "cache")] * 2
    world.store.available = True
    await world.write(3, 2_000, *rows)
    assert [(each.value, each.source) for each in await world.read(*rows)] == [(3, "redis")] * 2
    assert [(each.value, each.source) for each in await world.read(*rows)] == [(3, "cache")] * 2


@in_virtual_time
async def test_a_tombstone_during_an_outage_leaves_nothing() -> None:
    """What was deleted is unavailable and not given out again."""
    world = World()
    await world.write(1, 1_000, need(name="also"))
    await world.read(need(name="also"))
    world.store.available = False
    world.cached.invalidate("also", need().key, None, 2_000, position=None)
    with pytest.raises(StoreUnavailable):
        await world.read(need(name="also"))


@in_virtual_time
async def test_with_a_row_to_fall_back_on_half_the_time_is_left() -> None:
    """A hanging store costs a request half of what it has, and the model can still be asked."""
    world = World()
    await world.write(7, 5, need())
    await world.read()
    await asyncio.sleep(60)
    world.store.takes_s = 30
    started_ms = world.clock.steady_ms()
    assert (await world.read(timeout_ms=200))[0].value == 7
    assert world.clock.steady_ms() - started_ms == pytest.approx(100)


@in_virtual_time
async def test_while_the_store_fails_nobody_waits_for_anothers_fetch() -> None:
    """After a failure each request asks for itself, so that a breaker can answer it at once; after an answer they
    share again."""
    world = World(takes_s=0.1)
    world.store.available = False
    with pytest.raises(StoreUnavailable):
        await world.read()
    await asyncio.gather(*(world.read() for _ in range(5)), return_exceptions=True)
    assert len(world.store.asked) == 6
    world.store.available = True
    await world.read(need(2))
    await asyncio.gather(*(world.read() for _ in range(5)))
    assert len(world.store.asked) == 8


@in_virtual_time
async def test_a_shard_that_is_away_costs_its_rows_only() -> None:
    """Rows of other shards are there and kept; the lost one's is served from before, or unavailable."""
    world = World()
    await world.write(7, 5, need(1), need(2, "also"))
    await world.read(need(1))
    await asyncio.sleep(60)
    world.store.lost = {need(1).key, need(3).key}
    first, second = await world.read(need(1), need(2, "also"))
    assert (first.value, first.overdue, second.value, second.source) == (7, True, 7, "redis")
    assert (await world.read(need(2, "also")))[0].source == "cache"
    assert (await world.read(need(3)))[0].reason == UNAVAILABLE


@in_virtual_time
async def test_fetches_under_way_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches that outlive the requests which began them do not pile up: past the bound a request ends at once."""
    monkeypatch.setattr(near_cache, "FETCHES_MAX", 3)
    world = World(takes_s=0.9)
    for number in range(3):
        with pytest.raises(StoreUnavailable, match="within"):
            await world.read(need(number), timeout_ms=10)
    started_ms = world.clock.steady_ms()
    with pytest.raises(StoreUnavailable, match="3 fetches"):
        await world.read(need(4))
    assert world.clock.steady_ms() == started_ms
    await asyncio.sleep(1)
    assert (await world.read(need(4), timeout_ms=2_000))[0].status is MISSING


@in_virtual_time
async def test_closing_ends_what_is_under_way() -> None:
    """A request that waits meanwhile is told that the store is unavailable."""
    world = World(takes_s=0.5)
    reading = asyncio.create_task(world.read(timeout_ms=5_000))
    await asyncio.sleep(0.1)
    await world.cached.ping()
    await world.cached.close()
    with pytest.raises(StoreUnavailable, match="ends"):
        await reading


@in_virtual_time
async def test_a_fault_of_the_store_s_code_is_not_hidden() -> None:
    """What is no StoreUnavailable reaches the request, and the next one asks anew."""
    world = World()

    async def broken(needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        raise ZeroDivisionError

    right, world.store.fetch = world.store.fetch, broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        await world.read()
    world.store.fetch = right  # type: ignore[method-assign]
    assert (await world.read())[0] == Fetched(MISSING)


class SlowServer(CountedStore):
    """Redis answers at once, the feature server takes as long as it takes."""

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        """See FeatureStore."""
        self.takes_s = 2.0 if any(each.http is not None for each in needs) else 0.01
        return await super().fetch(needs, timeout_ms)


@in_virtual_time
@pytest.mark.parametrize("served", ["plain", "kept"])
async def test_a_slow_feature_server_keeps_no_row_of_redis_back(served: str) -> None:
    """Its own features are unavailable, cached view or not, once the time is over; Redis's are there, also for who
    joins."""
    world = World()
    world.store = SlowServer()
    world.cached._store = world.store
    await world.write(7, 5, need(name="also"), need(name="plain"))
    server = HttpSource.model_validate({"type": "http", "endpoints": ("http://server.example:1",), "timeout": "2s"})
    slow = need(name=served)._replace(http=server)
    started_ms = world.clock.steady_ms()
    both = asyncio.create_task(world.read(slow, need(name="also"), timeout_ms=800))
    await asyncio.sleep(0)
    assert (await world.read(need(name="also"), timeout_ms=800))[0].value == 7
    assert world.clock.steady_ms() - started_ms == pytest.approx(10)
    lacking, there = await both
    assert (lacking.reason, there.value) == (UNAVAILABLE, 7)
    assert world.clock.steady_ms() - started_ms == pytest.approx(800)
