"""The results agent: pool workers' answers in, each in its join, or counted, before it is acknowledged."""

from typing import Any, cast

import faust
import structlog
from faust.types import StreamT

from app.adapters.dead_letters import dead_letter, publish_dead_letters
from app.adapters.task_codec import decode_result
from app.agents.decider import Decider
from app.agents.delivery import Intake
from app.domain.requests import InboundRecord
from app.ports.log import Publisher

log = structlog.get_logger()


def attach(
    app: faust.App, *, topic: str, decider: Decider, publisher: Publisher, group: str, in_flight_max: int
) -> Intake:
    """Attach the agent to ``app``; bytes that are no result go to the dead-letter topic."""
    intake = Intake(app, in_flight_max=in_flight_max)

    async def handle(record: InboundRecord) -> None:
        try:
            result = decode_result(record.value or b"")
        except ValueError as error:
            log.warning("result_malformed", position=record.position, reason=str(error))
            await publish_dead_letters(publisher, [dead_letter(record, str(error), "result_malformed", group)])
            return
        await decider.on_result(record.partition, result)

    async def results(stream: StreamT[Any]) -> None:
        await intake.each(cast(faust.Stream[bytes], stream), handle)

    app.agent(app.topic(topic, key_type=bytes, value_type=bytes, allow_empty=True), name="results")(results)
    return intake
