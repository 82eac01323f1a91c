"""What would happen to a request under a revision, told step by step and without running anything.

The same functions that route, draw and find features for real are used here, so the explanation cannot drift from the
behaviour; only what they leave out is added: why earlier rules did not match, every arm's hash, and what each version
that may be asked would need.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from app.domain.assignment import fraction, score
from app.domain.decisions import must_answer
from app.domain.document_parts import Scalar
from app.domain.errors import Problem
from app.domain.features import ViewNeed, needs_of, resolve
from app.domain.join import JoinTask
from app.domain.on_demand import SOURCE as ON_DEMAND
from app.domain.registry import CompiledTask, Revision, Rule, rolled_out, rollout_digest
from app.domain.requests import Request
from app.domain.route_documents import TaskSpec
from app.domain.routing import Plan, Refused, TaskPlan, expired, route, rule_holds, seen_of, standbys_of, subject_of
from app.domain.version_documents import HttpBackend, ModelVersionSpec


@dataclass(frozen=True, slots=True)
class RuleTrace:
    """One rule that was tried: did it match, and why."""

    name: str
    matched: bool
    reason: str


@dataclass(frozen=True, slots=True)
class FeatureTrace:
    """One input of a version: what it is read from, and what holds when it is missing or old.

    ``source`` is request, redis, http or onDemand; ``computed`` is how the last is computed, of ``ingredients``.
    """

    ref: str
    type: str | None
    contract: str
    max_age_ms: int | None
    source: str = "request"
    computed: str | None = None
    ingredients: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ArmTrace:
    """One arm of a draw; ``fraction`` and ``score`` are None where it is not known whom it is drawn for."""

    version: str
    weight: int
    percent: float
    fraction: float | None
    score: float | None
    drawn: bool


@dataclass(frozen=True, slots=True)
class RolloutTrace:
    """A rollout and how far it is; ``state`` is ``not begun`` before the broker has taken it up."""

    to: str
    state: str
    step: int
    steps: tuple[int, ...]
    percent: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class VersionTrace:
    """One version that may be asked for a task, or (without one) the fixed output that stands in.

    ``problems`` are what the request itself lacks for it. ``percent``, ``drawn`` and ``segment`` are a shadow's.
    """

    role: Literal["own", "arm", "fallback", "shadow"]
    selected_by: str
    version: ModelVersionSpec | None
    output: Mapping[str, Scalar] | None
    backend: str | None
    expired: bool
    approved: bool
    features: tuple[FeatureTrace, ...]
    problems: tuple[Problem, ...]
    percent: float | None = None
    drawn: bool | None = None
    segment: str | None = None


@dataclass(frozen=True, slots=True)
class TaskTrace:
    """One task: what serves it, how that was selected, and what stands by.

    ``version`` is None where it depends on a request id that is not known; ``barred`` is why it may not be used.
    ``problems`` are what the request lacks and is rejected for; ``notes`` say what becomes of what it may lack.
    """

    spec: TaskSpec
    version: ModelVersionSpec | None
    selected_by: str
    experiment: str | None
    subject: str | None
    arms: tuple[ArmTrace, ...]
    barred: Problem | None
    rollout: RolloutTrace | None
    versions: tuple[VersionTrace, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def serving(self) -> tuple[VersionTrace, ...]:
        """What will be asked first: the version's own trace, or each arm's, or what stands in for a barred one."""
        if self.barred is None:
            return tuple(each for each in self.versions if each.role in ("own", "arm"))
        return tuple(each for each in self.versions if each.role == "fallback" and each.approved and not each.expired)[
            :1
        ]


@dataclass(frozen=True, slots=True)
class Explanation:
    """All of it; ``refused`` is the problem with which the request would be rejected by now."""

    revision: str
    route: str | None
    placeholders: dict[str, str]
    deadline_ms: int | None
    pinnable: tuple[str, ...] = ()
    rules: tuple[RuleTrace, ...] = ()
    rule: str | None = None
    join: str | None = None
    tasks: tuple[TaskTrace, ...] = ()
    needs: tuple[ViewNeed, ...] = ()
    problems: tuple[Problem, ...] = ()
    result: Mapping[str, str] | None = None
    reasons: Mapping[str, str] | None = None
    refused: Problem | None = None


def explain(revision: Revision, request: Request, now_ms: int, *, drawn: bool = True) -> Explanation:
    """The explanation of ``request`` under ``revision``, with the versions that may be used at ``now_ms``.

    A draw without ``stickyBy`` depends on the request's id; where that is not the real one, ``drawn`` False tells of
    every arm.
    """
    plan = route(revision, request, now_ms)
    found = revision.paths.match(request.path)
    if found is None:
        refused = plan.problem if isinstance(plan, Refused) else None
        return Explanation(revision.id, None, {}, None, refused=refused)
    matched, segments = found
    _, activation = seen_of(request, matched, segments)
    traces: list[RuleTrace] = []
    for rule in matched.rules:
        holds = rule_holds(matched, rule, activation)
        traces.append(RuleTrace(rule.spec.name, holds is True, _reason(rule, holds)))
        if holds:
            break
    told = Explanation(
        revision.id,
        matched.name,
        dict(zip(matched.placeholders, segments, strict=True)),
        matched.spec.deadline,
        matched.spec.pinnable,
        tuple(traces),
        plan.rule if isinstance(plan, Refused) else plan.rule.spec.name,
    )
    if isinstance(plan, Refused):
        return replace(told, refused=plan.problem)
    # Features see the placeholders as metadata, as they will when the request is decided.
    seen = replace(request, metadata=plan.metadata)
    tasks = tuple(
        _task(plan, compiled, task, seen, now_ms, drawn)
        for compiled, task in zip(plan.rule.tasks, plan.tasks, strict=True)
    )
    every = dict.fromkeys(_identity(each) for task in tasks for each in task.versions)
    # An entity is asked for whether its version serves or is barred.
    own = dict.fromkeys(_identity(each) for task in tasks for each in task.versions if each.role in ("own", "arm"))
    join = plan.rule.spec.join
    return replace(
        told,
        join=join.policy if join.n is None else f"{join.policy} {join.n}",
        tasks=tasks,
        needs=_needs(revision, every, seen)[0],
        problems=_needs(revision, own, seen)[1],
        result={name: expression.text for name, expression in plan.result.items()},
        reasons={name: expression.text for name, expression in plan.rule.reasons.items()},
    )


def _reason(rule: Rule, holds: bool | Refused) -> str:
    if isinstance(holds, Refused):
        return holds.problem.message
    if rule.when is None:
        return "has no when: always"
    return f"{'true' if holds else 'false'}: {rule.when.text}"


def _identity(trace: VersionTrace) -> tuple[str, str] | None:
    return None if trace.version is None else (trace.version.model, trace.version.version)


def _needs(
    revision: Revision, identities: Mapping[tuple[str, str] | None, None], request: Request
) -> tuple[tuple[ViewNeed, ...], tuple[Problem, ...]]:
    versions = (revision.versions[identity] for identity in identities if identity is not None)
    return needs_of(revision.wants(versions), revision.views, request)


def _task(plan: Plan, compiled: CompiledTask, task: TaskPlan, request: Request, now_ms: int, drawn: bool) -> TaskTrace:
    revision, spec = plan.revision, task.spec
    known = task.experiment is None or drawn or spec.select.subject is not None
    subject = subject_of(spec.select, request, plan.metadata) if task.experiment is not None and known else None
    whom = None if isinstance(subject, Problem) else subject
    arms = _arms(compiled, task, whom) if task.experiment is not None else ()

    def trace(
        role: Literal["own", "arm", "fallback", "shadow"], selected_by: str, version: ModelVersionSpec
    ) -> VersionTrace:
        return VersionTrace(
            role,
            selected_by,
            version,
            None,
            _backend(version),
            expired(revision, version, now_ms),
            version.governance is not None,
            _features(revision, version),
            _request_problems(revision, version, request),
        )

    versions = [trace("own", task.selected_by, task.version)] if known else []
    if not known:
        possible = (arm for arm in arms if arm.weight > 0)
        versions += [trace("arm", f"arm {arm.version}", revision.versions[spec.model, arm.version]) for arm in possible]
    for standby in standbys_of(revision, spec):
        if standby.version is None:
            versions.append(
                VersionTrace("fallback", standby.selected_by, None, standby.output, None, False, True, (), ())
            )
        else:
            versions.append(trace("fallback", standby.selected_by, standby.version))
    running = {shadow.version.version for shadow in task.shadows}
    for shadow in spec.shadow:
        alias = shadow.alias
        label = revision.models[spec.model].aliases[alias] if alias is not None else str(shadow.version)
        said = f"shadow alias {alias}" if alias is not None else f"shadow version {label}"
        made = trace("shadow", said, revision.versions[spec.model, label])
        whether = label in running if known and drawn else None
        versions.append(replace(made, percent=shadow.percent, drawn=whether, segment=shadow.segment))
    traced = TaskTrace(
        spec,
        task.version if known else None,
        task.selected_by,
        task.experiment,
        whom,
        arms,
        task.barred if known else None,
        _rollout(plan, spec),
        tuple(versions),
    )
    lacking = tuple(dict.fromkeys(problem for each in traced.serving for problem in each.problems))
    other = any(
        each.version is not None and not _request_problems(plan.revision, each.version, request)
        for each in task.standbys
    )
    if not lacking or (must_answer(plan, task) and not other):
        return replace(traced, problems=lacking)
    notes = tuple(
        f"version {each.version.version}: {problem.message}; {_instead(plan, task, each.version, request)}"
        for each in traced.serving
        if each.version is not None
        for problem in each.problems
    )
    return replace(traced, notes=notes)


def _instead(plan: Plan, task: TaskPlan, lacking: ModelVersionSpec | None, request: Request) -> str:
    """What becomes of the task where a version cannot be asked for want of inputs."""
    tried = [each.version for each in task.standbys]
    left = task.standbys[tried.index(lacking) + 1 :] if lacking in tried else task.standbys
    for standby in left:
        version = standby.version
        if version is not None and not _request_problems(plan.revision, version, request):
            return f"{standby.selected_by} is asked instead"
    known = JoinTask.of(task.spec)
    if known.need == "default":
        return "its fixed answer stands in"
    if plan.rule.spec.join.policy != "all":
        return "it is not among the answers"
    return "it has no output" if known.need == "optional" else "where it is run, the decision fails"


def _arms(compiled: CompiledTask, task: TaskPlan, subject: str | None) -> tuple[ArmTrace, ...]:
    total = sum(weight for _, weight in compiled.arms)
    return tuple(
        ArmTrace(
            version,
            weight,
            100 * weight / total,
            None if subject is None else fraction(compiled.experiment, version, subject),
            None if subject is None else score(compiled.experiment, version, weight, subject),
            subject is not None and version == task.version.version,
        )
        for version, weight in compiled.arms
    )


def _rollout(plan: Plan, spec: TaskSpec) -> RolloutTrace | None:
    rollout = spec.rollout
    if rollout is None:
        return None
    rule = plan.rule.spec.name
    status = plan.route.status.rollouts.get(f"{rule}/{spec.name}")
    if status is None or status.of != rollout_digest(rule, spec):
        return RolloutTrace(rollout.to, "not begun", 0, rollout.steps, rolled_out(rollout, None), None)
    percent = rolled_out(rollout, status)
    return RolloutTrace(rollout.to, status.state, status.step, rollout.steps, percent, status.reason)


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
        if contract.on_violation is not None:
            says += f", onViolation {contract.on_violation}"
        made = revision.computations.get((contract.source, contract.feature))
        traces.append(
            FeatureTrace(
                contract.ref,
                declared or contract.type,
                says,
                contract.max_age,
                "request" if view is None else ON_DEMAND if view.source is None else view.source.type,
                None if made is None else made.text,
                () if made is None else tuple(map(str, made.ingredients)),
            )
        )
    return tuple(traces)


def _request_problems(revision: Revision, version: ModelVersionSpec, request: Request) -> tuple[Problem, ...]:
    """What the request itself lacks; stored features are not looked at."""
    own = tuple(contract for contract in version.features if contract.source not in revision.views)
    return resolve(own, revision.views, request, {}, 0).problems
