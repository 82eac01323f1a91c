"""What would happen to a request under a revision, told step by step and without running anything.

The same functions that route and find features for real are used here, so the explanation cannot drift from the
behaviour; only what they leave out is added: why earlier rules did not match, and what each task would need.
"""

from dataclasses import dataclass, replace

from app.domain.documents import HttpBackend, ModelVersionSpec, TaskSpec
from app.domain.errors import Problem
from app.domain.features import ViewNeed, needs_of, resolve
from app.domain.registry import Revision, Rule
from app.domain.requests import Request
from app.domain.routing import Refused, TaskPlan, context_of, route, rule_holds


@dataclass(frozen=True, slots=True)
class RuleTrace:
    """One rule that was tried: did it match, and why."""

    name: str
    matched: bool
    reason: str


@dataclass(frozen=True, slots=True)
class FeatureTrace:
    """One input of a version: what it is read from, and what holds when it is missing or old."""

    ref: str
    type: str | None
    contract: str
    max_age_ms: int | None


@dataclass(frozen=True, slots=True)
class TaskTrace:
    """One task by one version that serves it, how that was selected, and what applies to it."""

    spec: TaskSpec
    version: ModelVersionSpec
    selected_by: str
    backend: str
    features: tuple[FeatureTrace, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """All of it; ``refused`` is the problem with which the request would be rejected by now."""

    revision: str
    route: str | None
    placeholders: dict[str, str]
    deadline_ms: int | None
    rules: tuple[RuleTrace, ...]
    rule: str | None
    tasks: tuple[TaskTrace, ...]
    needs: tuple[ViewNeed, ...]
    problems: tuple[Problem, ...]
    result: dict[str, str]
    refused: Problem | None


def explain(revision: Revision, request: Request, *, drawn: bool = True) -> Explanation:
    """The explanation of ``request`` under ``revision``.

    The arm of a split depends on the request's id; where that is not the real one, ``drawn`` False tells of every arm.
    """
    plan = route(revision, request)
    found = revision.paths.match(request.path)
    if found is None:
        refused = plan.problem if isinstance(plan, Refused) else None
        return Explanation(revision.id, None, {}, None, (), None, (), (), (), {}, refused)
    matched, segments = found
    context = context_of(request, matched, segments)
    placeholders = dict(zip(matched.placeholders, segments, strict=True))
    traces: list[RuleTrace] = []
    for rule in matched.rules:
        holds = rule_holds(matched, rule, context)
        traces.append(RuleTrace(rule.spec.name, holds is True, _reason(rule, holds)))
        if holds:
            break
    head = (revision.id, matched.name, placeholders, matched.spec.deadline, tuple(traces))
    if isinstance(plan, Refused):
        return Explanation(*head, plan.rule, (), (), (), {}, plan.problem)
    # Features see the placeholders as metadata, as they will when the request is decided.
    seen = replace(request, metadata=plan.metadata)
    served = [each for task in plan.tasks for each in _served(revision, task, drawn)]
    needs, problems = needs_of(revision.wants(version for _, version, _ in served), revision.views, seen)
    tasks = tuple(
        TaskTrace(
            spec,
            version,
            selected_by,
            _backend(version),
            _features(revision, version),
            _request_problems(revision, version, seen),
        )
        for spec, version, selected_by in served
    )
    result = {name: expression.text for name, expression in plan.result.items()}
    return Explanation(*head, plan.rule.spec.name, tasks, needs, problems, result, None)


def _reason(rule: Rule, holds: bool | Refused) -> str:
    if isinstance(holds, Refused):
        return holds.problem.message
    if rule.when is None:
        return "has no when: always"
    return f"{'true' if holds else 'false'}: {rule.when.text}"


def _served(revision: Revision, task: TaskPlan, drawn: bool) -> list[tuple[TaskSpec, ModelVersionSpec, str]]:
    split = task.spec.select.split
    if split is None:
        return [(task.spec, task.version, task.selected_by)]
    total = sum(arm.weight for arm in split)
    return [
        (task.spec, revision.versions[task.spec.model, arm.version], f"split, {100 * arm.weight / total:.4g} %")
        for arm in split
        if (arm.version == task.version.version if drawn else arm.weight > 0)
    ]


def _backend(version: ModelVersionSpec) -> str:
    if isinstance(version.backend, HttpBackend):
        return f"http {version.backend.protocol}: {', '.join(version.backend.endpoints)}"
    return f"kafka: pool {version.backend.pool}"


def _features(revision: Revision, version: ModelVersionSpec) -> tuple[FeatureTrace, ...]:
    traces = []
    for contract in version.features:
        view = revision.views.get(contract.source)
        declared = next((each.type for each in view.features if each.name == contract.feature), None) if view else None
        says = "required" if contract.required else f"default {contract.default!r}"
        traces.append(FeatureTrace(contract.ref, declared or contract.type, says, contract.max_age))
    return tuple(traces)


def _request_problems(revision: Revision, version: ModelVersionSpec, request: Request) -> tuple[Problem, ...]:
    """What the request itself lacks; stored features are not looked at."""
    own = tuple(contract for contract in version.features if contract.source not in revision.views)
    return resolve(own, revision.views, request, {}, 0).problems
