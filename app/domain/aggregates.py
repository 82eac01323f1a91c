"""Windowed aggregates of a view's updates: an entity's events in, one value a function and window out.

Time is cut into tiles of a fixed size, and an event is added to the tile that it lies in, so its order of arrival is of
no account. A window's value is merged from the tiles that reach into it. This is the general stream slicing of
Scotty (Traub et al., "Efficient Window Aggregation with General Stream Slicing", EDBT 2019) in the form that feature
platforms serve: Chronon's windows with a hop at their tail. The head of a window is exact; at its tail the tile that
is leaving counts until it has left as a whole. So a window of length W and tiles of size T covers between W and W + T.

``distinct`` is a KMV sketch: the 256 smallest of the values' hashes, exact below that number (Bar-Yossef et al.,
"Counting Distinct Elements in a Data Stream", RANDOM 2002), beyond it with the unbiased estimate of Beyer et al.
("On Synopses for Distinct-Value Estimation", SIGMOD 2007), whose standard error is 6.3 %.

An event is late when it lies more than ``lateness`` before the latest that was seen of its entity, and is not counted.
Within that bound ids of events are remembered, by hashes of 64 bits, so that one that is sent twice counts once. What
bounds the memory of ids never counts twice: past ``IDS_MAX`` the oldest are forgotten, and unknown ids of their time
are refused as late. So are those of a time that was late before ``lateness`` was raised.
"""

import base64
import hashlib
import heapq
import itertools
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

import orjson
import zstandard

TILE_SIZES_MS: Final = tuple(
    1_000 * seconds for seconds in (1, 5, 15, 60, 300, 900, 3_600, 7_200, 21_600, 86_400, 604_800)
)
TILES_MAX: Final = 120
"""Of a window: its tiles are the smallest of which no more are needed."""
SKETCH_SIZE: Final = 256
IDS_MAX: Final = 10_000
"""Of one entity: 120 KB at most, beside tiles of a few."""
_IDS_KEPT: Final = 1_000
"""So many may stay that are older than an event may be late."""
STATE_BYTES_MAX: Final = 700_000
"""What all tiles of an entity can grow to; beside its ids it fits into a record of Kafka's 1 MB."""
REFRESH_MS_MAX: Final = 6 * 3_600_000

_ID_BYTES: Final = 8
_HASH_BYTES: Final = 6
_HASH_SPACE: Final = 2 ** (8 * _HASH_BYTES)
_SKETCH_BYTES: Final = SKETCH_SIZE * 8  # the digits of a hash, compressed
_TILE_BYTES: Final = 24
_ATOM_BYTES: Final = 48
_ENTRY_BYTES_MAX: Final = 32 * 1024 * 1024
_COMPRESS: Final = zstandard.ZstdCompressor(level=1)
_DECOMPRESS: Final = zstandard.ZstdDecompressor()

_ATOMS: Final[Mapping[str, tuple[str, ...]]] = {
    "sum": ("sum",),
    "count": ("count",),
    "mean": ("sum", "count"),
    "min": ("min",),
    "max": ("max",),
    "last": ("last",),
    "distinct": ("distinct",),
}
"""What a tile has to hold for each function."""

Atom = tuple[str, str]
"""A feature's name ('' for the updates themselves), and what is held of it."""
Tile = dict[str, dict[str, Any]]
"""What one tile holds: by feature, by kind of atom."""


def tile_size_ms(window_ms: int) -> int:
    """The size of the tiles of a window.

    >>> [tile_size_ms(hours * 3_600_000) // 60_000 for hours in (1, 24, 30 * 24)]
    [1, 15, 360]
    """
    return next((size for size in TILE_SIZES_MS if window_ms <= size * TILES_MAX), TILE_SIZES_MS[-1])


@dataclass(frozen=True, slots=True)
class Aggregation:
    """One computed feature: ``op`` over the values of the feature ``of`` (None: over the updates) in a window."""

    name: str
    of: str | None
    op: str
    window_ms: int
    type: str

    @property
    def tile_ms(self) -> int:
        """The size of its tiles."""
        return tile_size_ms(self.window_ms)

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """What each of its tiles holds."""
        return tuple((self.of or "", kind) for kind in self.kinds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Their kinds. What holds a value says its type, for a view may declare another one some day."""
        typed = self.op in ("min", "max", "last")
        return tuple(f"{kind}:{self.type}" if typed else kind for kind in _ATOMS[self.op])


@dataclass(frozen=True, slots=True)
class Event:
    """One update as the aggregates see it; ``id`` None where its producer gave none."""

    offset: int
    time_ms: int
    values: Mapping[str, Any]
    id: str | None = None


class Outcome(StrEnum):
    """What became of an event."""

    COUNTED = "counted"
    LATE = "late"
    DUPLICATE = "duplicate"
    AGAIN = "again"
    """Delivered again: its offset is counted already."""


@dataclass(slots=True)
class State:
    """What is kept of one entity: the tiles, by size and number, and up to which offset they count.

    ``ids`` are hashes of events' ids, with their times. ``floor_ms`` is the last tombstone's time, ``written_ms`` as of
    when the values were computed last, and ``deleted`` holds from a tombstone that leaves nothing until the next event.
    """

    offset: int = -1
    watermark_ms: int = -1
    floor_ms: int = -1
    forgotten_ms: int = -1
    written_ms: int = -1
    deleted: bool = False
    ids: dict[int, int] = field(default_factory=dict)
    tiles: dict[int, dict[int, Tile]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether no tile is left."""
        return not any(self.tiles.values())


class Plan:
    """How the aggregations of one view are computed."""

    def __init__(self, aggregations: Sequence[Aggregation], lateness_ms: int) -> None:
        self.aggregations = tuple(aggregations)
        self.lateness_ms = lateness_ms
        self._levels: dict[int, tuple[tuple[Atom, ...], int]] = {}
        for each in self.aggregations:
            atoms, window_ms = self._levels.get(each.tile_ms, ((), 0))
            self._levels[each.tile_ms] = (
                tuple(dict.fromkeys((*atoms, *each.atoms))),
                max(window_ms, each.window_ms),
            )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The computed features, in the order of ``values``."""
        return tuple(each.name for each in self.aggregations)

    @cached_property
    def types(self) -> tuple[str, ...]:
        """Their types."""
        return tuple(each.type for each in self.aggregations)

    @cached_property
    def keeps_ms(self) -> int:
        """How long an event can matter."""
        return max(window + tile for tile, (_, window) in self._levels.items())

    @cached_property
    def refresh_ms(self) -> int:
        """After how long the values are written anew though nothing changes, so that their age says what is known."""
        return min(REFRESH_MS_MAX, max(self._levels))

    @cached_property
    def state_bytes_max(self) -> int:
        """What an entity's tiles can take."""
        return sum(
            (-(-window // tile) + 2)
            * (_TILE_BYTES + sum(_SKETCH_BYTES if kind == "distinct" else _ATOM_BYTES for _, kind in atoms))
            for tile, (atoms, window) in self._levels.items()
        )

    def feed(self, state: State, event: Event) -> Outcome:
        """Count an event of the state's entity; what is not counted changes nothing but the offset."""
        if event.offset <= state.offset:
            return Outcome.AGAIN
        state.offset = event.offset
        hashed = None if event.id is None else _hash_of(event.id)
        if hashed is not None and hashed in state.ids:
            return Outcome.DUPLICATE
        oldest_ms = max(state.watermark_ms - self.lateness_ms, state.floor_ms + 1)
        if hashed is not None:
            oldest_ms = max(oldest_ms, state.forgotten_ms + 1)
        if event.time_ms < oldest_ms:
            return Outcome.LATE
        state.watermark_ms = max(state.watermark_ms, event.time_ms)
        state.deleted = False
        if hashed is not None:
            self._remember(state, hashed, event.time_ms)
        for tile_ms, (atoms, _) in self._levels.items():
            tile = state.tiles.setdefault(tile_ms, {}).setdefault(event.time_ms // tile_ms, {})
            for of, kind in atoms:
                _add(tile, of, kind, event)
        return Outcome.COUNTED

    def _remember(self, state: State, hashed: int, time_ms: int) -> None:
        state.ids[hashed] = time_ms
        if len(state.ids) > IDS_MAX:
            self._forget_late(state, 0)
        while len(state.ids) > IDS_MAX:
            # A tenth at once, so that a flood of ids does not sort them each time.
            for oldest, its_ms in heapq.nsmallest(IDS_MAX // 10, state.ids.items(), key=lambda item: item[1]):
                del state.ids[oldest]
                state.forgotten_ms = max(state.forgotten_ms, its_ms)

    def _forget_late(self, state: State, kept: int) -> None:
        """Drop ids of events that would be late anyway, if there are more than ``kept``."""
        if len(state.ids) > kept:
            oldest_ms = state.watermark_ms - self.lateness_ms
            dropped_ms = max((time_ms for time_ms in state.ids.values() if time_ms < oldest_ms), default=-1)
            # The view may declare a longer lateness some day.
            state.forgotten_ms = max(state.forgotten_ms, dropped_ms)
            state.ids = {hashed: time_ms for hashed, time_ms in state.ids.items() if time_ms >= oldest_ms}

    def delete(self, state: State, offset: int, time_ms: int) -> Outcome:
        """A tombstone: events up to ``time_ms`` are gone, and those that lie in its tile and came before it."""
        if offset <= state.offset:
            return Outcome.AGAIN
        state.offset = offset
        state.floor_ms = max(state.floor_ms, time_ms)
        for tile_ms, tiles in state.tiles.items():
            state.tiles[tile_ms] = {number: tile for number, tile in tiles.items() if number * tile_ms > time_ms}
        state.deleted = state.empty
        return Outcome.COUNTED

    def as_of_ms(self, state: State, now_ms: int) -> int:
        """As of when values computed now are true: later than any before, and than the tombstone, by whatever clock."""
        return max(now_ms, state.written_ms + 1, state.floor_ms + 1)

    def values(self, state: State, as_of_ms: int) -> tuple[Any, ...]:
        """The value of each aggregation; tiles that are out of every window, and most ids that are of no use any more,
        are dropped from the state.

        Without events count, sum and distinct are 0 and the others None.
        """
        self._forget_late(state, _IDS_KEPT)
        for tile_ms, tiles in list(state.tiles.items()):
            atoms_window = self._levels.get(tile_ms)
            window_ms = atoms_window[1] if atoms_window else 0
            state.tiles[tile_ms] = {
                number: tile for number, tile in tiles.items() if _reaches(number, tile_ms, window_ms, as_of_ms)
            }
            if atoms_window is None or not state.tiles[tile_ms]:
                del state.tiles[tile_ms]
        return tuple(
            _value(
                each,
                [
                    tile.get(each.of or "", {})
                    for number, tile in state.tiles.get(each.tile_ms, {}).items()
                    if _reaches(number, each.tile_ms, each.window_ms, as_of_ms)
                ],
            )
            for each in self.aggregations
        )

    def due_ms(self, state: State, as_of_ms: int) -> int:
        """When the values computed as of ``as_of_ms`` have to be computed anew."""
        if state.empty:
            return max(as_of_ms + 1, state.floor_ms + self.keeps_ms)
        due = as_of_ms + self.refresh_ms
        for each in self.aggregations:
            for number in state.tiles.get(each.tile_ms, ()):
                if _reaches(number, each.tile_ms, each.window_ms, as_of_ms):
                    due = min(due, (number + 1) * each.tile_ms + each.window_ms)
        return due

    def over(self, state: State, as_of_ms: int) -> bool:
        """Whether nothing of the state can matter any more, so that it need not be kept."""
        return state.empty and state.floor_ms + self.keeps_ms <= as_of_ms


def _reaches(number: int, tile_ms: int, window_ms: int, as_of_ms: int) -> bool:
    return (number + 1) * tile_ms > as_of_ms - window_ms


def _add(tile: Tile, of: str, kind: str, event: Event) -> None:
    value = event.values.get(of) if of else True
    if value is None:
        return
    held = tile.setdefault(of, {})
    match kind.partition(":")[0]:
        case "count":
            held[kind] = held.get(kind, 0) + 1
        case "sum":
            total = held.get(kind, 0.0)
            # None: no double holds it, nor will one.
            held[kind] = None if total is None or not math.isfinite(total + value) else total + float(value)
        case "min":
            held[kind] = min(held.get(kind, value), value)
        case "max":
            held[kind] = max(held.get(kind, value), value)
        case "last":
            held[kind] = max(held.get(kind, [-1, value]), [event.time_ms, value])
        case _:
            sketch = held.setdefault(kind, [])
            hashed = _hash(value)
            if hashed not in sketch:
                held[kind] = heapq.nsmallest(SKETCH_SIZE, [*sketch, hashed])


def _hash_of(id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=_ID_BYTES).digest(), "big")


def _hash(value: Any) -> int:
    text = f"{type(value).__name__}:{value}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=_HASH_BYTES).digest(), "big")


def _value(aggregation: Aggregation, tiles: Sequence[Mapping[str, Any]]) -> Any:
    held = [[tile[kind] for tile in tiles if kind in tile] for kind in aggregation.kinds]
    match aggregation.op:
        case "count":
            return sum(held[0])
        case "sum":
            return _finite(held[0], 1)
        case "mean":
            count = sum(held[1])
            return _finite(held[0], count) if count else None
        case "min":
            return min(held[0], default=None)
        case "max":
            return max(held[0], default=None)
        case "last":
            latest = max(held[0], default=None)
            return None if latest is None else latest[1]
        case _:
            return _estimate(held[0])


def _finite(parts: Sequence[float | None], count: int) -> float | None:
    finite = [part for part in parts if part is not None]
    try:
        return math.fsum(finite) / count if len(finite) == len(parts) else None
    except OverflowError:
        return None


def _estimate(sketches: Iterable[Sequence[int]]) -> int:
    smallest = heapq.nsmallest(SKETCH_SIZE, {hashed for sketch in sketches for hashed in sketch})
    if len(smallest) < SKETCH_SIZE:
        return len(smallest)
    return round((SKETCH_SIZE - 1) * _HASH_SPACE / (smallest[-1] + 1))


# --- entries of the table ---------------------------------------------------------------------------------------------


def write_state(state: State) -> bytes:
    """A state as the table keeps it."""
    content = {
        "offset": state.offset,
        "watermark": state.watermark_ms,
        "floor": state.floor_ms,
        "forgotten": state.forgotten_ms,
        "written": state.written_ms,
        "deleted": state.deleted,
        "ids": _packed_ids(state.ids),
        "tiles": {
            str(tile_ms): {str(number): tile for number, tile in tiles.items()}
            for tile_ms, tiles in state.tiles.items()
        },
    }
    return _COMPRESS.compress(orjson.dumps(content))


def is_state(entry: bytes) -> bool:
    """Whether ``entry`` begins as states do; what lies behind is seen when it is read."""
    return entry.startswith(zstandard.FRAME_HEADER)


def read_state(entry: bytes) -> State:
    """The state that ``entry`` holds; ValueError where it is damaged."""
    try:
        content = orjson.loads(_DECOMPRESS.decompress(entry, max_output_size=_ENTRY_BYTES_MAX))
        return State(
            content["offset"],
            content["watermark"],
            content["floor"],
            content["forgotten"],
            content["written"],
            content["deleted"],
            _read_ids(content["ids"]),
            {
                int(tile_ms): {int(number): tile for number, tile in tiles.items()}
                for tile_ms, tiles in content["tiles"].items()
            },
        )
    except (zstandard.ZstdError, KeyError, TypeError, AttributeError, ValueError, struct.error) as error:
        raise ValueError(f"damaged aggregates entry: {error!r}") from error


def _packed_ids(ids: Mapping[int, int]) -> str:
    """Ids in the order of their times: the times, each by how much it is later than the one before, then the hashes.

    Hashes do not compress, so they are held in as few bytes as they have.
    """
    hashes = sorted(ids, key=ids.__getitem__)
    times = [ids[hashed] for hashed in hashes]
    steps = [later - before for before, later in zip([0, *times], times, strict=False)]
    return base64.b64encode(struct.pack(f"<{len(ids)}q{len(ids)}Q", *steps, *hashes)).decode()


def _read_ids(packed: str) -> dict[int, int]:
    content = base64.b64decode(packed, validate=True)
    count = len(content) // 16
    numbers = struct.unpack(f"<{count}q{count}Q", content)
    return dict(zip(numbers[count:], itertools.accumulate(numbers[:count]), strict=True))
