"""Registry documents from YAML: files or a directory in, each document with its file and line out.

Only plain YAML: tags make no objects, a key stands once, and anchors are refused, for a few lines of them can stand
for gigabytes. What a document means is not judged here.

A ModelVersion may name its baseline's file, beside its own: ``baseline: {file: PATH}``. It is put in its place here, so
that what is published needs no file.
"""

import math
from collections.abc import Iterable, Sequence
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

# libyaml reads some ten times as fast; a registry of thousands of documents is read in a second.
_SafeLoader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _NotPlain(yaml.YAMLError):
    """YAML that is well formed and still refused."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem)
        self.problem, self.problem_mark = problem, mark


class _Loader(_SafeLoader):  # type: ignore[misc]  # which of two classes it is depends on how PyYAML was built
    """PyYAML's safe loader, stricter."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key_node, _ in node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                raise _NotPlain("a key is text, not a list or a mapping", mark)
            if key_node.value in seen:
                problem = f"key {key_node.value!r} stands twice; keep one"
                raise _NotPlain(problem, mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)

    def construct_finite(self, node: Any) -> float:
        value = float(self.construct_yaml_float(node))
        if not math.isfinite(value):
            problem = f"{node.value} is not a number that JSON has"
            raise _NotPlain(problem, node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_finite)


def document_files(paths: Iterable[Path]) -> tuple[Path, ...]:
    """The files that ``paths`` name: a directory stands for all of its ``*.yaml`` and ``*.yml``, below it too.

    Raises:
        ConfigurationError: a path does not exist, or no file was found.
    """
    files: dict[Path, None] = {}
    asked = tuple(paths)
    for path in asked:
        if path.is_dir():
            inside = (each for each in path.rglob("*") if each.suffix in _SUFFIXES and each.is_file())
            files |= dict.fromkeys(sorted(inside))
        elif path.is_file():
            files[path] = None
        else:
            raise ConfigurationError(f"{path} does not exist")
    if not files:
        raise ConfigurationError(f"no *.yaml or *.yml in {', '.join(map(str, asked)) or 'nothing'}")
    return tuple(files)


def read_sources(files: Iterable[Path]) -> tuple[tuple[Source, ...], tuple[Fault, ...]]:
    """Every document of ``files`` that can be read, and what is wrong with the others; empty documents are skipped.

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
        except UnicodeDecodeError as error:
            faults.append(Fault(str(path), "", "", f"not UTF-8: {error}"))
        else:
            _read_text(path, text, sources, faults)
    return tuple(sources), tuple(faults)


def _read_text(path: Path, text: str, sources: list[Source], faults: list[Fault]) -> None:
    try:
        _refuse_depth_and_aliases(text)
        loader = _Loader(text)
    except yaml.YAMLError as error:
        faults.append(_fault(path, error))
        return
    try:
        while loader.check_node():
            node = loader.get_node()
            origin = f"{path}:{node.start_mark.line + 1}"
            content = loader.construct_document(node)
            if isinstance(content, dict):
                _put_in_baseline(path, origin, content, faults)
                sources.append(Source(origin, content))
            elif content is not None:
                faults.append(Fault(origin, "", "", f"a document is a mapping, not a {type(content).__name__}"))
    except (yaml.YAMLError, ValueError) as error:
        faults.append(_fault(path, error))
    finally:
        loader.dispose()


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


def _fault(path: Path, error: Exception) -> Fault:
    mark = getattr(error, "problem_mark", None)
    origin = f"{path}:{mark.line + 1}" if mark is not None else str(path)
    problem = (
        "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "problem", None) or str(error)
    )
    return Fault(origin, "", "", f"not YAML that can be read: {problem}")


def read_directory(paths: Sequence[Path]) -> tuple[tuple[Source, ...], tuple[Fault, ...]]:
    """``read_sources`` of ``document_files``."""
    return read_sources(document_files(paths))
