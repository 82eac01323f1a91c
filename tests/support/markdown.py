"""Markdown, as far as tests of the documentation read it: fenced blocks and what is said about them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
DOCUMENTS: Final = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
_BLOCK: Final = re.compile(
    r"(?:^<!-- run(?:: (?P<mark>\w+))? -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. ``mark`` is what the comment above it says: ``run``, ``run: MARK``, or None without one."""

    language: str
    text: str
    mark: str | None


def blocks_of(document: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    return [
        Block(found["language"], found["text"], (found["mark"] or "run") if found[0].startswith("<!--") else None)
        for found in _BLOCK.finditer(document.read_text())
    ]
