"""CEL expressions: bounded, compiled once, told plainly when they fail."""

import pytest

from app.domain.errors import ExpressionFailed
from app.domain.expressions import EXPRESSION_LENGTH_MAX, FUNCTIONS, compile_expression

ROOTS = ("path", "inputs", "metadata")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inputs.amount * 2.0", 21.0),
        ("has(inputs.colour)", False),
        ("'web' in metadata.channels", True),
        ("metadata.channels.all(c, size(c) > 1)", True),
        ("metadata.channels.filter(c, c != 'web').map(d, d + '!')", ["app!"]),
        ('inputs.amount > 10.0 ? "big" : "small"', "big"),
        ("path + '!'", "/a!"),
        ("1 < 2", True),
    ],
)
def test_values(text: str, expected: object) -> None:
    """The usual operators, macros and literals work on a request's values."""
    context = {"path": "/a", "inputs": {"amount": 10.5}, "metadata": {"channels": ["web", "app"]}}
    assert compile_expression(text, ROOTS).evaluate(context) == expected


def test_only_the_roots_that_are_named_are_converted() -> None:
    """A value that CEL cannot take does no harm to an expression that does not ask for it."""
    expression = compile_expression("inputs.amount > 1", ROOTS)
    assert expression.roots == ("inputs",)
    assert expression.evaluate({"inputs": {"amount": 2}, "metadata": object()}) is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inputs.", "inputs."),
        ("colour == 1", r"unknown name colour \(known here: path, inputs, metadata\)"),
        ("nofn(path)", r"unknown function nofn \(there is: bytes, contains"),
        ("path.lowerAscii() == ''", "unknown function lowerAscii"),
        ("1" * (EXPRESSION_LENGTH_MAX + 1), "characters"),
    ],
)
def test_refused_before_any_request(text: str, said: str) -> None:
    """Syntax, names and length are checked when the expression is compiled."""
    with pytest.raises(ExpressionFailed, match=said):
        compile_expression(text, ROOTS)


@pytest.mark.parametrize(
    "text",
    [
        "inputs.colour == 1",
        "inputs.amount * 2",
        "inputs.name < 1",
        "1 / 0 == 1",
        "[1][4] == 1",
        "inputs.size(1)",
        "-path",
    ],
)
def test_a_failing_evaluation_names_its_expression(text: str) -> None:
    """A missing member, mixed numbers, a division by zero: one kind of error, with the expression in it."""
    expression = compile_expression(text, ROOTS)
    with pytest.raises(ExpressionFailed) as caught:
        expression.evaluate({"path": "/a", "inputs": {"amount": 10.5, "name": "x"}, "metadata": {}})
    assert text in str(caught.value)


def test_every_function_that_is_offered_works() -> None:
    """The list of functions is the engine's own: each is called here."""
    calls = [
        "bytes('a')", "'ab'.contains('a')", "double(1)", "duration('1s')", "dyn(1)", "'ab'.endsWith('b')", "int('1')",
        "'ab'.matches('a.')", "size('ab')", "'ab'.startsWith('a')", "string(1)", "type(1)", "uint(1)",
    ]  # fmt: skip
    parts = sorted(name for name in FUNCTIONS if name.startswith("get"))
    calls += [f"timestamp('2026-01-02T03:04:05Z').{part}()" for part in parts]
    assert {name for name in FUNCTIONS if any(f"{name}(" in call for call in calls)} == FUNCTIONS
    for call in calls:
        compile_expression(call, ROOTS).evaluate({})
