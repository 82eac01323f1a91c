"""The services that tests run on: containers when a Docker engine answers, else the embedded stack.

Both have the same shape, so that one suite makes the same assertions on either. ``BROKER_TEST_STACK`` decides when it
says ``containers`` or ``embedded``; ``auto``, the default, asks for an engine. A container gets a fixed host port, so
that it comes back under its address after a kill, as an embedded service does.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self, cast

import pytest

from app.devstack import ALL, Stack
from app.devstack.kafka import SMALL_NODE, broker_answers
from app.devstack.moto import answers_http
from app.devstack.process import HOST, free_port
from app.devstack.redis import redis_answers
from app.devstack.stack import AWS_ENV

CHOICE_VARIABLE = "BROKER_TEST_STACK"
SERVE_TIMEOUT_S = 90.0
DOCKER_SOCKET = Path("/var/run/docker.sock")
BIND_ATTEMPTS = 3
STOP_GRACE_S = 15


class ServiceHandle(Protocol):
    """One service, for tests that take it away."""

    @property
    def runs(self) -> bool:
        """Whether its process runs (paused counts)."""
        ...

    def start(self) -> None:
        """Bring it back, on the same address and data, and wait until it serves."""
        ...

    def stop(self) -> None:
        """End it in good order."""
        ...

    def kill(self) -> None:
        """End it as a crash would."""
        ...

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        ...

    def resume(self) -> None:
        """Let it go on."""
        ...


class ServiceStack(Protocol):
    """All services."""

    @property
    def kafka(self) -> ServiceHandle:
        """The broker."""
        ...

    @property
    def redis(self) -> ServiceHandle:
        """The feature store."""
        ...

    @property
    def s3(self) -> ServiceHandle:
        """The object store."""
        ...

    @property
    def dynamodb(self) -> ServiceHandle:
        """The decision index."""
        ...

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment to work on the stack."""
        ...

    def down(self) -> object:
        """End them all."""
        ...


@cache
def chosen_stack() -> str:
    """``containers`` or ``embedded``."""
    choice = os.environ.get(CHOICE_VARIABLE, "auto")
    if choice not in ("auto", "containers", "embedded"):
        raise pytest.UsageError(f"{CHOICE_VARIABLE}={choice}: say auto, containers or embedded")
    if choice != "auto":
        return choice
    return "containers" if docker_answers() else "embedded"


def docker_answers() -> bool:
    """Whether a Docker engine is there to use."""
    if "DOCKER_HOST" not in os.environ and not DOCKER_SOCKET.exists():
        # Its client would leave open the socket that it could not connect.
        return False
    import docker  # type: ignore[import-untyped] # it publishes no types
    from docker.errors import DockerException  # type: ignore[import-untyped] # as above

    try:
        client = docker.from_env(timeout=5)
    except DockerException:
        return False
    with contextlib.closing(client):
        try:
            return bool(client.ping())
        except (DockerException, OSError):
            return False


def start_stack(directory: Path) -> ServiceStack:
    """The chosen stack, up and serving."""
    if chosen_stack() == "embedded":
        return Stack.up(directory, services=ALL)
    return ContainerStack.up()


@dataclass(slots=True)
class ContainerService:
    """One container on one fixed host port."""

    name: str
    image: str
    container_port: int
    serves: Callable[[str], bool]
    variable: str
    address_format: str
    environment: Callable[[str], dict[str, str]] = lambda _: {}
    command: str | None = None
    keeps_data: bool = True
    address: str = ""
    _container: Any = field(default=None, repr=False)

    @property
    def env(self) -> dict[str, str]:
        """The variable by which processes find it."""
        return {self.variable: self.address_format.format(self.address)}

    @property
    def runs(self) -> bool:
        """See ServiceHandle."""
        if self._container is None:
            return False
        docker_container = self._container.get_wrapped_container()
        docker_container.reload()
        return docker_container.status in ("running", "paused")

    def create(self) -> None:
        """Make the container; another port if somebody took the first in between."""
        from docker.errors import APIError
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.docker_client import DockerClient

        reported = DockerClient().host()
        host = HOST if reported == "localhost" else reported
        for attempt in range(1, BIND_ATTEMPTS + 1):
            port = free_port()
            self.address = f"{host}:{port}"
            container = DockerContainer(self.image)
            # On this machine only; `with_bind_ports` knows no interfaces, docker-py's port table does.
            interface = HOST if host == HOST else "0.0.0.0"  # noqa: S104 - a remote engine is reached from here
            cast(dict[str, Any], container.ports)[f"{self.container_port}/tcp"] = (interface, port)
            container.with_envs(**self.environment(self.address))
            if self.command is not None:
                container.with_command(self.command)
            try:
                container.start()
            except APIError as error:
                container.stop()
                if attempt == BIND_ATTEMPTS or "address already in use" not in str(error).lower():
                    raise
            else:
                self._container = container
                break
        self._await_service()

    def start(self) -> None:
        """See ServiceHandle."""
        if self.runs:
            return
        self._container.get_wrapped_container().start()
        self._await_service()

    def stop(self) -> None:
        """See ServiceHandle."""
        self._skip_if_it_forgets()
        if self.runs:
            self._container.get_wrapped_container().stop(timeout=STOP_GRACE_S)

    def kill(self) -> None:
        """See ServiceHandle."""
        self._skip_if_it_forgets()
        if self.runs:
            docker_container = self._container.get_wrapped_container()
            docker_container.kill()
            docker_container.wait(timeout=STOP_GRACE_S)

    def pause(self) -> None:
        """See ServiceHandle."""
        self._container.get_wrapped_container().pause()

    def resume(self) -> None:
        """See ServiceHandle."""
        self._container.get_wrapped_container().unpause()

    def remove(self) -> None:
        """End it and its data."""
        if self._container is not None:
            self._container.stop()

    def _skip_if_it_forgets(self) -> None:
        if not self.keeps_data:
            pytest.skip(f"{self.image} forgets its data when it ends: run with {CHOICE_VARIABLE}=embedded")

    def _await_service(self) -> None:
        end = time.monotonic() + SERVE_TIMEOUT_S
        while not self.serves(self.env[self.variable] if self.name == "redis" else self.address):
            if time.monotonic() > end or not self.runs:
                output = b"".join(self._container.get_logs()).decode(errors="replace")[-4_000:]
                state = "runs, does not serve" if self.runs else "ended"
                raise RuntimeError(f"{self.name} ({self.image}) {state} on {self.address}:\n{output}")
            time.sleep(0.1)


def kafka_environment(address: str) -> dict[str, str]:
    """A KRaft node as the image reads it, reachable from outside by its host port.

    What the node asks of itself goes over its loopback: inside the container nothing listens on the host's port, and
    without that way transactions never end.
    """
    node = {
        "node.id": "1",
        "process.roles": "broker,controller",
        "listeners": "OUTSIDE://:9092,CONTROLLER://:9093,INSIDE://127.0.0.1:9094",
        "advertised.listeners": f"OUTSIDE://{address},INSIDE://127.0.0.1:9094",
        "listener.security.protocol.map": "OUTSIDE:PLAINTEXT,CONTROLLER:PLAINTEXT,INSIDE:PLAINTEXT",
        "inter.broker.listener.name": "INSIDE",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.voters": "1@localhost:9093",
        **SMALL_NODE,
    }
    return {f"KAFKA_{key.upper().replace('.', '_')}": value for key, value in node.items()}


class ContainerStack:
    """The services as containers."""

    def __init__(self) -> None:
        self.kafka = ContainerService(
            name="kafka",
            image="apache/kafka:4.1.1",
            container_port=9092,
            serves=broker_answers,
            variable="BROKER_KAFKA_BOOTSTRAP",
            address_format="{}",
            environment=kafka_environment,
        )
        self.redis = ContainerService(
            name="redis",
            image="redis:7",
            container_port=6379,
            serves=redis_answers,
            variable="BROKER_REDIS_URL",
            address_format="redis://{}/0",
            command="redis-server --appendonly yes --save ''",
        )
        self.s3 = ContainerService(
            name="s3",
            image="motoserver/moto:5",
            container_port=5000,
            serves=answers_http,
            variable="AWS_ENDPOINT_URL_S3",
            address_format="http://{}",
            keeps_data=False,
        )
        self.dynamodb = ContainerService(
            name="dynamodb",
            image="amazon/dynamodb-local:2.6.1",
            container_port=8000,
            serves=answers_http,
            variable="AWS_ENDPOINT_URL_DYNAMODB",
            address_format="http://{}",
            command="-jar DynamoDBLocal.jar -sharedDb -dbPath .",
        )

    @property
    def services(self) -> tuple[ContainerService, ...]:
        """Each of them."""
        return self.kafka, self.redis, self.s3, self.dynamodb

    @property
    def env(self) -> dict[str, str]:
        """See ServiceStack."""
        env = dict(AWS_ENV)
        for service in self.services:
            env |= service.env
        return env

    @classmethod
    def up(cls) -> Self:
        """Create and start the containers, one after the other: the engine has the images or fetches them."""
        stack = cls()
        try:
            for service in stack.services:
                service.create()
        except BaseException:
            stack.down()
            raise
        return stack

    def down(self) -> None:
        """See ServiceStack."""
        for service in self.services:
            service.remove()


def set_aws(stack: ServiceStack, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Set the AWS variables of ``stack`` in this process too, for as long as ``patch`` holds; returns them."""
    variables = {name: value for name, value in stack.env.items() if name.startswith("AWS_")}
    for name, value in variables.items():
        patch.setenv(name, value)
    return variables
