"""Replies as HTTP answers: a decision's own bytes where there is one, RFC 9457 problem details where there is not.

``completed`` and ``partial`` are 200 with the reply as it came. Anything else is a problem: its ``status`` is HTTP's,
as the RFC wants it, so the decision's own status stands in ``outcome``; every other member of the reply is carried
under its own name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

import orjson

from app.domain.errors import Code
from app.domain.join import Status
from app.ports.request_reply import Reply

JSON: Final = "application/json"
PROBLEM_JSON: Final = "application/problem+json"

RETRY_AFTER_S: Final = 1
"""A place among those that wait is free again within about one decision."""

_HTTP_STATUS: Final = {Status.REJECTED: 422, Status.EXPIRED: 504, Status.FAILED: 502}
_PASSED_ON: Final = ("request-id", "execution-id", "traceparent")


class GatewayCode(StrEnum):
    """Codes of what the gateway refuses by itself; docs/errors.md describes each."""

    REQUEST_MALFORMED = "request_malformed"
    REQUEST_INVALID = "request_invalid"
    REQUEST_INCOMPLETE = "request_incomplete"
    REQUEST_TOO_LARGE = "request_too_large"
    REPLIES_FULL = "replies_full"
    REPLY_TIMEOUT = "reply_timeout"
    REPLY_UNREADABLE = "reply_unreadable"
    KAFKA_UNAVAILABLE = "kafka_unavailable"
    DECISION_UNKNOWN = "decision_unknown"
    AUDIT_UNAVAILABLE = "audit_unavailable"
    AUDIT_DAMAGED = "audit_damaged"
    NOT_FOUND = "not_found"
    NOT_ALLOWED = "method_not_allowed"
    NOT_READY = "not_ready"
    INTERNAL = "internal_error"


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response, before the framework makes one of it; ``outcome`` is for logs and metrics."""

    status: int
    body: bytes
    media_type: str
    outcome: str
    headers: Mapping[str, str] = field(default_factory=dict)


def location_of(request_id: str) -> str:
    """Where the decision of a request is found, or will be.

    >>> location_of("a b/c")
    '/v1/decisions/a%20b%2Fc'
    """
    return f"/v1/decisions/{quote(request_id, safe='')}"


def problem(
    status: int,
    code: GatewayCode,
    detail: str,
    *,
    request_id: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """What the gateway refuses by itself."""
    members: dict[str, Any] = {"errors": [{"code": code, "message": detail}]}
    if request_id is not None:
        members |= {"instance": location_of(request_id), "request_id": request_id}
    return _problem(status, detail, members, code, headers or {})


def answer_of(reply: Reply) -> Answer:
    """The answer that a worker's reply makes."""
    headers = {name: text for name in _PASSED_ON if (text := reply.header(name)) and _fits_a_header(text)}
    status = reply.header("status")
    if status in (Status.COMPLETED, Status.PARTIAL):
        return Answer(200, reply.value, JSON, status, headers)
    try:
        members = orjson.loads(reply.value)
        outcome = Status(members.pop("status"))
        errors = [*members["errors"]]
        detail = "; ".join(str(error["message"]) for error in errors) or f"the request was {outcome}"
        path_unknown = any(error["code"] == Code.PATH_UNKNOWN for error in errors)
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
        return problem(
            502,
            GatewayCode.REPLY_UNREADABLE,
            "the reply is none that this gateway knows: are its workers of another version?",
            headers=headers,
        )
    if outcome not in _HTTP_STATUS:
        return Answer(200, reply.value, JSON, outcome, headers)
    members["outcome"] = outcome
    if isinstance(request_id := members.get("request_id"), str):
        members["instance"] = location_of(request_id)
    return _problem(404 if path_unknown else _HTTP_STATUS[outcome], detail, members, outcome, headers)


def _problem(status: int, detail: str, members: Mapping[str, Any], outcome: str, headers: Mapping[str, str]) -> Answer:
    document = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **members,
    }
    return Answer(status, orjson.dumps(document), PROBLEM_JSON, outcome, headers)


def _fits_a_header(text: str) -> bool:
    return text.isascii() and text.isprintable()
