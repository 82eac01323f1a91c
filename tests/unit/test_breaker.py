"""The breaker: opens on a run of failures that lasts, lets one try at a time, closes on an answer."""

from hypothesis import given
from hypothesis import strategies as st

from app.domain.breaker import CLOSED, Breaker, BreakerPolicy, BreakerState

POLICY = BreakerPolicy(failures=3, failing_ms=100, open_ms=1_000, trial_ms=400)


def opened(at_ms: float = 200.0) -> Breaker:
    """A breaker that opened then."""
    breaker = CLOSED
    for moment in (at_ms - 100, at_ms - 50, at_ms):
        breaker = breaker.failed(moment, POLICY)
    assert breaker.state is BreakerState.OPEN
    return breaker


def test_failures_in_one_moment_do_not_open_it() -> None:
    """A hundred calls that time out together are one stall; the same failures over some time are an outage."""
    breaker = CLOSED
    for _ in range(100):
        breaker = breaker.failed(5.0, POLICY)
    assert breaker.state is BreakerState.CLOSED
    assert breaker.admit(6.0, POLICY) == (breaker, True)
    assert breaker.failed(105.0, POLICY).state is BreakerState.OPEN


def test_a_success_begins_the_count_anew() -> None:
    """Two failures, an answer, two failures: closed."""
    breaker = CLOSED.failed(0, POLICY).failed(150, POLICY).succeeded().failed(200, POLICY).failed(400, POLICY)
    assert (breaker.state, breaker.failures, breaker.since_ms) == (BreakerState.CLOSED, 2, 200)


def test_one_trial_at_a_time() -> None:
    """Open, nothing is admitted; then one call is, and no other until that one has had its time."""
    breaker = opened()
    assert not breaker.admit(1_199, POLICY)[1]
    half_open, admitted = breaker.admit(1_200, POLICY)
    assert (half_open.state, admitted) == (BreakerState.HALF_OPEN, True)
    assert not half_open.admit(1_599, POLICY)[1]
    again, admitted = half_open.admit(1_600, POLICY)
    assert (again.state, again.since_ms, admitted) == (BreakerState.HALF_OPEN, 1_600, True)


def test_the_trial_decides() -> None:
    """Its success closes the breaker, its failure opens it for as long as before."""
    half_open, _ = opened().admit(1_200, POLICY)
    assert half_open.succeeded() is CLOSED
    reopened = half_open.failed(1_300, POLICY)
    assert (reopened.state, reopened.since_ms) == (BreakerState.OPEN, 1_300)
    assert not reopened.admit(2_299, POLICY)[1]


def test_late_failures_do_not_keep_it_open() -> None:
    """Calls from before it opened may still fail: that moves nothing; one that is answered closes it."""
    breaker = opened()
    assert breaker.failed(900, POLICY) == breaker
    assert breaker.succeeded() is CLOSED


@given(st.lists(st.tuples(st.integers(0, 500), st.sampled_from(["call fails", "call succeeds", "lost"])), max_size=60))
def test_nobody_waits_for_the_dead_and_the_living_are_found(steps: list[tuple[int, str]]) -> None:
    """Whatever happens: within each open time at most one call is admitted, and after it one always is."""
    breaker, now_ms, admitted_ms = CLOSED, 0.0, float("-inf")
    for pause_ms, outcome in steps:
        now_ms += pause_ms
        before = breaker
        breaker, admitted = breaker.admit(now_ms, POLICY)
        if before.state is BreakerState.CLOSED:
            assert admitted
        elif admitted:
            assert now_ms - max(admitted_ms, before.since_ms) >= POLICY.trial_ms
        else:
            assert now_ms - before.since_ms < POLICY.open_ms
        if admitted:
            admitted_ms = now_ms
            if outcome == "call fails":
                breaker = breaker.failed(now_ms, POLICY)
            elif outcome == "call succeeds":
                breaker = breaker.succeeded()
                assert breaker.state is BreakerState.CLOSED
    assert breaker.admit(now_ms + POLICY.open_ms, POLICY)[1]
