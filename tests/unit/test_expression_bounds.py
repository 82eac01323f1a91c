"""What expressions may cost: how much they see, and what a walk may do at each step."""

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest

from app.domain.errors import ExpressionFailed
from app.domain.expression_bounds import ENSEMBLES
from app.domain.expression_sizes import LIST_LENGTH_MAX, TEXT_LENGTH_MAX
from app.domain.expressions import HELPERS, Activation, Expression, compile_expression

ROOTS = ("inputs", "metadata")


def compiled(text: str) -> Expression:
    return compile_expression(text, ROOTS)


def evaluated(text: str, inputs: Mapping[str, Any], **metadata: Any) -> object:
    return compiled(text).evaluate(Activation({"inputs": inputs, "metadata": metadata}))


def test_every_function_for_ensembles_is_counted() -> None:
    """A new one has a cost, too."""
    assert HELPERS.keys() == ENSEMBLES


def test_a_list_of_the_greatest_length_is_walked() -> None:
    """The bound itself is allowed."""
    assert evaluated("inputs.items.filter(i, i > 0.5).size() == 0", {"items": [0.0] * LIST_LENGTH_MAX}) is True


@pytest.mark.parametrize(
    ("text", "inputs", "said"),
    [
        ("size(inputs.items) > 1", {"items": [1] * 501}, "items has 501 elements; an expression sees at most 500"),
        ("inputs.a.exists(k, k == 'x')", {"a": {str(n): n for n in range(501)}}, "inputs.a has 501 members"),
        ("size(inputs) > 1", {"a": {"items": [1] * 501}}, "inputs.a.items has 501 elements"),
        ("size(inputs) > 1", {str(n): n for n in range(501)}, "inputs has 501 members"),
        ("inputs.a[0].b == 1", {"a": [{"b": [1] * 501}]}, "inputs.a holds what has 501 elements"),
        ("inputs.d != inputs.d", {"d": {str(n): [1] * 20 for n in range(400)}}, "inputs.d has 8400 values in it"),
        ("inputs.s == ''", {"s": "𐐀" * 2_501}, "inputs.s has 10004 bytes; an expression sees at most 10000"),
        ("inputs.s == ''", {"s": "x" * (TEXT_LENGTH_MAX + 1)}, "inputs.s has 10001 bytes"),
        ("inputs.a.all(i, i.b == 1)", {"a": [{"b": 1, "c": 1}] * 300}, "300 elements with 1800 values .* at most 833"),
    ],
)  # fmt: skip
def test_what_is_too_large_is_named(text: str, inputs: Mapping[str, Any], said: str) -> None:
    """The list, how long it is, and how long it may be."""
    with pytest.raises(ExpressionFailed, match=said):
        evaluated(text, inputs)


def test_only_what_an_expression_looks_at_counts() -> None:
    """A long list for a model fails no expression that looks elsewhere, on the same values."""
    inputs = {"items": [1] * 5_000, "deep": {"vector": [0.5] * 5_000, "a": 1}, "amount": 2}
    activation = Activation({"inputs": inputs})
    assert compiled("inputs.amount > 1 && inputs.deep.a == 1").evaluate(activation) is True
    with pytest.raises(ExpressionFailed, match=r"inputs\.deep\.vector has 5000 elements"):
        compiled("size(inputs.deep.vector) > 1").evaluate(activation)
    activation.add("inputs", {"items": [1]})
    assert compiled("size(inputs.items)").evaluate(activation) == 1


def test_an_object_with_many_members_is_looked_into_by_name() -> None:
    """Only those who go through its members are bounded."""
    outputs = {str(n): n for n in range(5_000)} | {"p": 0.5}
    assert evaluated("inputs.o.p < 1.0", {"o": outputs}) is True


@pytest.mark.parametrize(
    "text",
    [
        "inputs.l.filter(i, " + " || ".join(["i in inputs.others"] * 5) + ")",
        "inputs.l.all(i, size(inputs.a) + size(inputs.b) + inputs.c.size() + mean(inputs.d) + inputs.e[0] > 1)",
        "inputs.l.exists(i, inputs.l.exists(j, j == i))",
        "inputs.l.exists(i, i.m.exists(j, i.limit > j))",
        "inputs.l.exists(i, i.m.exists(j, j in inputs.others))",
        "inputs.l.exists(i, i.m.exists(j, j.n.exists(k, k > 1)))",
        "inputs.l.exists(i, i.m.filter(j, j > 1).exists(j, j > 1))",
        "inputs.l.exists(i, i.m.all(j, j > 1) || i.n.all(j, j > 1) || i.o.all(j, j > 1))",
        "inputs.l.exists(i, i.m.all(j, " + " && ".join(["j > 1"] * 21) + "))",
        "inputs.l.exists(i, " + " || ".join(["max([i]) > 1"] * 11) + ")",
        " || ".join(["vote(inputs.l) == 1"] * 51),
        "inputs.l.map(i, i + i + i + i)",
        "inputs.l.filter(i, size(" + " + ".join(["i"] * 12) + ") > 1)",
        "inputs.l.all(i, i.m.map(j, j + j + j + j).size() > 1)",
        "(inputs.l + inputs.l).map(i, i)",
        "inputs.l.map(i, [i, i])",
        "inputs.l.map(i, i > 1 ? {'a': i} : {})",
        "inputs.l.map(i, i).map(i, i).map(i, i)",
        "inputs.l.all(i, i.matches('[0-9]{50}'))",
        "inputs.l.all(i, i.matches('\\\\d+'))",
        "inputs.l.all(i, i.matches(r'\\w+'))",
        "inputs.l.all(i, i.matches(inputs.pattern))",
        f"inputs.l.all(i, i.matches('{'.*' * 15}'))",
        f"inputs.l.map(i, '{'x' * 300}')",
        f"[{', '.join(['inputs.l'] * 11)}].map(i, i)",
        "inputs.all(k, " + " && ".join(["inputs[k] > 1"] * 5) + ")",
        "inputs.a.matches('\\\\w{101}')",
        "inputs.a.matches('(\\\\w{10}){10,}')",
        "inputs.a.matches('(abc){20,126}')",
        "inputs.a.matches('a{250}') || inputs.b.matches('b{251}')",
        f"inputs.a.matches('(?:{'[ab]' * 110}){{80}}')",
        "inputs.a.matches('(?i)(?:ab){101}')",
        "inputs.a.matches('([a-z]{0,60})" + "()" * 190 + "$')",
        "inputs.a.matches('(?:.[^a]é?){50}')",
        r"inputs.a.matches(r'(?:[\\](?:ab){20}){20}')",
        "inputs.a.matches('(?:abc[[a](]){80}')",
        "inputs.a.matches('(?:a(?i)b){80}')",
        "inputs.a.matches(inputs.p)",
        "inputs.a.matches('(?:a?)' + '{50000}z')",
        "inputs.a.matches(['a'][0])",
        r"inputs.a.matches('(?:a?)\x7b50000}z')",
        r"inputs.a.matches('(?:a?)\u007b50000}z')",
        r"inputs.a.matches('(?:a?)\173 50000}z')",
        "inputs.a.matches('(?x)(?:a?){ 50000 }z')",
        "inputs.a.matches('(?:a?){ 50000 }z')",
        r"inputs.a.matches('(?:a?)\X7b50000}z')",
        "inputs.a.matches('(?:a?){70}{700}z')",
        "inputs.a.matches('(?:a?){1}{50000,}z')",
        f"inputs.l.all(i, !(1 in [{', '.join(['i'] * 101)}]))",
        f"[{', '.join(['inputs.l'] * 101)}].size() > 1",
        f"[{', '.join(['1'] * 501)}].all(i, i > 0)",
        f"inputs.a.matches('{'.*' * 251}')",
        "[inputs.l + inputs.l][0].map(i, i)",
        "{'a': inputs.l + inputs.l}.a.map(i, i)",
        "(inputs.l + inputs.l)[0] == 1",
        "(true ? [inputs.l] : [])[0].map(i, i)",
        "inputs.l.map(i, [[i, i]][0])",
        "inputs.l.map(i, {'a': [i, i]}.a)",
        "inputs.l.map(i, dyn([i, i]))",
        " + ".join(["inputs.l"] * 60),
        " && ".join(["inputs.l == inputs.l"] * 60),
    ],
)
def test_what_is_quadratic_is_refused(text: str) -> None:
    """What would go through, join or collect whole lists in each step is no expression."""
    with pytest.raises(ExpressionFailed, match=r"walk|at most|map to one value|joined or made|written out"):
        compiled(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inputs.items.filter(i, i.kind in ['x', 'y'] && i.paid < inputs.limit).map(i, i.paid)", [1.0]),
        ("inputs.items.map(i, i.kind + '!')", ["x!", "z!"]),
        ("inputs.items.map(i, i.paid * 2.0 + inputs.limit)", [7.0, 23.0]),
        ("inputs.items.exists(i, i.kind.matches('^[x-z]+$'))", True),
        ("inputs.items.all(i, i.kind == metadata.kind || has(inputs.items))", True),
        ("'2026-01'.matches('^\\\\d{4}-\\\\d{2}$')", True),
        (r"'a@b.de'.matches('^[a-z0-9._%+-]+@[a-z0-9.-]+[.][a-z]{2,63}$')", True),
        ("inputs.items.filter(i, i.paid > 5.0)[0].kind", "z"),
        ("[inputs.limit, inputs.items[0].paid][1] + {'a': inputs.limit > 1.0 ? 1.0 : 2.0}.a", 2.0),
        ("inputs.rates.all(k, inputs.rates[k] > 0.0)", True),
        ("(inputs.limit > 1.0 ? inputs.items : []).map(i, mean([i.paid, inputs.limit]))", [3.0, 7.0]),
        ("1.0 in inputs.items.map(i, i.paid) && size(inputs.items) == 2", True),
        (" + ".join(["inputs.limit * 1.0"] * 60) + " > 1.0", True),
        ("inputs.items.filter(i, i.kind in inputs.allowed).map(i, i.paid)", [9.0]),
        ("inputs.items.all(i, inputs.caps[i.kind] > 0.0 && size(inputs.allowed) == 2)", True),
        ("inputs.items.map(i, i.paid + inputs.limit)", [6.0, 14.0]),
        ("inputs.loans.all(a, a.rates.all(r, r < inputs.limit))", True),
        ("inputs.loans.filter(a, a.rates.exists(r, r > 0.3)).map(a, a.name)", ["b"]),
        ("inputs.loans.map(a, a.rates.map(r, r * 2.0))", [[0.2], [0.4, 0.8]]),
        ("'Meier (GmbH)'.matches('(?i)^meier [(]gmbh[)]$')", True),
        (r"'a{b'.matches('^a[{]b$') && 'a{b'.matches(r'^a\{b$')", True),
        ("'DE02120300000000202051'.matches('^[A-Z]{2}[0-9]{2}(?:[A-Z0-9]{4}){3,7}[A-Z0-9]{0,4}$')", True),
    ],
)
def test_what_is_linear_is_not(text: str, expected: object) -> None:
    """Elements, single values beside them, lists that are written, and the walked object by its own keys."""
    items = [{"kind": "x", "paid": 1.0}, {"kind": "z", "paid": 9.0}]
    inputs = {"items": items, "limit": 5.0, "rates": {"a": 0.5}, "allowed": ["y", "z"], "caps": {"x": 1.0, "z": 2.0}}
    inputs["loans"] = [{"name": "a", "rates": [0.1]}, {"name": "b", "rates": [0.2, 0.4]}]
    assert evaluated(text, inputs, kind="x") == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inputs.l.all(i, i == inputs.other)", r"inputs\.other is a list, and looked at as a whole in every step"),
        ("inputs.l.all(i, i == inputs)", "inputs is an object, and looked at as a whole"),
        ("inputs.l.map(i, inputs.text)", r"inputs\.text has 251 characters"),
        ("inputs.wide.all(k, inputs.wide[k] == 1)", r"inputs\.wide has 400 members.* too many values to be looked up"),
        ("inputs.l.all(i, i in inputs.long)", r"inputs\.long is gone through in every step of a walk.* it has 105"),
        ("inputs.l.all(i, inputs.wide['0' + i] > 1)", r"inputs\.wide is gone through in every step of a walk"),
    ],
)
def test_a_walk_looks_at_single_values_beside_its_list(text: str, said: str) -> None:
    """What a request holds there is known only when it comes."""
    inputs = {"l": [1], "other": [1], "long": [1] * 105, "text": "x" * 251, "wide": {str(n): n for n in range(400)}}
    with pytest.raises(ExpressionFailed, match=said):
        evaluated(text, inputs)


@pytest.mark.parametrize(
    "text",
    [
        "inputs.o.filter(i, true).filter(i, true)",
        "inputs.l.map(i, i).map(i, i)",
        "inputs.t.map(i, metadata.text).map(i, i)",
        f"inputs.t.all(i, i.matches('{'.*' * 14}'))",
        " + ".join(["inputs.l"] * 50),
        "inputs.long.matches('\\\\w{95}b')",
        " || ".join(["min(inputs.o) < 1.0"] * 50),
        "inputs.t.exists(i, " + " || ".join(["i in inputs.table"] * 4) + ")",
        "inputs.l.exists(i, " + " || ".join(["mean(inputs.hundred) > 9.0"] * 4) + ")",
        "inputs.lists.all(i, i.all(j, "
        + "max([j]) < 1.0 && max([j]) < 1.0) || i.all(j, max([j]) > 1.0 || max([j]) > 1.0))",
        "inputs.lists.map(i, i.map(j, metadata.text))",
    ],
)
def test_the_largest_expressions_on_the_largest_lists_take_milliseconds(text: str) -> None:
    """In the worker's own time, not what a busy machine adds."""
    inputs: dict[str, Any] = {"l": [0.5] * 500, "t": ["x" * 200] * 500, "o": [{"a": 1, "b": 2, "c": 3}] * 180}
    inputs |= {"long": "x" * TEXT_LENGTH_MAX, "lists": [[0.5] * 98] * 50, "hundred": [0.5] * 100, "table": ["y"] * 100}
    activation = Activation({"inputs": inputs, "metadata": {"text": "x" * 250}})
    expression = compiled(text)
    tracing = sys.gettrace()
    # Who measures coverage traces each line of the helpers, which is not what a worker pays.
    sys.settrace(None)
    try:
        began = time.process_time()
        with contextlib.suppress(ExpressionFailed):
            expression.evaluate(activation)
        took_s = time.process_time() - began
    finally:
        sys.settrace(tracing)
    assert took_s < 1.0


@pytest.mark.parametrize(
    "text",
    [
        "+".join(["1"] * 201),
        "+".join(["1"] * 1_500),
        "inputs.a" + "[0]" * 1_300,
        "(" * 41 + "1" + ")" * 41,
        "(" * 120 + "1" + ")" * 120,
        "-" * 41 + "1",
        "!" * 1_000 + "true",
        "[" * 42 + "]" * 42,
        "dyn(" * 41 + "inputs.a" + ")" * 41,
    ],
)
def test_what_is_too_deep_to_be_read_is_refused(text: str) -> None:
    """Wherever it is read, however deep the stack is there by then."""

    def below(depth: int) -> None:
        if depth:
            below(depth - 1)
            return
        with pytest.raises(ExpressionFailed, match="at most 40 brackets within one another and 200 terms in a sum"):
            compiled(text)

    below(0)
    below(200)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+".join(["1"] * 200), 200),
        ("(" * 40 + "+".join(["1"] * 150) + ")" * 40, 150),
        ("-" * 40 + "1", 1),
        ("".join(f"inputs.a < {n} ? {n} : " for n in range(90)) + "90", 8),
    ],
)
def test_the_deepest_is_read(text: str, expected: object) -> None:
    """On a stack that is deep already."""

    def below(depth: int) -> object:
        return below(depth - 1) if depth else evaluated(text, {"a": 7})

    assert below(200) == expected


@pytest.mark.parametrize("kind", ["list", "object"])
def test_what_is_nested_too_deep_fails_only_who_looks_at_it(kind: str) -> None:
    """As deep as JSON itself may be."""
    deep: Any = 1
    for _ in range(900):
        deep = [deep] if kind == "list" else {"a": deep}
    inputs = {"deep": deep, "amount": 1}
    assert evaluated("inputs.amount == 1", inputs) is True
    for text in ("size(inputs.deep) > 0", "size(inputs) > 0", "inputs.l.all(i, i in inputs.deep)"):
        with pytest.raises(ExpressionFailed, match="is nested deeper than 50 lists and objects"):
            evaluated(text, {**inputs, "l": [1]})
    inputs["deep"] = deep["a"] if kind == "object" else {"a": deep}
    if kind == "object":
        assert evaluated("has(inputs.deep.a.b)", inputs) is False
