"""An audit worker as a process of its own, to be killed: ``python -m tests.support.audit_process INSTANCE``."""

import sys

from app.adapters.dynamodb import DynamoPointerTable
from app.adapters.faust_app import create_app
from app.adapters.kafka import KafkaPublisher
from app.adapters.s3 import S3ObjectStore
from app.agents.audit import attach
from app.agents.worker import Worker, run_worker
from app.settings import Settings


async def main() -> int:
    """Run until SIGTERM."""
    instance = sys.argv[1]
    settings = Settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    app = create_app(settings, role="audit", instance=instance)
    async with (
        KafkaPublisher(settings, client_id=instance) as publisher,
        S3ObjectStore(settings.audit_bucket) as objects,
        DynamoPointerTable(settings.audit_table) as pointers,
    ):
        intake = attach(
            app,
            topic=settings.topic("inference.audit"),
            objects=objects,
            pointers=pointers,
            publisher=publisher,
            settings=settings,
            group=app.conf.id,
        )
        worker = Worker(
            app,
            settings=settings,
            role="audit",
            instance=instance,
            http_port=0,
            intakes=[intake],
            ready_checks={"s3": objects.ping, "dynamodb": pointers.ping},
        )
        return await worker.run()


if __name__ == "__main__":
    sys.exit(run_worker(main))
