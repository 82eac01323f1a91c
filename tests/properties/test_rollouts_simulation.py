"""Rollouts workers under every death and with late eyes: no step is skipped, repeated or left untold."""

import asyncio
import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from app.domain.dispatch import TaskStatus
from app.domain.registry import compile_revision
from app.domain.rollouts import moved, obey
from tests.support.memory_audit import Crash
from tests.support.rollouts import EVERY_MS, documents
from tests.support.rollouts_world import RolloutsWorker, World

which = st.integers(0, 1)
events = st.one_of(
    st.tuples(st.just("decide"), st.integers(1, 6), st.sampled_from([0, 0, 0, 0, 1])),
    st.tuples(st.just("turn"), which, st.just(0)),
    st.tuples(st.just("turn"), which, st.just(0)),
    st.tuples(st.just("turn"), which, st.just(0)),
    st.tuples(st.just("pass"), st.integers(100, 8_000), st.just(0)),
    st.tuples(st.just("count"), which, st.integers(1, 5)),
    st.tuples(st.just("tick"), which, st.just(0)),
    st.tuples(st.just("tick"), which, st.just(0)),
    st.tuples(st.just("late"), which, st.integers(0, 2)),
    st.tuples(st.just("die"), st.integers(0, 6), st.integers(0, 1)),
    st.tuples(st.just("order"), st.sampled_from(["pause", "resume"]), st.just(0)),
)


async def happen(world: World, happened: Sequence[tuple[str, Any, int]]) -> None:
    workers = [RolloutsWorker(world), RolloutsWorker(world)]
    for what, one, two in happened:
        match what:
            case "decide":
                for _ in range(one):
                    world.decide(TaskStatus.ERROR if two else TaskStatus.OK)
            case "pass":
                world.clock.now += one
            case "late":
                workers[one].registry.behind = two
            case "die":
                world.die_at(one, after=bool(two))
            case "order":
                running = world.running()
                with contextlib.suppress(ValueError):
                    status = obey(running, one, world.clock.now)
                    world.revisions.append(compile_revision(moved(world.head.documents, running.name, status)))
            case _:
                try:
                    if what == "turn":
                        world.decide()
                        world.clock.now += EVERY_MS
                    if what != "tick":
                        await workers[one].count(two or 1_000)
                    if what != "count":
                        await workers[one].judge.tick()
                except Crash:
                    workers[one] = RolloutsWorker(world)
    world.writes_left = None
    last = RolloutsWorker(world)
    for _ in range(12):
        await last.count()
        await last.judge.tick()
        world.clock.now += 6_000


@settings(max_examples=200, deadline=None)
@given(st.lists(events, max_size=60))
def test_whatever_dies_and_whoever_is_late(happened: list[tuple[str, Any, int]]) -> None:
    """Statuses follow one another by single steps, each is there once, and each that a worker made is told once."""
    world = World(documents(min_decisions=1))
    asyncio.run(happen(world, happened))
    walked = world.statuses()
    event(f"{walked[-1][0]} at step {walked[-1][1]}")
    for before, after in pairwise(walked):
        assert before != after
        assert before[2] < after[2]
        assert after[1] - before[1] in (0, 1)
        assert before[0] not in ("aborted", "promoted")
        if after[1] == before[1]:
            assert after[0] != before[0]
    assert len(set(walked)) == len(walked)
    told = [(each["state"], each["step"], each["since"]) for each in world.accounts()]
    assert len(set(told)) == len(told)
    assert set(told) <= set(walked)
    made_by_workers = {
        after for before, after in pairwise(walked) if after[0] in ("aborted", "promoted") or after[1] > before[1]
    }
    assert made_by_workers <= set(told)
