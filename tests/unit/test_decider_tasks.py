"""Order among tasks, versions that stand in, quorums, reasons and shadows, in the decide engine and in virtual time."""

import asyncio
from typing import Any

import orjson
import pytest

from app.domain.decisions import DecisionRecord, Kind
from app.domain.errors import Code, Problem
from tests.support.decide_world import AUDIT, World, every_route
from tests.support.memory_log import Fate
from tests.support.virtual_time import in_virtual_time

REVISION = every_route()


async def world(settings: dict[str, Any] | None = None) -> World:
    """A world with one worker that owns everything."""
    made = World(REVISION, settings)
    await made.start("one")
    return made


async def answered(made: World, *, failed: bool = False, within_s: float = 0.05) -> None:
    """A pool answers what was sent so far, each task once."""
    await asyncio.sleep(within_s)
    seen = set()
    for task in made.tasks():
        if (task.row.task, task.version) not in seen:
            seen.add((task.row.task, task.version))
            made.answer(task, problem=Problem(Code.MODEL_ERROR, "no") if failed else None)
    await asyncio.sleep(within_s)


async def settled(made: World) -> None:
    """Let everything come to its end; nothing may have gone wrong."""
    await asyncio.sleep(2)
    await made.close()
    assert not made.faults


def decision(made: World) -> DecisionRecord:
    """The record of the one decision."""
    (record,) = (each for each in made.audits() if each.kind is Kind.DECISION)
    return record


def statuses(reply: dict[str, Any]) -> dict[str, str]:
    """Each task's status in a reply."""
    return {name: output["status"] for name, output in reply["outputs"].items()}


# --- versions that stand in -------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_pool_stands_in_for_an_inline_version() -> None:
    """The reply names who answered; the record keeps who failed, with its inputs and attempts."""
    made = await world()
    made.send("r", "/standby", amount=-1.0)
    await answered(made)
    await settled(made)
    reply, (pd, _) = made.reply(), decision(made).tasks
    assert (reply["status"], reply["errors"]) == ("completed", [])
    assert reply["outputs"]["pd"]["version"] == "2"
    assert (pd.version, pd.selected_by) == ("2", "fallback version 2")
    (earlier,) = pd.earlier
    assert (earlier.version, earlier.selected_by) == ("1", "version")
    assert earlier.result is not None
    assert earlier.result.problem is not None
    assert earlier.result.problem.code is Code.MODEL_ERROR
    assert earlier.result.attempts
    assert earlier.features


@in_virtual_time
async def test_an_inline_version_stands_in_for_a_pool() -> None:
    """One without a topic is passed over; late words of the pool that failed change nothing."""
    made = await world()
    made.send("r", "/standin")
    await answered(made, failed=True)
    await answered(made)
    await settled(made)
    (pd,) = decision(made).tasks
    assert made.reply()["outputs"]["pd"]["version"] == "4"
    assert [each.version for each in pd.earlier] == ["2", "3"]
    assert len(made.replies()) == 1


@in_virtual_time
async def test_who_stands_in_is_known_to_the_next_worker() -> None:
    """A worker dies after it went over to the pool: the next one joins the pool's answer."""
    made = await world()
    made.send("r", "/standby", amount=-1.0)
    await asyncio.sleep(0.05)
    made.processes["one"].kill()
    await made.processes["one"].gone()
    await made.start("two")
    await answered(made)
    await settled(made)
    assert made.reply()["outputs"]["pd"]["version"] == "2"
    assert [each.version for each in decision(made).tasks[0].earlier] == ["1"]


@in_virtual_time
async def test_a_fixed_answer_is_the_last_resort() -> None:
    """After all versions have failed: defaulted, and the reply is partial and says why."""
    made = await world()
    made.send("r", "/fixed", amount=-1.0)
    await settled(made)
    reply = made.reply()
    assert (reply["status"], statuses(reply)) == ("partial", {"pd": "defaulted"})
    assert reply["result"] == {"probability": 0.5}
    assert [error["code"] for error in reply["errors"]] == ["model_error"]


@in_virtual_time
async def test_an_expired_version_gives_way_or_rejects() -> None:
    """onUnavailable: next takes the fallback and records why; reject turns the request away."""
    made = await world()
    made.send("r", "/expired")
    made.send("s", "/withdrawn", correlation="s")
    await settled(made)
    assert made.reply()["outputs"]["pd"]["version"] == "1"
    (record,) = (each for each in made.audits() if each.request_id == "r")
    result = record.tasks[0].earlier[0].result
    assert result is not None
    assert result.problem is not None
    assert result.problem.code is Code.VERSION_EXPIRED
    rejected = made.reply("s")
    assert (rejected["status"], rejected["errors"][0]["code"]) == ("rejected", "version_expired")
    assert "2025-01-01" in rejected["errors"][0]["message"]


def reasons(made: World, request_id: str = "r") -> dict[str, str]:
    """Why tasks of a request were skipped, as its record says."""
    (record,) = (each for each in made.audits() if each.request_id == request_id and each.kind == "decision")
    results = (task.result for task in record.tasks)
    return {result.task: result.reason for result in results if result is not None and result.reason is not None}


# --- quorums ----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_quorum_waits_for_no_more_than_it_needs() -> None:
    """Two of three: the third is skipped without an error."""
    made = await world()
    made.send("r", "/quorum")
    await asyncio.sleep(0.05)
    made.answer(next(task for task in made.tasks() if task.row.task == "c"))
    await settled(made)
    reply = made.reply()
    assert (reply["status"], reply["errors"]) == ("completed", [])
    assert statuses(reply) == {"pd": "ok", "b": "skipped", "c": "ok"}
    assert reasons(made) == {"b": "2 of 3 answers were enough"}
    assert reply["latency_ms"] < 100


@in_virtual_time
async def test_a_quorum_that_cannot_be_reached_fails_at_once() -> None:
    """Two of three fail: nobody waits for the third."""
    made = await world()
    made.send("r", "/quorum", amount=-1.0)
    await asyncio.sleep(0.05)
    made.answer(next(task for task in made.tasks() if task.row.task == "b"), problem=Problem(Code.MODEL_ERROR, "no"))
    await settled(made)
    reply = made.reply()
    assert reply["status"] == "failed"
    assert reply["errors"][-1] == {
        "code": "quorum_missed",
        "message": "2 of 3 tasks must answer, and 0 did",
    }
    assert reply["latency_ms"] < 100


@pytest.mark.parametrize(("amount", "first"), [(5.0, "pd"), (20_000.0, "b"), (-1.0, "b")])
def test_the_first_answer_decides(amount: float, first: str) -> None:
    """A model that is slow is given up, one that fails is passed over."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.send("r", "/first", amount=amount)
        if first == "b":
            await answered(made)
        await settled(made)
        reply = made.reply()
        assert reply["status"] == "completed"
        assert [name for name, output in reply["outputs"].items() if output["status"] == "ok"] == [first]

    run()


# --- order ------------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_tasks_follow_one_another_across_backends() -> None:
    """A pool's answer sets an inline task free, that one the next pool task; a repeated answer sets free nothing."""
    made = await world()
    made.send("r", "/chain")
    await answered(made)
    assert [task.row.task for task in made.tasks()] == ["pd", "c"]
    await answered(made)
    await settled(made)
    assert statuses(made.reply()) == {"pd": "ok", "b": "ok", "c": "ok"}
    assert made.model.calls == [("r", "b")]
    assert {task.row.task for task in made.tasks()} == {"pd", "c"}


@in_virtual_time
async def test_what_an_answer_sets_free_survives_a_death() -> None:
    """The worker dies while it runs what an answer set free: the next one gets the answer again, and runs it."""
    made = await world()
    made.send("r", "/chain", amount=100.0)
    await asyncio.sleep(0.02)
    made.answer(made.tasks()[0])
    await asyncio.sleep(0.02)
    assert made.model.calls == [("r", "b")]
    made.processes["one"].kill()
    await made.processes["one"].gone()
    await made.start("two")
    await asyncio.sleep(0.2)
    for task in made.tasks():
        made.answer(task)
    await settled(made)
    assert made.reply()["status"] == "completed"
    assert made.model.calls == [("r", "b"), ("r", "b")]


@in_virtual_time
async def test_an_expensive_model_runs_only_in_doubt() -> None:
    """Its condition on an earlier output holds: it runs. It does not: it is skipped, and that is no shortcoming."""
    made = await world()
    made.send("r", "/doubtful", correlation="doubtful")
    made.send("s", "/sure", correlation="sure")
    await answered(made)
    await settled(made)
    doubtful, sure = made.reply("doubtful"), made.reply("sure")
    assert statuses(doubtful) == {"pd": "ok", "b": "ok"}
    assert doubtful["result"]["probability"] == doubtful["outputs"]["b"]["output"]["probability"]
    assert (sure["status"], statuses(sure), sure["errors"]) == ("completed", {"pd": "ok", "b": "skipped"}, [])
    assert [task.row.request_id for task in made.tasks()] == ["r"]
    assert reasons(made, "s")["b"].startswith("its when is false: outputs.pd.probability")


@in_virtual_time
async def test_a_task_after_one_that_failed() -> None:
    """It has nothing to follow, is not run, and says so."""
    made = await world()
    made.send("r", "/follower", amount=-1.0)
    await settled(made)
    reply = made.reply()
    assert statuses(reply) == {"pd": "error", "b": "skipped"}
    assert [error["code"] for error in reply["errors"]] == ["model_error", "predecessor_failed"]
    assert made.model.calls == [("r", "pd")]


# --- reasons, shadows -------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_reasons_are_told_with_the_result() -> None:
    """The codes that hold, in the rule's order, in the reply and so in the record."""
    made = await world()
    made.send("r", "/reasoned")
    await settled(made)
    assert made.reply()["reasons"] == ["HIGH", "ALWAYS"]
    assert orjson.loads(decision(made).reply or b"")["reasons"] == ["HIGH", "ALWAYS"]


@in_virtual_time
async def test_a_shadow_is_recorded_after_the_reply() -> None:
    """Its record names its decision, holds its answer, and compares the results; the reply knows nothing of it."""
    made = await world()
    made.send("r", "/shadowed")
    await settled(made)
    decided, shadow = made.audits()
    assert (decided.kind, shadow.kind) == (Kind.DECISION, Kind.SHADOW)
    assert shadow.decision == decided.execution_id
    assert shadow.execution_id != decided.execution_id
    assert shadow.request_id == decided.request_id
    assert [task.version for task in shadow.tasks] == ["4"]
    evidence = orjson.loads(shadow.evidence or b"")
    assert evidence["champion"] == "1"
    assert evidence["shadow"] == "4"
    assert evidence["result"] == {"champion": {"high": True}, "shadow": {"high": False}}
    assert (evidence["flipped"], evidence["segment"]) == (True, "small")
    assert made.log.records(AUDIT)[1].order > made.replies()[0].order
    assert set(made.reply()["outputs"]) == {"pd"}


@in_virtual_time
async def test_a_shadow_that_fails_is_a_record_too() -> None:
    """What it would have said is unknown, and so is whether that would have changed anything."""
    made = await world()
    made.send("r", "/shadowed", amount=-1.0)
    await settled(made)
    _, shadow = made.audits()
    evidence = orjson.loads(shadow.evidence or b"")
    assert evidence["result"]["shadow"] is None
    assert evidence["flipped"] is None
    assert [problem.code for problem in shadow.problems] == [Code.MODEL_ERROR]


@pytest.mark.parametrize("answers", [True, False])
def test_a_pool_can_be_a_shadow(answers: bool) -> None:
    """Its answer is compared; silence past its policy's time is a record too. Neither is joined."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.send("r", "/pooled")
        await asyncio.sleep(0.05)
        (asked,) = made.tasks()
        assert made.reply()["status"] == "completed"
        if answers:
            made.answer(asked)
            made.answer(asked)
        await settled(made)
        _, shadow = made.audits()
        evidence = orjson.loads(shadow.evidence or b"")
        assert evidence["task"] == "pd"
        assert (evidence["outputs"]["shadow"] is not None) is answers
        assert [problem.code for problem in shadow.problems] == ([] if answers else [Code.MODEL_TIMEOUT])
        assert len(made.replies()) == 1

    run()


@in_virtual_time
async def test_shadows_are_shed_first() -> None:
    """More than there are slots: decisions go on, their replies wait for nothing, and what is shed has no record."""
    made = await world()
    for number in range(10):
        made.send(f"r{number}", "/shadowed", amount=50.0, correlation=f"c{number}")
    await settled(made)
    assert [made.reply(f"c{number}")["status"] for number in range(10)] == ["completed"] * 10
    kinds = [record.kind for record in made.audits()]
    assert kinds.count(Kind.DECISION) == 10
    assert 4 <= kinds.count(Kind.SHADOW) < 10


@in_virtual_time
async def test_a_shadow_that_cannot_be_recorded_harms_nobody() -> None:
    """Kafka gives up on its record; the worker goes on."""
    made = await world()
    made.send("r", "/shadowed")
    made.processes["one"].arm(Fate.WRITTEN, Fate.WRITTEN, Fate.WRITTEN, Fate.LOST)
    await asyncio.sleep(1)
    made.send("s", "/inline", correlation="s")
    await settled(made)
    assert made.reply("s")["status"] == "completed"


@in_virtual_time
async def test_what_was_not_asked_has_no_shadow() -> None:
    """A task that its condition skips is skipped by its shadow too."""
    made = await world()
    made.send("r", "/unasked")
    await settled(made)
    assert statuses(made.reply()) == {"pd": "ok", "b": "skipped"}
    assert [record.kind for record in made.audits()] == [Kind.DECISION]
    assert made.model.calls == [("r", "pd")]


@in_virtual_time
async def test_nothing_stands_in_for_itself() -> None:
    """Fallbacks that would ask the same version again are passed over."""
    made = await world()
    made.send("r", "/repeated", amount=-1.0)
    await settled(made)
    (pd,) = decision(made).tasks
    assert [each.version for each in pd.earlier] == ["1"]
    assert pd.version == "4"
    assert len(made.model.calls) == 2


@in_virtual_time
async def test_a_quorum_outlives_a_version() -> None:
    """Where two of three are enough, one that has expired does not reject the request."""
    made = await world()
    made.send("r", "/ageing")
    await settled(made)
    reply = made.reply()
    assert (reply["status"], statuses(reply)) == ("completed", {"pd": "error", "b": "ok", "c": "ok"})
    assert [error["code"] for error in reply["errors"]] == ["version_expired"]


@in_virtual_time
async def test_a_result_is_a_number_or_none() -> None:
    """Infinity would be written as null: the decision has failed instead, and says so."""
    made = await world()
    made.send("r", "/undefined")
    await settled(made)
    reply = made.reply()
    assert (reply["status"], reply["result"]) == ("failed", {})
    assert reply["errors"][0]["code"] == "result_failed"
