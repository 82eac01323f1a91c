"""Turns: who came first goes first."""

import asyncio

from app.agents.turns import Turns
from tests.support.virtual_time import in_virtual_time


@in_virtual_time
async def test_each_goes_on_after_those_before_it() -> None:
    """In the order in which they were taken, those of another key beside them; nothing is left of them."""
    turns, went = Turns(), []

    async def go(name: str, key: str, ready_s: float) -> None:
        with turns.turn() as turn:
            turn.take(key)
            turn.take(key)
            await asyncio.sleep(ready_s)
            await turn.come()
            went.append(name)

    async with asyncio.TaskGroup() as group:
        for each in (("a", "x", 0.3), ("b", "x", 0.1), ("c", "y", 0.2), ("d", "x", 0.0)):
            group.create_task(go(*each))
    assert went == ["c", "a", "b", "d"]
    assert len(turns) == 0


@in_virtual_time
async def test_one_that_gives_up_lets_nobody_pass_those_before_it() -> None:
    """The third waits for the first, though the second is gone."""
    turns, went = Turns(), []
    with turns.turn() as first:
        first.take("x")
        with turns.turn() as second:
            second.take("x")
        with turns.turn() as third:
            third.take("x")
            waiting = asyncio.create_task(third.come())
            await asyncio.sleep(1)
            went.append(waiting.done())
            first.__exit__()
            await waiting
    assert went == [False]
    assert len(turns) == 0


@in_virtual_time
async def test_a_turn_that_is_not_taken_waits_for_nobody() -> None:
    """As of a record whose key is not known."""
    turns = Turns()
    with turns.turn() as turn:
        await turn.come()
    assert len(turns) == 0
