"""The audit's bucket and table, made where the AWS endpoints point: on emulators nobody else makes them."""

from app.adapters.dynamodb import DynamoPointerTable
from app.adapters.s3 import S3ObjectStore
from app.settings import Settings


async def create_stores(settings: Settings) -> dict[str, bool]:
    """Create the bucket and the table that the settings name, unless they exist; for each name, whether it was created.

    Raises StoreUnavailable.
    """
    async with S3ObjectStore(settings.audit_bucket) as objects, DynamoPointerTable(settings.audit_table) as pointers:
        return {
            settings.audit_bucket: await objects.ensure_bucket(),
            settings.audit_table: await pointers.ensure_table(),
        }
