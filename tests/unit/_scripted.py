"""Connections for the AMQP rooms under test, whose other ends are scripted peers."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import fail, succeed

from tests.support.amqp_peer import Peer, content, method
from twistedcelery.errors import ServerUnreachable

if TYPE_CHECKING:
    from twisted.internet.task import Clock

__all__ = ["Attempts", "Scripted"]


class Scripted(Peer):
    """A peer that answers by itself what a test does not look at."""

    #: What answers what; the values come from a function of the request's.
    answers: dict[str, tuple[str, Any]] = {  # noqa: RUF012  # never changed
        "channel.open": ("channel.open-ok", lambda values: ()),
        "channel.close": ("channel.close-ok", lambda values: ()),
        "confirm.select": ("confirm.select-ok", lambda values: ()),
        "exchange.declare": ("exchange.declare-ok", lambda values: ()),
        "exchange.bind": ("exchange.bind-ok", lambda values: ()),
        "queue.declare": ("queue.declare-ok", lambda values: (values[1], 0, 0)),
        "queue.bind": ("queue.bind-ok", lambda values: ()),
        "queue.delete": ("queue.delete-ok", lambda values: (0,)),
        "basic.qos": ("basic.qos-ok", lambda values: ()),
        "basic.consume": ("basic.consume-ok", lambda values: ("me",)),
        "connection.close": ("connection.close-ok", lambda values: ()),
    }

    def __init__(self, clock: Clock, **settings: Any) -> None:
        super().__init__(**settings)
        self.clock = clock
        self.protocol._clock = clock
        #: Everything that the client has said since the last look, and what is not answered.
        self.seen: list[Any] = []
        self.silent: set[str] = set()

    def answer(self) -> None:
        """Answer until the client says nothing more."""
        while new := self.read():
            self.seen += new
            for one in new:
                if one.name in self.answers and one.name not in self.silent and not self.protocol._lost:
                    name, values = self.answers[one.name]
                    number = 0 if name.startswith("connection") else one.channel
                    self.send(number, name, *values(one.values))
                    if name == "connection.close-ok":
                        self.lose()

    def lose(self, reason: Exception | None = None) -> None:
        """End the connection, once."""
        if not self.protocol._lost:
            super().lose(reason)

    def said(self, *names: str) -> list[Any]:
        """Take what the client has said so far: all, or only the methods of these names."""
        self.answer()
        seen, self.seen = self.seen, []
        return [one for one in seen if not names or one.name in names]

    def reply(self, tag: int, body: bytes, *, channel: int, headers: Any = None, **properties: Any) -> None:
        """Deliver a message to the consumer."""
        self.protocol.dataReceived(
            method(channel, "basic.deliver", "me", tag, False, "", "q")
            + content(channel, body, properties, headers)
        )


class Attempts:
    """An endless iterator of attempts, each a peer that shakes hands at once, or an error that is due next."""

    def __init__(self, clock: Clock, *urls: str) -> None:
        self.clock = clock
        self.urls = urls or ("amqp://test",)
        self._next = count()
        self.peers: list[Scripted] = []
        self.errors: list[Exception] = []
        #: More of a connection's configuration.
        self.settings: dict[str, Any] = {}
        self.url = self.urls[0]

    def __iter__(self) -> Attempts:
        return self

    def __next__(self) -> Attempts:
        self.url = self.urls[next(self._next) % len(self.urls)]
        return self

    def connect(self) -> Any:
        """Shake hands."""
        if self.errors:
            return fail(self.errors.pop(0))
        peer = Scripted(self.clock, url=self.url, heartbeat=0, **self.settings)
        self.peers.append(peer)
        peer.open(heartbeat=0)
        return succeed(peer.protocol)

    @property
    def peer(self) -> Scripted:
        """The newest one."""
        return self.peers[-1]

    def refuse(self) -> None:
        """Let the next attempt fail."""
        self.errors.append(ServerUnreachable("refused"))
