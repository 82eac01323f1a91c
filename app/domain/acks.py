"""Acknowledging in order: offsets finish in any order, and only the finished prefix may be committed.

Faust commits one past the highest acknowledged offset even where an earlier one is unfinished (its check is off by
one), so what is acknowledged to it must already be contiguous. That is this module's whole purpose.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class OrderedAcks(Generic[T]):
    """One partition's started and finished offsets, each with what acknowledges it.

    >>> acks = OrderedAcks()
    >>> all(acks.start(offset, f"ack {offset}") for offset in (5, 6, 7))
    True
    >>> list(acks.finish(6)), list(acks.finish(5)), acks.oldest
    ([], ['ack 5', 'ack 6'], 7)
    """

    def __init__(self) -> None:
        self._order: deque[int] = deque()
        self._started: dict[int, T] = {}
        self._finished: set[int] = set()

    def start(self, offset: int, acknowledgement: T) -> bool:
        """Work on ``offset`` begins; False, and nothing changes, where it has begun already.

        Around a rebalance the same record can come twice, and one that was fetched ahead before an earlier one.

        >>> acks = OrderedAcks()
        >>> [acks.start(offset, offset) for offset in (7, 7, 6)], list(acks.finish(7)), list(acks.finish(6))
        ([True, False, True], [], [6, 7])
        """
        if offset in self._started:
            return False
        if self._order and offset < self._order[-1]:
            insort(self._order, offset)
        else:
            self._order.append(offset)
        self._started[offset] = acknowledgement
        return True

    def finish(self, offset: int) -> Iterator[T]:
        """Work on ``offset`` has ended; yields what may be acknowledged now, in order."""
        if offset in self._started:
            self._finished.add(offset)
        released = []
        while self._order and self._order[0] in self._finished:
            done = self._order.popleft()
            self._finished.discard(done)
            released.append(self._started.pop(done))
        return iter(released)

    @property
    def oldest(self) -> int | None:
        """The lowest unfinished offset, or None."""
        return self._order[0] if self._order else None

    def __len__(self) -> int:
        """How many started offsets are not yet released."""
        return len(self._order)
