"""What is known beforehand, put into the feature store as a lender would: by `model-broker features load`.

One load is of the applicants, what is stored about each. The other is of the loans asked for, by purpose, which the
features worker adds up. The data has no dates; they are taken to have been asked for today, as the day began, so that a
load that is run again on the same day counts no loan twice.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from examples.credit.applicants import DATA, PURPOSE_VIEW, VIEW

STORED_WITHIN_S = 120  # the features worker may only be starting
ENDS_WITHIN_S = 180.0
KILLED_WITHIN_S = 10.0


class LoadFailed(Exception):
    """The features could not be loaded; the message is the command's."""


@dataclass(frozen=True, slots=True)
class Load:
    """A load of one view, under way."""

    view: str
    process: subprocess.Popen[bytes]

    def result(self) -> Mapping[str, Any]:
        """What the command tells once all is stored: `rows`, `seconds` and more.

        Raises LoadFailed when it is not.
        """
        try:
            said, complaint = self.process.communicate(timeout=ENDS_WITHIN_S)
        except subprocess.TimeoutExpired as error:
            raise LoadFailed(f"features load of view {self.view} did not end in {ENDS_WITHIN_S:.0f} s") from error
        if self.process.returncode != 0:
            raise LoadFailed(f"features load of view {self.view}: {complaint.decode(errors='replace').strip()}")
        summary: dict[str, Any] = orjson.loads(said)
        return summary


def commands(today: datetime) -> dict[str, list[str]]:
    """The command lines, after `model-broker`, by view.

    >>> for words in commands(datetime(2026, 1, 31, tzinfo=UTC)).values():
    ...     print(*words[3:])
    --event-time-value 2026-01-31 --view applicant --map @row=applicant_id
    --event-time-value 2026-01-31 --view purpose
    """
    load = ["features", "load", str(DATA), "--event-time-value", today.date().isoformat()]
    return {
        VIEW: [*load, "--view", VIEW, "--map", "@row=applicant_id"],
        PURPOSE_VIEW: [*load, "--view", PURPOSE_VIEW],
    }


@contextmanager
def loading(env: Mapping[str, str]) -> Iterator[list[Load]]:
    """Both loads, begun at once beside whatever else goes on; what has not ended at the end is ended."""
    begun: list[Load] = []
    try:
        for view, words in commands(datetime.now(UTC)).items():
            command = [sys.executable, "-m", "app.cli", *words, "--timeout", f"{STORED_WITHIN_S}s", "--json"]
            process = subprocess.Popen(command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            begun.append(Load(view, process))
        yield begun
    finally:
        for load in begun:
            if load.process.poll() is None:
                load.process.kill()
                load.process.communicate(timeout=KILLED_WITHIN_S)
