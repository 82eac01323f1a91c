"""Redis as the feature store, in Feast's layout, so that what Feast has written is read and the other way round.

One hash an entity holds all its views; ``_ts:{view}`` is the event time of a view's features. What this project adds,
and Feast does not look at, is ``_at:{view}``: the event times of features that are older than their view's, for a
partial update leaves the others alone. Without it their age would be hidden by the update of their neighbours. And
``_del:{view}``, the time of the last tombstone, which keeps older updates from bringing back what it deleted.

``fetch`` is one round trip whatever is asked, of a cluster one to each master concerned, and one for several requests
where Redis is busy (``redis_sharing``). ``write`` is one round trip too: a script compares event times and writes
within Redis, so that of two workers the later event wins and not the later writer, feature by feature.

A row expires in Redis when the last of its views is past its ttl. Views without a ttl, and what others wrote before,
keep it for good.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Final

from redis.exceptions import ResponseError

from app.adapters.feast_codec import (
    decode_time,
    decode_values,
    encode_time,
    encode_value,
    feature_field,
    row_key,
    time_field,
)
from app.adapters.redis_nodes import Answer, Command, RedisNodes, pack
from app.domain.breaker import BreakerPolicy
from app.domain.errors import StoreUnavailable
from app.domain.feature_updates import FeatureRow
from app.domain.features import FeatureStatus, Fetched, ViewNeed, keys_of, unavailable

CONNECTIONS_MAX: Final = 32
"""To each server. A fetch takes one for a millisecond, so these carry more than a worker's CPU can ask for."""
WRITE_TIMEOUT_MS: Final = 10_000
"""One batch of rows; past it the worker asks again rather than trust a connection that may be dead."""
PING_TIMEOUT_MS: Final = 2_000
VALUE_BYTES_MAX: Final = 65_536
"""A value goes into the decision's record, which Kafka takes up to 1 MiB with everything that is in it."""

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


_WRITE_SHA: Final = hashlib.sha1(_WRITE_LUA, usedforsecurity=False).hexdigest().encode()
_LOAD: Final = pack((b"SCRIPT", b"LOAD", _WRITE_LUA))
_PING: Final = pack((b"PING",))


class RedisFeatureStore:
    """A FeatureStore and FeatureWriter over Redis; ``urls`` as RedisNodes takes them.

    ``value_bytes_max``: a stored value that is longer is an ERROR. ``breaker``: when fetches leave a server alone.
    """

    def __init__(
        self,
        urls: str,
        *,
        connections_max: int = CONNECTIONS_MAX,
        write_timeout_ms: int = WRITE_TIMEOUT_MS,
        value_bytes_max: int = VALUE_BYTES_MAX,
        breaker: BreakerPolicy | None = None,
    ) -> None:
        self._nodes = RedisNodes(urls, connections_max=connections_max, policy=breaker or BreakerPolicy())
        self._write_timeout_ms = write_timeout_ms
        self._value_bytes_max = value_bytes_max

    async def fetch(self, needs: Sequence[ViewNeed], timeout_ms: int) -> Mapping[tuple[str, str], Fetched]:
        """See FeatureStore."""
        if not needs:
            return {}
        by_row: dict[bytes, list[ViewNeed]] = {}
        key, row = needs[0].key, row_key(needs[0].key)
        for need in needs:
            if need.key != key:
                key, row = need.key, row_key(need.key)
            by_row.setdefault(row, []).append(need)
        commands = []
        for row, wanted in by_row.items():
            fields = [_fields(need) for need in wanted]
            commands.append(Command(row, pack((b"HMGET", row, *chain.from_iterable(fields)))))
        answers = await self._nodes.ask(commands, timeout_ms, guarded=True)
        fetched: dict[tuple[str, str], Fetched] = {}
        failures: list[StoreUnavailable] = []
        for wanted, answer in zip(by_row.values(), answers, strict=True):
            if isinstance(answer, list):
                start = 0
                for need in wanted:
                    end = start + len(need.features) + 2
                    _decode(need, answer[start:end], fetched, self._value_bytes_max)
                    start = end
            elif isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
                found = Fetched(FeatureStatus.ERROR, reason=f"stored row cannot be read: {answer}")
                fetched.update({(need.view, feature): found for need in wanted for feature in need.features})
            else:
                failures.append(_refused("read", answer))
                fetched.update(unavailable(wanted))
        if len(failures) == len(answers):
            raise failures[0]
        return fetched

    async def write(self, rows: Sequence[FeatureRow]) -> int:
        """See FeatureWriter."""
        if not rows:
            return 0
        # Loading the script each time costs one small command a batch, and no branch for a Redis that has forgotten it.
        answers = await self._nodes.ask([_write_command(row) for row in rows], self._write_timeout_ms, first=_LOAD)
        for answer in answers:
            if isinstance(answer, ResponseError) and "READONLY" in f"{answer.status_code} {answer}":
                # Of a server that others have replaced: its name may stand for another by now.
                await self._nodes.drop_idle()
            if isinstance(answer, ResponseError | StoreUnavailable):
                raise _refused("write", answer)
        return sum(answers)

    async def ping(self) -> None:
        """See FeatureStore; of a cluster, one master that answers will do: the others' rows end by their contracts."""
        if not self._nodes.learned:
            await self._nodes.learn()
        answers = await self._nodes.ask_each(_PING, PING_TIMEOUT_MS)
        failures = [_refused("PING", answer) for answer in answers if isinstance(answer, Exception)]
        if len(failures) == len(answers):
            raise failures[0]

    async def close(self) -> None:
        """See FeatureStore."""
        await self._nodes.close()


def _refused(what: str, answer: Answer) -> StoreUnavailable:
    if isinstance(answer, StoreUnavailable):
        return answer
    code = getattr(answer, "status_code", None)
    return StoreUnavailable(f"Redis refused a {what}: {code + ' ' if code else ''}{answer}")


@lru_cache(maxsize=4096)
def _feature_fields(view: str, features: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(feature_field(view, feature) for feature in features)


@lru_cache(maxsize=4096)
def _view_fields(view: str, features: tuple[str, ...]) -> tuple[bytes, ...]:
    return (*_feature_fields(view, features), time_field(view), _older_field(view))


def _fields(need: ViewNeed) -> tuple[bytes, ...]:
    return _view_fields(need.view, need.features)


def _older_field(view: str) -> bytes:
    return b"_at:" + view.encode()


def _tombstone_field(view: str) -> bytes:
    return b"_del:" + view.encode()


def _decode(
    need: ViewNeed, answer: list[bytes | None], fetched: dict[tuple[str, str], Fetched], value_bytes_max: int
) -> None:
    time, older = answer[-2:]
    event_time_ms = decode_time(time)
    older_times = _older_times(older, time) if older and time is not None else None
    values = decode_values(answer[:-2], need.types, event_time_ms, value_bytes_max)
    if older_times:
        for index, field in enumerate(_fields(need)[:-2]):
            if field in older_times and values[index].event_time_ms is not None:
                values[index] = values[index]._replace(event_time_ms=older_times[field])
    fetched.update(zip(keys_of(need.view, need.features), values, strict=True))


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


def _write_command(row: FeatureRow) -> Command:
    key = row_key(row.key)
    seconds, rest_ms = divmod(row.event_time_ms, 1_000)
    words: list[bytes] = [
        b"EVALSHA",
        _WRITE_SHA,
        b"1",
        key,
        time_field(row.view),
        _older_field(row.view),
        _tombstone_field(row.view),
        b"%d" % seconds,
        b"%d" % (rest_ms * 1_000_000),
        encode_time(row.event_time_ms),
        b"" if row.ttl_ms is None else b"%d" % (row.event_time_ms + row.ttl_ms),
        b"0" if not row.tombstone else b"1" if row.guards else b"2",
        b"%d" % len(row.kept),
        *_feature_fields(row.view, row.kept),
    ]
    for field, value, type_ in zip(_feature_fields(row.view, row.names), row.values, row.types, strict=True):
        words.append(field)
        words.append(encode_value(value, type_))
    return Command(key, pack(tuple(words)))
