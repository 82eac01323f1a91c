"""A small, sound registry to spoil: tests change one field and look at what is said of it."""

import copy
from collections.abc import Iterable
from typing import Any

from app.domain.registry import Revision, Source, read_revision
from app.domain.requests import Request, RequestId

API_VERSION = "modelbroker.dev/v1alpha1"
NOW_MS = 1_790_000_000_000
"""A moment in September 2026, when the sound versions' validity has not ended."""


def document(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """One document, as YAML gives it."""
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


def model_version(version: str, model: str = "credit-pd", **spec: Any) -> dict[str, Any]:
    """A version with one feature of the request, one of the view and one output."""
    whole: dict[str, Any] = {
        "model": model,
        "version": version,
        "digest": "sha256:" + "0" * 64,
        "backend": {"type": "http", "protocol": "oip-v2", "endpoints": ["http://127.0.0.1:9001"]},
        "features": [
            {"ref": "inputs.amount", "type": "DOUBLE", "required": True},
            {"ref": "applicant.age", "default": 35, "maxAge": "30d"},
        ],
        "outputs": [{"name": "probability", "datatype": "FP64", "min": 0, "max": 1}],
        "policy": {"timeout": "80ms", "retries": 1},
        "governance": {"approvedBy": "model-risk", "validUntil": "2027-06-30"},
    }
    whole |= spec
    if whole["backend"].get("type") == "kafka" and "policy" not in spec:
        whole["policy"] = {"timeout": "80ms"}
    return document("ModelVersion", f"{model}-{version}", whole)


def task(**changes: Any) -> dict[str, Any]:
    """A task that splits its requests between two versions."""
    split = [{"version": "1", "weight": 90}, {"version": "2", "weight": 10}]
    return {"name": "pd", "model": "credit-pd", "select": {"split": split}} | changes


def reasons(**codes: str) -> list[dict[str, str]]:
    """A rule's reasons: codes, each with its condition, in this order."""
    return [{"code": code, "when": when} for code, when in codes.items()]


def route(name: str = "credit", path: str = "/credit/{product}", **spec: Any) -> dict[str, Any]:
    """A route with one rule that always matches."""
    rule = {"name": "default", "tasks": [task()], "result": {"decision": "outputs.pd.probability < 0.3"}}
    return document("Route", name, {"path": path, "deadline": "250ms", "rules": [rule]} | spec)


def sound() -> list[dict[str, Any]]:
    """A whole registry: a route, a model in two versions, a view."""
    return [
        document("Model", "credit-pd", {"owner": "risk", "aliases": {"champion": "1", "challenger": "2"}}),
        model_version("1"),
        model_version("2", backend={"type": "kafka", "pool": "default"}),
        document(
            "FeatureView",
            "applicant",
            {
                "entities": [{"name": "applicant_id", "type": "INT64"}],
                "features": [{"name": "age", "type": "INT64"}, {"name": "history", "type": "STRING"}],
                "source": {"type": "redis", "project": "credit"},
            },
        ),
        route(),
    ]


def changed(documents: Iterable[dict[str, Any]], name: str, path: str, value: object) -> list[dict[str, Any]]:
    """A copy of ``documents`` in which the field at ``path`` of the document ``name`` is ``value``.

    A step of digits is a list's index; a value of ``...`` removes the field.
    """
    copies = copy.deepcopy(list(documents))
    here: Any = next(each for each in copies if each["metadata"]["name"] == name)
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in steps:
        here = here[step]
    if value is ...:
        del here[last]
    else:
        here[last] = value
    return copies


def sources(documents: Iterable[dict[str, Any]]) -> list[Source]:
    """The documents as they would come from files ``0.yaml``, ``1.yaml`` and so on."""
    return [Source(f"{index}.yaml:1", content) for index, content in enumerate(documents)]


def revision(documents: Iterable[dict[str, Any]] | None = None) -> Revision:
    """The revision of ``documents``; of the sound ones by default."""
    return read_revision(sources(sound() if documents is None else documents))


def request(path: str = "/credit/card", request_id: str = "r-1", **sections: dict[str, Any]) -> Request:
    """A request with the given sections."""
    return Request(
        RequestId(request_id),
        path,
        sections.get("entities", {}),
        sections.get("inputs", {}),
        sections.get("metadata", {}),
        None,
        None,
        "normal",
        "application/json",
        "digest",
    )
