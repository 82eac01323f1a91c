"""How a shadow compares with what it shadows, over many decisions: evidence of single ones in, one account out.

An account is fed one piece of evidence a decision (what the champion and the shadow answered, and whether the result
would have been another), and accounts of parts add up to the account of the whole: in any order, in any grouping, to
the last digit. So each partition of the log keeps its own, and whoever asks merges them. Sums are therefore whole
numbers of ``1e-9``, distributions are counts in bins that are fixed beforehand, and of names (segments, outputs) the
alphabetically first few are kept, which does not depend on who came first.

The population stability index of two binned distributions is ``sum((p - q) * ln(p / q))`` over the bins, with ``p`` and
``q`` the shares of each: the symmetric divergence of Jeffreys (1946), under the name that credit scoring gave it
(Siddiqi, Credit Risk Scorecards, 2006). Half an observation is added to each bin that either occupies, so that an empty
one has a logarithm. The trade reads below 0.1 as stable, above 0.25 as another population.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

SEGMENTS_MAX: Final = 20
OUTPUTS_MAX: Final = 8
OTHER: Final = "other"
"""The segment of all those beyond ``SEGMENTS_MAX``."""
UNIT_BINS: Final = 20
"""Equal-width bins over [0, 1], for scores that are probabilities."""

_NAME_LENGTH_MAX: Final = 64
_NANO: Final = 10**9
_LOG_FROM: Final = 1e-6
_LOG_BINS_A_DOUBLING: Final = 4
_LATENCY_FROM_MS: Final = 0.01
_LATENCY_GROWTH: Final = math.log(1.02)
_SMOOTHING: Final = 0.5

Counts = dict[int, int]


def _add(into: Counts, other: Mapping[int, int]) -> None:
    for key, count in other.items():
        into[key] = into.get(key, 0) + count


def _written(counts: Counts) -> dict[str, int]:
    return {str(key): counts[key] for key in sorted(counts)}


def _read(content: Mapping[str, int]) -> Counts:
    return {int(key): int(count) for key, count in content.items()}


# --- latencies --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Latencies:
    """A histogram whose bounds grow by 2 %: quantiles from it are never above the true ones, and 2 % below at most."""

    counts: Counts = field(default_factory=dict)

    def add(self, latency_ms: float) -> None:
        """Count one; below 10 µs they are alike."""
        bucket = 0
        if latency_ms > _LATENCY_FROM_MS:
            bucket = math.floor(math.log(latency_ms / _LATENCY_FROM_MS) / _LATENCY_GROWTH)
        self.counts[bucket] = self.counts.get(bucket, 0) + 1

    def merge(self, other: "Latencies") -> None:
        """Take in another's."""
        _add(self.counts, other.counts)

    @property
    def count(self) -> int:
        """How many."""
        return sum(self.counts.values())

    def quantile_ms(self, share: float) -> float | None:
        """The latency that ``share`` of them do not exceed; None of none.

        >>> latencies = Latencies()
        >>> for each in range(1, 101):
        ...     latencies.add(each)
        >>> 97 < latencies.quantile_ms(0.99) <= 99
        True
        """
        wanted, seen = math.ceil(share * self.count), 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return _LATENCY_FROM_MS * math.exp(bucket * _LATENCY_GROWTH)
        return None

    def above(self, latency_ms: float) -> int:
        """How many are above it, as ``quantile_ms`` tells them."""
        least = _LATENCY_FROM_MS
        return sum(
            count for bucket, count in self.counts.items() if least * math.exp(bucket * _LATENCY_GROWTH) > latency_ms
        )

    def as_json(self) -> dict[str, int]:
        """What ``from_json`` reads."""
        return _written(self.counts)

    @classmethod
    def from_json(cls, content: Mapping[str, int]) -> "Latencies":
        """The histogram that ``as_json`` gave."""
        return cls(_read(content))


# --- one numeric output -----------------------------------------------------------------------------------------------


def unit_bin(value: float) -> int:
    """The equal-width bin of a value in [0, 1].

    >>> unit_bin(0.0), unit_bin(0.049), unit_bin(0.05), unit_bin(1.0)
    (0, 0, 1, 19)
    """
    return min(int(value * UNIT_BINS), UNIT_BINS - 1)


def log_bin(value: float) -> int:
    """The bin of any number: quarters of a doubling on either side of 0, and one for what is next to 0.

    >>> log_bin(0.0), log_bin(-1e-9), log_bin(1.0) == -log_bin(-1.0), log_bin(2.0) - log_bin(1.0)
    (0, 0, True, 4)
    """
    size = abs(value)
    if size < _LOG_FROM:
        return 0
    number = 1 + math.floor(_LOG_BINS_A_DOUBLING * (math.log2(size) - math.log2(_LOG_FROM)))
    return number if value > 0 else -number


def psi(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """The population stability index of two binned distributions; None where either is empty.

    >>> psi({0: 50, 1: 50}, {0: 50, 1: 50}), round(psi({0: 900, 1: 100}, {0: 800, 1: 200}), 3)
    (0.0, 0.081)
    """
    total_one, total_other = sum(one.values()), sum(other.values())
    if not total_one or not total_other:
        return None
    bins = sorted(one.keys() | other.keys())
    whole_one, whole_other = total_one + _SMOOTHING * len(bins), total_other + _SMOOTHING * len(bins)
    index = 0.0
    for each in bins:
        p = (one.get(each, 0) + _SMOOTHING) / whole_one
        q = (other.get(each, 0) + _SMOOTHING) / whole_other
        index += (p - q) * math.log(p / q)
    return index


@dataclass(slots=True)
class OutputComparison:
    """One numeric output in the champion's words and the shadow's, where both said it. Differences: shadow's minus its.

    ``outside`` counts pairs of which one lies outside [0, 1]: the equal-width bins then do not describe them.
    """

    count: int = 0
    difference_nanos: int = 0
    absolute_nanos: int = 0
    largest: float = 0.0
    outside: int = 0
    champion_unit: Counts = field(default_factory=dict)
    shadow_unit: Counts = field(default_factory=dict)
    champion_log: Counts = field(default_factory=dict)
    shadow_log: Counts = field(default_factory=dict)

    def add(self, champion: float, shadow: float) -> None:
        """One decision's pair; both finite."""
        nanos = round(shadow * _NANO) - round(champion * _NANO)
        self.count += 1
        self.difference_nanos += nanos
        self.absolute_nanos += abs(nanos)
        self.largest = max(self.largest, abs(nanos) / _NANO)
        if 0 <= champion <= 1 and 0 <= shadow <= 1:
            _add(self.champion_unit, {unit_bin(champion): 1})
            _add(self.shadow_unit, {unit_bin(shadow): 1})
        else:
            self.outside += 1
        _add(self.champion_log, {log_bin(champion): 1})
        _add(self.shadow_log, {log_bin(shadow): 1})

    def merge(self, other: "OutputComparison") -> None:
        """Take in another's."""
        self.count += other.count
        self.difference_nanos += other.difference_nanos
        self.absolute_nanos += other.absolute_nanos
        self.largest = max(self.largest, other.largest)
        self.outside += other.outside
        _add(self.champion_unit, other.champion_unit)
        _add(self.shadow_unit, other.shadow_unit)
        _add(self.champion_log, other.champion_log)
        _add(self.shadow_log, other.shadow_log)

    @property
    def mean_difference(self) -> float | None:
        """By how much the shadow is above, on average."""
        return self.difference_nanos / self.count / _NANO if self.count else None

    @property
    def mean_absolute_difference(self) -> float | None:
        """By how much it differs, on average."""
        return self.absolute_nanos / self.count / _NANO if self.count else None

    @property
    def psi(self) -> float | None:
        """The population stability index between the two distributions."""
        if self.outside:
            return psi(self.champion_log, self.shadow_log)
        return psi(self.champion_unit, self.shadow_unit)

    def as_json(self) -> dict[str, Any]:
        """What ``from_json`` reads; sums are text, for they may exceed what JSON's readers take."""
        return {
            "count": self.count,
            "difference": str(self.difference_nanos),
            "absolute": str(self.absolute_nanos),
            "largest": self.largest,
            "outside": self.outside,
            "unit": [_written(self.champion_unit), _written(self.shadow_unit)],
            "log": [_written(self.champion_log), _written(self.shadow_log)],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "OutputComparison":
        """The account that ``as_json`` gave."""
        return cls(
            content["count"],
            int(content["difference"]),
            int(content["absolute"]),
            float(content["largest"]),
            content["outside"],
            *(_read(each) for each in content["unit"]),
            *(_read(each) for each in content["log"]),
        )


# --- all of a shadow, or of one of its segments -----------------------------------------------------------------------


@dataclass(slots=True)
class Account:
    """A shadow's decisions: how many, how many without an answer, how many whose result it would have changed.

    ``compared`` are those where that can be said. ``latencies`` are the shadow's.
    """

    count: int = 0
    failed: int = 0
    compared: int = 0
    flips: int = 0
    outputs: dict[str, OutputComparison] = field(default_factory=dict)
    latencies: Latencies = field(default_factory=Latencies)

    def feed(self, evidence: Mapping[str, Any]) -> None:
        """Take in one decision's evidence."""
        outputs = evidence.get("outputs") or {}
        champion, shadow = outputs.get("champion"), outputs.get("shadow")
        self.count += 1
        self.failed += shadow is None
        flipped = evidence.get("flipped")
        if isinstance(flipped, bool):
            self.compared += 1
            self.flips += flipped
        latency_ms = evidence.get("latency_ms")
        if _is_number(latency_ms):
            self.latencies.add(latency_ms)
        if isinstance(champion, Mapping) and isinstance(shadow, Mapping):
            for name in champion.keys() & shadow.keys():
                if _is_number(champion[name]) and _is_number(shadow[name]):
                    self.outputs.setdefault(name, OutputComparison()).add(champion[name], shadow[name])
            self._bound()

    def merge(self, other: "Account") -> None:
        """Take in another's."""
        self.count += other.count
        self.failed += other.failed
        self.compared += other.compared
        self.flips += other.flips
        for name, output in other.outputs.items():
            self.outputs.setdefault(name, OutputComparison()).merge(output)
        self._bound()
        self.latencies.merge(other.latencies)

    def _bound(self) -> None:
        for name in sorted(self.outputs)[OUTPUTS_MAX:]:
            del self.outputs[name]

    @property
    def flip_rate(self) -> float | None:
        """The share of the compared decisions that the shadow would have changed."""
        return self.flips / self.compared if self.compared else None

    def as_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return {
            "count": self.count,
            "failed": self.failed,
            "compared": self.compared,
            "flips": self.flips,
            "outputs": {name: self.outputs[name].as_json() for name in sorted(self.outputs)},
            "latencies": self.latencies.as_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Account":
        """The account that ``as_json`` gave."""
        return cls(
            content["count"],
            content["failed"],
            content["compared"],
            content["flips"],
            {name: OutputComparison.from_json(each) for name, each in content["outputs"].items()},
            Latencies.from_json(content["latencies"]),
        )

    def summary(self) -> dict[str, Any]:
        """The account's figures, for people and programs."""
        return {
            "count": self.count,
            "failed": self.failed,
            "compared": self.compared,
            "flips": self.flips,
            "flip_rate": self.flip_rate,
            "latency_p99_ms": self.latencies.quantile_ms(0.99),
            "outputs": {
                name: {
                    "count": output.count,
                    "mean_difference": output.mean_difference,
                    "mean_absolute_difference": output.mean_absolute_difference,
                    "largest_difference": output.largest,
                    "psi": output.psi,
                }
                for name, output in sorted(self.outputs.items())
            },
        }


@dataclass(slots=True)
class Comparison:
    """One shadow version's account, overall and by segment."""

    overall: Account = field(default_factory=Account)
    segments: dict[str, Account] = field(default_factory=dict)

    def feed(self, evidence: Mapping[str, Any]) -> None:
        """Take in one decision's evidence, as a shadow's audit record holds it."""
        self.overall.feed(evidence)
        segment = evidence.get("segment")
        if isinstance(segment, str):
            alone = Account()
            alone.feed(evidence)
            self._merge_segments({segment[:_NAME_LENGTH_MAX]: alone})

    def merge(self, other: "Comparison") -> None:
        """Take in another's."""
        self.overall.merge(other.overall)
        self._merge_segments(other.segments)

    def _merge_segments(self, others: Mapping[str, Account]) -> None:
        for name, account in others.items():
            self.segments.setdefault(name, Account()).merge(account)
        named = sorted(name for name in self.segments if name != OTHER)
        # Whoever is beyond the first few once stays so, as these never go: the rest is the same in any order.
        for name in named[SEGMENTS_MAX:]:
            self.segments.setdefault(OTHER, Account()).merge(self.segments.pop(name))

    def as_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return {
            "overall": self.overall.as_json(),
            "segments": {name: self.segments[name].as_json() for name in sorted(self.segments)},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Comparison":
        """The comparison that ``as_json`` gave."""
        segments = {name: Account.from_json(each) for name, each in content["segments"].items()}
        return cls(Account.from_json(content["overall"]), segments)

    def summary(self) -> dict[str, Any]:
        """Its figures, for people and programs."""
        return {
            "overall": self.overall.summary(),
            "segments": {name: self.segments[name].summary() for name in sorted(self.segments)},
        }


def merged(comparisons: Iterable[Comparison]) -> Comparison:
    """All of them as one; they stay as they are."""
    whole = Comparison()
    for comparison in comparisons:
        whole.merge(comparison)
    return whole


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
