"""An AMQP server in the hand of a test: it reads what a protocol wrote, and says what the test lets it say."""

from __future__ import annotations

from struct import pack, unpack_from
from typing import Any, NamedTuple

from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from twistedcelery.amqp.codec import decode_properties, encode_properties
from twistedcelery.amqp.methods import METHODS, decode_arguments, encode_method
from twistedcelery.amqp.protocol import AMQPProtocol, Channel, ConnectionConfig

__all__ = ["Peer", "Seen", "content", "frame", "method", "split"]

_NUMBERS = {name: number for number, (name, _) in METHODS.items()}

#: What RabbitMQ announces, as far as a client looks at it.
SERVER_PROPERTIES = {
    "product": "a test",
    "capabilities": {"authentication_failure_close": True, "publisher_confirms": True},
}


class Seen(NamedTuple):
    """A frame that the client wrote; for a content header, ``values`` are size, properties, headers."""

    channel: int
    name: str
    values: list[Any]


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    """Write a frame."""
    return pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def method(channel: int, name: str, *values: object) -> bytes:
    """Write a method frame."""
    return encode_method(channel, _NUMBERS[name], values)


def content(
    channel: int,
    body: bytes,
    properties: dict[str, Any] | None = None,
    headers: dict[str, Any] | None = None,
    room: int = 131064,
) -> bytes:
    """Write a content header and as many bodies as it takes."""
    packed = encode_properties(properties or {}, headers)
    frames = [frame(2, channel, pack(">HHQ", 60, 0, len(body)) + packed)]
    frames += [frame(3, channel, body[at : at + room]) for at in range(0, len(body), room)]
    return b"".join(frames)


def split(data: bytes) -> list[Seen]:
    """Read what a client wrote."""
    seen = []
    if data.startswith(b"AMQP"):
        seen.append(Seen(0, "header", [data[:8]]))
        data = data[8:]
    while data:
        kind, channel, size = unpack_from(">BHI", data)
        payload, end = data[7 : 7 + size], data[7 + size]
        assert end == 0xCE, "a frame without its end octet"
        data = data[8 + size :]
        if kind == 1:
            (number,) = unpack_from(">I", payload)
            seen.append(Seen(channel, METHODS[number][0], decode_arguments(number, payload)))
        elif kind == 2:
            (length,) = unpack_from(">Q", payload, 4)
            seen.append(Seen(channel, "content", [length, *decode_properties(payload, 12)]))
        else:
            seen.append(Seen(channel, {3: "body", 8: "heartbeat"}[kind], [payload]))
    return seen


class Peer:
    """A protocol under test, and the server's end of its transport. ``settings`` are `ConnectionConfig`'s."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.transport = StringTransport()
        self.protocol = AMQPProtocol(
            ConnectionConfig(url=settings.pop("url", "amqp://test"), **settings), self.clock
        )

    def connect(self) -> None:
        """Make the connection, but no more."""
        self.protocol.makeConnection(self.transport)

    def read(self) -> list[Seen]:
        """Take what the client wrote since the last time."""
        data = self.transport.value()
        self.transport.clear()
        return split(data)

    def names(self) -> list[str]:
        """Take the names of what the client wrote since the last time."""
        return [seen.name for seen in self.read()]

    def send(self, channel: int, name: str, *values: object) -> None:
        """Say a method."""
        self.protocol.dataReceived(method(channel, name, *values))

    def start(self, mechanisms: str = "PLAIN AMQPLAIN", properties: dict[str, Any] | None = None) -> None:
        """Connect, and ask for the login."""
        self.connect()
        if properties is None:
            properties = SERVER_PROPERTIES
        self.send(0, "connection.start", 0, 9, properties, mechanisms, "en_US")

    def tune(self, channel_max: int = 2047, frame_max: int = 131072, heartbeat: int = 60) -> None:
        """Accept the login."""
        self.send(0, "connection.tune", channel_max, frame_max, heartbeat)

    def open(self, **tune: int) -> AMQPProtocol:
        """Go through the whole handshake."""
        self.start()
        self.tune(**tune)
        self.send(0, "connection.open-ok")
        self.read()
        return self.protocol

    def open_channel(self, *, confirm: bool = False) -> Channel:
        """Open a channel on an open connection."""
        opened: list[Channel] = []
        self.protocol.open_channel(confirm=confirm).addCallback(opened.append)
        number = self.read()[0].channel
        self.send(number, "channel.open-ok")
        if confirm:
            self.send(number, "confirm.select-ok")
        return opened[0]

    def deliver(self, channel: int, tag: int, body: bytes, **message: Any) -> None:
        """Deliver a message to the consumer "me"."""
        self.protocol.dataReceived(
            method(channel, "basic.deliver", message.pop("consumer", "me"), tag, False, "", "q")
            + content(channel, body, **message)
        )

    def lose(self, reason: Exception | None = None) -> None:
        """End the connection."""
        self.protocol.connectionLost(Failure(reason or ConnectionDone()))
