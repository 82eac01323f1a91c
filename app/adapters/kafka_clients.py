"""The end of a Kafka client, whatever its broker does.

aiokafka's consumer cancels its fetches and waits for them, one by one; where such a fetch rests before it asks a broker
that is gone once more, the wait ends in the fetch's own CancelledError. Whoever stops the consumer would take that for
a cancellation of its own, and end without a word. So a client is closed in a task of its own, and for a bounded time.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

import structlog

log = structlog.get_logger(__name__)

REQUEST_TIMEOUT_MS: Final = 10_000
"""For clients that follow a topic: a fetch waits half a second for records. aiokafka's 40 s would be the silence after
a broker that vanished without a word, or was not there yet behind a proxy that was."""
_WITHIN_S: Final = 5.0


async def close_clients(*closing: Coroutine[Any, Any, None]) -> None:
    """Run what closes clients, as ``consumer.stop()`` and ``admin.close()``, at once; what fails is logged."""
    tasks = {asyncio.create_task(each) for each in closing}
    try:
        done, late = await asyncio.wait(tasks, timeout=_WITHIN_S)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        raise
    for task in late:
        task.cancel()
        log.warning("kafka_client_not_closed", reason=f"not within {_WITHIN_S:.0f} s")
    for task in done:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.warning("kafka_client_not_closed", reason=repr(error))
