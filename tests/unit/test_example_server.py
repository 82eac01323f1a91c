"""The credit example's model server, over a real socket: the protocol's answers and its refusals."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from examples.credit.applicants import Applicant, applicants, kind
from examples.credit.artifacts import load, spec_of
from examples.credit.server import BODY_BYTES_MAX, ROWS_MAX, ModelServer, listening, load_models
from examples.credit.train import matrix

START_SECONDS = 60
Tensors = list[dict[str, Any]]


class Client:
    """Requests to one server."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def get(self, path: str) -> tuple[int, Any]:
        async with self._session.get(path) as response:
            return response.status, orjson.loads(await response.read())

    async def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        async with self._session.post(path, data=data, headers=headers) as response:
            assert response.content_type == "application/json"
            return response.status, orjson.loads(await response.read())


@pytest.fixture
async def client(credit_models: Path) -> AsyncIterator[Client]:
    async with (
        listening(ModelServer(load_models(credit_models)), "127.0.0.1", 0) as port,
        aiohttp.ClientSession(
            f"http://127.0.0.1:{port}", timeout=aiohttp.ClientTimeout(total=START_SECONDS)
        ) as session,
    ):
        yield Client(session)


def tensors(model: str, version: str, people: tuple[Applicant, ...], *, nested: bool = False) -> Tensors:
    """One tensor a column, `[rows]` flat or `[rows, 1]` nested."""
    return [
        {
            "name": column,
            "datatype": {int: "INT64", float: "FP64", str: "BYTES"}[kind(column)],
            "shape": [len(people), 1] if nested else [len(people)],
            "data": [[person.value(column)] if nested else person.value(column) for person in people],
        }
        for column in spec_of(model, version).columns
    ]


async def test_one_row_of_each_version_is_scikit_learn_s_answer(client: Client, credit_models: Path) -> None:
    """Both versions of credit-pd answer side by side, with both classes' probabilities and the class."""
    person = applicants()[1:2]
    for version in ("1", "2"):
        rows = matrix(person, spec_of("credit-pd", version).columns)
        expected = load(credit_models, "credit-pd", version).pipeline.predict_proba(rows)
        status, reply = await client.post(
            f"/v2/models/credit-pd/versions/{version}/infer",
            {"id": "r-1", "inputs": tensors("credit-pd", version, person)},
        )
        assert status == 200
        assert (reply["id"], reply["model_name"], reply["model_version"]) == ("r-1", "credit-pd", version)
        proba, predict = reply["outputs"]
        assert (proba["name"], proba["datatype"], proba["shape"]) == ("predict_proba", "FP64", [1, 2])
        assert proba["data"] == pytest.approx(expected[0])
        assert (predict["name"], predict["datatype"], predict["shape"]) == ("predict", "INT64", [1])
        assert predict["data"] == [int(expected[0][1] >= 0.5)]


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
async def test_rows_share_a_call(client: Client, credit_models: Path, nested: bool) -> None:
    """Many rows are answered in one call, in their order, whichever way the tensors are written."""
    people = applicants()[:64]
    body = {"inputs": tensors("application-anomaly", "1", people, nested=nested)}
    status, reply = await client.post("/v2/models/application-anomaly/versions/1/infer", body)
    assert status == 200
    rows = matrix(people, spec_of("application-anomaly", "1").columns)
    expected = -load(credit_models, "application-anomaly", "1").pipeline.score_samples(rows)
    assert reply["outputs"] == [
        {"name": "score", "datatype": "FP64", "shape": [64], "data": pytest.approx(list(expected))}
    ]


async def test_a_url_without_a_version_means_the_newest(client: Client) -> None:
    """`/v2/models/credit-pd/infer` is version 2."""
    body = {"inputs": tensors("credit-pd", "2", applicants()[:1])}
    status, reply = await client.post("/v2/models/credit-pd/infer", body)
    assert (status, reply["model_version"]) == (200, "2")


async def test_only_the_outputs_asked_for_are_sent(client: Client) -> None:
    """A request that names outputs gets those; an empty list means all."""
    body: dict[str, Any] = {"inputs": tensors("credit-pd", "1", applicants()[:1]), "outputs": [{"name": "predict"}]}
    _, reply = await client.post("/v2/models/credit-pd/versions/1/infer", body)
    assert [output["name"] for output in reply["outputs"]] == ["predict"]
    _, reply = await client.post("/v2/models/credit-pd/versions/1/infer", body | {"outputs": []})
    assert [output["name"] for output in reply["outputs"]] == ["predict_proba", "predict"]


async def test_whole_numbers_may_come_as_floating_ones(client: Client) -> None:
    """FP64 5000.0 is taken as 5000, because a JSON caller may not tell them apart."""
    inputs = tensors("application-anomaly", "2", applicants()[:1])
    _, whole = await client.post("/v2/models/application-anomaly/infer", {"inputs": inputs})
    for tensor in inputs:
        if tensor["datatype"] == "INT64":
            tensor |= {"datatype": "FP64", "data": [float(value) for value in tensor["data"]]}
    status, floating = await client.post("/v2/models/application-anomaly/infer", {"inputs": inputs})
    assert status == 200
    assert floating == whole


async def test_health_and_metadata(client: Client) -> None:
    """Server and models say that they are there, and which tensors they take and give."""
    assert (await client.get("/v2/health/live")) == (200, {"live": True})
    assert (await client.get("/v2/health/ready")) == (200, {"ready": True})
    status, server = await client.get("/v2")
    assert status == 200
    assert set(server) == {"name", "version", "extensions"}
    for path in ("/v2/models/credit-pd/ready", "/v2/models/credit-pd/versions/1/ready"):
        assert (await client.get(path)) == (200, {"name": "credit-pd", "ready": True})
    status, model = await client.get("/v2/models/credit-pd/versions/1")
    assert status == 200
    assert model["versions"] == ["1", "2"]
    assert [tensor["name"] for tensor in model["inputs"]] == list(spec_of("credit-pd", "1").columns)
    assert model["outputs"][0] == {"name": "predict_proba", "datatype": "FP64", "shape": [-1, 2]}
    status, newest = await client.get("/v2/models/credit-pd")
    assert [tensor["name"] for tensor in newest["inputs"]] == list(spec_of("credit-pd", "2").columns)


async def test_inferences_are_counted_by_version(client: Client) -> None:
    """Answered inferences count with their rows; refused ones do not."""
    for rows in (1, 5):
        body = {"inputs": tensors("credit-pd", "1", applicants()[:rows])}
        await client.post("/v2/models/credit-pd/versions/1/infer", body)
    await client.post("/v2/models/credit-pd/versions/2/infer", {"inputs": []})
    assert (await client.get("/stats")) == (
        200,
        {
            "inferences": 2,
            "models": {
                "credit-pd/1": {"requests": 2, "rows": 6},
                "credit-pd/2": {"requests": 0, "rows": 0},
                "application-anomaly/1": {"requests": 0, "rows": 0},
                "application-anomaly/2": {"requests": 0, "rows": 0},
            },
        },
    )


def _change(name: str, **members: Any) -> Callable[[Tensors], Any]:
    def change(inputs: Tensors) -> Any:
        return [tensor | members if tensor["name"] == name else tensor for tensor in inputs]

    return change


REFUSED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "inputs is no list": (lambda _: {"a": 1}, "inputs must be a list of tensors"),
    "a tensor without a name": (
        lambda inputs: [*inputs, {"data": [1]}],
        "each of inputs must be an object with a name",
    ),
    "a tensor that is no object": (lambda inputs: [*inputs, 7], "each of inputs must be an object with a name"),
    "a missing tensor": (lambda inputs: inputs[1:], "inputs missing: credit_amount"),
    "an unknown tensor": (lambda inputs: [*inputs, inputs[0] | {"name": "shoe_size"}], "input shoe_size is not known"),
    "a tensor twice": (lambda inputs: [*inputs, inputs[0]], "input credit_amount is there twice"),
    "another datatype than text": (
        _change("purpose", datatype="INT64"),
        "input purpose has datatype INT64; it must be",
    ),
    "another datatype than a number": (
        _change("age_in_years", datatype="BYTES"),
        "input age_in_years has datatype BYTES; it must be INT64",
    ),
    "a number as text": (_change("age_in_years", data=["35"]), "input age_in_years holds '35', which is not a whole"),
    "true as a number": (_change("age_in_years", data=[True]), "input age_in_years holds True"),
    "a broken number": (
        _change("age_in_years", datatype="FP64", data=[35.5]),
        "input age_in_years holds 35.5, which is not a whole number",
    ),
    "null": (_change("purpose", data=[None]), "input purpose holds None, which is not text"),
    "an unknown label": (_change("purpose", data=["a boat"]), "input purpose is 'a boat', which is none of the labels"),
    "no shape": (_change("purpose", shape=None), "input purpose has shape None"),
    "a shape of two columns": (_change("purpose", shape=[1, 2]), "input purpose has shape [1, 2]"),
    "no rows": (_change("purpose", shape=[0], data=[]), "rows must be from 1 to"),
    "too many rows": (_change("purpose", shape=[ROWS_MAX + 1]), f"rows must be from 1 to {ROWS_MAX}"),
    "fewer values than the shape says": (
        _change("purpose", shape=[2]),
        "input purpose has 1 values where its shape [2] says 2",
    ),
    "rows that differ": (
        _change("purpose", shape=[2], data=["repairs", "repairs"]),
        "inputs differ in their number of rows",
    ),
    "no data": (_change("purpose", data=None), "input purpose has no data list"),
    "nested rows of two": (
        _change("purpose", shape=[1, 1], data=[["repairs", "others"]]),
        "input purpose has rows that are not lists of one value",
    ),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datatype": "BYTES"}, "input monthly_installment has datatype BYTES; it must be FP64"),
        ({"data": ["101"]}, "input monthly_installment holds '101', which is not a number of FP64"),
        ({"data": [True]}, "input monthly_installment holds True, which is not a number of FP64"),
        ({"data": [1e300]}, "input monthly_installment holds 1e+300, which is not a number of FP64"),
    ],
)
async def test_numbers_that_need_not_be_whole_are_checked(client: Client, change: dict[str, Any], message: str) -> None:
    """A computed number of another type, or too large for the trees, is a 400; whole ones are numbers too."""
    inputs = tensors("credit-pd", "2", applicants()[:1])
    path = "/v2/models/credit-pd/versions/2/infer"
    status, reply = await client.post(path, {"inputs": _change("monthly_installment", **change)(inputs)})
    assert status == 400
    assert message in reply["error"]
    assert (await client.post(path, {"inputs": _change("monthly_installment", data=[101])(inputs)}))[0] == 200


@pytest.mark.parametrize("case", REFUSED)
async def test_inputs_that_break_the_protocol_are_refused_by_name(client: Client, case: str) -> None:
    """Whatever is missing, unknown, or of another type or shape is a 400 that says which and why."""
    change, message = REFUSED[case]
    inputs = change(tensors("credit-pd", "1", applicants()[:1]))
    status, reply = await client.post("/v2/models/credit-pd/versions/1/infer", {"inputs": inputs})
    assert status == 400
    assert set(reply) == {"error"}
    assert message in reply["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"", "the body is not JSON"),
        (b"[]", "the body must be a JSON object"),
        (b'{"id": 7, "inputs": []}', "id must be text"),
        (b'{"inputs": [], "outputs": {}}', "outputs must be a list"),
        (b'{"inputs": [], "outputs": [{"name": "odds"}]}', "output 'odds' is not known; the model gives predict_proba"),
    ],
)
async def test_bodies_that_cannot_be_read_are_refused(client: Client, body: bytes, message: str) -> None:
    """A body that is not the protocol's JSON is a 400 that says what is wrong."""
    status, reply = await client.post("/v2/models/credit-pd/versions/1/infer", body)
    assert status == 400
    assert message in reply["error"]


async def test_binary_tensors_and_oversized_bodies_are_refused(client: Client) -> None:
    """The binary extension is not spoken, and a body has a bound."""
    path = "/v2/models/credit-pd/versions/1/infer"
    status, reply = await client.post(path, b"{}", headers={"Inference-Header-Content-Length": "2"})
    assert (status, reply) == (400, {"error": "binary tensors are not supported: send data as JSON"})
    status, reply = await client.post(path, b" " * (BODY_BYTES_MAX + 1))
    assert (status, reply) == (413, {"error": f"the body is larger than {BODY_BYTES_MAX} bytes"})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v2/models/no-such/infer", "there is no model no-such"),
        ("/v2/models/expected-amount/infer", "there is no model expected-amount"),
        ("/v2/models/credit-pd/versions/9/infer", "credit-pd has no version 9, only 1, 2"),
        ("/v2/models/credit-pd/explain", "see /v2"),
        ("/v3", "see /v2"),
    ],
)
async def test_what_is_not_here_is_404(client: Client, path: str, message: str) -> None:
    """An unknown model, version or path is a 404 that says which of them."""
    status, reply = await client.post(path, {"inputs": []})
    assert status == 404
    assert message in reply["error"]


async def test_a_path_s_other_methods_are_405(client: Client) -> None:
    """An inference is a POST; a GET says so."""
    status, reply = await client.get("/v2/models/credit-pd/infer")
    assert (status, reply) == (405, {"error": "/v2/models/credit-pd/infer takes POST, not GET"})


async def test_the_process_announces_its_port_and_ends_on_sigterm(credit_models: Path, tmp_path: Path) -> None:
    """The command writes its port to a file once it listens, answers there, and exits 0 on SIGTERM."""
    port_file = tmp_path / "port"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "examples.credit.server", "--models", str(credit_models)),
        *("--port", "0", "--port-file", str(port_file), "--delay-ms", "1"),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = (await process.stdout.readline()).decode()
        port = int(port_file.read_text())
        assert f"model server on http://127.0.0.1:{port} with credit-pd 1" in line
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            body = {"inputs": tensors("credit-pd", "1", applicants()[:1])}
            status, _ = await Client(session).post("/v2/models/credit-pd/versions/1/infer", body)
        assert status == 200
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(START_SECONDS):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_the_process_without_models_fails_with_one_line(tmp_path: Path) -> None:
    """Started on a directory without models, the command exits 1 and says how to train them."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "examples.credit.server", "--models", str(tmp_path), "--port", "0"),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            _, error = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 1
    assert error.decode().count("\n") == 1
    assert "run `python -m examples.credit.train" in error.decode()
