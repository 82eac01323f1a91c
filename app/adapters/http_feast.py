"""A Feast feature server as a source: ``POST /get-online-features``, one request a view, answers as Fetched values.

The server's JSON says less than Feast stores. A value that was never written and an entity that does not exist are both
a null that is PRESENT, and only its event time, the epoch, tells them from a stored null; so null and epoch is MISSING
here. An answer that has the entity's own columns must say there what was asked: what it says of another is of no use to
anybody. Bytes have no form at all. Endpoints are taken in turn, and one that cannot be reached is followed by the next
while there is time; whatever goes wrong is ServerFailed, for an answer that cannot be read says nothing of any
value. Source: Feast 0.67, ``feature_server.py``; tests hold this against the server itself.
"""

import asyncio
import itertools
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp
import orjson
from prometheus_client import Counter, Histogram

from app.domain.errors import ServerFailed
from app.domain.features import FROM_HTTP, FeatureStatus, Fetched, FetchedFeatures, ViewNeed, coerce
from app.domain.view_documents import HttpSource
from app.observability import LATENCY_BUCKETS_S

CONNECTIONS_MAX: Final = 64
"""Open connections of one process to all feature servers together; past it requests wait within their timeouts."""
RESPONSE_BYTES_MAX: Final = 1_048_576
"""Of one entity's features: a decision's record must hold them, so anything near it is a mistake."""

_SECONDS = Histogram(
    "broker_feature_server_seconds", "Requests to a feature server", ["view"], buckets=LATENCY_BUCKETS_S
)
_FAILURES = Counter(
    "broker_feature_server_failures",
    "Requests to a feature server that ended as: timeout, unavailable, error (its own), invalid (an unsound answer)",
    ["view", "kind"],
)
_UNSOUND: Final = "its feature server's answer is not of the format"
_UNREACHED: Final = "its feature server could not be reached"
_OF_ANOTHER: Final = "its feature server answered for another entity"
_NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
_STATUSES: Final = {
    "PRESENT": FeatureStatus.PRESENT,
    "NULL_VALUE": FeatureStatus.NULL,
    "NOT_FOUND": FeatureStatus.MISSING,
    "OUTSIDE_MAX_AGE": FeatureStatus.STALE,
}


class _Failed(Exception):
    """One endpoint's failure: its kind for the metric, what was wrong, and whether another may do better.

    ``why`` is what the features' own reason says of it: the server's name and words are not for callers.
    """

    def __init__(self, kind: str, said: str, why: str, *, again: bool = False) -> None:
        super().__init__(said)
        self.kind = kind
        self.why = why
        self.again = again


class _OfAnother(ValueError):
    """An answer whose entity columns do not say what was asked."""


class FeastServers:
    """Asks the feature servers that needs name. Connections open with the first request, in its event loop."""

    def __init__(self, *, connections_max: int = CONNECTIONS_MAX, response_bytes_max: int = RESPONSE_BYTES_MAX) -> None:
        self._connections_max = connections_max
        self._response_bytes_max = response_bytes_max
        self._turns: dict[tuple[str, ...], Iterator[int]] = {}
        self._opened: aiohttp.ClientSession | None = None
        self._closed = False

    async def ask(self, need: ViewNeed, source: HttpSource, timeout_ms: int) -> FetchedFeatures:
        """The features of one need.

        Raises:
            ServerFailed: no sound answer from any endpoint within ``timeout_ms`` and the source's own timeout.
        """
        limit_ms = min(timeout_ms, source.timeout)
        body = request_body(need, source)
        turn = next(self._turns.setdefault(source.endpoints, itertools.cycle(range(len(source.endpoints)))))
        failed = _Failed("unavailable", "was not asked", "its feature server was not asked")
        try:
            with _SECONDS.labels(need.view).time():
                async with asyncio.timeout(limit_ms / 1000):
                    for number in range(len(source.endpoints)):
                        endpoint = source.endpoints[(turn + number) % len(source.endpoints)]
                        try:
                            answer = await self._post(f"{endpoint.rstrip('/')}/get-online-features", body)
                            return read_answer(answer, need, source)
                        except _Failed as error:
                            failed = error
                            if not error.again:
                                break
                        except _OfAnother as error:
                            failed = _Failed("invalid", str(error), _OF_ANOTHER)
                            break
                        except ValueError as error:
                            failed = _Failed("invalid", f"answered unsoundly: {error}", _UNSOUND)
                            break
        except TimeoutError:
            why = f"its feature server did not answer within {limit_ms} ms"
            failed = _Failed("timeout", f"did not answer within {limit_ms} ms", why)
        _FAILURES.labels(need.view, failed.kind).inc()
        raise ServerFailed(f"the feature server of view {need.view} {failed}", failed.why)

    async def _post(self, url: str, body: bytes) -> bytes:
        try:
            response = await self._session().post(
                url, data=body, headers={"Content-Type": "application/json"}, allow_redirects=False
            )
            try:
                answer = await response.content.read(self._response_bytes_max + 1)
                while not response.content.at_eof() and len(answer) <= self._response_bytes_max:
                    answer += await response.content.read(self._response_bytes_max + 1 - len(answer))
            except BaseException:
                # What is left of the body would be read as the next response.
                response.close()
                raise
            if len(answer) > self._response_bytes_max:
                response.close()
                said = f"answered more than {self._response_bytes_max} bytes"
                raise _Failed("invalid", said, f"its feature server {said}")
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            said = f"could not be reached: {type(error).__name__}: {error}"[:300]
            raise _Failed("unavailable", said, _UNREACHED, again=not self._closed) from error
        if response.status != 200:
            said = " ".join(answer[:300].decode(errors="replace").split())
            why = f"its feature server answered with HTTP status {response.status}"
            raise _Failed("error", f"answered {response.status}: {said}", why, again=response.status >= 502)
        return answer

    def _session(self) -> aiohttp.ClientSession:
        if self._closed:
            raise RuntimeError("closed")
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections_max),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
                timeout=_NO_TIMEOUT,
            )
        return self._opened

    async def close(self) -> None:
        """Release connections; later requests are unavailable."""
        self._closed = True
        if self._opened is not None:
            await self._opened.close()


# --- the format -------------------------------------------------------------------------------------------------------


def request_body(need: ViewNeed, source: HttpSource) -> bytes:
    """What is asked: the view's features by the server's name of it, of one entity."""
    view = source.view or need.view
    return orjson.dumps(
        {
            "features": [f"{view}:{feature}" for feature in need.features],
            "entities": {name: [value] for name, value in zip(need.key.names, need.key.values, strict=True)},
            "full_feature_names": True,
        }
    )


def read_answer(body: bytes, need: ViewNeed, source: HttpSource) -> FetchedFeatures:
    """The features that an answer holds.

    Raises:
        ValueError: it is not of the format, or of another entity, or does not have a feature that was asked for.
    """
    try:
        answer = orjson.loads(body)
        names = answer["metadata"]["feature_names"]
        # Servers that write the protobuf message as it is have the list a level deeper.
        columns = dict(zip(names["val"] if isinstance(names, dict) else names, answer["results"], strict=True))
        for name, asked in zip(need.key.names, need.key.values, strict=True):
            if name in columns:
                _check_entity(name, asked, columns[name]["values"])
        view = source.view or need.view
        return {
            (need.view, feature): _fetched(columns[f"{view}__{feature}"], type_)
            for feature, type_ in zip(need.features, need.types, strict=True)
        }
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{type(error).__name__}: {error}"[:200]) from error


def _check_entity(name: str, asked: str | int, answered: list[Any]) -> None:
    [value] = answered
    # Servers that write the protobuf message as it is have an int64 as text.
    if isinstance(value, bool) or (value != asked and str(value) != str(asked)):
        raise _OfAnother(f"was asked for {name} {asked!r:.80}, and answered for {value!r:.80}")


def _fetched(column: Mapping[str, Any], type_: str) -> Fetched:
    [value], [status] = column["values"], column["statuses"]
    times = column.get("event_timestamps") or [None]
    time_ms = None if times[0] is None else _epoch_ms(times[0])
    found = _STATUSES.get(status, FeatureStatus.ERROR)
    if found is FeatureStatus.ERROR:
        return Fetched(found, None, time_ms, f"the feature server says {str(status)[:80]}", FROM_HTTP)
    if found is FeatureStatus.MISSING:
        return Fetched(found, source=FROM_HTTP)
    if value is None or found is FeatureStatus.NULL:
        # The status says what stands there, whatever does. A null at the epoch was never written.
        null = found in (FeatureStatus.PRESENT, FeatureStatus.NULL) and bool(time_ms)
        status_, time_ms = (FeatureStatus.NULL, time_ms) if null else (FeatureStatus.MISSING, None)
        return Fetched(status_, None, time_ms, None, FROM_HTTP)
    try:
        typed = coerce(value, type_)
    except ValueError as error:
        said = f"the feature server's value cannot be used: {error}"
        return Fetched(FeatureStatus.ERROR, None, time_ms, said, FROM_HTTP)
    if found is FeatureStatus.STALE:
        return Fetched(found, typed, time_ms, "is older than the feature server allows", FROM_HTTP)
    return Fetched(FeatureStatus.PRESENT, typed, time_ms, None, FROM_HTTP)


def _epoch_ms(text: str) -> int:
    """A moment; one without a zone is UTC, as all times of Feast's.

    >>> _epoch_ms("2026-11-23T00:00:00"), _epoch_ms("2026-11-23T01:00:00+01:00")
    (1795392000000, 1795392000000)
    """
    moment = datetime.fromisoformat(text)
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000)
