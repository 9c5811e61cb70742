"""Large values that are made piece by piece."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import hiredis
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery._pace import WRITE
from twistedcelery.redis.pieces import Pieces, pack_in_pieces


class PiecesTests(SynchronousTestCase):
    def test_whole(self):
        """The pieces are Base64 of the body between head and tail, and as long as they say, for any length of it."""
        for length in (0, 1, 2, 3, 4, WRITE * 3 // 4 - 1, WRITE * 3 // 4, WRITE * 3 // 4 + 1, 500_000):
            with self.subTest(length=length):
                body = bytes(range(256)) * (length // 256 + 1)
                value = Pieces(b"head", body[:length], b"tail")
                whole = b"".join(value)
                self.assertEqual(whole, b"head" + b64encode(body[:length]) + b"tail")
                self.assertEqual(len(value), len(whole))
                self.assertEqual(b"".join(value), whole)
                self.assertLessEqual(max(map(len, value)), WRITE)

    def test_packed(self):
        """Commands with such an argument are what hiredis makes of the whole."""
        value = Pieces(b"{", b"x" * 500_000, b"}")
        commands: list[tuple[Any, ...]] = [
            ("MULTI",),
            ("LPUSH", "k\u00fc", value),
            ("PEXPIRE", b"k", 60, 1.5),
            ("EXEC",),
        ]
        whole: list[Any] = [
            tuple(b"".join(value) if argument is value else argument for argument in command)
            for command in commands
        ]
        expected = b"".join(map(hiredis.pack_command, whole))
        self.assertEqual(b"".join(pack_in_pieces(commands)), expected)

    def test_unpackable(self):
        """What Redis cannot take is refused before anything is written."""
        self.assertRaises(TypeError, pack_in_pieces, [("SET", "a", object())])
