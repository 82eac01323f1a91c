"""Time, as an argument."""

from typing import Protocol


class Clock(Protocol):
    """Wall time for records and deadlines, and a steady one for latencies."""

    def now_ms(self) -> int:
        """Epoch milliseconds."""
        ...

    def steady_ms(self) -> float:
        """Milliseconds from an arbitrary point, never going back."""
        ...
