"""The figures of a comparison, on cases that can be worked out by hand."""

import math
from typing import Any

import pytest

from app.domain.comparison_stats import Comparison, psi


def evidence(champion: Any, shadow: Any, *, flipped: bool | None = False, segment: str | None = None) -> dict[str, Any]:
    return {
        "task": "pd",
        "champion": "3",
        "shadow": "4",
        "outputs": {
            "champion": None if champion is None else {"probability": champion},
            "shadow": None if shadow is None else {"probability": shadow},
        },
        "result": {"champion": {}, "shadow": None},
        "flipped": flipped,
        "segment": segment,
        "latency_ms": 10.0,
    }


def compared(*all_of: dict[str, Any]) -> Comparison:
    made = Comparison()
    for each in all_of:
        made.feed(each)
    return made


def test_flips_are_counted_among_those_that_can_be_compared() -> None:
    """A shadow without an answer is counted, and neither flips nor agrees."""
    made = compared(
        evidence(0.1, 0.2, flipped=True),
        evidence(0.1, 0.1, flipped=False),
        evidence(0.1, 0.1, flipped=False),
        evidence(0.1, 0.1, flipped=False),
        evidence(0.1, None, flipped=None),
    )
    overall = made.overall
    assert (overall.count, overall.failed, overall.compared, overall.flips, overall.flip_rate) == (5, 1, 4, 1, 0.25)


def test_differences_are_the_shadow_s_minus_the_champion_s() -> None:
    """Mean, mean absolute and largest, exact to a billionth."""
    output = compared(evidence(0.5, 0.7), evidence(0.5, 0.4)).overall.outputs["probability"]
    assert output.mean_difference == pytest.approx(0.05, abs=1e-9)
    assert output.mean_absolute_difference == pytest.approx(0.15, abs=1e-9)
    assert output.largest == pytest.approx(0.2, abs=1e-9)


def test_psi_is_the_formula_s() -> None:
    """Two bins, shares 900:100 against 800:200, each smoothed by half an observation."""
    p, q = 900.5 / 1001, 800.5 / 1001
    by_hand = (p - q) * math.log(p / q) + ((1 - p) - (1 - q)) * math.log((1 - p) / (1 - q))
    assert psi({0: 900, 1: 100}, {0: 800, 1: 200}) == pytest.approx(by_hand)


def test_scores_within_one_are_binned_evenly_and_others_by_size() -> None:
    """A score outside [0, 1] is compared by bins that grow with it."""
    inside = compared(*[evidence(0.51, 0.54)] * 50).overall.outputs["probability"]
    assert inside.psi == 0
    apart = compared(*[evidence(0.2, 0.9)] * 50).overall.outputs["probability"]
    assert apart.psi is not None
    assert apart.psi > 1
    beyond = compared(*[evidence(200.0, 2_000.0)] * 50).overall.outputs["probability"]
    assert beyond.outside == 50
    assert beyond.psi is not None
    assert beyond.psi > 1


def test_what_is_no_number_is_not_compared() -> None:
    """Text and booleans have no difference; the decision counts all the same."""
    overall = compared(evidence("high", "low"), evidence(True, False), evidence(0.1, "low")).overall
    assert overall.outputs == {}
    assert overall.count == 3


def test_segments_have_accounts_of_their_own() -> None:
    """A decision without a segment is in none."""
    made = compared(
        evidence(0.1, 0.2, flipped=True, segment="web"), evidence(0.1, 0.1, segment="branch"), evidence(0.1, 0.1)
    )
    assert {name: (each.count, each.flips) for name, each in made.segments.items()} == {"web": (1, 1), "branch": (1, 0)}
    assert made.overall.count == 3


def test_nothing_fed_says_nothing() -> None:
    """No rate and no quantile of nothing."""
    summary = Comparison().summary()["overall"]
    assert (summary["flip_rate"], summary["latency_p99_ms"], summary["outputs"]) == (None, None, {})
