"""Which entities a Redis in Feast's layout knows: a bounded sample of its keys, read back to entities."""

import struct
from collections.abc import Callable
from typing import Any, Final

import redis
from redis.exceptions import RedisClusterException, ResponseError

from app.domain.errors import StoreUnavailable
from app.domain.features import EntityKey

KEYS_LOOKED_AT_MAX: Final = 500_000
_SCAN_COUNT: Final = 1_000
_TYPES: Final = {2: "STRING", 3: "INT32", 4: "INT64"}
_STRING: Final = 2
_NAMES_MAX: Final = 64


def read_row_key(data: bytes, project: str) -> EntityKey | None:
    """The entity whose row ``data`` is the key of; None for another project's, or for what is no such key.

    >>> read_row_key(bytes.fromhex("01000000020000000200000069640400000008000000110000000000000070"), "p")
    EntityKey(project='p', names=('id',), values=(17,), types=('INT64',))
    """
    tail = project.encode()
    if not data.endswith(tail):
        return None
    end = len(data) - len(tail)
    try:
        (count,) = struct.unpack_from("<I", data)
        if count > _NAMES_MAX:
            return None
        at, names, values, types = 4, list[str](), list[str | int](), list[str]()
        for _ in range(count):
            type_, text, at = _part(data, at, end)
            if type_ != _STRING:
                return None
            names.append(text.decode())
        for _ in range(count):
            type_, raw, at = _part(data, at, end)
            name = _TYPES[type_]
            if name == "STRING":
                values.append(raw.decode())
            else:
                values.append(struct.unpack("<i" if name == "INT32" else "<q", raw)[0])
            types.append(name)
    except (struct.error, KeyError, UnicodeDecodeError, IndexError):
        return None
    return EntityKey(project, tuple(names), tuple(values), tuple(types)) if at == end else None


def _part(data: bytes, at: int, end: int) -> tuple[int, bytes, int]:
    type_, length = struct.unpack_from("<II", data, at)
    at += 8
    if at + length > end:
        raise IndexError
    return type_, data[at : at + length], at + length


def sample_keys(
    urls: str, project: str, most: int, wanted: Callable[[EntityKey], bool], *, timeout_s: float = 10.0
) -> list[EntityKey]:
    """Up to ``most`` entities of ``project`` that are ``wanted``, of the first half million keys that SCAN shows.

    ``urls`` is one server's, or several of one cluster's nodes with commas between; a cluster's masters are all asked.

    Raises:
        StoreUnavailable: Redis does not answer.
    """
    found: dict[EntityKey, None] = {}
    try:
        with _connected([url.strip() for url in urls.split(",")], timeout_s) as client:
            keys = client.scan_iter(match=f"*{project}", count=_SCAN_COUNT, _type="hash")
            for looked_at, data in enumerate(keys):
                key = read_row_key(data, project)
                if key is not None and wanted(key):
                    found[key] = None
                if len(found) >= most or looked_at >= KEYS_LOOKED_AT_MAX:
                    break
    except (redis.RedisError, RedisClusterException) as error:
        raise StoreUnavailable(f"Redis is not usable: {error}") from error
    return list(found)


def _connected(urls: list[str], timeout_s: float) -> Any:
    """A client of the server or the cluster behind the first of ``urls`` that answers."""
    within = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    for last, url in enumerate(urls, start=1 - len(urls)):
        client = redis.Redis.from_url(url, **within)
        try:
            client.execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]  # redis-py has no types of it
        except ResponseError:
            return client  # It is no cluster, and says so.
        except redis.RedisError:
            client.close()
            if last == 0:
                raise
        else:
            client.close()
            return redis.RedisCluster.from_url(url, **within)
    raise AssertionError  # pragma: no cover - the last URL returns or raises
