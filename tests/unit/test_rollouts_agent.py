"""The rollouts worker: what it counts, when it moves a rollout, and what it tells, whatever dies on the way."""

import contextlib
from dataclasses import replace

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.agents.rollouts import HELD_MS
from app.domain.dispatch import TaskStatus
from app.domain.registry import compile_revision
from app.domain.rollouts import moved, obey
from app.domain.windows import step_stats
from tests.support.memory_audit import Crash
from tests.support.rollouts import EVERY_MS, documents
from tests.support.rollouts_world import RolloutsWorker, World


@pytest.fixture
def world() -> World:
    """A rollout at its first step, of which nobody has told yet; it began long ago."""
    return World(documents())


@pytest.fixture
def worker(world: World) -> RolloutsWorker:
    return RolloutsWorker(world)


def seen(world: World) -> tuple[int, int]:
    stats = step_stats(world.entries, world.running().step_id)
    return stats.decisions, stats.errors


async def settle(worker: RolloutsWorker, ticks: int = 3) -> None:
    for _ in range(ticks):
        await worker.count()
        await worker.judge.tick()


async def test_decisions_of_the_new_version_are_counted_over_all_partitions(
    world: World, worker: RolloutsWorker
) -> None:
    """Those of the old one are not."""
    for _ in range(4):
        world.decide()
        world.decide(TaskStatus.ERROR)
        world.decide(version="1")
    await worker.count()
    assert seen(world) == (8, 4)


async def test_what_is_delivered_again_counts_once(world: World) -> None:
    """A worker that dies before its offsets are committed, and one that dies between its writes."""
    for _ in range(6):
        world.decide()
    await RolloutsWorker(world).count(commits=False)
    await RolloutsWorker(world).count(commits=False)
    assert seen(world) == (6, 0)
    world.decide()
    world.die_at(0, after=True)
    with pytest.raises(Crash):
        await RolloutsWorker(world).count()
    await RolloutsWorker(world).count()
    assert seen(world) == (7, 0)


async def test_a_decision_that_is_in_the_log_twice_counts_once(world: World, worker: RolloutsWorker) -> None:
    """A decide worker that takes over sends the records of another again."""
    world.decide()
    lane = next(lane for lane in world.log if lane)
    lane.append(replace(lane[0], offset=1))
    await worker.count()
    assert seen(world) == (1, 0)


async def test_a_decision_counts_for_the_step_of_its_revision(world: World, worker: RolloutsWorker) -> None:
    """One of the step before is late and counts for none; one of a revision not yet here waits for it."""
    first = world.head
    for _ in range(5):
        world.decide()
    await settle(worker)
    assert world.statuses()[-1][:2] == ("progressing", 1)
    world.decide(TaskStatus.ERROR, under=first)
    world.decide()
    await worker.count()
    assert seen(world) == (1, 0)


@pytest.mark.parametrize("ahead_ms", [1, 3_600_000])
async def test_a_clock_that_is_ahead_hides_no_decision(world: World, worker: RolloutsWorker, ahead_ms: int) -> None:
    """The first decision of a revision reaches the worker before the revision, and seems to come from the future."""
    for _ in range(5):
        world.decide()
    await settle(worker)
    assert world.statuses()[-1][:2] == ("progressing", 1)
    worker.registry.behind = 1
    world.clock.now += ahead_ms
    world.decide()
    world.clock.now -= ahead_ms
    world.decide()
    await worker.count()
    assert seen(world) == (2, 0)


async def test_a_revision_that_comes_late_is_known_from_then_on(world: World, worker: RolloutsWorker) -> None:
    """What was decided under it before cannot be placed; nothing of it is remembered against what comes after."""
    for _ in range(5):
        world.decide()
    await settle(worker)
    worker.registry.behind = 100
    world.decide()
    world.clock.now += 3_600_000
    await worker.count()
    worker.registry.behind = 0
    world.decide()
    await worker.count()
    assert seen(world) == (1, 0)


async def test_a_step_is_left_only_when_all_that_the_log_held_is_counted(world: World, worker: RolloutsWorker) -> None:
    """What waits in the log at the end of a step may be what takes the rollout back."""
    for _ in range(5):
        world.decide()
    await worker.count()
    for _ in range(5):
        world.decide(TaskStatus.ERROR)
    await worker.judge.tick()
    await worker.judge.tick()
    await worker.judge.tick()
    assert world.statuses()[-1][:2] == ("progressing", 0)
    await worker.count()
    await worker.judge.tick()
    assert world.statuses()[-1][:2] == ("aborted", 0)


async def test_each_step_is_told_with_what_it_was_judged_by(world: World, worker: RolloutsWorker) -> None:
    """From the start to the promotion, each once."""
    for _ in range(3):
        for _ in range(5):
            world.decide()
        world.clock.now += EVERY_MS
        await settle(worker)
    await settle(worker)
    assert [(each["action"], each["step"]) for each in world.accounts()] == [
        ("start", 0),
        ("advance", 1),
        ("advance", 2),
        ("promote", 2),
    ]
    assert [each["stats"]["decisions"] for each in world.accounts()[1:]] == [5, 5, 5]
    assert all(len(values) == 1 for values in world.told().values())


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("write", range(8))
async def test_a_death_at_any_write_neither_repeats_nor_loses_a_step(world: World, write: int, after: bool) -> None:
    """The next worker finds the step where it is, and tells of it in the very words of the one before."""
    for _ in range(5):
        world.decide()
    world.die_at(write, after=after)
    with contextlib.suppress(Crash):
        await settle(RolloutsWorker(world))
    world.writes_left = None
    successor = RolloutsWorker(world)
    for _ in range(8):
        world.clock.now += 3_000
        await settle(successor, 1)
    assert [status[:2] for status in world.statuses()] == [("progressing", 0), ("progressing", 1)]
    assert [(each["action"], each["step"]) for each in world.accounts()] == [("start", 0), ("advance", 1)]
    assert all(len(set(values)) == 1 for values in world.told().values())


async def test_what_others_order_is_told_when_they_do_not(world: World, worker: RolloutsWorker) -> None:
    """An order of an operator whose command died: the revision is the truth, and the audit gets to know of it."""
    await settle(worker)
    running = world.running()
    paused = obey(running, "pause", world.clock.now)
    world.revisions.append(compile_revision(moved(world.head.documents, running.name, paused)))
    await settle(worker)
    assert [each["action"] for each in world.accounts()] == ["start"]
    world.clock.now += 6_000
    await settle(worker)
    assert [each["action"] for each in world.accounts()] == ["start", "pause"]


async def test_of_two_that_believe_to_judge_one_moves_it(world: World) -> None:
    """The other is refused by the registry, looks again, and finds nothing to do."""
    one, other = RolloutsWorker(world), RolloutsWorker(world)
    for _ in range(5):
        world.decide()
    await one.count()
    for worker in (one, other):
        await worker.judge.tick()
    await one.judge.tick()
    other.registry.behind = 1
    await other.judge.tick()
    other.registry.behind = 0
    await settle(other)
    assert [status[:2] for status in world.statuses()] == [("progressing", 0), ("progressing", 1)]


def held(action: str) -> float:
    return REGISTRY.get_sample_value("broker_rollout_moves_held_total", {"action": action}) or 0


async def test_what_is_bad_is_taken_back_while_the_registrys_end_is_refused(
    world: World, worker: RolloutsWorker
) -> None:
    """Workers decide by the last good revision, and the bad version with it: the next one is made from there."""
    for _ in range(10):
        world.decide(TaskStatus.ERROR)
    world.refused = True
    await settle(worker)
    assert [status[:2] for status in world.statuses()] == [("progressing", 0), ("aborted", 0)]
    assert [each["action"] for each in world.accounts()] == ["start", "abort"]
    assert held("abort") == 0


async def test_nothing_goes_on_while_the_registrys_end_is_refused(world: World, worker: RolloutsWorker) -> None:
    """It is counted, an error, and not tried at every tick; once the end is sound the rollout goes on."""
    before = held("advance")
    for _ in range(5):
        world.decide()
    world.refused = True
    with capture_logs() as logs:
        await settle(worker, 5)
    assert [status[:2] for status in world.statuses()] == [("progressing", 0)]
    assert [line["log_level"] for line in logs if line["event"] == "rollout_held"] == ["error"]
    assert held("advance") == before + 1
    world.refused = False
    world.clock.now += HELD_MS
    await settle(worker)
    assert world.statuses()[-1][:2] == ("progressing", 1)


async def test_nothing_is_kept_that_nobody_asks_for(world: World, worker: RolloutsWorker) -> None:
    """Windows of steps that are over, of hours past, and marks of what was told go away."""
    for _ in range(5):
        world.decide()
        world.shadow(flipped=False)
    await settle(worker)
    assert world.statuses()[-1][:2] == ("progressing", 1)
    world.clock.now += 2 * 3_600_000
    await settle(worker)
    kept = [key for entries in world.entries for key in entries]
    assert [key.partition("|")[0] for key in kept] == ["told"]


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"route": "scored", "task": "first", **labels})


async def test_shadows_are_metered_overall_and_by_segment(world: World, worker: RolloutsWorker) -> None:
    """Counters by whoever counts, the last hour's rates by whoever judges."""
    overall, web = {"version": "2", "segment": "all"}, {"version": "2", "segment": "web"}
    before = sample("broker_shadow_compared_total", **overall) or 0
    flips = sample("broker_shadow_flips_total", **web) or 0
    world.shadow(flipped=True, segment="web")
    world.shadow(flipped=False, segment="branch")
    world.shadow(flipped=False)
    world.shadow(flipped=None)
    await settle(worker, 1)
    assert sample("broker_shadow_compared_total", **overall) == before + 3
    assert sample("broker_shadow_flips_total", **web) == flips + 1
    assert sample("broker_shadow_flip_rate", **overall) == pytest.approx(1 / 3)
    assert sample("broker_shadow_flip_rate", **web) == 1
    assert sample("broker_shadow_score_difference", output="y", **overall) == pytest.approx(0.5)
    assert sample("broker_rollout_percent", rule="default", version="2") == 10


async def test_flips_of_the_new_version_count_for_its_step(world: World, worker: RolloutsWorker) -> None:
    """They are what `flipRate` is held against."""
    for flipped in (True, False, None):
        world.shadow(flipped=flipped)
    await worker.count()
    stats = step_stats(world.entries, world.running().step_id)
    assert (stats.compared, stats.flips) == (2, 1)
