"""One child process of the stack, and the service it runs: its ports, its log, its beginning and its end.

A child is known by process id *and* start time, so that a recorded process is never confused with a later one that
got the same id. Attached children die with this process, even at kill -9; detached ones outlive it. A service keeps
its ports and its data over ``stop``/``kill`` and ``start``, which is what a broker that comes back looks like to
its clients.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

HOST = "127.0.0.1"
START_TIMEOUT_S = 90.0  # a JVM on a busy two-core machine takes some ten seconds; past this it hangs
STOP_GRACE_S = 15.0  # Kafka closes its log segments in about two seconds
POLL_S = 0.05
BIND_ATTEMPTS = 4
LOG_TAIL_LINES = 25

# Below Linux's and macOS's ephemeral ranges: a port of those may become some client's local port while a stopped
# service is to come back on it, or even be connected to itself by a client that retries.
PORTS = range(20_000, 32_000)

_TETHER = Path(__file__).with_name("tether.py")

# The parent-death signal follows the thread that forked, not the process, so every attached child is forked by one
# thread that lives as long as the process does.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="devstack-spawner")


class StackError(RuntimeError):
    """A service could not start, stop or be found; the message says which, why, and what to do."""


def free_port(taken: Sequence[int] = ()) -> int:
    """A port of 127.0.0.1 that nothing listens on now; another process may still be faster."""
    for _ in range(100):
        port = random.choice(PORTS)  # noqa: S311 - spreads parallel runs, guards nothing
        if port not in taken and port_is_free(port):
            return port
    raise StackError(f"found no free port on {HOST} between {PORTS.start} and {PORTS.stop}")


def port_is_free(port: int) -> bool:
    """Whether a listener could bind the port now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


def find_executable(name: str) -> str | None:
    """The absolute path of a program on the PATH."""
    return shutil.which(name)


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Names one process for good: process ids are used again, a process id with its start time is not."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """The identity of a process that runs now; None if there is none, or only an unreaped corpse."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            return None if Path("/proc/self/stat").exists() else cls._by_ps(pid)
        except ProcessLookupError:
            return None
        fields = stat.rpartition(")")[2].split()  # the name in parentheses may itself hold spaces
        return None if fields[0] in "ZX" else cls(pid, fields[19])

    @classmethod
    def _by_ps(cls, pid: int) -> "ProcessIdentity | None":
        """For systems without /proc."""
        ps = find_executable("ps")
        if ps is None:
            raise StackError("neither /proc nor ps is there to tell whether a process runs")
        listed = subprocess.run(
            [ps, "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10, check=False
        )
        state, _, started = listed.stdout.strip().partition(" ")
        return cls(pid, started.strip()) if state and not state.startswith("Z") else None

    @property
    def runs(self) -> bool:
        """Whether this very process, not a namesake, runs."""
        return ProcessIdentity.of(self.pid) == self


class Child:
    """A process that was spawned here, or that was found again by its recorded identity."""

    def __init__(self, identity: ProcessIdentity, popen: "subprocess.Popen[bytes] | None" = None) -> None:
        self.identity = identity
        self._popen = popen

    @classmethod
    def spawn(cls, command: Sequence[str], *, log: Path, env: Mapping[str, str], detached: bool) -> "Child":
        """Start the command in a session of its own (Ctrl-C is for the parent to handle), output to the log."""
        if not detached:
            command = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()), *command]

        def fork() -> "subprocess.Popen[bytes]":
            with log.open("ab") as output:
                return subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
                )

        popen = _spawner.submit(fork).result(timeout=30)
        identity = ProcessIdentity.of(popen.pid)
        return cls(identity or ProcessIdentity(popen.pid, "ended at once"), popen)

    @property
    def runs(self) -> bool:
        """Whether the process runs; reaps it if it ended."""
        if self._popen is not None:
            return self._popen.poll() is None
        return self.identity.runs

    @property
    def ending(self) -> str:
        """How a process that is gone ended; only its parent knows."""
        code = None if self._popen is None else self._popen.poll()
        if code is None:
            return ""
        return f" with exit code {code}" if code >= 0 else f" by {signal.Signals(-code).name}"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process is gone."""
        if self.runs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.identity.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Whether the process ended within the time."""
        end = time.monotonic() + timeout_s
        while self.runs:
            if time.monotonic() > end:
                return False
            time.sleep(POLL_S)
        return True


class Service(ABC):
    """A service of the stack: one child process, named ports, a directory with its log and data.

    A subclass says what to run and how to tell that it serves; this class starts, watches and stops it.
    """

    name: str
    port_names: ClassVar[tuple[str, ...]] = ("port",)

    def __init__(
        self,
        directory: Path,
        *,
        detached: bool = False,
        ports: Mapping[str, int] | None = None,
        child: Child | None = None,
        on_spawn: Callable[[], None] = lambda: None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.directory = directory
        self.ports: dict[str, int] = dict(ports or {})
        self.child = child
        self.progress = progress
        self._detached = detached
        self._on_spawn = on_spawn
        self._closed = False
        self._lock = threading.RLock()

    @abstractmethod
    def prepare(self) -> None:
        """Fetch, write and format what ``command`` needs; called before each start."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """The program, by absolute path, and its arguments, for the present ports."""

    @abstractmethod
    def serves(self) -> bool:
        """Whether the service answers a real call now; returns within two seconds."""

    @property
    @abstractmethod
    def env(self) -> dict[str, str]:
        """The variables by which the other processes find the service."""

    @property
    def address(self) -> str:
        """Where the service answers, as a person is told."""
        return next(iter(self.env.values()))

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.directory / f"{self.name}.log"

    @property
    def data(self) -> Path:
        """What the service keeps over a restart."""
        return self.directory / "data"

    @property
    def runs(self) -> bool:
        """Whether the process runs (paused counts)."""
        return self.child is not None and self.child.runs

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self.child.identity.pid if self.child is not None and self.child.runs else None

    def start(self) -> None:
        """Start the service and wait until it serves: first on free ports, later on the same ports and data.

        Does nothing if it runs. Raises StackError with the tail of its log if it ends or hangs.
        """
        with self._lock:
            if self.runs:
                return
            self.data.mkdir(parents=True, exist_ok=True)
            ports_are_new = not self.ports
            for attempt in range(1, BIND_ATTEMPTS + 1):
                if ports_are_new:
                    self._choose_ports()
                self.prepare()
                if self._start_once(last_attempt=attempt == BIND_ATTEMPTS):
                    return
                time.sleep(POLL_S * 10)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that was not enough; returns when the process is gone."""
        child = self.child
        if child is None:
            return
        child.signal(signal.SIGCONT)
        child.signal(signal.SIGTERM)
        if not child.wait(STOP_GRACE_S):
            self.kill()

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        child = self.child
        if child is None:
            return
        child.signal(signal.SIGKILL)
        if not child.wait(STOP_GRACE_S):
            raise StackError(f"{self.name} (process {child.identity.pid}) does not end at SIGKILL")

    def pause(self) -> None:
        """Freeze the process: connections stay open and nothing answers."""
        if self.child is not None:
            self.child.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        if self.child is not None:
            self.child.signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop for good: a start that is under way in another thread does not spawn any more."""
        self._closed = True
        self.stop()

    def _choose_ports(self) -> None:
        self.ports = {}
        for name in self.port_names:
            self.ports[name] = free_port(list(self.ports.values()))

    def _start_once(self, *, last_attempt: bool) -> bool:
        """Whether the service serves; False if another process was faster to take a port, and trying again helps."""
        if self._closed:
            raise StackError(f"{self.name} was stopped while it started")
        log_start = self.log.stat().st_size if self.log.exists() else 0
        self.child = child = Child.spawn(
            self.command(), log=self.log, env=os.environ.copy() | self.process_env(), detached=self._detached
        )
        self._on_spawn()
        end = time.monotonic() + START_TIMEOUT_S
        while child.runs:
            if self.serves():
                # Another process may answer on the port while ours fails to bind: it then ends within moments.
                if not child.runs:
                    break
                return True
            if time.monotonic() > end:
                self.kill()
                raise StackError(f"{self.name} did not serve within {START_TIMEOUT_S:.0f} s.\n{self.tail(log_start)}")
            time.sleep(POLL_S)
        if self._closed:
            raise StackError(f"{self.name} was stopped while it started")
        if not last_attempt and self._port_was_taken(log_start):
            return False
        raise StackError(f"{self.name} ended{child.ending} while it started.\n{self.tail(log_start)}")

    def process_env(self) -> dict[str, str]:
        """Variables for the child itself, over those of this process."""
        return {}

    def _port_was_taken(self, log_start: int) -> bool:
        text = self._log_text(log_start)
        return "address already in use" in text.lower() or not all(port_is_free(p) for p in self.ports.values())

    def _log_text(self, start: int) -> str:
        with self.log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def tail(self, log_start: int = 0) -> str:
        """The end of the log, as an error message shows it."""
        if not self.log.exists():
            return f"It wrote no log ({self.log})."
        lines = self._log_text(log_start).splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"The end of its log, {self.log}:", *(f"  {line}" for line in lines or ["(empty)"])])


def accepts_connections(address: str) -> bool:
    """Whether something listens on HOST:PORT: a cheap question before a real call."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False
