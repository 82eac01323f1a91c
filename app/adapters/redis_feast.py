"""Redis as the feature store, in Feast's layout, so that what Feast has written is read and the other way round.

One hash an entity holds all its views; ``_ts:{view}`` is the event time of a view's features. What this project adds,
and Feast does not look at, is ``_at:{view}``: the event times of features that are older than their view's, for a
partial update leaves the others alone. Without it their age would be hidden by the update of their neighbours. And
``_del:{view}``, the time of the last tombstone, which keeps older updates from bringing back what it deleted.

``fetch`` is one round trip whatever is asked, on a pooled connection, and one for several requests where Redis is busy
(``redis_sharing``); commands are packed here and answers read as bytes, which costs half of what a client's pipeline
object does. ``write`` is one round trip too: a script compares event times and writes within Redis, so that of two
workers the later event wins and not the later writer, feature by feature. Every driver's exception ends here, as
StoreUnavailable.

A row expires in Redis when the last of its views is past its ttl. Views without a ttl, and what others wrote before,
keep it for good.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import hiredis
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from app.adapters.feast_codec import (
    decode_time,
    decode_value,
    encode_time,
    encode_value,
    feature_field,
    row_key,
    time_field,
)
from app.adapters.redis_sharing import SharedExchanges
from app.domain.errors import StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, Fetched, ViewNeed

CONNECTIONS_MAX: Final = 32
"""A fetch takes a connection for a millisecond, so these carry more than a worker's CPU can ask for."""
WRITE_TIMEOUT_MS: Final = 10_000
"""One batch of rows; past it the worker asks again rather than trust a connection that may be dead."""
PING_TIMEOUT_MS: Final = 2_000

_WRITE_LUA: Final = b"""\
-- KEYS[1] a row. ARGV: ts field, at field, del field, seconds, nanos, Timestamp bytes, milliseconds at which the view
-- is past its ttl ('' for never), '1' for a tombstone ('2' for one that keeps nothing out later), number of kept
-- fields, kept fields..., then field and value in turn. Returns 1 when something was written, 0 when all that is
-- stored is as new or newer.
local KEY, TS, AT, DEL, SECONDS, NANOS, TIME = KEYS[1], ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]),
    tonumber(ARGV[5]), ARGV[6]
local EXPIRES, TOMBSTONE, GUARDS, KEPT = ARGV[7], ARGV[8] ~= '0', ARGV[8] == '1', tonumber(ARGV[9])

local function timestamp(data)
  local numbers, at = {[8] = 0, [16] = 0}, 1
  while at <= #data do
    local tag, value, scale, byte = string.byte(data, at), 0, 1, 128
    while byte >= 128 do
      at = at + 1
      byte = string.byte(data, at)
      if not byte then return 0, 0 end
      value = value + (byte % 128) * scale
      scale = scale * 128
    end
    at = at + 1
    numbers[tag] = value
  end
  -- A time before 1970 is a varint of 64 bits; like the epoch itself it guards nothing.
  if numbers[8] >= 2 ^ 63 then return 0, 0 end
  return numbers[8], numbers[16]
end

-- How the row's time lies to a stored one: 1 later, 0 the same, -1 earlier; later than one that guards nothing.
local function against(data)
  if not data then return 1 end
  local seconds, nanos = timestamp(data)
  if seconds == 0 and nanos == 0 then return 1 end
  if SECONDS ~= seconds then return SECONDS > seconds and 1 or -1 end
  if NANOS ~= nanos then return NANOS > nanos and 1 or -1 end
  return 0
end

local held = redis.call('HMGET', KEY, TS, AT, DEL)
local stored, list, deleted = held[1], held[2], held[3]

-- Own times of features that are older than the view's, by field. A list counts only beside the time it was written
-- with: another writer may have replaced the row since.
local function own_times()
  local times = {}
  if stored and list and string.sub(list, 2, 1 + string.byte(list, 1)) == stored then
    local at = 2 + string.byte(list, 1)
    while at <= #list do
      local length = string.byte(list, at + 4)
      times[string.sub(list, at, at + 3)] = string.sub(list, at + 5, at + 4 + length)
      at = at + 5 + length
    end
  end
  return times
end

local function keep_times(time, times)
  local parts = {string.char(#time), time}
  for field, own in pairs(times) do
    parts[#parts + 1] = field .. string.char(#own) .. own
  end
  if #parts > 2 then
    redis.call('HSET', KEY, AT, table.concat(parts))
  elseif list then
    redis.call('HDEL', KEY, AT)
  end
end

local before = redis.call('PTTL', KEY)
local alone = false
if EXPIRES ~= '' and before == -1 then
  local own = 0
  for i = 1, 3 do
    if held[i] then own = own + 1 end
  end
  for i = 10, #ARGV do
    if i < 10 + KEPT or (i - KEPT) % 2 == 0 then own = own + redis.call('HEXISTS', KEY, ARGV[i]) end
  end
  alone = own == redis.call('HLEN', KEY)
end

if against(stored) > 0 and (GUARDS or not TOMBSTONE) then
  if TOMBSTONE then
    redis.call('HDEL', KEY, AT, unpack(ARGV, 10, 9 + KEPT))
    redis.call('HSET', KEY, TS, TIME, DEL, TIME)
  else
    local times = {}
    if KEPT > 0 and stored then
      local older = own_times()
      for i = 10, 9 + KEPT do
        times[ARGV[i]] = older[ARGV[i]] or stored
      end
    end
    keep_times(TIME, times)
    redis.call('HSET', KEY, TS, TIME, unpack(ARGV, 10 + KEPT))
  end
else
  -- Each feature has its own time, the view's where no other is listed; one that is not there, the tombstone's.
  local times, changed = own_times(), 0
  if TOMBSTONE then
    for i = 10, 9 + KEPT do
      local field = ARGV[i]
      if against(times[field] or stored) >= 0 and redis.call('HDEL', KEY, field) == 1 then
        times[field] = nil
        changed = 1
      end
    end
    if GUARDS and against(deleted) > 0 then
      redis.call('HSET', KEY, DEL, TIME)
      changed = 1
    end
  else
    for i = 10 + KEPT, #ARGV, 2 do
      local field = ARGV[i]
      local guard = deleted
      if redis.call('HEXISTS', KEY, field) == 1 then guard = times[field] or stored end
      if against(guard) > 0 then
        redis.call('HSET', KEY, field, ARGV[i + 1])
        times[field] = TIME
        changed = 1
      end
    end
  end
  if changed == 0 then return 0 end
  if stored then keep_times(stored, times) end
end

-- The row ends with the last of its views: a longer life stays, and one without end ends only if it was ours alone.
if EXPIRES == '' then
  if before >= 0 then redis.call('PERSIST', KEY) end
else
  local now = redis.call('TIME')
  local now_ms = tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
  if before == -2 or alone or (before >= 0 and tonumber(EXPIRES) > now_ms + before) then
    redis.call('PEXPIREAT', KEY, EXPIRES)
  end
end
return 1
"""


def _pack(words: tuple[bytes, ...]) -> bytes:
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub says a tuple of exactly one word
    return packed


_WRITE_SHA: Final = hashlib.sha1(_WRITE_LUA, usedforsecurity=False).hexdigest().encode()
_LOAD: Final = _pack((b"SCRIPT", b"LOAD", _WRITE_LUA))
_PING: Final = _pack((b"PING",))


class RedisFeatureStore:
    """A FeatureStore and FeatureWriter over one Redis; ``url`` as redis-py takes it (``redis://``, ``rediss://``)."""

    def __init__(
        self, url: str, *, connections_max: int = CONNECTIONS_MAX, write_timeout_ms: int = WRITE_TIMEOUT_MS
    ) -> None:
        self._pool: ConnectionPool = ConnectionPool.from_url(
            url,
            max_connections=connections_max,
            # The timeout around each operation bounds everything in it, and the callers decide about trying again.
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
            decode_responses=False,
        )
        self._slots = asyncio.Semaphore(connections_max)
        self._write_timeout_ms = write_timeout_ms
        self._reads = SharedExchanges(self._ask)

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> Mapping[tuple[str, str], Fetched]:
        """See FeatureStore."""
        by_key: dict[EntityKey, list[ViewNeed]] = {}
        for need in needs:
            by_key.setdefault(need.key, []).append(need)
        if not by_key:
            return {}
        commands = [
            _pack((b"HMGET", row_key(key), *(field for need in wanted for field in _fields(need))))
            for key, wanted in by_key.items()
        ]
        answers = await self._reads.ask(commands, timeout_ms)
        fetched: dict[tuple[str, str], Fetched] = {}
        for wanted, answer in zip(by_key.values(), answers, strict=True):
            start = 0
            for need in wanted:
                if isinstance(answer, list):
                    end = start + len(need.features) + 2
                    _decode(need, answer[start:end], fetched)
                    start = end
                elif not str(answer).startswith("WRONGTYPE"):
                    raise StoreUnavailable(f"Redis refused a read: {answer}")
                else:
                    found = Fetched(FeatureStatus.ERROR, reason=f"stored row cannot be read: {answer}")
                    fetched.update({(need.view, feature): found for feature in need.features})
        return fetched

    async def write(self, rows: Sequence[FeatureRow]) -> int:
        """See FeatureWriter."""
        if not rows:
            return 0
        # Loading the script each time costs one small command a batch, and no branch for a Redis that has forgotten it.
        answers = await self._ask([_LOAD, *(_write_command(row) for row in rows)], self._write_timeout_ms)
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise StoreUnavailable(f"Redis refused a write: {answer}")
        return sum(answers[1:])

    async def ping(self) -> None:
        """See FeatureStore."""
        [answer] = await self._ask([_PING], PING_TIMEOUT_MS)
        if isinstance(answer, ResponseError):
            raise StoreUnavailable(f"Redis refused PING: {answer}")

    async def close(self) -> None:
        """See FeatureStore."""
        await self._reads.close()
        await self._pool.disconnect()

    async def _ask(self, commands: Sequence[bytes], timeout_ms: int) -> list[Any]:
        """The commands' answers, in order; a refusal of a single command is its answer, as a ResponseError."""
        try:
            async with asyncio.timeout(timeout_ms / 1000), self._slots:
                try:
                    return await self._exchange(commands)
                except RedisConnectionError:
                    # A server that was restarted leaves dead connections behind; every command here may be repeated.
                    await self._pool.disconnect(inuse_connections=False)
                    return await self._exchange(commands)
        except TimeoutError as error:
            raise StoreUnavailable(f"Redis did not answer within {timeout_ms} ms") from error
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"Redis is not usable: {error or type(error).__name__}") from error

    async def _exchange(self, commands: Sequence[bytes]) -> list[Any]:
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # decorated without types
        try:
            await connection.send_packed_command(commands, check_health=False)
            return [await _answer(connection) for _ in commands]
        except BaseException:
            # Answers that nobody has read would be taken for those of the next commands.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await self._pool.release(connection)


async def _answer(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


@lru_cache(maxsize=4096)
def _view_fields(view: str, features: tuple[str, ...]) -> tuple[bytes, ...]:
    return (*(feature_field(view, feature) for feature in features), time_field(view), _older_field(view))


def _fields(need: ViewNeed) -> tuple[bytes, ...]:
    return _view_fields(need.view, need.features)


def _older_field(view: str) -> bytes:
    return b"_at:" + view.encode()


def _tombstone_field(view: str) -> bytes:
    return b"_del:" + view.encode()


def _decode(need: ViewNeed, answer: list[bytes | None], fetched: dict[tuple[str, str], Fetched]) -> None:
    time, older = answer[-2:]
    event_time_ms = decode_time(time)
    view = need.view
    exceptions = _older_times(older, time) if older and time is not None else None
    if exceptions:
        fields = _fields(need)
        for index, (feature, type_) in enumerate(zip(need.features, need.types, strict=True)):
            own_ms = exceptions.get(fields[index], event_time_ms)
            fetched[view, feature] = decode_value(answer[index], type_, own_ms)
    else:
        for index, (feature, type_) in enumerate(zip(need.features, need.types, strict=True)):
            fetched[view, feature] = decode_value(answer[index], type_, event_time_ms)


def _older_times(data: bytes, time: bytes) -> dict[bytes, int | None] | None:
    """Event times that differ from the view's, by field; None where ``data`` was not written beside ``time``.

    Both times are serialized Timestamps, after a byte of length; four bytes of field go before each but the first.
    """
    at = 1 + data[0]
    if data[1:at] != time:
        return None
    times: dict[bytes, int | None] = {}
    decoded: dict[bytes, int | None] = {}
    while at + 5 <= len(data):
        end = at + 5 + data[at + 4]
        own = data[at + 5 : end]
        if own not in decoded:
            decoded[own] = decode_time(own)
        times[data[at : at + 4]] = decoded[own]
        at = end
    return times


def _write_command(row: FeatureRow) -> bytes:
    seconds, rest_ms = divmod(row.event_time_ms, 1_000)
    words: list[bytes] = [
        b"EVALSHA",
        _WRITE_SHA,
        b"1",
        row_key(row.key),
        time_field(row.view),
        _older_field(row.view),
        _tombstone_field(row.view),
        b"%d" % seconds,
        b"%d" % (rest_ms * 1_000_000),
        encode_time(row.event_time_ms),
        b"" if row.ttl_ms is None else b"%d" % (row.event_time_ms + row.ttl_ms),
        b"0" if not row.tombstone else b"1" if row.guards else b"2",
        b"%d" % len(row.kept),
        *(feature_field(row.view, feature) for feature in row.kept),
    ]
    for name, value, type_ in zip(row.names, row.values, row.types, strict=True):
        words.append(feature_field(row.view, name))
        words.append(encode_value(value, type_))
    return _pack(tuple(words))
