"""CEL expressions: compiled once a revision, evaluated once a request, on only the names that they use.

The engine (common-expression-language, in Rust) converts its whole context at every run, so an expression is given
just the roots it names. Numbers do not mix in CEL (``5000 * 1.5`` fails where ``5000.0 * 1.5`` works), so callers
coerce by declared types first. Length is bounded, for CEL's macros nest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import cel

from app.domain.errors import ExpressionFailed

EXPRESSION_LENGTH_MAX: Final = 4_096
FUNCTIONS: Final = frozenset(
    {
        "bytes", "contains", "double", "duration", "dyn", "endsWith", "getDate", "getDayOfMonth", "getDayOfWeek",
        "getDayOfYear", "getFullYear", "getHours", "getMilliseconds", "getMinutes", "getMonth", "getSeconds", "int",
        "matches", "size", "startsWith", "string", "timestamp", "type", "uint",
    }
)  # fmt: skip
"""The functions that the engine has, beside operators and macros."""
_MACRO_VARIABLE: Final = re.compile(r"\.\s*(?:all|exists|exists_one|map|filter)\s*\(\s*([A-Za-z_][A-Za-z0-9_]*)\s*,")
_TOKEN: Final = re.compile(
    r"""(?: \s+ | //[^\n]* )
    | (?P<text> [bB]?[rR][bB]? (?: \"""[\s\S]*?\""" | \'\'\'[\s\S]*?\'\'\' | "[^"]*" | '[^']*' )
        | [bB]? (?: \"""(?:\\.|[^\\])*?\""" | \'\'\'(?:\\.|[^\\])*?\'\'\' | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' ) )
    | (?P<name> [A-Za-z_][A-Za-z0-9_]* )
    | (?P<mark> . )""",
    re.VERBOSE | re.DOTALL,
)
_OPERATOR: Final = re.compile(r"[^A-Za-z0-9_]")
_PLAIN_TEXT: Final = re.compile(r"""(["'])([A-Za-z0-9_]+)\1""")


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled CEL expression and which of the offered roots it reads."""

    text: str
    roots: tuple[str, ...]
    _program: Any = field(repr=False, compare=False)

    def members(self, root: str) -> tuple[tuple[tuple[str, ...], bool], ...]:
        """What the text names below ``root``, each once, and whether ``has()`` asks for it just there.

        Members named by a computed key are not among them.

        >>> compile_expression("has(a.b) && a['c'].d > 1.0", ("a",)).members("a")
        ((('b',), True), (('c', 'd'), False))
        """
        if root in _MACRO_VARIABLE.findall(self.text):
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

    def mistyped(self, context: Mapping[str, object]) -> str | None:
        """Why types that ``context`` holds do not fit the expression; None where it fails otherwise, or not at all."""
        try:
            self.evaluate(context)
        except ExpressionFailed as error:
            return str(error) if isinstance(error.__cause__, TypeError) else None
        return None

    def evaluate(self, context: Mapping[str, object]) -> object:
        """The expression's value in ``context`` (root name to JSON-like value).

        Raises:
            ExpressionFailed: an unknown name, a type mismatch, or any other failure of the evaluation.
        """
        try:
            return self._program.execute({root: context[root] for root in self.roots})
        except KeyError as error:
            raise ExpressionFailed(f"unknown name {error} in: {self.text}") from error
        except (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError) as error:
            raise ExpressionFailed(f"{error} in: {self.text}") from error


def compile_expression(text: str, roots: tuple[str, ...]) -> Expression:
    """Compile ``text``, which may name only ``roots``.

    Raises:
        ExpressionFailed: a syntax error, with CEL's line and column; a name that is not a root; a function
            that there is not; a text longer than the bound.

    >>> compile_expression("inputs.amount > 10.0", ("inputs", "metadata")).evaluate({"inputs": {"amount": 11.0}})
    True
    """
    if len(text) > EXPRESSION_LENGTH_MAX:
        raise ExpressionFailed(f"an expression has {len(text)} characters; {EXPRESSION_LENGTH_MAX} are allowed")
    try:
        program = cel.compile(text)
    except ValueError as error:
        raise ExpressionFailed(f"{error} in: {text}") from error
    # The engine lists a macro's own variable (the c of `all(c, ...)`) with the names that come from outside.
    named = set(program.variables()) - (set(_MACRO_VARIABLE.findall(text)) - set(roots))
    unknown = sorted(named - set(roots))
    if unknown:
        raise ExpressionFailed(f"unknown name {', '.join(unknown)} (known here: {', '.join(roots)}) in: {text}")
    # Operators are listed too, under names that no function can have.
    absent = sorted(name for name in program.functions() if name not in FUNCTIONS and _OPERATOR.search(name) is None)
    if absent:
        known = ", ".join(sorted(FUNCTIONS))
        raise ExpressionFailed(f"unknown function {', '.join(absent)} (there is: {known}) in: {text}")
    return Expression(text, tuple(root for root in roots if root in named), program)
