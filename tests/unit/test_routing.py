"""Routing: the most specific path, the first rule that holds, the version by pin, alias or weight; or a rejection."""

import time
from collections import Counter
from typing import Any

import pytest

from app.domain.errors import Code
from app.domain.routing import Plan, Refused, draw, route
from tests.support import registry_documents as registry
from tests.support.registry_documents import changed, request, revision, sound, task


def planned(documents: list[dict[str, Any]], **asked: Any) -> Plan:
    plan = route(revision(documents), request(**asked))
    assert isinstance(plan, Plan)
    return plan


def refused(documents: list[dict[str, Any]], **asked: Any) -> Refused:
    plan = route(revision(documents), request(**asked))
    assert isinstance(plan, Refused)
    return plan


def rules(*whens: str | None) -> list[dict[str, Any]]:
    """The sound registry with rules r0, r1... of these conditions."""
    specs = [
        {"name": f"r{index}", "tasks": [task()]} | ({} if when is None else {"when": when})
        for index, when in enumerate(whens)
    ]
    return changed(sound(), "credit", "spec.rules", specs)


def test_placeholders_become_metadata_and_win_over_the_caller_s() -> None:
    """A caller cannot pass for another product by sending metadata of that name."""
    plan = planned(sound(), path="/credit/card", metadata={"product": "loan", "channel": "web"})
    assert plan.metadata == {"product": "card", "channel": "web"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/credit/card", "literal"),
        ("/credit/loan", "credit"),
        ("/insurance/card", "last"),
        ("/credit/card/new", "deep"),
        ("/credit/loan/new", "middle"),
    ],
)
def test_the_most_specific_path_wins(path: str, expected: str) -> None:
    """Literal segments come before placeholders, from the left, whatever the documents' order."""
    others = {
        "last": "/{branch}/card",
        "literal": "/credit/card",
        "middle": "/credit/{product}/new",
        "deep": "/credit/card/{stage}",
    }
    documents = [*(registry.route(name, shape) for name, shape in others.items()), *sound()]
    for order in (documents, documents[::-1]):
        assert planned(order, path=path).route.name == expected


@pytest.mark.parametrize("path", ["/", "/credit", "/credit/", "/credit/card/", "/credit/a/b", "//card", "/CREDIT/card"])
def test_unknown_path(path: str) -> None:
    """A path that no route has is rejected; placeholders stand for one whole segment that is not empty."""
    assert refused(sound(), path=path).problem.code is Code.PATH_UNKNOWN


def test_the_first_rule_that_holds_wins() -> None:
    """Rules are tried in order; later ones are not even looked at."""
    documents = rules('metadata.channel == "batch"', 'metadata.channel == "web"', None)
    assert planned(documents, metadata={"channel": "batch"}).rule.spec.name == "r0"
    assert planned(documents, metadata={"channel": "web"}).rule.spec.name == "r1"
    assert planned(documents, metadata={"channel": "phone"}).rule.spec.name == "r2"


def test_when_sees_path_entities_inputs_and_metadata() -> None:
    """All four parts of a request can be asked about."""
    when = 'path == "/credit/card" && entities.id == 17 && inputs.amount > 10.0 && metadata.product == "card"'
    asked: dict[str, Any] = {"entities": {"id": 17}, "inputs": {"amount": 11.5}}
    assert planned(rules(when), **asked).rule.spec.name == "r0"


def test_no_rule() -> None:
    """A request that no rule is for is rejected by the route's name."""
    answer = refused(rules('metadata.channel == "batch"'), metadata={"channel": "web"})
    assert (answer.problem.code, answer.route, answer.rule) == (Code.NO_RULE_MATCHED, "credit", None)


@pytest.mark.parametrize("when", ["metadata.channel == 'web'", "inputs.amount > 1.5", "'a' < 1", "1", "[1][3] == 1"])
def test_a_when_that_fails_rejects_and_does_not_fall_through(when: str) -> None:
    """The next rule would match, but nobody meant it for this request."""
    answer = refused(rules(when, None), inputs={"amount": "a lot"})
    assert (answer.problem.code, answer.route, answer.rule) == (Code.RULE_FAILED, "credit", "r0")
    assert when in answer.problem.message


def test_selection() -> None:
    """A task is served by the version that it pins, by its alias's, or by one drawn."""
    tasks = [
        task(name="pinned", select={"version": "2"}),
        task(name="named", select={"alias": "champion"}),
        task(name="drawn", select={"split": [{"version": "1", "weight": 0}, {"version": "2", "weight": 1}]}),
    ]
    plan = planned(changed(sound(), "credit", "spec.rules.0", {"name": "default", "tasks": tasks}))
    assert [(each.name, each.version.version, each.selected_by, each.queued) for each in plan.tasks] == [
        ("pinned", "2", "version", True),
        ("named", "1", "alias champion", False),
        ("drawn", "2", "split", True),
    ]
    assert plan.result == {}


def test_a_redelivered_request_meets_the_same_versions() -> None:
    """The draw depends on the request id and the task alone."""
    first = [planned(sound(), request_id=f"r-{n}").tasks[0].version.version for n in range(50)]
    again = [planned(sound(), request_id=f"r-{n}").tasks[0].version.version for n in range(50)]
    assert first == again
    assert set(first) == {"1", "2"}


def test_two_tasks_draw_independently() -> None:
    """Whoever gets the small arm of one task does not get the small arm of the other more often than others do."""
    arms = [("1", 50), ("2", 50)]
    pairs = Counter((draw(arms, f"r-{n}:pd"), draw(arms, f"r-{n}:fraud")) for n in range(4_000))
    assert all(850 < count < 1_150 for count in pairs.values())
    assert len(pairs) == 4


@pytest.mark.parametrize("weights", [(90, 10), (1, 1, 1), (0, 5, 95), (999, 1), (3, 14, 15, 92)])
def test_weights_are_kept_within_statistical_bounds(weights: tuple[int, ...]) -> None:
    """Of 20,000 requests each arm gets its share: chi-square below the bound that one run in 100,000 exceeds."""
    arms = [(str(index), weight) for index, weight in enumerate(weights)]
    count, total = 20_000, sum(weights)
    drawn = Counter(draw(arms, f"request-{n}:pd") for n in range(count))
    expected = {arm: count * weight / total for arm, weight in arms}
    assert all(drawn[arm] == 0 for arm, share in expected.items() if share == 0)
    chi_square = sum((drawn[arm] - share) ** 2 / share for arm, share in expected.items() if share)
    assert chi_square < {1: 19.5, 2: 23.0, 3: 25.9}[sum(weight > 0 for weight in weights) - 1]


def test_an_arm_of_weight_zero_cannot_be_drawn_alone() -> None:
    """The documents' own check comes first; the draw does not guess either."""
    with pytest.raises(ValueError, match="more than 0"):
        draw([("1", 0)], "seed")


def test_routing_stays_fast_with_many_routes() -> None:
    """The time to find a route does not grow with the number of routes: 200 cost about what 2 do."""

    def best_of(count: int) -> float:
        documents = [*sound(), *(registry.route(f"r{n}", f"/credit/{{product}}/p{n}") for n in range(count))]
        whole, asked = revision(documents), request(f"/credit/card/p{count - 1}")
        times = []
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(100):
                route(whole, asked)
            times.append(time.perf_counter() - began)
        return min(times)

    assert best_of(200) < 3 * best_of(2)
