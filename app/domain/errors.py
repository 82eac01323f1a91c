"""What can go wrong, as one tree and one list of codes.

Outcomes a caller sees are values, ``Problem(code, message, task, feature)``, with codes from ``Code``. Exceptions are
for what stops the work at hand::

    BrokerError
    ├── RequestRefused      the request itself is wrong: reply "rejected", acknowledge
    │   └── Undecodable     its bytes cannot be read: the same, and a copy to the dead-letter topic
    ├── DocumentsRefused    registry documents are wrong, each fault listed: nothing is published
    ├── RevisionConflict    another revision was published meanwhile: nothing is published, apply again
    ├── ExpressionFailed    a CEL expression did not evaluate: the caller of the expression names where
    ├── NotOwner            this worker lost the partition: drop the work, the new owner does it (retry)
    ├── StoreUnavailable    a store does not answer: the contract of each feature decides (retry)
    │   └── ServerFailed    a feature server, in whatever way: the same, with a reason for its features
    ├── RowsRefused         some rows can never be stored, the others are: bury those (dead-letter)
    ├── ReplyTimeout        a request reached Kafka and no reply came while its caller waited: ask again by its id
    ├── RepliesFull         as many requests wait for replies as may: refuse, with a time to come back (retry)
    ├── EvidenceDamaged     an audit record is not what its pointer says: an operator looks into it
    ├── LetterUnknown       there is no such dead letter: name one that is there
    ├── RedriveRefused      a dead letter is not sent back: the message says why and what to do
    ├── PublishFailed       Kafka did not acknowledge a record: retry while the partition is ours
    ├── PublisherBroken     the producer itself is beyond repair (crash)
    ├── RecordTooLarge      a record exceeds Kafka's limit: the outcome becomes "failed" (dead-letter)
    └── ConfigurationError  settings, topics or a dependency are wrong: one clear line, exit non-zero (crash)
        └── Unreachable     Kafka cannot be reached at all: a command ends by it, a worker tries again (retry)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """Codes of ``errors[].code`` in a reply; docs/errors.md describes each."""

    REQUEST_MALFORMED = "request_malformed"
    REQUEST_INVALID = "request_invalid"
    REQUEST_TOO_LARGE = "request_too_large"
    REQUEST_ID_CONFLICT = "request_id_conflict"
    REPLY_TOPIC_NOT_ALLOWED = "reply_topic_not_allowed"
    PATH_UNKNOWN = "path_unknown"
    NO_RULE_MATCHED = "no_rule_matched"
    RULE_FAILED = "rule_failed"
    CONDITION_FAILED = "condition_failed"
    SUBJECT_MISSING = "subject_missing"
    VERSION_NOT_ALLOWED = "version_not_allowed"
    VERSION_EXPIRED = "version_expired"
    VERSION_UNAPPROVED = "version_unapproved"
    ENTITY_MISSING = "entity_missing"
    ENTITY_INVALID = "entity_invalid"
    FEATURE_MISSING = "feature_missing"
    FEATURE_STALE = "feature_stale"
    FEATURE_INVALID = "feature_invalid"
    FEATURES_UNAVAILABLE = "features_unavailable"
    REFERRED = "referred"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    MODEL_TIMEOUT = "model_timeout"
    MODEL_UNAVAILABLE = "model_unavailable"
    MODEL_EJECTED = "model_ejected"
    MODEL_ERROR = "model_error"
    MODEL_OUTPUT_INVALID = "model_output_invalid"
    PREDECESSOR_FAILED = "predecessor_failed"
    QUORUM_MISSED = "quorum_missed"
    RESULT_FAILED = "result_failed"
    RECORD_TOO_LARGE = "record_too_large"
    INTERNAL = "internal_error"


@dataclass(frozen=True, slots=True)
class Problem:
    """One entry of a reply's ``errors``: what was wrong, where, and what to do, in ``message``."""

    code: Code
    message: str
    task: str | None = None
    feature: str | None = None

    def as_json(self) -> dict[str, str]:
        """The reply's form: absent members are left out."""
        members = {
            "code": str(self.code),
            "task": self.task,
            "feature": self.feature,
            "message": self.message,
        }
        return {name: value for name, value in members.items() if value is not None}


class BrokerError(Exception):
    """The root: catching it catches what this project raises on purpose, and nothing else."""


class RequestRefused(BrokerError):
    """The request is wrong; ``problem`` is what the caller reads."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class Undecodable(RequestRefused):
    """The request's bytes cannot be read at all; they go to the dead-letter topic as they came."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in registry documents: in which file and line, document and field; parts that do not apply are
    empty.

    >>> str(Fault("a.yaml:1", "Route credit", "spec.path", "is missing"))
    'a.yaml:1: Route credit: spec.path: is missing'
    """

    origin: str
    document: str
    field: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin, self.document, self.field, self.message) if part)


class DocumentsRefused(BrokerError):
    """Registry documents are wrong; ``faults`` lists everything that is."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = tuple(faults)


class RevisionConflict(BrokerError):
    """The registry moved on while a revision was about to be published; the message names what it is now."""


class PublisherFenced(RevisionConflict):
    """Another publisher took over while this one was at it; what that one publishes is not known yet."""


class HeadRefused(BrokerError):
    """What was published last is refused, so nothing is published after it; the message names why."""


class ExpressionFailed(BrokerError):
    """A CEL expression does not compile or evaluate; the message names the reason."""


class NotOwner(BrokerError):
    """The partition belongs to another worker now; whatever was being done for it is that worker's to do."""


class StoreUnavailable(BrokerError):
    """A store did not answer in time; what it holds is unknown, which is not the same as missing."""


class ServerFailed(StoreUnavailable):
    """A feature server gave no sound answer; ``why`` says so to callers, without what only operators may read."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class RowsRefused(BrokerError):
    """Rows that no repetition will store; all others of the same call are stored.

    ``refused`` are the reasons, by the rows' places in the call; ``written`` is how many others changed something.
    """

    def __init__(self, refused: Mapping[int, str], written: int) -> None:
        super().__init__(f"{len(refused)} rows cannot be stored, the first: {next(iter(refused.values()), '')[:300]}")
        self.refused = dict(refused)
        self.written = written


class ReplyTimeout(BrokerError):
    """A request is in Kafka and its reply did not come in time; its decision is made all the same."""


class RepliesFull(BrokerError):
    """As many requests wait for their replies as the settings allow; nothing was sent."""


class EvidenceDamaged(BrokerError):
    """An audit record is gone or altered; the message names its object, range and what was found."""


class LetterUnknown(BrokerError):
    """There is no such dead-letter topic, or no letter at that place; the message names what there is."""


class RedriveRefused(BrokerError):
    """A dead letter is not sent back to where it came from; the message says why."""


class PublishFailed(BrokerError):
    """Kafka did not acknowledge a record within the producer's own retries."""


class PublisherBroken(BrokerError):
    """The idempotent producer has lost its place for good; only a new process has one again."""


class RecordTooLarge(BrokerError):
    """A record is larger than Kafka takes; retrying cannot help."""


class ConfigurationError(BrokerError):
    """The process cannot do its work as configured; the message says what to set or start."""


class Unreachable(ConfigurationError, StoreUnavailable):
    """Kafka is not there: an error of configuration to whoever starts, an outage to whoever was served before."""


def raised(error: BaseException) -> str:
    """What foreign code raised, by type and words in one line; where its words cannot be had either, by type.

    >>> raised(ValueError("not\\n  so"))
    'ValueError: not so'
    """
    name = type(error).__name__
    try:
        said = " ".join(str(error).split())[:300]
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - the words are foreign code, too
        return name
    return f"{name}: {said}"
