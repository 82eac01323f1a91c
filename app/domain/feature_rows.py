"""Rows of a file in, feature updates out: which column is what, and what a cell's text means as its type.

A column is an entity or a feature of the view by its name, or by an explicit mapping; ``@row`` stands for the row's
number, from 1. Other columns are left out, and named. A cell becomes what an update would carry, and the update is
read as the features worker reads it, so a row that is sound here is sound there.

An update's id is made of what its row says, not of where it stands: the same rows as another format, in another order
or without some of them have the same ids, so that aggregates do not count them again.
"""

import base64
import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final

import orjson

from app.domain.errors import ConfigurationError
from app.domain.feature_updates import FeatureRow, UpdateRefused, read_update
from app.domain.features import EntityKey
from app.domain.view_documents import FeatureViewSpec

ROW_NUMBER: Final = "@row"
_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""As data has them. Python's own literals are more: ``1_000``, or digits of other scripts."""
_INT64_BOUND: Final = 2**63
_DAY: Final = re.compile(r"[0-9]{8}")
_YEARS_OF_DAYS: Final = range(1800, 2200)
_BOOLS: Final = {"true": True, "1": True, "false": False, "0": False}
_DIGEST_BYTES: Final = 16
_NAMED: Final = re.compile(r"(?:values|entities)\.([A-Za-z_][A-Za-z0-9_]*)(?::|\b)")


class RowRefused(ValueError):
    """A row cannot be an update; the message says which column and why."""


@dataclass(frozen=True, slots=True)
class Update:
    """One row as it is published: the record's key, its value, and a digest of what it says.

    ``occurrence``: the how manyeth it is of the rows of its file that say the same, from 1.
    """

    key: bytes
    value: bytes
    content: bytes
    occurrence: int = 1

    @property
    def id(self) -> bytes:
        """The same whenever the row is sent, and another one for each occurrence; 32 hexadecimal digits."""
        if self.occurrence == 1:
            return self.content.hex().encode()
        numbered = b"%d|" % self.occurrence + self.content
        return hashlib.blake2b(numbered, digest_size=_DIGEST_BYTES).hexdigest().encode()


class Occurrences:
    """Numbers the rows of one file that say the same, from its first row on: each is an event of its own.

    Holds a digest of each different row: about 100 MB for a million.
    """

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}

    def numbered(self, update: Update) -> Update:
        """The next row's update, with its number.

        >>> one, rows = Update(b"id=1", b"{}", b"digest"), Occurrences()
        >>> [rows.numbered(one).occurrence for _ in range(3)]
        [1, 2, 3]
        """
        occurrence = self._seen[update.content] = self._seen.get(update.content, 0) + 1
        return update if occurrence == 1 else replace(update, occurrence=occurrence)


@dataclass(frozen=True, slots=True)
class RowReader:
    """How rows of one file become updates of a view.

    ``columns`` are targets (entities and features) by column. The event time is in ``time_column``, or is ``time_ms``.
    ``text`` says that cells are text, of which an empty one is null.
    """

    view: str
    spec: FeatureViewSpec
    columns: Mapping[str, str]
    time_column: str | None
    time_ms: int | None
    text: bool

    def read(self, number: int, cells: Mapping[str, Any], now_ms: int) -> tuple[Update, FeatureRow]:
        """The update that row ``number`` makes, and the row of the store that the worker will make of it.

        Raises:
            RowRefused: a cell is not of its type, an entity or the time is missing, or nothing is given.
        """
        entities: dict[str, Any] = {}
        values: dict[str, Any] = {}
        entity_types = {entity.name: entity.type for entity in self.spec.entities}
        for column, target in self.columns.items():
            if column != ROW_NUMBER and column not in cells:
                continue
            cell = number if column == ROW_NUMBER else cells[column]
            type_ = entity_types.get(target) or self.spec.declared[target]
            try:
                given = _from_text(cell, type_) if self.text and isinstance(cell, str) else _plain(cell)
            except ValueError as error:
                raise RowRefused(f"column {column}: {error}") from error
            (entities if target in entity_types else values)[target] = given
        body = {
            "project": self.spec.project,
            "view": self.view,
            "entities": entities,
            "values": values,
            "event_time": self.time_ms if self.time_column is None else self._time(cells),
        }
        try:
            row = read_update(body, {self.view: self.spec}, now_ms)
        except UpdateRefused as error:
            raise RowRefused(self.told(str(error))) from error
        return Update(entity_text(row.key).encode(), orjson.dumps(body), _content_of(row)), row

    def _time(self, cells: Mapping[str, Any]) -> Any:
        assert self.time_column is not None  # noqa: S101 - the caller asks only then
        cell = _plain(cells.get(self.time_column))
        if cell in (None, ""):
            raise RowRefused(f"column {self.time_column}: no event time")
        if isinstance(cell, str) and _WHOLE.fullmatch(cell):
            return int(cell)
        return cell

    def told(self, message: str) -> str:
        """The message with the column's name before that of the update's member."""
        if message.startswith("event_time") and self.time_column is not None:
            return f"column {self.time_column}: {message}"
        named = _NAMED.match(message)
        column = next((c for c, target in self.columns.items() if named and target == named[1]), None)
        return message if column is None else f"column {column}: {message}"


def row_reader(
    view: str,
    spec: FeatureViewSpec,
    header: Collection[str],
    *,
    mapping: Mapping[str, str],
    time_column: str | None,
    time_ms: int | None,
    text: bool,
) -> tuple[RowReader, tuple[str, ...]]:
    """How to read a file that has the columns ``header``; and those of them that mean nothing to the view.

    Raises:
        ConfigurationError: an entity or the event time has no column, nothing is left to load, or a name is not known.
    """
    entities = [entity.name for entity in spec.entities]
    known = {*entities, *spec.declared}
    columns: dict[str, str] = {name: name for name in header if name in known and name not in mapping}
    for column, target in mapping.items():
        if column != ROW_NUMBER and column not in header:
            raise ConfigurationError(f"--map {column}={target}: the file has no column {column}: {_listed(header)}")
        if target not in known:
            computed = " (it is computed from updates)" if target in spec.types else ""
            raise ConfigurationError(
                f"--map {column}={target}: view {view} has no {target} to load{computed}: {_listed(known)}"
            )
        columns[column] = target
    if time_column is not None:
        if time_column not in header:
            raise ConfigurationError(f"--event-time {time_column}: the file has no such column: {_listed(header)}")
        if time_column not in mapping and time_column not in spec.declared:
            columns.pop(time_column, None)
    targets = list(columns.values())
    twice = next((name for name in targets if targets.count(name) > 1), None)
    if twice is not None:
        both = ", ".join(column for column, target in columns.items() if target == twice)
        raise ConfigurationError(f"columns {both} would all be {twice}: map one of them, and rename the others")
    for name in entities:
        if name not in targets:
            raise ConfigurationError(
                f"the file has no column {name}, the entity of view {view}: name one by --map COLUMN={name}, or "
                f"--map {ROW_NUMBER}={name} for the row's number"
            )
    if not set(targets) - set(entities):
        raise ConfigurationError(
            f"no column of the file is a feature of view {view}: {_listed(header)}; use --map COLUMN=FEATURE"
        )
    ignored = tuple(name for name in header if name not in columns and name != time_column)
    return RowReader(view, spec, columns, time_column, time_ms, text), ignored


def _content_of(row: FeatureRow) -> bytes:
    """A digest of what a row says: its values as their types, whatever their order and however they were written.

    Nulls are left out: to aggregates they are what a feature that is not given is, and writers of JSON lines differ in
    which of the two they write. So are empty texts, which CSV does not tell from nulls; and -0 is 0, as in JSON.
    """
    given = {
        name: value + 0.0 if isinstance(value, float) else value
        for name, value in zip(row.names, row.values, strict=True)
        if value is not None and not (isinstance(value, str | bytes) and not value)
    }
    said = [row.view, row.key.project, row.key.values, row.event_time_ms, given]
    written = orjson.dumps(said, default=bytes.hex, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(written, digest_size=_DIGEST_BYTES).digest()


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:12])
    return f"it has {shown}{', …' if len(names) > 12 else ''}"


def entity_text(key: EntityKey) -> str:
    """An entity as people write it, and as its updates are keyed.

    >>> entity_text(EntityKey("credit", ("branch", "iban"), (3, "DE1"), ("INT64", "STRING")))
    'branch=3,iban=DE1'
    """
    return ",".join(f"{name}={value}" for name, value in zip(key.names, key.values, strict=True))


def read_entity(spec: FeatureViewSpec, view: str, given: Mapping[str, Any], *, text: bool) -> EntityKey:
    """The key of the entity that ``given`` names.

    Raises:
        RowRefused: an entity of the view is missing, unknown, or not of its type.
    """
    types = {entity.name: entity.type for entity in spec.entities}
    wrong = [f"{name} is missing" for name in types if name not in given]
    wrong += [f"{name} is no entity of it" for name in given if name not in types]
    if wrong:
        raise RowRefused(f"view {view} is of {', '.join(types)}: {'; '.join(wrong)}")
    body: dict[str, Any] = {
        "project": spec.project,
        "view": view,
        "values": None,
        "event_time": 0,
    }
    try:
        body["entities"] = {
            name: _from_text(cell, types[name]) if text and isinstance(cell, str) else cell
            for name, cell in given.items()
        }
        return read_update(body, {view: spec}, 0).key
    except (UpdateRefused, ValueError) as error:
        raise RowRefused(f"view {view}: {error}; send {', '.join(f'{n} as {t}' for n, t in types.items())}") from error


def _from_text(text: str, type_: str) -> Any:
    """What a cell's text means as ``type_``; what cannot be meant is left for the update's reader to refuse.

    >>> _from_text("5", "INT64"), _from_text("5", "STRING"), _from_text("", "STRING"), _from_text("TRUE", "BOOL")
    (5, '5', None, True)
    """
    if text == "":
        return None
    if type_.endswith("_LIST"):
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{text[:80]!r} is no JSON list: {error}") from error
    match type_:
        case "UNIX_TIMESTAMP" if _reads_as_date(text.strip()):
            date_ = date.fromisoformat(text.strip())
            raise ValueError(f"{text!r} would be in 1970, as epoch seconds: write {date_}, or epoch seconds")
        case "INT32" | "INT64" | "UNIX_TIMESTAMP" if _WHOLE.fullmatch(text.strip()):
            return int(text)
        case "INT32" | "INT64" | "DOUBLE" | "FLOAT":
            if not _NUMBER.fullmatch(text.strip()):
                raise ValueError(f"{text[:80]!r} is not {type_}: write a number, as 1000 or 12.5")
            return float(text)
        case "BOOL":
            if text.strip().lower() not in _BOOLS:
                raise ValueError(f"{text[:80]!r} is not BOOL: write true or false")
            return _BOOLS[text.strip().lower()]
    return text


def _reads_as_date(text: str) -> bool:
    """Whether people who write these digits mean a day, and no seconds since 1970.

    >>> [_reads_as_date(text) for text in ("20260131", "20260132", "17000101", "1769817600")]
    [True, False, False, False]
    """
    if not _DAY.fullmatch(text):
        return False
    try:
        return date.fromisoformat(text).year in _YEARS_OF_DAYS
    except ValueError:
        return False


def _plain(cell: Any) -> Any:
    """A cell of a typed file as JSON has it.

    >>> _plain([b"ab", None, date(2026, 1, 31)])
    ['YWI=', None, '2026-01-31']
    """
    if isinstance(cell, list):
        return [_plain(each) for each in cell]
    if isinstance(cell, bytes):
        return base64.b64encode(cell).decode()
    if isinstance(cell, datetime):
        return (cell if cell.tzinfo else cell.replace(tzinfo=UTC)).isoformat()
    if isinstance(cell, date):
        return cell.isoformat()
    if isinstance(cell, Decimal):
        # What is whole stays exact; JSON has no more than 64 bits for it.
        return int(cell) if abs(cell) < _INT64_BOUND and cell == int(cell) else float(cell)
    return cell
