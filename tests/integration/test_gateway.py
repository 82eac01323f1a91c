"""The gateway as a process on real Kafka: served over a socket, drained on SIGTERM, clear about what it lacks."""

import asyncio
import os
import re
import signal
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import pytest

from app.adapters.topics import TopicAdmin, read_documents, wanted_topics
from app.settings import Settings
from tests.support.request_reply import reply_members
from tests.support.responder import Responder
from tests.support.stack import ServiceStack

BODY = {"path": "/a", "inputs": {"x": 1}}
RUN = "from app.commands.{name} import {name}_app; {name}_app()"


@pytest.fixture
def settings(kafka_bootstrap: str, topic_prefix: str) -> Settings:
    made = Settings(kafka_bootstrap=kafka_bootstrap, topic_prefix=topic_prefix, partitions=4)
    names = (made.topic("inference.requests"), made.topic("inference.replies"))
    TopicAdmin(made).apply([topic for topic in wanted_topics(read_documents(), made, ()) if topic.name in names])
    return made


@pytest.fixture
def environment(stack: ServiceStack, settings: Settings) -> dict[str, str]:
    return {**os.environ, **stack.env, "BROKER_TOPIC_PREFIX": settings.topic_prefix}


@pytest.fixture
async def responder(settings: Settings) -> AsyncIterator[Responder]:
    async with Responder(settings.kafka_bootstrap, settings.topic_prefix) as responder:
        yield responder


async def start(name: str, environment: dict[str, str], *arguments: str) -> Process:
    """One of the commands as a child process."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN.format(name=name), *arguments, env=environment, stdout=PIPE, stderr=PIPE
    )


async def ended(process: Process) -> tuple[str, str]:
    """What an ending process has said."""
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return out.decode(), err.decode()


@asynccontextmanager
async def gateway(environment: dict[str, str]) -> AsyncIterator[tuple[Process, httpx.AsyncClient]]:
    """A gateway on a free port, and a client of it."""
    process = await start("gateway", environment, "--http-port", "0", "--instance", "gateway-0")
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        match = re.search(r"http://[\d.]+:\d+", line)
        assert match, line + (await ended(process))[1]
        async with httpx.AsyncClient(base_url=match[0], timeout=20) as http:
            yield process, http
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_serves_and_drains(environment: dict[str, str], responder: Responder) -> None:
    """A request gets its decision; one in flight at SIGTERM too, and then the process ends with 0."""
    go_on = asyncio.Event()

    async def held(request: dict[str, Any], headers: dict[str, bytes]) -> dict[str, Any] | None:
        await go_on.wait()
        return reply_members("completed", request_id=headers["request-id"].decode())

    async with gateway(environment) as (process, http):
        assert (await http.get("/readyz")).status_code == 200
        assert (await http.get("/livez")).status_code == 200
        response = await http.post("/v1/decisions", json=BODY, headers={"Idempotency-Key": "g-1"})
        assert response.status_code == 200
        assert response.json()["request_id"] == "g-1"
        assert response.json()["result"] == {"x": 1}
        tensor = {"name": "x", "shape": [1], "datatype": "INT64", "data": [7]}
        response = await http.post("/v2/models/a/infer", content=orjson.dumps({"inputs": [tensor]}))
        assert response.json()["outputs"] == [tensor]
        assert 'outcome="matched"} 2.0' in (await http.get("/metrics")).text

        responder.behaviour = held
        seen = len(responder.records)
        in_flight = asyncio.create_task(http.post("/v1/decisions", json=BODY))
        async with asyncio.timeout(10):
            while len(responder.records) == seen:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        go_on.set()
        assert (await in_flight).status_code == 200
        _, log = await ended(process)
        assert process.returncode == 0, log
        lines = [orjson.loads(line) for line in log.splitlines() if '"answered"' in line]
        assert [line["http_status"] for line in lines] == [200, 200, 200]
        assert lines[0]["request_id"] == "g-1"
        assert "Traceback" not in log


async def test_respond_async(environment: dict[str, str], responder: Responder) -> None:
    """With ``Prefer: respond-async`` the request is in Kafka when 202 arrives, and asks for no reply."""
    async with gateway(environment) as (_, http):
        request_id = str(uuid.uuid4())
        response = await http.post(
            "/v1/decisions", json=BODY, headers={"Prefer": "respond-async", "Idempotency-Key": request_id}
        )
        assert response.status_code == 202
        assert response.headers["location"] == f"/v1/decisions/{request_id}"
        async with asyncio.timeout(10):
            while not responder.records:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.02)
        headers = dict(responder.records[0].headers)
        assert headers["request-id"] == request_id.encode()
        assert "kafka_replyTopic" not in headers


async def test_stores_without_audit(environment: dict[str, str]) -> None:
    """Asking for a decision where the audit's bucket and table do not exist is 503, not a crash."""
    nowhere = environment | {"BROKER_AUDIT_TABLE": "no-such-table", "BROKER_AUDIT_BUCKET": "no-such-bucket"}
    async with gateway(nowhere) as (_, http):
        response = await http.get("/v1/decisions/none")
        assert response.status_code == 503
        assert response.json()["errors"][0]["code"] == "audit_unavailable"


async def test_topics_missing(environment: dict[str, str], topic_prefix: str) -> None:
    """A gateway without its topics ends non-zero with one line that says what to run."""
    process = await start("gateway", environment | {"BROKER_TOPIC_PREFIX": f"{topic_prefix}not."}, "--http-port", "0")
    _, log = await ended(process)
    assert process.returncode == 2
    assert "topics apply" in log
    assert "Traceback" not in log


async def test_port_taken(environment: dict[str, str]) -> None:
    """A gateway whose port is taken ends non-zero and names the option."""
    async with gateway(environment) as (_, http):
        process = await start("gateway", environment, "--http-port", str(http.base_url.port))
        _, log = await ended(process)
        assert process.returncode == 2
        assert "--http-port" in log


async def test_request_command(environment: dict[str, str], responder: Responder) -> None:
    """``request`` sends one and prints the reply; its exit code says whether there is a decision."""
    arguments = ["/a", "--entities", "applicant_id=17", "--inputs", '{"x": 1}', "--request-id", "c-1"]
    process = await start("request", environment, *arguments, "--json")
    out, log = await ended(process)
    assert process.returncode == 0, log
    assert orjson.loads(out)["result"] == {"x": 1}
    assert orjson.loads(responder.records[0].value)["entities"] == {"applicant_id": 17}

    process = await start("request", environment, *arguments)
    out, log = await ended(process)
    assert process.returncode == 0, log
    assert "completed" in out
    assert "result.x" in out

    async def reject(request: dict[str, Any], headers: dict[str, bytes]) -> dict[str, Any] | None:
        return reply_members(
            "rejected", {"code": "path_unknown", "message": "no route"}, request_id=headers["request-id"].decode()
        )

    responder.behaviour = reject
    process = await start("request", environment, *arguments)
    out, log = await ended(process)
    assert process.returncode == 1, log
    assert "path_unknown" in out

    process = await start("request", environment, "/a", "--inputs", "nonsense")
    _, log = await ended(process)
    assert process.returncode == 2
    assert "NAME=VALUE" in log
