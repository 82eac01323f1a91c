"""The gateway's HTTP application: each route, from the bytes that came to the answer that goes.

Bodies are read raw, so that a caller who names no content type is served like any other and the bytes that were sent
are the bytes that go to Kafka. A wait ends with the request's deadline, or with this broker's default one, and a grace
for the way back; who asks again with the same request id after that gets the decision once it is made.
"""

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.domain.errors import (
    Code,
    EvidenceDamaged,
    Problem,
    PublishFailed,
    RecordTooLarge,
    RepliesFull,
    ReplyTimeout,
    RequestRefused,
    StoreUnavailable,
)
from app.domain.requests import Headers, RequestId, checked_id, decode_json
from app.gateway import openapi
from app.gateway.answers import (
    JSON,
    RETRY_AFTER_S,
    Answer,
    GatewayCode,
    answer_of,
    location_of,
    problem,
)
from app.gateway.inference_protocol import read_infer, wanted_outputs, write_infer
from app.observability import LATENCY_BUCKETS_S
from app.ports.clock import Clock
from app.ports.decision_reader import DecisionReader
from app.ports.request_reply import RequestReply
from app.settings import Settings

API_VERSION: Final = "1"

REPLY_GRACE_MS: Final = 1_000
"""After its deadline a request is still answered, as expired; the answer needs this long to arrive."""

CONTEXT_HEADERS_MAX: Final = 32
CONTEXT_BYTES_MAX: Final = 4_096
"""How many headers beginning with ``x-`` a request may have, and how many bytes in their names and values.

They are kept in the decision's record, so they are bounded; leaving some out would let a rule decide on the others.
"""

_PASSED_ON: Final = ("traceparent", "priority")
_ID_HEADERS: Final = ("Idempotency-Key", "request-id")
"""HTTP's name of the request id, and the one that it has in Kafka."""
_JSON_TYPES: Final = ("", "application/json", "text/json", "text/plain", "application/x-www-form-urlencoded")
_CONTEXT_PREFIX: Final = "x-"
_SECRET: Final = ("auth", "cookie", "credential", "key", "password", "secret", "session", "token")
"""What names of headers that hold secrets have in them, such as ``x-api-key``: those go no further."""

_log = structlog.get_logger()
_requests = Counter("broker_gateway_requests", "HTTP requests answered.", ["endpoint", "status"])
_latency = Histogram(
    "broker_gateway_request_seconds",
    "From the request's last byte to its answer.",
    ["endpoint"],
    buckets=LATENCY_BUCKETS_S,
)


class TooLarge(Exception):
    """A body is larger than the settings allow."""


class Incomplete(Exception):
    """A body did not come to its end in time, or its connection did before it."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the routes share."""

    client: RequestReply
    reader: DecisionReader
    settings: Settings
    clock: Clock

    async def decide(self, request: Request) -> Answer:
        """``POST /v1/decisions``."""
        if (refusal := _not_json(request)) is not None:
            return refusal
        body = await self._body(request)
        members = decode_json(body)
        request_id = _identify(request, members.get("request_id"), "request_id")
        structlog.contextvars.bind_contextvars(request_id=request_id)
        if _prefers_async(request):
            return await self._submit(request, body, request_id)
        return await self._call(request, body, request_id)

    async def infer(self, request: Request, path: str) -> Answer:
        """``POST /v2/models/{path}/infer``."""
        if "inference-header-content-length" in request.headers:
            return problem(
                415,
                GatewayCode.REQUEST_INVALID,
                "the tensors are binary, and only JSON ones are read: turn binary data off in the client",
            )
        if (refusal := _not_json(request)) is not None:
            return refusal
        call = decode_json(await self._body(request))
        wanted = wanted_outputs(call)
        body = orjson.dumps(read_infer(path, call))
        request_id = _identify(request, None if call.get("id") == "" else call.get("id"), "id")
        structlog.contextvars.bind_contextvars(request_id=request_id)
        answer = await self._call(request, body, request_id)
        if answer.status != 200:
            return answer
        translated = orjson.dumps(write_infer(path, orjson.loads(answer.body), wanted))
        return Answer(200, translated, JSON, answer.outcome, answer.headers)

    async def show(self, request_id: str) -> Answer:
        """``GET /v1/decisions/{request_id}``."""
        if not request_id:
            return problem(404, GatewayCode.NOT_FOUND, "no request id: write it behind /v1/decisions/")
        structlog.contextvars.bind_contextvars(request_id=request_id[:128])
        try:
            async with asyncio.timeout(self.settings.default_deadline / 1_000):
                record = await self.reader.find(checked_id(request_id))
        except RequestRefused:
            record = None
        except (StoreUnavailable, TimeoutError) as error:
            detail = str(error) or "the audit's stores did not answer in time"
            return problem(503, GatewayCode.AUDIT_UNAVAILABLE, detail, request_id=request_id, headers=_come_back())
        except EvidenceDamaged as error:
            _log.error("a recorded decision is damaged", error=str(error))
            detail = "the decision's record is not what was written; the gateway's log says where it lies"
            return problem(500, GatewayCode.AUDIT_DAMAGED, detail, request_id=request_id)
        if record is None or record["reply"] is None:
            return problem(
                404,
                GatewayCode.DECISION_UNKNOWN,
                f"no decision of request {request_id[:128]} is recorded; one that is being made appears within seconds",
                request_id=request_id[:128],
            )
        return Answer(200, bytes(record["reply"]), JSON, str(record["status"]))

    async def ready(self) -> str | None:
        """Why the gateway cannot serve; None when it can."""
        try:
            await self.client.ping()
        except StoreUnavailable as error:
            return str(error)
        return None

    async def _call(self, request: Request, body: bytes, request_id: RequestId) -> Answer:
        now_ms = self.clock.now_ms()
        bound_ms = now_ms + self.settings.default_deadline
        asked_ms, unreadable = _deadline(request)
        # A deadline that cannot be read is carried as it came: the broker says what is wrong with it.
        deadline_ms = None if unreadable else min(asked_ms if asked_ms is not None else bound_ms, bound_ms)
        wait_ms = max(0, (deadline_ms or bound_ms) - now_ms) + REPLY_GRACE_MS
        headers = (*_headers(request), *unreadable)
        try:
            reply = await self.client.call(
                body, request_id=request_id, wait_ms=wait_ms, deadline_ms=deadline_ms, headers=headers
            )
        except ReplyTimeout as error:
            return problem(
                504,
                GatewayCode.REPLY_TIMEOUT,
                str(error),
                request_id=request_id,
                headers={"Location": location_of(request_id)},
            )
        return answer_of(reply)

    async def _submit(self, request: Request, body: bytes, request_id: RequestId) -> Answer:
        deadline_ms, unreadable = _deadline(request)
        await self.client.submit(
            body,
            request_id=request_id,
            wait_ms=self.settings.default_deadline,
            deadline_ms=deadline_ms,
            headers=(*_headers(request), *unreadable),
        )
        headers = {"Location": location_of(request_id), "Preference-Applied": "respond-async"}
        return Answer(202, orjson.dumps({"request_id": request_id}), JSON, "accepted", headers)

    async def _body(self, request: Request) -> bytes:
        limit = self.settings.request_bytes_max
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise TooLarge
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.default_deadline / 1_000):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise TooLarge
        except (TimeoutError, ClientDisconnect) as error:
            raise Incomplete from error
        return bytes(body)


def create_app(client: RequestReply, reader: DecisionReader, settings: Settings, clock: Clock) -> FastAPI:
    """The application over a connected client and a reader of recorded decisions."""
    gateway = Gateway(client, reader, settings, clock)
    app = FastAPI(
        title="Model Broker",
        summary="One place to ask for model decisions.",
        version=API_VERSION,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        default_response_class=Response,
        redirect_slashes=False,
    )

    @app.post(
        "/v1/decisions",
        responses={
            **openapi.responses(openapi.REPLY, 400, 404, 408, 413, 415, 422, 502, 503, 504),
            202: {"description": "Accepted", "content": {JSON: {"schema": openapi.ACCEPTED}}},
        },
        openapi_extra=openapi.operation(openapi.REQUEST, asynchronous=True),
        summary="Ask for a decision",
    )
    async def decide(request: Request) -> Response:
        return await _answered("decisions", gateway, gateway.decide(request))

    @app.get(
        "/v1/decisions/{request_id:path}",
        responses=openapi.responses(openapi.REPLY, 404, 500, 503),
        summary="A decision that was made",
    )
    async def show(request_id: str) -> Response:
        return await _answered("decision", gateway, gateway.show(request_id))

    @app.post(
        "/v2/models/{path:path}/infer",
        responses=openapi.responses(openapi.INFER_RESPONSE, 400, 404, 408, 413, 415, 422, 502, 503, 504),
        openapi_extra=openapi.operation(openapi.INFER_REQUEST),
        summary="Ask for a decision in the Open Inference Protocol v2",
    )
    async def infer(request: Request, path: str) -> Response:
        return await _answered("infer", gateway, gateway.infer(request, path), oip=True)

    _add_probes(app, gateway)
    _add_problems(app)
    return app


def _add_probes(app: FastAPI, gateway: Gateway) -> None:
    state = openapi.responses(openapi.STATE, 503)

    async def probe(ready: dict[str, Any]) -> Response:
        reason = await gateway.ready()
        if reason is None:
            return _json(200, ready)
        return _response(problem(503, GatewayCode.NOT_READY, reason, headers=_come_back()), oip=True)

    @app.get("/livez", responses=state, summary="Whether this process works; if not, restart it")
    async def livez() -> Response:
        if gateway.client.alive:
            return _json(200, {"live": True})
        return _response(problem(503, GatewayCode.NOT_READY, "replies are no longer read: restart this process"))

    @app.get("/readyz", responses=state, summary="Whether requests can be served now")
    async def readyz() -> Response:
        return await probe({"ready": True})

    @app.get("/metrics", summary="Prometheus metrics", responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}})
    async def metrics() -> Response:
        return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/v2", responses=openapi.responses(openapi.STATE), summary="Open Inference Protocol: this server")
    async def server() -> Response:
        return _json(200, {"name": app.title, "version": app.version, "extensions": []})

    @app.get("/v2/health/live", responses=state, summary="Open Inference Protocol: liveness")
    async def live() -> Response:
        return await livez()

    @app.get("/v2/health/ready", responses=state, summary="Open Inference Protocol: readiness")
    async def ready() -> Response:
        return await probe({"ready": True})

    # Which paths have a route is the workers' knowledge: asking tells, and no list is kept here that could be stale.
    @app.get("/v2/models/{path:path}/ready", responses=state, summary="Open Inference Protocol: readiness of a path")
    async def model_ready(path: str) -> Response:
        return await probe({"name": path, "ready": True})

    @app.get("/v2/models/{path:path}", responses=state, summary="Open Inference Protocol: a path as a model")
    async def model(path: str) -> Response:
        return _json(200, {"name": path, "versions": [], "platform": "model-broker", "inputs": [], "outputs": []})


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http_problem(request: Request, error: HTTPException) -> Response:
        code = GatewayCode.NOT_ALLOWED if error.status_code == 405 else GatewayCode.NOT_FOUND
        detail = f"{request.method} {request.url.path[:200]}: {error.detail}; see /openapi.json"
        answer = problem(error.status_code, code, detail, headers=dict(error.headers or {}))
        return _response(answer, oip=request.url.path.startswith("/v2"))

    @app.exception_handler(Exception)
    async def internal_problem(request: Request, _: Exception) -> Response:
        answer = problem(500, GatewayCode.INTERNAL, "the gateway failed; its log says why")
        return _response(answer, oip=request.url.path.startswith("/v2"))


async def _answered(endpoint: str, gateway: Gateway, work: Any, *, oip: bool = False) -> Response:
    """Run one route's work: every way it can end is an answer, counted, timed and logged."""
    started_ms = gateway.clock.steady_ms()
    structlog.contextvars.clear_contextvars()
    answer = await _ended(gateway, work)
    elapsed_ms = gateway.clock.steady_ms() - started_ms
    _requests.labels(endpoint, str(answer.status)).inc()
    _latency.labels(endpoint).observe(elapsed_ms / 1_000)
    _log.info(
        "answered",
        stage="gateway",
        endpoint=endpoint,
        http_status=answer.status,
        outcome=answer.outcome,
        latency_ms=round(elapsed_ms, 1),
    )
    return _response(answer, oip=oip)


async def _ended(gateway: Gateway, work: Any) -> Answer:
    try:
        answer: Answer = await work
    except RequestRefused as error:
        return problem(400, GatewayCode(error.problem.code), error.problem.message)
    except (TooLarge, RecordTooLarge):
        limit = gateway.settings.request_bytes_max
        return problem(413, GatewayCode.REQUEST_TOO_LARGE, f"the body has more than {limit} bytes: send fewer")
    except RepliesFull as error:
        return problem(503, GatewayCode.REPLIES_FULL, str(error), request_id=_bound_id(), headers=_come_back())
    except PublishFailed as error:
        return problem(503, GatewayCode.KAFKA_UNAVAILABLE, str(error), request_id=_bound_id(), headers=_come_back())
    except Incomplete:
        return problem(408, GatewayCode.REQUEST_INCOMPLETE, "the body did not come to its end in time: send it again")
    return answer


def _bound_id() -> str | None:
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return request_id if isinstance(request_id, str) else None


def _come_back() -> dict[str, str]:
    return {"Retry-After": str(RETRY_AFTER_S)}


def _identify(request: Request, own_id: object, member: str) -> RequestId:
    """The header's id, else the one of the body's ``member``, else a new one.

    Raises:
        RequestRefused: it cannot serve as an id.
    """
    # The header is a structured field in its draft, so a text in quotes, and a bare word with most who send it.
    ids = {name: _header_id(request, name) for name in _ID_HEADERS if request.headers.get(name)}
    if len(set(ids.values())) > 1:
        said = f"headers {' and '.join(ids)} name two ids: send one of them"
        raise RequestRefused(Problem(Code.REQUEST_INVALID, said))
    if ids:
        return next(iter(ids.values()))
    if own_id is None:
        return RequestId(str(uuid.uuid4()))
    if not isinstance(own_id, str):
        raise RequestRefused(Problem(Code.REQUEST_INVALID, f"{member} is not text: send a string"))
    return checked_id(own_id)


def _header_id(request: Request, name: str) -> RequestId:
    try:
        return checked_id(request.headers[name].encode("latin-1").decode().strip().strip('"'))
    except UnicodeDecodeError as error:
        raise RequestRefused(Problem(Code.REQUEST_INVALID, f"header {name} is not UTF-8: send text")) from error


def _not_json(request: Request) -> Answer | None:
    """The refusal of a body that says it is something else; ``curl -d`` says that it is a form, and sends what it is
    given."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given in _JSON_TYPES or given.endswith("+json"):
        return None
    said = f"the content type is {given[:80]!r}: send application/json; Avro is read from Kafka only"
    return problem(415, GatewayCode.REQUEST_MALFORMED, said)


def _deadline(request: Request) -> tuple[int | None, Headers]:
    """The caller's deadline; or, where it cannot be read, the header as it came."""
    text = request.headers.get("deadline-ms")
    if text is None:
        return None, ()
    if text.isascii() and text.isdigit() and len(text) <= 16:
        return int(text), ()
    return None, (("deadline-ms", text.encode("latin-1")),)


def _headers(request: Request) -> Headers:
    """What goes along to Kafka: the content type, trace and priority, and ``x-`` headers, which rules may look at.

    Raises:
        RequestRefused: more ``x-`` headers, or longer ones, than are passed on.
    """
    passed_on = [
        (name, value.encode("latin-1")) for name in _PASSED_ON if (value := request.headers.get(name)) is not None
    ]
    context = [
        (name, value.encode("latin-1"))
        for name, value in request.headers.items()
        if name.startswith(_CONTEXT_PREFIX) and not any(word in name for word in _SECRET)
    ]
    size = sum(len(name) + len(value) for name, value in context)
    if len(context) > CONTEXT_HEADERS_MAX or size > CONTEXT_BYTES_MAX:
        said = (
            f"the request has {len(context)} headers beginning with x-, of {size} bytes: "
            f"send at most {CONTEXT_HEADERS_MAX}, of {CONTEXT_BYTES_MAX} bytes together"
        )
        raise RequestRefused(Problem(Code.REQUEST_INVALID, said))
    return (("content-type", b"application/json"), *passed_on, *context)


def _prefers_async(request: Request) -> bool:
    preferences = ",".join(request.headers.getlist("prefer")).lower().split(",")
    return any(preference.partition(";")[0].strip() == "respond-async" for preference in preferences)


def _json(status: int, document: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(document), status, media_type=JSON)


def _response(answer: Answer, *, oip: bool = False) -> Response:
    body = answer.body
    if oip and answer.status >= 400:
        # Clients of the protocol look for the reason under this name.
        document = orjson.loads(body)
        body = orjson.dumps(document | {"error": document["detail"]})
    return Response(body, answer.status, headers=dict(answer.headers), media_type=answer.media_type)
