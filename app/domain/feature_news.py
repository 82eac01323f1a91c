"""What a load's rows will change: each is held against what the store has of its entity, and against earlier rows.

A row is news if one of its features is later than what stands: the later event wins, feature by feature, and of one
time the first. Aggregates count a row by its event time whatever stands, unless it is later than their lateness allows.

What the store has is known as of the moment when it is asked, and earlier rows of a bounded number of entities. So more
rows may change nothing than are told.
"""

import struct
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from app.domain.aggregates import IDS_MAX
from app.domain.feature_updates import FeatureRow
from app.domain.features import FeatureStatus, Fetched, Value

FOLLOWED_MAX: Final = 1_000_000
"""Entities whose rows are followed: what they take is a few hundred MB at most."""
_SHAPES_MAX: Final = 16
"""Of one entity's rows: rows may have other features each, and all of them are looked through."""
_NEVER: Final = -1
_USABLE: Final = (FeatureStatus.PRESENT, FeatureStatus.NULL)
_MISSING: Final = Fetched(FeatureStatus.MISSING)


class StoredRow(NamedTuple):
    """What a store has of one entity's view: features as they were found, and when the last tombstone was."""

    features: Mapping[str, Fetched]
    deleted_ms: int | None = None

    @property
    def latest_ms(self) -> int | None:
        """The latest event time of what is there."""
        times = [found.event_time_ms for found in self.features.values() if found.event_time_ms is not None]
        return max(times, default=None)


class Standing(StrEnum):
    """How a row lies to what stands before it."""

    NEWS = "news"
    SAME = "same"
    """It is there: the same time, the same values."""
    OLDER = "older"
    CONFLICTING = "conflicting"
    """Other values of the same time: the first stand."""


class _Seen(NamedTuple):
    """Rows of one entity that have the same features: the latest, its values by 4 bytes of a checksum each."""

    names: tuple[str, ...]
    time_ms: int
    digests: bytes


@dataclass(slots=True)
class Outlook:
    """Follows the rows of a load in the file's order, and counts those that will change nothing.

    ``lateness_ms``: of a view with aggregates; None where there are none. ``outdated`` are rows that change nothing, by
    how they lie; ``late_rows`` those that aggregates do not count, and ``late_by_store`` how many of them by what the
    store has; ``stored_before`` those that the store has as they are, also where aggregates may count them.
    ``crowded``: entities with more rows than aggregates remember ids of them, so that some may not be counted.
    """

    lateness_ms: int | None = None
    most: int = FOLLOWED_MAX
    outdated: Counter[Standing] = field(default_factory=Counter)
    late_rows: int = 0
    late_by_store: int = 0
    stored_before: int = 0
    full: bool = False
    crowded: int = 0
    _seen: dict[bytes, tuple[_Seen, ...]] = field(default_factory=dict)
    _latest_ms: dict[bytes, int] = field(default_factory=dict)
    _rows: dict[bytes, int] = field(default_factory=dict)

    def see(self, key: bytes, row: FeatureRow, stored: StoredRow | None) -> None:
        """The next row; ``stored`` None where it is not to be held against the store."""
        if self.lateness_ms is not None and (key in self._rows or len(self._rows) < self.most):
            self._rows[key] = self._rows.get(key, 0) + 1
            self.crowded += self._rows[key] == IDS_MAX + 1
        late = self.lateness_ms is not None and self._late(key, row.event_time_ms, stored, self.lateness_ms)
        earlier = self._seen.get(key, ())
        standing = _standing(row, stored, earlier)
        if standing is Standing.NEWS:
            self._remember(key, row, earlier)
            return
        if standing is Standing.SAME and _standing(row, stored, ()) is Standing.SAME:
            self.stored_before += 1
        if late or self.lateness_ms is None:
            self.outdated[standing] += 1

    def _late(self, key: bytes, time_ms: int, stored: StoredRow | None, lateness_ms: int) -> bool:
        in_file_ms = self._latest_ms.get(key, _NEVER)
        in_store_ms = (stored.latest_ms if stored else None) or _NEVER
        deleted_ms = (stored.deleted_ms if stored else None) or _NEVER
        by_file = time_ms < in_file_ms - lateness_ms
        by_store = time_ms < in_store_ms - lateness_ms or time_ms <= deleted_ms
        self.late_rows += by_file or by_store
        self.late_by_store += by_store
        if time_ms > in_file_ms and not by_store:
            if key in self._latest_ms or len(self._latest_ms) < self.most:
                self._latest_ms[key] = time_ms
            else:
                self.full = True
        return by_file or by_store

    def _remember(self, key: bytes, row: FeatureRow, earlier: tuple[_Seen, ...]) -> None:
        if not earlier and len(self._seen) >= self.most:
            self.full = True
            return
        others = tuple(each for each in earlier if each.names != row.names)
        if len(others) < _SHAPES_MAX:
            # The epoch keeps nothing out, here as in the store.
            self._seen[key] = (*others, _Seen(row.names, row.event_time_ms or _NEVER, _digests(row.values)))
        else:
            self.full = True

    @property
    def outdated_rows(self) -> int:
        """Rows that change nothing."""
        return self.outdated.total()

    def told(self, total: int) -> str:
        """How many of ``total`` rows change nothing, and why; for people."""
        reasons = [
            f"{number:,} {'is' if number == 1 else 'are'} {_REASONS[standing]}"
            for standing, number in sorted(self.outdated.items())
            if number
        ]
        least = "at least " if self.full else ""
        verb = "changes" if self.outdated_rows == 1 == total else "change"
        return f"{least}{self.outdated_rows:,} of {total:,} rows {verb} nothing: {'; '.join(reasons)}"


_REASONS: Final[Mapping[Standing, str]] = {
    Standing.SAME: "there already, with the same event time and values",
    Standing.OLDER: "older than what the store or an earlier row has of the entity",
    Standing.CONFLICTING: "of the very event time of what the store or an earlier row has, with other values: the "
    "first stand, and what corrects them needs a later time",
}


def _digests(values: tuple[Value, ...]) -> bytes:
    return struct.pack(f"<{len(values)}I", *[_digest(value) for value in values])


def _digest(value: Value) -> int:
    return zlib.crc32(repr(value).encode())


def _standing(row: FeatureRow, stored: StoredRow | None, earlier: tuple[_Seen, ...]) -> Standing:
    equal: set[bool] = set()
    older = False
    for at, (name, value) in enumerate(zip(row.names, row.values, strict=True)):
        stands_ms, same = _stored_guard(stored, name, value)
        for seen in earlier:
            place = at if seen.names == row.names else seen.names.index(name) if name in seen.names else None
            if place is not None and seen.time_ms > stands_ms:
                [digest] = struct.unpack_from("<I", seen.digests, 4 * place)
                stands_ms, same = seen.time_ms, digest == _digest(value)
        if row.event_time_ms > stands_ms:
            return Standing.NEWS
        if row.event_time_ms == stands_ms:
            equal.add(same)
        else:
            older = True
    if False in equal:
        return Standing.CONFLICTING
    return Standing.OLDER if older else Standing.SAME


def _stored_guard(stored: StoredRow | None, name: str, value: Value) -> tuple[int, bool]:
    """When what the store has of a feature is of, and whether it is this value; the last tombstone, where it has none.

    A time that is not known, and the epoch, keep nothing out.
    """
    if stored is None:
        return _NEVER, False
    found = stored.features.get(name, _MISSING)
    if found.status is FeatureStatus.MISSING:
        return stored.deleted_ms or _NEVER, False
    same = found.status in _USABLE and found.value == value
    return found.event_time_ms or _NEVER, same
