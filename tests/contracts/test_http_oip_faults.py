"""What servers do to HTTP backends, each on a real socket: refuse, crash, lie, hang, hang up, flood."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from aiohttp import web
from prometheus_client import REGISTRY

from app.adapters.http_oip import HttpOipBackend
from app.domain.dispatch import Answer, Row, judge
from app.domain.errors import Code
from app.domain.features import Value
from app.domain.version_documents import ModelVersionSpec
from tests.support.model_server import Handler, doubled, read_request, respond, scripted, serving, tensor
from tests.support.models import TRACEPARENT, MovableClock, row_of, version_of

OK = b'{"outputs":[{"name":"y","shape":[1],"datatype":"FP64","data":[42]}]}'
HTTP_OK = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(OK), OK)


@pytest.fixture
async def backend() -> AsyncIterator[HttpOipBackend]:
    backend = HttpOipBackend(MovableClock(), response_bytes_max=65_536)
    yield backend
    await backend.close()


async def ask(backend: HttpOipBackend, version: ModelVersionSpec, row: Row | None = None) -> Answer:
    """One row's answer, within 10 s whatever the server does."""
    async with asyncio.timeout(10):
        (answer,) = await backend.infer(version, (row or row_of(),))
    assert (answer.problem is None) != (answer.outputs is None)
    return answer


def code_of(answer: Answer) -> Code | None:
    """The problem's code."""
    return None if answer.problem is None else answer.problem.code


def always(body: Any, status: int = 200) -> Handler:
    """A handler that answers the same to everything."""

    async def handler(_: web.BaseRequest, __: dict[str, Any]) -> web.StreamResponse:
        return respond(body, status)

    return handler


async def test_the_request_is_the_protocols(backend: HttpOipBackend) -> None:
    """One row: `[1,1]` flat tensors in Feast types' datatypes, the outputs by name, id, idempotency and trace."""
    values: dict[str, Value] = {"s": "a", "b": b"b", "i": 1, "l": 2, "d": 1.5, "f": 2.5, "o": True, "u": 3}
    types = dict(
        zip(
            values,
            ("STRING", "BYTES", "INT32", "INT64", "DOUBLE", "FLOAT", "BOOL", "UNIX_TIMESTAMP"),
            strict=True,
        )
    )
    async with serving(always(OK)) as server:
        answer = await ask(backend, version_of(server.url), row_of(values, types=types))
    assert answer.outputs == {"y": 42}
    (call,) = server.calls
    assert call.path == "/v2/models/m/versions/3/infer"
    assert call.headers["Content-Type"] == "application/json"
    assert call.headers["Idempotency-Key"] == "r-1:t:3"
    assert call.headers["traceparent"] == TRACEPARENT
    assert call.body["id"] == "r-1"
    assert call.body["outputs"] == [{"name": "y"}]
    datatypes = ("BYTES", "BYTES", "INT32", "INT64", "FP64", "FP32", "BOOL", "INT64")
    assert call.body["inputs"] == [
        {"name": name, "shape": [1, 1], "datatype": datatype, "data": [sent]}
        for (name, sent), datatype in zip({**values, "b": "b"}.items(), datatypes, strict=True)
    ]
    assert orjson.loads(answer.sent) == call.body


@pytest.mark.parametrize(
    ("members", "path"),
    [
        ({"modelVersion": ""}, "/v2/models/m/infer"),
        ({"modelVersion": "7", "modelName": "other"}, "/v2/models/other/versions/7/infer"),
    ],
)
async def test_the_servers_own_names(backend: HttpOipBackend, members: dict[str, str], path: str) -> None:
    """modelName and modelVersion stand in the URL; an empty version is left out."""
    async with serving(always(OK)) as server:
        await ask(backend, version_of(server.url, backend=members))
    assert [call.path for call in server.calls] == [path]


async def test_matrix_is_one_tensor(backend: HttpOipBackend) -> None:
    """layout: matrix sends one `[n,k]` tensor in the inputs' order."""
    matrix = {"input": {"layout": "matrix", "tensor": "m", "datatype": "FP32"}}
    async with serving(always({"outputs": [tensor("y", [2], [1, 2])]})) as server:
        rows = (row_of({"a": 1, "b": 2.5}), row_of({"a": True, "b": 3}))
        answers = await backend.infer(version_of(server.url, backend=matrix), rows)
    assert [answer.outputs for answer in answers] == [{"y": 1}, {"y": 2}]
    assert server.calls[0].body["inputs"] == [
        {"name": "m", "shape": [2, 2], "datatype": "FP32", "data": [1, 2.5, 1, 3]}
    ]
    assert "Idempotency-Key" not in server.calls[0].headers


async def test_rows_of_several_elements(backend: HttpOipBackend) -> None:
    """A wide output is a list a row, flat or nested alike, and the contract's element is taken from it."""
    contract = ({"name": "p", "from": "proba", "element": 1, "datatype": "FP64"},)
    for data in ([0.1, 0.9, 0.2, 0.8], [[0.1, 0.9], [0.2, 0.8]]):
        async with serving(always({"outputs": [tensor("proba", [2, 2], data)]})) as server:
            version = version_of(server.url, outputs=contract)
            answers = await backend.infer(version, (row_of(), row_of()))
        assert [answer.outputs for answer in answers] == [{"proba": [0.1, 0.9]}, {"proba": [0.2, 0.8]}]
        assert [judge("t", version, answer, 1.0).output for answer in answers] == [{"p": 0.9}, {"p": 0.8}]


@pytest.mark.parametrize(
    ("values", "types"),
    [
        ({"x": float("nan")}, {"x": "DOUBLE"}),
        ({"x": float("-inf")}, {"x": "FLOAT"}),
        ({"x": b"\xff"}, {"x": "BYTES"}),
        ({"x": 2**70}, {"x": "INT64"}),
        ({"x": "\ud800"}, {"x": "STRING"}),
        ({"x": 1}, {"x": "MAP"}),
    ],
)
async def test_values_that_json_cannot_hold(
    backend: HttpOipBackend, values: dict[str, Any], types: dict[str, str]
) -> None:
    """NaN, infinity, bytes that are no text: a problem that names it; the other rows are called all the same."""
    async with serving(doubled) as server:
        version = version_of(server.url)
        answer = await ask(backend, version, row_of(values, types=types))
        assert code_of(answer) is Code.FEATURE_INVALID
        assert server.calls == []
        bad, good = await backend.infer(version, (row_of(values, types=types), row_of()))
        assert (code_of(bad), good.outputs) == (Code.FEATURE_INVALID, {"y": 42})


async def test_rows_of_different_inferred_types_share_a_call(backend: HttpOipBackend) -> None:
    """5 and 5.5 in one column go as FP64; a null takes no part in the choice."""
    async with serving(always({"outputs": [tensor("y", [3], [1, 2, 3])]})) as server:
        await backend.infer(version_of(server.url), (row_of({"x": 5}), row_of({"x": 5.5}), row_of({"x": None})))
    (sent,) = server.calls[0].body["inputs"]
    assert (sent["datatype"], sent["data"]) == ("FP64", [5, 5.5, None])


async def test_a_hostile_traceparent_is_left_out(backend: HttpOipBackend) -> None:
    """Headers are written from a request's own words; what is no trace context, or not ASCII, does no harm."""
    row = Row(row_of().request_id, "t", {"x": 1}, {"x": "INT64"}, row_of().deadline_ms, "a\r\nX-Evil: 1")
    async with serving(doubled) as server:
        assert code_of(await ask(backend, version_of(server.url), row)) is None
        assert code_of(await ask(backend, version_of(server.url), row_of(request_id="ä b"))) is None
    assert "traceparent" not in server.calls[0].headers
    assert "X-Evil" not in server.calls[0].headers
    assert server.calls[1].headers["Idempotency-Key"] == "%C3%A4%20b:t:3"


@pytest.mark.parametrize(
    ("status", "body", "calls", "said"),
    [
        (400, {"error": "input x has shape [2]"}, 1, "400: input x has shape [2]"),
        (404, {"error": "no such model"}, 1, "404: no such model"),
        (422, {"detail": [{"loc": ["inputs"], "msg": "bad"}]}, 1, '422: [{"loc":["inputs"],"msg":"bad"}]'),
        (500, b"Internal Server Error", 2, "500: Internal Server Error"),
        (503, b"", 2, "503: "),
        (302, b"", 1, "302: "),
        (500, b"x" * 5_000, 2, "…"),
    ],
)
async def test_error_statuses(backend: HttpOipBackend, status: int, body: Any, calls: int, said: str) -> None:
    """A status other than 200 is a problem in the server's own words, shortened; only 5xx is tried again."""
    async with serving(always(body, status)) as server:
        answer = await ask(backend, version_of(server.url))
    assert answer.problem is not None
    assert answer.problem.code is Code.MODEL_ERROR
    assert said in answer.problem.message
    assert len(answer.problem.message) < 400
    assert server.url not in answer.problem.message
    assert [attempt.outcome for attempt in answer.attempts] == [f"http {status}"] * calls
    assert len(server.calls) == calls


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[1]",
        b'{"outputs": {}}',
        b'{"outputs": [1]}',
        {"outputs": []},
        {"outputs": [tensor("z", [1], [1])]},
        {"outputs": [tensor("y", [1], [1]), tensor("y", [1], [2])]},
        {"outputs": [tensor("y", [2], [1, 2])]},
        {"outputs": [tensor("y", [], [1])]},
        {"outputs": [tensor("y", [1, 2], [1])]},
        {"outputs": [tensor("y", [1], [1, 2])]},
        {"outputs": [tensor("y", [1, -1], [1])]},
        {"outputs": [tensor("y", [1] * 17, [1])]},
        {"outputs": [tensor("y", [1, 2], [[1], 2])]},
        {"outputs": [{"name": "y", "shape": [1]}]},
        {"outputs": [{"name": "y", "data": [1]}]},
        {"outputs": [{"name": "y", "shape": [True], "data": [1]}]},
        b'{"outputs": [{"name": "y", "shape": [1], "data": [NaN]}]}',
        b'{"outputs": [{"name": "y", "shape": [18446744073709551615, 18446744073709551615], "data": [1]}]}',
        b"[" * 50_000,
    ],
)
async def test_garbage_is_an_unsound_output(backend: HttpOipBackend, body: Any) -> None:
    """An answer that is not the protocol's is named as unsound, once: asking again would bring the same."""
    async with serving(always(body)) as server:
        answer = await ask(backend, version_of(server.url))
    assert code_of(answer) is Code.MODEL_OUTPUT_INVALID
    assert len(server.calls) == 1


async def test_a_huge_body_is_not_read(backend: HttpOipBackend) -> None:
    """A response beyond the bound is refused by its length, while it streams, or while it is decompressed."""

    async def streamed(request: web.BaseRequest, _body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for __ in range(1_000):
            await response.write(b"x" * 65_536)
        return response

    async def bomb(_: web.BaseRequest, __: dict[str, Any]) -> web.StreamResponse:
        return web.Response(body=gzip.compress(b"x" * 1_000_000), headers={"Content-Encoding": "gzip"})

    for handler in (always(b"x" * 100_000), streamed, bomb):
        async with serving(handler) as server:
            answer = await ask(backend, version_of(server.url))
        assert code_of(answer) is Code.MODEL_OUTPUT_INVALID
        assert "more than 65536 bytes" in answer.attempts[0].outcome


async def test_compressed_answers_are_read(backend: HttpOipBackend) -> None:
    """A server may compress, though nobody asks it to."""

    async def handler(_: web.BaseRequest, __: dict[str, Any]) -> web.StreamResponse:
        return web.Response(body=gzip.compress(OK), headers={"Content-Encoding": "gzip"})

    async with serving(handler) as server:
        assert (await ask(backend, version_of(server.url))).outputs == {"y": 42}


async def test_a_slow_body_is_a_timeout(backend: HttpOipBackend) -> None:
    """A server that answers at once and never ends its body is bounded like one that says nothing."""

    async def drip(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with scripted(drip) as url:
        answer = await ask(backend, version_of(url, policy={"timeout": "60ms"}))
    assert code_of(answer) is Code.MODEL_TIMEOUT
    assert [attempt.outcome for attempt in answer.attempts] == ["timeout", "timeout"]
    assert all(attempt.latency_ms < 1_000 for attempt in answer.attempts)


async def test_no_retry_past_the_deadline(backend: HttpOipBackend) -> None:
    """A retry gets what is left until the deadline, and none is made when nothing is."""

    async def silent(_: int, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    async with scripted(silent) as url:
        version = version_of(url, policy={"timeout": "100ms"})
        cut = await ask(backend, version, row_of(within_ms=150))
        alone = await ask(backend, version, row_of(within_ms=60))
    assert [attempt.outcome for attempt in cut.attempts] == ["timeout", "deadline"]
    assert sum(attempt.latency_ms for attempt in cut.attempts) < 400
    assert code_of(cut) is Code.DEADLINE_EXCEEDED
    assert [attempt.outcome for attempt in alone.attempts] == ["deadline"]


async def test_a_dead_endpoint_is_passed_over(backend: HttpOipBackend) -> None:
    """Two endpoints, one dead: every call succeeds, in turn at once or on the second try, both attempts recorded."""
    async with serving(doubled) as server:
        version = version_of("http://127.0.0.1:1", server.url)
        answers = [await ask(backend, version) for _ in range(4)]
    assert [answer.outputs for answer in answers] == [{"y": 42}] * 4
    assert [[attempt.endpoint for attempt in answer.attempts] for answer in answers] == [
        ["http://127.0.0.1:1", server.url],
        [server.url],
    ] * 2
    assert answers[0].attempts[0].outcome.startswith("connection: ")
    assert answers[0].attempts[1].outcome == "ok"


async def test_nobody_listens(backend: HttpOipBackend) -> None:
    """A version whose endpoints are all away is unavailable; the message holds no address, the attempts do."""
    answer = await ask(backend, version_of("http://127.0.0.1:1"))
    assert answer.problem is not None
    assert answer.problem.code is Code.MODEL_UNAVAILABLE
    assert "127.0.0.1" not in answer.problem.message
    assert [attempt.endpoint for attempt in answer.attempts] == ["http://127.0.0.1:1"] * 2
    without = await ask(backend, version_of("http://127.0.0.1:1", policy={"retries": 0}))
    assert len(without.attempts) == 1


async def test_hanging_up(backend: HttpOipBackend) -> None:
    """A connection closed before, within or instead of an answer is a connection failure, tried once more."""
    for said in (b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\n{"):

        async def hang_up(
            number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytes = said
        ) -> None:
            await read_request(reader)
            writer.write(said if number == 1 else HTTP_OK)
            await writer.drain()

        async with scripted(hang_up) as url:
            answer = await ask(backend, version_of(url))
        assert answer.outputs == {"y": 42}
        assert answer.attempts[0].outcome.startswith("connection: ")


async def test_a_server_that_does_not_speak_http(backend: HttpOipBackend) -> None:
    """Bytes that are no HTTP are an unsound answer."""

    async def babble(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"\x00\x01\x02 what?\r\n\r\n")
        await writer.drain()

    async with scripted(babble) as url:
        answer = await ask(backend, version_of(url))
    assert code_of(answer) is Code.MODEL_OUTPUT_INVALID


async def test_a_kept_connection_that_is_reset_after_a_500(backend: HttpOipBackend) -> None:
    """A server that resets the kept-alive connection after its 500 costs that request its first attempt, no more."""

    async def script(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        if number > 1:
            writer.write(HTTP_OK)
            await writer.drain()
            return
        writer.write(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        # The next request on this connection is read, and answered by a reset.
        await read_request(reader)
        writer.transport.abort()

    async with scripted(script) as url:
        version = version_of(url)
        first = await ask(backend, version)
        second = await ask(backend, version)
    assert [attempt.outcome for attempt in first.attempts] == ["http 500", "ok"]
    assert first.outputs == second.outputs == {"y": 42}
    assert len(second.attempts) == 2
    assert second.attempts[0].outcome.startswith("connection: ")


async def test_cancelled_calls_free_their_slot(backend: HttpOipBackend) -> None:
    """A caller that gives up leaves nothing behind: the next one finds the slot free."""

    called = asyncio.Event()

    async def handler(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        if len(server.calls) == 1:
            called.set()
            await asyncio.Event().wait()
        return await doubled(request, body)

    async with serving(handler) as server:
        version = version_of(server.url, policy={"concurrency": 1, "timeout": "60000ms"})
        abandoned = asyncio.create_task(ask(backend, version))
        async with asyncio.timeout(5):
            await called.wait()
        abandoned.cancel()
        await asyncio.gather(abandoned, return_exceptions=True)
        assert (await ask(backend, version)).outputs == {"y": 42}


async def test_a_changed_spec_is_followed(backend: HttpOipBackend) -> None:
    """A new revision that moves a version to another endpoint is followed by the next call."""
    async with serving(doubled) as old, serving(doubled) as new:
        await ask(backend, version_of(old.url))
        await ask(backend, version_of(new.url))
        await ask(backend, version_of(new.url))
    assert (len(old.calls), len(new.calls)) == (1, 2)


async def test_one_attempt_is_one(backend: HttpOipBackend) -> None:
    """A row that is asked for once is, whatever the version's policy says of retries."""
    async with serving(always(b"no", 503)) as server:
        version = version_of(server.url, policy={"retries": 1})
        answer = await backend.infer_once(version, row_of())
        assert code_of(answer) is Code.MODEL_ERROR
        assert (len(server.calls), len(answer.attempts)) == (1, 1)
        assert len((await ask(backend, version)).attempts) == 2


# --- ejection ---------------------------------------------------------------------------------------------------------

OUTLIER = {"timeout": "2s", "retries": 0, "outlier": {"consecutiveFailures": 3, "baseEjection": "5s"}}


def _ejections() -> float:
    return REGISTRY.get_sample_value("broker_endpoint_ejections_total", {"model": "m", "version": "3"}) or 0.0


def _ejected_now() -> float | None:
    return REGISTRY.get_sample_value("broker_endpoints_ejected", {"model": "m", "version": "3"})


async def test_an_endpoint_that_keeps_failing_is_left_out() -> None:
    """After three failures in a row the turn skips it; after its time one call tries it, and it is out for longer."""
    clock = MovableClock()
    backend = HttpOipBackend(clock)
    before = _ejections()
    async with serving(always(b"no", 503)) as bad, serving(always(OK)) as good:
        version = version_of(bad.url, good.url, policy=OUTLIER)
        codes = [code_of(await ask(backend, version)) for _ in range(6)]
        assert codes == [Code.MODEL_ERROR, None] * 3
        assert (_ejections() - before, _ejected_now()) == (1, 1)
        assert [code_of(await ask(backend, version)) for _ in range(6)] == [None] * 6
        assert len(bad.calls) == 3
        assert backend.refusal(version) is None
        clock.offset_ms += 5_000
        assert _ejected_now() == 0
        assert [code_of(await ask(backend, version)) for _ in range(6)].count(Code.MODEL_ERROR) == 1
        clock.offset_ms += 5_000
        # Twice by now: twice the time.
        assert (_ejections() - before, _ejected_now()) == (2, 1)
        clock.offset_ms += 5_000
        assert _ejected_now() == 0
    await backend.close()


async def test_a_version_without_an_endpoint_left_is_refused_and_still_called() -> None:
    """Whoever asks hears that it is ejected, by which endpoints and for how long; a call is made all the same."""
    clock = MovableClock()
    backend = HttpOipBackend(clock)
    async with serving(always(b"no", 500)) as one, serving(always(b"no", 500)) as two:
        version = version_of(one.url, two.url, policy=OUTLIER | {"retries": 1})
        assert backend.refusal(version) is None
        for _ in range(3):
            await ask(backend, version)
        refused = backend.refusal(version)
        assert refused is not None
        assert code_of(refused) is Code.MODEL_EJECTED
        assert refused.problem is not None
        assert "m 3 was not called: each of its endpoints failed 3 times in a row" in refused.problem.message
        assert one.url not in refused.problem.message
        assert [(each.endpoint, each.outcome) for each in refused.attempts] == [
            (one.url, "ejected"),
            (two.url, "ejected"),
        ]
        assert code_of(await ask(backend, version)) is Code.MODEL_ERROR
        assert (len(one.calls), len(two.calls)) == (4, 4)
        # Another version of the same model is another matter.
        assert backend.refusal(version_of(one.url, policy=OUTLIER)) is None
        clock.offset_ms += 5_000
        assert backend.refusal(version) is None
    await backend.close()


@pytest.mark.parametrize(
    ("status", "body"), [(400, b"no"), (404, b"no"), (429, b"no"), (200, b"nonsense")], ids=["400", "404", "429", "200"]
)
async def test_a_server_that_answers_is_not_ejected(backend: HttpOipBackend, status: int, body: bytes) -> None:
    """What it refuses, or answers unsoundly, is no sign that it is gone."""
    async with serving(always(body, status)) as server:
        version = version_of(server.url, policy=OUTLIER)
        for _ in range(5):
            assert code_of(await ask(backend, version)) is not None
        assert backend.refusal(version) is None
        assert len(server.calls) == 5


async def test_silence_and_absence_eject(backend: HttpOipBackend) -> None:
    """A timeout of the policy counts, and so does a port where nobody listens; a nearer deadline does not."""

    async def hang(_: web.BaseRequest, __: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(1)
        return respond(OK)

    async with serving(hang) as server:
        version = version_of(server.url, policy=OUTLIER | {"timeout": "30ms"})
        for _ in range(4):
            await ask(backend, version, row_of(within_ms=15))
        assert backend.refusal(version) is None
        for _ in range(3):
            assert code_of(await ask(backend, version)) is Code.MODEL_TIMEOUT
        assert backend.refusal(version) is not None
    absent = version_of("http://127.0.0.1:1", policy=OUTLIER)
    for _ in range(3):
        assert code_of(await ask(backend, absent)) is Code.MODEL_UNAVAILABLE
    assert backend.refusal(absent) is not None


async def test_calls_that_a_stall_catches_together_are_one_failure(backend: HttpOipBackend) -> None:
    """However many run when a server stands still, it is not ejected by that; failures one after the other count."""
    standing_still = asyncio.Event()

    async def stall(_: web.BaseRequest, __: dict[str, Any]) -> web.StreamResponse:
        if not standing_still.is_set():
            await asyncio.sleep(0.5)
        return respond(OK)

    async with serving(stall) as server:
        version = version_of(server.url, policy=OUTLIER | {"timeout": "60ms"})
        answers = await asyncio.gather(*(ask(backend, version) for _ in range(12)))
        assert {code_of(answer) for answer in answers} == {Code.MODEL_TIMEOUT}
        assert backend.refusal(version) is None
        standing_still.set()
        assert code_of(await ask(backend, version)) is None


async def test_one_call_tries_an_endpoint_whose_time_is_over() -> None:
    """Until it is answered whoever has something better stays away; then all are served again."""
    clock = MovableClock()
    backend = HttpOipBackend(clock)
    well, reached, slow = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def mended(_: web.BaseRequest, __: dict[str, Any]) -> web.StreamResponse:
        if not well.is_set():
            return respond(b"no", 503)
        reached.set()
        await slow.wait()
        return respond(OK)

    async with serving(mended) as server:
        version = version_of(server.url, policy=OUTLIER)
        for _ in range(3):
            await ask(backend, version)
        assert backend.refusal(version) is not None
        well.set()
        clock.offset_ms += 5_000
        assert backend.refusal(version) is None
        trial = asyncio.create_task(ask(backend, version))
        async with asyncio.timeout(5):
            await reached.wait()
        assert backend.refusal(version) is not None
        slow.set()
        assert code_of(await trial) is None
        assert backend.refusal(version) is None
        assert code_of(await ask(backend, version)) is None
    await backend.close()
