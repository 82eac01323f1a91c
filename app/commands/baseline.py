"""``model-broker baseline``: the training inputs of a version, in bins, as the file that its document names."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer
from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from app.commands.failures import failed
from app.domain.errors import ConfigurationError
from app.domain.skew import Cell, baseline_of, bins_of, written
from app.domain.version_documents import Baseline, FeatureBaseline

_CSV: Final = frozenset({".csv"})
_JSON_LINES: Final = frozenset({".jsonl", ".ndjson", ".json"})

baseline_app = typer.Typer(rich_markup_mode=None, add_completion=False)


@baseline_app.command("baseline", epilog="Example: model-broker baseline training.csv --version credit-pd/3")
def baseline(
    file: Annotated[Path, typer.Argument(help="CSV with a header (.csv) or JSON lines (.jsonl): a row an example.")],
    version: Annotated[str, typer.Option("--version", help="Of what it was the training data: MODEL/VERSION.")],
    feature: Annotated[
        list[str] | None,
        typer.Option("--feature", help="An input, by the model's name of it. May be repeated; default: every column."),
    ] = None,
    categorical: Annotated[
        list[str] | None, typer.Option("--categorical", help="A column of numbers that are codes. May be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where it goes; default: MODEL-VERSION.baseline.json here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Write the baseline of a version: how the inputs that it was trained on are distributed.

    Give the inputs as they were before empty ones were filled in. Name the file in the version's document, by
    baseline: {file: PATH}, and apply; decide workers then compare what the version is given with it.
    """
    try:
        model, slash, label = version.partition("/")
        if not slash:
            raise ConfigurationError(f"--version {version}: write MODEL/VERSION, as in credit-pd/3")
        made = read_baseline(file, model, label, feature, categorical or ())
        path = out or Path(f"{model}-{label}.baseline.json")
        try:
            path.write_bytes(written(made))
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error
    except ConfigurationError as error:
        raise failed(error) from error
    if as_json:
        typer.echo(orjson.dumps({"file": str(path), "baseline": made.model_dump(mode="json", exclude_unset=True)}))
        return
    Console(highlight=False).print(_table(made))
    typer.echo(f"{path}: {made.rows} rows of {model} {label}.")


def read_baseline(
    file: Path, model: str, version: str, features: Iterable[str] | None, categorical: Iterable[str]
) -> Baseline:
    """The baseline of a file's rows.

    Raises:
        ConfigurationError: the file cannot be read, or makes none; with its line where there is one.
    """
    in_text = file.suffix.lower() in _CSV
    if not in_text and file.suffix.lower() not in _JSON_LINES:
        raise ConfigurationError(f"{file}: its name ends neither in .csv nor in .jsonl; say so by renaming it")
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            return baseline_of(
                _csv_rows(lines) if in_text else _json_rows(lines),
                model=model,
                version=version,
                features=None if features is None else frozenset(features),
                categorical=frozenset(categorical),
                numbers_in_text=in_text,
            )
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} is not UTF-8: {error}") from error
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
        raise ConfigurationError(f"{file} makes no baseline of {model}/{version}: {said}") from error
    except (csv.Error, ValueError) as error:
        raise ConfigurationError(f"{file}: {error}") from error


def _csv_rows(lines: Iterable[str]) -> Iterator[Mapping[str, Cell]]:
    reader = csv.DictReader(lines)
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        raise ValueError("two columns have one name; rename one")
    for row in reader:
        # What is beyond the header goes under None, and None stands for what ended early.
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not {len(names)} cells, as its header has")
        yield row


def _json_rows(lines: Iterable[str]) -> Iterator[Mapping[str, Cell]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: Any = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error}; write an object a line") from error
        if not isinstance(row, dict) or any(isinstance(value, dict | list) for value in row.values()):
            raise ValueError(f"line {number} is no flat object of texts, numbers, true, false and null")
        yield row


def _table(made: Baseline) -> Table:
    table = Table("feature", "counts", "bins", "missing", box=SIMPLE_HEAD)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, feature in made.features.items():
        bins, _ = bins_of(feature)
        table.add_row(name, _kind(feature), str(len(bins.names) - 1), f"{feature.missing / made.rows:.1%}")
    return table


def _kind(feature: FeatureBaseline) -> str:
    if feature.edges is not None:
        return f"numbers, {feature.edges[0]:g} to {feature.edges[-1]:g}"
    return "categories"
