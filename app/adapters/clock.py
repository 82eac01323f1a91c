"""The machine's clocks behind the Clock port."""

import time


class SystemClock:
    """Wall time from the system, steady time from its monotonic clock."""

    def now_ms(self) -> int:
        """Epoch milliseconds."""
        return time.time_ns() // 1_000_000

    def steady_ms(self) -> float:
        """Milliseconds since an arbitrary point, never going back."""
        return time.perf_counter_ns() / 1_000_000
