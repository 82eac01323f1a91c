"""S3, through aiobotocore: the audit's objects, each written once.

A conditional PUT (``If-None-Match: *``) leaves what stands under a key alone and says so with 412. A PUT whose answer
got lost is repeated and then finds itself; the caller, who compares, need not tell the two apart.
"""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from botocore.exceptions import ClientError

from app.adapters.aws import error_code, http_status, open_client, translated
from app.ports.record_sink import StoredObject


class S3ObjectStore:
    """``ports.record_sink.ObjectStore`` on one bucket. An async context manager: its client lives as long."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._resources = AsyncExitStack()
        self._client: Any = None

    @property
    def bucket(self) -> str:
        """See ObjectStore."""
        return self._bucket

    async def __aenter__(self) -> Self:
        self._client = await open_client("s3", self._resources)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    async def put_if_absent(self, key: str, body: bytes, metadata: Mapping[str, str]) -> StoredObject | None:
        """See ObjectStore."""
        async with translated(self._at(key)):
            try:
                answer = await self._client.put_object(
                    Bucket=self._bucket,
                    Key=key,
                    Body=body,
                    Metadata=dict(metadata),
                    ContentType="application/zstd",
                    IfNoneMatch="*",
                )
            except ClientError as error:
                if http_status(error) == 412:
                    return None
                raise
        return StoredObject(answer.get("VersionId"), dict(metadata))

    async def head(self, key: str) -> StoredObject | None:
        """See ObjectStore."""
        async with translated(self._at(key)):
            try:
                answer = await self._client.head_object(Bucket=self._bucket, Key=key)
            except ClientError as error:
                if http_status(error) == 404:
                    return None
                raise
        return StoredObject(answer.get("VersionId"), answer["Metadata"])

    async def read(self, key: str, version: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """See ObjectStore."""
        wanted: dict[str, str] = {"Bucket": self._bucket, "Key": key}
        if version is not None:
            wanted["VersionId"] = version
        if start or length is not None:
            wanted["Range"] = f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"
        async with translated(self._at(key)):
            try:
                answer = await self._client.get_object(**wanted)
            except ClientError as error:
                if error_code(error) in ("NoSuchKey", "NoSuchVersion", "InvalidRange", "404", "416"):
                    raise LookupError(
                        f"{self._at(key)}, {wanted.get('Range', 'whole')}: {error_code(error)}"
                    ) from error
                raise
            async with answer["Body"] as stream:
                data: bytes = await stream.read()
        if length is not None and len(data) != length:
            raise LookupError(f"{self._at(key)} ends before byte {start + length}")
        return data

    async def keys(self, prefix: str) -> Sequence[str]:
        """See ObjectStore."""
        found: list[str] = []
        async with translated(self._at(prefix)):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
            async for page in pages:
                found.extend(entry["Key"] for entry in page.get("Contents", ()))
        return sorted(found)

    async def ping(self) -> None:
        """See ObjectStore."""
        async with translated(f"S3 bucket {self._bucket}"):
            await self._client.head_bucket(Bucket=self._bucket)

    async def ensure_bucket(self) -> bool:
        """Create the bucket unless it exists; whether it was created.

        It keeps versions and allows Object Lock, which S3 grants most simply at creation; retention stays to whoever
        owns the bucket.

        Raises:
            StoreUnavailable: S3 does not answer, or the name belongs to somebody else.
        """
        region = self._client.meta.region_name
        where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        async with translated(f"S3 bucket {self._bucket}"):
            try:
                await self._client.head_bucket(Bucket=self._bucket)
            except ClientError as error:
                if http_status(error) != 404:
                    raise
            else:
                return False
            try:
                await self._client.create_bucket(Bucket=self._bucket, ObjectLockEnabledForBucket=True, **where)
            except ClientError as error:
                if error_code(error) != "BucketAlreadyOwnedByYou":
                    raise
                return False
        return True

    def _at(self, key: str) -> str:
        return f"s3://{self._bucket}/{key}"
