"""The Open Inference Protocol v2 as a way to ask: a model's name is a path, its inputs one row, its answer a decision.

``POST /v2/models/credit/decision/infer`` asks for ``/credit/decision``. Each input tensor of one element becomes an
input of that name, one of several elements a list. ``parameters.entities`` and ``parameters.metadata`` say whom it is
about and what else is known: objects, or the JSON text of one for clients whose parameters are scalars. Other
parameters are instructions to other servers and mean nothing here. In the answer, the result's members are tensors
under their own names, a task's outputs under ``task.output``.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import orjson

from app.domain.errors import Code, Problem, RequestRefused

_NUMBERS: Final = (int, float)
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "BOOL": (bool,),
    **dict.fromkeys(("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"), (int,)),
    **dict.fromkeys(("FP16", "BF16", "FP32", "FP64"), _NUMBERS),
    "BYTES": (str,),
}
_DIMENSIONS_MAX: Final = 8


def read_infer(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The request that an inference call means.

    >>> tensor = {"name": "amount", "shape": [1, 1], "datatype": "INT64", "data": [5000]}
    >>> read_infer("credit/decision", {"inputs": [tensor], "parameters": {"entities": {"applicant_id": 17}}})
    {'path': '/credit/decision', 'entities': {'applicant_id': 17}, 'inputs': {'amount': 5000}, 'metadata': {}}

    Raises:
        RequestRefused: the call is not of the protocol, or asks for more than one decision.
    """
    tensors = body.get("inputs", [])
    if not isinstance(tensors, list):
        raise _refused("inputs is no list: send a list of tensors")
    inputs: dict[str, Any] = {}
    for tensor in tensors:
        name, value = _read_tensor(tensor)
        if name in inputs:
            raise _refused(f"two inputs are named {name}: send each once")
        inputs[name] = value
    parameters = body.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise _refused("parameters is no object")
    return {
        "path": f"/{path}",
        "entities": _members(parameters, "entities"),
        "inputs": inputs,
        "metadata": _members(parameters, "metadata"),
    }


def wanted_outputs(body: Mapping[str, Any]) -> frozenset[str] | None:
    """The names of the outputs that a call asks for; None for all.

    Raises:
        RequestRefused: ``outputs`` is not a list of named objects.
    """
    outputs = body.get("outputs")
    if not outputs:
        return None
    if not isinstance(outputs, list) or not all(
        isinstance(each, dict) and isinstance(each.get("name"), str) for each in outputs
    ):
        raise _refused("outputs is no list of objects with a name")
    return frozenset(each["name"] for each in outputs)


def write_infer(path: str, decision: Mapping[str, Any], wanted: frozenset[str] | None) -> dict[str, Any]:
    """The protocol's answer for a completed or partial decision."""
    tensors = [
        _tensor(name, value)
        for name, value in _values(decision)
        if value is not None and (wanted is None or name in wanted)
    ]
    return {
        "model_name": path,
        "id": decision["request_id"],
        "parameters": {name: decision[name] for name in ("status", "execution_id", "route", "rule", "revision")},
        "outputs": tensors,
    }


def _values(decision: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from decision["result"].items()
    for task, answer in decision["outputs"].items():
        for name, value in (answer.get("output") or {}).items():
            yield f"{task}.{name}", value


def _read_tensor(tensor: Any) -> tuple[str, Any]:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise _refused("an input is no object with a name")
    name = tensor["name"]
    shape, data, datatype = tensor.get("shape"), tensor.get("data"), tensor.get("datatype")
    if "data" not in tensor:
        raise _refused(f"input {name} has no data: send tensors as JSON, not as binary")
    if not isinstance(data, list):
        raise _refused(f"input {name} has data that is no list")
    if (
        not isinstance(shape, list)
        or len(shape) > _DIMENSIONS_MAX
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise _refused(f"input {name} has a shape that is no list of at most {_DIMENSIONS_MAX} whole numbers")
    if shape and shape[0] != 1:
        raise _refused(f"input {name} has {shape[0]} rows: send one row a decision")
    kinds = _KINDS.get(datatype) if isinstance(datatype, str) else None
    if kinds is None:
        raise _refused(f"input {name} has the datatype {str(datatype)[:40]}: send one of {', '.join(_KINDS)}")
    values = list(_flat(data, _DIMENSIONS_MAX))
    if len(values) != math.prod(shape):
        raise _refused(f"input {name} has {len(values)} values, and its shape {shape} wants {math.prod(shape)}")
    for value in values:
        if type(value) not in kinds:
            raise _refused(f"input {name} holds {type(value).__name__}, and its datatype is {datatype}")
    return name, values[0] if len(values) == 1 else values


def _flat(data: list[Any], depth: int) -> Iterator[Any]:
    for value in data:
        if isinstance(value, list) and depth > 1:
            yield from _flat(value, depth - 1)
        else:
            yield value


def _members(parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
    members = parameters.get(name)
    if members is None:
        return {}
    if isinstance(members, str):
        try:
            members = orjson.loads(members)
        except orjson.JSONDecodeError as error:
            raise _refused(f"parameters.{name} is text that is not JSON: {error}") from error
    if not isinstance(members, dict):
        raise _refused(f"parameters.{name} is no object")
    return members


def _tensor(name: str, value: Any) -> dict[str, Any]:
    values = value if isinstance(value, list) and value else [value]
    datatype = _datatype(values)
    if datatype is None:
        # What has no tensor's form travels as its JSON text.
        return {"name": name, "shape": [1], "datatype": "BYTES", "data": [orjson.dumps(value).decode()]}
    shape = [1, len(values)] if values is value else [1]
    return {"name": name, "shape": shape, "datatype": datatype, "data": values}


def _datatype(values: list[Any]) -> str | None:
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return "BOOL"
    if kinds == {str}:
        return "BYTES"
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in values):
        return "INT64"
    return "FP64" if kinds and kinds <= {int, float} else None


def _refused(message: str) -> RequestRefused:
    return RequestRefused(Problem(Code.REQUEST_INVALID, message))
