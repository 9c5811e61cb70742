"""Messages and methods as bytes: py-amqp is the oracle."""

from __future__ import annotations

import contextlib  # its suppress as a name of this module would be taken for trial's
import itertools
from struct import pack
from types import SimpleNamespace
from typing import Any

from amqp.basic_message import Message
from amqp.method_framing import frame_writer
from amqp.serialization import dumps
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.support.amqp_peer import split
from twistedcelery.amqp import codec, methods
from twistedcelery.amqp.codec import decode_deliver, decode_properties, encode_properties, encode_publish
from twistedcelery.amqp.methods import METHODS, decode_arguments, encode_method
from twistedcelery.errors import LocalProtocolError, RemoteProtocolError

SHORT = st.text(max_size=60)
STRINGS = (
    "content_type", "content_encoding", "correlation_id", "reply_to", "expiration", "message_id", "type",
    "user_id", "app_id", "cluster_id",
)  # fmt: skip
PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.none() | SHORT for name in STRINGS},
        "delivery_mode": st.integers(0, 255),
        "priority": st.integers(0, 255),
        "timestamp": st.integers(0, 2**64 - 1),
    },
)
HEADERS = st.none() | st.dictionaries(
    SHORT,
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | SHORT | st.lists(st.integers(0, 9)),
    max_size=6,
)


def py_amqp_publish(exchange, routing_key, properties, headers, body, frame_max, mandatory, immediate):
    """What py-amqp writes to its socket for a publish on channel 3."""
    written: list[bytes] = []
    write = frame_writer(
        SimpleNamespace(frame_max=frame_max, bytes_sent=0),
        SimpleNamespace(write=lambda data: written.append(bytes(data))),
    )
    arguments = dumps("Bssbb", (0, exchange, routing_key, mandatory, immediate))
    write(1, 3, (60, 40), arguments, Message(body, application_headers=headers, **properties))
    return b"".join(written)


def whole_publish(*arguments):
    """Encode a publish, its frames joined where they come one by one."""
    encoded = encode_publish(*arguments)
    return encoded if isinstance(encoded, bytes) else b"".join(encoded)


class PublishTests(SynchronousTestCase):
    @given(SHORT, SHORT, PROPERTIES, HEADERS, st.binary(max_size=300), st.booleans(), st.booleans())
    def test_equals_py_amqp(self, exchange, key, properties, headers, body, mandatory, immediate):
        """A publish with its content is byte for byte what py-amqp sends."""
        ours = encode_publish(
            3, exchange, key, properties, headers, body, 131072, mandatory=mandatory, immediate=immediate
        )
        theirs = py_amqp_publish(exchange, key, properties, headers, body, 131072, mandatory, immediate)
        self.assertEqual(ours, theirs)

    def test_split_bodies_equal_py_amqp(self):
        """Bodies around the size of one and of two frames are split as py-amqp splits them."""
        for size in (0, 1, 4087, 4088, 4089, 8176, 8177, 10000):
            with self.subTest(size=size):
                body = bytes(range(256)) * 40
                ours = whole_publish(3, "e", "k", {"priority": 3}, {}, body[:size], 4096)
                self.assertEqual(
                    ours, py_amqp_publish("e", "k", {"priority": 3}, {}, body[:size], 4096, 0, 0)
                )
                self.assertTrue(
                    all(len(seen.values[0]) <= 4088 for seen in split(ours) if seen.name == "body")
                )

    def test_frame_by_frame(self):
        """A body of several frames comes in pieces of a frame at most, which are made when they are asked for."""
        pieces = encode_publish(3, "e", "k", {}, {}, b"x" * 9000, 4096)
        assert not isinstance(pieces, bytes)
        self.assertIs(iter(pieces), pieces)
        sizes = [len(piece) for piece in pieces]
        self.assertLessEqual(max(sizes), 4096)
        self.assertEqual(len(sizes), 1 + 3 + 1)
        self.assertIsInstance(encode_publish(3, "e", "k", {}, {}, b"x" * 4088, 4096), bytes)

    def test_other_bodies(self):
        """A bytearray or memoryview is a body as well."""
        expected = whole_publish(1, "", "q", {}, None, b"x" * 9000, 4096)
        kind: Any
        for kind in (bytearray, memoryview):
            self.assertEqual(whole_publish(1, "", "q", {}, None, kind(b"x" * 9000), 4096), expected)

    def test_headers_must_fit_a_frame(self):
        """Headers that a server would have to end the connection for are refused here."""
        room = 4096 - 8 - 12 - 2
        for size, fits in ((room, True), (room + 1, False)):
            headers = {"k": "x" * (size - 4 - 2 - 5)}
            if fits:
                self.assertEqual(
                    split(whole_publish(1, "", "q", {}, headers, b"", 4096))[1].values[2], headers
                )
            else:
                self.assertRaises(LocalProtocolError, encode_publish, 1, "", "q", {}, headers, b"", 4096)

    def test_unencodable(self):
        """What does not fit its field is refused by name."""
        for properties, headers, name in (
            ({"correlation_id": 5}, None, "correlation_id"),
            ({"reply_to": "x" * 256}, None, "reply_to"),
            ({"type": "\u00fc" * 128}, None, "type"),
            ({"priority": 256}, None, "priority"),
            ({"priority": -1}, None, "priority"),
            ({"delivery_mode": "2"}, None, "delivery_mode"),
            ({"timestamp": -1}, None, "timestamp"),
            ({"timestamp": 1.5}, None, "timestamp"),
            ({}, {"some header": object()}, "some header"),
        ):
            with self.subTest(name=name):
                error = self.assertRaises(LocalProtocolError, encode_properties, properties, headers)
                self.assertIn(name, str(error))
        error = self.assertRaises(LocalProtocolError, encode_publish, 1, "e" * 256, "", {}, None, b"", 4096)
        self.assertIn("exchange", str(error))
        error = self.assertRaises(LocalProtocolError, encode_publish, 1, "", "k" * 256, {}, None, b"", 4096)
        self.assertIn("routing key", str(error))

    def test_odd_strings(self):
        """Bytes, empty values, lone surrogates and subclasses of str are sent as py-amqp sends them."""

        class Text(str):
            __slots__ = ()

        for value in (b"raw", b"", "", 0, False, "\ud800", Text("text")):
            with self.subTest(value=value):
                expected = Message(b"", correlation_id=value)._serialize_properties()
                self.assertEqual(encode_properties({"correlation_id": value}, None), expected)


class PropertiesTests(SynchronousTestCase):
    @given(PROPERTIES, HEADERS)
    def test_round_trip(self, properties, headers):
        """Properties and headers are read as they were written; those that are None are not there."""
        encoded = encode_properties(properties, headers)
        present = {name: value for name, value in properties.items() if value is not None}
        self.assertEqual(decode_properties(b"12" + encoded, 2), (present, headers or {}))

    def test_not_utf8(self):
        """A text that is not UTF-8 can be told from every other text."""
        data = pack(">HB", 0x0400, 2) + b"\xff\xfe"
        properties, _ = decode_properties(data)
        self.assertEqual(properties["correlation_id"].encode("utf-8", "surrogateescape"), b"\xff\xfe")

    def test_malformed(self):
        """Flags without their values, and flags that do not exist, are errors of the peer's."""
        for data in (b"", b"\x80", b"\x80\x00", b"\x80\x00\x05ab", b"\x00\x01\x00\x00", b"\x00\x02", b"\x20\x00",
                     b"\x10\x00", b"\x00\x40\x00", b"\x00\x04\x01"):  # fmt: skip
            with self.subTest(data=data):
                self.assertRaises(RemoteProtocolError, decode_properties, data)

    @given(st.binary(max_size=100))
    def test_random_bytes(self, data):
        """Random bytes are properties, or an error of the peer's."""
        with contextlib.suppress(RemoteProtocolError):
            decode_properties(data)


class DeliverTests(SynchronousTestCase):
    @given(SHORT, st.integers(0, 2**64 - 1), st.booleans(), SHORT, SHORT)
    def test_round_trip(self, consumer, tag, redelivered, exchange, key):
        """A delivery is read as py-amqp writes it."""
        payload = b"\x00\x3c\x00\x3c" + dumps("sLbss", (consumer, tag, redelivered, exchange, key))
        self.assertEqual(decode_deliver(payload), (consumer, tag, redelivered, exchange, key))

    def test_truncated(self):
        """A delivery cut anywhere is an error of the peer's."""
        payload = b"\x00\x3c\x00\x3c" + dumps("sLbss", ("tag", 5, True, "exchange", "key"))
        for length in range(4, len(payload)):
            with self.subTest(length=length):
                self.assertRaises(RemoteProtocolError, decode_deliver, payload[:length])


class AckTests(SynchronousTestCase):
    def test_frames(self):
        """Ack, nack and reject are what py-amqp's codec makes of the same arguments."""
        for yes, other in itertools.product((False, True), repeat=2):
            self.assertEqual(
                codec.encode_ack(7, 2**40, multiple=yes), encode_method(7, methods.BASIC_ACK, (2**40, yes))
            )
            self.assertEqual(
                codec.encode_reject(7, 9, requeue=yes), encode_method(7, methods.BASIC_REJECT, (9, yes))
            )
            self.assertEqual(
                codec.encode_nack(7, 9, multiple=yes, requeue=other),
                encode_method(7, methods.BASIC_NACK, (9, yes, other)),
            )


class MethodTests(SynchronousTestCase):
    def test_round_trip(self):
        """Every method of the table is read as it was written."""
        samples = {"b": True, "o": 200, "B": 60000, "l": 2**32 - 1, "L": 2**64 - 1, "s": "short", "S": "long",
                   "F": {"k": [1, None]}}  # fmt: skip
        for number, (name, format) in METHODS.items():  # noqa: A001
            with self.subTest(name=name):
                values = [samples[letter] for letter in format]
                (seen,) = split(encode_method(9, number, values))
                self.assertEqual(seen, (9, name, values))

    def test_bits(self):
        """Bits share an octet, in order, until another field comes or eight are full."""
        for values in itertools.product((False, True), repeat=5):
            arguments = (0, "e", "t", *values, {})
            (seen,) = split(encode_method(1, methods.EXCHANGE_DECLARE, arguments))
            self.assertEqual(tuple(seen.values), arguments)
        self.patch(methods, "METHODS", {1: ("bits", "b" * 10)})
        bits = [True, False] * 4 + [False, True]
        payload = b"\0\0\0\1" + dumps("b" * 10, bits)
        self.assertEqual(methods.decode_arguments(1, payload), bits)

    def test_missing_table(self):
        """No arguments table is an empty one."""
        (seen,) = split(encode_method(1, methods.QUEUE_BIND, (0, "q", "e", "k", False, None)))
        self.assertEqual(seen.values[-1], {})

    def test_unencodable(self):
        """An argument that does not fit is refused with the method's name, and a table's with its key."""
        for number, values, text in (
            (methods.QUEUE_DECLARE, (0, "x" * 256, 0, 0, 0, 0, 0, None), "queue.declare"),
            (methods.QUEUE_DECLARE, (0, 7, 0, 0, 0, 0, 0, None), "queue.declare"),
            (methods.QUEUE_DECLARE, (0, "q", 0, 0, 0, 0, 0, {"x-arg": object()}), "'x-arg'"),
            (methods.QUEUE_DECLARE, (0, "q", 0, 0, 0, 0, 0, [1]), "queue.declare"),
            (methods.BASIC_QOS, (0, -1, False), "basic.qos"),
            (methods.BASIC_QOS, (0, "many", False), "basic.qos"),
        ):
            with self.subTest(values=values):
                self.assertIn(
                    text, str(self.assertRaises(LocalProtocolError, encode_method, 1, number, values))
                )

    def test_text_cut_within_a_character(self):
        """A reply text that the server cut inside a character is still readable."""
        text = b"NOT_FOUND - no queue 'gr\xc3"
        payload = pack(">IHB", methods.CHANNEL_CLOSE, 404, len(text)) + text + b"\0\0\0\0"
        code, readable, _, _ = decode_arguments(methods.CHANNEL_CLOSE, payload)
        self.assertEqual((code, readable), (404, "NOT_FOUND - no queue 'gr\\xc3"))

    def test_truncated(self):
        """Every method cut anywhere is an error of the peer's."""
        samples = {"b": True, "o": 200, "B": 60000, "l": 1, "L": 1, "s": "short", "S": "long", "F": {"k": 1}}
        for number, (name, format) in METHODS.items():  # noqa: A001
            payload = encode_method(1, number, [samples[letter] for letter in format])[7:-1]
            for length in range(4, len(payload)):
                with self.subTest(name=name, length=length):
                    self.assertRaises(RemoteProtocolError, decode_arguments, number, payload[:length])

    def test_unknown(self):
        """A method that is not in the table is an error of the peer's, and named by its numbers."""
        error = self.assertRaises(RemoteProtocolError, decode_arguments, 90 << 16 | 11, b"\0\x5a\0\x0b")
        self.assertIn("90.11", str(error))

    @given(st.sampled_from(sorted(METHODS)), st.binary(max_size=100))
    def test_random_bytes(self, number, data):
        """Random bytes are arguments, or an error of the peer's."""
        with contextlib.suppress(RemoteProtocolError):
            decode_arguments(number, pack(">I", number) + data)
