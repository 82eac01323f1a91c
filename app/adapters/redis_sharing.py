"""Commands that share an exchange: reads of several requests in, as few round trips as Redis is busy for out.

What ``row_sharing`` does for models, for Redis: a read goes at once while fewer than ``EXCHANGES_MAX`` are under way;
those that come meanwhile go together, on one connection and in one write, when one returns. Nothing waits for company.
Most of what a read costs a worker is the exchange around it, and not the commands in it.

Each read keeps its own time limit, and whoever stops waiting takes nothing from the others. A refused command is an
answer of its own; what ends an exchange (a connection that breaks) ends it for all that share it, as it would for each.
Whatever that was, it reaches them as StoreUnavailable: a cancellation would end work that nobody wanted ended.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from app.domain.errors import StoreUnavailable

log = structlog.get_logger()

EXCHANGES_MAX: Final = 2
"""One that Redis works on and one on its way."""
COMMANDS_MAX: Final = 256
"""Commands of one exchange: Redis answers them in one go, and the first waits for the last."""

Ask = Callable[[Sequence[bytes], int], Awaitable[list[Any]]]
"""Packed commands and a time limit in milliseconds in, their answers in order out; raises StoreUnavailable."""


@dataclass(slots=True)
class _Read:
    """A read that waits for an exchange, and then for its answers."""

    commands: Sequence[bytes]
    timeout_ms: int
    answers: "asyncio.Future[list[Any]]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class SharedExchanges:
    """``ask`` as it is given, with fewer exchanges."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._exchanges = 0
        self._waiting: deque[_Read] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, commands: Sequence[bytes], timeout_ms: int) -> list[Any]:
        """The commands' answers, in order. Raises StoreUnavailable."""
        if self._exchanges >= EXCHANGES_MAX:
            return await self._in_turn(_Read(commands, timeout_ms))
        self._exchanges += 1
        try:
            return await self._ask(commands, timeout_ms)
        finally:
            self._returned()

    async def _in_turn(self, read: _Read) -> list[Any]:
        self._waiting.append(read)
        timer = asyncio.get_running_loop().call_later(read.timeout_ms / 1000, _expire, read)
        try:
            return await read.answers
        finally:
            timer.cancel()

    def _returned(self) -> None:
        """An exchange has ended: the reads that have gathered go."""
        self._exchanges -= 1
        while self._waiting and self._exchanges < EXCHANGES_MAX:
            gathered, commands = list[_Read](), list[bytes]()
            while self._waiting and len(commands) < COMMANDS_MAX:
                read = self._waiting.popleft()
                if not read.answers.done():
                    gathered.append(read)
                    commands += read.commands
            if gathered:
                self._exchanges += 1
                # A task of its own: whoever waits for one of the reads may be cancelled, and the exchange goes on.
                task = asyncio.create_task(self._exchange(gathered, commands))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _exchange(self, gathered: Sequence[_Read], commands: Sequence[bytes]) -> None:
        try:
            answers = iter(await self._ask(commands, max(read.timeout_ms for read in gathered)))
            for read in gathered:
                own = [next(answers) for _ in read.commands]
                if not read.answers.done():
                    read.answers.set_result(own)
        except StoreUnavailable as error:
            _fail(gathered, str(error))
        except Exception as error:  # there is nobody else to whom this could be raised
            log.exception("feature_exchange_failed", commands=len(commands))
            _fail(gathered, f"Redis is not usable: {error!r}")
        finally:
            for read in gathered:
                read.answers.cancel()  # nobody is left, unless this was cancelled by close()
            self._returned()

    async def close(self) -> None:
        """Give up what is under way."""
        while self._waiting:
            self._waiting.popleft().answers.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _fail(gathered: Sequence[_Read], reason: str) -> None:
    for read in gathered:
        if not read.answers.done():
            # Each its own: an exception that is raised twice would carry both traces.
            read.answers.set_exception(StoreUnavailable(reason))


def _expire(read: _Read) -> None:
    if not read.answers.done():
        read.answers.set_exception(StoreUnavailable(f"Redis did not answer within {read.timeout_ms} ms"))
