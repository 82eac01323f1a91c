"""Writes feast_exchanges.json: what a real Feast feature server answers, to hold our reader of it against.

Run it with a Python that has `feast`: `python tests/data/make_feast_exchanges.py`. With `--serve PORT` it serves the
same features on 127.0.0.1 until it is ended, for the contract tests.
"""

import http.client
import json
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Feast and what it brings are not among this project's dependencies; whoever runs this brings them.
import pandas  # type: ignore[import-untyped, import-not-found, unused-ignore]
import uvicorn
from feast import (  # type: ignore[import-not-found]
    Entity,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    RepoConfig,
    ValueType,
)
from feast.feature_server import get_app  # type: ignore[import-not-found]
from feast.protos.feast.types.EntityKey_pb2 import EntityKey  # type: ignore[import-not-found]
from feast.protos.feast.types.Value_pb2 import Value  # type: ignore[import-not-found]
from feast.type_map import python_values_to_proto_values  # type: ignore[import-not-found]
from feast.types import (  # type: ignore[import-not-found]
    Array,
    Bool,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    UnixTimestamp,
)

FEATURES: dict[str, tuple[Any, str, Any]] = {
    "text": (String, "STRING", "ż"),
    "small": (Int32, "INT32", -7),
    "large": (Int64, "INT64", 2**62),
    "wide": (Float64, "DOUBLE", 0.1),
    "narrow": (Float32, "FLOAT", 0.5),
    "flag": (Bool, "BOOL", True),
    "moment": (UnixTimestamp, "UNIX_TIMESTAMP", 1_700_000_000),
    "nothing": (String, "STRING", None),
    "texts": (Array(String), "STRING_LIST", ["a", ""]),
    "smalls": (Array(Int32), "INT32_LIST", [1, -1]),
    "larges": (Array(Int64), "INT64_LIST", [1, 2**60]),
    "wides": (Array(Float64), "DOUBLE_LIST", [0.5, 0.1]),
    "narrows": (Array(Float32), "FLOAT_LIST", []),
    "flags": (Array(Bool), "BOOL_LIST", [True, False]),
    "moments": (Array(UnixTimestamp), "UNIX_TIMESTAMP_LIST", [5]),
}
TIMES = {17: datetime(2026, 11, 23, 1, 2, 3, 250_000, tzinfo=UTC), 18: datetime(2025, 1, 1, tzinfo=UTC)}
ASKED: list[tuple[list[str], dict[str, list[object]]]] = [
    ([f"applicant:{name}" for name in FEATURES], {"applicant_id": [17]}),
    (["applicant:text", "applicant:nothing"], {"applicant_id": [18]}),
    (["applicant:text", "applicant:large"], {"applicant_id": [99]}),
    (["applicant:nope"], {"applicant_id": [17]}),
    (["other:nope"], {"applicant_id": [17]}),
    (["applicant:text"], {"other": [17]}),
]


def store_in(directory: Path) -> FeatureStore:
    """A feature store with one view and two applicants; the second one's row is years beyond the view's ttl."""
    store = FeatureStore(
        config=RepoConfig(
            project="credit",
            provider="local",
            registry=str(directory / "registry.db"),
            online_store={"type": "sqlite", "path": str(directory / "online.db")},
            entity_key_serialization_version=3,
        )
    )
    entity = Entity(name="applicant_id", join_keys=["applicant_id"], value_type=ValueType.INT64)
    source = FileSource(name="s", path=str(directory / "rows.parquet"), timestamp_field="event_timestamp")
    frame = {name: [value] for name, (_, _, value) in FEATURES.items()}
    pandas.DataFrame({**frame, "applicant_id": [17], "event_timestamp": [TIMES[17]]}).to_parquet(source.path)
    schema = [Field(name=name, dtype=dtype) for name, (dtype, _, _) in FEATURES.items()]
    view = FeatureView(
        name="applicant",
        entities=[entity],
        ttl=timedelta(days=1),
        schema=[*schema, Field(name="applicant_id", dtype=Int64)],
        source=source,
    )
    store.apply([entity, view])
    messages = {
        name: Value() if value is None else python_values_to_proto_values([value], ValueType[type_])[0]
        for name, (_, type_, value) in FEATURES.items()
    }
    rows = [
        (EntityKey(join_keys=["applicant_id"], entity_values=[Value(int64_val=key)]), messages, time, None)
        for key, time in TIMES.items()
    ]
    store._get_provider().online_write_batch(store.config, store.get_feature_view("applicant"), rows, None)
    return store


def exchange(port: int, features: list[str], entities: dict[str, list[object]]) -> dict[str, object]:
    """One request and what is answered."""
    request = {"features": features, "entities": entities, "full_feature_names": True}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/get-online-features", json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return {"request": request, "status": response.status, "response": json.loads(response.read())}


def main(arguments: list[str]) -> None:
    """Ask the server's own application and write down what it says, or serve it."""
    with tempfile.TemporaryDirectory() as directory:
        app = get_app(store_in(Path(directory)))
        if arguments[:1] == ["--serve"]:
            uvicorn.run(app, host="127.0.0.1", port=int(arguments[1]), log_level="warning")
            return
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        serving = threading.Thread(target=server.run)
        serving.start()
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        exchanges = [exchange(port, features, entities) for features, entities in ASKED]
        server.should_exit = True
        serving.join()
    declared = {name: type_ for name, (_, type_, _) in FEATURES.items()}
    values = {name: value for name, (_, _, value) in FEATURES.items()}
    told = {"feast": version("feast"), "types": declared, "values": values, "exchanges": exchanges}
    target = Path(__file__).with_name("feast_exchanges.json")
    target.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
