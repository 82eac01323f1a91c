"""Request and reply: a decision asked for through the log, and waited for."""

from dataclasses import dataclass
from typing import Protocol

from app.domain.requests import Headers


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as it came."""

    value: bytes
    headers: Headers

    def header(self, name: str) -> str | None:
        """A header's text; None where there is none, or none that can be read."""
        for key, value in self.headers:
            if key == name:
                try:
                    return value.decode()
                except UnicodeDecodeError:
                    return None
        return None


class RequestReply(Protocol):
    """Sends requests to the broker's workers and brings their replies."""

    async def call(
        self, body: bytes, *, request_id: str, wait_ms: int, deadline_ms: int | None = None, headers: Headers = ()
    ) -> Reply:
        """Send a request and wait for its reply for ``wait_ms`` at most.

        ``deadline_ms`` (epoch milliseconds) and ``headers`` travel with it.

        Raises:
            RepliesFull: too many wait already; nothing was sent.
            RecordTooLarge: Kafka does not take a record of this size; nothing was sent.
            PublishFailed: Kafka did not acknowledge the request in time; it may or may not have been written.
            ReplyTimeout: the request is in Kafka, and no reply came in time.
        """
        ...

    async def submit(
        self, body: bytes, *, request_id: str, wait_ms: int, deadline_ms: int | None = None, headers: Headers = ()
    ) -> None:
        """Send a request that wants no reply; returns once Kafka has acknowledged it. Raises as ``call``."""
        ...

    async def ping(self) -> None:
        """Raises StoreUnavailable unless Kafka answers and replies can arrive."""
        ...

    @property
    def alive(self) -> bool:
        """Whether replies are being read; once False, only a restart helps."""
        ...
