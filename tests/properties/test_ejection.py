"""Properties of ejection over any history of answers and failures."""

from hypothesis import given
from hypothesis import strategies as st

from app.domain.documents import Outlier
from app.domain.ejection import Health

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
histories = st.lists(st.tuples(st.booleans(), st.sampled_from([0, 1, 10, 500, 1_000, 20_000])), max_size=60)


@given(policies, histories)
def test_any_history_is_bounded_and_deserved(policy: Outlier, history: list[tuple[bool, int]]) -> None:
    """Out only by so many failures in a row while in, for the base time at least and the maximum at most."""
    health, now_ms, in_a_row = Health(), 0.0, 0
    for failed, pause_ms in history:
        now_ms += pause_ms
        before, was_out = health, health.is_ejected(now_ms)
        health = before.on_failure(policy, now_ms) if failed else before.on_success(now_ms)
        if was_out:
            # What is heard of it while it is out counts for nothing.
            assert health == before
            continue
        in_a_row = in_a_row + 1 if failed else 0
        assert health.is_ejected(now_ms) == (in_a_row >= policy.consecutive_failures)
        if not health.is_ejected(now_ms):
            assert health.failures == in_a_row
            continue
        in_a_row = 0
        out_ms = health.until_ms - now_ms
        assert policy.base_ejection <= out_ms <= policy.max_ejection
        assert out_ms == min(policy.base_ejection * health.ejections, policy.max_ejection)
        assert health.ejections <= before.ejections + 1
        # It comes back by itself.
        assert not health.is_ejected(health.until_ms)


@given(policies, st.integers(1, 20), st.integers(0, 30))
def test_ejections_are_forgotten_one_by_one(policy: Outlier, times: int, stays: int) -> None:
    """Each that follows at once is a base time longer; one is forgotten for each base time that it stays in."""
    health, now_ms = Health(), 0.0

    def ejected() -> Health:
        made = health
        for _ in range(policy.consecutive_failures):
            made = made.on_failure(policy, now_ms)
        return made

    for _ in range(times):
        now_ms = health.until_ms
        health = ejected()
    assert health.ejections == times
    now_ms = health.until_ms + stays * policy.base_ejection
    health = ejected()
    assert health.ejections == max(0, times - stays) + 1


def test_nothing_is_ejected_where_the_policy_says_never() -> None:
    """consecutiveFailures: 0."""
    health, never = Health(), Outlier(consecutive_failures=0)
    for now_ms in range(100):
        health = health.on_failure(never, float(now_ms))
    assert health == Health()
