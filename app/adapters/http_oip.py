"""Inline models over HTTP: rows in, one Open Inference Protocol v2 call to one of a version's endpoints, answers out.

Endpoints are taken in turn, but for those that failed so often in a row that they are ejected, and back only once one
call that tried them was answered (``domain.ejection``);
where all are, a call goes to them all the same, for a try is better than a certain failure, and whoever has something
better asks ``refusal`` first. A failed attempt is tried once more, on another endpoint where there is one, while there
is time; what a server refuses (4xx) or answers as nonsense it would again, so those stand. The deadline bounds the
wait for a free slot, each attempt, and the whole. Failures become problems here; no exception crosses the port.
Messages say what the server said but not where it is: callers read them; endpoints are kept in the attempts.

This is a decision's hot path, so everything that does not change between calls is made once a version (``_Lane``), and
aiohttp is used bare: no cookies, no redirects, no timers of its own.
"""

import asyncio
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

import aiohttp
import structlog
from prometheus_client import Counter, Gauge, Histogram
from yarl import URL

from app.adapters.oip import DATATYPES, RequestTemplate, decode_response, encode_request, error_text
from app.domain.dispatch import Answer, Attempt, Row
from app.domain.ejection import Health
from app.domain.errors import Code, Problem
from app.domain.version_documents import CallPolicy, ColumnsInput, HttpBackend, ModelVersionSpec
from app.observability import LATENCY_BUCKETS_S
from app.ports.clock import Clock

CONNECTIONS_MAX: Final = 512
"""Open connections of one process, all models together; a version's own bound is its policy's concurrency."""
RESPONSE_BYTES_MAX: Final = 4_194_304
"""Bytes of one response; a decision's record must fit into a Kafka record, so anything near it is a mistake."""
_LANES_MAX: Final = 4_096
_TEMPLATES_MAX: Final = 8
"""Shapes of rows a version; more than one only where the types of inputs are not declared."""

_SECONDS = Histogram(
    "broker_model_call_seconds", "Attempts to call a model over HTTP", ["model", "version"], buckets=LATENCY_BUCKETS_S
)
_FAILURES = Counter(
    "broker_model_call_failures",
    "Attempts that ended as: timeout, unavailable, error (the server's own), invalid (an unsound answer)",
    ["model", "version", "outcome"],
)
_EJECTIONS = Counter("broker_endpoint_ejections", "Ejections of a version's endpoints", ["model", "version"])
_EJECTED = Gauge("broker_endpoints_ejected", "A version's endpoints that are left out by now", ["model", "version"])
log = structlog.get_logger()

_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
_NOTHING_SENT: Final = b""


class _TooLarge(Exception):
    """A response beyond ``RESPONSE_BYTES_MAX``."""


@dataclass(frozen=True, slots=True)
class _Tried:
    """How an attempt ended: the response's body, or the problem; ``kind`` is the metric's label."""

    kind: str
    outcome: str
    body: bytes = b""
    problem: Problem | None = None
    again: bool = False


class _Lane:
    """What does not change between the calls of one version, its slots, and whose turn it is."""

    def __init__(self, version: ModelVersionSpec, backend: HttpBackend, clock: Clock) -> None:
        name = quote(backend.model_name or version.model, safe="")
        label = version.version if backend.model_version is None else backend.model_version
        path = f"/v2/models/{name}" + (f"/versions/{quote(label, safe='')}" if label else "") + "/infer"
        self.version = version
        self.title = f"{version.model} {version.version}"
        self.policy: CallPolicy = version.policy
        self.layout: ColumnsInput = backend.input
        self.wanted = tuple(dict.fromkeys(contract.tensor for contract in version.outputs))
        self.asked: tuple[Mapping[str, str], ...] = tuple({"name": tensor} for tensor in self.wanted)
        self.endpoints = tuple(
            (endpoint, URL(endpoint.rstrip("/") + path, encoded=True)) for endpoint in backend.endpoints
        )
        self.turn = itertools.count()
        self.health = [Health()] * len(self.endpoints)
        self.clock = clock
        _EJECTED.labels(version.model, version.version).set_function(lambda: len(self.endpoints) - len(self.usable()))
        self.slots = asyncio.Semaphore(version.policy.concurrency)
        self.seconds = _SECONDS.labels(version.model, version.version)
        self._templates: dict[tuple[str, ...], RequestTemplate] = {}

    def encode(self, rows: Sequence[Row]) -> tuple[bytes, Sequence[bytes]]:
        """The request's body, and each row's own; ValueError names the input that cannot be sent."""
        if len(rows) == 1:
            body = self.encode_one(rows[0])
            return body, (body,)
        first = rows[0]
        if self.layout.layout == "columns" and all(row.types == first.types for row in rows):
            template = self._template(first)
            filled = None if template is None else template.fill_shared(rows)
            if filled is not None:
                return filled
        body = encode_request(rows, self.layout, self.asked, None)
        return body, tuple(map(self.encode_one, rows))

    def encode_one(self, row: Row) -> bytes:
        """The body of a request for one row; ValueError names the input that cannot be sent."""
        template = self._template(row) if self.layout.layout == "columns" else None
        body = None if template is None else template.fill(row)
        return encode_request((row,), self.layout, self.asked, row.request_id) if body is None else body

    def _template(self, row: Row) -> RequestTemplate | None:
        types = tuple(row.types.values())
        template = self._templates.get(types)
        if template is None and len(self._templates) < _TEMPLATES_MAX and set(types) <= DATATYPES.keys():
            template = self._templates[types] = RequestTemplate(row, self.asked)
        return template

    def usable(self) -> Sequence[int]:
        """The places of the endpoints that are not ejected; of those, one that is due to be tried."""
        if not any(each.out for each in self.health):
            return range(len(self.health))
        now_ms = self.clock.steady_ms()
        return [place for place, each in enumerate(self.health) if not each.is_ejected(now_ms)]

    def call(self, place: int, now_ms: float) -> None:
        """An attempt begins; of an endpoint that is due to be tried it is the trial."""
        before = self.health[place]
        if before.out:
            self.health[place] = before.on_call(now_ms, self.policy.timeout)

    def account(self, place: int, tried: _Tried, began_ms: float, latency_ms: float) -> None:
        """Move the metrics and the endpoint's health for one attempt, which began at ``began_ms``.

        What may be tried again counts as a failure. A deadline shorter than the policy's timeout says nothing of the
        endpoint, nor does an unsound answer: a server that answers, or refuses, is there.
        """
        self.seconds.observe(latency_ms / 1000)
        if tried.kind != "ok":
            _FAILURES.labels(self.version.model, self.version.version, tried.kind).inc()
        before, now_ms = self.health[place], began_ms + latency_ms
        if tried.again:
            after = before.on_failure(self.policy.outlier, began_ms, now_ms)
            if after.until_ms > before.until_ms:
                _EJECTIONS.labels(self.version.model, self.version.version).inc()
                log.warning(
                    "endpoint_ejected",
                    model=self.version.model,
                    version=self.version.version,
                    endpoint=self.endpoints[place][0],
                    for_ms=round(after.until_ms - now_ms),
                    outcome=tried.outcome,
                )
            self.health[place] = after
        elif before.failures or before.out:
            answered = tried.kind in ("ok", "error")
            after = before.on_success(began_ms, now_ms) if answered else before.on_nothing(began_ms)
            if before.out and not after.out:
                log.info(
                    "endpoint_back",
                    model=self.version.model,
                    version=self.version.version,
                    endpoint=self.endpoints[place][0],
                )
            self.health[place] = after


class HttpOipBackend:
    """``ports.model_backend.ModelBackend`` over HTTP. Connections open with the first call, in its event loop."""

    def __init__(
        self,
        clock: Clock,
        *,
        connections_max: int = CONNECTIONS_MAX,
        response_bytes_max: int = RESPONSE_BYTES_MAX,
    ) -> None:
        self._clock = clock
        self._connections_max = connections_max
        self._response_bytes_max = response_bytes_max
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self._pooled: aiohttp.ClientSession | None = None
        self._single: aiohttp.ClientSession | None = None
        self._closed = False

    async def infer(self, version: ModelVersionSpec, rows: Sequence[Row]) -> Sequence[Answer]:
        """See ``ModelBackend.infer``. A row whose inputs cannot be sent fails alone; the others are called."""
        return await self._infer(version, rows, version.policy.retries) if rows else ()

    async def infer_once(self, version: ModelVersionSpec, row: Row) -> Answer:
        """See ``RowBackend.infer_once``."""
        (answer,) = await self._infer(version, (row,), 0)
        return answer

    async def _infer(self, version: ModelVersionSpec, rows: Sequence[Row], retries: int) -> Sequence[Answer]:
        backend = version.backend
        if not isinstance(backend, HttpBackend):
            problem = Problem(Code.INTERNAL, f"{version.model} {version.version} is not served over HTTP")
            return _all(rows, Answer(None, problem, (), _NOTHING_SENT))
        lane = self._lane(version, backend)
        try:
            body, own = lane.encode(rows)
        except ValueError as error:
            if len(rows) == 1:
                problem = Problem(Code.FEATURE_INVALID, f"{lane.title} cannot be asked: {error}")
                return (Answer(None, problem, (), _NOTHING_SENT),)
            # One row's fault is not the others': each goes alone.
            alone = await asyncio.gather(*(self._infer(version, (row,), retries) for row in rows))
            return tuple(answer for answers in alone for answer in answers)
        deadline_ms = rows[0].deadline_ms if len(rows) == 1 else min(row.deadline_ms for row in rows)
        return await self._in_slot(lane, rows, body, own, deadline_ms, retries)

    def request_of(self, version: ModelVersionSpec, row: Row) -> bytes:
        """See ``RowBackend.request_of``."""
        backend = version.backend
        try:
            return self._lane(version, backend).encode_one(row) if isinstance(backend, HttpBackend) else _NOTHING_SENT
        except ValueError:
            return _NOTHING_SENT

    def _lane(self, version: ModelVersionSpec, backend: HttpBackend) -> _Lane:
        key = (version.model, version.version)
        lane = self._lanes.get(key)
        if lane is not None:
            if lane.version is version:
                return lane
            if lane.version == version:
                # Another revision holds the same version: its spec is equal, and from now on identical.
                lane.version = version
                return lane
        fresh = _Lane(version, backend, self._clock)
        if lane is not None and lane.policy.concurrency == version.policy.concurrency:
            fresh.slots = lane.slots
        while len(self._lanes) >= _LANES_MAX:
            del self._lanes[next(iter(self._lanes))]
        self._lanes[key] = fresh
        return fresh

    def refusal(self, version: ModelVersionSpec) -> Answer | None:
        """See ``ModelBackend.refusal``: all endpoints of the version are ejected."""
        lane = self._lanes.get((version.model, version.version))
        if lane is None or (lane.version is not version and lane.version != version) or lane.usable():
            return None
        now_ms = self._clock.now_ms()
        left_ms = min(each.again_ms for each in lane.health) - self._clock.steady_ms()
        said = (
            f"{lane.title} was not called: each of its endpoints failed {lane.policy.outlier.consecutive_failures} "
            f"times in a row, and the first is asked again in {max(1, round(left_ms))} ms"
        )
        attempts = tuple(Attempt(endpoint, now_ms, 0.0, "ejected") for endpoint, _ in lane.endpoints)
        return Answer(None, Problem(Code.MODEL_EJECTED, said), attempts, _NOTHING_SENT)

    async def _in_slot(
        self, lane: _Lane, rows: Sequence[Row], body: bytes, own: Sequence[bytes], deadline_ms: int, retries: int
    ) -> Sequence[Answer]:
        remaining_ms = deadline_ms - self._clock.now_ms()
        if remaining_ms <= 0:
            problem = Problem(Code.DEADLINE_EXCEEDED, f"the deadline had passed before {lane.title} was called")
            return _all(rows, Answer(None, problem, (), _NOTHING_SENT))
        try:
            if lane.slots.locked():
                async with asyncio.timeout(remaining_ms / 1000):
                    await lane.slots.acquire()
            else:
                await lane.slots.acquire()
        except TimeoutError:
            said = f"{lane.policy.concurrency} calls of {lane.title} were running until the deadline"
            return _all(rows, Answer(None, Problem(Code.DEADLINE_EXCEEDED, said), (), _NOTHING_SENT))
        try:
            return await self._call(lane, rows, body, own, deadline_ms, retries)
        finally:
            lane.slots.release()

    async def _call(
        self, lane: _Lane, rows: Sequence[Row], body: bytes, own: Sequence[bytes], deadline_ms: int, retries: int
    ) -> Sequence[Answer]:
        headers = {"Content-Type": "application/json"}
        if len(rows) == 1:
            row = rows[0]
            # With the version: one that stands in for another at the same server asks anew.
            key = f"{row.request_id}:{row.task}:{lane.version.version}"
            headers["Idempotency-Key"] = key if key.isascii() else quote(key, safe=":")
            if row.traceparent is not None and _TRACEPARENT.fullmatch(row.traceparent):
                headers["traceparent"] = row.traceparent
        clock, turn = self._clock, next(lane.turn)
        attempts: tuple[Attempt, ...] = ()
        tried: _Tried | None = None
        last = -1
        for number in range(1 + retries):
            started_ms, started = clock.now_ms(), clock.steady_ms()
            remaining_ms = deadline_ms - started_ms
            if remaining_ms <= 0:
                break
            usable = lane.usable() or range(len(lane.endpoints))
            place = usable[(turn + number) % len(usable)]
            if place == last and len(usable) > 1:
                # The one before it was ejected by its failure just now, so the turn came upon the same again.
                place = usable[(turn + number + 1) % len(usable)]
            last = place
            lane.call(place, started)
            endpoint, url = lane.endpoints[place]
            tried = await self._attempt(lane, url, body, headers, remaining_ms, number)
            outputs = None
            if tried.problem is None:
                try:
                    outputs = decode_response(tried.body, len(rows), lane.wanted)
                except ValueError as error:
                    problem = Problem(Code.MODEL_OUTPUT_INVALID, f"{lane.title} answered unsoundly: {error}")
                    tried = _Tried("invalid", f"unsound: {error}"[:200], problem=problem)
            latency_ms = clock.steady_ms() - started
            lane.account(place, tried, started, latency_ms)
            attempts = (*attempts, Attempt(endpoint, started_ms, latency_ms, tried.outcome, len(rows)))
            if outputs is not None:
                return tuple(Answer(output, None, attempts, sent) for output, sent in zip(outputs, own, strict=True))
            if not tried.again:
                break
        if tried is None:
            problem = Problem(Code.DEADLINE_EXCEEDED, f"the deadline had passed before {lane.title} was called")
            return _all(rows, Answer(None, problem, (), _NOTHING_SENT))
        return tuple(Answer(None, tried.problem, attempts, sent) for sent in own)

    async def _attempt(
        self, lane: _Lane, url: URL, body: bytes, headers: Mapping[str, str], remaining_ms: int, number: int
    ) -> _Tried:
        timeout_ms = min(lane.policy.timeout, remaining_ms)
        title = lane.title
        try:
            session = self._session(number)
            async with asyncio.timeout(timeout_ms / 1000):
                response = await session.post(url, data=body, headers=headers, allow_redirects=False)
                status = response.status
                try:
                    answer = await self._read(response)
                except BaseException:
                    # What is left of the body would be read as the next response.
                    response.close()
                    raise
        except TimeoutError:
            if timeout_ms < lane.policy.timeout:
                said = f"{title} had not answered by the deadline, after {timeout_ms} ms"
                return _Tried("timeout", "deadline", problem=Problem(Code.DEADLINE_EXCEEDED, said))
            problem = Problem(Code.MODEL_TIMEOUT, f"{title} did not answer within its {timeout_ms} ms")
            return _Tried("timeout", "timeout", problem=problem, again=True)
        except _TooLarge:
            said = f"answered more than {self._response_bytes_max} bytes"
            problem = Problem(Code.MODEL_OUTPUT_INVALID, f"{title} {said}")
            return _Tried("invalid", said, problem=problem)
        except aiohttp.ClientResponseError as error:
            problem = Problem(Code.MODEL_OUTPUT_INVALID, f"{title} answered something that is not HTTP")
            return _Tried("invalid", f"not HTTP: {error.message}"[:200], problem=problem)
        except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
            problem = Problem(Code.MODEL_UNAVAILABLE, f"{title} could not be reached, or closed the connection")
            said = f"connection: {type(error).__name__}: {error}"[:200]
            return _Tried("unavailable", said, problem=problem, again=not self._closed)
        if status == 200:
            return _Tried("ok", "ok", answer)
        problem = Problem(Code.MODEL_ERROR, f"{title} answered {status}: {error_text(answer)}")
        return _Tried("error", f"http {status}", problem=problem, again=status >= 500)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        length = response.content_length
        if length is not None and length <= self._response_bytes_max and "Content-Encoding" not in response.headers:
            return await response.read()
        if length is not None and length > self._response_bytes_max:
            raise _TooLarge
        parts: list[bytes] = []
        size = 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > self._response_bytes_max:
                raise _TooLarge
            parts.append(part)
        return b"".join(parts)

    def _session(self, number: int) -> aiohttp.ClientSession:
        if self._closed:
            raise RuntimeError("this backend is closed")
        if number == 0:
            if self._pooled is None:
                self._pooled = self._open(keep=True)
            return self._pooled
        # A kept-alive connection may be what failed (some servers reset theirs after a 500), so a further attempt
        # goes over a new one.
        if self._single is None:
            self._single = self._open(keep=False)
        return self._single

    def _open(self, *, keep: bool) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections_max, force_close=not keep),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            timeout=_NO_TIMEOUT,
        )

    async def close(self) -> None:
        """Release connections; later calls are answered as unavailable."""
        self._closed = True
        for session in (self._pooled, self._single):
            if session is not None:
                await session.close()


def _all(rows: Sequence[Row], answer: Answer) -> Sequence[Answer]:
    return (answer,) * len(rows)
