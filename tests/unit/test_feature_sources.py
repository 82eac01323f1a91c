"""Sources of one fetch: none waits for another's, and who was not asked has not said that it lacks a value."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from app.adapters.feature_sources import FeatureSources
from app.adapters.http_feast import FeastServers
from app.domain.errors import StoreUnavailable
from app.domain.features import (
    UNAVAILABLE,
    EntityKey,
    FeatureStatus,
    Fetched,
    FetchedFeatures,
    ViewNeed,
    is_away,
    unavailable,
)
from app.domain.view_documents import HttpSource
from tests.support.memory_feature_store import MemoryFeatureStore
from tests.support.virtual_time import VirtualClock, in_virtual_time


class Servers(FeastServers):
    """Feature servers of which those of views named slow take ten minutes."""

    async def ask(self, need: ViewNeed, source: HttpSource, timeout_ms: int) -> FetchedFeatures:
        """See FeastServers."""
        if need.view == "slow":
            await asyncio.sleep(min(600, timeout_ms / 1000))
            return unavailable([need])
        return {(need.view, feature): Fetched(FeatureStatus.PRESENT, 7, source="http") for feature in need.features}


class Slow(MemoryFeatureStore):
    """Redis that takes twice the time that it is given."""

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> FetchedFeatures:
        """See FeatureStore."""
        await asyncio.sleep(2 * timeout_ms / 1000)
        return await super().fetch(needs, timeout_ms)


def need(view: str, **changes: Any) -> ViewNeed:
    """A feature of a feature server's view."""
    source = {"type": "http", "endpoints": ("http://server.example:1",), "timeout": "2s"} | changes
    key = EntityKey("p", ("id",), (1,), ("INT64",))
    return ViewNeed(view, key, ("a",), ("INT64",), HttpSource.model_validate(source))


KEPT = {"writeBack": {"project": "p", "maxAge": "1h"}}


def sources(store: MemoryFeatureStore) -> FeatureSources:
    """Over ``store`` and the servers above, in virtual time."""
    return FeatureSources(store, store, Servers(), VirtualClock(asyncio.get_running_loop()))


@in_virtual_time
async def test_a_server_with_write_back_waits_for_no_other_server() -> None:
    """It is asked as soon as Redis lacks its row, while a slow one takes all of the time."""
    found = await sources(MemoryFeatureStore()).fetch([need("slow"), need("quick", **KEPT)], 500)
    assert (found["quick", "a"].value, found["quick", "a"].source) == (7, "http")
    assert found["slow", "a"].reason == UNAVAILABLE


@in_virtual_time
async def test_a_silent_redis_leaves_a_server_with_write_back_half_of_the_time() -> None:
    """The server is asked after the first half, and answers for its view; Redis's own views are unavailable."""
    store, loop = MemoryFeatureStore(), asyncio.get_running_loop()
    store.silent = True
    started_s = loop.time()
    found = await sources(store).fetch([need("quick", **KEPT), need("redis")._replace(http=None)], 500)
    assert loop.time() - started_s == pytest.approx(0.25)
    assert (found["quick", "a"].value, found["quick", "a"].source) == (7, "http")
    assert found["redis", "a"] == Fetched(FeatureStatus.ERROR, reason=UNAVAILABLE)


@in_virtual_time
async def test_redis_alone_has_all_of_the_time() -> None:
    """Where no server can follow, none is waited for."""
    store, loop = MemoryFeatureStore(), asyncio.get_running_loop()
    store.silent = True
    started_s = loop.time()
    with pytest.raises(StoreUnavailable, match="within 500 ms"):
        await sources(store).fetch([need("redis")._replace(http=None)], 500)
    assert loop.time() - started_s == pytest.approx(0.5)


@in_virtual_time
async def test_a_server_that_was_not_asked_is_unavailable() -> None:
    """Where Redis has used the time up, as on a worker that stood still, nobody knows that the value is missing."""
    found = await sources(Slow()).fetch([need("quick", **KEPT)], 500)
    [expected] = unavailable([need("quick")], "no time was left to ask its feature server").values()
    assert found["quick", "a"] == expected
    assert is_away(expected.reason)
