"""The skew guard of a decide worker: what versions are given, counted against what they were trained on.

Fed where a task's inputs go out, to a model or to its pool, it adds to counts in memory and does nothing else there.
Whoever scrapes ``/metrics`` is told the counts and indices of that moment. Versions have series from their first row on
until the registry has them no more, or gives them another baseline. Shadows are counted apart from decisions: before a
version decides, its inputs can be seen to be right, and they do not dilute those that are decided by.

Each worker tells its own part. Counts add up over workers; an index is of its worker alone, and of any split of the
same rows the largest index is no smaller than that of all (it is jointly convex), so alerts take the largest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from app.domain.features import FeatureValue
from app.domain.registry import Revision
from app.domain.skew import Tally
from app.domain.version_documents import ModelVersionSpec
from app.ports.clock import Clock
from app.settings import Settings

log = structlog.get_logger()

_VERSION: Final = ("model", "version", "purpose", "feature")
_Key = tuple[str, str, bool]


@dataclass(slots=True)
class _Watched:
    """A version under watch; without a tally there was no room for it."""

    spec: ModelVersionSpec
    tally: Tally | None


@dataclass(frozen=True, slots=True)
class _Families:
    """What is told, still without samples."""

    index: GaugeMetricFamily
    given: CounterMetricFamily
    trained: GaugeMetricFamily

    @classmethod
    def empty(cls) -> "_Families":
        """All of them."""
        return cls(
            GaugeMetricFamily(
                "broker_feature_psi", "Population stability index of what a version is given", labels=_VERSION
            ),
            CounterMetricFamily(
                "broker_feature_bin",
                "Values that a version was given, by bin of its baseline",
                labels=(*_VERSION, "bin"),
            ),
            GaugeMetricFamily(
                "broker_feature_baseline_ratio", "The share of a bin at training", labels=(*_VERSION, "bin")
            ),
        )

    def __iter__(self) -> Iterator[Metric]:
        return iter((self.index, self.given, self.trained))


class SkewGuard:
    """Counts the rows of versions that have a baseline, of at most ``skew_features_max`` features in all."""

    def __init__(self, *, clock: Clock, settings: Settings) -> None:
        self._clock = clock
        self._features_max = settings.skew_features_max
        self._half_life_ms = settings.skew_half_life
        self._specs: Mapping[tuple[str, str], ModelVersionSpec] = {}
        self._watched: dict[_Key, _Watched] = {}

    def on_revision(self, revision: Revision) -> None:
        """The registry went over to ``revision``: forget what it has no more, or has otherwise by now."""
        self._specs = revision.versions
        for key, watched in list(self._watched.items()):
            now = self._specs.get(key[:2])
            # Those without room are asked again: others may have left.
            if now is None or watched.tally is None or not _counted_alike(watched.spec, now):
                del self._watched[key]

    def observe(self, version: ModelVersionSpec, row: Sequence[FeatureValue], *, shadow: bool = False) -> None:
        """Count what ``version`` is given, in the order of its contracts."""
        if version.baseline is None:
            return
        key = (version.model, version.version, shadow)
        watched = self._watched.get(key)
        if watched is None:
            watched = self._begin(key, version)
        elif watched.spec is not version:
            # The next revision holds the same document anew; a join may have begun under one that had another.
            if not _counted_alike(watched.spec, version):
                return
            watched.spec = version
        if watched is not None and watched.tally is not None:
            watched.tally.observe(row, self._clock.now_ms())

    def _begin(self, key: _Key, version: ModelVersionSpec) -> _Watched | None:
        now = self._specs.get(key[:2])
        if version.baseline is None or now is None or not _counted_alike(version, now):
            return None
        taken = sum(len(watched.tally) for watched in self._watched.values() if watched.tally is not None)
        wanted = len(version.baseline.features)
        tally = None
        if taken + wanted <= self._features_max:
            places = {contract.column: place for place, contract in enumerate(version.features)}
            tally = Tally(version.baseline, places, half_life_ms=self._half_life_ms)
        elif self._features_max:
            log.warning(
                "skew_not_watched",
                model=version.model,
                version=version.version,
                features=wanted,
                taken=taken,
                hint="raise BROKER_SKEW_FEATURES_MAX, or remove baselines of versions that matter less",
            )
        watched = self._watched[key] = _Watched(version, tally)
        return watched

    def metrics(self) -> Iterator[Metric]:
        """What ``/metrics`` tells, as of now. It may be called in a thread of its own: it changes nothing."""
        told = _Families.empty()
        now_ms = self._clock.now_ms()
        for (model, version, shadow), watched in list(self._watched.items()):
            purpose = "shadow" if shadow else "decision"
            for feature in () if watched.tally is None else watched.tally.told(now_ms):
                labels = {"model": model, "version": version, "purpose": purpose, "feature": feature.feature}
                if feature.psi is not None:
                    told.index.samples.append(Sample("broker_feature_psi", labels, feature.psi))
                rows = sum(feature.baseline)
                for name, count, before in zip(feature.bins, feature.counts, feature.baseline, strict=True):
                    of_bin = {**labels, "bin": name}
                    told.given.samples.append(Sample("broker_feature_bin_total", of_bin, count))
                    told.trained.samples.append(Sample("broker_feature_baseline_ratio", of_bin, before / rows))
        return iter(told)


def _counted_alike(one: ModelVersionSpec, other: ModelVersionSpec) -> bool:
    return one.baseline == other.baseline and one.features == other.features


class _Exported(Collector):
    """What this process tells of skew: what its guard has counted."""

    guard: SkewGuard | None = None

    def collect(self) -> Iterator[Metric]:
        """See ``Collector``."""
        return self.guard.metrics() if self.guard is not None else iter(_Families.empty())


_EXPORTED: Final = _Exported()
REGISTRY.register(_EXPORTED)


def export(guard: SkewGuard) -> None:
    """Let ``guard`` be what this process tells of skew; a process has one."""
    _EXPORTED.guard = guard
