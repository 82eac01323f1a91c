"""Admission: a request topic's record in; a request to decide on out, or the refusal of what cannot become one.

Nothing is left without an answer: whatever the bytes are, there is an id to answer under, and the reply address is
read before anything that can fail.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from app.domain.errors import Code, Problem, RequestRefused, Undecodable
from app.domain.requests import (
    Headers,
    InboundRecord,
    ReplyAddress,
    Request,
    RequestId,
    digest_of_bytes,
    identify,
    read_address,
    read_envelope,
    read_request,
)
from app.ports.log import Replies
from app.settings import Settings


class Decoder(Protocol):
    """Turns a request's bytes into its members."""

    async def decode(self, content_type: str, value: bytes | None) -> Mapping[str, Any]:
        """Raises Undecodable; StoreUnavailable while the schema registry is away."""
        ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """A record as it was admitted: ``request`` or, where there is none, the problem. ``dead`` bytes are kept aside.

    ``address`` is None where no reply can or may be sent.
    """

    record: InboundRecord
    request_id: RequestId
    body: str
    content_type: str
    address: ReplyAddress | None
    traceparent: bytes | None
    request: Request | None = None
    problem: Problem | None = None
    dead: bool = False


class Admission:
    """Reads records under the settings' bounds and the reply topics that there are."""

    def __init__(self, decoder: Decoder, replies: Replies, settings: Settings) -> None:
        self._decoder = decoder
        self._replies = replies
        self._settings = settings

    async def admit(self, record: InboundRecord) -> Arrival:
        """What ``record`` asks for. Raises StoreUnavailable where that cannot be known yet."""
        address, problem = await self._address(record)
        traceparent = next((value for name, value in record.headers if name == "traceparent"), None)
        try:
            if problem is not None:
                raise RequestRefused(problem)
            size = len(record.value or b"")
            if size > self._settings.request_bytes_max:
                said = f"the request has {size} bytes; {self._settings.request_bytes_max} are allowed"
                raise RequestRefused(Problem(Code.REQUEST_TOO_LARGE, said))
            request = await self.read(record)
        except RequestRefused as refused:
            dead = isinstance(refused, Undecodable)
            body = digest_of_bytes(record.value)
            content_type = content_type_of(record.headers)
            return Arrival(
                record, identify(record), body, content_type, address, traceparent, None, refused.problem, dead
            )
        return Arrival(record, request.request_id, request.body, request.content_type, address, traceparent, request)

    async def read(self, record: InboundRecord) -> Request:
        """The request in ``record``. Raises RequestRefused, Undecodable, StoreUnavailable."""
        envelope = read_envelope(record)
        return read_request(envelope, await self._decoder.decode(envelope.content_type, record.value), record)

    async def _address(self, record: InboundRecord) -> tuple[ReplyAddress | None, Problem | None]:
        address = read_address(record.headers)
        if address is None:
            return None, None
        if not address.allowed_by(self._settings.reply_topics_allowed, self._settings.topic_prefix):
            said = f"reply topic {address.topic[:200]} is not allowed: BROKER_REPLY_TOPICS_ALLOWED names those that are"
        elif not await self._replies.has_partition(address.topic, address.partition):
            which = address.topic[:200] if address.partition is None else f"{address.topic[:200]}/{address.partition}"
            said = f"reply topic {which} does not exist: create it, or name one that does"
        else:
            return address, None
        return None, Problem(Code.REPLY_TOPIC_NOT_ALLOWED, said)


def content_type_of(headers: Headers) -> str:
    """The content type as it was sent, for the record of a request whose headers cannot be understood."""
    named = next((value for name, value in headers if name in ("content-type", "contentType")), b"application/json")
    return named[:100].decode(errors="replace")
