"""Feature functions: the Python that installed packages register for what CEL cannot say.

A package declares an entry point in the group ``model_broker.features``; its name is what a FeatureView's
``{function: NAME}`` calls. Functions are loaded once, when the worker starts, and called in it, synchronously: as long
as one runs, the worker does nothing else. How long each takes is measured.
"""

import time
from collections.abc import Mapping
from importlib.metadata import EntryPoints, entry_points
from typing import Final

from prometheus_client import Histogram

from app.domain.errors import ConfigurationError
from app.domain.features import Value
from app.domain.on_demand import FeatureFunction
from app.observability import LATENCY_BUCKETS_S

GROUP: Final = "model_broker.features"

_SECONDS = Histogram(
    "broker_feature_function_seconds", "One call of a feature function", ["function"], buckets=LATENCY_BUCKETS_S
)


def load_functions(found: EntryPoints | None = None) -> Mapping[str, FeatureFunction]:
    """The functions that installed packages register, by name; ``found`` in place of the entry points.

    Raises:
        ConfigurationError: two packages claim a name, or one cannot be loaded or is no function.
    """
    functions: dict[str, FeatureFunction] = {}
    for point in entry_points(group=GROUP) if found is None else found:
        if point.name in functions:
            raise ConfigurationError(f"feature function {point.name} is registered by two packages; remove one of them")
        try:
            function = point.load()
        except Exception as error:
            # Whatever foreign code raises while it loads, the operator needs it in one line.
            said = f"{type(error).__name__}: {error}"
            raise ConfigurationError(
                f"feature function {point.name} ({point.value}) cannot be loaded: {said}"
            ) from error
        if not callable(function):
            kind = type(function).__name__
            raise ConfigurationError(f"feature function {point.name} ({point.value}) is a {kind}: name a function")
        functions[point.name] = _timed(point.name, function)
    return functions


def _timed(name: str, function: FeatureFunction) -> FeatureFunction:
    seconds = _SECONDS.labels(name)

    def timed(features: Mapping[str, Value]) -> Value:
        started = time.perf_counter()
        try:
            return function(features)
        finally:
            seconds.observe(time.perf_counter() - started)

    return timed
