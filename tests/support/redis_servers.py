"""Redis servers of a test's own: a cluster of masters whose slots it moves, and a pair that fails over."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from app.devstack.process import HOST, free_port
from app.devstack.redis import RedisService

SLOTS = 16_384
BUS_PORT_AHEAD = 10_000
"""A cluster's nodes talk to one another on their port and this much."""
WITHIN_S = 20.0
WORDS = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", "--cluster-node-timeout", "2000")
"""On the command line of a cluster's node."""


class Server(RedisService):
    """One Redis with more words on its command line."""

    extra: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """See Service."""
        return [*super().command(), *self.extra]

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.ports["port"]

    @property
    def url(self) -> str:
        """Its URL."""
        return self.env["BROKER_REDIS_URL"]

    def client(self) -> Any:
        """A plain client, whose commands have no types; the caller closes it."""
        return Redis(host=HOST, port=self.port, socket_timeout=5)


def port_with_bus() -> int:
    """A free port whose bus port is free too."""
    while True:
        port = free_port()
        if port + BUS_PORT_AHEAD > 65_535:
            continue
        with contextlib.suppress(OSError), socket.socket() as bus:
            bus.bind((HOST, port + BUS_PORT_AHEAD))
            return port


@contextlib.contextmanager
def servers(directory: Path, count: int, *extra: str, bus: bool = False) -> Iterator[list[Server]]:
    """``count`` of them, serving."""
    made: list[Server] = []
    try:
        for number in range(count):
            data = directory / f"redis-{number}"
            data.mkdir(parents=True)
            server = Server(data, ports={"port": port_with_bus() if bus else free_port()})
            server.extra = extra
            made.append(server)
            server.start()
        yield made
    finally:
        for server in made:
            server.kill()


class RedisCluster:
    """Masters that share the slots evenly, no replicas."""

    def __init__(self, masters: list[Server]) -> None:
        self.masters = masters
        self.clients = [master.client() for master in masters]
        self.ids = [client.execute_command("CLUSTER", "MYID") for client in self.clients]

    def join(self) -> None:
        """Share the slots out and wait until every node says that the cluster is whole."""
        count = len(self.masters)
        for number, client in enumerate(self.clients):
            first, end = SLOTS * number // count, SLOTS * (number + 1) // count
            client.execute_command("CLUSTER", "ADDSLOTS", *range(first, end))
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for master in self.masters[1:]:
            self.clients[0].execute_command("CLUSTER", "MEET", HOST, master.port)
        until(lambda: all(self._whole(client) for client in self.clients))

    def _whole(self, client: Any) -> bool:
        info = str(client.execute_command("CLUSTER", "INFO"))
        # A node that does not ask for full coverage calls itself fine before it knows who has the other slots.
        told = info.replace("'", "").replace('"', "")
        known = (f"cluster_known_nodes:{len(self.masters)}", f"cluster_slots_ok:{SLOTS}")
        return "cluster_state:ok" in told and all(each in told for each in known)

    def owner(self, slot: int) -> int:
        """Which master has a slot."""
        return next(
            number
            for number in range(len(self.masters))
            if SLOTS * number // len(self.masters) <= slot < SLOTS * (number + 1) // len(self.masters)
        )

    def begin_move(self, slot: int, source: int, target: int) -> None:
        """From now on the source answers ASK for keys of the slot that it lacks."""
        self.clients[target].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.ids[source])
        self.clients[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.ids[target])

    def move_keys(self, slot: int, source: int, target: int) -> int:
        """Take the slot's keys over; how many there were."""
        keys = self.clients[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1_000)
        for key in keys:
            self.clients[source].execute_command("MIGRATE", HOST, self.masters[target].port, key, 0, 5_000)
        return len(list(keys))

    def end_move(self, slot: int, target: int) -> None:
        """From now on the source answers MOVED."""
        for client in [self.clients[target], *self.clients]:
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.ids[target])

    def replicate(self, master: int, replica: Server) -> None:
        """Make ``replica`` one of a master's, with what it has."""
        with replica.client() as client:
            client.execute_command("CLUSTER", "MEET", HOST, self.masters[0].port)
            name = self.ids[master].decode()
            until(lambda: name in str(client.execute_command("CLUSTER", "NODES")))
            client.execute_command("CLUSTER", "REPLICATE", name)
            until(lambda: client.info("replication")["master_link_status"] == "up")
            port = str(replica.port)
            until(lambda: all(port in str(each.execute_command("CLUSTER", "SLOTS")) for each in self.clients))

    def close(self) -> None:
        """Close the clients."""
        for client in self.clients:
            client.close()


@contextlib.contextmanager
def redis_cluster(directory: Path, count: int = 3) -> Iterator[RedisCluster]:
    """A cluster, whole."""
    with servers(directory, count, *WORDS, bus=True) as masters:
        cluster = RedisCluster(masters)
        try:
            cluster.join()
            yield cluster
        finally:
            cluster.close()


def until(holds: object) -> None:
    """Wait for what ``holds`` asks."""
    assert callable(holds)
    end = time.monotonic() + WITHIN_S
    while True:
        with contextlib.suppress(RedisError):
            if holds():
                return
        assert time.monotonic() < end, "not within the time allowed"
        time.sleep(0.02)
