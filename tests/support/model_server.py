"""A model server on a real socket whose every fault can be asked for: an aiohttp server, and one below HTTP.

``python -m tests.support.model_server`` answers in a process of its own: it prints its URL, and ends with its input.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

Handler = Callable[[web.BaseRequest, dict[str, Any]], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Call:
    """One request as the server read it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass(slots=True)
class ModelServer:
    """A running server: where it listens, what it was asked, and how it answers."""

    url: str
    handler: Handler
    calls: list[Call] = field(default_factory=list)


async def doubled(_: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    """Answer tensor ``y`` with twice the first input of each row."""
    data = [2 * value for value in body["inputs"][0]["data"]]
    return respond({"outputs": [tensor("y", [len(data)], data)]})


def tensor(name: str, shape: list[int], data: list[Any], datatype: str = "FP64") -> dict[str, Any]:
    """An output tensor."""
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def respond(body: Any, status: int = 200) -> web.Response:
    """A JSON response; bytes go as they are."""
    return web.Response(
        body=body if isinstance(body, bytes) else orjson.dumps(body), status=status, content_type="application/json"
    )


@asynccontextmanager
async def serving(handler: Handler = doubled) -> AsyncIterator[ModelServer]:
    """A server on a free port of this host."""
    server = ModelServer("", handler)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        server.calls.append(Call(request.path, dict(request.headers), body))
        return await server.handler(request, body)

    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield server
    finally:
        await runner.cleanup()


Script = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[str]:
    """A TCP server that runs ``script(number of the connection, reader, writer)``; yields its URL."""
    opened = 0
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await script(opened, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One request's body, from a keep-alive connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
    )
    return await reader.readexactly(length)


async def _until_input_ends() -> None:
    async with serving() as server:
        print(server.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_until_input_ends())
