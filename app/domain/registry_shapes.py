"""Documents read one by one: content in, documents of their kinds' shapes out, and every fault of shape in words.

A document with a fault is not lost for the checks that follow: what is sound of it is a part, looked through for faults
of other sorts, so that whoever mends it sees all of them at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from pydantic import ValidationError

from app.domain.documents import (
    IN_WORDS,
    KINDS,
    NOT_SUPPORTED_YET,
    VALUES_NOT_SUPPORTED_YET,
    Document,
    item_label,
)
from app.domain.errors import Fault

_SHOWN_LENGTH_MAX: Final = 80


@dataclass(frozen=True, slots=True)
class Source:
    """One document as it was read: where from, and what it says."""

    origin: str
    content: Mapping[str, Any]


@dataclass(slots=True)
class Shapes:
    """What was read of documents, each with its origin.

    ``parts`` are what is sound of those with a fault: looked through for references, and no more. ``unread``: what
    documents that could not be read would have defined, so that references to it are not faults of their own.
    """

    documents: list[tuple[str, Document]] = field(default_factory=list)
    parts: list[tuple[str, Document]] = field(default_factory=list)
    unread: set[tuple[str, str]] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)

    def read(self, sources: Iterable[Source]) -> None:
        """Take in each document that has its kind's shape."""
        for source in sources:
            kind, name = source.content.get("kind"), _name_in(source.content)
            shape = KINDS.get(kind) if isinstance(kind, str) else None
            if shape is None:
                known = ", ".join(sorted(KINDS))
                self.faults.append(Fault(source.origin, name, "kind", f"{shown(kind)} is unknown: use one of {known}"))
                continue
            where = f"{kind} {name}" if name else str(kind)
            try:
                document = shape.model_validate_json(orjson.dumps(source.content))
            except ValidationError as error:
                details = (detail for detail in error.errors(include_url=False) if not _is_echo(detail))
                found = (_shape_fault(source, where, detail) for detail in details)
                self.faults += dict.fromkeys(found)
                self.unread |= _defined_by(source.content)
                part = _sound_part(shape, source.content, error)
                if part is not None:
                    self.parts.append((source.origin, part))
            except TypeError as error:
                self.faults.append(Fault(source.origin, where, "", f"cannot be kept as JSON: {error}"))
                self.unread |= _defined_by(source.content)
            else:
                self.documents.append((source.origin, document))


_NAMED_LISTS: Final = frozenset({"rules", "tasks", "features", "outputs"})
"""Lists whose items are called by name, so that those beside one that is left out keep what they are called."""


def _sound_part(shape: type[Document], content: Mapping[str, Any], error: ValidationError) -> Document | None:
    """The document without the rules, tasks, features and outputs in which the faults lie; None where no more helps."""
    left = orjson.loads(orjson.dumps(content))
    while True:
        details = error.errors(include_url=False)
        places = {_item_at(detail["loc"]) for detail in details if not _is_echo(detail)}
        items = sorted((place for place in places if place is not None), reverse=True)
        if not items or None in places:
            return None
        for *way, index in items:
            owner = left
            for step in way:
                owner = owner[step]
            if index < len(owner):
                del owner[index]
        try:
            return shape.model_validate_json(orjson.dumps(left))
        except ValidationError as another:
            error = another


def _item_at(location: tuple[str | int, ...]) -> tuple[Any, ...] | None:
    """The innermost item of a named list in which ``location`` lies."""
    for end in range(len(location), 1, -1):
        if isinstance(location[end - 1], int) and location[end - 2] in _NAMED_LISTS:
            return location[:end]
    return None


def _name_in(content: Mapping[str, Any]) -> str:
    metadata = content.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    return name if isinstance(name, str) else ""


def _defined_by(content: Mapping[str, Any]) -> set[tuple[str, str]]:
    kind, spec = content["kind"], content.get("spec")
    if kind == "ModelVersion" and isinstance(spec, Mapping):
        return {(kind, f"{spec.get('model')}/{spec.get('version')}")}
    return {(kind, _name_in(content))}


def shown(value: object) -> str:
    """A value as messages show it: cut where it is long."""
    return repr(value)[:_SHOWN_LENGTH_MAX]


_SCALAR_TYPES: Final = frozenset({"str", "int", "float", "bool"})


def _is_echo(detail: Any) -> bool:
    """pydantic counts only sound items, and so calls a list too short when what is wrong is in an item."""
    given = detail.get("input")
    return detail["type"] == "too_short" and isinstance(given, list) and len(given) >= detail["ctx"]["min_length"]


def _shape_fault(source: Source, where: str, detail: Any) -> Fault:
    kind, given = detail["type"], detail.get("input")
    field_, last = _field_at(source.content, detail["loc"])
    if kind == "union_tag_invalid":
        field_, given = f"{field_}.type", given.get("type")
    if kind == "extra_forbidden":
        if last in NOT_SUPPORTED_YET:
            message = f"not supported yet ({NOT_SUPPORTED_YET[last]}); remove it"
        else:
            message = "unknown field; remove it or correct its name"
    elif kind in ("literal_error", "union_tag_invalid") and given in VALUES_NOT_SUPPORTED_YET:
        message = f"{given} is not supported yet"
    elif last in _SCALAR_TYPES:
        message = f"{shown(given)} is not text, a number, true, false or null"
    elif kind == "missing":
        message = "is missing"
    elif kind == "string_pattern_mismatch" and detail["ctx"]["pattern"] in IN_WORDS:
        message = f"{shown(given)} cannot be read: write {IN_WORDS[detail['ctx']['pattern']]}"
    elif kind == "too_short" and not given:
        message = f"is empty: write at least {detail['ctx']['min_length']}"
    else:
        given_text = "" if isinstance(given, dict | list) else f" (given: {shown(given)})"
        message = detail["msg"].removeprefix("Value error, ") + given_text
    return Fault(source.origin, where, field_, message)


def _field_at(content: object, location: Sequence[str | int]) -> tuple[str, str]:
    """A field's place as people read it, with items of lists by name; and its last part.

    pydantic's locations also name which member of a union was tried; those parts are no fields.
    """
    path, here, last = "", content, ""
    for part in location:
        last = str(part)
        if isinstance(part, int):
            here = here[part] if isinstance(here, list) and part < len(here) else None
            path += f"[{item_label(here, part)}]"
            continue
        members = here if isinstance(here, dict) else {}
        tried = part in _SCALAR_TYPES and not members
        tagged = part not in members and members.get("type") == part
        if part != "[key]" and not tried and not tagged:
            here = members.get(part)
            path += f".{part}"
    return path.removeprefix("."), last
