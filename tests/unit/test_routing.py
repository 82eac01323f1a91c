"""Routing: the most specific path, the first rule that holds, the version by pin, alias or weight; or a rejection."""

import time
from dataclasses import replace
from typing import Any

import pytest

from app.domain.assignment import assign
from app.domain.errors import Code
from app.domain.registry import rollout_digest, unapproved_of
from app.domain.routing import Plan, Refused, TaskPlan, route
from tests.support import registry_documents as registry
from tests.support.registry_documents import NOW_MS, changed, model_version, request, revision, sound, task

EXPIRED_MS = 1_830_000_000_000  # the end of 2027: version 1 of `versions` has ended, 2 and 3 have not
SPLIT = [{"version": "1", "weight": 50}, {"version": "2", "weight": 50}]


def planned(documents: list[dict[str, Any]], now_ms: int = NOW_MS, **asked: Any) -> Plan:
    plan = route(revision(documents), request(**asked), now_ms)
    assert isinstance(plan, Plan), plan
    return plan


def refused(documents: list[dict[str, Any]], now_ms: int = NOW_MS, **asked: Any) -> Refused:
    plan = route(revision(documents), request(**asked), now_ms)
    assert isinstance(plan, Refused)
    return plan


def versions(**changes: Any) -> list[dict[str, Any]]:
    """The sound registry with versions 1, 2 and 3 over HTTP, of which only 1 ends, and one task of these changes."""
    documents = [each for each in sound() if each["metadata"]["name"] != "credit-pd-2"]
    documents += [model_version(label, governance={"approvedBy": "risk"}) for label in ("2", "3")]
    return changed(documents, "credit", "spec.rules.0.tasks.0", task(**changes))


def served(documents: list[dict[str, Any]], now_ms: int = NOW_MS, **asked: Any) -> TaskPlan:
    (only,) = planned(documents, now_ms, **asked).tasks
    return only


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
        ("/credit/loan/old", "below"),
        ("/credit/loan/new/now", "below"),
        ("/credit/card/new/now", "cards"),
        ("/insurance/car", "any"),
        ("/insurance", "any"),
        ("/st/one/two", "stages"),
        ("/other/one/two", "one-two"),
    ],
)
def test_the_most_specific_path_wins(path: str, expected: str) -> None:
    """From the left, literals come before placeholders and those before prefixes, whatever the documents' order.

    Where a more specific beginning leads nowhere, the next one is tried.
    """
    others = {
        "last": "/{branch}/card",
        "literal": "/credit/card",
        "middle": "/credit/{product}/new",
        "deep": "/credit/card/{stage}",
        "below": "/credit/*",
        "cards": "/credit/card/*",
        "any": "/*",
        "stages": "/st/*",
        "one-two": "/{branch}/one/two",
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


@pytest.mark.parametrize(
    "when", ["metadata.channel == 'web'", "inputs.amount > 1.5", "path < 1", "size(path)", "[path][3] == path"]
)
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
    """The draw depends on the request id and the experiment alone; the arm and its experiment are in the plan."""
    first = [served(sound(), request_id=f"r-{n}").version.version for n in range(50)]
    again = [served(sound(), request_id=f"r-{n}").version.version for n in range(50)]
    assert first == again
    assert set(first) == {"1", "2"}
    assert served(sound()).experiment == "credit/pd"


@pytest.mark.parametrize(
    ("sticky_by", "asked"),
    [
        ("applicant_id", {"entities": {"applicant_id": 17}}),
        ("entities.applicant_id", {"entities": {"applicant_id": "17"}}),
        ("inputs.contract", {"inputs": {"contract": 17.0}}),
        ("metadata.session", {"metadata": {"session": "17"}}),
        ("metadata.product", {"path": "/credit/17"}),
    ],
)
def test_a_subject_keeps_its_arm(sticky_by: str, asked: dict[str, Any]) -> None:
    """Whatever section names the subject, its arm is the same for every request and under every rule's experiment."""
    documents = versions(select={"split": SPLIT, "stickyBy": sticky_by, "experiment": "pd-test"})
    arms = {served(documents, request_id=f"r-{n}", **asked).version.version for n in range(20)}
    assert arms == {assign("pd-test", [("1", 50), ("2", 50)], "17")}
    assert served(documents, **asked).experiment == "pd-test"


@pytest.mark.parametrize("entities", [{}, {"applicant_id": None}, {"applicant_id": ""}, {"applicant_id": [17]}])
def test_a_request_without_its_subject_is_rejected(entities: dict[str, Any]) -> None:
    """Drawing by something else would put a subject into two arms; the message says what to send."""
    documents = versions(select={"split": SPLIT, "stickyBy": "applicant_id"})
    answer = refused(documents, entities=entities)
    assert (answer.problem.code, answer.problem.task) == (Code.SUBJECT_MISSING, "pd")
    assert "entities.applicant_id" in answer.problem.message
    assert (answer.route, answer.rule) == ("credit", "default")


def test_headers_are_seen_as_metadata() -> None:
    """By lower-case name, the first of a name; those of no text are left out, and metadata is no way round."""
    documents = rules('"x-channel" in metadata.headers && metadata.headers["x-channel"] == "canary"', None)
    whole = revision(documents)

    def rule_of(*headers: tuple[str, bytes], **asked: Any) -> str:
        plan = route(whole, replace(request(**asked), headers=headers), NOW_MS)
        assert isinstance(plan, Plan)
        return plan.rule.spec.name

    assert rule_of(("x-channel", b"canary")) == "r0"
    assert rule_of(("X-Channel", b"canary"), ("x-channel", b"web")) == "r0"
    assert rule_of(("x-channel", b""), ("x-channel", b"canary")) == "r0"
    assert rule_of(("x-channel", b"web"), ("x-channel", b"canary")) == "r1"
    assert rule_of(("x-channel", b"\xff"), ("y", b"\xff")) == "r1"
    assert rule_of(metadata={"headers": {"x-channel": "canary"}}) == "r1"


class TestPins:
    """``metadata.model_version``: a caller names the version, where the route lets it."""

    def test_what_nobody_approved_is_not_pinned(self) -> None:
        """It could only be a shadow; no caller makes it decide."""
        documents = changed(self.documents("pd"), "credit-pd-3", "spec.governance", ...)
        problem = refused(documents, metadata={"model_version": "3"}).problem
        assert (problem.code, "nobody has approved" in problem.message) == (Code.VERSION_NOT_ALLOWED, True)

    def documents(self, *pinnable: str) -> list[dict[str, Any]]:
        two = [task(name="pd", select={"version": "1"}), task(name="again", select={"split": SPLIT})]
        documents = changed(versions(), "credit", "spec.rules.0.tasks", two)
        return changed(documents, "credit", "spec.pinnable", list(pinnable))

    @pytest.mark.parametrize(
        ("pinnable", "pin", "expected"),
        [
            (("again",), "3", {"again": "3"}),
            (("pd", "again"), {"again": "3"}, {"again": "3"}),
            (("pd", "again"), {"pd": "2", "again": "3"}, {"pd": "2", "again": "3"}),
            (("pd",), {}, {}),
            (("again",), 3, {"again": "3"}),
            (("pd", "again"), {"again": 3}, {"again": "3"}),
        ],
    )
    def test_allowed(self, pinnable: tuple[str, ...], pin: object, expected: dict[str, str]) -> None:
        """One version where one task may be pinned, else versions by task; nothing is drawn for a pinned task."""
        plan = planned(self.documents(*pinnable), metadata={"model_version": pin})
        by_pin = {each.name: each.version.version for each in plan.tasks if each.selected_by == "pin"}
        assert by_pin == expected
        assert all(each.experiment is None for each in plan.tasks if each.name in expected)

    @pytest.mark.parametrize(
        ("pinnable", "pin", "said"),
        [
            ((), "3", "of no task"),
            (("pd", "again"), "3", "of pd, again"),
            (("pd",), {"again": "3"}, "names again"),
            (("pd",), {"pd": "9"}, "credit-pd has no such version"),
            (("pd",), "9", "credit-pd has no such version"),
            (("pd",), True, "neither a version"),
            (("pd",), {"pd": 3.5}, "neither a version"),
        ],
    )
    def test_refused(self, pinnable: tuple[str, ...], pin: object, said: str) -> None:
        """What the route does not allow is rejected, never left out in silence."""
        answer = refused(self.documents(*pinnable), metadata={"model_version": pin})
        assert answer.problem.code is Code.VERSION_NOT_ALLOWED
        assert said in answer.problem.message


class TestExpired:
    """A version whose validity has ended since it was applied."""

    def test_the_last_day_counts(self) -> None:
        """A version may be used to the end of its last day in UTC."""
        documents = versions(select={"version": "1"}, fallback=[{"version": "2"}])
        end_ms = revision(documents).expires_ms["credit-pd", "1"]
        assert end_ms == 1_814_400_000_000  # 2027-07-01T00:00Z
        assert served(documents, end_ms - 1).barred is None
        assert served(documents, end_ms).barred is not None

    def test_next(self) -> None:
        """The plan names what was selected, why it may not serve, and what stands in, but for what is expired too."""
        documents = versions(select={"alias": "champion"}, fallback=[{"version": "1"}, {"version": "3"}])
        only = served(documents, EXPIRED_MS)
        assert (only.version.version, only.selected_by) == ("1", "alias champion")
        assert only.barred is not None
        assert (only.barred.code, only.barred.task) == (Code.VERSION_EXPIRED, "pd")
        assert "valid until 2027-06-30" in only.barred.message
        assert [each.selected_by for each in only.standbys] == ["fallback version 3"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"fallback": [{"default": {"probability": 0.5}}]},
            {"need": "optional"},
            {"need": "default", "default": {"probability": 0.5}},
        ],
    )
    def test_something_stands_in(self, changes: dict[str, Any]) -> None:
        """A fixed answer, or a task that may be missing, is enough to go on."""
        guarded = "has(outputs.pd) && outputs.pd.probability < 0.3"
        documents = changed(
            versions(select={"version": "1"}, **changes), "credit", "spec.rules.0.result.decision", guarded
        )
        assert served(documents, EXPIRED_MS).barred is not None

    @pytest.mark.parametrize(
        "changes",
        [{"onUnavailable": "reject", "fallback": [{"version": "3"}]}, {}, {"fallback": [{"alias": "champion"}]}],
    )
    def test_rejected(self, changes: dict[str, Any]) -> None:
        """Where the task says so, and where nothing stands in that may be used."""
        answer = refused(versions(select={"version": "1"}, **changes), EXPIRED_MS)
        assert (answer.problem.code, answer.rule) == (Code.VERSION_EXPIRED, "default")

    def test_an_expired_shadow_does_not_run(self) -> None:
        """It is left out, and the decision goes on."""
        documents = versions(select={"version": "2"}, shadow=[{"version": "1"}, {"version": "3"}])
        assert [each.version.version for each in served(documents).shadows] == ["1", "3"]
        assert [each.version.version for each in served(documents, EXPIRED_MS).shadows] == ["3"]


def test_fallbacks_stand_by_in_order() -> None:
    """Versions by label or alias, then a fixed answer; all of them are among the versions that may be asked."""
    fallback = [{"alias": "challenger"}, {"version": "3"}, {"default": {"probability": 0.5}}]
    only = served(versions(select={"version": "1"}, fallback=fallback, shadow=[{"version": "2"}]))
    assert [(each.selected_by, each.output) for each in only.standbys] == [
        ("fallback alias challenger", None),
        ("fallback version 3", None),
        ("fallback default", {"probability": 0.5}),
    ]
    assert [each.version for each in only.versions] == ["1", "2", "3", "2"]


def test_a_shadow_runs_on_its_part_of_the_requests() -> None:
    """Its percent of them, drawn by the request's id, so a redelivered one has the same; never beside itself."""
    documents = versions(
        select={"split": SPLIT}, shadow=[{"version": "3", "percent": 25, "segment": "path"}, {"version": "2"}]
    )
    whole, count = revision(documents), 2_000
    plans = [route(whole, request(request_id=f"r-{n}"), NOW_MS) for n in range(count)]
    tasks = [plan.tasks[0] for plan in plans if isinstance(plan, Plan)]
    parts = [[each.version.version for each in only.shadows] for only in tasks]
    assert abs(sum("3" in part for part in parts) - 500) < 80  # four standard deviations
    assert all(("2" in part) == (only.version.version == "1") for only, part in zip(tasks, parts, strict=True))
    assert {each.segment.text if each.segment else None for only in tasks for each in only.shadows} == {"path", None}


@pytest.mark.parametrize(
    ("state", "step", "expected"),
    [
        ("progressing", 0, 5),
        ("progressing", 1, 25),
        ("paused", 1, 25),
        ("aborted", 1, 0),
        ("promoted", 2, 100),
    ],
)
def test_a_rollout_serves_its_percent(state: str, step: int, expected: int) -> None:
    """The route's status says how far it is; growing moves subjects only to the new version."""
    documents = versions(
        select={"version": "1", "stickyBy": "id"}, rollout={"to": "2", "steps": [5, 25, 100], "every": "10m"}
    )
    rule = revision(documents).routes[0].spec.rules[0]
    of = rollout_digest(rule.name, rule.tasks[0])
    status = {"rollouts": {"default/pd": {"state": state, "step": step, "since": 1, "of": of}}}
    documents = [each | ({"status": status} if each["kind"] == "Route" else {}) for each in documents]
    whole, count = revision(documents), 1_000
    plans = [route(whole, request(entities={"id": n}), NOW_MS) for n in range(count)]
    tasks = [plan.tasks[0] for plan in plans if isinstance(plan, Plan)]
    new = sum(only.version.version == "2" for only in tasks)
    assert abs(new - expected / 100 * count) <= 4 * (count * expected / 100 * (1 - expected / 100)) ** 0.5
    assert {only.selected_by for only in tasks} == {"rollout"}
    changed_status = {"rollouts": {"default/pd": status["rollouts"]["default/pd"] | {"of": "another"}}}
    other = [each | ({"status": changed_status} if each["kind"] == "Route" else {}) for each in documents]
    assert served(other, entities={"id": 1}).version.version == "1", "a status of another rollout does not count"


def test_routing_stays_fast_with_many_routes() -> None:
    """The time to find a route does not grow with the number of routes: 200 cost about what 2 do."""

    def best_of(count: int) -> float:
        documents = [*sound(), *(registry.route(f"r{n}", f"/credit/{{product}}/p{n}") for n in range(count))]
        whole, asked = revision(documents), request(f"/credit/card/p{count - 1}")
        times = []
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(100):
                route(whole, asked, NOW_MS)
            times.append(time.perf_counter() - began)
        return min(times)

    assert best_of(200) < 3 * best_of(2)


class TestUnapproved:
    """A version that nobody approved, in a revision that `apply` did not publish."""

    def test_what_stands_in_decides(self) -> None:
        """It is not asked, nor does it stand in; a rejection where the task says so or nothing is left."""
        documents = changed(
            versions(select={"version": "1"}, fallback=[{"version": "2"}, {"version": "3"}]),
            "credit-pd-1",
            "spec.governance",
            ...,
        )
        only = served(documents)
        assert only.barred is not None
        assert (only.barred.code, only.barred.task) == (Code.VERSION_UNAPPROVED, "pd")
        assert [each.selected_by for each in only.standbys] == ["fallback version 2", "fallback version 3"]
        documents = changed(documents, "credit-pd-2", "spec.governance", ...)
        assert [each.selected_by for each in served(documents).standbys] == ["fallback version 3"]
        for field, value in (("onUnavailable", "reject"), ("fallback", [])):
            answer = refused(changed(documents, "credit", f"spec.rules.0.tasks.0.{field}", value))
            assert (answer.problem.code, answer.rule) == (Code.VERSION_UNAPPROVED, "default")

    def test_it_may_run_beside_another(self) -> None:
        """A shadow decides nothing."""
        documents = changed(
            versions(select={"version": "2"}, shadow=[{"version": "1"}]), "credit-pd-1", "spec.governance", ...
        )
        assert [each.version.version for each in served(documents).shadows] == ["1"]
        assert unapproved_of(revision(documents)) == ()

    def test_each_use_is_told(self) -> None:
        """By route, rule, task and version, for the log of whoever went over to it."""
        documents = changed(
            versions(select={"version": "2"}, fallback=[{"version": "1"}]), "credit-pd-1", "spec.governance", ...
        )
        assert unapproved_of(revision(documents)) == ("Route credit, rule default, task pd: credit-pd 1",)
