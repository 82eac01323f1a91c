"""docs/routing.md: each strategy, asked what the page asks, does in the decide engine what the page says."""

import re
from typing import Any

import orjson
import pytest

from app.domain.explanation import explain
from app.domain.requests import Envelope, InboundRecord, RequestId, read_request
from app.domain.route_documents import TaskSpec
from tests.support.markdown import ROOT
from tests.support.routing_examples import (
    MODELS,
    PAGE,
    Asking,
    Example,
    answer,
    is_part,
    read_page,
    revision_of,
)
from tests.support.virtual_time import in_virtual_time

EXAMPLES = {example.heading: example for example in read_page(PAGE.read_text())}
STRATEGIES = [example for example in EXAMPLES.values() if example.heading != MODELS]
PUBLISHED = orjson.loads((ROOT / "tests" / "data" / "assignment.json").read_bytes())
VECTORS = PUBLISHED["vectors"]

each_strategy = pytest.mark.parametrize("example", STRATEGIES, ids=lambda example: example.heading)
each_asking = pytest.mark.parametrize(
    ("example", "asking"),
    [pytest.param(example, asking, id=example.heading) for example in STRATEGIES for asking in example.askings],
)


@each_strategy
def test_a_strategy_is_whole(example: Example) -> None:
    """Its document makes a revision with the page's models, its path is its own, and something is asked of it."""
    revision = revision_of(EXAMPLES[MODELS], example)
    assert [route.name for route in revision.routes] == [each["metadata"]["name"] for each in example.documents]
    assert example.askings
    assert all(asking.reply for asking in example.askings)
    assert example.heading == "Reasons" or any(asking.record for asking in example.askings)


def test_all_strategies_live_in_one_registry() -> None:
    """The page's documents can be applied together, and then too the prefix leaves the other routes theirs."""
    revision = revision_of(*EXAMPLES.values())
    assert len(revision.routes) == len(STRATEGIES)
    for example in STRATEGIES:
        for asking in example.askings:
            found = revision.paths.match(asking.body["path"])
            assert found is not None
            assert found[0].name == example.documents[0]["metadata"]["name"]


@each_asking
@in_virtual_time
async def test_callers_and_auditors_see_what_the_page_shows(example: Example, asking: Asking) -> None:
    """The reply has every member shown, and so has a record in the audit."""
    reply, records = await answer(revision_of(EXAMPLES[MODELS], example), asking)
    assert is_part(asking.reply, reply), reply
    if asking.record is not None:
        assert any(is_part(asking.record, record) for record in records), records


@each_asking
def test_explain_says_what_is_decided(example: Example, asking: Asking) -> None:
    """The explanation of each request names the rule, versions and problem that its reply shows."""
    now_ms = 1_924_992_000_000 if asking.day is not None else 0  # 2031-01-01
    record = InboundRecord("page", 0, 0, 0, None, None, asking.headers)
    envelope = Envelope(RequestId("page"), None, None, None, "normal", "application/json")
    told = explain(revision_of(EXAMPLES[MODELS], example), read_request(envelope, asking.body, record), now_ms)
    assert asking.reply is not None
    assert told.rule == asking.reply["rule"]
    if asking.reply["status"] == "rejected":
        assert told.refused is not None
        assert told.refused.code == asking.reply["errors"][0]["code"]
        return
    for task in told.tasks:
        shown = asking.reply["outputs"][task.spec.name]
        possible = {each.version.version for each in task.versions if each.version is not None}
        assert shown["version"] in possible
        if "experiment" in shown:
            assert [arm.version for arm in task.arms if arm.drawn] == [shown["version"]]


def test_every_field_of_a_task_has_an_example() -> None:
    """Whatever a route's task can say is shown on the page, and so are joins, reasons and pins."""

    def members(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {name for each in value.values() for name in members(each)}
        return {name for each in value for name in members(each)} if isinstance(value, list) else set()

    shown = members([example.documents for example in STRATEGIES])
    fields = {field.alias or name for name, field in TaskSpec.model_fields.items()}
    assert fields | {"join", "reasons", "pinnable", "stickyBy", "experiment", "segment", "abortOn"} <= shown


def test_the_test_vectors_are_the_published_ones() -> None:
    """The table has a row for each vector, with the digits that it shows."""
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| `(.+?)` \| (.+?) \| (\S+) \|$", PAGE.read_text(), re.M)
    expected = [
        (
            vector["experiment"],
            ", ".join(f"{arm}: {weight}" for arm, weight in vector["arms"].items()),
            vector["subject"],
            ", ".join(f"{fraction:.12f}" for fraction in vector["fractions"].values()),
            vector["arm"],
        )
        for vector in VECTORS
    ]
    assert rows == expected


def test_the_subjects_are_the_published_ones() -> None:
    """The table of texts has each value, as JSON, and what is hashed for it."""
    table = PAGE.read_text().partition("| in the request, as JSON | subject |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", table, re.M)
    assert rows == [(each["json"], each["subject"]) for each in PUBLISHED["subjects"]]
