"""A circuit breaker: what has failed again and again is not asked for a while, so that nobody waits for it.

Closed, all is admitted. A run of failures without one success, long enough and of some length in time, opens it: then
nothing is admitted until ``open_ms`` have passed, and one caller is let through to try (half-open). Its success closes
the breaker, its failure opens it anew; a trial that is never heard of again makes way for the next after ``trial_ms``.

The pattern is Michael Nygard's (*Release It!*, 2007). That a run must last ``failing_ms`` keeps a single stall of this
process, in which many calls time out at once, from being taken for an outage of the other side.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

COUNTED_FROM_MS: Final = 50
"""The least time after which silence is the other side's failure: a caller with less may be impatient with a healthy
one."""


class BreakerState(StrEnum):
    """What a breaker does with the next call: admit it, refuse it, or wait for the trial's outcome."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens, and for how long. Times in milliseconds of the clock that its callers pass."""

    failures: int = 3
    failing_ms: float = 200.0
    open_ms: float = 1_000.0
    trial_ms: float = 1_000.0


@dataclass(frozen=True, slots=True)
class Breaker:
    """A breaker's state: of CLOSED, the failures since the last success and when the first came; else since when.

    >>> policy = BreakerPolicy(failures=2, failing_ms=0, open_ms=100)
    >>> opened = CLOSED.failed(0, policy).failed(1, policy)
    >>> opened.state.value, opened.admit(50, policy)[1], opened.admit(101, policy)[1]
    ('open', False, True)
    """

    state: BreakerState = BreakerState.CLOSED
    failures: int = 0
    since_ms: float = 0.0

    def admit(self, now_ms: float, policy: BreakerPolicy) -> "tuple[Breaker, bool]":
        """Whether a call may be made now."""
        if self.state is BreakerState.CLOSED:
            return self, True
        wait_ms = policy.open_ms if self.state is BreakerState.OPEN else policy.trial_ms
        if now_ms - self.since_ms < wait_ms:
            return self, False
        return Breaker(BreakerState.HALF_OPEN, self.failures, now_ms), True

    def succeeded(self) -> "Breaker":
        """A call was answered, whenever it was made: the other side is there."""
        return CLOSED

    def failed(self, now_ms: float, policy: BreakerPolicy) -> "Breaker":
        """A call was not answered."""
        if self.state is BreakerState.OPEN:
            return self
        failures = self.failures + 1
        since_ms = self.since_ms if self.failures else now_ms
        if self.state is BreakerState.HALF_OPEN or (
            failures >= policy.failures and now_ms - since_ms >= policy.failing_ms
        ):
            return Breaker(BreakerState.OPEN, failures, now_ms)
        return Breaker(BreakerState.CLOSED, failures, since_ms)


CLOSED: Final = Breaker()
