"""``model-broker explain``: what would happen to a request, told without running it."""

import dataclasses
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from app.adapters.registry_topic import read_published
from app.commands.registry import Json, fail, read_files, shortened
from app.commands.rollouts import how_far
from app.domain.errors import BrokerError, ConfigurationError, RequestRefused
from app.domain.explanation import Explanation, TaskTrace, VersionTrace, explain
from app.domain.requests import Envelope, Headers, InboundRecord, Request, RequestId, read_request
from app.domain.version_documents import HttpBackend, ModelVersionSpec
from app.durations import format_duration
from app.settings import Settings

explain_app = typer.Typer(rich_markup_mode=None, add_completion=False)


@explain_app.command(
    "explain", epilog="Example: model-broker explain /credit/card --entities applicant_id=17 --inputs amount=5000"
)
def explain_path(
    path: Annotated[str, typer.Argument(help="The path that a caller would name.")],
    entities: Annotated[list[str] | None, typer.Option(help="A JSON object, or name=value; may be repeated.")] = None,
    inputs: Annotated[list[str] | None, typer.Option(help="As --entities.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="As --entities.")] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="A header of the request, name=value; may be repeated.")
    ] = None,
    request_id: Annotated[
        str | None, typer.Option(help="Draws an arm where no stickyBy does; without it, every arm is shown.")
    ] = None,
    file: Annotated[
        list[Path] | None, typer.Option("-f", "--file", help="Documents to ask instead of the current revision.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what would happen to a request, without running it; exit 1 where it would be rejected."""
    try:
        sections = {
            "entities": _section("entities", entities),
            "inputs": _section("inputs", inputs),
            "metadata": _section("metadata", metadata),
        }
        if file:
            revision = read_files(file, today=None)
        else:
            published = read_published(Settings())
            if published is None:
                raise ConfigurationError("no revision was published yet: `model-broker apply -f DIR`, or pass -f DIR")
            revision = published.revision
        request = _request(path, sections, request_id, _headers(header))
        explanation = explain(revision, request, time.time_ns() // 1_000_000, drawn=request_id is not None)
    except BrokerError as error:
        fail(error, as_json=as_json)
    if as_json:
        typer.echo(orjson.dumps(_explanation_json(explanation)))
    else:
        _print_explanation(explanation)
    if explanation.refused or explanation.problems or any(task.problems for task in explanation.tasks):
        raise typer.Exit(1)


def _section(name: str, given: list[str] | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in given or ():
        if text.lstrip().startswith("{"):
            try:
                values |= orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise ConfigurationError(f"--{name}: not a JSON object: {error}") from error
            continue
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"--{name}: {text!r} is neither a JSON object nor name=value")
        try:
            values[key] = orjson.loads(value)
        except orjson.JSONDecodeError:
            values[key] = value
    return values


def _headers(given: list[str] | None) -> Headers:
    pairs = [text.partition("=") for text in given or ()]
    for name, equals, value in pairs:
        if not equals or not name:
            raise ConfigurationError(f"--header: {name + equals + value!r} is not name=value")
    return tuple((name, value.encode()) for name, _, value in pairs)


def _request(path: str, sections: dict[str, Any], request_id: str | None, headers: Headers) -> Request:
    record = InboundRecord("explain", 0, 0, 0, None, None, headers)
    envelope = Envelope(RequestId(request_id) if request_id else None, None, None, None, "normal", "application/json")
    try:
        return read_request(envelope, {"path": path, **sections}, record)
    except RequestRefused as error:
        raise ConfigurationError(error.problem.message) from error


def _explanation_json(explanation: Explanation) -> dict[str, Any]:
    return {
        "revision": explanation.revision,
        "route": explanation.route,
        "placeholders": explanation.placeholders,
        "deadline_ms": explanation.deadline_ms,
        "pinnable": explanation.pinnable,
        "rules": [dataclasses.asdict(rule) for rule in explanation.rules],
        "rule": explanation.rule,
        "join": explanation.join,
        "tasks": [_task_json(task) for task in explanation.tasks],
        "entities": [
            {"view": need.view, "entities": dict(zip(need.key.names, need.key.values, strict=True))}
            for need in explanation.needs
        ],
        "result": explanation.result or {},
        "reasons": [{"code": code, "when": text} for code, text in (explanation.reasons or {}).items()],
        "problems": [problem.as_json() for problem in explanation.problems],
        "rejected": explanation.refused.as_json() if explanation.refused else None,
    }


def _task_json(task: TaskTrace) -> dict[str, Any]:
    return {
        "name": task.spec.name,
        "model": task.spec.model,
        "version": task.version.version if task.version else None,
        "selected_by": task.selected_by,
        "experiment": task.experiment,
        "subject": task.subject,
        "arms": [dataclasses.asdict(arm) for arm in task.arms],
        "barred": task.barred.as_json() if task.barred else None,
        "rollout": dataclasses.asdict(task.rollout) if task.rollout else None,
        "need": task.spec.need,
        "default": task.spec.default,
        "after": task.spec.after,
        "when": task.spec.when,
        "on_unavailable": task.spec.on_unavailable,
        "versions": [_version_json(each) for each in task.versions],
        "problems": [problem.as_json() for problem in task.problems],
        "notes": task.notes,
    }


def _version_json(each: VersionTrace) -> dict[str, Any]:
    members: dict[str, Any] = {"role": each.role, "selected_by": each.selected_by}
    if each.version is None:
        return members | {"output": each.output}
    if each.role == "shadow":
        members |= {"percent": each.percent, "drawn": each.drawn, "segment": each.segment}
    return members | {
        "version": each.version.version,
        "backend": each.backend,
        "expired": each.expired,
        "approved": each.approved,
        "timeout_ms": each.version.policy.timeout,
        **_calls(each.version),
        **_ejection(each.version),
        "features": [dataclasses.asdict(feature) for feature in each.features],
        "problems": [problem.as_json() for problem in each.problems],
    }


def _calls(version: ModelVersionSpec) -> dict[str, int]:
    """What applies to calls of ``version`` from here; a queued one is called by its pool's workers."""
    if isinstance(version.backend, HttpBackend):
        policy = version.policy
        shared = {} if policy.batch is None else {"batch_max_size": policy.batch.max_size}
        return {"retries": policy.retries, "concurrency": policy.concurrency, **shared}
    return {}


def _ejection(version: ModelVersionSpec) -> dict[str, Any]:
    """When an endpoint of ``version`` is left out for a while; of a queued one there are none."""
    outlier = version.policy.outlier
    return {"outlier": outlier.model_dump()} if isinstance(version.backend, HttpBackend) else {}


def _print_explanation(explanation: Explanation) -> None:
    width = Console().width
    # With one space the id, which must not be broken, fits 80 columns.
    typer.echo(f"revision {explanation.revision}")
    for line in _lines(explanation):
        typer.echo(_wrapped(line, width))


def _wrapped(line: str, width: int) -> str:
    """The line in ``width`` columns, what is continued below what it says."""
    own = len(line) - len(line.lstrip())
    label = re.match(r"[a-z]+ {2,}", line)
    indent = " " * (own + 2 if label is None else label.end() + 2)
    return textwrap.fill(line, max(width, 40), subsequent_indent=indent, break_on_hyphens=False, tabsize=1)


def _lines(explanation: Explanation) -> Iterator[str]:
    if explanation.route is not None and explanation.deadline_ms is not None:
        yield f"route     {explanation.route}, deadline {format_duration(explanation.deadline_ms)}"
    for name, value in explanation.placeholders.items():
        yield f"          metadata.{name} = {value}"
    if explanation.pinnable:
        yield f"          metadata.model_version may name a version of {', '.join(explanation.pinnable)}"
    for rule in explanation.rules:
        yield f"rule      {rule.name}: {'matches' if rule.matched else 'does not match'}; {rule.reason}"
    for task in explanation.tasks:
        yield from _task_lines(task)
    for need in explanation.needs:
        key = ", ".join(f"{name}={value}" for name, value in zip(need.key.names, need.key.values, strict=True))
        yield f"fetch     {need.view} of {key}"
    if explanation.join is not None:
        yield f"join      {explanation.join}"
    for name, text in (explanation.result or {}).items():
        yield f"result    {name} = {text}"
    for code, text in (explanation.reasons or {}).items():
        yield f"reason    {code} if {text}"
    found = (*explanation.problems, *(each for task in explanation.tasks for each in task.problems))
    for problem in dict.fromkeys(found):
        yield f"problem   {problem.code}: {problem.message}"
    if explanation.refused is not None:
        yield f"rejected  {explanation.refused.code}: {explanation.refused.message}"


def _task_lines(task: TaskTrace) -> Iterator[str]:
    spec, gap = task.spec, " " * 10
    which = f"version {task.version.version}" if task.version else "a version that the request's id decides"
    yield f"task      {spec.name}: {spec.model}, {which}, by {task.selected_by}"
    if task.experiment is not None:
        by = spec.select.sticky_by or "request id"
        whom = f": {task.subject}" if task.subject is not None else ""
        yield f"{gap}experiment {task.experiment}, drawn by {by}{whom}"
    for arm in task.arms:
        hashed = f", fraction {arm.fraction:.12f}, score {arm.score:.6g}" if arm.fraction is not None else ""
        drawn = " <- drawn" if arm.drawn else ""
        yield f"{gap}arm {arm.version}: weight {arm.weight} ({arm.percent:.4g} %){hashed}{drawn}"
    if task.rollout is not None:
        rollout = task.rollout
        begun = rollout.state != "not begun"
        at = how_far(rollout.step, rollout.steps, rollout.percent) if begun else f"{rollout.percent} %"
        why = f"; {rollout.reason}" if rollout.reason else ""
        yield f"{gap}rollout to {rollout.to}: {rollout.state}, {at}{why}"
    if task.barred is not None:
        yield f"{gap}not usable: {task.barred.message}"
    need = spec.need if spec.default is None else f"default {shortened(dict(spec.default))}"
    yield f"{gap}need: {need}; an expired or unapproved version: {spec.on_unavailable}"
    if spec.after:
        yield f"{gap}after {', '.join(spec.after)}" + (f", when {spec.when}" if spec.when else "")
    for each in task.versions:
        yield from (gap + line for line in _version_lines(each))
    for note in task.notes:
        yield f"{gap}note: {note}"


def _version_lines(each: VersionTrace) -> Iterator[str]:
    if each.version is None:
        yield f"{each.selected_by}: {shortened(dict(each.output or {}))}"
        return
    part = ""
    if each.role == "shadow":
        runs = {True: ", this one too", False: ", not this one", None: ""}[each.drawn]
        segment = f", by {each.segment}" if each.segment else ""
        part = f"{each.percent:g} % of decisions{runs}{segment}; "
    named = f"version {each.version.version}" if each.role in ("own", "arm") else each.selected_by
    version = f" (version {each.version.version})" if " alias " in named else ""
    barred = (", not approved" if not each.approved else "") + (", expired" if each.expired else "")
    yield f"{named}{version}: {part}{each.backend}{barred}"
    policy = each.version.policy
    calls = "".join(f", {name} {value}" for name, value in _calls(each.version).items())
    yield f"  timeout {format_duration(policy.timeout)}{calls}"
    if outlier := _ejection(each.version).get("outlier"):
        base, most = format_duration(outlier["base_ejection"]), format_duration(outlier["max_ejection"])
        times = outlier["consecutive_failures"]
        when = f"after {times} failures in a row, for {base} to {most}" if times else "never"
        yield f"  an endpoint is ejected {when}"
    for feature in each.features:
        age = f", at most {format_duration(feature.max_age_ms)} old" if feature.max_age_ms is not None else ""
        yield f"  {feature.ref} ({feature.type or 'as sent'}): {feature.contract}{age}"
        if feature.computed is not None:
            yield f"    computed of {', '.join(feature.ingredients) or 'nothing'}: {feature.computed}"
