"""Feast's online-store bytes (key serialization 3, as feast 0.67 writes them), without Feast.

Keys and field names go one way, to bytes; values go both ways, between Python's scalars and tuples and serialized
``feast.types.Value`` messages. Such a message holds one field, so its wire format is read and written here directly:
it is on the path of every decision, where a protobuf object a value would cost most of a fetch. Whatever bytes a store
holds, decoding them ends in a ``Fetched``: PRESENT, NULL, MISSING, or ERROR with the reason.

A list is a message of its own with its elements, numbers packed. It has no nulls: what Feast makes of them in lists of
floating-point numbers (NaN) and of times (the smallest int64) is null here, and nothing else is.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final

import mmh3

from app.domain.document_parts import ValueType
from app.domain.features import Element, EntityKey, FeatureStatus, Fetched, Value, coerce, coerce_element

INT64_MIN: Final = -(2**63)
"""What pandas makes of a time that is not there; a null of type UNIX_TIMESTAMP."""

_STRING: Final = 2
_NULL_FIELD: Final = 19
_FIELDS: Final[Mapping[str, int]] = {
    "BYTES": 1,
    "STRING": 2,
    "INT32": 3,
    "INT64": 4,
    "DOUBLE": 5,
    "FLOAT": 6,
    "BOOL": 7,
    "UNIX_TIMESTAMP": 8,
}
"""A type's number, both in ``feast.types.ValueType`` and as the field of ``feast.types.Value`` that holds it."""
_LIST_OFFSET: Final = 10
"""The number of a list type is its elements' and this."""
_LIST: Final = "_LIST"
_TIMES: Final = "UNIX_TIMESTAMP_LIST"
_WHOLE: Final = "INT64_LIST"
_BOUNDED: Final = ("DOUBLE", "FLOAT", "UNIX_TIMESTAMP")
"""Whose stored form can say what is no value: infinity, or a time that no calendar has."""
_NAMES: Final = {number: name for name, number in _FIELDS.items()} | {
    number + _LIST_OFFSET: name + _LIST for name, number in _FIELDS.items()
}
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_WIRE: Final = {1: _LENGTH, 2: _LENGTH, 3: _VARINT, 4: _VARINT, 5: _FIXED64, 6: _FIXED32, 7: _VARINT, 8: _VARINT}
_U64: Final = (1 << 64) - 1
_DOUBLE: Final = struct.Struct("<d").unpack_from
_PACK_DOUBLE: Final = struct.Struct("<d").pack
_GO_ON: Final = 0x80 + (0x80 << 7) + (0x80 << 14) + (0x80 << 21)
"""The bits by which four bytes of a number say that another follows."""
_ONE_INT64: Final = ("INT64",)
_PACK_INT64: Final = struct.Struct("<IIq").pack
"""A key's only value with its type and size before it: what nearly all keys have."""

_NULL: Final = Fetched(FeatureStatus.NULL)
_MISSING: Final = Fetched(FeatureStatus.MISSING)
_PRESENT: Final = FeatureStatus.PRESENT
_ERROR: Final = FeatureStatus.ERROR


# --- keys and fields --------------------------------------------------------------------------------------------------


def row_key(key: EntityKey) -> bytes:
    """The Redis key of an entity's row, which all views of that entity share.

    >>> row_key(EntityKey("p", ("id",), (17,), ("INT64",))).hex()
    '01000000020000000200000069640400000008000000110000000000000070'
    """
    if key.types == _ONE_INT64:
        return _key_head(key.names) + _PACK_INT64(4, 8, key.values[0]) + key.project.encode()
    parts = [_key_head(key.names)]
    for value, type_ in zip(key.values, key.types, strict=True):
        encoded = value.encode() if isinstance(value, str) else struct.pack("<i" if type_ == "INT32" else "<q", value)
        parts.append(struct.pack("<II", _FIELDS[type_], len(encoded)))
        parts.append(encoded)
    parts.append(key.project.encode())
    return b"".join(parts)


@lru_cache(maxsize=1024)
def _key_head(names: tuple[str, ...]) -> bytes:
    encoded = [name.encode() for name in names]
    return struct.pack("<I", len(names)) + b"".join(struct.pack("<II", _STRING, len(name)) + name for name in encoded)


def feature_field(view: str, feature: str) -> bytes:
    """The hash field that holds a feature.

    >>> feature_field("applicant", "age_years").hex()
    '24e8c600'
    """
    return struct.pack("<I", mmh3.hash(f"{view}:{feature}", signed=False))


def time_field(view: str) -> bytes:
    """The hash field that holds the event time of all of a view's features."""
    return b"_ts:" + view.encode()


# --- values -----------------------------------------------------------------------------------------------------------


def encode_value(value: Value, type_: str) -> bytes:
    r"""A ``feast.types.Value``; None is Feast's null, which is no bytes at all.

    ``value`` has been coerced to ``type_``; ValueError or OverflowError where it has not.

    >>> encode_value("ab", "STRING"), encode_value(None, "INT64")
    (b'\x12\x02ab', b'')
    """
    if value is None:
        return b""
    if type_ == "DOUBLE" and type(value) is float and math.isfinite(value):
        return b"\x29" + _PACK_DOUBLE(value)
    if type_.endswith(_LIST):
        elements = _whole_list(value) if type_ == _TIMES else coerce(value, type_)
        return _encode_list(elements, _FIELDS[type_.removesuffix(_LIST)])
    field = _FIELDS[type_]
    # Feast writes any int64 as a time, also one that no calendar has and that nobody can read.
    match field, coerce_element(value, "INT64" if type_ == "UNIX_TIMESTAMP" else type_):
        case 1, bytes(data):
            return b"\x0a" + _varint(len(data)) + data
        case 2, str(text):
            data = text.encode()
            return b"\x12" + _varint(len(data)) + data
        case 5, float(number):
            return b"\x29" + struct.pack("<d", number)
        case 6, float(number):
            return b"\x35" + struct.pack("<f", number)
        case 3 | 4 | 7 | 8, int(number):
            return bytes((field << 3,)) + _varint(number & _U64)
    raise ValueError(f"{value!r} is not {type_}")


def _whole_list(value: Value) -> Value:
    return coerce(
        [INT64_MIN if each is None else each for each in value] if isinstance(value, tuple) else value, _WHOLE
    )


def encode_values(values: Sequence[Value], types: Sequence[str]) -> list[bytes]:
    """``encode_value`` of each. Doubles are read here, for a row has many and a batch has many rows."""
    return [
        b"\x29" + _PACK_DOUBLE(value)
        if type_ == "DOUBLE" and type(value) is float and math.isfinite(value)
        else encode_value(value, type_)
        for value, type_ in zip(values, types, strict=True)
    ]


def _encode_list(elements: Value, field: int) -> bytes:
    assert isinstance(elements, tuple)  # noqa: S101 - what a list type is coerced to
    match field:
        case 1 | 2:
            parts = [each.encode() if isinstance(each, str) else each for each in elements]
            body = b"".join(b"\x0a" + _varint(len(part)) + part for part in parts if isinstance(part, bytes))
        case 5 | 6:
            numbers = [math.nan if each is None else each for each in elements]
            body = _packed(struct.pack(f"<{len(numbers)}{'d' if field == 5 else 'f'}", *numbers))
        case _:
            whole = (INT64_MIN if each is None else each for each in elements)
            body = _packed(b"".join(_varint(each & _U64) for each in whole if isinstance(each, int)))
    return _varint((field + _LIST_OFFSET) << 3 | _LENGTH) + _varint(len(body)) + body


def _packed(data: bytes) -> bytes:
    """Field 1, packed; without elements it is not there at all."""
    return b"\x0a" + _varint(len(data)) + data if data else b""


def decode_value(data: bytes | None, type_: ValueType, event_time_ms: int | None = None) -> Fetched:
    """What a stored value says, as the declared type.

    None is MISSING and empty is NULL. A value stored as another scalar is coerced where that loses nothing.

    >>> decode_value(b"\\x20\\x2a", "INT64").value, decode_value(b"\\x20\\x2a", "DOUBLE").value
    (42, 42.0)
    """
    if data is None:
        return _MISSING
    if not data:
        return Fetched(FeatureStatus.NULL, None, event_time_ms) if event_time_ms is not None else _NULL
    try:
        stored, value = _parse(data)
        if value is None or (value == INT64_MIN and "UNIX_TIMESTAMP" in (stored, type_)):
            return Fetched(FeatureStatus.NULL, None, event_time_ms)
        if stored != type_ or type_ in _BOUNDED or isinstance(value, tuple):
            value = coerce(value, type_)
    except ValueError as error:
        return Fetched(_ERROR, None, event_time_ms, f"stored value cannot be used: {error}")
    return Fetched(_PRESENT, value, event_time_ms)


def decode_values(
    stored: Sequence[bytes | None], types: Sequence[ValueType], event_time_ms: int | None, bytes_max: int
) -> list[Fetched]:
    """``decode_value`` of each: a row's values, all of one time; one of more than ``bytes_max`` bytes is an ERROR.

    Doubles, small whole numbers and short texts, stored as what they are declared, are nearly all there is: they are
    read here, for a request has many.
    """
    found: list[Fetched] = []
    for data, type_ in zip(stored, types, strict=True):
        if data is None:
            found.append(_MISSING)
            continue
        size = len(data)
        if type_ == "DOUBLE":
            if size == 9 and data[0] == 0x29:
                number: float = _DOUBLE(data, 1)[0]
                if math.isfinite(number):
                    found.append(Fetched(_PRESENT, number, event_time_ms))
                    continue
        elif type_ == "INT64" and size == 2 and data[0] == 0x20 and data[1] < 0x80:
            found.append(Fetched(_PRESENT, data[1], event_time_ms))
            continue
        if size > bytes_max:
            reason = f"stored value is too large: {size} bytes, and {bytes_max} are allowed"
            found.append(Fetched(_ERROR, None, event_time_ms, reason))
            continue
        found.append(decode_value(data, type_, event_time_ms))
    return found


def _parse(data: bytes) -> tuple[str, Value]:
    """The type and value that a message holds; of several fields the last counts, as in every protobuf ``oneof``."""
    at, end = 0, len(data)
    # Short texts, small whole numbers and doubles are nearly all there is.
    first = data[0]
    if first == 0x12 and end > 1 and data[1] == end - 2 < 0x80:
        return "STRING", data[2:].decode()
    if first == 0x20 and end == 2 and data[1] < 0x80:
        return "INT64", data[1]
    if first == 0x29 and end == 9:
        return "DOUBLE", _double(data[1:])
    found: tuple[str, Value] | None = None
    elements: tuple[Element, ...]
    while at < end:
        tag, at = _read_varint(data, at)
        field, wire = tag >> 3, tag & 7
        raw, at = _read_raw(data, at, wire)
        if field == _NULL_FIELD and wire == _VARINT:
            found = ("NULL", None)
            continue
        name = _NAMES.get(field)
        if name is None:
            raise ValueError(f"field {field} of feast.types.Value is neither a scalar nor a list of scalars")
        if field > _LIST_OFFSET:
            if wire != _LENGTH:
                raise ValueError(f"damaged: {name} in wire type {wire}")
            elements = _read_list(_as_bytes(raw), field - _LIST_OFFSET)
            if found is not None and found[0] == name and isinstance(found[1], tuple):
                # A message given in parts is all its parts.
                elements = (*found[1], *elements)
            found = (name, elements)
            continue
        if wire != _WIRE[field]:
            raise ValueError(f"damaged: {name} in wire type {wire}")
        found = (name, _READERS[field](raw))
    if found is None:
        raise ValueError("damaged: no field")
    return found


def _read_list(data: bytes, field: int) -> tuple[Element, ...]:
    """A list message's elements, packed or one by one: readers of protobuf take both."""
    wanted, read = _WIRE[field], _READERS[field]
    elements: list[Element] = []
    at, end = 0, len(data)
    while at < end:
        tag, at = _read_varint(data, at)
        wire = tag & 7
        raw, at = _read_raw(data, at, wire)
        if tag >> 3 != 1:
            continue  # a field that later versions may have
        if wire == wanted:
            elements.append(read(raw))
        elif wire == _LENGTH:
            elements += _unpacked(_as_bytes(raw), field)
        else:
            raise ValueError(f"damaged: an element in wire type {wire}")
    if field in (5, 6):
        return tuple(None if isinstance(each, float) and math.isnan(each) else each for each in elements)
    if field == 8:
        return tuple(None if each == INT64_MIN else each for each in elements)
    return tuple(elements)


def _unpacked(data: bytes, field: int) -> list[Element]:
    width = {_FIXED64: 8, _FIXED32: 4}.get(_WIRE[field])
    if width is not None:
        if len(data) % width:
            raise ValueError(f"damaged: {len(data)} bytes of numbers of {width}")
        return list(struct.unpack(f"<{len(data) // width}{'d' if width == 8 else 'f'}", data))
    elements: list[Element] = []
    at = 0
    while at < len(data):
        raw, at = _read_varint(data, at)
        elements.append(_READERS[field](raw))
    return elements


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    for index in range(at, min(at + 10, len(data))):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _U64, index + 1
        shift += 7
    raise ValueError("damaged: a number does not end")


def _read_raw(data: bytes, at: int, wire: int) -> tuple[int | bytes, int]:
    if wire == _VARINT:
        return _read_varint(data, at)
    if wire == _LENGTH:
        length, at = _read_varint(data, at)
    elif wire in (_FIXED64, _FIXED32):
        length = 8 if wire == _FIXED64 else 4
    else:
        raise ValueError(f"damaged: wire type {wire}")
    if at + length > len(data):
        raise ValueError(f"damaged: {length} bytes announced, {len(data) - at} there")
    return data[at : at + length], at + length


def _as_bytes(raw: int | bytes) -> bytes:
    assert isinstance(raw, bytes)  # noqa: S101 - the wire type was checked
    return raw


def _as_int(raw: int | bytes) -> int:
    assert isinstance(raw, int)  # noqa: S101 - the wire type was checked
    return raw


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _double(raw: int | bytes) -> float:
    number: float = struct.unpack("<d", _as_bytes(raw))[0]
    return number


def _float(raw: int | bytes) -> float:
    number: float = struct.unpack("<f", _as_bytes(raw))[0]
    return number


_READERS: Final[Mapping[int, Callable[[int | bytes], Element]]] = {
    1: _as_bytes,
    2: lambda raw: _as_bytes(raw).decode(),
    3: lambda raw: _signed(_as_int(raw), 32),
    4: lambda raw: _signed(_as_int(raw), 64),
    5: _double,
    6: _float,
    7: lambda raw: _as_int(raw) != 0,
    8: lambda raw: _signed(_as_int(raw), 64),
}


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# --- event times ------------------------------------------------------------------------------------------------------


def encode_time(epoch_ms: int) -> bytes:
    """A ``google.protobuf.Timestamp``: fields that are zero are left out, so the epoch is no bytes at all.

    >>> encode_time(1_000), encode_time(0)
    (b'\\x08\\x01', b'')
    """
    seconds, rest_ms = divmod(epoch_ms, 1_000)
    out = b""
    if 1 << 28 <= seconds < 1 << 35:
        # From 1978 on, for a thousand years: five bytes, written at once.
        out = bytes(
            (
                0x08,
                seconds & 0x7F | 0x80,
                seconds >> 7 & 0x7F | 0x80,
                seconds >> 14 & 0x7F | 0x80,
                seconds >> 21 & 0x7F | 0x80,
                seconds >> 28,
            )
        )
    elif seconds:
        out += b"\x08" + _varint(seconds & _U64)
    if rest_ms:
        out += b"\x10" + _varint(rest_ms * 1_000_000)
    return out


def decode_time(data: bytes | None) -> int | None:
    """Epoch milliseconds of a serialized Timestamp; None where there is none, or it cannot be read.

    >>> decode_time(encode_time(1_795_651_200_250)), decode_time(b""), decode_time(b"?"), decode_time(None)
    (1795651200250, 0, None, None)
    """
    if data is None:
        return None
    if len(data) == 6 and data[0] == 0x08:
        # Whole seconds, which is what Feast writes, from 1978 on: of five bytes all but the last go on.
        _, a, b, c, d, e = data
        if a & b & c & d >= 0x80 > e:
            return (a + (b << 7) + (c << 14) + (d << 21) + (e << 28) - _GO_ON) * 1_000
    seconds = nanos = 0
    at, end = 0, len(data)
    try:
        while at < end:
            tag, at = _read_varint(data, at)
            raw, at = _read_raw(data, at, tag & 7)
            if tag == 0x08:
                seconds = _signed(_as_int(raw), 64)
            elif tag == 0x10:
                nanos = _signed(_as_int(raw), 32)
    except ValueError:
        return None
    return seconds * 1_000 + nanos // 1_000_000
