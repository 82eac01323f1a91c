"""What the demo tells in the end: counts and figures from answers and evidence, as JSON and as tables. Pure."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.domain.features import FeatureStatus
from examples.credit.applicants import PURPOSE_VIEW
from examples.credit.callers import CALLERS, Answer
from examples.credit.evidence import ROLLOUT, SHADOWED, Evidence
from examples.credit.metrics import Worker

SOURCES = ("request", "redis", "cache", "onDemand")
OUTCOMES = ("approve", "refer", "decline")
FORWARD = ("advance", "promote")
MUST_BE_ZERO = ("lost", "duplicated", "audit_missing")
MUST_NOT_BE = ("failed", "rejected")  # a machine may be too slow for a deadline; these say that something is wrong
DECLINED_AT = 0.5
"""The probability from which a model is taken to say "bad", for its accuracy; the route's own rule is finer."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of ``values`` do not exceed; 0 for none.

    >>> percentile([5.0, 1.0, 3.0, 2.0], 0.5), percentile([5.0, 1.0, 3.0, 2.0], 0.99)
    (2.0, 5.0)
    """
    ordered = sorted(values)
    return ordered[ceil(share * len(ordered)) - 1] if ordered else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the demo; ``worker`` decided, and ``holdout`` are the applicants that no model was fitted on."""

    answers: Sequence[Answer]
    seconds: float
    evidence: Evidence
    worker: Worker
    holdout: Collection[int]

    @property
    def replied(self) -> list[tuple[Answer, Mapping[str, Any]]]:
        """The answers with a reply, and the reply."""
        return [(answer, answer.reply) for answer in self.answers if answer.reply is not None]

    @property
    def audit_missing(self) -> int:
        """What was told in the log and has no record in the stores, or one that is not what was written."""
        return len(self.evidence.audit.missing) + len(self.evidence.audit.faults)

    @property
    def misses(self) -> list[str]:
        """What keeps the run from being sound, a line each: an answer that says "failed" is no decision either."""
        figures = self.as_json()
        found = [f"{figures[name]:,} {name.replace('_', ' ')}" for name in MUST_BE_ZERO if figures[name]]
        found += [f"{figures['by_status'][each]:,} {each}" for each in MUST_NOT_BE if each in figures["by_status"]]
        return found

    def as_json(self) -> dict[str, Any]:
        """The run for programs; times in milliseconds as the callers saw them."""
        latencies = [answer.latency_ms for answer, _ in self.replied]
        last = self.evidence.steps[-1] if self.evidence.steps else None
        return {
            "requests": len(self.answers),
            "replied": len(self.replied),
            "lost": len(self.answers) - len(self.replied),
            "duplicated": len(self.evidence.duplicated),
            "by_status": _counted(str(reply["status"]) for _, reply in self.replied),
            "by_version": _counted(
                f"{task['model']}-{task['version']}"
                for _, reply in self.replied
                for task in reply.get("outputs", {}).values()
            ),
            "p50_ms": round(percentile(latencies, 0.5), 2),
            "p99_ms": round(percentile(latencies, 0.99), 2),
            "decisions_per_second": round(len(self.replied) / self.seconds, 1),
            "audit_objects": self.evidence.audit.objects,
            "audit_items": self.evidence.audit.items,
            "audit_missing": self.audit_missing,
            "http_requests": sum(answer.ask.via == "http" for answer in self.answers),
            "shadow_compared": self.evidence.shadows.overall.compared,
            "flip_rate": _rounded(self.evidence.shadows.overall.flip_rate),
            "rollout": {
                "name": str(ROLLOUT),
                "state": last["state"] if last else None,
                "percent": last["percent"] if last else 0,
                "steps": sum(step["action"] in FORWARD for step in self.evidence.steps),
            },
            "feature_statuses": {
                str(each): {source: count for (status, source), count in self._given if status == each}
                for each in FeatureStatus
            },
            "cache_hit_rate": _rounded(self.worker.hit_rate),
        }

    def tables(self) -> RenderableType:
        """The run for people."""
        return Group(
            self._summary(), self._outcomes(), self._versions(), self._shadow(), self._rollout(), self._features()
        )

    def _summary(self) -> Table:
        figures = self.as_json()
        table = Table("", "", title="The run", title_justify="left", box=box.SIMPLE, show_header=False)
        table.add_row("requests", f"{figures['requests']:,}, of which {figures['http_requests']:,} over HTTP")
        statuses = ", ".join(f"{count:,} {status}" for status, count in figures["by_status"].items())
        table.add_row("replied", f"{figures['replied']:,}: {statuses or 'none'}")
        codes = _counted(error["code"] for _, reply in self.replied for error in reply.get("errors", ()))
        if codes:
            table.add_row("errors told", ", ".join(f"{count:,} {code}" for code, count in codes.items()))
        table.add_row("lost", _zero_is_good(figures["lost"]))
        table.add_row("decided twice", _zero_is_good(figures["duplicated"]))
        table.add_row("throughput", f"{figures['decisions_per_second']:,.0f} decisions a second, {CALLERS} callers")
        table.add_row("latency", f"p50 {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.1f} ms, as callers see it")
        kept = (
            f"{figures['audit_items']:,} decisions, {self.evidence.shadows.overall.count:,} shadows and "
            f"{len(self.evidence.steps)} rollout steps proven by SHA-256, in {figures['audit_objects']:,} objects"
        )
        table.add_row("audit", kept)
        table.add_row("audit missing", _zero_is_good(figures["audit_missing"]))
        # Of the example's views this one alone is cached: each applicant asks once.
        table.add_row("near cache", cache_told(self.worker))
        skew = self.worker.most_skewed
        most = f"{skew.psi:.3f}: {skew.feature} of {skew.model} {skew.version}" if skew else "told from 500 rows on"
        table.add_row("largest PSI", most)
        return table

    def _outcomes(self) -> Table:
        table = Table(
            "decision",
            "requests",
            "held out: turned good",
            "turned bad",
            title="Decisions by outcome, and what became of the loan",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        made = [(answer, _outcome(reply)) for answer, reply in self.replied]
        for outcome in [*OUTCOMES, *sorted({outcome for _, outcome in made} - set(OUTCOMES))]:
            these = [answer.ask.applicant for answer, told in made if told == outcome]
            held = [person for person in these if person.applicant_id in self.holdout]
            good, bad = (len({p.applicant_id for p in held if p.label == label}) for label in ("good", "bad"))
            table.add_row(outcome, f"{len(these):,}", str(good), str(bad))
        for column in table.columns[1:]:
            column.justify = "right"
        return table

    def _versions(self) -> Table:
        table = Table(
            "model",
            "version",
            "decisions",
            "accuracy, held out",
            title="Decisions by model version",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        tasks = [
            (answer.ask.applicant, task) for answer, reply in self.replied for task in reply.get("outputs", {}).values()
        ]
        for model, version in sorted({(task["model"], task["version"]) for _, task in tasks}):
            these = [(person, task) for person, task in tasks if (task["model"], task["version"]) == (model, version)]
            right = {
                person.applicant_id: (task["output"]["probability"] >= DECLINED_AT) == (person.label == "bad")
                for person, task in these
                if person.applicant_id in self.holdout and "probability" in (task.get("output") or {})
            }
            accuracy = f"{sum(right.values()) / len(right):.1%} of {len(right)}" if right else "-"
            table.add_row(model, version, f"{len(these):,}", accuracy)
        for column in table.columns[2:]:
            column.justify = "right"
        return table

    @property
    def _given(self) -> list[tuple[tuple[str, str], int]]:
        return sorted(self.evidence.given.items())

    def _features(self) -> Table:
        """What the records of the decisions say of each input of each model."""
        counts = self.evidence.given
        statuses = list(FeatureStatus)
        title = "What the models were given, by source and status"
        table = Table("source", *statuses, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for source in [*SOURCES, *sorted({source for _, source in counts} - set(SOURCES))]:
            of_status = (counts.get((status, source), 0) for status in statuses)
            table.add_row(source, *(f"{count:,}" if count else "-" for count in of_status))
        for column in table.columns[1:]:
            column.justify = "right"
        return table

    def _shadow(self) -> Table:
        """Who would have been told otherwise, and how far the scores lie apart."""
        route, task = SHADOWED
        table = Table(
            "loans",
            "compared",
            "decided otherwise",
            "flip rate",
            "mean difference",
            "PSI",
            title=f"The shadow of {route}/{task}: had version 2 decided where version 1 did",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        shadows = self.evidence.shadows
        for name, account in [("all", shadows.overall), *sorted(shadows.segments.items())]:
            pairs = account.outputs.get("probability")
            table.add_row(
                Text(name),
                f"{account.compared:,}",
                f"{account.flips:,}",
                _or_dash(account.flip_rate, ".1%"),
                _or_dash(pairs.mean_difference if pairs else None, "+.3f"),
                _or_dash(pairs.psi if pairs else None, ".3f"),
            )
        for column in table.columns[1:]:
            column.justify = "right"
        return table

    def _rollout(self) -> Table:
        """Each step as the audit tells it."""
        table = Table(
            "step",
            "share of version 2",
            "because",
            title=f"The rollout of {ROLLOUT}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        table.columns[1].justify = "right"
        for step in self.evidence.steps:
            table.add_row(step["action"], f"{step['percent']} %", Text(step["reason"] or "the registry was published"))
        return table


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def cache_told(worker: Worker) -> str:
    """How the near cache did; where it gave nothing, why. A short run is over before it keeps what was just loaded.

    >>> cache_told(Worker({"hit": 550, "miss": 40, "shared": 6}, None))
    '550 of 596 reads of view purpose (92.3%), 46 waited for Redis'
    >>> cache_told(Worker({"hit": 0, "miss": 25}, None))
    '0 of 25 reads of view purpose (0.0%), 25 waited for Redis: a row with aggregates is kept once its updates are known to be stored, and the load was just before'
    >>> cache_told(Worker({}, None))
    'view purpose was not read: no request was given to a version that needs it'
    """  # noqa: E501 - the text is one line
    if worker.hit_rate is None:
        return f"view {PURPOSE_VIEW} was not read: no request was given to a version that needs it"
    told = (
        f"{worker.held:,} of {worker.reads:,} reads of view {PURPOSE_VIEW} ({worker.hit_rate:.1%}), "
        f"{worker.reads - worker.held:,} waited for Redis"
    )
    if worker.held:
        return told
    return (
        f"{told}: a row with aggregates is kept once its updates are known to be stored, and the load was just before"
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _outcome(reply: Mapping[str, Any]) -> str:
    return str((reply.get("result") or {}).get("decision", reply["status"]))


def _counted(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _zero_is_good(count: int) -> Text:
    return Text(f"{count:,}", style="red bold" if count else "green")
