"""Assignment: the published vectors, the weights' shares, and experiments that say nothing of one another."""

import hashlib
import math
import re
import struct
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from app.adapters.avro import AvroCodec
from app.domain.assignment import assign, fraction, score, subject_text

PUBLISHED = orjson.loads((Path(__file__).parents[1] / "data" / "assignment.json").read_bytes())
VECTORS, SUBJECTS = PUBLISHED["vectors"], PUBLISHED["subjects"]
AVRO = AvroCodec("InferenceRequest")


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['experiment']}-{vector['subject']}")
def test_the_published_vectors_hold(vector: dict[str, Any]) -> None:
    """Others compute arms from these: a change here moves every subject of every running experiment."""
    experiment, subject, arms = vector["experiment"], vector["subject"], vector["arms"]
    assert assign(experiment, arms.items(), subject) == vector["arm"]
    for arm, weight in arms.items():
        assert fraction(experiment, arm, subject) == vector["fractions"][arm]
        assert score(experiment, arm, weight, subject) == pytest.approx(vector["scores"][arm], rel=1e-12)


@pytest.mark.parametrize("vector", SUBJECTS, ids=lambda vector: vector["json"])
def test_a_subject_has_one_text(vector: dict[str, str]) -> None:
    """From JSON, and from Avro where its types hold the value: both are what others compute from the same page."""
    value = orjson.loads(vector["json"])
    assert subject_text(value) == vector["subject"]
    if type(value) is int and abs(value) >= 2**63:
        return  # Avro's long ends before
    request = AVRO.decode(AVRO.encode({"path": "/", "entities": {"applicant_id": value}}))
    assert subject_text(request["entities"]["applicant_id"]) == vector["subject"]


def test_a_subject_s_text_reads_back() -> None:
    """Any double's text is a number that is the same double, and no two doubles share one."""
    random = Random(17)
    for _ in range(10_000):
        (double,) = struct.unpack("d", random.randbytes(8))
        if math.isfinite(double):
            text = subject_text(double)
            assert text is not None
            assert float(text) == double
            assert re.fullmatch(r"-?(0|[1-9]\d{0,20})(\.\d+)?|-?[1-9](\.\d+)?e([+]\d+|-\d+)", text)


def test_the_fraction_is_what_the_documentation_says() -> None:
    """The first 53 bits of SHA-256 over experiment, arm and subject with NUL between, over 2^53."""
    for vector in VECTORS:
        for arm, expected in vector["fractions"].items():
            text = "\0".join((vector["experiment"], arm, vector["subject"]))
            bits = bin(int(hashlib.sha256(text.encode()).hexdigest(), 16))[2:].zfill(256)[:53]
            assert int(bits, 2) / 2**53 == expected


@pytest.mark.parametrize(("byte", "expected"), [(b"\xff", (2**53 - 1) / 2**53), (b"\0", 0.0)])
def test_the_outermost_hashes_are_fractions(byte: bytes, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in 2^53 all bits are set, or none: the fraction stays below 1, and an arm can still be told."""

    class Digest:
        def digest(self) -> bytes:
            return byte * 32

    monkeypatch.setattr(hashlib, "sha256", lambda _: Digest())
    assert fraction("any", "3", "17") == expected < 1
    assert assign("any", [("2", 0), ("3", 90), ("4", 90)], "17") == "3"


@pytest.mark.parametrize("weights", [(90, 10), (1, 1, 1), (0, 5, 95), (999, 1), (3, 14, 15, 92)])
def test_weights_are_kept_within_statistical_bounds(weights: tuple[int, ...]) -> None:
    """Of 20,000 subjects each arm gets its share: chi-square below the bound that one run in 100,000 exceeds."""
    arms = [(str(index), weight) for index, weight in enumerate(weights)]
    count, total = 20_000, sum(weights)
    drawn = Counter(assign("shares", arms, str(number)) for number in range(count))
    expected = {arm: count * weight / total for arm, weight in arms}
    assert all(drawn[arm] == 0 for arm, share in expected.items() if share == 0)
    chi_square = sum((drawn[arm] - share) ** 2 / share for arm, share in expected.items() if share)
    assert chi_square < {1: 19.5, 2: 23.0, 3: 25.9}[sum(weight > 0 for weight in weights) - 1]


def test_raising_a_weight_moves_no_more_than_it_must() -> None:
    """From 5 % to 25 %, a fifth of the subjects moves, within four standard deviations."""
    count = 20_000
    before, after = [("3", 95), ("4", 5)], [("3", 75), ("4", 25)]
    moved = sum(assign("ramp", before, str(number)) != assign("ramp", after, str(number)) for number in range(count))
    # The base's own weight falls while the other's rises: both move subjects the same way, and 20 % is the least.
    assert abs(moved - 0.2 * count) < 4 * math.sqrt(count * 0.2 * 0.8)


def test_two_experiments_are_independent() -> None:
    """Who is in one experiment's arm is in the other's no more often than anybody: chi-square, one run in 100,000."""
    arms, count = [("1", 70), ("2", 30)], 20_000
    pairs = Counter((assign("one", arms, str(number)), assign("other", arms, str(number))) for number in range(count))
    share = {"1": 0.7, "2": 0.3}
    chi_square = sum(
        (pairs[a, b] - count * share[a] * share[b]) ** 2 / (count * share[a] * share[b]) for a in share for b in share
    )
    assert chi_square < 25.9


def test_an_arm_of_weight_zero_cannot_be_drawn_alone() -> None:
    """The documents' own check comes first; the draw does not guess either."""
    with pytest.raises(ValueError, match="more than 0"):
        assign("none", [("1", 0)], "subject")


@pytest.mark.parametrize("value", [None, "", [], {}, [1], float("nan"), float("inf"), b"17", 10**400])
def test_what_names_nobody(value: object) -> None:
    """A value that is no text, number or truth value is no subject, and neither is the empty text."""
    assert subject_text(value) is None
