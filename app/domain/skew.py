"""Skew: are the values that a model is given now distributed as those that it was trained on?

Rows of training inputs in, a ``Baseline`` out: each feature's rows counted in a few bins, small enough to live in the
registry beside its version. While the version runs, a ``Tally`` counts what it is given in the same bins, and so the
population stability index of the two is exact over the bins, whatever has passed.

Numbers have about ten bins of equal counts. A value that alone has a bin's share is a bin of its own, and two bins
stay empty at training: below and above all that it saw, where sentinels and changed units land. Texts have a bin each,
of the most frequent ones, and one for all others. ``(missing)`` is where no value was: an empty cell at training; at
serving null, or a default that stood in for a value. A feature has either a default or nulls, so one bin is enough,
and cells that were empty before training filled them compare with defaults that serving fills in.

What is given is counted twice. ``counts`` only grow, so that those of several workers and any time between two moments
can be added and subtracted. ``weights`` fade by half in each half-life, and the index is told of them: it follows the
present. They fade forward (Cormode et al., Forward Decay, 2009): an observation weighs ``2 ** (age of the tally /
half-life)``, and only who reads divides, so that to count is one addition.

An index of few observations is noise: between equal populations it is about ``(bins - 1) * (1/n + 1/m)`` (Yurdakul and
Naranjo, Statistical properties of the population stability index, 2020). None is told below ``OBSERVATIONS_MIN``, and
baselines of few rows have fewer bins.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import orjson

from app.domain.comparison_stats import psi
from app.domain.features import FeatureStatus, FeatureValue, coerce
from app.domain.version_documents import RESERVED_CATEGORIES, Baseline, FeatureBaseline, ModelVersionSpec

BINS: Final = 10
ROWS_A_BIN_MIN: Final = 50
"""Fewer rows make fewer bins: with 50 in each, chance alone moves the index by a hundredth or two."""
CATEGORIES_MAX: Final = 20
CATEGORY_ROWS_MIN: Final = 5
"""Categories of fewer rows count as others: their share is not known."""
CATEGORY_LENGTH_MAX: Final = 128
OBSERVATIONS_MIN: Final = 500
ROWS_KEPT: Final = 100_000
"""Rows that a baseline is made of, at most; a share of them is exact to a thousandth then."""
BASELINE_BYTES_MAX: Final = 262_144

OTHER: Final = "(other)"
MISSING: Final = "(missing)"

_NUMBERS: Final = frozenset({"INT32", "INT64", "DOUBLE", "FLOAT", "UNIX_TIMESTAMP"})
_CATEGORIES: Final = frozenset({"STRING", "BOOL", "INT32", "INT64"})
_WEIGHT_MAX: Final = 2.0**200
"""Weights are brought back to 1 before they overflow, at 2 ** 1024."""
_EXPONENT_MAX: Final = 1_000.0
_GOLDEN: Final = 0x9E3779B97F4A7C15
_WORD: Final = 2**64

Cell = str | int | float | bool | None


# --- bins -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NumberBins:
    """Bins between ``edges``: below the first, up to each next one, above the last, missing.

    >>> bins = NumberBins((0.0, 10.0, 20.0))
    >>> [bins.place(value) for value in (-1, 0, 10, 10.5, 20, 21, None)]
    [0, 1, 1, 2, 2, 3, 4]
    >>> bins.names
    ('<0', '0..10', '10..20', '>20', '(missing)')
    """

    edges: tuple[float, ...]

    def place(self, value: object) -> int:
        """The number of the bin of ``value``; what is no number has none, and is missing."""
        if not isinstance(value, int | float) or value != value:  # noqa: PLR0124 - only NaN differs from itself
            return len(self.edges) + 1
        # As edges are: beyond 2 ** 53 a whole number may lie between two of them.
        number = float(value)
        return 0 if number < self.edges[0] else bisect_left(self.edges, number, 1)

    @property
    def names(self) -> tuple[str, ...]:
        """What people and metrics call the bins."""
        told = [f"{edge:.17g}" if float(f"{edge:.12g}") != edge else f"{edge:.12g}" for edge in self.edges]
        return (f"<{told[0]}", *(f"{low}..{high}" for low, high in pairwise(told)), f">{told[-1]}", MISSING)


@dataclass(frozen=True, slots=True)
class CategoryBins:
    """A bin each for the ``numbers`` of named categories, then others, then missing.

    >>> bins = CategoryBins({"car": 0, "true": 1})
    >>> [bins.place(value) for value in ("car", True, "boat", None)], bins.names
    ([0, 1, 2, 3], ('car', 'true', '(other)', '(missing)'))
    """

    numbers: Mapping[str, int]

    def place(self, value: object) -> int:
        """The number of the bin of ``value``."""
        if type(value) is not str:
            if value is None:
                return len(self.numbers) + 1
            value = _category(value)
        return self.numbers.get(value, len(self.numbers))

    @property
    def names(self) -> tuple[str, ...]:
        """What people and metrics call the bins."""
        return (*self.numbers, OTHER, MISSING)


Bins = NumberBins | CategoryBins


def bins_of(feature: FeatureBaseline) -> tuple[Bins, tuple[int, ...]]:
    """A feature's bins, and the baseline's count in each."""
    if feature.edges is not None and feature.counts is not None:
        return NumberBins(feature.edges), (*feature.counts, feature.missing)
    categories = feature.categories or {}
    numbers = {name: number for number, name in enumerate(categories)}
    return CategoryBins(numbers), (*categories.values(), feature.other, feature.missing)


def _category(value: object) -> str:
    """The text of a category, as registry documents and JSON write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def stability(baseline: Sequence[float], present: Sequence[float]) -> float | None:
    """The population stability index between counts of the same bins; bins that are empty in both tell nothing.

    >>> stability([50, 50, 0], [500, 500, 0])
    0.0
    >>> round(stability([800, 200, 0], [400, 500, 100]), 2)
    1.08
    """
    occupied = [number for number, pair in enumerate(zip(baseline, present, strict=True)) if any(pair)]
    return psi({each: baseline[each] for each in occupied}, {each: present[each] for each in occupied})


# --- baselines --------------------------------------------------------------------------------------------------------


def baseline_of(
    rows: Iterable[Mapping[str, Cell]],
    *,
    model: str,
    version: str,
    features: Collection[str] | None = None,
    categorical: Collection[str] = (),
    numbers_in_text: bool = False,
) -> Baseline:
    """The baseline of what ``model`` ``version`` was trained on, a row a mapping from the model's names to values.

    None, NaN and an absent name are a missing value. A feature all of whose values are numbers is numeric, others are
    categorical, and so are those that ``categorical`` names. ``features`` chooses; by default every name that a row
    has. ``numbers_in_text`` reads text as CSV files mean it: 5.0 is a number, nothing is missing, True is true.

    Raises:
        ValueError: no rows, a name that no row has, or names and values that a baseline cannot hold.

    >>> made = baseline_of([{"age": 30 + n % 40, "job": "x" if n % 4 else None} for n in range(400)],
    ...                    model="credit-pd", version="3")
    >>> made.features["age"].edges, made.features["age"].counts
    ((30.0, 34.0, 39.0, 44.0, 49.0, 54.0, 59.0, 64.0, 69.0), (0, 50, 50, 50, 50, 50, 50, 50, 50, 0))
    >>> made.features["job"].categories, made.features["job"].missing
    ({'x': 300}, 100)
    """
    columns, count, names = _columns(rows, features)
    if not count:
        raise ValueError("there are no rows: a baseline is made of what a model was trained on")
    absent = sorted({*(features or ()), *categorical} - columns.keys())
    if absent:
        have = ", ".join(sorted(names)) or "none"
        raise ValueError(f"no row has {', '.join(absent)[:500]} (there is: {have[:500]})")
    content = {
        "format": 1,
        "model": model,
        "version": version,
        "rows": count,
        "features": {
            name: _feature(values, count, name in categorical, numbers_in_text) for name, values in columns.items()
        },
    }
    return Baseline.model_validate_json(orjson.dumps(content))


def written(baseline: Baseline) -> bytes:
    """A baseline's file: JSON, a line a feature."""
    content = baseline.model_dump(mode="json", exclude_unset=True)
    features = content.pop("features")
    head = orjson.dumps(content).removesuffix(b"}")
    lines = b",\n".join(orjson.dumps(name) + b":" + orjson.dumps(features[name]) for name in features)
    return head + b',"features":{\n' + lines + b"\n}}\n"


def baseline_faults(spec: ModelVersionSpec, types: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """What keeps a version from being compared with its baseline: fields of it and messages.

    ``types`` are the declared types by the model's names of inputs that are known; None where an input declares none.
    """
    baseline = spec.baseline
    if baseline is None:
        return
    if (baseline.model, baseline.version) != (spec.model, spec.version):
        yield "", f"is of {baseline.model} {baseline.version}, not of this version; make its own"
    size = len(orjson.dumps(baseline.model_dump(mode="json", exclude_unset=True)))
    if size > BASELINE_BYTES_MAX:
        yield "", f"has {size} bytes, and {BASELINE_BYTES_MAX} are allowed: leave features out"
    columns = {contract.name or contract.ref.partition(".")[2] for contract in spec.features}
    for name, feature in baseline.features.items():
        at = f".features.{name}"
        if name not in columns:
            yield at, "is no input of this version; leave it out when you make the baseline"
        elif name in types:
            fault = _type_fault(feature, types[name])
            if fault is not None:
                yield at, fault


def _type_fault(feature: FeatureBaseline, type_: str | None) -> str | None:
    if type_ is None:
        return "declare the input's type: values of several types have no bins in common"
    if feature.edges is not None:
        if type_ in _NUMBERS:
            return None
        remedy = "name it in --categorical" if type_ in _CATEGORIES else "leave it out"
        return f"is {type_}, and the baseline counts numbers: {remedy} when you make the baseline"
    if not feature.categories and not feature.other:
        # Empty in each row: whatever is given now is other.
        return None
    if type_ not in _CATEGORIES:
        remedy = "mend what is no number in its column" if type_ in _NUMBERS else "leave it out"
        return f"is {type_}, and the baseline counts categories: {remedy} when you make the baseline"
    for text in feature.categories or ():
        try:
            _ = _read_category(text, type_)
        except ValueError:
            return f"category {text[:40]!r} is not {type_}: mend it in the training data"
    return None


def _read_category(text: str, type_: str) -> object:
    if type_ == "STRING":
        return text
    return coerce(orjson.loads(text), type_)


def _columns(
    rows: Iterable[Mapping[str, Cell]], features: Collection[str] | None
) -> tuple[dict[str, dict[int, Cell]], int, set[str]]:
    """Each column's values by row, of at most ``ROWS_KEPT`` rows, of how many, and the names of all their columns.

    A row is kept by its number: multiples of the golden ratio fill [0, 1) evenly (Weyl's equidistribution theorem),
    also those of every second or hundredth row, so no order of the rows makes the kept ones differ from the others.
    """
    columns: dict[str, dict[int, Cell]] = {}
    kept: list[int] = []
    names: set[str] = set()
    below = _WORD
    for number, row in enumerate(rows):
        if number * _GOLDEN % _WORD >= below:
            continue
        kept.append(number)
        names.update(row)
        for name, value in row.items():
            if value is not None and (features is None or name in features):
                columns.setdefault(name, {})[number] = value
            elif features is None or name in features:
                columns.setdefault(name, {})
        if len(kept) > ROWS_KEPT:
            below //= 2
            kept = [each for each in kept if each * _GOLDEN % _WORD < below]
            left = set(kept)
            columns = {
                name: {number: value for number, value in values.items() if number in left}
                for name, values in columns.items()
            }
    return columns, len(kept), names


def _feature(values: Mapping[int, Cell], rows: int, categorical: bool, in_text: bool) -> dict[str, Any]:
    present = [value for value in values.values() if not _is_missing(value, in_text)]
    if not categorical:
        numbers = [_number(value, in_text) for value in present]
        if present and None not in numbers:
            return _numeric([number for number in numbers if number is not None], rows)
        if not present:
            return {"categories": {}, "missing": rows}
    texts = [_category(value) for value in present]
    if in_text and {text.lower() for text in texts} <= {"true", "false"}:
        texts = [text.lower() for text in texts]
    return _categorical(texts, rows)


def _is_missing(value: Cell, in_text: bool) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is None or (in_text and isinstance(value, str) and value.strip().lower() in ("", "nan"))


def _number(value: Cell, in_text: bool) -> float | None:
    if isinstance(value, str) and in_text:
        try:
            number = float(value)
        except ValueError:
            return None
        return number if math.isfinite(number) and "_" not in value else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _numeric(numbers: list[float], rows: int) -> dict[str, Any]:
    edges = equal_count_edges(numbers, max(2, min(BINS, rows // ROWS_A_BIN_MIN)))
    bins = NumberBins(tuple(edges))
    counts = [0] * (len(edges) + 1)
    for number in numbers:
        counts[bins.place(number)] += 1
    return {"edges": edges, "counts": counts, "missing": rows - len(numbers)}


def _categorical(texts: list[str], rows: int) -> dict[str, Any]:
    counts = Counter(texts)
    fit = [
        (text, count)
        for text, count in counts.items()
        if count >= CATEGORY_ROWS_MIN and len(text) <= CATEGORY_LENGTH_MAX and text not in RESERVED_CATEGORIES
    ]
    named = dict(sorted(fit, key=lambda pair: (-pair[1], pair[0]))[:CATEGORIES_MAX])
    return {
        "categories": {text: named[text] for text in sorted(named)},
        "other": len(texts) - sum(named.values()),
        "missing": rows - len(texts),
    }


def equal_count_edges(numbers: Iterable[float], bins: int) -> list[float]:
    """Edges that cut ``numbers``, at least one, into ``bins`` of about equal counts, at most twice as many.

    A value that alone fills a bin gets its own. Between two values the edge with the fewest digits is taken.

    >>> equal_count_edges([1] * 5 + [2] * 90 + [3] * 5, 10)
    [1.0, 1.0, 2.0, 3.0]
    >>> equal_count_edges(range(1, 101), 4)
    [1.0, 25.0, 50.0, 75.0, 100.0]
    """
    counted = sorted(Counter(numbers).items())
    share = sum(count for _, count in counted) / bins
    edges = [float(counted[0][0])]
    filled = 0.0
    for (value, count), (after, alone) in pairwise([*counted, (math.inf, math.inf)]):
        filled += count
        if filled >= share or alone >= share:
            edges.append(_shortest(value, after))
            filled = 0.0
    return edges


def _shortest(value: float, after: float) -> float:
    """The number from ``value`` on and below ``after`` that is written with the fewest digits, three at least."""
    for digits in range(3, 17):
        rounded = float(f"{value:.{digits}g}")
        if value <= rounded < after:
            return rounded
    return float(value)


# --- what a version is given ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Distribution:
    """One feature's bins, what the baseline counts in them, and what was given."""

    name: str
    bins: tuple[str, ...]
    baseline: tuple[int, ...]
    counts: list[int]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class FeatureSkew:
    """One feature: bins, how many rows of training and of serving fell in each, and the index at this moment.

    ``psi`` is None while too little was seen of late.
    """

    feature: str
    bins: tuple[str, ...]
    baseline: tuple[int, ...]
    counts: tuple[int, ...]
    psi: float | None


class Tally:
    """The running distributions of what one version is given; as large as its baseline, whatever passes.

    >>> spec = baseline_of(({"x": n} for n in range(1_000)), model="m", version="1")
    >>> tally = Tally(spec, {"x": 0}, half_life_ms=1_000)
    >>> given = [FeatureValue("inputs.x", FeatureStatus.PRESENT, n, None, "request") for n in range(1_000)]
    >>> for value in given:
    ...     tally.observe([value], now_ms=0)
    >>> (told,) = tally.told(now_ms=0)
    >>> round(told.psi, 3), sum(told.counts)
    (0.0, 1000)
    >>> next(iter(tally.told(now_ms=2_000))).psi is None  # of a thousand, 250 count by now
    True
    """

    __slots__ = ("_distributions", "_half_life_ms", "_places", "_since_ms")

    def __init__(self, baseline: Baseline, places: Mapping[str, int], *, half_life_ms: int) -> None:
        """``places`` are the inputs' places in a row, by the model's names."""
        self._half_life_ms = half_life_ms
        self._since_ms: int | None = None
        self._distributions: list[_Distribution] = []
        # What a row passes through, side by side: looking each up on its way costs more than counting.
        self._places: list[tuple[int, Callable[[object], int], list[int], list[float]]] = []
        for name, feature in baseline.features.items():
            bins, trained = bins_of(feature)
            each = _Distribution(name, bins.names, trained, [0] * len(trained), [0.0] * len(trained))
            self._distributions.append(each)
            self._places.append((places[name], bins.place, each.counts, each.weights))

    def __len__(self) -> int:
        return len(self._distributions)

    def observe(self, row: Sequence[FeatureValue], now_ms: int) -> None:
        """Count one row that the version was given."""
        if self._since_ms is None:
            self._since_ms = now_ms
        weight = self._growth(now_ms)
        if weight > _WEIGHT_MAX:
            for each in self._distributions:
                each.weights[:] = [before / weight for before in each.weights]
            self._since_ms, weight = now_ms, 1.0
        defaulted = FeatureStatus.DEFAULTED
        for at, place, counts, weights in self._places:
            given = row[at]
            # A default is the contract's, not the applicant's: by its value it would pass for one.
            number = place(None if given.status is defaulted else given.value)
            counts[number] += 1
            weights[number] += weight

    def _growth(self, now_ms: int) -> float:
        """What an observation weighs at ``now_ms``, beside 1 for the first."""
        age_ms = now_ms - (now_ms if self._since_ms is None else self._since_ms)
        return math.pow(2.0, min(age_ms / self._half_life_ms, _EXPONENT_MAX))

    def weight(self, now_ms: int) -> float:
        """How many rows count at ``now_ms``: each by half for every half-life since."""
        return sum(self._distributions[0].weights) / self._growth(now_ms)

    def told(self, now_ms: int) -> Iterator[FeatureSkew]:
        """Each feature as it stands at ``now_ms``."""
        enough = self.weight(now_ms) >= OBSERVATIONS_MIN
        growth = self._growth(now_ms)
        for each in self._distributions:
            index = stability(each.baseline, [weight / growth for weight in each.weights]) if enough else None
            yield FeatureSkew(each.name, each.bins, each.baseline, tuple(each.counts), index)
