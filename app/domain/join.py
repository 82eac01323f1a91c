"""The join: tasks' results and a timer in, in any order and any number; exactly one outcome out.

A ``Join`` is a value. ``on_result`` and ``on_deadline`` return the next value and what to do: wait, decide with an
outcome, or ignore what came (repeated, late, or of no task of this join). Once it has decided it only ignores, whatever
comes, so loss, repetition and reordering of its inputs cannot make a second decision.

It decides once every task has ended (policy ``all``), or once enough have answered (``quorum``, ``first``) or cannot
any more. A task that is referred (a feature's contract wants a person to decide) stands in nobody's way: the others end
as they would, and what they amount to is partial. ``ready`` names the tasks whose predecessors have ended, so order
among tasks is the join's knowledge too.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from app.domain.dispatch import TaskResult, TaskStatus
from app.domain.document_parts import Scalar
from app.domain.errors import Code, Problem
from app.domain.route_documents import JoinSpec, TaskSpec


class Status(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    PARTIAL = "partial"
    REJECTED = "rejected"
    EXPIRED = "expired"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class JoinTask:
    """What the join must know of a task: its name, what stands in for its answer, and what it waits for."""

    name: str
    need: Literal["required", "optional", "default"]
    default: Mapping[str, Scalar] | None = None
    after: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: TaskSpec) -> "JoinTask":
        """The join's view of a task's document; a fallback that is a fixed answer is the task's default."""
        fixed = next((each.default for each in spec.fallback if each.default is not None), None)
        if fixed is not None:
            return cls(spec.name, "default", fixed, spec.after)
        return cls(spec.name, spec.need, spec.default, spec.after)


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


_ANSWERED = (TaskStatus.OK, TaskStatus.DEFAULTED)


@dataclass(frozen=True, slots=True)
class Join:
    """Tasks, the results that came, and whether it has decided. ``wanted``: so many answers are enough; None: all."""

    tasks: tuple[JoinTask, ...]
    deadline_ms: int
    results: Mapping[str, TaskResult]
    decided: bool = False
    wanted: int | None = None

    @classmethod
    def of(cls, specs: Sequence[TaskSpec], deadline_ms: int, policy: JoinSpec | None = None) -> "Join":
        """A join of these tasks, without results."""
        wanted = None if policy is None or policy.policy == "all" else policy.n or 1
        return cls(tuple(JoinTask.of(spec) for spec in specs), deadline_ms, {}, wanted=wanted)

    def ready(self, begun: Collection[str]) -> tuple[str, ...]:
        """The tasks that may begin: neither begun nor ended, and all that they wait for has ended."""
        if self.decided:
            return ()
        results = self.results
        return tuple(
            task.name
            for task in self.tasks
            if task.name not in begun and task.name not in results and all(name in results for name in task.after)
        )

    def on_result(self, result: TaskResult) -> tuple["Join", Effect]:
        """A task ended."""
        if self.decided:
            return self, Ignore("late")
        task = next((task for task in self.tasks if task.name == result.task), None)
        if task is None:
            return self, Ignore("unknown_task")
        if result.task in self.results:
            return self, Ignore("repeated")
        joined = replace(self, results={**self.results, result.task: _defaulted(task, result)})
        return joined._decide() if joined._is_over() else (joined, Wait())

    def on_deadline(self, now_ms: int) -> tuple["Join", Effect]:
        """The timer fired: decide with what came."""
        if self.decided:
            return self, Ignore("late")
        if now_ms < self.deadline_ms:
            return self, Ignore("early")
        return self._decide()

    @property
    def _answers(self) -> int:
        return sum(result.status in _ANSWERED for result in self.results.values())

    @property
    def _referrals(self) -> int:
        return sum(result.referred for result in self.results.values())

    def _is_over(self) -> bool:
        left = len(self.tasks) - len(self.results)
        if self.wanted is None or left == 0:
            return left == 0
        return self._answers >= self.wanted or self._answers + self._referrals + left < self.wanted

    def _decide(self) -> tuple["Join", Effect]:
        enough = self.wanted is not None and self._answers >= self.wanted
        left = len(self.tasks) - len(self.results)
        hopeless = self.wanted is not None and self._answers + self._referrals + left < self.wanted
        over = self._verdict(enough) if enough or hopeless else None
        results = {
            task.name: self.results.get(task.name)
            or (_defaulted(task, _overdue(task.name)) if over is None else _cancelled(task.name, over))
            for task in self.tasks
        }
        problems = [result.problem for result in results.values() if result.problem is not None]
        if self.wanted is None:
            status = self._status(results)
        elif sum(result.status in _ANSWERED for result in results.values()) >= self.wanted:
            status = Status.COMPLETED
        elif self._referrals and self._answers + self._referrals >= self.wanted:
            # With the referred ones there would have been enough: what is missing is a person's word.
            status = Status.PARTIAL
        else:
            status = Status.EXPIRED if any(map(_is_late, results.values())) else Status.FAILED
            came = sum(result.status in _ANSWERED for result in results.values())
            said = f"{self.wanted} of {len(self.tasks)} tasks must answer, and {came} did"
            problems.append(Problem(Code.QUORUM_MISSED, said))
        return replace(self, decided=True), Decide(Outcome(status, results, tuple(problems)))

    def _verdict(self, enough: bool) -> str:
        """Why nobody waits for the rest."""
        wanted = f"{self.wanted} of {len(self.tasks)}"
        return f"{wanted} answers were enough" if enough else f"{wanted} answers could not come together any more"

    def _status(self, results: Mapping[str, TaskResult]) -> Status:
        status = Status.COMPLETED
        for task in self.tasks:
            result = results[task.name]
            if result.status is TaskStatus.OK or (result.status is TaskStatus.SKIPPED and result.problem is None):
                # Skipped without a problem: its own condition said so.
                continue
            if task.need == "required" and result.status is not TaskStatus.DEFAULTED and not result.referred:
                # The deadline's own verdict yields to a failure that has a cause.
                status = Status.EXPIRED if _is_late(result) and status is not Status.FAILED else Status.FAILED
            elif status is Status.COMPLETED:
                status = Status.PARTIAL
        return status


def _defaulted(task: JoinTask, result: TaskResult) -> TaskResult:
    """The result, or the task's fixed answer where it has one and there is none.

    A fixed answer stands for a model that failed, not for the person who must decide.
    """
    if result.referred or task.need != "default" or result.status is TaskStatus.OK or result.problem is None:
        return result
    return replace(result, status=TaskStatus.DEFAULTED, output=task.default)


def _is_late(result: TaskResult) -> bool:
    return result.problem is not None and result.problem.code is Code.DEADLINE_EXCEEDED


def _cancelled(task: str, reason: str) -> TaskResult:
    return TaskResult(task, TaskStatus.SKIPPED, None, None, 0.0, (), b"", reason)


def _overdue(task: str) -> TaskResult:
    problem = Problem(Code.DEADLINE_EXCEEDED, "no answer before the request's deadline", task=task)
    return TaskResult(task, TaskStatus.TIMEOUT, None, problem, 0.0, (), b"")
