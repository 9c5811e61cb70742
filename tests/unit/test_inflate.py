"""Compressed replies: decompressed within a bound, in threads where it takes its time, and in order."""

from __future__ import annotations

import bz2
import lzma
import tracemalloc
import zlib
from queue import SimpleQueue
from random import Random
from threading import Thread, current_thread
from typing import Any

from kombu import compression
from twisted.internet.defer import CancelledError
from twisted.trial.unittest import SynchronousTestCase

from tests.support.threads import ThreadedClock
from twistedcelery import _inflate
from twistedcelery._inflate import InOrder, in_thread, inflate
from twistedcelery.errors import Stopped

#: kombu's names; the last two are there where their modules are.
NAMES = ("zlib", "gzip", "application/x-gzip", "bzip2", "application/x-bz2", "lzma", "xz", "brotli", "zstd")

MIB = 1024 * 1024

#: Does not become smaller.
RANDOM = Random(8).randbytes(200_000)


def compress(body: bytes, name: str = "zlib") -> bytes:
    packed: bytes = compression.compress(body, name)[0]
    return packed


class InflateTests(SynchronousTestCase):
    def names(self):
        there = {*compression._aliases, *compression._decoders}
        return [name for name in NAMES if name in there]

    def test_same(self):
        """What kombu has compressed comes out as it was, up to the limit, and no byte more than that."""
        for name in self.names():
            for body in (b"", b"x", bytes(1000), bytes(range(256)) * 40, bytes(3 * MIB), RANDOM):
                packed = compress(body, name)
                self.assertEqual(inflate(packed, name, max(1, len(body))), body, name)
                if body:
                    error = self.assertRaises(ValueError, inflate, packed, name, len(body) - 1)
                    self.assertIn("inflate_limit", str(error))

    def test_no_more_is_made(self):
        """What is larger than the limit is not made."""
        for name in self.names():
            packed = compress(bytes(20 * MIB), name)
            tracemalloc.start()
            try:
                self.assertRaises(ValueError, inflate, packed, name, MIB)
                self.assertLess(tracemalloc.get_traced_memory()[1], 16 * MIB, name)
            finally:
                tracemalloc.stop()

    def test_cut(self):
        """What ends too early is refused, whatever is missing, and so is what goes on."""
        for name in self.names():
            if _inflate._BOUNDED.get(compression.get_decoder(name)) is _inflate._zstandard:
                continue  # it does not tell; what comes out cannot be decoded then
            packed = compress(b"hello" * 10, name)
            for wrong in (*(packed[:end] for end in range(1, len(packed))), packed + b"x"):
                self.assertTrue(self.refused(wrong, name), name)

    def refused(self, packed, name):
        try:
            inflate(packed, name, 1000)
        except Exception:  # noqa: BLE001  # each has its own
            return True
        return False

    def test_unknown(self):
        """A way that is not registered is refused by name."""
        for name in ("nonsense", ["zlib"], 5):
            error = self.assertRaises(ValueError, inflate, b"x", name, 1000)
            self.assertIn(repr(name), str(error))

    def test_memory_of_lzma(self):
        """What would have lzma take more memory than its presets do is refused; they are not."""
        for preset in (0, 9, 9 | lzma.PRESET_EXTREME):
            self.assertEqual(inflate(lzma.compress(b"x", preset=preset), "lzma", 10), b"x")
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1536 * MIB, "preset": 0}]
        # Only said to need it: in the header.
        packed = bytearray(lzma.compress(b"x", filters=[{**filters[0], "dict_size": 4096}]))
        at = bytes(packed).index(b"\x21\x01") + 2
        packed[at] = 39
        packed[20:24] = zlib.crc32(bytes(packed[12:20])).to_bytes(4, "little")
        error = self.assertRaises(lzma.LZMAError, inflate, bytes(packed), "lzma", 10)
        self.assertIn("emory", str(error))

    def test_registered_by_the_user(self):
        """A way that somebody has registered is used, also under one of kombu's names; what comes out is measured."""
        before = dict(compression._decoders), dict(compression._encoders), dict(compression._aliases)

        def restore() -> None:
            for table, saved in zip(
                (compression._decoders, compression._encoders, compression._aliases), before, strict=True
            ):
                table.clear()
                table.update(saved)

        self.addCleanup(restore)
        for content_type in ("application/x-mine", "application/x-gzip"):
            compression.register(lambda body: body, lambda body: body * 2, content_type, ["mine"])
            self.assertEqual(inflate(b"ab", "mine", 4), b"abab")
            self.assertRaises(ValueError, inflate, b"ab", "mine", 3)
        self.assertEqual(inflate(b"ab", "zlib", 4), b"abab")

    def test_all_of_kombu(self):
        """Every way that kombu has registered by itself has its bound, but for older versions of brotli."""
        for name, decoder in compression._decoders.items():
            if "brotli" not in name:
                self.assertIn(decoder, _inflate._BOUNDED, name)


class InOrderTests(SynchronousTestCase):
    limit = 4 * MIB

    def setUp(self):
        self.clock = ThreadedClock()
        self.patch(_inflate, "in_thread", self.clock.in_thread)
        self.in_order = InOrder(self.clock, self.limit)
        self.got: list[Any] = []

    def put(self, body, name=None, packed=None):
        """Put a body; what comes of it is kept by its length, or the error is."""

        def take(found):
            self.got.append(len(found) if isinstance(found, bytes) else type(found))

        self.in_order.put(compress(body, name) if name and packed is None else packed or body, name, take)

    def test_at_once(self):
        """What is not compressed, or small, is handed over at once."""
        self.put(b"x" * MIB)
        self.put(bytes(1000), "zlib")
        self.put(bytes(64 * 1024), "zlib")
        self.put(b"", "zlib", b"nonsense")
        self.put(b"", "nonsense", b"x")
        self.assertEqual(self.got, [MIB, 1000, 64 * 1024, zlib.error, ValueError])
        self.assertEqual(self.clock.queued, 0)
        self.assertTrue(self.in_order.idle)

    def test_in_a_thread(self):
        """What is large, compressed or not any more, goes through a thread; what comes after it waits for it."""
        for body in (bytes(64 * 1024 + 1), RANDOM[:17_000]):
            self.got.clear()
            self.put(body, "zlib")
            self.put(b"after")
            self.put(b"small", "zlib")
            self.assertEqual((self.got, self.clock.queued, self.in_order.idle), ([], 1, False))
            self.clock.work()
            self.assertEqual(self.got, [len(body), 5, 5])
            self.assertTrue(self.in_order.idle)

    def test_one_at_a_time(self):
        """No two are in threads at once, and all come in order, errors included."""
        sizes = [MIB, 2 * MIB, self.limit + 1, MIB]
        for size in sizes:
            self.put(bytes(size), "zlib")
            self.put(b"x" * 3)
        while self.clock.queued:
            self.assertEqual(self.clock.queued, 1)
            self.clock.work()
        self.assertEqual(
            [getattr(one, "__name__", one) for one in self.got], [MIB, 3, 2 * MIB, 3, "_TooLarge", 3, MIB, 3]
        )
        self.assertEqual(self.in_order.bytes, 0)

    def test_in_slices(self):
        """Many that have waited leave the reactor its turns."""
        self.put(bytes(MIB), "zlib")

        def slow(found):
            self.got.append(len(found))
            self.clock.rightNow += 0.001

        for _ in range(10):
            self.in_order.put(b"x", None, slow)
        self.assertEqual(self.in_order.bytes, 10)
        self.clock.work()
        self.assertLess(len(self.got), 6)
        self.put(b"last")
        self.assertFalse(self.in_order.idle)
        for _ in range(10):
            self.clock.advance(0)
        self.assertEqual(self.got, [MIB, *[1] * 10, 4])
        self.assertTrue(self.in_order.idle)

    def test_bug(self):
        """A bug in what takes one keeps no other from being handed over."""
        self.put(bytes(MIB), "zlib")
        self.in_order.put(b"x", None, lambda _: 1 / 0)
        self.put(b"after")
        self.clock.work()
        self.assertEqual(self.got, [MIB, 5])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_no_thread(self):
        """Where no thread can be had, the reply fails, and the others go on."""
        self.put(bytes(MIB), "zlib")

        def refuse(work):
            raise RuntimeError("can't start new thread")

        self.patch(_inflate, "in_thread", refuse)
        self.put(bytes(MIB), "zlib")
        self.put(b"after")
        self.clock.work()
        self.assertEqual(self.got, [MIB, RuntimeError, 5])
        self.put(bytes(MIB), "zlib")
        self.assertEqual((self.got[3:], self.in_order.idle), ([RuntimeError], True))

    def test_from_within(self):
        """What is put while another is handed over comes after those that wait."""
        self.put(bytes(MIB), "zlib")
        self.in_order.put(b"x", None, lambda _: self.put(b"within"))
        self.put(b"waits")
        self.clock.work()
        self.assertEqual(self.got, [MIB, 5, 6])

    def test_flush(self):
        """A flush fires when all have been handed over, or when its time is over; it can be given up."""
        self.successResultOf(self.in_order.flush(1))
        self.put(bytes(MIB), "zlib")
        self.put(b"after")
        idle: list[int] = []
        self.in_order.on_idle = lambda: idle.append(len(self.got))
        late, flushed, cancelled = (self.in_order.flush(seconds) for seconds in (1, 5, 5))
        cancelled.cancel()
        self.successResultOf(cancelled.addErrback(lambda failure: failure.trap(CancelledError)))
        self.clock.advance(1)
        self.successResultOf(late)
        self.assertNoResult(flushed)
        self.clock.work()
        self.successResultOf(flushed)
        self.assertEqual((self.got, idle), ([MIB, 5], [2]))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop(self):
        """A stop tells all that wait, at once and once; what a thread still does is of no interest any more."""
        self.put(bytes(MIB), "zlib")
        self.put(b"after")
        flushed = self.in_order.flush(5)
        self.in_order.stop()
        self.successResultOf(flushed)
        self.assertEqual(self.got, [Stopped, Stopped])
        self.clock.work()
        self.put(b"later")
        self.put(b"later", "zlib")
        self.assertEqual(self.got, [Stopped, Stopped, 5, Stopped])
        self.assertEqual((self.clock.getDelayedCalls(), self.clock.queued), ([], 0))

    def test_stop_between_slices(self):
        """A stop while some are still to be handed over leaves no timer."""
        self.put(bytes(MIB), "zlib")
        for _ in range(3):
            self.in_order.put(b"x", None, lambda _: setattr(self.clock, "rightNow", self.clock.rightNow + 1))
        self.clock.work()
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.in_order.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertTrue(self.in_order.idle)


class BombTests(SynchronousTestCase):
    def test_bz2(self):
        """A block of bzip2 is the most that a small body has done at once."""
        packed = bz2.compress(bytes(45 * MIB))
        self.assertLess(len(packed), 1024)
        clock = ThreadedClock()
        self.patch(_inflate, "in_thread", clock.in_thread)
        InOrder(clock, MIB).put(packed, "bzip2", lambda _: None)
        self.assertEqual(clock.queued, 1)


class ThreadTests(SynchronousTestCase):
    def test_thread(self):
        """The thread is one that does not keep a program from ending, and no thread of the reactor's, which may all be waiting."""
        done: SimpleQueue[tuple[Thread, bool]] = SimpleQueue()
        in_thread(lambda: done.put((current_thread(), current_thread().daemon)))
        thread, daemon = done.get(timeout=30)
        self.assertTrue(daemon)
        self.assertIsNot(thread, current_thread())
        thread.join(30)
