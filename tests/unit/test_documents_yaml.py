"""Documents from YAML files: with file and line, and nothing that YAML would read as something else than is written."""

from pathlib import Path

import pytest

from app.adapters import documents_yaml
from app.adapters.documents_yaml import document_files, read_directory
from app.domain.errors import ConfigurationError, DocumentsRefused
from app.domain.registry import read_revision


def test_documents_know_their_file_and_line(tmp_path: Path) -> None:
    """Every document of every file is found, in a directory and below it, in a stable order."""
    (tmp_path / "b.yml").write_text("# said\n---\nkind: B\n---\n---\nkind: C\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text("kind: A\n")
    (tmp_path / "notes.txt").write_text("kind: [")
    sources, faults = read_directory([tmp_path])
    assert not faults
    assert [(each.origin, each.content) for each in sources] == [
        (f"{tmp_path}/b.yml:3", {"kind": "B"}),
        (f"{tmp_path}/b.yml:6", {"kind": "C"}),
        (f"{tmp_path}/sub/a.yaml:1", {"kind": "A"}),
    ]
    assert document_files([tmp_path / "b.yml", tmp_path / "b.yml"]) == (tmp_path / "b.yml",)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("kind: A\nspec:\n  x: 1\n  x: 2\n", 4, "key 'x' stands twice"),
        ("a: &one [1]\nb: *one\n", 2, "aliases"),
        ("a: 1\nb: .inf\n", 2, "not a number that JSON has"),
        ("a: .nan\n", 1, "not a number that JSON has"),
        ("a: !!python/object:object {}\n", 1, "could not determine a constructor"),
        ("a: [1\n", 2, "did not find expected"),
        ("? [1, 2]\n: 3\n", 1, "a key is text"),
        ("a: 2026-99-99\n", None, "month must be in"),
        ("a: \x00\n", None, "not YAML"),
    ],
)
def test_what_is_not_plain_is_refused(tmp_path: Path, text: str, line: int | None, said: str) -> None:
    """A file that cannot be read as it is written is a fault with its line; the other files are read."""
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("kind: B\n")
    sources, (fault,) = read_directory([tmp_path])
    assert [each.content for each in sources if not each.unread][-1] == {"kind": "B"}
    assert len(sources) == 2
    assert said in fault.message
    assert fault.origin.startswith(f"{tmp_path}/a.yaml")
    assert line is None or fault.origin == f"{tmp_path}/a.yaml:{line}"


def test_unreadable_files(tmp_path: Path) -> None:
    """Bytes that are no text, nesting without end, and missing paths are said plainly."""
    (tmp_path / "a.yaml").write_bytes(b"a: \xff\n")
    (tmp_path / "b.yaml").write_text("a: " + "[" * 5_000 + "]" * 5_000)
    _, faults = read_directory([tmp_path])
    assert ["UTF-8" in faults[0].message, "nested" in faults[1].message] == [True, True]
    with pytest.raises(ConfigurationError, match="does not exist"):
        document_files([tmp_path / "none"])
    with pytest.raises(ConfigurationError, match=r"no \*\.yaml"):
        document_files([])


def test_files_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading stops before the memory does."""
    monkeypatch.setattr(documents_yaml, "REVISION_BYTES_MAX", 10)
    (tmp_path / "a.yaml").write_text("kind: A # and much more\n")
    with pytest.raises(DocumentsRefused, match="20 bytes"):
        read_directory([tmp_path])


DOCUMENT = "apiVersion: modelbroker.dev/v1alpha1\nkind: {}\nmetadata: {{ name: {} }}\n"


def test_one_document_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    """Those before and after it in its file are read, each with its line; the fault names its document."""
    broken = DOCUMENT.format("ModelVersion", "m-1") + "spec: { model: [m }\n"
    whole = ["kind: A\n", broken, "kind: B\nx: 1\nx: 2\n", "- 1\n", "kind: C\nday: 2026-99-99\n", "kind: D\n"]
    (tmp_path / "a.yaml").write_text("---\n".join(whole))
    sources, faults = read_directory([tmp_path])
    assert [(each.origin.rpartition(":")[2], each.content) for each in sources if not each.unread] == [
        ("1", {"kind": "A"}),
        ("8", {"kind": "B", "x": 1}),
        ("17", {"kind": "D"}),
    ]
    assert [each.content for each in sources if each.unread] == [{"kind": "ModelVersion"}, {"kind": "C"}]
    assert [(each.origin.rpartition(":")[2], each.document) for each in faults] == [
        ("6", "ModelVersion m-1"),
        ("10", "B"),
        ("12", ""),
        ("13", "C"),
    ]
    assert "look for a bracket or quote that is not closed" in faults[0].message
    assert "quote what is meant as text" in faults[3].message


def test_what_an_unread_document_may_define_is_not_missed(tmp_path: Path) -> None:
    """A version that cannot be read is one fault, and those that name its versions are none; of another kind it is."""
    model = DOCUMENT.format("Model", "m") + 'spec: { owner: risk, aliases: { champion: "1" } }\n'
    (tmp_path / "model.yaml").write_text(model)
    (tmp_path / "version.yaml").write_text(DOCUMENT.format("ModelVersion", "m-1") + "spec: { model: [m }\n")
    sources, faults = read_directory([tmp_path])
    assert len(faults) == 1
    assert read_revision(sources).models
    (tmp_path / "version.yaml").write_text("]\n")
    assert read_revision(read_directory([tmp_path])[0]).models
    (tmp_path / "version.yaml").write_text(DOCUMENT.format("Route", "r") + "spec: { model: [m }\n")
    with pytest.raises(DocumentsRefused, match="there is no version 1"):
        read_revision(read_directory([tmp_path])[0])


def test_json_that_is_a_document_is_read(tmp_path: Path) -> None:
    """In a directory a baseline beside the documents is none."""
    (tmp_path / "a.json").write_text('{"apiVersion": "modelbroker.dev/v1alpha1", "kind": "Model"}')
    (tmp_path / "baseline.json").write_text('{"format": 1, "model": "m"}')
    sources, faults = read_directory([tmp_path])
    assert not faults
    assert [each.content["kind"] for each in sources] == ["Model"]
