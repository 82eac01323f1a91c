"""What the decide worker says of its features at `/metrics`: how its near cache does, and how skewed its inputs are."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

ANSWERS_WITHIN_S = 10.0
LOOKUPS = "broker_feature_cache_lookups_total"
PSI = "broker_feature_psi"
HELD = ("hit", "negative")


@dataclass(frozen=True, slots=True)
class Skew:
    """The population stability index of one feature of a version."""

    psi: float
    model: str
    version: str
    feature: str


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker: its cache's ``lookups`` by outcome, and the feature that is most unlike its baseline, if any yet."""

    lookups: Mapping[str, int]
    most_skewed: Skew | None

    @property
    def reads(self) -> int:
        """How many rows were looked for in the cache."""
        return sum(self.lookups.values())

    @property
    def held(self) -> int:
        """How many of them it answered itself."""
        return sum(self.lookups.get(outcome, 0) for outcome in HELD)

    @property
    def hit_rate(self) -> float | None:
        """The share of reads that the cache answered itself; None without reads."""
        return self.held / self.reads if self.reads else None


def worker_of(text: str) -> Worker:
    """Read a worker's metrics.

    >>> told = worker_of('''
    ... # TYPE broker_feature_cache_lookups counter
    ... broker_feature_cache_lookups_total{outcome="hit"} 9.0
    ... broker_feature_cache_lookups_total{outcome="miss"} 1.0
    ... # TYPE broker_feature_psi gauge
    ... broker_feature_psi{model="pd",version="1",purpose="decision",feature="age"} 0.25
    ... broker_feature_psi{model="pd",version="1",purpose="decision",feature="job"} 0.5
    ... broker_feature_psi{model="pd",version="2",purpose="shadow",feature="job"} 0.75
    ... ''')
    >>> told.hit_rate, told.most_skewed
    (0.9, Skew(psi=0.5, model='pd', version='1', feature='job'))
    """
    lookups: dict[str, int] = {}
    skews: list[Skew] = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == LOOKUPS:
                lookups[labels["outcome"]] = int(sample.value)
            elif sample.name == PSI and labels["purpose"] == "decision":
                skews.append(Skew(sample.value, labels["model"], labels["version"], labels["feature"]))
    return Worker(lookups, max(skews, key=lambda skew: skew.psi, default=None))


def read_worker(url: str) -> Worker:
    """Ask the worker at ``url``.

    Raises OSError when it does not answer.
    """
    with urllib.request.urlopen(f"{url}/metrics", timeout=ANSWERS_WITHIN_S) as answer:  # noqa: S310 - the URL is the demo's own
        return worker_of(answer.read().decode())
