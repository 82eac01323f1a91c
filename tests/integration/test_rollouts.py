"""Rollouts from end to end on real Kafka: real decisions, judged by workers that are killed and frozen.

What happened is read from the registry's topic, which has every revision, and from the audit's.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import orjson
import pytest
import zstandard
from confluent_kafka import Producer
from typer.testing import CliRunner

from app.adapters.record_codec import decode_record
from app.adapters.registry_topic import POINTER_KEY, read_head, read_published
from app.adapters.topic_reader import read_topic
from app.adapters.topics import REGISTRY_TOPIC
from app.cli import app as command_line
from app.commands.rollouts import give_order
from app.domain.rollouts import Running, rollouts_in
from tests.support.caller import Caller, request
from tests.support.cluster import Cluster
from tests.support.cluster_documents import expected
from tests.support.cluster_models import SwitchableModels
from tests.support.rollouts import SCORED, begun, rollout_documents, with_rollout

WITHIN_S = 120.0
_PAUSE_S = 0.03
SPOILED = b"not json"


@pytest.fixture(scope="module")
def new_models() -> Iterator[SwitchableModels]:
    """Where version 2 runs: apart from version 1, so that it can fail alone."""
    models = SwitchableModels()
    models.start()
    yield models
    models.stop()


@pytest.fixture
def cluster(standing_cluster: Cluster, new_models: SwitchableModels) -> Cluster:
    """A decide worker and a rollouts worker, ready; all models answer."""
    new_models.heal()
    standing_cluster.heal("decide-0", "rollouts-0")
    return standing_cluster


@pytest.fixture
def commands(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, and commands run in this process find it."""
    for name in ("KAFKA_BOOTSTRAP", "TOPIC_PREFIX", "PARTITIONS", "AUDIT_BUCKET", "AUDIT_TABLE"):
        monkeypatch.setenv(f"BROKER_{name}", cluster.env[f"BROKER_{name}"])
    monkeypatch.setenv("COLUMNS", "200")
    return cluster


def begin(cluster: Cluster, new_models: SwitchableModels, **rollout: Any) -> int:
    """Publish the rollout as `apply` begins it; the moment, which tells it from those of other tests."""
    since = time.time_ns() // 1_000_000
    contents = rollout_documents(
        cluster.models.url, prefix=cluster.settings.topic_prefix, bad_url=new_models.url, **rollout
    )
    cluster.publish(with_rollout(begun(contents, since=since)))
    return since


def running(cluster: Cluster) -> Running:
    published = read_published(cluster.settings)
    assert published is not None
    return next(each for each in rollouts_in(published.revision.documents) if each.name == SCORED)


def statuses(cluster: Cluster, since: int) -> Sequence[tuple[str, int]]:
    """State and step of the rollout in every revision since, repeats left out."""
    contents: dict[bytes, bytes] = {}
    seen: list[tuple[int, str, int]] = []
    for record in read_topic(cluster.settings, cluster.settings.topic(REGISTRY_TOPIC)):
        assert record.key is not None
        assert record.value is not None
        if record.key != POINTER_KEY:
            contents[record.key] = record.value
            continue
        if record.value == SPOILED:
            continue
        revision = orjson.loads(record.value)["revision"].encode()
        for document in orjson.loads(zstandard.ZstdDecompressor().decompress(contents[revision])):
            status = document.get("status", {}).get("rollouts", {}).get(SCORED.key)
            if document["metadata"]["name"] == SCORED.route and status and status["since"] >= since:
                told = (status["since"], status["state"], status["step"])
                if not seen or seen[-1] != told:
                    seen.append(told)
    assert len(seen) == len(set(seen)), f"a status came back: {seen}"
    return [(state, step) for _, state, step in seen]


def told(cluster: Cluster, since: int) -> Mapping[str, set[bytes]]:
    """The audit's records of the rollout since, by id in the order in which they came: what they say, each once."""
    found: dict[str, set[bytes]] = {}
    for record in read_topic(cluster.settings, cluster.settings.topic("inference.audit")):
        if ("kind", b"rollout") not in record.headers or record.value is None:
            continue
        decoded = decode_record(record.value)
        if decoded.received_ms >= since:
            found.setdefault(decoded.execution_id, set()).add(record.value)
    return found


def evidence(cluster: Cluster, since: int) -> Sequence[dict[str, Any]]:
    """What the audit tells of each step since, one account a step."""
    records = told(cluster, since)
    assert all(len(versions) == 1 for versions in records.values()), "a step was told in two ways"
    return [orjson.loads(decode_record(next(iter(versions))).evidence or b"") for versions in records.values()]


class Traffic:
    """Requests to the route, one after the other until stopped."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self.sent: list[dict[str, Any]] = []
        self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        while True:
            body = request("/scored", float(len(self.sent)), subject="subject-7")
            await self._caller.send(body, self._caller.spring(), key=body["request_id"].encode())
            self.sent.append(body)
            await asyncio.sleep(_PAUSE_S)

    async def stop(self) -> None:
        self._sending.cancel()
        await asyncio.gather(self._sending, return_exceptions=True)

    async def replies(self) -> Sequence[dict[str, Any]]:
        """The reply to each request that was sent, in that order: completed, and with the right answer."""
        await self.stop()
        records = await self._caller.replies(len(self.sent))
        found = {dict(record.headers)["request-id"].decode(): orjson.loads(record.value) for record in records}
        for body in self.sent:
            members = found[body["request_id"]]
            assert members["status"] == "completed", members
            assert members["result"]["y"] == expected(body["inputs"]["x"], "subject-7")
        return [found[body["request_id"]] for body in self.sent]


@contextlib.asynccontextmanager
async def traffic_to(cluster: Cluster) -> AsyncIterator[Traffic]:
    async with Caller(cluster) as caller:
        traffic = Traffic(caller)
        try:
            yield traffic
        finally:
            await traffic.stop()


def versions(replies: Sequence[dict[str, Any]]) -> list[str]:
    return [members["outputs"]["first"]["version"] for members in replies]


async def until(holds: Any, otherwise: Any, within_s: float = WITHIN_S) -> None:
    end = time.monotonic() + within_s
    while not await asyncio.to_thread(holds):
        assert time.monotonic() < end, otherwise()
        await asyncio.sleep(0.2)


async def until_state(cluster: Cluster, state: str) -> None:
    def said() -> str:
        return f"{running(cluster).status}, not {state}\n{cluster.tails()}"

    await until(lambda: running(cluster).status.state == state, said)


async def until_told(cluster: Cluster, since: int, count: int) -> None:
    await until(lambda: len(told(cluster, since)) >= count, lambda: f"{told(cluster, since)}\n{cluster.tails()}")


async def test_a_good_version_is_promoted_step_by_step(cluster: Cluster, new_models: SwitchableModels) -> None:
    """Each step is a revision and a record in the audit that says what it was judged by; then it serves all."""
    since = await asyncio.to_thread(begin, cluster, new_models)
    async with traffic_to(cluster) as traffic:
        await until_state(cluster, "promoted")
        await until_told(cluster, since, 4)
        replies = await traffic.replies()
    assert set(versions(replies)) == {"1", "2"}
    walked = await asyncio.to_thread(statuses, cluster, since)
    assert walked == [("progressing", 0), ("progressing", 1), ("progressing", 2), ("promoted", 2)]
    accounts = await asyncio.to_thread(evidence, cluster, since)
    assert [(each["action"], each["step"], each["percent"]) for each in accounts] == [
        ("start", 0, 10),
        ("advance", 1, 50),
        ("advance", 2, 100),
        ("promote", 2, 100),
    ]
    for each in accounts[1:]:
        assert each["stats"]["decisions"] >= 5
        assert each["stats"]["errors"] == 0
        assert each["revision"].startswith("sha256:")
        assert each["previous"].startswith("sha256:")
    async with Caller(cluster) as caller:
        answers = [
            orjson.loads((await caller.ask(request("/scored", 10_000.0 + number))).value) for number in range(10)
        ]
    assert set(versions(answers)) == {"2"}


async def test_a_bad_version_is_taken_back_by_itself(cluster: Cluster, new_models: SwitchableModels) -> None:
    """It answers 500: callers get the other version's answer meanwhile, and soon nobody is sent to it any more."""
    new_models.switch("inline", "error")
    since = await asyncio.to_thread(begin, cluster, new_models, min_decisions=10)
    async with traffic_to(cluster) as traffic:
        await until_state(cluster, "aborted")
        await until_told(cluster, since, 2)
        replies = await traffic.replies()
    assert set(versions(replies)) == {"1"}
    assert await asyncio.to_thread(statuses, cluster, since) == [("progressing", 0), ("aborted", 0)]
    start, abort = await asyncio.to_thread(evidence, cluster, since)
    assert (start["action"], abort["action"], abort["percent"]) == ("start", "abort", 0)
    assert abort["stats"]["errors"] == abort["stats"]["decisions"] >= 3
    assert "errors in" in abort["reason"]
    new_models.heal()
    async with Caller(cluster) as caller:
        for number in range(10):
            body = request("/scored", 20_000.0 + number)
            await caller.ask(body)
            assert new_models.calls(body["request_id"]) == 0


async def test_a_bad_version_is_taken_back_although_the_pointer_is_bad(
    cluster: Cluster, new_models: SwitchableModels
) -> None:
    """Workers go by the last good revision; the one that takes the version back follows it, and counts from then on."""
    new_models.switch("inline", "error")
    since = await asyncio.to_thread(begin, cluster, new_models, min_decisions=12)
    await asyncio.to_thread(spoil, cluster)
    async with traffic_to(cluster):
        await until(lambda: state_in_force(cluster) == "aborted", cluster.tails)
        await until_told(cluster, since, 2)
    assert await asyncio.to_thread(read_published, cluster.settings) is not None
    walked = await asyncio.to_thread(statuses, cluster, since)
    assert walked == [("progressing", 0), ("aborted", 0)]


def spoil(cluster: Cluster) -> None:
    """Write a pointer by hand that nobody can read."""
    producer = Producer({"bootstrap.servers": cluster.settings.kafka_bootstrap})
    producer.produce(cluster.settings.topic(REGISTRY_TOPIC), key=POINTER_KEY, value=SPOILED, partition=0)
    assert producer.flush(20) == 0


def state_in_force(cluster: Cluster) -> str:
    """The rollout's state in the revision that workers go by."""
    last_good = read_head(cluster.settings).last_good
    assert last_good is not None
    return next(each.status.state for each in rollouts_in(last_good.documents) if each.name == SCORED)


async def test_a_version_that_would_decide_otherwise_is_taken_back(
    commands: Cluster, new_models: SwitchableModels
) -> None:
    """It answers soundly, and its shadow shows that every other decision flips; `compare` and `list` say the same."""
    cluster = commands
    new_models.switch("inline", "off")
    shadow = [{"version": "2", "percent": 100, "segment": "inputs.x < 20.0 ? 'small' : 'large'"}]
    since = await asyncio.to_thread(
        begin, cluster, new_models, shadow=shadow, min_decisions=20, every="1h", abortOn={"flipRate": 0.05}
    )
    async with traffic_to(cluster) as traffic:
        await until_state(cluster, "aborted")
        await until_told(cluster, since, 2)
        await traffic.stop()
    assert await asyncio.to_thread(statuses, cluster, since) == [("progressing", 0), ("aborted", 0)]
    abort = (await asyncio.to_thread(evidence, cluster, since))[-1]
    assert abort["action"] == "abort"
    assert abort["stats"]["flips"] >= 2
    assert "flips in" in abort["reason"]
    found = await asyncio.to_thread(command, "compare", SCORED.route, SCORED.task, "--json")
    (compared,) = found["shadows"]
    assert (compared["version"], compared["champions"]) == ("2", ["1"])
    assert compared["overall"]["flip_rate"] == 1
    assert compared["overall"]["outputs"]["y"]["mean_difference"] == pytest.approx(1)
    assert "small" in compared["segments"]
    listed = await asyncio.to_thread(command, "rollouts", "list", "--json")
    (rollout,) = listed["rollouts"]
    assert (rollout["rollout"], rollout["state"], rollout["percent"]) == (str(SCORED), "aborted", 0)
    assert "flips in" in rollout["reason"]
    await asyncio.to_thread(cluster.start, "audit-0")
    await until(lambda: kept_steps(since) == ["start", "abort"], lambda: f"{kept_steps(since)}\n{cluster.tails()}")


def kept_steps(since: int) -> list[str]:
    """What `decision show` tells of the rollout since, from S3 and DynamoDB."""
    answer = CliRunner().invoke(command_line, ["decision", "show", f"rollout/{SCORED}", "--json"])
    steps = orjson.loads(answer.stdout)["rollout"] if answer.exit_code == 0 else []
    return [step["evidence"]["action"] for step in steps if step["received_ms"] >= since]


def command(*words: str) -> Any:
    """What a command prints as JSON."""
    answer = CliRunner().invoke(command_line, words)
    assert answer.exit_code == 0, answer.output
    return orjson.loads(answer.stdout)


async def test_workers_that_are_killed_or_frozen_skip_and_repeat_nothing(
    cluster: Cluster, new_models: SwitchableModels
) -> None:
    """Two workers, of which one after the other is killed, frozen and woken while a rollout goes through its steps."""
    steps = [5, 10, 20, 30, 40, 50, 60, 100]
    await asyncio.to_thread(cluster.start, "rollouts-1")
    since = await asyncio.to_thread(begin, cluster, new_models, steps=steps, min_decisions=1)
    async with traffic_to(cluster) as traffic:
        for turn, victim in enumerate(("rollouts-0", "rollouts-1", "rollouts-0")):
            at = (await asyncio.to_thread(running, cluster)).status.step
            await until(
                lambda: running(cluster).status.step > at or running(cluster).status.state == "promoted",  # noqa: B023
                cluster.tails,
            )
            if turn == 1:
                cluster[victim].pause()
                await asyncio.sleep(cluster.settings.session_timeout / 1_000 + 4)
                cluster[victim].resume()
            else:
                await asyncio.to_thread(cluster[victim].kill)
                await asyncio.to_thread(cluster[victim].start)
        await until_state(cluster, "promoted")
        await until_told(cluster, since, len(steps) + 1)
        await traffic.replies()
    walked = await asyncio.to_thread(statuses, cluster, since)
    assert walked == [*(("progressing", step) for step in range(len(steps))), ("promoted", len(steps) - 1)]
    accounts = await asyncio.to_thread(evidence, cluster, since)
    assert [each["action"] for each in accounts] == ["start", *["advance"] * (len(steps) - 1), "promote"]
    assert [each["step"] for each in accounts] == [*range(len(steps)), len(steps) - 1]


async def test_an_operator_pauses_resumes_and_aborts(commands: Cluster, new_models: SwitchableModels) -> None:
    """What is paused stays, whatever comes; resumed, it goes on; each order is told in the audit."""
    cluster = commands
    since = await asyncio.to_thread(begin, cluster, new_models)
    name = str(SCORED)
    async with traffic_to(cluster) as traffic:
        await until_told(cluster, since, 1)
        told_of = await asyncio.to_thread(command, "rollouts", "pause", name, "--json")
        assert (told_of["from"], told_of["to"]) == ("progressing", "paused")
        # A command takes its time to start, and a step may be over by then.
        assert told_of["percent"] in (10, 50)
        shown = await asyncio.to_thread(CliRunner().invoke, command_line, ["rollouts", "list"])
        assert "paused by operator" in shown.stdout
        paused_at = (await asyncio.to_thread(running, cluster)).status
        await asyncio.sleep(4)
        assert (await asyncio.to_thread(running, cluster)).status == paused_at
        for words, code, said in (
            (("pause", name), 1, "is paused, and cannot be told to pause"),
            (("pause", "scored/default/other"), 2, "no rollout scored/default/other in sha256:"),
            (("abort", "scored"), 2, "is not ROUTE/RULE/TASK"),
        ):
            answer = await asyncio.to_thread(CliRunner().invoke, command_line, ["rollouts", *words])
            assert answer.exit_code == code
            assert said in answer.stderr
        await asyncio.to_thread(command, "rollouts", "resume", name, "--json")
        await until_state(cluster, "promoted")
        await asyncio.to_thread(give_order, cluster.settings, name, "abort")
        await until(
            lambda: "abort" in [each["action"] for each in evidence(cluster, since)],
            lambda: f"{evidence(cluster, since)}\n{cluster.tails()}",
        )
        await traffic.replies()
    actions = [each["action"] for each in await asyncio.to_thread(evidence, cluster, since)]
    assert actions[0] == "start"
    assert actions.index("pause") < actions.index("resume") < actions.index("promote") < actions.index("abort")
    assert len(actions) == len(await asyncio.to_thread(statuses, cluster, since))
