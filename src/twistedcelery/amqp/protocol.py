"""An AMQP connection in Twisted: `connection.Connection` on a transport, with heartbeats, backpressure and an end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from zope.interface import implementer

from .._explain import explain, text_of
from .._pace import Writer, read_in_slices
from .._steady import comparing
from ..errors import (
    ConnectionFailed,
    ConnectionLost,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
    TLSFailed,
)
from . import methods
from .channel import Channel, QueueState, _tell
from .codec import HEARTBEAT
from .config import ConnectionConfig
from .connection import Connection, State
from .events import (
    Acked,
    Blocked,
    ChannelClosed,
    Closed,
    Delivery,
    Got,
    MethodReceived,
    Opened,
    Returned,
    Unblocked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.python.failure import Failure

__all__ = ["AMQPProtocol", "Channel", "ConnectionConfig", "Delivery", "QueueState"]

_T = TypeVar("_T")

#: Looks at the clock per heartbeat interval: a heartbeat is due after 2 without a write, the peer is dead after
#: 8 (two intervals) without a byte. Counted instead of timed, so that a reactor that was stopped for a minute
#: reads what has come meanwhile before it gives the peer up.
_LOOKS: Final = 4
#: Looks in the span that an answer may take (``declare_timeout``); counted for the same reason.
_ANSWER_LOOKS: Final = 4
#: Reply codes with which a server closes a connection because of what it has read (AMQP 0-9-1, 1.2), and not because of itself.
_FOR_A_MESSAGE: Final = frozenset({501, 502, 503, 504, 505, 540, 541})
#: Seconds that a connection may take to flush the answer to a close of the server's.
_FAREWELL: Final = 5.0
#: Bytes of methods that a server may leave unread. What it is answered, and what follows from what it says (a channel that it has
#: closed is opened again), is written whether it reads or not; a message is only written while there is room.
_UNREAD: Final = 1024 * 1024


@implementer(IPushProducer)
class AMQPProtocol(Protocol):
    """One connection to an AMQP server. It is made by an endpoint and lives once."""

    transport: Any  # ITCPTransport and IConsumer; TLS and UNIX sockets have the same methods

    def __init__(self, config: ConnectionConfig, clock: IReactorTime) -> None:
        self.config = config
        #: False while the transport asks not to be given more.
        self.writable = True
        #: Why the server takes no messages at present; None while it does.
        self.blocked: str | None = None
        #: Whether the server has closed this connection, and it may be because of a message that it has read.
        self.closed_for_message = False
        #: Called when messages may be written again, neither side hindering.
        self.on_writable: Callable[[], object] | None = None
        #: Called with the reason when the server blocks this connection, and with None when it stops to.
        self.on_blocked: Callable[[str | None], object] | None = None
        #: Called when nothing more is taken, before anybody is told what has become of what was sent. Maybe several times.
        self.on_ending: Callable[[], object] | None = None
        self._clock = clock
        self._compare = comparing(clock)
        self._writer = Writer()
        self._core = Connection(config, self._send_method)
        self._channels: dict[int, Channel] = {}
        #: Why the connection ends or has ended; the first reason counts.
        self._reason: Exception | None = None
        self._lost = False
        self._when_open: list[Deferred[AMQPProtocol]] = []
        self._when_closed: list[Deferred[Exception]] = []
        self._closing: list[Deferred[None]] = []
        self._heartbeat_call: IDelayedCall | None = None
        self._deadline_call: IDelayedCall | None = None
        self._deadline = 0.0
        #: Runs while the server owes an answer.
        self._answer_call: IDelayedCall | None = None
        #: Bytes of methods that were written since the transport asked not to be given more.
        self._unread = 0
        #: Looks since something was received, and since something was written.
        self._silent = 0
        self._idle = 0

    @property
    def server_properties(self) -> dict[str, Any]:
        """What the server says of itself: ``product``, ``version``, ``capabilities``, ..."""
        return self._core.server_properties

    @property
    def frame_max(self) -> int:
        """Bytes per frame, as agreed upon."""
        return self._core.frame_max

    @property
    def heartbeat(self) -> int:
        """Seconds, as agreed upon; 0: none."""
        return self._core.heartbeat

    # -- the calling side ----------------------------------------------------------------------------------------------

    def when_open(self) -> Deferred[AMQPProtocol]:
        """Fire with this once the handshake is complete, or fail with why it is not. Fresh per caller."""
        if self._reason is not None:
            return fail(self._reason)
        if self._core.state is State.OPEN:
            return succeed(self)
        return _waiter(self._when_open)

    def when_closed(self) -> Deferred[Exception]:
        """Fire with the reason once the connection is gone. Fresh per caller."""
        if self._lost and self._reason is not None:
            return succeed(self._reason)
        return _waiter(self._when_closed)

    def open_channel(self, *, confirm: bool = False) -> Deferred[Channel]:
        """Open a channel, with publisher confirms if asked for."""
        if self._reason is not None:
            return fail(self._reason)
        try:
            number = self._core.open_channel()
        except LocalProtocolError as problem:
            return fail(problem)
        channel = self._channels[number] = Channel(self, number, confirm=confirm)
        return channel._open()

    def close(self, timeout: float) -> Deferred[None]:
        """Say goodbye, wait for the answer at most ``timeout`` seconds; fires when the connection is gone.

        A handshake that is under way is cut short. Channels take no more work from now on.
        """
        if self._lost:
            return succeed(None)
        done = _waiter(self._closing)
        reason = ConnectionLost("the connection was closed by this side", url=self.config.url)
        if self._reason is not None:
            self._set_deadline(timeout)
        elif self._core.state is State.OPEN:
            self._reason = reason
            self._shut()
            self._core.close()
            self._set_deadline(timeout)
        else:
            self.abort(reason)
        return done

    def abort(self, reason: Exception) -> None:
        """Drop the connection at once; what is pending ends with ``reason``."""
        if self._lost:
            return
        self._give_up(reason)
        if self.transport is None:
            self._finish(reason)
        else:
            self.transport.abortConnection()

    # -- Twisted's side ------------------------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Begin the handshake."""
        self._writer.transport = self.transport
        if self._reason is not None:
            self.transport.abortConnection()
            return
        self.transport.registerProducer(self, True)
        read_in_slices(self.transport)
        self._core.start()

    def dataReceived(self, data: bytes) -> None:
        """Take bytes of the server's."""
        self._silent = 0
        if self._compare() and self._heartbeat_call is not None:
            # Ours was late, perhaps for long.
            self._send(HEARTBEAT)
        if self._unread > _UNREAD:
            self.abort(
                RemoteProtocolError(
                    f"the server does not read the answers that it asks for: {self._unread} bytes of them wait",
                    url=self.config.url,
                )
            )
            return
        try:
            for event in self._core.receive_data(data):
                _HANDLERS[event.__class__](self, event)
        except RemoteProtocolError as problem:
            problem.url = self.config.url
            self.abort(problem)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell everybody, once."""
        error = self._reason
        if error is None:
            error = self._describe_loss(reason)
        if not self._lost:
            self._finish(error)

    def pauseProducing(self) -> None:
        """The transport's buffer is full."""
        self._writer.pause()
        self.writable = False

    def resumeProducing(self) -> None:
        """The transport's buffer is empty."""
        self._writer.resume()
        if not self._writer.paused:
            self.writable = True
            self._unread = 0
            self._tell_writable()

    def stopProducing(self) -> None:
        """The transport is gone; `connectionLost` says so, too."""

    # -- events --------------------------------------------------------------------------------------------------------

    def _on_opened(self, event: Opened) -> None:
        if self.heartbeat:
            self._heartbeat_call = self._clock.callLater(self.heartbeat / _LOOKS, self._look)
        while self._when_open:
            self._when_open.pop(0).callback(self)

    def _on_delivery(self, event: Delivery) -> None:
        self._channels[event.channel]._delivered(event)

    def _on_got(self, event: Got) -> None:
        self._channels[event.channel]._answered(methods.BASIC_GET_OK, event)

    def _on_returned(self, event: Returned) -> None:
        self._channels[event.channel]._returned(event)

    def _on_acked(self, event: Acked) -> None:
        self._channels[event.channel]._acked(event)

    def _on_method(self, event: MethodReceived) -> None:
        if event.method == methods.CHANNEL_CLOSE_OK:
            self._channels.pop(event.channel)._close_answered()
        else:
            self._channels[event.channel]._received(event)

    def _on_channel_closed(self, event: ChannelClosed) -> None:
        self._channels.pop(event.channel)._closed_by_server(event.code, event.text)

    def _on_blocked(self, event: Blocked) -> None:
        self.blocked = event.reason
        if self.on_blocked is not None:
            _tell(self.on_blocked, event.reason)

    def _on_unblocked(self, event: Unblocked) -> None:
        self.blocked = None
        if self.on_blocked is not None:
            _tell(self.on_blocked, None)
        self._tell_writable()

    def _on_closed(self, event: Closed) -> None:
        named = event.method in (0, methods.BASIC_PUBLISH)
        self.closed_for_message = named and event.code in _FOR_A_MESSAGE
        self._give_up(event.error)
        if event.method:
            # 503 for an exchange type that it does not know, for example: the call that asked for it is refused, no other.
            refused = Refused(f"{event.code} {event.text}", code=event.code, url=self.config.url)
            for channel in self._channels.values():
                channel._calls.refuse(event.method, refused)
        if not event.orderly:
            self.transport.abortConnection()
            return
        if self._deadline_call is None:
            self._set_deadline(_FAREWELL)
        self.transport.unregisterProducer()  # TLS does not close under a producer
        self.transport.loseConnection()

    # -- heartbeats, deadlines, the end --------------------------------------------------------------------------------

    def _send(self, data: bytes | Iterator[bytes]) -> None:
        self._idle = 0
        self._writer.write(data)

    def _send_method(self, data: bytes) -> None:
        """Send what is no message."""
        if not self.writable:
            self._unread += len(data)
        self._send(data)

    def _tell_writable(self) -> None:
        if self.writable and self.blocked is None and self._reason is None and self.on_writable is not None:
            _tell(self.on_writable)

    def _look(self) -> None:
        """See to the heartbeats, a few times per interval (AMQP 0-9-1, 4.2.7)."""
        self._silent += 1
        self._idle += 1
        if self._silent >= 2 * _LOOKS:
            self._heartbeat_call = None
            silence = 2 * self.heartbeat
            self.abort(ConnectionLost(f"the server was silent for {silence} seconds", url=self.config.url))
            return
        if self._idle >= _LOOKS // 2:
            self._send(HEARTBEAT)
        self._heartbeat_call = self._clock.callLater(self.heartbeat / _LOOKS, self._look)

    def _asked(self) -> None:
        """A channel waits for an answer of the server's: see that it comes within ``declare_timeout``."""
        if self._answer_call is None and self._reason is None and self.config.declare_timeout:
            span = self.config.declare_timeout / _ANSWER_LOOKS
            self._answer_call = self._clock.callLater(span, self._look_for_answers, span)

    def _look_for_answers(self, span: float) -> None:
        """Replace a connection that gives signs of life, but no answers.

        While the server has blocked this connection it reads nothing of what it is asked, and while our bytes do not leave it has
        not been asked.
        """
        self._answer_call = None
        waiting = [channel for channel in self._channels.values() if channel._waits]
        if self.blocked is None and self.writable:
            for channel in waiting:
                channel._unanswered += 1
                if channel._unanswered > _ANSWER_LOOKS:
                    unanswered = f"no answer to {channel._waits} within {self.config.declare_timeout:g} s"
                    self.abort(ConnectionLost(unanswered, url=self.config.url))
                    return
        if waiting:
            self._answer_call = self._clock.callLater(span, self._look_for_answers, span)

    def _set_deadline(self, timeout: float) -> None:
        """Abort in ``timeout`` seconds, if not earlier."""
        deadline = self._clock.seconds() + timeout
        if self._deadline_call is not None:
            if self._deadline <= deadline:
                return
            self._deadline_call.cancel()
        self._deadline = deadline
        self._deadline_call = self._clock.callLater(timeout, self._deadline_passed)

    def _deadline_passed(self) -> None:
        self._deadline_call = None
        self._give_up(None)
        self.transport.abortConnection()

    def _give_up(self, reason: Exception | None) -> None:
        """Read and write nothing more; `connectionLost` is going to come."""
        if self._reason is None:
            self._reason = reason
        self._core.abandon()
        self._writer.clear()
        self._shut()
        if self._heartbeat_call is not None:
            self._heartbeat_call.cancel()
            self._heartbeat_call = None

    def _shut(self) -> None:
        """Take no more work, and wait for no answers: whoever is told next may want more of it."""
        for channel in self._channels.values():
            channel._shut(self._reason)
        if self._answer_call is not None:
            self._answer_call.cancel()
            self._answer_call = None
        if self.on_ending is not None:
            _tell(self.on_ending)

    def _finish(self, reason: Exception) -> None:
        self._lost = True
        self._give_up(reason)
        if self._deadline_call is not None:
            self._deadline_call.cancel()
            self._deadline_call = None
        channels, self._channels = self._channels, {}
        # Whatever ends a connection: what was on its way on it is lost, no more and no less.
        lost = reason
        if not isinstance(reason, ConnectionLost):
            told = getattr(reason, "message", str(reason))
            lost = ConnectionLost(f"the connection ended: {told}", url=self.config.url)
            lost.__cause__ = reason
        for channel in channels.values():
            channel._ended(lost)
        # One by one: whoever is told may cancel another, which then leaves its list.
        while self._when_open:
            self._when_open.pop(0).errback(reason)
        while self._closing:
            self._closing.pop(0).callback(None)
        while self._when_closed:
            self._when_closed.pop(0).callback(reason)

    def _describe_loss(self, reason: Failure) -> ConnectionFailed:
        explained = explain(reason, self.config.url)
        if isinstance(explained, TLSFailed):
            return explained
        cause = reason.value
        assert cause is not None
        # What it means in the present state of the connection says more.
        lost = self._core.lost("" if isinstance(cause, ConnectionDone) else text_of(cause))
        lost.__cause__ = cause
        return lost


def _waiter(waiting: list[Deferred[_T]]) -> Deferred[_T]:
    """Make a Deferred that leaves ``waiting`` when it is cancelled."""
    deferred: Deferred[_T] = Deferred(waiting.remove)
    waiting.append(deferred)
    return deferred


_HANDLERS: Final[dict[type, Callable[[AMQPProtocol, Any], None]]] = {
    Acked: AMQPProtocol._on_acked,
    Blocked: AMQPProtocol._on_blocked,
    ChannelClosed: AMQPProtocol._on_channel_closed,
    Closed: AMQPProtocol._on_closed,
    Delivery: AMQPProtocol._on_delivery,
    Got: AMQPProtocol._on_got,
    MethodReceived: AMQPProtocol._on_method,
    Opened: AMQPProtocol._on_opened,
    Returned: AMQPProtocol._on_returned,
    Unblocked: AMQPProtocol._on_unblocked,
}
