"""What a call costs in CPU beside a minimal aiohttp call: printed for whoever changes the hot path, never asserted."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator

import aiohttp
import orjson
import pytest

from app.adapters.clock import SystemClock
from app.adapters.http_oip import HttpOipBackend
from tests.support.models import row_of, version_of

CALLS, CALLERS, ROUNDS = 400, 16, 3
VALUES = {f"feature_number_{number}": "some text" if number % 2 else number for number in range(14)}


@pytest.fixture
def url() -> Iterator[str]:
    """A server in a process of its own, so that this process's CPU time is the client's alone."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.model_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.stdout.close()
    process.wait(10)


async def _cost_us(call: Callable[[], Awaitable[None]]) -> float:
    """This process's CPU a call, with as many callers at once."""
    left = CALLS

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await call()

    before = time.process_time()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return (time.process_time() - before) / CALLS * 1e6


async def test_cost_of_a_call(url: str) -> None:
    """Every call succeeds; how its CPU compares is printed (run with -s)."""
    backend, version = HttpOipBackend(SystemClock()), version_of(url)
    row = row_of(VALUES, within_ms=120_000)

    async def ours() -> None:
        (answer,) = await backend.infer(version, (row,))
        assert answer.outputs == {"y": 0}

    async with aiohttp.ClientSession() as session:

        async def minimal() -> None:
            inputs = [{"name": name, "shape": [1, 1], "data": [value]} for name, value in VALUES.items()]
            body = orjson.dumps({"id": "r", "inputs": inputs})
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{url}/infer", data=body, headers=headers) as response:
                assert orjson.loads(await response.read())["outputs"]

        # Interleaved, and the best round of each: a shared machine disturbs some.
        costs = [(await _cost_us(minimal), await _cost_us(ours)) for _ in range(ROUNDS)]
    await backend.close()
    floor, cost = (min(column) for column in zip(*costs, strict=True))
    print(f"CPU a call: {cost:.0f} us, a minimal aiohttp call: {floor:.0f} us, ratio {cost / floor:.2f}")
