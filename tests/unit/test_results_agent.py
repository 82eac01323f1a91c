"""The results agent: what becomes of bytes that are no result."""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any
from unittest.mock import MagicMock

import pytest

from app.agents import results
from app.domain.requests import InboundRecord
from app.ports.log import OutboundRecord

RECORD = InboundRecord("inference.results", 3, 7, 0, b"k", b"?", ())


class OneRecord:
    """An intake whose stream is one record."""

    def __init__(self, _: object, *, in_flight_max: int) -> None:
        self.in_flight_max = in_flight_max

    async def each(self, _: object, handle: Callable[[InboundRecord], Awaitable[None]]) -> None:
        """See Intake."""
        await handle(RECORD)


class Letters:
    """A publisher that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[OutboundRecord] = []

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See Publisher."""
        self.records += records
        return range(len(records))


async def test_bytes_that_are_no_result_are_buried_by_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go to the dead-letter topic as they came, under a kind that is the contract's and no exception's name."""
    monkeypatch.setattr(results, "Intake", OneRecord)
    app, decider, letters = MagicMock(), MagicMock(), Letters()
    results.attach(app, topic=RECORD.topic, decider=decider, publisher=letters, group="decide", in_flight_max=1)
    ((agent,), _) = app.agent.return_value.call_args
    run: Callable[[Any], Coroutine[Any, Any, None]] = agent
    await run(None)
    [letter] = letters.records
    assert (letter.topic, letter.partition, letter.value) == ("inference.results-dlt", 3, b"?")
    assert dict(letter.headers)["kafka_dlt-exception-fqcn"] == b"result_malformed"
    decider.on_result.assert_not_called()
