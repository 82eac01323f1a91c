"""The examples of docs/routing.md, and what the decide engine makes of them.

The page's first YAML block is the models; each later one is a strategy's route. Below it stand requests (as HTTP:
headers, an empty line, the body) and, after each, what callers see and what auditors see, as parts of reply and record.
"""

import asyncio
import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
import yaml

from app.domain.decisions import DecisionRecord, Kind, TaskRecord
from app.domain.dispatch import Answer, Attempt, Row
from app.domain.errors import Code, Problem
from app.domain.registry import Revision, Source, compile_revision, read_revision
from app.domain.requests import Headers
from app.domain.rollout_status import with_status
from app.domain.version_documents import ModelVersionSpec
from app.ports.clock import Clock
from tests.support.decide_world import World
from tests.support.markdown import ROOT

PAGE: Final = ROOT / "docs" / "routing.md"
MODELS: Final = "The models of these examples"
SETTLED_S: Final = 2.0

_SECTION: Final = re.compile(r"^## (?P<heading>.+)\n(?P<text>(?:(?!^## ).*\n)*)", re.M)
_FENCE: Final = re.compile(r"^(?P<before>[^\n]+):\n\n```(?P<language>http|json)\n(?P<text>.*?)^```$", re.M | re.S)
_YAML: Final = re.compile(r"^```yaml\n(.*?)^```$", re.M | re.S)
_ON_DAY: Final = re.compile(r"\bon (\d{4}-\d{2}-\d{2})$")


@dataclass(slots=True)
class Asking:
    """A request of the page, on which day (None: any), and what is shown of reply and records."""

    headers: Headers
    body: dict[str, Any]
    day: datetime.date | None
    reply: dict[str, Any] | None = None
    record: dict[str, Any] | None = None


@dataclass(slots=True)
class Example:
    """One strategy: its heading, its documents, and what is asked of them."""

    heading: str
    documents: Sequence[Mapping[str, Any]]
    askings: list[Asking] = field(default_factory=list)


def read_page(text: str) -> Iterator[Example]:
    """The page's examples in order, that of the models first."""
    for section in _SECTION.finditer(text):
        blocks = _YAML.findall(section["text"])
        if not blocks:
            continue
        (block,) = blocks
        example = Example(section["heading"], list(yaml.safe_load_all(block)))
        for fence in _FENCE.finditer(section["text"]):
            if fence["language"] == "http":
                head, _, body = fence["text"].rpartition("\n\n")
                pairs = (line.partition(": ") for line in head.splitlines())
                headers = tuple((name, value.encode()) for name, _, value in pairs)
                day = _ON_DAY.search(fence["before"])
                on = datetime.date.fromisoformat(day[1]) if day else None
                example.askings.append(Asking(headers, orjson.loads(body), on))
            elif fence["before"].startswith("Auditors see"):
                example.askings[-1].record = orjson.loads(fence["text"] or "{}")
            else:
                example.askings[-1].reply = orjson.loads(fence["text"] or "{}")
        yield example


def revision_of(*examples: Example) -> Revision:
    """The examples' documents as one revision, with the status that `apply` gives their rollouts."""
    sources = [
        Source(f"{each.heading}:{number}", document)
        for each in examples
        for number, document in enumerate(each.documents)
    ]
    return compile_revision(with_status(read_revision(sources).documents, (), 0))


class PageModels:
    """A ``ModelBackend`` of the page's models: the probability rises with the amount, each version's in its own way."""

    RISES: Final[Mapping[tuple[str, str], tuple[float, float]]] = {
        ("credit-pd", "2"): (30_000, 0.005),
        ("credit-pd", "3"): (50_000, 0.005),
        ("credit-pd", "4"): (40_000, 0.010),
        ("credit-pd", "5"): (25_000, 0.100),
        ("credit-pd-large", "1"): (45_000, 0.040),
    }
    """By version: the amount that is sure to fail, and how many seconds an answer takes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def infer(self, version: ModelVersionSpec, rows: Sequence[Row]) -> Sequence[Answer]:
        """See ``ModelBackend``."""
        (row,) = rows
        amount = row.values["amount"]
        assert isinstance(amount, float)
        _, seconds = self.RISES[version.model, version.version]
        await asyncio.sleep(seconds)
        attempt = Attempt("http://models:8000", self._clock.now_ms(), seconds * 1_000, "ok")
        if version.version == "4" and amount > 100_000:
            return (Answer(None, Problem(Code.MODEL_ERROR, "500 Internal Server Error"), (attempt,), b""),)
        return (Answer({"probability": self.score(version, amount)}, None, (attempt,), b""),)

    @classmethod
    def score(cls, version: ModelVersionSpec, amount: float) -> float:
        """The probability that a version answers."""
        certain, _ = cls.RISES[version.model, version.version]
        return round(min(1.0, amount / certain), 4)

    def refusal(self, version: ModelVersionSpec) -> Answer | None:
        """See ``ModelBackend``."""
        return None

    async def close(self) -> None:
        """See ``ModelBackend``."""


async def answer(revision: Revision, asking: Asking) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The reply to a request and the audit's records of it, from the decide engine; call it in virtual time."""
    world = World(revision)
    world.model = PageModels(world.clock)  # type: ignore[assignment]  # in the scripted one's place
    if asking.day is not None:
        midnight = datetime.datetime.combine(asking.day, datetime.time(), datetime.UTC)
        world.clock.start_ms = round(midnight.timestamp() * 1_000)
    await world.start("one")
    world.send(asking.body.get("request_id", "page"), value=orjson.dumps(asking.body), headers=asking.headers)
    await asyncio.sleep(SETTLED_S / 2)
    for task in world.tasks():
        # The page's pool has all the time in the world: what it answers comes after the reply.
        amount = task.row.values["amount"]
        assert isinstance(amount, float)
        world.answer(task, score=PageModels.score(revision.versions[task.model, task.version], amount))
    await asyncio.sleep(SETTLED_S / 2)
    await world.close()
    assert not world.faults
    return world.reply(), [recorded(each) for each in world.audits()]


def recorded(record: DecisionRecord) -> dict[str, Any]:
    """What the page shows of an audit record."""
    told: dict[str, Any] = {"kind": str(record.kind), "path": record.path, "route": record.route, "rule": record.rule}
    told["headers"] = {name: value.decode(errors="replace") for name, value in record.source.headers}
    told["tasks"] = [_task(task) for task in record.tasks]
    if record.kind is not Kind.DECISION:
        told["evidence"] = orjson.loads(record.evidence or b"{}")
    return told


def _task(task: TaskRecord) -> dict[str, Any]:
    told: dict[str, Any] = {"name": task.name, "version": task.version, "selected_by": task.selected_by}
    told |= {"experiment": task.experiment, "need": task.need}
    if task.result is not None:
        told["status"] = str(task.result.status)
        told["code"] = str(task.result.problem.code) if task.result.problem else None
    told["earlier"] = [_task(each) for each in task.earlier]
    return told


def is_part(shown: object, whole: object) -> bool:
    """Whether ``whole`` has all that is ``shown``: members of objects may be left out, items of lists may not.

    >>> is_part({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 2}], "d": 3}), is_part({"a": []}, {"a": [1]})
    (True, False)
    """
    if isinstance(shown, dict):
        return isinstance(whole, dict) and all(
            name in whole and is_part(value, whole[name]) for name, value in shown.items()
        )
    if isinstance(shown, list):
        return (
            isinstance(whole, list)
            and len(shown) == len(whole)
            and all(is_part(one, other) for one, other in zip(shown, whole, strict=True))
        )
    return shown == whole
