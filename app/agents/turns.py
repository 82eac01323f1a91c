"""Turns: of those with the same key, whoever took its turn first goes first, however long each takes to get ready."""

import asyncio
from collections.abc import Hashable
from types import TracebackType
from typing import Self


class Turns:
    """The turns that are not over."""

    def __init__(self) -> None:
        self._last: dict[Hashable, Turn] = {}

    def __len__(self) -> int:
        """How many keys have one."""
        return len(self._last)

    def turn(self) -> "Turn":
        """A turn that is to be taken."""
        return Turn(self._last)


class Turn:
    """A context manager: the turn is over when it is left, taken or not."""

    __slots__ = ("_before", "_key", "_last", "_over")

    def __init__(self, last: "dict[Hashable, Turn]") -> None:
        self._last = last
        self._key: Hashable = None
        self._before: Turn | None = None
        self._over: asyncio.Event | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._over is None:
            return
        self._over.set()
        if self._last.get(self._key) is self:
            if (before := self._unfinished()) is None:
                del self._last[self._key]
            else:
                self._last[self._key] = before

    def take(self, key: Hashable) -> None:
        """Stand behind all that have taken theirs for ``key``; once."""
        if self._over is None:
            self._key, self._over = key, asyncio.Event()
            self._before = self._last.get(key)
            self._last[key] = self

    async def come(self) -> None:
        """Wait until those before it are over."""
        while (before := self._unfinished()) is not None:
            assert before._over is not None  # noqa: S101 - what is before another was taken
            await before._over.wait()

    def _unfinished(self) -> "Turn | None":
        """The next before it that is not over. One that was left before it came is; those before that may not be."""
        while self._before is not None and self._before._over is not None and self._before._over.is_set():
            self._before = self._before._before
        return self._before
