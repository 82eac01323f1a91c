"""Dead letters: the original beside its account, in Spring's headers."""

from collections.abc import Sequence

from app.adapters.dead_letters import dead_letter, publish_dead_letters
from app.domain.errors import RecordTooLarge
from app.domain.requests import InboundRecord
from app.ports.log import OutboundRecord

RECORD = InboundRecord("t.features.updates", 3, 2**40, 1_700_000_000_123, b"key", b"\xff", (("content-type", b"x"),))
ACCOUNT = (
    ("kafka_dlt-original-topic", b"t.features.updates"),
    ("kafka_dlt-original-partition", b"\x00\x00\x00\x03"),
    ("kafka_dlt-original-offset", (2**40).to_bytes(8, "big")),
    ("kafka_dlt-original-timestamp", (1_700_000_000_123).to_bytes(8, "big")),
    ("kafka_dlt-original-timestamp-type", b"CREATE_TIME"),
    ("kafka_dlt-original-consumer-group", b"t.features"),
    ("kafka_dlt-exception-fqcn", b"feature_update_refused"),
    ("kafka_dlt-exception-message", "świat is wrong".encode()),
)


class SmallLog:
    """A publisher that takes at most ``bytes_max`` of value and key."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.records: list[OutboundRecord] = []

    async def publish(self, records: Sequence[OutboundRecord]) -> Sequence[int]:
        """See Publisher."""
        for record in records:
            if len(record.value or b"") + len(record.key or b"") > self.bytes_max:
                raise RecordTooLarge(f"more than {self.bytes_max} bytes")
        self.records += records
        return range(len(records))


def test_a_dead_letter_is_the_original_and_its_account() -> None:
    """Key, value, headers and partition stay; Spring's headers say where it lay and what was wrong."""
    letter = dead_letter(RECORD, "świat is wrong", "feature_update_refused", "t.features")
    assert letter == OutboundRecord("t.features.updates-dlt", b"\xff", b"key", 3, (("content-type", b"x"), *ACCOUNT))


def test_a_second_death_replaces_the_first_account() -> None:
    """Headers of an earlier dead letter do not pile up."""
    old = InboundRecord("t.features.updates", 3, 2**40, 1_700_000_000_123, b"key", b"\xff", ACCOUNT[:4])
    letter = dead_letter(old, "świat is wrong", "feature_update_refused", "t.features")
    assert letter.headers == ACCOUNT


def test_a_long_reason_is_cut() -> None:
    """The message stays small beside the record."""
    assert len(dead_letter(RECORD, "x" * 5_000, "k", "g").headers[-1][1]) == 1_000


async def test_letters_that_do_not_fit_lose_their_value_only() -> None:
    """One that is too large goes without its value, and the headers say how large that was; the others go whole."""
    large = InboundRecord("t", 0, 1, 0, b"k" * 2_000, b"v" * 500, (("big", b"h" * 900),))
    log = SmallLog(bytes_max=1_200)
    letters = [dead_letter(RECORD, "r", "k", "g"), dead_letter(large, "r", "k", "g")]
    await publish_dead_letters(log, letters)
    whole, cut = log.records
    assert whole == letters[0]
    assert (cut.value, cut.key, cut.partition) == (None, b"k" * 1_024, 0)
    assert cut.headers[-1] == ("kafka_dlt-value-bytes-dropped", b"500")
    assert "big" not in dict(cut.headers)
