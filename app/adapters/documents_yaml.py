"""Registry documents from YAML: files or a directory in, each document with its file and line out.

Only plain YAML: tags make no objects, a key stands once, and anchors are refused, for a few lines of them can stand
for gigabytes. What a document means is not judged here. One that cannot be read is a fault, and a source that stands
for whatever it may define, so that what refers to it is no fault beside it; the documents around it are read.

JSON is YAML too: in a directory, a ``*.json`` that says its ``apiVersion`` is a document; others are baselines.

A ModelVersion may name its baseline's file, beside its own: ``baseline: {file: PATH}``. It is put in its place here, so
that what is published needs no file.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
import yaml

from app.domain.errors import ConfigurationError, DocumentsRefused, Fault
from app.domain.registry import REVISION_BYTES_MAX, Source
from app.domain.skew import BASELINE_BYTES_MAX

_DEPTH_MAX: Final = 64
_BASELINE_FILE_BYTES_MAX: Final = 4 * BASELINE_BYTES_MAX
"""Indented by hand or by another program, it is larger than what of it counts."""
_SUFFIXES: Final = frozenset({".yaml", ".yml"})
_SEPARATOR: Final = re.compile(r"^---(?=\s|$)", re.MULTILINE)
_KIND: Final = re.compile(r"^kind:[ \t]*[\"']?(\w+)", re.MULTILINE)
_NAME: Final = re.compile(r"^metadata:\s*(?:\{[^}\n]*?)?name:[ \t]*[\"']?([^\s,}\"']+)", re.MULTILINE)

# libyaml reads some ten times as fast; a registry of thousands of documents is read in a second.
_SafeLoader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _NotPlain(yaml.YAMLError):
    """YAML that is well formed and still refused."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem)
        self.problem, self.problem_mark = problem, mark


class _Loader(_SafeLoader):  # type: ignore[misc]  # which of two classes it is depends on how PyYAML was built
    """PyYAML's safe loader, stricter."""

    repeated: list[_NotPlain]
    """Keys that stand twice: of them the first counts, so that what else is wrong with their document is found too."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        kept = []
        for key_node, value_node in node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                raise _NotPlain("a key is text, not a list or a mapping", mark)
            if key_node.value in seen:
                self.repeated.append(_NotPlain(f"key {key_node.value!r} stands twice; keep one", mark))
                continue
            seen.add(key_node.value)
            kept.append((key_node, value_node))
        node.value = kept
        return super().construct_mapping(node, deep=deep)

    def construct_finite(self, node: Any) -> float:
        value = float(self.construct_yaml_float(node))
        if not math.isfinite(value):
            problem = f"{node.value} is not a number that JSON has"
            raise _NotPlain(problem, node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_finite)


def document_files(paths: Iterable[Path]) -> tuple[Path, ...]:
    """The files that ``paths`` name: a directory stands for all of its ``*.yaml`` and ``*.yml``, below it too, and
    for every ``*.json`` that is a document.

    Raises:
        ConfigurationError: a path does not exist, or no file was found.
    """
    files: dict[Path, None] = {}
    asked = tuple(paths)
    for path in asked:
        if path.is_dir():
            inside = (each for each in path.rglob("*") if _is_documents(each))
            files |= dict.fromkeys(sorted(inside))
        elif path.is_file():
            files[path] = None
        else:
            raise ConfigurationError(f"{path} does not exist")
    if not files:
        raise ConfigurationError(f"no *.yaml or *.yml in {', '.join(map(str, asked)) or 'nothing'}")
    return tuple(files)


def _is_documents(path: Path) -> bool:
    if path.suffix == ".json" and path.is_file():
        try:
            return b'"apiVersion"' in path.read_bytes()[:REVISION_BYTES_MAX]
        except OSError:
            return True  # Reading it is a fault by itself.
    return path.suffix in _SUFFIXES and path.is_file()


def read_sources(files: Iterable[Path]) -> tuple[tuple[Source, ...], tuple[Fault, ...]]:
    """Every document of ``files``, the unread ones marked, and what is wrong with those; empty ones are skipped.

    Raises:
        DocumentsRefused: the files together are larger than a revision can be.
    """
    sources: list[Source] = []
    faults: list[Fault] = []
    size = 0
    for path in files:
        try:
            size += path.stat().st_size
            # YAML's own punctuation and comments count less than this twice over.
            if size > 2 * REVISION_BYTES_MAX:
                too_large = f"the files have more than {2 * REVISION_BYTES_MAX} bytes: remove old versions"
                raise DocumentsRefused([Fault(str(path), "", "", too_large)])
            text = path.read_text()
        except OSError as error:
            faults.append(Fault(str(path), "", "", f"cannot be read: {error.strerror}"))
            sources.append(Source(str(path), {}, unread=True))
        except UnicodeDecodeError as error:
            faults.append(Fault(str(path), "", "", f"not UTF-8: {error}; save it as UTF-8"))
            sources.append(Source(str(path), {}, unread=True))
        else:
            _read_text(path, text, sources, faults)
    return tuple(sources), tuple(faults)


def _read_text(path: Path, text: str, sources: list[Source], faults: list[Fault]) -> None:
    try:
        _refuse_depth_and_aliases(text)
    except yaml.YAMLError:
        # Each document by itself, so that one that cannot be parsed takes no other with it.
        for line, part in _parts_of(text):
            try:
                _refuse_depth_and_aliases(part)
            except yaml.YAMLError as error:
                _refuse(path, line, part, error, sources, faults)
            else:
                _read_documents(path, line, part, sources, faults)
    else:
        _read_documents(path, 0, text, sources, faults)


def _parts_of(text: str) -> Iterator[tuple[int, str]]:
    """The documents' texts, each with the line that it begins in, from 0: a separator is one wherever a line starts."""
    starts = [0, *(match.start() for match in _SEPARATOR.finditer(text) if match.start() > 0)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        yield text.count("\n", 0, start), text[start:end]


def _read_documents(path: Path, line: int, text: str, sources: list[Source], faults: list[Fault]) -> None:
    """Take in the documents of ``text``, which begins in ``line`` of its file and can be parsed."""
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        _refuse(path, line, text, error, sources, faults)
        return
    try:
        while loader.check_node():
            node = loader.get_node()
            origin = f"{path}:{line + node.start_mark.line + 1}"
            written = text[node.start_mark.index : node.end_mark.index]
            loader.repeated = []
            try:
                content = loader.construct_document(node)
            except (yaml.YAMLError, ValueError) as error:
                _refuse(path, line, written, error, sources, faults)
                _begin_anew(loader)
                continue
            faults += (_fault(path, line, written, each) for each in loader.repeated)
            if isinstance(content, dict):
                _put_in_baseline(path, origin, content, faults)
                sources.append(Source(origin, content))
            elif content is not None:
                faults.append(Fault(origin, "", "", f"a document is a mapping, not a {type(content).__name__}"))
    finally:
        loader.dispose()


def _begin_anew(loader: Any) -> None:
    """Let a loader go on with the next document after one that it gave up in the middle."""
    loader.constructed_objects, loader.recursive_objects = {}, {}
    loader.state_generators, loader.deep_construct = [], False


def _refuse(path: Path, line: int, text: str, error: Exception, sources: list[Source], faults: list[Fault]) -> None:
    fault = _fault(path, line, text, error)
    faults.append(fault)
    kind = _KIND.search(text)
    sources.append(Source(fault.origin, {"kind": kind[1]} if kind else {}, unread=True))


def _put_in_baseline(path: Path, origin: str, content: dict[str, Any], faults: list[Fault]) -> None:
    """Replace a baseline that names its file by what the file holds; one that cannot be is left out and a fault."""
    spec = content.get("spec")
    baseline = spec.get("baseline") if content.get("kind") == "ModelVersion" and isinstance(spec, dict) else None
    if not isinstance(spec, dict) or not isinstance(baseline, dict) or "file" not in baseline:
        return
    try:
        if len(baseline) > 1 or not isinstance(baseline["file"], str):
            raise ValueError("write baseline: {file: PATH}, or what such a file holds")
        file = path.parent / baseline["file"]
        try:
            if file.stat().st_size > _BASELINE_FILE_BYTES_MAX:
                raise ValueError(f"{file} has more than {_BASELINE_FILE_BYTES_MAX} bytes: leave features out")
            spec["baseline"] = orjson.loads(file.read_bytes())
        except OSError as error:
            said = f"{file} cannot be read: {error.strerror}; make it by `model-broker baseline`"
            raise ValueError(said) from error
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}; make it by `model-broker baseline`") from error
    except ValueError as error:
        del spec["baseline"]
        metadata = content.get("metadata")
        name = metadata.get("name") if isinstance(metadata, dict) else None
        faults.append(Fault(origin, f"ModelVersion {name}" if name else "ModelVersion", "spec.baseline", str(error)))


def _refuse_depth_and_aliases(text: str) -> None:
    # libyaml composes documents by recursion in C, without a bound of its own: too deep a nesting ends the process.
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEPTH_MAX:
                problem = f"nested more than {_DEPTH_MAX} levels deep"
                raise _NotPlain(problem, event.start_mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not read; write it out"
            raise _NotPlain(problem, event.start_mark)


def _fault(path: Path, line: int, text: str, error: Exception) -> Fault:
    """What is wrong with a document's ``text``, which begins in ``line`` of its file, in words that say what to do."""
    mark, begun = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    origin = f"{path}:{line + mark.line + 1}" if mark is not None else f"{path}:{line + 1}" if line else str(path)
    kind, name = _KIND.search(text), _NAME.search(text)
    document = " ".join(found[1] for found in (kind, name) if found)
    if isinstance(error, _NotPlain):
        return Fault(origin, document, "", f"not YAML that can be read: {error.problem}")
    problem = getattr(error, "problem", None) or str(error)
    if isinstance(error, ValueError):
        return Fault(origin, document, "", f"not YAML that can be read: {problem}; quote what is meant as text")
    since = f" ({getattr(error, 'context', None)} that begins in line {line + begun.line + 1})" if begun else ""
    advice = "look for a bracket or quote that is not closed, a missing colon, or a line not indented as its like"
    return Fault(origin, document, "", f"not YAML that can be read: {problem}{since}; {advice}")


def read_directory(paths: Sequence[Path]) -> tuple[tuple[Source, ...], tuple[Fault, ...]]:
    """``read_sources`` of ``document_files``."""
    return read_sources(document_files(paths))
