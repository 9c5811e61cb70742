"""The length of arrays, seen before they are parsed: hiredis makes a list of as many items as a header says, whatever that is.

To know an array's header from bytes that only look like one (in a value, or in a line), one has to know where replies begin and end,
and hiredis knows: where it has taken all that it was given, what comes next is the beginning of a reply, or of an item of one.
Nearly nothing looks like the header of a large array, so nearly nothing costs more than the look.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Arrays", "TooLong"]

#: What the headers of all that has items begin with: arrays, and RESP3's sets, pushes, maps and attributes.
_KINDS = (b"*", b"~", b">", b"%", b"|")

#: Digits of a length beyond which it does not matter how it goes on.
_DIGITS = 32


class TooLong(Exception):
    """An array has more items than it may."""


class Arrays:
    """Looks at what a `hiredis.Reader` is about to be fed, for arrays of more than ``limit`` items."""

    __slots__ = ("_headers", "_limit", "_reader", "_searches", "held")

    def __init__(self, reader: Any, limit: int) -> None:
        self._reader = reader
        self._limit = limit
        #: A header of a length that has as many digits as the limit, or more.
        length = rb"[1-9]\d{%d,%d}" % (len(str(limit)) - 1, _DIGITS)
        self._headers = re.compile(rb"[*~>%|]" + length)
        self._searches = [(kind, re.compile(re.escape(kind) + length).search) for kind in _KINDS]
        #: The last bytes that came, if they belong to what is not complete and may become a header.
        self.held = b""

    def pieces(self, data: bytes) -> Iterator[bytes] | tuple[bytes, ...]:
        """Give what is to be fed, in order; the reader has to have no reply left in it before the next piece is asked for.

        Raises `TooLong` where an array follows that may not be parsed.
        """
        if self.held:
            data = self.held + data
            self.held = b""
        if data[-1:] != b"\n":
            # Nothing that ends like this is complete: the end can wait.
            start = _beginning(data)
            self.held = data[start:]
            data = data[:start]
        # "in" is many times as fast as a search.
        for kind, search in self._searches:
            if kind in data and search(data) is not None:
                return self._carefully(data)
        return (data,)

    def _carefully(self, data: bytes) -> Iterator[bytes]:
        has_data = self._reader.has_data
        start = 0
        for header in self._headers.finditer(data):
            if int(header[0][1:]) <= self._limit:
                continue
            at = header.start()
            is_within = True
            if at:
                # A line is taken up with its first byte, whatever comes next: then there is nothing left before that byte either.
                yield data[start : at - 1]
                is_within = has_data()
                yield data[at - 1 : at]
            if is_within and not has_data():
                raise TooLong(
                    f"an array of {header[0][1:].decode()} items, more than the {self._limit} that are allowed"
                )
            start = at
        yield data[start:]


def _beginning(data: bytes) -> int:
    """Give where the last byte is, or the one before what may be the beginning of a header."""
    end = len(data)
    before = data[-_DIGITS - 1 :].rstrip(b"0123456789")
    if before and before[-1:] in _KINDS:
        end -= min(end, _DIGITS + 1) - len(before) + 1
    return max(0, end - 1)
