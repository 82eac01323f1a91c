"""What the patterns of ``matches`` may cost.

The engine matches in linear time, but by an automaton that it makes anew at each evaluation, of a size that the
pattern need not show: counted repetitions are unrolled, and a class such as ``\\w`` is hundreds of ranges. So what is
bounded is the size of the pattern as it is unrolled. That can be told only of patterns that are written out. Each is
given as a ``Match``, with how many texts it is held against at once, joined by ``+``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from app.domain.expression_syntax import Node

_LENGTH_MAX: Final = 500
"""Characters of all the patterns of one expression, as they are written."""
_SIZE_MAX: Final = 500
"""The size of all of them, unrolled: a fifth of a second on 10,000 characters of many alphabets."""
_WIDE: Final = 5
"""The size of what many alphabets are in: ``.``, ``[^…]``, and classes by name, as ``\\w``."""
_CAPTURE: Final = 3
"""The size of a group that captures: its places are kept for every part."""
_WALKED_LENGTH_MAX: Final = 30
"""Characters of all the patterns that walks of one expression match."""
_COSTLY_IN_WALKS: Final = re.compile(r"\{|\\[^.^$*+?()\[\]{}|\\/-]|\(\?")
_BY_NUMBER: Final = re.compile(r"\\[xXuU0-7]")
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_CONTROLS: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_IN_BOTH_CASES: Final = "(?i)"
_PART: Final = re.compile(
    r"""(?P<class> \[\^?\]? (?: \\. | \[:\^?[a-z]+:\] | [^\[\]\\] )* \] )
    | (?P<named> \\[pP](?:\{[^{}]*\}|.) | \\[bB]\{[a-z-]+\} | \\[A-Za-z<>] )
    | (?P<escaped> \\. )
    | (?P<opens> \(\?: | \((?!\?) )
    | (?P<closes> \) )
    | (?P<counted> \{(?P<low>[0-9]+)(?:,(?P<high>[0-9]*))?\} )
    | (?P<uncounted> [?*+] )
    | (?P<any> \. )
    | (?P<single> [^\[({\\] )""",
    re.VERBOSE | re.DOTALL,
)
_WIDE_CLASS: Final = re.compile(r"\[\^|\\[A-Za-z]|[^\x00-\x7f]|\[:\^")


@dataclass(frozen=True, slots=True)
class Match:
    """A pattern, as it is written, and of how many texts what it is held against is joined."""

    pattern: Node
    texts: int


def patterns_fault(matches: Sequence[Match]) -> str | None:
    """Why the patterns of an expression, those of all its ``matches``, could cost more than they show."""
    size = 0
    for each in matches:
        pattern = each.pattern
        if pattern.kind != "literal":
            return "matches has a pattern that is not written out as one text: who sends a pattern says what it costs"
        unrolled = None if _BY_NUMBER.search(pattern.names[0]) else unrolled_size(_written(pattern))
        if unrolled is None:
            return (
                "a pattern has characters by number, as \\x7b, flags other than (?i) at its beginning, a named group "
                "(?P<name>…), a class within a class, or braces that are no {n}: write characters as they are, at most "
                "by one backslash, groups as (…), and {n} without spaces"
            )
        size += unrolled * each.texts
    if size > _SIZE_MAX:
        return (
            f"patterns are {size} parts long, their repetitions {{n}} unrolled, of which ., [^…] and \\w and the like "
            f"count {_WIDE} each, and (…) {_CAPTURE}, but (?:…) one, all as often as texts are joined by + to be "
            f"matched; at most {_SIZE_MAX} in one expression: match less closely, or each text by itself"
        )
    length = sum(len(each.pattern.names[0]) for each in matches)
    if length > _LENGTH_MAX:
        return f"patterns have {length} characters; at most {_LENGTH_MAX} in one expression"
    return None


def walked_patterns_fault(matches: Sequence[Match]) -> str | None:
    """Why the patterns of all ``matches`` in walks cost too much to be made in every step."""
    length = sum(len(each.pattern.names[0]) * each.texts for each in matches if each.pattern.kind == "literal")
    if length <= _WALKED_LENGTH_MAX and all(map(_is_cheap, matches)):
        return None
    return (
        "matches makes its pattern anew in every step of a walk: write patterns there, of at most "
        f"{_WALKED_LENGTH_MAX} characters in one expression, as often as texts are joined by + to be matched, without "
        "{n}, (?…) and classes such as \\d ([0-9])"
    )


def unrolled_size(pattern: str) -> int | None:
    """How many parts a pattern has, its counted repetitions unrolled; None where it is not of the kind that is read.

    >>> unrolled_size("^[A-Z]{2}[0-9]{2}$"), unrolled_size("(?:ab|c){10}"), unrolled_size(r"(?:a|\\w?){10}")
    (6, 50, 90)
    >>> unrolled_size("a{ 3 }"), unrolled_size("(?x)a"), unrolled_size("[[a]]")
    (None, None, None)
    """
    in_both_cases = pattern.startswith(_IN_BOTH_CASES)
    at = len(_IN_BOTH_CASES) if in_both_cases else 0
    sizes, last = [0], 0
    captures: list[bool] = []
    while at < len(pattern):
        part = _PART.match(pattern, at)
        if part is None:
            return None
        at = part.end()
        match part.lastgroup:
            case "opens":
                sizes.append(0)
                captures.append(part[0] == "(")
                last = 0
                continue
            case "closes" if len(sizes) > 1:
                last = sizes.pop() + (_CAPTURE if captures.pop() else 1)
            case "closes":
                return None
            case "counted":
                # What is counted is there already, once.
                sizes[-1] -= last
                last *= max(int(part["low"]), int(part["high"] or 0), 1)
            case "uncounted":
                sizes[-1] -= last
                last += 1
            case "named" | "any":
                last = _WIDE
            case "class":
                last = _WIDE if _WIDE_CLASS.search(part[0]) else 1
            case _:
                last = 1
        sizes[-1] += last
    return sum(sizes) * (2 if in_both_cases else 1)


def _written(literal: Node) -> str:
    """The text that a literal stands for."""
    prefix, quoted = re.fullmatch(r"([bBrR]*)(.*)", literal.names[0], re.DOTALL).groups()  # type: ignore[union-attr]
    quotes = 3 if quoted[:3] in ('"""', "'''") and len(quoted) >= 6 else 1
    text = quoted[quotes:-quotes]
    if "r" in prefix.lower():
        return text
    return _ESCAPED.sub(lambda found: _CONTROLS.get(found[1], found[1]), text)


def _is_cheap(match: Match) -> bool:
    return match.pattern.kind == "literal" and _COSTLY_IN_WALKS.search(_written(match.pattern)) is None
