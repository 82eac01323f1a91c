"""Rollouts: what the new version did in a step so far, and a moment, in; whether to go on, out.

How far a rollout is stands in the revision (``Route.status``), and only publishing the next revision moves it. A step
is named by its status: what it is of, and since when. So a decision belongs to the step of the revision that it was
made under, whenever and by whomever it is counted.

A bound is broken for certain when more decisions missed it than could among ``minDecisions``, or among those that there
are by now; then the rollout is aborted at once. It goes on when its time is up, enough decisions were made and every
bound holds; anything else waits.
"""

import hashlib
import math
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import orjson

from app.domain.decisions import DecisionRecord, Kind
from app.domain.documents import Document, ModelVersion, Route
from app.domain.join import Status
from app.domain.registry import Revision, rolled_out, rollout_digest
from app.domain.requests import ROLLOUT_ID_PREFIX, InboundRecord, RequestId
from app.domain.rollout_stats import NO_ANSWER_MS, StepStats, Terms
from app.domain.route_documents import Rollout, RolloutStatus, RouteStatus, TaskSpec
from app.domain.routing import barred_by
from app.durations import format_duration

Action = Literal["start", "advance", "pause", "resume", "abort", "promote"]
Order = Literal["pause", "resume", "abort", "promote"]
"""What an operator may say."""

INSTANCE: Final = "rollouts"
RESUMED: Final = "resumed"
"""How the reason of a status begins that an operator let go on."""
_NAMESPACE: Final = uuid.UUID("2d1f9a54-6a51-5c0b-9f61-0c3d8a7be214")
_ID_BYTES_MAX: Final = 512
OWED_SHARE: Final = 0.25
"""Of the time that a version may have at most, what it must have been given for its silence to tell of it; or less, as
much as the p99 that it is held against."""
_P99_SHARE: Final = 0.01
"""What may be above a p99."""


@dataclass(frozen=True, slots=True, order=True)
class RolloutName:
    """Which rollout: its route, rule and task.

    >>> str(RolloutName("credit", "default", "pd")), RolloutName.read("credit/default/pd").task
    ('credit/default/pd', 'pd')
    """

    route: str
    rule: str
    task: str

    def __str__(self) -> str:
        return f"{self.route}/{self.rule}/{self.task}"

    @property
    def key(self) -> str:
        """Its name within its route's status."""
        return f"{self.rule}/{self.task}"

    @classmethod
    def read(cls, text: str) -> "RolloutName":
        """The name in ``ROUTE/RULE/TASK``; ValueError for anything else."""
        parts = text.split("/")
        if len(parts) != 3 or not all(parts):
            raise ValueError(f"{text!r} is not ROUTE/RULE/TASK")
        return cls(*parts)


@dataclass(frozen=True, slots=True)
class Running:
    """A rollout and how far it is. ``owed_ms``: a call that was given less is not held against the new version."""

    name: RolloutName
    task: TaskSpec
    rollout: Rollout
    status: RolloutStatus
    owed_ms: float

    @property
    def terms(self) -> Terms:
        """What decisions of the new version are counted by."""
        return Terms(self.rollout.to, self.owed_ms, self.rollout.abort_on.p99)

    @property
    def percent(self) -> int:
        """The part of the subjects that the new version has."""
        return rolled_out(self.rollout, self.status)

    @property
    def step_id(self) -> str:
        """Names this step of this rollout and no other."""
        return step_id(self.name, self.status)


def step_id(name: RolloutName, status: RolloutStatus) -> str:
    """Names one step; unlike any before it, because a status is since another moment."""
    return f"{name}|{status.of}|{status.since}"


def rollouts_in(documents: Iterable[Document]) -> Iterator[Running]:
    """The rollouts of a revision that have begun."""
    documents = tuple(documents)
    timeouts = {
        (each.spec.model, each.spec.version): each.spec.policy.timeout
        for each in documents
        if isinstance(each, ModelVersion)
    }
    for document in documents:
        if not isinstance(document, Route) or document.status is None:
            continue
        for rule in document.spec.rules:
            for task in rule.tasks:
                status = document.status.rollouts.get(f"{rule.name}/{task.name}")
                if task.rollout is None or status is None or status.of != rollout_digest(rule.name, task):
                    continue
                name = RolloutName(document.metadata.name, rule.name, task.name)
                most_ms = min(document.spec.deadline, timeouts[task.model, task.rollout.to])
                owed_ms = min(most_ms * OWED_SHARE, task.rollout.abort_on.p99 or math.inf)
                yield Running(name, task, task.rollout, status, owed_ms)


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stay:
    """Nothing to do yet; ``reason`` says what for."""

    reason: str


@dataclass(frozen=True, slots=True)
class Advance:
    """The next step."""

    reason: str


@dataclass(frozen=True, slots=True)
class Promote:
    """The last step has held: the version serves all, for good."""

    reason: str


@dataclass(frozen=True, slots=True)
class Abort:
    """A bound is broken: the old version serves all again."""

    reason: str


Verdict = Stay | Advance | Promote | Abort


def judge(
    rollout: Rollout, status: RolloutStatus, stats: StepStats, now_ms: int, *, barred: str | None = None
) -> Verdict:
    """What follows for a rollout from its step's ``stats`` at ``now_ms``. Nothing moves unless it is progressing.

    ``barred``: why the new version may not decide, where it may not; its part of the subjects is badly served by then.
    """
    if status.state != "progressing":
        return Stay(f"it is {status.state}")
    if barred is not None:
        return Abort(barred)
    broken, doubtful = _held_against(rollout, stats)
    if broken is not None:
        return Abort(broken)
    if stats.decisions < rollout.min_decisions:
        more = f", and {stats.unjudged} that say nothing of it" if stats.unjudged else ""
        return Stay(f"{stats.decisions} of at least {rollout.min_decisions} decisions by version {rollout.to}{more}")
    left_ms = status.since + rollout.every - now_ms
    if left_ms > 0:
        return Stay(f"{format_duration(left_ms)} of {format_duration(rollout.every)} left")
    if doubtful is not None:
        return Stay(doubtful)
    unsure = _unsure(rollout, stats)
    if unsure is not None:
        return Stay(unsure)
    answered = stats.latencies.count
    if rollout.abort_on.p99 is not None and answered < rollout.min_decisions:
        return Stay(f"{answered} of at least {rollout.min_decisions} calls of version {rollout.to} for its p99")
    if (
        rollout.abort_on.flip_rate is not None
        and stats.compared < rollout.min_decisions
        and _has_others(rollout, status)
    ):
        return Stay(f"{stats.compared} of at least {rollout.min_decisions} comparisons with version {rollout.to}")
    held = f"{stats.decisions} decisions in {format_duration(rollout.every)} or more, within all bounds"
    return Promote(held) if status.step >= len(rollout.steps) - 1 else Advance(held)


def judge_in(revision: Revision, running: Running, stats: StepStats, now_ms: int) -> Verdict:
    """``judge`` of a rollout of ``revision``, which knows whether the new version may decide."""
    version = revision.versions[running.task.model, running.rollout.to]
    barred = barred_by(revision, version, now_ms, running.name.task)
    said = None if barred is None else barred.message
    return judge(running.rollout, running.status, stats, now_ms, barred=said)


def _has_others(rollout: Rollout, status: RolloutStatus) -> bool:
    """Whether other versions still decide in this step, so that there is something to compare with."""
    return rolled_out(rollout, status) < 100


def _held_against(rollout: Rollout, stats: StepStats) -> tuple[str | None, str | None]:
    """The bound that is broken for certain; and one that does not hold on what little is known."""
    bounds, least = rollout.abort_on, rollout.min_decisions
    broken, doubtful = list[str](), list[str]()
    for name, bound, count, total in (
        ("errors", bounds.error_rate, stats.errors, stats.decisions),
        ("flips", bounds.flip_rate, stats.flips, stats.compared),
    ):
        if bound is None or not count > bound * total:
            continue
        of = f"{name} in {count} of {total} decisions, above {bound:.2%}"
        if count > bound * max(total, least):
            broken.append(f"{of}" if total >= least else f"{of} of {least} already")
        else:
            doubtful.append(of)
    p99_ms = stats.latencies.quantile_ms(0.99)
    if bounds.p99 is not None and p99_ms is not None and p99_ms > bounds.p99:
        slow = f"p99 of {p99_ms:.0f} ms" if p99_ms < NO_ANSWER_MS / 2 else "more than 1 % of calls without an answer"
        said = f"{slow} in {stats.decisions} decisions, above {format_duration(bounds.p99)}"
        (broken if stats.decisions >= least else doubtful).append(said)
    return "; ".join(broken) or None, "; ".join(doubtful) or None


def _unsure(rollout: Rollout, stats: StepStats) -> str | None:
    """The bound that might not hold, by what says nothing of the version: no reason to end it, nor to go on."""
    bounds, unjudged, known = rollout.abort_on, stats.unjudged, stats.decisions + stats.unjudged
    said = "had no feature store or too little time"
    if bounds.error_rate is not None and stats.errors + unjudged > bounds.error_rate * known:
        above = f"all together above {bounds.error_rate:.2%}"
        return f"{unjudged} of {known} decisions {said}, and {stats.errors} failed: {above}"
    if bounds.p99 is not None and unjudged:
        slow, calls = stats.latencies.above(bounds.p99), stats.latencies.count + unjudged
        if slow + unjudged > _P99_SHARE * calls:
            above = f"{slow} took longer than {format_duration(bounds.p99)}: all together more than 1 %"
            return f"{unjudged} of {calls} calls {said}, and {above}"
    return None


# --- moving -----------------------------------------------------------------------------------------------------------


def follow(running: Running, verdict: Advance | Promote | Abort, now_ms: int) -> RolloutStatus:
    """The status after ``verdict``."""
    status, last = running.status, len(running.rollout.steps) - 1
    match verdict:
        case Advance():
            return _next(status, now_ms, "progressing", status.step + 1, verdict.reason)
        case Promote():
            return _next(status, now_ms, "promoted", last, verdict.reason)
        case Abort():
            return _next(status, now_ms, "aborted", status.step, verdict.reason)


def obey(running: Running, order: Order, now_ms: int, *, reason: str = "by operator") -> RolloutStatus:
    """The status after an operator's order; ValueError where it makes no sense. A step that is resumed begins anew."""
    status, last = running.status, len(running.rollout.steps) - 1
    state = status.state
    match order:
        case "pause" if state == "progressing":
            return _next(status, now_ms, "paused", status.step, f"paused {reason}")
        case "resume" if state == "paused":
            return _next(status, now_ms, "progressing", status.step, f"{RESUMED} {reason}")
        case "abort" if state != "aborted":
            return _next(status, now_ms, "aborted", status.step, f"aborted {reason}")
        case "promote" if state in ("progressing", "paused"):
            return _next(status, now_ms, "promoted", last, f"promoted {reason}")
    hint = "; to begin it again, change or remove it in the documents and apply" if state == "aborted" else ""
    raise ValueError(f"{running.name} is {state}, and cannot be told to {order}{hint}")


def _next(
    status: RolloutStatus,
    now_ms: int,
    state: Literal["progressing", "paused", "promoted", "aborted"],
    step: int,
    reason: str,
) -> RolloutStatus:
    # A clock that went back must not give two steps one name.
    since = max(now_ms, status.since + 1)
    return RolloutStatus(state=state, step=step, since=since, of=status.of, reason=reason)


def moved(documents: Iterable[Document], name: RolloutName, status: RolloutStatus) -> tuple[Document, ...]:
    """``documents`` with one rollout's status replaced."""
    result = list[Document]()
    for document in documents:
        if isinstance(document, Route) and document.metadata.name == name.route:
            rollouts = {**(document.status or RouteStatus()).rollouts, name.key: status}
            result.append(document.model_copy(update={"status": RouteStatus(rollouts=rollouts)}))
        else:
            result.append(document)
    return tuple(result)


def action_of(status: RolloutStatus) -> Action:
    """What brought a rollout to this status."""
    match status.state:
        case "paused":
            return "pause"
        case "aborted":
            return "abort"
        case "promoted":
            return "promote"
    if (status.reason or "").startswith(RESUMED):
        return "resume"
    return "start" if status.step == 0 else "advance"


# --- evidence ---------------------------------------------------------------------------------------------------------


def record_id(name: RolloutName, status: RolloutStatus) -> str:
    """The execution id of a step's audit record: the same, whoever writes it."""
    return str(uuid.uuid5(_NAMESPACE, f"{step_id(name, status)}|{status.state}|{status.step}"))


def request_id_of(name: RolloutName) -> RequestId:
    """Under which request id a rollout's steps are recorded.

    >>> request_id_of(RolloutName("credit", "default", "pd"))
    'rollout/credit/default/pd'
    """
    written = f"{ROLLOUT_ID_PREFIX}{name}"
    if len(written.encode()) > _ID_BYTES_MAX:
        written = f"{ROLLOUT_ID_PREFIX}{hashlib.sha256(written.encode()).hexdigest()}"
    return RequestId(written)


def step_record(
    after: Running, *, revision: str, previous: str | None, stats: StepStats | None, source_topic: str
) -> DecisionRecord:
    """The audit record of a rollout that came to ``after`` by ``revision``; ``stats`` are what it was judged by."""
    name, status = after.name, after.status
    evidence = orjson.dumps(
        {
            "route": name.route,
            "rule": name.rule,
            "task": name.task,
            "to": after.rollout.to,
            "action": action_of(status),
            "state": status.state,
            "step": status.step,
            "percent": after.percent,
            "since": status.since,
            "reason": status.reason,
            "stats": None if stats is None else stats.summary(),
            "bounds": after.rollout.abort_on.model_dump(mode="json", by_alias=True, exclude_none=True),
            "revision": revision,
            "previous": previous,
        }
    )
    return DecisionRecord(
        kind=Kind.ROLLOUT,
        request_id=request_id_of(name),
        execution_id=record_id(name, status),
        source=InboundRecord(source_topic, 0, -1, status.since, b"current", None, ()),
        content_type="application/json",
        body=hashlib.sha256(evidence).hexdigest(),
        received_ms=status.since,
        deadline_ms=status.since,
        instance=INSTANCE,
        route=name.route,
        rule=name.rule,
        revision=revision,
        status=Status.COMPLETED,
        decided_ms=status.since,
        evidence=evidence,
    )
