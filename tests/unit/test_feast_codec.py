"""Feast's bytes: the same as its own SDK's, and no stored bytes that could stop a decision."""

import struct
from typing import Any

import pytest

from app.adapters.feast_codec import (
    INT64_MIN,
    decode_time,
    decode_value,
    encode_time,
    encode_value,
    feature_field,
    row_key,
    time_field,
)
from app.domain.document_parts import ValueType
from app.domain.features import FeatureStatus
from tests.support.feast_rows import FeastRow, feast_rows

ROWS = feast_rows()
IDS = [f"{row.view}-{index}" for index, row in enumerate(ROWS)]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_keys_and_fields_are_those_of_the_sdk(row: FeastRow) -> None:
    """A row's key and the names of its fields are byte for byte what Feast made."""
    assert row_key(row.key) == row.stored_key
    fields = {feature_field(row.view, name) for name in row.values}
    assert fields | {time_field(row.view)} == set(row.stored_hash)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_values_and_times_are_written_as_the_sdk_writes_them(row: FeastRow) -> None:
    """What this codec would store is byte for byte what Feast stored."""
    for name, (type_, value) in row.values.items():
        assert encode_value(value, type_) == row.stored_hash[feature_field(row.view, name)], name
    assert encode_time(row.event_time_ms) == row.stored_hash[time_field(row.view)]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_values_and_times_of_the_sdk_are_read(row: FeastRow) -> None:
    """What Feast stored comes back as what it was given; its nulls are NULL."""
    assert decode_time(row.stored_hash[time_field(row.view)]) == row.event_time_ms
    for name, (type_, value) in row.values.items():
        found = decode_value(row.stored_hash[feature_field(row.view, name)], type_)
        if value is None or (type_ == "UNIX_TIMESTAMP" and value == INT64_MIN):
            assert (found.status, found.value) == (FeatureStatus.NULL, None)
        elif type_.startswith("UNIX_TIMESTAMP") and not within_years(value):
            assert (found.status, found.value) == (FeatureStatus.ERROR, None)
        else:
            expected = as_stored(value) if type_.startswith("FLOAT") else value
            assert (found.status, found.value) == (FeatureStatus.PRESENT, expected)


def within_years(value: Any) -> bool:
    """Whether Feast, which writes any int64 as a time, can read what it wrote."""
    return all(
        each is None or -62_135_596_800 <= each < 253_402_300_800
        for each in (value if isinstance(value, tuple) else (value,))
    )


def as_stored(value: Any) -> Any:
    """What 32 bits hold of a number, or of each of a list."""
    if isinstance(value, tuple):
        return tuple(as_stored(each) for each in value)
    return value if value is None else struct.unpack("<f", struct.pack("<f", value))[0]


def test_absent_and_empty_differ() -> None:
    """No field is MISSING; a field without bytes is NULL and has a time."""
    assert decode_value(None, "INT64", 5).status is FeatureStatus.MISSING
    null = decode_value(b"", "INT64", 5)
    assert (null.status, null.event_time_ms) == (FeatureStatus.NULL, 5)
    assert decode_value(b"\x98\x01\x00", "INT64").status is FeatureStatus.NULL


@pytest.mark.parametrize(
    ("value", "stored", "declared", "expected"),
    [
        (3, "INT64", "DOUBLE", 3.0),
        (3, "INT32", "INT64", 3),
        (3.0, "DOUBLE", "INT64", 3),
        (0.5, "FLOAT", "DOUBLE", 0.5),
        (7, "INT64", "UNIX_TIMESTAMP", 7),
    ],
)
def test_another_type_is_coerced_where_nothing_is_lost(
    value: float, stored: str, declared: ValueType, expected: float
) -> None:
    """A value stored as another scalar than declared is used where it can be that type."""
    found = decode_value(encode_value(value, stored), declared)
    assert (found.status, found.value) == (FeatureStatus.PRESENT, expected)
    assert type(found.value) is type(expected)


@pytest.mark.parametrize(
    ("data", "declared", "said"),
    [
        (encode_value(3.5, "DOUBLE"), "INT64", "3.5"),
        (encode_value(2**40, "INT64"), "INT32", "INT32"),
        (encode_value("x", "STRING"), "INT64", "STRING|str"),
        (encode_value(True, "BOOL"), "DOUBLE", "True"),
        (b"\x29" + struct.pack("<d", float("nan")), "DOUBLE", "nan"),
        (b"\x9a\x01\x02\x08\x01", "INT64", "wire type 2|neither a scalar"),
        (b"\xaa\x01\x02\x08\x01", "INT64", "neither a scalar"),
        (encode_value((1, 2), "INT64_LIST"), "INT64", "(1, 2)"),
        (encode_value(1, "INT64"), "INT64_LIST", "1"),
        (encode_value(("a",), "STRING_LIST"), "INT64_LIST", "'a'"),
        (b"\x70\x01", "INT64_LIST", "wire type 0"),
        (b"\x72\x03\x0a\x02\x80", "INT64_LIST", "announced"),
        (b"\x72\x03\x0a\x01\x80", "INT64_LIST", "does not end"),
        (b"\x7a\x06\x0a\x04abcd", "DOUBLE_LIST", "4 bytes of numbers of 8"),
        (b"\x62\x02\x08\x01", "STRING_LIST", "an element in wire type 0"),
        (encode_value((0.5,), "DOUBLE_LIST")[:-8] + struct.pack("<d", float("inf")), "DOUBLE_LIST", "inf"),
        (b"\x12\x05ab", "STRING", "5 bytes announced"),
        (b"\x12\x02\xff\xfe", "STRING", "utf-8"),
        (b"\x20\xff", "INT64", "does not end"),
        (b"\x22\x00", "INT64", "wire type"),
        (b"\x23", "INT64", "wire type 3"),
    ],
)
def test_unusable_bytes_are_an_error_with_a_reason(data: bytes, declared: ValueType, said: str) -> None:
    """What cannot be the declared type is ERROR, says why, and is never a guess."""
    found = decode_value(data, declared, 9)
    assert (found.status, found.value, found.event_time_ms) == (FeatureStatus.ERROR, None, 9)
    assert found.reason is not None
    assert any(part in found.reason for part in said.split("|"))


@pytest.mark.parametrize("seconds", [253_402_300_800, 1_767_225_600_000, -62_135_596_801, -(2**63) + 1, 2**63 - 1])
def test_a_stored_time_that_no_calendar_has_is_an_error(seconds: int) -> None:
    """As for Feast, which writes it and fails to read it; alone and within a list."""
    for value, type_ in ((seconds, "UNIX_TIMESTAMP"), ((5, seconds), "UNIX_TIMESTAMP_LIST")):
        found = decode_value(encode_value(value, type_), type_)  # type: ignore[arg-type]  # of a list's two types
        assert (found.status, found.value) == (FeatureStatus.ERROR, None)
        assert "outside the years 1 to 9999" in (found.reason or "")


def test_lists_are_read_however_they_were_written() -> None:
    """Elements one by one are as good as packed ones, fields of later versions are passed over, parts are joined."""
    one_by_one = b"\x72\x06\x08\x01\x10\x09\x08\x02"
    assert decode_value(one_by_one, "INT64_LIST").value == (1, 2)
    assert decode_value(one_by_one + encode_value((3,), "INT64_LIST"), "INT64_LIST").value == (1, 2, 3)
    assert decode_value(encode_value((9,), "INT32_LIST") + one_by_one, "INT64_LIST").value == (1, 2)
    assert decode_value(encode_value((1, 2), "INT64_LIST"), "DOUBLE_LIST").value == (1.0, 2.0)


def test_a_null_within_a_list_is_written_where_it_can_be_told_from_a_value() -> None:
    """As NaN, or as the time that is none; in a list of texts it would become an empty one, and is refused."""
    types: tuple[ValueType, ...] = ("DOUBLE_LIST", "FLOAT_LIST", "UNIX_TIMESTAMP_LIST")
    for type_ in types:
        assert decode_value(encode_value((None, 2), type_), type_).value == (None, 2)
    with pytest.raises(ValueError, match="null within a list"):
        encode_value((None, "a"), "STRING_LIST")


@pytest.mark.parametrize(("value", "type_"), [("x", "INT64"), (2**31, "INT32"), (1, "BOOL"), (1e39, "FLOAT")])
def test_a_value_of_another_type_is_not_written(value: object, type_: str) -> None:
    """Encoding refuses what is not the type, before it is stored."""
    with pytest.raises((ValueError, OverflowError)):
        encode_value(value, type_)  # type: ignore[arg-type]  # wrong on purpose
