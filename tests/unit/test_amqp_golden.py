"""Bytes that workers in the field read: headers as py-amqp 5.1.1 decodes them unharmed."""

from __future__ import annotations

from amqp.serialization import loads
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery.amqp.codec import encode_properties

#: Seen to be decoded to these values by py-amqp 5.1.1 itself, which misreads the letters B, s and u of other clients.
HEADERS = {"n": 300, "m": -1, "l": [300, 240], "big": 2**40, "f": 1.5, "t": {"x": None}}
GOLDEN = bytes.fromhex(
    "00000041"  # the table's size
    "016e" "49" "0000012c"  # n: I, 32 bits with sign
    "016d" "49" "ffffffff"
    "016c" "41" "0000000a" "49" "0000012c" "49" "000000f0"  # l: A, a list of I
    "03626967" "4c" "0000010000000000"  # big: L, 64 bits with sign
    "0166" "64" "3ff8000000000000"  # f: d
    "0174" "46" "00000003" "0178" "56"  # t: F, a table with V, nothing
)  # fmt: skip


class GoldenTests(SynchronousTestCase):
    def test_headers(self):
        """Numbers, lists, floats and tables in headers are written in the letters that every py-amqp reads."""
        content = encode_properties({}, HEADERS)
        self.assertEqual(content, b"\x20\x00" + GOLDEN)
        self.assertEqual(loads("F", GOLDEN, 0)[0], [HEADERS])
