"""The benchmark's callers: each sends a request, waits for its reply, and sends the next.

Run: ``python -m bench.load BOOTSTRAP REQUESTS_TOPIC REPLIES_TOPIC PARTITION PATH CALLERS REQUESTS PREFIX``; it prints
one line of JSON: seconds, and latencies in milliseconds.
"""

import asyncio
import sys
import time
import uuid
from typing import Any

import orjson
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

REPLY_WITHIN_S = 30.0


async def run(arguments: list[str]) -> dict[str, Any]:
    """Send, wait, measure."""
    bootstrap, requests, replies = arguments[:3]
    partition, path, callers, total, prefix = (
        int(arguments[3]), arguments[4], int(arguments[5]), int(arguments[6]), arguments[7],
    )  # fmt: skip
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, linger_ms=0)
    await consumer.start()
    await producer.start()
    mine = TopicPartition(replies, partition)
    consumer.assign([mine])
    await consumer.seek_to_end(mine)
    await consumer.position(mine)
    waiting: dict[bytes, asyncio.Future[None]] = {}
    address = [("kafka_replyTopic", replies.encode()), ("kafka_replyPartition", partition.to_bytes(4, "big"))]
    latencies: list[float] = []
    numbers = iter(range(total))
    unexpected = 0

    async def receive() -> None:
        nonlocal unexpected
        async for record in consumer:
            status = next((value for name, value in record.headers if name == "status"), b"completed")
            unexpected += status != b"completed"
            for name, value in record.headers:
                if name == "kafka_correlationId" and value in waiting:
                    waiting.pop(value).set_result(None)

    async def call() -> None:
        loop = asyncio.get_running_loop()
        for number in numbers:
            request_id = f"{prefix}-{number}"
            correlation = uuid.uuid4().bytes
            body = orjson.dumps(
                {
                    "request_id": request_id,
                    "path": path,
                    "entities": {"customer_id": number % 1_000},
                    "inputs": {"amount": 5000.0, "months": 24.0},
                }
            )
            waiting[correlation] = replied = loop.create_future()
            started = time.perf_counter()
            await producer.send(
                requests, body, key=request_id.encode(), headers=[*address, ("kafka_correlationId", correlation)]
            )
            await asyncio.wait_for(replied, REPLY_WITHIN_S)
            latencies.append((time.perf_counter() - started) * 1000)

    receiver = asyncio.create_task(receive())
    started = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    seconds = time.perf_counter() - started
    receiver.cancel()
    await producer.stop()
    await consumer.stop()
    return {"seconds": seconds, "latencies_ms": latencies, "unexpected": unexpected}


if __name__ == "__main__":
    print(orjson.dumps(uvloop.run(run(sys.argv[1:]))).decode())
