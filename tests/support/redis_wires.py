"""Redis rooms on a wire of the test's own: connections made without a network, to a Redis that is a few dictionaries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from twisted.internet import error
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from tests.support.redis_peer import RedisPeer, array, bulk, push
from twistedcelery.redis.connection import ConnectionConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twistedcelery.redis.protocol import RedisProtocol

__all__ = ["Connection", "Store", "Wires", "integer"]

P = TypeVar("P", bound="RedisProtocol[Any]")

URL = "redis://10.0.0.1:6379/0"


def integer(value: int) -> bytes:
    """Encode an integer reply."""
    return b":%d\r\n" % value


class Store:
    """What a Redis server holds, as far as these rooms use it."""

    def __init__(self) -> None:
        self.lists: dict[bytes, list[bytes]] = {}
        self.sets: dict[bytes, list[bytes]] = {}
        self.strings: dict[bytes, bytes] = {}
        #: Answers that override these, by the command's name.
        self.answers: dict[bytes, bytes | Callable[[list[bytes]], bytes]] = {}

    def peer(self) -> RedisPeer:
        """One server-side connection."""
        known = {
            name[3:].upper().encode(): getattr(self, name) for name in dir(self) if name.startswith("do_")
        }
        peer = RedisPeer(known)
        peer.answers = {**known, **self.answers}
        return peer

    def do_lpush(self, command: list[bytes]) -> bytes:
        there = self.lists.setdefault(command[1], [])
        there.insert(0, command[2])
        return integer(len(there))

    def do_lrange(self, command: list[bytes]) -> bytes:
        start = int(command[2])
        return array(*map(bulk, self.lists.get(command[1], [])[start or None :]))

    def do_ltrim(self, command: list[bytes]) -> bytes:
        end = int(command[3]) + 1
        self.lists[command[1]] = self.lists.get(command[1], [])[: end or None]
        return b"+OK\r\n"

    def do_brpoplpush(self, command: list[bytes]) -> bytes:
        there = self.lists.get(command[1])
        if not there:
            return b"$-1\r\n"
        reply = there.pop()
        self.lists.setdefault(command[2], []).insert(0, reply)
        return bulk(reply)

    def do_sadd(self, command: list[bytes]) -> bytes:
        there = self.sets.setdefault(command[1], [])
        there.append(command[2])
        return integer(1)

    def do_smembers(self, command: list[bytes]) -> bytes:
        return array(*map(bulk, self.sets.get(command[1], [])))

    def do_exists(self, command: list[bytes]) -> bytes:
        return integer(sum(key in self.lists for key in command[1:]))

    def do_publish(self, command: list[bytes]) -> bytes:
        return integer(0)

    def do_pexpire(self, command: list[bytes]) -> bytes:
        return integer(1)

    def do_eval(self, command: list[bytes]) -> bytes:
        return b"$-1\r\n"

    def do_set(self, command: list[bytes]) -> bytes:
        self.strings[command[1]] = command[2]
        return b"+OK\r\n"

    def do_get(self, command: list[bytes]) -> bytes:
        found = self.strings.get(command[1])
        return b"$-1\r\n" if found is None else bulk(found)

    def do_mget(self, command: list[bytes]) -> bytes:
        return array(*(self.do_get([b"GET", key]) for key in command[1:]))

    def do_del(self, command: list[bytes]) -> bytes:
        for key in command[1:]:
            self.strings.pop(key, None)
            self.lists.pop(key, None)
        return integer(1)


class Transport(StringTransport):
    """Remembers that it is to end; `Wires.flush` ends it."""

    ending: Exception | None = None

    def abortConnection(self) -> None:
        self.ending = self.ending or error.ConnectionAborted()

    def loseConnection(self) -> None:
        self.ending = self.ending or error.ConnectionDone()


class Connection(Generic[P]):
    """One connection: both ends."""

    def __init__(self, protocol: P, peer: RedisPeer) -> None:
        self.protocol = protocol
        self.peer = peer
        self.transport = Transport()
        self.lost = False
        protocol.makeConnection(self.transport)

    def flush(self) -> bool:
        """Carry bytes both ways; returns whether there were any."""
        if self.lost:
            return False
        data = self.transport.value()
        self.transport.clear()
        for answer in self.peer.receive(data):
            if not self.lost:
                self.protocol.dataReceived(answer)
        if self.transport.ending and not self.transport.value():
            self.lose(self.transport.ending)
        return bool(data)

    def send(self, data: bytes) -> None:
        """Have the server send something."""
        self.protocol.dataReceived(data)

    def publish(self, channel: bytes, payload: bytes) -> None:
        """Have the server push a message."""
        self.send(push(b"message", channel, payload))

    def lose(self, why: Exception | None = None) -> None:
        """End the connection."""
        if not self.lost:
            self.lost = True
            self.protocol.connectionLost(Failure(why or error.ConnectionDone()))

    @property
    def commands(self) -> list[list[bytes]]:
        """What the server was asked since the greeting or the last look."""
        taken = [[name.upper(), *rest] for name, *rest in self.peer.commands if name != b"PING"]
        self.peer.commands.clear()
        return taken


class Wires:
    """All connections of a test."""

    def __init__(self, store: Store | None = None) -> None:
        self.clock = Clock()
        self.store = store or Store()
        self.connections: list[Connection[Any]] = []
        #: Errors of the next attempts to connect.
        self.refusals: list[Exception] = []

    def attempts(self, kind: Callable[[ConnectionConfig, Any], P], url: str = URL) -> Iterator[Any]:
        """Attempts for a keeper."""
        attempt = _Attempt(self, kind, url)
        while True:
            yield attempt

    def of(self, kind: type) -> Connection[Any]:
        """The newest connection of this kind."""
        return next(each for each in reversed(self.connections) if isinstance(each.protocol, kind))

    def flush(self) -> None:
        """Carry everything to its end, and let what is due at once happen."""
        while True:
            self.clock.advance(0)
            # Each of them, not up to the first that had something.
            if not sum(each.flush() for each in list(self.connections)):
                break
        self.clock.advance(0)
        if any(not each.lost and each.transport.value() for each in self.connections):
            self.flush()

    def pass_time(self, seconds: float) -> None:
        """Let time pass in steps of 50 ms."""
        for _ in range(round(seconds / 0.05)):
            self.clock.advance(0.05)
            self.flush()


class _Attempt(Generic[P]):
    def __init__(self, wires: Wires, kind: Callable[[ConnectionConfig, Any], P], url: str) -> None:
        self._wires = wires
        self._kind = kind
        self.url = url

    def connect(self) -> Deferred[P]:
        wires = self._wires
        if wires.refusals:
            return fail(wires.refusals.pop(0))
        config = ConnectionConfig(url=self.url, silence_timeout=3600, ping_interval=0)
        made = Connection(self._kind(config, wires.clock), wires.store.peer())
        wires.connections.append(made)
        opening: Deferred[P] = Deferred(lambda _: made.lose())
        made.protocol.when_open().chainDeferred(opening)
        return opening
