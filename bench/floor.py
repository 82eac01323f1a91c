"""The floor: a hand-written aiokafka loop that consumes a request, calls one model over HTTP and produces the reply.

No features, join, table or audit, and offsets committed by time: the least that anything between a caller and a model
could do in Python. Every figure of the benchmark is a ratio to what this does in the same run.

Run: ``python -m bench.floor BOOTSTRAP REQUESTS_TOPIC MODEL_URL``; it prints ``ready`` when it has its partitions.
"""

import asyncio
import sys
from typing import Any

import aiohttp
import orjson
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

IN_FLIGHT_MAX = 256


async def serve(bootstrap: str, topic: str, model_url: str) -> None:
    """Answer requests until ended."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, group_id="bench-floor", auto_offset_reset="earliest"
    )
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, linger_ms=0)
    slots = asyncio.Semaphore(IN_FLIGHT_MAX)
    tasks: set[asyncio.Task[None]] = set()
    await producer.start()
    await consumer.start()
    while not consumer.assignment():  # noqa: ASYNC110 - aiokafka has no event for it
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    async with aiohttp.ClientSession() as session:

        async def answer(record: Any) -> None:
            try:
                headers = dict(record.headers)
                request = orjson.loads(record.value)
                body = orjson.dumps(
                    {
                        "inputs": [
                            {"name": name, "shape": [1, 1], "datatype": "FP64", "data": [value]}
                            for name, value in request["inputs"].items()
                        ]
                    }
                )
                async with session.post(model_url, data=body) as response:
                    output = orjson.loads(await response.read())
                reply = orjson.dumps({"request_id": request["request_id"], "output": output["outputs"][0]["data"][0]})
                await producer.send_and_wait(
                    headers["kafka_replyTopic"].decode(),
                    reply,
                    partition=int.from_bytes(headers["kafka_replyPartition"], "big"),
                    headers=[("kafka_correlationId", headers["kafka_correlationId"])],
                )
            finally:
                slots.release()

        async for record in consumer:
            await slots.acquire()
            task = asyncio.create_task(answer(record))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    uvloop.run(serve(*sys.argv[1:4]))
