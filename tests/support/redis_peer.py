"""A Redis server for unit tests: it parses commands for real, and answers what the test says.

Unless told otherwise it answers as a Redis server does that knows the commands of a greeting and of pub/sub, and
``+OK`` to everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hiredis
from twisted.internet.protocol import Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RedisPeer", "array", "bulk", "push"]


def bulk(value: bytes) -> bytes:
    """Encode a bulk string."""
    return b"$%d\r\n%s\r\n" % (len(value), value)


def array(*items: bytes) -> bytes:
    """Encode an array of encoded items."""
    return b"*%d\r\n%s" % (len(items), b"".join(items))


def push(kind: bytes, *items: bytes | int) -> bytes:
    """Encode a pub/sub push as RESP2 has it."""
    return array(bulk(kind), *(b":%d\r\n" % item if isinstance(item, int) else bulk(item) for item in items))


class RedisPeer(Protocol):
    """One server-side connection.

    ``answers`` maps a command's name (upper case) to what is sent for it: encoded bytes, or a callable
    that gets the command and returns them. ``hold`` makes it collect answers until `release`.
    """

    def __init__(self, answers: dict[bytes, bytes | Callable[[list[bytes]], bytes]] | None = None) -> None:
        self.answers = dict(answers or {})
        self.commands: list[list[bytes]] = []
        self.hold = False
        self.held: list[bytes] = []
        self.subscribed: dict[bytes, None] = {}
        self._queued: list[bytes] | None = None
        self._more = object()
        self._reader = hiredis.Reader(notEnoughData=self._more)
        self.lost: Any = None

    def dataReceived(self, data: bytes) -> None:
        for answer in self.receive(data):
            self.transport.write(answer)  # type: ignore[union-attr]  # connected

    def connectionLost(self, reason=None):
        self.lost = reason

    def receive(self, data: bytes) -> list[bytes]:
        """Take bytes of the client, and give the answers that are due now."""
        self._reader.feed(data)
        answers = []
        while (command := self._reader.gets()) is not self._more:
            self.commands.append(command)
            answers.append(self.answer(command))
        if self.hold:
            self.held += answers
            return []
        return answers

    def release(self, count: int | None = None) -> bytes:
        """Give the answers that were held back, and hold none of them any more."""
        released, self.held = self.held[:count], self.held[len(self.held[:count]) :]
        return b"".join(released)

    def answer(self, command: list[bytes]) -> bytes:
        """Answer one command."""
        name = command[0].upper()
        if name == b"MULTI":
            self._queued = []
            return b"+OK\r\n"
        if name == b"EXEC" and self._queued is not None:
            queued, self._queued = self._queued, None
            return array(*queued)
        reply = self._reply(name, command)
        if self._queued is not None:
            self._queued.append(reply)
            return b"+QUEUED\r\n"
        return reply

    def _reply(self, name: bytes, command: list[bytes]) -> bytes:
        given = self.answers.get(name)
        if given is not None:
            return given(command) if callable(given) else given
        if name == b"PING":
            return push(b"pong", b"") if self.subscribed else b"+PONG\r\n"
        if name == b"ROLE":
            return array(bulk(b"master"), b":0\r\n", array())
        if name in (b"SUBSCRIBE", b"PSUBSCRIBE", b"UNSUBSCRIBE", b"PUNSUBSCRIBE"):
            return b"".join(self._subscription(name, channel) for channel in command[1:])
        return b"+OK\r\n"

    def _subscription(self, name: bytes, channel: bytes) -> bytes:
        if b"UN" in name:
            self.subscribed.pop(channel, None)
        else:
            self.subscribed[channel] = None
        return push(name.lower(), channel, len(self.subscribed))
