"""How far rollouts are, carried from one revision to the next.

Documents that people write say what is rolled out and how; how far it is belongs to the broker and lives in the
revision, as ``Route.status``. Whoever publishes documents takes the status over from the current revision: a rollout
that still is the same goes on where it is, a new or changed one begins, and one that is gone is forgotten. Where an
alias was moved from which a rollout leads, its steps so far were held against another version: it begins anew, or waits
at its first step if it was paused. What has ended stays ended, for an aborted version is no better by that.

Going back to an old revision must not resume its rollouts half way, on evidence of another day: those that moved then
are paused, for an operator to look at, and what was aborted since stays aborted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from app.domain.documents import Document, Model, Route
from app.domain.errors import Fault
from app.domain.registry import Source, rollout_digest
from app.domain.route_documents import RolloutStatus, RouteStatus

_Progress = Callable[[str, str, str], RolloutStatus | None]
"""The status of a rollout by its route, its RULE/TASK and its digest."""


def with_status(documents: Iterable[Document], before: Sequence[Document], now_ms: int) -> tuple[Document, ...]:
    """``documents`` with the status that follows from the revision ``before`` them; their own is not looked at."""
    written = tuple(documents)
    known, bases_then, bases = statuses_of(before), _bases_of(before), _bases_of(written)

    def progress(route: str, key: str, digest: str) -> RolloutStatus:
        status = known.get((route, key))
        if status is None or status.of != digest:
            return RolloutStatus(state="progressing", step=0, since=now_ms, of=digest)
        then, base = bases_then.get((route, key)), bases.get((route, key))
        if base == then or status.state in ("promoted", "aborted"):
            return status
        reason = f"begun anew: it leads from version {base}, and no longer from {then}"
        # A clock that went back must not give two steps one name.
        since = max(now_ms, status.since + 1)
        return status.model_copy(update={"step": 0, "since": since, "reason": reason})

    return tuple(_with_progress(written, progress))


def restored(
    documents: Iterable[Document], before: Sequence[Document], now_ms: int, *, reason: str
) -> tuple[Document, ...]:
    """The ``documents`` of an old revision with their status, as they are published again after ``before``.

    A rollout that was progressing is paused at its step, for ``reason``; a finished one is as it was then. A rollout
    aborted by now is not brought back.
    """
    old_documents = tuple(documents)
    old, known = statuses_of(old_documents), statuses_of(before)

    def progress(route: str, key: str, digest: str) -> RolloutStatus | None:
        status, now = old.get((route, key)), known.get((route, key))
        if status is None or status.of != digest:
            return None
        now = now if now is not None and now.of == digest else None
        if now is not None and now.state == "aborted":
            return now
        if status.state != "progressing":
            return status
        paused = RolloutStatus(state="paused", step=status.step, since=now_ms, of=digest, reason=reason)
        # Going back to where one is already changes nothing.
        return now if now is not None and now.model_copy(update={"since": now_ms}) == paused else paused

    return tuple(_with_progress(old_documents, progress))


def without_status(documents: Iterable[Document]) -> tuple[Document, ...]:
    """``documents`` as people wrote them."""
    return tuple(_unstated(each) if isinstance(each, Route) and each.status is not None else each for each in documents)


def statuses_of(documents: Iterable[Document]) -> Mapping[tuple[str, str], RolloutStatus]:
    """How far each rollout is, by its route's name and its ``RULE/TASK``."""
    return {
        (document.metadata.name, key): status
        for document in documents
        if isinstance(document, Route) and document.status is not None
        for key, status in document.status.rollouts.items()
    }


def _bases_of(documents: Iterable[Document]) -> Mapping[tuple[str, str], str | None]:
    """The version that each rollout leads from, by its route's name and its ``RULE/TASK``; None where there is none."""
    read = tuple(documents)
    aliases = {each.metadata.name: each.spec.aliases for each in read if isinstance(each, Model)}
    return {
        (document.metadata.name, f"{rule.name}/{task.name}"): (
            task.select.version if task.select.alias is None else aliases.get(task.model, {}).get(task.select.alias)
        )
        for document in read
        if isinstance(document, Route)
        for rule in document.spec.rules
        for task in rule.tasks
        if task.rollout is not None
    }


def status_faults(sources: Iterable[Source]) -> tuple[Fault, ...]:
    """A fault for each document that somebody wrote a status into."""
    return tuple(
        Fault(source.origin, _called(source), "status", "is kept by the broker; remove it")
        for source in sources
        if "status" in source.content and source.content.get("kind") == "Route"
    )


def _called(source: Source) -> str:
    metadata = source.content.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    return f"Route {name}" if isinstance(name, str) else "Route"


def _with_progress(documents: Iterable[Document], progress: _Progress) -> Iterator[Document]:
    for document in documents:
        if not isinstance(document, Route):
            yield document
            continue
        rollouts = {
            f"{rule.name}/{task.name}": rollout_digest(rule.name, task)
            for rule in document.spec.rules
            for task in rule.tasks
            if task.rollout is not None
        }
        found = ((key, progress(document.metadata.name, key, digest)) for key, digest in rollouts.items())
        statuses = {key: status for key, status in found if status is not None}
        if statuses:
            yield document.model_copy(update={"status": RouteStatus(rollouts=statuses)})
        else:
            yield document if document.status is None else _unstated(document)


def _unstated(route: Route) -> Route:
    # Rebuilt rather than set to None: what was not written is not in a revision.
    return Route(apiVersion=route.api_version, kind=route.kind, metadata=route.metadata, spec=route.spec)
