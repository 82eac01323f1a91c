"""Accounts of shadows add up: in any order, in any grouping, through JSON, to the last digit."""

import math
from collections.abc import Sequence
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.comparison_stats import OTHER, SEGMENTS_MAX, Comparison, Latencies, merged, psi

scores = st.one_of(
    st.floats(0, 1), st.floats(-1e9, 1e9), st.integers(-(10**6), 10**6), st.booleans(), st.text(max_size=3), st.none()
)
outputs = st.none() | st.dictionaries(st.sampled_from([*"abcdefghijk"]), scores, max_size=11)
evidences = st.fixed_dictionaries(
    {
        "outputs": st.fixed_dictionaries({"champion": outputs, "shadow": outputs}),
        "flipped": st.none() | st.booleans(),
        "segment": st.none() | st.just(OTHER) | st.integers(0, 40).map(str) | st.text(max_size=70),
        "latency_ms": st.floats(0, 1e5),
    }
)


def fed(all_of: Sequence[dict[str, Any]]) -> Comparison:
    made = Comparison()
    for each in all_of:
        made.feed(each)
    return made


@settings(deadline=None)
@given(st.lists(evidences, max_size=60), st.randoms(use_true_random=False), st.data())
def test_any_grouping_in_any_order_gives_the_same(all_of: list[dict[str, Any]], random: Any, data: Any) -> None:
    """Feeding, merging parts, and merging merged parts are one and the same, whatever came first."""
    whole = fed(all_of)
    shuffled = list(all_of)
    random.shuffle(shuffled)
    assert fed(shuffled) == whole
    one = data.draw(st.integers(0, len(shuffled)))
    two = data.draw(st.integers(one, len(shuffled)))
    a, b, c = (fed(part) for part in (shuffled[:one], shuffled[one:two], shuffled[two:]))
    assert merged([a, b, c]) == merged([a, merged([b, c])]) == merged([merged([c, a]), b]) == whole


@settings(deadline=None)
@given(st.lists(evidences, max_size=30), st.lists(evidences, max_size=30))
def test_accounts_survive_json(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    """What is written and read again goes on as if it had never been away."""
    read = Comparison.from_json(orjson.loads(orjson.dumps(fed(one).as_json())))
    assert read == fed(one)
    for each in two:
        read.feed(each)
    assert read == fed([*one, *two])
    orjson.dumps(read.summary())


@settings(deadline=None)
@given(st.lists(evidences, max_size=80))
def test_segments_are_bounded_and_lose_nothing(all_of: list[dict[str, Any]]) -> None:
    """At most twenty are named; together they count every decision that has a segment."""
    made = fed(all_of)
    assert len(made.segments.keys() - {OTHER}) <= SEGMENTS_MAX
    told = [each for each in all_of if each["segment"] is not None]
    assert sum(account.count for account in made.segments.values()) == len(told)
    assert sum(account.flips for account in made.segments.values()) == sum(each["flipped"] is True for each in told)


@given(st.dictionaries(st.integers(-50, 50), st.integers(1, 1_000), min_size=1), st.integers(1, 20))
def test_psi_of_equals_is_nothing_and_of_others_is_more(counts: dict[int, int], shift: int) -> None:
    """It is 0 between a distribution and itself, never below, and the same both ways."""
    shifted = {bin_ + shift: count for bin_, count in counts.items()}
    assert psi(counts, counts) == 0
    there, back = psi(counts, shifted), psi(shifted, counts)
    assert there is not None
    assert back is not None
    assert there >= 0
    assert math.isclose(there, back, rel_tol=1e-9, abs_tol=1e-12)


@given(st.lists(st.floats(0.02, 1e6), min_size=1, max_size=200), st.floats(0.01, 1))
def test_quantiles_are_within_two_percent_and_never_above(latencies: list[float], share: float) -> None:
    """A bound that the histogram finds exceeded is exceeded."""
    histogram = Latencies()
    for each in latencies:
        histogram.add(each)
    true = sorted(latencies)[math.ceil(share * len(latencies)) - 1]
    found = histogram.quantile_ms(share)
    assert found is not None
    assert true / 1.0201 <= found <= true * (1 + 1e-9)
