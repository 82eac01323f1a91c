"""Who moves rollouts: everybody's windows in; the next revision, and a record in the audit of why, out.

Every rollouts worker counts (``windows``). The one that owns partition 0 also judges, once a second: it follows
everybody's windows, holds each rollout's step against its bounds, and moves it by publishing the next revision.

**The revision is the truth.** A step is in the revision and changes by compare-and-swap, so two workers that both
believe to be the one cannot both move it, and one that starts again finds the step where it is.

**Every step is told in the audit.** The record is written to the table before its revision is published, and sent
after; one that was published and not told, because the worker died in between, is sent again, the same bytes under the
same id. What others moved (``apply`` begins rollouts, operators pause them) is told when nobody else does. Records of
rollouts go to partition 0, so the worker that judges reads there which of them are told.

A rollout goes on only when everything that the log held at the end of its step is counted; it is taken back as soon as
a bound is broken for certain.

**Where what was published last is refused**, workers decide by the last good revision, and so does the judge: what is
bad is taken back all the same, by the next revision after the last good one. Nothing goes on meanwhile: whoever wrote
what is refused meant something by it.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

import structlog
from prometheus_client import Counter, Gauge

from app.adapters.record_codec import decode_record, encode_record
from app.adapters.rollout_records import JUDGING_PARTITION, audit_record
from app.agents.windows import ALL, WindowTable
from app.domain.errors import DocumentsRefused, HeadRefused, NotOwner, PublishFailed, RevisionConflict, StoreUnavailable
from app.domain.registry import Revision, restated
from app.domain.rollout_stats import StepStats
from app.domain.rollouts import (
    Abort,
    Running,
    Stay,
    Verdict,
    action_of,
    follow,
    judge_in,
    moved,
    record_id,
    rollouts_in,
    step_record,
)
from app.domain.windows import (
    comparisons,
    oldest_kept,
    read_intent,
    read_shadow_key,
    step_key,
    step_stats,
    write_intent,
)
from app.ports.clock import Clock
from app.ports.log import Publisher
from app.ports.registry import Registry

log = structlog.get_logger()

TICK_S: Final = 1.0
TELL_AFTER_MS: Final = 5_000
"""Who moved a rollout tells of it within this, unless it died."""
HELD_MS: Final = 10_000
"""Where what was published last is refused, it is looked after this long whether a rollout may go on."""
_SHOW_EVERY_MS: Final = 5_000
_MARK_KEPT_MS: Final = 60_000

_FLIP_RATE = Gauge(
    "broker_shadow_flip_rate",
    "The share of decisions that a shadow would have changed, of the last hour",
    ["route", "task", "version", "segment"],
)
_PSI = Gauge(
    "broker_shadow_psi",
    "The population stability index of a shadow's scores against the champion's, of the last hour",
    ["route", "task", "version", "segment", "output"],
)
_DIFFERENCE = Gauge(
    "broker_shadow_score_difference",
    "How far a shadow's score lies from the champion's on average, of the last hour",
    ["route", "task", "version", "segment", "output"],
)
_PERCENT = Gauge(
    "broker_rollout_percent",
    "The part of the subjects that a rollout's version has",
    ["route", "rule", "task", "version"],
)
_SHADOW_GAUGES: Final = (_FLIP_RATE, _PSI, _DIFFERENCE)
_STEPS = Counter("broker_rollout_steps", "Steps of rollouts that this worker made, by what was done", ["action"])
_HELD = Counter(
    "broker_rollout_moves_held",
    "Moves that were due and not made, as what was published last in the registry is refused",
    ["action"],
)


class AllWindows(Protocol):
    """The windows of every partition, and how far the log is counted."""

    @property
    def partitions(self) -> Mapping[int, Mapping[str, bytes]]:
        """Every partition's entries, by key."""
        ...

    async def ends(self) -> Mapping[int, int]:
        """Where the log ends in each partition. Raises StoreUnavailable."""
        ...

    async def reached(self, ends: Mapping[int, int]) -> bool:
        """Whether all records before ``ends`` are counted and the windows that count them are here.

        Raises:
            StoreUnavailable: Kafka does not say.
        """
        ...


class PublishNext(Protocol):
    """Publishes by compare-and-swap; it blocks, and is run in a thread."""

    def __call__(self, revision: Revision, *, before: str, now_ms: int, message: str, over_refused: bool) -> object:
        """Publish ``revision``, made from ``before``; ``over_refused``: even if what was published last is refused.

        Raises:
            RevisionConflict: workers go by another revision by now.
            HeadRefused: what was published last is refused.
            StoreUnavailable, PublishFailed: Kafka does not answer, or did not confirm.
        """
        ...


class Judge:
    """Moves rollouts, on the worker that owns partition 0."""

    def __init__(
        self,
        *,
        table: WindowTable,
        windows: AllWindows,
        registry: Registry,
        publisher: Publisher,
        publish_next: PublishNext,
        clock: Clock,
        audit_topic: str,
        registry_topic: str,
    ) -> None:
        self._table = table
        self._windows = windows
        self._registry = registry
        self._publisher = publisher
        self._publish_next = publish_next
        self._clock = clock
        self._audit_topic = audit_topic
        self._registry_topic = registry_topic
        self._fences: dict[str, Mapping[int, int]] = {}
        self._tell_at: dict[str, int] = {}
        self._intended: dict[str, int] = {}
        self._shown_ms = 0
        self._held_until_ms = 0

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.tick()
            except (StoreUnavailable, PublishFailed, NotOwner, DocumentsRefused) as error:
                log.warning("rollouts_wait", reason=str(error))

    async def tick(self) -> None:
        """Look at every rollout once, and move one of them at most: the next one needs the next revision.

        Raises:
            StoreUnavailable, PublishFailed, NotOwner, DocumentsRefused: what was begun is taken up by a later tick,
                here or elsewhere.
        """
        await self._purge()
        revision = self._registry.current
        if revision is None or not (self._table.recovered and self._table.owns(JUDGING_PARTITION)):
            self._fences.clear()
            self._tell_at.clear()
            self._intended.clear()
            self._shown_ms = 0
            _clear(_PERCENT, *_SHADOW_GAUGES)
            return
        rollouts = tuple(rollouts_in(revision.documents))
        self._show(rollouts)
        await self._tell(revision, rollouts)
        current = {running.step_id for running in rollouts}
        for identity in self._fences.keys() - current:
            del self._fences[identity]
        for running in rollouts:
            if await self._moves(revision, running):
                return

    async def _moves(self, revision: Revision, running: Running) -> bool:
        verdict, stats = self._judged(revision, running)
        if not isinstance(verdict, Stay | Abort):
            if self._clock.now_ms() < self._held_until_ms:
                return False
            # Going on is judged by all that the log held when the step's time was up, not by what was counted by then.
            fence = self._fences.get(running.step_id)
            if fence is None:
                self._fences[running.step_id] = await self._windows.ends()
                return False
            if not await self._windows.reached(fence):
                return False
            verdict, stats = self._judged(revision, running)
        if isinstance(verdict, Stay):
            self._fences.pop(running.step_id, None)
            return False
        now_ms = self._clock.now_ms()
        return await self._move(revision, replace(running, status=follow(running, verdict, now_ms)), stats, now_ms)

    def _judged(self, revision: Revision, running: Running) -> tuple[Verdict, StepStats]:
        """What follows now, and from which figures."""
        stats, now_ms = step_stats(self._windows.partitions.values(), running.step_id), self._clock.now_ms()
        return judge_in(revision, running, stats, now_ms), stats

    async def _move(self, revision: Revision, after: Running, stats: StepStats, now_ms: int) -> bool:
        following = await asyncio.to_thread(restated, revision, moved(revision.documents, after.name, after.status))
        record = step_record(
            after, revision=following.id, previous=revision.id, stats=stats, source_topic=self._registry_topic
        )
        encoded = encode_record(record)
        await self._table.put(JUDGING_PARTITION, f"intent|{record.execution_id}", write_intent(following.id, encoded))
        self._intended[record.execution_id] = now_ms
        try:
            message = f"rollout {after.name}: {action_of(after.status)}, {after.percent} %: {after.status.reason}"
            await asyncio.to_thread(
                self._publish_next,
                following,
                before=revision.id,
                now_ms=now_ms,
                message=message,
                over_refused=after.status.state == "aborted",
            )
        except RevisionConflict as error:
            log.info("rollout_overtaken", rollout=str(after.name), reason=str(error))
            return True
        except HeadRefused as error:
            action = action_of(after.status)
            _HELD.labels(action).inc()
            said = {"rollout": str(after.name), "action": action, "reason": str(error)}
            log.error("rollout_held", **said)  # noqa: TRY400 - one clear line, not a trace
            self._held_until_ms = now_ms + HELD_MS
            return True
        log.info(
            "rollout_moved",
            rollout=str(after.name),
            action=action_of(after.status),
            step=after.status.step,
            percent=after.percent,
            reason=after.status.reason,
            revision=following.id,
            previous=revision.id,
        )
        _STEPS.labels(action_of(after.status)).inc()
        await self._send(record.execution_id, record.request_id, encoded)
        return True

    # --- telling ------------------------------------------------------------------------------------------------------

    async def _tell(self, revision: Revision, rollouts: Sequence[Running]) -> None:
        """Send what was published and is not told in the audit: our own records first, then others' in our words."""
        now_ms = self._clock.now_ms()
        entries = dict(self._table.entries(JUDGING_PARTITION))
        current = {record_id(running.name, running.status): running for running in rollouts}
        for identity in self._tell_at.keys() - current.keys():
            del self._tell_at[identity]
        for identity in [each for each in self._intended if f"intent|{each}" not in entries]:
            del self._intended[identity]
        for key, entry in entries.items():
            kind, _, identity = key.partition("|")
            if kind == "told" and identity not in current:
                # What is told may be of a revision that is not here yet.
                if now_ms - int(entry) >= _MARK_KEPT_MS:
                    await self._table.put(JUDGING_PARTITION, key, None)
            elif kind == "intent" and f"told|{identity}" not in entries:
                await self._tell_intended(key, identity, entry, identity in current, now_ms)
        for identity, running in current.items():
            if f"told|{identity}" in entries or f"intent|{identity}" in entries:
                self._tell_at.pop(identity, None)
                continue
            # Nobody but this worker tells of a start; who gives an order tells of it.
            begins = action_of(running.status) == "start"
            if now_ms >= self._tell_at.setdefault(identity, now_ms if begins else now_ms + TELL_AFTER_MS):
                record = step_record(
                    running, revision=revision.id, previous=None, stats=None, source_topic=self._registry_topic
                )
                await self._send(identity, record.request_id, encode_record(record))
                self._tell_at[identity] = now_ms + TELL_AFTER_MS

    async def _tell_intended(self, key: str, identity: str, entry: bytes, holds: bool, now_ms: int) -> None:
        """An intent that is not told: send it once it is known to be published, forget it if it never was."""
        since = self._intended.setdefault(identity, now_ms)
        if now_ms - since < TELL_AFTER_MS:
            return
        published, encoded = read_intent(entry)
        if holds or await asyncio.to_thread(self._registry.get, published) is not None:
            await self._send(identity, decode_record(encoded).request_id, encoded)
            self._intended[identity] = now_ms
        elif now_ms - since >= _MARK_KEPT_MS:
            await self._table.put(JUDGING_PARTITION, key, None)
            del self._intended[identity]

    async def _send(self, identity: str, request_id: str, encoded: bytes) -> None:
        await self._publisher.publish([audit_record(self._audit_topic, identity, request_id, encoded)])

    # --- keeping house ------------------------------------------------------------------------------------------------

    async def _purge(self) -> None:
        """Delete windows of our partitions that nobody will ask for."""
        revision = self._registry.current
        if revision is None or not self._table.recovered:
            return
        steps = {step_key(running.step_id) for running in rollouts_in(revision.documents)}
        oldest = oldest_kept(self._clock.now_ms())
        for partition in self._windows.partitions:
            if not self._table.owns(partition):
                continue
            for key, _ in list(self._table.entries(partition)):
                named = read_shadow_key(key)
                if (key.startswith("step|") and key not in steps) or (named is not None and named[1] < oldest):
                    await self._table.put(partition, key, None)

    def _show(self, rollouts: Iterable[Running]) -> None:
        _clear(_PERCENT)
        for running in rollouts:
            name = running.name
            _PERCENT.labels(name.route, name.rule, name.task, running.rollout.to).set(running.percent)
        now_ms = self._clock.now_ms()
        if now_ms - self._shown_ms < _SHOW_EVERY_MS:
            return
        self._shown_ms = now_ms
        found = comparisons(self._windows.partitions.values(), oldest_kept(now_ms))
        _clear(*_SHADOW_GAUGES)
        for shadow, comparison in found.items():
            for segment, account in ((ALL, comparison.overall), *comparison.segments.items()):
                labels = (shadow.route, shadow.task, shadow.version, segment)
                if account.flip_rate is not None:
                    _FLIP_RATE.labels(*labels).set(account.flip_rate)
                for output, pairs in account.outputs.items():
                    if pairs.psi is not None:
                        _PSI.labels(*labels, output).set(pairs.psi)
                    _DIFFERENCE.labels(*labels, output).set(pairs.mean_difference or 0.0)


def _clear(*gauges: Gauge) -> None:
    for gauge in gauges:
        gauge.clear()
