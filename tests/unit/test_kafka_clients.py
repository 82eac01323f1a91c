"""Closing Kafka's clients ends, whatever they do, and never ends who closes them."""

import asyncio

import structlog

from app.adapters.kafka_clients import close_clients


async def test_a_client_that_looks_cancelled_does_not_end_its_closer() -> None:
    """aiokafka's consumer passes the CancelledError of its own fetch on; the other client is closed all the same."""
    closed = []

    async def consumer() -> None:
        fetch = asyncio.ensure_future(asyncio.get_running_loop().create_future())
        fetch.cancel()
        await fetch

    async def admin() -> None:
        closed.append("admin")

    await close_clients(consumer(), admin())
    assert closed == ["admin"]


async def test_a_client_that_fails_is_told() -> None:
    """What is being stopped goes on stopping; the log says why a client was left."""

    async def broken() -> None:
        raise OSError("no route")

    with structlog.testing.capture_logs() as logs:
        await close_clients(broken())
    assert [(each["event"], each["reason"]) for each in logs] == [("kafka_client_not_closed", "OSError('no route')")]


async def test_a_cancellation_passes_through() -> None:
    """Who is cancelled while it closes clients does not wait for them."""
    began = asyncio.Event()

    async def endless() -> None:
        began.set()
        await asyncio.get_running_loop().create_future()

    closer = asyncio.create_task(close_clients(endless()))
    await began.wait()
    closer.cancel()
    await asyncio.wait({closer})
    assert closer.cancelled()
