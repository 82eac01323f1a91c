"""Presence: what an expression can come to while some tasks have an output and others have none.

A rule's tasks are few, so the sets of them that can have answered together are enumerated, and an expression is
evaluated on each by abstract interpretation (Cousot and Cousot, 1977): whether a task is there is known, its values are
not, and every part comes to the set of what it may give. CEL fails where an absent task is looked into, unless
``false && failure`` or ``true || failure`` settles it, in either order.
"""

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from app.domain.expression_syntax import SIMPLE_TEXT, Node
from app.domain.route_documents import RuleSpec, TaskSpec

STATES_MAX: Final = 1_024
_KEPT_MAX: Final = 16
"""Values of one part that are told apart."""

Outcome = tuple[str, Any]
"""A kind, ``bool``, ``int``, ``float``, ``str``, ``any`` or ``missing``, and what it is: a value, or a task's name."""
_ANY: Final[Outcome] = ("any", None)
_TRUE: Final[Outcome] = ("bool", True)
_FALSE: Final[Outcome] = ("bool", False)
_KINDS: Final = {bool: "bool", int: "int", float: "float", str: "str"}
_OPERATORS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "+": operator.add, "-": operator.sub, "*": operator.mul,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class State:
    """Which tasks have an output, and which conditions of tasks therefore were true or false."""

    present: frozenset[str]
    known: Mapping[Node, bool]

    def among(self, names: Collection[str]) -> "State":
        """The same, of ``names`` only."""
        return State(self.present & frozenset(names), self.known)


def missing(node: Node, state: State, tasks: Collection[str]) -> frozenset[str]:
    """The ``tasks`` that are absent in ``state`` and that ``node`` may come to look into.

    >>> from app.domain.expression_syntax import syntax
    >>> guarded = syntax("has(outputs.b) || has(outputs.c) ? (has(outputs.b) ? outputs.b.p : outputs.c.p) : 0.0")
    >>> [sorted(missing(guarded, State(frozenset(each), {}), "bc")) for each in ("", "b", "c")]
    [[], [], []]
    >>> sorted(missing(syntax("has(outputs.b) ? outputs.c.p : 0.0"), State(frozenset("b"), {}), "bc"))
    ['c']
    """
    return frozenset(value for kind, value in _outcomes(node, state, tasks) if kind == "missing")


def states_of(
    rule: RuleSpec, conditions: Mapping[str, Node | None], *, before: str | None = None
) -> tuple[State, ...] | None:
    """What may be there where the rule's result is evaluated, or where the condition of the task ``before`` is.

    None where that are too many to tell apart, or where the order of the tasks is no order.
    """
    tasks = _ordered(rule.tasks)
    if tasks is None:
        return None
    if before is not None:
        wanted = _ancestors(rule.tasks, before)
        tasks = [task for task in tasks if task.name in wanted]
    whole = rule.join.policy == "all"
    states = [State(frozenset(), {})]
    for task in tasks:
        states = [after for state in states for after in _after(task, state, conditions, whole=whole)]
        if len(states) > STATES_MAX:
            return None
    least = 0 if whole or before is not None else rule.join.n or 1
    return tuple(state for state in states if len(state.present) >= least)


def _ordered(tasks: Sequence[TaskSpec]) -> list[TaskSpec] | None:
    """The tasks, each after those that it comes after; None where there is a circle or a name that is none."""
    left, done = list(tasks), dict[str, TaskSpec]()
    while left:
        free = [task for task in left if all(name in done for name in task.after)]
        if not free:
            return None
        done |= {task.name: task for task in free}
        left = [task for task in left if task.name not in done]
    return list(done.values())


def _ancestors(tasks: Iterable[TaskSpec], name: str) -> set[str]:
    after = {task.name: task.after for task in tasks}
    found: set[str] = set()
    left = list(after.get(name, ()))
    while left:
        each = left.pop()
        if each not in found:
            found.add(each)
            left += after.get(each, ())
    return found


def _after(task: TaskSpec, state: State, conditions: Mapping[str, Node | None], *, whole: bool) -> Iterable[State]:
    """What may be there once ``task`` has ended too."""
    absent = state
    there = State(state.present | {task.name}, state.known)
    fixed = task.need == "default" or any(each.default is not None for each in task.fallback)
    may_fail = not whole or (task.need == "optional" and not fixed)
    if task.when is None:
        if not all(name in state.present for name in task.after):
            return (absent, there) if fixed else (absent,)
        return (there, absent) if may_fail else (there,)
    node = conditions.get(task.name)
    ways = _outcomes(node, state.among(task.after), task.after) if node is not None else frozenset({_ANY})
    found: list[State] = []
    if ways - {_FALSE} and any(kind != "missing" for kind, _ in ways - {_FALSE}):
        known = {**state.known, **_follows(node, True)}
        found.append(State(there.present, known))
        if may_fail:
            found.append(State(absent.present, known))
    if _FALSE in ways or _ANY in ways:
        found.append(State(absent.present, {**state.known, **_follows(node, False)}))
    if any(kind == "missing" for kind, _ in ways):
        # Its condition fails, which is a fault of its own; what else is wrong where it is absent is to be told too.
        found.append(there if fixed else absent)
    return found


def _follows(node: Node | None, value: bool) -> dict[Node, bool]:
    """What is known where a condition was ``value``."""
    if node is None or node.kind == "literal":
        return {}
    if node.kind == "not":
        return {node: value, **_follows(node.parts[0], not value)}
    known = {node: value}
    if (node.kind == "and" and value) or (node.kind == "or" and not value):
        for part in node.parts:
            known |= _follows(part, value)
    return known


# --- evaluation -------------------------------------------------------------------------------------------------------


def _outcomes(node: Node, state: State, tasks: Collection[str]) -> frozenset[Outcome]:
    if node in state.known:
        return frozenset({("bool", state.known[node])})
    match node.kind:
        case "literal":
            return frozenset({_literal(node.names[0])})
        case "has" | "in" if (asked := _asked(node, tasks)) is not None:
            return frozenset({("bool", asked in state.present)})
        case "has":
            (looked,) = node.parts
            # Only what is looked into must be there: has(outputs.a.p) fails without a.
            below = looked.parts if looked.kind == "member" else (looked,)
            return _strict([_outcomes(each, state, tasks) for each in below])
        case "path":
            within = len(node.names) > 1 and node.names[0] == "outputs" and node.names[1] in tasks
            return frozenset({("missing", node.names[1]) if within and node.names[1] not in state.present else _ANY})
        case "not":
            negated = {_TRUE: _FALSE, _FALSE: _TRUE}
            return frozenset(negated.get(each, each) for each in _outcomes(node.parts[0], state, tasks))
        case "and" | "or":
            return _chain(node, state, tasks)
        case "if":
            condition = _outcomes(node.parts[0], state, tasks)
            found = {each for each in condition if each[0] == "missing"}
            for value, part in ((_TRUE, node.parts[1]), (_FALSE, node.parts[2])):
                if value in condition or _ANY in condition:
                    found |= _outcomes(part, state, tasks)
            return _bounded(found)
        case "size()" | ".size" if node.parts == (Node("path", (), ("outputs",)),):
            return frozenset({("int", len(state.present))})
        case _:
            parts = [_outcomes(part, state, tasks) for part in node.parts]
            return _computed(node.kind, *parts) if node.kind in _OPERATORS and len(parts) == 2 else _strict(parts)


def _literal(word: str) -> Outcome:
    if word in ("true", "false"):
        return ("bool", word == "true")
    text = SIMPLE_TEXT.fullmatch(word)
    if text is not None:
        return ("str", text[2])
    try:
        return ("int", int(word))
    except ValueError:
        pass
    try:
        return ("float", float(word))
    except ValueError:
        return _ANY


def _asked(node: Node, tasks: Collection[str]) -> str | None:
    """The task whose presence ``node`` is."""
    if node.kind == "has" and node.parts[0].kind == "path":
        names = node.parts[0].names
        return names[1] if len(names) == 2 and names[0] == "outputs" and names[1] in tasks else None
    if node.kind == "in" and node.parts[1] == Node("path", (), ("outputs",)) and node.parts[0].kind == "literal":
        keyed = SIMPLE_TEXT.fullmatch(node.parts[0].names[0])
        return keyed[2] if keyed and keyed[2] in tasks else None
    return None


def _chain(node: Node, state: State, tasks: Collection[str]) -> frozenset[Outcome]:
    """A conjunction or disjunction, which one operand can settle whatever becomes of the others."""
    settled = _FALSE if node.kind == "and" else _TRUE
    own = set(node.parts)
    for condition, value in state.known.items():
        # `a && b && c` is false where `a && b` was.
        if condition.kind == node.kind and ("bool", value) == settled and set(condition.parts) <= own:
            return frozenset({settled})
    parts = [_outcomes(part, state, tasks) for part in node.parts]
    found: set[Outcome] = set()
    if any(settled in part or _ANY in part for part in parts):
        found.add(settled)
    if all(part - {settled} for part in parts):
        # No operand need settle it.
        found |= {each for part in parts for each in part if each[0] == "missing"}
        if all(any(kind != "missing" for kind, _ in part - {settled}) for part in parts):
            found.add(_TRUE if settled == _FALSE else _FALSE)
    return frozenset(found)


def _computed(kind: str, left: frozenset[Outcome], right: frozenset[Outcome]) -> frozenset[Outcome]:
    found: set[Outcome] = set()
    for one in left:
        for other in right:
            if one[0] == "missing" or other[0] == "missing":
                found |= {each for each in (one, other) if each[0] == "missing"}
            elif one[0] == other[0] and (one[0] in ("int", "float") or kind in ("==", "!=")) and one != _ANY:
                value = _OPERATORS[kind](one[1], other[1])
                found.add((_KINDS[type(value)], value))
            else:
                found.add(_ANY)
    return _bounded(found)


def _strict(parts: Iterable[frozenset[Outcome]]) -> frozenset[Outcome]:
    """What fails where a part of it does."""
    failing: set[Outcome] = set()
    whole = True
    for part in parts:
        failing |= {each for each in part if each[0] == "missing"}
        whole &= any(kind != "missing" for kind, _ in part)
    return frozenset(failing | {_ANY} if whole else failing)


def _bounded(found: set[Outcome]) -> frozenset[Outcome]:
    if len(found) <= _KEPT_MAX:
        return frozenset(found)
    return frozenset({each for each in found if each[0] == "missing"} | {_ANY})
