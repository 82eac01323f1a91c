"""Decisions that a feature's contract leaves to a person: what still runs, what callers and auditors are told."""

import asyncio
from typing import Any

import orjson
import pytest

from app.domain.decisions import Kind
from app.domain.errors import Code, Problem
from app.domain.explanation import explain
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, refers
from app.domain.registry import Revision
from tests.support.decide_world import World, decision
from tests.support.registry_documents import document, model_version, request, revision, route, task
from tests.support.virtual_time import in_virtual_time

AMOUNT: dict[str, Any] = {"ref": "inputs.amount", "type": "DOUBLE", "required": True}
REFERS = {"ref": "applicant.age", "required": True, "onViolation": "refer", "maxAge": "1d"}
POOL = {"type": "kafka", "pool": "default"}
RESULT = {"high": "outputs.pd.probability > 0.4"}
MAYBE = {"high": "has(outputs.pd) && outputs.pd.probability > 0.4"}
REFERRED = {"high": "a person says"}
APPLICANT = EntityKey("credit", ("applicant_id",), (17,), ("INT64",))
UNTIL: dict[str, Any] = {"governance": {"approvedBy": "model-risk"}}


def a(version: str, name: str = "pd", **changes: Any) -> dict[str, Any]:
    """A task that selects one version."""
    return task(name=name, select={"version": version}, **changes)


def rule(*tasks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A rule whose result needs task ``pd``."""
    return {"name": "default", "tasks": list(tasks), "result": RESULT, "referResult": REFERRED} | changes


RULES: dict[str, dict[str, Any]] = {
    "alone": rule(a("1"), reasons=[{"code": "HIGH", "when": "result.high"}]),
    "bare": {"name": "default", "tasks": [a("1")], "result": RESULT},
    "beside": rule(a("1"), a("4", "b", shadow=[{"version": "5"}]), a("2", "pool")),
    "standby": rule(a("1", fallback=[{"version": "4"}])),
    "standbys": rule(a("1", fallback=[{"version": "1b"}, {"version": "4"}])),
    "fixed": rule(a("1", fallback=[{"default": {"probability": 0.5}}])),
    "optional": rule(a("1", need="optional"), a("4", "b"), result=MAYBE),
    "default": rule(a("1", need="default", default={"probability": 0.5})),
    "after": rule(
        a("1"),
        a("4", "next", after=["pd"]),
        a("4", "last", after=["next"]),
        a("4", "asks", after=["pd"], when="outputs.pd.probability > 0.1"),
        a("4", "else", after=["pd"], when="!has(outputs.pd)"),
    ),
    "enough": rule(a("4"), a("1", "b"), a("4", "c"), join={"policy": "quorum", "n": 2}, result=MAYBE),
    "short": rule(a("1"), a("4", "b"), join={"policy": "quorum", "n": 2}, result=MAYBE),
    "hopeless": rule(a("1"), a("4", "b"), a("4", "c"), join={"policy": "quorum", "n": 3}, result=MAYBE),
    "first": rule(a("1"), a("4", "b"), join={"policy": "first"}, result={}, referResult={}),
    "shadow": rule(a("4", shadow=[{"version": "1"}])),
    "both": rule(a("6")),
}


def registry() -> Revision:
    """Version 1 and its like refer without an age; 4 and 5 need none; 6 rejects besides."""
    return revision(
        [
            document("Model", "credit-pd", {"owner": "risk"}),
            model_version("1", features=[AMOUNT, REFERS], **UNTIL),
            model_version("1b", features=[AMOUNT, REFERS], **UNTIL),
            model_version("2", features=[AMOUNT], backend=POOL, **UNTIL),
            model_version("4", features=[AMOUNT], **UNTIL),
            model_version("5", features=[AMOUNT], **UNTIL),
            model_version("6", features=[REFERS, {"ref": "inputs.term", "required": True}, AMOUNT], **UNTIL),
            document(
                "FeatureView",
                "applicant",
                {
                    "entities": [{"name": "applicant_id", "type": "INT64"}],
                    "features": [{"name": "age", "type": "INT64"}],
                    "source": {"type": "redis", "project": "credit"},
                },
            ),
            *(route(name, f"/{name}", deadline="400ms", rules=[each]) for name, each in RULES.items()),
        ]
    )


REVISION = registry()


async def asked(name: str, amount: float = 5.0, **settings: Any) -> World:
    """The world after a request for a route, and what its tasks need to end."""
    made = World(REVISION, settings)
    await made.start("one")
    made.send("r", f"/{name}", amount=amount)
    await asyncio.sleep(0.05)
    for each in made.tasks():
        made.answer(each)
    await asyncio.sleep(2)
    await made.close()
    assert not made.faults
    return made


def told(made: World) -> tuple[str, dict[str, str], dict[str, Any], list[tuple[str, str | None]]]:
    """The reply's status, tasks' statuses, result and errors."""
    reply = made.reply()
    tasks = {name: output["status"] for name, output in reply["outputs"].items()}
    return reply["status"], tasks, reply["result"], [(each["code"], each.get("task")) for each in reply["errors"]]


WHY = [("feature_missing", "pd"), ("referred", "pd")]


@in_virtual_time
async def test_a_person_decides() -> None:
    """The task is not run, the rule's fixed result stands in, reasons are none; the error names feature and cause."""
    made = await asked("alone")
    assert told(made) == ("partial", {"pd": "skipped"}, REFERRED, WHY)
    assert made.reply()["reasons"] == []
    error = made.reply()["errors"][1]
    assert error["feature"] == "applicant.age"
    assert "required feature applicant.age is missing" in error["message"]
    record = decision(made)
    assert [str(problem.code) for problem in record.problems] == ["feature_missing", "referred"]
    assert [str(each.status) for each in record.tasks[0].features] == ["PRESENT", "MISSING"]
    assert not made.model.calls


@in_virtual_time
async def test_without_a_fixed_result_there_is_none() -> None:
    """The expressions of the result are not evaluated without what they need."""
    assert told(await asked("bare")) == ("partial", {"pd": "skipped"}, {}, WHY)


@pytest.mark.parametrize("age_days", [0, 2])
@in_virtual_time
async def test_what_is_there_and_fresh_is_decided_as_ever(age_days: int) -> None:
    """A value within its maxAge serves; one beyond it is a violation like any other."""
    made = World(REVISION)
    made.clock.start_ms = 1_790_000_000_000
    time_ms = made.clock.start_ms - age_days * 86_400_000
    await made.features.write([FeatureRow("applicant", APPLICANT, ("age",), (30,), ("INT64",), time_ms)])
    await made.start("one")
    made.send("r", "/alone")
    await asyncio.sleep(2)
    await made.close()
    stale: tuple[Any, ...] = ("partial", {"pd": "skipped"}, REFERRED, [("feature_stale", "pd"), ("referred", "pd")])
    assert told(made) == (stale if age_days else ("completed", {"pd": "ok"}, {"high": True}, []))


@in_virtual_time
async def test_the_other_tasks_help_that_person() -> None:
    """Inline, in a pool; a shadow beside one of them has no result to be held against."""
    made = await asked("beside")
    status, tasks, result, _ = told(made)
    assert (status, tasks, result) == ("partial", {"pd": "skipped", "b": "ok", "pool": "ok"}, REFERRED)
    (shadow,) = (each for each in made.audits() if each.kind is Kind.SHADOW)
    evidence = orjson.loads(shadow.evidence or b"")
    assert (evidence["flipped"], evidence["result"]) == (None, {"champion": None, "shadow": None})
    assert evidence["outputs"]["shadow"] is not None


@in_virtual_time
async def test_the_next_worker_knows_of_the_referral() -> None:
    """A pool answers after another worker took over: the same end."""
    made = World(REVISION)
    await made.start("one")
    made.send("r", "/beside")
    await asyncio.sleep(0.05)
    made.processes["one"].kill()
    await made.processes["one"].gone()
    await made.start("two")
    for each in made.tasks()[:1]:
        made.answer(each)
    await asyncio.sleep(2)
    await made.close()
    assert not made.faults
    assert told(made)[0] == "partial"
    assert told(made)[2:] == (REFERRED, WHY)


@in_virtual_time
async def test_a_version_with_a_sound_contract_serves_first() -> None:
    """The fallback decides; where it refers too the next one does; where it fails, the person is asked after all."""
    made = await asked("standby")
    assert told(made) == ("completed", {"pd": "ok"}, {"high": True}, [])
    assert decision(made).tasks[0].earlier[0].version == "1"
    assert told(await asked("standbys"))[0] == "completed"
    assert told(await asked("standby", amount=-1.0)) == (
        "partial",
        {"pd": "error"},
        REFERRED,
        [("model_error", "pd"), ("referred", "pd")],
    )


@pytest.mark.parametrize("name", ["fixed", "default"])
@in_virtual_time
async def test_a_fixed_answer_is_not_a_person(name: str) -> None:
    """It stands for a model that failed; here the model was not even asked."""
    assert told(await asked(name)) == ("partial", {"pd": "skipped"}, REFERRED, WHY)


@in_virtual_time
async def test_an_optional_task_refers_too() -> None:
    """Whoever wants to do without it says onViolation: default."""
    assert told(await asked("optional")) == ("partial", {"pd": "skipped", "b": "ok"}, REFERRED, WHY)


@in_virtual_time
async def test_what_needs_the_referred_output_is_skipped() -> None:
    """Without an error of its own; what does not look at it runs."""
    skipped = {"pd": "skipped", "next": "skipped", "last": "skipped", "asks": "skipped", "else": "ok"}
    assert told(await asked("after")) == ("partial", skipped, REFERRED, WHY)


@in_virtual_time
async def test_a_failure_is_a_failure_all_the_same() -> None:
    """Another required task's error outranks the referral; the same request may succeed later."""
    status, tasks, result, errors = told(await asked("beside", amount=-1.0))
    assert (status, tasks["b"], result) == ("failed", "error", {})
    assert ("referred", "pd") not in errors


@in_virtual_time
async def test_enough_answers_need_no_person() -> None:
    """A quorum that is reached decides; one that only lacks the referred ones refers; one beyond reach has failed."""
    assert told(await asked("enough"))[:3] == ("completed", {"pd": "ok", "b": "skipped", "c": "ok"}, {"high": True})
    assert told(await asked("short")) == ("partial", {"pd": "skipped", "b": "ok"}, REFERRED, WHY)
    assert told(await asked("first"))[0] == "completed"
    assert told(await asked("hopeless"))[0] == "partial"
    assert told(await asked("hopeless", amount=-1.0))[0] == "failed"


@in_virtual_time
async def test_a_shadow_that_would_refer_is_no_matter_of_the_decision() -> None:
    """It is recorded as not run, with the reason."""
    made = await asked("shadow")
    assert told(made) == ("completed", {"pd": "ok"}, {"high": True}, [])
    (shadow,) = (each for each in made.audits() if each.kind is Kind.SHADOW)
    assert [str(problem.code) for problem in shadow.problems] == ["feature_missing"]


@in_virtual_time
async def test_what_is_rejected_is_not_referred() -> None:
    """A version of which one contract rejects and another refers rejects."""
    assert told(await asked("both"))[0] == "rejected"


@in_virtual_time
async def test_a_store_that_is_away_refers_too() -> None:
    """An error is a violation: the person sees that it was ours."""
    made = World(REVISION)
    made.features.available = False
    await made.start("one")
    made.send("r", "/alone")
    await asyncio.sleep(2)
    await made.close()
    assert told(made) == (
        "partial",
        {"pd": "skipped"},
        REFERRED,
        [("features_unavailable", "pd"), ("referred", "pd")],
    )


def test_explain_tells_what_a_violation_does() -> None:
    """Beside what the contract requires."""
    explained = explain(REVISION, request("/alone", inputs={"amount": 1.0}, entities={"applicant_id": 17}), 0)
    features = explained.tasks[0].versions[0].features
    assert [(each.ref, each.contract, each.source) for each in features] == [
        ("inputs.amount", "required", "request"),
        ("applicant.age", "required, onViolation refer", "redis"),
    ]


def test_a_problem_of_no_contract_refers_nothing() -> None:
    """Only what a contract says of its own feature counts."""
    contracts = REVISION.versions["credit-pd", "1"].features
    assert refers(contracts, Problem(Code.FEATURE_STALE, "old", "pd", "applicant.age"))
    assert not refers(contracts, Problem(Code.FEATURE_MISSING, "gone", "pd", "inputs.amount"))
    assert not refers(contracts, Problem(Code.MODEL_ERROR, "no", "pd"))
    assert not refers(contracts, None)
