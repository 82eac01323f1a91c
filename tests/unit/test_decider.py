"""The decide engine over a log in memory and in virtual time: each outcome, each kind of duplicate, each bad moment."""

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from app.adapters.record_codec import EntryState
from app.adapters.task_codec import decode_result
from app.adapters.topics import read_documents, wanted_topics
from app.agents.admission import Admission
from app.agents.decider import FORGETTING_MAX
from app.agents.ledger import Ledger
from app.domain.decisions import Kind
from app.domain.errors import BrokerError, Code, Problem, RequestRefused, StoreUnavailable
from app.domain.join import Status
from app.domain.requests import Headers, InboundRecord, Request, positional_id
from app.ports.log import OutboundRecord
from app.settings import Settings
from tests.support.decide_world import (
    AUDIT,
    DEAD,
    REPLIES,
    REQUESTS,
    RESULTS,
    TASKS,
    ScriptedModel,
    World,
    every_route,
    header,
    held_by,
    is_out,
)
from tests.support.memory_log import Fate
from tests.support.virtual_time import START_MS, in_virtual_time

REVISION = every_route()
WINDOW = {"dedupe_window": "2s"}


async def world(settings: dict[str, Any] | None = None) -> World:
    """A world with one worker that owns everything."""
    made = World(REVISION, settings)
    await made.start("one")
    return made


async def settled(made: World, within_s: float = 3.0) -> None:
    """Let everything come to its end; nothing may have crashed, and every request is acknowledged."""
    await asyncio.sleep(within_s)
    assert not made.faults
    for topic in (REQUESTS, RESULTS):
        for partition, lane in enumerate(made.log.topics[topic]):
            assert made.committed.get((topic, partition), 0) == len(lane)
    await made.close()


def codes(reply: dict[str, Any]) -> list[str]:
    """The codes of a reply's errors."""
    return [error["code"] for error in reply["errors"]]


# --- outcomes ---------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_inline_request_is_completed() -> None:
    """Entry, audit record, reply, in this order, and the reply carries all that its headers should."""
    made = await world()
    made.send("r", headers=(("traceparent", b"00-1-2-01"),))
    await settled(made)
    (reply,) = made.replies()
    (audit,) = made.audits()
    assert made.reply()["status"] == "completed"
    assert made.reply()["latency_ms"] == 5
    assert audit.reply == reply.record.value
    assert audit.kind is Kind.DECISION
    assert made.entries("r") == [EntryState.COMPLETED]
    assert [stored.topic for stored in sorted_by_order(made)] == [REQUESTS, "decide-joins-changelog", AUDIT, REPLIES]
    assert reply.record.headers == (
        ("kafka_correlationId", b"c"),
        ("request-id", b"r"),
        ("execution-id", b"execution-0"),
        ("status", b"completed"),
        ("content-type", b"application/json"),
        ("traceparent", b"00-1-2-01"),
    )


def sorted_by_order(made: World) -> list[Any]:
    """Everything in the log, in the order it was written."""
    every = [stored for topic in made.log.topics for stored in made.log.records(topic)]
    return sorted(every, key=lambda stored: stored.order)


@pytest.mark.parametrize(
    ("path", "amount", "status", "expected"),
    [
        ("/inline", 5.0, "completed", []),
        ("/inline", -1.0, "failed", ["model_error"]),
        ("/inline", 9_000.0, "expired", ["deadline_exceeded"]),
        ("/inline", 20_000.0, "expired", ["deadline_exceeded"]),
        ("/inline", None, "rejected", ["feature_missing"]),
        ("/inline", "much", "rejected", ["feature_invalid"]),
        ("/defaulted", -1.0, "partial", ["model_error"]),
        ("/defaulted", None, "partial", ["feature_missing"]),
        ("/broken", 5.0, "failed", ["result_failed"]),
        ("/unserved", 5.0, "failed", ["model_unavailable"]),
        ("/choosy", 5.0, "rejected", ["no_rule_matched"]),
        ("/choosy", "much", "rejected", ["rule_failed"]),
        ("/nowhere", 5.0, "rejected", ["path_unknown"]),
        ("/queued", 5.0, "expired", ["deadline_exceeded"]),
        ("/optional", 5.0, "partial", ["deadline_exceeded"]),
    ],
)
def test_each_way_to_end(path: str, amount: object, status: str, expected: list[str]) -> None:
    """Whatever happens, there is one reply with its codes, one audit record, and the entry is completed."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.send("r", path, amount=amount)
        await settled(made)
        assert made.reply()["status"] == status
        assert codes(made.reply()) == expected
        assert [audit.status for audit in made.audits()] == [Status(status)]
        assert made.entries("r")[-1] is EntryState.COMPLETED

    run()


@in_virtual_time
async def test_a_request_that_hangs_is_answered_at_its_deadline() -> None:
    """A backend that never returns costs the request its deadline, and the moment in which a call says how it ended."""
    made = await world()
    made.send("r", amount=20_000.0)
    await settled(made)
    assert made.reply()["latency_ms"] == 420


@in_virtual_time
async def test_expired_on_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline in the past: no model is called, and nothing evaluated, which may have been too much before."""
    made = await world()
    monkeypatch.setattr("app.agents.decider.plan_of", lambda *_: pytest.fail("it was planned"))
    made.send("r", headers=(("deadline-ms", str(START_MS - 1).encode()),))
    await settled(made)
    reply = made.reply()
    assert (reply["status"], reply["route"], reply["rule"]) == ("expired", "inline", None)
    assert "had passed when the request arrived: send it earlier" in reply["errors"][0]["message"]
    assert not made.model.calls


@in_virtual_time
async def test_expired_while_no_worker_was_free() -> None:
    """What waited longer than it had, as behind a slow feature function, came in time: its caller is not told to send
    it earlier."""
    made = World(REVISION)
    made.send("r", headers=(("deadline-ms", str(START_MS + 40).encode()),))
    await asyncio.sleep(0.1)
    await made.start("one")
    await settled(made)
    [error] = made.reply()["errors"]
    assert error["code"] == "deadline_exceeded"
    assert "passed before a worker was free, 100 ms after the request arrived" in error["message"]
    assert "earlier" not in error["message"]


@in_virtual_time
async def test_without_a_registry_all_paths_are_unknown() -> None:
    """A worker without a revision rejects, and says what to do."""
    made = World(None)
    await made.start("one")
    made.send("r")
    await settled(made)
    assert codes(made.reply()) == ["path_unknown"]
    assert "model-broker apply" in made.reply()["errors"][0]["message"]


@in_virtual_time
async def test_features_away_fails_only_what_requires_them() -> None:
    """With the store away a feature with a default is defaulted, and the audit says why."""
    made = await world()
    made.features.available = False
    made.send("r")
    await settled(made)
    assert made.reply()["status"] == "completed"
    (audit,) = made.audits()
    (age,) = [feature for feature in audit.tasks[0].features if feature.ref == "applicant.age"]
    assert age.value == 35
    assert "does not answer" in (age.reason or "")


@in_virtual_time
async def test_a_wrong_entity_is_rejected() -> None:
    """An entity of the wrong type is named."""
    made = await world()
    made.send("r", value=b'{"path":"/inline","entities":{"applicant_id":"x"},"inputs":{"amount":1}}')
    made.send("s", value=b'{"path":"/inline","inputs":{"amount":1}}', correlation="d")
    await settled(made)
    assert codes(made.reply("c")) == ["entity_invalid"]
    assert codes(made.reply("d")) == ["entity_missing"]


@in_virtual_time
async def test_an_id_stands_for_what_came_first() -> None:
    """Also where its reply topic has to be looked up, and what contradicts it is read meanwhile."""
    made = await world()
    made.log.slow_topics_s = 0.1
    made.send("r", amount=1.0, correlation="first")
    made.send("r", amount=2.0, correlation="second", reply_to=None)
    made.send("s", amount=2.0, correlation="other", reply_to=None)
    await asyncio.sleep(0.05)
    assert [audit.request_id for audit in made.audits()] == ["s"]
    await settled(made)
    assert made.reply("first")["status"] == "completed"
    kinds = {audit.kind: dict(audit.source.headers)["kafka_correlationId"] for audit in made.audits()[1:]}
    assert kinds == {Kind.DECISION: b"first", Kind.REFUSAL: b"second"}


# --- requests that are none -------------------------------------------------------------------------------------------


@in_virtual_time
async def test_malformed_bytes_are_answered_and_kept() -> None:
    """What cannot be read is rejected under its position's id, audited, and kept in the dead-letter topic."""
    made = await world()
    sent = made.send(None, value=b"\x80 no request")
    await settled(made)
    assert codes(made.reply()) == ["request_malformed"]
    assert made.reply()["request_id"] == positional_id(sent.inbound())
    (dead,) = made.log.records(DEAD)
    assert dead.record.value == b"\x80 no request"
    assert dead.partition == sent.partition
    assert [audit.status for audit in made.audits()] == [Status.REJECTED]


@pytest.mark.parametrize(
    "reply_to",
    [
        "secrets",
        "no.such.replies",
        # What a pattern may allow and no reply may be written to: the broker's own topics, and what is no topic's name.
        "inference.audit",
        "inference.tasks.default",
        "inference.requests-dlt",
        "nul\0replies",
        "x" * 250 + "replies",
        "..",
    ],
)
def test_a_reply_topic_that_may_not_be_written_to(reply_to: str) -> None:
    """Rejected and audited; nothing is written anywhere else."""

    @in_virtual_time
    async def run() -> None:
        made = await world({"reply_topics_allowed": ["*" if reply_to != "secrets" else "r"]})
        made.send("r", reply_to=reply_to)
        await settled(made)
        assert {topic for topic, lanes in made.log.topics.items() if any(lanes)} == {REQUESTS, AUDIT}
        (audit,) = made.audits()
        assert [problem.code for problem in audit.problems] == [Code.REPLY_TOPIC_NOT_ALLOWED]

    run()


@pytest.mark.parametrize(
    "reply_to",
    sorted(
        topic.name
        for topic in wanted_topics(read_documents(), Settings(), ["default"])
        if topic.name != "inference.replies"
    ),
)
def test_the_broker_s_own_topics_take_no_replies(reply_to: str) -> None:
    """Whatever the setting allows, and though the topic is there; the message says why."""

    @in_virtual_time
    async def run() -> None:
        made = await world({"reply_topics_allowed": ["*"]})
        made.log.topics.setdefault(reply_to, [[], []])
        with capture_logs() as logs:
            made.send("r", reply_to=reply_to)
            await settled(made)
        assert {topic for topic, lanes in made.log.topics.items() if any(lanes)} == {REQUESTS, AUDIT}
        (problem,) = made.audits()[0].problems
        assert (
            problem.message
            == f"reply topic {reply_to} is not allowed: the broker keeps its own records there; name one of your own"
        )
        (refused,) = [line for line in logs if line["event"] == "refused"]
        assert (refused["message"], refused["reply_topic"]) == (problem.message, reply_to)

    run()


@in_virtual_time
async def test_a_reply_partition_that_is_none() -> None:
    """Not four bytes: rejected, no model is asked, and the reply goes to the topic without a partition."""
    made = await world()
    made.send("r", headers=(("kafka_replyPartition", b"0"),))
    await settled(made)
    assert made.reply()["status"] == "rejected"
    assert codes(made.reply()) == ["request_invalid"]
    assert "kafka_replyPartition" in made.reply()["errors"][0]["message"]
    assert {reply.record.partition for reply in made.replies()} == {None}


@pytest.mark.parametrize(
    "headers", [(("deadline-ms", b"soon"),), (("priority", b"urgent"),), (("kafka_replyPartition", b"0"),)]
)
def test_headers_that_are_mended(headers: Headers) -> None:
    """What only its headers had wrong is refused under its id, and decided under it once they are right."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        body = b'{"request_id":"mine","path":"/inline","entities":{"applicant_id":17},"inputs":{"amount":5.0}}'
        made.send(None, value=body, headers=headers, correlation="wrong")
        await asyncio.sleep(1)
        made.send(None, value=body, correlation="right")
        await settled(made)
        wrong, right = made.reply("wrong"), made.reply("right")
        assert (wrong["request_id"], wrong["status"], codes(wrong)) == ("mine", "rejected", ["request_invalid"])
        assert (right["request_id"], right["status"]) == ("mine", "completed")
        assert [audit.kind for audit in made.audits()] == [Kind.REFUSAL, Kind.DECISION]

    run()


@in_virtual_time
async def test_an_answer_to_another_execution() -> None:
    """A result that an earlier beginning of the request asked for is not taken for its own."""
    made = await world()
    made.send("r", "/queued")
    await asyncio.sleep(0.1)
    (task,) = made.tasks()
    made.answer(replace(task, row=replace(task.row, execution_id="of another beginning")))
    await asyncio.sleep(0.1)
    assert not made.replies()
    mine = made.answer(task)
    await settled(made)
    (audit,) = made.audits()
    assert audit.tasks[0].result is not None
    assert audit.tasks[0].result.output == decode_result(mine.record.value or b"").answer.outputs


@in_virtual_time
async def test_without_an_address_a_request_is_decided_all_the_same() -> None:
    """No reply is due, the record is."""
    made = await world()
    made.send("r", reply_to=None)
    await settled(made)
    assert [audit.status for audit in made.audits()] == [Status.COMPLETED]
    assert not made.replies()


@in_virtual_time
async def test_too_large_to_read_and_too_large_to_write() -> None:
    """A request past its bound is rejected; a record past Kafka's fails, and the reply still goes out."""
    made = await world({"request_bytes_max": 500, "record_bytes_max": 16_384})
    made.send("r", value=b"x" * 501)
    made.send("v", value=random_bytes(16_000), correlation="v")
    for request_id, path in (("s", "/inline"), ("t", "/queued"), ("u", "/mixed")):
        made.send(request_id, path, correlation=request_id, headers=(("padding", random_bytes(16_000)),))
    await asyncio.sleep(1)
    made.send("v", value=random_bytes(16_100), correlation="conflict")
    await settled(made)
    assert codes(made.reply("c")) == codes(made.reply("v")) == ["request_too_large"]
    assert codes(made.reply("conflict")) == ["request_id_conflict"]
    for correlation in ("s", "t", "u"):
        assert made.reply(correlation)["status"] == "failed"
        assert codes(made.reply(correlation)) == ["record_too_large"]


@in_virtual_time
async def test_headers_have_a_bound() -> None:
    """Whichever header it is: turned away, and the id is free for a request with headers that can be kept."""
    made = await world()
    made.send("r", headers=(("x-foo", random_bytes(600_000)),))
    made.send("s", correlation="c" * 600_000)
    await asyncio.sleep(1)
    assert codes(made.reply("c")) == codes(made.reply("c" * 600_000)) == ["request_too_large"]
    assert "32768 are allowed" in made.reply("c")["errors"][0]["message"]
    assert made.model.calls == []
    made.send("r", correlation="d")
    await settled(made)
    assert made.reply("d")["status"] == "completed"


def random_bytes(count: int) -> bytes:
    """Bytes that do not compress, the same each time."""
    return random.Random(1).randbytes(count)


# --- duplicates -------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_repeated_request_gets_the_same_bytes() -> None:
    """After the decision: the first reply, under its own correlation id, and no model is called."""
    made = await world()
    made.send("r", correlation="first")
    await asyncio.sleep(1)
    made.send("r", correlation="second")
    await settled(made)
    first, second = made.replies()
    assert first.record.value == second.record.value
    assert (header(first.record, "kafka_correlationId"), header(second.record, "kafka_correlationId")) == (
        "first",
        "second",
    )
    assert len(made.model.calls) == len(made.audits()) == 1


@pytest.mark.parametrize("path", ["/inline", "/queued", "/mixed"])
def test_a_request_repeated_in_flight_waits(path: str) -> None:
    """Before the decision: it waits for it, and calls and sends nothing."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.send("r", path, amount=50.0, correlation="first")
        await asyncio.sleep(0.02)
        made.send("r", path, amount=50.0, correlation="second")
        await asyncio.sleep(0.1)
        for queued in made.tasks():
            made.answer(queued)
        await settled(made)
        first, second = made.replies()
        assert first.record.value == second.record.value
        assert made.reply("second")["status"] == "completed"
        assert len(made.model.calls) == (0 if path == "/queued" else 1)
        assert len(made.tasks()) == (0 if path == "/inline" else 1)

    run()


@pytest.mark.parametrize("in_flight", [True, False])
def test_the_same_id_for_another_question_is_refused(in_flight: bool) -> None:
    """Rejected as a conflict, recorded beside the decision, and the first stands."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.send("r", amount=50.0, correlation="first")
        await asyncio.sleep(0.01 if in_flight else 1)
        made.send("r", amount=60.0, correlation="second")
        made.send("r", correlation="third", value=b"{")
        await settled(made)
        assert made.reply("first")["status"] == "completed"
        for correlation in ("second", "third"):
            assert codes(made.reply(correlation)) == ["request_id_conflict"]
        kinds = sorted(audit.kind for audit in made.audits())
        assert kinds == [Kind.DECISION, Kind.REFUSAL, Kind.REFUSAL]

    run()


@in_virtual_time
async def test_a_refusal_is_the_same_at_every_delivery() -> None:
    """A worker that dies before the conflict is acknowledged leaves no second version of it."""
    made = await world()
    made.send("r", amount=1.0, correlation="first")
    await asyncio.sleep(1)
    made.processes["one"].arm(Fate.WRITTEN, Fate.KILLED_AFTER)
    made.send("r", amount=2.0, correlation="second")
    await asyncio.sleep(1)
    await made.start("two")
    await settled(made)
    assert len(made.replies("second")) == 2
    assert codes(made.reply("second")) == ["request_id_conflict"]
    refusals = {audit.execution_id for audit in made.audits() if audit.kind is Kind.REFUSAL}
    assert len(refusals) == 1


@in_virtual_time
async def test_a_duplicate_in_another_partition_at_the_same_offset_is_answered() -> None:
    """A caller whose keys are not stable still gets a reply for each record while the first is in flight."""
    made = await world()
    first = made.send("r", amount=50.0, correlation="first")
    other = made.log.partitions - 1 - first.partition
    headers = (("request-id", b"r"), ("kafka_replyTopic", REPLIES.encode()), ("kafka_correlationId", b"second"))
    made.log.append(replace(first.record, partition=other, headers=headers))
    await settled(made)
    assert made.reply("first") == made.reply("second")


@in_virtual_time
async def test_past_the_window_an_id_is_free_again() -> None:
    """The entry is deleted, and the same id makes a new decision."""
    made = await world(WINDOW)
    made.send("r", correlation="first")
    await asyncio.sleep(2.1)
    assert made.entries("r") == [EntryState.COMPLETED, None]
    made.send("r", correlation="second")
    await settled(made, 1.0)
    assert made.reply("first")["execution_id"] != made.reply("second")["execution_id"]


@in_virtual_time
async def test_the_window_ends_for_entries_of_before_a_restart() -> None:
    """A worker that takes over deletes what its predecessor decided, a broker that is unwell notwithstanding."""
    made = await world(WINDOW)
    made.send("r")
    await asyncio.sleep(1)
    made.processes["one"].kill()
    second = await made.start("two")
    await asyncio.sleep(0.1)
    second.arm(Fate.LOST, Fate.UNACKNOWLEDGED)
    await settled(made)
    assert made.entries("r")[-1] is None


# --- queued tasks -----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_queued_request_is_durable_before_its_tasks_are_out() -> None:
    """Pending entry, task, acknowledgement; then the result, the decision, its record and the reply."""
    made = await world()
    made.send("r", "/queued")
    await asyncio.sleep(0.1)
    assert made.entries("r") == [EntryState.PENDING]
    (queued,) = made.tasks()
    assert sum(made.committed.values()) == 1
    made.answer(queued)
    await settled(made)
    assert made.reply()["status"] == "completed"
    assert made.entries("r") == [EntryState.PENDING, EntryState.DECIDED, EntryState.COMPLETED]


@in_virtual_time
async def test_results_that_are_repeated_late_or_of_nothing_change_nothing() -> None:
    """One decision; each result is acknowledged all the same."""
    made = await world()
    made.send("r", "/pair")
    await asyncio.sleep(0.05)
    first, second = made.tasks()
    made.answer(first)
    made.answer(first, problem=Problem(Code.MODEL_ERROR, "again, and otherwise"))
    made.answer(second, task="stranger")
    await asyncio.sleep(0.05)
    made.answer(second)
    await asyncio.sleep(0.05)
    made.answer(second)
    made.answer(first)
    await settled(made)
    assert made.reply()["status"] == "completed"
    assert len(made.audits()) == len(made.replies()) == 1


@in_virtual_time
async def test_a_result_after_the_deadline_is_late() -> None:
    """The timer decides at the deadline, with what came."""
    made = await world()
    made.send("r", "/pair")
    await asyncio.sleep(0.05)
    first, second = made.tasks()
    made.answer(first)
    await asyncio.sleep(0.5)
    made.answer(second)
    await settled(made)
    assert made.reply()["status"] == "expired"
    assert made.reply()["latency_ms"] == 400
    assert made.reply()["outputs"]["pd"]["status"] == "ok"
    assert made.reply()["outputs"]["late"]["status"] == "timeout"


@in_virtual_time
async def test_a_pool_that_fails() -> None:
    """Its problem is the task's."""
    made = await world()
    made.send("r", "/queued")
    await asyncio.sleep(0.05)
    made.answer(made.tasks()[0], problem=Problem(Code.MODEL_ERROR, "no"))
    await settled(made)
    assert made.reply()["errors"] == [{"code": "model_error", "task": "pd", "message": "no"}]


@in_virtual_time
async def test_no_more_joins_wait_than_may() -> None:
    """Past the bound requests wait for room, and an abandoned one takes none."""
    made = await world({"joins_pending_max": 1})
    for number in range(4):
        made.send(f"r{number}", "/queued", correlation=f"c{number}")
    await asyncio.sleep(0.1)
    assert len(made.tasks()) == 1
    await made.rebalance({0: "nobody", 1: "nobody"})
    await made.rebalance({0: "one", 1: "one"})
    await settled(made)
    assert len({made.reply(f"c{number}")["request_id"] for number in range(4)}) == 4
    made = await world({"joins_pending_max": 1})
    made.send("again", "/queued")
    await asyncio.sleep(0.05)
    made.answer(made.tasks()[0])
    await settled(made)
    assert made.reply()["status"] == "completed"


@in_virtual_time
async def test_a_join_that_is_over_before_there_is_room_takes_none() -> None:
    """Its results were faster; those that come after it still find the room that there is."""
    made = await world({"joins_pending_max": 1})
    made.send("first", "/queued", correlation="first")
    await asyncio.sleep(0.01)
    made.send("second", "/mixed", correlation="second")
    await asyncio.sleep(0.02)
    for queued in made.tasks():
        if queued.row.request_id == "second":
            made.answer(queued)
    await asyncio.sleep(0.02)
    assert made.reply("second")["status"] == "completed"
    made.answer(made.tasks()[0])
    await asyncio.sleep(0.02)
    made.send("third", "/queued", correlation="third")
    await asyncio.sleep(0.02)
    made.answer(made.tasks()[-1])
    await settled(made)
    assert made.reply("first")["status"] == made.reply("third")["status"] == "completed"


@in_virtual_time
async def test_a_task_that_kafka_takes_too_late_is_not_sent() -> None:
    """Expired work is never dispatched, not even by the writes that are tried again."""
    made = await world()
    made.processes["one"].arm(Fate.WRITTEN, *[Fate.LOST] * 4)
    made.send("r", "/queued")
    await settled(made, 5.0)
    assert not made.tasks()
    assert made.reply()["status"] == "expired"


@in_virtual_time
async def test_a_join_that_becomes_durable_after_its_deadline_is_decided() -> None:
    """Kafka takes longer for the pending entry than the request has: the timer must not have fired for nothing."""
    made = await world()
    made.send("r", "/mixed", amount=5.0)
    await asyncio.sleep(0.003)
    made.processes["one"].arm(*[Fate.LOST] * 4)
    await settled(made, 5.0)
    assert made.reply()["status"] == "expired"


@in_virtual_time
async def test_an_older_write_never_lands_on_a_newer_one() -> None:
    """The first result's write fails and is tried again; meanwhile the second result completes the join."""
    made = await world()
    made.send("r", "/pair")
    await asyncio.sleep(0.05)
    first, second = made.tasks()
    made.processes["one"].arm(Fate.LOST)
    made.answer(first)
    await asyncio.sleep(0.001)
    made.answer(second)
    await settled(made)
    assert made.entries("r")[-1] is EntryState.COMPLETED
    assert len({audit.execution_id for audit in made.audits()}) == len(made.replies()) == 1
    assert made.reply()["status"] == "completed"


@in_virtual_time
async def test_two_results_at_once_are_both_kept() -> None:
    """A result that comes while the join is first written is in its entry before it is acknowledged."""
    made = await world()
    made.send("r", "/mixed", amount=20.0)
    await asyncio.sleep(0.0205)
    (queued,) = made.tasks()
    made.processes["one"].arm(Fate.SLOW)
    await asyncio.sleep(0.001)
    made.answer(queued)
    await settled(made)
    assert made.reply()["status"] == "completed"


# --- crashes, rebalances, an unwell broker ----------------------------------------------------------------------------


@pytest.mark.parametrize("fate", [Fate.KILLED_BEFORE, Fate.KILLED_AFTER])
@pytest.mark.parametrize("write", range(7))
@pytest.mark.parametrize("path", ["/inline", "/queued", "/mixed", "/nowhere"])
def test_a_worker_dies_at_each_write(path: str, write: int, fate: Fate) -> None:
    """Its successor finishes or begins anew; callers and auditors see one decision, duplicates included."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.processes["one"].arm(*[Fate.WRITTEN] * write, fate)
        made.send("r", path, correlation="first")
        await asyncio.sleep(0.05)
        for queued in made.tasks():
            made.answer(queued)
        await asyncio.sleep(0.05)
        made.send("r", path, correlation="second")
        await asyncio.sleep(0.05)
        if made.processes["one"].alive:
            made.processes["one"].kill()
        await made.start("two")
        await asyncio.sleep(0.05)
        for queued in made.tasks():
            made.answer(queued)
        await settled(made)
        assert made.reply("first") == made.reply("second")
        assert len({audit.reply for audit in made.audits()}) == 1
        executions = {audit.execution_id for audit in made.audits()}
        audited = min(stored.order for stored in made.log.records(AUDIT))
        assert executions == {made.reply("first")["execution_id"]}
        assert all(audited < reply.order for reply in made.replies())

    run()


@pytest.mark.parametrize("fate", [Fate.LOST, Fate.UNACKNOWLEDGED, Fate.SLOW])
@pytest.mark.parametrize("path", ["/inline", "/queued", "/mixed"])
def test_a_broker_that_is_unwell_delays_and_no_more(path: str, fate: Fate) -> None:
    """Every write is tried until it is acknowledged; what is written twice is the same."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.processes["one"].arm(*[fate, Fate.WRITTEN] * 6)
        made.send("r", path)
        await asyncio.sleep(0.2)
        for queued in made.tasks():
            made.answer(queued)
        await settled(made, 6.0)
        assert made.reply()["status"] in ("completed", "expired")
        assert len({audit.reply for audit in made.audits()}) == 1

    run()


@in_virtual_time
async def test_an_entry_that_was_decided_and_not_announced_is_announced_by_its_new_owner() -> None:
    """Nobody redelivers the request of a queued join: the new owner finds the entry and sends record and reply."""
    made = await world()
    made.send("r", "/queued")
    await asyncio.sleep(0.1)
    made.processes["one"].arm(Fate.KILLED_AFTER)
    made.answer(made.tasks()[0])
    await asyncio.sleep(0.1)
    assert made.entries("r")[-1] is EntryState.DECIDED
    assert not made.audits()
    await made.start("two")
    await settled(made)
    assert made.entries("r")[-1] is EntryState.COMPLETED
    assert made.reply()["status"] == "completed"


@in_virtual_time
async def test_a_deadline_that_passes_while_nobody_runs() -> None:
    """The join is expired by whoever comes."""
    made = await world()
    made.send("r", "/queued")
    await asyncio.sleep(0.1)
    made.processes["one"].kill()
    await asyncio.sleep(10)
    await made.start("two")
    await settled(made)
    assert made.reply()["status"] == "expired"


@in_virtual_time
async def test_where_nothing_was_ever_published_there_is_no_path() -> None:
    """That is an answer, and kept."""
    made = await world()
    made.registry.current, made.registry.blank = None, True
    made.send("r", "/scored")
    await settled(made)
    assert codes(made.reply()) == ["path_unknown"]


@in_virtual_time
async def test_where_no_revision_is_sound_requests_wait_for_one() -> None:
    """Within their deadlines; it would be untrue, and kept, that there is no path."""
    made = await world()
    sound = made.registry.current
    made.registry.current = None
    made.send("r")
    await asyncio.sleep(0.1)
    assert not made.replies()
    made.registry.current = sound
    await settled(made)
    assert made.reply()["status"] == "completed"


@in_virtual_time
async def test_a_request_whose_revision_never_comes_expires() -> None:
    """By the deadline that requests have by default; the reply says what to do."""
    made = await world({"default_deadline": 1_000})
    made.registry.current = None
    made.send("r")
    await asyncio.sleep(0.9)
    assert not made.replies()
    await settled(made)
    reply = made.reply()
    assert (reply["status"], codes(reply)) == ("expired", ["deadline_exceeded"])
    assert "no registry revision that was published is sound" in reply["errors"][0]["message"]


@in_virtual_time
async def test_a_join_whose_revision_is_gone_fails() -> None:
    """A worker that does not know the revision says so, once, to whoever waits."""
    made = await world()
    made.send("r", "/queued")
    await asyncio.sleep(0.1)
    made.processes["one"].kill()
    made.registry.current = None
    await made.start("two")
    made.answer(made.tasks()[0])
    await settled(made)
    assert codes(made.reply()) == ["internal_error"]
    assert len({audit.execution_id for audit in made.audits()}) == 1


@pytest.mark.parametrize(
    ("error", "status", "code", "said"),
    [
        (
            RequestRefused(Problem(Code.REQUEST_MALFORMED, "a schema that is gone")),
            "failed",
            "internal_error",
            "could not be read again: a schema that is gone",
        ),
        (StoreUnavailable("no schema registry"), "expired", "deadline_exceeded", "by its deadline: no schema registry"),
    ],
)
def test_a_join_whose_request_cannot_be_read_again(error: BrokerError, status: str, code: str, said: str) -> None:
    """Whoever waits is told so, and not that a revision is gone."""

    @in_virtual_time
    async def run() -> None:
        made = await world()
        made.send("r", "/queued")
        await asyncio.sleep(0.1)
        made.processes["one"].kill()

        async def read(_: Admission, __: InboundRecord) -> Request:
            raise error

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Admission, "read", read)
            await made.start("two")
            made.answer(made.tasks()[0])
            await settled(made)
        assert (made.reply()["status"], codes(made.reply())) == (status, [code])
        assert said in made.reply()["errors"][0]["message"]

    run()


@in_virtual_time
async def test_entries_that_are_all_over_at_once_are_forgotten_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart past the window: however many there are, so many tombstones are written at once."""
    made = await world(WINDOW)
    count = 3 * FORGETTING_MAX
    for number in range(count):
        made.send(f"r{number}", correlation=f"c{number}")
    await asyncio.sleep(1)
    made.processes["one"].kill()
    await made.processes["one"].gone()
    await asyncio.sleep(3)
    running = peak = 0

    async def forget(self: Ledger, partition: int, request_id: str, header: Any) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.01)
        await original(self, partition, request_id, header)
        running -= 1

    original = Ledger.forget
    monkeypatch.setattr(Ledger, "forget", forget)
    process = await made.start("two")
    await settled(made)
    assert peak == FORGETTING_MAX
    assert sum(len(list(process.table.entries(partition))) for partition in (0, 1)) == 0


@in_virtual_time
async def test_an_id_that_is_live_under_another_key_keeps_no_entry() -> None:
    """Its window ends while the same id is being decided in another partition: the entry goes all the same."""
    made = await world(WINDOW)
    inline = b'{"path": "/inline", "entities": {"applicant_id": 17}, "inputs": {"amount": 5}}'
    made.log.append(OutboundRecord(REQUESTS, inline, b"k", 0, (("request-id", b"r"),)))
    await asyncio.sleep(1.9)
    queued = b'{"path": "/queued", "entities": {"applicant_id": 17}, "inputs": {"amount": 5}}'
    made.log.append(OutboundRecord(REQUESTS, queued, b"l", 1, (("request-id", b"r"),)))
    await asyncio.sleep(0.2)
    process = made.processes["one"]
    assert [len(list(process.table.entries(partition))) for partition in (0, 1)] == [0, 1]
    await settled(made)


@in_virtual_time
async def test_a_partition_that_goes_away_takes_its_requests_along() -> None:
    """What the old owner had in flight, the new one decides; the old one writes nothing of it."""
    made = await world()
    await made.start("two", ())
    made.send("r", amount=100.0)
    made.send("s", "/mixed", amount=100.0, correlation="d")
    await asyncio.sleep(0.01)
    await made.rebalance({0: "two", 1: "two"})
    await asyncio.sleep(0.15)
    made.answer(made.tasks()[-1])
    await settled(made)
    assert [audit.instance for audit in made.audits()] == ["two", "two"]
    assert made.reply("c")["status"] == "completed"
    assert made.reply("d")["status"] == "completed"


@in_virtual_time
async def test_a_decision_that_kafka_gets_after_the_partition_went_away_is_not_told() -> None:
    """A frozen worker's producer held its entry, and the next owner has decided: the first says nothing, ever."""
    made = await world()
    await made.start("two", ())
    made.processes["one"].arm(Fate.HELD)
    made.send("r")
    await asyncio.sleep(0.02)
    await made.rebalance({0: "two", 1: "two"})
    await asyncio.sleep(0.05)
    assert made.reply()["status"] == "completed"
    await settled(made)
    assert [audit.instance for audit in made.audits()] == ["two"]
    assert len({reply.record.value for reply in made.replies()}) == 1
    # Kafka has both entries; a worker that recovers them keeps the one that was told.
    assert len(made.entries("r")) == 2


@in_virtual_time
async def test_a_partition_that_stays_through_a_rebalance_keeps_its_requests() -> None:
    """Redelivered records wait for the work that is under way; models are called once."""
    made = await world()
    made.send("r", amount=100.0)
    await asyncio.sleep(0.01)
    await made.rebalance({0: "one", 1: "one"})
    await settled(made)
    assert len(made.model.calls) == 1
    assert made.reply()["status"] == "completed"


@in_virtual_time
async def test_what_a_model_raises_becomes_a_failed_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours is answered, recorded, and its request kept aside; the worker goes on."""
    made = await world()

    async def broken(*_: object) -> Any:
        raise ZeroDivisionError("a fault of ours")

    with monkeypatch.context() as patched:
        patched.setattr(ScriptedModel, "infer", broken)
        made.send("r")
        await asyncio.sleep(0.1)
    made.send("s", correlation="d")
    await settled(made)
    assert codes(made.reply("c")) == ["internal_error"]
    assert len(made.log.records(DEAD)) == 1
    assert made.reply("d")["status"] == "completed"


@in_virtual_time
async def test_a_request_whose_work_was_cancelled_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited for its decision goes on with the request himself."""
    made = await world()
    calls = 0

    async def infer(self: ScriptedModel, version: Any, rows: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.sleep(0.01)
            raise asyncio.CancelledError
        return await original(self, version, rows)

    original = ScriptedModel.infer
    monkeypatch.setattr(ScriptedModel, "infer", infer)
    made.send("r")
    await asyncio.sleep(0.005)
    made.send("r", correlation="d")
    await asyncio.sleep(3)
    assert [header(reply.record, "kafka_correlationId") for reply in made.replies()] == ["d"]
    assert made.committed.get((REQUESTS, made.replies()[0].partition), 0) == 0
    await made.close()


@in_virtual_time
async def test_a_reply_topic_that_is_deleted_meanwhile() -> None:
    """The reply cannot be delivered; the decision and its record stand, and the worker goes on."""
    made = await world()
    made.send("r", amount=50.0)
    await asyncio.sleep(0.01)
    del made.log.topics[REPLIES]
    await asyncio.sleep(1)
    assert [audit.status for audit in made.audits()] == [Status.COMPLETED]
    made.log.topics[REPLIES] = [[], []]
    made.send("s", correlation="d")
    await settled(made)
    assert made.reply("d")["status"] == "completed"


@in_virtual_time
async def test_the_entry_of_a_pending_join_holds_what_came() -> None:
    """A worker that takes over joins the rest to the results that the first had."""
    made = await world()
    made.send("r", "/pair")
    await asyncio.sleep(0.05)
    first, second = made.tasks()
    made.answer(first)
    await asyncio.sleep(0.05)
    (entry,) = [stored.record.value for stored in made.log.records("decide-joins-changelog")][-1:]
    assert [is_out(task) for task in held_by(entry or b"").tasks].count(True) == 1
    made.processes["one"].kill()
    await made.start("two")
    made.answer(second)
    await settled(made)
    assert made.reply()["status"] == "completed"
    assert len(made.log.records(TASKS)) == 2
