"""Paths: which route a request's path belongs to, found segment by segment in a tree.

At each place a literal segment is tried first, then a placeholder, then a prefix (``/credit/*``: whatever follows, one
segment at least), so the most specific path wins, and a request costs a few steps a segment, however many routes there
are.
"""

import re
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_PLACEHOLDER: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


def placeholders_of(path: str) -> tuple[str, ...]:
    """The names of a route's placeholders, in order; each is one whole segment.

    Raises:
        ValueError: a placeholder is not a whole segment, or is named twice; a ``*`` is not the whole last segment.

    >>> placeholders_of("/credit/{product}")
    ('product',)
    """
    names: list[str] = []
    segments = path.split("/")
    for place, segment in enumerate(segments, 1):
        placeholder = _PLACEHOLDER.fullmatch(segment)
        if placeholder is None:
            if "*" in segment and (segment != "*" or place < len(segments)):
                raise ValueError(f"segment {segment!r}: a * is the whole last segment, as in /credit/*")
            if "{" in segment or "}" in segment:
                raise ValueError(f"segment {segment!r}: a placeholder is a whole segment, as in /credit/{{product}}")
        elif placeholder[1] in names:
            raise ValueError(f"placeholder {placeholder[1]} is named twice; give each a name of its own")
        else:
            names.append(placeholder[1])
    return tuple(names)


class PathTree(Generic[T]):
    """What belongs to each path; built once, then only read.

    >>> tree = PathTree([("/credit/{product}", "any"), ("/credit/card", "card"), ("/credit/*", "rest")])
    >>> tree.match("/credit/card"), tree.match("/credit/loan"), tree.match("/credit")
    (('card', ()), ('any', ('loan',)), None)
    >>> tree.match("/credit/loan/car")
    ('rest', ())
    """

    __slots__ = ("_end", "_literals", "_placeholder", "_prefix")

    def __init__(self, entries: Iterable[tuple[str, T]] = ()) -> None:
        self._literals: dict[str, PathTree[T]] = {}
        self._placeholder: PathTree[T] | None = None
        # Lists of none or one: None is a value that may belong to a path.
        self._end: list[T] = []
        self._prefix: list[T] = []
        for path, value in entries:
            node = self
            parent, _, last = path.rpartition("/")
            for segment in (parent if last == "*" else path).split("/"):
                node = node._child(segment)
            # Of two equal paths the first counts; the registry refuses the second.
            if last == "*":
                node._prefix = node._prefix or [value]
            else:
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
        if found is None and self._prefix and any(segments[at:]):
            found = self._prefix[0], bound
        return found
