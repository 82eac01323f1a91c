"""CEL expressions: bounded, compiled once, told plainly when they fail."""

import pytest

from app.domain.errors import ExpressionFailed
from app.domain.expressions import EXPRESSION_LENGTH_MAX, FUNCTIONS, Activation, compile_expression

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
    assert compile_expression(text, ROOTS).evaluate(Activation(context)) == expected


def test_only_the_roots_that_are_named_are_needed() -> None:
    """An expression says which roots it reads; what it does not ask for need not be there."""
    expression = compile_expression("inputs.amount > 1", ROOTS)
    assert expression.roots == ("inputs",)
    assert expression.evaluate(Activation({"inputs": {"amount": 2}})) is True


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
        "inputs.size() > path",
        "-path",
    ],
)
def test_a_failing_evaluation_names_its_expression(text: str) -> None:
    """A missing member, mixed numbers, a division by zero: one kind of error, with the expression in it."""
    expression = compile_expression(text, ROOTS)
    with pytest.raises(ExpressionFailed) as caught:
        expression.evaluate(Activation({"path": "/a", "inputs": {"amount": 10.5, "name": "x"}, "metadata": {}}))
    assert text in str(caught.value)


@pytest.mark.parametrize("text", ["double(inputs.a)", "size(inputs.b)"])
def test_a_value_that_a_function_does_not_take_is_told_as_that(text: str) -> None:
    """The function is there, so nobody is told that it is not."""
    expression = compile_expression(text, ("inputs",))
    with pytest.raises(ExpressionFailed, match=r"^(double|size)\(\) does not take a value of this type in: "):
        expression.evaluate(Activation({"inputs": {"a": [1], "b": 1}}))


def test_every_function_that_is_offered_works() -> None:
    """The list of functions is the engine's own: each is called here."""
    calls = [
        "bytes('a')", "'ab'.contains('a')", "double(1)", "duration('1s')", "dyn(1)", "'ab'.endsWith('b')", "int('1')",
        "'ab'.matches('a.')", "size('ab')", "'ab'.startsWith('a')", "string(1)", "type(1)", "uint(1)",
    ]  # fmt: skip
    calls += ["max([1.0])", "mean([1, 2])", "min([1])", "vote(['a'])", "weightedMean([1, 2], [3, 4])"]
    parts = sorted(name for name in FUNCTIONS if name.startswith("get"))
    calls += [f"timestamp('2026-01-02T03:04:05Z').{part}()" for part in parts]
    assert {name for name in FUNCTIONS if any(f"{name}(" in call for call in calls)} == FUNCTIONS
    for call in calls:
        compile_expression(call, ROOTS).evaluate(Activation({}))


def evaluated(text: str, **roots: object) -> object:
    return compile_expression(text, tuple(roots)).evaluate(Activation(roots))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("size(i.text)", 6),
        ("i.text.size() == 2", False),
        ('i.text.matches("^.{1,40}$") && !i.text.matches("^.{3,9}$")', True),
        ("9007199254740993 == 9007199254740992.0", True),
        ("-i.least == i.least", True),
        ("string(b'\\xff')", "\ufffd"),
        ("i.most == double(i.most)", True),
    ],
)
def test_where_cel_is_not_as_specified(text: str, expected: object) -> None:
    """What docs/routing.md says of the engine; an engine that mends one of them changes what expressions decide."""
    assert evaluated(text, i={"text": "ü😀", "least": -(2**63), "most": 2**63 - 1}) == expected


@pytest.mark.parametrize("text", ["0 - i.least", "i.most + 1", "i.least * -1", "i.least / -1"])
def test_whole_numbers_that_overflow_fail(text: str) -> None:
    """The way out of a negation that does not."""
    with pytest.raises(ExpressionFailed, match="overflow"):
        evaluated(text, i={"least": -(2**63), "most": 2**63 - 1})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mean([o.a.score, o.b.score])", 0.5),
        ("weightedMean([o.a.score, o.b.score], [3, 1])", 0.35),
        ("weightedMean([1, 2.0], [0, 5])", 2.0),
        ("max([o.a.score, o.b.score, 0])", 0.8),
        ("min([o.a.score, o.b.score])", 0.2),
        ("vote([o.a.says, o.b.says, o.c.says])", "refer"),
        ("vote(['b', 'a', 'a', 'b'])", "b"),
        ("vote([true, false, true])", True),
        ("mean([o.a, o.b].map(each, each.score)) < 0.6 && vote(['x']) == 'x'", True),
    ],
)
def test_ensembles(text: str, expected: object) -> None:
    """Means, extremes and votes over lists of outputs; of a tied vote the first named wins."""
    outputs = {
        "a": {"score": 0.2, "says": "approve"},
        "b": {"score": 0.8, "says": "refer"},
        "c": {"says": "refer"},
    }
    assert evaluated(text, o=outputs) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "mean([])",
        "mean(1.0)",
        "mean(['a'])",
        "max([true])",
        "min([])",
        "max({})",
        "vote([])",
        "vote('ab')",
        "vote([[1], [1]])",
        "weightedMean([1], [1, 2])",
        "weightedMean([1], [-1])",
        "weightedMean([1, 2], [0, 0])",
        "weightedMean([1])",
        "mean([1], [2])",
        "mean([o.missing])",
    ],
)
def test_an_ensemble_of_nothing_or_of_no_numbers_fails(text: str) -> None:
    """A helper that is given what it cannot use is a failure of its expression, never a guess."""
    with pytest.raises(ExpressionFailed, match=r"in: "):
        evaluated(text, o={})


def test_an_activation_serves_many_expressions_and_takes_more_roots() -> None:
    """What is known later (a result, outputs) is added; its newest value counts."""
    activation = Activation({"path": "/a"})
    outputs = compile_expression("outputs.pd > 0.5", ("outputs", "path"))
    with pytest.raises(ExpressionFailed, match="unknown name 'outputs'"):
        outputs.evaluate(activation)
    activation.add("outputs", {"pd": 0.7})
    assert outputs.evaluate(activation) is True
    activation.add("outputs", {"pd": 0.2})
    assert outputs.evaluate(activation) is False
    assert compile_expression("path + '/b'", ("path",)).evaluate(activation) == "/a/b"


def test_helpers_are_named_by_the_expressions_that_call_them() -> None:
    """Only what is called has to be there when an expression runs; a macro's variable may have a helper's name."""
    assert compile_expression("max([path.size()]) > min([1])", ROOTS).helpers == ("max", "min")
    assert compile_expression("path == ''", ROOTS).helpers == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inputs.a > 1", {"a": None}),
        ("inputs['a'].b == inputs [ \"a\" ] . c", {"a": {"b": None, "c": None}}),
        ("inputs.a.size() > inputs.b", {"a": None, "b": None}),
        ("'x-y' in inputs.a && inputs.a['x-y'] == 'z'", {"a": {"x-y": None}}),
        ("'a' + 'b' in inputs", None),
        ("'a' in inputs.c + []", {"c": None}),
        ("has(inputs.a) ? inputs.a : inputs", None),
        ("inputs[inputs.a] == 1", None),
        ("inputs[r'a'] == 1", None),
        ("inputs['a\\\\n'] == 1", None),
        ("inputs.all(k, k == 'a')", None),
        ("metadata.inputs == 1 && inputs.a == 1", {"a": None}),
        ("[metadata][0].inputs == 1 && inputs.a == 1", {"a": None}),
        ("metadata.list.exists(inputs, inputs.a == 1) && inputs.b", None),
        ("inputs.a == 'inputs' // inputs.b", {"a": None}),
        ("{'a': inputs}.a.b == 1", None),
    ],
)
def test_reach(text: str, expected: object) -> None:
    """Only what a text plainly names limits what it is given; anything else is given the whole."""
    assert compile_expression(text, ROOTS).reach("inputs") == expected


@pytest.mark.parametrize("text", ["mean([])", "vote([]) == 1", "weightedMean([1.0], [0.0]) > 1.0", "max(1.0)"])
def test_a_helper_that_fails_says_so_to_nobody_else(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The reason is the expression's, and the process's own output stays clean."""
    activation = Activation({})
    with pytest.raises(ExpressionFailed, match=text.partition("(")[0] + ": "):
        compile_expression(text, ()).evaluate(activation)
    assert compile_expression("mean([]) > 0.5 || true", ()).evaluate(activation) is True
    with pytest.raises(ExpressionFailed, match=r"^(?!.*mean)"):
        compile_expression("1 / 0", ()).evaluate(activation)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("inputs.l.map(i, inputs.l.map(j, j + i))", False),
        ("inputs.l.exists(i, size(inputs.m.filter(j, j > i)) > 0)", False),
        ("inputs.l.filter(i, i > 1).map(i, i * 2) == [2]", True),
        ('inputs.l.all(i, i != ".map(")', True),
        ("inputs.l.all(i, i > 0) && inputs.m.all(i, i > 0)", True),
    ],
)
def test_one_list_is_walked_at_a_time(text: str, allowed: bool) -> None:
    """Nested walks take the product of their lists' lengths, in which a worker does nothing else."""
    if allowed:
        compile_expression(text, ("inputs",))
        return
    with pytest.raises(ExpressionFailed, match="walk within a walk"):
        compile_expression(text, ("inputs",))
