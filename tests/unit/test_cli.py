"""The command line: it names every command, and loads only what the one that is asked for needs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import COMMANDS, app
from app.commands.worker import Role
from app.settings import Settings

ALWAYS_HEAVY = ("faust", "aiobotocore", "fastapi", "sklearn", "aiokafka")


def modules_after(program: str) -> set[str]:
    """The modules that a fresh interpreter has loaded when the program is through."""
    program += "\nimport sys\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_there(name: str) -> None:
    """Every command that the help names can be loaded, explains itself, and ends its help with an example."""
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output
    assert "Example" in result.output or "Commands:" in result.output


def test_the_help_names_them_all() -> None:
    """`model-broker --help` lists each command with its line."""
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.help}" in shown


def test_an_unknown_command_is_refused() -> None:
    """A word that is no command ends in exit code 2 and names the word."""
    result = CliRunner().invoke(app, ["decide"])
    assert result.exit_code == 2
    assert "decide" in result.output


def test_the_help_loads_no_command() -> None:
    """Asking what there is takes a moment, not the seconds that the whole broker takes to load."""
    loaded = modules_after(
        "from typer.testing import CliRunner; from app.cli import app; CliRunner().invoke(app, ['--help'])"
    )
    assert loaded.isdisjoint(f"app.commands.{command.place.partition(':')[0]}" for command in COMMANDS.values())
    assert loaded.isdisjoint((*ALWAYS_HEAVY, "pydantic_settings"))


@pytest.mark.parametrize(
    ("role", "foreign"),
    [
        ("decide", ("aiobotocore", "fastapi", "sklearn", "app.adapters.s3")),
        ("features", ("aiobotocore", "fastapi", "sklearn", "app.agents.decider")),
        ("pool", ("aiobotocore", "fastapi", "redis", "app.agents.decider")),
        ("audit", ("redis", "fastapi", "sklearn", "app.agents.decider")),
    ],
)
def test_a_worker_loads_its_own_parts(role: str, foreign: tuple[str, ...]) -> None:
    """A worker's process imports what its role needs and nothing of the others'."""
    program = f"""
import inspect, textwrap
import app.commands.worker
from app import main
source = inspect.getsource(main.run_{role}).splitlines()
exec("\\n".join(line.strip() for line in source if line.strip().startswith("from app.")))
"""
    assert modules_after(program).isdisjoint(foreign)


def command_line(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line, run in a process of its own with these settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BROKER_LOG_LEVEL", "loud", "'loud' is no level: write debug, info, warning or error"),
        ("BROKER_REDIS_URL", "foo", "not a URL of Redis: write redis://"),
        ("BROKER_PARTITIONS", "many", "integer"),
        ("BROKER_TOPIC_PREFIX", "a/b.", "'a/b.' cannot begin a topic's name: write letters, digits"),
        ("BROKER_TOPIC_PREFIX", "a" * 101, "100 at most"),
        ("BROKER_RECORD_BYTES_MAX", "16383", "greater than or equal to 16384"),
        ("BROKER_KAFKA_BOOTSTRAP", "", "names no server: write host:port"),
        ("BROKER_KAFKA_BOOTSTRAP", "kafka", "'kafka' is no server: write host:port"),
        ("BROKER_KAFKA_BOOTSTRAP", "kafka:9092,kafka:many", "'kafka:many' is no server"),
        ("BROKER_KAFKA_BOOTSTRAP", "kafka://kafka:9092", "is no server"),
        ("BROKER_KAFKA_BOOTSTRAP", "kafka:70000", "is no server"),
    ],
)
def test_a_setting_that_cannot_be(name: str, value: str, said: str) -> None:
    """It is one line that names the variable, and exit code 2."""
    done = command_line("topics", "check", **{name: value})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: settings: {name}: ")
    assert "Value error" not in line
    assert said in line


def test_bootstrap_servers_that_can_be() -> None:
    """Names, addresses of either kind, and several of them."""
    for servers in ("kafka:9092", "10.0.0.1:9092, kafka_1.example:9093", "[::1]:9092"):
        assert Settings(kafka_bootstrap=servers).kafka_bootstrap == servers


@pytest.mark.parametrize("process", [*(f"worker {role}" for role in Role), "gateway"])
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--http-port=-1", "0"),
        ("--http-port=65536", "65535"),
        ("--instance=a/b", "'a/b': write 1 to 200 letters, digits"),
        ("--instance=", "'': write 1 to 200 letters"),
        (f"--instance={'a' * 201}", "write 1 to 200 letters"),
    ],
)
def test_an_option_that_cannot_be(process: str, option: str, said: str) -> None:
    """Every process refuses it before it starts, and says what can be."""
    result = CliRunner().invoke(app, [*process.split(), option], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert option.partition("=")[0] in result.output
    assert said in " ".join(result.output.replace("│", " ").split())


def test_settings_that_are_none_are_named() -> None:
    """A misspelt variable has no effect, and one line says so; what is spelt well is not mentioned."""
    environment = {"BROKER_TOPIC_PREFX": "a.", "BROKER_LOG_LEVEL": "INFO"}
    done = command_line("explain", "/a", "-f", "nowhere", **environment)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert "BROKER_TOPIC_PREFX" in line
    assert "BROKER_LOG_LEVEL" not in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("decide", "--pool", "default"),
        ("audit", "--runner", "a:b"),
        ("features", "--pool", "default", "--runner", "a:b"),
        ("pool",),
        ("pool", "--pool", "default"),
    ],
)
def test_options_of_another_role_are_refused(arguments: tuple[str, ...]) -> None:
    """`worker` does not run with an option that it would not heed, or without one that its role needs."""
    result = CliRunner().invoke(app, ["worker", *arguments])
    assert result.exit_code == 2
    assert "--runner go with role pool" in " ".join(result.output.split())


@pytest.mark.parametrize("command", [("decision", "show", "r"), ("gateway", "--http-port", "0")])
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "set AWS_REGION"),
        ({"AWS_REGION": "eu-west-1"}, "set AWS_ACCESS_KEY_ID"),
        ({"AWS_DEFAULT_REGION": "eu-west-1", "AWS_ACCESS_KEY_ID": "a"}, "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_what_aws_needs_is_named(
    command: tuple[str, ...], environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a region or credentials a process that reads the audit ends at once, naming the variable."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    done = command_line(*command, **nowhere, **environment)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line


@pytest.mark.parametrize("command", ["get routes", "topics check", "dlt list", "request /a"])
def test_without_kafka(command: str) -> None:
    """A command that needs Kafka ends soon, with one line that names the setting, and exit code 2."""
    began = time.monotonic()
    done = command_line(*command.split(), BROKER_KAFKA_BOOTSTRAP="127.0.0.1:1")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "BROKER_KAFKA_BOOTSTRAP" in line
    # The command waits for 5 s; loading it is not in that, and a busy machine takes its time for it.
    assert time.monotonic() - began < 30
