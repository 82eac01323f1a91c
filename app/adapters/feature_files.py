"""Files of feature values, read as streams: CSV with a header, JSON lines, and Parquet where pyarrow is installed."""

import csv
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson

from app.domain.errors import ConfigurationError

FORMATS: Final = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_LINE_BYTES_MAX: Final = 8 * 1024 * 1024
_PARQUET_ROWS: Final = 4_096
_TOO_WIDE: Final = ""
"""Where the reader of CSV puts cells that have no column."""


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row: its number from 1, where it is for people, and its cells by column. ``fault`` says why there are none."""

    number: int
    place: str
    cells: Mapping[str, Any]
    fault: str | None = None


def format_of(path: Path, given: str | None) -> str:
    """A file's format: as it is given, or by the name's ending. ConfigurationError where neither tells."""
    found = given or FORMATS.get(path.suffix.lower())
    if found is None or found not in FORMATS.values():
        raise ConfigurationError(f"{path}: give its --format, one of {', '.join(sorted(set(FORMATS.values())))}")
    return found


class FeatureFile(AbstractContextManager["FeatureFile"]):
    """One file, opened once and read as often as asked; ``header`` are its columns, of JSON lines those of any line.

    Raises (on entry):
        ConfigurationError: it cannot be opened, is not of the format, or the format's library is not installed.
    """

    def __init__(self, path: Path, format_: str) -> None:
        self.path = path
        self.format = format_
        self.header: tuple[str, ...] = ()

    @property
    def text(self) -> bool:
        """Whether its cells are text."""
        return self.format == "csv"

    def __enter__(self) -> Self:
        try:
            if self.format == "parquet":
                self.header = tuple(self._parquet().schema_arrow.names)
            elif self.format == "csv":
                with self.path.open(newline="", encoding="utf-8-sig") as lines:
                    self.header = tuple(next(csv.reader(lines), ()))
            else:
                first = next(iter(self.rows()), None)
                if first is not None and first.fault is not None:
                    raise ConfigurationError(f"{self.path}, {first.place}: {first.fault}")
                # Lines may leave out what they have no value of, so that no single one tells all columns.
                self.header = tuple(dict.fromkeys(name for row in self.rows() for name in row.cells))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigurationError(f"{self.path} cannot be read as {self.format}: {error}") from error
        if not self.header:
            raise ConfigurationError(f"{self.path} is empty: a {self.format} file with columns is needed")
        repeated = {name for name in self.header if self.header.count(name) > 1}
        if repeated:
            raise ConfigurationError(f"{self.path}: column {sorted(repeated)[0]} is there twice; rename one")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def rows(self) -> Iterator[FileRow]:
        """All rows, from the first; a few thousand at most are held at once.

        Raises:
            ConfigurationError: the file breaks off or was replaced meanwhile.
        """
        try:
            match self.format:
                case "csv":
                    yield from self._csv_rows()
                case "jsonl":
                    yield from self._json_rows()
                case _:
                    yield from self._parquet_rows()
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigurationError(f"{self.path} cannot be read as {self.format}: {error}") from error

    def _csv_rows(self) -> Iterator[FileRow]:
        with self.path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, restkey=_TOO_WIDE, strict=True)
            number = 0
            for number, cells in enumerate(reader, start=1):
                place = f"line {reader.line_num}"
                if _TOO_WIDE in cells or None in cells.values():
                    found = len(self.header) + len(cells.get(_TOO_WIDE) or ()) - list(cells.values()).count(None)
                    yield FileRow(number, place, {}, f"{found} cells, and the header has {len(self.header)}")
                else:
                    yield FileRow(number, place, cells)

    def _json_rows(self) -> Iterator[FileRow]:
        with self.path.open("rb") as lines:
            number = line = 0
            while text := lines.readline(_LINE_BYTES_MAX):
                line += 1
                if not text.strip():
                    continue
                number += 1
                try:
                    cells = orjson.loads(text)
                except orjson.JSONDecodeError as error:
                    yield FileRow(number, f"line {line}", {}, f"not JSON: {error}")
                    continue
                fault = (
                    None if isinstance(cells, dict) else f"a JSON {type(cells).__name__}: an object a line is needed"
                )
                yield FileRow(number, f"line {line}", {} if fault else cells, fault)

    def _parquet(self) -> Any:
        try:
            from pyarrow import ArrowException, parquet  # noqa: PLC0415 - an extra that most do without
        except ImportError as error:
            raise ConfigurationError(
                f"{self.path}: Parquet needs pyarrow: pip install 'model-broker[parquet]', or load CSV or JSON lines"
            ) from error
        try:
            return parquet.ParquetFile(self.path)
        except ArrowException as error:
            raise ConfigurationError(f"{self.path} cannot be read as parquet: {error}") from error

    def _parquet_rows(self) -> Iterator[FileRow]:
        number = 0
        for batch in self._parquet().iter_batches(batch_size=_PARQUET_ROWS):
            for cells in batch.to_pylist():
                number += 1
                yield FileRow(number, f"row {number}", cells)
