"""What the gateway takes and gives, as OpenAPI schemas: the contract that ``/openapi.json`` publishes."""

from typing import Any, Final

from app.gateway.answers import JSON, PROBLEM_JSON

_MEMBERS: Final = {"type": "object", "additionalProperties": True}
_ERRORS: Final = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["code", "message"],
        "properties": {name: {"type": "string"} for name in ("code", "task", "feature", "message")},
    },
}
_NULLABLE: Final = {"type": ["string", "null"]}

REQUEST: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["path"],
    "additionalProperties": False,
    "properties": {
        "request_id": {"type": ["string", "null"], "minLength": 1, "maxLength": 128},
        "path": {"type": "string", "pattern": "^/", "maxLength": 512},
        "entities": _MEMBERS,
        "inputs": _MEMBERS,
        "metadata": _MEMBERS,
    },
    "example": {
        "path": "/credit/decision",
        "entities": {"applicant_id": 17},
        "inputs": {"credit_amount": 5000},
        "metadata": {"channel": "web"},
    },
}
REPLY: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["request_id", "execution_id", "status", "outputs", "result", "errors", "latency_ms"],
    "properties": {
        "request_id": {"type": "string"},
        "execution_id": {"type": "string"},
        "status": {"enum": ["completed", "partial", "rejected", "expired", "failed"]},
        "path": _NULLABLE,
        "route": _NULLABLE,
        "rule": _NULLABLE,
        "revision": _NULLABLE,
        "outputs": _MEMBERS,
        "result": _MEMBERS,
        "errors": _ERRORS,
        "latency_ms": {"type": "number"},
    },
}
PROBLEM: Final[dict[str, Any]] = {
    "type": "object",
    "description": "RFC 9457 problem details; a refused decision carries its reply's members, status as outcome",
    "required": ["type", "title", "status", "detail", "errors"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "request_id": {"type": "string"},
        "outcome": {"enum": ["rejected", "expired", "failed"]},
        "errors": _ERRORS,
    },
}
INFER_REQUEST: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "parameters": {
            "type": "object",
            "properties": {name: {"type": ["object", "string"]} for name in ("entities", "metadata")},
        },
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype", "data"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "datatype": {"type": "string"},
                    "data": {"type": "array"},
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
        },
    },
}
INFER_RESPONSE: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["model_name", "id", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "outputs": {"type": "array", "items": {"type": "object", "required": ["name", "shape", "datatype", "data"]}},
    },
}
ACCEPTED: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["request_id"],
    "properties": {"request_id": {"type": "string"}},
}
STATE: Final[dict[str, Any]] = {"type": "object"}

_HEADERS: Final = (
    ("Idempotency-Key", "the request id: asking again with it brings the first decision", {"type": "string"}),
    ("request-id", "the same under the name that it has in Kafka; send one of them", {"type": "string"}),
    ("deadline-ms", "absolute, epoch milliseconds; the route's own deadline caps it", {"type": "string"}),
    ("traceparent", "W3C trace context", {"type": "string"}),
    ("priority", "normal where none is given", {"type": "string", "enum": ["high", "normal", "low"]}),
)
_PREFER: Final = ("Prefer", "respond-async: 202 at once, the decision at its Location", {"type": "string"})


def responses(schema: dict[str, Any], *problems: int, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """A route's responses: one success, and problem details for ``problems`` and whatever else goes wrong."""
    documented: dict[int | str, dict[str, Any]] = {
        status: {"description": "Success", "content": {JSON: {"schema": schema}}}
    }
    problem = {"description": "Problem details", "content": {PROBLEM_JSON: {"schema": PROBLEM}}}
    return documented | dict.fromkeys(problems, problem) | {"default": problem}


def operation(body: dict[str, Any], *, asynchronous: bool = False) -> dict[str, Any]:
    """What a route that asks for a decision takes."""
    headers = (*_HEADERS, _PREFER) if asynchronous else _HEADERS
    return {
        "requestBody": {"required": True, "content": {JSON: {"schema": body}}},
        "parameters": [
            {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
            for name, text, schema in headers
        ],
    }
