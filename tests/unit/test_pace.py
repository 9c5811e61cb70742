"""How much is read and written at once."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from twistedcelery._pace import READ, WRITE, Writer, read_in_slices, slices


class Transport:
    """Takes bytes, and has enough after each write that is larger than ``room``."""

    def __init__(self, writer, room=READ):
        self.writes: list[bytes] = []
        self._writer = writer
        self._room = room

    def write(self, data):
        assert type(data) is bytes
        self.writes.append(data)
        if len(data) > self._room:
            self._writer.pause()


class ReadTests(SynchronousTestCase):
    def test_plain_and_tls(self):
        """The transport that reads is told to read less, also where TLS lies over it; others are left alone."""

        class Transport:
            bufferSize = 65536

        class Layer:
            transport = Transport()

        plain, layer = Transport(), Layer()
        for transport in (plain, layer, object()):
            read_in_slices(transport)
        self.assertEqual((plain.bufferSize, layer.transport.bufferSize), (READ, READ))
        self.assertFalse(hasattr(layer, "bufferSize"))


class WriterTests(SynchronousTestCase):
    def setUp(self):
        self.writer = Writer()
        self.transport = self.writer.transport = Transport(self.writer)

    def test_small(self):
        """What is small goes out at once, also while the transport has enough: it is the callers who wait then."""
        self.writer.write(b"a")
        self.writer.pause()
        self.writer.write(b"b")
        self.assertEqual(self.transport.writes, [b"a", b"b"])

    def test_large(self):
        """What is large goes out slice by slice, each when the one before has left; what follows waits its turn."""
        body = bytes(range(256)) * (3 * WRITE // 256)
        self.writer.write(body)
        self.writer.write(b"next")
        self.assertEqual(len(self.transport.writes), 1)
        for expected in (2, 3):
            self.writer.resume()
            self.assertEqual((len(self.transport.writes), self.writer.paused), (expected, True))
        self.writer.resume()
        self.assertFalse(self.writer.paused)
        self.assertEqual(b"".join(self.transport.writes), body + b"next")
        self.assertEqual(len(self.transport.writes), 4)
        self.writer.write(b"at once")
        self.assertEqual(self.transport.writes[-1], b"at once")

    def test_pieces(self):
        """Pieces are made when it is their turn."""
        made = []

        def pieces():
            for number in range(3):
                made.append(number)
                yield b"%d" % number + b"x" * READ

        self.writer.write(pieces())
        self.assertEqual(made, [0])
        self.writer.resume()
        self.assertEqual(made, [0, 1])
        self.writer.resume()
        self.writer.resume()
        self.assertEqual([write[:1] for write in self.transport.writes], [b"0", b"1", b"2"])

    def test_never_enough(self):
        """A transport that never has enough gets everything at once."""
        self.writer.transport = transport = Transport(self.writer, room=10 * WRITE)
        self.writer.write(b"x" * (2 * WRITE + 1))
        self.writer.write(iter((b"a", b"b")))
        self.assertEqual([len(write) for write in transport.writes], [WRITE, WRITE, 1, 1, 1])

    def test_clear(self):
        """What waits is forgotten with the connection."""
        self.writer.write(b"x" * (2 * WRITE))
        self.writer.clear()
        self.writer.resume()
        self.assertEqual(len(self.transport.writes), 1)

    def test_slices(self):
        """Slices cover everything, in order."""
        self.assertEqual([bytes(part) for part in slices(b"abcde", 2)], [b"ab", b"cd", b"e"])
        self.assertEqual(list(slices(b"")), [])
