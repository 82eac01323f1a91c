"""On-demand features: what is made of what, in which order, how old it is, and what is refused."""

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.document_parts import ValueType
from app.domain.errors import Code
from app.domain.explanation import explain
from app.domain.expressions import Activation
from app.domain.features import (
    EVENT_TIME_AHEAD_MS_MAX,
    UNAVAILABLE,
    FeatureRef,
    FeatureStatus,
    Fetched,
    FetchedFeatures,
    ViewWant,
    resolve,
)
from app.domain.on_demand import FeatureFunction, closure, compile_views, compute, functions_of
from app.domain.version_documents import FeatureContract
from app.domain.view_documents import FeatureViewSpec
from tests.support.registry_documents import document, model_version, request, revision, route, task

NOW_MS = 1_790_000_000_000
PRESENT, MISSING, NULL = FeatureStatus.PRESENT, FeatureStatus.MISSING, FeatureStatus.NULL
COMPUTED, ERROR, STALE = FeatureStatus.COMPUTED, FeatureStatus.ERROR, FeatureStatus.STALE
APPLICANT: dict[str, ValueType] = {"income": "DOUBLE", "age": "INT64", "history": "STRING", "spent": "DOUBLE_LIST"}


def stored(**types: ValueType) -> FeatureViewSpec:
    """A view in Redis."""
    return FeatureViewSpec.model_validate_json(
        FeatureViewSpec.model_validate(
            {
                "entities": ({"name": "applicant_id", "type": "INT64"},),
                "features": tuple({"name": name, "type": type_} for name, type_ in types.items()),
                "source": {"type": "redis", "project": "credit"},
            }
        ).model_dump_json(by_alias=True, exclude_unset=True)
    )


def computed(types: dict[str, ValueType], **how: Any) -> FeatureViewSpec:
    """A view that is computed."""
    features = tuple({"name": name, "type": type_} for name, type_ in types.items())
    return FeatureViewSpec.model_validate({"features": features, "onDemand": how})


def views(*features: tuple[str, ValueType, Any], **others: FeatureViewSpec) -> dict[str, FeatureViewSpec]:
    """The applicant's view and one, ``loan``, that computes ``features``."""
    made = computed({name: type_ for name, type_, _ in features}, **{name: how for name, _, how in features})
    return {"applicant": stored(**APPLICANT), "loan": made} | others


def told(found: dict[str, FeatureViewSpec]) -> list[str]:
    """What is wrong with views."""
    return [f"{fault.view}.{fault.field}: {fault.message}" for fault in compile_views(found)[1]]


def computed_of(
    found: dict[str, FeatureViewSpec],
    known: dict[str, Fetched] | None = None,
    functions: dict[str, FeatureFunction] | None = None,
    **sections: Any,
) -> FetchedFeatures:
    """Everything that the views compute of the applicant's features."""
    computations, faults = compile_views(found)
    assert not faults
    given_: dict[FeatureRef, Fetched] = {("applicant", name): value for name, value in (known or {}).items()}
    return compute(tuple(computations.values()), request(**sections), given_, functions or {}, found, NOW_MS)


def present(value: Any, at_ms: int | None = NOW_MS) -> Fetched:
    """A stored value."""
    return Fetched(PRESENT, value, at_ms)


def test_cel_sees_features_and_the_request() -> None:
    """Stored features by view, the request's sections, lists as lists; the value is of its declared type."""
    found = computed_of(
        views(
            ("share", "DOUBLE", "double(inputs.amount) / applicant.income"),
            ("young", "BOOL", 'applicant.age < 25 && metadata.channel == "web" && path.startsWith("/credit")'),
            ("most", "DOUBLE", "max(applicant.spent)"),
            ("last", "DOUBLE_LIST", "applicant.spent.filter(x, x > 1.0)"),
            ("whom", "STRING", "string(entities.applicant_id)"),
        ),
        {"income": present(2_000.0), "age": present(24), "spent": present((1.0, 3.0))},
        inputs={"amount": 500},
        metadata={"channel": "web"},
        entities={"applicant_id": 17},
    )
    values = {name: (one.status, one.value, one.source) for (view, name), one in found.items() if view == "loan"}
    assert values == {
        "share": (COMPUTED, 0.25, "onDemand"),
        "young": (COMPUTED, True, "onDemand"),
        "most": (COMPUTED, 3.0, "onDemand"),
        "last": (COMPUTED, (3.0,), "onDemand"),
        "whom": (COMPUTED, "17", "onDemand"),
    }


def test_features_of_features_come_in_order_whatever_their_order_in_documents() -> None:
    """Across views too; a view's ``-`` is written ``_``."""
    found = views(("c", "DOUBLE", "bureau_two.b * 2.0"), ("a", "DOUBLE", "applicant.income + 1.0"))
    found["bureau-two"] = computed({"b": "DOUBLE"}, b="loan.a * 10.0")
    computations, _ = compile_views(found)
    assert [str(each) for each in computations.values()] == ["loan.a", "bureau-two.b", "loan.c"]
    assert computed_of(found, {"income": present(1.0)})["loan", "c"].value == 40.0
    assert [str(each) for each in closure([("bureau-two", "b")], computations)] == ["loan.a", "bureau-two.b"]
    assert closure([("applicant", "income")], computations) == ()


def test_circles_are_spelled_out() -> None:
    """Each step of one, across views; and a feature made of itself."""
    around = views(("a", "DOUBLE", "other.b + 1.0"), ("c", "DOUBLE", "loan.a"))
    around["other"] = computed({"b": "DOUBLE"}, b="loan.c * 2.0")
    assert told(around) == ["loan.onDemand.a: is made of itself: loan.a -> other.b -> loan.c -> loan.a"]
    assert told(views(("a", "DOUBLE", "loan.a"))) == ["loan.onDemand.a: is made of itself: loan.a -> loan.a"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("aplicant.income", "unknown name aplicant (known here: path, inputs, entities, metadata, applicant, loan)"),
        ("applicant.incme", "FeatureView applicant has no feature incme (there is: income, age, history, spent)"),
        ("applicant[inputs.name]", "applicant as a whole, or by a computed key"),
        ("size(inputs) + 1.0", "inputs as a whole"),
        ("double(metadata.headers.x)", "metadata.headers is not for features"),
        ("applicant.income +", "in: applicant.income +"),
        ("applicant.income + applicant.age", "in: applicant.income + applicant.age"),
        ("applicant.history", "gives str, and the feature is DOUBLE"),
        ("applicant.spent", "gives list, and the feature is DOUBLE"),
        ({"function": "f", "inputs": ("nobody.x",)}, "there is no FeatureView nobody"),
        ({"function": "f", "inputs": ("applicant.x",)}, "FeatureView applicant has no feature x"),
    ],
)
def test_what_cannot_be_computed_is_refused(how: object, said: str) -> None:
    """Unknown names, values that are not named, and types that declared ones prove wrong."""
    (fault,) = told(views(("x", "DOUBLE", how)))
    assert fault.startswith("loan.onDemand.x: ")
    assert said in fault


def test_a_view_computes_just_what_it_declares() -> None:
    """One expression a feature, one feature an expression."""
    made = computed({"a": "DOUBLE", "b": "DOUBLE"}, a="1.0", c="1.0")
    assert told({"loan": made}) == [
        "loan.onDemand.c: is not among the view's features: declare it there, with its type",
        "loan.features[b]: has nothing under onDemand that computes it",
    ]


@pytest.mark.parametrize(
    ("known", "status", "reason"),
    [
        ({}, MISSING, "its ingredient applicant.income is missing"),
        ({"income": Fetched(NULL, None, 5)}, MISSING, "its ingredient applicant.income is null"),
        ({"income": Fetched(ERROR, None, 5, "damaged")}, ERROR, "its ingredient applicant.income is ERROR: damaged"),
        ({"income": Fetched(STALE, 1.0, 5)}, ERROR, "its ingredient applicant.income is STALE"),
        ({"income": Fetched(ERROR, reason=UNAVAILABLE)}, ERROR, UNAVAILABLE),
        ({"income": present(0.0)}, ERROR, "inf"),
    ],
)
def test_nothing_is_guessed(known: dict[str, Fetched], status: FeatureStatus, reason: str) -> None:
    """What is made of a value that is not there is not there, and says which; a store that is away stays told apart."""
    found = computed_of(views(("x", "DOUBLE", "1.0 / applicant.income")), known)["loan", "x"]
    assert (found.status, found.value) == (status, None)
    assert found.reason is not None
    assert reason in found.reason


def test_has_makes_an_ingredient_optional() -> None:
    """An expression that asks whether a value is there says what to do without it: of features and of the request."""
    found = views(
        ("x", "INT64", "has(applicant.age) ? applicant.age : -1"),
        ("y", "INT64", 'has(inputs.y) ? inputs.y : ("z" in inputs ? 0 : -2)'),
    )
    assert computed_of(found, {})["loan", "x"].value == -1
    assert computed_of(found, {"age": Fetched(NULL)})["loan", "x"].value == -1
    assert computed_of(found, {"age": present(3)})["loan", "x"].value == 3
    assert [
        computed_of(found, {}, inputs=given_)["loan", "y"].value for given_ in ({"y": None}, {"z": 1}, {"y": 7})
    ] == [
        -2,
        0,
        7,
    ]
    assert computed_of(found, {"age": Fetched(ERROR, reason="?")})["loan", "x"].status is ERROR


def test_what_is_computed_is_as_old_as_its_oldest_ingredient() -> None:
    """So a maxAge holds against it; a time too far ahead is not hidden by an older one."""
    found = views(("x", "DOUBLE", "applicant.income + double(applicant.age) + double(inputs.amount)"))

    def aged(income_ms: int | None, age_ms: int | None) -> int | None:
        known = {"income": present(1.0, income_ms), "age": present(1, age_ms)}
        return computed_of(found, known, inputs={"amount": 1})["loan", "x"].event_time_ms

    ahead_ms = NOW_MS + EVENT_TIME_AHEAD_MS_MAX + 1
    assert aged(NOW_MS - 5, NOW_MS - 7) == NOW_MS - 7
    assert aged(NOW_MS - 5, None) == NOW_MS - 5
    assert aged(None, None) is None
    assert aged(NOW_MS - 5, ahead_ms) == ahead_ms


def test_the_age_of_what_is_made_of_an_undated_value_is_not_known() -> None:
    """Through all that is computed of it, whatever times the others have; what a request brings is of now."""
    made = views(
        ("sum", "DOUBLE", "applicant.income + double(applicant.age)"),
        ("again", "DOUBLE", "loan.sum * 2.0"),
        ("asked", "DOUBLE", "double(inputs.amount)"),
    )

    def ages(income_ms: int | None, age_ms: int | None) -> dict[str, tuple[FeatureStatus, str | None]]:
        known = {"income": present(1.0, income_ms), "age": present(1, age_ms)}
        found = computed_of(made, known, inputs={"amount": 1})
        contracts = [
            FeatureContract.model_validate({"ref": f"loan.{name}", "maxAge": "1h", "required": True})
            for name in ("sum", "again", "asked")
        ]
        resolved = resolve(contracts, made, request(), found, NOW_MS)
        return {feature.ref.partition(".")[2]: (feature.status, feature.reason) for feature in resolved.features}

    sound = dict.fromkeys(("sum", "again", "asked"), (COMPUTED, None))
    assert ages(NOW_MS, NOW_MS) == sound
    for found in (ages(NOW_MS, None), ages(None, None)):
        assert found["asked"] == (COMPUTED, None)
        for status, reason in (found["sum"], found["again"]):
            assert status is STALE
            assert reason is not None
            assert "its age is not known" in reason


def test_null_and_times_are_values_too() -> None:
    """An expression may say null; one that says a time is epoch seconds, whole ones."""
    found = computed_of(
        views(
            ("n", "DOUBLE", "null"),
            ("t", "UNIX_TIMESTAMP", 'timestamp("2024-01-01T00:00:00Z")'),
            ("cut", "UNIX_TIMESTAMP", 'timestamp("2024-01-01T00:00:00.5Z")'),
        ),
        {},
    )
    assert found["loan", "n"].status is NULL
    assert found["loan", "t"].value == 1_704_067_200
    assert (found["loan", "cut"].status, found["loan", "cut"].value) == (ERROR, None)


def test_text_of_a_request_stands_for_bytes_here_too() -> None:
    """What an expression hands on of the request is base64, as where a contract takes it; a function's text is text."""
    made = views(
        ("b", "BYTES", "inputs.b"),
        ("each", "BYTES_LIST", "[inputs.b, b'x']"),
        ("bad", "BYTES", "inputs.bad"),
        ("f", "BYTES", {"function": "echo", "inputs": ("inputs.b",)}),
    )
    found = computed_of(made, {}, {"echo": lambda given: given["inputs.b"]}, inputs={"b": "YWI=", "bad": "YWI"})
    assert (found["loan", "b"].value, found["loan", "each"].value) == (b"ab", (b"ab", b"x"))
    assert (found["loan", "bad"].status, found["loan", "f"].status) == (ERROR, ERROR)
    assert "not base64" in str(found["loan", "bad"].reason)


# --- functions --------------------------------------------------------------------------------------------------------

BY_FUNCTION = views(("x", "INT64", {"function": "pick", "inputs": ("applicant.age", "inputs.n", "applicant.spent")}))
KNOWN = {"age": present(30), "spent": present((1.0,))}


def test_functions_get_what_they_declare() -> None:
    """By ref, lists as tuples, and their value is coerced."""
    seen: list[Any] = []

    def pick(features: Any) -> Any:
        seen.append(dict(features))
        return 4.0

    found = computed_of(BY_FUNCTION, KNOWN, {"pick": pick}, inputs={"n": [1]})["loan", "x"]
    assert (found.status, found.value, type(found.value)) == (COMPUTED, 4, int)
    assert seen == [{"applicant.age": 30, "inputs.n": (1,), "applicant.spent": (1.0,)}]
    assert computed_of(BY_FUNCTION, KNOWN, {"pick": pick})["loan", "x"].status is MISSING
    assert len(seen) == 1
    assert functions_of(compile_views(BY_FUNCTION)[0].values()) == {"pick"}


def test_a_function_that_fails_is_an_error_of_its_feature() -> None:
    """Whatever it raises; and so is one that is not registered, or that gives what its feature is not."""

    def broken(_: Any) -> Any:
        raise ZeroDivisionError("by nothing")

    functions: list[tuple[dict[str, FeatureFunction], str]] = [
        ({"pick": broken}, "function pick raised ZeroDivisionError: by nothing"),
        ({}, "function pick is not registered in this worker"),
        ({"pick": lambda _: "text"}, "is not INT64"),
        ({"pick": lambda _: {}}, "is not INT64"),  # type: ignore[return-value, dict-item]
    ]
    for registered, said in functions:
        found = computed_of(BY_FUNCTION, KNOWN, registered, inputs={"n": 1})["loan", "x"]
        assert found.status is ERROR
        assert found.reason is not None
        assert said in found.reason


class Panic(BaseException):
    """As Rust's panics come to Python: no Exception."""


class Mute(Exception):
    """What cannot say what it is."""

    def __str__(self) -> str:
        raise Panic


class Odd:
    """A value that cannot say what it is."""

    def __str__(self) -> str:
        raise Panic("odd")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (asyncio.CancelledError(), "function pick raised CancelledError"),
        (SystemExit(3), "function pick raised SystemExit: 3"),
        (GeneratorExit(), "function pick raised GeneratorExit"),
        (Panic("called `Option::unwrap()`\n on a `None` value"), "raised Panic: called `Option::unwrap()` on a `None`"),
        (Mute(), "function pick raised Mute"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_function_raises_ends_nothing_else(error: BaseException, said: str) -> None:
    """What would end a worker, from code that the worker only calls, is an ERROR of the one feature."""

    def broken(_: Any) -> Any:
        raise error

    found = computed_of(BY_FUNCTION, KNOWN, {"pick": broken}, inputs={"n": 1})["loan", "x"]
    assert (found.status, found.value) == (ERROR, None)
    assert said in str(found.reason)


def test_a_value_that_cannot_be_told_is_an_error_of_its_feature() -> None:
    """Foreign code runs also where what a function gave is looked at."""
    found = computed_of(BY_FUNCTION, KNOWN, {"pick": lambda _: Odd()}, inputs={"n": 1})["loan", "x"]  # type: ignore[dict-item, return-value]
    assert (found.status, found.reason) == (ERROR, "cannot be computed: its value raised Panic: odd")


def test_an_engine_that_panics_is_an_error_of_its_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expression's failure of whatever kind says which expression it was."""

    def panics(*_: object) -> object:
        raise Panic("index out of bounds")

    monkeypatch.setattr(Activation, "run", panics)
    known = {"income": present(1.0)}
    computations, faults = compile_views(views(("x", "DOUBLE", "double(inputs.n) + applicant.income")))
    assert not faults
    stored_income: dict[FeatureRef, Fetched] = {("applicant", "income"): known["income"]}
    made = tuple(computations.values())
    found = compute(made, request(inputs={"n": 1}), stored_income, {}, BY_FUNCTION, NOW_MS)["loan", "x"]
    assert found.status is ERROR
    assert found.reason == ("cannot be computed: Panic: index out of bounds in: double(inputs.n) + applicant.income")


@pytest.mark.parametrize("raiser", ["function", "value", "words"])
def test_an_interrupt_passes(raiser: str) -> None:
    """Who stops the worker by the keyboard stops it, whatever runs at the moment."""

    class Interrupts(Exception):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    def function(_: Any) -> Any:
        if raiser == "function":
            raise KeyboardInterrupt
        if raiser == "words":
            raise Interrupts
        return Interrupts()

    with pytest.raises(KeyboardInterrupt):
        computed_of(BY_FUNCTION, KNOWN, {"pick": function}, inputs={"n": 1})


async def test_a_task_that_is_cancelled_ends_whatever_its_function_raises() -> None:
    """A cancellation of the worker's own comes where the task waits next, not where the function runs."""
    begun, reached = asyncio.Event(), list[str]()

    async def work() -> None:
        def function(_: Any) -> Any:
            begun.set()
            raise asyncio.CancelledError

        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        found = computed_of(BY_FUNCTION, KNOWN, {"pick": function}, inputs={"n": 1})["loan", "x"]
        reached.append(str(found.status))
        await asyncio.sleep(0)
        reached.append("on")

    working = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError):
        await working
    assert begun.is_set()
    assert reached == ["ERROR"]


# --- bounds -----------------------------------------------------------------------------------------------------------

LONG = 40_000
TOO_LONG = f"has {LONG} elements; an expression sees at most 500 in: "


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("size(inputs.l.map(i, i + 1))", "inputs.l"),
        ("size(inputs.l)", "inputs.l"),
        ("size(metadata.l.filter(i, i > 1))", "metadata.l"),
        ("size(entities.l)", "entities.l"),
        ("size(applicant.spent.map(i, i + 1.0))", "applicant.spent"),
        ("has(applicant.spent) ? size(applicant.spent) : 0", "applicant.spent"),
    ],
)
def test_a_list_that_is_too_long_is_an_error_at_once(how: str, where: str) -> None:
    """Of the request or of the store: the feature says which list it was, and the worker is not held up."""
    numbers = list(range(LONG))
    sections: dict[str, Any] = {"inputs": {"l": numbers}, "metadata": {"l": numbers}, "entities": {"l": numbers}}
    found = views(("x", "INT64", how))
    began = time.process_time()
    one = computed_of(found, {"spent": present(tuple(map(float, numbers)))}, **sections)["loan", "x"]
    assert time.process_time() - began < 0.5
    assert (one.status, one.reason) == (ERROR, f"cannot be computed: {where} {TOO_LONG}{how}")


def test_what_is_computed_is_bounded_as_what_is_stored() -> None:
    """A long list that a function gives is too long for the expression that is made of it."""
    found = views(
        ("long", "INT64_LIST", {"function": "pick", "inputs": ("applicant.age",)}), ("x", "INT64", "size(loan.long)")
    )
    made = computed_of(found, {"age": present(3)}, {"pick": lambda _: (1,) * 501})
    assert made["loan", "long"].status is COMPUTED
    assert made["loan", "x"].reason == (
        "cannot be computed: loan.long has 501 elements; an expression sees at most 500 in: size(loan.long)"
    )


# --- in a revision ----------------------------------------------------------------------------------------------------


def registry(**contract: Any) -> list[dict[str, Any]]:
    """A version whose input is computed of a stored feature and of the request."""
    of_view = [{"name": "age", "type": "INT64"}, {"name": "income", "type": "DOUBLE"}]
    pinned = task(select={"version": "1"})
    return [
        document("Model", "credit-pd", {"owner": "risk"}),
        model_version("1", features=[{"ref": "loan.share", **contract}]),
        document(
            "FeatureView",
            "applicant",
            {
                "entities": [{"name": "applicant_id", "type": "INT64"}],
                "features": of_view,
                "source": {"type": "redis", "project": "credit"},
            },
        ),
        document(
            "FeatureView",
            "loan",
            {
                "features": [{"name": "share", "type": "DOUBLE"}, {"name": "other", "type": "INT64"}],
                "onDemand": {"share": "double(inputs.amount) / applicant.income", "other": "applicant.age"},
            },
        ),
        route(rules=[{"name": "default", "tasks": [pinned], "result": {}}]),
    ]


def test_ingredients_are_part_of_what_is_fetched() -> None:
    """Only those that some version needs, with the age that is asked of what is made of them."""
    known = revision(registry(maxAge="1h"))
    versions = tuple(known.versions.values())
    assert known.wants(versions) == (ViewWant("applicant", ("income",), ("DOUBLE",), 3_600_000),)
    assert [str(each) for each in known.computed(versions)] == ["loan.share"]
    assert known.computed(()) == ()


def test_a_computed_value_keeps_the_contract_and_its_age() -> None:
    """COMPUTED within maxAge, STALE beyond it, and refused where required and not there."""
    known = revision(registry(maxAge="1h", required=True))
    (version,) = known.versions.values()
    asked = request(inputs={"amount": 1}, entities={"applicant_id": 1})

    def given_income(income: Fetched | None) -> tuple[FeatureStatus, list[Code]]:
        fetched = {} if income is None else {("applicant", "income"): income}
        found = compute(known.computed([version]), asked, fetched, {}, known.views, NOW_MS)
        inputs = resolve(version.features, known.views, asked, found, NOW_MS)
        assert inputs.features[0].source == "onDemand"
        return inputs.features[0].status, [problem.code for problem in inputs.problems]

    assert given_income(present(2.0)) == (COMPUTED, [])
    assert given_income(present(2.0, NOW_MS - 3_600_001)) == (STALE, [Code.FEATURE_STALE])
    assert given_income(present(2.0, None)) == (STALE, [Code.FEATURE_STALE])
    assert given_income(None) == (MISSING, [Code.FEATURE_MISSING])
    assert given_income(Fetched(ERROR, reason=UNAVAILABLE)) == (ERROR, [Code.FEATURES_UNAVAILABLE])


def test_nothing_is_computed_of_what_a_cache_kept_too_long() -> None:
    """An ingredient that only a maxAge of its own could allow is unavailable, and so is what is computed of it."""
    found = views(("share", "DOUBLE", "applicant.income"))
    for overdue, status in ((False, COMPUTED), (True, ERROR)):
        made = computed_of(found, {"income": present(2.0)._replace(source="cache", overdue=overdue)})["loan", "share"]
        assert made.status is status
    assert made.reason == UNAVAILABLE


def test_explain_tells_how_a_feature_is_computed_and_of_what() -> None:
    """With the views that are fetched for it, though no contract names them."""
    known = revision(registry(maxAge="1h"))
    explained = explain(known, request("/credit/card", inputs={"amount": 1}, entities={"applicant_id": 17}), NOW_MS)
    (feature,) = explained.tasks[0].versions[0].features
    assert (feature.ref, feature.type, feature.source) == ("loan.share", "DOUBLE", "onDemand")
    assert feature.computed == "double(inputs.amount) / applicant.income"
    assert feature.ingredients == ("inputs.amount", "applicant.income")
    assert [(need.view, need.features) for need in explained.needs] == [("applicant", ("income",))]
    assert [problem.code for problem in explain(known, request("/credit/card"), NOW_MS).problems] == [
        Code.ENTITY_MISSING
    ]


@given(
    st.dictionaries(
        st.sampled_from(["income", "age", "history"]),
        st.builds(
            Fetched,
            st.sampled_from(FeatureStatus),
            st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.just((1, None)),
            st.none() | st.integers(-1, 2**62),
            st.none() | st.text(max_size=3),
        ),
    ),
    st.dictionaries(st.sampled_from(["amount", "x"]), st.none() | st.integers() | st.floats() | st.text(max_size=3)),
)
def test_whatever_the_ingredients_are_there_is_a_status(known: dict[str, Fetched], inputs: dict[str, Any]) -> None:
    """No value, of any type, crashes a computation; a value is there only where it was computed."""
    found = computed_of(
        views(
            ("a", "DOUBLE", "double(inputs.amount) / applicant.income"),
            ("b", "INT64", "has(applicant.age) ? applicant.age : size(applicant.history)"),
            ("c", "STRING", 'loan.b > 3 ? applicant.history : "none"'),
        ),
        known,
        inputs=inputs,
    )
    for (view, _), one in found.items():
        if view == "loan":
            assert one.status in (COMPUTED, NULL, MISSING, ERROR)
            assert (one.value is not None) == (one.status is COMPUTED)
            assert (one.reason is None) == (one.status in (COMPUTED, NULL))
