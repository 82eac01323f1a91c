"""What a test cluster decides: arithmetic, so that every reply can be checked.

Each model answers ``2 * x + score``: ``x`` is the request's, ``score`` the feature store's. Routes differ in how their
tasks run: ``/inline`` over HTTP, ``/queued`` in a pool, ``/mixed`` both, ``/hanging`` one more that a test may
hang. ``/soft`` has a default for the feature, the others require it; ``/brief`` is queued and has 3 s. ``/hasty`` waits
1 s for the pool, and then asks over HTTP.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey

POOL: Final = "default"
PROJECT: Final = "arithmetic"
SUBJECTS: Final = 50
SCORE_DEFAULT: Final = 1_000_000.0
DEADLINE: Final = "60s"
HANGING_TIMEOUT_MS: Final = 500
HASTY_TIMEOUT_MS: Final = 1_000

Document = Mapping[str, Any]


def score_of(subject: str) -> float:
    """The stored score of a subject.

    >>> score_of("subject-7")
    7.0
    """
    return float(subject.rpartition("-")[2])


def expected(x: float, subject: str) -> float:
    """What every model answers."""
    return 2 * x + score_of(subject)


def expected_by_default(x: float) -> float:
    """What model ``soft`` answers where the score is not to be had."""
    return 2 * x + SCORE_DEFAULT


def project_of(prefix: str) -> str:
    """Clusters share a Redis, so each has a Feast project of its own."""
    return PROJECT + "_" + "".join(letter for letter in prefix if letter.isalnum())


def entity_rows(prefix: str, now_ms: int) -> Sequence[FeatureRow]:
    """The features of all subjects."""
    subjects = [f"subject-{number}" for number in range(SUBJECTS)]
    return [
        FeatureRow(
            "subject",
            EntityKey(project_of(prefix), ("subject_id",), (subject,), ("STRING",)),
            ("score",),
            (score_of(subject),),
            ("DOUBLE",),
            now_ms,
        )
        for subject in subjects
    ]


def document(kind: str, name: str, spec: Mapping[str, Any]) -> Document:
    """A registry document."""
    return {"apiVersion": "modelbroker.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _version(model: str, version: str, backend: Mapping[str, Any], *, soft: bool, timeout: str = "10s") -> Document:
    score = {"ref": "subject.score", "default": SCORE_DEFAULT} if soft else {"ref": "subject.score", "required": True}
    return document(
        "ModelVersion",
        f"{model}-{version}",
        {
            "model": model,
            "version": version,
            "digest": "sha256:" + version.partition("-")[0].rjust(64, "0"),
            "backend": backend,
            "features": [{"ref": "inputs.x", "type": "DOUBLE", "required": True}, score],
            "outputs": [{"name": "y", "datatype": "FP64"}],
            "policy": {"timeout": timeout},
            "governance": {"approvedBy": "model-risk"},
        },
    )


def _route(
    name: str,
    path: str,
    tasks: Mapping[str, str],
    *,
    version: str,
    need: str = "required",
    fallback: str | None = None,
) -> Document:
    needs = {task: need if task == "hanging" else "required" for task in tasks}
    return document(
        "Route",
        name,
        {
            "path": path,
            "deadline": "3s" if name.startswith("brief") else DEADLINE,
            "rules": [
                {
                    "name": f"rule-{version}",
                    "tasks": [
                        {
                            "name": task,
                            "model": model,
                            "select": {"version": version},
                            "need": needs[task],
                            "fallback": [{"version": fallback}] if fallback else [],
                        }
                        for task, model in tasks.items()
                    ],
                    "result": {"y": f"outputs.{next(iter(tasks))}.y", "rule_version": f'"{version}"'},
                }
            ],
        },
    )


def registry_documents(url: str, *, prefix: str, version: str = "1") -> Sequence[Document]:
    """The whole registry; in one of another ``version`` every rule, model version and result differs."""
    http: dict[str, Any] = {"type": "http", "endpoints": [url]}
    pool: dict[str, Any] = {"type": "kafka", "pool": POOL}
    models = ["inline", "soft", "hanging", "pooled", "hasty"]
    hanging_timeout = f"{HANGING_TIMEOUT_MS}ms"
    return [
        document(
            "FeatureView",
            "subject",
            {
                "entities": [{"name": "subject_id", "type": "STRING"}],
                "features": [{"name": "score", "type": "DOUBLE"}],
                "source": {"type": "redis", "project": project_of(prefix)},
            },
        ),
        *(document("Model", model, {"owner": "tests"}) for model in models),
        _version("inline", version, http, soft=False),
        _version("soft", version, http, soft=True),
        _version("hanging", version, http, soft=True, timeout=hanging_timeout),
        # As long as the request: no outage of what is between may count as the pool's silence.
        _version("pooled", version, pool, soft=False, timeout=DEADLINE),
        _version("hasty", version, pool, soft=False, timeout=f"{HASTY_TIMEOUT_MS}ms"),
        _version("hasty", f"{version}-http", http, soft=False),
        _route("inline", "/inline", {"first": "inline"}, version=version),
        _route("soft", "/soft", {"first": "soft"}, version=version),
        _route("queued", "/queued", {"first": "pooled"}, version=version),
        _route("hasty", "/hasty", {"first": "hasty"}, version=version, fallback=f"{version}-http"),
        _route("brief", "/brief", {"first": "pooled"}, version=version),
        _route("mixed", "/mixed", {"first": "inline", "second": "pooled"}, version=version),
        _route("hanging", "/hanging", {"first": "inline", "hanging": "hanging"}, version=version, need="optional"),
    ]
