"""A load's wait for the features workers, by what they have committed."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest

from app.adapters import feature_load
from app.adapters.feature_load import await_stored
from app.domain.errors import StoreUnavailable
from app.settings import Settings

TIMEOUT_S = 60.0


class Clock:
    """Time that passes only while somebody sleeps, ten seconds for each fifth of one."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let it pass."""
        self.now_s += 50 * seconds


@pytest.fixture
def committing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], Clock]:
    """Make the group's committed offset go through ``offsets``, of which the last stays."""

    def begin(offsets: Sequence[int]) -> Clock:
        clock, left = Clock(), iter(offsets)
        last = offsets[-1]

        def committed(asked: Sequence[SimpleNamespace], timeout: float) -> Iterator[SimpleNamespace]:
            offset = next(left, last)
            return iter([SimpleNamespace(partition=each.partition, offset=offset) for each in asked])

        consumer = SimpleNamespace(committed=committed, close=lambda: None)
        monkeypatch.setattr(feature_load, "Consumer", lambda _: consumer)
        monkeypatch.setattr(feature_load, "time", clock)
        return clock

    return begin


def test_a_load_waits_as_long_as_workers_progress(committing: Callable[[Sequence[int]], Clock]) -> None:
    """However long it takes: the time runs from what was committed last."""
    clock = committing([*range(0, 100, 2), 100])
    await_stored(Settings(), {0: 100}, TIMEOUT_S, lambda _: None)
    assert clock.now_s == 1_000 + 500


@pytest.mark.parametrize("stuck_at", [-1001, 90])
def test_a_load_does_not_wait_for_workers_that_stand_still(
    committing: Callable[[Sequence[int]], Clock], stuck_at: int
) -> None:
    """Neither where none of a group ever was, nor where they have stopped on the way."""
    ahead: list[int] = []
    clock = committing([stuck_at])
    with pytest.raises(StoreUnavailable, match=r"to go, and stored none of them for 60 s"):
        await_stored(Settings(), {0: 100}, TIMEOUT_S, ahead.append)
    assert set(ahead) == {100 - max(0, stuck_at)}
    assert clock.now_s == 1_000 + TIMEOUT_S + 10
