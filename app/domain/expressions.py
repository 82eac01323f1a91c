"""CEL expressions: compiled once a revision, evaluated on values that are converted once a request.

Converting a request's values costs the engine (common-expression-language, in Rust) forty times what evaluating an
expression on them does, so a request has one ``Activation`` for all rules, conditions and results, which converts only
what they look at, and each once (``expression_looks``). Numbers do not mix in CEL (``5000 * 1.5`` fails where
``5000.0 * 1.5`` works), so callers coerce by declared types first. An evaluation cannot be interrupted, so what it may
cost is bounded: by what is written (``expression_bounds``) and by how much is seen (``expression_sizes``).

Beside CEL's own there are functions for ensembles: ``mean``, ``weightedMean``, ``max``, ``min`` and ``vote``.
"""

import datetime
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import cel

from app.domain.errors import ExpressionFailed, raised
from app.domain.expression_bounds import NOTHING_BESIDE, Beside, beside_walks, costs_too_much
from app.domain.expression_looks import ABSENT, OWN_PREFIX, Look, hoisted, value_at
from app.domain.expression_sizes import SEEN_MAX, lookup_fault, single_fault, table_fault, too_large, weight
from app.domain.expression_syntax import BRACKETS_MAX, DEPTH_MAX, TEXT_PATTERN, Node, syntax, walk_variables

EXPRESSION_LENGTH_MAX: Final = 4_096
_CEL_FUNCTIONS: Final = frozenset(
    {
        "bytes", "contains", "double", "duration", "dyn", "endsWith", "getDate", "getDayOfMonth", "getDayOfWeek",
        "getDayOfYear", "getFullYear", "getHours", "getMilliseconds", "getMinutes", "getMonth", "getSeconds", "int",
        "matches", "size", "startsWith", "string", "timestamp", "type", "uint",
    }
)  # fmt: skip
"""The functions that the engine has, beside operators and macros."""


def _numbers(values: object) -> list[float]:
    if not isinstance(values, Sequence) or not values or any(type(value) not in (int, float) for value in values):
        raise ValueError("a list of numbers is wanted, with one at least")
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("NaN and infinity are no numbers to reckon with")
    return numbers


def _mean(values: object) -> float:
    return _weighted_mean(values, [1.0] * len(_numbers(values)))


def _weighted_mean(values: object, weights: object) -> float:
    """The weighted arithmetic mean."""
    each, counted = _numbers(values), _numbers(weights)
    if len(each) != len(counted) or min(counted) < 0 or sum(counted) <= 0:
        raise ValueError("as many weights as values are wanted, none below 0, and not all 0")
    return sum(value * weight for value, weight in zip(each, counted, strict=True)) / sum(counted)


def _vote(values: object) -> object:
    """What most of a list says; of those said as often, the one that was said first."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not values:
        raise ValueError("a list is wanted, with one vote at least")
    if any(isinstance(value, list | Mapping) for value in values):
        raise ValueError("a vote is text, a number, true or false, and no list or object")
    return Counter(values).most_common(1)[0][0]


HELPERS: Final[Mapping[str, Callable[..., object]]] = {
    "max": lambda values: max(_numbers(values)),
    "mean": _mean,
    "min": lambda values: min(_numbers(values)),
    "vote": _vote,
    "weightedMean": _weighted_mean,
}
"""Functions for ensembles, over lists."""
_NO_OVERLOAD: Final = re.compile(r"Undefined variable or function: '(\w+)'")
FUNCTIONS: Final = _CEL_FUNCTIONS | HELPERS.keys()
"""Every function that an expression may call."""
_ARGUMENTS: Final[Mapping[str, int]] = {
    **dict.fromkeys(FUNCTIONS, 1),
    **dict.fromkeys(("contains", "endsWith", "matches", "startsWith", "weightedMean"), 2),
}
"""How many values each takes, what stands before its dot among them."""
_CONVERTED: Final = {
    "double": "numbers are written as double('1.5')",
    "duration": "durations have h, m, s, ms, us and ns, as duration('720h') for 30 days",
    "int": "whole numbers are written as int('15'), of 64 bits",
    "timestamp": "timestamps are as RFC 3339 has them, as timestamp('2024-01-01T00:00:00Z')",
    "uint": "whole numbers from 0 on are written as uint('15'), of 64 bits",
}
"""What text each conversion takes."""
_TOKEN: Final = re.compile(
    rf"""(?: \s+ | //[^\n]* )
    | (?P<text> {TEXT_PATTERN} )
    | (?P<name> [A-Za-z_][A-Za-z0-9_]* )
    | (?P<mark> . )""",
    re.VERBOSE | re.DOTALL,
)
_TEXTS: Final = re.compile(TEXT_PATTERN, re.VERBOSE | re.DOTALL)
_ASSIGNED: Final = re.compile(r"(?<![=!<>])=(?!=)")
_OPERATOR: Final = re.compile(r"[^A-Za-z0-9_]")
_PLAIN_TEXT: Final = re.compile(r"""(["'])([A-Za-z0-9_]+)\1""")
_SIMPLE_TEXT: Final = re.compile(r"""(["'])([^"'\\\n]*)\1""")
_PARSE_ERROR: Final = re.compile(r"ERROR: <input>:(\d+:\d+: [^\n]*)")
_SHOWN_LENGTH_MAX: Final = 300
_TOO_DEEP: Final = "Recursion limit"
"""What the engine says of an expression that is nested too deep for it."""
_UNREADABLE: Final = (
    f"its cost cannot be told from how this is written: write it more plainly, with at most {BRACKETS_MAX} "
    f"brackets within one another and {DEPTH_MAX} terms in a sum"
)
_COMPILED_KEPT: Final = 2_048
"""Expressions that are kept: a registry of thousands of routes asks the same in many, and the next revision in most."""
_BEGINS: Final = frozenset({"", "(", "[", ",", "?", ":", "&", "|"})
_ENDS: Final = frozenset({"", ")", "]", ",", "?", ":", "&", "|"})
"""What stands around a relation that is an operand by itself, such as ``"a" in b``."""

Reach = Mapping[str, "Reach | None"] | None
"""Which members of a value can be looked at, and of those which; None: any."""


_FAILED: Final = object()
"""What a helper gives that fails: the engine has no such value, so the call fails as CEL's own errors do."""


class Activation:
    """Values by root, for every expression that is evaluated on them; what one looks at is converted once for all.

    What is too large is not converted, and fails only the expressions that look at it.
    """

    __slots__ = ("_context", "_helpers", "_refused", "_said", "_seen", "_values")

    def __init__(self, values: Mapping[str, object], helpers: Iterable[str] = HELPERS) -> None:
        self._values = dict(values)
        self._helpers = tuple(helpers)
        self._refused: str | None = None
        self._begin()

    def _begin(self) -> None:
        """Anew, with nothing converted."""
        self._said: dict[Look, str | None] = {}
        self._seen = 0
        self._context = cel.Context({})
        for name in self._helpers:
            self._context.add_function(name, self._guarded(name))

    def _guarded(self, name: str) -> Callable[..., object]:
        """The helper, which says why it fails to ``run``: an exception would have the engine write to stderr itself."""

        def call(*arguments: object) -> object:
            try:
                return HELPERS[name](*arguments)
            except (ValueError, TypeError, ArithmeticError) as error:
                self._refused = f"{name}: {error}"
                return _FAILED

        return call

    def add(self, root: str, value: object) -> None:
        """Set one more root, or another value of one."""
        self._seen = 0
        before = [look for look in self._said if look.path[0] == root]
        self._values[root] = value
        if any(look.at(self._values) is ABSENT for look in before):
            # The engine forgets no variable.
            self._begin()
        for look in before:
            self._said.pop(look, None)

    def _convert(self, look: Look) -> str | None:
        """Have the engine see what ``look`` finds; gives why it may not, as where it is too large."""
        value = look.at(self._values)
        if value is ABSENT:
            return None
        path = look.path[:-1] if look.asked else look.path
        said, count = None, weight(value)
        if count is None:
            said = too_large(path, value)
        elif self._seen + count > SEEN_MAX:
            said = f"{'.'.join(path)} and what else is looked at have more than {SEEN_MAX} values in all: look at less"
        else:
            self._seen += count
            try:
                self._context.add_variable(look.variable, value)
            except (ValueError, TypeError, OverflowError):
                said = f"{'.'.join(path)} has what is no JSON, which no expression sees"
        self._said[look] = said
        return said

    def oversize(self, expression: "Expression") -> str | None:
        """What is too large of what ``expression`` looks at, or cannot be seen; None where nothing is."""
        for look in expression.looks:
            said = self._said[look] if look in self._said else self._convert(look)
            if said is not None:
                return said
        beside = expression.beside
        if beside is NOTHING_BESIDE:
            return None
        faults = ((single_fault, beside.singles), (table_fault, beside.tables), (lookup_fault, beside.looked_up))
        for fault, paths in faults:
            for path in paths:
                said = fault(value_at(path, self._values))
                if said is not None:
                    return f"{'.'.join(path)} {said}"
        return None

    def run(self, expression: "Expression", program: Any) -> object:
        """The value of ``expression``, which is compiled as ``program``."""
        for root in expression.roots:
            if root not in self._values:
                raise KeyError(root)
        self._refused = None
        try:
            return program.execute(self._context)
        except RuntimeError as error:
            undefined = _NO_OVERLOAD.match(str(error))
            for look in expression.looks:
                if undefined is not None and undefined[1] == look.variable:
                    raise look.failure(self._values) from error
            # A helper's failure is what the engine cannot take as a value. Its own words may be lines, with drawings.
            said = " ".join(str(error).split()) if self._refused is None else self._refused
            raise RuntimeError(said) from error


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled CEL expression, which of the offered roots it reads, and which helpers it calls."""

    text: str
    roots: tuple[str, ...]
    helpers: tuple[str, ...]
    variables: frozenset[str]
    beside: Beside
    looks: tuple[Look, ...]
    _program: Any = field(repr=False, compare=False)

    def members(self, root: str) -> tuple[tuple[tuple[str, ...], bool], ...]:
        """What the text names below ``root``, each once, and whether ``has()`` asks for it just there.

        Members named by a computed key are not among them.

        >>> compile_expression("has(a.b) && a['c'].d > 1.0", ("a",)).members("a")
        ((('b',), True), (('c', 'd'), False))
        """
        if root in self.variables:
            return ()
        tokens = [match for match in _TOKEN.finditer(self.text) if match.lastgroup]
        words = [match[0] for match in tokens] + [""] * 3
        found: dict[tuple[tuple[str, ...], bool], None] = {}
        for start, token in enumerate(tokens):
            if token.lastgroup != "name" or token[0] != root or (start and words[start - 1] == "."):
                continue
            path: list[str] = []
            at = start + 1
            while True:
                keyed = _PLAIN_TEXT.fullmatch(words[at + 1]) if words[at] == "[" and words[at + 2] == "]" else None
                if keyed is not None:
                    path.append(keyed[2])
                    at += 3
                elif words[at] == "." and words[at + 2] != "(":
                    path.append(words[at + 1])
                    at += 2
                else:
                    break
            tested = start > 1 and words[start - 2 : start] == ["has", "("] and words[at] == ")"
            if path:
                found[tuple(path), tested] = None
        return tuple(found)

    def reach(self, root: str) -> Reach:
        """Which members of ``root`` the expression can look at, whatever they hold.

        >>> compile_expression('a.b.c > 1 && "x-y" in a.d && a.e.all(f, f)', ("a",)).reach("a")
        {'b': {'c': None}, 'd': {'x-y': None}, 'e': None}
        >>> compile_expression("size(a) > 1", ("a",)).reach("a") is None
        True
        """
        if root in self.variables:
            return None
        tokens = [match for match in _TOKEN.finditer(self.text) if match.lastgroup]
        # Padded at both ends, so that neighbours can be asked for without looking where the text ends.
        words = ["", "", "", *(match[0] for match in tokens), "", "", ""]
        reach: Reach = {}
        for start, token in enumerate(tokens, 3):
            if token.lastgroup != "name" or token[0] != root:
                continue
            if words[start - 1] == "." and (words[start - 2][-1:].isalnum() or words[start - 2][-1:] in set("_)]\"'")):
                continue  # a member of something else
            path = _path_after(words, start)
            tested = _SIMPLE_TEXT.fullmatch(words[start - 2]) if words[start - 1] == "in" else None
            if tested is not None and words[start - 3] in _BEGINS and words[_end_after(words, start)] in _ENDS:
                path = (*path, tested[2])
            reach = joined(reach, _chain(path))
        return reach or None

    def mistyped(self, activation: Activation) -> str | None:
        """Why types that ``activation`` holds do not fit the expression; None where it fails otherwise or never."""
        try:
            self.evaluate(activation)
        except ExpressionFailed as error:
            return str(error) if isinstance(error.__cause__, TypeError) else None
        return None

    def evaluate(self, activation: Activation) -> object:
        """The expression's value on ``activation``'s JSON-like values.

        Raises:
            ExpressionFailed: an unknown name, a type mismatch, what is too large to look at, or any other failure of
                the evaluation.
        """
        said = activation.oversize(self)
        if said is not None:
            raise ExpressionFailed(f"{said} in: {self.text}")
        try:
            return activation.run(self, self._program)
        except KeyError as error:
            raise ExpressionFailed(f"unknown name {error} in: {self.text}") from error
        except (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError) as error:
            raise ExpressionFailed(f"{_told(str(error))} in: {self.text}") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # A panic of the engine is no Exception in Python. Nothing waits in here, so no cancellation can be meant.
            raise ExpressionFailed(f"{raised(error)} in: {self.text}") from error


def _told(said: str) -> str:
    """What the engine says, but of a function that has no such overload, which to the engine does not exist."""
    found = _NO_OVERLOAD.match(said)
    return said if found is None or found[1] not in FUNCTIONS else f"{found[1]}() does not take a value of this type"


def _end_after(words: Sequence[str], start: int) -> int:
    """Where the members named behind the word at ``start`` end."""
    at = start + 1
    while True:
        if words[at] == "[" and words[at + 2] == "]" and _SIMPLE_TEXT.fullmatch(words[at + 1]):
            at += 3
        elif words[at] == "." and words[at + 1].isidentifier() and words[at + 2] != "(":
            at += 2
        else:
            return at


def _path_after(words: Sequence[str], start: int) -> tuple[str, ...]:
    """The members named behind the word at ``start``, each a member of the one before."""
    named = words[start + 1 : _end_after(words, start)]
    return tuple(word.strip("\"'") for word in named if word not in (".", "[", "]"))


def _chain(path: Sequence[str]) -> Reach:
    reach: Reach = None
    for name in reversed(path):
        reach = {name: reach}
    return reach


def joined(one: Reach, other: Reach) -> Reach:
    """What can be looked at by one or by the other.

    >>> joined({"a": {"b": None}}, {"a": {"c": None}, "d": None})
    {'a': {'b': None, 'c': None}, 'd': None}
    """
    if one is None or other is None:
        return None
    both = {**one, **other}
    return {name: joined(one[name], other[name]) if name in one and name in other else both[name] for name in both}


def _first_error(said: str) -> str:
    """The engine's first error, with line and column, without the text that it draws below."""
    found = _PARSE_ERROR.search(said)
    return found[1][:_SHOWN_LENGTH_MAX] if found else said[:_SHOWN_LENGTH_MAX]


@lru_cache(maxsize=_COMPILED_KEPT)
def compile_expression(text: str, roots: tuple[str, ...]) -> Expression:
    """Compile ``text``, which may name only ``roots``; what was compiled of late is not compiled again.

    Raises:
        ExpressionFailed: a syntax error, with CEL's line and column; a name that is not a root; a function
            that there is not; a text longer than the bound.

    >>> activation = Activation({"inputs": {"amount": 11.0}})
    >>> compile_expression("inputs.amount > 10.0", ("inputs", "metadata")).evaluate(activation)
    True
    """
    if len(text) > EXPRESSION_LENGTH_MAX:
        raise ExpressionFailed(f"an expression has {len(text)} characters; {EXPRESSION_LENGTH_MAX} are allowed")
    try:
        program = cel.compile(text)
    except ValueError as error:
        if _TOO_DEEP in str(error):
            raise ExpressionFailed(f"{_UNREADABLE} in: {text[:_SHOWN_LENGTH_MAX]}") from error
        meant = " (equality is written ==)" if _ASSIGNED.search(_TEXTS.sub("", text)) else ""
        raise ExpressionFailed(f"{_first_error(str(error))}{meant} in: {text[:_SHOWN_LENGTH_MAX]}") from error
    node = syntax(text)
    if node is None:
        raise ExpressionFailed(f"{_UNREADABLE} in: {text}")
    # The engine lists a macro's own variable (the c of `all(c, ...)`) with the names that come from outside.
    variables = walk_variables(node)
    named = set(program.variables()) - (variables - set(roots))
    unknown = sorted(named - set(roots))
    if unknown:
        raise ExpressionFailed(f"unknown name {', '.join(unknown)} (known here: {', '.join(roots)}) in: {text}")
    # Operators are listed too, under names that no function can have.
    absent = sorted(name for name in program.functions() if name not in FUNCTIONS and _OPERATOR.search(name) is None)
    if absent:
        known = ", ".join(sorted(FUNCTIONS))
        raise ExpressionFailed(f"unknown function {', '.join(absent)} (there is: {known}) in: {text}")
    if FUNCTIONS & set(program.functions()):
        for said in _calls_that_fail(node):
            raise ExpressionFailed(f"{said} in: {text}")
    costly = costs_too_much(node)
    if costly is not None:
        raise ExpressionFailed(f"{costly} in: {text}")
    own = sorted(name for name in variables if name.startswith(OWN_PREFIX))
    if own:
        raise ExpressionFailed(f"{own[0]}: names that begin with {OWN_PREFIX} are taken; call it otherwise in: {text}")
    helpers = tuple(sorted(HELPERS.keys() & set(program.functions())))
    read = tuple(root for root in roots if root in named)
    without_paths, looks = hoisted(text, node, read)
    return Expression(text, read, helpers, variables, beside_walks(node), looks, cel.compile(without_paths))


def _calls_that_fail(node: Node) -> Iterator[str]:
    """Calls that fail whatever is looked at: too many or too few values, patterns that are none, texts that cannot be
    converted, weights that are not as many as what they weigh."""
    for part in node.parts:
        yield from _calls_that_fail(part)
    if not (node.kind.startswith(".") or node.kind.endswith("()")):
        return
    name, given = node.kind.strip(".()"), len(node.parts)
    wanted = _ARGUMENTS.get(name)
    if wanted is not None and given != wanted:
        in_list = f": a list, as {name}([a, b])" if name in HELPERS and wanted == 1 else ""
        yield f"{name} takes {wanted} value{'s' * (wanted > 1)}, not {given}{in_list}"
    elif name == "matches" and node.parts[1].kind == "literal":
        failure = _failure(f'"".matches({node.parts[1].names[0]})')
        if failure is not None:
            lines = [line.strip() for line in str(failure).splitlines()]
            why = next((line for line in lines if line.startswith("error:")), lines[0])
            yield f"matches: {node.parts[1].names[0]} is no regular expression ({why.split('. ')[0]})"
    elif name in _CONVERTED and node.parts[0].kind == "literal":
        call = f"{name}({node.parts[0].names[0]})"
        if _failure(call) is not None:
            yield f"{call[:_SHOWN_LENGTH_MAX]} always fails: {_CONVERTED[name]}"
    elif name == "weightedMean" and all(part.kind == "list" for part in node.parts):
        values, weights = (len(part.parts) for part in node.parts)
        if values != weights:
            yield f"weightedMean weighs {values} values by {weights} weights; write as many"


def _failure(text: str) -> BaseException | None:
    """How a text that looks at nothing fails; None where it does not."""
    try:
        cel.compile(text).execute(cel.Context({}))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of the engine is no Exception in Python
        return error
    return None


def unfit(value: object) -> str | None:
    """Why a value cannot be in a reply's JSON; None where it can."""
    match value:
        case None | bool() | int() | str() | datetime.datetime():
            # A timestamp is told as RFC 3339 writes it.
            return None
        case float():
            return None if math.isfinite(value) else "NaN or infinity, which JSON cannot hold"
        case Mapping():
            if not all(isinstance(name, str) for name in value):
                return "an object whose keys are not text, which JSON cannot hold"
            return next((said for said in map(unfit, value.values()) if said is not None), None)
        case list() | tuple():
            return next((said for said in map(unfit, value) if said is not None), None)
        case datetime.timedelta():
            return "a duration, which JSON cannot hold; write string(…)"
        case _:
            return f"{type(value).__name__}, which JSON cannot hold"
