"""The embedded stack: real Kafka, Redis, S3 and DynamoDB as child processes, for machines without Docker.

``Stack.up(DIR)`` starts the services in parallel on free ports of 127.0.0.1, waits until each answers a real call, and
says in ``Stack.env`` how to reach them. The demo and the tests own their stack (its children die with them);
``model-broker dev up`` detaches it, and ``dev down`` finds it again by what DIR records.
"""

from app.devstack.process import StackError
from app.devstack.stack import ALL, Stack

__all__ = ["ALL", "Stack", "StackError"]
