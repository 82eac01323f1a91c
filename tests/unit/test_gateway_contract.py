"""The gateway against its own OpenAPI document: whatever is sent, the answer is one that the document promises."""

import re
from typing import Any

import orjson
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.domain.errors import ReplyTimeout
from app.gateway.application import create_app
from app.ports.request_reply import Reply
from app.settings import Settings
from tests.support.request_reply import FakeDecisionReader, FakeRequestReply, FixedClock, reply_members, reply_of

_client = FakeRequestReply()
_reader = FakeDecisionReader()
_schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(_client, _reader, Settings(), FixedClock()))
_outcomes: list[Reply | Exception] = [
    reply_of(reply_members("completed", result={"decision": "approve"}, outputs={"pd": {"output": {"p": 0.5}}})),
    reply_of(reply_members("rejected", {"code": "path_unknown", "message": "no such path"})),
    ReplyTimeout("no reply in time"),
]


_operations = [found.ok().label for found in _schema.get_all_operations() if isinstance(found, Ok)]


def _answers_as_documented(operation: str) -> Any:
    """A test of one operation: no request, however odd, is answered with 5xx of the gateway's own making or outside the
    schema."""

    @_schema.include(name=operation).parametrize()
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def answers_as_documented(case: "schemathesis.Case[Any]") -> None:
        _client.sent.clear()
        for outcome in _outcomes:
            _client.outcome = outcome
            response = case.call()
            case.validate_response(
                response, checks=[status_code_conformance, content_type_conformance, response_schema_conformance]
            )
            assert response.status_code != 500
            for sent in _client.sent:
                assert isinstance(orjson.loads(sent.body), dict)

    return answers_as_documented


# A name for each: tests that one `parametrize` makes of all operations have the same id by this pytest, and of those
# pytest-xdist runs one.
for _operation in _operations:
    globals()["test_" + re.sub(r"\W+", "_", _operation).strip("_").lower()] = _answers_as_documented(_operation)


def test_every_operation_has_its_own_test() -> None:
    """None is left out, nor two of one name."""
    assert len([name for name in globals() if name.startswith("test_")]) == len(_operations) + 1
    assert {"POST /v1/decisions", "GET /v1/decisions/{request_id}", "POST /v2/models/{path}/infer"} < {*_operations}
