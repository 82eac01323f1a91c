"""``model-broker explain``: what would happen to a request, told without running it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from app.adapters.registry_topic import read_published
from app.commands.registry import Json, fail, read_files, shortened
from app.domain.documents import HttpBackend, ModelVersionSpec
from app.domain.errors import BrokerError, ConfigurationError, RequestRefused
from app.domain.explanation import Explanation, explain
from app.domain.requests import Envelope, InboundRecord, Request, RequestId, read_request
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
    request_id: Annotated[
        str | None, typer.Option(help="Decides which arm of a split is drawn; without it, every arm is shown.")
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
        explanation = explain(revision, _request(path, sections, request_id), drawn=request_id is not None)
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


def _request(path: str, sections: dict[str, Any], request_id: str | None) -> Request:
    record = InboundRecord("explain", 0, 0, 0, None, None, ())
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
        "rules": [dataclasses.asdict(rule) for rule in explanation.rules],
        "rule": explanation.rule,
        "tasks": [
            {
                "name": task.spec.name,
                "model": task.version.model,
                "version": task.version.version,
                "selected_by": task.selected_by,
                "need": task.spec.need,
                "default": task.spec.default,
                "backend": task.backend,
                "timeout_ms": task.version.policy.timeout,
                **_calls(task.version),
                "features": [dataclasses.asdict(feature) for feature in task.features],
                "problems": [problem.as_json() for problem in task.problems],
            }
            for task in explanation.tasks
        ],
        "entities": [
            {"view": need.view, "entities": dict(zip(need.key.names, need.key.values, strict=True))}
            for need in explanation.needs
        ],
        "result": explanation.result,
        "problems": [problem.as_json() for problem in explanation.problems],
        "rejected": explanation.refused.as_json() if explanation.refused else None,
    }


def _calls(version: ModelVersionSpec) -> dict[str, int]:
    """What applies to calls of ``version`` from here; a queued one is called by its pool's workers."""
    if isinstance(version.backend, HttpBackend):
        return {"retries": version.policy.retries, "concurrency": version.policy.concurrency}
    return {}


def _print_explanation(explanation: Explanation) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"revision  {explanation.revision}")
    if explanation.route is not None and explanation.deadline_ms is not None:
        console.print(f"route     {explanation.route}, deadline {format_duration(explanation.deadline_ms)}")
    for name, value in explanation.placeholders.items():
        console.print(f"          metadata.{name} = {value}")
    for rule in explanation.rules:
        console.print(f"rule      {rule.name}: {'matches' if rule.matched else 'does not match'}; {rule.reason}")
    for task in explanation.tasks:
        model, version = task.version.model, task.version.version
        console.print(f"task      {task.spec.name}: {model}, version {version} by {task.selected_by}")
        need = task.spec.need if task.spec.default is None else f"default {shortened(dict(task.spec.default))}"
        policy = task.version.policy
        console.print(f"          need: {need}; {task.backend}")
        calls = "".join(f", {name} {value}" for name, value in _calls(task.version).items())
        console.print(f"          timeout {format_duration(policy.timeout)}{calls}")
        for feature in task.features:
            age = f", at most {format_duration(feature.max_age_ms)} old" if feature.max_age_ms is not None else ""
            console.print(f"          {feature.ref} ({feature.type or 'as sent'}): {feature.contract}{age}")
    for need_ in explanation.needs:
        key = ", ".join(f"{name}={value}" for name, value in zip(need_.key.names, need_.key.values, strict=True))
        console.print(f"fetch     {need_.view} of {key}")
    for name, text in explanation.result.items():
        console.print(f"result    {name} = {text}")
    found = (*explanation.problems, *(each for task in explanation.tasks for each in task.problems))
    for problem in dict.fromkeys(found):
        console.print(f"problem   {problem.code}: {problem.message}")
    if explanation.refused is not None:
        console.print(f"rejected  {explanation.refused.code}: {explanation.refused.message}")
