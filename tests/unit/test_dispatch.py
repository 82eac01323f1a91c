"""Judging answers: what a model said, under its version's output contracts."""

from typing import Any

import pytest

from app.domain.dispatch import Answer, Attempt, TaskResult, TaskStatus, judge
from app.domain.errors import Code, Problem
from tests.support.models import version_of

ATTEMPTS = (Attempt("http://127.0.0.1:1", 1, 2.0, "ok"),)


def judged(outputs: dict[str, Any] | None, *contracts: dict[str, Any]) -> TaskResult:
    """The result that outputs make under contracts."""
    return judge("t", version_of(outputs=contracts), Answer(outputs, None, ATTEMPTS, b"sent"), 3.0)


@pytest.mark.parametrize(
    ("contract", "value", "expected"),
    [
        ({"datatype": "FP64"}, 1, 1.0),
        ({"datatype": "FP32", "min": 0, "max": 1}, 1.0, 1.0),
        ({"datatype": "FP64"}, [0.5], 0.5),
        ({"datatype": "FP64", "element": 1}, [0.1, 0.9], 0.9),
        ({"datatype": "FP64", "element": 0}, 0.5, 0.5),
        ({"datatype": "INT64"}, 7, 7),
        ({"datatype": "INT8", "max": 7}, 7, 7),
        ({"datatype": "BOOL"}, True, True),
        ({"datatype": "BYTES"}, "label", "label"),
    ],
)
def test_sound_answers(contract: dict[str, Any], value: object, expected: object) -> None:
    """The element that is asked for, in its declared type."""
    result = judged({"y": value}, {"name": "y", **contract})
    assert result.status is TaskStatus.OK
    assert result.output == {"y": expected}
    assert (result.problem, result.attempts, result.sent, result.latency_ms) == (None, ATTEMPTS, b"sent", 3.0)


@pytest.mark.parametrize(
    ("contract", "outputs", "said"),
    [
        ({"datatype": "FP64"}, {}, "no output 'y' (there is: none)"),
        ({"datatype": "FP64"}, {"z": 1, "a": 2}, "no output 'y' (there is: a, z)"),
        ({"datatype": "FP64"}, None, "no output 'y'"),
        ({"datatype": "FP64"}, {"y": [0.1, 0.9]}, "name one by `element`"),
        ({"datatype": "FP64"}, {"y": []}, "0 elements a row"),
        ({"datatype": "FP64", "element": 2}, {"y": [0.1, 0.9]}, "element 2 is asked"),
        ({"datatype": "FP64", "element": 1}, {"y": 0.9}, "one element a row"),
        ({"datatype": "FP64"}, {"y": "0.5"}, "which is not FP64"),
        ({"datatype": "FP64"}, {"y": True}, "which is not FP64"),
        ({"datatype": "FP64"}, {"y": None}, "which is not FP64"),
        ({"datatype": "FP64"}, {"y": float("nan")}, "which is not FP64"),
        ({"datatype": "INT64"}, {"y": 1.0}, "which is not INT64"),
        ({"datatype": "INT64"}, {"y": True}, "which is not INT64"),
        ({"datatype": "BOOL"}, {"y": 1}, "which is not BOOL"),
        ({"datatype": "BYTES"}, {"y": b"x"}, "which is not BYTES"),
        ({"datatype": "FP64", "min": 0}, {"y": -0.1}, "outside 0"),
        ({"datatype": "FP64", "max": 1}, {"y": 1.1}, "to 1"),
    ],
)
def test_unsound_answers(contract: dict[str, Any], outputs: dict[str, Any] | None, said: str) -> None:
    """An error with the model, its version and what is wrong; no output is passed on."""
    result = judged(outputs, {"name": "y", **contract})
    assert result.status is TaskStatus.ERROR
    assert result.output is None
    assert result.problem is not None
    assert result.problem.code is Code.MODEL_OUTPUT_INVALID
    assert result.problem.message.startswith("m 3 answered unsoundly: ")
    assert said in result.problem.message
    assert result.problem.task == "t"


def test_one_unsound_output_spoils_all() -> None:
    """Half an answer is none."""
    result = judged({"y": 0.5, "z": 2}, {"name": "y", "datatype": "FP64"}, {"name": "z", "datatype": "BOOL"})
    assert result.output is None


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (Code.MODEL_TIMEOUT, TaskStatus.TIMEOUT),
        (Code.DEADLINE_EXCEEDED, TaskStatus.TIMEOUT),
        (Code.MODEL_UNAVAILABLE, TaskStatus.ERROR),
        (Code.MODEL_ERROR, TaskStatus.ERROR),
    ],
)
def test_problems_become_statuses(code: Code, status: TaskStatus) -> None:
    """The backend's problem is the task's, and says which task."""
    result = judge("t", version_of(), Answer(None, Problem(code, "why"), (), b""), 0.0)
    assert (result.status, result.problem) == (status, Problem(code, "why", "t"))
    named = judge("t", version_of(), Answer(None, Problem(code, "why", "u"), (), b""), 0.0)
    assert named.problem == Problem(code, "why", "u")
