"""A route compiled: its rules' expressions ready to evaluate, its draws laid out, and all that is wrong within it."""

import datetime
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from app.domain.document_parts import Scalar
from app.domain.documents import Route
from app.domain.errors import ExpressionFailed, Fault
from app.domain.expression_syntax import syntax
from app.domain.expressions import Expression, compile_expression
from app.domain.paths import placeholders_of
from app.domain.registry_checks import FieldFault, Known, repeated, task_faults
from app.domain.registry_parts import is_unread
from app.domain.registry_results import (
    Absences,
    constant_fault,
    constant_segment,
    header_faults,
    is_always,
    result_faults,
)
from app.domain.route_documents import Rollout, RolloutStatus, RouteSpec, RouteStatus, RuleSpec, TaskSpec
from app.domain.version_documents import ModelVersionSpec

WHEN_ROOTS: Final = ("path", "entities", "inputs", "metadata")
RESULT_ROOTS: Final = ("outputs", *WHEN_ROOTS)
REASON_ROOTS: Final = ("result", *RESULT_ROOTS)

_RESERVED: Final = frozenset({"headers", "model_version"})
"""Members of metadata that no placeholder may be called."""


@dataclass(frozen=True, slots=True)
class CompiledTask:
    """A task, compiled. ``experiment`` salts its draws; ``arms`` are what is drawn from, none where nothing is.

    ``segments`` stand for its shadows' segments, in their order.
    """

    spec: TaskSpec
    experiment: str
    arms: tuple[tuple[str, int], ...]
    condition: Expression | None
    segments: tuple[Expression | None, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, compiled."""

    spec: RuleSpec
    when: Expression | None
    tasks: tuple[CompiledTask, ...]
    result: Mapping[str, Expression]
    reasons: Mapping[str, Expression]
    """By code, in the order in which they are told."""


@dataclass(frozen=True, slots=True)
class CompiledRoute:
    """A route, compiled; ``placeholders`` name the segments of its path that vary, in order.

    ``helpers`` and ``sees_headers`` are what its expressions need, together.
    """

    name: str
    spec: RouteSpec
    status: RouteStatus
    placeholders: tuple[str, ...]
    rules: tuple[Rule, ...]
    helpers: frozenset[str]
    sees_headers: bool


def compile_route(
    known: Known, document: Route, today: datetime.date | None, add: Callable[[str, str], None]
) -> CompiledRoute:
    """The route, compiled as far as it is sound; ``add`` is told the field and the fault of all that is not."""
    return _Compiler(known, document, today, add).route()


def same_path_faults(routes: Iterable[tuple[str, CompiledRoute]]) -> Iterator[Fault]:
    """Routes, each with its origin, whose paths match the same requests."""
    seen: dict[tuple[str, ...], str] = {}
    for origin, route in routes:
        # Where a placeholder stands counts, not what it is called.
        names = {f"{{{name}}}" for name in route.placeholders}
        shape = tuple("{}" if segment in names else segment for segment in route.spec.path.split("/"))
        if shape in seen and not is_unread(route.spec.path):
            same = f"Route {seen[shape]} has the same path; merge their rules"
            yield Fault(origin, f"Route {route.name}", "spec.path", same)
        seen.setdefault(shape, route.name)


def rollout_digest(rule: str, task: TaskSpec) -> str:
    """What a rollout's status is of: its rule, its task, and from where to where, how, it leads."""
    # Defaults are left out, so that a field that documents gain one day does not begin every rollout anew.
    named = {"name", "model", "select", "rollout"}
    content = task.model_dump(mode="json", by_alias=True, include=named, exclude_defaults=True)
    return hashlib.sha256(orjson.dumps([rule, content], option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def rolled_out(rollout: Rollout, status: RolloutStatus | None) -> int:
    """The percent of subjects that a rollout's new version has."""
    if status is None or status.state == "aborted":
        return 0
    return 100 if status.state == "promoted" else rollout.steps[min(status.step, len(rollout.steps) - 1)]


class _Compiler:
    """One route's way to its compiled form; ``add`` hears of each fault."""

    def __init__(
        self, known: Known, document: Route, today: datetime.date | None, add: Callable[[str, str], None]
    ) -> None:
        self._known, self._document, self._today, self._add = known, document, today, add

    def route(self) -> CompiledRoute:
        document, spec = self._document, self._document.spec
        self._add_all("", repeated("spec.rules", (rule.name for rule in spec.rules)))
        rules = tuple(map(self._rule, spec.rules))
        placeholders: tuple[str, ...] = ()
        try:
            placeholders = placeholders_of(spec.path)
            for name in sorted(_RESERVED & set(placeholders)):
                self._add("spec.path", f"metadata.{name} has a meaning of its own; name it otherwise")
        except ValueError as error:
            self._add("spec.path", str(error))
        self._add_all("status.rollouts.", _status_faults(document))
        self._add_all("", repeated("spec.pinnable", spec.pinnable))
        self._add_all("", _unreached(rules))
        named = {task.name for rule in spec.rules for task in rule.tasks}
        for task in spec.pinnable:
            if task not in named and not any(map(is_unread, named)):
                self._add(f"spec.pinnable[{task}]", f"there is no task {task}")
        expressions = [expression for rule in rules for expression in _expressions_of(rule)]
        return CompiledRoute(
            document.metadata.name,
            spec,
            document.status or RouteStatus(),
            placeholders,
            rules,
            frozenset(helper for expression in expressions for helper in expression.helpers),
            any(map(_sees_headers, expressions)),
        )

    def _add_all(self, at: str, faults: Iterable[FieldFault]) -> None:
        for field, message in faults:
            self._add(f"{at}{field}", message)

    def _rule(self, rule: RuleSpec) -> Rule:
        at, known = f"spec.rules[{rule.name}]", self._known
        self._add_all("", repeated(f"{at}.tasks", (task.name for task in rule.tasks)))
        for task in rule.tasks:
            self._add_all(f"{at}.tasks[{task.name}].", task_faults(known, task, self._today))
        self._add_all(f"{at}.", (*_order_faults(rule.tasks), *_join_faults(rule), *_flip_faults(rule)))
        when = self._condition(f"{at}.when", rule.when, WHEN_ROOTS)
        if when is not None and is_always(when, False):
            self._add(f"{at}.when", "is always false, so the rule is for no request; remove the rule")
        result = self._each(f"{at}.result", rule.result, RESULT_ROOTS)
        self._add_all("", repeated(f"{at}.reasons", (reason.code for reason in rule.reasons)))
        reasons: dict[str, Expression] = {}
        for reason in rule.reasons:
            found = self._condition(f"{at}.reasons[{reason.code}].when", reason.when, REASON_ROOTS)
            if found is not None:
                reasons[reason.code] = found
        for name, expression in reasons.items():
            for member in dict.fromkeys(path[0] for path, _ in expression.members("result")):
                if member not in rule.result and not any(map(is_unread, rule.result)):
                    have = ", ".join(rule.result) or "nothing"
                    self._add(f"{at}.reasons[{name}].when", f"result has no {member} (there is: {have})")
        served = {task.name: known.served(task) for task in rule.tasks}
        unsure = any(map(is_unread, (*served, *(name for task in rule.tasks for name in task.after))))
        conditions = {
            task.name: self._condition(f"{at}.tasks[{task.name}].when", task.when, RESULT_ROOTS) for task in rule.tasks
        }
        compiled = {name: each for name, each in conditions.items() if each is not None}
        absences = Absences.of(rule, compiled)
        told = {f"result.{name}": expression for name, expression in result.items()}
        holding = {f"reasons[{code}].when": expression for code, expression in reasons.items()}
        for field, expression in (told | holding).items():
            for message in result_faults(expression, served, absences, boolean=field in holding):
                self._add(f"{at}.{field}", message)
        tasks = []
        for task in rule.tasks:
            below, condition = f"{at}.tasks[{task.name}]", conditions[task.name]
            if condition is not None and is_always(condition, False):
                self._add(f"{below}.when", "is always false, so the task never runs; remove the task")
            if condition is not None:
                before = {name: served.get(name) for name in task.after if name in served or unsure}
                others = set() if unsure else served.keys() - before.keys()
                for name in dict.fromkeys(path[0] for path, _ in condition.members("outputs") if path[0] in others):
                    before[name] = served[name]
                    said = f"outputs.{name}: task {name} may not have ended by then; add {name} to after"
                    self._add(f"{below}.when", said)
                for message in result_faults(condition, before, absences.before(task, rule, compiled), boolean=True):
                    self._add(f"{below}.when", message)
            segments = tuple(
                self._segment(f"{below}.shadow[{number}].segment", shadow.segment)
                for number, shadow in enumerate(task.shadow)
            )
            experiment = task.select.experiment or f"{self._document.metadata.name}/{task.name}"
            spec = _with_typed_answers(task, served[task.name])
            tasks.append(CompiledTask(spec, experiment, self._arms(rule, task), condition, segments))
        return Rule(rule, when, tuple(tasks), result, reasons)

    def _compiled(self, field: str, text: str | None, roots: tuple[str, ...]) -> Expression | None:
        if text is None:
            return None
        try:
            expression = compile_expression(text, roots)
        except ExpressionFailed as error:
            self._add(field, str(error))
            return None
        for said in header_faults(expression):
            self._add(field, said)
        return expression

    def _segment(self, field: str, text: str | None) -> Expression | None:
        expression = self._compiled(field, text, WHEN_ROOTS)
        said = None if expression is None else constant_segment(expression)
        if said is not None:
            self._add(field, said)
        return expression

    def _condition(self, field: str, text: str | None, roots: tuple[str, ...]) -> Expression | None:
        expression = self._compiled(field, text, roots)
        said = None if expression is None else constant_fault(expression)
        if said is not None:
            self._add(field, said)
        return expression

    def _each(self, field: str, texts: Mapping[str, str], roots: tuple[str, ...]) -> dict[str, Expression]:
        made = {name: self._compiled(f"{field}.{name}", text, roots) for name, text in texts.items()}
        return {name: expression for name, expression in made.items() if expression is not None}

    def _arms(self, rule: RuleSpec, task: TaskSpec) -> tuple[tuple[str, int], ...]:
        """What a version is drawn from: a split's arms, or a rollout's two as far as it is."""
        select, rollout = task.select, task.rollout
        if select.split is not None:
            return tuple((arm.version, arm.weight) for arm in select.split)
        base = self._known.label(task, select.version, select.alias)
        if rollout is None or base is None:
            return ()
        status = (self._document.status or RouteStatus()).rollouts.get(f"{rule.name}/{task.name}")
        begun = status is not None and status.of == rollout_digest(rule.name, task)
        percent = rolled_out(rollout, status if begun else None)
        return ((base, 100 - percent), (rollout.to, percent))


def _with_typed_answers(task: TaskSpec, versions: tuple[ModelVersionSpec, ...] | None) -> TaskSpec:
    """The task, its fixed answers as numbers of the types that its versions answer with: CEL does not mix 1 and 1.0."""
    fallback = tuple(
        each if each.default is None else each.model_copy(update={"default": _typed(each.default, versions or ())})
        for each in task.fallback
    )
    default = None if task.default is None else _typed(task.default, versions or ())
    return task.model_copy(update={"default": default, "fallback": fallback}) if task.fallback or default else task


def _typed(answer: Mapping[str, Scalar], versions: Iterable[ModelVersionSpec]) -> dict[str, Scalar]:
    floats = {output.name for version in versions for output in version.outputs if output.datatype in ("FP32", "FP64")}
    return {name: float(value) if type(value) is int and name in floats else value for name, value in answer.items()}


def _status_faults(document: Route) -> list[tuple[str, str]]:
    """What is wrong with a status that somebody wrote: rollouts that are none, and steps that they do not have."""
    if document.status is None:
        return []
    rollouts = {
        f"{rule.name}/{task.name}": (rule.name, task, task.rollout)
        for rule in document.spec.rules
        for task in rule.tasks
        if task.rollout is not None
    }
    faults = []
    for key, status in document.status.rollouts.items():
        if key not in rollouts:
            faults.append((key, "there is no such rollout"))
            continue
        rule_name, task, rollout = rollouts[key]
        if status.step >= len(rollout.steps) and status.of == rollout_digest(rule_name, task):
            faults.append((f"{key}.step", f"is {status.step}, and there are {len(rollout.steps)} steps, from 0"))
    return faults


def _expressions_of(rule: Rule) -> Iterator[Expression]:
    if rule.when is not None:
        yield rule.when
    for task in rule.tasks:
        yield from (each for each in (task.condition, *task.segments) if each is not None)
    yield from rule.result.values()
    yield from rule.reasons.values()


def _sees_headers(expression: Expression) -> bool:
    if "metadata" not in expression.roots:
        return False
    reach = expression.reach("metadata")
    return reach is None or "headers" in reach


def _unreached(rules: Sequence[Rule]) -> Iterator[FieldFault]:
    """Rules behind one that is for every request, or for the same requests: the first that holds decides."""
    seen: dict[object, str] = {}
    for number, rule in enumerate(rules):
        spec = rule.spec
        after = ", ".join(each.spec.name for each in rules[number + 1 :])
        if spec.when is None or (rule.when is not None and is_always(rule.when, True)):
            if after:
                has = "has no when" if spec.when is None else "has a when that is always true"
                said = f"{has}, so none after it is reached ({after}); put it last or give it one that may be false"
                yield f"spec.rules[{spec.name}]", said
                return
        elif not is_unread(spec.when):
            asked = syntax(spec.when) or spec.when.strip()
            if asked in seen:
                said = f"is that of rule {seen[asked]} before it, so {spec.name} is never reached; merge the two"
                yield f"spec.rules[{spec.name}].when", said
            seen.setdefault(asked, spec.name)


def _order_faults(tasks: Sequence[TaskSpec]) -> list[tuple[str, str]]:
    """What is wrong with ``after``: names that are none, and circles (Kahn's algorithm finds who is left in one)."""
    names = {task.name for task in tasks}
    faults = [
        (f"tasks[{task.name}].after", f"there is no task {name} in this rule")
        for task in tasks
        for name in task.after
        if name not in names and not any(map(is_unread, (name, *names)))
    ]
    faults += [
        (f"tasks[{task.name}].when", "needs after: the tasks whose outputs it may look at")
        for task in tasks
        if task.when is not None and not task.after
    ]
    for task in tasks:
        faults += repeated(f"tasks[{task.name}].after", task.after)
    left: dict[str, set[str]] = {}
    for task in tasks:  # two of one name are another fault, and hide no circle
        left.setdefault(task.name, set()).update(names & set(task.after))
    while free := [name for name, before in left.items() if not before & left.keys()]:
        for name in free:
            del left[name]
    if left:
        faults.append(("tasks", f"{', '.join(sorted(left))} wait for one another by after; break the circle"))
    return faults


def _flip_faults(rule: RuleSpec) -> list[tuple[str, str]]:
    """Rollouts that are bound by flips of a result that there is not."""
    said = "a flip is another result, and the rule has none, so the bound never breaks; give it a result, or remove it"
    return [
        (f"tasks[{task.name}].rollout.abortOn.flipRate", said)
        for task in rule.tasks
        if not rule.result and task.rollout is not None and task.rollout.abort_on.flip_rate is not None
    ]


def _join_faults(rule: RuleSpec) -> list[tuple[str, str]]:
    join = rule.join
    if join.policy == "all":
        return []
    faults = [
        (f"tasks[{task.name}].need", f"join policy {join.policy} says how many answers are needed; remove it")
        for task in rule.tasks
        if "need" in task.model_fields_set
    ]
    if join.n is not None and join.n > len(rule.tasks) and not any(is_unread(task.name) for task in rule.tasks):
        faults.append(("join.n", f"is {join.n}, and the rule has {len(rule.tasks)} tasks"))
    return faults
