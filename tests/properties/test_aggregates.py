"""Aggregates are what a computation over all events says, whatever order they come in and however often."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.aggregates import Aggregation, Event, Outcome, Plan, State, read_state, write_state

BASE_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
WINDOWS = {"1h": HOUR_MS, "24h": 24 * HOUR_MS, "7d": 7 * 24 * HOUR_MS}
OPS = {"sum": "DOUBLE", "count": "INT64", "mean": "DOUBLE", "min": "INT64", "max": "INT64", "last": "INT64"}
PLAN = Plan(
    [
        *(Aggregation(f"x_{op}_{w}", "x", op, ms, type_) for op, type_ in OPS.items() for w, ms in WINDOWS.items()),
        *(Aggregation(f"x_distinct_{window}", "x", "distinct", ms, "INT64") for window, ms in WINDOWS.items()),
        *(Aggregation(f"count_{window}", None, "count", ms, "INT64") for window, ms in WINDOWS.items()),
    ],
    lateness_ms=HOUR_MS,
)


@dataclass(frozen=True)
class Sent:
    """An update as it is sent; ``value`` ... makes it a tombstone."""

    time_ms: int
    value: Any
    id: str | None


SENT = st.builds(
    Sent,
    # Some days, with crowds at the edges of tiles.
    st.integers(0, 9 * 24 * HOUR_MS).map(lambda ms: BASE_MS + ms)
    | st.integers(0, 200).map(lambda quarters: BASE_MS - BASE_MS % HOUR_MS + quarters * 900_000),
    st.none() | st.integers(-5, 5) | st.integers(-(2**40), 2**40),
    st.none() | st.sampled_from("abcdef"),
)
TOMBSTONE = st.builds(Sent, st.integers(0, 9 * 24 * HOUR_MS).map(lambda ms: BASE_MS + ms), st.just(...), st.none())
AS_OF = st.integers(0, 20 * 24 * HOUR_MS).map(lambda ms: BASE_MS + ms)


class Naive:
    """All events, kept; every window computed from them."""

    def __init__(self) -> None:
        self.kept: list[tuple[Sent, int]] = []
        self.tombstones: list[tuple[int, int]] = []
        self.ids: set[str] = set()

    def feed(self, sent: Sent) -> None:
        """Keep what is neither late nor known."""
        if sent.value is ...:
            self.tombstones.append((sent.time_ms, len(self.kept)))
            return
        latest = max((each.time_ms for each, _ in self.kept), default=-(10**15))
        floor = max((time_ms for time_ms, _ in self.tombstones), default=-1)
        if sent.id in self.ids or sent.time_ms < latest - HOUR_MS or sent.time_ms <= floor:
            return
        if sent.id is not None:
            self.ids.add(sent.id)
        self.kept.append((sent, len(self.kept)))

    def of(self, aggregation: Aggregation, as_of_ms: int) -> list[Sent]:
        """The events of a window: by whole tiles at its tail, and at tombstones that came after them."""
        size = aggregation.tile_ms
        return [
            sent
            for sent, place in self.kept
            if (sent.time_ms // size + 1) * size > as_of_ms - aggregation.window_ms
            and not any(sent.time_ms // size * size <= at and place < before for at, before in self.tombstones)
        ]

    def value(self, aggregation: Aggregation, as_of_ms: int) -> Any:
        """What the aggregation is."""
        events = self.of(aggregation, as_of_ms)
        if aggregation.of is None:
            return len(events)
        given = [event.value for event in events if event.value is not None]
        match aggregation.op:
            case "sum":
                return float(sum(given))
            case "count":
                return len(given)
            case "mean":
                return sum(given) / len(given) if given else None
            case "distinct":
                return len(set(given))
            case "last":
                return max(((e.time_ms, e.value) for e in events if e.value is not None), default=(0, None))[1]
        return (min if aggregation.op == "min" else max)(given, default=None)


def assert_same(state: State, naive: Naive, as_of_ms: int) -> None:
    """Every aggregation, one after the other."""
    for aggregation, value in zip(PLAN.aggregations, PLAN.values(state, as_of_ms), strict=True):
        expected = naive.value(aggregation, as_of_ms)
        assert value == (pytest.approx(expected) if isinstance(expected, float) else expected), aggregation.name


@settings(max_examples=300, deadline=None)
@given(sents=st.lists(SENT | SENT | SENT | SENT | TOMBSTONE, max_size=40), as_ofs=st.lists(AS_OF, max_size=4))
def test_any_order_any_time(sents: Sequence[Sent], as_ofs: Sequence[int]) -> None:
    """Early, late, twice, deleted: the tiles say what all events would, at each later moment again."""
    state, naive = State(), Naive()
    for offset, sent in enumerate(sents):
        if sent.value is ...:
            PLAN.delete(state, offset, sent.time_ms)
        else:
            PLAN.feed(state, Event(offset, sent.time_ms, {"x": sent.value}, sent.id))
        naive.feed(sent)
    for as_of_ms in sorted(as_ofs):
        state = read_state(write_state(state))
        assert_same(state, naive, as_of_ms)


@settings(max_examples=150, deadline=None)
@given(
    sents=st.lists(SENT, min_size=1, max_size=30).map(lambda sents: sorted(sents, key=lambda each: each.time_ms)),
    as_of_ms=AS_OF,
    share=st.floats(0, 1, exclude_max=True),
)
def test_values_stand_until_they_are_due(sents: Sequence[Sent], as_of_ms: int, share: float) -> None:
    """Between a computation and the moment that it is due again, no value changes; afterwards one may."""
    state = State()
    for offset, sent in enumerate(sents):
        PLAN.feed(state, Event(offset, sent.time_ms, {"x": sent.value}, None))
    values = PLAN.values(state, as_of_ms)
    due_ms = PLAN.due_ms(state, as_of_ms)
    assert due_ms > as_of_ms
    entry = write_state(state)
    assert PLAN.values(read_state(entry), as_of_ms + int((due_ms - as_of_ms - 1) * share)) == values
    if not state.empty:
        assert due_ms - as_of_ms <= PLAN.refresh_ms


@settings(max_examples=150, deadline=None)
@given(
    sents=st.lists(SENT, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=5),
    as_of_ms=AS_OF,
)
def test_what_is_delivered_again_counts_once(sents: Sequence[Sent], cuts: Sequence[int], as_of_ms: int) -> None:
    """A worker that begins again at an earlier offset, any number of times, ends with the same values."""
    events = [Event(offset, sent.time_ms, {"x": sent.value}, sent.id) for offset, sent in enumerate(sents)]
    once, again = State(), State()
    for event in events:
        PLAN.feed(once, event)
    for cut in cuts:
        for event in events[:cut]:
            PLAN.feed(again, event)
        for event in events[max(0, cut - 3) : cut]:
            assert PLAN.feed(again, event) is Outcome.AGAIN
    for event in events:
        PLAN.feed(again, event)
    assert PLAN.values(once, as_of_ms) == PLAN.values(again, as_of_ms)


@settings(max_examples=100, deadline=None)
@given(sents=st.lists(SENT, max_size=30), later_ms=st.integers(0, 30 * 24 * HOUR_MS))
def test_a_state_that_is_over_has_nothing_to_say(sents: Sequence[Sent], later_ms: int) -> None:
    """Once every tile is out of every window the entry may go: what it knew would change no value any more."""
    state = State()
    for offset, sent in enumerate(sents):
        PLAN.feed(state, Event(offset, sent.time_ms, {"x": sent.value}, sent.id))
    as_of_ms = BASE_MS + later_ms
    values = PLAN.values(state, as_of_ms)
    if PLAN.over(state, as_of_ms):
        assert values == PLAN.values(State(), as_of_ms)
        for sent in sents:
            fresh = State()
            PLAN.feed(fresh, Event(0, sent.time_ms, {"x": sent.value}, sent.id))
            assert PLAN.values(fresh, as_of_ms) == values
    if later_ms > 18 * 24 * HOUR_MS:
        assert PLAN.over(state, as_of_ms)


@settings(max_examples=200, deadline=None)
@given(
    # Few times, so that events are sent again.
    sents=st.lists(
        SENT
        | TOMBSTONE
        | st.builds(Sent, st.integers(0, 9).map(lambda n: BASE_MS + n * HOUR_MS), st.just(1), st.sampled_from("ab")),
        max_size=40,
    ),
    latenesses=st.lists(st.sampled_from([0, HOUR_MS, 24 * HOUR_MS, 9 * 24 * HOUR_MS]), min_size=1, max_size=41),
    as_of_ms=AS_OF,
)
def test_no_id_counts_twice_under_any_lateness(sents: Sequence[Sent], latenesses: Sequence[int], as_of_ms: int) -> None:
    """Whatever a view's lateness becomes, and however soon ids are dropped, an event that is sent again with its time
    is counted once. Where the lateness stays, what is dropped changes no outcome."""
    dropping, keeping = State(), State()
    counted: set[str] = set()
    for offset, sent in enumerate(sents):
        plan = Plan(PLAN.aggregations, latenesses[offset % len(latenesses)])
        plan._forget_late(dropping, 0)
        if sent.value is ...:
            plan.delete(dropping, offset, sent.time_ms)
            plan.delete(keeping, offset, sent.time_ms)
            continue
        id_ = None if sent.id is None else f"{sent.id} {sent.time_ms}"
        event = Event(offset, sent.time_ms, {"x": sent.value}, id_)
        outcome, kept = plan.feed(dropping, event), plan.feed(keeping, event)
        if outcome is Outcome.COUNTED and id_ is not None:
            assert id_ not in counted
            counted.add(id_)
        if len(set(latenesses)) == 1:
            # Of what is late, an id that is not known any more says nothing.
            late = (Outcome.LATE, Outcome.DUPLICATE)
            assert outcome is kept or (outcome in late and kept in late)
    if len(set(latenesses)) == 1:
        assert PLAN.values(dropping, as_of_ms) == PLAN.values(keeping, as_of_ms)
