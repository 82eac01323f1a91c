"""Tasks for pool workers and their answers, typed, as Avro.

Inputs and outputs travel as JSON inside the records, for their names differ from model to model. JSON has no bytes:
a bytes value is ``{"b64": text}``, which no other value can be, since values are scalars and lists of them.
"""

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from app.adapters.avro import AvroCodec
from app.domain.dispatch import Answer, Attempt, Row
from app.domain.errors import Code, Problem
from app.domain.features import Element, Value
from app.domain.requests import RequestId
from app.domain.version_documents import ModelVersionSpec

_TASK: Final = AvroCodec("InferenceTask")
_RESULT: Final = AvroCodec("InferenceResult")


@dataclass(frozen=True, slots=True)
class QueuedTask:
    """A task as a pool worker reads it; ``results_partition`` is where its answer goes."""

    row: Row
    model: str
    version: str
    digest: str
    results_partition: int
    dispatched_ms: int


@dataclass(frozen=True, slots=True)
class QueuedResult:
    """An answer as the results agent reads it."""

    request_id: RequestId
    task: str
    answer: Answer
    latency_ms: float
    instance: str
    execution_id: str = ""
    version: str = ""


def encode_values(values: Mapping[str, Value]) -> bytes:
    """Values by column as a JSON object.

    Raises:
        ValueError: a number that JSON cannot hold.

    >>> encode_values({"a": 1, "b": b"x"})
    b'{"a":1,"b":{"b64":"eA=="}}'
    """
    for name, value in values.items():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                # The JSON writer would turn it into null, which means something else.
                raise ValueError(f"input {name} is {each}, which JSON cannot hold")
    try:
        return orjson.dumps(values, default=_as_b64)
    except TypeError as error:
        raise ValueError(f"inputs cannot be written as JSON: {error}") from error


def _as_b64(value: object) -> object:
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} is not a value")


def _value(name: str, value: Any) -> Value:
    return tuple(_element(name, each) for each in value) if isinstance(value, list) else _element(name, value)


def _element(name: str, value: Any) -> Element:
    if isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"input {name} is not base64: {error}") from error
    if isinstance(value, dict | list):
        raise ValueError(f"input {name} is a {type(value).__name__}, not a value")
    scalar: Element = value
    return scalar


def encode_task(row: Row, version: ModelVersionSpec, results_partition: int, now_ms: int) -> bytes:
    """The task that asks a pool worker for ``row``.

    Raises:
        ValueError: an input that cannot be sent; the message names it.
    """
    record = {
        "request_id": row.request_id,
        "execution_id": row.execution_id,
        "task": row.task,
        "model": version.model,
        "version": version.version,
        "digest": version.digest,
        "results_partition": results_partition,
        "deadline_ms": row.deadline_ms,
        "dispatched_ms": now_ms,
        "values": encode_values(row.values),
        "types": orjson.dumps(row.types),
        "traceparent": row.traceparent,
    }
    return _encode(_TASK, record)


def decode_task(data: bytes) -> QueuedTask:
    """The task in ``data``; ValueError says what is malformed."""
    record = _TASK.decode(data)
    values = _object(record["values"], "values")
    types = _object(record["types"], "types")
    if values.keys() != types.keys() or not all(isinstance(type_, str) for type_ in types.values()):
        raise ValueError("damaged InferenceTask: values and types name different columns")
    if record["results_partition"] < 0:
        raise ValueError(f"damaged InferenceTask: results_partition is {record['results_partition']}")
    row = Row(
        RequestId(record["request_id"]),
        record["task"],
        {name: _value(name, value) for name, value in values.items()},
        types,
        record["deadline_ms"],
        record["traceparent"],
        record["execution_id"],
    )
    return QueuedTask(
        row,
        record["model"],
        record["version"],
        record["digest"],
        record["results_partition"],
        record["dispatched_ms"],
    )


def encode_result(
    request_id: str,
    task: str,
    answer: Answer,
    *,
    latency_ms: float,
    instance: str,
    execution_id: str = "",
    version: str = "",
) -> bytes:
    """The result that carries ``answer``, to the decision ``execution_id``, by the model's ``version``.

    Raises:
        ValueError: outputs that JSON cannot hold.
    """
    problem = answer.problem
    try:
        outputs = None if answer.outputs is None else orjson.dumps(answer.outputs)
    except TypeError as error:
        raise ValueError(f"outputs cannot be written as JSON: {error}") from error
    record = {
        "request_id": request_id,
        "execution_id": execution_id,
        "task": task,
        "version": version,
        "outputs": outputs,
        "problem": None if problem is None else {"code": str(problem.code), "message": problem.message},
        "attempts": [
            {
                "endpoint": attempt.endpoint,
                "started_ms": attempt.started_ms,
                "latency_ms": attempt.latency_ms,
                "outcome": attempt.outcome,
            }
            for attempt in answer.attempts
        ],
        "sent": answer.sent,
        "latency_ms": latency_ms,
        "instance": instance,
    }
    return _encode(_RESULT, record)


def decode_result(data: bytes) -> QueuedResult:
    """The result in ``data``; ValueError says what is malformed."""
    record = _RESULT.decode(data)
    task, problem = record["task"], record["problem"]
    if (record["outputs"] is None) == (problem is None):
        raise ValueError("damaged InferenceResult: it needs either outputs or a problem")
    answer = Answer(
        None if record["outputs"] is None else _object(record["outputs"], "outputs"),
        None if problem is None else Problem(_code(problem["code"]), problem["message"], task),
        tuple(
            Attempt(attempt["endpoint"], attempt["started_ms"], attempt["latency_ms"], attempt["outcome"])
            for attempt in record["attempts"]
        ),
        record["sent"],
    )
    return QueuedResult(
        RequestId(record["request_id"]),
        task,
        answer,
        record["latency_ms"],
        record["instance"],
        record["execution_id"],
        record["version"],
    )


def _code(text: str) -> Code:
    try:
        return Code(text)
    except ValueError as error:
        raise ValueError(f"damaged InferenceResult: problem code {text[:80]!r} is not known") from error


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        members = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(members, dict):
        raise ValueError(f"{name} is a JSON {type(members).__name__}, not an object")
    return members


def _encode(codec: AvroCodec, record: dict[str, Any]) -> bytes:
    try:
        return codec.encode(record)
    except (TypeError, OverflowError, UnicodeEncodeError, KeyError) as error:
        raise ValueError(f"cannot be written as {codec.name}: {error}") from error
