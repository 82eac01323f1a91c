"""Files of feature values, read as streams: CSV with a header, JSON lines, and Parquet where pyarrow is installed."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson

from app.domain.errors import ConfigurationError

FORMATS: Final = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_LINE_BYTES_MAX: Final = 8 * 1024 * 1024
"""Of a line of JSON, and of a cell of CSV: what is longer fits no update, whatever BROKER_RECORD_BYTES_MAX allows. The
csv module's own bound is 131,072 characters, where updates may hold more."""
_PARQUET_ROWS: Final = 4_096
_BOM: Final = b"\xef\xbb\xbf"


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

    Columns without a name, as pandas writes its index, are left out: ``unnamed`` are their places, from 1.

    Raises (on entry):
        ConfigurationError: it cannot be opened, is not of the format, or the format's library is not installed.
    """

    def __init__(self, path: Path, format_: str) -> None:
        self.path = path
        self.format = format_
        self.header: tuple[str, ...] = ()
        self.unnamed: tuple[int, ...] = ()

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
                    self.header = tuple(next(_csv_lines(lines)[1], ()))
            else:
                first = next(iter(self.rows()), None)
                if first is not None and first.fault is not None:
                    raise ConfigurationError(f"{self.path}, {first.place}: {first.fault}")
                # Lines may leave out what they have no value of, so that no single one tells all columns.
                self.header = tuple(dict.fromkeys(name for row in self.rows() for name in row.cells))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigurationError(f"{self.path} cannot be read as {self.format}: {error}") from error
        self.unnamed = tuple(at for at, name in enumerate(self.header, start=1) if not name)
        self.header = tuple(name for name in self.header if name)
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
            ConfigurationError: there are none, or the file breaks off or was replaced meanwhile.
        """
        readers = {"csv": self._csv_rows, "jsonl": self._json_rows}
        row = None
        try:
            for row in readers.get(self.format, self._parquet_rows)():
                yield row
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigurationError(f"{self.path} cannot be read as {self.format}: {error}") from error
        if row is None:
            raise ConfigurationError(f"{self.path} is empty: it has no rows")

    def _csv_rows(self) -> Iterator[FileRow]:
        with self.path.open(newline="", encoding="utf-8-sig") as lines:
            reader, filled = _csv_lines(lines)
            header = next(filled, [])
            named = [(at, name) for at, name in enumerate(header) if name]
            for number, cells in enumerate(filled, start=1):
                place = f"line {reader.line_num}"
                if len(cells) == len(header):
                    yield FileRow(number, place, {name: cells[at] for at, name in named})
                else:
                    yield FileRow(number, place, {}, f"{len(cells)} cells, and the header has {len(header)}")

    def _json_rows(self) -> Iterator[FileRow]:
        with self.path.open("rb") as lines:
            number = line = 0
            while text := lines.readline(_LINE_BYTES_MAX):
                line += 1
                if line == 1:
                    text = text.removeprefix(_BOM)
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
        file = self._parquet()
        from pyarrow import ArrowException, Table  # noqa: PLC0415 - see above

        number = 0
        try:
            schema = _python_schema(file.schema_arrow)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for cells in Table.from_batches([batch]).cast(schema, safe=False).to_pylist():
                    number += 1
                    yield FileRow(number, f"row {number}", cells)
        except (ArrowException, ValueError, OverflowError, LookupError) as error:
            # Python has no such year, or no such time zone: Arrow says so in Python's own errors.
            raise ConfigurationError(
                f"{self.path} cannot be read as parquet, after row {number}: {str(error) or type(error).__name__}"
            ) from error


def _csv_lines(lines: Iterable[str]) -> tuple[Any, Iterator[list[str]]]:
    """A reader, which knows its line's number, and the cells of each line that has any, the header's first."""
    csv.field_size_limit(_LINE_BYTES_MAX)
    reader = csv.reader(lines, strict=True)
    return reader, filter(None, reader)


def _python_schema(schema: Any) -> Any:
    """An Arrow schema of what Python's own times can hold: microseconds where there were nanoseconds."""
    import pyarrow  # noqa: PLC0415 - see FeatureFile

    return pyarrow.schema([field.with_type(_python_type(field.type)) for field in schema])


def _python_type(type_: Any) -> Any:
    import pyarrow  # noqa: PLC0415 - see FeatureFile

    types = pyarrow.types
    if types.is_timestamp(type_) and type_.unit == "ns":
        return pyarrow.timestamp("us", type_.tz)
    if types.is_duration(type_) and type_.unit == "ns":
        return pyarrow.duration("us")
    if types.is_time64(type_):
        return pyarrow.time64("us")
    if types.is_fixed_size_list(type_):
        return pyarrow.list_(_python_field(type_.value_field), type_.list_size)
    if types.is_list(type_):
        return pyarrow.list_(_python_field(type_.value_field))
    if types.is_large_list(type_):
        return pyarrow.large_list(_python_field(type_.value_field))
    if types.is_struct(type_):
        return pyarrow.struct([_python_field(type_.field(at)) for at in range(type_.num_fields)])
    return type_


def _python_field(field: Any) -> Any:
    return field.with_type(_python_type(field.type))
