"""Field tables: byte for byte py-amqp's, and no bytes that hurt."""

from __future__ import annotations

import contextlib  # its suppress as a name of this module would be taken for trial's
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from struct import pack
from typing import Any

from amqp.serialization import dumps, loads
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery.amqp import tables
from twistedcelery.amqp.tables import MAX_DEPTH, decode_table, encode_table
from twistedcelery.errors import LocalProtocolError, RemoteProtocolError

KEYS = st.text(max_size=60)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=40)
    | st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(9999, 1, 1)).map(  # noqa: DTZ001
        lambda moment: moment.replace(microsecond=0)
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)
TABLES = st.dictionaries(KEYS, VALUES, max_size=8)


def one(letter: bytes, value: bytes) -> bytes:
    """Write a table with one item, "k"."""
    item = b"\x01k" + letter + value
    return pack(">I", len(item)) + item


class EncodeTests(SynchronousTestCase):
    @given(TABLES)
    def test_equals_py_amqp(self, table):
        """Any table is written exactly as py-amqp writes it."""
        self.assertEqual(encode_table(table), dumps("F", [table]))

    def test_what_other_clients_corrupt(self):
        """What other codecs write with letters that workers misread is written with py-amqp's."""
        value: Any
        for value in (300, -1, 200, [300, 240], 10.1, (1, 2), b"abc", True, 2**31, -(2**31), -(2**31) + 1,
                      {"a": {"b": [None, {}]}}, Decimal("-12.50"), Decimal(7), "gr\u00fc\u00df", "\ud800", b"\xff",
                      datetime(2026, 1, 2, 3, 4, 5),  # noqa: DTZ001
                      datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=5)))):  # fmt: skip
            with self.subTest(value=value):
                self.assertEqual(encode_table({"k": value}), dumps("F", [{"k": value}]))

    def test_not_finite(self):
        """Numbers for which RabbitMQ ends the connection are refused."""
        for value in (float("nan"), float("inf"), -float("inf")):
            error = self.assertRaises(LocalProtocolError, encode_table, {"k": [value]})
            self.assertIn(str(value), str(error))

    def test_subclasses(self):
        """Subclasses of what AMQP carries are carried as py-amqp carries them."""

        class Text(str):
            __slots__ = ()

        class Number(int):
            pass

        class Table(dict[str, int]):
            pass

        table: dict[Any, Any] = {Text("a"): Text("b"), "n": Number(5), "t": Table(x=1), b"raw": 1}
        self.assertEqual(encode_table(table), dumps("F", [table]))

    def test_unencodable_values_name_their_key(self):
        """A value that AMQP cannot carry is refused with the path of keys to it."""
        for value in (object(), 2**63, Decimal("Infinity"), Decimal("1e3"), Decimal(2**40), {1, 2},
                      datetime(1969, 1, 1)):  # noqa: DTZ001  # fmt: skip
            with self.subTest(value=value):
                error = self.assertRaises(LocalProtocolError, encode_table, {"outer": {"the key": [value]}})
                self.assertIn("'outer': 'the key': ", str(error))

    def test_unencodable_keys(self):
        """A key that is no text, or too long, is refused."""
        for key in (1, None, "x" * 256, "\u00fc" * 128, (1,)):
            with self.subTest(key=key):
                self.assertRaises(LocalProtocolError, encode_table, {key: 1})
        self.assertEqual(decode_table(encode_table({"x" * 255: 1}))[0], {"x" * 255: 1})

    def test_circular(self):
        """A table or list that contains itself is refused instead of recursed into."""
        table: dict[str, object] = {}
        table["self"] = table
        self.assertRaises(LocalProtocolError, encode_table, table)
        array: list[object] = []
        array.append(array)
        self.assertRaises(LocalProtocolError, encode_table, {"k": array})

    def test_names_are_not_kept_for_ever(self):
        """The caches of names are bounded."""
        for number in range(3000):
            decode_table(encode_table({f"name-{number}": None}))
        self.assertLessEqual(len(tables._names), 1024)
        self.assertLessEqual(len(tables._known_names), 1024)


class DecodeTests(SynchronousTestCase):
    @given(TABLES)
    def test_round_trip(self, table):
        """What is written is read again, all of it."""
        encoded = encode_table(table)
        self.assertEqual(decode_table(b"head" + encoded, 4), (table, 4 + len(encoded)))

    @given(TABLES)
    def test_reads_what_py_amqp_reads(self, table):
        """py-amqp and we read the same."""
        encoded = dumps("F", [table])
        self.assertEqual(decode_table(encoded)[0], loads("F", encoded, 0)[0][0])

    def test_letters_of_rabbitmq(self):
        """Every letter that RabbitMQ may send is read with RabbitMQ's meaning."""
        for letter, value, meaning in (
            (b"t", b"\x01", True),
            (b"t", b"\x00", False),
            (b"b", b"\xff", -1),
            (b"B", b"\xff", 255),
            (b"s", b"\xff\xfe", -2),
            (b"U", b"\xff\xfe", -2),
            (b"u", b"\xff\xfe", 65534),
            (b"I", b"\xff\xff\xff\xfd", -3),
            (b"i", b"\xff\xff\xff\xfd", 2**32 - 3),
            (b"l", pack(">q", -4), -4),
            (b"L", pack(">q", -5), -5),
            (b"f", pack(">f", 1.5), 1.5),
            (b"d", pack(">d", 0.1), 0.1),
            (b"D", b"\x02" + pack(">i", -1250), Decimal("-12.50")),
            (b"S", b"\x00\x00\x00\x02hi", "hi"),
            (b"S", b"\x00\x00\x00\x02\xff\xfe", b"\xff\xfe"),
            (b"x", b"\x00\x00\x00\x02hi", b"hi"),
            (b"A", b"\x00\x00\x00\x03Vt\x01", [None, True]),
            (b"A", b"\x00\x00\x00\x07S\x00\x00\x00\x02hi", ["hi"]),
            (b"F", b"\x00\x00\x00\x00", {}),
            (b"T", pack(">Q", 86400), datetime(1970, 1, 2)),  # noqa: DTZ001
            (b"T", pack(">Q", 2**63), 2**63),
            (b"V", b"", None),
            (b"A", b"\x00\x00\x00\x01V", [None]),
        ):
            with self.subTest(letter=letter):
                table, _ = decode_table(one(letter, value))
                self.assertEqual(table, {"k": meaning})
                self.assertIs(type(table["k"]), type(meaning))

    def test_odd_names(self):
        """A name that is not UTF-8 stays bytes."""
        self.assertEqual(decode_table(b"\x00\x00\x00\x03\x01\xffV")[0], {b"\xff": None})

    def test_nesting_is_bounded(self):
        """Tables and arrays within each other beyond the bound are refused, not recursed into."""
        for letter, head in ((b"F", b"\x01k"), (b"A", b"")):
            data = pack(">I", 0)
            for _ in range(MAX_DEPTH):
                inner = head + letter + data
                data = pack(">I", len(inner)) + inner
            table = data if letter == b"F" else one(letter, data)
            error = self.assertRaises(RemoteProtocolError, decode_table, table)
            self.assertIn("nested", str(error))

    def test_deep_but_allowed(self):
        """Nesting up to the bound is written and read."""
        table: dict[str, object] = {}
        for _ in range(MAX_DEPTH - 1):
            table = {"k": table}
        self.assertEqual(decode_table(encode_table(table))[0], table)

    def test_lengths_that_lie(self):
        """A length that does not fit what is there is an error of the peer's."""
        for data in (
            b"",
            b"\x00\x00",
            b"\x00\x00\x00\x05",
            b"\xff\xff\xff\xff\x01kV",
            one(b"S", b"\xff\xff\xff\xffx"),
            one(b"x", b"\x00\x00\x00\x09x"),
            one(b"A", b"\x00\x00\x00\x09V"),
            one(b"A", b"\x00\x00\x00\x01I\x00\x00\x00\x00"),
            one(b"F", b"\x00\x00\x00\x01"),
            one(b"I", b"\x00"),
            one(b"Z", b""),
            b"\x00\x00\x00\x02\x01kV",
            b"\x00\x00\x00\x02\x05k",
        ):
            with self.subTest(data=data):
                self.assertRaises(RemoteProtocolError, decode_table, data)

    @given(st.binary(max_size=200))
    def test_random_bytes(self, data):
        """Random bytes are a table, or an error of the peer's."""
        for table in (data, pack(">I", len(data)) + data):
            with contextlib.suppress(RemoteProtocolError):
                decode_table(table)

    @given(TABLES, st.data())
    def test_mutated_tables(self, table, data):
        """A table with one byte changed is a table, or an error of the peer's."""
        encoded = bytearray(encode_table(table))
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(RemoteProtocolError):
            decode_table(bytes(encoded))
