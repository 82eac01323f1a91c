"""Connections to Redis: one server, or the masters of a Redis Cluster, asked in one round trip each.

Callers bring packed commands, each with the key that it is about, and get the answers in order. A single server gets
them all in one pipeline. Of a cluster, known by its slot map, each master gets its own, all at the same time; what is
redirected is asked again where the redirect says, a bounded number of times, and the map is read anew. Nobody has to
say which of the two it is: ``learn`` asks, and a server that becomes part of a cluster says so by its first MOVED.

Commands are packed by the caller and answers read as bytes, on connections of redis-py that are kept here: a pool's and
a pipeline's own bookkeeping costs more than the rest of a fetch. Each node has a breaker, so that one that does not
answer delays nobody for long. Every driver's exception ends here, as StoreUnavailable.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import hiredis
import structlog
from prometheus_client import Counter, Gauge
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, MovedError, RedisError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError

from app.adapters.redis_sharing import SharedExchanges
from app.domain.breaker import CLOSED, COUNTED_FROM_MS, Breaker, BreakerPolicy, BreakerState
from app.domain.errors import ConfigurationError, StoreUnavailable

log = structlog.get_logger()

REDIRECTS_MAX: Final = 5
"""A slot that moves costs one redirect or two; more mean that nodes disagree about who has it."""
LEARN_TIMEOUT_MS: Final = 2_000
RELEARN_AFTER_MS: Final = 500
"""How soon the slot map is read again at the earliest: a cluster fails over in seconds."""
TRY_AGAIN_S: Final = 0.01

_STATE: Final = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}
_BREAKER = Gauge(
    "broker_feature_breaker_state", "Breaker of a feature store's node: 0 closed, 1 half-open, 2 open", ["node"]
)
_OPENED = Counter("broker_feature_breaker_opened", "How often a node's breaker opened", ["node"])
_REDIRECTS = Counter("broker_feature_redirects", "Commands that a cluster's node sent on, by moved or ask", ["kind"])


def pack(words: tuple[bytes, ...]) -> bytes:
    """A command as it goes over the wire."""
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub says a tuple of exactly one word
    return packed


_ASKING: Final = pack((b"ASKING",))
_SLOTS: Final = pack((b"CLUSTER", b"SLOTS"))


class Command(NamedTuple):
    """A packed command about one key. A tuple, because one is made of each row."""

    key: bytes
    packed: bytes


Answer = Any
"""What Redis answered, in bytes and lists; a ResponseError where it refused, StoreUnavailable where it did not."""


class RedisNode:
    """One server. ``options`` are a connection's, as redis-py takes them."""

    def __init__(self, options: Mapping[str, Any], *, connections_max: int, policy: BreakerPolicy) -> None:
        self.host: str = options.get("host", "")
        self.name: str = options.get("path") or f"{self.host}:{options.get('port')}"
        # A factory of connections of the right class: TCP, TLS or a Unix socket.
        self._factory = ConnectionPool(**options)
        self._idle: list[AbstractConnection] = []
        self._places = asyncio.Semaphore(connections_max)
        self._policy = policy
        self._breaker = CLOSED
        self._closed = False
        self._reads = SharedExchanges(self._read)
        _BREAKER.labels(self.name).set(0)

    async def ask(self, commands: Sequence[bytes], timeout_ms: float, *, guarded: bool) -> list[Answer]:
        """The answers, in order; a refusal of a single command is its answer, as a ResponseError.

        ``guarded``: a read, which may share an exchange with others, and is refused while the breaker is open.

        Raises:
            StoreUnavailable: not all were answered within ``timeout_ms``.
        """
        if guarded:
            return await self._reads.ask(commands, max(1, round(timeout_ms)))
        return await self._ask(commands, timeout_ms)

    async def _read(self, commands: Sequence[bytes], timeout_ms: int) -> list[Answer]:
        return await self._ask(commands, timeout_ms, guarded=True)

    async def _ask(self, commands: Sequence[bytes], timeout_ms: float, *, guarded: bool = False) -> list[Answer]:
        if guarded and self._breaker is not CLOSED:
            breaker, admitted = self._breaker.admit(_now_ms(), self._policy)
            self._become(breaker)
            if not admitted:
                raise StoreUnavailable(f"Redis at {self.name} does not answer, and is left alone for a moment")
        limit = asyncio.timeout(timeout_ms / 1000)
        try:
            async with limit, self._places:
                try:
                    answers = await self._exchange(commands)
                except (RedisConnectionError, RuntimeError):
                    # A server that was restarted leaves dead connections behind; every command here may be repeated.
                    await self.drop_idle()
                    answers = await self._exchange(commands)
        except TimeoutError as error:
            self._silent(timeout_ms)
            raise StoreUnavailable(f"Redis at {self.name} did not answer within {timeout_ms:.0f} ms") from error
        except (RedisError, OSError, RuntimeError) as error:
            # RuntimeError: what uvloop says of a write to a connection that was closed meanwhile. The end of the time
            # can show as an error of the driver's too.
            if limit.expired():
                self._silent(timeout_ms)
            else:
                self._failed()
            raise StoreUnavailable(f"Redis at {self.name} is not usable: {error or type(error).__name__}") from error
        if self._breaker is not CLOSED:
            self._become(self._breaker.succeeded())
        return answers

    async def drop_idle(self) -> None:
        """Close what is not in use; the next call connects anew, by the name's address of then."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.disconnect(nowait=True)

    async def close(self) -> None:
        """Close all connections, each as soon as it is not in use."""
        self._closed = True
        await self._reads.close()
        await self.drop_idle()

    def retire(self) -> None:
        """The node is no longer one of the cluster: what is under way ends, and its metrics go."""
        self._closed = True
        _BREAKER.remove(self.name)

    async def _exchange(self, commands: Sequence[bytes]) -> list[Answer]:
        connection = self._idle.pop() if self._idle else self._connection()
        try:
            if not connection.is_connected:
                await connection.connect()  # type: ignore[no-untyped-call]
            await connection.send_packed_command(commands, check_health=False)
            answers = [await _answer(connection) for _ in commands]
        except BaseException:
            # Answers that nobody has read would be taken for those of the next commands.
            await connection.disconnect(nowait=True)
            raise
        if self._closed:
            await connection.disconnect(nowait=True)
        else:
            self._idle.append(connection)
        return answers

    def _connection(self) -> AbstractConnection:
        made: AbstractConnection = self._factory.make_connection()  # type: ignore[no-untyped-call]
        return made

    def _silent(self, timeout_ms: float) -> None:
        # A trial that is not counted would leave the breaker half-open.
        if timeout_ms >= COUNTED_FROM_MS or self._breaker.state is not BreakerState.CLOSED:
            self._failed()

    def _failed(self) -> None:
        self._become(self._breaker.failed(_now_ms(), self._policy))

    def _become(self, breaker: Breaker) -> None:
        before, self._breaker = self._breaker.state, breaker
        if breaker.state is before or self._closed:
            return
        _BREAKER.labels(self.name).set(_STATE[breaker.state])
        if breaker.state is BreakerState.OPEN and before is BreakerState.CLOSED:
            _OPENED.labels(self.name).inc()
            log.warning("feature_breaker_opened", node=self.name, failures=breaker.failures)
        elif breaker.state is BreakerState.CLOSED:
            log.info("feature_breaker_closed", node=self.name)


async def _answer(connection: AbstractConnection) -> Answer:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


def _now_ms() -> float:
    return time.monotonic_ns() / 1e6


class RedisNodes:
    """The server or the cluster behind ``urls``: one URL, or several of one cluster's nodes with commas between."""

    def __init__(self, urls: str, *, connections_max: int, policy: BreakerPolicy) -> None:
        self._connections_max = connections_max
        self._policy = policy
        self._options = [_options_of(url) for url in urls.split(",")]
        self._nodes: dict[str, RedisNode] = {}
        self._seeds = [self._node_of(options) for options in self._options]
        self._slots: list[RedisNode] | None = None
        """Of a cluster: who has each slot. None: one server has everything, as far as is known."""
        self.learned = False
        """Whether it is known if this is a cluster."""
        self._learning: asyncio.Task[None] | None = None
        self._learned_at_ms = float("-inf")

    @property
    def nodes(self) -> Sequence[RedisNode]:
        """Each of them that has data."""
        return self._seeds[:1] if self._slots is None else list(self._nodes.values())

    async def ask(
        self,
        commands: Sequence[Command],
        timeout_ms: int,
        *,
        first: bytes | None = None,
        guarded: bool = False,
    ) -> list[Answer]:
        """Each command's answer, in order. ``first`` goes to each node before its commands; its answer is not told."""
        if self._slots is None:
            if len(self._seeds) > 1 and not self.learned:
                await self.learn()
                return await self.ask(commands, timeout_ms, first=first, guarded=guarded)
            started_ms = _now_ms()
            answers = await self._of_node(self._seeds[0], commands, (), timeout_ms, first, guarded)
            if not any(isinstance(answer, AskError) for answer in answers):
                return answers
            everywhere = [(self._seeds[0], list(range(len(commands))))]
            pending = self._redirected(everywhere, [answers], answers)
            return await self._routed(commands, answers, pending, started_ms + timeout_ms, first, guarded)
        slots = self._slots
        where = {index: (slots[key_slot(command.key)], False) for index, command in enumerate(commands)}
        return await self._routed(commands, [None] * len(commands), where, _now_ms() + timeout_ms, first, guarded)

    async def ask_each(self, packed: bytes, timeout_ms: int) -> list[Answer]:
        """Every node's answer to one command."""
        answers = await asyncio.gather(
            *(_attempt(node.ask([packed], timeout_ms, guarded=False)) for node in self.nodes)
        )
        return [answer if isinstance(answer, StoreUnavailable) else answer[0] for answer in answers]

    async def learn(self) -> None:
        """Find out whether this is a cluster, and who has which slots.

        Raises:
            StoreUnavailable: no node answers.
            ConfigurationError: several servers are named that are no cluster.
        """
        failure: StoreUnavailable | None = None
        for node in [*self._nodes.values(), *(seed for seed in self._seeds if seed.name not in self._nodes)]:
            try:
                [answer] = await node.ask([_SLOTS], LEARN_TIMEOUT_MS, guarded=False)
            except StoreUnavailable as error:
                failure = error
                continue
            if isinstance(answer, ResponseError):
                # Not a cluster, or the command is not allowed here: then redirects are followed, if there are any.
                if len(self._seeds) > 1 and self._slots is None:
                    raise ConfigurationError(
                        f"BROKER_REDIS_URL names several servers, and {node.name} is no cluster's ({answer}): name one"
                    )
                self.learned = True
                return
            await self._map(node, answer)
            return
        raise failure or StoreUnavailable("no Redis is known")

    async def drop_idle(self) -> None:
        """See RedisNode."""
        for node in self.nodes:
            await node.drop_idle()

    async def close(self) -> None:
        """Close all connections."""
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.gather(self._learning, return_exceptions=True)
        for node in {*self._nodes.values(), *self._seeds}:
            await node.close()

    # --- a cluster ----------------------------------------------------------------------------------------------------

    async def _routed(
        self,
        commands: Sequence[Command],
        answers: list[Answer],
        where: Mapping[int, tuple[RedisNode, bool]],
        end_ms: float,
        first: bytes | None,
        guarded: bool,
    ) -> list[Answer]:
        """Ask for the answers that ``where`` says, following redirects; the others are there."""
        for _ in range(REDIRECTS_MAX + 1):
            groups: dict[RedisNode, list[int]] = {}
            for index, (node, _asking) in where.items():
                groups.setdefault(node, []).append(index)
            left_ms = max(0.0, end_ms - _now_ms())
            works = [
                self._of_node(
                    node,
                    [commands[index] for index in indices],
                    [number for number, index in enumerate(indices) if where[index][1]],
                    left_ms,
                    first,
                    guarded,
                )
                for node, indices in groups.items()
            ]
            attempts = [_attempt(work) for work in works]
            found = [await attempts[0]] if len(attempts) == 1 else await asyncio.gather(*attempts)
            where = self._redirected(list(groups.items()), found, answers)
            if not where:
                return answers
            if any(isinstance(answers[index], TryAgainError) for index in where):
                await asyncio.sleep(TRY_AGAIN_S)
        return answers

    async def _of_node(
        self,
        node: RedisNode,
        commands: Sequence[Command],
        asking: Sequence[int],
        timeout_ms: float,
        first: bytes | None,
        guarded: bool,
    ) -> list[Answer]:
        """One node's answers to ``commands``, of which those in ``asking`` are asked while their slot moves there."""
        if not asking:
            packed = [command.packed for command in commands]
            if first is None:
                return await node.ask(packed, timeout_ms, guarded=guarded)
            return (await node.ask([first, *packed], timeout_ms, guarded=guarded))[1:]
        sent: list[bytes] = [] if first is None else [first]
        places: list[int] = []
        for number, command in enumerate(commands):
            if number in asking:
                sent.append(_ASKING)
            places.append(len(sent))
            sent.append(command.packed)
        answers = await node.ask(sent, timeout_ms, guarded=guarded)
        return [answers[place] for place in places]

    def _redirected(
        self,
        groups: Sequence[tuple[RedisNode, list[int]]],
        found: Sequence[list[Answer] | StoreUnavailable],
        answers: list[Answer],
    ) -> dict[int, tuple[RedisNode, bool]]:
        """Put what was ``found`` into ``answers``; where the rest is to be asked, and whether after ASKING."""
        again: dict[int, tuple[RedisNode, bool]] = {}
        outdated = False
        for (node, indices), group in zip(groups, found, strict=True):
            if isinstance(group, StoreUnavailable):
                outdated = True
                for index in indices:
                    answers[index] = group
                continue
            for index, answer in zip(indices, group, strict=True):
                answers[index] = answer
                if isinstance(answer, MovedError):
                    outdated = True
                    owner = self._node_at(answer.host or node.host, answer.port)
                    if self._slots is not None:
                        self._slots[answer.slot_id] = owner
                    again[index] = (owner, False)
                    _REDIRECTS.labels("moved").inc()
                elif isinstance(answer, AskError):
                    again[index] = (self._node_at(answer.host or node.host, answer.port), True)
                    _REDIRECTS.labels("ask").inc()
                elif isinstance(answer, TryAgainError):
                    again[index] = (node, False)
        if outdated:
            self._relearn()
        return again

    def _relearn(self) -> None:
        """Read the slot map in the background, unless that has just been done."""
        if self._learning is not None or _now_ms() - self._learned_at_ms < RELEARN_AFTER_MS:
            return
        self._learned_at_ms = _now_ms()

        async def learn() -> None:
            try:
                await self.learn()
            except (StoreUnavailable, ConfigurationError) as error:
                log.warning("feature_slots_unknown", reason=str(error))
            finally:
                self._learning = None

        self._learning = asyncio.create_task(learn(), name="redis-slots")

    async def _map(self, told_by: RedisNode, answer: Sequence[Any]) -> None:
        """Take over a slot map, as CLUSTER SLOTS gives it."""
        slots: list[RedisNode | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        owners: dict[str, RedisNode] = {}
        for first, last, (host, port, *_), *_replicas in answer:
            # A node that does not know its own address is where it was reached.
            owner = self._node_at(host.decode() if host and host != b"?" else told_by.host, port)
            owners[owner.name] = owner
            slots[first : last + 1] = [owner] * (last + 1 - first)
        # Whose slots nobody has, any node will say that the cluster is down.
        self._slots = [slot or told_by for slot in slots]
        self.learned = True
        gone = [node for name, node in self._nodes.items() if name not in owners and node not in self._seeds]
        for node in gone:
            node.retire()
            await node.drop_idle()
        self._nodes = owners
        log.info("feature_slots", nodes=sorted(owners))

    def _node_at(self, host: str, port: int) -> RedisNode:
        name = f"{host}:{port}"
        known = self._nodes.get(name) or next((seed for seed in self._seeds if seed.name == name), None)
        if known is None:
            known = self._nodes[name] = self._node_of({**self._options[0], "host": host, "port": port})
        return known

    def _node_of(self, options: Mapping[str, Any]) -> RedisNode:
        return RedisNode(options, connections_max=self._connections_max, policy=self._policy)


async def _attempt(work: Any) -> Any:
    try:
        return await work
    except StoreUnavailable as error:
        return error


def _options_of(url: str) -> dict[str, Any]:
    parsed = parse_url(url.strip())
    place = {} if "path" in parsed else {"host": "localhost", "port": 6379}
    return {
        **place,
        **parsed,
        # The timeout around each call bounds everything in it, and the callers decide about trying again.
        "socket_timeout": None,
        "socket_connect_timeout": None,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "decode_responses": False,
    }
