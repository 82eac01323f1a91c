"""The join: tasks' results and a timer in, in any order and any number; exactly one outcome out.

A ``Join`` is a value. ``on_result`` and ``on_deadline`` return the next value and what to do: wait, decide with an
outcome, or ignore what came (repeated, late, or of no task of this join). Once it has decided it only ignores, whatever
comes, so loss, repetition and reordering of its inputs cannot make a second decision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from app.domain.dispatch import TaskResult, TaskStatus
from app.domain.documents import Scalar, TaskSpec
from app.domain.errors import Code, Problem


class Status(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    PARTIAL = "partial"
    REJECTED = "rejected"
    EXPIRED = "expired"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class JoinTask:
    """What the join must know of a task: its name, and what stands in for it."""

    name: str
    need: Literal["required", "optional", "default"]
    default: Mapping[str, Scalar] | None = None

    @classmethod
    def of(cls, spec: TaskSpec) -> "JoinTask":
        """The join's view of a task's document."""
        return cls(spec.name, spec.need, spec.default)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The joined answers: every task has a result, and the status says what they amount to."""

    status: Status
    results: Mapping[str, TaskResult]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do yet."""


@dataclass(frozen=True, slots=True)
class Decide:
    """The join is over: make the decision."""

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Ignore:
    """What came changes nothing; ``reason`` is counted."""

    reason: Literal["late", "repeated", "unknown_task", "early"]


Effect = Wait | Decide | Ignore


@dataclass(frozen=True, slots=True)
class Join:
    """Tasks, the results that came, and whether it has decided."""

    tasks: tuple[JoinTask, ...]
    deadline_ms: int
    results: Mapping[str, TaskResult]
    decided: bool = False

    @classmethod
    def of(cls, specs: Sequence[TaskSpec], deadline_ms: int) -> "Join":
        """A join of these tasks, without results."""
        return cls(tuple(JoinTask.of(spec) for spec in specs), deadline_ms, {})

    def on_result(self, result: TaskResult) -> tuple["Join", Effect]:
        """A task ended."""
        if self.decided:
            return self, Ignore("late")
        if all(task.name != result.task for task in self.tasks):
            return self, Ignore("unknown_task")
        if result.task in self.results:
            return self, Ignore("repeated")
        joined = replace(self, results={**self.results, result.task: result})
        if len(joined.results) < len(joined.tasks):
            return joined, Wait()
        return joined._decide()

    def on_deadline(self, now_ms: int) -> tuple["Join", Effect]:
        """The timer fired: decide with what came."""
        if self.decided:
            return self, Ignore("late")
        if now_ms < self.deadline_ms:
            return self, Ignore("early")
        return self._decide()

    def _decide(self) -> tuple["Join", Effect]:
        results: dict[str, TaskResult] = {}
        problems: list[Problem] = []
        status = Status.COMPLETED
        for task in self.tasks:
            result = self.results.get(task.name) or _overdue(task.name)
            if result.problem is not None:
                problems.append(result.problem)
            if result.status is not TaskStatus.OK:
                if task.need == "required":
                    # The deadline's own verdict yields to a failure that has a cause.
                    late = result.problem is not None and result.problem.code is Code.DEADLINE_EXCEEDED
                    status = Status.EXPIRED if late and status is not Status.FAILED else Status.FAILED
                elif status is Status.COMPLETED:
                    status = Status.PARTIAL
                if task.need == "default":
                    result = replace(result, status=TaskStatus.DEFAULTED, output=task.default)
            results[task.name] = result
        return replace(self, decided=True), Decide(Outcome(status, results, tuple(problems)))


def _overdue(task: str) -> TaskResult:
    problem = Problem(Code.DEADLINE_EXCEEDED, "no answer before the request's deadline", task=task)
    return TaskResult(task, TaskStatus.TIMEOUT, None, problem, 0.0, (), b"")
