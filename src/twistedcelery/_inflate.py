"""Compressed replies: decompressed within a bound, in a thread where it takes its time, handed over in the order in which they came.

kombu's own ways of decompressing have no bound: a few kilobytes can become gigabytes, while the reactor waits. The decompressors of the standard
library can be told where to stop, and so can those of newer brotli and zstd; they stand in for the functions that kombu has registered. Any
other way that is registered there is used as it is, and what comes out is measured afterwards.
"""

from __future__ import annotations

import sys
import zlib
from collections import deque
from contextlib import suppress
from functools import partial
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeAlias

from kombu.compression import get_decoder
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from ._slices import SLICE
from .errors import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.interfaces import IDelayedCall

__all__ = ["InOrder", "in_thread", "inflate"]

#: Bytes that are decompressed at once, in the reactor's thread: a fraction of a millisecond with zlib.
_AT_ONCE = 64 * 1024
#: Bytes of a compressed body that is not even tried there.
_SMALL = 16 * 1024
#: Bytes that lzma may take for itself: twice what its strongest preset does.
_LZMA_MEMORY = 128 * 1024 * 1024

#: Called with a body, or with why there is none.
Take: TypeAlias = "Callable[[Any], object]"

#: Bytes that go in, and come out, at once: so a thread leaves the reactor its turns, and of what is too large little is made in vain.
_IN, _OUT = 64 * 1024, 1024 * 1024

#: Decompresses at most so many bytes, or raises `_TooLarge`.
_Bounded: TypeAlias = "Callable[[bytes, int], bytes]"


class _TooLarge(ValueError):
    def __init__(self, limit: int) -> None:
        super().__init__(f"it has more than {limit} bytes once it is decompressed (inflate_limit)")


def inflate(body: bytes, compression: str, limit: int) -> bytes:
    """Decompress a body; ``compression`` is a name or a content type of `kombu.compression`.

    Raises ValueError for one that is not registered, and where more than ``limit`` bytes come out, which are then not made, as
    far as the way of decompressing can be told to; else what that raises.
    """
    try:
        decoder = get_decoder(compression)  # type: ignore[no-untyped-call]
    except (KeyError, TypeError):
        raise ValueError(
            f"it is compressed with {compression!r:.80}, which is not registered with kombu.compression here"
        ) from None
    bounded = _BOUNDED.get(decoder)
    inflated: bytes = decoder(body) if bounded is None else bounded(body, limit)
    if len(inflated) > limit:
        raise _TooLarge(limit)
    return inflated


class _Parts:
    """What has come out so far."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._parts: list[bytes] = []

    def add(self, part: bytes) -> None:
        self._parts.append(part)
        self._size += len(part)
        if self._size > self._limit:
            raise _TooLarge(self._limit)

    def joined(self) -> bytes:
        return b"".join(self._parts)


def _with(make: Callable[[], Any]) -> _Bounded:
    """Decompress with an object of the standard library's kind, from its factory."""

    def bounded(body: bytes, limit: int) -> bytes:
        decompressor, parts = make(), _Parts(limit)
        for start in range(0, len(body), _IN):
            data = body[start : start + _IN]
            more = True
            while more and not decompressor.eof:
                part = decompressor.decompress(data, _OUT)
                parts.add(part)
                # zlib gives back what it has not taken; the others keep it.
                data = getattr(decompressor, "unconsumed_tail", b"")
                more = len(part) == _OUT
            if decompressor.eof:
                if decompressor.unused_data or start + _IN < len(body):
                    raise ValueError("there is something behind the compressed data")
                return parts.joined()
        raise EOFError("the compressed data ends too early")

    return bounded


def _brotli(make: Callable[[], Any]) -> _Bounded:
    def bounded(body: bytes, limit: int) -> bytes:
        decompressor, parts = make(), _Parts(limit)
        parts.add(decompressor.process(body, output_buffer_limit=_OUT))
        while not decompressor.is_finished():
            part = decompressor.process(b"", output_buffer_limit=_OUT)
            if not part:
                raise EOFError("the compressed data ends too early")
            parts.add(part)
        return parts.joined()

    return bounded


def _zstandard(body: bytes, limit: int) -> bytes:
    """Decompress with the module that older versions of kombu use; it does not tell where the data ends too early."""
    with import_module("zstandard").ZstdDecompressor().stream_reader(body) as reader:
        inflated: bytes = reader.read(limit + 1)
        return inflated


def _known() -> dict[Any, _Bounded]:
    """What stands in for the functions that kombu registers by itself, as far as they are there."""
    known: dict[Any, _Bounded] = {zlib.decompress: _with(zlib.decompressobj)}
    with suppress(ImportError):
        bz2 = import_module("bz2")
        known[bz2.decompress] = _with(bz2.BZ2Decompressor)
    with suppress(ImportError):
        lzma = import_module("lzma")
        known[lzma.decompress] = _with(lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY))
    with suppress(ImportError):
        zstd = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
        known[zstd.decompress] = _with(zstd.ZstdDecompressor)
    with suppress(AttributeError):
        # Older versions of kombu have a function of their own.
        known[import_module("kombu.compression").zstd_decompress] = _zstandard
    for name in ("brotli", "brotlicffi"):
        with suppress(ImportError, AttributeError, TypeError):
            brotli = import_module(name)
            # Older ones know no limit, and are used as they are.
            brotli.Decompressor().process(b"", output_buffer_limit=1)
            known[brotli.decompress] = _brotli(brotli.Decompressor)
    return known


#: kombu's function -> what decompresses the same within a bound.
_BOUNDED = _known()


def in_thread(work: Callable[[], object]) -> None:
    """Do this in a thread of its own.

    Those of the reactor's pool may all be waiting for results; a program that ends without stopping the reactor is not held.
    """
    Thread(target=work, name="twistedcelery", daemon=True).start()


class InOrder:
    """Hands bodies over in the order in which they came, decompressed, big ones after a thread has seen to that.

    One at a time: so no more than ``limit`` bytes are being made at once, and the others wait behind it.
    """

    log = Logger()

    def __init__(self, clock: Any, limit: int) -> None:
        self._clock = clock
        self._limit = limit
        self._line: deque[tuple[Any, str | None, Take]] = deque()
        #: The one that is in a thread.
        self._first: Take | None = None
        self._call: IDelayedCall | None = None
        #: Whether some wait, or are being handed over.
        self._busy = False
        self._stopped = False
        self._waiting: list[Deferred[None]] = []
        #: Bytes, as they came, of those that wait in line.
        self.bytes = 0
        #: Called when all have been handed over that had to wait.
        self.on_idle: Callable[[], object] = _nothing

    @property
    def idle(self) -> bool:
        """Whether none waits: what comes now is first."""
        return not self._busy

    def put(self, body: Any, compression: str | None, take: Take) -> None:
        """Call ``take`` with the body, or with the error that decompressing it ended with; maybe before this returns."""
        if self._busy:
            self._line.append((body, compression, take))
            self.bytes += len(body)
        elif not self._hand_over(body, compression, take):
            self._busy = True

    def _hand_over(self, body: Any, compression: str | None, take: Take) -> bool:
        """Hand one over at once, or begin with it in a thread and give False."""
        if compression is not None and self._stopped:
            body = _stopped()
        elif compression is not None:
            try:
                if len(body) > _SMALL:
                    raise _TooLarge(_SMALL)
                body = inflate(body, compression, min(_AT_ONCE, self._limit))
            except _TooLarge:
                self._first = take
                try:
                    in_thread(partial(self._inflate, body, compression))
                except RuntimeError as error:  # there can be no more threads
                    self._first, body = None, error
                else:
                    return False
            except Exception as error:  # noqa: BLE001  # whatever a peer sends, and whatever a decoder of the user's raises
                body = error
        self._tell(take, body)
        return True

    def _tell(self, take: Take, body: Any) -> None:
        try:
            take(body)
        except Exception:  # noqa: BLE001  # a bug there must not keep the others from being handed over
            self.log.failure("bug in what takes a reply")

    def _inflate(self, body: bytes, compression: str) -> None:
        """Decompress, in a thread."""
        found: Any
        try:
            found = inflate(body, compression, self._limit)
        except Exception as error:  # noqa: BLE001  # whatever a peer sends, and whatever a decoder of the user's raises
            found = error
        except BaseException as error:  # noqa: BLE001  # one that panics; those behind must not wait for ever
            found = ValueError(f"what decompresses it has ended with {error!r}")
        self._clock.callFromThread(self._inflated, found)

    def _inflated(self, body: Any) -> None:
        """The thread is done with the first."""
        first, self._first = self._first, None
        if first is not None:
            self._tell(first, body)
            self._go_on()

    def _go_on(self) -> None:
        self._call = None
        line = self._line
        end = self._clock.seconds() + SLICE
        while line:
            body, compression, take = line.popleft()
            self.bytes -= len(body)
            if not self._hand_over(body, compression, take):
                return
            if line and self._clock.seconds() > end:
                self._call = self._clock.callLater(0, self._go_on)
                return
        self._busy = False
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)
        self.on_idle()

    def flush(self, timeout: float) -> Deferred[None]:
        """Fire with None when all have been handed over, at the latest after ``timeout`` seconds."""
        if not self._busy:
            return succeed(None)
        waiter: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        return waiter.addTimeout(timeout, self._clock).addErrback(_nothing)

    def stop(self) -> None:
        """Give up what waits: each is told `Stopped`."""
        self._stopped = True
        self.on_idle = _nothing
        if self._call is not None:
            self._call.cancel()
            self._call = None
        first, self._first = self._first, None
        if first is not None:
            self._tell(first, _stopped())
        while self._line:
            _, _, take = self._line.popleft()
            self._tell(take, _stopped())
        self.bytes = 0
        self._busy = False
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)


def _stopped() -> Stopped:
    return Stopped("stopped before the reply was decompressed")


def _nothing(*args: object) -> None:
    """Do nothing."""
