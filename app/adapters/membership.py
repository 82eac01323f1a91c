"""Membership: whether this process may still believe that it is a member of its consumer group.

A process that was frozen, or cut off, longer than the session timeout has been expelled, its partitions are another's,
and it does not know. So belief is a lease: it lasts for the session timeout from the last heartbeat that the group
answered, by a clock that goes on while the process stands still. Whoever was expelled comes back under another member
id, and must take nothing for still its own.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

from faust.types import AppT

_COMEBACKS_MAX: Final = 3
_COMEBACKS_WITHIN_S: Final = 60.0


class Membership:
    """One process's membership. ``lease_s`` is the group's session timeout; written by the consumer's thread."""

    def __init__(self, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._confirmed_s: float | None = None
        self._comebacks: deque[float] = deque(maxlen=_COMEBACKS_MAX)
        self._left = False
        self._stood_when_refused: bool | None = None
        self.member_id = ""
        self.generation = 0

    def now(self) -> float:
        """The lease's clock, to be read before a heartbeat is sent."""
        return self._clock()

    def confirm(self, sent_s: float) -> None:
        """The group answered a heartbeat that was sent at ``sent_s``."""
        self._confirmed_s = sent_s
        self._stood_when_refused = None

    def refuse(self) -> None:
        """The group did not take a heartbeat."""
        if self._stood_when_refused is None:
            self._stood_when_refused = self.stands

    def join(self, member_id: str, generation: int) -> bool:
        """The group is joined, in its ``generation``; False after so many expulsions that something is wrong.

        Of two processes under one instance name each expels the other, again and again, while its lease runs; one that
        stood still for longer than that was expelled for it.
        """
        now = self._clock()
        if self.member_id and member_id != self.member_id and self._stood_when_refused is not False:
            self._comebacks.append(now)
        self._stood_when_refused = None
        self.member_id, self.generation = member_id, generation
        self._confirmed_s = now
        often = len(self._comebacks) == _COMEBACKS_MAX
        return not (often and now - self._comebacks[0] < _COMEBACKS_WITHIN_S)

    def leave(self) -> None:
        """This process gives its membership up, for good."""
        self._left = True

    @property
    def stands(self) -> bool:
        """Whether the lease runs, or none was ever begun; never again once it was given up."""
        if self._left:
            return False
        return self._confirmed_s is None or self._clock() - self._confirmed_s < self._lease_s


_MEMBERSHIPS: Final["WeakKeyDictionary[AppT, Membership]"] = WeakKeyDictionary()


def membership(app: AppT) -> Membership:
    """The app's membership."""
    found = _MEMBERSHIPS.get(app)
    if found is None:
        found = _MEMBERSHIPS[app] = Membership(app.conf.broker_session_timeout)
    return found
