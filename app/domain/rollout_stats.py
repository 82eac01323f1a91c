"""What a rollout's step has seen: decisions of the new version, its failures, its latencies; its shadow's flips.

Statistics of parts add up to those of the whole: each partition of the audit's log keeps its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from app.domain.comparison_stats import Latencies
from app.domain.decisions import TaskRecord
from app.domain.dispatch import TaskResult, TaskStatus
from app.domain.errors import Code, Problem

UNATTENDED: Final = "unattended"
"""The outcome of a call to a pool that was given up, and whose answer nobody listened for all the while."""
UNACKNOWLEDGED: Final = "unacknowledged"
"""The outcome of a call to a pool that was given up before Kafka had acknowledged it: the pool may not have had it."""
_NOT_TO_BE_RUN: Final = (Code.CONDITION_FAILED, Code.PREDECESSOR_FAILED)
"""Why a task is not run, whatever its version is."""
_GIVEN_UP: Final = (Code.MODEL_TIMEOUT, Code.DEADLINE_EXCEEDED)
"""What a call ends with that nobody waits for any more."""
_UNREACHED: Final = (Code.MODEL_UNAVAILABLE, Code.MODEL_EJECTED)
"""What a call ends with, or is not made for, that no model has answered."""
_CUT_OFF: Final = ("deadline", "timeout", UNATTENDED)
"""Outcomes of attempts that nobody answered in time."""
NO_ANSWER_MS: Final = 3_600_000.0
"""The latency of a call that was given up: more than any bound may be."""

_Ended = Literal["ok", "failed", "slow", "unjudged"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a new version is judged by. A call that was given up before ``owed_ms`` says nothing of it."""

    version: str
    owed_ms: float
    p99_ms: float | None = None


@dataclass(slots=True)
class StepStats:
    """What the new version did in a step. ``compared`` and ``flips`` are of its shadow.

    ``unjudged`` came to the new version and says nothing of it: there was no feature store, or too little time.
    """

    decisions: int = 0
    errors: int = 0
    compared: int = 0
    flips: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    unjudged: int = 0

    def feed_decision(self, task: TaskRecord, terms: Terms, problems: Sequence[Problem] = ()) -> bool:
        """Count what the version answered in ``task``, or failed to before another stood in; whether it counts.

        What it lacks to be asked at all, a feature say, is its failure too: its record, or among the decision's
        ``problems`` where these ended the request. A task that was not to be run does not count, nor one that others
        made needless, unless it was above the p99 by then.
        """
        fed = False
        for each in (*task.earlier, task):
            # Drawn by chance, and not asked for by a caller or come to because another version failed.
            if each.version != terms.version or each.selected_by != "rollout":
                continue
            ended = _ended(each.result, [problem for problem in problems if problem.task == task.name], terms)
            fed = fed or ended is not None
            match ended:
                case "unjudged":
                    self.unjudged += 1
                case "ok" | "failed" | "slow":
                    self.decisions += 1
                    self.errors += ended == "failed"
                    latency_ms = NO_ANSWER_MS if ended == "slow" else _latency_ms(each.result, terms)
                    if latency_ms is not None:
                        self.latencies.add(latency_ms)
        return fed

    def feed_shadow(self, evidence: Mapping[str, Any]) -> bool:
        """Count a decision that the version would have made; whether it can be told what it would have changed."""
        flipped = evidence.get("flipped")
        if not isinstance(flipped, bool):
            return False
        self.compared += 1
        self.flips += flipped
        return True

    def merge(self, other: "StepStats") -> None:
        """Take in another partition's."""
        self.decisions += other.decisions
        self.errors += other.errors
        self.unjudged += other.unjudged
        self.compared += other.compared
        self.flips += other.flips
        self.latencies.merge(other.latencies)

    def as_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return {
            "decisions": self.decisions,
            "errors": self.errors,
            "unjudged": self.unjudged,
            "compared": self.compared,
            "flips": self.flips,
            "latencies": self.latencies.as_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "StepStats":
        """The statistics that ``as_json`` gave."""
        return cls(
            content["decisions"],
            content["errors"],
            content["compared"],
            content["flips"],
            Latencies.from_json(content["latencies"]),
            content.get("unjudged", 0),
        )

    def summary(self) -> dict[str, Any]:
        """The figures that the bounds are held against."""
        return {
            "decisions": self.decisions,
            "errors": self.errors,
            "error_rate": self.errors / self.decisions if self.decisions else None,
            "unjudged": self.unjudged,
            "p99_ms": self.latencies.quantile_ms(0.99),
            "compared": self.compared,
            "flips": self.flips,
            "flip_rate": self.flips / self.compared if self.compared else None,
        }


def _ended(result: TaskResult | None, problems: Sequence[Problem], terms: Terms) -> _Ended | None:
    """How a version ended, by its result, or where there is none by what ended the request; None: it does not count."""
    if result is None:
        mattering = [problem for problem in problems if problem.code not in _NOT_TO_BE_RUN]
        if not mattering:
            return None
        own = any(problem.code is not Code.FEATURES_UNAVAILABLE for problem in mattering)
        return "failed" if own else "unjudged"
    if result.status is TaskStatus.OK:
        return "ok"
    code = None if result.problem is None else result.problem.code
    if result.status is TaskStatus.PENDING or code in _NOT_TO_BE_RUN:
        return None
    if code is None and result.status is TaskStatus.SKIPPED:
        # Others were enough, and it is no failure of what was still asked. But how long it had not answered is known.
        asked = any(attempt.outcome == "cancelled" for attempt in result.attempts)
        return "slow" if asked and terms.p99_ms is not None and result.latency_ms >= terms.p99_ms else None
    return "unjudged" if code is Code.FEATURES_UNAVAILABLE or _had_no_time(result, code, terms) else "failed"


def _had_no_time(result: TaskResult, code: Code | None, terms: Terms) -> bool:
    """Whether the version was given up before it had its time, or could not be asked or heard any more.

    A latency that was cut off is known only to be longer ("right-censored", Kaplan and Meier 1958): where the cut came
    early, that is next to nothing.
    """
    outcomes = [attempt.outcome for attempt in result.attempts]
    if UNACKNOWLEDGED in outcomes:
        return True
    silent = all(outcome in _CUT_OFF for outcome in outcomes)
    return code in _GIVEN_UP and silent and (result.latency_ms < terms.owed_ms or UNATTENDED in outcomes)


def _latency_ms(result: TaskResult | None, terms: Terms) -> float | None:
    """How long a call took; None where none was made, or what refused it at once was no model."""
    if result is None:
        return None
    code = None if result.problem is None else result.problem.code
    given_up = code is not None and any(attempt.outcome in _CUT_OFF for attempt in result.attempts)
    if code in _GIVEN_UP or given_up:
        return NO_ANSWER_MS
    if code in _UNREACHED and result.latency_ms < terms.owed_ms:
        return None
    return result.latency_ms if result.attempts else None
