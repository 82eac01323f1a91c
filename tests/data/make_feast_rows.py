"""Writes feast_rows.json: what the real Feast SDK stores in Redis, to hold our codec against.

Run it with a Python that has `feast[redis]` and a Redis to spare, whose database it empties:
`python tests/data/make_feast_rows.py 127.0.0.1:6379`. It writes through the SDK's own RedisOnlineStore and reads the
hashes back raw.
"""

import json
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
from feast.types import (  # type: ignore[import-not-found]
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
}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def plain(value: object) -> object:
    """JSON's form of a value."""
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def main(address: str) -> None:
    """Write all rows of all views through the SDK, and what Redis then holds to the file beside this script."""
    client: Any = redis.Redis.from_url(f"redis://{address}/0")
    client.flushdb()
    config = RepoConfig(
        project="credit",
        provider="local",
        registry="/tmp/feast-registry.db",  # noqa: S108 - named only, never opened
        online_store={"type": "redis", "connection_string": address},
        entity_key_serialization_version=3,
    )
    store = RedisOnlineStore()
    rows = []
    for view_name, joins in KEYS.items():
        types = {"INT64": ValueType.INT64, "INT32": ValueType.INT32, "STRING": ValueType.STRING}
        entities = [Entity(name=name, join_keys=[name], value_type=types[kind]) for name, kind, _, _ in joins]
        view = FeatureView(
            name=view_name,
            entities=entities,
            ttl=timedelta(days=1),
            schema=[Field(name=name, dtype=dtype) for name, (dtype, _, _) in FIELDS.items()],
            source=FileSource(name=f"{view_name}_source", path="none.parquet", timestamp_field="event_timestamp"),
        )
        for index, (values, time) in enumerate(zip(ROWS, TIMES, strict=True)):
            key = EntityKey(
                join_keys=[name for name, _, _, _ in joins],
                entity_values=[Value(**{member: given[index]}) for _, _, member, given in joins],
            )
            messages = {
                name: Value() if value is None else Value(**{FIELDS[name][2]: value}) for name, value in values.items()
            }
            before = set(client.keys())
            store.online_write_batch(config, view, [(key, messages, time, None)], None)
            [stored_key] = set(client.keys()) - before
            rows.append(
                {
                    "project": "credit",
                    "view": view_name,
                    "entities": {name: [kind, given[index]] for name, kind, _, given in joins},
                    "values": {name: [FIELDS[name][1], plain(value)] for name, value in values.items()},
                    "event_time_ms": (time - EPOCH) // timedelta(milliseconds=1),
                    "key": stored_key.hex(),
                    "hash": {field.hex(): value.hex() for field, value in sorted(client.hgetall(stored_key).items())},
                }
            )
    target = Path(__file__).with_name("feast_rows.json")
    target.write_text(json.dumps({"feast": version("feast"), "rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
