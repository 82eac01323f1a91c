"""Names that the registry may still learn: how long each is waited for, by whoever reads what names them.

Something may overtake the revision that declares what it names, so an unknown name is worth a wait, once. Whoever goes
on asking for it has a wrong name, and must hold nobody else up: as long as it is asked for, it gets no second grace.
Nor do ever new names: all of them together are waited for as long as one, until nobody has waited for a while.
"""

from dataclasses import dataclass
from typing import Final

FORGOTTEN_MS: Final = 60_000
"""A name that nobody asked for in so long is new again: its revision may be on its way now."""
_APART_MS: Final = 1_000
"""Who waits asks again sooner than this."""
NAMES_MAX: Final = 1_000
"""Names remembered, each of some hundred bytes; past it further ones get no grace, for they are no oversight."""


@dataclass(slots=True)
class _Asked:
    first_ms: float
    last_ms: float


class Graces:
    """The grace of each unknown name: ``grace_ms`` from when it is first asked for. Times are steady milliseconds."""

    def __init__(self, grace_ms: int, *, forgotten_ms: int = FORGOTTEN_MS, names_max: int = NAMES_MAX) -> None:
        self._grace_ms = grace_ms
        self._forgotten_ms = forgotten_ms
        self._names_max = names_max
        self._asked: dict[str, _Asked] = {}
        self._waited_ms: float | None = None
        self._spent_ms = 0.0

    def ask(self, name: str, now_ms: float, *, waits: bool = True) -> bool:
        """Whether the unknown ``name`` is worth a wait at ``now_ms``.

        Who would not wait says ``waits=False``: that spends nothing, and takes no name's place, but a name that has had
        its grace stays known by it.

        >>> graces = Graces(5_000)
        >>> [graces.ask("v", at) for at in (0, 4_999, 5_000, 64_999, 130_000)]
        [True, True, False, False, True]
        """
        asked = self._asked.pop(name, None)
        if asked is None or now_ms - asked.last_ms >= self._forgotten_ms:
            if not waits:
                return False
            self._forget(now_ms)
            if len(self._asked) >= self._names_max:
                return False
            asked = _Asked(now_ms, now_ms)
        asked.last_ms = now_ms
        # At the end: those that were not asked for lately come first.
        self._asked[name] = asked
        return waits and now_ms - asked.first_ms < self._grace_ms and self._spend(now_ms)

    def _spend(self, now_ms: float) -> bool:
        """Whether there is time left that all names share; counts what has been waited since the last time."""
        since_ms = self._forgotten_ms if self._waited_ms is None else now_ms - self._waited_ms
        if since_ms >= self._forgotten_ms:
            self._spent_ms = 0.0
        elif since_ms < _APART_MS:
            self._spent_ms += since_ms
        if self._spent_ms >= self._grace_ms:
            return False
        self._waited_ms = now_ms
        return True

    def _forget(self, now_ms: float) -> None:
        for name, asked in tuple(self._asked.items()):
            if now_ms - asked.last_ms < self._forgotten_ms:
                break
            del self._asked[name]
