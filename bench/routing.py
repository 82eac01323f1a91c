"""What routing costs: one request under a registry of 200 routes, 10 rules on its own, the last of which matches.

A third of the routes is literal, a third has a placeholder, a third is a prefix; the request's own has a placeholder.
Its rules ask for metadata, inputs, entities and a header by CEL, and its task draws an arm for the request's subject.
The figure ``routing_us`` is the median of many requests, each of another subject, in microseconds of one core.

Run by itself: ``python -m bench.routing``
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any, Final

import orjson

from app.domain.registry import Revision, Source, read_revision
from app.domain.requests import Request, RequestId
from app.domain.routing import Plan, route

ROUTES: Final = 200
RULES: Final = 10
REQUESTS: Final = 20_000
WARM_UP: Final = 1_000
NOW_MS: Final = 1_790_000_000_000
PATH: Final = "/credit/card/limit"


def documents() -> Iterator[dict[str, Any]]:
    """The registry of this benchmark."""
    yield _document("Model", "pd", {"owner": "bench"})
    for version in ("1", "2"):
        spec = {
            "model": "pd",
            "version": version,
            "digest": "sha256:" + "0" * 64,
            "backend": {"type": "http", "endpoints": ["http://127.0.0.1:1"]},
            "features": [{"ref": f"inputs.i{number}", "default": 0} for number in range(20)],
            "outputs": [{"name": "probability", "datatype": "FP64"}],
            "governance": {"approvedBy": "bench"},
        }
        yield _document("ModelVersion", f"pd-{version}", spec)
    for number in range(ROUTES - 1):
        shape = ("/credit/card/p{0}", "/credit/{{product}}/p{0}", "/credit/area{0}/*")[number % 3]
        yield _document("Route", f"other-{number}", _route(shape.format(number), [None]))
    asked = (
        'metadata.channel == "batch-{0}"',
        'metadata.product == "loan" && inputs.i3 > {0}0.0',
        "inputs.i1 > {0}000.0 || inputs.i2 < -1.0",
        'metadata.headers["x-channel"] == "partner-{0}"',
        "entities.applicant_id < -{0}",
    )
    whens = [asked[number % len(asked)].format(1 + number // len(asked)) for number in range(RULES - 1)]
    yield _document("Route", "own", _route("/credit/{product}/limit", [*whens, 'metadata.channel == "web"']))


def _route(path: str, whens: list[str | None]) -> dict[str, Any]:
    split = [{"version": "1", "weight": 90}, {"version": "2", "weight": 10}]
    tasks = [{"name": "pd", "model": "pd", "select": {"split": split, "stickyBy": "applicant_id"}}]
    rules = [
        {"name": f"rule-{number}", "tasks": tasks, "result": {"low": "outputs.pd.probability < 0.3"}}
        | ({} if when is None else {"when": when})
        for number, when in enumerate(whens)
    ]
    return {"path": path, "deadline": "1s", "rules": rules}


def _document(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "modelbroker.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def request(number: int) -> Request:
    """A request that reaches the last rule: 20 inputs, and the headers that a caller of Kafka sends."""
    return Request(
        RequestId(f"bench-{number}"),
        PATH,
        {"applicant_id": number},
        {f"i{place}": float(place) for place in range(20)},
        {"channel": "web", "session": "b7c1e7a0"},
        None,
        None,
        "normal",
        "application/json",
        "digest",
        (
            ("kafka_replyTopic", b"bench.replies"),
            ("kafka_correlationId", bytes(range(16))),
            ("request-id", b"bench"),
            ("x-channel", b"web"),
        ),
    )


def measure(revision: Revision, requests: int = REQUESTS) -> list[float]:
    """Microseconds of each of so many requests, after those that warm up."""
    taken = []
    for number in range(WARM_UP + requests):
        asked = request(number)
        began = time.perf_counter_ns()
        plan = route(revision, asked, NOW_MS)
        taken.append((time.perf_counter_ns() - began) / 1_000)
        if not isinstance(plan, Plan) or plan.rule.spec.name != f"rule-{RULES - 1}":
            raise SystemExit(f"request {number} is not decided by the last rule: {plan}")
    return taken[WARM_UP:]


def routing_us(requests: int = REQUESTS) -> dict[str, float]:
    """The figure, ``value``; ``min`` and ``max`` are the 5th and the 95th hundredth."""
    taken = measure(read_revision(Source("bench", each) for each in documents()), requests)
    hundredths = statistics.quantiles(taken, n=100)
    return {"value": statistics.median(taken), "min": hundredths[4], "max": hundredths[94]}


def main() -> None:
    """Run this benchmark alone, and print its figure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    arguments = parser.parse_args()
    print(orjson.dumps({"routing_us": routing_us(arguments.requests)}).decode())


if __name__ == "__main__":
    main()
