"""Writes feast_rows.json: what the real Feast SDK stores in Redis, to hold our codec against.

Run it with a Python that has `feast[redis]` and a Redis to spare, whose database 9 it empties:
`python tests/data/make_feast_rows.py 127.0.0.1:6379`. It writes through the SDK's own RedisOnlineStore and reads the
hashes back raw. A second argument names another file to write.
"""

import json
import math
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import redis

# Feast is not among this project's dependencies; whoever runs this brings it.
from feast import (  # type: ignore[import-not-found]
    Entity,
    FeatureView,
    Field,
    FileSource,
    RepoConfig,
    ValueType,
)
from feast.infra.online_stores.redis import RedisOnlineStore  # type: ignore[import-not-found]
from feast.protos.feast.types.EntityKey_pb2 import EntityKey  # type: ignore[import-not-found]
from feast.protos.feast.types.Value_pb2 import Value  # type: ignore[import-not-found]
from feast.type_map import python_values_to_proto_values  # type: ignore[import-not-found]
from feast.types import (  # type: ignore[import-not-found]
    Array,
    Bool,
    Bytes,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    UnixTimestamp,
)

FIELDS = {
    "text": (String, "STRING", "string_val"),
    "raw": (Bytes, "BYTES", "bytes_val"),
    "small": (Int32, "INT32", "int32_val"),
    "large": (Int64, "INT64", "int64_val"),
    "wide": (Float64, "DOUBLE", "double_val"),
    "narrow": (Float32, "FLOAT", "float_val"),
    "flag": (Bool, "BOOL", "bool_val"),
    "moment": (UnixTimestamp, "UNIX_TIMESTAMP", "unix_timestamp_val"),
}
LISTS = {f"{name}s": (Array(dtype), f"{type_}_LIST") for name, (dtype, type_, _) in FIELDS.items()}
NAN = float("nan")
LIST_ROWS: list[dict[str, list[Any] | None]] = [
    {"texts": ["A34", "", "żółć"], "raws": [b"\x00\xff", b""], "smalls": [7, 0, -(2**31)], "larges": [17, -(2**63)],
     "wides": [0.5, 0.0, -1e300], "narrows": [0.25, -1.5], "flags": [True, False], "moments": [1_700_000_000, 0, -1]},
    {name: [] for name in LISTS},
    dict.fromkeys(LISTS),
    {"texts": ["x"] * 200, "raws": [bytes(200)], "smalls": list(range(200)), "larges": list(range(-9, 300, 7)),
     "wides": [each / 7 for each in range(100)], "narrows": [0.5] * 40, "flags": [True] * 130, "moments": [2**62]},
    {"texts": ["a", None], "raws": [None, b"b"], "smalls": [1, None], "larges": [None, 2], "wides": [0.5, None],
     "narrows": [None, 0.5], "flags": [True, None], "moments": [5, None]},
    {"wides": [0.5, NAN], "narrows": [NAN, 0.5]},
]  # fmt: skip
"""Lists, and nulls in them, as the SDK's own conversion takes them; where it makes another value of a null (0, "") that
is what is stored."""
INT64_MIN = -(2**63)
ROWS = [
    {"text": "A34", "raw": b"\x00\xff", "small": 7, "large": 17, "wide": 0.5, "narrow": 0.25, "flag": True,
     "moment": 1_700_000_000},
    {"text": "", "raw": b"", "small": 0, "large": 0, "wide": 0.0, "narrow": 0.0, "flag": False, "moment": 0},
    {"text": "zażółć" * 40, "raw": bytes(range(256)), "small": -(2**31), "large": -(2**63), "wide": -1e300,
     "narrow": -1.5, "flag": True, "moment": -1},
    {"text": "x", "raw": b"y", "small": 2**31 - 1, "large": 2**63 - 1, "wide": 5e-324, "narrow": 0.1, "flag": False,
     "moment": 2**62},
    dict.fromkeys(FIELDS),
    {"text": "one", "moment": INT64_MIN},
]  # fmt: skip
TIMES = [
    datetime(2026, 11, 23, tzinfo=UTC),
    datetime(2026, 11, 23, 1, 2, 3, 250_000, tzinfo=UTC),
    datetime(1970, 1, 1, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 58, 500_000, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
    datetime(2038, 1, 19, 3, 14, 8, tzinfo=UTC),
]
KEYS: dict[str, list[tuple[str, str, str, list[int] | list[str]]]] = {
    "applicant": [("applicant_id", "INT64", "int64_val", [17, -1, 2**40, 0, 5, 6])],
    "account": [
        ("iban", "STRING", "string_val", ["DE1", "ż", "", "a", "b", "c"]),
        ("branch", "INT32", "int32_val", [1, -2, 3, 4, 5, 6]),
    ],
    "loan": [
        ("product", "STRING", "string_val", ["card", "auto", "", "a", "b", "c"]),
        ("lender_id", "INT64", "int64_val", [2**62, -1, 0, 4, 5, 6]),
        ("Zone", "INT32", "int32_val", [-(2**31), 2**31 - 1, 0, 7, 8, 9]),
    ],
}
TYPES = {"INT64": ValueType.INT64, "INT32": ValueType.INT32, "STRING": ValueType.STRING}
DATABASE = 9
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def plain(value: object) -> object:
    """JSON's form of a value; it has no NaN."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def listed(message: Any, type_: str) -> list[Any] | None:
    """The elements that a message holds; the SDK's stand-in for a null that differs from every value is null."""
    if not message.WhichOneof("val"):
        return None
    held = list(getattr(message, message.WhichOneof("val")).val)
    return [None if type_ == "UNIX_TIMESTAMP_LIST" and each == INT64_MIN else each for each in held]


def main(address: str, target: Path) -> None:
    """Write all rows of all views through the SDK, and what Redis then holds to ``target``."""
    client: Any = redis.Redis.from_url(f"redis://{address}/{DATABASE}")
    client.flushdb()
    rows = []
    for view_name, joins in KEYS.items():
        for index, (values, time) in enumerate(zip(ROWS, TIMES, strict=True)):
            messages = {
                name: Value() if value is None else Value(**{FIELDS[name][2]: value}) for name, value in values.items()
            }
            told = {name: [FIELDS[name][1], plain(value)] for name, value in values.items()}
            dtypes = {name: dtype for name, (dtype, _, _) in FIELDS.items()}
            rows.append(written(client, address, view_name, joins, index, dtypes, messages, told, time))
    for index, (lists, time) in enumerate(zip(LIST_ROWS, TIMES, strict=True)):
        messages, told = {}, {}
        for name, value in lists.items():
            type_ = LISTS[name][1]
            [messages[name]] = python_values_to_proto_values([value], ValueType[type_])
            told[name] = [type_, plain(listed(messages[name], type_))]
        joins = [("applicant_id", "INT64", "int64_val", [17, 18, 19, 20, 21, 22])]
        dtypes = {name: dtype for name, (dtype, _) in LISTS.items()}
        rows.append(written(client, address, "series", joins, index, dtypes, messages, told, time))
    target.write_text(json.dumps({"feast": version("feast"), "rows": rows}, indent=1, ensure_ascii=False) + "\n")


def written(
    client: Any,
    address: str,
    view_name: str,
    joins: list[tuple[str, str, str, list[int] | list[str]]],
    index: int,
    dtypes: dict[str, Any],
    messages: dict[str, Any],
    told: dict[str, list[object]],
    time: datetime,
) -> dict[str, object]:
    """One row, written by the SDK into an empty database, and what it left there."""
    config = RepoConfig(
        project="credit",
        provider="local",
        registry="/tmp/feast-registry.db",  # noqa: S108 - named only, never opened
        online_store={"type": "redis", "connection_string": f"{address},db={DATABASE}"},
        entity_key_serialization_version=3,
    )
    view = FeatureView(
        name=view_name,
        entities=[Entity(name=name, join_keys=[name], value_type=TYPES[kind]) for name, kind, _, _ in joins],
        ttl=timedelta(days=1),
        schema=[Field(name=name, dtype=dtype) for name, dtype in dtypes.items()],
        source=FileSource(name=f"{view_name}_source", path="none.parquet", timestamp_field="event_timestamp"),
    )
    key = EntityKey(
        join_keys=[name for name, _, _, _ in joins],
        entity_values=[Value(**{member: given[index]}) for _, _, member, given in joins],
    )
    client.flushdb()
    RedisOnlineStore().online_write_batch(config, view, [(key, messages, time, None)], None)
    [stored_key] = client.keys()
    return {
        "project": "credit",
        "view": view_name,
        "entities": {name: [kind, given[index]] for name, kind, _, given in joins},
        "values": told,
        "event_time_ms": (time - EPOCH) // timedelta(milliseconds=1),
        "key": stored_key.hex(),
        "hash": {field.hex(): value.hex() for field, value in sorted(client.hgetall(stored_key).items())},
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).with_name("feast_rows.json")))
