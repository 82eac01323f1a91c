"""Baselines of training inputs, and what a version is given held against them."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pytest

from app.domain import skew
from app.domain.errors import DocumentsRefused
from app.domain.features import FeatureStatus, FeatureValue
from app.domain.skew import (
    BASELINE_BYTES_MAX,
    OBSERVATIONS_MIN,
    FeatureSkew,
    Tally,
    baseline_of,
    bins_of,
    written,
)
from app.domain.version_documents import Baseline
from tests.support.registry_documents import changed, revision, sound

DAY_MS = 86_400_000


def made(rows: Sequence[Mapping[str, Any]], **how: Any) -> Baseline:
    return baseline_of(rows, model="credit-pd", version="1", **how)


def given(*values: Any, status: FeatureStatus = FeatureStatus.PRESENT) -> list[FeatureValue]:
    return [FeatureValue("inputs.x", status, value, None, "request") for value in values]


def told(baseline: Baseline, values: Sequence[Any], *, at_ms: int = 0) -> FeatureSkew:
    """The one feature ``x`` of ``baseline`` after ``values``."""
    tally = Tally(baseline, {"x": 0}, half_life_ms=DAY_MS)
    for value in values:
        tally.observe(given(value), at_ms)
    (found,) = tally.told(at_ms)
    return found


# --- baselines --------------------------------------------------------------------------------------------------------


def test_continuous_numbers_are_cut_into_tenths() -> None:
    """Each bin between the edges has a tenth of the rows; below and above are empty."""
    feature = made([{"x": n / 7} for n in range(1_000)]).features["x"]
    assert feature.counts is not None
    assert (feature.counts[0], feature.counts[-1]) == (0, 0)
    assert set(feature.counts[1:-1]) == {100}


def test_a_frequent_value_has_a_bin_of_its_own() -> None:
    """Ties are not spread over bins, nor mixed with their neighbours."""
    rows: list[dict[str, Any]] = [{"x": 0.0} for _ in range(600)] + [{"x": 1.0 + n} for n in range(400)]
    feature = made(rows).features["x"]
    assert feature.edges is not None
    assert feature.edges[:2] == (0.0, 0.0)
    assert feature.counts is not None
    assert feature.counts[1] == 600
    assert sum(feature.counts) == 1_000


def test_few_rows_make_few_bins() -> None:
    """Of 150 rows three bins, for chance moves small ones."""
    feature = made([{"x": n} for n in range(150)]).features["x"]
    assert feature.counts == (0, 50, 50, 50, 0)


def test_missing_values_are_counted_as_such() -> None:
    """None, NaN and a name that is not there are missing; in a CSV's text, empty cells."""
    rows: list[dict[str, Any]] = [{"x": 1.5, "y": "a"}] * 6 + [{"x": None, "y": None}, {"x": math.nan}, {}]
    baseline = made(rows)
    assert (baseline.rows, baseline.features["x"].missing, baseline.features["y"].missing) == (9, 3, 3)
    text: list[dict[str, Any]] = [{"x": "1.5"}] * 6 + [{"x": ""}, {"x": "nan"}]
    assert made(text, numbers_in_text=True).features["x"].missing == 2


def test_rare_and_many_categories_are_others() -> None:
    """Of 30 categories the 20 most frequent are named; those of a handful of rows, and long texts, are not."""
    rows: list[dict[str, Any]] = [{"x": f"c{n:02}"} for n in range(30) for _ in range(10 + n)]
    rows += [{"x": "rare"}] * 4 + [{"x": "long" * 40}] * 100 + [{"x": "(missing)"}] * 100
    feature = made(rows).features["x"]
    assert feature.categories is not None
    assert set(feature.categories) == {f"c{n:02}" for n in range(10, 30)}
    assert feature.other == sum(10 + n for n in range(10)) + 204


def test_text_is_read_as_csv_means_it() -> None:
    """Numbers, words for true, and codes that are named categorical; one cell that is no number makes categories."""
    rows: list[dict[str, Any]] = [{"n": "5", "flag": "True", "code": "7", "mixed": str(n)} for n in range(20)]
    rows += [{"n": "6.5", "flag": "false", "code": "8", "mixed": "1_0"}] * 20
    features = made(rows, numbers_in_text=True, categorical=["code"]).features
    assert features["n"].edges == (5.0, 5.0, 6.5)
    assert features["flag"].categories == {"false": 20, "true": 20}
    assert features["code"].categories == {"7": 20, "8": 20}
    assert features["mixed"].categories == {"1_0": 20}
    assert made([{"x": "5"}] * 9).features["x"].categories == {"5": 9}


def test_bools_are_categories() -> None:
    """True of JSON is the category that the registry writes as true."""
    feature = made([{"x": n % 2 == 0} for n in range(20)]).features["x"]
    assert feature.categories == {"false": 10, "true": 10}
    bins, _ = bins_of(feature)
    assert [bins.place(value) for value in (False, True, None, "no")] == [0, 1, 3, 2]


def test_only_what_was_asked_for_is_kept() -> None:
    """``features`` chooses; a name that no row has is refused, and so is a file without rows."""
    rows: list[dict[str, Any]] = [{"x": n, "label": 1} for n in range(10)]
    assert list(made(rows, features=["x"]).features) == ["x"]
    with pytest.raises(ValueError, match=r"no row has zz \(there is: x, y\)"):
        baseline_of([{"x": 1.0, "y": 2.0}], model="m", version="1", features={"zz"})
    with pytest.raises(ValueError, match=r"no row has age \(there is: label, x\)"):
        made(rows, features=["x", "age"])
    with pytest.raises(ValueError, match="there are no rows"):
        made([])


def test_a_large_file_is_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not more than a bound is kept, and a pattern in the rows' order does not show."""
    kept = 2_000
    monkeypatch.setattr(skew, "ROWS_KEPT", kept)
    count = 13 * kept
    baseline = made([{"x": n / count, "turn": "a" if n % 2 else "b"} for n in range(count)])
    assert kept / 2 <= baseline.rows <= kept
    turn, feature = baseline.features["turn"].categories, baseline.features["x"]
    assert turn is not None
    assert abs(turn["a"] / baseline.rows - 0.5) < 0.002
    assert feature.edges is not None
    assert all(abs(edge - n / 10) < 0.01 for n, edge in enumerate(feature.edges))


def test_a_file_holds_the_baseline() -> None:
    """What is written is read as the same, and its size is a fraction of a kilobyte a feature."""
    rng = random.Random(1)
    baseline = made([{f"x{n}": rng.lognormvariate(0, 1) for n in range(20)} for _ in range(1_000)])
    data = written(baseline)
    assert Baseline.model_validate_json(data) == baseline
    assert len(data) < 20 * 250
    assert data.count(b"\n") == 22


# --- at apply ---------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [{"amount": n * 10.5, "age": 20 + n % 50} for n in range(200)]


def content(baseline: Baseline) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(written(baseline))
    return found


def refused(baseline: object, *changes: tuple[str, str, object]) -> list[str]:
    """The faults of a sound registry with a baseline in version 1."""
    documents = changed(sound(), "credit-pd-1", "spec.baseline", baseline)
    for name, path, value in changes:
        documents = changed(documents, name, path, value)
    with pytest.raises(DocumentsRefused) as refusal:
        revision(documents)
    return [str(fault).partition("spec.baseline")[2] for fault in refusal.value.faults]


def test_a_baseline_is_part_of_the_revision() -> None:
    """It is accepted as written, and another baseline is another revision."""
    one, other = content(made(ROWS)), content(made(ROWS[:150]))
    first = revision(changed(sound(), "credit-pd-1", "spec.baseline", one))
    assert first.versions["credit-pd", "1"].baseline == made(ROWS)
    assert first.id != revision(changed(sound(), "credit-pd-1", "spec.baseline", other)).id


@pytest.mark.parametrize(
    ("rows", "how", "said"),
    [
        (ROWS, {"version": "2"}, ": is of credit-pd 2, not of this version; make its own"),
        ([{"label": n} for n in range(9)], {}, ".features.label: is no input of this version; leave it out"),
        ([{"age": "x"}] * 9, {}, ".features.age: category 'x' is not INT64"),
        ([{"age": "1.5"}] * 9, {}, ".features.age: category '1.5' is not INT64"),
        ([{"amount": "x"}] * 9, {}, ".features.amount: is DOUBLE, and the baseline counts categories: mend"),
    ],
)
def test_a_baseline_that_does_not_fit_is_refused(rows: Any, how: dict[str, str], said: str) -> None:
    """Another version's, unknown inputs and values of other types are faults that name the field."""
    baseline = baseline_of(rows, model="credit-pd", version=how.get("version", "1"))
    (fault,) = refused(content(baseline))
    assert fault.startswith(said), fault


def test_types_decide_what_may_be_counted() -> None:
    """Numbers of a text, and inputs of no declared type, are refused; codes and empty columns are accepted."""
    amount = "spec.features.0.type"
    numbers = content(made([{"amount": n} for n in range(9)]))
    (fault,) = refused(numbers, ("credit-pd-1", amount, "STRING"))
    assert "name it in --categorical" in fault
    (fault,) = refused(numbers, ("credit-pd-1", amount, "BYTES"))
    assert "leave it out" in fault
    (fault,) = refused(numbers, ("credit-pd-1", amount, ...))
    assert "declare the input's type" in fault
    texts = content(made([{"amount": "a"}] * 9))
    (fault,) = refused(texts, ("credit-pd-1", amount, "BYTES"))
    assert "leave it out" in fault
    for rows, type_ in (
        ([{"amount": 7}] * 9, "INT64"),
        ([{"amount": None}] * 9, "DOUBLE"),
        ([{"amount": "a"}], "STRING"),
    ):
        codes = content(made(rows, categorical=["amount"]))
        documents = changed(sound(), "credit-pd-1", "spec.baseline", codes)
        revision(changed(documents, "credit-pd-1", amount, type_))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", 2, "format: Input should be 1"),
        ("rows", 199, "amount counts 200 rows, and there are 199"),
        ("features.age.edges", [3.0, 2.0], "edges must rise"),
        ("features.age.edges", [1.0, 2.0, 2.0], "edges must rise"),
        ("features.age.edges", [1.0, 2.0], "2 edges make 3 counts"),
        ("features.age.edges", ..., "either edges and counts (numbers) or categories (text)"),
        ("features.age.other", 1, "other belongs to categories"),
        ("features.age.shape", 1, "unknown field"),
        ("features", {}, "is empty"),
        ("features.age", {"categories": {"(other)": 200}}, "no category may be called so"),
        ("features.age", {"categories": {"a": -1}}, "greater than or equal to 0"),
    ],
)
def test_a_baseline_that_contradicts_itself_is_refused(path: str, value: object, said: str) -> None:
    """Edges, counts and rows agree, and an unknown format is not guessed at."""
    documents = changed(sound(), "credit-pd-1", "spec.baseline", content(made(ROWS)))
    with pytest.raises(DocumentsRefused) as refusal:
        revision(changed(documents, "credit-pd-1", f"spec.baseline.{path}", value))
    assert any(said in str(fault) for fault in refusal.value.faults), refusal.value.faults


def test_a_baseline_is_of_bounded_size() -> None:
    """What is larger than a revision can bear is refused by its bytes."""
    texts = [f"{n:03}" + "x" * 125 for n in range(60)]
    feature = {"categories": dict.fromkeys(texts, 1), "other": 140}
    baseline = {"format": 1, "model": "credit-pd", "version": "1", "rows": 200}
    names = [f"f{n}" for n in range(40)]
    faults = refused({**baseline, "features": dict.fromkeys(names, feature)})
    assert any(f"{BASELINE_BYTES_MAX} are allowed" in fault for fault in faults)


# --- what a version is given ------------------------------------------------------------------------------------------

UNIFORM = made([{"x": n / 1_000} for n in range(1_000)])


def test_the_same_population_is_stable_and_another_is_not() -> None:
    """Fresh values of the same distribution stay below 0.1; shifted by two tenths they exceed 0.25."""
    rng = random.Random(3)
    same, shifted = ([rng.random() + shift for _ in range(1_000)] for shift in (0.0, 0.2))
    stable, moved = told(UNIFORM, same).psi, told(UNIFORM, shifted).psi
    assert stable is not None
    assert moved is not None
    assert stable < 0.1
    assert moved > 0.25


def test_too_few_values_tell_nothing() -> None:
    """An index is told from so many observations on."""
    assert told(UNIFORM, [0.5] * (OBSERVATIONS_MIN - 1)).psi is None
    assert told(UNIFORM, [0.5] * OBSERVATIONS_MIN).psi is not None


def test_defaults_and_nulls_count_as_missing() -> None:
    """What stands in for a value is not taken for one; what no model may be given does no harm either."""
    tally = Tally(UNIFORM, {"x": 0}, half_life_ms=DAY_MS)
    tally.observe(given(0.5, status=FeatureStatus.DEFAULTED), 0)
    for value in (None, math.nan, "text", b"bytes"):
        tally.observe(given(value), 0)
    tally.observe(given(0.5), 0)
    (found,) = tally.told(0)
    assert (found.counts[-1], sum(found.counts)) == (5, 6)
    assert (found.bins[0], found.bins[1], found.bins[-2:]) == ("<0", "0..0.099", (">0.999", "(missing)"))


def test_a_sentinel_shows_in_a_bin_that_was_empty() -> None:
    """Minus one for "unknown" falls below all that training saw, not in with its small values."""
    found = told(UNIFORM, [-1.0] * 50 + [n / 950 for n in range(950)])
    assert found.counts[0] == 50
    assert found.psi is not None
    assert found.psi > 0.1


def test_the_index_follows_the_present() -> None:
    """After a shift of the population it rises within half-lives; the counts keep all that was."""
    tally = Tally(UNIFORM, {"x": 0}, half_life_ms=1_000)
    for n in range(1_000):
        tally.observe(given(n / 1_000), 0)
    indices = []
    for moment in (10_000, 2_000_000):
        for _ in range(1_000):
            tally.observe(given(0.95), moment)
        (found,) = tally.told(moment)
        assert found.psi is not None
        indices.append(found.psi)
    # Of the first thousand a thousandth counts after ten half-lives, and nothing after two thousand.
    assert indices[0] == pytest.approx(told(UNIFORM, [0.95] * 1_000).psi, rel=0.05)
    assert indices[1] == pytest.approx(told(UNIFORM, [0.95] * 1_000).psi)
    assert sum(found.counts) == 3_000
    assert next(iter(tally.told(2_002_000))).psi is None
