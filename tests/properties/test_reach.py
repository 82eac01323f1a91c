"""What an expression can look at is all that it needs: on that part of the values it says what it says on the whole."""

from typing import Any

import cel
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.errors import ExpressionFailed
from app.domain.expressions import Activation, Expression, Reach, compile_expression, joined

ROOTS = ("inputs", "metadata")
names = st.sampled_from(["a", "b", "ab", "inputs", "x-y", "metadata", ""])
scalars = st.one_of(st.integers(-3, 3), st.booleans(), st.sampled_from(["a", "b", "x-y", ""]), st.none())
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=4)),
    max_leaves=9,
)
sections = st.dictionaries(names, values, max_size=4)

quoted = st.builds(lambda mark, name: f"{mark}{name}{mark}", st.sampled_from(["'", '"']), names)
steps = st.one_of(
    st.sampled_from(
        [".a", ".b", ".inputs", ".metadata", " . a", "[0]", "[inputs.a]", ".size()", "['a' + '']", "[r'a']"]
    ),
    st.builds("[{}]".format, quoted),
)
operands = st.builds(
    lambda root, path: root + "".join(path),
    st.sampled_from(["inputs", "metadata", "(inputs)", "[inputs][0]"]),
    st.lists(steps, max_size=3),
)
relations = st.one_of(
    operands,
    quoted,
    st.builds("{} in {}".format, quoted, operands),
    st.builds("'a' + {} in {}".format, quoted, operands),
    st.builds("{} in {} + []".format, quoted, operands),
    st.builds("!({} in {})".format, quoted, operands),
    st.builds("{} == {}".format, operands, operands),
    st.builds("has({}.a)".format, operands),
    st.builds("size({}) > 1".format, operands),
    st.builds("{}.all(k, k != 'a')".format, operands),
    st.builds("{}.exists(k, k == inputs.a || has(metadata.b))".format, operands),
    st.builds("{}.map(inputs, inputs.a)".format, operands),
    st.builds("{{'inputs': {}}}.inputs.b".format, operands),
    st.builds("string({}) // inputs.b\n".format, operands),
)
texts = st.one_of(
    relations,
    st.builds("{} && {}".format, relations, relations),
    st.builds("{} ? {} : {}".format, relations, relations, relations),
    st.builds("[{}, {}]".format, relations, relations),
)


def plain(value: object) -> object:
    """The value with its types, and without an order: the engine's maps have none."""
    if isinstance(value, dict):
        return ("map", *sorted((repr(plain(key)), repr(plain(item))) for key, item in value.items()))
    if isinstance(value, list):
        return ("list", *sorted(repr(plain(item)) for item in value))
    return repr(value)


def said_by(expression: Expression, activation: Activation) -> object:
    """The value; or that there is none."""
    try:
        return plain(expression.evaluate(activation))
    except ExpressionFailed:
        return "failed"


def said(expression: Expression, roots: dict[str, Any]) -> object:
    return said_by(expression, Activation(roots))


def compiled(text: str) -> Expression | None:
    try:
        return compile_expression(text, ROOTS)
    except ExpressionFailed:
        return None


def within_reach(value: object, reach: Reach) -> object:
    """The part of ``value`` that ``reach`` can look at."""
    if reach is None or not isinstance(value, dict):
        return value
    return {name: within_reach(value[name], below) for name, below in reach.items() if name in value}


@given(texts, texts, sections, sections)
@settings(max_examples=300, deadline=None)
def test_a_path_is_a_variable_and_says_what_it_says_as_a_path(
    text: str, other: str, inputs: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """The engine says of the text itself, on the whole values, what the expression says; also beside another one, and
    where the values become others."""
    activation = Activation({"inputs": metadata, "metadata": metadata})
    for expression in filter(None, map(compiled, (other, text))):
        said_by(expression, activation)
        activation.add("inputs", inputs)
        try:
            native = plain(cel.compile(expression.text).execute(cel.Context({"inputs": inputs, "metadata": metadata})))
        except (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError, KeyError):
            native = "failed"
        # A list that is looked at beside a walk is refused, whatever the engine would say.
        assert said_by(expression, activation) == native or activation.oversize(expression), expression.text


@given(texts, texts, sections, sections)
@settings(max_examples=300, deadline=None)
def test_the_part_within_reach_says_what_the_whole_says(
    text: str, other: str, inputs: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """For an expression alone, and for two that share one activation."""
    whole = {"inputs": inputs, "metadata": metadata}
    expressions = [each for each in map(compiled, (text, other)) if each is not None]
    reach: dict[str, Any] = {}
    for expression in expressions:
        for root in expression.roots:
            own = expression.reach(root)
            reach[root] = joined(reach[root], own) if root in reach else own
    part = {root: within_reach(whole[root], below) for root, below in reach.items()}
    for expression in expressions:
        alone = {root: within_reach(whole[root], expression.reach(root)) for root in expression.roots}
        assert said(expression, alone) == said(expression, part) == said(expression, whole), (expression.text, alone)
