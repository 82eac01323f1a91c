"""The demo: everything a decision needs, on this machine, for as long as it takes; then what happened, in tables.

Kafka, Redis, S3 and DynamoDB start as child processes, the models are trained and served, the broker's processes start
and say that they are ready. Each applicant then asks for a loan. When all have their answer, the replies are counted,
and the audit's records are read back and proven. The end, Ctrl-C and SIGTERM stop every child; ``keep`` leaves them.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import orjson
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.adapters.documents_yaml import read_directory
from app.adapters.registry_topic import publish_revision, read_head
from app.adapters.request_reply import RequestReplyClient
from app.adapters.topics import TopicAdmin, read_documents, wanted_topics
from app.devstack import Stack, StackError
from app.devstack.program import ProgramSpec
from app.devstack.stores import create_stores
from app.domain.errors import DocumentsRefused
from app.domain.registry import compile_revision, read_revision
from app.domain.rollout_status import with_status
from app.settings import Settings
from examples.credit.applicants import Applicant, applicants
from examples.credit.artifacts import baseline_files, read_digests, read_manifest
from examples.credit.callers import PATH, Answer, ask_all, asks
from examples.credit.documents import write_documents
from examples.credit.evidence import Evidence, gather_evidence
from examples.credit.loads import LoadFailed, loading
from examples.credit.metrics import read_worker
from examples.credit.report import Report
from examples.credit.runner import MODELS_DIR

POOL = "default"
FAULTS_SHOWN = 5
ROOT = Path(__file__).resolve().parents[2]

BROKER = {
    "decide": ("worker", "decide"),
    "pool": ("worker", "pool", "--pool", POOL, "--runner", "examples.credit.runner:load"),
    "features": ("worker", "features"),
    "audit": ("worker", "audit"),
    "rollouts": ("worker", "rollouts"),
    "gateway": ("gateway",),
}
"""The broker's processes and their command lines."""


class DemoFailed(Exception):
    """The demo could not be carried through; the message says at what and why."""


class Steps:
    """Tells each step as it ends, with its time."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def step(self, doing: str) -> Iterator[list[str]]:
        """A step; what the list holds in the end is told beside its name."""
        began = time.monotonic()
        told: list[str] = []
        status = self.console.status(doing) if self.console.is_terminal else contextlib.nullcontext()
        try:
            with status:
                yield told
        except BaseException:
            self.console.print(f"[red]✗[/red] {doing} [dim]({time.monotonic() - began:.1f} s)[/dim]")
            raise
        words = f"[green]✓[/green] {doing} [dim]({time.monotonic() - began:.1f} s)[/dim]"
        self.console.print(words, *(f"  [dim]{line}[/dim]" for line in told), sep="\n", highlight=False, soft_wrap=True)


def run(*, requests: int, json_file: str | None, keep: bool, state_dir: Path) -> int:
    """Run the demo; the process's exit code: 0 only if nothing was lost, doubled, failed or left unproven."""
    console = Console(stderr=json_file == "-")
    with _signals_interrupt():
        try:
            return _run(console, requests=requests, json_file=json_file, keep=keep, state_dir=state_dir)
        except KeyboardInterrupt:
            console.print("Interrupted; everything that the demo started is stopped.")
            return 130
        except (DemoFailed, LoadFailed, StackError, DocumentsRefused) as error:
            console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            return 1


def _run(console: Console, *, requests: int, json_file: str | None, keep: bool, state_dir: Path) -> int:
    began = time.monotonic()
    directory = _directory(keep, state_dir)
    logs_matter = True
    try:
        report, stack = _demonstrate(Steps(console), directory, requests=requests, keep=keep)
        logs_matter = bool(report.misses)
    except KeyboardInterrupt:
        logs_matter = False
        raise
    finally:
        if logs_matter:
            console.print(f"The logs are in {directory}.", highlight=False, soft_wrap=True)
        elif not keep:
            shutil.rmtree(directory, ignore_errors=True)
    console.print()
    console.print(report.tables())
    for fault in [answer.fault for answer in report.answers if answer.fault][:FAULTS_SHOWN]:
        console.print(f"unanswered: {fault}", style="red", markup=False, soft_wrap=True)
    for fault in report.evidence.audit.faults[:FAULTS_SHOWN]:
        console.print(f"audit: {fault}", style="red", markup=False, soft_wrap=True)
    if json_file is not None:
        _write_json(report, json_file)
    if report.misses:
        console.print(f"Not as it should be: {', '.join(report.misses)}.", style="red", highlight=False)
    else:
        console.print("Every request was decided once and answered, its record proven.", style="green")
    console.print(f"All of it took {time.monotonic() - began:.0f} s.", highlight=False)
    if keep:
        _tell_kept(console, stack)
    return 1 if report.misses else 0


def _demonstrate(steps: Steps, directory: Path, *, requests: int, keep: bool) -> tuple[Report, Stack]:
    models = directory.resolve() / "models"
    variables = {MODELS_DIR: str(models), "BROKER_DATA_DIR": str(directory.resolve() / "workers")}
    with contextlib.ExitStack() as cleanup:
        stack = _prepare(steps, directory, models, keep=keep)
        cleanup.callback(_stop, steps, stack)
        stack.variables |= variables
        if keep:
            stack.write_env()
        os.environ.update(stack.env)  # the AWS clients of this process read them there
        settings = Settings()
        with steps.step("Topics, bucket and table made; model server started"):
            with ThreadPoolExecutor(1) as pool:
                serving = pool.submit(stack.run, [_model_server(models)])
                admin = TopicAdmin(settings)
                admin.apply(wanted_topics(read_documents(), settings, {POOL}))
                asyncio.run(create_stores(settings))
                serving.result()
            models_url = stack.service("models").address
        with steps.step("Registry published") as told:
            told.append(_publish(settings, directory / "registry", models, models_url))
        with loading(os.environ | _PATH) as loads:
            with steps.step(f"Broker started: {', '.join(BROKER)}"):
                stack.run(_broker_program(name) for name in BROKER)
            with steps.step("Features loaded meanwhile, by model-broker features load") as told:
                for load in loads:
                    done = load.result()
                    told.append(
                        f"view {load.view}: {done['rows']:,} rows published and stored ({done['seconds']:.1f} s)"
                    )
        gateway_url = stack.service("gateway").address
        people = applicants()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            answers, seconds = runner.run(_decide(steps.console, settings, people, requests, gateway_url))
            worker = read_worker(stack.service("decide").address)
            with steps.step("Replies counted, audit records read back and proven"):
                evidence: Evidence = runner.run(
                    gather_evidence(settings, [answer.ask.request_id for answer in answers])
                )
        report = Report(answers, seconds, evidence, worker, frozenset(read_manifest(models)["holdout"]))
        if keep:
            cleanup.pop_all()
        return report, stack


def _prepare(steps: Steps, directory: Path, models: Path, *, keep: bool) -> Stack:
    """Services up and models trained, at the same time."""
    with steps.step("Kafka, Redis, S3 and DynamoDB started; models trained") as told, ThreadPoolExecutor(1) as pool:
        training = pool.submit(_train, models)
        stack = Stack.up(directory, detached=keep, progress=told.append)
        try:
            told.append(training.result())
        except BaseException:
            stack.down()
            raise
    return stack


def _train(models: Path) -> str:
    from examples.credit.train import train  # noqa: PLC0415 - scikit-learn loads while the services start

    began = time.monotonic()
    manifest = train(models)
    return f"{len(manifest['artifacts'])} model versions trained ({time.monotonic() - began:.1f} s)"


def _model_server(models: Path) -> ProgramSpec:
    command = [sys.executable, "-m", "examples.credit.server", "--models", str(models), "--port"]
    return ProgramSpec("models", lambda port: [*command, str(port)], _PATH, ready_path="/v2/health/ready")


def _broker_program(name: str) -> ProgramSpec:
    command = [sys.executable, "-m", "app.cli", *BROKER[name], "--instance", f"{name}-0", "--http-port"]
    return ProgramSpec(name, lambda port: [*command, str(port)], _PATH)


# The children find the example from any directory, as this process did.
_PATH = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def _publish(settings: Settings, directory: Path, models: Path, models_url: str) -> str:
    write_documents(directory, endpoints=[models_url], digests=read_digests(models), baselines=baseline_files(models))
    sources, faults = read_directory([directory])
    if faults:
        raise DocumentsRefused(faults)
    written = read_revision(sources, today=datetime.now(UTC).date())
    head = read_head(settings)
    now_ms = time.time_ns() // 1_000_000
    revision = compile_revision(with_status(written.documents, head.carried, now_ms))
    if head.id != revision.id:
        publish_revision(settings, revision, expected=head.id, now_ms=now_ms)
    return f"{len(revision.documents)} documents, {revision.id[:23]}…"


async def _decide(
    console: Console, settings: Settings, people: Sequence[Applicant], requests: int, gateway_url: str
) -> tuple[list[Answer], float]:
    name = f"demo-{uuid.uuid4().hex[:8]}"
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with RequestReplyClient(settings, instance=name) as kafka:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("Decisions", total=requests)
            began = time.perf_counter()
            answers = await ask_all(asks(name, people, requests), kafka, gateway_url, lambda _: progress.advance(bar))
            return answers, time.perf_counter() - began


def _directory(keep: bool, state_dir: Path) -> Path:
    if not keep:
        return Path(tempfile.mkdtemp(prefix="model-broker-demo-"))
    stack = Stack.attach(state_dir)
    if stack is not None and any(state.running for state in stack.status()):
        raise DemoFailed(f"a demo was kept in {state_dir}: end it by `model-broker dev down --state-dir {state_dir}`")
    return state_dir


def _stop(steps: Steps, stack: Stack) -> None:
    with steps.step("Everything stopped"):
        stack.down()


def _tell_kept(console: Console, stack: Stack) -> None:
    person = applicants()[16]
    asked = {"entities": dict(person.entities), "inputs": dict(person.inputs)}
    entities, inputs = (orjson.dumps(part).decode() for part in asked.values())
    body = orjson.dumps({"path": PATH, **asked}).decode()
    lines = [f"  {state.name:<9} {state.address:<32} {state.log}" for state in stack.status()]
    console.print(
        "",
        "Everything keeps running: what, where, and its log",
        *lines,
        "Ask it, with this environment or over HTTP:",
        f"  set -a; . {stack.env_file}; set +a",
        f"  model-broker request {PATH} --entities '{entities}' --inputs '{inputs}'",
        f"  curl {stack.service('gateway').address}/v1/decisions --json '{body}'",
        "End it:",
        f"  model-broker dev down --state-dir {stack.state_dir}",
        sep="\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _write_json(report: Report, file: str) -> None:
    data = orjson.dumps(report.as_json(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    if file == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    else:
        Path(file).write_bytes(data)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does; both do so even where a shell started it in the background."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
