"""Redis connections over Twisted: thin shells around `CommandConnection` and `SubscriberConnection`.

What they add is what needs a transport or a clock: life and death, liveness, and the pace of writing.

Liveness: one timer for each connection. Where an answer is due and no byte came for ``silence_timeout``
seconds (to within half of it), the connection is aborted, also with a full write buffer; where nothing
happened for ``ping_interval`` seconds, PING makes an answer due. A peer that takes our bytes is alive too.

Pace: `writable` is False while the transport has more than it wants; callers are expected to wait for
``on_writable``. What is large is handed to the transport piece by piece (`Writer`), so it neither holds up the
reactor, nor looks like silence on a slow line.

A blocking command (BRPOP) needs a connection of its own, and a time-out of its own below ``silence_timeout``.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer, ITCPTransport
from twisted.internet.protocol import Protocol
from twisted.logger import Logger
from zope.interface import implementer

from .._explain import explain
from .._pace import Writer, read_in_slices
from .._steady import comparing
from ..errors import ConnectionFailed, ConnectionLost
from .connection import CommandConnection, Connection, State
from .subscription import SubscriberConnection

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.python.failure import Failure

    from .connection import ConnectionConfig

__all__ = ["CommandProtocol", "RedisProtocol", "SubscriberProtocol"]

C = TypeVar("C", bound=Connection)
T = TypeVar("T")


class _Waiters(Generic[T]):
    """Deferreds for one event, a fresh one for each caller."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[Deferred[T]] = []

    def add(self) -> Deferred[T]:
        """Give a Deferred; cancelled, it is forgotten."""
        waiter: Deferred[T] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        return waiter

    def succeed(self, value: T) -> None:
        """Fire all of them."""
        while self._waiting:
            self._waiting.pop(0).callback(value)

    def fail(self, reason: Exception) -> None:
        """Fail all of them."""
        while self._waiting:
            self._waiting.pop(0).errback(reason)


@implementer(IPushProducer)
class RedisProtocol(Protocol, Generic[C]):
    """What both kinds of connection share."""

    log = Logger()

    connection: C
    #: An ITCPTransport, an UNIX socket's, or TLS over one.
    transport: Any

    def __init__(self, config: ConnectionConfig, clock: IReactorTime) -> None:
        self.config = config
        self.clock = clock
        self._compare = comparing(clock)
        #: Whether more may be sent: open, and the transport has room.
        self.writable = False
        #: Called when ``writable`` becomes true again.
        self.on_writable: Callable[[], object] | None = None
        #: Called when nothing more is taken, before anybody is told what has become of what was sent. Maybe several times.
        self.on_ending: Callable[[], object] | None = None
        self._open: _Waiters[Any] = _Waiters()
        self._closed: _Waiters[Exception] = _Waiters()
        #: Why the connection ends, as far as this side knows.
        self._reason: Exception | None = None
        #: Whether connectionLost has come.
        self._gone = False
        self._closing = False
        self._writer = Writer()
        self._write = self._writer.write
        self._heard = False
        self._quiet = self._owing = 0.0
        #: For liveness.
        self._timer: IDelayedCall | None = None
        #: For closing.
        self._deadline: IDelayedCall | None = None

    # Life and death

    def when_open(self) -> Deferred[Any]:
        """Fire with this protocol when the greeting is done; fail with a `ConnectionFailed` otherwise."""
        waiter = self._open.add()
        if self._gone:
            self._open.fail(self._why())
        elif self.connection.state is State.OPEN:
            self._open.succeed(self)
        return waiter

    def when_closed(self) -> Deferred[Exception]:
        """Fire with the reason once nothing is left of the connection."""
        return succeed(self._why()) if self._gone else self._closed.add()

    def close(self, timeout: float) -> Deferred[None]:
        """Take nothing more, wait for the answers that are due, close; abort after ``timeout`` seconds."""
        if not self._gone:
            if self._deadline is not None:
                self._deadline.cancel()
            late = ConnectionLost(f"not closed within {timeout:g} s", url=self.config.url)
            self._deadline = self.clock.callLater(timeout, self.abort, late)
            self.connection.drain(ConnectionLost("closed by this side", url=self.config.url))
        return self.when_closed().addCallback(_nothing)

    def abort(self, reason: Exception) -> None:
        """Drop the connection now, because of ``reason``."""
        if self._gone:
            return
        self._reason = self._reason or reason
        self._ending()
        if self.transport is not None:
            self.transport.abortConnection()

    def connectionMade(self) -> None:
        """Begin the greeting."""
        self._writer.transport = self.transport
        # Twisted before 24 says of UNIX sockets as well that they are TCP.
        if ITCPTransport.providedBy(self.transport) and not isinstance(self.transport.getPeer(), UNIXAddress):
            self.transport.setTcpNoDelay(True)
            if self.config.keepalive:
                self._keep_alive()
        self.transport.registerProducer(self, True)
        read_in_slices(self.transport)
        if self._reason is not None:
            self.transport.abortConnection()
            return
        self._schedule()
        self.connection.start()

    def _keep_alive(self) -> None:
        """Switch TCP keepalive on, with the operating system's options where the settings give some."""
        transport: Any = self.transport
        transport.setTcpKeepAlive(True)
        while not isinstance(handle := transport.getHandle(), socket.socket):
            transport = transport.transport  # TLS wraps the one that has the socket
        for option, value in self.config.keepalive_options.items():
            handle.setsockopt(socket.IPPROTO_TCP, option, value)

    def _opened(self) -> None:
        self.writable = not self._writer.paused
        self._open.succeed(self)

    def _ending(self) -> None:
        """Nothing more is taken; answers may still come."""
        self.writable = False
        if self.on_ending is not None:
            self.on_ending()

    def _drained(self, reason: Exception) -> None:
        """Close in an orderly way: every answer that can come has come."""
        if self._closing:
            return  # `close` was called by whoever got the last answer
        self._closing = True
        self._reason = self._reason or reason
        self._writer.clear()
        if self.transport is not None:
            # A TLS transport does not close while a producer is registered.
            self.transport.unregisterProducer()
            self.transport.loseConnection()

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the server."""
        self._heard = True
        self._compare()
        if self._reason is None:
            try:
                self.connection.receive_data(data)
            except ConnectionFailed as error:
                self.abort(error)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]  # has a default there
        """Fail whatever waits, once."""
        self._gone = True
        if self._reason is None:
            self._reason = explain(reason, self.config.url)
        self._writer.clear()
        for call in (self._timer, self._deadline):
            if call is not None and call.active():
                call.cancel()
        self._timer = self._deadline = None
        self.transport = None
        self.connection.connection_lost(self._reason)
        self._open.fail(self._reason)
        self._closed.succeed(self._reason)

    def _why(self) -> Exception:
        assert self._reason is not None
        return self._reason

    def _bug(self) -> None:
        self.log.failure("a callable that was handed to a Redis connection failed")

    # Liveness

    def _schedule(self) -> None:
        self._timer = self.clock.callLater(self._period(), self._tick)

    def _period(self) -> float:
        silence, ping = self.config.silence_timeout, self.config.ping_interval
        return (min(silence, ping) if ping else silence) / 2

    def _tick(self) -> None:
        """Look whether the peer lives."""
        period = self._period()
        if self._heard:
            self._heard = False
            self._quiet = self._owing = 0.0
        else:
            self._quiet += period
            if not self.connection.waiting:
                if self.config.ping_interval and self._quiet >= self.config.ping_interval:
                    self.connection.ping()
                self._owing = 0.0
            else:
                self._owing += period
                if self._owing > self.config.silence_timeout:
                    silent = f"the server is silent for {self._quiet:g} s"
                    self._timer = None
                    self.abort(ConnectionLost(silent, url=self.config.url))
                    return
        self._schedule()

    # Pace

    def pauseProducing(self) -> None:
        """Take note that the transport has enough."""
        self._writer.pause()
        self.writable = False

    def resumeProducing(self) -> None:
        """Go on: the transport has room, so the peer takes our bytes."""
        self._heard = True
        self._writer.resume()
        if self._writer.paused or self._reason is not None or self.connection.state is not State.OPEN:
            return
        self.writable = True
        if self.on_writable is not None:
            self.on_writable()

    def stopProducing(self) -> None:
        """Do nothing: the transport says it when the connection ends, which connectionLost tells."""


class CommandProtocol(RedisProtocol[CommandConnection]):
    """Commands out, replies in."""

    def __init__(self, config: ConnectionConfig, clock: IReactorTime) -> None:
        super().__init__(config, clock)
        self.connection = CommandConnection(
            config,
            write=self._write,
            opened=self._opened,
            ending=self._ending,
            drained=self._drained,
            bug=self._bug,
        )
        #: See `CommandConnection.send`: the hot path, without a Deferred.
        self.send = self.connection.send

    def misfit(self, what: str) -> ConnectionLost:
        """Drop the connection, whose server has answered what no Redis answers; gives the error for whoever had asked."""
        garbage = self.connection.garbage(what)
        self.abort(garbage)
        lost = ConnectionLost(garbage.message, url=self.config.url)
        lost.__cause__ = garbage
        return lost

    def command(self, *args: Any) -> Deferred[Any]:
        """Send one command; fires with its reply. Cancelled, it only stops waiting.

        Errors as those of `CommandConnection.send`.
        """
        answer = _Answer()
        deferred = answer.deferred
        assert deferred is not None
        self.send((args,), answer)
        return deferred


class SubscriberProtocol(RedisProtocol[SubscriberConnection]):
    """Subscriptions out, messages in. The callables to set are those of `SubscriberConnection`."""

    def __init__(self, config: ConnectionConfig, clock: IReactorTime) -> None:
        super().__init__(config, clock)
        self.connection = SubscriberConnection(
            config,
            write=self._write,
            opened=self._opened,
            ending=self._ending,
            drained=self._drained,
            bug=self._bug,
        )
        self.subscribe = self.connection.subscribe
        self.unsubscribe = self.connection.unsubscribe
        self.resubscribe = self.connection.resubscribe


class _Answer:
    """The ``done`` behind a Deferred. When that is cancelled it stays in the queue: the reply still comes."""

    __slots__ = ("deferred",)

    def __init__(self) -> None:
        self.deferred: Deferred[Any] | None = Deferred(self._forget)

    def _forget(self, _deferred: Deferred[Any]) -> None:
        self.deferred = None

    def __call__(self, outcome: list[Any] | Exception) -> None:
        deferred, self.deferred = self.deferred, None
        if deferred is None:
            return
        if isinstance(outcome, Exception):
            deferred.errback(outcome)
        else:
            deferred.callback(outcome[0])


def _nothing(_reason: Exception) -> None:
    """Turn `when_closed` into a bare "it is over"."""
