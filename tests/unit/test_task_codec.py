"""Tasks and results as bytes: what goes in comes out, and what is damaged says so."""

import contextlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.avro import AvroCodec
from app.adapters.task_codec import QueuedTask, decode_result, decode_task, encode_result, encode_task
from app.domain.dispatch import Answer, Attempt
from app.domain.errors import Code, Problem
from app.domain.requests import RequestId
from tests.support.models import row_of, version_of

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ELEMENTS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
    st.binary(max_size=20),
)
VALUES = ELEMENTS | st.lists(ELEMENTS, max_size=4).map(tuple)
ATTEMPTS = (Attempt("pool/a", 1_000, 2.5, "ok"),)


@given(st.dictionaries(TEXT, VALUES, max_size=6), st.integers(0, 2**31 - 1))
def test_a_task_survives(values: dict[str, Any], partition: int) -> None:
    """Inputs of every type, bytes too, come out as they went in, beside where the answer goes."""
    row = row_of(values)
    version = version_of()
    task = decode_task(encode_task(row, version, partition, 1_234))
    assert task == QueuedTask(row, version.model, version.version, version.digest, partition, 1_234)
    assert all(type(task.row.values[name]) is type(value) for name, value in values.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**70, "\ud800", (0.5, math.nan)])
def test_inputs_that_cannot_be_sent(value: Any) -> None:
    """NaN, infinity, whole numbers beyond 64 bits and text that is no text are refused, not changed."""
    with pytest.raises(ValueError, match="input"):
        encode_task(row_of({"x": value}, types={"x": "DOUBLE"}), version_of(), 0, 0)


@pytest.mark.parametrize(
    "answer",
    [
        Answer({"y": 1.5, "p": [0.1, 0.9], "s": "a", "n": None}, None, ATTEMPTS, b"{}"),
        Answer(None, Problem(Code.MODEL_ERROR, "no", "t"), ATTEMPTS, b""),
        Answer(None, Problem(Code.DEADLINE_EXCEEDED, "late", "t"), (), b""),
    ],
)
def test_a_result_survives(answer: Answer) -> None:
    """Outputs or a problem, attempts and timing come out as they went in."""
    result = decode_result(encode_result("r-1", "t", answer, latency_ms=3.5, instance="pool-1"))
    assert result.answer == answer
    assert (result.request_id, result.task) == (RequestId("r-1"), "t")
    assert (result.latency_ms, result.instance) == (3.5, "pool-1")


def test_outputs_that_cannot_be_sent() -> None:
    """Outputs that JSON cannot hold are a ValueError."""
    with pytest.raises(ValueError, match="outputs"):
        encode_result("r", "t", Answer({"y": object()}, None, (), b""), latency_ms=0, instance="i")


@given(st.binary(max_size=80))
def test_noise_is_refused(noise: bytes) -> None:
    """Bytes that are neither, or only begin as one, are a ValueError and nothing else."""
    task = encode_task(row_of(), version_of(), 0, 0)
    result = encode_result("r", "t", Answer({"y": 1}, None, ATTEMPTS, b""), latency_ms=0, instance="i")
    for decode, whole in ((decode_task, task), (decode_result, result)):
        for data in (noise, whole[:10] + noise, whole[: len(whole) // 2] + noise):
            with contextlib.suppress(ValueError):
                decode(data)


@pytest.mark.parametrize(
    "change",
    [
        {"values": b"[]"},
        {"values": b"{"},
        {"values": b'{"y": 1}'},
        {"values": b'{"x": {"b64": "?"}}'},
        {"values": b'{"x": [[1]]}'},
        {"types": b'{"x": 1}'},
        {"results_partition": -1},
    ],
)
def test_a_task_that_does_not_hold_together(change: dict[str, Any]) -> None:
    """Well-formed Avro whose members do not fit one another is malformed too."""
    codec = AvroCodec("InferenceTask")
    record = codec.decode(encode_task(row_of(), version_of(), 0, 0))
    with pytest.raises(ValueError, match=r"values|types|input|partition"):
        decode_task(codec.encode({**record, **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": None},
        {"problem": {"code": "model_error", "message": ""}},
        {"outputs": b"1"},
        {"outputs": None, "problem": {"code": "no_such_code", "message": ""}},
    ],
)
def test_a_result_that_does_not_hold_together(change: dict[str, Any]) -> None:
    """A result has either outputs or a problem with a known code."""
    codec = AvroCodec("InferenceResult")
    answer = Answer({"y": 1}, None, (), b"")
    record = codec.decode(encode_result("r", "t", answer, latency_ms=0, instance="i"))
    with pytest.raises(ValueError, match=r"outputs|problem"):
        decode_result(codec.encode({**record, **change}))
