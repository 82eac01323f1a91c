"""Passive outlier ejection: an endpoint's failures in a row and a moment in; whether it is left out for a while, out.

Envoy's outlier detection by consecutive failures (Envoy documentation, "Outlier detection": ``consecutive_5xx``,
``base_ejection_time``, ``max_ejection_time``). So many failures in a row eject an endpoint for the base time, times how
often it was ejected, up to a bound; it comes back by itself, with nothing held against it but how often it was out. One
ejection is forgotten for each base time that it then stays in. What is heard of an endpoint while it is out counts for
nothing: those are answers to calls that began before, or that had no better endpoint to go to.

Moments are milliseconds of a steady clock.
"""

from dataclasses import dataclass

from app.domain.documents import Outlier


@dataclass(frozen=True, slots=True)
class Health:
    """What is held against an endpoint: failures in a row, ejections not yet forgotten, and until when it is out."""

    failures: int = 0
    ejections: int = 0
    until_ms: float = 0.0

    def is_ejected(self, now_ms: float) -> bool:
        """Whether it is left out."""
        return self.ejections > 0 and now_ms < self.until_ms

    def on_success(self, now_ms: float) -> "Health":
        """It answered: no failures are in a row any more.

        >>> Health(failures=3).on_success(0.0).failures
        0
        """
        if self.failures == 0 or self.is_ejected(now_ms):
            return self
        return Health(0, self.ejections, self.until_ms)

    def on_failure(self, policy: Outlier, now_ms: float) -> "Health":
        """It failed: one more in a row, and with the last one that is allowed it is out.

        >>> written = {"consecutiveFailures": 2, "baseEjection": "1s", "maxEjection": "3s"}
        >>> policy = Outlier.model_validate(written)
        >>> once = Health().on_failure(policy, 0.0).on_failure(policy, 0.0)
        >>> once.is_ejected(999.0), once.is_ejected(1_000.0)
        (True, False)
        >>> once.on_failure(policy, 1_000.0).on_failure(policy, 1_000.0).until_ms
        3000.0
        """
        if policy.consecutive_failures == 0 or self.is_ejected(now_ms):
            return self
        failures = self.failures + 1
        if failures < policy.consecutive_failures:
            return Health(failures, self.ejections, self.until_ms)
        forgotten = int((now_ms - self.until_ms) // policy.base_ejection) if self.ejections else 0
        ejections = max(0, self.ejections - forgotten) + 1
        return Health(0, ejections, now_ms + min(policy.base_ejection * ejections, policy.max_ejection))
