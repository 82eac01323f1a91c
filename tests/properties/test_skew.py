"""Baselines lose no row and survive their file; indices are distances; counts add up and fade by half."""

import math
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.features import FeatureStatus, FeatureValue
from app.domain.skew import BINS, Tally, baseline_of, bins_of, equal_count_edges, stability, written
from app.domain.version_documents import Baseline

numbers = st.one_of(st.integers(-5, 5), st.floats(-1e300, 1e300, allow_nan=False), st.integers(-(2**63), 2**63 - 1))
cells = st.one_of(numbers, st.text(max_size=5), st.booleans(), st.none(), st.floats())
counts = st.integers(3, 12).flatmap(
    lambda bins: st.tuples(*[st.lists(st.integers(0, 5_000), min_size=bins, max_size=bins)] * 3)
)


def row(value: Any) -> list[FeatureValue]:
    return [FeatureValue("inputs.x", FeatureStatus.PRESENT, value, None, "request")]


@given(st.lists(numbers, min_size=1, max_size=200), st.integers(2, BINS))
def test_edges_enclose_and_rise(values: list[float], bins: int) -> None:
    """From the least value to the largest, at most two edges a bin, whatever ties there are."""
    edges = equal_count_edges(values, bins)
    # Compared as the numbers that are counted: whole ones beyond 2^53 are rounded.
    assert edges[0] <= float(min(values))
    assert edges[-1] >= float(max(values))
    assert edges[0] <= edges[1]
    assert all(before < after for before, after in pairwise(edges[1:]))
    assert 2 <= len(edges) <= 2 * bins + 2


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"x": cells, "y": numbers}), min_size=1, max_size=80), st.booleans())
def test_each_row_is_counted_once(rows: list[dict[str, Any]], in_text: bool) -> None:
    """Whatever the cells hold, counts add up to the rows, and the file is read as what was written."""
    baseline = baseline_of(rows, model="m", version="1", numbers_in_text=in_text)
    assert Baseline.model_validate_json(written(baseline)) == baseline
    for name in ("x", "y"):
        bins, expected = bins_of(baseline.features[name])
        assert sum(expected) == len(rows)
        assert len(bins.names) == len(expected) == len(set(bins.names))
    assert baseline.features["y"].edges is not None


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"y": numbers}), min_size=1, max_size=80))
def test_training_rows_given_again_fall_into_the_same_bins(rows: list[dict[str, Any]]) -> None:
    """A version that is given its training data is given the baseline, to the last row."""
    baseline = baseline_of(rows, model="m", version="1")
    tally = Tally(baseline, {"y": 0}, half_life_ms=1)
    for each in rows:
        tally.observe(row(each["y"]), 0)
    (skew,) = tally.told(0)
    assert skew.counts == skew.baseline


@given(counts)
def test_an_index_is_a_distance(three: tuple[list[int], list[int], list[int]]) -> None:
    """Never below 0, 0 to itself, the same both ways, defined with empty bins, None only of nothing."""
    one, other, _ = three
    index = stability(one, other)
    assert (index is None) == (not sum(one) or not sum(other))
    if index is not None:
        back = stability(other, one)
        assert back is not None
        assert index >= 0
        assert math.isclose(index, back, rel_tol=1e-9, abs_tol=1e-12)
        assert stability(one, one) == 0


@given(counts)
def test_the_largest_index_of_parts_is_no_smaller_than_the_whole_s(
    three: tuple[list[int], list[int], list[int]],
) -> None:
    """What alerts rely on: whatever rows workers share, the whole's skew shows in one of them (up to smoothing)."""
    baseline, *parts = [[count + 1_000 for count in each] for each in three]
    whole = stability(baseline, [sum(pair) for pair in zip(*parts, strict=True)])
    indices = [stability(baseline, part) for part in parts]
    assert whole is not None
    assert whole <= max(index for index in indices if index is not None) + 1e-3


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3_000)), max_size=60),
    st.integers(0, 60),
    st.integers(1, 1_000),
)
def test_counts_of_parts_add_up_and_weights_fade(given_: list[tuple[float, int]], cut: int, half_life_ms: int) -> None:
    """Two workers' counts are one's of all; each weight is a half to the power of its age, whatever the order."""
    baseline = baseline_of(({"x": n / 100} for n in range(101)), model="m", version="1")
    whole, one, two = (Tally(baseline, {"x": 0}, half_life_ms=half_life_ms) for _ in range(3))
    for number, (value, at_ms) in enumerate(given_):
        whole.observe(row(value), at_ms)
        (one if number < cut else two).observe(row(value), at_ms)
    now_ms = 3_000
    (all_of,), (first,), (second,) = ((*tally.told(now_ms),) for tally in (whole, one, two))
    assert all_of.counts == tuple(map(sum, zip(first.counts, second.counts, strict=True)))
    expected = math.fsum(2.0 ** -((now_ms - at_ms) / half_life_ms) for _, at_ms in given_)
    assert math.isclose(whole.weight(now_ms), expected, rel_tol=1e-6, abs_tol=1e-6)
