"""Large values for Redis that are made piece by piece, as they are written: no copy of the whole is ever made."""

from __future__ import annotations

from binascii import b2a_base64
from typing import TYPE_CHECKING, Any

import hiredis

from .._pace import WRITE, slices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Pieces", "pack_in_pieces"]

#: Bytes whose Base64 is `WRITE` bytes long; without padding, as three make four.
_BITE = WRITE // 4 * 3


class Pieces:
    """The Base64 of ``body`` between ``head`` and ``tail``, as an argument of a command."""

    __slots__ = ("_body", "_head", "_tail")

    def __init__(self, head: bytes, body: bytes, tail: bytes) -> None:
        self._head = head
        self._body = body
        self._tail = tail

    def __len__(self) -> int:
        return len(self._head) + (len(self._body) + 2) // 3 * 4 + len(self._tail)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        for bite in slices(self._body, _BITE):
            yield b2a_base64(bite, newline=False)
        yield self._tail


def pack_in_pieces(commands: Sequence[tuple[Any, ...]]) -> Iterator[bytes]:
    """Encode commands (RESP: arrays of bulk strings) whose arguments may be `Pieces`.

    Raises TypeError for arguments of other types that Redis cannot take, before the first piece is asked for.
    """
    parts: list[bytes | Pieces] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            if isinstance(argument, Pieces):
                parts += (b"$%d\r\n" % len(argument), argument, b"\r\n")
            else:
                parts.append(hiredis.pack_command((argument,)).partition(b"\r\n")[2])
    return _flat(parts)


def _flat(parts: list[bytes | Pieces]) -> Iterator[bytes]:
    for part in parts:
        if isinstance(part, bytes):
            yield part
        else:
            yield from part
