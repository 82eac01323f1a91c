"""What can be said of expressions before any request: those that fail whatever the tasks' versions answer.

Only what the documents prove is a fault. Requests have no types, so an expression over them is left alone.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any, Final

from app.domain.errors import ExpressionFailed
from app.domain.expression_guards import Absence, unguarded, whole_of
from app.domain.expression_presence import State, missing, states_of
from app.domain.expression_syntax import SIMPLE_TEXT, Node, numbers_in, syntax
from app.domain.expressions import Activation, Expression, unfit
from app.domain.registry_parts import is_unread
from app.domain.registry_shapes import shown
from app.domain.route_documents import RuleSpec, TaskSpec
from app.domain.version_documents import ModelVersionSpec, OutputContract


def constant_fault(expression: Expression) -> str | None:
    """Why a condition that looks at nothing cannot hold or fail to hold; None where it can, or looks at something."""
    if expression.roots:
        return None
    try:
        value = expression.evaluate(Activation({}))
    except ExpressionFailed as error:
        return str(error)
    said = f"is always {shown(value)}, and a condition is true or false; compare it with something"
    return None if isinstance(value, bool) else said


def is_always(expression: Expression, value: bool) -> bool:
    """Whether a condition looks at nothing and is ``value``."""
    return not expression.roots and constant_fault(expression) is None and expression.evaluate(Activation({})) is value


def constant_segment(expression: Expression) -> str | None:
    """Why a segment that looks at nothing tells no requests apart; None where it looks at something."""
    if expression.roots:
        return None
    try:
        value = expression.evaluate(Activation({}))
    except ExpressionFailed as error:
        return str(error)
    return f"is always {shown(value)}, so it tells no requests apart; look at the request, or leave it out"


def header_faults(expression: Expression) -> Iterator[str]:
    """Headers that an expression looks for by a name that none can have."""
    if "metadata" not in expression.roots:
        return
    for name in dict.fromkeys(_headers_in(syntax(expression.text))):
        if name != name.lower():
            wanted = f'metadata.headers["{name.lower()}"]'
            yield f"header {name} is never there, for headers are seen by lower-case names: write {wanted}"


def _headers_in(node: Node | None) -> Iterator[str]:
    """The headers that are named, by a member, by a key, or before ``in``."""
    if node is None:
        return
    if node.kind == "path" and node.names[:2] == _HEADERS and len(node.names) > 2:
        yield node.names[2]
    if node.kind == "in" and node.parts[0].kind == "literal" and node.parts[1].names == _HEADERS:
        keyed = SIMPLE_TEXT.fullmatch(node.parts[0].names[0])
        if keyed is not None:
            yield keyed[2]
    for part in node.parts:
        yield from _headers_in(part)


_HEADERS: Final = ("metadata", "headers")


@dataclass(frozen=True, slots=True)
class Absences:
    """The tasks of a rule that may have no output where its expressions are evaluated, each with why.

    At most ``most`` at once. ``conditions``: of those that are absent only where a condition is false, that condition.
    ``states``: which can be there together; None where they are too many to tell apart.
    """

    why: Mapping[str, str]
    most: int
    conditions: Mapping[str, Expression]
    states: tuple[State, ...] | None = None

    @classmethod
    def of(cls, rule: RuleSpec, conditions: Mapping[str, Expression]) -> "Absences":
        """The rule's, with its tasks' compiled ``conditions``."""
        made = cls._of(rule, conditions)
        return replace(made, states=_states(rule, conditions)) if made.why else made

    @classmethod
    def _of(cls, rule: RuleSpec, conditions: Mapping[str, Expression]) -> "Absences":
        join, count = rule.join, len(rule.tasks)
        if join.policy != "all":
            n = join.n or 1
            said = f"join policy {join.policy} waits for {n} of {count} tasks"
            return cls({task.name: said for task in rule.tasks} if n < count else {}, count - n, {})
        why: dict[str, str] = {}
        only_by: dict[str, Expression] = {}
        left = list(rule.tasks)
        while left:
            # Whoever comes after a task that may be skipped is skipped with it.
            found = [task for task in left if _absence(task, why) is not None]
            if not found:
                break
            for task in found:
                why[task.name] = _absence(task, why) or ""
                may_fail = task.need == "optional" and not _has_fixed(task)
                absent_before = [name for name in task.after if name in why]
                if task.when is not None and not may_fail and task.name in conditions:
                    only_by[task.name] = conditions[task.name]
                elif not may_fail and len(absent_before) == 1 and absent_before[0] in only_by:
                    only_by[task.name] = only_by[absent_before[0]]
            left = [task for task in left if task.name not in why]
        return cls(why, len(why), only_by)

    def before(self, task: TaskSpec, rule: RuleSpec, conditions: Mapping[str, Expression]) -> "Absences":
        """The same for a task's condition: how many answer in the end says nothing of those that have by then."""
        states = _states(rule, conditions, before=task.name) if self.why else None
        seen = None if states is None else tuple(state.among(task.after) for state in states)
        return replace(self, most=len(self.why), states=seen)


def _states(
    rule: RuleSpec, conditions: Mapping[str, Expression], *, before: str | None = None
) -> tuple[State, ...] | None:
    return states_of(rule, {name: syntax(each.text) for name, each in conditions.items()}, before=before)


def _has_fixed(task: TaskSpec) -> bool:
    return any(each.default is not None for each in task.fallback)


def _absence(task: TaskSpec, why: Mapping[str, str]) -> str | None:
    """Why the task may have no output, beside those that may have none already."""
    if task.need == "optional" and not _has_fixed(task):
        return "need is optional"
    if task.when is not None:
        return "its when may be false"
    before = [name for name in task.after if name in why]
    return f"it comes after {before[0]}, which may have none" if before else None


Served = Mapping[str, tuple[ModelVersionSpec, ...] | None]
"""The versions that can serve each task that an expression may look at; None where they are not known."""


def result_faults(expression: Expression, served: Served, absences: Absences, *, boolean: bool = False) -> list[str]:
    """Why ``expression`` fails for every answer that the tasks' versions can give, for every one of some version, or
    where a task has none; ``boolean``: or gives what is neither true nor false.

    Only what the documents prove is a fault: members named by a computed key and types of requests are not known.
    """
    named = expression.members("outputs")
    asked = {path for path, tested in named if tested}
    faults = []
    for path in dict.fromkeys(path for path, _ in named):
        task, output = path[0], path[1] if len(path) > 1 else None
        if task not in served:
            if any(map(is_unread, served)):
                continue
            faults.append(f"outputs.{task}: there is no task {task} (there is: {', '.join(served) or 'none'})")
            continue
        versions = served[task]
        if output is None or versions is None:
            continue
        lacking = [each for each in versions if all(contract.name != output for contract in each.outputs)]
        if len(lacking) == len(versions):
            have = ", ".join(dict.fromkeys(contract.name for each in versions for contract in each.outputs))
            faults.append(f"outputs.{task}.{output}: task {task} has no output {output} (there is: {have})")
        elif lacking and path[:2] not in asked and " in " not in expression.text:
            without = ", ".join(f"{each.model} {each.version}" for each in lacking)
            faults.append(
                f"outputs.{task}.{output}: {without} has no such output; ask has(outputs.{task}.{output}) first"
            )
    if faults:
        return faults
    if not expression.roots:
        said = None if boolean else _constant_unfit(expression)
        return [] if said is None else [said]
    faults += (
        f"outputs.{name}: task {name} may have no output ({absences.why[name]}), and the expression would fail: "
        f"write `has(outputs.{name}) ? … : …`, or `has(outputs.{name}) && …`"
        for name in _unguarded(expression, served, absences)
    )
    if faults or not set(expression.roots) <= _TRIED or None in served.values():
        return faults
    known = {task: versions for task, versions in served.items() if versions}
    for turn in range(max(map(len, known.values()), default=0)):
        outputs = {task: _sample(versions[turn % len(versions)]) for task, versions in known.items()}
        activation = Activation({"outputs": outputs, "path": "/"})
        said = _fault_on(expression, activation, boolean=boolean)
        if said is not None:
            return [said]
    whole = all(served.values()) and not any(map(is_unread, served))
    said = _always_failing(expression, known) if whole and expression.roots == ("outputs",) else None
    return [] if said is None else [said]


def _constant_unfit(expression: Expression) -> str | None:
    """Why a result that looks at nothing can be told to nobody."""
    try:
        said = unfit(expression.evaluate(Activation({})))
    except ExpressionFailed as error:
        return str(error)
    return None if said is None else f"gives {said}"


def _fault_on(expression: Expression, activation: Activation, *, boolean: bool) -> str | None:
    """Why the types that ``activation`` holds do not fit the expression, or what it gives does not fit its place."""
    try:
        value = expression.evaluate(activation)
    except ExpressionFailed as error:
        return str(error) if isinstance(error.__cause__, TypeError) else None
    if boolean:
        kind = f"gives {type(value).__name__}, and a condition is true or false; compare it with something"
        return None if isinstance(value, bool) else kind
    # Whether a number is finite depends on the answer; what kind of thing it is does not.
    said = None if isinstance(value, float) else unfit(value)
    return None if said is None else f"gives {said}"


def _always_failing(expression: Expression, served: Mapping[str, tuple[ModelVersionSpec, ...]]) -> str | None:
    """Why the expression fails for every answer that is tried; None where one makes it evaluate.

    Texts are not tried, for nobody knows which there may be.
    """
    asked = {path[0] for path, _ in expression.members("outputs")}
    first: str | None = None
    if any(each.datatype == "BYTES" for name in asked & served.keys() for each in served[name][0].outputs):
        return None
    for outputs in islice(_answers(served, numbers_in(expression.text)), _TRIALS_MAX):
        try:
            expression.evaluate(Activation({"outputs": outputs}))
        except ExpressionFailed as error:
            first = first or str(error)
        else:
            return None
    return first


def _unguarded(expression: Expression, served: Served, absences: Absences) -> list[str]:
    """The tasks that ``expression`` looks into although they may be absent then."""
    names = [path[0] for path, _ in expression.members("outputs")]
    at_risk = [name for name in dict.fromkeys(names) if name in absences.why and name in served]
    node = syntax(expression.text) if at_risk else None
    if node is None:
        return []
    if absences.states is not None:
        where = [(state, missing(node, state, served)) for state in absences.states]
        return [
            name
            for name in at_risk
            if any(
                _fails_without(name, expression, node, _those(served, state.present), absences)
                for state, _ in islice((each for each in where if name in each[1]), _STATES_TRIED_MAX)
            )
        ]
    conditions = {name: syntax(condition.text) for name, condition in absences.conditions.items()}
    unless = {name: condition for name, condition in conditions.items() if condition is not None}
    found = unguarded(node, "outputs", Absence(absences.why.keys(), absences.most, unless))
    return [
        name
        for name in at_risk
        if name in found and _fails_without(name, expression, node, _those(served, served.keys() - {name}), absences)
    ]


def _those(served: Served, names: Collection[str]) -> Served:
    return {name: versions for name, versions in served.items() if name in names}


def _fails_without(name: str, expression: Expression, node: Node, served: Served, absences: Absences) -> bool:
    """Whether ``expression``, which has no guard that syntax shows, does fail where of its tasks only ``served`` are
    there, for want of ``name``.

    Where its own or the absent task's condition may be a guard in other words, answers are tried: those at, below and
    above every number that is written in either. Where they cannot be tried, it is believed.
    """
    condition = absences.conditions.get(name)
    related = condition is not None and bool(set(condition.roots) & set(expression.roots) - {"path"})
    if not related and not whole_of(node, "outputs"):
        return True
    roots = {*expression.roots, *(condition.roots if condition is not None else ())}
    if not roots <= _TRIED or None in served.values():
        return False
    present = {task: versions for task, versions in served.items() if versions}
    written = [*numbers_in(expression.text), *(numbers_in(condition.text) if condition is not None else ())]
    for outputs in islice(_answers(present, written), _TRIALS_MAX):
        activation = Activation({"outputs": outputs, "path": "/"})
        try:
            if condition is not None and condition.evaluate(activation) is not False:
                continue
        except ExpressionFailed:
            continue
        try:
            expression.evaluate(activation)
        except ExpressionFailed as error:
            if isinstance(error.__cause__, KeyError) and error.__cause__.args == (name,):
                return True
    return False


_TRIED: Final = frozenset({"outputs", "path"})
_TRIALS_MAX: Final = 512
_STATES_TRIED_MAX: Final = 32


def _answers(served: Mapping[str, tuple[ModelVersionSpec, ...]], numbers: Iterable[float]) -> Iterator[dict[str, Any]]:
    """Answers of the tasks' first versions that tell the numbers that are written apart."""
    written = tuple(numbers)
    places = [(task, contract) for task, versions in served.items() for contract in versions[0].outputs]
    values = [_values(contract, written) for _, contract in places]
    for combination in product(*values):
        outputs: dict[str, Any] = {task: {} for task in served}
        for (task, contract), value in zip(places, combination, strict=True):
            outputs[task][contract.name] = value
        yield outputs


def _values(contract: OutputContract, written: Iterable[float]) -> list[Any]:
    match contract.datatype:
        case "BOOL":
            return [False, True]
        case "BYTES":
            return [""]
    whole = contract.datatype.startswith("INT")
    step = 1.0 if whole else 1e-6
    near = [0.5, *(number + way for number in written for way in (-step, 0.0, step))]
    low = -math.inf if contract.min is None else contract.min
    high = math.inf if contract.max is None else contract.max
    within = sorted({min(max(number, low), high) for number in near})
    return [int(number) for number in within] if whole else within


_SAMPLES: Final[Mapping[str, Any]] = {"BOOL": True, "BYTES": "", "FP32": 0.5, "FP64": 0.5}


def _sample(version: ModelVersionSpec) -> dict[str, Any]:
    """An answer of the types that ``version`` declares."""
    return {output.name: _SAMPLES.get(output.datatype, 1) for output in version.outputs}
