"""Rows that the real Feast SDK wrote (tests/data/make_feast_rows.py), as this project's types."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from app.domain.features import EntityKey, Value

_FILE = Path(__file__).resolve().parent.parent / "data" / "feast_rows.json"


@dataclass(frozen=True, slots=True)
class FeastRow:
    """One row: what was given to the SDK, and the Redis key and hash that it made of it."""

    view: str
    key: EntityKey
    values: dict[str, tuple[Any, Value]]
    event_time_ms: int
    stored_key: bytes
    stored_hash: dict[bytes, bytes]


def feast_rows() -> list[FeastRow]:
    """All of them."""
    rows = []
    for row in orjson.loads(_FILE.read_bytes())["rows"]:
        entities = sorted(row["entities"].items())
        key = EntityKey(
            row["project"],
            tuple(name for name, _ in entities),
            tuple(value for _, (_, value) in entities),
            tuple(type_ for _, (type_, _) in entities),
        )
        values = {name: (type_, _value(value)) for name, (type_, value) in row["values"].items()}
        stored = {bytes.fromhex(field): bytes.fromhex(value) for field, value in row["hash"].items()}
        rows.append(FeastRow(row["view"], key, values, row["event_time_ms"], bytes.fromhex(row["key"]), stored))
    return rows


def _value(value: Any) -> Value:
    if isinstance(value, list):
        return tuple(_value(each) for each in value)  # type: ignore[misc]  # lists hold no lists
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
