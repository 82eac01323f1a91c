"""Redriven offsets: whatever the order, what was sent is known, and a commit can hold it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.redriven import Redriven

OFFSETS = st.lists(st.integers(0, 60), max_size=60)


@given(st.integers(0, 30), OFFSETS)
def test_what_was_sent_is_known_and_nothing_else(upto: int, offsets: list[int]) -> None:
    """Adding offsets in any order, repetitions included, makes exactly those known, beside what lay below."""
    redriven = Redriven(upto)
    for offset in offsets:
        redriven = redriven.adding(offset)
    assert {offset for offset in range(70) if offset in redriven} == set(range(upto)) | set(offsets)
    assert all(offset > redriven.upto for offset in redriven.beyond)


@given(st.integers(0, 30), OFFSETS)
def test_a_commit_holds_it(upto: int, offsets: list[int]) -> None:
    """What is written into a commit is read back the same."""
    redriven = Redriven(upto)
    for offset in offsets:
        redriven = redriven.adding(offset)
    assert Redriven.read(redriven.upto, redriven.metadata) == redriven


@given(st.text(max_size=40))
def test_strange_metadata_says_nothing_wrong(metadata: str) -> None:
    """A commit that another tool wrote still holds its offset."""
    assert Redriven.read(3, metadata).upto >= 3


def test_what_a_commit_cannot_hold_is_refused() -> None:
    """More gaps than Kafka takes as metadata are an error that says what to do."""
    redriven = Redriven(0, frozenset(range(1_000_000, 1_001_200, 2)))
    with pytest.raises(ValueError, match="redrive the rest of the topic first"):
        _ = redriven.metadata
