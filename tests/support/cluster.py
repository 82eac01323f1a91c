"""A broker of several processes on the test stack, each of which a test may kill, stop, freeze and start again.

``Cluster`` prepares topics of its own, stores, a registry and features, runs a model server that can be told to fail,
and starts broker processes as an operator would, by their command line. They die with the test process. What each one
prints is kept, and told when it does not do what was expected of it.
"""

import asyncio
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import orjson

from app.adapters.redis_feast import RedisFeatureStore
from app.adapters.registry_topic import publish_revision, read_head
from app.adapters.topics import TopicAdmin, read_documents, wanted_topics
from app.devstack.process import Child
from app.devstack.stores import create_stores
from app.domain.registry import Source, compile_revision, read_revision
from app.domain.rollout_status import with_status
from app.settings import Settings
from tests.support.cluster_documents import POOL, entity_rows, registry_documents
from tests.support.cluster_models import SwitchableModels
from tests.support.stack import ServiceStack

ROOT: Final = Path(__file__).resolve().parents[2]
PARTITIONS: Final = 4
READY_WITHIN_S: Final = 90.0
ENDED_WITHIN_S: Final = 45.0
"""Longer than a drain and the stop after it may take."""
_POLL_S: Final = 0.05
_LOG_LINES: Final = 40
_ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "decide": ("worker", "decide"),
    "features": ("worker", "features"),
    "audit": ("worker", "audit"),
    "pool": ("worker", "pool", "--pool", POOL, "--runner", "tests.support.cluster_runner:load"),
    "rollouts": ("worker", "rollouts"),
    "gateway": ("gateway",),
}


def until(holds: Callable[[], bool], within_s: float, otherwise: Callable[[], str]) -> None:
    """Wait until ``holds``; AssertionError with what ``otherwise`` says when it does not in time."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, otherwise()
        time.sleep(_POLL_S)


class Member:
    """One broker process; ``name`` is its instance name, ROLE-NUMBER."""

    def __init__(self, name: str, env: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self._env = env
        self._log = directory / f"{name}.log"
        self._log.touch()
        self._read_from = 0
        self._child: Child | None = None

    @property
    def child(self) -> Child:
        """The process of the last start."""
        assert self._child is not None, f"{self.name} was never started"
        return self._child

    @property
    def runs(self) -> bool:
        """Whether its process runs (paused counts)."""
        return self._child is not None and self._child.runs

    def spawn(self) -> None:
        """Start the process; ``await_ready`` tells when it works."""
        assert not self.runs, f"{self.name} runs already"
        self._read_from = self._log.stat().st_size
        command = [sys.executable, "-m", "app.cli", *_ROLES[self.name.partition("-")[0]]]
        command += ["--instance", self.name, "--http-port", "0"]
        self._child = Child.spawn(command, log=self._log, env=self._env, detached=False)

    def start(self) -> None:
        """Start the process and wait until it is ready."""
        self.spawn()
        self.await_ready()

    def await_ready(self, within_s: float = READY_WITHIN_S) -> None:
        """Wait until it says that it is ready."""

        def ready_or_ended() -> bool:
            assert self.runs, f"{self.name} ended instead of becoming ready:\n{self.tail()}"
            return not self.faults()

        until(ready_or_ended, within_s, lambda: f"{self.name} is not ready: {self.faults()}\n{self.tail()}")

    def faults(self) -> str:
        """What keeps it from being ready, in its own words; empty when nothing does."""
        port = self._port()
        if port is None:
            return "it has not said on which port it serves"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            return error.read().decode(errors="replace") or str(error)
        except OSError as error:
            return repr(error)
        return ""

    @property
    def url(self) -> str:
        """Where it serves HTTP."""
        port = self._port()
        assert port is not None, f"{self.name} has not said on which port it serves"
        return f"http://127.0.0.1:{port}"

    def _port(self) -> int | None:
        for line in self.lines():
            port = line.get("http_port") or (line.get("port") if line.get("event") == "gateway serves" else None)
            if port:
                return int(port)
        return None

    def lines(self) -> list[dict[str, Any]]:
        """What it logged since its last start; lines that are not structured are left out."""
        lines = []
        for line in self._text().splitlines():
            try:
                lines.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                continue
        return [line for line in lines if isinstance(line, dict)]

    def await_logged(self, event: str, within_s: float = 30.0) -> None:
        """Wait until it has logged ``event`` since its last start."""

        def logged() -> bool:
            return any(line.get("event") == event for line in self.lines())

        until(logged, within_s, lambda: f"{self.name} never logged {event}\n{self.tail()}")

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.child.signal(signal.SIGKILL)
        assert self.child.wait(ENDED_WITHIN_S), f"{self.name} survives SIGKILL"

    def stop(self) -> None:
        """SIGTERM; returns when the process has ended by itself, and in good order."""
        self.child.signal(signal.SIGTERM)
        assert self.child.wait(ENDED_WITHIN_S), f"{self.name} does not end at SIGTERM:\n{self.tail()}"
        # A client may still say that its broker is away; a trace would follow what ended the process.
        ends = {line.get("event") for line in self.lines()[-5:]}
        in_order = "stopped" in ends and "Traceback" not in self.tail()
        assert in_order, f"{self.name} did not end in good order:\n{self.tail()}"

    def pause(self) -> None:
        """SIGSTOP."""
        self.child.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.child.signal(signal.SIGCONT)

    def tail(self) -> str:
        """The end of what it printed since its last start."""
        return "\n".join([f"--- {self.name}", *self._text().splitlines()[-_LOG_LINES:]])

    def _text(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._read_from)
            return file.read().decode(errors="replace")


class Cluster:
    """Broker processes under one topic prefix. A context manager; every blocking call is bounded.

    From a coroutine, call what starts, stops or publishes by ``asyncio.to_thread``.
    """

    def __init__(self, stack: ServiceStack, directory: Path, *, prefix: str, **settings: str) -> None:
        self.directory = directory
        self.models = SwitchableModels()
        self.gate = directory / "pool-gate"
        self._pool_calls = directory / "pool-calls"
        self._pool_calls.touch()
        bare = prefix.rstrip(".")
        variables = {
            "BROKER_KAFKA_BOOTSTRAP": stack.env["BROKER_KAFKA_BOOTSTRAP"],
            "BROKER_REDIS_URL": stack.env["BROKER_REDIS_URL"],
            "BROKER_TOPIC_PREFIX": prefix,
            "BROKER_PARTITIONS": str(PARTITIONS),
            "BROKER_AUDIT_BUCKET": f"{bare}-audit",
            "BROKER_AUDIT_TABLE": f"{bare}-decisions",
            "BROKER_AUDIT_BATCH_WAIT": "200ms",
            "BROKER_DATA_DIR": str(directory / "data"),
            "BROKER_LOG_FORMAT": "json",
            **settings,
        }
        self.settings = Settings.model_validate(
            {name.removeprefix("BROKER_").lower(): value for name, value in variables.items()}
        )
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        self.env = {
            **inherited,
            **stack.env,
            **variables,
            "PYTHONPATH": str(ROOT),
            "TEST_POOL_CALLS": str(self._pool_calls),
            "TEST_POOL_GATE": str(self.gate),
        }
        self._members: dict[str, Member] = {}

    def __enter__(self) -> "Cluster":
        self.models.start()
        try:
            admin = TopicAdmin(self.settings)
            admin.apply(wanted_topics(read_documents(), self.settings, [POOL]))
            asyncio.run(create_stores(self.settings))
            asyncio.run(self._write_features())
            self.publish(self.documents())
        except BaseException:
            self.models.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.unlink(missing_ok=True)
        for member in self._members.values():
            if member.runs:
                member.kill()
        self.models.stop()

    def __getitem__(self, name: str) -> Member:
        """The member of that name, which need not run."""
        if name not in self._members:
            self._members[name] = Member(name, self.env, self.directory)
        return self._members[name]

    def twin(self, name: str) -> Member:
        """Another process of that name, not started; it ends by itself or with the test process."""
        directory = self.directory / "twins"
        directory.mkdir(exist_ok=True)
        return Member(name, self.env, directory)

    def start(self, *names: str) -> None:
        """Start those that do not run, and wait until all of them are ready."""
        members = [self[name] for name in names]
        for member in members:
            if not member.runs:
                member.spawn()
        with ThreadPoolExecutor(len(members)) as pool:
            list(pool.map(Member.await_ready, members))

    def heal(self, *names: str) -> None:
        """Make exactly these run, ready and unhindered, whatever a test before has left."""
        self.models.heal()
        self.open_gate()
        for name, member in self._members.items():
            if member.runs:
                member.resume()
                if name not in names:
                    member.stop()
        self.start(*names)

    def documents(self, version: str = "1") -> Sequence[Mapping[str, Any]]:
        """The registry of this cluster's models, every rule and model of it in ``version``."""
        return registry_documents(self.models.url, prefix=self.settings.topic_prefix, version=version)

    def publish(self, documents: Sequence[Mapping[str, Any]]) -> str:
        """Make ``documents`` the registry; the revision's id."""
        written = read_revision(Source(f"test:{at}", document) for at, document in enumerate(documents))
        head = read_head(self.settings)
        now_ms = time.time_ns() // 1_000_000
        revision = compile_revision(with_status(written.documents, head.carried, now_ms))
        if head.id != revision.id:
            publish_revision(self.settings, revision, expected=head.id, now_ms=now_ms)
        return revision.id

    async def _write_features(self) -> None:
        store = RedisFeatureStore(self.settings.redis_url)
        try:
            await store.write(entity_rows(self.settings.topic_prefix, time.time_ns() // 1_000_000))
        finally:
            await store.close()

    def close_gate(self) -> None:
        """Make the pool's models wait until ``open_gate``."""
        self.gate.touch()

    def open_gate(self) -> None:
        """Let the pool's models go on."""
        self.gate.unlink(missing_ok=True)

    def pool_calls(self, x: float) -> int:
        """How often pool workers have run a row with input ``x``."""
        return self._pool_calls.read_text().splitlines().count(repr(float(x)))

    def tails(self) -> str:
        """The end of what each process printed."""
        return "\n".join(member.tail() for member in self._members.values())
