"""What becomes of a join while its partition moves, its pool is silent, or Kafka does not take its tasks."""

import asyncio
from typing import Any

import pytest

from app.domain.errors import Code, Problem
from app.domain.rollout_stats import UNACKNOWLEDGED, UNATTENDED
from tests.support import registry_documents as rd
from tests.support.decide_world import World, decision, settled, statuses, with_route
from tests.support.memory_log import Fate
from tests.support.virtual_time import in_virtual_time

INLINE = {"select": {"version": "1"}}
QUEUED = {"select": {"version": "2"}}
BRIEF = {"select": {"version": "6"}}
"""Queued, and given up after 80 ms."""


async def world(name: str, tasks: list[dict[str, Any]], *workers: str, **rule: Any) -> World:
    """Workers, of which the first owns everything, and a route with these tasks."""
    made = World(with_route(name, tasks, **rule), None)
    first, *others = workers or ("one",)
    await made.start(first)
    for other in others:
        await made.start(other, ())
    return made


def told(made: World) -> list[tuple[str, str, str, str]]:
    """Task, version, status and the last attempt's outcome, those that failed before included."""
    lines = []
    for task in decision(made).tasks:
        for each in (*task.earlier, task):
            assert each.result is not None
            outcome = each.result.attempts[-1].outcome if each.result.attempts else ""
            lines.append((task.name, each.version, str(each.result.status), outcome))
    return lines


# --- what was given up ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("join", [{}, {"join": {"policy": "first"}}])
def test_nobody_waits_for_a_join_that_was_given_up(join: dict[str, Any]) -> None:
    """The partition goes away while answers are being handled: each handler ends, and its slot is free again."""

    @in_virtual_time
    async def run() -> None:
        standing = [{"version": "4"}]
        tasks = [rd.task(**BRIEF, fallback=standing), rd.task(name="b", **BRIEF, fallback=standing)]
        made = await world("moved", tasks, "one", "two", **join)
        made.send("r", "/moved", amount=40.0)
        await asyncio.sleep(0.02)
        for task in made.tasks():
            made.answer(task, problem=Problem(Code.MODEL_ERROR, "no"))
        await asyncio.sleep(0.005)
        assert made.processes["one"].handling == 2
        await made.rebalance({0: "two", 1: "two"})
        await asyncio.sleep(1)
        assert made.processes["one"].handling == 0
        await settled(made)
        assert made.reply()["status"] == "completed"

    run()


@in_virtual_time
async def test_a_join_that_was_given_up_calls_no_model() -> None:
    """What an inline call set free is run by the next owner alone."""
    names = ("pd", "b", "c")
    tasks = [
        rd.task(name=name, **INLINE, **({"after": [names[at - 1]]} if at else {})) for at, name in enumerate(names)
    ]
    made = await world("steps", tasks, "one", "two")
    made.send("r", "/steps", amount=30.0)
    await asyncio.sleep(0.01)
    assert made.model.calls == [("r", "pd")]
    await made.rebalance({0: "two", 1: "two"})
    await settled(made)
    assert made.model.calls == [("r", "pd"), *(("r", name) for name in names)]


@in_virtual_time
async def test_others_were_enough_before_a_takeover_has_read_everything() -> None:
    """The pool may have answered while nobody listened, so the task is skipped and its pool not called slow."""
    tasks = [rd.task(**QUEUED), rd.task(name="b", **QUEUED)]
    made = await world("enough", tasks, "one", "two", join={"policy": "first"})
    made.send("r", "/enough")
    await asyncio.sleep(0.02)
    await made.rebalance({0: "two", 1: "two"})
    made.answer(next(task for task in made.tasks() if task.row.task == "pd"))
    await settled(made)
    assert told(made) == [("pd", "2", "ok", "ok"), ("b", "2", "skipped", UNATTENDED)]


# --- what stands in ---------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_stand_in_that_was_asked_is_known_to_the_next_worker() -> None:
    """Its answer comes after the death of whoever asked, and counts."""
    made = await world("known", [rd.task(**BRIEF, fallback=[{"version": "7"}])], "one", "two")
    made.send("r", "/known")
    asked = asyncio.Event()
    made.log.listeners.append(lambda: asked.set() if len(made.tasks()) > 1 else None)
    await asked.wait()
    _, second = made.tasks()
    assert second.version == "7"
    made.processes["one"].kill()
    await made.processes["one"].gone()
    await made.rebalance({0: "two", 1: "two"})
    made.answer(second)
    await settled(made)
    assert told(made) == [("pd", "6", "timeout", "timeout"), ("pd", "7", "ok", "ok")]


@in_virtual_time
async def test_a_second_stand_in_is_known_to_the_next_worker_too() -> None:
    """The first one's pool has no topic, so another is asked: the entry names it before."""
    fallback = [{"version": "3"}, {"version": "7"}]
    made = await world("second", [rd.task(**BRIEF, fallback=fallback)], "one", "two")
    made.send("r", "/second")
    await asyncio.sleep(0.02)
    asked = asyncio.Event()
    made.log.listeners.append(lambda: asked.set() if len(made.tasks()) > 1 else None)
    made.answer(made.tasks()[0], problem=Problem(Code.MODEL_ERROR, "no"))
    await asked.wait()
    made.processes["one"].kill()
    await made.processes["one"].gone()
    made.answer(made.tasks()[1])
    await made.rebalance({0: "two", 1: "two"})
    await settled(made)
    assert told(made) == [("pd", "6", "error", "ok"), ("pd", "3", "error", ""), ("pd", "7", "ok", "ok")]


@in_virtual_time
async def test_an_inline_stand_in_waits_for_no_entry() -> None:
    """Kafka refuses the entry that a queued stand-in beside it needs: the model is called all the same."""
    tasks = [rd.task(**BRIEF, fallback=[{"version": "4"}]), rd.task(name="b", **BRIEF, fallback=[{"version": "7"}])]
    made = await world("apart", tasks)
    made.send("r", "/apart")
    await asyncio.sleep(0.05)
    made.processes["one"].arm(*[Fate.LOST] * 3)
    await asyncio.sleep(0.05)
    assert made.model.calls == [("r", "pd")]
    await settled(made)
    assert told(made)[:2] == [("pd", "6", "timeout", "timeout"), ("pd", "4", "ok", "ok")]


@in_virtual_time
async def test_who_waits_for_room_waits_no_longer_than_the_partition_is_its_own() -> None:
    """A full worker that loses it keeps what fills it, which is of another partition."""
    made = World(with_route("room", [rd.task(**QUEUED)]), {"joins_pending_max": 1})
    await made.start("one")
    await made.start("two", ())
    there = made.send("r", "/room").partition
    await asyncio.sleep(0.05)
    names = (f"s{number}" for number in range(100))
    sent = next(each for name in names if (each := made.send(name, "/room", correlation=name)).partition != there)
    await asyncio.sleep(0.05)
    waiting = made.processes["one"].handling
    await made.rebalance({there: "one", sent.partition: "two"})
    await asyncio.sleep(0.05)
    assert made.processes["one"].handling == waiting - 1
    await settled(made)


# --- tasks that Kafka does not take -----------------------------------------------------------------------------------


@in_virtual_time
async def test_a_pool_has_its_time_from_when_it_is_asked() -> None:
    """Learning of its topic takes longer than it may take: it is asked all the same."""
    made = await world("asked", [rd.task(**BRIEF)])
    made.log.slow_topics_s = 0.1
    made.send("r", "/asked")
    await asyncio.sleep(0.25)
    (task,) = made.tasks()
    made.answer(task)
    await settled(made)
    assert told(made) == [("pd", "6", "ok", "ok")]


@pytest.mark.parametrize("stands_in", [True, False])
def test_what_kafka_did_not_take_is_no_silence_of_a_pool(stands_in: bool) -> None:
    """The record says so, and what stands in is asked."""

    @in_virtual_time
    async def run() -> None:
        fallback = {"fallback": [{"version": "4"}]} if stands_in else {}
        made = await world("unsent", [rd.task(**BRIEF, **fallback)])
        made.processes["one"].arm(Fate.WRITTEN, Fate.LOST, Fate.LOST)
        made.send("r", "/unsent")
        await settled(made)
        assert made.tasks() == []
        failed = ("pd", "6", "error", UNACKNOWLEDGED)
        assert told(made) == ([failed, ("pd", "4", "ok", "ok")] if stands_in else [failed])
        if not stands_in:
            (error,) = made.reply()["errors"]
            said = "credit-pd 6 did not answer within its 80 ms, and Kafka has not acknowledged its task"
            assert error == {"code": "model_unavailable", "task": "pd", "message": said}

    run()


@in_virtual_time
async def test_what_is_not_acknowledged_is_sent_by_the_next_worker() -> None:
    """Though the entry was written meanwhile, for a redelivery that was acknowledged."""
    made = await world("resent", [rd.task(**QUEUED)], "one", "two")
    made.processes["one"].arm(Fate.WRITTEN, Fate.LOST)
    made.send("r", "/resent")
    await asyncio.sleep(0.01)
    await made.rebalance({0: "one", 1: "one"})
    await asyncio.sleep(0.01)
    assert made.tasks() == []
    await made.rebalance({0: "two", 1: "two"})
    await asyncio.sleep(0.1)
    (task,) = made.tasks()
    made.answer(task)
    await settled(made)
    assert told(made) == [("pd", "2", "ok", "ok")]


@in_virtual_time
async def test_a_stand_in_that_is_not_acknowledged_is_sent_by_the_next_worker() -> None:
    """Though the entry was written meanwhile, as a task beside it has ended."""
    tasks = [rd.task(**BRIEF, fallback=[{"version": "2"}]), rd.task(name="b", select={"version": "8"})]
    made = await world("beside", tasks, "one", "two")
    made.send("r", "/beside")
    await asyncio.sleep(0.06)
    made.processes["one"].arm(Fate.WRITTEN, Fate.LOST)
    await asyncio.sleep(0.03)
    made.answer(next(task for task in made.tasks() if task.row.task == "b"))
    await asyncio.sleep(0.02)
    assert [task.version for task in made.tasks() if task.row.task == "pd"] == ["6"]
    made.processes["one"].kill()
    await made.processes["one"].gone()
    await made.rebalance({0: "two", 1: "two"})
    await asyncio.sleep(0.1)
    made.answer(next(task for task in made.tasks() if task.version == "2"))
    await settled(made)
    assert made.reply()["status"] == "completed"


@in_virtual_time
async def test_what_kafka_takes_too_late_is_not_sent() -> None:
    """Its version has more time than the request, which is over."""
    made = await world("late", [rd.task(**INLINE), rd.task(name="b", **QUEUED)])
    made.send("r", "/late", headers=(("deadline-ms", str(made.clock.now_ms() + 345).encode()),))
    made.processes["one"].arm(*[Fate.LOST] * 3)
    await settled(made)
    assert made.tasks() == []
    assert told(made)[1] == ("b", "2", "timeout", UNACKNOWLEDGED)


@pytest.mark.parametrize("trouble", [[Fate.SLOW], [Fate.LOST] * 4])
def test_inline_tasks_do_not_wait_for_queued_ones(trouble: list[Fate]) -> None:
    """Kafka is slow, or refuses the task: the model beside it is called at once."""

    @in_virtual_time
    async def run() -> None:
        made = await world("beside", [rd.task(**INLINE), rd.task(name="b", **BRIEF, need="optional")])
        made.processes["one"].arm(*trouble)
        made.send("r", "/beside", amount=5.0)
        await asyncio.sleep(0.02)
        assert made.model.calls == [("r", "pd")]
        await settled(made)
        assert statuses(made.reply())["pd"] == "ok"
        assert made.reply()["latency_ms"] < 150

    run()
