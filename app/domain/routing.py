"""Routing: a request and a revision in, the plan of its decision out, or the problem that rejects it.

The most specific path wins, then the first rule whose ``when`` holds. A ``when`` that cannot be evaluated rejects the
request and says why: falling through to the next rule would decide by a rule that nobody meant. An arm of a split is
drawn for the request's subject, or for its id where it has none, so a redelivered request meets the same versions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from app.domain.assignment import assign, fraction, subject_text
from app.domain.document_parts import Scalar
from app.domain.errors import Code, ExpressionFailed, Problem
from app.domain.expressions import Activation, Expression
from app.domain.registry import CompiledRoute, CompiledTask, Revision, Rule
from app.domain.requests import Request
from app.domain.route_documents import Selection, TaskSpec
from app.domain.version_documents import ModelVersionSpec


@dataclass(frozen=True, slots=True)
class Standby:
    """What stands in when a version fails: another version, or (without one) a fixed output."""

    selected_by: str
    version: ModelVersionSpec | None
    output: Mapping[str, Scalar] | None


@dataclass(frozen=True, slots=True)
class ShadowPlan:
    """A version that runs beside a task's own, and how its comparison is segmented."""

    version: ModelVersionSpec
    segment: Expression | None


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """One task of a decision: which version serves it, how that was chosen, and what stands in for it.

    ``experiment``: what the version was drawn in, as the arm of its name; None where nothing was drawn. ``barred``: why
    the version may not be used, so that the first standby serves.
    """

    spec: TaskSpec
    version: ModelVersionSpec
    selected_by: str
    experiment: str | None = None
    condition: Expression | None = None
    barred: Problem | None = None
    standbys: tuple[Standby, ...] = ()
    shadows: tuple[ShadowPlan, ...] = ()

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name

    @property
    def queued(self) -> bool:
        """Whether a pool worker answers it, over Kafka."""
        return self.version.backend.type == "kafka"

    @property
    def versions(self) -> tuple[ModelVersionSpec, ...]:
        """Every version that may be asked for this task: its own, those that stand in, and its shadows."""
        standing = (standby.version for standby in self.standbys if standby.version is not None)
        return (self.version, *standing, *(shadow.version for shadow in self.shadows))


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done for a request, under one revision. ``activation`` holds what expressions see of it."""

    revision: Revision
    route: CompiledRoute
    rule: Rule
    metadata: Mapping[str, Any]
    tasks: tuple[TaskPlan, ...]
    activation: Activation = field(compare=False, repr=False)

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


Found = tuple[CompiledRoute, Sequence[str]]
"""A route, and what a path has in the places of its placeholders."""


def find_route(revision: Revision, path: str) -> Found | Refused:
    """The route of a path; nothing is evaluated yet."""
    found = revision.paths.match(path)
    if found is None:
        return Refused(Problem(Code.PATH_UNKNOWN, f"no route has the path {path[:200]}; see `get routes`"))
    return found


def route(revision: Revision, request: Request, now_ms: int) -> Plan | Refused:
    """The plan for ``request`` under ``revision``, with the versions that may be used at ``now_ms``."""
    found = find_route(revision, request.path)
    return found if isinstance(found, Refused) else plan_of(revision, found, request, now_ms)


def plan_of(revision: Revision, found: Found, request: Request, now_ms: int) -> Plan | Refused:
    """The plan for ``request`` by the route that was found for its path."""
    matched, segments = found
    metadata, activation = seen_of(request, matched, segments)
    for rule in matched.rules:
        holds = rule_holds(matched, rule, activation)
        if isinstance(holds, Refused):
            return holds
        if holds:
            tasks = _plan_tasks(revision, matched, rule, request, metadata, now_ms)
            if isinstance(tasks, Problem):
                return Refused(tasks, matched.name, rule.spec.name)
            return Plan(revision, matched, rule, metadata, tasks, activation)
    return Refused(
        Problem(Code.NO_RULE_MATCHED, f"route {matched.name} has no rule for this request; see `explain`"), matched.name
    )


def seen_of(request: Request, matched: CompiledRoute, segments: Sequence[str]) -> tuple[Mapping[str, Any], Activation]:
    """The request's metadata, and what expressions see of the request.

    The path's placeholders are metadata, and so are the headers, as ``metadata.headers`` by lower-case name; both win
    over the caller's own. Headers that are no text, or say nothing, are not seen.
    """
    metadata = {**request.metadata, **dict(zip(matched.placeholders, segments, strict=True))}
    shown = {**metadata, "headers": _texts(request.headers)} if matched.sees_headers else metadata
    seen = {"path": request.path, "entities": request.entities, "inputs": request.inputs, "metadata": shown}
    return metadata, Activation(seen, matched.helpers)


def _texts(headers: Sequence[tuple[str, bytes]]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, value in headers:
        if not value:
            continue
        try:
            texts.setdefault(name.lower(), value.decode())
        except UnicodeDecodeError:
            continue
    return texts


def rule_holds(matched: CompiledRoute, rule: Rule, activation: Activation) -> bool | Refused:
    """Whether ``rule`` is for the request; Refused where that cannot be said."""
    if rule.when is None:
        return True
    try:
        value = rule.when.evaluate(activation)
        if isinstance(value, bool):
            return value
        reason = f"gives {type(value).__name__}, not a bool: {rule.when.text}"
    except ExpressionFailed as error:
        reason = f"failed: {error}"
    problem = Problem(Code.RULE_FAILED, f"route {matched.name}, rule {rule.spec.name}: when {reason}")
    return Refused(problem, matched.name, rule.spec.name)


# --- selection --------------------------------------------------------------------------------------------------------


def _plan_tasks(
    revision: Revision,
    matched: CompiledRoute,
    rule: Rule,
    request: Request,
    metadata: Mapping[str, Any],
    now_ms: int,
) -> tuple[TaskPlan, ...] | Problem:
    pins = _pins(matched, rule, metadata.get("model_version"))
    if isinstance(pins, Problem):
        return pins
    whole = rule.spec.join.policy == "all"
    tasks = []
    for task in rule.tasks:
        planned = _plan_task(revision, task, request, metadata, pins.get(task.spec.name), now_ms, whole=whole)
        if isinstance(planned, Problem):
            return planned
        tasks.append(planned)
    return tuple(tasks)


def _pins(matched: CompiledRoute, rule: Rule, given: object) -> Mapping[str, str] | Problem:
    """The versions that the caller names by ``metadata.model_version``: one version, or versions by task."""
    if given is None:
        return {}
    mine = [task.spec.name for task in rule.tasks if task.spec.name in matched.spec.pinnable]
    allowed = f"route {matched.name} lets callers name a version of {', '.join(mine) or 'no task'}"
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    if isinstance(given, Mapping):
        # Versions that look like numbers come as such from callers who write no quotes.
        given = {
            name: str(version) if isinstance(version, int) and not isinstance(version, bool) else version
            for name, version in given.items()
        }
    if isinstance(given, str):
        if len(mine) != 1:
            return Problem(Code.VERSION_NOT_ALLOWED, f"metadata.model_version names one version, and {allowed}")
        return {mine[0]: given}
    if not isinstance(given, Mapping) or not all(isinstance(version, str) for version in given.values()):
        said = 'metadata.model_version is neither a version, as "2", nor an object of versions by task'
        return Problem(Code.VERSION_NOT_ALLOWED, said)
    refused = sorted(str(name) for name in given if name not in mine)
    if refused:
        said = f"metadata.model_version names {', '.join(refused)[:200]}, and {allowed}"
        return Problem(Code.VERSION_NOT_ALLOWED, said)
    return {str(name): str(version) for name, version in given.items()}


def _plan_task(
    revision: Revision,
    task: CompiledTask,
    request: Request,
    metadata: Mapping[str, Any],
    pin: str | None,
    now_ms: int,
    *,
    whole: bool,
) -> TaskPlan | Problem:
    """One task's plan; ``whole``: the join wants every task's answer."""
    spec, select, experiment = task.spec, task.spec.select, None
    if pin is not None:
        label, selected_by = pin, "pin"
        if (spec.model, label) not in revision.versions:
            said = f"metadata.model_version names {label[:80]!r}, and {spec.model} has no such version"
            return Problem(Code.VERSION_NOT_ALLOWED, said, spec.name)
        if revision.versions[spec.model, label].governance is None:
            said = f"metadata.model_version names {label[:80]!r}, which nobody has approved"
            return Problem(Code.VERSION_NOT_ALLOWED, said, spec.name)
    elif task.arms:
        subject = subject_of(select, request, metadata)
        if isinstance(subject, Problem):
            return replace(subject, task=spec.name)
        experiment = task.experiment
        label = assign(experiment, task.arms, subject)
        selected_by = "split" if spec.rollout is None else "rollout"
    elif select.alias is not None:
        label, selected_by = revision.models[spec.model].aliases[select.alias], f"alias {select.alias}"
    else:
        assert select.version is not None  # noqa: S101 - Selection holds exactly one of the three
        label, selected_by = select.version, "version"
    version = revision.versions[spec.model, label]
    standbys: tuple[Standby, ...] = ()
    if spec.fallback:
        standbys = _distinct(
            version,
            [
                each
                for each in standbys_of(revision, spec)
                if each.version is None or usable(revision, each.version, now_ms)
            ],
        )
    barred = barred_by(revision, version, now_ms, spec.name)
    if barred is not None:
        needed = whole and spec.need == "required" and not spec.after
        if spec.on_unavailable == "reject" or (needed and not standbys):
            return barred
    shadows = _shadows(revision, task, version, request, now_ms) if spec.shadow else ()
    return TaskPlan(spec, version, selected_by, experiment, task.condition, barred, standbys, shadows)


def subject_of(select: Selection, request: Request, metadata: Mapping[str, Any]) -> str | Problem:
    """Whom an arm is drawn for: the value of ``stickyBy``, or the request's own id."""
    if select.subject is None:
        return request.request_id
    section, name = select.subject
    values = metadata if section == "metadata" else getattr(request, section)
    subject = subject_text(values.get(name))
    if subject is None:
        said = f"{section}.{name} is missing or names nobody, and the version is chosen by it: send it"
        return Problem(Code.SUBJECT_MISSING, said)
    return subject


def standbys_of(revision: Revision, spec: TaskSpec) -> tuple[Standby, ...]:
    """A task's fallbacks, in order."""
    standbys = []
    for fallback in spec.fallback:
        if fallback.default is not None:
            standbys.append(Standby("fallback default", None, fallback.default))
            continue
        alias = fallback.alias
        label = revision.models[spec.model].aliases[alias] if alias is not None else fallback.version
        assert label is not None  # noqa: S101 - Fallback holds exactly one of the three
        named = f"alias {alias}" if alias is not None else f"version {label}"
        standbys.append(Standby(f"fallback {named}", revision.versions[spec.model, label], None))
    return tuple(standbys)


def usable(revision: Revision, version: ModelVersionSpec, now_ms: int) -> bool:
    """Whether the version may decide: it is approved, and its validity has not ended."""
    return version.governance is not None and not expired(revision, version, now_ms)


def barred_by(revision: Revision, version: ModelVersionSpec, now_ms: int, task: str) -> Problem | None:
    """Why a version may not decide; None where it may."""
    if usable(revision, version, now_ms):
        return None
    named, governance = f"{version.model} {version.version}", version.governance
    if governance is None:
        return Problem(Code.VERSION_UNAPPROVED, f"{named} has no governance: nobody has approved it", task)
    return Problem(Code.VERSION_EXPIRED, f"{named} was valid until {governance.valid_until}", task)


def expired(revision: Revision, version: ModelVersionSpec, now_ms: int) -> bool:
    """Whether the version's validity has ended; what only runs beside another needs no more than that it has not."""
    end_ms = revision.expires_ms.get((version.model, version.version))
    return end_ms is not None and now_ms >= end_ms


def _distinct(own: ModelVersionSpec, standbys: Sequence[Standby]) -> tuple[Standby, ...]:
    """Without those that would ask again what has failed already."""
    tried, kept = {own.version}, []
    for standby in standbys:
        if standby.version is None or standby.version.version not in tried:
            kept.append(standby)
        if standby.version is not None:
            tried.add(standby.version.version)
    return tuple(kept)


def _shadows(
    revision: Revision, task: CompiledTask, own: ModelVersionSpec, request: Request, now_ms: int
) -> tuple[ShadowPlan, ...]:
    """The shadows of this request: those whose part it falls into, but for what serves it anyway, and what expired."""
    spec = task.spec
    shadows: list[ShadowPlan] = []
    for shadow, segment in zip(spec.shadow, task.segments, strict=True):
        alias = shadow.alias
        label = revision.models[spec.model].aliases[alias] if alias is not None else shadow.version
        assert label is not None  # noqa: S101 - Shadow holds exactly one of the two
        version = revision.versions[spec.model, label]
        drawn = fraction(f"{task.experiment}/shadow", label, request.request_id) * 100 < shadow.percent
        twice = any(version is each.version for each in shadows)
        if drawn and not twice and version is not own and not expired(revision, version, now_ms):
            shadows.append(ShadowPlan(version, segment))
    return tuple(shadows)
