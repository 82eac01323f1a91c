"""Which offsets of a dead-letter partition were sent again, small enough to be kept in a consumer group's commit.

Everything below ``upto``, and single offsets beyond it: a letter may be redriven before its elders. ``upto`` is what
the group commits; what lies beyond goes into the commit's metadata, as ranges. So the position says the same to every
tool, and nothing has to be kept elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

METADATA_CHARACTERS_MAX: Final = 4_000
"""Kafka takes 4,096 bytes (``offset.metadata.max.bytes``)."""


@dataclass(frozen=True, slots=True)
class Redriven:
    """Offsets that were sent again: each below ``upto``, and those of ``beyond``, all of which are above it.

    >>> some = Redriven(5).adding(7).adding(8)
    >>> some.upto, some.metadata, 4 in some, 5 in some, 8 in some
    (5, '7-8', True, False, True)
    >>> some.adding(5).adding(6)
    Redriven(upto=9, beyond=frozenset())
    """

    upto: int
    beyond: frozenset[int] = frozenset()

    def __contains__(self, offset: int) -> bool:
        """Whether ``offset`` was sent again."""
        return offset < self.upto or offset in self.beyond

    def adding(self, offset: int) -> Self:
        """The same and ``offset``."""
        if offset in self:
            return self
        return type(self)(self.upto, self.beyond | {offset}).from_at_least(self.upto)

    def from_at_least(self, offset: int) -> Self:
        """The same, with everything below ``offset`` counted as sent: it is no longer there.

        >>> Redriven(2, frozenset({4, 5, 9})).from_at_least(4)
        Redriven(upto=6, beyond=frozenset({9}))
        """
        upto = max(self.upto, offset)
        while upto in self.beyond:
            upto += 1
        return type(self)(upto, frozenset(each for each in self.beyond if each > upto))

    @property
    def metadata(self) -> str:
        """``beyond`` as text, for ``read``.

        Raises:
            ValueError: it does not fit into a commit; the message says what to do.
        """
        text = ",".join(f"{first}-{last}" if first < last else str(first) for first, last in self._ranges())
        if len(text) > METADATA_CHARACTERS_MAX:
            raise ValueError("too many letters were redriven out of order: redrive the rest of the topic first")
        return text

    def _ranges(self) -> Iterator[tuple[int, int]]:
        first = last = None
        for offset in sorted(self.beyond):
            if first is None or last is None:
                first = last = offset
            elif offset == last + 1:
                last = offset
            else:
                yield first, last
                first = last = offset
        if first is not None and last is not None:
            yield first, last

    @classmethod
    def read(cls, upto: int, metadata: str) -> Self:
        """What a commit says; metadata that this module did not write says nothing.

        >>> Redriven.read(5, "7-8,12").metadata, Redriven.read(5, "by hand").beyond
        ('7-8,12', frozenset())
        """
        beyond: set[int] = set()
        for part in metadata.split(",") if metadata else ():
            first, _, last = part.partition("-")
            if not first.isdecimal() or (last and not last.isdecimal()):
                return cls(upto)
            beyond.update(range(int(first), int(last or first) + 1))
        return cls(upto, frozenset(beyond)).from_at_least(upto)
