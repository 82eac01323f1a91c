"""The requests agent: request records in, each decided or durably pending before it is acknowledged."""

from typing import Any, cast

import faust
from faust.types import StreamT

from app.agents.decider import Decider
from app.agents.delivery import Intake


def attach(app: faust.App, *, topic: str, decider: Decider, in_flight_max: int) -> Intake:
    """Attach the agent to ``app``; at most ``in_flight_max`` requests are worked on at once."""
    intake = Intake(app, in_flight_max=in_flight_max)

    async def requests(stream: StreamT[Any]) -> None:
        await intake.each(cast(faust.Stream[bytes], stream), decider.on_request)

    app.agent(app.topic(topic, key_type=bytes, value_type=bytes, allow_empty=True), name="requests")(requests)
    return intake
