"""Properties of ejection over any history of answers and failures."""

from hypothesis import given
from hypothesis import strategies as st

from app.domain.ejection import Health
from app.domain.version_documents import Outlier

policies = st.sampled_from(
    [
        Outlier.model_validate(
            {"consecutiveFailures": failures, "baseEjection": f"{base}ms", "maxEjection": f"{base + more}ms"}
        )
        for failures in (1, 2, 3, 5)
        for base in (1, 7, 500, 1_000)
        for more in (0, 1, 500, 5_000)
    ]
)
TIMES = st.sampled_from([0, 1, 10, 500, 1_000, 20_000])
histories = st.lists(st.tuples(st.sampled_from(["ok", "failed", "nothing"]), TIMES, TIMES), max_size=60)
"""How each call ended, how long after the one before it began, and how long it took."""


def told(health: Health, policy: Outlier, how: str, began_ms: float, now_ms: float) -> Health:
    """The health after a call."""
    if how == "failed":
        return health.on_failure(policy, began_ms, now_ms)
    return health.on_success(began_ms, now_ms) if how == "ok" else health.on_nothing(began_ms)


@given(policies, histories)
def test_any_history_is_bounded_and_deserved(policy: Outlier, history: list[tuple[str, int, int]]) -> None:
    """Out only by so many failures in a row, or a failed trial; for the base time at least and the maximum at most."""
    health, now_ms, in_a_row = Health(), 0.0, 0
    for how, pause_ms, takes_ms in history:
        began_ms = now_ms + pause_ms
        was_ejected, trial = health.is_ejected(began_ms), health.out and not health.is_ejected(began_ms)
        before = health.on_call(began_ms, 10.0)
        assert trial == (before != health)
        now_ms = began_ms + takes_ms
        health = told(before, policy, how, began_ms, now_ms)
        if was_ejected and began_ms < before.until_ms:
            # What is heard of it by a call that began while it was out counts for nothing.
            assert health == before
            continue
        if how == "nothing":
            assert (health.out, health.failures) == (before.out, before.failures)
            continue
        in_a_row = in_a_row + 1 if how == "failed" else 0
        deserved = how == "failed" and (trial or in_a_row >= policy.consecutive_failures)
        assert health.out == deserved
        if not health.out:
            assert health.failures == in_a_row
            continue
        in_a_row = 0
        out_ms = health.until_ms - now_ms
        assert policy.base_ejection <= out_ms <= policy.max_ejection
        assert out_ms == min(policy.base_ejection * health.ejections, policy.max_ejection)
        assert health.ejections <= before.ejections + 1
        assert health.is_ejected(now_ms)
        # Somebody may try it.
        assert not health.is_ejected(health.until_ms)


@given(policies, st.lists(st.integers(0, 100), min_size=1, max_size=30), st.integers(1, 4))
def test_a_stall_counts_once(policy: Outlier, begun: list[int], stalls: int) -> None:
    """However many calls began before the first of them failed, they are one failure."""
    health = Health()
    for number in range(stalls):
        for began in sorted(begun):
            start_ms = number * 1_000.0
            health = health.on_failure(policy, start_ms + began, start_ms + 101 + began)
            if health.out:
                assert number + 1 >= policy.consecutive_failures
                return
    assert health.failures == stalls < policy.consecutive_failures


@given(policies, st.integers(1, 20), st.integers(0, 30))
def test_ejections_are_forgotten_one_by_one(policy: Outlier, times: int, stays: int) -> None:
    """Each that follows at once is a base time longer; one is forgotten for each base time that it stays in."""
    health, now_ms = Health(), 0.0
    for _ in range(policy.consecutive_failures):
        health = health.on_failure(policy, now_ms, now_ms)
    for _ in range(times - 1):
        now_ms = health.until_ms
        health = health.on_call(now_ms, 1.0).on_failure(policy, now_ms, now_ms)
    assert health.ejections == times
    now_ms = health.until_ms
    health = health.on_call(now_ms, 1.0).on_success(now_ms, now_ms)
    assert (health.out, health.ejections) == (False, times)
    now_ms += stays * policy.base_ejection
    for _ in range(policy.consecutive_failures):
        health = health.on_failure(policy, now_ms, now_ms)
    assert health.ejections == max(0, times - stays) + 1


@given(policies, st.integers(0, 5_000))
def test_one_trial_at_once_and_never_none(policy: Outlier, trial_ms: int) -> None:
    """While a trial runs nobody else calls; one that is never heard of makes way for the next."""
    health = Health()
    for _ in range(policy.consecutive_failures):
        health = health.on_failure(policy, 0.0, 0.0)
    due_ms = health.until_ms
    health = health.on_call(due_ms, float(trial_ms))
    assert health.is_ejected(due_ms) == (trial_ms > 0)
    assert not health.is_ejected(due_ms + trial_ms)
    assert not health.on_nothing(due_ms).is_ejected(due_ms)


def test_nothing_is_ejected_where_the_policy_says_never() -> None:
    """consecutiveFailures: 0."""
    health, never = Health(), Outlier(consecutiveFailures=0)
    for now_ms in range(100):
        health = health.on_failure(never, float(now_ms), float(now_ms))
    assert health == Health()
