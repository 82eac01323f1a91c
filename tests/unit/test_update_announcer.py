"""What the near cache is told of updates that it reads otherwise than the materializer: no row stays as it was."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from app.adapters.near_cache import CachedFeatureStore
from app.adapters.update_announcer import SETTLED_MS, UpdateAnnouncer
from app.domain.document_parts import ValueType
from app.domain.feature_updates import UpdateRefused, read_update
from app.domain.features import EntityKey, Fetched, ViewNeed
from app.domain.near_cache import LAG_MS, views_read_anew
from app.domain.view_documents import FeatureViewSpec
from tests.support.memory_feature_store import MemoryFeatureStore
from tests.support.virtual_time import VirtualClock, in_virtual_time

Views = Mapping[str, FeatureViewSpec]
CACHED: Mapping[str, Any] = {"cache": {"ttl": "1h", "negativeTtl": "1h"}}


def view(*features: str, type_: str = "INT64", **more: Any) -> FeatureViewSpec:
    """A view of an applicant."""
    return FeatureViewSpec.model_validate_json(
        orjson.dumps(
            {
                "entities": [{"name": "id", "type": "INT64"}],
                "features": [{"name": each, "type": type_} for each in features],
                "source": {"type": "redis", "project": "p"},
                **more,
            }
        )
    )


PLAIN, KEPT, WIDER = view("a"), view("a", **CACHED), view("a", "b", **CACHED)


def need(name: str = "v", number: int = 1, type_: ValueType = "INT64") -> ViewNeed:
    """Feature ``a`` of an applicant."""
    return ViewNeed(name, EntityKey("p", ("id",), (number,), ("INT64",)), ("a",), (type_,))


@dataclass(frozen=True)
class Sent:
    """A record of the updates' topic."""

    offset: int
    value: bytes | None


class World:
    """A topic of one partition, a decide worker's near cache and a materializer, each under a revision of its own."""

    def __init__(self, views: Views | None) -> None:
        self.here, self.there = views, views or {}
        self.clock = VirtualClock(asyncio.get_running_loop())
        self.store = MemoryFeatureStore()
        self.cached = CachedFeatureStore(
            self.store,
            views=lambda: self.here,
            clock=self.clock,
            entries_max=100,
            bytes_max=1_000_000,
            fetch_timeout_ms=1_000,
        )
        self.announcer = UpdateAnnouncer(self.cached, views=lambda: self.here, clock=self.clock)
        self.log: list[bytes] = []
        self.stored = self.committed = 0
        self.announcer.assign({0: 0}, {0: 0})

    def send(self, values: Mapping[str, object], name: str = "v", number: int = 1, ahead_ms: int = 0) -> None:
        """An update comes into the topic."""
        update = {"project": "p", "view": name, "entities": {"id": number}, "values": values}
        # Each is later than the one before, also within a millisecond.
        self.log.append(orjson.dumps(update | {"event_time": self.clock.now_ms() + len(self.log) + ahead_ms}))

    async def announce(self) -> None:
        """The worker reads what is new in the topic, or finds that nothing is."""
        self.announcer.notice()
        at = self.announcer.positions[0]
        if self.log[at:]:
            await self.announcer.tell(0, [Sent(offset, self.log[offset]) for offset in range(at, len(self.log))])

    async def materialize(self, records: int = 1_000) -> None:
        """The materializer stores some; what it refuses is gone."""
        for value in self.log[self.stored : self.stored + records]:
            self.stored += 1
            try:
                await self.store.write([read_update(orjson.loads(value), self.there, self.clock.now_ms())])
            except UpdateRefused:
                continue

    def commit(self) -> None:
        """What is stored is committed, and the worker learns it, if it waits for it."""
        self.committed = self.stored
        announced = self.cached.awaits()
        if announced is not None:
            self.cached.materialized(announced, {0: self.committed})

    async def read(self, asked: ViewNeed | None = None) -> Fetched:
        """The feature as a request gets it."""
        asked = asked or need()
        return (await self.cached.fetch([asked], 500))[asked.view, "a"]

    async def assert_seen(self, *expected: object) -> None:
        """A request gets the value of what is stored by now, and once that is committed, it comes from the cache."""
        found = await self.read()
        assert (found.value, found.source) == (*expected, "redis")
        self.commit()
        await self.read()
        found = await self.read()
        assert (found.value, found.source) == (*expected, "cache")


@in_virtual_time
async def test_an_update_that_overtakes_the_revision_of_its_feature_is_seen() -> None:
    """The worker refuses it, the materializer waits for the revision and stores it."""
    world = World({"v": KEPT})
    world.send({"a": 1})
    await world.announce()
    await world.materialize()
    await world.read()
    world.send({"a": 2, "b": 1})
    await world.announce()
    assert (await world.read()).source == "cache"
    world.here = world.there = {"v": WIDER}
    await world.announce()
    assert [(await world.read()).source for _ in range(3)] == ["redis"] * 3
    await world.materialize()
    await world.assert_seen(2)


@in_virtual_time
async def test_an_update_on_its_way_while_its_view_gets_a_cache_is_seen() -> None:
    """Rows that are read before it is stored are not kept as fresh."""
    world = World({"v": PLAIN})
    world.send({"a": 1})
    await world.announce()
    world.here = world.there = {"v": KEPT}
    await world.announce()
    assert [(await world.read()).value for _ in range(2)] == [None, None]
    await world.materialize()
    await world.assert_seen(1)


@in_virtual_time
async def test_rows_of_before_a_view_lost_its_cache_are_read_again() -> None:
    """Nothing was told of them in between."""
    world = World({"v": KEPT})
    world.send({"a": 1})
    await world.announce()
    await world.materialize()
    await world.read()
    world.here = world.there = {"v": PLAIN}
    world.send({"a": 2})
    await world.announce()
    await world.materialize()
    world.here = world.there = {"v": KEPT}
    await world.announce()
    await world.assert_seen(2)


@in_virtual_time
async def test_an_update_that_a_worker_behind_refuses_is_seen_when_it_catches_up() -> None:
    """The materializer, which has the revision already, has stored it by then."""
    world = World({"v": KEPT})
    world.send({"a": 1})
    await world.announce()
    await world.materialize()
    await world.read()
    world.there = {"v": WIDER}
    world.send({"a": 2, "b": 1})
    await world.announce()
    await world.materialize()
    world.here = world.there
    await world.announce()
    await world.assert_seen(2)


@in_virtual_time
async def test_an_update_that_a_worker_ahead_refuses_is_seen_when_all_have_caught_up() -> None:
    """A materializer that is behind stores it; the rows are read again once none is."""
    world = World({"v": WIDER})
    world.send({"a": 1})
    await world.announce()
    await world.materialize()
    await world.read()
    world.here = {"v": KEPT}
    await world.announce()
    world.commit()
    await world.read()
    world.send({"a": 2, "b": 1})
    await world.announce()
    await world.materialize()
    assert (await world.read()).value == 1
    world.there = world.here
    await asyncio.sleep(SETTLED_MS / 1_000)
    await world.announce()
    await world.assert_seen(2)


@in_virtual_time
async def test_updates_read_before_any_revision_is_known_are_waited_for() -> None:
    """The first revision is one that changes all of its views."""
    world = World(None)
    world.send({"a": 1})
    await world.announce()
    world.here = world.there = {"v": KEPT}
    await world.announce()
    await world.read()
    await world.materialize()
    await world.assert_seen(1)


@in_virtual_time
async def test_an_update_that_is_too_far_ahead_until_it_is_stored_is_seen() -> None:
    """A materializer that lags takes what this worker's clock would refuse."""
    world = World({"v": KEPT})
    world.send({"a": 1})
    await world.announce()
    await world.materialize()
    await world.read()
    world.send({"a": 2}, ahead_ms=310_000)
    await world.announce()
    await asyncio.sleep(20)
    await world.materialize()
    await world.assert_seen(2)


@in_virtual_time
async def test_a_worker_that_starts_with_a_revision_may_be_ahead_of_others() -> None:
    """A materializer under the one before stores what this worker refuses; that is seen a little later."""
    world = World({"v": KEPT})
    world.there = {"v": WIDER}
    world.send({"a": 1})
    await world.announce()
    await world.materialize()
    world.commit()
    await world.read()
    world.send({"a": 2, "b": 2})
    await world.announce()
    await world.materialize()
    world.there = {"v": KEPT}
    await asyncio.sleep(SETTLED_MS / 1_000)
    await world.announce()
    await world.assert_seen(2)


@in_virtual_time
async def test_other_views_and_wrong_names_cost_no_row() -> None:
    """A revision that changes another view leaves the rows of this one, whatever was sent under names that nobody
    knows, or refused."""
    world = World({"v": KEPT, "w": PLAIN})
    await asyncio.sleep(SETTLED_MS / 1_000)
    world.send({"a": 1})
    await world.announce()
    await world.materialize()
    await world.read()
    for each in range(3):
        for name, values in (("x", {"a": 1}), (f"x{each}", {"a": 1}), ("v", {"c": 1}), ("w", {"a": 1})):
            world.send(values, name)
        await world.announce()
        assert (await world.read()).source == "cache"
        # Each revision's documents are read anew.
        world.here = world.there = {"v": view("a", **CACHED), "w": view("a", *"bcd"[: each + 1], **CACHED)}
        await world.announce()
        await asyncio.sleep(SETTLED_MS / 1_000)
        await world.announce()
    assert (await world.read()).source == "cache"


def test_the_views_that_are_read_anew_are_those_with_a_cache_that_have_changed() -> None:
    """Also where parts of what is the same have been computed; a feature server's view has no updates."""
    same = view("a", **CACHED)
    assert same.types == {"a": "INT64"}
    before = {"v": KEPT, "w": KEPT, "x": PLAIN, "y": PLAIN, "z": KEPT}
    server = {"type": "http", "endpoints": ["http://server.example:1"]}
    after = {
        "v": same,
        "w": WIDER,
        "x": KEPT,
        "y": view("a", "b"),
        "new": KEPT,
        "http": view("a", source=server, **CACHED),
    }
    assert views_read_anew(before, after) == {"w", "x", "new"}
    assert views_read_anew(before, before) == frozenset()


REVISIONS: tuple[Views, ...] = (
    {"v": PLAIN},
    {"v": KEPT},
    {"v": WIDER},
    {},
    {"v": view("a", type_="DOUBLE", **CACHED)},
)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_once_all_are_of_one_revision_no_fresh_row_lacks_an_update(seed: int) -> None:
    """Whatever the worker and the materializer read under which revision, and in whatever order, where the worker sees
    each and the materializer is not behind it for long: when both have gone over to the last one and all is stored,
    what the cache gives is what the store has."""
    drawn = random.Random(seed)

    @in_virtual_time
    async def run() -> None:
        world = World(REVISIONS[1])
        published, here, there, switched_ms = [REVISIONS[1]], 0, 0, 0.0
        for _ in range(60):
            match drawn.choice(
                ("send", "send", "announce", "store", "commit", "read", "read", "apply", "here", "there")
            ):
                case "send":
                    world.send(drawn.choice(({"a": drawn.randrange(100)}, {"a": drawn.randrange(100), "b": 1})))
                case "announce":
                    await world.announce()
                case "store":
                    await world.materialize(drawn.randrange(4))
                case "commit":
                    world.commit()
                case "read":
                    await world.read(need(type_=drawn.choice(("INT64", "DOUBLE"))))
                case "apply":
                    published.append(drawn.choice(REVISIONS))
                case "here":
                    here, switched_ms = min(here + 1, len(published) - 1), world.clock.steady_ms()
                    world.here = published[here]
                    world.announcer.notice()
                case _:
                    there = len(published) - 1
            await asyncio.sleep(drawn.choice((0, 0.01, 0.3)))
            if there < here and world.clock.steady_ms() - switched_ms >= SETTLED_MS - 300:
                there = here
            world.there = published[there]
        for each in published[here + 1 :]:
            world.here = each
            world.announcer.notice()
        latest: Views = {"v": drawn.choice((KEPT, view("a", "b", "c", **CACHED)))}
        world.here = latest
        await world.announce()
        world.send({"a": 100, "b": 1})
        await world.materialize(drawn.randrange(4))
        world.there = latest
        await asyncio.sleep(SETTLED_MS / 1_000)
        await world.announce()
        await world.read()
        await world.materialize()
        await world.read()
        world.commit()
        for type_ in ("INT64", "DOUBLE"):
            asked = need(type_=type_)
            stored = (await world.store.fetch([asked], 500))["v", "a"]
            for _ in range(3):
                found = await world.read(asked)
                assert (found.value, found.event_time_ms) == (stored.value, stored.event_time_ms)
        # What was told and then refused is waited for until a materializer lags no more.
        await asyncio.sleep(LAG_MS / 1_000)
        await world.read()
        assert (await world.read()).source == "cache"

    run()


@in_virtual_time
async def test_positions_go_on_where_they_were() -> None:
    """Known partitions go on, later ones begin at their beginning, and a topic that was made anew at its end; at the
    start only what is there by then is not told."""
    world = World({"v": KEPT})
    announcer = UpdateAnnouncer(world.cached, views=lambda: world.here, clock=world.clock)
    announcer.assign({0: 3, 1: 5}, {0: 3, 1: 9})
    assert announcer.positions == {0: 3, 1: 9}
    assert world.cached.awaits() is not None
    announcer.assign({0: 3, 1: 10, 2: 0}, {0: 8, 1: 12, 2: 4})
    assert announcer.positions == {0: 3, 1: 10, 2: 0}
    announcer.assign({0: 0}, {0: 1})
    assert announcer.positions[0] == 1
    world.here = {"v": WIDER}
    announcer.notice()
