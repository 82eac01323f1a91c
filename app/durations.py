"""Durations as people write them: ``80ms``, ``2s``, ``15m``, ``1h``, ``30d``; inside, whole milliseconds."""

import re
from typing import Annotated, Final

from pydantic import BeforeValidator

_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse_duration_ms(text: object) -> int:
    """Whole milliseconds of ``text``; ValueError for anything but one number and one unit.

    >>> parse_duration_ms("80ms"), parse_duration_ms("1.5s"), parse_duration_ms("30d")
    (80, 1500, 2592000000)
    """
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write a number and a unit, as 80ms, 2s, 15m, 1h or 30d")
    return round(float(match[1]) * _UNITS_MS[match[2]])


def format_duration(milliseconds: int) -> str:
    """The shortest exact text of a duration.

    >>> format_duration(900_000), format_duration(1500)
    ('15m', '1500ms')
    """
    for unit in ("d", "h", "m", "s"):
        if milliseconds and milliseconds % _UNITS_MS[unit] == 0:
            return f"{milliseconds // _UNITS_MS[unit]}{unit}"
    return f"{milliseconds}ms"


def _duration_or_ms(value: object) -> int:
    # A whole number is what a revision read back from the registry topic holds.
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return parse_duration_ms(value)


DurationMs = Annotated[int, BeforeValidator(_duration_or_ms)]
"""A pydantic field: a duration's text in, milliseconds held."""
