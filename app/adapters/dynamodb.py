"""DynamoDB, through aiobotocore: the pointers of the audit, each written once.

Pointers go in transactions of up to a hundred conditional puts, for a call costs the client and the service far more
than an item does. A transaction with a taken key is cancelled whole and says for each item what stands there
(``ALL_OLD``); the others go into the next one. A service that does not get through transactions in time, as emulators
may not, gets conditional puts one by one. Keys: ``PK = REQ#<request id>``, ``SK`` the pointer's sort key.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self

import structlog
from botocore.exceptions import ClientError

from app.adapters.aws import error_code, open_client, translated
from app.domain.audit import DECISION, Pointer
from app.domain.errors import StoreUnavailable

log = structlog.get_logger()

TRANSACTION_ITEMS_MAX: Final = 100
TRANSACTIONS_AT_ONCE: Final = 4
"""Four times a hundred items already keep the service busier than one sink can."""
TRANSACTION_TIMEOUT_S: Final = 5.0
"""A hundred times what DynamoDB takes."""
PUTS_AT_ONCE: Final = 32
READ_KEYS_MAX: Final = 100
ROUNDS_MAX: Final = 4
"""Each round leaves out what stands; only other writers of the same keys, or throttling, make more than two."""
TABLE_ACTIVE_TIMEOUT_S: Final = 60

_PK_PREFIX: Final = "REQ#"
_TEXT: Final = ("execution_id", "kind", "status", "source", "sha256", "bucket", "object_key")
_NUMBERS: Final = ("recorded_ms", "start", "length")
_IF_ABSENT: Final[Mapping[str, str]] = {
    "ConditionExpression": "attribute_not_exists(PK)",
    "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
}

Key = tuple[str, str]
Item = dict[str, dict[str, str]]


def to_item(pointer: Pointer) -> Item:
    """A pointer as DynamoDB's attributes."""
    item: Item = {"PK": {"S": _PK_PREFIX + pointer.request_id}, "SK": {"S": pointer.sort_key}}
    for name in _TEXT:
        item[name] = {"S": getattr(pointer, name)}
    for name in _NUMBERS:
        item[name] = {"N": str(getattr(pointer, name))}
    if pointer.object_version is not None:
        item["object_version"] = {"S": pointer.object_version}
    return item


def from_item(item: Mapping[str, Mapping[str, str]]) -> Pointer:
    """The pointer in an item."""
    version = item.get("object_version")
    return Pointer(
        request_id=item["PK"]["S"].removeprefix(_PK_PREFIX),
        sort_key=item["SK"]["S"],
        object_version=version["S"] if version else None,
        recorded_ms=int(item["recorded_ms"]["N"]),
        start=int(item["start"]["N"]),
        length=int(item["length"]["N"]),
        **{name: item[name]["S"] for name in _TEXT},
    )


class DynamoPointerTable:
    """``ports.record_sink.PointerTable`` on one table. An async context manager: its client lives as long.

    ``transactions`` is False for a service that is known to be too slow at them.
    """

    def __init__(self, table: str, *, transactions: bool = True) -> None:
        self._table = table
        self._transactions = transactions
        self._resources = AsyncExitStack()
        self._client: Any = None
        self._slots = asyncio.Semaphore(TRANSACTIONS_AT_ONCE)
        self._put_slots = asyncio.Semaphore(PUTS_AT_ONCE)

    async def __aenter__(self) -> Self:
        self._client = await open_client("dynamodb", self._resources)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    async def put_if_absent(self, pointers: Sequence[Pointer]) -> Sequence[Pointer | None]:
        """See PointerTable."""
        first: dict[Key, Pointer] = {}
        for pointer in pointers:
            first.setdefault(_key(pointer), pointer)
        keys = list(first)
        chunks = [keys[at : at + TRANSACTION_ITEMS_MAX] for at in range(0, len(keys), TRANSACTION_ITEMS_MAX)]
        standing: dict[Key, Pointer] = {}
        # All run to their end before the first failure is raised: no transaction goes on behind the caller's back.
        puts = (self._put([first[key] for key in chunk]) for chunk in chunks)
        for found in await asyncio.gather(*puts, return_exceptions=True):
            if isinstance(found, BaseException):
                raise found
            standing |= found
        answers: list[Pointer | None] = []
        for pointer in pointers:
            key = _key(pointer)
            answers.append(standing.get(key))
            # A second pointer of one key in this call meets the first, which a transaction could not have told.
            standing.setdefault(key, first[key])
        return answers

    async def _put(self, pointers: Sequence[Pointer]) -> dict[Key, Pointer]:
        """Write those whose keys are free, in as few transactions as it takes; what stands under the other keys."""
        standing: dict[Key, Pointer] = {}
        pending = list(pointers)
        reasons: Sequence[Mapping[str, Any]] | None = None
        for _ in range(ROUNDS_MAX):
            if len(pending) == 1 or not self._transactions:
                return standing | await self._put_singly(pending)
            try:
                async with self._slots, asyncio.timeout(TRANSACTION_TIMEOUT_S):
                    reasons = await self._transact(pending)
            except TimeoutError:
                standing |= await self._put_singly(pending)
                # Reached only where single puts got through: it is transactions that are slow, not the service.
                self._transactions = False
                log.warning("transactions_too_slow", table=self._table, puts="one by one from now on")
                return standing
            if reasons is None:
                return standing
            for pointer, reason in zip(pending, reasons, strict=True):
                if reason.get("Code") == "ConditionalCheckFailed":
                    standing[_key(pointer)] = from_item(reason["Item"])
            pending = [pointer for pointer in pending if _key(pointer) not in standing]
            if not pending:
                return standing
        said = sorted({str(reason.get("Code")) for reason in reasons or ()} - {"None"})
        raise StoreUnavailable(f"DynamoDB table {self._table} cancelled {ROUNDS_MAX} transactions: {', '.join(said)}")

    async def _put_singly(self, pointers: Sequence[Pointer]) -> dict[Key, Pointer]:
        """As ``_put``, with a call a pointer."""
        found = await asyncio.gather(*(self._put_one(pointer) for pointer in pointers), return_exceptions=True)
        standing: dict[Key, Pointer] = {}
        for pointer, answer in zip(pointers, found, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            if answer is not None:
                standing[_key(pointer)] = answer
        return standing

    async def _put_one(self, pointer: Pointer) -> Pointer | None:
        async with self._put_slots, translated(f"DynamoDB table {self._table}"):
            try:
                await self._client.put_item(TableName=self._table, Item=to_item(pointer), **_IF_ABSENT)
            except ClientError as error:
                if error_code(error) != "ConditionalCheckFailedException":
                    raise
                return from_item(error.response["Item"])  # type: ignore[typeddict-item] # ALL_OLD adds it
        return None

    async def _transact(self, pointers: Sequence[Pointer]) -> Sequence[Mapping[str, Any]] | None:
        """One transaction: None when it was done, else for each item why not."""
        puts = [{"Put": {"TableName": self._table, "Item": to_item(pointer), **_IF_ABSENT}} for pointer in pointers]
        async with translated(f"DynamoDB table {self._table}"):
            try:
                await self._client.transact_write_items(TransactItems=puts)
            except ClientError as error:
                reasons: Any = error.response.get("CancellationReasons")
                if error_code(error) != "TransactionCanceledException" or not reasons:
                    raise
                return list(reasons)
        return None

    async def get(self, request_id: str) -> Sequence[Pointer]:
        """See PointerTable."""
        items: list[Item] = []
        async with translated(f"DynamoDB table {self._table}"):
            pages = self._client.get_paginator("query").paginate(
                TableName=self._table,
                KeyConditionExpression="PK = :pk",
                ExpressionAttributeValues={":pk": {"S": _PK_PREFIX + request_id}},
                ConsistentRead=True,
            )
            async for page in pages:
                items.extend(page["Items"])
        found = [from_item(item) for item in items]
        return sorted(found, key=lambda pointer: (pointer.sort_key != DECISION, pointer.sort_key))

    async def decisions(self, request_ids: Sequence[str]) -> Mapping[str, Pointer]:
        """See PointerTable."""
        unique = list(dict.fromkeys(request_ids))
        chunks = [unique[at : at + READ_KEYS_MAX] for at in range(0, len(unique), READ_KEYS_MAX)]
        found: dict[str, Pointer] = {}
        for pointers in await asyncio.gather(*(self._decisions(chunk) for chunk in chunks)):
            found |= {pointer.request_id: pointer for pointer in pointers}
        return found

    async def _decisions(self, request_ids: Sequence[str]) -> list[Pointer]:
        keys: Any = [{"PK": {"S": _PK_PREFIX + name}, "SK": {"S": DECISION}} for name in request_ids]
        found: list[Pointer] = []
        async with self._slots, translated(f"DynamoDB table {self._table}"):
            while keys:  # an answer ends at 16 MB, or where the table throttles, and names the keys it left out
                answer = await self._client.batch_get_item(
                    RequestItems={self._table: {"Keys": keys, "ConsistentRead": True}}
                )
                items = answer["Responses"].get(self._table, ())
                found.extend(from_item(item) for item in items)
                keys = answer.get("UnprocessedKeys", {}).get(self._table, {}).get("Keys", ())
                if keys and not items:
                    await asyncio.sleep(0.05)
        return found

    async def all(self) -> AsyncIterator[Pointer]:
        """See PointerTable."""
        start: dict[str, Any] = {}
        while True:
            async with translated(f"DynamoDB table {self._table}"):
                page = await self._client.scan(TableName=self._table, ConsistentRead=True, **start)
            for item in page["Items"]:
                yield from_item(item)
            if not (last := page.get("LastEvaluatedKey")):
                return
            start = {"ExclusiveStartKey": last}

    async def ping(self) -> None:
        """See PointerTable."""
        async with translated(f"DynamoDB table {self._table}"):
            await self._client.describe_table(TableName=self._table)

    async def ensure_table(self) -> bool:
        """Create the table, paid per request, unless it exists, and wait until it is active; whether it was created.

        Raises:
            StoreUnavailable: DynamoDB does not answer, or the table does not become active.
        """
        created = True
        names = ("PK", "SK")
        async with translated(f"DynamoDB table {self._table}"):
            try:
                await self._client.create_table(
                    TableName=self._table,
                    BillingMode="PAY_PER_REQUEST",
                    AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in names],
                    KeySchema=[
                        {"AttributeName": name, "KeyType": role}
                        for name, role in zip(names, ("HASH", "RANGE"), strict=True)
                    ],
                )
            except ClientError as error:
                if error_code(error) != "ResourceInUseException":
                    raise
                created = False
        for _ in range(TABLE_ACTIVE_TIMEOUT_S):
            async with translated(f"DynamoDB table {self._table}"):
                answer = await self._client.describe_table(TableName=self._table)
            if answer["Table"]["TableStatus"] == "ACTIVE":
                return created
            await asyncio.sleep(1)
        raise StoreUnavailable(f"DynamoDB table {self._table} is not active after {TABLE_ACTIVE_TIMEOUT_S} s")


def _key(pointer: Pointer) -> Key:
    return pointer.request_id, pointer.sort_key
