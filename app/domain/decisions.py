"""Decisions: what becomes of a request, as the reply's bytes and as the record that explains it.

A ``DecisionRecord`` is the one account of a request: where it came from, what was routed, fetched, sent and answered,
and the reply. It goes to the audit whole; the joins table holds the same record, so that a worker that takes over can
finish it, and a duplicate gets the reply's very bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, Literal

import orjson

from app.domain.dispatch import TaskResult, TaskStatus
from app.domain.errors import Code, ExpressionFailed, Problem
from app.domain.expressions import unfit
from app.domain.features import FeatureValue, refers
from app.domain.join import JoinTask, Outcome, Status
from app.domain.registry import Revision
from app.domain.requests import InboundRecord, Request, RequestId, address_headers
from app.domain.routing import Plan, TaskPlan

_KEY_BYTES_KEPT: Final = 256
_SMALLER: Final[Mapping[str, str]] = {
    "body": "send smaller inputs",
    "headers": "send fewer or shorter headers",
    "features": "let the models need fewer or shorter features",
    "outputs": "ask for smaller outputs",
}


class Kind(StrEnum):
    """What a record tells of: a decision, a message turned away beside one, a shadow of one, or a rollout's step."""

    DECISION = "decision"
    REFUSAL = "refusal"
    SHADOW = "shadow"
    ROLLOUT = "rollout"


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One task: what was chosen, given, sent, tried and answered. ``result`` is None while it is out.

    ``experiment``: the version was drawn in it, as an arm. ``earlier``: the versions that failed before this one stood
    in, each with its result, the first of them first.
    """

    name: str
    model: str
    version: str
    digest: str
    backend: str
    selected_by: str
    need: Literal["required", "optional", "default"]
    governance: Mapping[str, Any] | None
    features: tuple[FeatureValue, ...]
    result: TaskResult | None
    experiment: str | None = None
    earlier: tuple["TaskRecord", ...] = ()


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """All that is known of one request. ``status`` and ``reply`` are None while its join is pending.

    ``body`` is the digest of what was asked (SHA-256, hex); times are epoch milliseconds. ``decision`` is the execution
    id of the decision that a shadow ran beside. ``evidence`` is JSON: how a shadow compares, why a rollout moved.
    """

    kind: Kind
    request_id: RequestId
    execution_id: str
    source: InboundRecord
    content_type: str
    body: str
    received_ms: int
    deadline_ms: int
    instance: str
    path: str | None = None
    route: str | None = None
    rule: str | None = None
    revision: str | None = None
    tasks: tuple[TaskRecord, ...] = ()
    status: Status | None = None
    decided_ms: int | None = None
    problems: tuple[Problem, ...] = ()
    reply: bytes | None = None
    decision: str | None = None
    evidence: bytes | None = None

    @property
    def pending(self) -> bool:
        """Whether the join still waits."""
        return self.status is None


def deadline_of(request: Request, route_deadline_ms: int, appended_ms: int) -> int:
    """When the request expires: its own deadline, capped by the route's, which counts from the record's append time."""
    latest = appended_ms + route_deadline_ms
    return latest if request.deadline_ms is None else min(request.deadline_ms, latest)


def refuse(record: DecisionRecord, status: Status, problems: tuple[Problem, ...], now_ms: int) -> DecisionRecord:
    """The record of a request that ends without its models: rejected, expired, or failed."""
    return _close(record, status, {}, {"result": {}}, problems, now_ms)


def must_answer(plan: Plan, task: TaskPlan) -> bool:
    """Whether the request cannot end well without an answer of this task, so that what its versions lack is the
    request's."""
    if plan.rule.spec.join.policy != "all" or task.spec.after:
        return False
    return JoinTask.of(task.spec).need == "required"


def condition(task: TaskPlan, plan: Plan, results: Mapping[str, TaskResult]) -> TaskResult | None:
    """Why a task whose predecessors have ended is not run, as its result; None: it is run.

    Its ``when`` decides; without one it needs what comes before it to have answered. What only lacks the output of a
    referred task has no problem of its own.
    """
    after = task.spec.after
    if task.condition is None:
        silent = [name for name in after if results[name].output is None]
        if not silent:
            return None
        blamed = any(results[name].problem is not None and not results[name].referred for name in silent)
        said = f"task {', '.join(silent)} has no output, and this one comes after it"
        if blamed:
            return _not_run(task, Problem(Code.PREDECESSOR_FAILED, said, task.name))
        return _not_run(task, None, said)
    plan.activation.add("outputs", _outputs({name: results[name] for name in after}))
    try:
        holds = task.condition.evaluate(plan.activation)
        if isinstance(holds, bool):
            return None if holds else _not_run(task, None, f"its when is false: {task.condition.text}")
        reason = f"gives {type(holds).__name__}, not a bool: {task.condition.text}"
    except ExpressionFailed as error:
        if any(results[name].referred for name in after):
            return _not_run(task, None, f"what comes before it is left to a person, and its when needs that: {error}")
        reason = f"failed: {error}"
    return _not_run(task, Problem(Code.CONDITION_FAILED, f"when {reason}", task.name))


def _not_run(task: TaskPlan, problem: Problem | None, reason: str | None = None) -> TaskResult:
    return TaskResult(task.name, TaskStatus.SKIPPED, None, problem, 0.0, (), b"", reason)


def decide(record: DecisionRecord, plan: Plan, outcome: Outcome, now_ms: int) -> DecisionRecord:
    """The record of a joined request: its result and reasons evaluated, its reply written."""
    status, problems = outcome.status, outcome.problems
    result: dict[str, Any] = {}
    reasons: list[str] = []
    if is_referred(outcome):
        result = dict(plan.rule.spec.refer_result or {})
        problems = (*problems, *(_referral(each) for each in outcome.results.values() if each.referred))
    elif status in (Status.COMPLETED, Status.PARTIAL):
        try:
            result = evaluate_result(plan, outcome.results)
            reasons = _reasons(plan, result)
        except ExpressionFailed as error:
            status, result = Status.FAILED, {}
            problems = (*problems, Problem(Code.RESULT_FAILED, f"rule {plan.rule.spec.name}: {error}"))
    tasks = tuple(replace(task, result=outcome.results[task.name]) for task in record.tasks)
    outputs = {task.name: _output(task) for task in tasks}
    answered = {"result": result, "reasons": reasons} if plan.rule.reasons else {"result": result}
    return _close(record, status, outputs, answered, problems, now_ms, tasks)


def is_referred(outcome: Outcome) -> bool:
    """Whether a person must decide: a task is referred, and nothing else has failed or was enough without it."""
    return outcome.status is Status.PARTIAL and any(result.referred for result in outcome.results.values())


def is_referral(revision: Revision, task: TaskRecord, result: TaskResult) -> bool:
    """Whether a task without an answer is left to a person: by its version's contract, or by that of one before."""

    def refers_by(record: TaskRecord, problem: Problem | None) -> bool:
        version = revision.versions.get((record.model, record.version))
        return version is not None and refers(version.features, problem)

    earlier = any(refers_by(each, each.result.problem) for each in task.earlier if each.result is not None)
    return result.problem is not None and (earlier or refers_by(task, result.problem))


def _referral(result: TaskResult) -> Problem:
    cause = result.problem
    said = "a feature's contract refers the decision to a person" + (f": {cause.message}" if cause else "")
    return Problem(Code.REFERRED, said, result.task, cause.feature if cause else None)


def evaluate_result(plan: Plan, results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """The rule's result on these answers.

    Raises:
        ExpressionFailed: an expression fails, or gives what JSON cannot hold.
    """
    plan.activation.add("outputs", _outputs(results))
    values: dict[str, Any] = {}
    for name, expression in plan.result.items():
        value = expression.evaluate(plan.activation)
        said = unfit(value)
        if said is not None:
            raise ExpressionFailed(f"result.{name} gives {said}")
        values[name] = value
    return values


def _outputs(results: Mapping[str, TaskResult]) -> dict[str, Any]:
    return {name: result.output for name, result in results.items() if result.output is not None}


def _reasons(plan: Plan, result: Mapping[str, Any]) -> list[str]:
    """The codes of the reasons that hold, in the rule's order."""
    if not plan.rule.reasons:
        return []
    plan.activation.add("result", result)
    codes = []
    for code, expression in plan.rule.reasons.items():
        holds = expression.evaluate(plan.activation)
        if not isinstance(holds, bool):
            raise ExpressionFailed(f"reasons.{code} gives {type(holds).__name__}, not a bool: {expression.text}")
        if holds:
            codes.append(code)
    return codes


def _output(task: TaskRecord) -> dict[str, Any]:
    result = task.result
    assert result is not None  # noqa: S101 - an outcome has a result for every task
    output: dict[str, Any] = {"status": result.status, "model": task.model, "version": task.version}
    if result.status in (TaskStatus.OK, TaskStatus.DEFAULTED):
        output["output"] = result.output
    if task.experiment is not None:
        output["experiment"] = task.experiment
    output["latency_ms"] = round(result.latency_ms, 1)
    return output


def _close(
    record: DecisionRecord,
    status: Status,
    outputs: Mapping[str, Any],
    answered: Mapping[str, Any],
    problems: tuple[Problem, ...],
    now_ms: int,
    tasks: tuple[TaskRecord, ...] | None = None,
) -> DecisionRecord:
    reply = orjson.dumps(
        {
            "request_id": record.request_id,
            "execution_id": record.execution_id,
            "status": status,
            "path": record.path,
            "route": record.route,
            "rule": record.rule,
            "revision": record.revision,
            "outputs": outputs,
            **answered,
            "errors": [problem.as_json() for problem in problems],
            "latency_ms": max(0, now_ms - record.received_ms),
        }
    )
    return replace(
        record,
        tasks=record.tasks if tasks is None else tasks,
        status=status,
        decided_ms=now_ms,
        problems=problems,
        reply=reply,
    )


def what_is_large(record: DecisionRecord) -> str:
    """Of what a record's bytes are, the most first, and what to do about those."""
    tasks = [each for task in record.tasks for each in (task, *task.earlier)]
    results = [task.result for task in tasks if task.result is not None]
    sizes = {
        "body": len(record.source.value or b""),
        "headers": sum(len(name) + len(value) for name, value in record.source.headers),
        # What was sent to models is features in another form.
        "features": sum(len(each.ref) + _size_of(each.value) for task in tasks for each in task.features)
        + sum(len(result.sent) for result in results),
        "outputs": sum(len(orjson.dumps(result.output)) for result in results if result.output is not None),
    }
    ordered = sorted(sizes, key=lambda part: -sizes[part])
    listed = ", ".join(f"{part} {sizes[part]} bytes" for part in ordered)
    return f"{listed}; {_SMALLER[ordered[0]]}"


def _size_of(value: object) -> int:
    return len(value) if isinstance(value, bytes) else len(str(value).encode(errors="replace"))


def shrink(record: DecisionRecord, limit: int, now_ms: int) -> DecisionRecord:
    """The record of a decision too large for Kafka, without the request's bytes, whose digest it keeps.

    A refusal stays what it is; any other decision has failed, for what explains it did not fit either. The reply's
    address stays, since whoever takes over must still find it.
    """
    problem = Problem(Code.RECORD_TOO_LARGE, f"the decision's record exceeds {limit} bytes: {what_is_large(record)}")
    key = record.source.key and record.source.key[:_KEY_BYTES_KEPT]
    source = replace(record.source, value=None, key=key, headers=address_headers(record.source.headers))
    bare = replace(record, source=source, content_type=record.content_type[:_KEY_BYTES_KEPT], tasks=())
    if record.status is Status.REJECTED and not record.tasks:
        return bare
    return _close(bare, Status.FAILED, {}, {"result": {}}, (problem,), now_ms)
