"""A load's journal, held against the topics as they are; its wait for the features workers, by what they committed."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.adapters import feature_load
from app.adapters.feature_load import Journal, TopicNow, await_stored
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


def begun(tmp_path: Path) -> tuple[Path, Path]:
    """A file, and the directory of a journal that says its 50 rows are offsets 10 to 60 of partition 1."""
    file, directory = tmp_path / "rows.csv", tmp_path / "data"
    file.write_text("a\n")
    journal = Journal.open(Settings(data_dir=directory), file, view="v")
    journal.rows, journal.starts, journal.ends, journal.letters = 50, {1: 10}, {1: 60}, {0: 3, 1: 4}
    journal.topics = {"updates": "u1", "letters": "l1"}
    journal.save()
    return file, directory


@pytest.mark.parametrize(
    ("updates", "letters", "said"),
    [
        (("u1", {0: (0, 9), 1: (0, 60)}), ("l1", {0: (0, 3), 1: (4, 4)}), None),
        # What others sent before and after is of no account.
        (("u1", {0: (9, 9), 1: (10, 99)}), ("l1", {0: (1, 8), 1: (2, 4)}), None),
        (("u2", {0: (0, 9), 1: (0, 60)}), ("l1", {0: (0, 3), 1: (4, 4)}), "topic updates was created anew"),
        (("u1", {0: (0, 9), 1: (0, 60)}), ("l2", {0: (0, 3), 1: (4, 4)}), "topic letters was created anew"),
        (("u1", {0: (0, 9), 1: (0, 59)}), ("l1", {0: (0, 3), 1: (4, 4)}), "partition 1 of updates ends at 59"),
        (("u1", {0: (0, 9)}), ("l1", {0: (0, 3), 1: (4, 4)}), "partition 1 of updates ends at 0"),
        (("u1", {0: (0, 9), 1: (11, 60)}), ("l1", {0: (0, 3), 1: (4, 4)}), "deleted records of partition 1 of updates"),
        (("u1", {0: (0, 9), 1: (0, 60)}), ("l1", {0: (4, 4), 1: (4, 4)}), "deleted records of partition 0 of letters"),
        (("u1", {0: (0, 9), 1: (0, 60)}), ("l1", {0: (0, 3), 1: (0, 3)}), "partition 1 of letters ends at 3"),
    ],
)
def test_a_journal_holds_only_for_the_records_it_is_of(
    tmp_path: Path,
    updates: tuple[str, dict[int, tuple[int, int]]],
    letters: tuple[str, dict[int, tuple[int, int]]],
    said: str | None,
) -> None:
    """Not where a topic is another of its name, or has lost some: what was stored of them cannot be known."""
    file, directory = begun(tmp_path)
    journal = Journal.open(Settings(data_dir=directory), file, view="v")
    assert (journal.rows, journal.starts, journal.ends) == (50, {1: 10}, {1: 60})
    why = journal.void(TopicNow("updates", *updates), TopicNow("letters", *letters))
    assert (why is None) if said is None else (why is not None and said in why)


def test_a_journal_that_is_void_begins_anew(tmp_path: Path) -> None:
    """As that of a load that never ran, in the same place."""
    file, directory = begun(tmp_path)
    journal = Journal.open(Settings(data_dir=directory), file, view="v")
    journal.clear()
    assert journal == Journal(journal.path)
