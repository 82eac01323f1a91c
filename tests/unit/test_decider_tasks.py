"""Order among tasks, versions that stand in, quorums, reasons and shadows, in the decide engine and in virtual time."""

import asyncio
from typing import Any, cast

import orjson
import pytest
from prometheus_client import REGISTRY

from app.adapters.http_oip import HttpOipBackend
from app.agents.decider import CATCH_UP_MS
from app.domain.decisions import DecisionRecord, Kind
from app.domain.dispatch import TaskStatus
from app.domain.errors import Code, Problem
from app.domain.registry import Revision
from app.domain.rollout_stats import UNATTENDED
from tests.support import registry_documents as rd
from tests.support.decide_world import (
    AUDIT,
    TASKS,
    World,
    decision,
    documents,
    every_route,
    settled,
    statuses,
    with_route,
)
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


# --- ejected versions -------------------------------------------------------------------------------------------------


@in_virtual_time
@pytest.mark.parametrize("path", ["/inline", "/standby"])
async def test_what_no_version_can_be_asked_without_is_the_callers_to_send(path: str) -> None:
    """Whether something could stand in or not: the request is rejected."""
    made = await world()
    made.send("r", value=orjson.dumps({"path": path, "entities": {"applicant_id": 17}, "inputs": {}}))
    await settled(made)
    assert (made.reply()["status"], made.reply()["errors"][0]["code"]) == ("rejected", "feature_missing")


@in_virtual_time
async def test_an_ejected_version_gives_way_without_a_call() -> None:
    """Its fallback answers at once; the record says that it was ejected, and by which endpoints."""
    made = await world()
    made.model.ejected = {"1"}
    made.send("r", "/standby")
    await answered(made)
    await settled(made)
    pd, _ = decision(made).tasks
    assert (made.reply()["status"], pd.version) == ("completed", "2")
    assert made.model.calls == []
    (earlier,) = pd.earlier
    assert earlier.result is not None
    assert earlier.result.problem is not None
    assert (earlier.result.status, earlier.result.problem.code) == (TaskStatus.ERROR, Code.MODEL_EJECTED)
    assert [attempt.outcome for attempt in earlier.result.attempts] == ["ejected"]


@in_virtual_time
async def test_a_default_is_better_than_an_ejected_version() -> None:
    """All that could be called are ejected: the fixed answer serves, and the reply says why."""
    made = await world()
    made.model.ejected = {"1", "4"}
    made.send("r", "/fixed")
    await settled(made)
    reply = made.reply()
    assert (reply["status"], statuses(reply)) == ("partial", {"pd": "defaulted"})
    assert [error["code"] for error in reply["errors"]] == ["model_ejected"]
    assert made.model.calls == []


@in_virtual_time
async def test_an_ejected_version_is_called_where_nothing_else_is_left() -> None:
    """A try is better than a certain failure: for a task alone, and for the last that stands in."""
    made = await world()
    made.model.ejected = {"1", "4"}
    made.send("r", "/inline")
    made.send("s", "/repeated", correlation="s")
    await settled(made)
    assert made.reply()["status"] == "completed"
    assert made.reply("s")["outputs"]["pd"]["version"] == "4"
    assert made.model.calls == [("r", "pd"), ("s", "pd")]


# --- silence ----------------------------------------------------------------------------------------------------------


def fates() -> dict[str, float]:
    """Queued results so far, by fate."""
    names = ("joined", "late", "repeated", "unknown")
    return {name: REGISTRY.get_sample_value("broker_results_total", {"fate": name}) or 0.0 for name in names}


@in_virtual_time
async def test_a_silent_pool_is_given_up_after_its_policys_time() -> None:
    """Its fallback answers long before the deadline; the record tells when the pool was asked, and for how long."""
    made = await world()
    stored = made.send("r", "/silent")
    await settled(made)
    reply, (pd,) = made.reply(), decision(made).tasks
    assert (reply["status"], reply["errors"], reply["outputs"]["pd"]["version"]) == ("completed", [], "4")
    assert 80 <= reply["latency_ms"] < 120
    (earlier,) = pd.earlier
    assert earlier.result is not None
    assert (earlier.version, earlier.result.status) == ("6", TaskStatus.TIMEOUT)
    assert earlier.result.problem == Problem(Code.MODEL_TIMEOUT, "credit-pd 6 did not answer within its 80 ms", "pd")
    (attempt,) = earlier.result.attempts
    assert (attempt.endpoint, attempt.outcome, attempt.latency_ms) == (TASKS, "timeout", 80.0)
    assert 0 <= attempt.started_ms - stored.time_ms < 20
    # The pool was told the same.
    (asked,) = made.tasks()
    assert asked.row.deadline_ms == attempt.started_ms + 80


@pytest.mark.parametrize(
    ("path", "status", "tasks", "codes"),
    [
        ("/patient", "completed", {"pd": "ok", "b": "ok"}, []),
        ("/unheard", "partial", {"pd": "defaulted"}, ["model_timeout"]),
        ("/lonely", "failed", {"pd": "timeout"}, ["model_timeout"]),
        ("/follow", "partial", {"pd": "timeout", "b": "ok"}, ["model_timeout"]),
        ("/both", "failed", {"pd": "error", "b": "timeout"}, ["model_error", "model_timeout"]),
    ],
)
def test_silence_is_a_timeout_as_any_other(path: str, status: str, tasks: dict[str, str], codes: list[str]) -> None:
    """The next fallback, the default, or what `need` says; what came after the task goes on."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.send("r", path, amount=-1.0 if path == "/both" else 5.0)
        await settled(made)
        reply = made.reply()
        assert (reply["status"], statuses(reply)) == (status, tasks)
        assert [error["code"] for error in reply["errors"]] == codes
        assert reply["latency_ms"] < 250

    run()


@in_virtual_time
async def test_silence_after_silence() -> None:
    """What stands in for a silent pool may be one too: each has its own time."""
    made = await world()
    made.send("r", "/patient")
    await settled(made)
    pd, _ = decision(made).tasks
    assert [each.version for each in pd.earlier] == ["6", "7"]
    latencies = [each.result.latency_ms for each in pd.earlier if each.result is not None]
    assert latencies == [80.0, 60.0]
    assert pd.version == "4"


@in_virtual_time
async def test_an_answer_in_time_leaves_nothing_for_the_timer() -> None:
    """The pool answers within its time: no fallback, and one decision, whatever timers fire later."""
    made = await world()
    made.send("r", "/silent")
    await answered(made)
    await settled(made)
    (pd,) = decision(made).tasks
    assert (pd.version, pd.earlier) == ("6", ())
    assert made.model.calls == []
    assert len(made.replies()) == 1


@in_virtual_time
async def test_an_answer_after_the_silence_is_passed_over() -> None:
    """While its fallback runs it is `repeated`, and after the decision `late`; either way it changes nothing."""
    made, before = await world(), fates()
    made.send("r", "/silent", amount=100.0)
    await asyncio.sleep(0.13)
    (asked,) = made.tasks()
    made.answer(asked)
    await asyncio.sleep(0.02)
    assert made.replies() == []
    assert fates() == before | {"repeated": before["repeated"] + 1}
    await asyncio.sleep(0.5)
    made.answer(asked)
    await settled(made)
    assert fates()["late"] == before["late"] + 1
    (pd,) = decision(made).tasks
    assert (pd.version, [each.version for each in pd.earlier]) == ("4", ["6"])
    assert len(made.replies()) == 1


@in_virtual_time
async def test_a_silence_while_an_inline_task_runs() -> None:
    """The join need not be durable yet: the fallback runs beside the inline task."""
    made = await world()
    made.send("r", "/crossed", amount=300.0)
    await asyncio.sleep(0.2)
    assert made.entries("r") == []
    assert made.model.calls == [("r", "pd"), ("r", "b")]
    await settled(made)
    reply = made.reply()
    assert (reply["status"], reply["outputs"]["b"]["version"]) == ("completed", "4")
    assert 380 <= reply["latency_ms"] < 450


@pytest.mark.parametrize("answers", [True, False])
def test_a_silence_that_the_next_worker_finds(answers: bool) -> None:
    """What the pool answered while nobody listened is joined; only after that it counts as silent."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.send("r", "/silent")
        await asyncio.sleep(0.05)
        made.processes["one"].kill()
        await made.processes["one"].gone()
        await asyncio.sleep(0.5)
        if answers:
            made.answer(made.tasks()[0])
        await made.start("two")
        await asyncio.sleep(CATCH_UP_MS / 1000 - 0.05)
        assert len(made.replies()) == answers
        await asyncio.sleep(0.2)
        assert made.reply()["outputs"]["pd"]["version"] == ("6" if answers else "4")
        await settled(made)
        assert len(made.replies()) == 1

    run()


@in_virtual_time
async def test_the_next_worker_knows_when_a_pool_was_asked() -> None:
    """A version's time goes on across a takeover, and does not begin anew."""
    made = await world()
    made.send("r", "/remembered")
    await asyncio.sleep(0.9)
    made.processes["one"].kill()
    await made.processes["one"].gone()
    await made.start("two")
    await asyncio.sleep(2.0)
    assert made.replies() == []
    await asyncio.sleep(0.3)
    reply = made.reply()
    assert (reply["status"], reply["outputs"]["pd"]["version"]) == ("completed", "4")
    assert 3_000 <= reply["latency_ms"] < 3_100
    await settled(made)
    # Acknowledged before the takeover: nobody asked the pool again.
    assert len(made.tasks()) == 1


@in_virtual_time
async def test_a_fallback_that_a_worker_did_not_live_to_hear() -> None:
    """It dies while the fallback of a silent pool runs: the next one finds the pool silent too, and decides."""
    made = await world()
    made.send("r", "/silent", amount=200.0)
    await asyncio.sleep(0.15)
    assert made.model.calls == [("r", "pd")]
    made.processes["one"].kill()
    await made.processes["one"].gone()
    await made.start("two")
    await asyncio.sleep(3)
    await settled(made)
    (pd,) = decision(made).tasks
    assert (pd.version, [each.version for each in pd.earlier]) == ("4", ["6"])
    assert len(made.replies()) == 1


@in_virtual_time
async def test_a_silence_that_races_with_an_answer() -> None:
    """The answer comes while what stands in is prepared: it is taken, and nothing stands in."""
    made = await world()
    made.send("r", "/silent")
    await asyncio.sleep(0.05)
    made.processes["one"].kill()
    await made.processes["one"].gone()
    # The next worker has to fetch the features of what stands in.
    made.features.slow_s = 0.3
    await made.start("two")
    await asyncio.sleep(CATCH_UP_MS / 1000 + 0.1)
    made.answer(made.tasks()[0])
    await asyncio.sleep(0.1)
    assert made.reply()["outputs"]["pd"]["version"] == "6"
    await settled(made)
    (pd,) = decision(made).tasks
    assert (pd.version, pd.earlier) == ("6", ())
    assert made.model.calls == []


# --- features that do not come ----------------------------------------------------------------------------------------

STRICT: list[dict[str, Any]] = [
    {"ref": "inputs.amount", "type": "DOUBLE", "required": True},
    {"ref": "applicant.age", "required": True},
]


def strict(deadline: str) -> Revision:
    """Two routes: ``/strict`` cannot end well without the stored feature, ``/lenient`` can."""
    one = {"select": {"version": "1"}}
    late = {"name": "late", "select": {"version": "1"}, "need": "default", "default": {"probability": 0.5}}
    tasks = {"strict": [rd.task(**one)], "lenient": [rd.task(**late)]}
    return rd.revision(
        [
            rd.document("Model", "credit-pd", {"owner": "risk"}),
            rd.model_version("1", features=STRICT),
            *(each for each in documents() if each["kind"] == "FeatureView"),
            *(
                rd.route(
                    name, f"/{name}", deadline=deadline, rules=[{"name": "default", "tasks": tasks[name], "result": {}}]
                )
                for name in tasks
            ),
        ]
    )


@pytest.mark.parametrize(
    ("deadline", "silent", "path", "status", "code"),
    [
        ("20ms", True, "/strict", "expired", "deadline_exceeded"),
        ("20ms", True, "/lenient", "partial", "deadline_exceeded"),
        ("20ms", False, "/strict", "failed", "features_unavailable"),
        ("800ms", True, "/strict", "failed", "features_unavailable"),
        ("800ms", True, "/lenient", "partial", "features_unavailable"),
        ("3s", True, "/strict", "failed", "features_unavailable"),
        ("3s", True, "/lenient", "partial", "features_unavailable"),
    ],
)
def test_a_deadline_is_no_outage(deadline: str, silent: bool, path: str, status: str, code: str) -> None:
    """Features that the request left no time for expire it; a store that is away, or had its time, fails it."""

    @in_virtual_time
    async def run() -> None:
        made = World(strict(deadline))
        made.features.silent = silent
        made.features.available = silent
        await made.start("one")
        made.send("r", path)
        await settled(made)
        reply = made.reply()
        assert (reply["status"], [error["code"] for error in reply["errors"]]) == (status, [code])
        assert made.model.calls == []
        assert decision(made).tasks[0].features[-1].status == "ERROR"

    run()


def with_soft_feature() -> Revision:
    """One route, whose model has a default for its only stored feature."""
    features = [{"ref": "inputs.amount", "type": "DOUBLE", "required": True}, {"ref": "applicant.age", "default": 30}]
    tasks = [rd.task(select={"version": "1"})]
    return rd.revision(
        [
            rd.document("Model", "credit-pd", {"owner": "risk"}),
            rd.model_version("1", features=features),
            *(each for each in documents() if each["kind"] == "FeatureView"),
            rd.route("soft", "/soft", deadline="800ms", rules=[{"name": "default", "tasks": tasks, "result": {}}]),
        ]
    )


@in_virtual_time
async def test_a_silent_store_leaves_time_to_decide_with_defaults() -> None:
    """A quarter of the deadline at least: the model is asked, with the default in place of what did not come."""
    made = World(with_soft_feature())
    made.features.silent = True
    await made.start("one")
    made.send("r", "/soft")
    await settled(made)
    reply = made.reply()
    assert (reply["status"], reply["errors"]) == ("completed", [])
    assert len(made.model.calls) == 1
    assert 600 <= reply["latency_ms"] < 800
    (task,) = decision(made).tasks
    assert (task.features[-1].status, task.features[-1].value) == ("DEFAULTED", 30)


@in_virtual_time
async def test_what_hangs_leaves_time_for_what_stands_in() -> None:
    """Its policy has a second and the request 400 ms, of which three quarters are its own, and the rest the pool's."""
    made = await world()
    made.send("r", "/standby", amount=9_000.0)
    await asyncio.sleep(0.32)
    await answered(made, within_s=0.01)
    await settled(made)
    pd, _ = decision(made).tasks
    assert (made.reply()["status"], pd.version, made.reply()["latency_ms"] < 400) == ("completed", "2", True)
    (first,) = pd.earlier
    assert first.result is not None
    assert first.result.problem is not None
    assert (first.result.status, first.result.problem.code) == (TaskStatus.TIMEOUT, Code.MODEL_TIMEOUT)


@in_virtual_time
async def test_a_pool_that_is_silent_leaves_time_for_what_stands_in() -> None:
    """By the deadline, however long its policy would wait."""
    made = await world()
    made.send("r", "/standin")
    await settled(made)
    pd = decision(made).tasks[0]
    assert (made.reply()["status"], pd.version) == ("completed", "4")
    assert [each.version for each in pd.earlier] == ["2", "3"]


# --- calls that are cut off -------------------------------------------------------------------------------------------


def attempts(record: DecisionRecord) -> dict[str, list[tuple[str, float, str]]]:
    """Of each task that has a result: where to, how long and how it ended."""
    return {
        task.name: [(each.endpoint, each.latency_ms, each.outcome) for each in task.result.attempts]
        for task in record.tasks
        if task.result is not None
    }


@in_virtual_time
async def test_a_call_that_the_deadline_cuts_off_is_recorded() -> None:
    """However it comes that the backend does not tell of it: the model was asked, and this long nothing came."""
    made = await world()
    made.send("r", "/defaulted", amount=20_000.0)
    made.send("s", "/unserved", correlation="s")
    await settled(made)
    (record,) = (each for each in made.audits() if each.request_id == "r")
    (result,) = (task.result for task in record.tasks)
    assert result is not None
    assert attempts(record) == {"pd": [("http://127.0.0.1:9001", 420.0, "deadline")]}
    assert (result.status, result.latency_ms) == (TaskStatus.DEFAULTED, 420.0)


@in_virtual_time
async def test_a_call_that_was_not_made_is_not_recorded() -> None:
    """The deadline passed while features were fetched: the backend says so, and no model was asked."""
    made = World(REVISION, None)
    made.model = cast(Any, HttpOipBackend(made.clock))
    await made.start("one")
    (route,) = (each for each in REVISION.routes if each.name == "inline")
    made.features.slow_s = route.spec.deadline / 1_000 + 0.005
    made.send("r", "/inline")
    await settled(made)
    record = decision(made)
    assert attempts(record) == {"pd": []}
    (result,) = (task.result for task in record.tasks)
    assert result is not None
    assert result.problem is not None
    assert (result.status, result.problem.code) == (TaskStatus.TIMEOUT, Code.DEADLINE_EXCEEDED)


@in_virtual_time
async def test_a_pool_that_the_deadline_cuts_off_is_recorded() -> None:
    """Its policy would have waited longer."""
    made = await world()
    made.send("r", "/queued")
    await settled(made)
    (attempt,) = attempts(decision(made))["pd"]
    assert (attempt[0], attempt[2]) == ("inference.tasks.default", "deadline")
    assert 390 <= attempt[1] <= 400


@in_virtual_time
async def test_a_pool_that_did_not_call_its_model_has_made_no_call() -> None:
    """However long other tasks take after that."""
    made = await world()
    made.send("r", "/pair")
    await asyncio.sleep(0.05)
    first, second = made.tasks()
    late = Problem(Code.DEADLINE_EXCEEDED, "the deadline had passed before it was run")
    made.answer(first, problem=late, called=False)
    await asyncio.sleep(0.2)
    made.answer(second)
    await settled(made)
    assert attempts(decision(made))[first.row.task] == []


@pytest.mark.parametrize("away_s", [0.6, 10.0])
def test_nobody_listened_for_what_came_while_workers_changed(away_s: float) -> None:
    """The pool may have answered in time, and the record does not say that it was silent."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.send("r", "/queued")
        await asyncio.sleep(0.1)
        made.processes["one"].kill()
        made.answer(made.tasks()[0])
        await asyncio.sleep(away_s)
        await made.start("two")
        await settled(made)
        ((_, waited_ms, outcome),) = attempts(decision(made))["pd"]
        assert (waited_ms, outcome) == (100 + 1_000 * away_s, UNATTENDED)

    run()


@in_virtual_time
async def test_a_call_that_others_made_needless_is_recorded() -> None:
    """The rest of a quorum was asked too, and is skipped."""
    made = await world()
    made.send("r", "/quorum", amount=300.0)
    await asyncio.sleep(0.1)
    for task in made.tasks():
        made.answer(task)
    await settled(made)
    assert statuses(made.reply()) == {"pd": "skipped", "b": "ok", "c": "ok"}
    ((place, waited_ms, outcome),) = attempts(decision(made))["pd"]
    assert (place, outcome) == ("http://127.0.0.1:9001", "cancelled")
    assert 90 <= waited_ms < 300


@pytest.mark.parametrize("slow_topics_s", [0.0, 0.01])
@pytest.mark.parametrize("first", ["x", "pd"])
def test_what_an_answer_goes_on_with_is_not_begun_again(first: str, slow_topics_s: float) -> None:
    """Who takes a join over finds a failure to read while it begins: no task is sent or called again, in any order."""
    own = [{"ref": "inputs.amount", "type": "DOUBLE", "required": True}]
    tasks = [
        rd.task(name="x", after=["y"], select={"version": "5"}, fallback=[{"version": "1"}]),
        rd.task(name="y", select={"version": "8"}),
        rd.task(select={"version": "8"}, fallback=[{"version": "9"}]),
    ]
    tasks.sort(key=lambda task: task["name"] != first)
    race = rd.route("race", "/race", deadline="5s", rules=[{"name": "default", "result": {}, "tasks": tasks}])

    @in_virtual_time
    async def run() -> None:
        made = World(rd.revision([*documents(), rd.model_version("9", features=own), race]), None)
        await made.start("one")
        made.send("r", "/race", amount=200.0)
        await asyncio.sleep(0.1)
        sent = {task.row.task: task for task in made.tasks()}
        made.processes["one"].kill()
        made.features.slow_s = 0.002
        made.log.slow_topics_s = slow_topics_s
        made.answer(sent["y"])
        made.answer(sent["pd"], problem=Problem(Code.MODEL_ERROR, "no"))
        await made.start("two")
        await asyncio.sleep(3)
        await settled(made)
        assert sorted(made.model.calls) == [("r", "pd"), ("r", "x")]
        assert statuses(made.reply()) == {"x": "ok", "y": "ok", "pd": "ok"}
        assert len([task for task in made.tasks() if task.row.task == "pd"]) == 1

    run()


@in_virtual_time
async def test_each_silent_pool_is_given_up_in_its_time() -> None:
    """Also the one that has longer than another: what stands in for it is asked then."""
    tasks = [
        rd.task(select={"version": "8"}, fallback=[{"version": "4"}]),
        rd.task(name="y", select={"version": "2"}, need="optional"),
    ]
    made = World(with_route("pools", tasks), None)
    await made.start("one")
    made.send("r", "/pools")
    await asyncio.sleep(4)
    await settled(made)
    assert statuses(made.reply()) == {"pd": "ok", "y": "timeout"}
    assert 3_000 <= made.reply()["latency_ms"] < 3_500


@in_virtual_time
async def test_a_join_is_looked_at_about_once_a_silence() -> None:
    """However many pools are silent one after the other; also where one has answered, whose timer is set still."""
    waits = range(200, 2_400, 200)
    pools = [
        rd.model_version(f"1{wait}", backend={"type": "kafka", "pool": "default"}, policy={"timeout": f"{wait}ms"})
        for wait in waits
    ]
    tasks = [rd.task(name=f"t{wait}", select={"version": f"1{wait}"}, need="optional") for wait in waits]
    rules = [{"name": "default", "result": {}, "tasks": tasks}]
    made = World(rd.revision([*documents(), *pools, rd.route("long", "/long", deadline="30s", rules=rules)]), None)
    await made.start("one")
    decider = made.processes["one"].decider
    look, looks = decider._look, []

    async def counted(live: Any) -> None:
        looks.append(live)
        await look(live)

    decider._look = counted  # type: ignore[method-assign]
    made.send("r", "/long")
    await asyncio.sleep(0.1)
    made.answer(next(task for task in made.tasks() if task.row.task == "t200"))
    await asyncio.sleep(3)
    await settled(made)
    assert made.reply()["status"] == "partial"
    assert len(looks) < 3 * len(waits)


@in_virtual_time
async def test_what_a_silence_has_set_free_survives_a_death() -> None:
    """An inline version stands in for a pool; another's answer is acknowledged, and then the worker dies."""
    tasks = [
        rd.task(select={"version": "6"}, fallback=[{"version": "4"}]),
        rd.task(name="y", select={"version": "8"}),
    ]
    made = World(with_route("death", tasks), None)
    await made.start("one")
    made.send("r", "/death", amount=1_000.0)
    await asyncio.sleep(0.3)
    made.answer(next(task for task in made.tasks() if task.row.task == "y"))
    await asyncio.sleep(0.1)
    assert made.model.calls == [("r", "pd")]
    made.processes["one"].kill()
    await made.start("two")
    await asyncio.sleep(2)
    await settled(made)
    assert statuses(made.reply()) == {"pd": "ok", "y": "ok"}
    assert made.reply()["latency_ms"] < 2_000


@in_virtual_time
async def test_a_queued_task_that_a_silence_has_set_free_survives_a_death() -> None:
    """The worker dies before it has sent it, and another answer is acknowledged by then: who takes over sends it."""
    tasks = [
        rd.task(name="a", select={"version": "6"}, need="optional"),
        rd.task(name="s", after=["a"], when="true", select={"version": "8"}),
        rd.task(name="y", select={"version": "8"}),
        rd.task(name="w", select={"version": "8"}),
    ]
    made = World(with_route("freed", tasks), None)
    await made.start("one")
    made.send("r", "/freed")
    await asyncio.sleep(0.05)
    made.log.slow_topics_s = 0.5
    await asyncio.sleep(0.1)
    made.answer(next(task for task in made.tasks() if task.row.task == "y"))
    await asyncio.sleep(0.1)
    made.processes["one"].kill()
    made.log.slow_topics_s = 0.0
    await made.start("two")
    await asyncio.sleep(0.1)
    for task in made.tasks():
        if task.row.task in ("s", "w"):
            made.answer(task)
    await asyncio.sleep(1)
    await settled(made)
    assert statuses(made.reply()) == {"a": "timeout", "s": "ok", "y": "ok", "w": "ok"}


@pytest.mark.parametrize(
    ("join", "status"), [({"policy": "first"}, "completed"), ({"policy": "quorum", "n": 2}, "failed")]
)
def test_what_is_decided_before_it_begins_calls_no_model(join: dict[str, Any], status: str) -> None:
    """A version has expired: its fixed answer is the first one, or without it there are not enough."""
    fixed = {"fallback": [{"default": {"probability": 0.5}}]} if status == "completed" else {}
    tasks = [rd.task(select={"version": "5"}, **fixed), rd.task(name="b", select={"version": "1"})]

    @in_virtual_time
    async def run() -> None:
        made = World(with_route("decided", tasks, join=join), None)
        await made.start("one")
        made.send("r", "/decided", amount=1_000.0)
        await settled(made)
        assert made.model.calls == []
        assert made.reply()["status"] == status
        assert made.reply()["latency_ms"] < 100

    run()


@in_virtual_time
async def test_what_is_decided_before_it_begins_waits_for_no_place() -> None:
    """Its pool is not asked, and no other join is in its way."""
    tasks = [rd.task(name="b", select={"version": "2"}), rd.task(select={"version": "5"})]
    made = World(with_route("decided", tasks, join={"policy": "quorum", "n": 2}), {"joins_pending_max": 1})
    await made.start("one")
    made.send("there", "/queued", correlation="there")
    await asyncio.sleep(0.05)
    made.send("r", "/decided")
    await settled(made)
    assert [task.row.request_id for task in made.tasks()] == ["there"]
    assert made.reply()["status"] == "failed"
    assert made.reply()["latency_ms"] < 100


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
async def test_without_a_result_nothing_flips() -> None:
    """A rule without result has nothing to hold the shadow's against, however far the two scores lie apart."""
    made = await world()
    made.send("r", "/mute")
    await settled(made)
    _, shadow = made.audits()
    evidence = orjson.loads(shadow.evidence or b"")
    assert evidence["outputs"]["champion"] != evidence["outputs"]["shadow"]
    assert evidence["flipped"] is None


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
    assert 3 <= kinds.count(Kind.SHADOW) < 10


@in_virtual_time
async def test_a_shadow_that_hangs_leaves_others_room() -> None:
    """Of two that are shadows one has two thirds of the slots at most."""
    made = await world()
    for number in range(4):
        made.send(f"p{number}", "/pooled", correlation=f"p{number}")
    await asyncio.sleep(0.05)
    for number in range(2):
        made.send(f"s{number}", "/shadowed", correlation=f"s{number}")
    await settled(made)
    shadows = [each.tasks[0].version for each in made.audits() if each.kind is Kind.SHADOW]
    assert sorted(shadows) == ["2", "2", "2", "4"]


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
