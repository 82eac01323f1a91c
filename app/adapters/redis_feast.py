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
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from redis.exceptions import ResponseError

from app.adapters.feast_codec import (
    decode_time,
    decode_values,
    encode_time,
    encode_values,
    feature_field,
    row_key,
    time_field,
)
from app.adapters.redis_nodes import Answer, Command, RedisNodes, pack
from app.domain.breaker import BreakerPolicy
from app.domain.errors import RowsRefused, StoreUnavailable
from app.domain.feature_news import StoredRow
from app.domain.feature_updates import FeatureRow
from app.domain.features import EntityKey, FeatureStatus, Fetched, ViewNeed, keys_of, unavailable

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
local held = redis.call('HMGET', KEY, TS, AT)
local stored, list = held[1], held[2]

local before = redis.call('PTTL', KEY)

-- The row ends with the last of its views: a longer life stays, and one without end ends only if it was ours alone.
local function end_with_the_last(alone)
  if EXPIRES == '' then
    if before >= 0 then redis.call('PERSIST', KEY) end
    return
  end
  local now = redis.call('TIME')
  local now_ms = tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
  if before == -2 or alone or (before >= 0 and tonumber(EXPIRES) > now_ms + before) then
    redis.call('PEXPIREAT', KEY, EXPIRES)
  end
end

-- Nearly all there is: a whole row over none, or over one of an earlier second whose features have one time. It is told
-- by seconds in the five bytes that they have today; all else is the business of what follows.
if KEPT == 0 and not TOMBSTONE and not list and (EXPIRES == '' or before ~= -1) then
  local later = not stored
  if stored then
    local tag, a, b, c, d, e = string.byte(stored, 1, 6)
    later = tag == 8 and e and a > 127 and b > 127 and c > 127 and d > 127 and e < 128 and
      SECONDS > a - 128 + (b - 128) * 128 + (c - 128) * 16384 + (d - 128) * 2097152 + e * 268435456
  end
  if later then
    redis.call('HSET', KEY, TS, TIME, unpack(ARGV, 10))
    end_with_the_last(false)
    return 1
  end
end

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

local deleted = redis.call('HGET', KEY, DEL)

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

local alone = false
if EXPIRES ~= '' and before == -1 then
  local own = (stored and 1 or 0) + (list and 1 or 0) + (deleted and 1 or 0)
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

end_with_the_last(alone)
return 1
"""


_IN_THE_WAY: Final = (
    "what Redis holds under the entity's key is no row of features: find out who wrote it, delete it, and redrive"
)
_WRITE_SHA: Final = hashlib.sha1(_WRITE_LUA, usedforsecurity=False).hexdigest().encode()
_LOAD: Final = pack((b"SCRIPT", b"LOAD", _WRITE_LUA))
_PING: Final = pack((b"PING",))
_ROW_FAULT: Final = re.compile(r"WRONGTYPE|user_script:\d+: (?:user_script:\d+: )?[a-z]")
"""What Redis says of the row itself: that its key holds something else, or that the script, an error of which is in
small letters where Redis' own begin with a code in capitals, stumbles over what others wrote there."""


class RedisFeatureStore:
    """A FeatureStore and FeatureWriter over Redis; ``urls`` as RedisNodes takes them.

    ``value_bytes_max``: a row with a longer value is not stored, and such a value that is stored is an ERROR.
    ``breaker``: when fetches leave a server alone.
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
        by_row: dict[bytes, list[tuple[ViewNeed, _Reading]]] = {}
        key: EntityKey | None = None
        for need in needs:
            if need.key is not key:
                key = need.key
                wanted = by_row.setdefault(row_key(key), [])
            wanted.append((need, _reading(need.view, need.features)))
        answers = await self._nodes.ask(
            [_read_command(row, [reading for _, reading in wanted]) for row, wanted in by_row.items()],
            timeout_ms,
            guarded=True,
        )
        fetched: dict[tuple[str, str], Fetched] = {}
        failures: list[StoreUnavailable] = []
        for wanted, answer in zip(by_row.values(), answers, strict=True):
            if isinstance(answer, list):
                start = 0
                for need, reading in wanted:
                    end = start + len(reading.fields)
                    values = _decode(
                        answer[start:end], answer[end], answer[end + 1], need, reading, self._value_bytes_max
                    )
                    fetched.update(zip(reading.keys, values, strict=True))
                    start = end + 2
            elif isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
                found = Fetched(FeatureStatus.ERROR, reason=f"stored row cannot be read: {answer}")
                fetched.update({each: found for _, reading in wanted for each in reading.keys})
            else:
                failures.append(_refused("read", answer))
                fetched.update(unavailable(need for need, _ in wanted))
        if len(failures) == len(answers):
            raise failures[0]
        return fetched

    async def stored(self, needs: Sequence[ViewNeed], timeout_ms: int) -> list[StoredRow]:
        """What there is of each need's row, and its last tombstone: for whoever asks what an update would change.

        Raises:
            StoreUnavailable: not all rows were read within ``timeout_ms``.
        """
        readings = [_reading(need.view, need.features) for need in needs]
        commands = []
        for need, reading in zip(needs, readings, strict=True):
            guards, _, _ = _write_fields(need.view, (), ())
            commands.append(Command(key := row_key(need.key), pack((b"HMGET", key, *reading.fields, *guards))))
        found: list[StoredRow] = []
        for need, reading, answer in zip(needs, readings, await self._nodes.ask(commands, timeout_ms), strict=True):
            if isinstance(answer, list):
                *fields, time, older, deleted = answer
                values = _decode(fields, time, older, need, reading, self._value_bytes_max)
                found.append(StoredRow(dict(zip(need.features, values, strict=True)), decode_time(deleted)))
            elif isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
                # What is in the way of a row is told when it is written.
                found.append(StoredRow({}))
            else:
                raise _refused("read", answer)
        return found

    async def write(self, rows: Sequence[FeatureRow]) -> int:
        """See FeatureWriter."""
        if not rows:
            return 0
        refused: dict[int, str] = {}
        commands: list[Command] = []
        places: list[int] = []
        for place, row in enumerate(rows):
            try:
                commands.append(_write_command(row, self._value_bytes_max))
                places.append(place)
            except (ValueError, OverflowError) as error:
                refused[place] = f"view {row.view}: a value cannot be stored: {error}"
        # Loading the script each time costs one small command a batch, and no branch for a Redis that has forgotten it.
        answers = await self._nodes.ask(commands, self._write_timeout_ms, first=_LOAD) if commands else []
        written = 0
        for place, answer in zip(places, answers, strict=True):
            if type(answer) is int:
                written += answer
                continue
            said = f"{answer.status_code} {answer}" if isinstance(answer, ResponseError) else ""
            if _ROW_FAULT.search(said):
                refused[place] = f"view {rows[place].view}: {_IN_THE_WAY} (Redis says: {answer})"
                continue
            if "READONLY" in said:
                # Of a server that others have replaced: its name may stand for another by now.
                await self._nodes.drop_idle()
            raise _refused("write", answer)
        if refused:
            raise RowsRefused(dict(sorted(refused.items())), written)
        return written

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


class _Reading(NamedTuple):
    """How some of a view's features are read: their fields, all words of the command packed, and their names."""

    fields: tuple[bytes, ...]
    packed: bytes
    keys: tuple[tuple[str, str], ...]


@lru_cache(maxsize=4096)
def _reading(view: str, features: tuple[str, ...]) -> _Reading:
    fields = _feature_fields(view, features)
    words = (*fields, time_field(view), _older_field(view))
    return _Reading(fields, b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words), keys_of(view, features))


def _read_command(row: bytes, readings: Sequence[_Reading]) -> Command:
    """``HMGET`` of what all of them want, put together from what is packed already."""
    words = 2 + sum([len(reading.fields) + 2 for reading in readings])
    head = b"*%d\r\n$5\r\nHMGET\r\n$%d\r\n%b\r\n" % (words, len(row), row)
    return Command(row, b"".join([head, *[reading.packed for reading in readings]]))


def _older_field(view: str) -> bytes:
    return b"_at:" + view.encode()


@lru_cache(maxsize=4096)
def _write_fields(
    view: str, names: tuple[str, ...], kept: tuple[str, ...]
) -> tuple[tuple[bytes, bytes, bytes], tuple[bytes, ...], tuple[bytes, ...]]:
    """What is the same in all rows of these names: guarding fields, the names' own, and the number of kept and theirs.

    The guards are the view's event time, older features' times and the last tombstone's time.
    """
    guards = time_field(view), _older_field(view), b"_del:" + view.encode()
    return guards, _feature_fields(view, names), (b"%d" % len(kept), *_feature_fields(view, kept))


def _decode(
    stored: Sequence[bytes | None],
    time: bytes | None,
    older: bytes | None,
    need: ViewNeed,
    reading: _Reading,
    value_bytes_max: int,
) -> list[Fetched]:
    values = decode_values(stored, need.types, decode_time(time), value_bytes_max)
    if older and time is not None and (older_times := _older_times(older, time)):
        for index, field in enumerate(reading.fields):
            if field in older_times and values[index].event_time_ms is not None:
                values[index] = values[index]._replace(event_time_ms=older_times[field])
    return values


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


def _write_command(row: FeatureRow, value_bytes_max: int) -> Command:
    """Raises ValueError or OverflowError where a value is too long, or is none of its type."""
    encoded = encode_values(row.values, row.types)
    if (fault := too_long(row.names, encoded, value_bytes_max)) is not None:
        raise ValueError(f"{fault}, and redrive")
    key = row_key(row.key)
    time_ms = row.event_time_ms
    seconds, rest_ms = divmod(time_ms, 1_000)
    mode = b"0" if not row.tombstone else b"1" if row.guards else b"2"
    guards, fields, kept = _write_fields(row.view, row.names, row.kept)
    # Field and value in turn.
    pairs = [*fields, *fields]
    pairs[::2] = fields
    pairs[1::2] = encoded
    words = (
        b"EVALSHA",
        _WRITE_SHA,
        b"1",
        key,
        *guards,
        b"%d" % seconds,
        b"%d" % (rest_ms * 1_000_000) if rest_ms else b"0",
        encode_time(time_ms),
        b"" if row.ttl_ms is None else b"%d" % (time_ms + row.ttl_ms),
        mode,
        *kept,
        *pairs,
    )
    return Command(key, pack(words))


def too_long(names: Sequence[str], encoded: Sequence[bytes], bytes_max: int) -> str | None:
    """Which values have more than ``bytes_max``, and what to do; None where none has."""
    if max(map(len, encoded), default=0) <= bytes_max:
        return None
    said = ", ".join(
        f"{name} has {len(value)}" for name, value in zip(names, encoded, strict=True) if len(value) > bytes_max
    )
    return (
        f"{said} bytes, and {bytes_max} are allowed, for no decision could use it: send less, or raise "
        "BROKER_FEATURE_VALUE_BYTES_MAX of features and decide workers"
    )
