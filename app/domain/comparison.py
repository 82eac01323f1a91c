"""Comparison: what a decision would have been, had a shadow made it.

The shadow's answer takes the place of its task's in the decision's own answers, and the rule's result is evaluated
again on them: what counts is not how far two scores lie apart but whether a customer would have been told otherwise.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from app.domain.decisions import DecisionRecord, evaluate_result
from app.domain.dispatch import TaskResult, TaskStatus
from app.domain.errors import ExpressionFailed
from app.domain.expressions import Expression
from app.domain.join import Status
from app.domain.routing import Plan

SEGMENT_LENGTH_MAX = 64


def compare_shadow(
    plan: Plan,
    decided: DecisionRecord,
    results: Mapping[str, TaskResult],
    shadow: TaskResult,
    version: str,
    segment: Expression | None,
) -> bytes:
    """How a shadow of ``version`` compares, as JSON.

    Members: ``task``, ``champion`` and ``shadow`` (versions), ``outputs`` and ``result`` of both (null where there is
    none), ``flipped`` (null where either result is missing, or the rule has
    none), ``segment`` (text or null), ``latency_ms``.
    """
    own = results[shadow.task]
    referred = decided.status is Status.PARTIAL and any(result.referred for result in results.values())
    task = next(task for task in decided.tasks if task.name == shadow.task)
    # What was left to a person has no result to hold the shadow's against.
    champion = None if referred else _result(plan, results)
    answered = shadow.status is TaskStatus.OK and not referred
    would_be = _result(plan, {**results, shadow.task: shadow}) if answered else None
    unknown = not plan.result or champion is None or would_be is None or own.output is None
    flipped = None if unknown else champion != would_be
    return orjson.dumps(
        {
            "task": shadow.task,
            "champion": task.version,
            "shadow": version,
            "outputs": {"champion": own.output, "shadow": shadow.output},
            "result": {"champion": champion, "shadow": would_be},
            "flipped": flipped,
            "segment": _segment(plan, segment),
            "latency_ms": shadow.latency_ms,
        }
    )


def _result(plan: Plan, results: Mapping[str, TaskResult]) -> dict[str, Any] | None:
    try:
        return evaluate_result(plan, results)
    except ExpressionFailed:
        return None


def _segment(plan: Plan, segment: Expression | None) -> str | None:
    if segment is None:
        return None
    try:
        value = segment.evaluate(plan.activation)
    except ExpressionFailed:
        return "unknown"
    return str(value)[:SEGMENT_LENGTH_MAX]
