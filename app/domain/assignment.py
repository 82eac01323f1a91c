"""Assignment: which arm of an experiment a subject belongs to, the same wherever and whenever it is asked.

Weighted rendezvous hashing: each arm scores ``-weight / ln(u)``, where ``u`` in [0, 1) is a hash of experiment, arm
and subject, and the highest score wins. An arm wins in proportion to its weight, and an arm's score depends on nothing
but its own weight: raising it moves subjects only to that arm, adding or removing an arm moves only those who go to or
come from it. Two experiments hash apart, so one says nothing of the other.

Sources: Thaler and Ravishankar, "Using name-based mappings to increase hit rates" (1998), for rendezvous hashing;
Schindelhauer and Schomaker, "Weighted distributed hash tables" (2005), for the logarithmic weights; RFC 8785, "JSON
Canonicalization Scheme" (2020), which takes the text of numbers from ECMAScript.
"""

import hashlib
import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Final

_BITS: Final = 53  # what a double holds exactly, so that every language computes the same fraction
_RANGE: Final = 1 << _BITS
_WHOLE_MAX: Final = 1 << 64
"""What whole numbers stay below that JSON's readers keep exactly; Avro's long ends earlier."""
_PLAIN_DIGITS_MAX: Final = 21
_PLAIN_ZEROS_MAX: Final = 6
"""ECMAScript's bounds of what is written without an exponent: below 1e21, and from 1e-6 on."""


def fraction(experiment: str, arm: str, subject: str) -> float:
    """The hash as a number in [0, 1): the first 53 bits of SHA-256 of the three texts with NUL between, exactly.

    >>> round(fraction("pd-test", "3", "17"), 12)
    0.103919354309
    """
    digest = hashlib.sha256(f"{experiment}\0{arm}\0{subject}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - _BITS)) / _RANGE


def score(experiment: str, arm: str, weight: int, subject: str) -> float:
    """The arm's score for the subject; 0, the limit, for a fraction of 0, and for an arm without weight."""
    u = fraction(experiment, arm, subject)
    return -weight / math.log(u) if weight > 0 and u > 0 else 0.0


def assign(experiment: str, arms: Iterable[tuple[str, int]], subject: str) -> str:
    """The arm that ``subject`` belongs to; of equal scores the first named.

    Raises:
        ValueError: no arm has a weight.
    """
    best, highest = None, -1.0
    for arm, weight in arms:
        if weight <= 0:
            continue
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
    if isinstance(value, int | float):
        return _number_text(value)
    return None


def _number_text(number: float) -> str | None:
    """Whole numbers of up to 64 bits in decimal digits, any other as ECMAScript writes the double nearest to it.

    >>> [_number_text(number) for number in (2**64 - 1, 2.0**63, -0.0, 1e-7, 2**64, 1.5e300)]
    ['18446744073709551615', '9223372036854775808', '0', '1e-7', '18446744073709552000', '1.5e+300']
    """
    try:
        double = float(number)
    except OverflowError:
        return None
    if not math.isfinite(double):
        return None
    whole = int(number)
    return str(whole) if whole == number and abs(whole) < _WHOLE_MAX else _ecmascript(double)


def _ecmascript(double: float) -> str:
    """Number::toString of ECMA-262, section 6.1.6.1.20: the shortest digits that read back, in its own layout."""
    # Python's repr has the same digits; where it puts the point and the exponent is its own affair.
    sign, digits, exponent = Decimal(repr(double)).normalize().as_tuple()
    assert isinstance(exponent, int)  # noqa: S101 - only NaN and infinities have none
    text, count = "".join(map(str, digits)), len(digits)
    point = count + exponent
    if 0 < point <= _PLAIN_DIGITS_MAX:
        laid = text.ljust(point, "0") if count <= point else f"{text[:point]}.{text[point:]}"
    elif -_PLAIN_ZEROS_MAX < point <= 0:
        laid = f"0.{'0' * -point}{text}"
    else:
        laid = f"{text[0]}{'.' if count > 1 else ''}{text[1:]}e{point - 1:+d}"
    return f"-{laid}" if sign else laid
