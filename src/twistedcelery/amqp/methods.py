"""The methods of AMQP 0-9-1 that a client needs, with RabbitMQ's extensions: one table, and their codec.

Arguments are written by py-amqp's ``amqp.serialization.dumps``, which takes the same format letters. They are read here,
because ``loads`` neither checks bounds nor limits nesting, and gives up at a text that the server
cut inside a character (RabbitMQ cuts reply texts at 255 bytes).

Formats: ``b`` bit, ``o`` octet, ``B`` short (16 bits), ``l`` long (32), ``L`` long long (64), ``s`` short string, ``S`` long
string, ``F`` table. Reserved fields of methods that we receive are left out; what follows is not looked at.
The methods that travel with every message (publish, deliver, ack, nack) have a faster way in `codec`.
"""

from __future__ import annotations

from struct import Struct, error
from typing import TYPE_CHECKING, Any, Final

from amqp.serialization import dumps

from ..errors import LocalProtocolError, RemoteProtocolError
from .tables import decode_table, encode_table

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["METHODS", "decode_arguments", "encode_method", "name_of"]

CONNECTION_START: Final = 10 << 16 | 10
CONNECTION_START_OK: Final = 10 << 16 | 11
CONNECTION_SECURE: Final = 10 << 16 | 20
CONNECTION_TUNE: Final = 10 << 16 | 30
CONNECTION_TUNE_OK: Final = 10 << 16 | 31
CONNECTION_OPEN: Final = 10 << 16 | 40
CONNECTION_OPEN_OK: Final = 10 << 16 | 41
CONNECTION_CLOSE: Final = 10 << 16 | 50
CONNECTION_CLOSE_OK: Final = 10 << 16 | 51
CONNECTION_BLOCKED: Final = 10 << 16 | 60
CONNECTION_UNBLOCKED: Final = 10 << 16 | 61
CHANNEL_OPEN: Final = 20 << 16 | 10
CHANNEL_OPEN_OK: Final = 20 << 16 | 11
CHANNEL_FLOW: Final = 20 << 16 | 20
CHANNEL_FLOW_OK: Final = 20 << 16 | 21
CHANNEL_CLOSE: Final = 20 << 16 | 40
CHANNEL_CLOSE_OK: Final = 20 << 16 | 41
EXCHANGE_DECLARE: Final = 40 << 16 | 10
EXCHANGE_DECLARE_OK: Final = 40 << 16 | 11
EXCHANGE_BIND: Final = 40 << 16 | 30
EXCHANGE_BIND_OK: Final = 40 << 16 | 31
QUEUE_DECLARE: Final = 50 << 16 | 10
QUEUE_DECLARE_OK: Final = 50 << 16 | 11
QUEUE_BIND: Final = 50 << 16 | 20
QUEUE_BIND_OK: Final = 50 << 16 | 21
QUEUE_PURGE: Final = 50 << 16 | 30
QUEUE_PURGE_OK: Final = 50 << 16 | 31
QUEUE_DELETE: Final = 50 << 16 | 40
QUEUE_DELETE_OK: Final = 50 << 16 | 41
QUEUE_UNBIND: Final = 50 << 16 | 50
QUEUE_UNBIND_OK: Final = 50 << 16 | 51
BASIC_QOS: Final = 60 << 16 | 10
BASIC_QOS_OK: Final = 60 << 16 | 11
BASIC_CONSUME: Final = 60 << 16 | 20
BASIC_CONSUME_OK: Final = 60 << 16 | 21
BASIC_CANCEL: Final = 60 << 16 | 30
BASIC_CANCEL_OK: Final = 60 << 16 | 31
BASIC_PUBLISH: Final = 60 << 16 | 40
BASIC_RETURN: Final = 60 << 16 | 50
BASIC_DELIVER: Final = 60 << 16 | 60
BASIC_GET: Final = 60 << 16 | 70
BASIC_GET_OK: Final = 60 << 16 | 71
BASIC_GET_EMPTY: Final = 60 << 16 | 72
BASIC_ACK: Final = 60 << 16 | 80
BASIC_REJECT: Final = 60 << 16 | 90
BASIC_NACK: Final = 60 << 16 | 120
CONFIRM_SELECT: Final = 85 << 16 | 10
CONFIRM_SELECT_OK: Final = 85 << 16 | 11

#: ``class << 16 | method`` -> name and format of the arguments.
METHODS: Final[dict[int, tuple[str, str]]] = {
    CONNECTION_START: ("connection.start", "ooFSS"),
    CONNECTION_START_OK: ("connection.start-ok", "FsSs"),
    CONNECTION_SECURE: ("connection.secure", "S"),
    CONNECTION_TUNE: ("connection.tune", "BlB"),
    CONNECTION_TUNE_OK: ("connection.tune-ok", "BlB"),
    CONNECTION_OPEN: ("connection.open", "ssb"),
    CONNECTION_OPEN_OK: ("connection.open-ok", ""),
    CONNECTION_CLOSE: ("connection.close", "BsBB"),
    CONNECTION_CLOSE_OK: ("connection.close-ok", ""),
    CONNECTION_BLOCKED: ("connection.blocked", "s"),
    CONNECTION_UNBLOCKED: ("connection.unblocked", ""),
    CHANNEL_OPEN: ("channel.open", "s"),
    CHANNEL_OPEN_OK: ("channel.open-ok", ""),
    CHANNEL_FLOW: ("channel.flow", "b"),
    CHANNEL_FLOW_OK: ("channel.flow-ok", "b"),
    CHANNEL_CLOSE: ("channel.close", "BsBB"),
    CHANNEL_CLOSE_OK: ("channel.close-ok", ""),
    EXCHANGE_DECLARE: ("exchange.declare", "BssbbbbbF"),
    EXCHANGE_DECLARE_OK: ("exchange.declare-ok", ""),
    EXCHANGE_BIND: ("exchange.bind", "BsssbF"),
    EXCHANGE_BIND_OK: ("exchange.bind-ok", ""),
    QUEUE_DECLARE: ("queue.declare", "BsbbbbbF"),
    QUEUE_DECLARE_OK: ("queue.declare-ok", "sll"),
    QUEUE_BIND: ("queue.bind", "BsssbF"),
    QUEUE_BIND_OK: ("queue.bind-ok", ""),
    QUEUE_PURGE: ("queue.purge", "Bsb"),
    QUEUE_PURGE_OK: ("queue.purge-ok", "l"),
    QUEUE_DELETE: ("queue.delete", "Bsbbb"),
    QUEUE_DELETE_OK: ("queue.delete-ok", "l"),
    QUEUE_UNBIND: ("queue.unbind", "BsssF"),
    QUEUE_UNBIND_OK: ("queue.unbind-ok", ""),
    BASIC_QOS: ("basic.qos", "lBb"),
    BASIC_QOS_OK: ("basic.qos-ok", ""),
    BASIC_CONSUME: ("basic.consume", "BssbbbbF"),
    BASIC_CONSUME_OK: ("basic.consume-ok", "s"),
    BASIC_CANCEL: ("basic.cancel", "sb"),
    BASIC_CANCEL_OK: ("basic.cancel-ok", "s"),
    BASIC_PUBLISH: ("basic.publish", "Bssbb"),
    BASIC_RETURN: ("basic.return", "Bsss"),
    BASIC_DELIVER: ("basic.deliver", "sLbss"),
    BASIC_GET: ("basic.get", "Bsb"),
    BASIC_GET_OK: ("basic.get-ok", "Lbssl"),
    BASIC_GET_EMPTY: ("basic.get-empty", ""),
    BASIC_ACK: ("basic.ack", "Lb"),
    BASIC_REJECT: ("basic.reject", "Lb"),
    BASIC_NACK: ("basic.nack", "Lbb"),
    CONFIRM_SELECT: ("confirm.select", "b"),
    CONFIRM_SELECT_OK: ("confirm.select-ok", ""),
}

_HEAD: Final = Struct(">BHII")
_NUMBERS: Final = {"o": Struct(">B"), "B": Struct(">H"), "l": Struct(">I"), "L": Struct(">Q")}
_LONG_LENGTH: Final = Struct(">I")


def name_of(method: int) -> str:
    """Name a method for people, also one that is not in the table."""
    known = METHODS.get(method)
    return known[0] if known else f"{method >> 16}.{method & 0xFFFF}"


def encode_method(channel: int, method: int, arguments: Sequence[Any] = ()) -> bytes:
    """Encode a method frame (AMQP 0-9-1, 4.2.4).

    :raises LocalProtocolError: for an argument that does not fit its field; a table's key is named.
    """
    name, format = METHODS[method]  # noqa: A001  # py-amqp's word
    # Our own table encoder, for the sake of its errors; "x" (bytes with their length) would copy it once more.
    before, table, after = format.partition("F")
    split = len(before)
    try:
        payload: bytes = dumps(before, arguments[:split])
        if table:
            payload += encode_table(arguments[split] or {})
            payload += dumps(after, arguments[split + 1 :])
    except LocalProtocolError as problem:
        raise LocalProtocolError(f"{name}: {problem.message}") from None
    except (error, TypeError, ValueError, AttributeError) as problem:
        raise LocalProtocolError(f"{name}: arguments that AMQP cannot carry: {problem}") from problem
    return _HEAD.pack(1, channel, len(payload) + 4, method) + payload + b"\xce"


def decode_arguments(method: int, payload: bytes) -> list[Any]:
    """Decode the arguments of a method frame; ``payload`` begins with class and method.

    Texts that are not UTF-8 stay readable: odd bytes become backslash escapes.

    :raises RemoteProtocolError: for a method that is not in the table, or bytes that are not its arguments.
    """
    if method not in METHODS:
        raise RemoteProtocolError(f"unknown method {name_of(method)}")
    name, format = METHODS[method]  # noqa: A001
    values: list[Any] = []
    offset, bit = 4, 8  # bits share an octet until another field comes, or eight are full
    try:
        for letter in format:
            if letter == "b":
                if bit == 8:
                    bit, offset = 0, offset + 1
                values.append(bool(payload[offset - 1] >> bit & 1))
                bit += 1
                continue
            bit = 8
            if letter in _NUMBERS:
                number = _NUMBERS[letter]
                values.append(number.unpack_from(payload, offset)[0])
                offset += number.size
            elif letter == "F":
                table, offset = decode_table(payload, offset)
                values.append(table)
            else:
                if letter == "s":
                    start = offset + 1
                    offset = start + payload[offset]
                else:
                    start = offset + 4
                    offset = start + _LONG_LENGTH.unpack_from(payload, offset)[0]
                values.append(payload[start:offset].decode("utf-8", "backslashreplace"))
    except (error, IndexError) as problem:
        raise RemoteProtocolError(f"malformed {name}") from problem
    if offset > len(payload):
        raise RemoteProtocolError(f"malformed {name}: a field is longer than its frame")
    return values
