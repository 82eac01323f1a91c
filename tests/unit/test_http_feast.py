"""Answers of feature servers, read without a server."""

import time
from collections.abc import Iterator

import orjson
import pytest

from app.adapters.http_feast import read_answer
from app.domain.features import EntityKey, ViewNeed
from app.domain.view_documents import HttpSource

SOURCE = HttpSource.model_validate({"type": "http", "endpoints": ("http://127.0.0.1:1",)})
NEED = ViewNeed("v", EntityKey("", ("id",), (17,), ("INT64",)), ("age",), ("INT64",), SOURCE)


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process whose local time is nine hours ahead."""
    monkeypatch.setenv("TZ", "JST-9")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_from_utc")
@pytest.mark.parametrize("time_", ["2026-11-23T00:00:00", "2026-11-23T00:00:00Z", "2026-11-23T01:00:00+01:00"])
def test_a_time_without_a_zone_is_utc(time_: str) -> None:
    """As Feast writes them, wherever the worker runs: local time would make values hours younger or older."""
    column = {"values": [41], "statuses": ["PRESENT"], "event_timestamps": [time_]}
    body = orjson.dumps({"metadata": {"feature_names": ["v__age"]}, "results": [column]})
    assert read_answer(body, NEED, SOURCE)["v", "age"].event_time_ms == 1_795_392_000_000
