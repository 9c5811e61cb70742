"""A loopback TCP proxy in this process, that does to a connection what networks and dying servers do."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone

from .processes import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IListeningPort
    from twisted.python.failure import Failure

__all__ = ["Direction", "FaultProxy"]

#: ``up`` is from the client to the server, ``down`` from the server to the client.
Direction: TypeAlias = Literal["up", "down"]

#: Bytes that wait in the proxy, in one direction of one connection, before it stops reading more.
_HIGH_WATER = 65536


class _End(Protocol):
    """One end of a proxied connection: what it receives goes to its ``peer``, by way of a queue of its own."""

    transport: Any
    peer: _End

    def __init__(self, proxy: FaultProxy, direction: Direction) -> None:
        self.proxy = proxy
        self.direction: Direction = direction
        self.connected_now = False
        self.queue: deque[bytes] = deque()
        self.queued = 0
        self.peer_full = False
        self.timer: Any = None

    def connectionMade(self) -> None:
        self.connected_now = True
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(_Gate(self.peer), True)
        self.proxy._ends.add(self)
        self.update()

    def dataReceived(self, data: bytes) -> None:
        proxy = self.proxy
        if proxy.on_data is not None:
            changed = proxy.on_data(self.direction, data)
            if changed is None:
                return
            data = changed
        size = proxy._piece
        pieces = (data,) if size is None else (data[at : at + size] for at in range(0, len(data), size))
        for piece in pieces:
            self.queue.append(piece)
        self.queued += len(data)
        self.update()

    def update(self) -> None:
        """Send on what may be sent, and read on only where there is room."""
        proxy = self.proxy
        stalled = self.direction in proxy._stalled
        peer = self.peer
        while self.queue and not stalled and not self.peer_full and peer.connected_now and self.timer is None:
            data = self.queue.popleft()
            self.queued -= len(data)
            if self._send(data):
                return
            if self.queue and proxy._piece is not None:
                self.timer = proxy._reactor.callLater(0.0005, self._go_on)
        if self.connected_now:
            full = self.queued > _HIGH_WATER or not peer.connected_now
            if stalled or full or self.peer_full:
                self.transport.pauseProducing()
            else:
                self.transport.resumeProducing()

    def _go_on(self) -> None:
        self.timer = None
        self.update()

    def _send(self, data: bytes) -> bool:
        """Hand data to the peer; returns whether that was the last of this connection."""
        proxy = self.proxy
        allowed = proxy._allowed.get(self.direction)
        last = False
        if self.direction in proxy._halve:
            proxy._halve.discard(self.direction)
            data = data[: len(data) // 2]
            last = True
        if allowed is not None:
            data = data[:allowed]
            proxy._allowed[self.direction] = allowed - len(data)
            last = last or allowed == len(data)
        if self.direction == "up":
            proxy.bytes_up += len(data)
        else:
            proxy.bytes_down += len(data)
        self.peer.transport.write(data)
        if last:
            proxy._allowed.pop(self.direction, None)
            self.peer.transport.loseConnection()
            self.abort()
        return last

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connected_now = False
        self.proxy._ends.discard(self)
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.peer.connected_now:
            if self.direction not in self.proxy._stalled:  # what arrived before the end is still due
                self.peer.transport.writeSequence(list(self.queue))
            self.peer.transport.unregisterProducer()
            self.peer.transport.loseConnection()
        self.queue.clear()
        self.proxy._changed()

    def abort(self) -> None:
        """Reset this end."""
        self.transport.abortConnection()


class _Gate:
    """Tells an end that the transport which it writes to is full."""

    def __init__(self, end: _End) -> None:
        self._end = end

    def pauseProducing(self) -> None:
        self._end.peer_full = True
        self._end.update()

    def resumeProducing(self) -> None:
        self._end.peer_full = False
        self._end.update()

    def stopProducing(self) -> None:
        """Nothing to do: ``connectionLost`` follows."""


class FaultProxy:
    """Forwards what comes to ``port`` to ``127.0.0.1:target_port``, as faithfully as it is told to.

    Faults hold for present and later connections until they are taken back; ``cut``, ``halve`` and ``cut_after`` once.

    Attributes:
        port: where it listens, the same after ``refuse`` and ``accept``.
        on_data: sees all that arrives, ``(direction, data)``; returns what is to be forwarded, None for nothing.
        bytes_up: bytes forwarded to the server; ``bytes_down`` to the client.
        accepted: how many connections were made to it, ever.

    """

    def __init__(self, reactor: Any, target_port: int) -> None:
        self._reactor = reactor
        self.target_port = target_port
        self.port = free_port()
        self.on_data: Callable[[Direction, bytes], bytes | None] | None = None
        self.bytes_up = 0
        self.bytes_down = 0
        self.accepted = 0
        self._listening: IListeningPort | None = None
        self._ends: set[_End] = set()
        self._connecting: set[Deferred[Any]] = set()
        self._stalled: frozenset[Direction] = frozenset()
        self._piece: int | None = None
        self._halve: set[Direction] = set()
        self._allowed: dict[Direction, int] = {}
        self._idle: list[Deferred[None]] = []

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        return sum(end.direction == "up" for end in self._ends)

    def start(self) -> Deferred[None]:
        """Listen; fires once connections are taken."""
        return self.accept()

    def stop(self) -> Deferred[None]:
        """Stop listening and reset all connections; fires when nothing is left."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        idle: Deferred[None] = Deferred()
        self._idle.append(idle)
        await self.refuse()
        self.cut()
        self._changed()
        await idle

    def accept(self) -> Deferred[None]:
        """Listen (again)."""
        return Deferred.fromCoroutine(self._accept())

    async def _accept(self) -> None:
        if self._listening is None:
            endpoint = TCP4ServerEndpoint(self._reactor, self.port, interface="127.0.0.1")
            self._listening = await endpoint.listen(Factory.forProtocol(self._accepted))

    def refuse(self) -> Deferred[None]:
        """Stop listening: new connections are refused, present ones go on."""
        return Deferred.fromCoroutine(self._refuse())

    async def _refuse(self) -> None:
        port, self._listening = self._listening, None
        if port is not None:
            stopped = port.stopListening()
            if stopped is not None:
                await stopped

    def cut(self) -> None:
        """Reset all connections now, at both ends."""
        for connecting in list(self._connecting):
            connecting.cancel()
        for end in list(self._ends):
            end.abort()

    def stall(self, *directions: Direction) -> None:
        """Stop forwarding, in both directions unless named; sockets stay open, and fill."""
        self._stalled |= frozenset(directions or ("up", "down"))
        self._update()

    def resume(self) -> None:
        """Forward everything again, what waited included, and whole (no `trickle`)."""
        self._stalled = frozenset()
        self._piece = None
        self._update()

    def trickle(self, size: int) -> None:
        """Forward at most ``size`` bytes by each write, in turns of the reactor of their own."""
        self._piece = size

    def halve(self, direction: Direction = "down") -> None:
        """Forward half of the next chunk, then end that connection."""
        self._halve.add(direction)

    def cut_after(self, size: int, direction: Direction = "down") -> None:
        """Forward ``size`` more bytes in this direction, then end the connection that they went through."""
        self._allowed[direction] = size

    @property
    def cutting(self) -> bool:
        """Whether a `cut_after` is still to come."""
        return bool(self._allowed)

    def garbage(self, data: bytes) -> None:
        """Send these bytes to every client, as if the server had."""
        for end in list(self._ends):
            if end.direction == "up":
                end.transport.write(data)

    def _update(self) -> None:
        for end in list(self._ends):
            end.update()

    def _changed(self) -> None:
        """Tell `stop` when nothing is left."""
        if not self._ends and not self._connecting:
            idle, self._idle = self._idle, []
            for waiting in idle:
                waiting.callback(None)

    def _accepted(self) -> _End:
        """Make both ends of a connection that was accepted, and begin to connect to the server."""
        self.accepted += 1
        client, server = _End(self, "up"), _End(self, "down")
        client.peer, server.peer = server, client
        connecting = TCP4ClientEndpoint(self._reactor, "127.0.0.1", self.target_port, timeout=5).connect(
            Factory.forProtocol(lambda: server)
        )
        self._connecting.add(connecting)

        def settled(result: object) -> None:
            self._connecting.discard(connecting)
            if server.connected_now and client.connected_now:
                client.update()
            elif server.connected_now:
                server.abort()
            elif client.connected_now:
                client.abort()
            self._changed()

        connecting.addBoth(settled)
        return client
