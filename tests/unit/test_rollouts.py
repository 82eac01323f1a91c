"""When a rollout goes on, ends well, or is taken back; and that its steps are named and recorded the same by all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest

from app.adapters.record_codec import decode_record, encode_record
from app.domain.decisions import TaskRecord
from app.domain.dispatch import Attempt, TaskResult, TaskStatus
from app.domain.errors import Code, Problem
from app.domain.registry import Source, compile_revision, read_revision, rollout_digest
from app.domain.rollout_stats import UNACKNOWLEDGED, UNATTENDED, StepStats, Terms
from app.domain.rollouts import (
    Abort,
    Advance,
    Promote,
    RolloutName,
    Running,
    Stay,
    action_of,
    follow,
    judge,
    moved,
    obey,
    record_id,
    rollouts_in,
    step_record,
)
from app.domain.route_documents import Rollout, RolloutStatus
from tests.support.rollouts import EVERY_MS, begun, documents, rollout_documents

NAME = RolloutName("scored", "default", "first")
BEGAN = 1_000_000


def rollout(**abort_on: Any) -> Rollout:
    return Rollout.model_validate(
        {"to": "2", "steps": (5, 50, 100), "every": "10m", "abortOn": abort_on, "minDecisions": 100}
    )


def status(state: Any = "progressing", step: int = 0) -> RolloutStatus:
    return RolloutStatus(state=state, step=step, since=BEGAN, of="digest")


def stats(decisions: int, errors: int = 0, *, compared: int = 0, flips: int = 0, latency_ms: float = 10.0) -> StepStats:
    made = StepStats(decisions, errors, compared, flips)
    for _ in range(decisions):
        made.latencies.add(latency_ms)
    return made


LATER = BEGAN + 600_000


def test_it_goes_on_when_time_is_up_and_enough_was_decided_well() -> None:
    """Both are needed; after the last step there is no next one."""
    assert isinstance(judge(rollout(), status(), stats(100), LATER), Advance)
    assert isinstance(judge(rollout(), status(step=2), stats(100), LATER), Promote)
    assert judge(rollout(), status(), stats(100), LATER - 1) == Stay("1ms of 10m left")
    assert judge(rollout(), status(), stats(99), LATER) == Stay("99 of at least 100 decisions by version 2")


@pytest.mark.parametrize("state", ["paused", "promoted", "aborted"])
def test_nothing_moves_unless_it_is_progressing(state: str) -> None:
    """An operator's pause holds whatever the figures say."""
    assert isinstance(judge(rollout(errorRate=0.01), status(state), stats(1_000, 1_000), LATER), Stay)


def test_a_bound_is_broken_as_soon_as_that_is_certain() -> None:
    """Of 100 decisions 2 may fail at 2 %: the third failure ends it, however few were made."""
    bounds = rollout(errorRate=0.02)
    assert isinstance(judge(bounds, status(), stats(2, 2), BEGAN), Stay)
    assert judge(bounds, status(), stats(3, 3), BEGAN) == Abort(
        "errors in 3 of 3 decisions, above 2.00% of 100 already"
    )
    assert isinstance(judge(bounds, status(), stats(100, 2), BEGAN), Stay)
    assert isinstance(judge(bounds, status(), stats(200, 4), LATER), Advance)
    assert isinstance(judge(bounds, status(), stats(200, 5), BEGAN), Abort)


def test_flips_are_held_against_what_was_compared() -> None:
    """A few comparisons neither end a step nor let it go on; at 100 % there is nothing left to compare with."""
    bounds = rollout(flipRate=0.05)
    said = "99 of at least 100 comparisons with version 2"
    assert judge(bounds, status(), stats(100, compared=99), LATER) == Stay(said)
    assert isinstance(judge(bounds, status(), stats(100, compared=100), LATER), Advance)
    assert isinstance(judge(bounds, status(step=2), stats(100), LATER), Promote)
    assert judge(bounds, status(), stats(100, compared=10, flips=2), LATER) == Stay(
        "flips in 2 of 10 decisions, above 5.00%"
    )
    assert isinstance(judge(bounds, status(), stats(100, compared=10, flips=6), BEGAN), Abort)
    assert isinstance(judge(bounds, status(), stats(100, compared=200, flips=11), BEGAN), Abort)
    assert isinstance(judge(bounds, status(), stats(100, compared=200, flips=10), LATER), Advance)


def test_slowness_ends_a_step_once_enough_was_decided() -> None:
    """A slow start is not yet a verdict."""
    bounds = rollout(p99="100ms")
    assert isinstance(judge(bounds, status(), stats(99, latency_ms=500), LATER), Stay)
    slow = judge(bounds, status(), stats(100, latency_ms=500), BEGAN)
    assert isinstance(slow, Abort)
    assert "in 100 decisions, above 100ms" in slow.reason
    assert isinstance(judge(bounds, status(), stats(100, latency_ms=100), LATER), Advance)


def task(*results: tuple[str, TaskStatus]) -> TaskRecord:
    """A task that was tried in these versions, the last one's result its own."""
    records = [
        TaskRecord(
            "first",
            "inline",
            version,
            "sha256:0",
            "http",
            "rollout",
            "required",
            None,
            (),
            result(state),
        )
        for version, state in results
    ]
    return replace(records[-1], earlier=tuple(records[:-1]))


TERMS = Terms("2", 100.0, 300.0)


def to_2(made: StepStats, task: TaskRecord, problems: Sequence[Problem] = ()) -> bool:
    """Count it in a rollout to version 2."""
    return made.feed_decision(task, TERMS, problems)


def result(state: TaskStatus, problem: Problem | None = None) -> TaskResult:
    if problem is None and state in (TaskStatus.TIMEOUT, TaskStatus.DEFAULTED):
        problem = Problem(Code.MODEL_TIMEOUT, "no answer", "first")
        waited = Attempt("http://model", BEGAN, 200.0, "timeout")
        return TaskResult("first", state, None, problem, waited.latency_ms, (waited,), b"")
    called = state is not TaskStatus.SKIPPED
    attempts = (Attempt("http://model", BEGAN, 12.0, "ok"),) if called else ()
    return TaskResult("first", state, None, problem, 12.0 if called else 0.0, attempts, b"")


def test_only_what_the_new_version_answered_counts() -> None:
    """Its failure counts though another stood in; a task that was not run says nothing."""
    made = StepStats()
    assert to_2(made, task(("2", TaskStatus.OK)))
    assert not to_2(made, task(("1", TaskStatus.OK)))
    assert to_2(made, task(("2", TaskStatus.TIMEOUT), ("1", TaskStatus.OK)))
    assert to_2(made, task(("2", TaskStatus.DEFAULTED)))
    assert not to_2(made, task(("2", TaskStatus.SKIPPED)))
    assert (made.decisions, made.errors, made.latencies.count) == (3, 2, 3)


@pytest.mark.parametrize(
    ("code", "counts"),
    [
        (Code.FEATURE_MISSING, True),
        (Code.FEATURE_STALE, True),
        (Code.VERSION_EXPIRED, True),
        (Code.PREDECESSOR_FAILED, False),
        (Code.CONDITION_FAILED, False),
    ],
)
@pytest.mark.parametrize("stood_in", [False, True])
def test_what_a_version_lacks_to_be_asked_is_its_failure(code: Code, counts: bool, stood_in: bool) -> None:
    """Whether another stood in or not; it has no latency. What the route or another task lacks is not."""
    made = StepStats()
    skipped = replace(task(("2", TaskStatus.SKIPPED)), result=result(TaskStatus.SKIPPED, Problem(code, "no", "first")))
    whole = replace(task(("1", TaskStatus.OK)), earlier=(skipped,)) if stood_in else skipped
    assert to_2(made, whole) is counts
    assert (made.decisions, made.errors, made.latencies.count) == (counts, counts, 0)


def test_what_ended_the_request_before_any_task_is_its_versions_failure() -> None:
    """The record has no result then, and the decision's problems name the task."""
    made = StepStats()
    unasked = replace(task(("2", TaskStatus.OK)), result=None)
    missing = Problem(Code.FEATURE_MISSING, "no income", "first")
    assert not to_2(made, unasked)
    assert not to_2(made, unasked, [replace(missing, task="second")])
    assert not to_2(made, replace(unasked, version="1"), [missing])
    assert to_2(made, unasked, [missing])
    assert (made.decisions, made.errors, made.latencies.count) == (1, 1, 0)


def test_a_call_without_an_answer_is_slower_than_any_bound() -> None:
    """Wherever it was cut off: a version that never answers would else be as fast as the deadline."""
    made = StepStats()
    for _ in range(98):
        to_2(made, task(("2", TaskStatus.OK)))
    for _ in range(2):
        to_2(made, task(("2", TaskStatus.TIMEOUT), ("1", TaskStatus.OK)))
    verdict = judge(rollout(p99="1h"), status(), made, BEGAN)
    assert isinstance(verdict, Stay)
    verdict = judge(rollout(p99="10m"), status(), made, BEGAN)
    assert verdict == Abort("more than 1 % of calls without an answer in 100 decisions, above 10m")


def given_up(waited_ms: float, *attempts: str, code: Code = Code.DEADLINE_EXCEEDED, fixed: bool = False) -> TaskRecord:
    """A task that was given up after ``waited_ms``, its calls with these outcomes; or that a fixed answer stood for."""
    state = TaskStatus.DEFAULTED if fixed else TaskStatus.TIMEOUT
    calls = tuple(Attempt("http://model", BEGAN, waited_ms, outcome) for outcome in attempts)
    ended = TaskResult("first", state, None, Problem(code, "no answer", "first"), waited_ms, calls, b"")
    return replace(task(("2", state)), result=ended)


@pytest.mark.parametrize(
    ("record", "decisions", "unjudged", "p99_ms"),
    [
        (given_up(0.2), 0, 1, None),
        (given_up(99.0, "deadline"), 0, 1, None),
        (given_up(99.0, "timeout", code=Code.MODEL_TIMEOUT), 0, 1, None),
        (given_up(99.0, "deadline", fixed=True), 0, 1, None),
        # It had failed before the deadline came.
        (given_up(99.0, "http 503", "deadline"), 1, 0, 3_600_000.0),
        # It waited for a free place.
        (given_up(100.0), 1, 0, 3_600_000.0),
        (given_up(100.0, "deadline"), 1, 0, 3_600_000.0),
        (given_up(100.0, "deadline", fixed=True), 1, 0, 3_600_000.0),
        (given_up(100.0, "timeout", code=Code.MODEL_TIMEOUT, fixed=True), 1, 0, 3_600_000.0),
        (given_up(0.0, "ejected", code=Code.MODEL_EJECTED), 1, 0, None),
        (given_up(3.0, "connection: refused", code=Code.MODEL_UNAVAILABLE), 1, 0, None),
        (given_up(950.0, "connection: closed", code=Code.MODEL_UNAVAILABLE), 1, 0, 950.0),
        (given_up(950.0, "timeout", "connection: refused", code=Code.MODEL_UNAVAILABLE), 1, 0, 3_600_000.0),
        # Nobody listened for its answer.
        (given_up(10_000.0, UNATTENDED), 0, 1, None),
        # Kafka did not take its task.
        (given_up(10_000.0, UNACKNOWLEDGED, code=Code.MODEL_UNAVAILABLE), 0, 1, None),
        (given_up(10_000.0, UNACKNOWLEDGED, fixed=True), 0, 1, None),
        (given_up(30.0, "http 500", code=Code.MODEL_ERROR, fixed=True), 1, 0, 30.0),
        (given_up(0.0, code=Code.FEATURES_UNAVAILABLE), 0, 1, None),
    ],
)
def test_what_a_version_had_no_time_for_says_nothing_of_it(
    record: TaskRecord, decisions: int, unjudged: int, p99_ms: float | None
) -> None:
    """What it was given too little for is told apart; silence after its time is slow, whatever stood in for it."""
    made = StepStats()
    assert to_2(made, record)
    assert (made.decisions, made.errors, made.unjudged) == (decisions, decisions, unjudged)
    quantile_ms = made.latencies.quantile_ms(0.99)
    assert quantile_ms == (p99_ms if p99_ms is None else pytest.approx(p99_ms, rel=0.03))


def test_a_version_is_owed_a_quarter_of_the_time_it_may_have() -> None:
    """The route's deadline is 60 s, its policy's timeout 10 s; or as much as its p99 may be."""
    assert running().owed_ms == 2_500.0
    contents = rollout_documents("http://127.0.0.1:1", prefix="", abortOn={"p99": "300ms"})
    (strict,) = rollouts_in(begun(contents))
    assert strict.owed_ms == 300.0


@pytest.mark.parametrize(
    ("waited_ms", "outcome", "counts"),
    [(299.0, "cancelled", False), (300.0, "cancelled", True), (9e3, UNATTENDED, False), (9e3, UNACKNOWLEDGED, False)],
)
def test_what_others_made_needless_is_slow_above_the_p99(waited_ms: float, outcome: str, counts: bool) -> None:
    """It is no failure. Before that it says nothing, nor where nobody listened meanwhile."""
    made = StepStats()
    ended = TaskResult(
        "first", TaskStatus.SKIPPED, None, None, waited_ms, (Attempt("http://model", BEGAN, waited_ms, outcome),), b""
    )
    assert to_2(made, replace(task(("2", TaskStatus.SKIPPED)), result=ended)) is counts
    assert (made.decisions, made.errors, made.unjudged, made.latencies.count) == (counts, 0, 0, counts)


def test_a_step_does_not_end_by_what_says_nothing() -> None:
    """It takes nothing back, and counts against every bound where the step would end."""
    made = stats(900, 10)
    made.unjudged = 8
    assert isinstance(judge(rollout(errorRate=0.02, p99="1s"), status(), made, LATER), Advance)
    made.unjudged = 10
    said = "10 of 910 decisions had no feature store or too little time"
    above = judge(rollout(errorRate=0.02, p99="1s"), status(), made, LATER)
    assert above == Stay(f"{said}, and 10 failed: all together above 2.00%")
    assert judge(rollout(p99="1s"), status(), made, LATER) == Stay(
        "10 of 910 calls had no feature store or too little time, and 0 took longer than 1s: all together more than 1 %"
    )
    made.unjudged = 8
    assert isinstance(judge(rollout(p99="1s"), status(), made, LATER), Advance)
    made.latencies.add(2_000.0)
    made.latencies.add(2_000.0)
    waits = judge(rollout(p99="1s"), status(), made, LATER)
    assert isinstance(waits, Stay)
    assert waits.reason.endswith("too little time, and 2 took longer than 1s: all together more than 1 %")
    made.unjudged = 10
    assert isinstance(judge(rollout(), status(), made, LATER), Advance)
    few = judge(rollout(), status(), replace(made, decisions=99), LATER)
    assert few == Stay("99 of at least 100 decisions by version 2, and 10 that say nothing of it")


def test_a_p99_is_of_as_many_calls_as_decisions_are_asked() -> None:
    """A version that is only ejected has none."""
    made = replace(stats(0), decisions=300, errors=300)
    said = "0 of at least 100 calls of version 2 for its p99"
    assert judge(rollout(p99="300ms"), status(), made, LATER) == Stay(said)
    assert isinstance(judge(rollout(), status(), made, LATER), Advance)


def test_a_version_that_may_not_decide_any_more_is_taken_back() -> None:
    """At once: its part of the subjects is turned away."""
    barred = judge(rollout(), status(), stats(0), BEGAN, barred="inline 2 was valid until 2026-11-29")
    assert barred == Abort("inline 2 was valid until 2026-11-29")
    assert isinstance(judge(rollout(), status("paused"), stats(0), BEGAN, barred="it was"), Stay)


def running(state: Any = "progressing", step: int = 0) -> Running:
    (found,) = rollouts_in(documents(state=state, step=step))
    return found


def test_statuses_follow_verdicts() -> None:
    """A step begins at the moment of its verdict; a clock that went back does not give two steps one name."""
    now = running()
    advanced = follow(now, Advance("well"), now.status.since - 5)
    assert (advanced.state, advanced.step, advanced.since) == ("progressing", 1, now.status.since + 1)
    aborted = follow(running(step=1), Abort("errors"), LATER)
    assert (aborted.state, aborted.step, aborted.reason) == ("aborted", 1, "errors")
    promoted = follow(running(step=2), Promote("well"), LATER)
    assert (promoted.state, promoted.step) == ("promoted", 2)


@pytest.mark.parametrize(
    ("state", "order", "becomes", "action"),
    [
        ("progressing", "pause", "paused", "pause"),
        ("paused", "resume", "progressing", "resume"),
        ("progressing", "abort", "aborted", "abort"),
        ("paused", "abort", "aborted", "abort"),
        ("promoted", "abort", "aborted", "abort"),
        ("progressing", "promote", "promoted", "promote"),
        ("paused", "promote", "promoted", "promote"),
    ],
)
def test_orders_that_make_sense_are_obeyed(state: str, order: Any, becomes: str, action: str) -> None:
    """What is recorded is what was ordered."""
    made = obey(running(state), order, LATER)
    assert made.state == becomes
    assert action_of(made) == action
    assert "by operator" in (made.reason or "")


@pytest.mark.parametrize(
    ("state", "order"),
    [
        ("paused", "pause"),
        ("promoted", "pause"),
        ("aborted", "pause"),
        ("progressing", "resume"),
        ("promoted", "resume"),
        ("aborted", "resume"),
        ("aborted", "abort"),
        ("aborted", "promote"),
        ("promoted", "promote"),
    ],
)
def test_orders_that_make_none_are_refused(state: str, order: Any) -> None:
    """The message says how it stands."""
    with pytest.raises(ValueError, match=f"scored/default/first is {state}, and cannot be told to {order}"):
        obey(running(state), order, LATER)


def test_a_moved_rollout_is_a_sound_revision_that_routes_otherwise() -> None:
    """The next revision differs in the status alone, and its arms follow."""
    before = compile_revision(documents())
    now = running()
    after = compile_revision(moved(before.documents, now.name, follow(now, Advance("well"), LATER)))
    assert after.id != before.id
    arms = [
        dict(route.rules[0].tasks[0].arms)
        for revision in (before, after)
        for route in revision.routes
        if route.name == "scored"
    ]
    assert arms == [{"1": 90, "2": 10}, {"1": 50, "2": 50}]
    (moved_on,) = rollouts_in(after.documents)
    assert (moved_on.percent, moved_on.status.step) == (50, 1)


def test_a_status_of_something_else_is_no_rollout() -> None:
    """A document that changed begins anew: its old status says nothing."""
    content = [dict(each) for each in rollout_documents("http://127.0.0.1:1", prefix="")]
    revision = read_revision(Source("test", each) for each in content)
    assert list(rollouts_in(revision.documents)) == []


def test_a_step_is_recorded_the_same_by_everyone() -> None:
    """The record of a status has one id and one set of bytes, and survives its codec."""
    now = running()
    records = [
        step_record(now, revision="sha256:1", previous="sha256:0", stats=stats(10, 1), source_topic="broker.registry")
        for _ in range(2)
    ]
    assert encode_record(records[0]) == encode_record(records[1])
    read = decode_record(encode_record(records[0]))
    assert read == records[0]
    told = orjson.loads(read.evidence or b"")
    assert (told["action"], told["percent"], told["stats"]["errors"]) == ("start", 10, 1)
    assert read.request_id == "rollout/scored/default/first"
    other = follow(now, Advance("well"), LATER)
    assert record_id(now.name, now.status) == read.execution_id != record_id(now.name, other)


def test_the_name_of_a_rollout_is_read_as_it_is_written() -> None:
    """ROUTE/RULE/TASK, all three."""
    assert RolloutName.read(str(NAME)) == NAME
    for wrong in ("scored", "scored/default", "scored//first", "a/b/c/d"):
        with pytest.raises(ValueError, match="is not ROUTE/RULE/TASK"):
            RolloutName.read(wrong)


def test_the_support_documents_roll_out_what_they_say() -> None:
    """The digest in a status is the document's."""
    (found,) = rollouts_in(documents())
    assert found.status.of == rollout_digest("default", found.task)
    assert found.rollout.every == EVERY_MS
