"""The examples of the documentation, run as they stand there, against a demo that was kept as the README says."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from app.devstack.java import find_java, resolve_jars
from tests.support.markdown import ROOT, Block, blocks_of

README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
DEFAULT_GATEWAY = "http://127.0.0.1:8080"
DEMO_WITHIN_S = 300
BLOCK_WITHIN_S = 120
RECORDED_WITHIN_S = 60
KAFKA_TOOLS = "org.apache.kafka:kafka-tools:4.1.1+org.slf4j:slf4j-simple:1.7.36"
TOOLS = {
    "kafka-console-producer.sh": "org.apache.kafka.tools.ConsoleProducer",
    "kafka-console-consumer.sh": "org.apache.kafka.tools.consumer.ConsoleConsumer",
}


@dataclass(frozen=True, slots=True)
class Shell:
    """A shell in a directory of its own, as a reader of the documentation has one."""

    directory: Path
    env: dict[str, str]

    def run(self, text: str, *, within_s: float = BLOCK_WITHIN_S, language: str = "bash") -> str:
        """What ``text`` prints; AssertionError with all of it unless it ends with 0 in time."""
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        with subprocess.Popen(
            command,
            cwd=self.directory,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=within_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                pytest.fail(f"not done within {within_s} s:\n{text}\n{output}")
        assert process.returncode == 0, f"exit code {process.returncode}:\n{text}\n{output}"
        return output


def marked(mark: str) -> list[Block]:
    return [block for block in blocks_of(README) if block.mark == mark]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell beside a kept demo, with the variables that the README puts into it."""
    directory = tmp_path_factory.mktemp("docs")
    binaries = directory / "bin"
    binaries.mkdir()
    (binaries / "model-broker").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m app.cli "$@"\n')
    (binaries / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    classpath = os.pathsep.join(str(jar) for jar in resolve_jars(KAFKA_TOOLS, print))
    for name, main_class in TOOLS.items():
        java = f'"{find_java()}" -Xmx128m -XX:TieredStopAtLevel=1 -Dorg.slf4j.simpleLogger.defaultLogLevel=off'
        (binaries / name).write_text(f'#!/bin/sh\nexec {java} -cp "{classpath}" {main_class} "$@"\n')
    for binary in binaries.iterdir():
        binary.chmod(0o755)
    # What the README activates; the environment of this run stands for it.
    (directory / ".venv" / "bin").mkdir(parents=True)
    (directory / ".venv" / "bin" / "activate").touch()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "AWS_"))}
    path = f"{binaries}{os.pathsep}{inherited['PATH']}"
    bare = Shell(directory, inherited | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "160"})
    (keep,), (down,) = marked("keep"), marked("down")
    try:
        output = bare.run(f"{keep.text}\nenv -0 > environment", within_s=DEMO_WITHIN_S)
        assert "Everything keeps running" in output
        pairs = (directory / "environment").read_text().rstrip("\0").split("\0")
        yield Shell(directory, dict(pair.split("=", 1) for pair in pairs))
    finally:
        assert "Stopped" in bare.run(down.text)
        assert "Nothing runs" in bare.run(down.text)


@pytest.fixture(scope="module")
def gateway(shell: Shell) -> str:
    """The address of the demo's gateway, as `dev status` tells it."""
    told: Any = orjson.loads(shell.run("model-broker dev status --state-dir .model-broker/demo --json"))
    (address,) = (each["address"] for each in told["services"] if each["name"] == "gateway")
    return str(address)


def test_requests_of_the_readme_are_decided(shell: Shell, gateway: str) -> None:
    """Shell, curl, Python and Kafka's console tools: each ends well and prints a decision."""
    blocks = marked("run")
    printed = [shell.run(block.text.replace(DEFAULT_GATEWAY, gateway), language=block.language) for block in blocks]
    for output in printed[:4]:
        assert "approve" in output
    curl, console = printed[1], printed[3]
    reply = orjson.loads(curl)
    assert (reply["request_id"], reply["status"]) == ("loan-0001", "completed")
    assert "kafka_correlationId:mine-1,request-id:loan-0002" in console
    shown = next(block.text for block in blocks_of(README) if block.language == "json")
    example = orjson.loads(shown)
    assert example.keys() == reply.keys()
    assert {name: set(task) for name, task in example["outputs"].items()} == {
        name: set(task) for name, task in reply["outputs"].items()
    }


def test_a_decision_of_the_readme_is_recorded(shell: Shell, gateway: str) -> None:
    """It can be read by HTTP and shown by the command, within seconds."""
    curl = next(block.text for block in marked("run") if "loan-0001" in block.text)
    first = shell.run(curl.replace(DEFAULT_GATEWAY, gateway))
    (block,) = marked("later")
    end = time.monotonic() + RECORDED_WITHIN_S
    while True:
        try:
            output = shell.run(block.text.replace(DEFAULT_GATEWAY, gateway))
            break
        except AssertionError:
            if time.monotonic() > end:
                raise
    assert output.startswith(first)
    assert "credit-pd" in output.removeprefix(first)


def test_operations_commands_run(shell: Shell) -> None:
    """An installation, a registry change, dead letters and a decision, as docs/operations.md has them."""
    topic = "inference.requests"
    ask = 'model-broker request /credit/card --entities applicant_id=1 --json --request-id "$REQUEST_ID" || true'
    bury = (
        f"for n in 1 2 3; do echo 'no request'; done | kafka-console-producer.sh "
        f'--bootstrap-server "$BROKER_KAFKA_BOOTSTRAP" --topic {topic}'
    )
    env = shell.env | {"REQUEST_ID": "operations-1"}
    prepared = Shell(shell.directory, env)
    (shell.directory / "registry").symlink_to(shell.directory / ".model-broker" / "demo" / "registry")
    prepared.run(ask)
    prepared.run(bury)
    letters: list[Any] = []
    end = time.monotonic() + RECORDED_WITHIN_S
    while len(letters) < 3:
        assert time.monotonic() < end, letters
        listed: Any = orjson.loads(prepared.run(f"model-broker dlt list --topic {topic} --json"))
        letters = listed["topics"][0]["latest"]
    one = str(letters[0]["letter"])
    published: Any = orjson.loads(prepared.run("model-broker history --json"))["publications"]
    oldest = str(published[-1]["revision"])
    printed = []
    for block in blocks_of(OPERATIONS):
        if block.language == "bash":
            end = time.monotonic() + RECORDED_WITHIN_S
            text = block.text.replace(f"{topic}-dlt/3/41", one).replace("sha256:4f1c", oldest)
            while True:
                try:
                    printed.append(prepared.run(text))
                    break
                except AssertionError:
                    # A decision is recorded within seconds; everything else is there at once.
                    if "decision show" not in text or time.monotonic() > end:
                        raise
    installed, changed, restored, compared, dead, shown = printed
    assert "unchanged" in installed
    assert "Nothing to publish" in changed
    assert '"route":"credit"' in changed
    assert "Published" in restored
    assert "credit/consumer/anomaly" in compared
    assert f"{one}: redriven" in dead
    # The one that was redriven alone dies again, and may be back by then.
    assert re.search(r"^[23] of inference.requests-dlt redriven, 0 not.$", dead, re.M)
    assert "feature_missing" in shown or "rejected" in shown
