"""Dispatch: what a model is given, what it answered, and whether that answer is sound.

A backend turns a ``Row`` into an ``Answer``; ``judge`` holds the answer against the version's output contracts and
makes the task's result. Backends take several rows at once, so that rows which arrive while a model is busy can share
a call; ``sharing`` says which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from app.domain.document_parts import Scalar
from app.domain.errors import Code, Problem
from app.domain.features import Value
from app.domain.requests import RequestId, is_finite
from app.domain.version_documents import ModelVersionSpec, OutputContract


class TaskStatus(StrEnum):
    """How a task ended; PENDING is a queued one that has not."""

    OK = "ok"
    DEFAULTED = "defaulted"
    TIMEOUT = "timeout"
    ERROR = "error"
    SKIPPED = "skipped"
    PENDING = "pending"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call: where to, when (epoch milliseconds), how long, how it ended (``ok`` or the reason); its rows."""

    endpoint: str
    started_ms: int
    latency_ms: float
    outcome: str
    rows: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One task's inputs for one model call. ``types`` are Feast value types, by column.

    ``execution_id`` names the decision that asks, so that an answer to an earlier one is not taken for its own.
    """

    request_id: RequestId
    task: str
    values: Mapping[str, Value]
    types: Mapping[str, str]
    deadline_ms: int
    traceparent: str | None
    execution_id: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a backend said of one row: outputs by the server's tensor name, or the problem that it met.

    An output is the row's element, or the row's list of elements where it has several. ``sent`` is the call's body, as
    it went out; of a call that several rows share, it is the row's own request, as it would have gone out alone: the
    whole would be kept once a row, and show each decision its neighbours' inputs.
    """

    outputs: Mapping[str, Any] | None
    problem: Problem | None
    attempts: tuple[Attempt, ...]
    sent: bytes


@dataclass(frozen=True, slots=True)
class TaskResult:
    """How a task ended, with all that explains it; ``reason`` is why it was skipped, where that is no problem.

    ``referred``: it was not run, or what stood in failed, because a feature's contract leaves the decision to a person.
    Not recorded: the record's contracts and problems tell.
    """

    task: str
    status: TaskStatus
    output: Mapping[str, Scalar] | None
    problem: Problem | None
    latency_ms: float
    attempts: tuple[Attempt, ...]
    sent: bytes
    reason: str | None = None
    referred: bool = False


def sharing(rows: Sequence[Row], rows_max: int) -> list[int]:
    """The places of the rows that go into one call: the first, and up to ``rows_max`` in all that are of its shape.

    Of one shape are rows with the same columns in the same order, of the same types, so that each column is a tensor.
    """
    first = rows[0]
    names, places = tuple(first.values), [0]
    for place in range(1, len(rows)):
        if len(places) >= rows_max:
            break
        row = rows[place]
        if row.types == first.types and tuple(row.values) == names:
            places.append(place)
    return places


def judge(task: str, version: ModelVersionSpec, answer: Answer, latency_ms: float) -> TaskResult:
    """The result that ``answer`` makes under the version's output contracts."""
    problem, output = answer.problem, None
    if problem is None:
        try:
            output = {contract.name: _element(contract, answer.outputs or {}) for contract in version.outputs}
        except ValueError as error:
            said = f"{version.model} {version.version} answered unsoundly: {error}"
            problem = Problem(Code.MODEL_OUTPUT_INVALID, said, task=task)
    if problem is None:
        status = TaskStatus.OK
    elif problem.code in (Code.MODEL_TIMEOUT, Code.DEADLINE_EXCEEDED):
        status = TaskStatus.TIMEOUT
    else:
        status = TaskStatus.ERROR
    if problem is not None and problem.task is None:
        problem = Problem(problem.code, problem.message, task, problem.feature)
    return TaskResult(task, status, output, problem, latency_ms, answer.attempts, answer.sent)


def _element(contract: OutputContract, outputs: Mapping[str, Any]) -> Scalar:
    if contract.tensor not in outputs:
        have = ", ".join(sorted(outputs)) or "none"
        raise ValueError(f"no output {contract.tensor!r} (there is: {have})")
    value = outputs[contract.tensor]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        index = 0 if contract.element is None else contract.element
        if contract.element is None and len(value) != 1:
            raise ValueError(f"output {contract.tensor!r} has {len(value)} elements a row: name one by `element`")
        if index >= len(value):
            raise ValueError(
                f"output {contract.tensor!r} has {len(value)} elements a row, and element {index} is asked"
            )
        value = value[index]
    elif contract.element:
        raise ValueError(f"output {contract.tensor!r} has one element a row, and element {contract.element} is asked")
    return sound_value(contract, value)


def sound_value(contract: OutputContract, value: Any) -> Scalar:
    """``value`` as the contract's datatype.

    Raises:
        ValueError: it is of another, or outside the contract's bounds.
    """
    sound: Scalar
    match contract.datatype:
        case "BOOL" if isinstance(value, bool):
            return value
        case "BYTES" if isinstance(value, str):
            return value
        case "FP32" | "FP64" if isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value):
            sound = float(value)
        case "INT8" | "INT16" | "INT32" | "INT64" if isinstance(value, int) and not isinstance(value, bool):
            sound = value
        case _:
            raise ValueError(f"output {contract.name} is {str(value)[:40]!r}, which is not {contract.datatype}")
    if (contract.min is not None and sound < contract.min) or (contract.max is not None and sound > contract.max):
        raise ValueError(f"output {contract.name} is {sound}, outside {contract.min} to {contract.max}")
    return sound
