"""What changes from one revision to the next, field by field, as a person reviews it.

Items of a list are told apart by what names them (a rule, a task, a feature's ref, an arm's version), so a new first
rule is one addition and not a change of every rule; where such items change places that is a change of its own, for
the first rule that matches wins.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from app.domain.documents import Document, item_label
from app.domain.registry import content_of

_SORTED: Final = orjson.OPT_SORT_KEYS


@dataclass(frozen=True, slots=True)
class Change:
    """One field's change; ``field`` is empty where the whole document is new or gone. None: it is not there."""

    document: str
    field: str
    before: object
    after: object

    @property
    def kind(self) -> str:
        """``added``, ``removed`` or ``changed``."""
        return "added" if self.before is None else "removed" if self.after is None else "changed"


def differences(before: Iterable[Document], after: Iterable[Document]) -> tuple[Change, ...]:
    """The changes that make ``after`` of ``before``, by document, then in the fields' order."""
    old, new = _by_name(before), _by_name(after)
    changes: list[Change] = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            changes.append(Change(name, "", None, new[name]))
        elif name not in new:
            changes.append(Change(name, "", old[name], None))
        elif orjson.dumps(old[name], option=_SORTED) != orjson.dumps(new[name], option=_SORTED):
            # Of thousands of documents few differ; the text tells 1 from 1.0 too, and costs a tenth of the comparison.
            _compare(name, "", old[name], new[name], changes)
    return tuple(changes)


def _by_name(documents: Iterable[Document]) -> dict[str, Any]:
    return {f"{document.kind} {document.metadata.name}": _fields(content_of(document)) for document in documents}


def _fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """The spec's fields, and those of the status, which no spec has, below ``status``; a baseline by its digest."""
    status = {"status": content["status"]} if content.get("status") else {}
    fields = {**content["spec"], **status}
    if fields.get("baseline"):
        # Hundreds of counts that all differ say no more than that they differ.
        digest = hashlib.sha256(orjson.dumps(fields["baseline"], option=_SORTED)).hexdigest()
        fields["baseline"] = f"sha256:{digest} of {fields['baseline']['rows']} rows"
    return fields


def _compare(document: str, at: str, old: object, new: object, changes: list[Change]) -> None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            _compare(document, f"{at}.{key}".removeprefix("."), old.get(key), new.get(key), changes)
    elif isinstance(old, Sequence) and isinstance(new, Sequence) and not isinstance(old, str | bytes):
        _compare_lists(document, at, _labelled(old), _labelled(new), changes)
    elif (old, type(old)) != (new, type(new)):
        changes.append(Change(document, at, old, new))


def _compare_lists(document: str, at: str, old: dict[str, Any], new: dict[str, Any], changes: list[Change]) -> None:
    for label in dict.fromkeys([*old, *new]):
        _compare(document, f"{at}[{label}]", old.get(label), new.get(label), changes)
    kept_old = [label for label in old if label in new]
    kept_new = [label for label in new if label in old]
    if kept_old != kept_new:
        changes.append(Change(document, f"{at} (order)", kept_old, kept_new))


def _labelled(items: Sequence[Any]) -> dict[str, Any]:
    # Names are unique within a list of a sound revision.
    return {item_label(item, index): item for index, item in enumerate(items)}
