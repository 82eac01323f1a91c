"""A Faust event as a record: bytes as they came."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from app.agents.delivery import inbound


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (None, ()),
        ([("a", b"1"), ("a", b"2")], (("a", b"1"), ("a", b"2"))),
        ({"a": b"1"}, (("a", b"1"),)),
        ([("empty", None)], (("empty", b""),)),
    ],
)
def test_headers(headers: Any, expected: tuple[tuple[str, bytes], ...]) -> None:
    """In their order, repetitions too; Kafka allows one without a value, which is an empty one here."""
    message = SimpleNamespace(topic="t", partition=1, offset=2, timestamp=1.5, key=b"k", value=None, headers=headers)
    record = inbound(cast(Any, SimpleNamespace(message=message)))
    assert record.headers == expected
    assert (record.position, record.timestamp_ms, record.key, record.value) == ("t/1/2", 1_500, b"k", None)
