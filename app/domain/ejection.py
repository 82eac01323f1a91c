"""Passive outlier ejection: an endpoint's failures in a row and a moment in; whether it is left out for a while, out.

Envoy's outlier detection by consecutive failures (Envoy documentation, "Outlier detection": ``consecutive_5xx``,
``base_ejection_time``, ``max_ejection_time``), with the half-open state of a circuit breaker (Michael Nygard, *Release
It!*, 2007). So many failures in a row eject an endpoint for the base time, times how often it was ejected, up to a
bound. Then one call tries it: answered, it is back; failed, it is out again. One ejection is forgotten for each base
time that it then stays in.

Calls that run at once and fail together are one event. Only a call that began after the last failure was counted says
something new, so a stall counts once however many calls it caught. What is heard of an endpoint by calls that began
before it was to be tried counts for nothing: those had begun before it was ejected, or had no better endpoint to go to.

Moments are milliseconds of a steady clock.
"""

from dataclasses import dataclass, replace

from app.domain.version_documents import Outlier

_NEVER_MS = float("-inf")


@dataclass(frozen=True, slots=True)
class Health:
    """What is held against an endpoint: failures in a row, ejections not yet forgotten, and since when it counts.

    ``out``: it was ejected, and no trial has been answered since. ``until_ms``: of one that is out, when it is to be
    tried; of one that is back, since when. ``counted_ms``: when the last failure was counted. ``trial_until_ms``: for
    so long a trial may run before another is made, for one may never be heard of again.
    """

    failures: int = 0
    ejections: int = 0
    until_ms: float = 0.0
    out: bool = False
    counted_ms: float = _NEVER_MS
    trial_until_ms: float = _NEVER_MS

    @property
    def again_ms(self) -> float:
        """Of one that is out: when the next call may go to it."""
        return max(self.until_ms, self.trial_until_ms)

    def is_ejected(self, now_ms: float) -> bool:
        """Whether it is left out: its time runs, or a trial does."""
        return self.out and now_ms < self.again_ms

    def on_call(self, now_ms: float, trial_ms: float) -> "Health":
        """A call goes to it; if it is due to be tried, that is the trial, and for ``trial_ms`` the only one.

        >>> tried = Health(ejections=1, until_ms=10.0, out=True).on_call(10.0, 5.0)
        >>> tried.is_ejected(14.0), tried.is_ejected(15.0)
        (True, False)
        """
        if not self.out or self.is_ejected(now_ms):
            return self
        return replace(self, trial_until_ms=now_ms + trial_ms)

    def on_success(self, began_ms: float, now_ms: float) -> "Health":
        """It answered a call that began at ``began_ms``: no failures are in a row any more, and a trial is passed.

        >>> Health(failures=3).on_success(0.0, 0.0).failures
        0
        """
        if self.out:
            if began_ms < self.until_ms:
                return self
            return Health(0, self.ejections, now_ms, counted_ms=self.counted_ms)
        return replace(self, failures=0) if self.failures else self

    def on_nothing(self, began_ms: float) -> "Health":
        """A call ended that says neither: if it was the trial, another may be made."""
        if self.out and began_ms >= self.until_ms:
            return replace(self, trial_until_ms=_NEVER_MS)
        return self

    def on_failure(self, policy: Outlier, began_ms: float, now_ms: float) -> "Health":
        """It failed a call that began at ``began_ms``: one more in a row, and with the last that is allowed it is out.

        >>> written = {"consecutiveFailures": 2, "baseEjection": "1s", "maxEjection": "3s"}
        >>> policy = Outlier.model_validate(written)
        >>> stalled = Health().on_failure(policy, 0.0, 80.0).on_failure(policy, 40.0, 120.0)
        >>> stalled.failures, stalled.on_failure(policy, 120.0, 200.0).until_ms
        (1, 1200.0)
        >>> out = stalled.on_failure(policy, 120.0, 200.0)
        >>> out.is_ejected(1_199.0), out.is_ejected(1_200.0), out.on_failure(policy, 1_200.0, 1_280.0).until_ms
        (True, False, 3280.0)
        """
        if policy.consecutive_failures == 0 or began_ms < (self.until_ms if self.out else self.counted_ms):
            return self
        failures = self.failures + 1
        if not self.out and failures < policy.consecutive_failures:
            return replace(self, failures=failures, counted_ms=now_ms)
        forgotten = int((now_ms - self.until_ms) // policy.base_ejection) if self.ejections and not self.out else 0
        ejections = max(0, self.ejections - forgotten) + 1
        out_ms = min(policy.base_ejection * ejections, policy.max_ejection)
        return Health(0, ejections, now_ms + out_ms, out=True, counted_ms=now_ms)
