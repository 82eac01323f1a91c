"""Which rows of a load change nothing: by the store, by the file itself, and by what aggregates still count."""

import pytest

from app.domain.aggregates import IDS_MAX
from app.domain.feature_news import Outlook, Standing, StoredRow
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, Fetched

KEY = EntityKey("p", ("id",), (17,), ("INT64",))
NOTHING = StoredRow({})


def row(time_ms: int, **values: int | None) -> FeatureRow:
    """Values of one entity, at a time."""
    return FeatureRow("v", KEY, tuple(values), tuple(values.values()), ("INT64",) * len(values), time_ms)


def held(time_ms: int | None, value: int | None = 1, **more: tuple[int, int]) -> StoredRow:
    """A store that has feature ``a``, and more features with their times and values."""
    found = {"a": (time_ms, value), **more}
    return StoredRow(
        {
            name: Fetched(FeatureStatus.NULL if value is None else FeatureStatus.PRESENT, value, at)
            for name, (at, value) in found.items()
        }
    )


def standing_of(outlook: Outlook, *rows: FeatureRow, stored: StoredRow | None = NOTHING) -> list[str]:
    """How each row of one entity lies; empty for news."""
    told = []
    for each in rows:
        before = outlook.outdated.copy()
        outlook.see(b"17", each, stored)
        told.append("".join(outlook.outdated - before))
    return told


def test_more_rows_of_an_entity_than_ids_are_remembered_are_told() -> None:
    """Where there are aggregates, which then do not count all that are of one moment."""
    for lateness_ms, crowded in ((3_600_000, 1), (None, 0)):
        outlook = Outlook(lateness_ms=lateness_ms)
        for number in range(IDS_MAX):
            outlook.see(b"17", row(1_000, a=number), None)
        assert outlook.crowded == 0
        for number in range(5):
            outlook.see(b"17", row(1_000, a=number), None)
            outlook.see(b"18", row(1_000, a=number), None)
        assert outlook.crowded == crowded


@pytest.mark.parametrize(
    ("stored", "given", "expected"),
    [
        (NOTHING, row(1_000, a=1), ""),
        (None, row(1_000, a=1), ""),
        (held(999), row(1_000, a=1), ""),
        (held(1_000), row(1_000, a=1), "same"),
        (held(1_000), row(1_000, a=2), "conflicting"),
        (held(1_000, None), row(1_000, a=None), "same"),
        (held(1_000, None), row(1_000, a=1), "conflicting"),
        (held(1_001), row(1_000, a=1), "older"),
        # One feature that is later, or that is not there yet, is enough.
        (held(1_001), row(1_000, a=1, b=1), ""),
        (held(1_000, b=(999, 1)), row(1_000, a=1, b=1), ""),
        (held(1_000, b=(1_001, 5)), row(1_000, a=1, b=1), "older"),
        (held(1_000, b=(1_000, 5)), row(1_000, a=1, b=1), "conflicting"),
        # What a tombstone deleted comes back only by what is later than it.
        (StoredRow({}, 1_000), row(1_000, a=1), "conflicting"),
        (StoredRow({}, 1_000), row(999, a=1), "older"),
        (StoredRow({}, 1_000), row(1_001, a=1), ""),
        # A time that is not known, and the epoch, keep nothing out.
        (held(None), row(1_000, a=1), ""),
        (held(0), row(0, a=1), ""),
    ],
)
def test_rows_are_held_against_the_store(stored: StoredRow | None, given: FeatureRow, expected: str) -> None:
    """Later wins, feature by feature, and of one time the first."""
    assert standing_of(Outlook(), given, stored=stored) == [expected]


def test_rows_are_held_against_earlier_rows_of_the_file() -> None:
    """In the file's order; other entities do not matter, and features that are left out keep nothing out."""
    outlook = Outlook()
    rows = [
        row(5, a=1),
        row(5, a=2),
        row(5, a=1),
        row(4, a=9),
        row(4, b=1),
        row(5, b=1),
        row(5, a=1, b=1),
        row(6, a=-1),
    ]
    assert standing_of(outlook, *rows) == ["", "conflicting", "same", "older", "", "", "same", ""]
    assert standing_of(outlook, row(6, a=-2), row(7, a=1)) == ["conflicting", ""]
    outlook.see(b"18", row(0, a=1), NOTHING)
    outlook.see(b"18", row(0, a=1), NOTHING)
    assert (outlook.outdated_rows, outlook.stored_before, outlook.late_rows, outlook.full) == (5, 0, 0, False)


def test_what_is_there_already_is_told_apart() -> None:
    """A file that is loaded again is no alarm: each row is told as what it is."""
    outlook = Outlook()
    standing_of(outlook, row(1_000, a=1), row(900, a=1), stored=held(1_000))
    assert outlook.stored_before == 1
    assert outlook.told(3) == (
        "2 of 3 rows change nothing: 1 is older than what the store or an earlier row has of the entity; "
        "1 is there already, with the same event time and values"
    )
    standing_of(outlook, row(1_000, a=2), row(1_000, a=3), stored=held(1_000))
    assert "2 are of the very event time of what the store or an earlier row has, with other values" in outlook.told(5)


def test_memory_is_bounded() -> None:
    """Entities past the bound are held against the store alone, and it is said that there may be more."""
    outlook = Outlook(most=1)
    outlook.see(b"17", row(5, a=1), NOTHING)
    for _ in range(2):
        outlook.see(b"18", row(5, a=1), NOTHING)
    assert (outlook.outdated_rows, outlook.full) == (0, True)
    outlook.see(b"18", row(5, a=1), held(5))
    assert outlook.told(4).startswith("at least 1 of 4 rows change nothing")
    shapes = Outlook()
    for at in range(40):
        shapes.see(b"17", row(5, **{f"f{at}": 1}), NOTHING)
    assert (shapes.outdated_rows, shapes.full) == (0, True)


def test_rows_that_aggregates_will_not_count() -> None:
    """Those further behind their entity's latest than the lateness allows; other entities' times do not matter."""
    late = Outlook(60_000, most=2)
    times = [(b"a", 0), (b"b", 500_000), (b"a", 100_000), (b"a", 40_000), (b"a", 39_999), (b"b", 600_000), (b"b", 1)]
    for key, time_ms in times:
        late.see(key, row(time_ms, a=1), NOTHING)
    assert (late.late_rows, late.late_by_store, late.outdated_rows) == (2, 0, 2)
    for time_ms in (10**9, 0):
        late.see(b"c", row(time_ms, a=1), NOTHING)
    assert (late.late_rows, late.full) == (2, True)


def test_what_the_store_has_makes_rows_late() -> None:
    """The latest event of any feature counts, and a tombstone; a row in time counts though its values are old."""
    outlook = Outlook(60_000)
    stored = held(500_000, b=(600_000, 1))
    for time_ms in (539_999, 540_000, 700_000, 639_999):
        outlook.see(b"17", row(time_ms, a=1), stored)
    assert (outlook.late_rows, outlook.late_by_store) == (2, 1)
    assert outlook.outdated == {Standing.OLDER: 1}
    outlook.see(b"18", row(1_000, a=1), StoredRow({}, 1_000))
    outlook.see(b"18", row(1_001, a=1), StoredRow({}, 1_000))
    assert outlook.late_by_store == 2


def test_events_of_one_time_count_each() -> None:
    """Two equal payments of one moment are two for aggregates, so neither changes nothing."""
    outlook = Outlook(60_000)
    assert standing_of(outlook, row(5, a=1), row(5, a=1), row(4, a=1)) == ["", "", ""]
