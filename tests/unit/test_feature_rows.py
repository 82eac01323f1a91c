"""Rows of files: columns to features, cells to types, faults with their column, ids that stay."""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pytest
from pyarrow import parquet

from app.adapters.feast_codec import row_key
from app.adapters.feast_keys import read_row_key
from app.adapters.feature_files import FeatureFile, format_of
from app.domain.errors import ConfigurationError
from app.domain.feature_check import findings_of, judge_all, need_of
from app.domain.feature_rows import Occurrences, RowReader, RowRefused, read_entity, row_reader
from app.domain.feature_updates import read_update
from app.domain.features import EntityKey, FeatureStatus, Fetched, resolve
from app.domain.on_demand import compile_views
from app.domain.requests import Request, RequestId
from app.domain.version_documents import ModelVersionSpec
from app.domain.view_documents import FeatureViewSpec

NOW_MS = 1_795_392_000_000
SECONDS = pyarrow.timestamp("s", "UTC")
SPEC = FeatureViewSpec.model_validate_json(
    """{"entities": [{"name": "iban", "type": "STRING"}, {"name": "branch", "type": "INT32"}],
        "features": [{"name": "age", "type": "INT64"}, {"name": "share", "type": "DOUBLE"},
                     {"name": "since", "type": "UNIX_TIMESTAMP"}, {"name": "scan", "type": "BYTES"},
                     {"name": "owner", "type": "BOOL"}, {"name": "text", "type": "STRING"}],
        "source": {"type": "redis", "project": "p"}, "ttl": "30d"}"""
)


def reader(*header: str, text: bool = True, time_column: str | None = None, **mapping: str) -> RowReader:
    """A reader of a file with these columns."""
    made, _ = row_reader(
        "v", SPEC, header, mapping=mapping, time_column=time_column, time_ms=None if time_column else NOW_MS, text=text
    )
    return made


def values(cells: Mapping[str, Any], *, text: bool = True) -> dict[str, Any]:
    """What the row of the store holds of these cells."""
    given = {"iban": "DE1", "branch": "3" if text else 3, **cells}
    row = reader(*given, text=text).read(1, given, NOW_MS)[1]
    return dict(zip(row.names, row.values, strict=True))


def test_text_becomes_what_it_means() -> None:
    """Cells of CSV are read as their type; an empty one is null."""
    cells = {"age": "41", "share": "1e3", "since": "2026-11-23T00:00:00Z", "scan": "AP8=", "owner": "TRUE", "text": "5"}
    assert values(cells) == {
        "age": 41, "share": 1_000.0, "since": NOW_MS // 1_000, "scan": b"\x00\xff", "owner": True, "text": "5",
    }  # fmt: skip
    assert values({"since": "20260231", "age": "20260131"}) == {"since": 20_260_231, "age": 20_260_131}
    assert values({"age": "41.0", "since": "1795392000"}) == {"age": 41, "since": 1_795_392_000}
    assert values(dict.fromkeys(cells, "")) == dict.fromkeys(cells)


def test_typed_cells_are_taken_as_they_are() -> None:
    """JSON lines and Parquet carry types, times, bytes and decimals among them."""
    cells = {"age": 41, "share": Decimal("0.5"), "since": datetime(2026, 11, 23), "scan": b"\x00\xff", "text": None}
    assert values(cells, text=False) == {
        "age": 41, "share": 0.5, "since": NOW_MS // 1_000, "scan": b"\x00\xff", "text": None,
    }  # fmt: skip
    assert values({"since": date(2026, 11, 23)}, text=False) == {"since": NOW_MS // 1_000}
    exact = {"age": Decimal("9007199254740993"), "share": Decimal("1e30")}
    assert values(exact, text=False) == {"age": 2**53 + 1, "share": 1e30}


def test_lists_of_typed_cells_are_taken_element_by_element(tmp_path: Path) -> None:
    """Parquet's lists of bytes and of times are what JSON's of base64 and ISO 8601 are; a null stays one."""
    spec = FeatureViewSpec.model_validate_json(
        """{"entities": [{"name": "id", "type": "INT64"}],
            "features": [{"name": "scans", "type": "BYTES_LIST"}, {"name": "times", "type": "UNIX_TIMESTAMP_LIST"},
                         {"name": "shares", "type": "DOUBLE_LIST"}],
            "source": {"type": "redis", "project": "p"}}"""
    )
    moment = datetime(2026, 11, 23, tzinfo=UTC)
    table = {
        "id": [1], "scans": [[b"\x00\xff", b""]], "times": pyarrow.array([[moment, None]], pyarrow.list_(SECONDS)),
        "shares": [[Decimal("0.5"), None]],
    }  # fmt: skip
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with FeatureFile(tmp_path / "a.parquet", "parquet") as file:
        made, _ = row_reader("v", spec, file.header, mapping={}, time_column=None, time_ms=NOW_MS, text=file.text)
        [(update, row)] = [made.read(each.number, each.cells, NOW_MS) for each in file.rows()]
    assert row.values == ((b"\x00\xff", b""), (NOW_MS // 1_000, None), (0.5, None))
    assert read_update(orjson.loads(update.value), {"v": spec}, NOW_MS) == row


def test_an_update_is_keyed_by_its_entity_and_has_an_id_of_its_own() -> None:
    """The same row has the same id wherever it stands; another content or occurrence has another."""
    one = reader("iban", "branch", "age")
    cells = {"iban": "DE1", "branch": "3", "age": "41"}
    update = one.read(1, cells, NOW_MS)[0]
    assert update.key == b"branch=3,iban=DE1"
    assert orjson.loads(update.value)["event_time"] == NOW_MS
    assert one.read(2, cells, NOW_MS + 1)[0].id == update.id
    rows = Occurrences()
    same, again = rows.numbered(update), rows.numbered(one.read(2, cells, NOW_MS)[0])
    mended = rows.numbered(one.read(1, {**cells, "age": "42"}, NOW_MS)[0])
    assert same.id == update.id
    assert len({same.id, again.id, mended.id}) == 3
    assert {len(same.id), len(again.id)} == {32}


ARRANGED = [
    {"iban": "DE1", "branch": 3, "age": 41, "share": 0.1, "since": NOW_MS // 1_000, "owner": True, "at": NOW_MS},
    {"iban": "DE1", "branch": 3, "age": None, "share": 5.0, "since": None, "owner": False, "at": NOW_MS},
    {"iban": "DE2", "branch": 3, "age": 7, "share": 2.5, "since": 0, "owner": None, "at": NOW_MS + 1},
    {"iban": "DE1", "branch": 3, "age": 41, "share": 0.1, "since": NOW_MS // 1_000, "owner": True, "at": NOW_MS},
]


def ids_of(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The ids of these rows, written as the file's name says and read from there."""
    names = list(rows[0])
    if path.suffix == ".csv":
        lines = [",".join("" if row[name] is None else str(row[name]) for name in names) for row in rows]
        path.write_text("\n".join([",".join(names), *lines]))
    elif path.suffix == ".jsonl":
        path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    else:
        columns = {name: [row[name] for row in rows] for name in names}
        columns["since"] = pyarrow.array(columns["since"], SECONDS)
        columns["at"] = pyarrow.array(columns["at"], pyarrow.timestamp("ms", "UTC"))
        parquet.write_table(pyarrow.table(columns), path)
    numbers, found = Occurrences(), []
    with FeatureFile(path, format_of(path, None)) as file:
        made = reader(*file.header, text=file.text, time_column="at")
        for row in file.rows():
            found.append(numbers.numbered(made.read(row.number, row.cells, NOW_MS)[0]).id)
    return found


def test_rows_keep_their_ids_in_every_format_and_order(tmp_path: Path) -> None:
    """What a file says makes the ids, not its format, the order of columns and rows, or which other rows there are."""
    ids = ids_of(tmp_path / "a.csv", ARRANGED)
    assert len(set(ids)) == len(ARRANGED)
    assert ids_of(tmp_path / "a.jsonl", ARRANGED) == ids
    assert ids_of(tmp_path / "a.parquet", ARRANGED) == ids
    turned = [dict(reversed(row.items())) for row in ARRANGED]
    assert ids_of(tmp_path / "turned.csv", turned) == ids
    assert ids_of(tmp_path / "turned.jsonl", turned) == ids
    assert set(ids_of(tmp_path / "sorted.csv", sorted(ARRANGED, key=str))) == set(ids)
    assert ids_of(tmp_path / "without_the_second.csv", [ARRANGED[0], *ARRANGED[2:]]) == [ids[0], *ids[2:]]
    assert set(ids_of(tmp_path / "without_the_first.csv", ARRANGED[1:])) == {ids[0], ids[1], ids[2]}
    assert ids_of(tmp_path / "resumed.csv", ARRANGED)[2:] == ids[2:]


def test_a_null_that_is_not_written_is_the_same_event(tmp_path: Path) -> None:
    """Writers of JSON lines differ in that, and aggregates count neither."""
    (tmp_path / "short.jsonl").write_bytes(
        b"\n".join(orjson.dumps({name: cell for name, cell in row.items() if cell is not None}) for row in ARRANGED)
    )
    numbers = Occurrences()
    with FeatureFile(tmp_path / "short.jsonl", "jsonl") as file:
        made = reader(*file.header, text=False, time_column="at")
        short = [numbers.numbered(made.read(row.number, row.cells, NOW_MS)[0]).id for row in file.rows()]
    assert short == ids_of(tmp_path / "a.csv", ARRANGED)


def test_what_formats_do_not_tell_apart_is_the_same_event(tmp_path: Path) -> None:
    """CSV has no empty text, and JSON writes -0 as 0."""
    rows = [{**row, "text": text, "share": 0.0} for row, text in zip(ARRANGED[:2], ("", "told"), strict=True)]
    ids = ids_of(tmp_path / "a.jsonl", rows)
    assert ids_of(tmp_path / "a.csv", [{**rows[0], "share": -0.0}, rows[1]]) == ids
    assert ids_of(tmp_path / "null.jsonl", [{**rows[0], "text": None}, rows[1]]) == ids
    assert ids_of(tmp_path / "other.jsonl", [{**rows[0], "text": "told"}, rows[1]])[0] != ids[0]


@pytest.mark.parametrize("cell", ["iban", "branch", "age", "share", "since", "owner", "at"])
def test_a_mended_cell_makes_another_row(tmp_path: Path, cell: str) -> None:
    """An event that says something else is another event."""
    mended = {**ARRANGED[2], cell: {"iban": "DE9", "owner": True, "at": NOW_MS + 2}.get(cell, 9)}
    before, after = ids_of(tmp_path / "a.csv", ARRANGED), ids_of(tmp_path / "b.csv", [*ARRANGED[:2], mended])
    assert after[:2] == before[:2]
    assert after[2] not in before


@pytest.mark.parametrize(
    ("moment", "expected_ms"),
    [
        ("1795392000123", NOW_MS + 123),
        ("2026-11-23T00:00:00", NOW_MS),
        (NOW_MS, NOW_MS),
        (datetime(2026, 11, 23, tzinfo=UTC), NOW_MS),
    ],
)
def test_event_times_of_a_column(moment: object, expected_ms: int) -> None:
    """Epoch milliseconds, ISO 8601, or the file's own timestamps."""
    one = reader("iban", "branch", "age", "at", time_column="at", text=isinstance(moment, str))
    cells = {"iban": "DE1", "branch": "3" if isinstance(moment, str) else 3, "age": 1, "at": moment}
    assert one.read(1, cells, NOW_MS)[1].event_time_ms == expected_ms


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"age": "old"}, "column age: 'old' is not INT64"),
        ({"age": "1.5"}, "column age: values.age: '1.5' (float)"),
        ({"share": "x"}, "column share: 'x' is not DOUBLE"),
        ({"share": "1_000"}, "column share: '1_000' is not DOUBLE: write a number"),
        ({"share": "1,000"}, "column share: '1,000' is not DOUBLE"),
        (
            {"since": "20260131"},
            "column since: '20260131' would be in 1970, as epoch seconds: write 2026-01-31, or epoch",
        ),
        ({"share": "nan"}, "column share: 'nan' is not DOUBLE"),
        ({"share": "1e999"}, "column share: values.share: 'inf' (float) is not DOUBLE"),
        ({"age": "1_000"}, "column age: '1_000' is not INT64"),
        ({"age": "\u0663"}, "column age: '\u0663' is not INT64"),
        ({"age": "9007199254740993.0"}, "column age: values.age: 9007199254740992.0 (float) may be a rounded number"),
        ({"since": "2026-11-23T00:00:00.5Z"}, "column since: values.since: '2026-11-23T00:00:00.5Z' has a fraction"),
        ({"owner": "perhaps"}, "column owner: 'perhaps' is not BOOL"),
        ({"scan": "%%"}, "column scan: values.scan: not base64"),
        ({"branch": "x"}, "column branch: 'x' is not INT32"),
        ({"branch": ""}, "column branch: entities.branch"),
        ({"at": ""}, "column at: no event time"),
        ({"at": "soon"}, "column at: event_time 'soon'"),
        ({"at": "1795392000"}, "column at: event_time 1795392000 would be in early 1970"),
        ({"at": "20261123"}, "column at: event_time 20261123 would be in early 1970"),
    ],
)
def test_a_fault_names_its_column(cells: dict[str, str], said: str) -> None:
    """What a person has to mend is the file's column."""
    given = {"iban": "DE1", "branch": "3", "at": "0", "age": "1", **cells}
    with pytest.raises(RowRefused) as refused:
        reader(*given, time_column="at").read(1, given, NOW_MS)
    assert str(refused.value).startswith(said)


def test_a_row_without_its_entity() -> None:
    """JSON lines may lack a member that the first one has."""
    with pytest.raises(RowRefused, match="entities has branch"):
        reader("iban", "branch", "age", text=False).read(2, {"branch": 3, "age": 1}, NOW_MS)
    with pytest.raises(RowRefused, match="column iban"):
        reader("iban", "branch", "age", text=False).read(2, {"iban": "\ud800", "branch": 3, "age": 1}, NOW_MS)


def test_columns_are_mapped_and_the_rest_is_named() -> None:
    """A mapping takes a column's own meaning away; the row's number may stand for an entity."""
    made, ignored = row_reader(
        "v", SPEC, ["iban", "age", "years", "shoe", "at"],
        mapping={"@row": "branch", "years": "age", "age": "share"}, time_column="at", time_ms=None, text=True,
    )  # fmt: skip
    assert made.columns == {"iban": "iban", "@row": "branch", "years": "age", "age": "share"}
    assert ignored == ("shoe",)
    row = made.read(7, {"iban": "x", "age": "1", "years": "2", "shoe": "44", "at": "0"}, NOW_MS)[1]
    assert (row.key.values, row.names, row.values) == ((7, "x"), ("age", "share"), (2, 1.0))


@pytest.mark.parametrize(
    ("header", "mapping", "time", "said"),
    [
        (["iban", "age"], {}, None, "no column branch"),
        (["iban", "branch", "shoe"], {}, None, "no column of the file is a feature"),
        (["iban", "branch", "age"], {"years": "age"}, None, "the file has no column years"),
        (["iban", "branch", "age", "years"], {"years": "age"}, None, "columns age, years would all be age"),
        (["iban", "branch", "age"], {"age": "colour"}, None, "view v has no colour to load"),
        (["iban", "branch", "age"], {}, "at", "--event-time at: the file has no such column"),
    ],
)
def test_files_that_do_not_fit(header: list[str], mapping: dict[str, str], time: str | None, said: str) -> None:
    """The message says what is missing, and what to write."""
    with pytest.raises(ConfigurationError) as refused:
        row_reader("v", SPEC, header, mapping=mapping, time_column=time, time_ms=0, text=True)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"iban": "DE1"}, "branch is missing"),
        ({"iban": "DE1", "branch": "3", "x": "1"}, "x is no entity of it"),
        ({"iban": "DE1", "branch": "x"}, "send iban as STRING, branch as INT32"),
        ({"iban": "", "branch": "3"}, "entities.iban"),
    ],
)
def test_entities_that_people_write(given: dict[str, str], said: str) -> None:
    """A key is every entity of the view, as its type."""
    with pytest.raises(RowRefused) as refused:
        read_entity(SPEC, "v", given, text=True)
    assert said in str(refused.value)
    key = EntityKey("p", ("branch", "iban"), (3, "DE1"), ("INT32", "STRING"))
    assert read_entity(SPEC, "v", {"iban": "DE1", "branch": "3"}, text=True) == key
    assert read_entity(SPEC, "v", {"iban": "DE1", "branch": 3}, text=False) == key


@pytest.mark.parametrize(
    "key",
    [
        EntityKey("p", ("branch", "iban"), (3, "ż1"), ("INT32", "STRING")),
        EntityKey("p", ("id",), (-(2**63),), ("INT64",)),
    ],
)
def test_keys_are_read_back(key: EntityKey) -> None:
    """A row's key says which entity it is; another project's, or what is cut off, says nothing."""
    data = row_key(key)
    assert read_row_key(data, "p") == key
    assert read_row_key(data, "q") is None
    for cut in range(len(data)):
        assert read_row_key(data[:cut] + b"p", "p") in (None, key)
    assert read_row_key(b"\xff" * 40 + b"p", "p") is None
    assert read_row_key(b"p", "p") is None


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"a,a\n1,2\n", "column a is there twice"),
        ("a.csv", b"a,\xff\n", "cannot be read as csv"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"{\n", "line 1: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: a JSON list"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.xlsx", b"", "--format"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    """One line says which file and why."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as refused, FeatureFile(path, format_of(path, None)):
        pass
    assert said in str(refused.value)


def test_faults_of_rows_have_their_line(tmp_path: Path) -> None:
    """Quoted line breaks count, blank lines are skipped, and a fault does not end the file."""
    csv = tmp_path / "a.csv"
    csv.write_text('\ufeffa,b\n"x\ny",1\n2\n3,4,5\n6,7\n')
    with FeatureFile(csv, "csv") as file:
        rows = list(file.rows())
    assert file.header == ("a", "b")
    assert [(row.number, row.place, row.fault) for row in rows] == [
        (1, "line 3", None),
        (2, "line 4", "1 cells, and the header has 2"),
        (3, "line 5", "3 cells, and the header has 2"),
        (4, "line 6", None),
    ]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": 1}\n\n{"a":\n3\n{"a": 2}\n')
    with FeatureFile(lines, "jsonl") as file:
        found = [(row.number, row.place, row.fault is None) for row in file.rows()]
    assert found == [(1, "line 1", True), (2, "line 3", False), (3, "line 4", False), (4, "line 5", True)]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b"a,b\n"), ("a.csv", b"\xef\xbb\xbfa,b\r\n\r\n"), ("a.jsonl", b"\xef\xbb\xbf\n\n"), ("a.parquet", None)],
)
def test_a_file_without_rows_is_an_error(tmp_path: Path, name: str, content: bytes | None) -> None:
    """Whatever its format: whoever loads it takes it for one that has some."""
    path = tmp_path / name
    if content is None:
        parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.int64())}), path)
    else:
        path.write_bytes(content)
    with (
        pytest.raises(ConfigurationError, match=f"{name} is empty: "),
        FeatureFile(path, format_of(path, None)) as file,
    ):
        list(file.rows())


def test_a_column_without_a_name_is_left_out(tmp_path: Path) -> None:
    """As pandas writes its index; a line that has too few cells is still one."""
    csv = tmp_path / "a.csv"
    csv.write_text(",a,b,\n0,1,2,\n1,3\n")
    with FeatureFile(csv, "csv") as file:
        rows = list(file.rows())
    assert (file.header, file.unnamed) == (("a", "b"), (1, 4))
    assert [(row.cells, row.fault) for row in rows] == [
        ({"a": "1", "b": "2"}, None),
        ({}, "2 cells, and the header has 4"),
    ]


def test_cells_are_as_long_as_an_update_can_be(tmp_path: Path) -> None:
    """A list of 10,000 numbers is a cell of CSV too."""
    csv = tmp_path / "a.csv"
    csv.write_text(f"a,b\n1,{'x' * 200_000}\n")
    with FeatureFile(csv, "csv") as file:
        [row] = file.rows()
    assert len(row.cells["b"]) == 200_000


def test_json_lines_may_begin_with_a_mark(tmp_path: Path) -> None:
    """A byte order mark, as spreadsheets write it, is none of the text."""
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    with FeatureFile(lines, "jsonl") as file:
        assert [(row.cells, row.fault) for row in file.rows()] == [({"a": 1}, None), ({"a": 2}, None)]


def test_nanoseconds_of_parquet_are_cut_to_microseconds(tmp_path: Path) -> None:
    """Python's times have no more, in columns as in lists."""
    nanos, table = pyarrow.timestamp("ns", "UTC"), tmp_path / "a.parquet"
    at = NOW_MS * 1_000_000 + 1_234
    written = {
        "at": pyarrow.array([at, None], nanos),
        "list": pyarrow.array([[at, None], None], pyarrow.list_(nanos)),
        "struct": pyarrow.array([{"at": at}, None], pyarrow.struct([("at", nanos)])),
        "spent": pyarrow.array([1_234, None], pyarrow.duration("ns")),
        "time": pyarrow.array([1_234, None], pyarrow.time64("ns")),
    }
    parquet.write_table(pyarrow.table(written), table)
    with FeatureFile(table, "parquet") as file:
        first, second = file.rows()
    moment = datetime.fromtimestamp(NOW_MS // 1_000, UTC).replace(microsecond=1)
    assert first.cells == {
        "at": moment, "list": [moment, None], "struct": {"at": moment},
        "spent": timedelta(microseconds=1), "time": time(0, 0, 0, 1),
    }  # fmt: skip
    assert set(second.cells.values()) == {None}


@pytest.mark.parametrize(
    ("values", "type_"),
    [([2**52], pyarrow.timestamp("ms")), ([1], pyarrow.timestamp("us", "Nowhere/Nothing"))],
)
def test_a_table_that_python_cannot_hold_is_told(tmp_path: Path, values: list[int], type_: Any) -> None:
    """A year past 9999, or a time zone that nobody knows: one line, and the file's name."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"a": pyarrow.array(values, type_)}), path)
    with (
        pytest.raises(ConfigurationError, match=r"a\.parquet cannot be read as parquet, after row 0: "),
        FeatureFile(path, "parquet") as file,
    ):
        list(file.rows())


def test_a_damaged_table_is_told(tmp_path: Path) -> None:
    """Its footer is sound, so that only reading its rows finds out."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"a": list(range(10_000))}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:2_000] = b"\xff" * 1_996
    path.write_bytes(data)
    with (
        pytest.raises(ConfigurationError, match=r"a\.parquet cannot be read as parquet"),
        FeatureFile(path, "parquet") as file,
    ):
        list(file.rows())


def test_columns_of_json_lines_are_those_of_any_line(tmp_path: Path) -> None:
    """A column that the first line does not have is loaded where it is, and told where the view does not know it."""
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        '{"iban": "DE1", "branch": 3, "age": 41}\n{"iban": "DE2", "branch": 3, "share": 0.5, "shoe": 44}\n'
    )
    with FeatureFile(lines, "jsonl") as file:
        assert file.header == ("iban", "branch", "age", "share", "shoe")
        made, ignored = row_reader("v", SPEC, file.header, mapping={}, time_column=None, time_ms=NOW_MS, text=file.text)
        rows = [made.read(row.number, row.cells, NOW_MS)[1] for row in file.rows()]
    assert ignored == ("shoe",)
    assert [dict(zip(row.names, row.values, strict=True)) for row in rows] == [{"age": 41}, {"share": 0.5}]


# --- check ------------------------------------------------------------------------------------------------------------


def version(name: str, *features: dict[str, Any]) -> ModelVersionSpec:
    """A version that needs these features."""
    document = {
        "model": name, "version": "1", "digest": f"sha256:{'0' * 64}", "features": features,
        "backend": {"type": "http", "endpoints": ["http://127.0.0.1:1"]},
        "outputs": [{"name": "y", "datatype": "FP64"}],
    }  # fmt: skip
    return ModelVersionSpec.model_validate_json(orjson.dumps(document))


def test_needs_are_counted_by_view_feature_and_age() -> None:
    """Versions that need the same share a finding; each status counts, ttl and maxAge as they are at decision time."""
    versions = [
        version("a", {"ref": "v.age", "required": True}, {"ref": "inputs.x"}, {"ref": "w.z"}),
        version("b", {"ref": "v.age"}, {"ref": "v.share", "required": True, "maxAge": "1h"}),
    ]
    assert findings_of(versions, {"v": SPEC}, {}, "w") == {}
    needed = findings_of(versions, {"v": SPEC}, {})
    age, share = needed["v"]
    assert (age.required_by, age.optional_for, share.required_by) == (["a/1"], ["b/1"], ["b/1"])
    # Of a store that knows no entity nothing is there.
    assert (age.rejected_by(0.99), age.rejected_by(1)) == (["a/1"], [])
    key = EntityKey("p", ("branch", "iban"), (3, "DE1"), ("INT32", "STRING"))
    assert need_of(needed["v"], key).features == ("age", "share")
    hour, day = 3_600_000, 86_400_000
    for fetched in (
        {("v", "age"): Fetched(FeatureStatus.PRESENT, 1, NOW_MS - 31 * day)},
        {("v", "age"): Fetched(FeatureStatus.PRESENT, 1, NOW_MS), ("v", "share"): Fetched(FeatureStatus.PRESENT, 1.0)},
        {("v", "share"): Fetched(FeatureStatus.PRESENT, 1.0, NOW_MS - hour - 1)},
        {("v", "share"): Fetched(FeatureStatus.PRESENT, 1.0, NOW_MS - hour)},
    ):
        judge_all(needed["v"], fetched, SPEC.ttl, NOW_MS)
    assert dict(age.statuses) == {FeatureStatus.STALE: 1, FeatureStatus.PRESENT: 1, FeatureStatus.MISSING: 2}
    # A value without an event time has no known age, which no bound allows.
    assert dict(share.statuses) == {FeatureStatus.MISSING: 1, FeatureStatus.PRESENT: 1, FeatureStatus.STALE: 2}
    assert age.rejected_by(0.7) == ["a/1"]
    assert not age.rejected_by(0.75)


@pytest.mark.parametrize(
    "found",
    [
        Fetched(FeatureStatus.PRESENT, 1, event_time_ms)
        for event_time_ms in (None, 0, NOW_MS - 3_600_001, NOW_MS - 3_600_000, NOW_MS + 300_000, NOW_MS + 300_001)
    ],
)
def test_a_check_and_a_request_agree_on_a_value_s_age(found: Fetched) -> None:
    """What is counted sound is what a request would be given."""
    contract = {"ref": "v.age", "required": True, "maxAge": "1h"}
    needing = version("a", contract)
    [finding] = findings_of([needing], {"v": SPEC}, {})["v"]
    finding.judge(found, None, NOW_MS)
    request = Request(RequestId("r1"), "/p", {}, {}, {}, None, None, "normal", "application/json", "")
    inputs = resolve(needing.features, {"v": SPEC}, request, {("v", "age"): found}, NOW_MS)
    assert bool(finding.rejected_by(0)) == bool(inputs.problems)


@pytest.mark.parametrize(
    ("contract", "status", "rejected", "referred"),
    [
        ({"required": True}, FeatureStatus.MISSING, True, False),
        ({"required": True, "onViolation": "refer"}, FeatureStatus.NULL, False, True),
        ({"required": True, "onViolation": "refer"}, FeatureStatus.STALE, False, True),
        ({"onViolation": "reject"}, FeatureStatus.STALE, True, False),
        ({"onViolation": "reject"}, FeatureStatus.ERROR, True, False),
        ({"onViolation": "reject"}, FeatureStatus.MISSING, False, False),
        ({"onViolation": "refer"}, FeatureStatus.STALE, False, True),
        ({}, FeatureStatus.ERROR, False, False),
    ],
)
def test_a_violation_does_what_its_contract_says(
    contract: dict[str, Any], status: FeatureStatus, rejected: bool, referred: bool
) -> None:
    """An optional value that is absent is no violation, one that is stale or an error is; some refer, some reject."""
    [finding] = findings_of([version("a", {"ref": "v.age", **contract})], {"v": SPEC}, {})["v"]
    needs_it = contract.get("required", False)
    assert bool(finding.rejected_by(0) or finding.referred_by(0)) == needs_it
    finding.judge(Fetched(status), None, NOW_MS)
    assert finding.rejected_by(0) == ["a/1"] * rejected
    assert finding.referred_by(0) == ["a/1"] * referred


def test_what_is_computed_needs_its_ingredients() -> None:
    """Through every view on the way, as young as the contract wants it; what has() asks for may be absent."""
    loan = FeatureViewSpec.model_validate_json(
        """{"features": [{"name": "part", "type": "DOUBLE"}, {"name": "whole", "type": "DOUBLE"}],
            "onDemand": {"part": "has(v.share) ? v.share : 0.0",
                         "whole": "loan.part + double(v.age) + double(inputs.amount)"}}"""
    )
    computations, faults = compile_views({"v": SPEC, "loan": loan})
    assert not faults
    contract = {"ref": "loan.whole", "required": True, "maxAge": "1h"}
    needed = findings_of([version("a", contract, {"ref": "v.share"})], {"v": SPEC}, computations)
    assert set(needed) == {"v"}
    found = {(each.feature, each.max_age_ms): each for each in needed["v"]}
    assert found["age", 3_600_000].required_by == ["a/1"]
    assert found["share", 3_600_000].optional_for == ["a/1"]
    assert found["share", None].optional_for == ["a/1"]
    found["share", 3_600_000].judge(Fetched(FeatureStatus.MISSING), None, NOW_MS)
    found["age", 3_600_000].judge(Fetched(FeatureStatus.MISSING), None, NOW_MS)
    assert not found["share", 3_600_000].rejected_by(0)
    assert found["age", 3_600_000].rejected_by(0) == ["a/1"]
