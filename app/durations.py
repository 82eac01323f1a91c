"""Durations as people write them: ``80ms``, ``2s``, ``15m``, ``1h``, ``30d``; inside, whole milliseconds."""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse_duration_ms(text: object) -> int:
    """Whole milliseconds of ``text``; ValueError for anything but one number and one unit.

    >>> parse_duration_ms("80ms"), parse_duration_ms("1.5s"), parse_duration_ms("30d")
    (80, 1500, 2592000000)
    """
    milliseconds = _milliseconds(text) if isinstance(text, str) else None
    if milliseconds is None:
        raise ValueError(f"{text!r} is not a duration: write a number and a unit, as 80ms, 2s, 15m, 1h or 30d")
    return milliseconds


# A registry of thousands of documents names the same few durations many thousand times.
@lru_cache(maxsize=1_024)
def _milliseconds(text: str) -> int | None:
    match = _DURATION.fullmatch(text)
    return None if match is None else round(Fraction(match[1]) * _UNITS_MS[match[2]])


@lru_cache(maxsize=1_024)
def format_duration(milliseconds: int) -> str:
    """The shortest exact text of a duration.

    >>> format_duration(900_000), format_duration(1500)
    ('15m', '1500ms')
    """
    for unit in ("d", "h", "m", "s"):
        if milliseconds and milliseconds % _UNITS_MS[unit] == 0:
            return f"{milliseconds // _UNITS_MS[unit]}{unit}"
    return f"{milliseconds}ms"


def spoken_duration(milliseconds: int) -> str:
    """About how long, for people: whole seconds, rounded up, or from an hour on whole minutes.

    >>> [spoken_duration(each) for each in (1, 59_900, 1_255_661, 3_600_000, 93_660_000)]
    ['1s', '1m', '20m56s', '1h', '1d2h1m']
    """
    step_ms = 1_000 if milliseconds <= _UNITS_MS["h"] else _UNITS_MS["m"]
    left = -(-milliseconds // step_ms) * step_ms
    parts = []
    for unit in ("d", "h", "m", "s"):
        count, left = divmod(left, _UNITS_MS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def _duration_or_ms(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return parse_duration_ms(value)


DurationMs = Annotated[int, BeforeValidator(_duration_or_ms)]
"""A setting: a duration's text in from the environment, whole milliseconds from code; milliseconds held."""

WrittenDurationMs = Annotated[
    int, BeforeValidator(parse_duration_ms), PlainSerializer(format_duration, return_type=str, when_used="json")
]
"""A document's field: a duration's text in and, in its shortest form, out; milliseconds held. A number has no unit."""


def within(least: str, most: str) -> AfterValidator:
    """The bounds of a ``WrittenDurationMs``, both included."""
    least_ms, most_ms = parse_duration_ms(least), parse_duration_ms(most)

    def checked(milliseconds: int) -> int:
        if not least_ms <= milliseconds <= most_ms:
            raise ValueError(f"a duration from {least} to {most} is allowed here")
        return milliseconds

    return AfterValidator(checked)
