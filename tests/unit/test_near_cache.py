"""The near cache's rules: what is fresh, what goes first, what may not be kept, and that its bounds hold."""

import random
import tracemalloc
from collections import Counter

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.domain.document_parts import ValueType
from app.domain.features import UNAVAILABLE, EntityKey, FeatureStatus, Fetched, ViewNeed, unavailable
from app.domain.near_cache import ENTRY_BYTES, FLOOR_MS, LAG_MS, Entry, Materialized, NearCache, size_of
from app.domain.view_documents import CacheSpec, FeatureViewSpec, HttpSource

PRESENT, NULL, MISSING, ERROR = FeatureStatus.PRESENT, FeatureStatus.NULL, FeatureStatus.MISSING, FeatureStatus.ERROR
STALE = FeatureStatus.STALE
NOW_MS = 1_750_000_000_000
SPEC = CacheSpec.model_validate({"ttl": "10s", "negativeTtl": "1s", "staleIfError": "20s"})


def key(number: int = 1) -> EntityKey:
    """An applicant."""
    return EntityKey("p", ("id",), (number,), ("INT64",))


def need(number: int = 1, *features: str, view: str = "v") -> ViewNeed:
    """Features of a view for an applicant."""
    names = features or ("a",)
    types: tuple[ValueType, ...] = tuple("INT64" for _ in names)
    return ViewNeed(view, key(number), names, types)


def answer(asked: ViewNeed, value: int = 7, time_ms: int | None = NOW_MS) -> dict[tuple[str, str], Fetched]:
    """A store's answer with values."""
    return {(asked.view, feature): Fetched(PRESENT, value, time_ms) for feature in asked.features}


def cache(entries: int = 100, size: int = 1_000_000, floors: int = 100) -> NearCache:
    """An empty one."""
    return NearCache(entries_max=entries, bytes_max=size, floors_max=floors)


def outdated(made: NearCache, asked: ViewNeed) -> bool:
    """Whether the row is there and outdated."""
    entry = made.find(asked)
    assert entry is not None
    return entry.outdated_ms is not None


def learn(made: NearCache, now_ms: int, offsets: dict[int, int]) -> None:
    """Tell the cache what is materialized, if it waits for that."""
    announced = made.awaits(now_ms)
    if announced is not None:
        made.materialized(announced, offsets)


def test_documents_say_what_is_wrong_with_them() -> None:
    """A ttl is needed and in bounds, and what is not known is refused."""
    for wrong in ({}, {"ttl": "0ms"}, {"ttl": "2d"}, {"ttl": "1s", "negativeTtl": "2d"}, {"ttl": "1s", "size": 3}):
        with pytest.raises(ValidationError):
            CacheSpec.model_validate(wrong)


def test_a_row_is_fresh_for_its_ttl() -> None:
    """From the moment it was read, by the view's ttl of now; a clock that went back makes nothing fresh."""
    made = cache()
    assert made.find(need()) is None
    assert made.store(need(), answer(need()), NOW_MS)
    entry = made.find(need())
    assert entry is not None
    assert entry.fresh(SPEC, NOW_MS)
    assert entry.fresh(SPEC, NOW_MS + 10_000)
    assert not entry.fresh(SPEC, NOW_MS + 10_001)
    assert not entry.fresh(SPEC, NOW_MS - 1)
    assert not entry.fresh(CacheSpec.model_validate({"ttl": "5s"}), NOW_MS + 6_000)


def test_a_row_too_old_for_who_asks_is_not_fresh() -> None:
    """Inside its ttl, a row whose oldest value is past the strictest maxAge is read again: there may be a newer one."""
    values = (Fetched(PRESENT, 1, NOW_MS - 60_000), Fetched(PRESENT, 2, NOW_MS), Fetched(MISSING))
    entry = Entry(need(1, "a", "b", "c"), values, NOW_MS)
    assert [entry.fresh(SPEC, NOW_MS, max_age_ms) for max_age_ms in (None, 60_000, 59_999)] == [True, True, False]
    timeless = Entry(need(), (Fetched(PRESENT, 1),), NOW_MS)
    assert timeless.fresh(SPEC, NOW_MS + 10_000, 10_000)


def test_a_view_on_demand_has_no_cache() -> None:
    """What is computed for each request cannot be kept; the document is refused."""
    view = {"features": [{"name": "a", "type": "INT64"}], "onDemand": {"a": "1"}, "cache": {"ttl": "1s"}}
    with pytest.raises(ValidationError, match="computed on demand"):
        FeatureViewSpec.model_validate_json(orjson.dumps(view))


def test_a_row_that_is_not_there_is_fresh_for_its_negative_ttl() -> None:
    """All MISSING, or an ERROR or a STALE among others, lasts as negativeTtl says; one value that is there makes a row;
    a null is a value."""
    lacking, mixed, broken, null, stale = (
        Entry(need(), values, NOW_MS)
        for values in (
            (Fetched(MISSING), Fetched(MISSING)),
            (Fetched(MISSING), Fetched(PRESENT, 1)),
            (Fetched(ERROR, reason="damaged"), Fetched(PRESENT, 1)),
            (Fetched(NULL), Fetched(MISSING)),
            (Fetched(STALE, 1, NOW_MS, source="http"), Fetched(PRESENT, 1)),
        )
    )
    assert [entry.negative for entry in (lacking, mixed, broken, null, stale)] == [True, False, True, False, True]
    assert [stale.fresh(SPEC, NOW_MS + age_ms) for age_ms in (1_000, 1_001)] == [True, False]
    assert [lacking.fresh(SPEC, NOW_MS + age_ms) for age_ms in (1_000, 1_001)] == [True, False]
    assert not lacking.fresh(CacheSpec.model_validate({"ttl": "10s"}), NOW_MS)


def test_values_say_that_they_come_from_the_cache() -> None:
    """And since when they have been there; their event time is the store's."""
    made = cache()
    made.store(need(), answer(need()), NOW_MS + 5)
    entry = made.find(need())
    assert entry is not None
    expected = {("v", "a"): Fetched(PRESENT, 7, NOW_MS, source="cache", fetched_ms=NOW_MS + 5)}
    assert entry.served() == expected
    assert entry.served() is entry.served()


def test_past_its_ttl_a_row_is_overdue_after_stale_if_error() -> None:
    """Until then any contract may use it; what was missing or broken is not said again."""
    values = (Fetched(PRESENT, 1, 5), Fetched(NULL), Fetched(MISSING), Fetched(ERROR, reason="damaged"))
    entry = Entry(need(1, "a", "b", "c", "d"), values, NOW_MS)
    early, late = (entry.served_stale(SPEC, NOW_MS + age_ms) for age_ms in (30_000, 30_001))
    assert [value.status for value in early] == [PRESENT, NULL, ERROR, ERROR]
    assert [value.reason for value in early] == [None, None, UNAVAILABLE, UNAVAILABLE]
    assert [value.overdue for value in early[:2] + late[:2]] == [False, False, True, True]
    assert entry.served_stale(SPEC, NOW_MS - 60_000)[0].overdue
    without = entry.served_stale(CacheSpec.model_validate({"ttl": "10s"}), NOW_MS + 10_001)
    assert without[0].overdue


def test_needs_for_other_features_or_types_are_other_rows() -> None:
    """What was not read is not answered; an update makes all of a row's entries outdated."""
    made = cache()
    other_type = ViewNeed("v", key(), ("a",), ("DOUBLE",))
    for each in (need(), need(1, "a", "b"), other_type, need(2), need(1, view="w")):
        made.store(each, answer(each), NOW_MS)
    assert len(made) == 5
    assert made.find(need(1, "b")) is None
    found = made.find(other_type)
    assert found is not None
    assert found.need is other_type
    assert made.invalidate("v", key(), ("a",), NOW_MS + 1, NOW_MS) == 3
    assert made.invalidate("v", key(9), ("a",), NOW_MS + 1, NOW_MS) == 0
    assert [outdated(made, each) for each in (need(), other_type, need(2), need(1, view="w"))] == [
        True, True, False, False,
    ]  # fmt: skip


def test_rows_of_another_source_are_other_rows() -> None:
    """A view that moves to a feature server, or to another one, is asked for there; the same said anew is the same."""
    made = cache()
    one, other = (
        HttpSource.model_validate({"type": "http", "endpoints": (f"http://server.example:{port}",)}) for port in (1, 2)
    )
    made.store(need(), answer(need()), NOW_MS)
    assert made.find(need()._replace(http=one)) is None
    made.store(need()._replace(http=one), answer(need(), 8), NOW_MS)
    assert made.find(need()._replace(http=other)) is None
    for same in ({"timeout": 200}, {"endpoints": (*other.endpoints, *one.endpoints)}):
        again = made.find(need()._replace(http=one.model_copy(update=same)))
        assert again is not None
        assert again.values[0].value == 8
    assert made.find(need()._replace(http=one.model_copy(update={"view": "w"}))) is None
    made.store(need()._replace(http=other), answer(need(), 9), NOW_MS)
    both = need()._replace(http=one.model_copy(update={"endpoints": (*one.endpoints, *other.endpoints)}))
    made.store(both, answer(need(), 10), NOW_MS)
    again = made.find(both)
    assert again is not None
    assert (again.values[0].value, len(made)) == (10, 2)


def test_a_row_read_again_replaces_itself() -> None:
    """One entry, with the later values and the later time."""
    made = cache()
    made.store(need(), answer(need(), 1), NOW_MS)
    made.store(need(), answer(need(), 2), NOW_MS + 1)
    entry = made.find(need())
    assert entry is not None
    assert (entry.values[0].value, entry.fetched_ms, len(made)) == (2, NOW_MS + 1, 1)
    assert made.bytes == entry.size


def test_the_old_row_is_not_kept_while_an_update_is_under_way() -> None:
    """Not before the announced value shows, or its time is over; one as new or newer is kept at once."""
    made = cache()
    made.invalidate("v", key(), ("a",), NOW_MS + 100, NOW_MS)
    made.invalidate("v", key(), ("a",), NOW_MS + 50, NOW_MS)
    assert not made.store(need(), answer(need(), time_ms=NOW_MS + 99), NOW_MS + 1)
    assert not made.store(need(), answer(need(), time_ms=None), NOW_MS + 1)
    assert made.store(need(2), answer(need(2), time_ms=NOW_MS), NOW_MS + 1)
    assert made.store(need(), answer(need(), time_ms=NOW_MS + 100), NOW_MS + 1)
    made.invalidate("v", key(3), ("a",), NOW_MS + 100, NOW_MS)
    assert not made.store(need(3), answer(need(3)), NOW_MS + LAG_MS - 1)
    assert made.store(need(3), answer(need(3)), NOW_MS + LAG_MS)


def test_an_update_that_changes_nothing_takes_nothing() -> None:
    """An entry as new as the update stays; with times at the epoch, which guard nothing, it goes."""
    made = cache()
    made.store(need(), answer(need()), NOW_MS)
    assert made.invalidate("v", key(), ("a",), NOW_MS, NOW_MS) == 0
    made.store(need(2), answer(need(2), time_ms=0), NOW_MS)
    assert made.invalidate("v", key(2), ("a",), 0, NOW_MS) == 1
    assert not made.store(need(2), answer(need(2), time_ms=0), NOW_MS)


def test_an_outdated_row_is_never_fresh_and_kept_for_a_store_that_is_away() -> None:
    """A maxAge may allow it, and for those without one staleIfError counts from the update on; without it, not at all.
    The next row that has the update takes its place."""
    made, without = cache(), CacheSpec.model_validate({"ttl": "10s"})
    made.store(need(), answer(need()), NOW_MS)
    assert made.invalidate("v", key(), ("a",), NOW_MS + 1, NOW_MS + 1_000) == 1
    assert made.invalidate("v", key(), ("a",), NOW_MS + 2, NOW_MS + 2_000) == 0
    entry = made.find(need())
    assert entry is not None
    assert entry.outdated_ms == NOW_MS + 1_000
    assert not any(entry.fresh(SPEC, NOW_MS + age_ms) for age_ms in (0, 1_000, 2_000))
    within, late = (entry.served_stale(SPEC, NOW_MS + age_ms)[0] for age_ms in (20_999, 21_000))
    assert (within.value, within.source, within.overdue) == (7, "cache", False)
    assert (late.value, late.overdue) == (7, True)
    assert all(entry.served_stale(without, NOW_MS + age_ms)[0].overdue for age_ms in (1_000, 2_000))
    assert (len(made), made.bytes) == (1, entry.size)
    assert made.store(need(), answer(need(), 8, NOW_MS + 2), NOW_MS + 3_000)
    assert not outdated(made, need())
    assert len(made) == 1


def test_a_row_past_its_ttl_stays_no_longer_for_an_update() -> None:
    """An update after the ttl is over prolongs nothing."""
    entry = Entry(need(), (Fetched(PRESENT, 7, NOW_MS),), NOW_MS)
    entry.outdated_ms = NOW_MS + 25_000
    assert [entry.served_stale(SPEC, NOW_MS + age_ms)[0].overdue for age_ms in (30_000, 30_001)] == [False, True]


def test_a_row_that_is_read_before_its_update_arrives_is_kept_as_outdated() -> None:
    """It is the latest to fall back on, and replaces an older one; but none that has the update already, and where it
    has no value there is nothing to fall back on."""
    made = cache()
    made.store(need(), answer(need(), 1, NOW_MS), NOW_MS)
    made.invalidate("v", key(), ("a",), NOW_MS + 100, NOW_MS + 1)
    assert not made.store(need(), answer(need(), 2, NOW_MS + 50), NOW_MS + 2)
    entry = made.find(need())
    assert entry is not None
    assert (entry.values[0].value, entry.outdated_ms, len(made)) == (2, NOW_MS + 2, 1)
    assert made.store(need(), answer(need(), 3, NOW_MS + 100), NOW_MS + 3)
    assert not made.store(need(), answer(need(), 2, NOW_MS + 50), NOW_MS + 4)
    entry = made.find(need())
    assert entry is not None
    assert (entry.values[0].value, entry.outdated_ms) == (3, None)
    made.invalidate("v", key(), ("a",), NOW_MS + 200, NOW_MS + 5)
    assert not made.store(need(), {("v", "a"): Fetched(MISSING)}, NOW_MS + 6)
    assert made.find(need()) is None
    assert (len(made), made.bytes) == (0, 0)


def test_an_update_of_a_row_without_values_takes_it_away() -> None:
    """There is nothing to fall back on in it."""
    made = cache()
    made.store(need(), {("v", "a"): Fetched(MISSING)}, NOW_MS)
    assert made.invalidate("v", key(), ("a",), NOW_MS, NOW_MS) == 1
    assert (made.find(need()), len(made), made.bytes) == (None, 0, 0)


def test_a_tombstone_takes_outdated_rows_away_too() -> None:
    """What is deleted is not given out again, not even while the store is away."""
    made = cache()
    made.store(need(), answer(need()), NOW_MS)
    made.invalidate("v", key(), ("a",), NOW_MS + 1, NOW_MS)
    assert outdated(made, need())
    assert made.invalidate("v", key(), None, NOW_MS + 2, NOW_MS) == 1
    assert (made.find(need()), len(made)) == (None, 0)
    assert not made.store(need(), answer(need()), NOW_MS + 1)
    assert made.find(need()) is None


def test_outdated_rows_count_and_go_first() -> None:
    """They are within the bounds, and an update takes the mark of past hits from its row."""
    made = cache(entries=2)
    for number in range(2):
        made.store(need(number), answer(need(number)), NOW_MS)
        made.find(need(number))
    made.invalidate("v", key(1), ("a",), NOW_MS + 1, NOW_MS)
    made.store(need(2), answer(need(2)), NOW_MS)
    assert [made.find(need(number)) is not None for number in range(3)] == [True, False, True]
    assert len(made) == 2


def test_each_feature_has_its_own_floor() -> None:
    """An update of one feature may be late, below its neighbours' times: the row waits for that feature, and rows
    without it are not touched; floors of several updates add up."""
    made, both = cache(), need(1, "a", "b")
    times = {("v", "a"): Fetched(PRESENT, 1, NOW_MS - 50), ("v", "b"): Fetched(PRESENT, 2, NOW_MS)}
    made.store(both, times, NOW_MS)
    made.store(need(1, "b"), times, NOW_MS)
    assert made.invalidate("v", key(), ("a",), NOW_MS - 10, NOW_MS) == 1
    assert made.find(need(1, "b"))
    assert not made.store(both, times, NOW_MS)
    assert made.invalidate("v", key(), ("b",), NOW_MS + 5, NOW_MS) == 1
    times["v", "a"] = Fetched(PRESENT, 3, NOW_MS - 10)
    assert not made.store(both, times, NOW_MS)
    times["v", "b"] = Fetched(PRESENT, 3, NOW_MS + 5)
    assert made.store(both, times, NOW_MS)


def test_a_row_with_aggregates_is_not_kept_until_its_update_is_materialized() -> None:
    """Their times do not tell whether an update is in them: nothing of the row is kept before the materializer is past
    it, whatever else comes, or may lag no more; and what the update itself carries has to show for as long."""
    made, carried, computed = cache(), need(), need(1, "a_sum_1h")
    for each in (carried, computed):
        made.store(each, answer(each), NOW_MS)
    assert made.invalidate("v", key(), ("a",), NOW_MS + 1, NOW_MS, position=(3, 7)) == 2
    made.invalidate("v", key(), ("b",), NOW_MS, NOW_MS + 1)
    for offsets in ({}, {3: 7}, {2: 8}):
        learn(made, NOW_MS + 1, offsets)
        for each in (carried, computed):
            assert not made.store(each, answer(each, time_ms=NOW_MS + 1), NOW_MS + LAG_MS, made.known)
        assert made.awaits(NOW_MS + 1) is not None
    assert made.store(computed, answer(computed), NOW_MS + LAG_MS + 1, made.known)
    assert made.awaits(NOW_MS + LAG_MS) is None
    learn(made, NOW_MS + 1, {2: 1, 3: 8})
    assert made.awaits(NOW_MS + 1) is None
    assert made.store(computed, answer(computed, time_ms=None), NOW_MS + 2, made.known)
    assert not made.store(carried, answer(carried), NOW_MS + LAG_MS - 1, made.known)
    assert made.store(carried, answer(carried, time_ms=NOW_MS + 1), NOW_MS + 2, made.known)


def test_aggregates_asked_for_before_their_update_was_known_to_be_there_are_not_kept() -> None:
    """They may have been read before it came, however long the answer took."""
    made = cache()
    made.invalidate("v", key(), ("b",), NOW_MS, NOW_MS, position=(0, 7))
    began = made.known
    learn(made, NOW_MS, {0: 8})
    assert not made.store(need(), answer(need()), NOW_MS + 1, began)
    assert outdated(made, need())
    assert made.store(need(), answer(need(), 8), NOW_MS + 2, made.known)
    assert not made.store(need(), answer(need()), NOW_MS + 3, began)
    assert not outdated(made, need())


def test_what_was_materialized_of_another_topic_says_nothing() -> None:
    """A topic that is made anew begins its offsets again: what was asked for before an update is not about it, and what
    an update waited for there, the next one of its row does not."""
    made = cache()
    made.invalidate("v", key(), ("b",), NOW_MS, NOW_MS, position=(0, 700))
    asked = made.awaits(NOW_MS)
    assert asked is not None
    made.invalidate("v", key(), ("b",), NOW_MS, NOW_MS, position=(0, 2))
    made.materialized(asked, {0: 701})
    assert not made.store(need(), answer(need()), NOW_MS + 1, made.known)
    learn(made, NOW_MS, {0: 3})
    assert made.store(need(), answer(need()), NOW_MS + 2, made.known)
    assert made.awaits(NOW_MS) is None


def test_a_tombstone_waits_until_what_it_deletes_is_gone() -> None:
    """A row in which something not later than it is still there is not kept, for as long as a materializer may lag;
    what is missing, or later, is as it has to be."""
    made, both = cache(), need(1, "a", "b")
    old, new, gone = Fetched(PRESENT, 1, NOW_MS), Fetched(PRESENT, 2, NOW_MS + 1), Fetched(MISSING)
    made.store(both, {("v", "a"): old, ("v", "b"): new}, NOW_MS)
    made.store(need(1, "b"), {("v", "b"): new}, NOW_MS)
    assert made.invalidate("v", key(), None, NOW_MS, NOW_MS) == 1
    assert made.find(need(1, "b"))
    for value in (old, old._replace(status=NULL), old._replace(status=ERROR), old._replace(event_time_ms=None)):
        assert not made.store(both, {("v", "a"): value, ("v", "b"): new}, NOW_MS + LAG_MS - 1)
    for value in (gone, new):
        assert made.store(both, {("v", "a"): value, ("v", "b"): gone}, NOW_MS + 1)
    assert made.store(both, {("v", "a"): old, ("v", "b"): new}, NOW_MS + LAG_MS)


@pytest.mark.parametrize("first", [True, False])
def test_what_a_tombstone_keeps_out_is_not_waited_for(first: bool) -> None:
    """In whatever order they are announced: an older update never shows, and a later one has to."""
    made, found = cache(), {("v", "a"): Fetched(MISSING)}
    told: list[tuple[tuple[str, ...] | None, int]] = [(None, NOW_MS), (("a",), NOW_MS)]
    for features, time_ms in told if first else reversed(told):
        made.invalidate("v", key(), features, time_ms, NOW_MS)
    assert made.store(need(), found, NOW_MS + 1)
    assert made.invalidate("v", key(), ("a",), NOW_MS + 1, NOW_MS) == 1
    assert not made.store(need(), found, NOW_MS + 1)
    assert made.store(need(), answer(need(), time_ms=NOW_MS + 1), NOW_MS + 1)


def test_floors_have_a_bound_and_nothing_is_kept_past_it() -> None:
    """Where more rows change than can be remembered, no row is kept until the forgotten floors' time is over."""
    made = cache(floors=2)
    for number in range(3):
        made.invalidate("v", key(number), ("a",), NOW_MS, NOW_MS + number)
    assert not made.store(need(8), answer(need(8)), NOW_MS + 10)
    assert not made.store(need(2), answer(need(2), time_ms=1), NOW_MS + FLOOR_MS)
    assert made.store(need(8), answer(need(8)), NOW_MS + FLOOR_MS)


def test_floors_of_a_row_add_up() -> None:
    """A row of which an update, and then others with aggregates, were announced waits for all, each as long as it has
    to."""
    made = cache()
    made.invalidate("v", key(), ("a",), NOW_MS + 100, NOW_MS)
    made.invalidate("v", key(), None, NOW_MS, NOW_MS, position=(1, 5))
    made.invalidate("v", key(), ("b",), NOW_MS + 1, NOW_MS, position=(0, 9))
    made.invalidate("v", key(), ("b",), NOW_MS + 2, NOW_MS)
    for offsets in ({1: 6}, {0: 10}, {0: 9, 1: 6}):
        learn(made, NOW_MS, offsets)
        assert not made.store(need(), answer(need(), time_ms=NOW_MS + 100), NOW_MS, made.known)
    learn(made, NOW_MS, {0: 10, 1: 6})
    assert not made.store(need(), answer(need(), time_ms=NOW_MS + 99), NOW_MS, made.known)
    assert made.store(need(), answer(need(), time_ms=NOW_MS + 100), NOW_MS, made.known)


def test_floors_past_their_bound_end_without_stopping_the_cache() -> None:
    """Those of materializers that lag go first where there are too many, and nothing else pays for it."""
    made = cache(floors=2)
    for number in range(3):
        made.invalidate("v", key(number), ("a",), NOW_MS + 100, NOW_MS + number * FLOOR_MS)
    assert made.store(need(8), answer(need(8)), NOW_MS + 2 * FLOOR_MS)
    assert made.store(need(0), answer(need(0)), NOW_MS + 2 * FLOOR_MS)
    assert not made.store(need(1), answer(need(1)), NOW_MS + 2 * FLOOR_MS)


def test_a_view_waits_for_the_floors_that_were_given_up_and_are_not_committed() -> None:
    """Past their bound, an aggregate without its update is kept no more than within it; other views are kept."""
    made, later_ms = cache(floors=1), NOW_MS + FLOOR_MS
    for number in range(3):
        made.invalidate("v", key(number), ("b",), NOW_MS, NOW_MS, position=(number, 7))
    learn(made, NOW_MS, {0: 8, 2: 8})
    assert not made.store(need(0), answer(need(0)), later_ms, made.known)
    assert made.store(need(0, view="w"), answer(need(0, view="w")), later_ms, made.known)
    before = made.known
    learn(made, NOW_MS, {0: 8, 1: 8, 2: 8})
    assert not made.store(need(0), answer(need(0)), later_ms, before)
    assert made.store(need(0), answer(need(0)), later_ms, made.known)
    assert not made.store(need(1), answer(need(1)), NOW_MS + LAG_MS - 1, before)
    assert made.store(need(1), answer(need(1)), NOW_MS + LAG_MS, before)
    made, before = cache(floors=1), cache().known
    made.invalidate("v", key(0), ("b",), NOW_MS, NOW_MS, position=(0, 7))
    learn(made, NOW_MS, {0: 8})
    made.invalidate("v", key(1), ("b",), NOW_MS, NOW_MS)
    assert not made.store(need(0), answer(need(0)), later_ms, before)
    assert made.store(need(0), answer(need(0)), later_ms, made.known)


def test_what_was_announced_before_anything_was_heard_of_is_waited_for() -> None:
    """It may be of any row: none that is there stays fresh, and none is kept as such until all of it is committed, or
    may lag no more. Where there was nothing before, nothing is waited for."""
    made = cache()
    made.store(need(), answer(need()), NOW_MS)
    made.unheard({}, NOW_MS)
    assert not outdated(made, need())
    assert made.awaits(NOW_MS) is None
    began = made.known
    made.unheard({0: 5, 3: 1}, NOW_MS)
    assert outdated(made, need())
    for offsets in ({0: 5}, {0: 4, 3: 1}):
        learn(made, NOW_MS, offsets)
        assert not made.store(need(), answer(need()), NOW_MS + LAG_MS - 1, made.known)
    learn(made, NOW_MS, {0: 5, 3: 1})
    assert made.awaits(NOW_MS) is None
    assert not made.store(need(), answer(need()), NOW_MS, began)
    assert made.store(need(), answer(need()), NOW_MS, made.known)
    assert made.store(need(2), answer(need(2)), NOW_MS + LAG_MS, began)


def test_an_entity_s_rows_go_one_by_one() -> None:
    """Views of one entity are found together and end each for itself; of the last nothing is left."""
    made = cache()
    views = [need(1, view="v"), need(1, view="w"), need(1, "b", view="w")]
    for each in views:
        assert made.store(each, answer(each), NOW_MS)
    rows = made.rows_of(key(1))
    assert [made.find(each, rows) for each in views] == [made.find(each) for each in views]
    assert {view: len(entries) for view, entries in rows.items()} == {"v": 1, "w": 2}
    assert made.invalidate("w", key(1), None, NOW_MS, NOW_MS) == 2
    assert [made.find(each) is None for each in views] == [False, True, True]
    assert made.invalidate("v", key(1), None, NOW_MS, NOW_MS) == 1
    assert not made.rows_of(key(1))
    assert (len(made), made.bytes) == (0, 0)


def test_no_answer_is_not_kept() -> None:
    """That the store was away says nothing of a row."""
    made = cache()
    assert not made.store(need(), unavailable([need()]), NOW_MS)
    assert made.find(need()) is None


def test_what_is_asked_for_again_stays() -> None:
    """Of four entries the two that were hit outlive a scan of rows that nobody asks for again."""
    made = cache(entries=4)
    for number in range(4):
        made.store(need(number), answer(need(number)), NOW_MS)
    made.find(need(0))
    made.find(need(2))
    for number in range(10, 12):
        made.store(need(number), answer(need(number)), NOW_MS)
    assert {number for number in range(12) if made.find(need(number))} == {0, 2, 10, 11}
    assert made.evicted == 2


def test_bytes_are_about_what_python_takes() -> None:
    """The estimate of a thousand rows of ten values is within a third of what they take."""
    features = tuple(f"feature_{number}" for number in range(10))
    types: tuple[ValueType, ...] = tuple("DOUBLE" for _ in features)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = cache(10_000, 100_000_000)
        for number in range(1_000):
            asked = ViewNeed("v", key(number), features, types)
            made.store(asked, {("v", name): Fetched(PRESENT, number + 0.5, NOW_MS) for name in features}, NOW_MS)
            entry = made.find(asked)
            assert entry is not None
            entry.served()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.67 < made.bytes / taken < 1.5


def test_contents_count() -> None:
    """Text, bytes and lists by their length."""
    small, text, listed = (size_of([Fetched(PRESENT, value)]) for value in (1, "x" * 10_000, (1.0,) * 1_000))
    assert text - small > 9_900
    assert listed - small > 30_000


class ReferenceSieve:
    """SIEVE as its paper writes it down, over a plain list from the oldest to the newest."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.order: list[int] = []
        self.marked: set[int] = set()
        self.hand: int | None = None

    def access(self, number: int) -> None:
        if number in self.order:
            self.marked.add(number)
            return
        if len(self.order) == self.size:
            at = self.order.index(self.hand) if self.hand is not None else 0
            while self.order[at] in self.marked:
                self.marked.discard(self.order[at])
                at = (at + 1) % len(self.order)
            del self.order[at]
            self.hand = self.order[at] if at < len(self.order) else None
        self.order.append(number)


@given(st.lists(st.integers(0, 9), max_size=120), st.integers(1, 5))
def test_eviction_is_sieve(accesses: list[int], size: int) -> None:
    """Whatever is asked for, the same rows stay as in the algorithm's plain form."""
    made, reference = cache(entries=size), ReferenceSieve(size)
    for number in accesses:
        if made.find(need(number)) is None:
            made.store(need(number), answer(need(number)), NOW_MS)
        reference.access(number)
        assert len(made) <= size
    left = {number for number in range(10) if made.find(need(number))}
    assert left == set(reference.order)


@given(
    st.lists(
        st.tuples(st.sampled_from(["read", "update", "delete", "large"]), st.integers(0, 6), st.integers(0, 40)),
        max_size=100,
    )
)
def test_bounds_hold_and_no_update_is_missed(steps: list[tuple[str, int, int]]) -> None:
    """Under any mix of reads, updates and tombstones, entries and bytes stay in bounds and agree with what is there.
    What is fresh is never older than an update of which the cache has heard; what was deleted is not there at all."""
    made = cache(entries=4, size=4 * ENTRY_BYTES + 2_000)
    told: dict[int, int] = {}
    deleted: dict[int, int] = {}
    now_ms = NOW_MS
    for what, number, time_ms in steps:
        now_ms += 1
        if what == "update":
            made.invalidate("v", key(number), ("a",), time_ms, now_ms)
            told[number] = max(told.get(number, 0), time_ms)
        elif what == "delete":
            made.invalidate("v", key(number), None, time_ms, now_ms)
            deleted[number] = max(deleted.get(number, -1), time_ms)
        elif what == "read":
            made.store(need(number), answer(need(number), time_ms=time_ms), now_ms)
        else:
            made.store(need(number), {("v", "a"): Fetched(PRESENT, "x" * time_ms * 200, time_ms)}, now_ms)
        found = {each: entry for each in range(7) if (entry := made.find(need(each)))}
        assert len(made) == len(found) <= 4
        assert made.bytes == sum(entry.size for entry in found.values()) <= 4 * ENTRY_BYTES + 2_000
        for each, entry in found.items():
            event_time_ms = entry.values[0].event_time_ms
            assert event_time_ms is not None
            assert event_time_ms > deleted.get(each, -1)
            assert not entry.fresh(SPEC, now_ms) or event_time_ms >= told.get(each, 0)


class Materializing:
    """One partition of updates, a materializer that computes a sum of each row's, and a cache that hears of it all.

    Each step is one that the others may come between: an update is sent, announced, stored with the sum it makes, and
    committed; the group's offset is asked for, answered and told; a row is asked for, read and kept. A sum has no time.
    """

    def __init__(self, floors: int) -> None:
        self.cache = cache(floors=floors)
        self.now_ms = NOW_MS
        self.log: list[int] = []
        self.following = False
        self.announced = self.stored = self.committed = 0
        self.sums: Counter[int] = Counter()
        self.heard: Counter[int] = Counter()
        self.asked: int | None = None
        self.offset: int | None = None
        self.fetches: list[tuple[int, Materialized, int | None]] = []

    def update(self, number: int) -> None:
        self.log.append(number)

    def follow(self, _: int) -> None:
        """From here on updates are announced."""
        if not self.following:
            self.following = True
            self.announced, self.heard = len(self.log), Counter(self.log)
            self.cache.unheard({0: self.announced} if self.log else {}, self.now_ms)

    def announce(self, _: int) -> None:
        if self.following and self.announced < len(self.log):
            number = self.log[self.announced]
            self.cache.invalidate("v", key(number), ("b",), NOW_MS, self.now_ms, position=(0, self.announced))
            self.heard[number] += 1
            self.announced += 1

    def materialize(self, _: int) -> None:
        if self.stored < len(self.log):
            self.sums[self.log[self.stored]] += 1
            self.stored += 1

    def commit(self, _: int) -> None:
        self.committed = self.stored

    def ask(self, _: int) -> None:
        self.asked, self.offset = self.cache.awaits(self.now_ms), None

    def reply(self, _: int) -> None:
        if self.asked is not None:
            self.offset = self.committed

    def tell(self, _: int) -> None:
        if self.asked is not None and self.offset is not None:
            self.cache.materialized(self.asked, {0: self.offset})
            self.asked = None

    def fetch(self, number: int) -> None:
        self.fetches.append((number, self.cache.known, None))

    def read(self, place: int) -> None:
        if self.fetches:
            number, known, value = self.fetches[place % len(self.fetches)]
            if value is None:
                self.fetches[place % len(self.fetches)] = (number, known, self.sums[number])

    def keep(self, place: int) -> None:
        if self.fetches:
            number, known, value = self.fetches.pop(place % len(self.fetches))
            if value is not None:
                self.cache.store(need(number), answer(need(number), value, None), self.now_ms, known)

    def wait(self, seconds: int) -> None:
        self.now_ms += seconds * 2_000

    def plain(self, number: int) -> None:
        """An update that no aggregate follows, as of a view that had none then."""
        self.cache.invalidate("v", key(number), ("b",), NOW_MS, self.now_ms)

    def anew(self, _: int) -> None:
        """The topic is made anew, once all in it was heard of and stored; the group's offsets go with it."""
        self.follow(0)
        while self.announced < len(self.log):
            self.announce(0)
        while self.stored < len(self.log):
            self.materialize(0)
        self.log.clear()
        self.announced = self.stored = self.committed = 0


STEPS = (
    "update",
    "announce",
    "plain",
    "materialize",
    "commit",
    "ask",
    "reply",
    "tell",
    "fetch",
    "read",
    "keep",
    "wait",
    "follow",
)


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 100]), st.booleans())
def test_no_aggregate_is_fresh_without_an_update_that_was_heard_of(seed: int, floors: int, anew: bool) -> None:
    """However long the materializer, its group's answers and reads take, and also where floors are given up for room,
    a fresh row has every update of which the cache has heard. Once all is committed, and that is known, rows are kept
    again, though they have no times."""
    world, lasting = Materializing(floors), CacheSpec.model_validate({"ttl": "1h"})
    drawn = random.Random(seed)
    for _ in range(300):
        what = "anew" if anew and drawn.random() < 0.01 else drawn.choice(STEPS)
        getattr(world, what)(drawn.randrange(3))
        for each in range(3):
            entry = world.cache.find(need(each))
            if entry is not None and entry.fresh(lasting, world.now_ms):
                value = entry.values[0].value
                assert isinstance(value, int)
                assert value >= world.heard[each]
    if anew:
        # What stands for the topic that was stands until it lags no more.
        world.now_ms += LAG_MS
    world.follow(0)
    for _ in tuple(world.log):
        world.announce(0)
        world.materialize(0)
    for what in ("commit", "ask", "reply", "tell"):
        getattr(world, what)(0)
    assert world.cache.awaits(world.now_ms) is None
    world.now_ms += FLOOR_MS
    for each in range(3):
        assert world.cache.store(
            need(each), answer(need(each), world.sums[each], None), world.now_ms, world.cache.known
        )
