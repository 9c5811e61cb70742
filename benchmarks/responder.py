"""An instant responder in place of a worker: answers every task message with SUCCESS, at once.

Run as ``python -m benchmarks.responder AMQP_URL QUEUE``; prints "ready" when it consumes.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kombu.connection import Connection
from twisted.internet.defer import Deferred
from twisted.internet.task import react

from twistedcelery._endpoints import Target
from twistedcelery._urls import servers
from twistedcelery.amqp.settings import protocol_builder

if TYPE_CHECKING:
    from twistedcelery.amqp.events import Delivery

#: JSON of what the rpc backend of a worker sends, around the task's id.
_REPLY = (
    b'{"task_id": "%s", "status": "SUCCESS", "result": 3, "traceback": null, "children": [], '
    b'"date_done": "2026-01-01T00:00:00+00:00", "parent_id": null, "group_id": null}'
)


async def respond(reactor: Any, url: str, queue: str) -> None:
    """Answer for ever."""
    server = servers(Connection(url))[0]
    connection = await Target(reactor, server, protocol_builder(reactor, 60)).connect()
    channel = await connection.open_channel()
    await channel.declare_queue(queue, durable=True)
    await channel.qos(500)

    def answer(delivery: Delivery) -> None:
        properties = delivery.properties
        task_id = properties["correlation_id"]
        channel.publish(
            "",
            properties["reply_to"],
            {
                "content_type": "application/json",
                "content_encoding": "utf-8",
                "correlation_id": task_id,
                "delivery_mode": 1,
                "priority": 0,
            },
            {},
            _REPLY % task_id.encode(),
            token=None,
        )
        channel.ack(delivery.delivery_tag)

    await channel.consume(queue, answer, no_ack=False)
    print("ready", flush=True)
    await Deferred()


if __name__ == "__main__":
    react(respond, sys.argv[1:])
