"""An AuditRecord as people and programs read it: its JSON members opened, its bytes as text where they are text."""

import base64
from collections.abc import Mapping
from typing import Any, Final

import orjson

FEATURE_FIELDS: Final = ("ref", "status", "value", "event_time_ms", "source", "reason")


def readable(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record``, decoded from ``schemas/AuditRecord.avsc``, as a value that JSON holds.

    >>> readable({"tasks": [], "problems": b"[]", "reply": b'{"status":"completed"}', "path": None})
    {'tasks': [], 'problems': [], 'reply': {'status': 'completed'}, 'path': None}
    """
    return {name: _task_list(value) if name == "tasks" else _opened(value) for name, value in record.items()}


def _task_list(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    opened: list[dict[str, Any]] = [_opened(task) for task in tasks]
    for task in opened:
        if isinstance(task.get("features"), list):
            task["features"] = [dict(zip(FEATURE_FIELDS, feature, strict=False)) for feature in task["features"]]
        if isinstance(task.get("earlier"), list):
            task["earlier"] = _task_list(task["earlier"])
    return opened


def _opened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _opened(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_opened(member) for member in value]
    return open_bytes(value) if isinstance(value, bytes) else value


def open_bytes(data: bytes) -> Any:
    """JSON's value; else UTF-8 text; else ``{"b64": ...}``.

    >>> open_bytes(b'{"a": 1}'), open_bytes(b"plain"), open_bytes(b"\\xff")
    ({'a': 1}, 'plain', {'b64': '/w=='})
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(data).decode()}
