"""An audit worker as a process of its own, to be killed: ``python -m tests.support.audit_process INSTANCE``."""

import sys

from app.agents.worker import run_worker
from app.main import run_audit
from app.settings import Settings


async def main() -> int:
    """Run until SIGTERM."""
    return await run_audit(Settings(), instance=sys.argv[1], http_port=0)


if __name__ == "__main__":
    sys.exit(run_worker(main))
