"""Time and chance as commands meet them: when something is published, and how long to step aside for another publisher.

Publishers fence one another: the last one to begin goes through, and who was at it is refused. So whoever begins again
at once only fences the other in turn; each waits for a random time instead, longer with every attempt.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_FIRST_S: Final = 1.0
"""About as long as a publication takes."""
_LONGEST_S: Final = 4.0


def pause_s(attempt: int, drawn: float) -> float:
    """For how long to step aside after ``attempt`` (0: the first), in seconds; ``drawn`` is uniform in [0, 1).

    >>> pause_s(0, 0.5), pause_s(1, 0.5), pause_s(9, 0.5)
    (0.5, 1.0, 2.0)
    """
    return drawn * min(_FIRST_S * (1 << attempt), _LONGEST_S)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Pace:
    """``now_ms`` gives epoch milliseconds, ``draw`` a number in [0, 1); ``sleep`` takes seconds."""

    now_ms: Callable[[], int] = _now_ms
    draw: Callable[[], float] = random.random
    sleep: Callable[[float], None] = time.sleep

    def step_aside(self, attempt: int) -> None:
        """Wait for another publisher, after ``attempt`` (0: the first)."""
        self.sleep(pause_s(attempt, self.draw()))


PACE: Final = Pace()
"""The machine's own."""
