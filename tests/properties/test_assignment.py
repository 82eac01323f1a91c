"""Properties of assignment: who is moved by a change of arms, and what makes two subjects one."""

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.avro import AvroCodec
from app.domain.assignment import assign, fraction, score, subject_text
from app.domain.requests import Envelope, InboundRecord, RequestId, read_request
from app.domain.routing import Plan, route
from tests.support.registry_documents import NOW_MS, changed, revision, sound

experiments = st.text(min_size=1, max_size=20)
subjects = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=60)
weights = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 1_000), min_size=1, max_size=8).filter(
    lambda arms: sum(arms.values()) > 0
)


def moved(experiment: str, before: dict[str, int], after: dict[str, int], whom: list[str]) -> set[tuple[str, str]]:
    """From which arm to which other the change of weights moves subjects."""
    drawn = ((assign(experiment, before.items(), each), assign(experiment, after.items(), each)) for each in whom)
    return {(one, other) for one, other in drawn if one != other}


@given(experiments, weights, subjects)
def test_an_arm_with_weight_is_assigned_and_the_order_does_not_count(
    experiment: str, arms: dict[str, int], whom: list[str]
) -> None:
    """Whoever asks, an arm is assigned, never one of weight 0, and the same one from arms in another order."""
    for subject in whom:
        arm = assign(experiment, arms.items(), subject)
        assert arms[arm] > 0
        assert assign(experiment, reversed(arms.items()), subject) == arm
        assert 0 < fraction(experiment, arm, subject) < 1


@given(experiments, weights, subjects, st.data())
def test_raising_a_weight_moves_subjects_only_to_that_arm(
    experiment: str, arms: dict[str, int], whom: list[str], data: Any
) -> None:
    """Nobody leaves the arm that grows, and nobody is moved between the others; lowering is the same backwards."""
    arm = data.draw(st.sampled_from(sorted(arms)))
    raised = arms | {arm: arms[arm] + data.draw(st.integers(1, 100_000))}
    assert {to for _, to in moved(experiment, arms, raised, whom)} <= {arm}
    assert {origin for origin, _ in moved(experiment, raised, arms, whom)} <= {arm}


@given(experiments, weights, subjects, st.integers(0, 1_000))
def test_adding_or_removing_an_arm_moves_only_who_goes_to_it_or_comes_from_it(
    experiment: str, arms: dict[str, int], whom: list[str], weight: int
) -> None:
    """An arm that comes takes subjects from the others; one that goes gives its own back, and no one else moves."""
    more = arms | {"new": weight}
    assert {to for _, to in moved(experiment, arms, more, whom)} <= {"new"}
    assert {origin for origin, _ in moved(experiment, more, arms, whom)} <= {"new"}


@given(experiments, weights, subjects, st.integers(2, 1_000))
def test_only_the_weights_proportions_count(
    experiment: str, arms: dict[str, int], whom: list[str], factor: int
) -> None:
    """90 and 10 assign as 9 and 1 do, but for scores that are equal to the last bit."""
    scaled = {arm: weight * factor for arm, weight in arms.items()}
    for subject in whom:
        one, other = assign(experiment, arms.items(), subject), assign(experiment, scaled.items(), subject)
        scores = [score(experiment, arm, arms[arm], subject) for arm in (one, other)]
        assert abs(scores[0] - scores[1]) <= 1e-12 * scores[0]


@given(st.integers(-(2**53), 2**53))
def test_a_number_and_its_text_are_one_subject(number: int) -> None:
    """17 as a JSON number, as text, as a number with a point, and as Avro's long hash alike."""
    assert subject_text(number) == subject_text(str(number)) == subject_text(float(number))


STICKY = revision(
    changed(
        changed(sound(), "credit", "spec.rules.0.tasks.0.select.stickyBy", "applicant_id"),
        "credit",
        "spec.rules.0.tasks.0.select.split.0.weight",
        10,
    )
)


AVRO = AvroCodec("InferenceRequest")


@given(st.integers(-(2**63), 2**63 - 1), st.uuids(), st.uuids())
def test_a_subject_has_one_arm_by_whatever_way_it_is_named(number: int, one: object, other: object) -> None:
    """JSON's number, JSON's text and Avro's long route to one version, whatever the requests' ids."""
    record = InboundRecord("inference.requests", 0, 0, 0, None, None, ())
    served = set()
    for request_id, value in ((str(one), number), (str(other), str(number))):
        members = {"path": "/credit/card", "entities": {"applicant_id": value}}
        for body in (orjson.loads(orjson.dumps(members)), AVRO.decode(AVRO.encode(members))):
            envelope = Envelope(RequestId(request_id), None, None, None, "normal", "application/json")
            planned = route(STICKY, read_request(envelope, body, record), NOW_MS)
            assert isinstance(planned, Plan)
            served.add(planned.tasks[0].version.version)
    assert len(served) == 1
