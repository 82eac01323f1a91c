"""What the documentation names exists: settings, topics, codes, metrics, commands, files and links."""

import pkgutil
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from prometheus_client import REGISTRY

import app
from app.cli import app as command_line
from app.domain.errors import Code
from app.domain.join import Status
from app.gateway.answers import GatewayCode, answer_of
from app.ports.request_reply import Reply
from app.settings import Settings
from tests.support.doc_tables import OPERATIONS, replaced, settings_table, topics_table
from tests.support.markdown import DOCUMENTS, ROOT, blocks_of

ERRORS = ROOT / "docs" / "errors.md"
OTHER_VARIABLES = {"BROKER_TEST_STACK", "BROKER_TEST_FEAST_PYTHON"}
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)


def rows(document: Path, heading: str) -> list[list[str]]:
    """The cells of the table rows under a heading, without the table's head."""
    section = document.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    assert section, f"{document.name} has no {heading}"
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:1] == "|"
    ]
    return cells[2:]


def named(cell: str) -> str:
    return cell.strip("`* ")


def test_settings_and_topics_are_listed_as_they_are() -> None:
    """The tables are what the code writes; `python -m tests.support.doc_tables` writes them anew."""
    text = OPERATIONS.read_text()
    assert replaced(text, "settings", settings_table()) == text
    assert replaced(text, "topics", topics_table()) == text


@pytest.mark.parametrize("row", rows(OPERATIONS, "Settings"), ids=lambda row: str(row[0]))
def test_a_setting_s_default_can_be_written_as_it_is_listed(row: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies a default from the table sets what is the default anyway."""
    variable, default = row[0].strip("`"), row[1].strip("`")
    monkeypatch.delenv(variable, raising=False)
    unset = Settings()
    if default == "unset":
        assert getattr(unset, variable.removeprefix("BROKER_").lower()) is None
        return
    monkeypatch.setenv(variable, "" if default == "empty" else default)
    assert Settings() == unset


@each_document
def test_variables_exist(document: Path) -> None:
    """Every BROKER_ variable that is named is a setting."""
    known = {f"BROKER_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    assert set(re.findall(r"\bBROKER_[A-Z_]*[A-Z]", document.read_text())) <= known


def test_every_code_is_described_and_no_other() -> None:
    """docs/errors.md has one row a code, of decisions and of the gateway."""
    assert [named(row[0]) for row in rows(ERRORS, "Codes of a decision")] == [str(code) for code in Code]
    assert [named(row[0]) for row in rows(ERRORS, "Codes of the gateway")] == [str(code) for code in GatewayCode]


def test_statuses_are_answered_over_http_as_described() -> None:
    """The HTTP status of each way in which a request ends is the one that the gateway gives."""
    described = {named(row[0]): row[2] for row in rows(ERRORS, "How a request ends")}
    assert set(described) == {str(status) for status in Status}
    for status, said in described.items():
        body = b'{"status": "%s", "errors": []}' % status.encode()
        assert answer_of(Reply(body, (("status", status.encode()),))).status == int(said[:3])
    unknown = b'{"status": "rejected", "errors": [{"code": "path_unknown", "message": ""}]}'
    assert answer_of(Reply(unknown, (("status", b"rejected"),))).status == 404
    assert "404" in described["rejected"]


def test_kinds_of_dead_letters_are_those_of_the_code() -> None:
    """Each kind that is a name stands in the code that buries such records."""
    sources = "".join(path.read_text() for path in (ROOT / "app").rglob("*.py"))
    kinds = [row[0] for row in rows(ERRORS, "Kinds of dead letters")]
    assert len(kinds) == 7
    for kind in kinds:
        assert not kind.startswith("`") or f'"{named(kind)}"' in sources


def test_every_metric_is_described_and_no_other() -> None:
    """docs/operations.md has one row a metric, under the name that Prometheus sees."""
    for module in pkgutil.walk_packages(app.__path__, "app."):
        if module.name != "app.devstack.moto_server":  # a program of its own
            import_module(module.name)
    ours = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in REGISTRY.collect()
        if family.name.startswith("broker_")
    }
    described = [named(row[0]) for row in rows(OPERATIONS, "Metrics")]
    assert len(described) == len(set(described))
    assert set(described) == ours


@each_document
def test_metrics_that_are_named_exist(document: Path) -> None:
    """A metric in running text is one of the table's."""
    known = {named(row[0]) for row in rows(OPERATIONS, "Metrics")}
    assert set(re.findall(r"`(broker_[a-z_]+)", document.read_text())) <= known


def commands_in(document: Path) -> Iterator[list[str]]:
    """The model-broker commands of a document's shell blocks and running text, as words."""
    for block in blocks_of(document):
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.startswith("model-broker "):
                    yield shlex.split(line.partition("  #")[0])[1:]
    for text in re.findall(r"`model-broker ([^`<]+)`", document.read_text()):
        yield shlex.split(text)


@each_document
def test_commands_and_their_options_exist(document: Path) -> None:
    """Each command that is shown, with each of its options, is known to the command line."""
    for words in commands_in(document):
        command: Any = typer.main.get_command(command_line)
        rest = list(words)
        while hasattr(command, "get_command") and rest:
            name = rest.pop(0)
            found = command.get_command(click.Context(click.Command("model-broker")), name)
            assert found is not None, f"{document.name}: model-broker {' '.join(words)}"
            command = found
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known, f"{document.name}: {' '.join(words)}"


@each_document
def test_links_and_files_exist(document: Path) -> None:
    """Relative links lead to files and headings that are there, and so do paths into the source."""
    text = document.read_text()
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), f"{document.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in headings}
    for path_text in re.findall(r"`((?:app|tests|docs|examples|schemas|topics)/[\w./-]*)`", text):
        assert (ROOT / path_text).exists(), f"{document.name} names {path_text}"


def test_the_changelog_knows_the_version() -> None:
    """The version of the package has its heading."""
    assert f"## [{app.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_top_level_command_is_in_the_changelog_or_readme() -> None:
    """A command that nobody is told of does not exist for users."""
    told = (ROOT / "CHANGELOG.md").read_text()
    group: Any = typer.main.get_command(command_line)
    missing = [
        name for name in group.list_commands(click.Context(click.Command("model-broker"))) if f"`{name}`" not in told
    ]
    assert missing == []
