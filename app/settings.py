"""Settings: everything an operator can turn, read from the environment with the prefix ``BROKER_``.

Each bound says its unit and its reason. AWS is configured by its own standard variables (``AWS_ENDPOINT_URL_S3``,
``AWS_REGION``, ...), which boto3 and aiobotocore read themselves.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, field_validator
from pydantic.functional_validators import BeforeValidator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.durations import DurationMs, within

_PREFIX: Final = "BROKER_"
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
_PORT_MAX: Final = 65_535
_PREFIX_LENGTH_MAX: Final = 100
"""Beside a prefix, a topic's 249 characters must hold our names, a pool's among them, and the changelogs'."""
_PREFIXES: Final = re.compile(rf"[A-Za-z0-9._-]{{0,{_PREFIX_LENGTH_MAX}}}")


def _comma_separated(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Settings(BaseSettings):
    """One process's settings; the same names serve every role."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="ignore")

    kafka_bootstrap: str = Field("127.0.0.1:9092", description="Kafka bootstrap servers, host:port[,host:port]")
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="the feature store; of a Redis Cluster any node, or several with commas between",
    )
    topic_prefix: str = Field(
        "", description="put before every topic's and consumer group's name: letters, digits, `.`, `_`, `-`"
    )
    partitions: int = Field(
        8, gt=0, description="of each topic but the registry's, when created: at most so many workers share a role"
    )
    replication_factor: int = Field(-1, ge=-1, description="of topics when created; -1: the brokers' own default")
    schema_registry_url: str | None = Field(
        None,
        description="Avro requests in Confluent wire format are resolved here; unset: single-object encoding",
    )
    audit_bucket: str = Field("model-broker-audit", description="S3 bucket of the audit objects")
    audit_table: str = Field("model-broker-decisions", description="DynamoDB table of the decision pointers")
    reply_topics_allowed: Annotated[list[str], NoDecode, BeforeValidator(_comma_separated)] = Field(
        ["*replies"], description="globs, comma separated, matched against reply topics after the prefix"
    )
    data_dir: Path = Field(Path(".model-broker"), description="local state; holds nothing that Kafka does not")

    dedupe_window: DurationMs = Field(
        900_000, description="how long a decision answers duplicates of its request; bounds the joins table"
    )
    default_deadline: DurationMs = Field(
        5_000, description="a queued or routed request without a nearer deadline ends by then"
    )
    request_bytes_max: int = Field(
        262_144,
        gt=0,
        description="bytes; keeps request, features and outputs of one record below Kafka's 1 MiB",
    )
    record_bytes_max: int = Field(
        1_000_000,
        # Below it, a record that says no more than why it is too large would not fit either.
        ge=16_384,
        description="bytes of one produced record, 16384 at least; just below Kafka's message.max.bytes",
    )
    requests_in_flight_max: int = Field(
        256,
        gt=0,
        description="requests a decide worker works on at once; past it the partition waits in Kafka",
    )
    joins_pending_max: int = Field(
        10_000, gt=0, description="joins of a decide worker that wait for queued tasks at once; past it requests wait"
    )
    shadows_in_flight_max: int = Field(
        32, ge=0, description="shadows that a decide worker runs at once, after replying; past it they are shed"
    )
    tasks_in_flight_max: int = Field(64, gt=0, description="tasks a pool worker holds at once")
    replies_pending_max: int = Field(
        1_024, gt=0, description="requests a gateway waits for at once; past it 503 with Retry-After"
    )
    session_timeout: Annotated[DurationMs, within("1s", "90s")] = Field(
        6_000,
        # Above it a request that joins the group would outlast the client's own bound for any request.
        description="Kafka's session timeout: the silence after a worker's sudden death is this plus a rebalance; "
        "1s to 90s, and what the brokers allow (`group.min.session.timeout.ms`, 6 s unless set)",
    )
    commit_interval: DurationMs = Field(500, description="how often finished offsets are committed")
    drain_timeout: DurationMs = Field(
        20_000,
        description="how long SIGTERM waits for work in flight; Kubernetes' grace period must be 15 s longer, which a "
        "worker can need to end while Kafka is away",
    )
    feature_timeout: DurationMs = Field(
        1_000,
        description="one feature fetch, within the request's deadline; longer than a full worker is busy",
    )
    feature_cache_entries: int = Field(
        100_000, ge=0, description="rows that a decide worker's near cache holds at most; 0: no cache"
    )
    feature_cache_bytes: int = Field(
        67_108_864, ge=0, description="bytes that they take at most, as estimated; counts towards the worker's memory"
    )
    feature_value_bytes_max: int = Field(
        65_536,
        gt=0,
        description="bytes of one stored value, as a record must hold it; a longer one is not stored, or an ERROR",
    )
    feature_breaker_failures: int = Field(
        3, gt=0, description="exchanges that a Redis server must fail in a row to be left alone"
    )
    feature_breaker_open: DurationMs = Field(
        1_000, description="for how long it is left alone, until one fetch tries it again"
    )
    skew_half_life: DurationMs = Field(
        86_400_000, gt=0, description="how long ago a value counts half when inputs are compared with their baseline"
    )
    skew_features_max: int = Field(
        500,
        ge=0,
        description="features that a decide worker compares with baselines, some 30 series each; 0: none",
    )
    audit_batch_records: int = Field(2_000, gt=0, description="records of one audit object at most")
    audit_batch_bytes: int = Field(4_194_304, gt=0, description="bytes of one audit object at most, uncompressed")
    audit_batch_wait: DurationMs = Field(1_000, description="an audit object is written at the latest after this")
    log_level: str = Field("info", description="debug, info, warning or error")
    log_format: str = Field("auto", pattern="^(auto|json|console)$", description="auto: console on a terminal")

    @field_validator("log_level")
    @classmethod
    def _level(cls, value: str) -> str:
        level = value.lower()
        if level not in ("debug", "info", "warning", "error"):
            raise ValueError(f"{value!r} is no level: write debug, info, warning or error")
        return level

    @field_validator("kafka_bootstrap")
    @classmethod
    def _kafka(cls, value: str) -> str:
        for server in value.split(","):
            host, _, port = server.strip().rpartition(":")
            if not host or not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) <= _PORT_MAX:
                said = f"{server[:80]!r} is no server" if server.strip() else "names no server"
                raise ValueError(f"{said}: write host:port, several with commas between")
        return value

    @field_validator("topic_prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if not _PREFIXES.fullmatch(value):
            raise ValueError(
                f"{value[:80]!r} cannot begin a topic's name: write letters, digits, dots, underscores and hyphens, "
                f"{_PREFIX_LENGTH_MAX} at most"
            )
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: str) -> str:
        for url in value.split(","):
            scheme, _, place = url.strip().partition("://")
            if scheme not in ("redis", "rediss", "unix") or not place:
                # The text is not repeated: it can hold a password.
                raise ValueError("not a URL of Redis: write redis://host:port/database; rediss:// and unix:// work too")
        return value

    def topic(self, name: str) -> str:
        """A topic's full name: prefix and contract name."""
        return f"{self.topic_prefix}{name}"


def unknown_names(names: Iterable[str]) -> list[str]:
    """Which of these environment names look like settings and are none; such a setting has no effect.

    >>> unknown_names(["PATH", "BROKER_TOPIC_PREFX", "broker_topic_prefix"])
    ['BROKER_TOPIC_PREFX']
    """
    known = {f"{_PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in names if name.upper().startswith(_PREFIX) and name.upper() not in known)
