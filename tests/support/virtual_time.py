"""An event loop whose time is a number: sleeping costs nothing, and every run is the same run.

When nothing is ready, the clock jumps to the next timer. When nothing is ready and no timer is set, nothing will ever
happen, and the loop says so instead of hanging.
"""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, Final, ParamSpec

P = ParamSpec("P")
START_MS: Final = 1_750_000_000_000


class Deadlock(AssertionError):
    """All tasks wait for something that nobody will bring."""


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise Deadlock("every task waits, and no timer is set")
        self.now_s += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time begins at zero and moves only where nothing is left to do."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._jumping.now_s


class VirtualClock:
    """The ``Clock`` of a virtual loop; ``start_ms`` is the moment at which the loop was made."""

    def __init__(self, loop: asyncio.AbstractEventLoop, start_ms: int = START_MS) -> None:
        self._loop = loop
        self.start_ms = start_ms

    def now_ms(self) -> int:
        """Epoch milliseconds."""
        return self.start_ms + round(self._loop.time() * 1000)

    def steady_ms(self) -> float:
        """Milliseconds since the loop was made."""
        return self._loop.time() * 1000


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that runs on a virtual loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run
