"""Feast's bytes for any value and any bytes."""

import struct
from typing import Any, cast

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.adapters.feast_codec import (
    decode_time,
    decode_value,
    decode_values,
    encode_time,
    encode_value,
    encode_values,
)
from app.domain.document_parts import ValueType
from app.domain.features import FeatureStatus

# How fast examples come says nothing here, on a machine that others use.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SCALARS: dict[ValueType, st.SearchStrategy[Any]] = {
    "BYTES": st.binary(max_size=300),
    "STRING": st.text(max_size=300),
    "INT32": st.integers(-(2**31), 2**31 - 1),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "DOUBLE": st.floats(allow_nan=False, allow_infinity=False),
    "FLOAT": st.floats(allow_nan=False, allow_infinity=False, width=32),
    "BOOL": st.booleans(),
    "UNIX_TIMESTAMP": st.integers(-62_135_596_800, 253_402_300_799),
}
LISTS: dict[ValueType, st.SearchStrategy[Any]] = {
    cast("ValueType", f"{type_}_LIST"): st.lists(
        values | st.none() if type_ in ("DOUBLE", "FLOAT", "UNIX_TIMESTAMP") else values, max_size=40
    ).map(tuple)
    for type_, values in SCALARS.items()
}
TYPES = SCALARS | LISTS


@unhurried
@given(st.sampled_from(sorted(TYPES)).flatmap(lambda type_: st.tuples(st.just(type_), TYPES[type_])))
def test_every_value_comes_back(typed: tuple[ValueType, Any]) -> None:
    """What is written is read: same type, same value."""
    type_, value = typed
    found = decode_value(encode_value(value, type_), type_)
    assert found.status is FeatureStatus.PRESENT
    assert found.value == value
    assert type(found.value) is type(value)


@unhurried
@given(st.binary(max_size=64), st.sampled_from(sorted(TYPES)))
def test_any_bytes_end_in_a_status(data: bytes, type_: ValueType) -> None:
    """No bytes raise; an ERROR has a reason, and a PRESENT value is of the declared type."""
    found = decode_value(data, type_)
    assert found.status in (FeatureStatus.PRESENT, FeatureStatus.NULL, FeatureStatus.ERROR)
    assert (found.reason is not None) == (found.status is FeatureStatus.ERROR)
    if found.status is FeatureStatus.PRESENT:
        encode_value(found.value, type_)


@unhurried
@given(st.sampled_from(sorted(TYPES)), st.sampled_from(sorted(TYPES)), st.data())
def test_any_type_stored_under_any_other_ends_in_a_status(
    stored: ValueType, declared: ValueType, data: st.DataObject
) -> None:
    """A producer that changed a type stops nobody."""
    found = decode_value(encode_value(data.draw(TYPES[stored]), stored), declared)
    assert found.status in (FeatureStatus.PRESENT, FeatureStatus.NULL, FeatureStatus.ERROR)


@unhurried
@given(st.integers(-(2**53), 253_402_300_799_999))
def test_every_time_comes_back(epoch_ms: int) -> None:
    """Milliseconds survive, before and after the epoch."""
    assert decode_time(encode_time(epoch_ms)) == epoch_ms


@unhurried
@given(st.binary(max_size=40))
def test_any_bytes_are_a_time_or_none(data: bytes) -> None:
    """No bytes raise."""
    assert decode_time(data) is None or isinstance(decode_time(data), int)


def test_a_float_is_what_32_bits_hold() -> None:
    """A FLOAT written with more digits comes back as its nearest 32-bit value."""
    assert decode_value(encode_value(0.1, "FLOAT"), "FLOAT").value == struct.unpack("<f", struct.pack("<f", 0.1))[0]


@unhurried
@given(st.lists(st.tuples(st.none() | st.binary(max_size=12), st.sampled_from(sorted(TYPES))), max_size=6))
def test_a_row_is_decoded_as_its_values_are(row: list[tuple[bytes | None, ValueType]]) -> None:
    """What is read quickly says the same as what is read value by value; only what is too long differs."""
    found = decode_values([data for data, _ in row], [type_ for _, type_ in row], 7, 10)
    for (data, type_), each in zip(row, found, strict=True):
        if data is None or len(data) <= 10:
            assert each == decode_value(data, type_, 7)
        else:
            assert (each.status, each.event_time_ms) == (FeatureStatus.ERROR, 7)


@unhurried
@given(st.sampled_from(sorted(TYPES)).flatmap(lambda type_: st.tuples(st.just(type_), TYPES[type_])))
def test_a_row_of_what_was_written_comes_back(typed: tuple[ValueType, bytes | str | int | float | bool]) -> None:
    """Values of all types, by the way that a fetch reads them."""
    type_, value = typed
    assert encode_values([value, None], [type_, type_]) == [encode_value(value, type_), b""]
    assert decode_values(encode_values([value], [type_]), [type_], None, 1_000_000)[0].value == value


@unhurried
@given(st.integers(0, 2**52))
def test_whole_seconds_are_read_as_any_time_is(seconds: int) -> None:
    """The short way for times without a fraction agrees with the long one, which a zero fraction takes."""
    data = encode_time(seconds * 1_000)
    assert decode_time(data) == decode_time(data + b"\x10\x00") == seconds * 1_000
