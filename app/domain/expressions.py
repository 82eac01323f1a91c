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
_MACRO_VARIABLE: Final = re.compile(r"\.\s*(?:all|exists|exists_one|map|filter)\s*\(\s*([A-Za-z_][A-Za-z0-9_]*)\s*,")


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled CEL expression and which of the offered roots it reads."""

    text: str
    roots: tuple[str, ...]
    _program: Any = field(repr=False, compare=False)

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
        ExpressionFailed: a syntax error, with CEL's line and column; a name that is not a root; a text longer
            than the bound.

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
    return Expression(text, tuple(root for root in roots if root in named), program)
