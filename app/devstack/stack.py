"""The four services together: up in parallel, down in parallel, found again by what the state directory records.

Programs may run on them: they start when the services serve, and stop before the services do. ``DIR`` holds a
directory a service or program (log, data), ``dev.env``, and ``stack.json``: for a detached stack, its processes and
ports, the programs that were started on it though they ended, and what their owner added to ``env``. One process at a
time may change a directory; it holds ``stack.lock`` meanwhile, an attached stack for as long as it lives.
"""

import fcntl
import json
import os
import shlex
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import IO, Any, Self

from app.devstack.dynamodb import DynamoDBService
from app.devstack.kafka import KafkaService
from app.devstack.process import POLL_S, Child, ProcessIdentity, Service, StackError, port_is_free
from app.devstack.program import READY_PATH, Program, ProgramSpec
from app.devstack.redis import RedisService
from app.devstack.s3 import S3Service

SERVICES: dict[str, type[Service]] = {
    "kafka": KafkaService,
    "redis": RedisService,
    "s3": S3Service,
    "dynamodb": DynamoDBService,
}
ALL = tuple(SERVICES)

# Both emulators take any credentials; DynamoDB Local wants letters and digits only. boto3 reads the region from
# AWS_DEFAULT_REGION, other AWS tools from AWS_REGION.
AWS_ENV = {
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ACCESS_KEY_ID": "modelbroker",
    "AWS_SECRET_ACCESS_KEY": "modelbroker",
}
LOCK_TIMEOUT_S = 120.0  # another `dev up` of the same directory may be fetching jars


@dataclass(frozen=True, slots=True)
class ServiceState:
    """One line of ``dev status``."""

    name: str
    running: bool
    serving: bool
    pid: int | None
    address: str
    log: Path


class Stack:
    """The services of one state directory. Made by ``up`` or ``attach``; a context manager that ends in ``down``."""

    def __init__(self, state_dir: Path, *, detached: bool, progress: Callable[[str], None]) -> None:
        self.state_dir = state_dir
        self.detached = detached
        self.was_running = False
        self.variables: dict[str, str] = {}
        """What whoever owns the stack adds to ``env``."""
        self._progress = progress
        self._services: dict[str, Service] = {}
        self._record_lock = Lock()
        self._directory_lock: IO[str] | None = None

    @classmethod
    def up(
        cls,
        state_dir: Path,
        *,
        services: Collection[str] = ALL,
        detached: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Start the services and wait until each serves.

        A detached stack that already runs in the directory is taken as it is, what it lacks is started, and
        ``was_running`` says whether nothing had to be. Raises StackError, after stopping what had started.
        """
        if unknown := set(services) - set(ALL):
            raise StackError(f"no such service: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
        stack = cls(state_dir, detached=detached, progress=progress)
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StackError(f"{state_dir} cannot be made ({error.strerror}): name another directory") from error
        stack._lock_directory()
        with ExitStack() as on_failure:
            on_failure.callback(stack.down)
            stack._load(services)
            found = [service.name for service in stack._services.values() if service.runs]
            if found and not detached:
                on_failure.pop_all()
                stack._unlock_directory()
                raise StackError(
                    f"a detached stack runs in {state_dir} ({', '.join(found)}): use it by its dev.env, end it by "
                    f"`model-broker dev down --state-dir {state_dir}`, or name another directory"
                )
            if found:  # what somebody uses already is not stopped because an addition failed
                on_failure.pop_all()
            stack.was_running = set(found) >= set(services)
            stack._start([service for service in stack._services.values() if not isinstance(service, Program)])
            on_failure.pop_all()
        stack.write_env()
        if detached:
            stack._unlock_directory()
        return stack

    @classmethod
    def attach(cls, state_dir: Path) -> Self | None:
        """The detached stack that the directory records, whatever state it is in; None if it records none."""
        stack = cls(state_dir, detached=True, progress=lambda _: None)
        if not stack._record.exists():
            return None
        stack._load(())
        return stack

    def run(self, programs: Iterable[ProgramSpec]) -> None:
        """Start programs in parallel and wait until each is ready; they see the stack's variables.

        A detached stack's programs outlive this process as its services do, and are stopped with them. Raises
        StackError, after stopping those that it started.
        """
        if self._directory_lock is None:
            self._lock_directory()
        try:
            started = []
            for spec in programs:
                if spec.name in self._services and self._services[spec.name].runs:
                    raise StackError(f"{spec.name} runs already in {self.state_dir}")
                program = Program(
                    self._directory(spec.name),
                    name=spec.name,
                    ready_path=spec.ready_path,
                    spec=replace(spec, variables=self.env | dict(spec.variables)),
                    detached=self.detached,
                    on_spawn=self._write_record,
                    progress=self._progress,
                )
                self._services[spec.name] = program
                started.append(program)
            self._start(started)
        finally:
            if self.detached:
                self._unlock_directory()

    @property
    def kafka(self) -> Service:
        """The Kafka node."""
        return self.service("kafka")

    @property
    def redis(self) -> Service:
        """The Redis server."""
        return self.service("redis")

    @property
    def s3(self) -> Service:
        """The S3 endpoint."""
        return self.service("s3")

    @property
    def dynamodb(self) -> Service:
        """The DynamoDB endpoint."""
        return self.service("dynamodb")

    def service(self, name: str) -> Service:
        """The handle of one service, by which a test stops, kills, pauses and starts it."""
        try:
            return self._services[name]
        except KeyError:
            raise StackError(f"{name} is not part of the stack in {self.state_dir}") from None

    @property
    def env(self) -> dict[str, str]:
        """Each variable that the other processes need to work on this stack."""
        env: dict[str, str] = {}
        for service in self._services.values():
            env |= service.env
        return env | AWS_ENV | self.variables

    @property
    def env_file(self) -> Path:
        """Where ``write_env`` writes."""
        return self.state_dir / "dev.env"

    def write_env(self) -> Path:
        """Write ``env`` as ``KEY=VALUE`` lines that a shell and Docker's env_file both read, and record it."""
        self._write_record()
        _replace(self.env_file, "".join(f"{key}={shlex.quote(value)}\n" for key, value in self.env.items()))
        return self.env_file

    def status(self) -> list[ServiceState]:
        """What each service does now; asks it."""
        return [
            ServiceState(
                service.name,
                running=service.runs,
                serving=service.runs and service.serves(),
                pid=service.pid,
                address=service.address,
                log=service.log,
            )
            for service in self._services.values()
        ]

    @property
    def ended(self) -> list[Service]:
        """What was started on the stack and does not run now."""
        return [service for service in self._services.values() if not service.runs]

    def down(self) -> list[str]:
        """Stop programs, then services; returns the names of those that ran. Data stays: the next ``up`` finds it."""
        if self._directory_lock is None:
            self._lock_directory()
        try:
            ran = [service.name for service in self._services.values() if service.runs]
            programs = [service for service in self._services.values() if isinstance(service, Program)]
            services = [service for service in self._services.values() if not isinstance(service, Program)]
            for together in (programs, services):  # a program that drains needs the services
                if together:
                    with ThreadPoolExecutor(len(together)) as pool:
                        list(pool.map(lambda service: service.close(), together))
            self._write_record()
            self.env_file.unlink(missing_ok=True)
        finally:
            self._unlock_directory()
        return ran

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # --- the state directory ------------------------------------------------------------------------------------

    @property
    def _record(self) -> Path:
        return self.state_dir / "stack.json"

    def _load(self, wanted: Collection[str]) -> None:
        """Make the handles: of what is wanted, and of what the record says runs."""
        record = self._read_record()
        self.variables |= record.get("variables", {})
        recorded: Mapping[str, Any] = record.get("services", {})
        for name in [*SERVICES, *(name for name in recorded if name not in SERVICES)]:
            entry: Mapping[str, Any] = recorded.get(name, {})
            if name not in wanted and not entry:
                continue
            child = None
            if "pid" in entry:
                identity = ProcessIdentity(entry["pid"], entry["started"])
                child = Child(identity) if identity.runs else None
            # The ports of a service that died are kept if they can be: addresses that clients know stay good.
            ports: dict[str, int] | None = entry.get("ports")
            if name in SERVICES and child is None and not all(port_is_free(port) for port in (ports or {}).values()):
                ports = None
            handle: dict[str, Any] = {
                "detached": self.detached,
                "ports": ports,
                "child": child,
                "on_spawn": self._write_record,
                "progress": self._progress,
            }
            directory = self._directory(name)
            if name in SERVICES:
                self._services[name] = SERVICES[name](directory, **handle)
            else:
                ready_path = entry.get("ready_path", READY_PATH)
                self._services[name] = Program(directory, name=name, ready_path=ready_path, **handle)

    def _directory(self, name: str) -> Path:
        directory = self.state_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self._record.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise StackError(f"{self._record} is not what this program wrote ({error}); remove it") from error
        return dict(record)

    def _write_record(self) -> None:
        """Record the running detached processes; called at each spawn, so that even an ``up`` cut short is known.

        A program that ended stays recorded while anything runs: who looks is to be told that it is gone.
        """
        if not self.detached:
            return
        with self._record_lock:
            entries = {name: _entry(service) for name, service in list(self._services.items())}
            if any("pid" in entry for entry in entries.values()):
                kept = {name: entry for name, entry in entries.items() if "pid" in entry or name not in SERVICES}
                _replace(self._record, json.dumps({"services": kept, "variables": self.variables}, indent=1))
            else:
                self._record.unlink(missing_ok=True)

    def _start(self, services: Sequence[Service]) -> None:
        """Start in parallel; at the first failure, or Ctrl-C, the others are not waited for longer than it takes."""
        services = [service for service in services if not service.runs]
        if not services:
            return
        pool = ThreadPoolExecutor(len(services))
        try:
            for future in [pool.submit(self._start_one, service) for service in services]:
                future.result()
        except BaseException:
            for service in services:
                service.close()
            raise
        finally:
            pool.shutdown(wait=True)

    def _start_one(self, service: Service) -> None:
        began = time.monotonic()
        service.start()
        self._progress(f"{service.name} serves on {service.address} ({time.monotonic() - began:.1f} s)")

    def _lock_directory(self) -> None:
        try:
            file = (self.state_dir / "stack.lock").open("a+")
        except OSError as error:
            raise StackError(
                f"{error.filename} cannot be written ({error.strerror}): name another directory"
            ) from error
        end = time.monotonic() + (LOCK_TIMEOUT_S if self.detached else 0)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    file.seek(0)
                    holder = file.read().strip()
                    file.close()
                    raise StackError(
                        f"process {holder or '?'} already runs a stack in {self.state_dir}; name another directory"
                    ) from None
                time.sleep(POLL_S)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._directory_lock = file

    def _unlock_directory(self) -> None:
        if self._directory_lock is not None:
            self._directory_lock.close()  # closing releases the lock
            self._directory_lock = None


def _entry(service: Service) -> dict[str, Any]:
    """What the record says of a service or program; without ``pid`` it does not run."""
    entry: dict[str, Any] = {"ports": service.ports}
    if service.child is not None and service.runs:
        entry |= {"pid": service.child.identity.pid, "started": service.child.identity.started}
    if isinstance(service, Program):
        entry["ready_path"] = service.ready_path
    return entry


def _replace(path: Path, text: str) -> None:
    """Write so that a reader sees the old text or the new, never half."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)
