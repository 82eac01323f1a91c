"""The benchmark: floor and broker in turn, in one run on one machine, as ratios.

It starts the embedded Kafka and Redis, a model server that answers at once, the floor and one decide worker, and then
measures in rounds: floor, broker with one task, broker with three, and again. A figure is the median of its rounds'
ratios, with the lowest and highest beside it; what routing alone costs is ``bench.routing``'s, what features cost
``bench.features``'s. ``--json FILE`` holds each figure by its name.

Run: ``python -m bench.run --rounds 5 --json bench/out/latest.json``
"""

import argparse
import asyncio
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from app.adapters.record_codec import EntryState, decode_record, encode_entry, entry_record
from app.adapters.redis_feast import RedisFeatureStore
from app.devstack import Stack
from app.devstack.process import free_port
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey
from bench.features import feature_figures
from bench.routing import routing_us

READY_WITHIN_S: Final = 60.0
LOAD_WITHIN_S: Final = 300.0
MEMORY_ENTRIES: Final = 100_000
BATCH_MAX_SIZE: Final = 32
"""Of the models: rows share a call while one is under way, as whoever has a busy model would have it."""
FEATURES: Final = tuple(f"f{number}" for number in range(10))
TARGETS: Final = {
    "latency_p50": ("<=", 1.6),
    "latency_p99": ("<=", 2.0),
    "throughput": (">=", 0.5),
    "throughput_three": (">=", 0.25),
    "cpu": ("<=", 2.2),
    "memory_mib": ("<=", 400.0),
    "routing_us": ("<=", 60.0),
    "features_cold": ("<=", 1.5),
    "features_cached": ("<=", 0.1),
    "features_five_views": ("<=", 1.3),
    "materializer": (">=", 0.5),
}
console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Sample:
    """One load's outcome. Latencies in milliseconds; CPU seconds are the worker's own."""

    p50: float
    p99: float
    per_second: float
    cpu_per_request: float


@dataclass(frozen=True, slots=True)
class Shape:
    """What is measured: a worker, the topics it is reached by, and the path."""

    name: str
    log: str
    worker: psutil.Process
    requests: str
    path: str


class Bench:
    """The processes of one run."""

    def __init__(self, stack: Stack, directory: Path, resources: contextlib.ExitStack) -> None:
        self.stack = stack
        self._directory = directory
        self._resources = resources
        self.env = {**os.environ, **stack.env, "BROKER_DATA_DIR": str(directory), "BROKER_LOG_FORMAT": "json"}
        self.bootstrap = stack.env["BROKER_KAFKA_BOOTSTRAP"]

    def spawn(self, name: str, *command: str) -> psutil.Process:
        """A child process that ends with this run; its output goes to a file of its name."""
        log = (self._directory / f"{name}.log").open("wb")
        process = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        self._resources.callback(log.close)
        self._resources.callback(_end, process)
        return psutil.Process(process.pid)

    def wait_for_line(self, name: str, text: str) -> None:
        """Wait until a child has printed ``text``."""
        path, give_up = self._directory / f"{name}.log", time.monotonic() + READY_WITHIN_S
        while text not in path.read_text():
            if time.monotonic() > give_up:
                raise SystemExit(f"{name} is not ready: {path.read_text()[-2_000:]}")
            time.sleep(0.1)

    def command(self, *arguments: str) -> None:
        """Run a model-broker command to its end."""
        subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments], env=self.env, check=True, stdout=subprocess.DEVNULL
        )

    def load(self, shape: Shape, callers: int, requests: int) -> Sample:
        """Put a load on a worker and measure both."""
        before = shape.worker.cpu_times()
        arguments = (
            self.bootstrap, shape.requests, "inference.replies", "0", shape.path,
            str(callers), str(requests), uuid.uuid4().hex[:8],
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "bench.load", *arguments],
            env=self.env,
            check=False,
            capture_output=True,
            timeout=LOAD_WITHIN_S,
        )
        if done.returncode:
            log = (self._directory / f"{shape.log}.log").read_text()
            raise SystemExit(f"{shape.name}: {done.stderr.decode()[-2_000:]}\n{shape.log}: {log[-2_000:]}")
        after = shape.worker.cpu_times()
        said: Mapping[str, Any] = orjson.loads(done.stdout)
        if said["unexpected"]:
            raise SystemExit(f"{shape.name}: {said['unexpected']} of {requests} requests did not complete")
        latencies = sorted(said["latencies_ms"])
        cpu = after.user + after.system - before.user - before.system
        return Sample(
            statistics.median(latencies),
            latencies[int(len(latencies) * 0.99)],
            requests / said["seconds"],
            cpu / requests,
        )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def documents(model_url: str) -> list[dict[str, Any]]:
    """The registry of the benchmark: one model, asked once or three times, with ten features from Redis."""
    api = {"apiVersion": "modelbroker.dev/v1alpha1"}

    def task(number: int) -> dict[str, Any]:
        return {"name": f"t{number}", "model": f"m{number}", "select": {"version": "1"}}

    def route(name: str, tasks: int) -> dict[str, Any]:
        rule = {
            "name": "default",
            "tasks": [task(number) for number in range(tasks)],
            "result": {"decision": 'outputs.t0.score < 0.3 ? "approve" : "refer"'},
        }
        spec = {"path": f"/bench/{name}", "deadline": "30s", "rules": [rule]}
        return {**api, "kind": "Route", "metadata": {"name": name}, "spec": spec}

    made: list[dict[str, Any]] = []
    for number in range(3):
        features = [{"ref": "inputs.amount", "required": True}, {"ref": "inputs.months", "required": True}]
        features += [{"ref": f"customer.{name}", "required": True} for name in FEATURES]
        spec = {
            "model": f"m{number}",
            "version": "1",
            "digest": "sha256:" + "0" * 64,
            "backend": {"type": "http", "endpoints": [model_url]},
            "features": features,
            "outputs": [{"name": "score", "datatype": "FP64", "min": 0, "max": 1}],
            "policy": {"timeout": "10s", "concurrency": 256, "batch": {"maxSize": BATCH_MAX_SIZE}},
            "governance": {"approvedBy": "bench"},
        }
        made.append({**api, "kind": "Model", "metadata": {"name": f"m{number}"}, "spec": {"owner": "bench"}})
        made.append({**api, "kind": "ModelVersion", "metadata": {"name": f"m{number}-1"}, "spec": spec})
    view = {
        "entities": [{"name": "customer_id", "type": "INT64"}],
        "features": [{"name": name, "type": "DOUBLE"} for name in FEATURES],
        "source": {"type": "redis", "project": "bench"},
    }
    made.append({**api, "kind": "FeatureView", "metadata": {"name": "customer"}, "spec": view})
    return [*made, route("one", 1), route("three", 3)]


async def write_features(url: str) -> None:
    """Features of 1,000 customers, straight into the store."""
    store = RedisFeatureStore(url)
    now_ms = int(time.time() * 1000)
    rows = [
        FeatureRow(
            "customer",
            EntityKey("bench", ("customer_id",), (customer,), ("INT64",)),
            FEATURES,
            tuple(float(customer + number) for number in range(len(FEATURES))),
            ("DOUBLE",) * len(FEATURES),
            now_ms,
        )
        for customer in range(1_000)
    ]
    await store.write(rows)
    await store.close()


async def fill_joins(bootstrap: str) -> int:
    """Copy one completed joins entry to 100,000 request ids; its bytes."""
    topic = "decide-joins-changelog"
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, linger_ms=20)
    await consumer.start()
    await producer.start()
    entry = (await asyncio.wait_for(consumer.getone(), 30)).value
    assert entry is not None
    encoded = entry_record(entry)
    record = decode_record(encoded)
    now_ms = int(time.time() * 1000)
    fresh = encode_entry(EntryState.COMPLETED, record, encoded)
    fresh = fresh[:2] + now_ms.to_bytes(8, "big") + fresh[10:]
    for _ in range(MEMORY_ENTRIES):
        await producer.send(topic, fresh, key=str(uuid.uuid4()).encode())
    await producer.stop()
    await consumer.stop()
    return len(fresh)


def wait_ready(port: int, log: Path) -> None:
    """Wait for a worker's /readyz."""
    give_up = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=3):
                return
        except OSError:
            if time.monotonic() > give_up:
                raise SystemExit(f"worker not ready: {log.read_text()[-2_000:]}") from None
            time.sleep(0.2)


def ratios(rounds: list[dict[str, tuple[Sample, Sample]]]) -> dict[str, dict[str, float]]:
    """Each figure's median ratio over the rounds, with its spread."""
    figures: dict[str, list[float]] = {
        name: [] for name in ("latency_p50", "latency_p99", "throughput", "throughput_three", "cpu")
    }
    for each in rounds:
        (floor_alone, floor_busy), (one_alone, one_busy), (_, three_busy) = (
            each["floor"], each["one"], each["three"],
        )  # fmt: skip
        figures["latency_p50"].append(one_alone.p50 / floor_alone.p50)
        figures["latency_p99"].append(one_alone.p99 / floor_alone.p99)
        figures["throughput"].append(one_busy.per_second / floor_busy.per_second)
        figures["throughput_three"].append(three_busy.per_second / floor_busy.per_second)
        figures["cpu"].append(one_busy.cpu_per_request / floor_busy.cpu_per_request)
    return {
        name: {"value": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in figures.items()
    }


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Bench]:
    """The stack and everything on it."""
    with contextlib.ExitStack() as resources:
        stack = resources.enter_context(
            Stack.up(directory / "stack", services=("kafka", "redis"), progress=console.log)
        )
        yield Bench(stack, directory, resources)


def measure(bench: Bench, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and the memory of a worker whose window is full."""
    # While nothing but idle services runs.
    routing = routing_us()
    of_features, features = feature_figures(bench.stack.env["BROKER_REDIS_URL"])
    model_port, decide_port = free_port(), free_port()
    url = f"http://127.0.0.1:{model_port}"
    bench.spawn("model", sys.executable, "-m", "bench.model", str(model_port))
    bench.wait_for_line("model", "ready")
    bench.command("topics", "apply")
    admin = AdminClient({"bootstrap.servers": bench.bootstrap})
    admin.create_topics([NewTopic("bench.requests", 8)])["bench.requests"].result(30)
    registry = directory / "registry.yaml"
    registry.write_bytes(b"\n---\n".join(orjson.dumps(document) for document in documents(url)))
    bench.command("apply", "-f", str(registry), "--yes")
    asyncio.run(write_features(bench.stack.env["BROKER_REDIS_URL"]))
    infer = f"{url}/v2/models/m0/versions/1/infer"
    floor = bench.spawn("floor", sys.executable, "-m", "bench.floor", bench.bootstrap, "bench.requests", infer)
    decide = bench.spawn(
        "decide", sys.executable, "-m", "app.cli", "worker", "decide", "--instance", "bench", "--http-port",
        str(decide_port),
    )  # fmt: skip
    bench.wait_for_line("floor", "ready")
    wait_ready(decide_port, directory / "decide.log")
    shapes = [
        Shape("floor", "floor", floor, "bench.requests", "/bench/one"),
        Shape("one", "decide", decide, "inference.requests", "/bench/one"),
        Shape("three", "decide", decide, "inference.requests", "/bench/three"),
    ]
    rounds: list[dict[str, tuple[Sample, Sample]]] = []
    with Progress(console=console) as progress:
        steps = progress.add_task("rounds", total=(arguments.rounds + 1) * len(shapes))
        for number in range(arguments.rounds + 1):
            each = {}
            for shape in shapes:
                alone = bench.load(shape, 1, arguments.serial)
                each[shape.name] = (alone, bench.load(shape, arguments.callers, arguments.requests))
                progress.advance(steps)
            if number:  # the first round warms up
                rounds.append(each)
    decide.terminate()
    decide.wait(30)
    entry_bytes = asyncio.run(fill_joins(bench.bootstrap))
    port = free_port()
    full = bench.spawn(
        "full", sys.executable, "-m", "app.cli", "worker", "decide", "--instance", "bench", "--http-port", str(port)
    )
    started = time.monotonic()
    wait_ready(port, directory / "full.log")
    figures = ratios(rounds)
    mib = full.memory_info().rss / 2**20
    figures["memory_mib"] = {"value": mib, "min": mib, "max": mib}
    figures["routing_us"] = routing
    figures |= of_features
    floors = [each["floor"] for each in rounds]
    return {
        **{name: figure["value"] for name, figure in figures.items()},
        "spread": {name: [figure["min"], figure["max"]] for name, figure in figures.items()},
        "floor": {
            "p50_ms": statistics.median(alone.p50 for alone, _ in floors),
            "p99_ms": statistics.median(alone.p99 for alone, _ in floors),
            "per_second": statistics.median(busy.per_second for _, busy in floors),
            "cpu_ms": statistics.median(busy.cpu_per_request for _, busy in floors) * 1000,
        },
        "features": features,
        "recovery_s": time.monotonic() - started,
        "join_entry_bytes": entry_bytes,
        "machine": machine(),
        "batch_max_size": BATCH_MAX_SIZE,
        "rounds": arguments.rounds,
        "requests": arguments.requests,
        "callers": arguments.callers,
    }


def machine() -> str:
    """What the figures were taken on."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?"
    )
    return f"{os.cpu_count()} x {model}, Python {platform.python_version()}, {platform.system()}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def show(result: Mapping[str, Any]) -> None:
    """The table for people."""
    table = Table(title=f"Against the floor, on {result['machine']}")
    for heading in ("figure", "median", "spread", "target", ""):
        table.add_column(heading)
    for name, (sign, target) in TARGETS.items():
        low, high = result["spread"][name]
        met = result[name] <= target if sign == "<=" else result[name] >= target
        table.add_row(
            name, f"{result[name]:.2f}", f"{low:.2f} to {high:.2f}", f"{sign} {target}", "met" if met else "not met"
        )
    console.print(table)
    floor = result["floor"]
    console.print(
        f"floor: p50 {floor['p50_ms']:.1f} ms, p99 {floor['p99_ms']:.1f} ms, {floor['per_second']:.0f}/s, "
        f"{floor['cpu_ms']:.2f} ms of CPU a request; a row a call. The broker's models have "
        f"policy.batch.maxSize: {result['batch_max_size']}"
    )
    costs = Table(title="A fetch of features (raw: redis-py's HMGET of the same fields)")
    for heading in ("fetch", "p50, us", "CPU, us"):
        costs.add_column(heading)
    for name, cost in result["features"]["fetches"].items():
        costs.add_row(name, f"{cost['p50_us']:.0f}", f"{cost['cpu_us']:.0f}")
    console.print(costs)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=3_000, help="a round, with all callers")
    parser.add_argument("--serial", type=int, default=300, help="requests a round, with one caller")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path("bench/out/latest.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="model-broker-bench-") as name, running(Path(name)) as bench:
        result = measure(bench, Path(name), arguments)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    show(result)
    console.print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
