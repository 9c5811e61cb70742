"""What travels with every message, as pure functions over bytes: publish, content headers, deliver, return, ack.

All other methods are in `methods`. A message is a method frame, a content header frame and as many body frames as its
size needs (AMQP 0-9-1, 4.2.6); properties are a word of flags and the values that are present.
"""

from __future__ import annotations

from struct import Struct, error
from typing import TYPE_CHECKING, Any, Final

from .._pace import slices
from ..errors import LocalProtocolError, RemoteProtocolError
from .methods import BASIC_ACK, BASIC_NACK, BASIC_PUBLISH, BASIC_REJECT
from .tables import decode_table, encode_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "FRAME_BODY",
    "FRAME_END",
    "FRAME_HEADER",
    "FRAME_HEARTBEAT",
    "FRAME_METHOD",
    "FRAME_OVERHEAD",
    "HEARTBEAT",
    "PROTOCOL_HEADER",
    "decode_deliver",
    "decode_properties",
    "encode_ack",
    "encode_nack",
    "encode_properties",
    "encode_publish",
    "encode_reject",
]

PROTOCOL_HEADER: Final = b"AMQP\x00\x00\x09\x01"
FRAME_METHOD: Final = 1
FRAME_HEADER: Final = 2
FRAME_BODY: Final = 3
FRAME_HEARTBEAT: Final = 8
FRAME_END: Final = 0xCE
#: Type, channel, size before the payload, the end octet after it.
FRAME_OVERHEAD: Final = 8
HEARTBEAT: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"

_OCTET: Final = Struct("B")
_U64: Final = Struct(">Q")
_TAG_BIT: Final = Struct(">QB")
_FLAGS: Final = Struct(">H")
_TAG_FRAME: Final = Struct(">BHIIQBB")  # ack, nack, reject: one frame of one size
_PUBLISH_HEAD: Final = Struct(">BHIIH")
#: End of the method frame; then head, class 60, weight 0 and body size of the header frame.
_HEADER_HEAD: Final = Struct(">BBHIHHQ")
#: End of the frame before; then the head of a body frame.
_BODY_HEAD: Final = Struct(">BBHI")

_OCTETS: Final = tuple(bytes((n,)) for n in range(256))

#: The properties but for ``headers`` and ``timestamp``: flag and name, in the order of the wire.
_BEFORE_HEADERS: Final = ((0x8000, "content_type"), (0x4000, "content_encoding"))
_NUMBERS: Final = ((0x1000, "delivery_mode"), (0x0800, "priority"))
_STRINGS: Final = (
    (0x0400, "correlation_id"),
    (0x0200, "reply_to"),
    (0x0100, "expiration"),
    (0x0080, "message_id"),
)
_AFTER_TIMESTAMP: Final = (
    (0x0020, "type"),
    (0x0010, "user_id"),
    (0x0008, "app_id"),
    (0x0004, "cluster_id"),
)
_HEADERS_FLAG: Final = 0x2000
_TIMESTAMP_FLAG: Final = 0x0040


def _short(value: Any, name: str) -> bytes:
    """Encode a short string as py-amqp does: text or bytes, at most 255 bytes, anything empty as ''."""
    try:
        raw = value.encode() if value.__class__ is str else _uncommon(value, name)
    except UnicodeEncodeError:
        raw = value.encode("utf-8", "surrogatepass")
    try:
        return _OCTETS[len(raw)] + raw
    except IndexError:
        raise LocalProtocolError(f"{name} is longer than 255 bytes") from None


def _uncommon(value: Any, name: str) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return value
    if not value:
        return b""
    raise LocalProtocolError(f"{name} is a {type(value).__name__}, not a str")


def encode_properties(properties: Mapping[str, Any], headers: Mapping[str, Any] | None) -> bytes:
    """Encode property flags and property list (AMQP 0-9-1, 4.2.6.1).

    ``headers`` None: no table; an empty one is sent. Properties that are None or unknown are not sent, as
    with py-amqp. ``timestamp`` is in seconds since the epoch.

    :raises LocalProtocolError: for a value that AMQP cannot carry; the message names it.
    """
    flags = 0
    get = properties.get
    out: list[bytes] = [b""]
    append = out.append
    for flag, name in _BEFORE_HEADERS:
        if (value := get(name)) is not None:
            flags |= flag
            append(_short(value, name))
    if headers is not None:
        flags |= _HEADERS_FLAG
        append(encode_table(headers))
    for flag, name in _NUMBERS:
        if (value := get(name)) is not None:
            flags |= flag
            try:
                append(_OCTET.pack(value))
            except error:
                raise LocalProtocolError(f"{name} is {value!r:.40}, not a number from 0 to 255") from None
    for flag, name in _STRINGS:
        if (value := get(name)) is not None:
            flags |= flag
            append(_short(value, name))
    if (value := get("timestamp")) is not None:
        flags |= _TIMESTAMP_FLAG
        try:
            append(_U64.pack(value))
        except error as problem:
            raise LocalProtocolError(f"timestamp: not whole seconds since the epoch: {problem}") from None
    for flag, name in _AFTER_TIMESTAMP:
        if (value := get(name)) is not None:
            flags |= flag
            append(_short(value, name))
    out[0] = _FLAGS.pack(flags)
    return b"".join(out)


def encode_publish(  # called once per message: positions are faster than names
    channel: int,
    exchange: str,
    routing_key: str,
    properties: Mapping[str, Any],
    headers: Mapping[str, Any] | None,
    body: bytes,
    frame_max: int,
    *,
    mandatory: bool = False,
    immediate: bool = False,
) -> bytes | Iterator[bytes]:
    """Encode ``basic.publish`` with its content, all frames in one piece; frame by frame where the body takes several.

    :raises LocalProtocolError: if a value cannot be carried, or properties and headers do not fit a frame.
    """
    content = encode_properties(properties, headers)
    if len(content) + 12 + FRAME_OVERHEAD > frame_max:
        raise LocalProtocolError(
            f"the message's headers and properties take {len(content)} bytes, more than a frame of {frame_max}"
        )
    exchange_field = _short(exchange, "exchange")
    key_field = _short(routing_key, "routing key")
    size = len(body)
    chunks = [
        _PUBLISH_HEAD.pack(FRAME_METHOD, channel, 7 + len(exchange_field) + len(key_field), BASIC_PUBLISH, 0),
        exchange_field,
        key_field,
        _OCTETS[(1 if mandatory else 0) | (2 if immediate else 0)],
        _HEADER_HEAD.pack(FRAME_END, FRAME_HEADER, channel, 12 + len(content), 60, 0, size),
        content,
    ]
    room = frame_max - FRAME_OVERHEAD
    if size > room:
        return _in_frames(b"".join(chunks), channel, body, room)
    if size:
        chunks += (_BODY_HEAD.pack(FRAME_END, FRAME_BODY, channel, size), body)
    chunks.append(b"\xce")
    return b"".join(chunks)


def _in_frames(head: bytes, channel: int, body: bytes, room: int) -> Iterator[bytes]:
    """Yield the frames of a large message; ``head`` is those before the body, but for the last octet."""
    yield head
    for part in slices(body, room):
        yield b"".join((_BODY_HEAD.pack(FRAME_END, FRAME_BODY, channel, len(part)), part))
    yield b"\xce"


def encode_ack(channel: int, delivery_tag: int, *, multiple: bool = False) -> bytes:
    """Encode ``basic.ack``; tag 0 with ``multiple`` means all so far."""
    return _TAG_FRAME.pack(1, channel, 13, BASIC_ACK, delivery_tag, 1 if multiple else 0, FRAME_END)


def encode_nack(channel: int, delivery_tag: int, *, multiple: bool, requeue: bool) -> bytes:
    """Encode ``basic.nack``, RabbitMQ's extension."""
    bits = (1 if multiple else 0) | (2 if requeue else 0)
    return _TAG_FRAME.pack(1, channel, 13, BASIC_NACK, delivery_tag, bits, FRAME_END)


def encode_reject(channel: int, delivery_tag: int, *, requeue: bool) -> bytes:
    """Encode ``basic.reject``."""
    return _TAG_FRAME.pack(1, channel, 13, BASIC_REJECT, delivery_tag, 1 if requeue else 0, FRAME_END)


def decode_deliver(payload: bytes) -> tuple[str, int, bool, str, str]:
    """Decode ``basic.deliver``: consumer tag, delivery tag, redelivered, exchange, routing key.

    Names that are not UTF-8 keep their bytes as surrogate escapes.

    :raises RemoteProtocolError: if the bytes are something else.
    """
    try:
        at = 5 + payload[4]
        delivery_tag, redelivered = _TAG_BIT.unpack_from(payload, at)
        exchange_at = at + 10
        key_at = exchange_at + payload[at + 9] + 1
        end = key_at + payload[key_at - 1]
    except (error, IndexError) as problem:
        raise RemoteProtocolError("malformed basic.deliver") from problem
    if end > len(payload):
        raise RemoteProtocolError("malformed basic.deliver: a field is longer than its frame")
    return (
        payload[5:at].decode("utf-8", "surrogateescape"),
        delivery_tag,
        redelivered & 1 == 1,
        payload[exchange_at : key_at - 1].decode("utf-8", "surrogateescape"),
        payload[key_at:end].decode("utf-8", "surrogateescape"),
    )


def decode_properties(content: bytes, offset: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decode property flags and list; return the properties that are present, and the headers.

    :raises RemoteProtocolError: if the bytes are something else.
    """
    properties: dict[str, Any] = {}
    headers: dict[str, Any] = {}
    try:
        (flags,) = _FLAGS.unpack_from(content, offset)
        offset += 2
        if flags & 0xC000:
            offset = _read_strings(content, offset, flags, _BEFORE_HEADERS, properties)
        if flags & _HEADERS_FLAG:
            headers, offset = decode_table(content, offset)
        for flag, name in _NUMBERS:
            if flags & flag:
                properties[name] = content[offset]
                offset += 1
        if flags & 0x0780:
            offset = _read_strings(content, offset, flags, _STRINGS, properties)
        if flags & _TIMESTAMP_FLAG:
            (properties["timestamp"],) = _U64.unpack_from(content, offset)
            offset += 8
        if flags & 0x003C:
            offset = _read_strings(content, offset, flags, _AFTER_TIMESTAMP, properties)
    except (error, IndexError) as problem:
        raise RemoteProtocolError("malformed content header") from problem
    if flags & 0x0003 or offset > len(content):
        raise RemoteProtocolError("malformed content header: it does not end where its flags say")
    return properties, headers


def _read_strings(
    content: bytes, offset: int, flags: int, names: tuple[tuple[int, str], ...], properties: dict[str, Any]
) -> int:
    for flag, name in names:
        if flags & flag:
            start = offset + 1
            offset = start + content[offset]
            properties[name] = content[start:offset].decode("utf-8", "surrogateescape")
    return offset
