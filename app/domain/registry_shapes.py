"""Documents read one by one: content in, documents of their kinds' shapes out, and every fault of shape in words.

A document with a fault is not lost for the checks that follow: what is sound of it is a part, looked through for faults
of other sorts, so that whoever mends it sees all of them at once.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from pydantic import ValidationError

from app.domain.document_parts import IN_WORDS, NOT_SUPPORTED_YET, VALUES_NOT_SUPPORTED_YET, DocumentPart
from app.domain.documents import KINDS, Document, item_label
from app.domain.errors import Fault
from app.domain.registry_parts import SCALAR_TYPES, Path, details_of, path_of, sound_part

_SHOWN_LENGTH_MAX: Final = 80


@dataclass(frozen=True, slots=True)
class Source:
    """One document as it was read: where from, and what it says.

    ``unread``: there is one, and it could not be read, which is a fault that whoever tried has told. What it may define
    is of the ``kind`` in its content, or of any where that is not known.
    """

    origin: str
    content: Mapping[str, Any]
    unread: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """What is sound of a document with faults of shape: ``where`` it is said to be, and what its fillers are called."""

    origin: str
    where: str
    document: Document
    labels: Mapping[str, str]

    def fault(self, field: str, message: str) -> Fault:
        """A fault of the document, in terms of what is written in it."""
        for filler, label in self.labels.items():
            field, message = field.replace(filler, label), message.replace(filler, label)
        return Fault(self.origin, self.where, field, message)


@dataclass(slots=True)
class Shapes:
    """What was read of documents, each with its origin.

    ``parts`` are of those with a fault, and only looked through for others. ``unread``: what documents that could not
    be read would have defined, by kind and name (none: any), so that references to it are not faults of their own.
    """

    documents: list[tuple[str, Document]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    unread: set[tuple[str, str]] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)

    def read(self, sources: Iterable[Source]) -> None:
        """Take in each document that has its kind's shape."""
        for source in sources:
            self._read(source)

    def _read(self, source: Source) -> None:
        kind, name = source.content.get("kind"), _name_in(source.content)
        if source.unread:
            self.unread |= {(each, "") for each in KINDS if kind not in KINDS or each == kind}
            return
        shape = KINDS.get(kind) if isinstance(kind, str) else None
        where = f"{kind} {name}" if shape is not None and name else name if shape is None else str(kind)
        try:
            encoded = orjson.dumps(source.content)
        except TypeError as error:
            self.faults.append(Fault(source.origin, where, "", f"cannot be kept as JSON: {error}"))
            self.unread |= _defined_by(source.content, ()) if shape is not None else set()
            return
        if shape is None:
            known = ", ".join(sorted(KINDS))
            self.faults.append(Fault(source.origin, name, "kind", f"{shown(kind)} is unknown: use one of {known}"))
            meant = next((each for each in KINDS if each.lower() == str(kind).lower()), None)
            if meant is not None:
                self._read_part(source.origin, {**source.content, "kind": meant}, name)
            return
        # What JSON has no number for is written as null, and then would be no bound at all.
        for path in _not_finite(source.content) if b"null" in encoded else ():
            said = "is NaN or infinite; write a number or leave it out"
            self.faults.append(Fault(source.origin, where, _field_at(source.content, path), said))
        try:
            self.documents.append((source.origin, shape.model_validate_json(encoded)))
        except ValidationError:
            self._read_part(source.origin, source.content, where)

    def _read_part(self, origin: str, content: Mapping[str, Any], where: str) -> None:
        """Take in what is sound of a document that is not, and what is not."""
        shape, faulty = KINDS[content["kind"]], []
        try:
            _ = shape.model_validate_json(orjson.dumps(content))
        except ValidationError as error:
            details = details_of(error)
            self.faults += dict.fromkeys(_shape_fault(origin, content, where, detail) for detail in details)
            faulty = [path_of(content, detail["loc"]) for detail in details]
        self.unread |= _defined_by(content, faulty)
        part = sound_part(shape, content, faulty)
        if part is not None:
            self.parts.append(Part(origin, where, *part))


def _not_finite(value: object, way: Path = ()) -> Iterator[Path]:
    """Where numbers are that are none to JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        yield way
    elif isinstance(value, Mapping):
        for name, below in value.items():
            if isinstance(below, float | Mapping | list):
                yield from _not_finite(below, (*way, name))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            if isinstance(below, float | Mapping | list):
                yield from _not_finite(below, (*way, index))


def _name_in(content: Mapping[str, Any]) -> str:
    metadata = content.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    return name if isinstance(name, str) else ""


def _defined_by(content: Mapping[str, Any], faulty: Iterable[Path]) -> set[tuple[str, str]]:
    """The kind and name of a document with ``faulty`` paths; without a name where that may be any."""
    kind, spec = content["kind"], content.get("spec")
    version = kind == "ModelVersion"
    naming: tuple[Path, ...] = (("spec", "model"), ("spec", "version")) if version else (("metadata", "name"),)
    defined = {(kind, "")} if any(path == own[: len(path)] for path in faulty for own in naming) else set()
    if not version:
        return defined | {(kind, _name_in(content))}
    return defined | ({(kind, f"{spec.get('model')}/{spec.get('version')}")} if isinstance(spec, Mapping) else set())


def shown(value: object) -> str:
    """A value as messages show it: cut where it is long."""
    return repr(value)[:_SHOWN_LENGTH_MAX]


def _shape_fault(origin: str, content: Mapping[str, Any], where: str, detail: Any) -> Fault:
    kind, given = detail["type"], detail.get("input")
    field_ = _field_at(content, path_of(content, detail["loc"]))
    last = str(detail["loc"][-1]) if detail["loc"] else ""
    if kind == "union_tag_invalid":
        field_, given = f"{field_}.type", given.get("type")
    if kind == "extra_forbidden":
        if last in NOT_SUPPORTED_YET:
            message = f"not supported yet ({NOT_SUPPORTED_YET[last]}); remove it"
        else:
            meant = _SPELLINGS.get(_letters(last))
            message = (
                f"unknown field; {f'write {meant}' if meant not in (None, last) else 'remove it or correct its name'}"
            )
    elif kind in ("literal_error", "union_tag_invalid") and str(given) in VALUES_NOT_SUPPORTED_YET:
        message = f"{given} is not supported yet"
    elif last in SCALAR_TYPES or last.startswith("tuple["):
        message = f"{shown(given)} is not text, a number, true, false or null"
    elif kind == "missing":
        message = "is missing"
    elif kind == "string_pattern_mismatch" and detail["ctx"]["pattern"] in IN_WORDS:
        message = f"{shown(given)} cannot be read: write {IN_WORDS[detail['ctx']['pattern']]}"
    elif kind == "too_short" and not given:
        message = f"is empty: write at least {detail['ctx']['min_length']}"
    else:
        message = detail["msg"].removeprefix("Value error, ")
        if not isinstance(given, dict | list) and shown(given) not in message:
            message += f" (given: {shown(given)})"
        message += _remedy(kind, given)
    return Fault(origin, where, field_, message)


def _letters(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _aliases(part: type[DocumentPart]) -> Iterator[str]:
    yield from (each.alias for each in part.model_fields.values() if each.alias is not None)
    for below in part.__subclasses__():
        yield from _aliases(below)


_SPELLINGS: Final = {_letters(alias): alias for alias in _aliases(DocumentPart)}
"""The names that are of several words, by what they are however the words are joined."""


def _remedy(kind: str, given: object) -> str:
    """What to write instead, where YAML has made something else of what was meant."""
    if kind == "string_type" and isinstance(given, int | float) and not isinstance(given, bool):
        return f': quote it, as "{given}"'
    if kind == "string_type" and isinstance(given, bool):
        return ": quote it, for YAML reads yes, no, on and off as true and false"
    if kind in ("int_type", "int_from_float") and isinstance(given, float):
        return ": write a whole number; of weights only their proportion counts, as 90 and 10"
    if kind == "tuple_type" and not isinstance(given, list):
        return ": write a list, each item after a dash"
    return ""


def _field_at(content: object, path: Sequence[str | int]) -> str:
    """A field's place as people read it, with items of lists by name.

    >>> _field_at({"rules": [{"name": "default"}]}, ("rules", 0, "when"))
    'rules[default].when'
    """
    field, here = "", content
    for part in path:
        if isinstance(part, int):
            here = here[part] if isinstance(here, list) and part < len(here) else None
            # These name versions, by number or by alias, and a number alone would read as a place.
            by_place = field.endswith((".shadow", ".fallback"))
            field += f"[{part if by_place else item_label(here, part)}]"
        else:
            here = here.get(part) if isinstance(here, dict) else None
            field += f".{part}"
    return field.removeprefix(".")
