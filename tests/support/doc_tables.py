"""Tables of the documentation that the code knows best: settings and topics, written by the code, held by a test.

``python -m tests.support.doc_tables`` writes them into docs/operations.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

from app.adapters.topics import read_documents
from app.durations import DurationMs, format_duration
from app.settings import Settings

ROOT: Final = Path(__file__).resolve().parents[2]
OPERATIONS: Final = ROOT / "docs" / "operations.md"


def settings_table() -> str:
    """Each setting: variable, default as one would write it, meaning."""
    rows = [("variable", "default", "meaning")]
    durations = {name for name, kind in Settings.__annotations__.items() if is_duration(kind)}
    for name, field in Settings.model_fields.items():
        default = format_duration(field.default) if name in durations else _written(field.default)
        rows.append((f"`BROKER_{name.upper()}`", default, field.description or ""))
    return _table(rows)


def is_duration(kind: Any) -> bool:
    """Whether a setting's annotation is a duration's, whatever bounds it has beside."""
    return set(get_args(DurationMs)) <= set(get_args(kind))


def topics_table() -> str:
    """Each topic document: name, partitions, cleanup, and whether there is a dead-letter topic beside it."""
    rows = [("topic", "partitions", "kept", "dead letters")]
    for document in read_documents():
        cleanup, retention = document.config["cleanup.policy"], document.config.get("retention.ms")
        kept = "compacted" if cleanup == "compact" else format_duration(int(retention or 0))
        partitions = str(document.partitions or "`BROKER_PARTITIONS`")
        rows.append((f"`{document.name}`", partitions, kept, "yes" if document.dead_letter else ""))
    return _table(rows)


def replaced(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between the marks of ``name``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    if not rest or not tail:
        raise ValueError(f"no {begin} ... {end} in the text")
    return f"{head}{begin}\n\n{table}\n\n{end}{tail}"


def _written(default: Any) -> str:
    if default is None:
        return "unset"
    text = ",".join(default) if isinstance(default, list) else str(default)
    return f"`{text}`" if text else "empty"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the tables into docs/operations.md."""
    text = OPERATIONS.read_text()
    text = replaced(text, "settings", settings_table())
    OPERATIONS.write_text(replaced(text, "topics", topics_table()))


if __name__ == "__main__":
    main()
