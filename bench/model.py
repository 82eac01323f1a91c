"""The benchmark's model: an Open Inference Protocol v2 server that answers at once.

It costs as little as a server can, so that the ratios speak of the worker. Run: ``python -m bench.model PORT``.
"""

import asyncio
import sys
from typing import cast

import uvloop

ROWS_MAX = 512
_SHAPE = b'"shape":['


def _answer(rows: int) -> bytes:
    data = b",".join([b"0.25"] * rows)
    output = b'{"name":"score","shape":[%d],"datatype":"FP64","data":[%b]}' % (rows, data)
    body = b'{"model_name":"m","model_version":"1","outputs":[%b]}' % output
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


ANSWERS = tuple(_answer(rows) for rows in range(ROWS_MAX + 1))
"""The answer to so many rows."""


def rows_of(body: bytes) -> int:
    """How many rows a request has: its first input's shape begins with that.

    >>> rows_of(b'{"inputs":[{"name":"amount","shape":[32,1],"datatype":"FP64","data":[]}]}')
    32
    """
    at = body.index(_SHAPE) + len(_SHAPE)
    return int(body[at : body.index(b",", at)])


class Model(asyncio.Protocol):
    """Enough HTTP/1.1 for one client that sends a content length: whole requests in, one answer each out."""

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # uvloop's transports are not registered as asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + length], self._buffer[end + 4 + length :]
            self._transport.write(ANSWERS[rows_of(body)])


async def serve(port: int) -> None:
    """Serve until ended."""
    server = await asyncio.get_running_loop().create_server(Model, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
