"""What becomes of a join while its partition moves, its pool is silent, or Kafka does not take its tasks."""

import asyncio
from typing import Any

import pytest

from app.domain.errors import Code, Problem
from app.domain.rollout_stats import UNATTENDED, UNSENT
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
        failed = ("pd", "6", "error", UNSENT)
        assert told(made) == ([failed, ("pd", "4", "ok", "ok")] if stands_in else [failed])
        if not stands_in:
            (error,) = made.reply()["errors"]
            said = "credit-pd 6 could not be asked within its 80 ms: Kafka did not acknowledge its task"
            assert error == {"code": "model_unavailable", "task": "pd", "message": said}

    run()


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
