"""What libraries repeat is said once in a while, and never lost from sight."""

import logging

from app.observability import Repeats


def _record(
    message: str, *args: object, at_s: float, name: str = "aiokafka", level: int = logging.ERROR
) -> logging.LogRecord:
    record = logging.LogRecord(name, level, __file__, 1, message, args, None)
    record.created = at_s
    return record


def test_a_repeated_message_is_said_once_in_ten_seconds_with_its_count() -> None:
    """Attempts of one client at one node are one message, whatever differs in them."""
    repeats = Repeats()
    attempts = [_record("Unable to reach %s: %s", 1, f"attempt {n}", at_s=100 + n) for n in range(11)]
    assert [repeats.filter(each) for each in attempts] == [True, *[False] * 9, True]
    assert attempts[-1].getMessage() == "Unable to reach 1: attempt 10 (and 9 times more since it was said last)"


def test_what_differs_in_logger_level_template_or_first_argument_is_another_message() -> None:
    """Another node, another facility, a warning: each is said."""
    repeats = Repeats()
    records = [
        _record("Unable to reach %s", 1, at_s=0.0),
        _record("Unable to reach %s", 2, at_s=0.0),
        _record("Failed to fetch from %s", 1, at_s=0.0),
        _record("Unable to reach %s", 1, at_s=0.0, level=logging.WARNING),
        _record("Unable to reach %s", 1, at_s=0.0, name="librdkafka"),
    ]
    assert all(repeats.filter(each) for each in records)


def test_a_mapping_of_arguments_is_no_first_argument() -> None:
    """Named arguments, which logging passes as one mapping, are what the message is filled with."""
    repeats = Repeats()
    named = logging.LogRecord("x", logging.ERROR, __file__, 1, "%(what)s", ({"what": "a"},), None)
    assert repeats.filter(named)
    assert named.getMessage() == "a"


def test_messages_without_end_take_no_memory_without_end() -> None:
    """Ever new texts are all said; what is remembered of them is bounded."""
    repeats = Repeats()
    assert all(repeats.filter(_record(f"text {n}", at_s=0.0)) for n in range(1_000))
    assert len(repeats._said) <= 256
