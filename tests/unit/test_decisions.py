"""Decisions: a reply's bytes, results that cannot be, and records that do not fit."""

from dataclasses import replace
from typing import Any

import orjson
import pytest

from app.domain.decisions import DecisionRecord, Kind, TaskRecord, deadline_of, decide, refuse, shrink
from app.domain.dispatch import TaskResult, TaskStatus
from app.domain.errors import Code, Problem
from app.domain.features import FeatureStatus, FeatureValue
from app.domain.join import Outcome, Status
from app.domain.requests import Headers, InboundRecord, RequestId
from app.domain.routing import Plan, route
from tests.support import registry_documents as documents

NOW_MS = 1_750_000_000_000
ADDRESS: Headers = (("kafka_replyTopic", b"replies"), ("kafka_correlationId", b"7"))


def plan_of(result: dict[str, str]) -> Plan:
    """The plan of a request whose rule has this result."""
    rules = [{"name": "default", "tasks": [documents.task(select={"version": "1"})], "result": result}]
    whole = [*documents.sound()[:-1], documents.route(rules=rules)]
    plan = route(documents.revision(whole), documents.request(), NOW_MS)
    assert isinstance(plan, Plan)
    return plan


def record(**changes: Any) -> DecisionRecord:
    """A record of a request that is about to be decided."""
    task = TaskRecord("pd", "credit-pd", "1", "sha256:0", "http", "version", "required", None, (), None)
    whole = DecisionRecord(
        Kind.DECISION,
        RequestId("r-1"),
        "e-1",
        InboundRecord("inference.requests", 0, 7, NOW_MS, b"key", b"body", (*ADDRESS, ("other", b"x"))),
        "application/json",
        "00" * 32,
        NOW_MS,
        NOW_MS + 100,
        "decide-0",
        path="/credit/card",
        route="credit",
        rule="default",
        revision="sha256:1",
        tasks=(task,),
    )
    return replace(whole, **changes)


def outcome(
    status: Status = Status.COMPLETED, task: TaskStatus = TaskStatus.OK, output: dict[str, Any] | None = None
) -> Outcome:
    """An outcome of one task."""
    given = {"probability": 0.25} if output is None and task is TaskStatus.OK else output
    problem = None if task is TaskStatus.OK else Problem(Code.MODEL_ERROR, "why", "pd")
    result = TaskResult("pd", task, given, problem, 8.06, (), b"")
    return Outcome(status, {"pd": result}, () if problem is None else (problem,))


def reply_of(decided: DecisionRecord) -> dict[str, Any]:
    """A record's reply, read."""
    members: dict[str, Any] = orjson.loads(decided.reply or b"")
    return members


def test_the_replys_bytes() -> None:
    """Members in their order, latencies in milliseconds, nothing more."""
    plan = plan_of({"decision": 'outputs.pd.probability < 0.3 ? "approve" : "refer"', "product": "metadata.product"})
    decided = decide(record(), plan, outcome(), NOW_MS + 11)
    assert decided.reply == (
        b'{"request_id":"r-1","execution_id":"e-1","status":"completed","path":"/credit/card","route":"credit",'
        b'"rule":"default","revision":"sha256:1","outputs":{"pd":{"status":"ok","model":"credit-pd","version":"1",'
        b'"output":{"probability":0.25},"latency_ms":8.1}},"result":{"decision":"approve","product":"card"},'
        b'"errors":[],"latency_ms":11}'
    )
    assert not decided.pending
    assert (decided.status, decided.decided_ms) == (Status.COMPLETED, NOW_MS + 11)
    assert decided.tasks[0].result is not None


def test_without_all_that_is_required_there_is_no_result() -> None:
    """A failed decision names the problem, and its task has no output."""
    plan = plan_of({"decision": "outputs.pd.probability < 0.3"})
    decided = decide(record(), plan, outcome(Status.FAILED, TaskStatus.ERROR), NOW_MS)
    reply = reply_of(decided)
    assert reply["result"] == {}
    assert reply["errors"] == [{"code": "model_error", "task": "pd", "message": "why"}]
    assert reply["outputs"]["pd"] == {"status": "error", "model": "credit-pd", "version": "1", "latency_ms": 8.1}


def test_a_default_stands_in() -> None:
    """A defaulted task's output is in the reply and in the result."""
    plan = plan_of({"probability": "outputs.pd.probability"})
    defaulted = outcome(Status.PARTIAL, TaskStatus.DEFAULTED, {"probability": 0.5})
    reply = reply_of(decide(record(), plan, defaulted, NOW_MS))
    assert (reply["status"], reply["result"]) == ("partial", {"probability": 0.5})
    assert reply["outputs"]["pd"]["output"] == {"probability": 0.5}


def test_a_result_that_cannot_be_evaluated_fails_the_decision() -> None:
    """An output that is not there, or a value that JSON cannot hold; the outputs stay in the reply."""
    for text, said in (
        ("inputs.absent", "rule default"),
        ("size(inputs) < 9 ? b'x' : b'y'", "which JSON cannot hold"),
    ):
        decided = decide(record(), plan_of({"x": text}), outcome(), NOW_MS)
        assert decided.status is Status.FAILED
        assert [problem.code for problem in decided.problems] == [Code.RESULT_FAILED]
        assert said in decided.problems[0].message
        assert reply_of(decided)["result"] == {}
        assert reply_of(decided)["outputs"]["pd"]["status"] == "ok"


def test_a_clock_that_went_back_makes_no_negative_latency() -> None:
    """Never below zero."""
    refused = refuse(record(tasks=()), Status.REJECTED, (), NOW_MS - 5)
    assert reply_of(refused)["latency_ms"] == 0


def test_the_nearer_deadline_counts() -> None:
    """The request's own, capped by the route's, which counts from the record's append time."""
    request = documents.request()
    assert deadline_of(request, 250, NOW_MS) == NOW_MS + 250
    assert deadline_of(replace(request, deadline_ms=NOW_MS + 100), 250, NOW_MS) == NOW_MS + 100
    assert deadline_of(replace(request, deadline_ms=NOW_MS + 900), 250, NOW_MS) == NOW_MS + 250


def test_a_decision_that_does_not_fit_has_failed() -> None:
    """Body, tasks and headers go; the digest, the identity and the reply's address stay."""
    decided = decide(record(), plan_of({}), outcome(), NOW_MS)
    shrunk = shrink(decided, 1_000, NOW_MS + 1)
    assert shrunk.status is Status.FAILED
    assert [problem.code for problem in shrunk.problems] == [Code.RECORD_TOO_LARGE]
    assert (shrunk.source.value, shrunk.tasks, shrunk.source.headers) == (None, (), ADDRESS)
    assert (shrunk.body, shrunk.execution_id) == (decided.body, decided.execution_id)
    assert reply_of(shrunk)["errors"][0]["code"] == "record_too_large"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("body", "body 9000 bytes, headers 49 bytes, outputs 20 bytes, features 0 bytes; send smaller inputs"),
        ("headers", "headers 9056 bytes, outputs 20 bytes, body 4 bytes, features 0 bytes; send fewer"),
        (
            "features",
            "features 9013 bytes, headers 49 bytes, outputs 20 bytes, body 4 bytes; let the models need fewer",
        ),
        ("outputs", "outputs 9013 bytes, headers 49 bytes, body 4 bytes, features 0 bytes; ask for smaller outputs"),
    ],
)
def test_what_is_large_is_told_by_bytes(part: str, said: str) -> None:
    """The largest part first, and what to do about that one: a caller with large headers is not sent to its inputs."""
    before = record()
    output: dict[str, Any] | None = None
    match part:
        case "body":
            before = replace(before, source=replace(before.source, value=b"x" * 9_000))
        case "headers":
            headers = (*before.source.headers, ("padding", b"x" * 9_000))
            before = replace(before, source=replace(before.source, headers=headers))
        case "features":
            feature = FeatureValue("applicant.age", FeatureStatus.PRESENT, "x" * 9_000, None, "redis")
            before = replace(before, tasks=(replace(before.tasks[0], features=(feature,)),))
        case _:
            output = {"text": "x" * 9_002}
    decided = decide(before, plan_of({}), outcome(output=output), NOW_MS)
    (problem,) = shrink(decided, 1_000, NOW_MS + 1).problems
    assert f"exceeds 1000 bytes: {said}" in problem.message


def test_a_refusal_that_does_not_fit_stays_a_refusal() -> None:
    """Its reply is the same; the bytes that were refused are not kept beside their digest."""
    problem = Problem(Code.REQUEST_TOO_LARGE, "too large")
    source = replace(record().source, key=b"k" * 1_000, value=b"x" * 10_000)
    refused = refuse(record(tasks=(), source=source), Status.REJECTED, (problem,), NOW_MS)
    shrunk = shrink(refused, 1_000, NOW_MS + 1)
    assert (shrunk.status, shrunk.problems, shrunk.reply) == (Status.REJECTED, (problem,), refused.reply)
    assert (shrunk.source.value, len(shrunk.source.key or b"")) == (None, 256)
