"""Paths: which route a request's path belongs to, found segment by segment in a tree.

A literal segment is tried before a placeholder at each place, so the most specific path wins, and a request costs as
many steps as its path has segments, however many routes there are.
"""

import re
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_PLACEHOLDER: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


def placeholders_of(path: str) -> tuple[str, ...]:
    """The names of a route's placeholders, in order; each is one whole segment.

    Raises:
        ValueError: a placeholder is not a whole segment, or is named twice.

    >>> placeholders_of("/credit/{product}")
    ('product',)
    """
    names: list[str] = []
    for segment in path.split("/"):
        placeholder = _PLACEHOLDER.fullmatch(segment)
        if placeholder is None:
            if "*" in segment:
                raise ValueError(f"segment {segment!r}: prefixes are not supported yet")
            if "{" in segment or "}" in segment:
                raise ValueError(f"segment {segment!r}: a placeholder is a whole segment, as in /credit/{{product}}")
        elif placeholder[1] in names:
            raise ValueError(f"placeholder {placeholder[1]} is named twice; give each a name of its own")
        else:
            names.append(placeholder[1])
    return tuple(names)


class PathTree(Generic[T]):
    """What belongs to each path; built once, then only read.

    >>> tree = PathTree([("/credit/{product}", "any"), ("/credit/card", "card")])
    >>> tree.match("/credit/card"), tree.match("/credit/loan"), tree.match("/credit")
    (('card', ()), ('any', ('loan',)), None)
    """

    __slots__ = ("_end", "_literals", "_placeholder")

    def __init__(self, entries: Iterable[tuple[str, T]] = ()) -> None:
        self._literals: dict[str, PathTree[T]] = {}
        self._placeholder: PathTree[T] | None = None
        self._end: list[T] = []
        for path, value in entries:
            node = self
            for segment in path.split("/"):
                node = node._child(segment)
            # Of two equal paths the first counts; the registry refuses the second.
            node._end = node._end or [value]

    def _child(self, segment: str) -> "PathTree[T]":
        if not _PLACEHOLDER.fullmatch(segment):
            return self._literals.setdefault(segment, PathTree())
        if self._placeholder is None:
            self._placeholder = PathTree()
        return self._placeholder

    def match(self, path: str) -> tuple[T, tuple[str, ...]] | None:
        """What belongs to ``path``, and the segments that its placeholders stand for; None: nothing does."""
        return self._match(path.split("/"), 0, ())

    def _match(self, segments: list[str], at: int, bound: tuple[str, ...]) -> tuple[T, tuple[str, ...]] | None:
        if at == len(segments):
            return (self._end[0], bound) if self._end else None
        segment = segments[at]
        literal = self._literals.get(segment)
        found = literal._match(segments, at + 1, bound) if literal is not None else None
        if found is None and self._placeholder is not None and segment:
            found = self._placeholder._match(segments, at + 1, (*bound, segment))
        return found
