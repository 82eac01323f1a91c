"""Apache Kafka itself, one node that is broker and controller (KRaft), from the jars that Kafka publishes."""

import os
import subprocess
from collections.abc import Sequence

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from app.devstack.java import JVM_OPTIONS, find_java, resolve_jars
from app.devstack.process import HOST, Service, StackError, accepts_connections

COORDINATES = "org.apache.kafka:kafka_2.13:4.1.1+org.slf4j:slf4j-simple:1.7.36"
# Any will do for a node that is its whole cluster, but a random one that begins with "-" is taken for an option.
CLUSTER_ID = "bW9kZWwtYnJva2VyLWRldg"
FORMAT_TIMEOUT_S = 60.0

# What makes a broker small, quick to start and strict; the test containers take the same.
SMALL_NODE = {
    # Topics are applied from their documents: a misspelt name is an error, not a new topic.
    "auto.create.topics.enable": "false",
    # One node holds each partition once; few partitions and small indexes make it start and stop fast.
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "2",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "log.index.size.max.bytes": "1048576",
    "log.cleaner.dedupe.buffer.size": "16777216",
    "num.network.threads": "2",
    "num.io.threads": "4",
    # A group forms at once, and tests may have a dead member noticed within a second.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    # Topics set their own retention; this bounds what a forgotten one keeps.
    "log.retention.hours": "168",
}


def broker_answers(bootstrap: str) -> bool:
    """Whether a broker names itself in its metadata; answers within two seconds.

    The port opens well before that, and is asked first, because a client logs each refused connection.
    """
    if not accepts_connections(bootstrap):
        return False
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    try:
        return bool(admin.list_topics(timeout=1.5).brokers)
    except KafkaException:
        return False


class KafkaService(Service):
    """One Kafka node."""

    name = "kafka"
    port_names = ("port", "controller")

    def prepare(self) -> None:
        """Fetch the jars, write the properties for the present ports, format the data directory if it is new."""
        self._classpath = os.pathsep.join(str(jar) for jar in resolve_jars(COORDINATES, self.progress))
        self._java = find_java()
        self._properties = self.directory / "server.properties"
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in self._node().items()))
        if not (self.data / "meta.properties").exists():
            self._format()

    def _node(self) -> dict[str, str]:
        client, controller = f"{HOST}:{self.ports['port']}", f"{HOST}:{self.ports['controller']}"
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{client}",
            "log.dirs": str(self.data.resolve()),
            **SMALL_NODE,
        }

    def _format(self) -> None:
        tool = ["kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(self._properties)]
        try:
            done = subprocess.run(
                [self._java, *JVM_OPTIONS, "-cp", self._classpath, *tool],
                capture_output=True,
                text=True,
                timeout=FORMAT_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StackError(f"formatting Kafka's {self.data} took over {FORMAT_TIMEOUT_S:.0f} s") from error
        if done.returncode != 0:
            raise StackError(f"formatting Kafka's {self.data} failed:\n{done.stdout}{done.stderr}")

    def command(self) -> Sequence[str]:
        """See Service."""
        logger = "-Dorg.slf4j.simpleLogger."
        logging = [f"{logger}defaultLogLevel=warn", f"{logger}showDateTime=true"]
        heap = ["-Xms128m", "-Xmx512m"]
        main = ["kafka.Kafka", str(self._properties)]
        return [self._java, *heap, *JVM_OPTIONS, *logging, "-cp", self._classpath, *main]

    def serves(self) -> bool:
        """See Service."""
        return broker_answers(f"{HOST}:{self.ports['port']}")

    @property
    def env(self) -> dict[str, str]:
        """See Service."""
        return {"BROKER_KAFKA_BOOTSTRAP": f"{HOST}:{self.ports['port']}"}
