"""The examples of docs/features.md, and what the decide engine makes of them.

The page's first YAML block is the models; each later one is an example's documents. Below it stand, in any order, what
is stored, requests, and after each request what callers and auditors see.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson
import yaml

from app.domain.decisions import DecisionRecord
from app.domain.dispatch import Answer, Attempt, Row
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureValue, Value, coerce
from app.domain.registry import Revision
from app.domain.version_documents import ModelVersionSpec
from app.durations import format_duration, parse_duration_ms
from app.ports.clock import Clock
from tests.support.decide_world import World
from tests.support.markdown import ROOT

PAGE: Final = ROOT / "docs" / "features.md"
NOW_MS: Final = 1_790_000_000_000
FUNCTIONS: Final = {
    "harmonic": lambda features: 2 / (1 / features["applicant.income"] + 1 / features["inputs.amount"]),
}
_SECTION: Final = re.compile(r"^## (?P<heading>.+)\n(?P<text>(?:(?!^## ).*\n)*)", re.M)
_STEP: Final = re.compile(
    r"^(Stored|Callers ask|Callers get|Auditors see)[^\n]*:\n\n```(?:http|json)\n(.*?)^```$", re.M | re.S
)
_YAML: Final = re.compile(r"^```yaml\n(.*?)^```$", re.M | re.S)
Step = Literal["Stored", "Callers ask", "Callers get", "Auditors see"]


@dataclass(slots=True)
class Example:
    """A section with documents: its heading, them, and its steps in order."""

    heading: str
    documents: Sequence[Mapping[str, Any]]
    steps: list[tuple[Step, dict[str, Any]]] = field(default_factory=list)


def read_page(text: str) -> Iterator[Example]:
    """The page's examples in order, that of the models first."""
    for section in _SECTION.finditer(text):
        for block in _YAML.findall(section["text"]):
            example = Example(section["heading"], list(yaml.safe_load_all(block)))
            example.steps = [(kind, orjson.loads(body)) for kind, body in _STEP.findall(section["text"])]
            yield example


class Sums:
    """A ``ModelBackend`` that answers 1 / (1 + the sum of a row's numbers)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def infer(self, version: ModelVersionSpec, rows: Sequence[Row]) -> Sequence[Answer]:
        """See ``ModelBackend``."""
        (row,) = rows
        total = sum(value for value in row.values.values() if isinstance(value, int | float))
        attempt = Attempt("http://models:8000", self._clock.now_ms(), 0.0, "ok")
        return (Answer({"probability": round(1 / (1 + total), 4)}, None, (attempt,), b""),)

    async def close(self) -> None:
        """See ``ModelBackend``."""


class Asked:
    """The decide engine with a revision; call it in virtual time."""

    def __init__(self, revision: Revision) -> None:
        self._revision = revision
        self._world = World(revision, functions=FUNCTIONS)
        self._world.model = Sums(self._world.clock)  # type: ignore[assignment]  # in the scripted one's place
        self._world.clock.start_ms = NOW_MS
        self._number = 0

    async def store(self, told: Mapping[str, Any]) -> None:
        """Store what the page says is stored, as old as it says."""
        spec = self._revision.views[told["view"]]
        entities = spec.sorted_entities
        values: dict[str, Value] = {name: coerce(value, spec.types[name]) for name, value in told["values"].items()}
        key = EntityKey(
            spec.project,
            tuple(entity.name for entity in entities),
            tuple(told["entities"][entity.name] for entity in entities),
            tuple(entity.type for entity in entities),
        )
        time_ms = self._world.clock.now_ms() - parse_duration_ms(told["age"])
        types = tuple(spec.types[name] for name in values)
        await self._world.features.write(
            [FeatureRow(told["view"], key, tuple(values), tuple(values.values()), types, time_ms)]
        )

    async def ask(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The reply to a request, and what the page shows of its record."""
        if not self._world.processes:
            await self._world.start("one")
        self._number += 1
        name = f"page-{self._number}"
        self._world.send(name, value=orjson.dumps(body), correlation=name)
        await asyncio.sleep(1)
        (record,) = (each for each in self._world.audits() if each.request_id == name)
        return self._world.reply(name), recorded(record)

    async def close(self) -> None:
        """End it; nothing may have gone wrong."""
        await self._world.close()
        assert not self._world.faults


def recorded(record: DecisionRecord) -> dict[str, Any]:
    """What the page shows of an audit record."""
    return {
        "tasks": [
            {
                "name": task.name,
                "status": None if task.result is None else str(task.result.status),
                "code": str(task.result.problem.code) if task.result and task.result.problem else None,
                "features": {each.ref: _feature(each, record.received_ms) for each in task.features},
            }
            for task in record.tasks
        ]
    }


def _feature(feature: FeatureValue, received_ms: int) -> dict[str, Any]:
    told = {"status": str(feature.status), "value": feature.value, "source": feature.source, "reason": feature.reason}
    if feature.event_time_ms is not None:
        # What was stored a moment before the request came is as old as the page says, to the second.
        told["age"] = format_duration(round((received_ms - feature.event_time_ms) / 60_000) * 60_000)
    return told
