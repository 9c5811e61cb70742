"""Field tables and arrays (AMQP 0-9-1, 4.2.5.5), as Celery's workers read them.

The letters of the specification, of RabbitMQ and of py-amqp differ. Workers decode headers with py-amqp, which up to
5.3.1 read ``s`` as a string and ``b`` as unsigned, so a client that writes "the smallest integer that fits"
turns 300 into ``','`` there. Hence: **write** exactly py-amqp's letters, **read** all of RabbitMQ's.

======  ==============================  ==========================================
letter  meaning                         written for
======  ==============================  ==========================================
t       boolean                         ``bool``
I       32-bit signed                   ``int`` within +-2147483647
L       64-bit signed                   any other ``int``
d       64-bit float                    ``float``
D       scale octet, 32-bit signed      ``decimal.Decimal``
S       string with 32-bit length       ``str`` (UTF-8), ``bytes``
T       64-bit seconds since the epoch  ``datetime`` (a naive one is UTC)
A       array                           ``list``, ``tuple``
F       table                           ``dict``
V       void                            ``None``
b B     8-bit signed, unsigned          never
s u     16-bit signed, unsigned         never
U       16-bit signed                   never
i       32-bit unsigned                 never
l       64-bit signed                   never
f       32-bit float                    never
x       bytes with 32-bit length        never
======  ==============================  ==========================================
"""

from __future__ import annotations

import calendar
from datetime import datetime, timedelta
from decimal import Decimal
from math import isfinite
from struct import Struct, error
from typing import TYPE_CHECKING, Any, Final

from ..errors import LocalProtocolError, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["MAX_DEPTH", "decode_table", "encode_table"]

#: Tables within tables: a bound on the recursion, either way. Celery's deepest headers (nested stamps) need a handful.
MAX_DEPTH: Final = 64

_INT32_MAX: Final = 2147483647  # py-amqp writes -2147483648 as L as well
_EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001  # py-amqp hands out naive UTC

_U32: Final = Struct(">I")
_STRING: Final = Struct(">cI")
_INT: Final = Struct(">ci")
_LONG: Final = Struct(">cq")
_DOUBLE: Final = Struct(">cd")
_DECIMAL: Final = Struct(">cBi")
_TIMESTAMP: Final = Struct(">cQ")

#: Encoded names. Celery's are a few dozen; the bound is for programs that make up their own.
_names: dict[str, bytes] = {}
#: And decoded ones; at most 255 bytes each.
_known_names: dict[bytes, str] = {}
_NAMES_KEPT: Final = 1024


def encode_table(table: Mapping[str, Any]) -> bytes:
    """Encode a table with its 32-bit length, byte for byte as py-amqp does.

    :raises LocalProtocolError: for a value that AMQP cannot carry; the message names its key.
    """
    out: list[bytes] = []
    _write_table(table, out, 0)
    return b"".join(out)


def _write_table(table: Mapping[Any, Any], out: list[bytes], depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise LocalProtocolError(f"a table is nested more than {MAX_DEPTH} deep")
    items: list[bytes] = []
    append = items.append
    for key, value in table.items():
        try:
            append(_names[key])
        except (KeyError, TypeError):
            append(_encode_name(key))
        kind = type(value)
        if kind is str:
            try:
                text = value.encode()
            except UnicodeEncodeError:
                text = value.encode("utf-8", "surrogatepass")
            append(_STRING.pack(b"S", len(text)))
            append(text)
        elif value is None:
            append(b"V")
        else:
            try:
                _write_value(value, items, depth)
            except LocalProtocolError as problem:
                raise LocalProtocolError(f"{key!r}: {problem.message}") from None
    _append_counted(items, out)


def _append_counted(items: list[bytes], out: list[bytes]) -> None:
    content = b"".join(items)
    out.append(_U32.pack(len(content)))
    out.append(content)


def _encode_name(key: object) -> bytes:
    if isinstance(key, str):
        name = key.encode("utf-8", "surrogatepass")
    elif isinstance(key, bytes):
        name = key
    else:
        raise LocalProtocolError(f"the key {key!r} of a table is a {type(key).__name__}, not a str")
    if len(name) > 255:
        raise LocalProtocolError(f"the key {key[:40]!r}... of a table is longer than 255 bytes")
    encoded = bytes((len(name),)) + name
    if type(key) is str:
        if len(_names) >= _NAMES_KEPT:
            _names.clear()
        _names[key] = encoded
    return encoded


def _write_value(value: Any, out: list[bytes], depth: int) -> None:
    """Write letter and value. The order of the tests is py-amqp's: a bool is an int, too."""
    try:
        if isinstance(value, str | bytes):
            text = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
            out.append(_STRING.pack(b"S", len(text)))
            out.append(text)
        elif isinstance(value, bool):
            out.append(b"t\x01" if value else b"t\x00")
        elif isinstance(value, float):
            if not isfinite(value):
                raise ValueError(f"{value} makes RabbitMQ end the connection")
            out.append(_DOUBLE.pack(b"d", value))
        elif isinstance(value, int):
            if -_INT32_MAX <= value <= _INT32_MAX:
                out.append(_INT.pack(b"I", value))
            else:
                out.append(_LONG.pack(b"L", value))
        elif isinstance(value, Decimal):
            sign, digits, exponent = value.as_tuple()
            number = int("".join(map(str, digits)))
            out.append(_DECIMAL.pack(b"D", -exponent, -number if sign else number))  # type: ignore[operator]  # 'F' of Infinity: the TypeError is meant
        elif isinstance(value, datetime):
            out.append(_TIMESTAMP.pack(b"T", calendar.timegm(value.utctimetuple())))
        elif isinstance(value, dict):
            out.append(b"F")
            _write_table(value, out, depth + 1)
        elif isinstance(value, list | tuple):
            if depth + 1 >= MAX_DEPTH:
                raise LocalProtocolError(f"an array is nested more than {MAX_DEPTH} deep")
            out.append(b"A")
            items: list[bytes] = []
            for item in value:
                _write_value(item, items, depth + 1)
            _append_counted(items, out)
        elif value is None:
            out.append(b"V")
        else:
            raise LocalProtocolError(f"AMQP tables cannot carry a {type(value).__name__}")
    except (error, TypeError, OverflowError, ValueError) as problem:
        # A number of more than 64 bits, a Decimal that is not finite, a date before 1970 ...
        raise LocalProtocolError(
            f"AMQP tables cannot carry this {type(value).__name__}: {problem}"
        ) from problem


def decode_table(data: bytes, offset: int = 0, depth: int = 0) -> tuple[dict[str, Any], int]:
    """Decode the table (32-bit length, then names and values) at ``offset``; return it and where it ends.

    Strings that are not UTF-8 stay bytes, as with py-amqp; so do such names.

    :raises RemoteProtocolError: if the bytes are not a table, or one nested deeper than `MAX_DEPTH`.
    """
    try:
        return _read_table(data, offset, depth)
    except (error, IndexError, KeyError) as problem:
        raise RemoteProtocolError(f"malformed table: {problem!r}") from problem


def _end_of(data: bytes, offset: int, depth: int) -> int:
    """Read the length of a table or array and return where it ends."""
    if depth >= MAX_DEPTH:
        raise RemoteProtocolError(f"a table is nested more than {MAX_DEPTH} deep")
    end: int = offset + 4 + _U32.unpack_from(data, offset)[0]
    if end > len(data):
        raise RemoteProtocolError("malformed table: it is longer than what holds it")
    return end


def _check_end(offset: int, end: int) -> None:
    if offset != end:
        raise RemoteProtocolError("malformed table: a value is longer than what holds it")


def _read_table(data: bytes, offset: int, depth: int) -> tuple[dict[str, Any], int]:
    end = _end_of(data, offset, depth)
    offset += 4
    table: dict[str, Any] = {}
    while offset < end:
        start = offset + 1
        offset = start + data[offset]
        raw = data[start:offset]
        # A name that is not UTF-8 stays bytes: an oddity of some other client, and nobody asks for it.
        name: Any = _known_names.get(raw) or _decode_name(raw)
        letter = data[offset]
        if letter == 83:  # S
            start = offset + 5
            offset = start + _U32.unpack_from(data, offset + 1)[0]
            raw = data[start:offset]
            try:
                table[name] = raw.decode()
            except UnicodeDecodeError:
                table[name] = _text(raw)
        elif letter == 86:  # V
            table[name] = None
            offset += 1
        else:
            table[name], offset = _READERS[letter](data, offset + 1, depth)
    _check_end(offset, end)
    return table, end


def _decode_name(raw: bytes) -> str | bytes:
    name = _text(raw)
    if isinstance(name, str):
        if len(_known_names) >= _NAMES_KEPT:
            _known_names.clear()
        _known_names[raw] = name
    return name


def _text(raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return raw


def _read_array(data: bytes, offset: int, depth: int) -> tuple[list[Any], int]:
    end = _end_of(data, offset, depth)
    offset += 4
    array: list[Any] = []
    while offset < end:
        value, offset = _READERS[data[offset]](data, offset + 1, depth)
        array.append(value)
    _check_end(offset, end)
    return array, end


def _read_string(data: bytes, offset: int, depth: int) -> tuple[str | bytes, int]:
    raw, offset = _read_bytes(data, offset, depth)
    return _text(raw), offset


def _read_bytes(data: bytes, offset: int, depth: int) -> tuple[bytes, int]:
    end = offset + 4 + _U32.unpack_from(data, offset)[0]
    return data[offset + 4 : end], end


def _read_void(data: bytes, offset: int, depth: int) -> tuple[None, int]:
    return None, offset


def _read_decimal(data: bytes, offset: int, depth: int) -> tuple[Decimal, int]:
    scale, number = _SCALED.unpack_from(data, offset)
    return Decimal(number).scaleb(-scale), offset + 5


def _read_timestamp(data: bytes, offset: int, depth: int) -> tuple[datetime | int, int]:
    (seconds,) = _U64.unpack_from(data, offset)
    try:
        return _EPOCH + timedelta(seconds=seconds), offset + 8
    except OverflowError:
        return (
            seconds,
            offset + 8,
        )  # past the year 9999: legal on the wire, so no reason to drop the connection


def _number(format: str) -> Callable[[bytes, int, int], tuple[Any, int]]:  # noqa: A002  # struct's word
    numbers = Struct(format)
    unpack, size = numbers.unpack_from, numbers.size

    def read(data: bytes, offset: int, depth: int) -> tuple[Any, int]:
        return unpack(data, offset)[0], offset + size

    return read


_SCALED: Final = Struct(">Bi")
_U64: Final = Struct(">Q")
_READERS: Final[dict[int, Callable[[bytes, int, int], tuple[Any, int]]]] = {
    ord(letter): reader
    for letter, reader in {
        "t": _number(">?"),
        "b": _number(">b"),
        "B": _number(">B"),
        "s": _number(">h"),
        "U": _number(">h"),
        "u": _number(">H"),
        "I": _number(">i"),
        "i": _number(">I"),
        "l": _number(">q"),
        "L": _number(">q"),
        "f": _number(">f"),
        "d": _number(">d"),
        "D": _read_decimal,
        "S": _read_string,
        "x": _read_bytes,
        "A": lambda data, offset, depth: _read_array(data, offset, depth + 1),
        "F": lambda data, offset, depth: _read_table(data, offset, depth + 1),
        "T": _read_timestamp,
        "V": _read_void,
    }.items()
}
