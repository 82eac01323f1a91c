"""Timers of joins: due times in, a call at or after each out.

One heap and one task for a whole worker, whatever the number of joins that wait. A timer says when to look at a join,
not why, and cannot be cancelled; whoever is called looks whether there is something to do.
"""

import asyncio
import heapq
from collections.abc import Callable
from typing import Final

from app.ports.clock import Clock

_CALLS_A_TURN: Final = 256


class Timers:
    """The moments at which joins are to be looked at."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[int, int, str]] = []
        self._earlier = asyncio.Event()

    def __len__(self) -> int:
        """How many timers wait."""
        return len(self._heap)

    def at(self, due_ms: int, partition: int, request_id: str) -> None:
        """Set a timer, in epoch milliseconds."""
        heapq.heappush(self._heap, (due_ms, partition, request_id))
        if self._heap[0][0] == due_ms:
            self._earlier.set()

    def drop(self, partitions: frozenset[int]) -> None:
        """Forget the timers of ``partitions``."""
        self._heap = [entry for entry in self._heap if entry[1] not in partitions]
        heapq.heapify(self._heap)

    async def run(self, on_due: Callable[[int, str], None]) -> None:
        """Call ``on_due(partition, request_id)`` for each timer, in order of due times, until cancelled."""
        while True:
            self._earlier.clear()
            now_ms = self._clock.now_ms()
            called = 0
            while self._heap and self._heap[0][0] <= now_ms:
                _, partition, request_id = heapq.heappop(self._heap)
                on_due(partition, request_id)
                called += 1
                if called % _CALLS_A_TURN == 0:
                    # Many may be due at once, as after a time without workers; the loop has more to do.
                    await asyncio.sleep(0)
            wait_s = (self._heap[0][0] - now_ms) / 1000 if self._heap else None
            try:
                # Not wait_for, which may lose a cancellation that comes together with the event (CPython issue 86296).
                async with asyncio.timeout(wait_s):
                    await self._earlier.wait()
            except TimeoutError:
                continue
