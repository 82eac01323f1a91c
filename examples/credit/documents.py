"""Registry documents of one run of the example: the templates in `registry/` with what this run has.

`python -m examples.credit.documents --models DIR --endpoint URL... --out DIR`

Where the model server listens and what training wrote, digests and baselines, are known only once both have run. The
templates are valid documents themselves, so these are put in as values, not as text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from examples.credit.artifacts import ArtifactError, baseline_files, read_digests

TEMPLATES = Path(__file__).parent / "registry"


def write_documents(
    out: Path, *, endpoints: Sequence[str], digests: Mapping[str, str], baselines: Mapping[str, Path] | None = None
) -> list[Path]:
    """Write every template to `out` with the given model server URLs, digests and baselines (by ModelVersion name).

    Baselines are copied beside the documents, which then are whole wherever they go. Returns the documents' files.
    Raises ValueError for no endpoint or a version without a digest, before any is written.
    """
    if not endpoints:
        raise ValueError("at least one endpoint of a model server is needed")
    files = {name: f"baselines/{name}.json" for name in baselines or ()}
    filled = {
        template.name: [
            _filled(document, endpoints, digests, files) for document in yaml.safe_load_all(template.read_text("utf-8"))
        ]
        for template in sorted(TEMPLATES.glob("*.yaml"))
    }
    (out / "baselines").mkdir(parents=True, exist_ok=True)
    for name, path in (baselines or {}).items():
        (out / files[name]).write_bytes(path.read_bytes())
    for name, documents in filled.items():
        text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=110)
        (out / name).write_text(text, "utf-8")
    return [out / name for name in filled]


def _filled(
    document: dict[str, Any], endpoints: Sequence[str], digests: Mapping[str, str], baselines: Mapping[str, str]
) -> dict[str, Any]:
    if document["kind"] != "ModelVersion":
        return document
    name, spec = document["metadata"]["name"], document["spec"]
    if name not in digests:
        raise ValueError(f"no digest of {name}: train the models first")
    backend = spec["backend"]
    if backend["type"] == "http":
        backend = backend | {"endpoints": list(endpoints)}
    baseline = {"baseline": {"file": baselines[name]}} if name in baselines else {}
    return document | {"spec": spec | {"digest": digests[name], "backend": backend} | baseline}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the documents and say where they are."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.credit.documents", description="Write the example's registry documents."
    )
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="what `train` wrote")
    parser.add_argument("--endpoint", action="append", required=True, metavar="URL", help="a model server; repeatable")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        written = write_documents(
            options.out,
            endpoints=[url.rstrip("/") for url in options.endpoint],
            digests=read_digests(options.models),
            baselines=baseline_files(options.models),
        )
    except (ArtifactError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
