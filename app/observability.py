"""What operators see: one structured log line a request a stage, and Prometheus metrics.

Logs go to standard error, JSON unless it is a terminal; ``request_id`` and what else identifies the work is bound by
context. Metrics are defined beside the code that moves them, with the prefix ``broker_``.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import orjson
import structlog
from prometheus_client.metrics import MetricWrapperBase

from app.settings import Settings

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds; from a cached answer to a request at its deadline."""
_CHILDREN_MAX = 4_096
_REPEAT_AFTER_S = 10.0
_REPEATS_KEPT = 256
_Metric = TypeVar("_Metric", bound=MetricWrapperBase)


def labelled(metric: _Metric) -> Callable[..., _Metric]:
    """``metric.labels`` that remembers its answers, for what moves with every decision: finding one costs 2 µs.

    >>> from prometheus_client import CollectorRegistry, Counter
    >>> calls = labelled(Counter("calls", "Calls", ["model"], registry=CollectorRegistry()))
    >>> calls("pd") is calls("pd")
    True
    """
    return lru_cache(_CHILDREN_MAX)(metric.labels)


def json_line(event: Any, default: Callable[[Any], Any]) -> str:
    """A line of the log, at a third of what the standard library's writer costs each decision.

    >>> json_line({"event": "decided", "codes": []}, str)
    '{"event":"decided","codes":[]}'
    >>> json_line({"event": "refused", "given": 2**70}, str)
    '{"event": "refused", "given": 1180591620717411303424}'
    """
    try:
        return orjson.dumps(event, default=default).decode()
    except TypeError:
        # Whole numbers beyond 64 bits, text that is not UTF-8: a log takes what it gets.
        return json.dumps(event, default=default)


class Repeats(logging.Filter):
    """Passes what libraries say once in ten seconds, with how often it was said in between.

    A Kafka client whose broker is away tells every attempt, dozens a second, and buries the lines of the broker.
    Messages are the same by their logger, their template and its first argument (a node, a facility), not by what
    differs from one attempt to the next.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        about = record.args[:1] if isinstance(record.args, tuple) else ()
        key = (record.name, record.levelno, record.msg, *map(str, about))
        at_s, unsaid = self._said.get(key, (float("-inf"), 0))
        if record.created - at_s < _REPEAT_AFTER_S:
            self._said[key] = (at_s, unsaid + 1)
            return False
        if len(self._said) >= _REPEATS_KEPT:
            self._said.clear()
        self._said[key] = (record.created, 0)
        if unsaid:
            record.msg, record.args = f"{record.getMessage()} (and {unsaid} times more since it was said last)", ()
        return True


@contextmanager
def logs_of_a_command() -> Iterator[None]:
    """Meanwhile what adapters log goes to standard error, warnings and worse: standard output is the command's."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)


def configure_logging(settings: Settings) -> None:
    """Send structlog's and the libraries' records to standard error in one format."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(json_line)
    )
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Repeats())
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    # Records that a library makes at DEBUG and nobody keeps cost a twentieth of a worker's CPU.
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    logging.captureWarnings(True)
