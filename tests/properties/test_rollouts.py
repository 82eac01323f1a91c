"""Rollouts whatever happens to them: no step is skipped or repeated, no verdict is taken back by better news."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app.domain.rollout_stats import StepStats
from app.domain.rollouts import Abort, Order, Stay, follow, judge, obey, record_id, rollouts_in
from app.domain.route_documents import Rollout, RolloutStatus
from tests.support.rollouts import documents

(BEGUN,) = rollouts_in(documents())
stats = st.builds(
    lambda decisions, errors, compared, flips: StepStats(
        decisions, min(errors, decisions), compared, min(flips, compared)
    ),
    st.integers(0, 400),
    st.integers(0, 60) | st.just(0),
    st.integers(0, 400),
    st.integers(0, 60) | st.just(0),
)
bounds = st.fixed_dictionaries({}, optional={"errorRate": st.floats(0, 1), "flipRate": st.floats(0, 1)})


def rollout(abort_on: dict[str, Any], least: int) -> Rollout:
    return Rollout.model_validate(
        {"to": "2", "steps": (5, 25, 100), "every": "1m", "abortOn": abort_on, "minDecisions": least}
    )


@given(bounds, st.integers(1, 300), stats)
def test_what_is_certain_stays_so(abort_on: dict[str, Any], least: int, seen: StepStats) -> None:
    """No good news up to the least number of decisions would have changed an abort."""
    made = rollout(abort_on, least)
    status = RolloutStatus(state="progressing", step=0, since=0, of="x")
    if not isinstance(judge(made, status, seen, 0), Abort):
        return
    for compared, decisions in ((0, least), (least, 0), (least, least)):
        better = StepStats(
            max(seen.decisions, decisions), seen.errors, max(seen.compared, compared), seen.flips, seen.latencies
        )
        assert isinstance(judge(made, status, better, 10**9), Abort)


@given(bounds, st.integers(1, 300), stats, st.integers(0, 120_000))
def test_nothing_goes_on_early_or_on_bad_news(
    abort_on: dict[str, Any], least: int, seen: StepStats, now_ms: int
) -> None:
    """What goes on has had its time, its decisions, and rates within every bound."""
    made = rollout(abort_on, least)
    verdict = judge(made, RolloutStatus(state="progressing", step=0, since=0, of="x"), seen, now_ms)
    if isinstance(verdict, Stay | Abort):
        return
    assert now_ms >= made.every
    assert seen.decisions >= least
    for bound, count, total in (
        (made.abort_on.error_rate, seen.errors, seen.decisions),
        (made.abort_on.flip_rate, seen.flips, seen.compared),
    ):
        assert bound is None or count <= bound * total


orders = st.sampled_from(["pause", "resume", "abort", "promote"])
events = st.lists(st.tuples(st.none() | orders, stats, st.integers(-5_000, 120_000)), max_size=25)


@given(events)
def test_steps_follow_one_another(happened: list[tuple[Order | None, StepStats, int]]) -> None:
    """Whatever is judged and ordered, a step follows the one before it, and no two statuses have one record."""
    now, running, seen = 0, BEGUN, {record_id(BEGUN.name, BEGUN.status)}
    for order, stats_, passed_ms in happened:
        now += passed_ms
        before = running.status
        if order is not None:
            try:
                after = obey(running, order, now)
            except ValueError:
                continue
        else:
            verdict = judge(running.rollout, before, stats_, now)
            if isinstance(verdict, Stay):
                continue
            after = follow(running, verdict, now)
        assert after.since > before.since
        if after.state != "promoted":
            assert after.step - before.step in ((0, 1) if order is None else (0,))
        assert before.state != "aborted"
        identity = record_id(running.name, after)
        assert identity not in seen
        seen.add(identity)
        running = replace(running, status=after)
