"""Timers: due times in, calls in their order out."""

import asyncio

from app.agents.timers import Timers
from tests.support.virtual_time import START_MS, VirtualClock, in_virtual_time


class Fired:
    """What fired, and when, in milliseconds since the start."""

    def __init__(self) -> None:
        self.clock = VirtualClock(asyncio.get_running_loop())
        self.calls: list[tuple[int, int, str]] = []
        self.timers = Timers(self.clock)
        self.task = asyncio.create_task(self.timers.run(self._on_due))

    def _on_due(self, partition: int, request_id: str) -> None:
        self.calls.append((self.clock.now_ms() - START_MS, partition, request_id))


@in_virtual_time
async def test_each_fires_once_at_its_time() -> None:
    """In order of time, whatever the order they were set in; one set for the past fires at once."""
    fired = Fired()
    fired.timers.at(START_MS + 300, 0, "last")
    fired.timers.at(START_MS + 100, 1, "first")
    await asyncio.sleep(0.15)
    fired.timers.at(START_MS + 200, 0, "between")
    fired.timers.at(START_MS, 0, "overdue")
    assert len(fired.timers) == 3
    await asyncio.sleep(1)
    assert fired.calls == [(100, 1, "first"), (150, 0, "overdue"), (200, 0, "between"), (300, 0, "last")]
    assert len(fired.timers) == 0


@in_virtual_time
async def test_those_of_a_partition_are_dropped() -> None:
    """What went to another worker does not fire here."""
    fired = Fired()
    for partition in range(3):
        fired.timers.at(START_MS + 100, partition, "r")
    fired.timers.drop(frozenset({0, 2}))
    await asyncio.sleep(1)
    assert fired.calls == [(100, 1, "r")]


@in_virtual_time
async def test_a_cancellation_that_comes_together_with_a_new_timer_is_kept() -> None:
    """The task ends, or a worker that stops would wait for it."""
    fired = Fired()
    fired.timers.at(START_MS + 10, 0, "a")
    await asyncio.sleep(0.01)
    fired.timers.at(START_MS + 20, 0, "b")
    fired.task.cancel()
    await asyncio.wait({fired.task}, timeout=1)
    assert fired.task.cancelled()
