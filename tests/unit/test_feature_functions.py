"""Feature functions: what installed packages register by entry point, and what cannot be used."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest
from prometheus_client import REGISTRY

from app.adapters.feature_functions import GROUP, load_functions
from app.domain.errors import ConfigurationError


def metric_value(name: str, **labels: str) -> float | None:
    """What a metric stands at."""
    return REGISTRY.get_sample_value(name, labels)


def points(**values: str) -> EntryPoints:
    """Entry points of the group."""
    return EntryPoints(EntryPoint(name, value, GROUP) for name, value in values.items())


def test_functions_are_found_by_name() -> None:
    """Called as they are; each call is measured, one that raises too."""
    functions = load_functions(points(size="builtins:len", least="builtins:min"))
    assert set(functions) == {"size", "least"}
    assert functions["size"]({"a.b": 1, "a.c": 2}) == 2
    with pytest.raises(ValueError, match="empty"):
        functions["least"]({})
    assert metric_value("broker_feature_function_seconds_count", function="size") == 1
    assert metric_value("broker_feature_function_seconds_count", function="least") == 1


def test_without_packages_there_are_none() -> None:
    """This project registers none itself."""
    assert load_functions() == {}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            points(f="no_such_module:f"),
            r"feature function f \(no_such_module:f\) cannot be loaded: ModuleNotFoundError",
        ),
        (points(f="math:no_such_name"), "cannot be loaded: AttributeError"),
        (points(f="math:pi"), "is a float: name a function"),
        (EntryPoints([*points(f="math:sin"), *points(f="math:cos")]), "registered by two packages"),
    ],
)
def test_what_cannot_be_used_stops_the_worker(found: EntryPoints, said: str) -> None:
    """In one line, that names the function."""
    with pytest.raises(ConfigurationError, match=said):
        load_functions(found)
