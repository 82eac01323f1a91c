"""Windowed aggregates: names and types, tiles, bounds, sketches, and what documents may not say."""

import random
from typing import Any

import orjson
import pytest

from app.domain.aggregates import (
    IDS_MAX,
    SKETCH_SIZE,
    STATE_BYTES_MAX,
    TILES_MAX,
    Aggregation,
    Event,
    Outcome,
    Plan,
    State,
    read_state,
    tile_size_ms,
    write_state,
)
from app.domain.feature_views import aggregate_faults
from app.domain.view_documents import FeatureViewSpec
from app.durations import parse_duration_ms

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
NOW_MS = 1_700_000_000_000


def view(aggregate: Any, **more: Any) -> FeatureViewSpec:
    """A view of payments with this ``aggregate``."""
    features = [("amount", "DOUBLE"), ("merchant", "STRING"), ("scan", "BYTES"), ("at", "UNIX_TIMESTAMP")]
    document = {
        "entities": [{"name": "customer", "type": "INT64"}],
        "features": [{"name": name, "type": type_} for name, type_ in features],
        "source": {"type": "redis", "project": "p"},
        "aggregate": aggregate,
    }
    return FeatureViewSpec.model_validate_json(orjson.dumps(document | more))


def test_names_and_types() -> None:
    """A window is a feature of its own, named as it is written; its type comes from the function."""
    spec = view(
        [
            {"of": "amount", "op": "sum", "windows": ["1h", "24h"]},
            {"op": "count", "windows": ["24h"]},
            {"of": "at", "op": "max", "windows": ["1d"]},
            {"of": "merchant", "op": "last", "windows": ["30d"]},
            {"of": "merchant", "op": "distinct", "windows": ["30d"]},
        ]
    )
    assert {name: spec.types[name] for name in spec.types.keys() - spec.declared.keys()} == {
        "amount_sum_1h": "DOUBLE",
        "amount_sum_24h": "DOUBLE",
        "count_24h": "INT64",
        "at_max_1d": "UNIX_TIMESTAMP",
        "merchant_last_30d": "STRING",
        "merchant_distinct_30d": "INT64",
    }
    assert not list(aggregate_faults(spec))
    assert view({"op": "count", "windows": ["24h"]}) == view([{"op": "count", "windows": ["24h"]}])


@pytest.mark.parametrize(
    ("aggregate", "field", "said"),
    [
        ({"op": "sum", "windows": ["1h"]}, "spec.aggregate[0].of", "sum needs a feature"),
        ({"of": "x", "op": "count", "windows": ["1h"]}, "spec.aggregate[0].of", "no feature x"),
        (
            {"of": "merchant", "op": "sum", "windows": ["1h"]},
            "spec.aggregate[0].of",
            "merchant is STRING, and sum takes",
        ),
        ({"of": "scan", "op": "last", "windows": ["1h"]}, "spec.aggregate[0].of", "scan is BYTES"),
        ({"of": "at", "op": "mean", "windows": ["1h"]}, "spec.aggregate[0].of", "at is UNIX_TIMESTAMP"),
        ({"op": "count", "windows": ["59s"]}, "spec.aggregate[0].windows[59s]", "from 1m to 365d"),
        ({"op": "count", "windows": ["366d"]}, "spec.aggregate[0].windows[366d]", "from 1m to 365d"),
        ({"op": "count", "windows": ["24h", "1d"]}, "spec.aggregate[0].windows[24h]", "is there twice"),
        ([{"op": "count", "windows": ["1h"]}] * 2, "spec.aggregate", "count_1h is taken in this view"),
        (
            [{"of": of, "op": "distinct", "windows": ["1h", "24h", "30d"]} for of in ("merchant", "amount")],
            "spec.aggregate",
            "fewer windows of distinct",
        ),
    ],
)
def test_what_a_document_may_not_say(aggregate: Any, field: str, said: str) -> None:
    """The fault names the field and what to do."""
    faults = dict(aggregate_faults(view(aggregate)))
    assert said in faults[field]


def test_a_name_that_is_taken_or_too_long() -> None:
    """An aggregate's name is one of the view's, and bounded like all names."""
    spec = view({"op": "count", "windows": ["24h"]}, features=[{"name": "count_24h", "type": "INT64"}])
    assert "count_24h is taken" in dict(aggregate_faults(spec))["spec.aggregate"]
    long = "x" * 120
    spec = view({"of": long, "op": "count", "windows": ["24h"]}, features=[{"name": long, "type": "INT64"}])
    assert "longer than the 128" in dict(aggregate_faults(spec))["spec.aggregate"]


def test_lateness_without_aggregates() -> None:
    """A field without effect is refused."""
    assert dict(aggregate_faults(view([], lateness="1h"))).keys() == {"spec.lateness"}
    assert not list(aggregate_faults(view([])))


@pytest.mark.parametrize(
    ("window", "refreshed"), [("1m", "1s"), ("1h", "1m"), ("24h", "15m"), ("30d", "6h"), ("365d", "6h")]
)
def test_a_ttl_outlasts_the_time_between_two_computations(window: str, refreshed: str) -> None:
    """Else what is sound would be STALE until it is computed anew."""
    aggregate = {"op": "count", "windows": [window]}
    [(field, said)] = aggregate_faults(view(aggregate, ttl=refreshed))
    assert field == "spec.ttl"
    assert said.startswith(f"{refreshed} is over before aggregates are computed anew")
    assert f"declare more than {refreshed}" in said
    more = parse_duration_ms(refreshed) + 1_000
    assert not list(aggregate_faults(view(aggregate, ttl=f"{more}ms")))
    assert not list(aggregate_faults(view([], ttl=refreshed)))


def test_lateness_is_within_the_windows() -> None:
    """What is later than the longest window covers counts nowhere. It may be longer than the ttl, which is about the
    values that updates carry; nor does its default bound short windows."""
    hour = {"op": "count", "windows": ["1h"]}
    [(field, said)] = aggregate_faults(view(hour, lateness="62m"))
    assert (field, said.split(":")[0]) == ("spec.lateness", "62m is longer than the longest window covers")
    assert said.endswith("declare 61m at most")
    assert not list(aggregate_faults(view(hour, lateness="61m", ttl="2m")))
    assert not list(aggregate_faults(view({"op": "count", "windows": ["1m"]})))


@pytest.mark.parametrize("hours", [1 / 60, 0.5, 1, 3, 6, 12, 24, 48, 72, 168, 720, 2_160, 8_760])
def test_tiles_are_few_and_small(hours: float) -> None:
    """A window has 120 tiles at most, and one tile is 1/17 of it at most."""
    window_ms = int(hours * HOUR_MS)
    size = tile_size_ms(window_ms)
    assert window_ms / TILES_MAX <= size <= window_ms / 17


def plan(*ops: str, lateness_ms: int = HOUR_MS) -> Plan:
    """One day of these functions."""
    return Plan([Aggregation(f"x_{op}_24h", "x", op, DAY_MS, "DOUBLE") for op in ops], lateness_ms)


def test_a_window_slides_out_tile_by_tile() -> None:
    """An event counts for its window, and until its tile is out: a quarter of an hour more at most."""
    one, state = plan("count"), State()
    tile_end = NOW_MS - NOW_MS % 900_000 + 900_000
    assert one.feed(state, Event(0, NOW_MS, {"x": 1.0})) is Outcome.COUNTED
    assert one.values(state, NOW_MS) == (1,)
    assert one.values(state, tile_end + DAY_MS - 1) == (1,)
    assert one.values(state, tile_end + DAY_MS) == (0,)
    assert one.over(state, tile_end + DAY_MS)


def test_nothing_is_zero_or_null() -> None:
    """Without events count, sum and distinct are 0; the others have no value."""
    every = plan("count", "sum", "distinct", "mean", "min", "max", "last")
    assert every.values(State(), NOW_MS) == (0, 0.0, 0, None, None, None, None)


def test_what_has_no_finite_sum_is_null() -> None:
    """A sum past the largest double is no number."""
    one, state = plan("sum", "mean"), State()
    for offset in range(3):
        one.feed(state, Event(offset, NOW_MS - offset * 900_000, {"x": 1.7e308}))
    assert one.values(state, NOW_MS) == (None, None)
    for offset in range(3, 6):
        one.feed(state, Event(offset, NOW_MS, {"x": 1.7e308}))
    assert one.values(read_state(write_state(state)), NOW_MS) == (None, None)


def test_distinct_is_exact_and_then_near() -> None:
    """Up to 255 values are counted; beyond, the estimate is within three standard errors of 6.3 %."""
    one, state = plan("distinct"), State()
    for number in range(SKETCH_SIZE - 1):
        one.feed(state, Event(number, NOW_MS - number % 7 * 900_000, {"x": number}))
        one.feed(state, Event(10_000 + number, NOW_MS, {"x": number}))
    assert one.values(state, NOW_MS) == (SKETCH_SIZE - 1,)
    state = State()
    for number in range(20_000):
        one.feed(state, Event(number, NOW_MS - number % 3 * 900_000, {"x": f"m{number}"}))
    [estimate] = one.values(state, NOW_MS)
    assert abs(estimate - 20_000) < 3 * 0.063 * 20_000


def test_ids_are_bounded_and_nothing_counts_twice() -> None:
    """Past the bound the oldest ids are forgotten, and unknown ids of their time are refused as late."""
    one, state = plan("count"), State()
    for number in range(IDS_MAX + 1):
        assert one.feed(state, Event(number, NOW_MS + number, {"x": 1.0}, f"id-{number}")) is Outcome.COUNTED
    assert len(state.ids) <= IDS_MAX
    again = [one.feed(state, Event(20_000 + n, NOW_MS + n, {"x": 1.0}, f"id-{n}")) for n in range(IDS_MAX + 1)]
    assert set(again) == {Outcome.LATE, Outcome.DUPLICATE}
    assert one.values(state, NOW_MS) == (IDS_MAX + 1,)
    # Those without an id were never to be told from duplicates.
    assert one.feed(state, Event(40_000, NOW_MS, {"x": 1.0})) is Outcome.COUNTED


def test_thousands_of_events_of_one_moment_count() -> None:
    """As those of a file that knows only days; sent again they count once, from what the table keeps."""
    one, state = plan("count"), State()
    for number in range(3_000):
        assert one.feed(state, Event(number, NOW_MS, {"x": 1.0}, f"id-{number}")) is Outcome.COUNTED
    state = read_state(write_state(state))
    for number in range(3_000):
        assert one.feed(state, Event(3_000 + number, NOW_MS, {"x": 1.0}, f"id-{number}")) is Outcome.DUPLICATE
    assert one.values(state, NOW_MS) == (3_000,)


def test_as_many_ids_as_there_may_be_fit_beside_the_largest_tiles() -> None:
    """Their times as far apart as they can be."""
    one, state = plan("count", lateness_ms=DAY_MS), State()
    times = random.Random(7)
    for number in range(IDS_MAX):
        one.feed(state, Event(number, NOW_MS - times.randrange(DAY_MS), {"x": 1.0}, f"id-{number}"))
    assert len(state.ids) == IDS_MAX
    entry = write_state(state)
    assert read_state(entry) == state
    assert STATE_BYTES_MAX + len(entry) < 900_000


def test_ids_past_the_lateness_go_first() -> None:
    """An id that no update in time could repeat is dropped without a loss."""
    one, state = plan("count", lateness_ms=1_000), State()
    for number in range(IDS_MAX + 1):
        one.feed(state, Event(number, NOW_MS + number * 10, {"x": 1.0}, f"id-{number}"))
    assert len(state.ids) <= 102
    assert state.forgotten_ms < state.watermark_ms - one.lateness_ms


def test_a_longer_lateness_counts_nothing_twice() -> None:
    """Ids that were dropped as late are refused as late under a longer lateness too; later ones, and those of a time
    that has not been forgotten, are counted."""
    one, longer, state = plan("count", lateness_ms=1_000), plan("count", lateness_ms=DAY_MS), State()
    events = [(NOW_MS + number * 10, f"id-{number}") for number in range(2_000)]
    for number, (time_ms, id_) in enumerate(events):
        assert one.feed(state, Event(number, time_ms, {"x": 1.0}, id_)) is Outcome.COUNTED
    assert one.values(state, NOW_MS) == (2_000,)
    state = read_state(write_state(state))
    again = [longer.feed(state, Event(2_000 + n, at_ms, {"x": 1.0}, id_)) for n, (at_ms, id_) in enumerate(events)]
    assert set(again) == {Outcome.LATE, Outcome.DUPLICATE}
    assert longer.feed(state, Event(5_000, state.forgotten_ms + 1, {"x": 1.0}, "new")) is Outcome.COUNTED
    assert longer.values(state, NOW_MS) == (2_001,)


def test_a_tombstone_ends_what_came_before() -> None:
    """Events up to its time are gone and stay out; the entry stays until no window could want them."""
    one, state = plan("count", "sum"), State()
    one.feed(state, Event(0, NOW_MS, {"x": 2.0}))
    assert one.delete(state, 1, NOW_MS + 1) is Outcome.COUNTED
    assert one.delete(state, 1, NOW_MS + 1) is Outcome.AGAIN
    assert state.deleted
    assert one.feed(state, Event(2, NOW_MS + 1, {"x": 2.0})) is Outcome.LATE
    assert not one.over(state, NOW_MS + DAY_MS)
    assert one.due_ms(state, NOW_MS) == NOW_MS + 1 + one.keeps_ms
    assert one.feed(state, Event(3, NOW_MS + 2, {"x": 3.0})) is Outcome.COUNTED
    assert not state.deleted
    assert one.values(state, NOW_MS) == (1, 3.0)
    assert one.as_of_ms(state, NOW_MS) == NOW_MS + 2


def test_a_view_that_changes_keeps_what_it_can() -> None:
    """A function that is added begins with the next event; one that goes, or changes its type, leaves nothing wrong."""
    before = Plan(
        [Aggregation("x_max_24h", "x", "max", DAY_MS, "STRING"), Aggregation("n", None, "count", HOUR_MS, "INT64")], 1
    )
    after = plan("max", "sum")
    state = State()
    before.feed(state, Event(0, NOW_MS, {"x": "text"}))
    state = read_state(write_state(state))
    assert after.values(state, NOW_MS) == (None, 0.0)
    after.feed(state, Event(1, NOW_MS, {"x": 4.0}))
    assert after.values(state, NOW_MS) == (4.0, 4.0)


def test_the_largest_entry_is_within_its_bound() -> None:
    """Tiles full of sketches fit into a record of Kafka's, which the bound on documents promises."""
    spec = view({"of": "merchant", "op": "distinct", "windows": ["1h", "24h", "30d"]})
    assert spec.plan is not None
    state, draw = State(), random.Random(7)
    for each in spec.plan.aggregations:
        state.tiles[each.tile_ms] = {
            number: {"merchant": {"distinct": sorted(draw.randrange(2**48) for _ in range(SKETCH_SIZE))}}
            for number in range(each.window_ms // each.tile_ms + 2)
        }
    assert len(write_state(state)) <= spec.plan.state_bytes_max


@pytest.mark.parametrize("entry", [b"", b"x", write_state(State())[:-3]])
def test_a_damaged_entry_is_told(entry: bytes) -> None:
    """What is no entry is a ValueError, whatever is wrong with it."""
    with pytest.raises(ValueError, match="damaged"):
        read_state(entry)
