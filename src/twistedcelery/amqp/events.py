"""What `connection.Connection` tells: one small object per thing that the server did.

Events of a channel carry its number as ``channel``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from .codec import decode_properties

__all__ = [
    "Acked",
    "Blocked",
    "ChannelClosed",
    "Closed",
    "Content",
    "Delivery",
    "Event",
    "Got",
    "MethodReceived",
    "Opened",
    "Returned",
    "Unblocked",
]


class Content:
    """A message that came: properties, headers and body.

    ``oversize`` is 0, or the bytes of a body that was larger than ``max_body_size``, and is not here. Properties and headers are decoded when they are first asked for.

    :raises RemoteProtocolError: from ``properties`` and ``headers``, if the server sent nonsense there.
    """

    __slots__ = (
        "_headers", "_properties", "body", "channel", "content", "exchange", "oversize", "routing_key",
    )  # fmt: skip

    def __init__(self, channel: int, exchange: str, routing_key: str) -> None:
        self.channel = channel
        self.exchange = exchange
        self.routing_key = routing_key
        #: The payload of the content header frame; flags and properties begin at offset 12.
        self.content = b""
        self.body = b""
        self.oversize = 0
        self._properties: dict[str, Any] | None = None
        self._headers: dict[str, Any] = {}

    @property
    def properties(self) -> dict[str, Any]:
        """The properties that are present, by AMQP's names, without the headers."""
        if self._properties is None:
            self._properties, self._headers = decode_properties(self.content, 12)
        return self._properties

    @property
    def headers(self) -> dict[str, Any]:
        """The headers; empty where the message has none."""
        if self._properties is None:
            self._properties, self._headers = decode_properties(self.content, 12)
        return self._headers


class Delivery(Content):
    """A message for a consumer of ours (``basic.deliver``)."""

    __slots__ = ("consumer_tag", "delivery_tag", "redelivered")

    def __init__(  # the order of the wire
        self,
        channel: int,
        consumer_tag: str,
        delivery_tag: int,
        redelivered: bool,
        exchange: str,
        routing_key: str,
    ) -> None:
        super().__init__(channel, exchange, routing_key)
        self.consumer_tag = consumer_tag
        self.delivery_tag = delivery_tag
        self.redelivered = redelivered


class Got(Delivery):
    """The answer to ``basic.get`` where there was a message; ``consumer_tag`` is empty."""

    __slots__ = ()


class Returned(Content):
    """A message of ours that no queue takes (``basic.return``): its confirm comes right after."""

    __slots__ = ("code", "text")

    def __init__(self, channel: int, code: int, text: str, exchange: str, routing_key: str) -> None:
        super().__init__(channel, exchange, routing_key)
        self.code = code
        self.text = text


@dataclass(slots=True)
class Acked:
    """The server has taken a message of ours, or (``positive`` False: ``basic.nack``) will not."""

    channel: int
    delivery_tag: int
    #: This one and every earlier one.
    multiple: bool
    positive: bool


@dataclass(slots=True)
class MethodReceived:
    """Any other method on an open channel: an answer to one of ours, or the server cancelling a consumer."""

    channel: int
    method: int
    arguments: list[Any]


@dataclass(slots=True)
class ChannelClosed:
    """The server has closed a channel because of an error. It has been answered; the number is free again."""

    channel: int
    code: int
    text: str


@dataclass(slots=True)
class Opened:
    """The handshake is complete."""


@dataclass(slots=True)
class Blocked:
    """The server takes no more messages for now (RabbitMQ: memory or disk alarm), and says why."""

    reason: str


@dataclass(slots=True)
class Unblocked:
    """The server takes messages again."""


@dataclass(slots=True)
class Closed:
    """The connection is over; nothing comes after this event."""

    #: None: closed because we asked for it.
    error: Exception | None
    #: True: what is in the transport's buffer may still be written; False: drop the connection at once.
    orderly: bool
    #: The method of ours that the server closed the connection for; 0: none that it names.
    method: int = 0
    #: What it said: reply code and text.
    code: int = 0
    text: str = ""


Event: TypeAlias = Acked | Blocked | ChannelClosed | Closed | Content | MethodReceived | Opened | Unblocked
