"""Request-reply and recorded decisions without services, for tests of what lies in front of them."""

from dataclasses import dataclass, field
from typing import Any

import orjson

from app.domain.requests import Headers
from app.ports.request_reply import Reply


@dataclass(frozen=True, slots=True)
class Sent:
    """One request that was sent."""

    body: bytes
    request_id: str
    wait_ms: int
    deadline_ms: int | None
    headers: Headers


def reply_members(status: str, *errors: dict[str, str], **members: Any) -> dict[str, Any]:
    """A reply as the broker writes it."""
    return {
        "request_id": "r-1",
        "execution_id": "e-1",
        "status": status,
        "path": "/credit/decision",
        "route": "credit-decision",
        "rule": "default",
        "revision": "sha256:abc",
        "outputs": {},
        "result": {},
        "errors": list(errors),
        "latency_ms": 3,
        **members,
    }


def reply_of(members: dict[str, Any]) -> Reply:
    """The Kafka record's value and headers for a reply."""
    headers = tuple(
        (name, str(members[key]).encode())
        for name, key in (("request-id", "request_id"), ("execution-id", "execution_id"), ("status", "status"))
    )
    return Reply(orjson.dumps(members), (("kafka_correlationId", b"\x00" * 16), *headers))


@dataclass(slots=True)
class FakeRequestReply:
    """``ports.request_reply.RequestReply`` that remembers what it sent and answers what it was given."""

    outcome: Reply | Exception = field(default_factory=lambda: reply_of(reply_members("completed")))
    sent: list[Sent] = field(default_factory=list)
    down: Exception | None = None
    alive: bool = True

    async def call(
        self, body: bytes, *, request_id: str, wait_ms: int, deadline_ms: int | None = None, headers: Headers = ()
    ) -> Reply:
        self.sent.append(Sent(body, request_id, wait_ms, deadline_ms, headers))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def submit(
        self, body: bytes, *, request_id: str, wait_ms: int, deadline_ms: int | None = None, headers: Headers = ()
    ) -> None:
        await self.call(body, request_id=request_id, wait_ms=wait_ms, deadline_ms=deadline_ms, headers=headers)

    async def ping(self) -> None:
        if self.down is not None:
            raise self.down


@dataclass(slots=True)
class FakeDecisionReader:
    """``ports.decision_reader.DecisionReader`` over a dictionary."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    down: Exception | None = None

    async def find(self, request_id: str) -> dict[str, Any] | None:
        if self.down is not None:
            raise self.down
        return self.records.get(request_id)


@dataclass(slots=True)
class FixedClock:
    """A clock that a test sets."""

    now: int = 1_700_000_000_000

    def now_ms(self) -> int:
        return self.now

    def steady_ms(self) -> float:
        return float(self.now)
