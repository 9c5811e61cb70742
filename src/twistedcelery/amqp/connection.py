"""One AMQP 0-9-1 connection, client side, without I/O: bytes in, events out.

The conversation (AMQP 0-9-1, 2.2.4 and 4.2)::

    HEADER_SENT   we said "AMQP 0-9-1"            the server sends connection.start
    STARTING      we sent start-ok                connection.tune        (Tune is answered with
    OPENING       we sent tune-ok and open        connection.open-ok      two methods at once)
    OPEN          channels live and die           anything
    CLOSING       we sent connection.close        connection.close-ok
    CLOSED        nothing more, either way

`_TRANSITIONS` says which method is allowed in which state, and which function sees to it. What is not there is a
protocol error: `RemoteProtocolError`, and the connection is dropped. Three more rules stand beside the table:

1. The server may send ``connection.close`` at any time. In STARTING it means that the login was refused (403), in
   OPENING that the virtual host was (402, 403, 530); otherwise that the connection is lost. It is answered.
2. Whoever has sent a close ignores all but close and close-ok (2.2.4, 1.5.2.5). So in CLOSING, and so for a channel
   that is being closed. The number of a channel is free again once its close is answered, not earlier.
3. Channels have a table of their own, in miniature: OPENING until ``channel.open-ok``, then OPEN, then CLOSING. Within
   OPEN, a method with content is followed by its header and its bodies, and by nothing else on that channel.

What methods on an open channel *mean* (which call an answer belongs to, publisher confirms, consumers) is not known
here: they go out as events. All memory that a peer can make us hold is bounded: a frame by ``frame_max``, a
message by ``max_body_size``, a table by its frame and by its nesting.

Errors of the peer come as a last event, `Closed`, never as an exception; errors of this side are raised.
"""

from __future__ import annotations

import math
import platform
from collections import deque
from enum import Enum, auto
from importlib import metadata
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from ..errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    LocalProtocolError,
    RemoteProtocolError,
    VirtualHostNotFound,
)
from . import codec, methods
from .events import (
    Acked,
    Blocked,
    ChannelClosed,
    Closed,
    Content,
    Delivery,
    Got,
    MethodReceived,
    Opened,
    Returned,
    Unblocked,
)
from .login import choose_login
from .methods import decode_arguments, encode_method, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .config import ConnectionConfig
    from .events import Event

__all__ = ["Connection", "State"]

_FRAME: Final = Struct(">BHI")
_METHOD: Final = Struct(">I")
_HEADER: Final = Struct(">HHQ")
_CONFIRM: Final = Struct(">IQB")

_VERSION: Final = metadata.version("twistedcelery")
_LOGIN_REFUSED: Final = 403
_VIRTUAL_HOST_REFUSED: Final = (402, 403, 530)
_DEFAULT_FRAME_MAX: Final = 131072

_CAPABILITIES: Final = {
    "authentication_failure_close": True,
    "basic.nack": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
    "exchange_exchange_bindings": True,
    "publisher_confirms": True,
}


class State(Enum):
    """Where in the conversation a connection is."""

    HEADER_SENT = auto()
    STARTING = auto()
    OPENING = auto()
    OPEN = auto()
    CLOSING = auto()
    CLOSED = auto()


class _Channel:
    """What the wire needs to know of a channel."""

    __slots__ = ("chunks", "content", "missing", "state")

    def __init__(self) -> None:
        self.state = State.OPENING
        #: The message that is being received, if there is one.
        self.content: Content | None = None
        #: How many bytes of its body are missing; None until its header has come.
        self.missing: int | None = None
        self.chunks: list[bytes] = []


class Connection:
    """The state of one connection.

    ``write`` takes what is to be sent; it may be called from any method. Nothing is sent before `start`.
    """

    def __init__(self, config: ConnectionConfig, write: Callable[[bytes], object]) -> None:
        self.config = config
        self.state = State.HEADER_SENT
        #: What the server says of itself, once it has.
        self.server_properties: dict[str, Any] = {}
        #: Bytes; the limit for both sides once OPEN.
        self.frame_max = config.frame_max or _DEFAULT_FRAME_MAX
        self.channel_max = config.channel_max
        #: Seconds, as agreed upon; 0: none.
        self.heartbeat = 0
        self._write = write
        self._channels: dict[int, _Channel] = {}
        self._free: deque[int] = deque()
        self._next_channel = 1
        #: The beginning of a frame, and how long it must be before it is worth looking at again.
        self._rest = bytearray()
        self._wanted = 0

    def start(self) -> None:
        """Say which protocol we speak."""
        self._write(codec.PROTOCOL_HEADER)

    # -- the calling side ----------------------------------------------------------------------------------------------

    def open_channel(self) -> int:
        """Ask for a channel and return its number; `MethodReceived` with channel.open-ok tells that it is open.

        :raises LocalProtocolError: if the connection is not open, or has as many channels as it may.
        """
        if self.state is not State.OPEN:
            raise LocalProtocolError("the connection is not open", url=self.config.url)
        if self._free:
            number = self._free.popleft()
        elif self._next_channel <= self.channel_max:
            number = self._next_channel
            self._next_channel += 1
        else:
            raise LocalProtocolError(f"all {self.channel_max} channels are in use", url=self.config.url)
        self._channels[number] = _Channel()
        self._send(number, methods.CHANNEL_OPEN, "")
        return number

    def close_channel(self, number: int) -> None:
        """Ask for the end of an open channel; `MethodReceived` with channel.close-ok tells that it came."""
        self._channels[number].state = State.CLOSING
        self._send(number, methods.CHANNEL_CLOSE, 200, "", 0, 0)

    def close(self) -> None:
        """Ask for the end of an open connection; `Closed` tells that it came."""
        self.state = State.CLOSING
        self._send(0, methods.CONNECTION_CLOSE, 200, "", 0, 0)

    def abandon(self) -> None:
        """Take no notice of anything any more."""
        self.state = State.CLOSED
        self._channels.clear()
        self._rest.clear()

    def lost(self, detail: str = "") -> ConnectionFailed:
        """Say what it means that the stream has ended in the present state.

        ``detail``: what the transport says, where that is more than that it was closed.
        """
        detail = detail and f": {detail}"
        capabilities = self.server_properties.get("capabilities")
        announces = isinstance(capabilities, dict) and capabilities.get("authentication_failure_close")
        if self.state is State.STARTING and not announces:
            # The only way in which such a server can refuse a login (AMQP 0-9-1, 2.2.4).
            return AuthenticationFailed(
                f"the server ended the connection during the login{detail}", url=self.config.url
            )
        during = {
            State.HEADER_SENT: " before it said anything",
            State.STARTING: " during the login",
            State.OPENING: " while the virtual host was being opened",
        }.get(self.state, "")
        return ConnectionLost(f"the connection ended{during}{detail}", url=self.config.url)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def receive_data(self, data: bytes) -> Iterator[Event]:
        """Take bytes as they come, in pieces of any size; give what they amount to, event by event.

        Each event is to be handled before the next one is asked for: what its handler does (closing a channel,
        `abandon`) holds for the bytes after it. To be read to the end, or else given up.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return
            data = bytes(self._rest)
            self._rest.clear()
        offset, length = 0, len(data)
        if self.state is State.HEADER_SENT and data[:1] == b"A" and length < 8:
            # The beginning of a protocol header: to be refused, but with the version that it asks for.
            self._rest += data
            self._wanted = 8
            return
        try:
            while self.state is not State.CLOSED:
                start = offset + 7
                if start > length:
                    self._wanted = 7
                    break
                kind, number, size = _FRAME.unpack_from(data, offset)
                if size > self.frame_max - codec.FRAME_OVERHEAD or kind not in _FRAME_KINDS:
                    raise RemoteProtocolError(_describe_garbage(data[offset : offset + 8], self.frame_max))
                end = start + size
                if end >= length:
                    self._wanted = size + codec.FRAME_OVERHEAD
                    break
                if data[end] != codec.FRAME_END:
                    raise RemoteProtocolError("a frame without its end octet")
                offset = end + 1
                event = self._receive_frame(kind, number, data[start:end])
                if event is not None:
                    yield event
        except ConnectionFailed as problem:
            problem.url = self.config.url
            self.abandon()
            yield Closed(problem, orderly=False)
        if self.state is not State.CLOSED:
            self._rest += data[offset:]

    def _receive_frame(self, kind: int, number: int, payload: bytes) -> Event | None:
        channel = self._channels.get(number)
        if kind == codec.FRAME_HEARTBEAT:
            return None
        if channel is None or channel.state is not State.OPEN or self.state is not State.OPEN:
            return self._receive_uncommon(kind, number, channel, payload)
        if kind == codec.FRAME_METHOD:
            return self._receive_method(number, channel, payload)
        content = channel.content
        if content is None:
            raise RemoteProtocolError("a content frame without its method")
        if kind == codec.FRAME_HEADER:
            whole = self._receive_header(channel, content, payload)
        else:
            whole = _receive_body(channel, content, payload)
        if not whole:
            return None
        channel.content = channel.missing = None
        return content

    # -- open channels -------------------------------------------------------------------------------------------------

    def _receive_method(self, number: int, channel: _Channel, payload: bytes) -> Event | None:
        if channel.content is not None:
            raise RemoteProtocolError("a method in the middle of a message")
        if len(payload) < 4:
            raise RemoteProtocolError("a method frame without a method")
        (method,) = _METHOD.unpack_from(payload)
        if method == methods.BASIC_DELIVER:
            channel.content = Delivery(number, *codec.decode_deliver(payload))
        elif method in {methods.BASIC_ACK, methods.BASIC_NACK}:
            if len(payload) < 13:
                raise RemoteProtocolError(f"malformed {name_of(method)}")
            _, tag, bits = _CONFIRM.unpack_from(payload)
            return Acked(number, tag, bits & 1 == 1, method == methods.BASIC_ACK)
        elif method == methods.BASIC_RETURN:
            channel.content = Returned(number, *decode_arguments(method, payload))
        elif method == methods.BASIC_GET_OK:
            tag, redelivered, exchange, key, _ = decode_arguments(method, payload)
            channel.content = Got(number, "", tag, redelivered, exchange, key)
        elif method == methods.CHANNEL_CLOSE:
            return self._channel_closed(number, payload)
        elif method == methods.CHANNEL_FLOW:
            self._send(number, methods.CHANNEL_FLOW_OK, *decode_arguments(method, payload))
        elif method in _FOR_CHANNELS:
            return MethodReceived(number, method, decode_arguments(method, payload))
        else:
            raise RemoteProtocolError(f"{name_of(method)} on channel {number}")
        return None

    def _receive_header(self, channel: _Channel, content: Content, payload: bytes) -> bool:
        if channel.missing is not None:
            raise RemoteProtocolError("a second content header for one message")
        if len(payload) < 14:
            raise RemoteProtocolError("malformed content header")
        class_id, _weight, size = _HEADER.unpack_from(payload)
        if class_id != 60:
            raise RemoteProtocolError(f"a content header of class {class_id}")
        if size > self.config.max_body_size:
            content.oversize = size
        content.content = payload
        channel.missing = size
        return not size

    def _channel_closed(self, number: int, payload: bytes) -> Event:
        code, text, _class, _method = decode_arguments(methods.CHANNEL_CLOSE, payload)
        self._send(number, methods.CHANNEL_CLOSE_OK)
        self._forget_channel(number)
        return ChannelClosed(number, code, text)

    def _forget_channel(self, number: int) -> None:
        del self._channels[number]
        self._free.append(number)

    # -- everything else -----------------------------------------------------------------------------------------------

    def _receive_uncommon(
        self, kind: int, number: int, channel: _Channel | None, payload: bytes
    ) -> Event | None:
        """Take a frame for channel 0, for a channel that is not open, or on a connection that is not."""
        method = _METHOD.unpack_from(payload)[0] if kind == codec.FRAME_METHOD and len(payload) >= 4 else 0
        if self.state is State.CLOSING and (number or method not in _CLOSES):
            return None
        if number == 0:
            handle = _TRANSITIONS.get((self.state, method))
            if handle is None:
                what = name_of(method) if method else f"a frame of type {kind}"
                raise RemoteProtocolError(f"{what} on channel 0 in state {self.state.name}")
            return handle(self, decode_arguments(method, payload))
        if channel is None:
            raise RemoteProtocolError(f"a frame for channel {number}, which does not exist")
        if channel.state is State.OPENING:
            if method == methods.CHANNEL_CLOSE:
                return self._channel_closed(number, payload)
            if method != methods.CHANNEL_OPEN_OK:
                raise RemoteProtocolError(f"a frame for channel {number}, which is not open yet")
            channel.state = State.OPEN
            return MethodReceived(number, method, [])
        if method == methods.CHANNEL_CLOSE:
            self._send(number, methods.CHANNEL_CLOSE_OK)  # both sides at once; ours is still to be answered
        elif method == methods.CHANNEL_CLOSE_OK:
            self._forget_channel(number)
            return MethodReceived(number, method, [])
        return None

    def _start(self, arguments: list[Any]) -> None:
        major, minor, self.server_properties, mechanisms, locales = arguments
        if (major, minor) != (0, 9):
            raise RemoteProtocolError(f"the server speaks AMQP {major}-{minor}, not 0-9")
        mechanism, response = choose_login(self.config, mechanisms.split())
        properties = {
            "product": "twistedcelery",
            "version": _VERSION,
            "platform": f"Python {platform.python_version()}",
            **self.config.client_properties,
        }
        properties["capabilities"] = {**_CAPABILITIES, **(properties.get("capabilities") or {})}
        locale = "en_US" if "en_US" in locales.split() else (locales.split() or ["en_US"])[0]
        self._send(0, methods.CONNECTION_START_OK, properties, mechanism, response, locale)
        self.state = State.STARTING

    def _secure(self, arguments: list[Any]) -> None:
        raise AuthenticationFailed("the login method asks for more than one response, which is not supported")

    def _tune(self, arguments: list[Any]) -> None:
        channel_max, frame_max, heartbeat = arguments
        if frame_max and frame_max < 4096:
            raise RemoteProtocolError(
                f"the server's frame_max is {frame_max}; AMQP demands 4096 bytes at least"
            )
        config = self.config
        self.channel_max = min(config.channel_max or 65535, channel_max or 65535)
        self.frame_max = _lower(config.frame_max, frame_max) or _DEFAULT_FRAME_MAX
        # 0 from us switches it off, as with py-amqp; 0 from the server leaves it to us.
        self.heartbeat = _lower(math.ceil(config.heartbeat), heartbeat) if config.heartbeat else 0
        self._send(0, methods.CONNECTION_TUNE_OK, self.channel_max, self.frame_max, self.heartbeat)
        self._send(0, methods.CONNECTION_OPEN, config.virtual_host, "", False)
        self.state = State.OPENING

    def _open_ok(self, arguments: list[Any]) -> Event:
        self.state = State.OPEN
        return Opened()

    def _blocked(self, arguments: list[Any]) -> Event:
        return Blocked(arguments[0])

    def _unblocked(self, arguments: list[Any]) -> Event:
        return Unblocked()

    def _closed_by_server(self, arguments: list[Any]) -> Event:
        code, text, class_id, method_id = arguments
        told = f"{code} {text}"
        url = self.config.url
        error: Exception | None
        if self.state is State.CLOSING:
            error = None
        elif self.state is State.STARTING and code == _LOGIN_REFUSED:
            error = AuthenticationFailed(told, url=url)
        elif self.state is State.OPENING and code in _VIRTUAL_HOST_REFUSED and "connection limit" not in text:
            # RabbitMQ's limits on connections have code 530 as well, but pass.
            error = VirtualHostNotFound(told, url=url)
        else:
            error = ConnectionLost(f"closed by the server: {told}", url=url)
            error.code = code
        self._send(0, methods.CONNECTION_CLOSE_OK)
        self.abandon()
        if error is None:
            return Closed(None, orderly=True)
        return Closed(error, orderly=True, method=class_id << 16 | method_id, code=code, text=text)

    def _close_ok(self, arguments: list[Any]) -> Event:
        self.abandon()
        return Closed(None, orderly=True)

    def _send(self, channel: int, method: int, *arguments: Any) -> None:
        self._write(encode_method(channel, method, arguments))


def _lower(ours: int, theirs: int) -> int:
    """The lower of two limits of which 0 means none."""
    return min(ours, theirs) if ours and theirs else ours or theirs


def _receive_body(channel: _Channel, content: Content, payload: bytes) -> bool:
    if channel.missing is None:
        raise RemoteProtocolError("a content body without its header")
    channel.missing -= len(payload)
    if channel.missing > 0:
        if payload and not content.oversize:
            channel.chunks.append(payload)
        return False
    if channel.missing < 0:
        raise RemoteProtocolError("a message longer than its header says")
    if content.oversize:
        return True
    if channel.chunks:
        channel.chunks.append(payload)
        content.body = b"".join(channel.chunks)
        channel.chunks.clear()
    else:
        content.body = payload
    return True


def _describe_garbage(head: bytes, frame_max: int) -> str:
    if head[:2] == b"\x15\x03":
        return "the server answers with a TLS alert: this port expects TLS"
    if head[0] in _FRAME_KINDS:
        return f"a frame longer than the {frame_max} bytes that are allowed"
    if head[:4] == b"AMQP":  # the answer to a version that the server does not speak (4.2.2)
        return f"the server wants protocol version {'-'.join(map(str, head[4:]))}, not 0-0-9-1"
    return f"the server does not speak AMQP: {head!r}"


_FRAME_KINDS: Final = frozenset(
    (codec.FRAME_METHOD, codec.FRAME_HEADER, codec.FRAME_BODY, codec.FRAME_HEARTBEAT)
)
_CLOSES: Final = frozenset((methods.CONNECTION_CLOSE, methods.CONNECTION_CLOSE_OK))

#: What a server may send on an open channel, beside what `_receive_method` sees to itself.
_FOR_CHANNELS: Final = frozenset(
    (
        methods.EXCHANGE_DECLARE_OK,
        methods.EXCHANGE_BIND_OK,
        methods.QUEUE_DECLARE_OK,
        methods.QUEUE_BIND_OK,
        methods.QUEUE_PURGE_OK,
        methods.QUEUE_DELETE_OK,
        methods.QUEUE_UNBIND_OK,
        methods.BASIC_QOS_OK,
        methods.BASIC_CONSUME_OK,
        methods.BASIC_CANCEL,
        methods.BASIC_CANCEL_OK,
        methods.BASIC_GET_EMPTY,
        methods.CONFIRM_SELECT_OK,
    )
)

_TRANSITIONS: Final[dict[tuple[State, int], Callable[[Connection, list[Any]], Event | None]]] = {
    (State.HEADER_SENT, methods.CONNECTION_START): Connection._start,
    (State.HEADER_SENT, methods.CONNECTION_CLOSE): Connection._closed_by_server,
    (State.STARTING, methods.CONNECTION_SECURE): Connection._secure,
    (State.STARTING, methods.CONNECTION_TUNE): Connection._tune,
    (State.STARTING, methods.CONNECTION_CLOSE): Connection._closed_by_server,
    (State.OPENING, methods.CONNECTION_OPEN_OK): Connection._open_ok,
    (State.OPENING, methods.CONNECTION_CLOSE): Connection._closed_by_server,
    (State.OPEN, methods.CONNECTION_BLOCKED): Connection._blocked,
    (State.OPEN, methods.CONNECTION_UNBLOCKED): Connection._unblocked,
    (State.OPEN, methods.CONNECTION_CLOSE): Connection._closed_by_server,
    (State.CLOSING, methods.CONNECTION_CLOSE): Connection._closed_by_server,
    (State.CLOSING, methods.CONNECTION_CLOSE_OK): Connection._close_ok,
}
