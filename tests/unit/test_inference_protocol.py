"""Open Inference Protocol calls as requests, and decisions as its answers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.errors import RequestRefused
from app.gateway.inference_protocol import read_infer, wanted_outputs, write_infer
from tests.support.request_reply import reply_members


def tensor(name: str = "x", **members: Any) -> dict[str, Any]:
    """A tensor that can be used, but for ``members``."""
    return {"name": name, "shape": [1], "datatype": "INT64", "data": [5]} | members


@pytest.mark.parametrize(
    ("members", "value"),
    [
        ({}, 5),
        ({"shape": []}, 5),
        ({"shape": [1, 1, 1], "data": [[[5]]]}, 5),
        ({"datatype": "FP32", "data": [0.5]}, 0.5),
        ({"datatype": "FP64", "data": [1]}, 1),
        ({"datatype": "BOOL", "data": [True]}, True),
        ({"datatype": "BYTES", "data": ["car"]}, "car"),
        ({"shape": [1, 3], "data": [1, 2, 3]}, [1, 2, 3]),
        ({"shape": [1, 2], "data": [[1, 2]]}, [1, 2]),
        ({"shape": [1, 0], "data": []}, []),
    ],
)
def test_tensor_read(members: dict[str, Any], value: object) -> None:
    """A tensor of one row is a value, or a list of values."""
    assert read_infer("p", {"inputs": [tensor(**members)]})["inputs"] == {"x": value}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"inputs": {}}, "no list"),
        ({"inputs": [5]}, "no object"),
        ({"inputs": [{"shape": [1]}]}, "name"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "INT64"}]}, "binary"),
        ({"inputs": [tensor(data=5)]}, "no list"),
        ({"inputs": [tensor(shape=None)]}, "shape"),
        ({"inputs": [tensor(shape=[True])]}, "shape"),
        ({"inputs": [tensor(shape=[1] * 9)]}, "shape"),
        ({"inputs": [tensor(shape=[2], data=[1, 2])]}, "2 rows"),
        ({"inputs": [tensor(shape=[1, 2])]}, "1 values"),
        ({"inputs": [tensor(datatype="STRING")]}, "STRING"),
        ({"inputs": [tensor(datatype=["INT64"])]}, "datatype"),
        ({"inputs": [tensor(data=["5"])]}, "str"),
        ({"inputs": [tensor(data=[True])]}, "bool"),
        ({"inputs": [tensor(data=[None])]}, "NoneType"),
        ({"inputs": [tensor(), tensor()]}, "two inputs"),
        ({"parameters": 5}, "parameters"),
        ({"parameters": {"entities": "{"}}, "parameters.entities"),
        ({"parameters": {"metadata": [1]}}, "parameters.metadata"),
    ],
)
def test_call_refused(body: dict[str, Any], reason: str) -> None:
    """What is no call of the protocol for one decision is refused, and the message says what was wrong."""
    with pytest.raises(RequestRefused, match=reason):
        read_infer("p", body)


def test_outputs_asked_for() -> None:
    """A call may ask for some outputs; one that the decision does not have is left out."""
    wanted = wanted_outputs({"outputs": [{"name": "pd.p"}, {"name": "absent"}]})
    decision = reply_members("partial", result={"d": 1}, outputs={"pd": {"output": {"p": 0.5, "q": 1}}})
    assert [each["name"] for each in write_infer("p", decision, wanted)["outputs"]] == ["pd.p"]
    assert wanted_outputs({"outputs": []}) is None
    with pytest.raises(RequestRefused):
        wanted_outputs({"outputs": ["pd.p"]})


@pytest.mark.parametrize(
    ("value", "shape", "datatype", "data"),
    [
        (True, [1], "BOOL", [True]),
        (3, [1], "INT64", [3]),
        (2**63, [1], "FP64", [2**63]),
        (0.5, [1], "FP64", [0.5]),
        ([1, 2.5], [1, 2], "FP64", [1, 2.5]),
        (["a", "b"], [1, 2], "BYTES", ["a", "b"]),
        ([], [1], "BYTES", ["[]"]),
        ({"a": 1}, [1], "BYTES", ['{"a":1}']),
        ([True, 1], [1], "BYTES", ["[true,1]"]),
    ],
)
def test_tensor_written(value: object, shape: list[int], datatype: str, data: list[Any]) -> None:
    """A result's value is a tensor of one row; what no tensor holds is its JSON text."""
    decision = reply_members("completed", result={"x": value, "gone": None})
    assert write_infer("p", decision, None)["outputs"] == [
        {"name": "x", "shape": shape, "datatype": datatype, "data": data}
    ]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "inputs": st.lists(
                st.fixed_dictionaries(
                    {"name": st.just("x") | _json},
                    optional={"shape": st.lists(st.integers(0, 3)) | _json, "datatype": _json, "data": _json},
                ),
                max_size=2,
            ),
            "parameters": st.dictionaries(st.sampled_from(["entities", "metadata"]), _json) | _json,
            "outputs": _json,
        },
    )
)
def test_any_call(body: dict[str, Any]) -> None:
    """Any JSON object is a request or is refused; nothing else happens."""
    try:
        request = read_infer("p", body)
        wanted_outputs(body)
    except RequestRefused:
        return
    assert set(request) == {"path", "entities", "inputs", "metadata"}
