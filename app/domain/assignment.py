"""Assignment: which arm of an experiment a subject belongs to, the same wherever and whenever it is asked.

Weighted rendezvous hashing: each arm scores ``-weight / ln(u)``, where ``u`` in (0, 1) is a hash of experiment, arm
and subject, and the highest score wins. An arm wins in proportion to its weight, and an arm's score depends on nothing
but its own weight: raising it moves subjects only to that arm, adding or removing an arm moves only those who go to or
come from it. Two experiments hash apart, so one says nothing of the other.

Sources: Thaler and Ravishankar, "Using name-based mappings to increase hit rates" (1998), for rendezvous hashing;
Schindelhauer and Schomaker, "Weighted distributed hash tables" (2005), for the logarithmic weights.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Final

_BITS: Final = 53  # what a double holds exactly, so that every language computes the same fraction
_RANGE: Final = 1 << _BITS


def fraction(experiment: str, arm: str, subject: str) -> float:
    """The hash as a number in (0, 1): SHA-256 of the three texts with NUL between, its first 53 bits, plus a half.

    >>> round(fraction("pd-test", "3", "17"), 12)
    0.103919354309
    """
    digest = hashlib.sha256(f"{experiment}\0{arm}\0{subject}".encode()).digest()
    return ((int.from_bytes(digest[:8], "big") >> (64 - _BITS)) + 0.5) / _RANGE


def score(experiment: str, arm: str, weight: int, subject: str) -> float:
    """The arm's score for the subject; 0 for an arm without weight, which never wins."""
    return -weight / math.log(fraction(experiment, arm, subject)) if weight > 0 else 0.0


def assign(experiment: str, arms: Iterable[tuple[str, int]], subject: str) -> str:
    """The arm that ``subject`` belongs to; of equal scores the first named.

    Raises:
        ValueError: no arm has a weight.
    """
    best, highest = None, 0.0
    for arm, weight in arms:
        scored = score(experiment, arm, weight, subject)
        if scored > highest:
            best, highest = arm, scored
    if best is None:
        raise ValueError("the weights of a split must sum to more than 0")
    return best


def subject_text(value: object) -> str | None:
    """An entity or input as the text that is hashed, the same from JSON and from Avro; None: it names no subject.

    >>> subject_text(17), subject_text(17.0), subject_text("17"), subject_text(True), subject_text(1.5)
    ('17', '17', '17', 'true', '1.5')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value or None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value) if math.isfinite(value) else None
    return None
