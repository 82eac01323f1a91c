"""Routing: a request and a revision in, the plan of its decision out, or the problem that rejects it.

The most specific path wins, then the first rule whose ``when`` holds. A ``when`` that cannot be evaluated rejects the
request and says why: falling through to the next rule would decide by a rule that nobody meant. An arm of a weighted
split is drawn by a hash of the request id, so a redelivered request meets the same versions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from app.domain.documents import ModelVersionSpec, TaskSpec
from app.domain.errors import Code, ExpressionFailed, Problem
from app.domain.expressions import Expression
from app.domain.registry import CompiledRoute, Revision, Rule
from app.domain.requests import Request

_HASH_RANGE: Final = 2**64


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """One task of a decision: which version serves it, and how that was chosen."""

    spec: TaskSpec
    version: ModelVersionSpec
    selected_by: str

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name

    @property
    def queued(self) -> bool:
        """Whether a pool worker answers it, over Kafka."""
        return self.version.backend.type == "kafka"


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done for a request, under one revision."""

    revision: Revision
    route: CompiledRoute
    rule: Rule
    metadata: Mapping[str, Any]
    tasks: tuple[TaskPlan, ...]

    @property
    def result(self) -> Mapping[str, Expression]:
        """The expressions of the decision's result."""
        return self.rule.result


@dataclass(frozen=True, slots=True)
class Refused:
    """No plan: the problem, and how far routing came."""

    problem: Problem
    route: str | None = None
    rule: str | None = None


def route(revision: Revision, request: Request) -> Plan | Refused:
    """The plan for ``request`` under ``revision``."""
    found = revision.paths.match(request.path)
    if found is None:
        return Refused(Problem(Code.PATH_UNKNOWN, f"no route has the path {request.path[:200]}; see `get routes`"))
    matched, segments = found
    context = context_of(request, matched, segments)
    for rule in matched.rules:
        holds = rule_holds(matched, rule, context)
        if isinstance(holds, Refused):
            return holds
        if holds:
            tasks = tuple(_select(revision, task, request) for task in rule.spec.tasks)
            return Plan(revision, matched, rule, context["metadata"], tasks)
    return Refused(
        Problem(Code.NO_RULE_MATCHED, f"route {matched.name} has no rule for this request; see `explain`"), matched.name
    )


def context_of(request: Request, matched: CompiledRoute, segments: Sequence[str]) -> dict[str, Any]:
    """What expressions see of a request; the path's placeholders are metadata, and win over the caller's own."""
    metadata = {**request.metadata, **dict(zip(matched.placeholders, segments, strict=True))}
    return {"path": request.path, "entities": request.entities, "inputs": request.inputs, "metadata": metadata}


def rule_holds(matched: CompiledRoute, rule: Rule, context: Mapping[str, object]) -> bool | Refused:
    """Whether ``rule`` is for the request of ``context``; Refused where that cannot be said."""
    if rule.when is None:
        return True
    try:
        value = rule.when.evaluate(context)
        if isinstance(value, bool):
            return value
        reason = f"gives {type(value).__name__}, not a bool: {rule.when.text}"
    except ExpressionFailed as error:
        reason = f"failed: {error}"
    problem = Problem(Code.RULE_FAILED, f"route {matched.name}, rule {rule.spec.name}: when {reason}")
    return Refused(problem, matched.name, rule.spec.name)


def _select(revision: Revision, task: TaskSpec, request: Request) -> TaskPlan:
    select = task.select
    if select.alias is not None:
        version, selected_by = revision.models[task.model].aliases[select.alias], f"alias {select.alias}"
    elif select.version is not None:
        version, selected_by = select.version, "version"
    else:
        assert select.split is not None  # noqa: S101 - Selection holds exactly one of the three
        arms = [(arm.version, arm.weight) for arm in select.split]
        version, selected_by = draw(arms, f"{request.request_id}:{task.name}"), "split"
    return TaskPlan(task, revision.versions[(task.model, version)], selected_by)


def draw(arms: list[tuple[str, int]], seed: str) -> str:
    """The arm that ``seed`` draws: its SHA-256's first 8 bytes, as a fraction, along the cumulated weights.

    >>> draw([("3", 90), ("4", 10)], "a"), draw([("3", 0), ("4", 1)], "b")
    ('3', '4')
    """
    total = sum(weight for _, weight in arms)
    point = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") * total
    passed = 0
    for version, weight in arms:
        passed += weight
        if point < passed * _HASH_RANGE:
            return version
    raise ValueError("the weights of a split must sum to more than 0")
