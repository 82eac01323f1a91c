"""A live request: everything that one worker knows of a request while it is being decided there."""

import asyncio
from dataclasses import dataclass, field, replace

from app.domain.decisions import DecisionRecord
from app.domain.errors import NotOwner
from app.domain.features import FetchedFeatures, TaskInputs
from app.domain.join import Join, Outcome
from app.domain.requests import Request
from app.domain.routing import Plan, TaskPlan


@dataclass(slots=True)
class Live:
    """One request while it is being decided here; between awaits it is changed by one thing at a time.

    ``tasks``: each task as it stands, with the version that is asked by now. ``begun``: the tasks that were begun here.
    ``asked``: since when (epoch milliseconds) a queued task is out; ``unacknowledged``: the tasks and versions of those
    that Kafka has not acknowledged so far; ``named``: the tasks and versions of the entry in the table. ``look_ms``:
    when a timer looks for silent pools. ``called``: the version that is called for an inline task, and since when.
    ``gained_ms``: since when it is this worker's, where another had begun it; before ``patient_ms`` no pool counts as
    silent, for what was answered while nobody listened is still to be read. ``fetched``: the stored features, where
    this worker fetched them; ``inputs`` by task and version.

    ``counted``: it takes a pending join's place. ``durable``: its pending join is in the table. ``outcome``: its join
    has decided. ``concluding``: its decision is being written. ``abandoned``: the partition went away, and even if it
    came back, another Live stands for the request by now. ``writing`` is held while its entry is written, for a write
    that is tried again must not land on a later one.
    """

    record: DecisionRecord
    request: Request | None = None
    plan: Plan | None = None
    join: Join | None = None
    tasks: dict[str, TaskPlan] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    asked: dict[str, int] = field(default_factory=dict)
    unacknowledged: set[tuple[str, str]] = field(default_factory=set)
    named: frozenset[tuple[str, str]] = frozenset()
    look_ms: int | None = None
    called: dict[str, tuple[str, int]] = field(default_factory=dict)
    gained_ms: int = 0
    patient_ms: int = 0
    fetched: FetchedFeatures | None = None
    inputs: dict[tuple[str, str], TaskInputs] = field(default_factory=dict)
    outcome: Outcome | None = None
    counted: bool = False
    durable: bool = False
    concluding: bool = False
    abandoned: bool = False
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    enough: "asyncio.Future[None] | None" = None
    """Done once the join has decided, for those who wait for no more than that."""
    done: "asyncio.Future[DecisionRecord] | None" = None

    @property
    def partition(self) -> int:
        """The partition of its request."""
        return self.record.source.partition

    def check(self) -> None:
        """Raise NotOwner where another Live stands for the request."""
        if self.abandoned:
            raise NotOwner(f"{self.record.request_id} was begun anew after a rebalance")

    def seen(self) -> Request:
        """The request as features see it: the path's placeholders are metadata."""
        assert self.request is not None  # noqa: S101 - what was planned was read
        assert self.plan is not None  # noqa: S101 - only planned requests have features
        return replace(self.request, metadata=self.plan.metadata)
