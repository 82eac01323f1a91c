"""`model-broker baseline` writes a file that a document names, `apply` reads, and `get -o yaml` gives back."""

from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from typer.testing import CliRunner, Result

from app.adapters.documents_yaml import read_directory
from app.cli import app
from app.commands.registry import read_files
from app.domain.errors import DocumentsRefused
from app.domain.registry import content_of
from app.domain.registry_diff import differences
from app.domain.version_documents import Baseline
from tests.support.registry_documents import changed, sound

CSV = "amount,age,label\n" + "".join(f"{n * 10.5},{20 + n % 50 if n % 10 else ''},{n % 2}\n" for n in range(1, 201))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["baseline", *arguments])


def documents_with(baseline: object) -> str:
    return yaml.safe_dump_all(changed(sound(), "credit-pd-1", "spec.baseline", baseline), sort_keys=False)


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A directory of documents of which one names its baseline's file beside it."""
    directory = tmp_path / "registry"
    (directory / "models").mkdir(parents=True)
    training = tmp_path / "training.csv"
    training.write_text(CSV)
    out = directory / "models" / "credit-pd-1.baseline.json"
    version = ("--version", "credit-pd/1", "--feature", "amount", "--feature", "age")
    done = run(str(training), *version, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "200 rows of credit-pd 1" in done.output
    (directory / "all.yaml").write_text(documents_with({"file": "models/credit-pd-1.baseline.json"}))
    return directory


def test_a_revision_holds_its_baselines(registry: Path, tmp_path: Path) -> None:
    """It needs no file any more, and what `get -o yaml` writes is applied as the same revision."""
    revision = read_files([registry], today=None)
    baseline = revision.versions["credit-pd", "1"].baseline
    assert baseline is not None
    assert (set(baseline.features), baseline.features["age"].missing) == ({"amount", "age"}, 20)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump_all([content_of(each) for each in revision.documents], sort_keys=False))
    assert read_files([again], today=None).id == revision.id


def test_another_baseline_is_one_change(registry: Path) -> None:
    """The difference tells its digest and rows, not each count."""
    before = read_files([registry], today=None)
    content = orjson.loads((registry / "models" / "credit-pd-1.baseline.json").read_bytes())
    content["features"]["age"]["counts"][1] -= 1
    content["features"]["age"]["counts"][2] += 1
    (registry / "models" / "credit-pd-1.baseline.json").write_bytes(orjson.dumps(content))
    (change,) = differences(before.documents, read_files([registry], today=None).documents)
    assert (change.field, change.kind) == ("baseline", "changed")
    assert str(change.before).endswith("of 200 rows")


@pytest.mark.parametrize(
    ("baseline", "content", "said"),
    [
        ({"file": "none.json"}, None, "none.json cannot be read: No such file or directory; make it by"),
        ({"file": "x.json"}, b"{", "x.json is not JSON"),
        ({"file": "x.json"}, b"[" + b"1," * 700_000 + b"1]", "bytes: leave features out"),
        ({"file": "x.json", "format": 1}, b"{}", "write baseline: {file: PATH}"),
        ({"file": 3}, None, "write baseline: {file: PATH}"),
        ({"file": "x.json"}, b"[1]", "Input should be an object"),
        ({"file": "x.json"}, b"{}", "spec.baseline.rows: is missing"),
        ("x.json", None, "Input should be an object"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path: Path, baseline: object, content: Any, said: str) -> None:
    """With the document, the field, and what to do; everything else is still checked."""
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    (tmp_path / "all.yaml").write_text(documents_with(baseline))
    with pytest.raises(DocumentsRefused) as refusal:
        read_files([tmp_path], today=None)
    faults = [str(fault) for fault in refusal.value.faults]
    assert any(said in fault for fault in faults), faults
    assert all("ModelVersion credit-pd-1: spec.baseline" in fault for fault in faults), faults


def test_only_a_model_version_names_a_file(tmp_path: Path) -> None:
    """In any other document the words mean nothing, and are left as they are."""
    (tmp_path / "a.yaml").write_text("kind: Route\nspec: {baseline: {file: none.json}}\n---\nkind: ModelVersion\n")
    sources, faults = read_directory([tmp_path])
    assert (len(sources), faults) == (2, ())
    (tmp_path / "a.yaml").write_text("kind: ModelVersion\nspec: {baseline: {file: none.json}}\n")
    _, (fault,) = read_directory([tmp_path])
    assert (fault.document, fault.field) == ("ModelVersion", "spec.baseline")


def test_json_lines_keep_their_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that looks like a number is text; --categorical makes codes of numbers; the file has the version's name."""
    monkeypatch.chdir(tmp_path)
    rows = [{"code": "7", "kind": 3, "rate": n / 9, "new": n % 2 == 0} for n in range(90)]
    Path("rows.jsonl").write_bytes(b"\n\n".join(map(orjson.dumps, rows)))
    done = run("rows.jsonl", "--version", "credit-pd/3.1", "--categorical", "kind", "--json")
    assert done.exit_code == 0, done.output
    assert orjson.loads(done.output)["file"] == "credit-pd-3.1.baseline.json"
    features = Baseline.model_validate_json(Path("credit-pd-3.1.baseline.json").read_bytes()).features
    assert features["code"].categories == {"7": 90}
    assert features["kind"].categories == {"3": 90}
    assert features["new"].categories == {"false": 45, "true": 45}
    assert features["rate"].edges is not None


@pytest.mark.parametrize(
    ("name", "content", "version", "said"),
    [
        ("x.csv", b"a,b\n1,2\n3\n", "m/1", "line 3 has not 2 cells"),
        ("x.csv", b"a,b\n1,2,3\n", "m/1", "line 2 has not 2 cells"),
        ("x.csv", b"a,a\n1,2\n", "m/1", "two columns have one name"),
        ("x.csv", b"a,b\n", "m/1", "there are no rows"),
        ("x.csv", b"", "m/1", "there are no rows"),
        ("x.csv", b"a\n\xff\n", "m/1", "not UTF-8"),
        ("x.csv", b"my age\n1\n", "m/1", "makes no baseline of m/1: features.my age"),
        ("x.csv", b"a\n1\n", "M/1", "makes no baseline of M/1: model"),
        ("x.csv", b"a\n1\n", "m", "write MODEL/VERSION"),
        ("x.jsonl", b"{\n", "m/1", "line 1 is not JSON"),
        ("x.jsonl", b'{"a": 1}\n{"a": [1]}\n', "m/1", "line 2 is no flat object"),
        ("x.parquet", b"", "m/1", "ends neither in .csv nor in .jsonl"),
        ("none.csv", None, "m/1", "cannot be read: No such file"),
    ],
)
def test_what_makes_no_baseline_is_refused(tmp_path: Path, name: str, content: Any, version: str, said: str) -> None:
    """One line that names file and line, exit code 2, and nothing is written."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.json"
    done = run(str(tmp_path / name), "--version", version, "--out", str(out))
    assert done.exit_code == 2
    assert said in done.output
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """As any fault of what was asked."""
    (tmp_path / "x.csv").write_text("a\n1\n")
    done = run(str(tmp_path / "x.csv"), "--version", "m/1", "--out", str(tmp_path / "none" / "x.json"))
    assert done.exit_code == 2
    assert "cannot be written" in done.output
