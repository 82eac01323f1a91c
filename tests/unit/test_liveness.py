"""Liveness: finished offsets that do not reach the group's commit."""

from faust.types import TP

from app.agents.worker import Liveness

P, Q = TP("inference.requests", 0), TP("inference.requests", 1)


def test_a_commit_that_stands_still_is_a_fault() -> None:
    """Half a minute behind without moving; named, with where it stands."""
    liveness = Liveness()
    liveness.observe({P: 10, Q: 5}, {P: 7, Q: 5}, 100.0)
    assert liveness.fault(130.0) is None
    liveness.observe({P: 12, Q: 5}, {P: 7, Q: 5}, 130.0)
    assert liveness.fault(130.1) == "inference.requests/0: the commit stands at 7 for 30 s; restart"


def test_a_commit_that_moves_is_none() -> None:
    """However far behind, as long as it moves."""
    liveness = Liveness()
    for second in range(0, 200, 10):
        liveness.observe({P: 1_000}, {P: second}, float(second))
        assert liveness.fault(float(second)) is None


def test_what_is_caught_up_or_gone_is_forgotten() -> None:
    """A partition that has caught up, or went to another worker, is no fault of this one."""
    liveness = Liveness()
    liveness.observe({P: 10, Q: 10}, {}, 0.0)
    liveness.observe({P: 10}, {P: 10}, 20.0)
    assert liveness.fault(100.0) is None


def test_an_outage_of_kafkas_is_no_fault() -> None:
    """Nobody can commit meanwhile; half a minute to do so begins when it is back."""
    liveness = Liveness()
    liveness.observe({P: 10}, {P: 7}, 100.0)
    liveness.observe_group(joined=True, kafka_answers=False, now_s=110.0)
    assert liveness.fault(1_000.0) is None
    liveness.observe_group(joined=True, kafka_answers=True, now_s=1_000.0)
    liveness.observe({P: 10}, {P: 7}, 1_000.0)
    assert liveness.fault(1_030.0) is None
    assert liveness.fault(1_031.0) is not None


def test_a_process_that_never_joins_its_group_is_a_fault() -> None:
    """Three minutes outside while Kafka answers; an outage of Kafka's is none, nor is who has joined."""
    liveness = Liveness()
    liveness.observe_group(joined=False, kafka_answers=True, now_s=10.0)
    liveness.observe_group(joined=False, kafka_answers=True, now_s=190.0)
    assert liveness.fault(190.0) is None
    assert liveness.fault(191.0) == "Kafka answers, and this process has not joined its group for 181 s"
    liveness.observe_group(joined=False, kafka_answers=False, now_s=200.0)
    assert liveness.fault(1_000.0) is None
    liveness.observe_group(joined=False, kafka_answers=True, now_s=1_000.0)
    liveness.observe_group(joined=True, kafka_answers=True, now_s=1_010.0)
    assert liveness.fault(2_000.0) is None
