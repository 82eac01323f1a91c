"""Open Inference Protocol v2 as bytes: templates write what the encoder does, and no response crashes the reader."""

import contextlib
import math
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.oip import RequestTemplate, decode_response, encode_request, error_text
from app.domain.features import Value
from app.domain.version_documents import ColumnsInput
from tests.support.models import row_of

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SENDABLE = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), TEXT
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)
ASKED = ({"name": "y%b"},)


@given(
    st.lists(
        st.tuples(st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), TEXT),
        min_size=2,
        max_size=5,
    )
)
def test_the_template_writes_the_encoders_bytes_for_several_rows(
    given_rows: list[tuple[int, bool, float, str]],
) -> None:
    """A template filled with rows writes what the encoder does for all of them, and for each."""
    rows = [
        row_of({"a": number % 2**63, "b": flag, "c%b": real, "d": text}, request_id=f"r-{place}")
        for place, (number, flag, real, text) in enumerate(given_rows)
    ]
    filled = RequestTemplate(rows[0], ASKED).fill_shared(rows)
    own = tuple(encode_request((row,), ColumnsInput(), ASKED, row.request_id) for row in rows)
    assert filled == (encode_request(rows, ColumnsInput(), ASKED, None), own)
    assert RequestTemplate(rows[0], ASKED).fill_shared([*rows, row_of({"a": 1})]) is None


@given(st.dictionaries(TEXT, SENDABLE, max_size=8), TEXT)
def test_the_template_writes_the_encoders_bytes(values: dict[str, Value], request_id: str) -> None:
    """A template filled with a row is byte for byte what the encoder writes."""
    row = row_of(values, request_id=request_id)
    assert RequestTemplate(row, ASKED).fill(row) == encode_request((row,), ColumnsInput(), ASKED, request_id)


@given(st.lists(st.lists(SENDABLE, max_size=5).map(tuple), min_size=1, max_size=4))
def test_lists_are_rows_of_one_tensor(lists: list[tuple[Any, ...]]) -> None:
    """A tensor has a row for each list, flat; lists of different lengths are refused, and so is a null."""
    rows = [row_of({"x": each}, types={"x": "STRING_LIST"}) for each in lists]
    assert RequestTemplate(rows[0], ASKED).fill(rows[0]) is None
    if len({len(each) for each in lists}) > 1:
        with pytest.raises(ValueError, match="input x has lists of"):
            encode_request(rows, ColumnsInput(), ASKED, "r")
        return
    (tensor,) = orjson.loads(encode_request(rows, ColumnsInput(), ASKED, "r"))["inputs"]
    assert tensor["shape"] == [len(lists), len(lists[0])]
    assert tensor["data"] == [element for each in lists for element in each]
    rows[0] = row_of({"x": None}, types={"x": "STRING_LIST"})
    with pytest.raises(ValueError, match="input x is null"):
        encode_request(rows, ColumnsInput(), ASKED, "r")


@given(SENDABLE, st.sampled_from([None, math.nan, math.inf, b"x", 2**70, "\ud800"]))
def test_the_template_leaves_the_rest_to_the_encoder(first: Value, second: Value) -> None:
    """Null, NaN, bytes, other columns: nothing that needs a decision is decided by the template."""
    row = row_of({"a": first, "b": "text"})
    template = RequestTemplate(row, ASKED)
    assert template.fill(row_of({"a": first, "b": second})) is None
    assert template.fill(row_of({"b": "text", "a": first})) is None
    assert template.fill(row_of({"a": first})) is None


@given(
    st.one_of(
        st.binary(max_size=60),
        JSON.map(orjson.dumps),
        st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["y", "z"])},
                optional={"shape": JSON, "data": JSON, "datatype": TEXT},
            ),
            max_size=3,
        ).map(lambda outputs: orjson.dumps({"outputs": outputs})),
    ),
    st.integers(1, 3),
)
def test_no_response_crashes_the_reader(body: bytes, rows: int) -> None:
    """Whatever a server answers is outputs for each row, or a ValueError; and its error text is short."""
    with contextlib.suppress(ValueError):
        answers = decode_response(body, rows, ("y",))
        assert len(answers) == rows
        assert all(answer.keys() == {"y"} for answer in answers)
    assert len(error_text(body)) <= 300


@given(st.integers(1, 4), st.lists(st.integers(1, 3), max_size=2), st.data())
def test_rows_get_their_own_elements(rows: int, inner: list[int], data: st.DataObject) -> None:
    """Row i's outputs are the i-th stretch of the flat data, whether it came flat or nested."""
    width = math.prod(inner)
    flat = data.draw(st.lists(st.integers(-9, 9), min_size=rows * width, max_size=rows * width))
    nested: list[Any] = flat
    for size in reversed(inner):
        nested = [nested[start : start + size] for start in range(0, len(nested), size)]
    expected = [flat[start : start + width] if width > 1 else flat[start] for start in range(0, len(flat), width)]
    for given_data in (flat, nested):
        body = orjson.dumps({"outputs": [{"name": "y", "shape": [rows, *inner], "data": given_data}]})
        assert [answer["y"] for answer in decode_response(body, rows, ("y",))] == expected
