"""The examples in docstrings hold: those of every module of the broker and of the credit example."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("app", "examples")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "    >>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str) -> None:
    """Each example in the module's docstrings gives what it says."""
    results = doctest.testmod(import_module(name))
    assert results.attempted > 0
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples fail; see what was printed"
