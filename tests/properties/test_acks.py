"""Ordered acknowledgements: whatever order work ends in, only a finished prefix is released, and all of it once."""

from hypothesis import given
from hypothesis import strategies as st

from app.domain.acks import OrderedAcks


@given(st.sets(st.integers(0, 60), min_size=1), st.data())
def test_never_past_an_unfinished_offset(offsets: set[int], data: st.DataObject) -> None:
    """After each end, what has been released is exactly the offsets below the oldest unfinished one, in order."""
    acks: OrderedAcks[str] = OrderedAcks()
    order = sorted(offsets)
    for offset in order:
        assert acks.start(offset, f"ack {offset}")
    released: list[str] = []
    finished: set[int] = set()
    ends = data.draw(st.lists(st.sampled_from(order), max_size=80)) + data.draw(st.permutations(order))
    for offset in ends:
        released.extend(acks.finish(offset))
        finished.add(offset)
        prefix = [each for each in order if all(lower in finished for lower in order if lower <= each)]
        assert released == [f"ack {each}" for each in prefix]
        assert acks.oldest == next((each for each in order if each not in prefix), None)
        assert len(acks) == len(order) - len(prefix)
    assert len(released) == len(order)


@given(st.data())
def test_starts_and_ends_interleaved(data: st.DataObject) -> None:
    """Offsets begin while others are at work, some twice: none is released early, twice, or out of order."""
    acks: OrderedAcks[int] = OrderedAcks()
    at_work: set[int] = set()
    released: list[int] = []
    following = 0
    for begin in data.draw(st.lists(st.booleans(), max_size=60)):
        if begin or not at_work:
            assert acks.start(following, following)
            assert not acks.start(following, -1)
            at_work.add(following)
            following += 1
        else:
            done = data.draw(st.sampled_from(sorted(at_work)))
            at_work.remove(done)
            released.extend(acks.finish(done))
            assert all(offset > max(released, default=-1) for offset in at_work)
    for offset in sorted(at_work, reverse=True):
        released.extend(acks.finish(offset))
    assert released == list(range(following))


def test_an_unknown_offset_releases_nothing() -> None:
    """What was never begun here cannot end here."""
    acks: OrderedAcks[int] = OrderedAcks()
    acks.start(5, 5)
    assert list(acks.finish(6)) == []
    assert acks.oldest == 5
