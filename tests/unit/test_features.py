"""Features: declared types, contracts and what is made of values that are missing, null, old or unusable."""

from typing import Any

import pytest

from app.domain.errors import Code, Problem
from app.domain.features import (
    UNAVAILABLE,
    EntityKey,
    FeatureStatus,
    FeatureValue,
    Fetched,
    ViewNeed,
    coerce,
    inferred_type,
    needs_of,
    recorded,
    resolve,
    unavailable,
    wants_of,
)
from app.domain.requests import Request
from app.domain.version_documents import FeatureContract
from app.domain.view_documents import FeatureViewSpec
from tests.support.registry_documents import request

NOW_MS = 1_750_000_000_000
DAY_MS = 86_400_000


def view(**changes: Any) -> FeatureViewSpec:
    """A view of one entity with an age, a history and a time."""
    whole: dict[str, Any] = {
        "entities": ({"name": "applicant_id", "type": "INT64"},),
        "features": (
            {"name": "age", "type": "INT64"},
            {"name": "history", "type": "STRING"},
            {"name": "since", "type": "UNIX_TIMESTAMP"},
        ),
        "source": {"type": "redis", "project": "credit"},
    }
    return FeatureViewSpec.model_validate(whole | changes)


def needs(
    contracts: list[FeatureContract], views: dict[str, FeatureViewSpec], asked: Request
) -> tuple[tuple[ViewNeed, ...], tuple[Problem, ...]]:
    """What contracts need of views for one request."""
    return needs_of(wants_of(contracts, views), views, asked)


def contract(ref: str, **changes: Any) -> FeatureContract:
    """A contract about ``ref``."""
    return FeatureContract.model_validate({"ref": ref, **changes})


VIEWS = {"applicant": view()}


@pytest.mark.parametrize(
    ("value", "type_", "expected"),
    [
        (None, "INT64", None),
        (True, "BOOL", True),
        ("x", "STRING", "x"),
        (b"x", "BYTES", b"x"),
        (5, "DOUBLE", 5.0),
        (5.5, "FLOAT", 5.5),
        (0.1, "FLOAT", 0.10000000149011612),
        ([1e-60, None], "FLOAT_LIST", (0.0, None)),
        (1e300, "DOUBLE", 1e300),
        (5.0, "INT64", 5),
        (9007199254740991.0, "INT64", 2**53 - 1),
        (2**53 + 1, "INT64", 2**53 + 1),
        (2**31 - 1, "INT32", 2**31 - 1),
        (-(2**63), "INT64", -(2**63)),
        (1_700_000_000, "UNIX_TIMESTAMP", 1_700_000_000),
        ("2024-01-01", "UNIX_TIMESTAMP", 1_704_067_200),
        ("2024-01-01T01:00:00+01:00", "UNIX_TIMESTAMP", 1_704_067_200),
        (-62_135_596_800, "UNIX_TIMESTAMP", -62_135_596_800),
        (253_402_300_799, "UNIX_TIMESTAMP", 253_402_300_799),
        ("9999-12-31T23:59:59Z", "UNIX_TIMESTAMP", 253_402_300_799),
        ([1, 2.0], "INT64_LIST", (1, 2)),
        ((1, None), "DOUBLE_LIST", (1.0, None)),
        ([], "STRING_LIST", ()),
        (None, "STRING_LIST", None),
        (["2024-01-01", 5], "UNIX_TIMESTAMP_LIST", (1_704_067_200, 5)),
    ],
)
def test_values_become_their_declared_type(value: object, type_: str, expected: object) -> None:
    """Where nothing is lost and nothing is guessed."""
    found = coerce(value, type_)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        (1, "BOOL"),
        ("true", "BOOL"),
        (1, "STRING"),
        ("x", "BYTES"),
        (True, "DOUBLE"),
        ("5", "DOUBLE"),
        (float("nan"), "DOUBLE"),
        (float("inf"), "FLOAT"),
        (True, "INT64"),
        (5.5, "INT64"),
        (2**31, "INT32"),
        (2**63, "INT64"),
        (float("inf"), "INT64"),
        ("yesterday", "UNIX_TIMESTAMP"),
        ([1], "INT64"),
        (1, "INT64_LIST"),
        ("ab", "STRING_LIST"),
        ([1, "a"], "INT64_LIST"),
        ([[1]], "INT64_LIST"),
        ([[1]], "INT64_LIST_LIST"),
        ({}, "STRING"),
        ("x", "NO_SUCH_TYPE"),
    ],
)
def test_what_would_be_a_guess_is_an_error(value: object, type_: str) -> None:
    """The message names the value and the type."""
    with pytest.raises(ValueError, match=r"is not|Invalid isoformat"):
        coerce(value, type_)


@pytest.mark.parametrize(
    ("value", "type_", "said"),
    [
        (1e300, "FLOAT", r"1e\+300 is beyond the range of FLOAT"),
        (-(2**128), "FLOAT", "beyond the range of FLOAT"),
        ([0.5, 3.5e38], "FLOAT_LIST", "beyond the range of FLOAT"),
        (10**400, "DOUBLE", "beyond the range of DOUBLE"),
        (9007199254740993.0, "INT64", "may be a rounded number: send it as a whole one"),
        (-9007199254740992.0, "INT64_LIST", "is not INT64_LIST"),
        ([-9007199254740992.0], "INT64_LIST", "may be a rounded number"),
        (1_700_000_000.5, "UNIX_TIMESTAMP", "is not UNIX_TIMESTAMP"),
        ("2024-01-01T00:00:00.25Z", "UNIX_TIMESTAMP", "has a fraction of a second"),
        (1_767_225_600_000, "UNIX_TIMESTAMP", r"outside the years 1 to 9999: .* epoch seconds \(milliseconds\?\)"),
        ([5, 1_767_225_600_000], "UNIX_TIMESTAMP_LIST", r"epoch seconds \(milliseconds\?\)"),
        (253_402_300_800, "UNIX_TIMESTAMP", "outside the years 1 to 9999"),
        (-62_135_596_801, "UNIX_TIMESTAMP", "outside the years 1 to 9999: UNIX_TIMESTAMP is in epoch seconds$"),
        ("0001-01-01T00:00:00+14:00", "UNIX_TIMESTAMP", "outside the years 1 to 9999"),
        ("20260131", "UNIX_TIMESTAMP", "send 2026-01-31, or a number of epoch seconds"),
        (" 1767225600", "UNIX_TIMESTAMP", "send a date as 2026-01-31, or a number of epoch seconds"),
        (["20260131"], "UNIX_TIMESTAMP_LIST", "send 2026-01-31"),
    ],
)
def test_what_a_type_cannot_hold_is_neither_cut_nor_rounded_away(value: object, type_: str, said: str) -> None:
    """Beyond a type's range, of whole numbers that a float cannot tell apart, and of parts of seconds."""
    with pytest.raises(ValueError, match=said):
        coerce(value, type_)


@pytest.mark.parametrize(("value", "said"), [([None], "null within a list"), ([1] * 10_001, "10000 are allowed")])
def test_lists_have_bounds(value: object, said: str) -> None:
    """A null that could not be told from a value, and a list without end, are refused."""
    with pytest.raises(ValueError, match=said):
        coerce(value, "INT64_LIST")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "BOOL"),
        (1, "INT64"),
        (1.5, "DOUBLE"),
        ("x", "STRING"),
        (b"x", "BYTES"),
        (None, "STRING"),
        ([1, None], "INT64_LIST"),
        ([1, 2.5], "DOUBLE_LIST"),
        (["a", 1], "STRING_LIST"),
        ([], "STRING_LIST"),
    ],
)
def test_undeclared_types_are_inferred(value: Any, expected: str) -> None:
    """By the value alone."""
    assert inferred_type(value) == expected


def test_each_view_is_fetched_once_for_all_tasks() -> None:
    """The union of the features that contracts name, with their types; the request's own values are not fetched."""
    contracts = [contract("applicant.age"), contract("inputs.amount"), contract("applicant.history")]
    asked = request(entities={"applicant_id": 17})
    (need,), problems = needs([*contracts, contract("applicant.age")], VIEWS, asked)
    assert not problems
    assert need.key == EntityKey("credit", ("applicant_id",), (17,), ("INT64",))
    assert (need.features, need.types) == (("age", "history"), ("INT64", "STRING"))


@pytest.mark.parametrize(
    ("entities", "code"),
    [
        ({}, Code.ENTITY_MISSING),
        ({"applicant_id": None}, Code.ENTITY_MISSING),
        ({"applicant_id": "17"}, Code.ENTITY_INVALID),
        ({"applicant_id": 17.0}, Code.ENTITY_INVALID),
        ({"applicant_id": True}, Code.ENTITY_INVALID),
        ({"applicant_id": 2**63}, Code.ENTITY_INVALID),
    ],
)
def test_entities_that_name_nobody(entities: dict[str, Any], code: Code) -> None:
    """Named once, however many views need it."""
    views = {"applicant": view(), "other": view()}
    found, problems = needs([contract("applicant.age"), contract("other.age")], views, request(entities=entities))
    assert not found
    assert [problem.code for problem in problems] == [code]
    assert "entities.applicant_id" in problems[0].message


def test_keys_of_several_entities_are_sorted_by_name() -> None:
    """As Feast sorts them; each that is missing is named."""
    entities = ({"name": "shop", "type": "STRING"}, {"name": "applicant_id", "type": "INT32"})
    views = {"applicant": view(entities=entities)}
    given = request(entities={"shop": "s", "applicant_id": 1})
    ((need,), _) = needs([contract("applicant.age")], views, given)
    assert need.key == EntityKey("credit", ("applicant_id", "shop"), (1, "s"), ("INT32", "STRING"))
    _, problems = needs([contract("applicant.age")], views, request())
    assert len(problems) == 2


def one(contract_: FeatureContract, fetched: Fetched | None = None, **sections: Any) -> tuple[FeatureValue, list[Code]]:
    """A contract's value and problems; ``fetched`` is what the store has of it."""
    found = {} if fetched is None else {(contract_.source, contract_.feature): fetched}
    inputs = resolve([contract_], VIEWS, request(**sections), found, NOW_MS)
    assert inputs.values == {contract_.column: inputs.features[0].value}
    return inputs.features[0], [problem.code for problem in inputs.problems]


@pytest.mark.parametrize(
    ("given", "type_", "value", "said"),
    [
        ("YWI=", "BYTES", b"ab", None),
        ("", "BYTES", b"", None),
        (["YWI=", ""], "BYTES_LIST", (b"ab", b""), None),
        (b"ab", "BYTES", b"ab", None),
        ("YWI", "BYTES", None, "not base64, the text form of BYTES"),
        ("YWI=\n", "BYTES", None, "not base64, the text form of BYTES"),
        ("ż", "BYTES", None, "not base64, the text form of BYTES"),
        (["YWI=", "?"], "BYTES_LIST", None, "not base64, the text form of BYTES"),
        (7, "BYTES", None, "is not BYTES"),
        ("YWI=", "BYTES_LIST", None, "is not BYTES_LIST"),
    ],
)
def test_text_of_a_request_stands_for_bytes(given: Any, type_: str, value: Any, said: str | None) -> None:
    """In base64, as in updates, where the contract declares bytes; a stored text is no bytes."""
    found, problems = one(contract("inputs.b", type=type_), inputs={"b": given})
    if said is None:
        assert (found.status, found.value, problems) == (FeatureStatus.PRESENT, value, [])
    else:
        assert found.status is FeatureStatus.DEFAULTED  # the contract's own null, for an ERROR
        assert said in (found.reason or "")
    with pytest.raises(ValueError, match="is not BYTES"):
        coerce("YWI=", "BYTES")


@pytest.mark.parametrize(
    ("default", "type_", "value"),
    [
        ("YWI=", "BYTES", b"ab"),
        (["YWI="], "BYTES_LIST", (b"ab",)),
        ("2024-01-01", "UNIX_TIMESTAMP", 1_704_067_200),
        (1, "DOUBLE", 1.0),
        (0.1, "FLOAT", 0.10000000149011612),
        ("YWI=", "STRING", "YWI="),
        ("YWI=", None, "YWI="),
    ],
)
def test_a_default_is_of_the_declared_type(default: Any, type_: str | None, value: Any) -> None:
    """As every other value that a model is given, however a document has to write it."""
    default = tuple(default) if isinstance(default, list) else default
    found, problems = one(contract("inputs.b", default=default, **({} if type_ is None else {"type": type_})))
    assert (found.status, found.value, problems) == (FeatureStatus.DEFAULTED, value, [])
    assert type(found.value) is type(value)


@pytest.mark.parametrize(
    ("changes", "fetched", "status", "reject", "refer"),
    [
        ({"onViolation": "reject"}, None, FeatureStatus.DEFAULTED, [], []),
        ({"onViolation": "reject"}, "error", FeatureStatus.ERROR, ["feature_invalid"], []),
        ({"onViolation": "reject", "default": 1}, "stale", FeatureStatus.STALE, ["feature_stale"], []),
        ({"onViolation": "default", "default": 1}, "stale", FeatureStatus.DEFAULTED, [], []),
        ({"onViolation": "refer", "default": 1}, None, FeatureStatus.DEFAULTED, [], []),
        ({"onViolation": "refer"}, "stale", FeatureStatus.STALE, [], ["feature_stale"]),
        ({"onViolation": "refer"}, "error", FeatureStatus.ERROR, [], ["feature_invalid"]),
        ({"onViolation": "refer", "required": True}, "null", FeatureStatus.NULL, [], ["feature_missing"]),
        ({"onViolation": "reject", "required": True}, None, FeatureStatus.MISSING, ["feature_missing"], []),
    ],
)
def test_what_a_violation_does(
    changes: dict[str, Any], fetched: str | None, status: FeatureStatus, reject: list[str], refer: list[str]
) -> None:
    """A required value that is not there, or any that is stale or an error, rejects, refers, or is defaulted."""
    stored = {
        "stale": Fetched(FeatureStatus.PRESENT, 30, NOW_MS - 2 * DAY_MS),
        "error": Fetched(FeatureStatus.ERROR, None, NOW_MS, "damaged"),
        "null": Fetched(FeatureStatus.NULL, None, NOW_MS),
    }
    found = {("applicant", "age"): stored[fetched]} if fetched else {}
    inputs = resolve([contract("applicant.age", maxAge="1d", **changes)], VIEWS, request(), found, NOW_MS)
    assert inputs.features[0].status is status
    assert [str(each.code) for each in inputs.problems] == reject
    assert [str(each.code) for each in inputs.referrals] == refer
    assert (inputs.obstacle is None) == (not reject and not refer)


@pytest.mark.parametrize("given", [{"a": 1}, [1, "a"], [1, None], 2**70])
def test_an_input_of_no_declared_type_can_be_violated_too(given: object) -> None:
    """What has no type at all is an ERROR, so that onViolation says something of it, required or not."""
    value, problems = one(contract("inputs.x", onViolation="reject"), inputs={"x": given})
    assert (value.status, problems) == (FeatureStatus.ERROR, ["feature_invalid"])


def test_what_is_asked_of_a_server_says_what_its_row_lacks_and_how_long_it_lasts() -> None:
    """So that what is written back of it expires by its view's ttl."""
    source = {"type": "http", "endpoints": ("http://server.example:1",)}
    (asked,), _ = needs(
        [contract("applicant.age", maxAge="1h")],
        {"applicant": view(source=source, ttl="1d")},
        request(entities={"applicant_id": 17}),
    )
    assert (asked.others, asked.max_age_ms, asked.ttl_ms) == (("history", "since"), 3_600_000, 86_400_000)


def test_a_source_that_calls_a_value_stale_is_believed() -> None:
    """Whatever the contract's maxAge."""
    found = Fetched(FeatureStatus.STALE, 30, NOW_MS, "is older than the feature server allows", "http")
    value, problems = one(contract("applicant.age", required=True), found)
    assert (value.status, value.source, problems) == (FeatureStatus.STALE, "http", ["feature_stale"])


def present(value: Any, age_ms: int = 0) -> Fetched:
    """A stored value of some age."""
    return Fetched(FeatureStatus.PRESENT, value, NOW_MS - age_ms)


@pytest.mark.parametrize(
    ("fetched", "changes", "status", "value", "codes"),
    [
        (present(41), {}, FeatureStatus.PRESENT, 41, []),
        (present(41, DAY_MS), {"maxAge": "1d"}, FeatureStatus.PRESENT, 41, []),
        (present(41, DAY_MS + 1), {"maxAge": "1d"}, FeatureStatus.DEFAULTED, None, []),
        (present(41, DAY_MS + 1), {"maxAge": "1d", "default": 35}, FeatureStatus.DEFAULTED, 35, []),
        (present(41, DAY_MS + 1), {"maxAge": "1d", "required": True}, FeatureStatus.STALE, 41, [Code.FEATURE_STALE]),
        # Clocks differ; what lies further ahead has no age.
        (present(41, -300_000), {"maxAge": "1d"}, FeatureStatus.PRESENT, 41, []),
        (present(41, -300_001), {"maxAge": "1d"}, FeatureStatus.DEFAULTED, None, []),
        (present(41, -300_001), {"maxAge": "1d", "required": True}, FeatureStatus.STALE, 41, [Code.FEATURE_STALE]),
        (present(41, -300_001), {}, FeatureStatus.PRESENT, 41, []),
        (None, {}, FeatureStatus.DEFAULTED, None, []),
        (None, {"default": 35}, FeatureStatus.DEFAULTED, 35, []),
        (None, {"required": True}, FeatureStatus.MISSING, None, [Code.FEATURE_MISSING]),
        (Fetched(FeatureStatus.NULL), {"default": 35}, FeatureStatus.DEFAULTED, 35, []),
        (Fetched(FeatureStatus.NULL), {"required": True}, FeatureStatus.NULL, None, [Code.FEATURE_MISSING]),
        (Fetched(FeatureStatus.ERROR, reason="no"), {"default": 35}, FeatureStatus.DEFAULTED, 35, []),
        (
            Fetched(FeatureStatus.ERROR, reason="no"),
            {"required": True},
            FeatureStatus.ERROR,
            None,
            [Code.FEATURE_INVALID],
        ),
        (Fetched(FeatureStatus.ERROR), {"required": True}, FeatureStatus.ERROR, None, [Code.FEATURE_INVALID]),
        (
            Fetched(FeatureStatus.ERROR, reason=UNAVAILABLE),
            {"required": True},
            FeatureStatus.ERROR,
            None,
            [Code.FEATURES_UNAVAILABLE],
        ),
        (Fetched(FeatureStatus.PRESENT, 41), {}, FeatureStatus.PRESENT, 41, []),
        (Fetched(FeatureStatus.PRESENT, 41), {"maxAge": "1d"}, FeatureStatus.DEFAULTED, None, []),
        (
            Fetched(FeatureStatus.PRESENT, 41, source="http"),
            {"maxAge": "1d", "required": True},
            FeatureStatus.STALE,
            41,
            [Code.FEATURE_STALE],
        ),
        # Computed of the request alone: of now.
        (Fetched(FeatureStatus.COMPUTED, 41, source="onDemand"), {"maxAge": "1d"}, FeatureStatus.COMPUTED, 41, []),
    ],
)
def test_a_views_value_under_its_contract(
    fetched: Fetched | None, changes: dict[str, Any], status: FeatureStatus, value: object, codes: list[Code]
) -> None:
    """Required: it must be there and young enough. Else: its default, and the record says why."""
    found, problems = one(contract("applicant.age", **changes), fetched)
    assert (found.status, found.value, problems) == (status, value, codes)
    assert found.source == (fetched.source if fetched else "redis")
    if status is FeatureStatus.DEFAULTED:
        assert found.reason


@pytest.mark.parametrize(
    ("sections", "changes", "status", "value", "codes"),
    [
        ({"inputs": {"amount": 5}}, {"type": "DOUBLE"}, FeatureStatus.PRESENT, 5.0, []),
        ({"inputs": {"amount": 5}}, {}, FeatureStatus.PRESENT, 5, []),
        ({"inputs": {"amount": "x"}}, {"type": "DOUBLE", "required": True}, FeatureStatus.ERROR, None, ["invalid"]),
        ({"inputs": {"amount": [1]}}, {"required": True}, FeatureStatus.PRESENT, (1,), []),
        ({"inputs": {"amount": {}}}, {"required": True}, FeatureStatus.ERROR, None, ["invalid"]),
        ({"inputs": {"amount": None}}, {"required": True}, FeatureStatus.NULL, None, ["missing"]),
        ({}, {"required": True}, FeatureStatus.MISSING, None, ["missing"]),
        ({}, {"default": 1.5}, FeatureStatus.DEFAULTED, 1.5, []),
    ],
)
def test_the_requests_own_values(
    sections: dict[str, Any], changes: dict[str, Any], status: FeatureStatus, value: object, codes: list[str]
) -> None:
    """The same rules, without a store."""
    found, problems = one(contract("inputs.amount", **changes), **sections)
    assert (found.status, found.value, found.source) == (status, value, "request")
    assert problems == [Code(f"feature_{code}") for code in codes]


def test_problems_name_their_feature() -> None:
    """A program finds it in ``feature``, a person in the message."""
    inputs = resolve([contract("applicant.age", required=True)], VIEWS, request(), {}, NOW_MS)
    said = "required feature applicant.age is missing"
    assert inputs.problems == (Problem(Code.FEATURE_MISSING, said, feature="applicant.age"),)


@pytest.mark.parametrize(
    ("age_ms", "said"), [(DAY_MS + 1, "is older than its maxAge"), (-DAY_MS, "has an event time in the future")]
)
def test_a_stale_feature_says_why(age_ms: int, said: str) -> None:
    """A value that is too old is told from one whose time cannot be right; a default's record says it too."""
    stored = {("applicant", "age"): present(41, age_ms)}
    for required in (True, False):
        inputs = resolve([contract("applicant.age", maxAge="1d", required=required)], VIEWS, request(), stored, NOW_MS)
        assert said in str(inputs.features[0].reason)
        assert [said in problem.message for problem in inputs.problems] == [True] * required


def test_columns_and_types_are_the_models() -> None:
    """A contract may rename; declared types win over what the value looks like."""
    contracts = [contract("applicant.age", name="years"), contract("inputs.amount", type="DOUBLE", default=1)]
    inputs = resolve(contracts, VIEWS, request(inputs={"amount": 2}), {("applicant", "age"): present(41)}, NOW_MS)
    assert inputs.values == {"years": 41, "amount": 2.0}
    assert inputs.types == {"years": "INT64", "amount": "DOUBLE"}


def test_recorded_inputs_are_what_was_found_before() -> None:
    """Another worker sends the same row, whatever the store holds by now."""
    contracts = [contract("applicant.age", name="years"), contract("inputs.amount")]
    first = resolve(contracts, VIEWS, request(inputs={"amount": 2}), {("applicant", "age"): present(41)}, NOW_MS)
    again = recorded(contracts, VIEWS, first.features)
    assert (again.values, again.types, again.features) == (first.values, first.types, first.features)


def test_what_is_known_while_the_store_is_away() -> None:
    """Nothing of any value, and that is not the same as missing."""
    given = request(entities={"applicant_id": 1})
    wanted, _ = needs([contract("applicant.age"), contract("applicant.since")], VIEWS, given)
    known = unavailable(wanted)
    assert set(known) == {("applicant", "age"), ("applicant", "since")}
    assert {fetched.status for fetched in known.values()} == {FeatureStatus.ERROR}


def found(**changes: Any) -> dict[tuple[str, str], Fetched]:
    """The applicant's age as a cache gives it, fetched a minute ago."""
    value = Fetched(FeatureStatus.PRESENT, 35, NOW_MS - DAY_MS, source="cache", fetched_ms=NOW_MS - 60_000)
    return {("applicant", "age"): value._replace(**changes)}


def test_a_cached_value_says_so_and_its_age_counts() -> None:
    """By its event time; without one its age is not known, whenever it was fetched."""
    asked = [contract("applicant.age", maxAge="2d"), contract("applicant.age", maxAge="1h")]
    first, second = resolve(asked, VIEWS, request(), found(), NOW_MS).features
    assert (first.status, first.source, second.status, second.source) == (
        FeatureStatus.PRESENT, "cache", FeatureStatus.DEFAULTED, "cache",
    )  # fmt: skip
    [unknown] = resolve(asked[:1], VIEWS, request(), found(event_time_ms=None), NOW_MS).features
    assert unknown.status is FeatureStatus.DEFAULTED
    assert unknown.reason is not None
    assert "age is not known" in unknown.reason


def test_a_need_says_the_strictest_age_that_is_allowed() -> None:
    """Of Redis's views too, so that a cached row which is too old for a contract is read again."""
    given = request(entities={"applicant_id": 1})
    ages = [contract("applicant.age", maxAge="20s"), contract("applicant.since", maxAge="1h")]
    [need], _ = needs(ages, VIEWS, given)
    assert need.max_age_ms == 20_000
    [unbounded], _ = needs([contract("applicant.age")], VIEWS, given)
    assert unbounded.max_age_ms is None


def test_an_overdue_value_needs_a_max_age() -> None:
    """Inside it, it is used; where none bounds its age, it is unavailable, and a default or a failure follows."""
    overdue = found(overdue=True)
    asked = [contract("applicant.age", maxAge="2d", required=True), contract("applicant.age", default=40)]
    bounded, unbounded = resolve(asked, VIEWS, request(), overdue, NOW_MS).features
    assert (bounded.status, bounded.value) == (FeatureStatus.PRESENT, 35)
    assert (unbounded.status, unbounded.value) == (FeatureStatus.DEFAULTED, 40)
    assert UNAVAILABLE in str(unbounded.reason)
    required = resolve([contract("applicant.age", required=True)], VIEWS, request(), overdue, NOW_MS)
    assert [problem.code for problem in required.problems] == [Code.FEATURES_UNAVAILABLE]


@pytest.mark.parametrize(
    ("stored", "required", "status", "codes"),
    [
        (present(41, DAY_MS), True, FeatureStatus.PRESENT, []),
        (present(41, DAY_MS + 1), True, FeatureStatus.STALE, [Code.FEATURE_STALE]),
        (present(41, DAY_MS + 1), False, FeatureStatus.DEFAULTED, []),
        (Fetched(FeatureStatus.NULL, None, NOW_MS - DAY_MS - 1), True, FeatureStatus.STALE, [Code.FEATURE_STALE]),
        (Fetched(FeatureStatus.PRESENT, 41), True, FeatureStatus.PRESENT, []),
        (Fetched(FeatureStatus.ERROR, None, 0, "damaged"), True, FeatureStatus.ERROR, [Code.FEATURE_INVALID]),
    ],
)
def test_a_value_past_its_views_ttl_is_stale(
    stored: Fetched, required: bool, status: FeatureStatus, codes: list[Code]
) -> None:
    """No contract takes it for a value, with or without a maxAge of its own; the reason says so."""
    views = {"applicant": VIEWS["applicant"].model_copy(update={"ttl": DAY_MS})}
    contracts = [contract("applicant.age", required=required)]
    inputs = resolve(contracts, views, request(), {("applicant", "age"): stored}, NOW_MS)
    assert (inputs.features[0].status, [problem.code for problem in inputs.problems]) == (status, codes)
    if stored.event_time_ms == NOW_MS - DAY_MS - 1:
        assert "is past its view's ttl" in (inputs.features[0].reason or "")


def test_what_another_worker_found_is_as_broken_as_it_was() -> None:
    """Contracts hold against recorded values too: a worker that takes over runs nothing that the first would not."""
    contracts = [
        contract("applicant.age", required=True, maxAge="1d"),
        contract("applicant.history", onViolation="refer", required=True),
        contract("applicant.since", default=5),
    ]
    old = {("applicant", "age"): Fetched(FeatureStatus.PRESENT, 30, NOW_MS - 2 * DAY_MS)}
    inputs = resolve(contracts, VIEWS, request(), old, NOW_MS)
    assert [len(inputs.problems), len(inputs.referrals)] == [1, 1]
    assert recorded(contracts, VIEWS, inputs.features) == inputs
