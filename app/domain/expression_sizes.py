"""What an expression may see: how large the values are that it looks at.

The engine copies what a ``map`` or ``filter`` has collected at each step, so a walk costs a list's length times all
that is in it; and what is looked at within a walk, beside its element, is copied once a step. So what an expression
sees is bounded by ``LIST_LENGTH_MAX``; what it does with it is ``expression_bounds``' part.
"""

from collections.abc import Mapping
from typing import Final

LIST_LENGTH_MAX: Final = 500
"""Elements of a list, or members of an object, that an expression sees: a walk over so many takes milliseconds.

A list of objects may be as long as costs the same: its length times all values in it is at most this, squared.
"""
_LENGTH_FLOOR: Final = 50
"""Shorter lists count as this long, so that a few elements do not hold a whole archive."""
_OBJECT_WEIGHT: Final = 4
"""What an object costs to copy beside its members, in numbers."""
_WORK_MAX: Final = LIST_LENGTH_MAX**2
OBJECT_VALUES_MAX: Final = 5_000
"""Values in an object that an expression looks at as a whole, as where it compares it or goes through its members."""
TEXT_LENGTH_MAX: Final = 10_000
"""Bytes of a text that an expression sees, in UTF-8: one a character of ASCII, four at most."""
NESTING_MAX: Final = 50
"""How deep lists and objects are within one another."""
SHORT_TEXT_MAX: Final = 250
"""Characters that are copied about as fast as a number; a text counts as one value more for each so many."""
LOOKUPS_MAX: Final = 4
"""Uses, in walks over an object's keys, of ``object[key]``, each of which copies the object."""
TABLE_VALUES_MAX: Final = 100
"""Values in a list or an object from outside that each step of a walk goes through."""
SEEN_MAX: Final = 150_000
"""Values that all expressions of a request see together, between two answers: to convert so many takes a quarter of a
second. More than a body holds, but what is looked at both by itself and as a part of something counts twice."""
_SCALARS: Final = frozenset({float, int, bool, type(None)})


def too_large(path: tuple[str, ...], value: object) -> str:
    """What is too large at or below ``path``, which ``value`` is at, and of which ``weight`` says None.

    >>> too_large(("inputs", "a"), {"b": [1] * 501})
    'inputs.a.b has 501 elements; an expression sees at most 500'
    """
    found, said = _too_large(path, value, 0)
    return f"{'.'.join(found)} {said}"


def weight(value: object, depth: int = 0) -> int | None:
    """How many values there are in ``value``, all that is within it included; None where anything is too large."""
    if isinstance(value, str | bytes):
        return 1 + len(value) // SHORT_TEXT_MAX if _bytes_of(value) <= TEXT_LENGTH_MAX else None
    if not isinstance(value, Mapping | list | tuple):
        return 1
    count = len(value)
    if count > LIST_LENGTH_MAX or depth == NESTING_MAX:
        return None
    in_object = isinstance(value, Mapping)
    total = 0
    for each in value.values() if isinstance(value, Mapping) else value:
        if type(each) in _SCALARS:
            total += 1
            continue
        within = weight(each, depth + 1)
        if within is None:
            return None
        total += within
    if in_object:
        return _OBJECT_WEIGHT + total if total <= OBJECT_VALUES_MAX else None
    return 1 + total if total <= _WORK_MAX // max(count, _LENGTH_FLOOR) else None


def _bytes_of(text: str | bytes) -> int:
    """How many bytes it has; of what is surely short or too long, without looking at each character."""
    if isinstance(text, bytes) or not TEXT_LENGTH_MAX // 4 < len(text) <= TEXT_LENGTH_MAX:
        return len(text)
    return len(text.encode(errors="surrogatepass"))


def _too_large(path: tuple[str, ...], value: object, depth: int) -> tuple[tuple[str, ...], str]:
    """Where what is too large is at or below ``path``, and what it has; ``weight`` says that something is."""
    if isinstance(value, str | bytes):
        return path, f"has {_bytes_of(value)} bytes; an expression sees at most {TEXT_LENGTH_MAX}"
    assert isinstance(value, Mapping | list | tuple)  # noqa: S101 - nothing else is ever too large
    if depth == NESTING_MAX:
        return path, f"is nested deeper than {NESTING_MAX} lists and objects, which no expression sees"
    count = len(value)
    if count > LIST_LENGTH_MAX:
        called = "members" if isinstance(value, Mapping) else "elements"
        return path, f"has {count} {called}; an expression sees at most {LIST_LENGTH_MAX}"
    total = 0
    for name, each in value.items() if isinstance(value, Mapping) else enumerate(value):
        within = weight(each, depth + 1)
        if within is None and isinstance(value, Mapping):
            return _too_large((*path, str(name)), each, depth + 1)
        if within is None:
            # Of what is in an element the list is told, which is what can be named.
            _, said = _too_large((), each, depth + 1)
            return path, f"holds what {said.removeprefix('holds what ')}"
        total += within
    if isinstance(value, Mapping):
        return path, f"has {total} values in it; an expression sees at most {OBJECT_VALUES_MAX}"
    said = f"has {count} elements with {total} values in them; of so many elements an expression sees"
    return path, f"{said} at most {_WORK_MAX // max(count, _LENGTH_FLOOR)} values"


def lookup_fault(value: object) -> str | None:
    """Why the object that a walk goes over may not be looked up by key at each step; None where it may."""
    count = weight(value)
    if not isinstance(value, Mapping) or (count is not None and len(value) * count * LOOKUPS_MAX <= _WORK_MAX):
        return None
    return f"has {len(value)} members, with too many values to be looked up by key in every step of a walk"


def table_fault(value: object) -> str | None:
    """Why ``value`` may not be gone through once a step of a walk; None where it may."""
    whole = weight(value)
    count = None if whole is None else whole - (_OBJECT_WEIGHT if isinstance(value, Mapping) else 1)
    if count is not None and count <= TABLE_VALUES_MAX:
        return None
    most = f"at most {TABLE_VALUES_MAX} values may be"
    return f"is gone through in every step of a walk, where {most}: it has {'more' if count is None else count}"


def single_fault(value: object) -> str | None:
    """Why ``value`` may not be looked at once a step of a walk; None where it may."""
    match value:
        case list() | tuple() | Mapping():
            kind = "an object" if isinstance(value, Mapping) else "a list"
            return f"is {kind}, and looked at as a whole in every step of a walk, where only single values may be"
        case str() | bytes() if len(value) > SHORT_TEXT_MAX:
            return f"has {len(value)} characters, and is looked at in every step of a walk: at most {SHORT_TEXT_MAX}"
    return None
