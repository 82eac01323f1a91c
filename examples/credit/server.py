"""The example's model server: Open Inference Protocol v2 over HTTP, in a process of its own.

`python -m examples.credit.server --models DIR --port N [--host H] [--port-file FILE] [--delay-ms N]`

It answers for `credit-pd` and `application-anomaly`, versions 1 and 2 of both; a URL without a version means the
newest. An inference takes one tensor a column, `[rows]` or `[rows, 1]`, flat or nested, and answers for all rows at
once. Requests are held to the protocol: whatever is missing, unknown, of another datatype or shape is an
`{"error": …}` that names the tensor, and nothing is guessed.

Paths are known once the models are loaded, so a request finds its handler in one dictionary instead of a router.
`GET /stats` says how many inferences each version has answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop
from aiohttp import web

from examples.credit.applicants import kind
from examples.credit.artifacts import SPECS, ArtifactError, load, write_whole
from examples.credit.inference import Compiled, Row, UnknownLabelError, compile_artifact

SERVED = tuple((spec.model, spec.version) for spec in SPECS if spec.model != "expected-amount")
ROWS_MAX = 4_096  # of one call; bounds how long the event loop is held, about 20 ms
BODY_BYTES_MAX = 1_048_576
DRAIN_SECONDS = 5.0
NUMBER_MAX = 3e38  # the models' trees take single precision
WHOLE_MAX = 2**53  # beyond it a JSON number may not be the whole number that was meant

_WHOLE = frozenset(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
_FLOATING = frozenset({"FP32", "FP64"})
_DATATYPES: Mapping[type, str] = {int: "INT64", float: "FP64", str: "BYTES"}
_JSON = {"Content-Type": "application/json"}

Handler = Callable[[web.BaseRequest], Awaitable[web.Response]]


class ProtocolError(Exception):
    """A request that the protocol or the model does not allow; becomes a status and an `error`."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Served:
    """A model version behind its URL, and how often it has answered."""

    model: Compiled
    requests: int = 0
    rows: int = 0

    def metadata(self, versions: Sequence[str]) -> dict[str, Any]:
        """The protocol's model metadata."""
        return {
            "name": self.model.model,
            "versions": list(versions),
            "platform": "sklearn_compiled",
            "inputs": [
                {"name": column, "datatype": _DATATYPES[kind(column)], "shape": [-1]} for column in self.model.columns
            ],
            "outputs": [
                {"name": name, "datatype": datatype, "shape": [-1, *shape]}
                for name, (datatype, shape) in _OUTPUTS[self.model.model].items()
            ],
        }

    def infer(self, body: bytes) -> bytes:
        """Answer one inference request.

        Raises ProtocolError for a request that cannot be answered.
        """
        request = _object(body)
        wanted = _wanted(request, self.model.model)
        rows = read_rows(request, self.model.columns)
        try:
            values = [self.model.predict(row) for row in rows]
        except UnknownLabelError as error:
            raise ProtocolError(f"input {error}") from error
        self.requests += 1
        self.rows += len(values)
        reply: dict[str, Any] = {
            "model_name": self.model.model,
            "model_version": self.model.version,
            "outputs": [_output(self.model.model, name, values) for name in wanted],
        }
        if "id" in request:
            reply["id"] = request["id"]
        return orjson.dumps(reply)


# What each model answers: each tensor's datatype and the shape of one row.
_OUTPUTS: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]] = {
    "credit-pd": {"predict_proba": ("FP64", (2,)), "predict": ("INT64", ())},
    "application-anomaly": {"score": ("FP64", ())},
}


def read_rows(request: Mapping[str, Any], columns: Sequence[str]) -> list[Row]:
    """The rows of a request's tensors, in the order of a model's columns.

    Raises ProtocolError naming the tensor for one that is missing, unknown, twice there, or not as it must be.
    """
    inputs = request.get("inputs")
    if not isinstance(inputs, list):
        raise ProtocolError("inputs must be a list of tensors")
    tensors: dict[str, list[Any]] = {}
    for tensor in inputs:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(name, str):
            raise ProtocolError("each of inputs must be an object with a name")
        if name in tensors:
            raise ProtocolError(f"input {name} is there twice")
        if name not in columns:
            raise ProtocolError(f"input {name} is not known; the model takes {', '.join(columns)}")
        tensors[name] = _values(name, tensor)
    if len(tensors) != len(columns):
        missing = (column for column in columns if column not in tensors)
        raise ProtocolError(f"inputs missing: {', '.join(missing)}")
    ordered = [tensors[column] for column in columns]
    if len(set(map(len, ordered))) != 1:
        sizes = ", ".join(f"{name} {len(values)}" for name, values in tensors.items())
        raise ProtocolError(f"inputs differ in their number of rows: {sizes}")
    return list(zip(*ordered, strict=True))


def _values(name: str, tensor: Mapping[str, Any]) -> list[Any]:
    shape, data, datatype = tensor.get("shape"), tensor.get("data"), tensor.get("datatype")
    if not isinstance(shape, list) or len(shape) not in (1, 2) or shape[1:] not in ([], [1]):
        raise ProtocolError(f"input {name} has shape {shape}; it must be [rows] or [rows, 1]")
    rows = shape[0]
    if type(rows) is not int or not 1 <= rows <= ROWS_MAX:
        raise ProtocolError(f"input {name} has shape {shape}; rows must be from 1 to {ROWS_MAX}")
    if not isinstance(data, list):
        raise ProtocolError(f"input {name} has no data list (binary tensors are not supported)")
    if len(shape) == 2 and data and isinstance(data[0], list):
        if not all(isinstance(row, list) and len(row) == 1 for row in data):
            raise ProtocolError(f"input {name} has rows that are not lists of one value")
        data = [row[0] for row in data]
    if len(data) != rows:
        raise ProtocolError(f"input {name} has {len(data)} values where its shape {shape} says {rows}")
    if kind(name) is int:
        return _whole_numbers(name, datatype, data)
    if kind(name) is float:
        return _numbers(name, datatype, data)
    if datatype != "BYTES":
        raise ProtocolError(f"input {name} has datatype {datatype}; it must be BYTES")
    for value in data:
        if not isinstance(value, str):
            raise ProtocolError(f"input {name} holds {_shown(value)}, which is not text")
    return data


def _whole_numbers(name: str, datatype: object, data: list[Any]) -> list[int]:
    # A caller's JSON may hold 5000.0 where 5000 is meant, so floating datatypes are taken when the values are whole.
    if datatype in _FLOATING:
        for value in data:
            if type(value) not in (int, float) or not math.isfinite(value) or value != int(value):
                raise ProtocolError(f"input {name} holds {_shown(value)}, which is not a whole number")
        data = [int(value) for value in data]
    elif datatype not in _WHOLE:
        raise ProtocolError(f"input {name} has datatype {datatype}; it must be INT64")
    for value in data:
        if type(value) is not int or not -WHOLE_MAX <= value <= WHOLE_MAX:
            raise ProtocolError(f"input {name} holds {_shown(value)}, which is not a whole number of {datatype}")
    return data


def _numbers(name: str, datatype: object, data: list[Any]) -> list[float]:
    if datatype not in _FLOATING:
        raise ProtocolError(f"input {name} has datatype {datatype}; it must be FP64")
    for value in data:
        if type(value) not in (int, float) or not abs(value) <= NUMBER_MAX:
            raise ProtocolError(f"input {name} holds {_shown(value)}, which is not a number of {datatype}")
    return [float(value) for value in data]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _object(body: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise ProtocolError("the body must be a JSON object")
    if not isinstance(request.get("id", ""), str):
        raise ProtocolError("id must be text")
    return request


def _wanted(request: Mapping[str, Any], model: str) -> Sequence[str]:
    offered = list(_OUTPUTS[model])
    asked = request.get("outputs")
    if asked is None or asked == []:
        return offered
    if not isinstance(asked, list):
        raise ProtocolError("outputs must be a list")
    names = [output.get("name") if isinstance(output, dict) else None for output in asked]
    for name in names:
        if name not in offered:
            raise ProtocolError(f"output {_shown(name)} is not known; the model gives {', '.join(offered)}")
    return [name for name in names if isinstance(name, str)]


def _output(model: str, name: str, values: Sequence[float]) -> dict[str, Any]:
    datatype, shape = _OUTPUTS[model][name]
    data: Sequence[float]
    match name:
        case "predict_proba":
            data = [share for value in values for share in (1 - value, value)]
        case "predict":
            data = [int(value >= 0.5) for value in values]
        case _:
            data = values
    return {"name": name, "datatype": datatype, "shape": [len(values), *shape], "data": data}


@dataclass(slots=True)
class ModelServer:
    """The server's models and paths; `handle` answers one HTTP request."""

    models: Sequence[Compiled]
    delay_seconds: float = 0.0
    served: dict[tuple[str, str], Served] = field(init=False)
    _routes: dict[str, dict[str, Handler]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.served = {(model.model, model.version): Served(model) for model in self.models}
        self._route("GET", "/v2", self._fixed({"name": "credit-example", "version": "1", "extensions": []}))
        self._route("GET", "/v2/health/live", self._fixed({"live": True}))
        # Models load before the server listens, so whoever can ask gets the true answer.
        self._route("GET", "/v2/health/ready", self._fixed({"ready": True}))
        self._route("GET", "/stats", self._stats)
        for name in dict.fromkeys(model.model for model in self.models):
            versions = sorted((version for model, version in self.served if model == name), key=int)
            for version in versions:
                self._route_model(f"/v2/models/{name}/versions/{version}", self.served[name, version], versions)
            self._route_model(f"/v2/models/{name}", self.served[name, versions[-1]], versions)

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """Answer one request; a refusal is an `error` with its status."""
        methods = self._routes.get(request.rel_url.raw_path)
        if methods is None:
            return _refusal(404, f"{request.path} is not here: {self._whats_missing(request.path)}")
        handler = methods.get(request.method)
        if handler is None:
            allowed = ", ".join(methods)
            response = _refusal(405, f"{request.path} takes {allowed}, not {request.method}")
            response.headers["Allow"] = allowed
            return response
        try:
            return await handler(request)
        except ProtocolError as error:
            return _refusal(error.status, str(error))
        except web.HTTPRequestEntityTooLarge:
            return _refusal(413, f"the body is larger than {BODY_BYTES_MAX} bytes")

    def _route(self, method: str, path: str, handler: Handler) -> None:
        self._routes.setdefault(path, {})[method] = handler

    def _route_model(self, path: str, served: Served, versions: Sequence[str]) -> None:
        async def infer(request: web.BaseRequest) -> web.Response:
            if "Inference-Header-Content-Length" in request.headers:
                raise ProtocolError("binary tensors are not supported: send data as JSON")
            body = await request.read()
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            return web.Response(body=served.infer(body), headers=_JSON)

        self._route("POST", f"{path}/infer", infer)
        self._route("GET", path, self._fixed(served.metadata(versions)))
        self._route("GET", f"{path}/ready", self._fixed({"name": served.model.model, "ready": True}))

    def _fixed(self, content: Mapping[str, Any]) -> Handler:
        body = orjson.dumps(content)

        async def answer(_: web.BaseRequest) -> web.Response:
            return web.Response(body=body, headers=_JSON)

        return answer

    async def _stats(self, _: web.BaseRequest) -> web.Response:
        models = {
            f"{name}/{version}": {"requests": served.requests, "rows": served.rows}
            for (name, version), served in self.served.items()
        }
        total = sum(served.requests for served in self.served.values())
        return web.Response(body=orjson.dumps({"inferences": total, "models": models}), headers=_JSON)

    def _whats_missing(self, path: str) -> str:
        match path.split("/"):
            case ["", "v2", "models", name, *rest] if name:
                versions = [version for model, version in self.served if model == name]
                if not versions:
                    return f"there is no model {name}"
                if rest[:1] == ["versions"] and rest[1:2] and rest[1] not in versions:
                    return f"{name} has no version {rest[1]}, only {', '.join(versions)}"
        return "see /v2 and /v2/models/MODEL"


def _refusal(status: int, message: str) -> web.Response:
    return web.Response(status=status, body=orjson.dumps({"error": message}), headers=_JSON)


@contextlib.asynccontextmanager
async def listening(server: ModelServer, host: str, port: int) -> AsyncIterator[int]:
    """Serve while the context is open; yields the port. Closing waits for answers under way, at most five seconds."""
    runner = web.ServerRunner(web.Server(server.handle, access_log=None), shutdown_timeout=DRAIN_SECONDS)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=1024)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def load_models(directory: Path) -> list[Compiled]:
    """Load and compile what the server answers for; ArtifactError when the directory does not hold it."""
    return [compile_artifact(load(directory, model, version)) for model, version in SERVED]


async def serve(server: ModelServer, host: str, port: int, port_file: Path | None) -> None:
    """Serve until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with listening(server, host, port) as actual:
        if port_file is not None:
            write_whole(port_file, f"{actual}\n".encode())
        names = ", ".join(f"{model} {version}" for model, version in server.served)
        print(f"model server on http://{host}:{actual} with {names}", flush=True)
        await stopped.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the models, listen, and serve until told to stop."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.credit.server", description="Serve the example's models (Open Inference Protocol v2)."
    )
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="what `train` wrote")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port-file", type=Path, metavar="FILE", help="gets the port once the server listens")
    parser.add_argument("--delay-ms", type=int, default=0, help="wait before each inference, to play a slow backend")
    options = parser.parse_args(arguments)
    try:
        server = ModelServer(load_models(options.models), delay_seconds=options.delay_ms / 1000)
        uvloop.run(serve(server, options.host, options.port, options.port_file))
    except ArtifactError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cannot listen on {options.host}:{options.port}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
