"""Open Inference Protocol v2, as bytes: rows become an inference request, a response becomes each row's outputs.

Pure; the calls are ``http_oip``'s. Servers are strict in what they read (MLServer answers nested data and unknown
datatypes with errors) and differ in what they write, so requests are flat and exact, and responses are taken flat or
nested and held to their own shapes. Source: the protocol's REST specification (KServe, "Open Inference Protocol").
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from app.domain.dispatch import Row
from app.domain.features import Value
from app.domain.version_documents import ColumnsInput

_SCALARS: Final = {
    "BOOL": "BOOL",
    "BYTES": "BYTES",
    "DOUBLE": "FP64",
    "FLOAT": "FP32",
    "INT32": "INT32",
    "INT64": "INT64",
    "STRING": "BYTES",
    "UNIX_TIMESTAMP": "INT64",
}
DATATYPES: Final[Mapping[str, str]] = {
    **_SCALARS,
    **{f"{type_}_LIST": datatype for type_, datatype in _SCALARS.items()},
}
"""The tensor datatype of each Feast value type, a list's being its elements'; BYTES is what the protocol calls text."""

_WHOLE: Final = frozenset({"INT32", "INT64"})
_NUMBERS: Final = frozenset({"FP32", "FP64", "INT32", "INT64"})
_ONE_VALUE: Final = (1, 1)
_DIMENSIONS_MAX: Final = 16  # of an output's shape; its product is taken, and its sizes are the server's


def encode_request(
    rows: Sequence[Row], layout: ColumnsInput, outputs: Sequence[Mapping[str, str]], request_id: str | None
) -> bytes:
    """The request's body: every row in one call, ``outputs`` asked for by name.

    Raises:
        ValueError: a value that the protocol's JSON cannot carry, or rows that do not fit into one call; it names the
            input.
    """
    body: dict[str, Any] = {} if request_id is None else {"id": request_id}
    try:
        if layout.layout == "matrix":
            body["inputs"] = (_matrix(rows, layout),)
        elif len(rows) == 1:
            body["inputs"] = _one_row(rows[0])
        else:
            body["inputs"] = _columns(rows)
        body["outputs"] = outputs
        return orjson.dumps(body)
    except KeyError as error:
        raise ValueError(f"no value type that the protocol has a datatype for: {error}") from error
    except TypeError as error:
        raise ValueError(f"inputs cannot be written as JSON: {error}") from error


def _one_row(row: Row) -> list[dict[str, Any]]:
    types = row.types
    tensors: list[dict[str, Any]] = []
    for name, value in row.values.items():
        data: Sequence[str | int | float | bool | None]
        if type(value) is tuple or types[name].endswith("_LIST"):
            data = _elements(name, value)
            shape = (1, len(data))
        else:
            data, shape = (value if type(value) is int or type(value) is str else _plain(name, value),), _ONE_VALUE
        tensors.append({"name": name, "shape": shape, "datatype": DATATYPES[types[name]], "data": data})
    return tensors


class RequestTemplate:
    """One-row requests of one shape (columns and their types), as bytes with gaps for the id and the values.

    It writes the very bytes that ``encode_request`` does at half the cost, which each decision pays for each of its
    models.
    """

    __slots__ = ("_columns", "_lists", "_names", "_outputs", "_text")

    def __init__(self, row: Row, outputs: Sequence[Mapping[str, str]]) -> None:
        self._names = tuple(row.values)
        self._lists = any(type_.endswith("_LIST") for type_ in row.types.values())
        tensors = (
            b'{"name":%b,"shape":[1,1],"datatype":%b,"data":[%%b]}'
            % (_literal(name), _literal(DATATYPES[row.types[name]]))
            for name in self._names
        )
        self._text = b'{"id":%%b,"inputs":[%b],"outputs":%b}' % (b",".join(tensors), _literal(outputs))
        self._columns = tuple(
            b'{"name":%b,"shape":[%%d,1],"datatype":%b,"data":[%%b]}'
            % (_literal(name), _literal(DATATYPES[row.types[name]]))
            for name in self._names
        )
        self._outputs = orjson.dumps(outputs)

    def fill(self, row: Row) -> bytes | None:
        """The request for ``row``, whose types in the columns' order are the template's.

        None where ``encode_request`` has to look closer: other columns, a null (which NaN also becomes), bytes, or
        lists, whose shapes vary.
        """
        literals = self._literals(row)
        return None if literals is None else self._text % literals

    def fill_shared(self, rows: Sequence[Row]) -> tuple[bytes, tuple[bytes, ...]] | None:
        """The request for all of ``rows``, of the template's types, and each row's own as ``fill`` writes it; or None.

        Each value is written once for both.
        """
        written: list[tuple[bytes, ...]] = []
        for row in rows:
            literals = self._literals(row)
            if literals is None:
                return None
            written.append(literals)
        _, *columns = zip(*written, strict=True)
        tensors = (
            tensor % (len(rows), b",".join(values)) for tensor, values in zip(self._columns, columns, strict=True)
        )
        body = b'{"inputs":[%b],"outputs":%b}' % (b",".join(tensors), self._outputs)
        return body, tuple(self._text % literals for literals in written)

    def _literals(self, row: Row) -> tuple[bytes, ...] | None:
        """The row's id and its values, as JSON."""
        values = row.values
        if self._lists or tuple(values) != self._names or tuple(row.types) != self._names:
            return None
        try:
            literals = (orjson.dumps(row.request_id), *map(orjson.dumps, values.values()))
        except TypeError:
            return None
        return None if b"null" in literals else literals


def _literal(value: object) -> bytes:
    return orjson.dumps(value).replace(b"%", b"%%")


def _columns(rows: Sequence[Row]) -> list[dict[str, Any]]:
    names = rows[0].values.keys()
    if any(row.values.keys() != names for row in rows):
        raise ValueError("rows of one call have different inputs")
    return [_column(name, rows) for name in names]


def _column(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    datatype = _common_datatype(name, rows)
    values = [row.values[name] for row in rows]
    if not any(type(row.values[name]) is tuple or row.types[name].endswith("_LIST") for row in rows):
        data = [_plain(name, value) for value in values]
        return {"name": name, "shape": (len(rows), 1), "datatype": datatype, "data": data}
    lists = [_elements(name, value) for value in values]
    widths = {len(each) for each in lists}
    if len(widths) > 1:
        found = ", ".join(map(str, sorted(widths)))
        raise ValueError(f"input {name} has lists of {found} elements in one call: a tensor's rows are of one length")
    return {
        "name": name,
        "shape": (len(rows), widths.pop()),
        "datatype": datatype,
        "data": [element for each in lists for element in each],
    }


def _elements(name: str, value: Value) -> list[str | int | float | bool | None]:
    if not isinstance(value, tuple):
        said = "null, so that its tensor has no shape" if value is None else "no list, and its type is one"
        raise ValueError(f"input {name} is {said}: give it a list as its default, or require it")
    return [_plain(name, element) for element in value]


def _common_datatype(name: str, rows: Sequence[Row]) -> str:
    # A null has no type of its own: what a row infers for it must not outvote the others.
    known = {DATATYPES[row.types[name]] for row in rows if row.values[name] is not None}
    if not known:
        return DATATYPES[rows[0].types[name]]
    if len(known) == 1:
        return known.pop()
    if known <= _WHOLE:
        return "INT64"
    if known <= _NUMBERS:
        return "FP64"
    raise ValueError(f"input {name} has datatypes {', '.join(sorted(known))} in one call: declare its type")


def _plain(name: str, value: Value) -> str | int | float | bool | None:
    assert not isinstance(value, tuple)  # noqa: S101 - lists were told apart
    if isinstance(value, float) and not math.isfinite(value):
        # The JSON writer would turn it into null, which means something else.
        raise ValueError(f"input {name} is {value}, which JSON cannot hold")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"input {name} holds bytes that are not UTF-8, which JSON cannot hold") from None
    return value


def _matrix(rows: Sequence[Row], layout: ColumnsInput) -> dict[str, Any]:
    names = tuple(rows[0].values)
    datatype = str(layout.datatype)
    whole = datatype in _WHOLE
    if any(tuple(row.values) != names for row in rows):
        raise ValueError("rows of one call have different inputs")
    data = [_number(name, value, datatype, whole) for row in rows for name, value in row.values.items()]
    return {"name": layout.tensor, "shape": (len(rows), len(names)), "datatype": datatype, "data": data}


def _number(name: str, value: Value, datatype: str, whole: bool) -> int | float:
    if not isinstance(value, int | float) or not math.isfinite(value) or (whole and value != int(value)):
        raise ValueError(f"input {name} is {str(value)[:80]!r}, which a matrix of {datatype} cannot hold")
    return int(value) if whole or isinstance(value, bool) else value


def decode_response(body: bytes, rows: int, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Each row's outputs by tensor name: the row's element, or the list of its elements where it has several.

    Raises:
        ValueError: not a response of the protocol, a wanted tensor is missing, or shapes, data and rows disagree.
    """
    try:
        response = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    outputs = response.get("outputs") if isinstance(response, dict) else None
    if not isinstance(outputs, list):
        raise ValueError("no list of outputs")
    answers: list[dict[str, Any]] = [{} for _ in range(rows)]
    found: set[str] = set()
    for output in outputs:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str):
            raise ValueError("an output without a name")
        if name in found:
            raise ValueError(f"output {name[:80]!r} is there twice")
        found.add(name)
        if name in wanted:
            _spread(name, output, answers)
    if not found.issuperset(wanted):
        missing = ", ".join(name for name in wanted if name not in found)
        raise ValueError(f"no output {missing} (there is: {', '.join(sorted(found))[:200] or 'none'})")
    return answers


def _spread(name: str, output: Mapping[str, Any], answers: Sequence[dict[str, Any]]) -> None:
    # Plain loops: this runs for every decision, and generators cost more than what they look at.
    shape, data = output.get("shape"), output.get("data")
    if not isinstance(shape, list) or not 1 <= len(shape) <= _DIMENSIONS_MAX:
        raise ValueError(f"output {name!r} has no usable shape")
    size = 1
    for dimension in shape:
        if type(dimension) is not int or dimension < 0:
            raise ValueError(f"output {name!r} has no usable shape")
        size *= dimension
    if not isinstance(data, list):
        raise ValueError(f"output {name!r} has no list of data")
    rows = len(answers)
    if shape[0] != rows:
        raise ValueError(f"output {name!r} has shape {str(shape)[:80]}, and {rows} rows were sent")
    for element in data:
        if isinstance(element, list):
            data = _flat(name, data)
            break
    if size != len(data):
        raise ValueError(f"output {name!r} has shape {str(shape)[:80]} and {len(data)} elements of data")
    width = size // rows
    for index, answer in enumerate(answers):
        answer[name] = data[index] if width == 1 else data[index * width : (index + 1) * width]


def _flat(name: str, data: list[Any]) -> list[Any]:
    while any(isinstance(element, list) for element in data):
        if not all(isinstance(element, list) for element in data):
            raise ValueError(f"output {name!r} mixes lists and elements")
        data = [element for inner in data for element in inner]
    return data


def error_text(body: bytes, limit: int = 300) -> str:
    """What a server says went wrong: its ``error`` or ``detail`` member, or the body's text; one line, shortened.

    >>> error_text(b'{"error": "no such model"}'), error_text(b"Internal  Server\\nError")
    ('no such model', 'Internal Server Error')
    """
    said: object = None
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if isinstance(answer, dict):
        said = answer.get("error") or answer.get("detail")
    if said is None:
        said = body[: 4 * limit].decode(errors="replace")
    text = said if isinstance(said, str) else orjson.dumps(said).decode()
    text = "".join(character if character.isprintable() else " " for character in text[: 4 * limit])
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
