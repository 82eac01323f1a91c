"""The gateway's routes: what each way a request can end looks like over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest

from app.domain.errors import (
    EvidenceDamaged,
    PublishFailed,
    RecordTooLarge,
    RepliesFull,
    ReplyTimeout,
    StoreUnavailable,
)
from app.gateway.application import CONTEXT_BYTES_MAX, CONTEXT_HEADERS_MAX, REPLY_GRACE_MS, create_app
from app.ports.request_reply import Reply
from app.settings import Settings
from tests.support.request_reply import FakeDecisionReader, FakeRequestReply, FixedClock, reply_members, reply_of

BODY = b'{"path": "/credit/decision",  "entities": {"applicant_id": 17}}'


@pytest.fixture
def client() -> FakeRequestReply:
    return FakeRequestReply()


@pytest.fixture
def reader() -> FakeDecisionReader:
    return FakeDecisionReader()


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock()


@pytest.fixture
async def http(
    client: FakeRequestReply, reader: FakeDecisionReader, clock: FixedClock
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(client, reader, Settings(), clock)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as session:
        yield session


def problem_of(response: httpx.Response) -> dict[str, Any]:
    """The problem details of a response, checked for what RFC 9457 asks of them."""
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == response.status_code
    assert document["type"] == "about:blank"
    assert document["title"]
    assert document["detail"]
    return document


@pytest.mark.parametrize("status", ["completed", "partial"])
async def test_decided(http: httpx.AsyncClient, client: FakeRequestReply, status: str) -> None:
    """A completed or partial decision is 200 with the reply's own bytes; the body goes to Kafka as it came."""
    client.outcome = reply_of(reply_members(status))
    response = await http.post("/v1/decisions", content=BODY)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.content == client.outcome.value
    assert response.headers["execution-id"] == "e-1"
    assert client.sent[0].body == BODY


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("rejected", "feature_missing", 422),
        ("rejected", "path_unknown", 404),
        ("expired", "deadline_exceeded", 504),
        ("failed", "model_error", 502),
    ],
)
async def test_refused_by_the_broker(
    http: httpx.AsyncClient, client: FakeRequestReply, status: str, code: str, expected: int
) -> None:
    """Any other decision is a problem with every member of its reply, its status as outcome."""
    members = reply_members(status, {"code": code, "message": "why", "task": "pd"})
    client.outcome = reply_of(members)
    response = await http.post("/v1/decisions", content=BODY)
    assert response.status_code == expected
    document = problem_of(response)
    assert document["outcome"] == status
    assert document["detail"] == "why"
    assert document["instance"] == "/v1/decisions/r-1"
    assert {name: document[name] for name in members if name != "status"} == {
        name: value for name, value in members.items() if name != "status"
    }


@pytest.mark.parametrize(
    ("error", "expected", "code", "retry"),
    [
        (ReplyTimeout("no reply to request mine"), 504, "reply_timeout", False),
        (RepliesFull("too many"), 503, "replies_full", True),
        (PublishFailed("no acknowledgement"), 503, "kafka_unavailable", True),
        (RecordTooLarge("large"), 413, "request_too_large", False),
    ],
)
async def test_not_answered(
    http: httpx.AsyncClient, client: FakeRequestReply, error: Exception, expected: int, code: str, retry: bool
) -> None:
    """What keeps a request from its reply is a problem of its own; 503 says when to come back, 504 under which id."""
    client.outcome = error
    response = await http.post("/v1/decisions", content=BODY, headers={"Idempotency-Key": "mine"})
    assert response.status_code == expected
    document = problem_of(response)
    assert document["errors"][0]["code"] == code
    assert ("retry-after" in response.headers) is retry
    if expected in (503, 504):
        assert document["request_id"] == "mine"
    if expected == 504:
        assert response.headers["location"] == "/v1/decisions/mine"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b'"text"', 400),
        (b"\xff\xfe", 400),
        (b'{"path": "/a", "inputs": {"x": NaN}}', 400),
        (b'{"path": "/a", "inputs": ' + b"[" * 2_000 + b"]" * 2_000 + b"}", 400),
        (b'{"path": "/a", "request_id": 5}', 400),
        (b'{"path": "/a", "request_id": ""}', 400),
        (b'{"path": "/a", "request_id": "a\\nb"}', 400),
        (b'{"path": "/a", "x": "' + b"x" * 300_000 + b'"}', 413),
    ],
)
async def test_refused_by_the_gateway(
    http: httpx.AsyncClient, client: FakeRequestReply, body: bytes, expected: int
) -> None:
    """A body that is no JSON object, names an unusable id, or is too large is refused before Kafka."""
    response = await http.post("/v1/decisions", content=body)
    assert response.status_code == expected
    problem_of(response)
    assert client.sent == []


async def test_too_large_in_pieces(http: httpx.AsyncClient, client: FakeRequestReply) -> None:
    """A body without a declared length is cut off at the limit."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 50_000

    response = await http.post("/v1/decisions", content=pieces())
    assert response.status_code == 413
    assert client.sent == []


async def test_body_never_ends(client: FakeRequestReply, reader: FakeDecisionReader, clock: FixedClock) -> None:
    """A body that stops coming is given up after the default deadline."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    app = create_app(client, reader, Settings(default_deadline=50), clock)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        response = await http.post("/v1/decisions", content=pieces())
    assert response.status_code == 408
    assert problem_of(response)["errors"][0]["code"] == "request_incomplete"


@pytest.mark.parametrize(
    "body",
    [
        b'{"path": "/a", "path": "/b", "inputs": {"x": 1, "x": 2}}',
        b'{"path": "/a", "inputs": {"x": 123456789012345678901234567890}}',
        b'{"path": 5, "nonsense": {}}',
        b"{}",
    ],
)
async def test_judged_by_the_broker(http: httpx.AsyncClient, client: FakeRequestReply, body: bytes) -> None:
    """An object that is no request is the broker's to reject, so that it is recorded."""
    response = await http.post("/v1/decisions", content=body)
    assert response.status_code == 200
    assert client.sent[0].body == body


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({"Idempotency-Key": "from-header"}, b'{"request_id": "from-body"}', "from-header"),
        ({"Idempotency-Key": '"quoted"'}, b"{}", "quoted"),
        ({"Idempotency-Key": "größe".encode()}, b"{}", "größe"),
        ({}, b'{"request_id": "from-body"}', "from-body"),
    ],
)
async def test_request_id(
    http: httpx.AsyncClient, client: FakeRequestReply, headers: dict[str, Any], body: bytes, expected: str
) -> None:
    """The id is the header's, else the body's."""
    await http.post("/v1/decisions", content=body, headers=headers)
    assert client.sent[0].request_id == expected


@pytest.mark.parametrize("own_id", [5, 0, False, ["a"], {}])
async def test_an_id_that_is_not_text(http: httpx.AsyncClient, client: FakeRequestReply, own_id: object) -> None:
    """It is named as what it is, whichever way a decision is asked for; nothing is sent."""
    for url, member in (("/v1/decisions", "request_id"), ("/v2/models/a/infer", "id")):
        response = await http.post(url, content=orjson.dumps({"path": "/a", "inputs": [], member: own_id}))
        assert response.status_code == 400
        assert problem_of(response)["detail"] == f"{member} is not text: send a string"
    assert not client.sent


async def test_request_id_made(http: httpx.AsyncClient, client: FakeRequestReply) -> None:
    """A request without an id gets a new one each time."""
    await http.post("/v1/decisions", content=BODY)
    await http.post("/v1/decisions", content=BODY)
    assert client.sent[0].request_id != client.sent[1].request_id


async def test_id_beyond_latin(http: httpx.AsyncClient, client: FakeRequestReply) -> None:
    """An id that no HTTP header can hold is named in the body, and escaped in the location."""
    client.outcome = ReplyTimeout("late")
    response = await http.post("/v1/decisions", content='{"request_id": "日本"}'.encode())
    assert response.status_code == 504
    assert problem_of(response)["request_id"] == "日本"
    assert response.headers["location"] == "/v1/decisions/%E6%97%A5%E6%9C%AC"
    client.outcome = reply_of(reply_members("completed", request_id="日本"))
    response = await http.post("/v1/decisions", content='{"request_id": "日本"}'.encode())
    assert response.status_code == 200
    assert "request-id" not in response.headers


async def test_the_id_by_its_name_in_kafka(http: httpx.AsyncClient, client: FakeRequestReply) -> None:
    """A request-id header is the id, as it is in Kafka; beside another Idempotency-Key it is refused."""
    await http.post("/v1/decisions", content=BODY, headers={"request-id": "mine"})
    assert client.sent[0].request_id == "mine"
    await http.post("/v1/decisions", content=BODY, headers={"request-id": "mine", "Idempotency-Key": "mine"})
    assert client.sent[1].request_id == "mine"
    response = await http.post("/v1/decisions", content=BODY, headers={"request-id": "a", "Idempotency-Key": "b"})
    assert response.status_code == 400
    assert "name two ids" in problem_of(response)["detail"]
    assert len(client.sent) == 2


@pytest.mark.parametrize("url", ["/v1/decisions", "/v2/models/a/infer"])
@pytest.mark.parametrize("content_type", ["application/avro", "image/png"])
async def test_what_says_that_it_is_no_json(
    http: httpx.AsyncClient, client: FakeRequestReply, url: str, content_type: str
) -> None:
    """415, with what is read."""
    response = await http.post(url, content=BODY, headers={"content-type": content_type})
    assert response.status_code == 415
    assert "application/json" in problem_of(response)["detail"]
    assert client.sent == []


async def test_headers_passed_on(http: httpx.AsyncClient, client: FakeRequestReply, clock: FixedClock) -> None:
    """Deadline, trace and priority travel to the broker; a nearer deadline shortens the wait."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"deadline-ms": str(clock.now + 300), "traceparent": trace, "priority": "high"}
    await http.post("/v1/decisions", content=BODY, headers=headers)
    sent = client.sent[0]
    assert sent.deadline_ms == clock.now + 300
    assert sent.wait_ms == 300 + REPLY_GRACE_MS
    assert dict(sent.headers) == {
        "content-type": b"application/json",
        "traceparent": trace.encode(),
        "priority": b"high",
    }


@pytest.mark.parametrize("url", ["/v1/decisions", "/v2/models/a/infer"])
async def test_context_headers_passed_on(http: httpx.AsyncClient, client: FakeRequestReply, url: str) -> None:
    """Headers beginning with x- travel under their own names, as rules see them; secrets and all others stay here."""
    headers = [
        (b"X-Channel", b"web"),
        (b"x-channel", b"app"),
        (b"x-empty", b""),
        (b"X-Api-Key", b"secret"),
        (b"x-auth-request-user", b"secret"),
        (b"x-amz-security-token", b"secret"),
        (b"Authorization", b"Bearer secret"),
        (b"Cookie", b"secret=1"),
        (b"Channel", b"web"),
        (b"x-name", "Zo\xeb".encode()),
    ]
    body = BODY if url == "/v1/decisions" else b'{"inputs": []}'
    await http.post(url, content=body, headers=headers)
    assert client.sent[0].headers[1:] == (
        ("x-channel", b"web"),
        ("x-channel", b"app"),
        ("x-empty", b""),
        ("x-name", "Zo\xeb".encode()),
    )


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({f"x-{number}": "" for number in range(CONTEXT_HEADERS_MAX)}, False),
        ({f"x-{number}": "" for number in range(CONTEXT_HEADERS_MAX + 1)}, True),
        ({"x-a": "a" * (CONTEXT_BYTES_MAX - 3)}, False),
        ({"x-a": "a" * (CONTEXT_BYTES_MAX - 2)}, True),
        ({"x-api-key": "a" * (CONTEXT_BYTES_MAX + 1)}, False),
    ],
)
async def test_context_headers_are_bounded(
    http: httpx.AsyncClient, client: FakeRequestReply, headers: dict[str, str], refused: bool
) -> None:
    """Too many, or too long, is refused before anything is sent: a rule must not decide on a part of them."""
    response = await http.post("/v1/decisions", content=BODY, headers=headers)
    assert bool(client.sent) is not refused
    if refused:
        assert response.status_code == 400
        assert response.json()["errors"][0]["code"] == "request_invalid"
        assert "headers beginning with x-" in response.json()["detail"]


@pytest.mark.parametrize(
    ("header", "deadline_after_ms", "wait_ms"),
    [
        (None, 5_000, 5_000 + REPLY_GRACE_MS),
        ("9999999999999", 5_000, 5_000 + REPLY_GRACE_MS),
        ("5", None, REPLY_GRACE_MS),
        ("soon", None, 5_000 + REPLY_GRACE_MS),
    ],
)
async def test_deadline(
    http: httpx.AsyncClient,
    client: FakeRequestReply,
    clock: FixedClock,
    header: str | None,
    deadline_after_ms: int | None,
    wait_ms: int,
) -> None:
    """No wait is longer than the default deadline and the grace; what cannot be read is the broker's to reject."""
    await http.post("/v1/decisions", content=BODY, headers={} if header is None else {"deadline-ms": header})
    sent = client.sent[0]
    assert sent.wait_ms == wait_ms
    if deadline_after_ms is not None:
        assert sent.deadline_ms == clock.now + deadline_after_ms
    if header == "5":
        assert sent.deadline_ms == 5
    if header == "soon":
        assert sent.deadline_ms is None
        assert ("deadline-ms", b"soon") in sent.headers


async def test_respond_async(http: httpx.AsyncClient, client: FakeRequestReply) -> None:
    """With ``Prefer: respond-async`` a request that Kafka has is 202, and its decision is found at the location."""
    response = await http.post(
        "/v1/decisions", content=b'{"request_id": "a b"}', headers={"Prefer": "wait=5, Respond-Async"}
    )
    assert response.status_code == 202
    assert response.headers["location"] == "/v1/decisions/a%20b"
    assert response.json() == {"request_id": "a b"}
    assert client.sent[0].deadline_ms is None


async def test_decision_found(http: httpx.AsyncClient, reader: FakeDecisionReader) -> None:
    """A recorded decision is shown with the reply's own bytes, however it ended and whatever its id looks like."""
    value = b'{"status":"rejected"}'
    reader.records["a/b c"] = {"status": "rejected", "reply": value}
    response = await http.get("/v1/decisions/a%2Fb%20c")
    assert (response.status_code, response.content) == (200, value)


async def test_decision_not_found(http: httpx.AsyncClient, reader: FakeDecisionReader) -> None:
    """No record yet is 404; stores that do not answer are 503, for nothing is known then."""
    response = await http.get("/v1/decisions/none")
    assert response.status_code == 404
    assert problem_of(response)["request_id"] == "none"
    assert (await http.get("/v1/decisions/" + "x" * 200)).status_code == 404
    nameless = problem_of(await http.get("/v1/decisions/"))
    assert (nameless["status"], nameless["errors"][0]["code"]) == (404, "not_found")
    assert "request id" in nameless["detail"]
    reader.down = StoreUnavailable("S3 does not answer")
    response = await http.get("/v1/decisions/none")
    assert response.status_code == 503
    assert response.headers["retry-after"]
    reader.down = EvidenceDamaged("not what was written")
    damaged = problem_of(await http.get("/v1/decisions/none"))
    assert (damaged["status"], damaged["errors"][0]["code"]) == (500, "audit_damaged")


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"", ()),
        Reply(b"[]", ()),
        Reply(b'{"status": "strange", "errors": []}', (("status", b"strange"),)),
        Reply(b'{"status": "failed"}', (("status", b"\xff"),)),
        Reply(b'{"status": "failed", "errors": [5]}', ()),
    ],
)
async def test_unreadable_reply(http: httpx.AsyncClient, client: FakeRequestReply, reply: Reply) -> None:
    """A reply of another make is 502, not a crash."""
    client.outcome = reply
    response = await http.post("/v1/decisions", content=BODY)
    assert response.status_code == 502
    assert problem_of(response)["errors"][0]["code"] == "reply_unreadable"


async def test_infer(http: httpx.AsyncClient, client: FakeRequestReply) -> None:
    """An inference call is a request for the path that the model's name is; the answer holds tensors."""
    client.outcome = reply_of(
        reply_members(
            "completed",
            result={"decision": "approve"},
            outputs={"pd": {"status": "ok", "output": {"probability": 0.1}}, "extra": {"status": "timeout"}},
        )
    )
    call = {
        "model_name": "credit/decision",
        "id": "from-id",
        "parameters": {"binary_data_output": True, "entities": '{"applicant_id": 17}', "metadata": {"channel": "web"}},
        "inputs": [{"name": "credit_amount", "shape": [1, 1], "datatype": "INT64", "data": [[5000]]}],
    }
    response = await http.post("/v2/models/credit/decision/infer", content=orjson.dumps(call))
    assert response.status_code == 200
    assert orjson.loads(client.sent[0].body) == {
        "path": "/credit/decision",
        "entities": {"applicant_id": 17},
        "inputs": {"credit_amount": 5000},
        "metadata": {"channel": "web"},
    }
    assert client.sent[0].request_id == "from-id"
    document = response.json()
    assert document["model_name"] == "credit/decision"
    assert document["outputs"] == [
        {"name": "decision", "shape": [1], "datatype": "BYTES", "data": ["approve"]},
        {"name": "pd.probability", "shape": [1], "datatype": "FP64", "data": [0.1]},
    ]


async def test_infer_refused(http: httpx.AsyncClient, client: FakeRequestReply) -> None:
    """A problem answers an inference call too, with the member that clients of the protocol read."""
    client.outcome = reply_of(reply_members("rejected", {"code": "path_unknown", "message": "no such path"}))
    response = await http.post("/v2/models/none/infer", content=b'{"inputs": []}')
    assert response.status_code == 404
    assert problem_of(response)["error"] == "no such path"
    response = await http.post(
        "/v2/models/none/infer", content=b"{}", headers={"Inference-Header-Content-Length": "10"}
    )
    assert response.status_code == 415
    assert "binary" in problem_of(response)["error"]


async def test_probes(http: httpx.AsyncClient, client: FakeRequestReply) -> None:
    """Ready means that Kafka answers; live, that replies are read; both are told in the protocol's way as well."""
    ready = ["/readyz", "/v2/health/ready", "/v2/models/credit/decision/ready"]
    live = ["/livez", "/v2/health/live"]
    for path in (*ready, *live, "/v2", "/v2/models/credit/decision", "/openapi.json", "/metrics"):
        assert (await http.get(path)).status_code == 200, path
    client.down = StoreUnavailable("Kafka does not answer")
    assert {(await http.get(path)).status_code for path in ready} == {503}
    assert {(await http.get(path)).status_code for path in live} == {200}
    client.alive = False
    assert {(await http.get(path)).status_code for path in live} == {503}


async def test_metrics(http: httpx.AsyncClient) -> None:
    """Requests are counted by endpoint and status."""
    await http.post("/v1/decisions", content=BODY)
    text = (await http.get("/metrics")).text
    assert 'broker_gateway_requests_total{endpoint="decisions",status="200"}' in text


async def test_elsewhere(http: httpx.AsyncClient) -> None:
    """What is not there, or not with this method, is a problem as well."""
    assert problem_of(await http.get("/nowhere"))["status"] == 404
    response = await http.delete("/v1/decisions")
    assert problem_of(response)["status"] == 405
    assert response.headers["allow"]


async def test_own_fault(http: httpx.AsyncClient, client: FakeRequestReply) -> None:
    """A fault of the gateway's own is a problem too, and the next request is served."""
    client.outcome = RuntimeError("a fault")
    assert problem_of(await http.post("/v1/decisions", content=BODY))["status"] == 500
    client.outcome = reply_of(reply_members("completed"))
    assert (await http.post("/v1/decisions", content=BODY)).status_code == 200
