"""What is sound of a document with faults, so that one wrong scalar does not hide what else is wrong.

Each place that cannot be read is mended as lightly as helps: left out where the document may do without it, filled with
what stands for no knowledge (``is_unread``) where it may not, and only then is what holds it given up. The part that is
left has its kind's shape and goes through all the checks that whole documents go through; those leave alone what is
unread. It is never used for anything else.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
from pydantic import ValidationError

from app.domain.document_parts import API_VERSION
from app.domain.documents import Document

_UNREAD: Final = "unread0x"
_UNREAD_WHEN: Final = f"path != '{_UNREAD}'"
"""A condition that may hold or not; what is constant, or the same as another rule's, is a fault."""
_GONE: Final = object()
_MENDS_MAX: Final = 64
"""Rounds of mending; what is left of a document after so many is not looked through."""

Path = tuple[str | int, ...]


def is_unread(name: str | None) -> bool:
    """Whether a name, version, path or condition stands for one that could not be read."""
    return name is not None and _UNREAD in name


def sound_part(
    shape: type[Document], content: Mapping[str, Any], faulty: Sequence[Path]
) -> tuple[Document, Mapping[str, str]] | None:
    """The document, mended at the ``faulty`` paths, and what to call its fillers; None where no mending helps."""
    mender = _Mender(orjson.loads(orjson.dumps(content)))
    for _ in range(_MENDS_MAX):
        if not all(mender.mend(path) for path in faulty):
            return None
        mender.sweep()
        try:
            return shape.model_validate_json(orjson.dumps(mender.left)), mender.labels
        except ValidationError as error:
            faulty = [path_of(mender.left, detail["loc"]) for detail in details_of(error)]
    return None


def details_of(error: ValidationError) -> list[Any]:
    """What pydantic found, without echoes: it counts only sound items, and so calls a list too short for an odd one."""
    return [detail for detail in error.errors(include_url=False) if not _is_echo(detail)]


def _is_echo(detail: Any) -> bool:
    given = detail.get("input")
    return detail["type"] == "too_short" and isinstance(given, list) and len(given) >= detail["ctx"]["min_length"]


SCALAR_TYPES: Final = frozenset({"str", "int", "float", "bool"})


def path_of(content: object, location: Sequence[str | int]) -> Path:
    """The members and items that lead to pydantic's ``location``, which also names what of a union was tried."""
    path: list[str | int] = []
    here = content
    for part in location:
        if isinstance(part, int):
            if isinstance(here, dict):
                continue  # a lone item that needs no list around it
            here = here[part] if isinstance(here, list) and part < len(here) else None
            path.append(part)
            continue
        members = here if isinstance(here, dict) else {}
        tried = (part in SCALAR_TYPES or part.startswith("tuple[")) and part not in members
        tagged = part not in members and members.get("type") == part
        # pydantic's own words, as of a mapping's key, and the tags of our unions are written in brackets.
        if not part.startswith("[") and not tried and not tagged:
            here = members.get(part)
            path.append(part)
    return tuple(path)


class _Mender:
    """One document on its way to a part. ``labels``: what stood where each filler stands now."""

    def __init__(self, left: Any) -> None:
        self.left = left
        self.labels: dict[str, str] = {}
        self._mended: set[Path] = set()
        if left["kind"] == "Route":
            # Held against rollouts that may be unread.
            left.pop("status", None)

    def mend(self, path: Path) -> bool:
        """Mend what is wrong at ``path``, or else what holds it; False where nothing is left to try."""
        if any(path[:end] in self._mended for end in range(1, len(path) + 1)):
            return True
        for end in range(len(path), 0, -1):
            *way, last = path[:end]
            owner: Any = self._at(way)
            if isinstance(owner, dict):
                present = last in owner
            elif isinstance(owner, list):
                present = isinstance(last, int) and last < len(owner)
            else:
                continue
            now = owner[last] if present else None
            for candidate in self._candidates(path[:end], now):
                if candidate != now:
                    owner[last] = candidate
                    self._mended.add(path[:end])
                    return True
            if present and _may_go(path[:end]):
                owner[last] = _GONE
                self._mended.add(path[:end])
                return True
        return False

    def sweep(self) -> None:
        """Take out what was given up: a round of mending is over."""
        self._mended.clear()
        self.left = _without_gone(self.left)

    def _at(self, way: Sequence[str | int]) -> Any:
        here = self.left
        for step in way:
            if isinstance(here, dict):
                here = here.get(step)
            elif isinstance(here, list) and isinstance(step, int) and step < len(here):
                here = here[step]
            else:
                return None
        return here

    def _unread(self, now: object, index: str | int | None = None) -> str:
        """A new filler for a name; one that is there already stays, so that mending gets on."""
        if isinstance(now, str) and is_unread(now.lower()):
            return now
        filler = f"{_UNREAD}{len(self.labels)}x"
        self.labels[filler] = now if isinstance(now, str) else str(0 if index is None else index)
        return filler

    def _candidates(self, path: Path, now: object) -> list[Any]:
        """What may stand at ``path`` instead of what is there, best first."""
        match (self.left["kind"], *("*" if isinstance(part, int) else part for part in path)):
            case (_, "apiVersion"):
                return [API_VERSION]
            case (_, "metadata"):
                return [{"name": self._unread(None)}]
            case (_, "metadata", "name"):
                return [self._unread(now)]
            case ("ModelVersion", "spec", "model" | "version"):
                return [self._unread(now)]
            case ("ModelVersion", "spec", "digest"):
                return ["sha256:" + "0" * 64]
            case ("ModelVersion", "spec", "backend"):
                return [{"type": "http", "endpoints": ["http://127.0.0.1"]}]
            case ("ModelVersion", "spec", "features"):
                return [[]]
            case ("ModelVersion", "spec", "features", "*") if isinstance(now, dict) and "ref" in now:
                return [{"ref": now["ref"]}]
            case ("ModelVersion", "spec", "features", "*", "name"):
                return [self._unread(now)]
            case ("ModelVersion", "spec", "outputs"):
                return [[{"name": _UNREAD, "datatype": "BOOL"}]]
            case ("Model", "spec", "owner"):
                return [_UNREAD]
            case ("FeatureView", "spec", "entities"):
                return [[{"name": _UNREAD, "type": "STRING"}]]
            case ("FeatureView", "spec", "features"):
                return [[{"name": _UNREAD, "type": "STRING"}]]
            case ("FeatureView", "spec", "source"):
                return [{"type": "redis", "project": _UNREAD}]
            case ("Route", "spec", *below):
                return self._route_candidates(below, path, now)
        return []

    def _route_candidates(self, below: Sequence[object], path: Path, now: object) -> list[Any]:
        match tuple(below):
            case ("path",):
                return [f"/{_UNREAD}"]
            case ("deadline",):
                return ["1s"]
            case ("rules",):
                return [[{"name": self._unread(None), "when": _UNREAD_WHEN, "tasks": [self._stub(None, 0)]}]]
            case ("rules", "*"):
                return [{"name": self._unread(None, path[-1]), "when": _UNREAD_WHEN, "tasks": [self._stub(None, 0)]}]
            case ("rules", "*", "name"):
                return [self._unread(now, path[-2])]
            case ("rules", "*", "tasks"):
                return [[self._stub(None, 0)]]
            case ("rules", "*", "tasks", "*"):
                stub = self._stub(now, path[-1])
                kept = now if isinstance(now, dict) else {}
                said = {name: kept[name] for name in ("after", "when", "fallback", "shadow") if name in kept}
                return [stub | said | {"select": _undrawn(kept.get("select"))}, stub] if "select" in kept else [stub]
            case ("rules", "*", "tasks", "*", "name"):
                return [self._unread(now, path[-2])]
            case ("rules", "*", "tasks", "*", "model"):
                return [self._unread(now)]
            case ("rules", "*", "tasks", "*", "select"):
                return [{"version": _UNREAD}]
            case ("rules", "*", "tasks", "*", "after", "*"):
                return [self._unread(now)]
            case ("rules", "*", "tasks", "*", "after"):
                return [[_UNREAD]]
            case ("rules", "*", "result"):
                return [{_UNREAD: "true"}]
            case ("rules", "*", "result", str(key)):
                if not key.isidentifier():
                    self._at(path[:-1])[_UNREAD] = "true"
                    return []
                return ["true"]
            case ("rules", "*", "reasons", "*", "code"):
                filler = self._unread(now, path[-2]).upper()
                self.labels[filler] = self.labels[filler.lower()]
                return [filler]
            case ("rules", "*", "when"):
                return [_UNREAD_WHEN]
            case ("rules", "*", "reasons", "*", "when"):
                return ["true"]
        return []

    def _stub(self, now: object, index: str | int) -> dict[str, Any]:
        """A task of which no more is known than its name and its model, if that."""
        kept = now if isinstance(now, dict) else {}
        name, model = kept.get("name"), kept.get("model")
        return {
            "name": name if isinstance(name, str) else self._unread(None, index),
            "model": model if isinstance(model, str) else self._unread(None),
            "select": {"version": _UNREAD},
        }


def _undrawn(select: object) -> object:
    """A selection without what belongs to a draw."""
    if not isinstance(select, dict):
        return select
    return {name: value for name, value in select.items() if name not in ("stickyBy", "experiment")}


def _may_go(path: Path) -> bool:
    """Whether what is at ``path`` may be left out by itself: an answer with fewer outputs would be another fault."""
    return "default" not in path[:-1]


def _without_gone(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_gone(each) for name, each in value.items() if each is not _GONE}
    if isinstance(value, list):
        return [_without_gone(each) for each in value if each is not _GONE]
    return value
