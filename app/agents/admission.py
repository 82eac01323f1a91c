"""Admission: a request topic's record in; a request to decide on out, or the refusal of what cannot become one.

Nothing is left without an answer: whatever the bytes are, there is an id to answer under, and the reply address is
read, whatever else fails.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from app.adapters.topics import is_kept
from app.domain.errors import Code, Problem, RequestRefused, Undecodable
from app.domain.requests import (
    JSON,
    Envelope,
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

HEADERS_BYTES_MAX: Final = 32_768
"""Bytes of a request's headers, names and values: the joins entry, the audit record and the reply hold them beside the
request. Traces, and what Spring says of an exception, fit well."""
_TOPIC_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")


class Decoder(Protocol):
    """Turns a request's bytes into its members."""

    async def decode(self, content_type: str, value: bytes | None) -> Mapping[str, Any]:
        """Raises Undecodable; StoreUnavailable while the schema registry is away."""
        ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """A record as it was admitted: ``request`` or, where there is none, the problem. ``dead`` bytes are kept aside.

    ``address`` is None where no reply can or may be sent. ``mendable``: its headers are at fault and not what it asks,
    so it is turned away, and may be sent again under the same id with headers that can be used.
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
    mendable: bool = False


class Admission:
    """Reads records under the settings' bounds and the reply topics that there are."""

    def __init__(self, decoder: Decoder, replies: Replies, settings: Settings) -> None:
        self._decoder = decoder
        self._replies = replies
        self._settings = settings

    async def admit(self, record: InboundRecord, named: Callable[[RequestId], None]) -> Arrival:
        """What ``record`` asks for. ``named`` is told its id, before its reply topic is looked up.

        Raises:
            StoreUnavailable: that cannot be known yet.
        """
        traceparent = next((value for name, value in record.headers if value and name == "traceparent"), None)
        envelope: Envelope | None = None
        members: Mapping[str, Any] | None = None
        request: Request | None = None
        fault: Problem | None = None
        refusal: RequestRefused | None = None
        try:
            envelope = read_envelope(record)
        except RequestRefused as refused:
            fault = refused.problem
        header_bytes = sum(len(name) + len(value) for name, value in record.headers)
        if header_bytes > HEADERS_BYTES_MAX:
            said = f"the request's headers have {header_bytes} bytes; {HEADERS_BYTES_MAX} are allowed"
            fault = fault or Problem(Code.REQUEST_TOO_LARGE, said)
        try:
            size = len(record.value or b"")
            if size > self._settings.request_bytes_max:
                said = f"the request has {size} bytes; {self._settings.request_bytes_max} are allowed"
                raise RequestRefused(Problem(Code.REQUEST_TOO_LARGE, said))
            # Also behind headers at fault: the body may hold the id under which to say so.
            members = await self._decoder.decode(JSON if envelope is None else envelope.content_type, record.value)
            if envelope is not None and fault is None:
                request = read_request(envelope, members, record)
        except RequestRefused as refused:
            refusal = refused
        request_id = identify(record, members) if request is None else request.request_id
        named(request_id)
        address, unusable = await self._address(record)
        fault = unusable or fault
        if request is not None and fault is None:
            return Arrival(record, request_id, request.body, request.content_type, address, traceparent, request)
        problem = fault or (None if refusal is None else refusal.problem)
        assert problem is not None  # noqa: S101 - what is no request has a reason
        return Arrival(
            record,
            request_id,
            digest_of_bytes(record.value),
            content_type_of(record.headers),
            address,
            traceparent,
            None,
            problem,
            dead=isinstance(refusal, Undecodable),
            mendable=fault is not None,
        )

    def unreadable(self, record: InboundRecord, reason: str) -> Arrival:
        """What becomes of a record that could not be read for a reason of ours; its bytes are kept aside."""
        address = read_address(record.headers)
        if address is not None and self._refusal_of(address) is not None:
            address = None
        problem = Problem(Code.INTERNAL, f"the request is kept aside: {reason}")
        body, content_type = digest_of_bytes(record.value), content_type_of(record.headers)
        return Arrival(record, identify(record), body, content_type, address, None, None, problem, dead=True)

    async def read(self, record: InboundRecord) -> Request:
        """The request in ``record``. Raises RequestRefused, Undecodable, StoreUnavailable."""
        envelope = read_envelope(record)
        return read_request(envelope, await self._decoder.decode(envelope.content_type, record.value), record)

    async def _address(self, record: InboundRecord) -> tuple[ReplyAddress | None, Problem | None]:
        address = read_address(record.headers)
        if address is None:
            return None, None
        said = self._refusal_of(address)
        if said is None and not await self._replies.has_partition(address.topic, address.partition):
            which = address.topic if address.partition is None else f"{address.topic}/{address.partition}"
            said = f"reply topic {which} does not exist: create it, or name one that does"
        if said is None:
            return address, None
        return None, Problem(Code.REPLY_TOPIC_NOT_ALLOWED, said)

    def _refusal_of(self, address: ReplyAddress) -> str | None:
        """Why replies are not written there, whatever exists; None where they may be."""
        topic = address.topic
        if not _TOPIC_NAME.fullmatch(topic) or topic in (".", ".."):
            return f"reply topic {topic[:80]!r} is no topic's name: 1 to 249 of A-Z, a-z, 0-9, dot, - and _"
        if not address.allowed_by(self._settings.reply_topics_allowed, self._settings.topic_prefix):
            return f"reply topic {topic} is not allowed: BROKER_REPLY_TOPICS_ALLOWED names those that are"
        if is_kept(topic.removeprefix(self._settings.topic_prefix)) or topic.startswith("__"):
            return f"reply topic {topic} is not allowed: the broker keeps its own records there; name one of your own"
        return None


def content_type_of(headers: Headers) -> str:
    """The content type as it was sent, for the record of a request whose headers cannot be understood."""
    given = (value for name, value in headers if value and name in ("content-type", "contentType"))
    named = next(given, b"application/json")
    return named[:100].decode(errors="replace")
