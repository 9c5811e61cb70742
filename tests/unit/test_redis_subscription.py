"""The sans-IO subscriber connection: acknowledgements, pace, pushes, refusals."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.support.redis_peer import RedisPeer, array, bulk, push
from twistedcelery.errors import AuthenticationFailed, ConnectionFailed, ConnectionLost, RemoteProtocolError
from twistedcelery.redis.connection import ConnectionConfig, State
from twistedcelery.redis.replies import CommandRefused
from twistedcelery.redis.subscription import BATCH, IN_FLIGHT, SubscriberConnection

URL = "redis://10.0.0.1:6379/0"
NOPERM = b"-NOPERM No permissions to access a channel\r\n"


class Wire:
    """A subscriber, its peer, and what was told."""

    def __init__(self, answers=None, greet=True):
        self.peer = RedisPeer(answers)
        self.written: list[bytes] = []
        self.told: list[Any] = []
        self.drained: list[Exception] = []
        self.bugs: list[Any] = []
        self.connection = SubscriberConnection(
            ConnectionConfig(url=URL),
            write=self.written.append,
            opened=lambda: self.told.append("open"),
            ending=lambda: None,
            drained=self.drained.append,
            bug=lambda: self.bugs.append(sys.exc_info()[1]),
        )
        self.connection.on_message = lambda *message: self.told.append(message)
        self.connection.on_pattern_message = lambda *message: self.told.append(message)
        self.connection.on_subscribed = self.told.append
        self.connection.on_refused = lambda names, error: self.told.append((names, error))
        if greet:
            self.greet()

    def greet(self):
        self.connection.start()
        self.flush()
        self.told.remove("open")

    def flush(self):
        while self.written:
            written, self.written[:] = b"".join(self.written), []
            for answer in self.peer.receive(written):
                self.connection.receive_data(answer)

    @property
    def sent(self):
        return self.peer.commands[1:]


class SubscribeTests(SynchronousTestCase):
    def test_each_is_acknowledged(self):
        """Each channel is told once the server has it, in the order asked."""
        wire = Wire()
        wire.connection.subscribe([b"a", b"b"])
        self.assertEqual(wire.told, [])
        self.assertTrue(wire.connection.waiting)
        wire.flush()
        self.assertEqual(wire.told, [b"a", b"b"])
        self.assertEqual(wire.sent, [[b"subscribe", b"a", b"b"]])
        self.assertFalse(wire.connection.waiting)

    def test_before_open(self):
        """What is wanted before the connection is open is asked for as soon as it is."""
        wire = Wire(greet=False)
        wire.connection.subscribe([b"a"])
        wire.greet()
        self.assertEqual(wire.told, [b"a"])

    def test_patterns(self):
        """Patterns are subscribed, told and unsubscribed apart from channels."""
        wire = Wire()
        wire.connection.subscribe([b"a*"], patterns=True)
        wire.flush()
        wire.connection.receive_data(push(b"pmessage", b"a*", b"ab", b"text"))
        wire.connection.unsubscribe([b"a*"], patterns=True)
        wire.flush()
        self.assertEqual(wire.told, [b"a*", (b"a*", b"ab", b"text")])
        self.assertEqual(wire.sent, [[b"psubscribe", b"a*"], [b"punsubscribe", b"a*"]])

    def test_message(self):
        """A message comes with its channel."""
        wire = Wire()
        wire.connection.receive_data(push(b"message", b"a", b"text"))
        self.assertEqual(wire.told, [(b"a", b"text")])

    def test_unsubscribe(self):
        """Unsubscribing is acknowledged without telling anybody."""
        wire = Wire()
        wire.connection.subscribe([b"a"])
        wire.flush()
        wire.connection.unsubscribe([b"a"])
        wire.flush()
        self.assertEqual((wire.peer.subscribed, wire.told), ({}, [b"a"]))
        self.assertFalse(wire.connection.waiting)

    def test_burst(self):
        """A burst leaves as a few commands, each after an acknowledgement, never more than may be in flight."""
        wire = Wire()
        names = [b"%d" % number for number in range(2 * BATCH)]
        for name in names:
            wire.connection.subscribe([name])
        self.assertEqual(len(wire.written), IN_FLIGHT)
        wire.flush()
        self.assertEqual(
            [len(command) - 1 for command in wire.sent], [1] * IN_FLIGHT + [BATCH, BATCH - IN_FLIGHT]
        )
        self.assertEqual(wire.told, names)

    def test_withdrawn_before_it_left(self):
        """What is unsubscribed before its turn is never subscribed, and the other way round."""
        wire = Wire()
        wire.connection.subscribe([b"x"])
        wire.connection.subscribe([b"y"])
        wire.connection.subscribe([b"a", b"b"])
        wire.connection.unsubscribe([b"b", b"c"])
        wire.connection.subscribe([b"c"])
        wire.flush()
        self.assertEqual(
            wire.sent,
            [[b"subscribe", b"x"], [b"subscribe", b"y"], [b"unsubscribe", b"b"], [b"subscribe", b"a", b"c"]],
        )

    def test_resubscribe_draws_as_the_server_keeps_up(self):
        """Many channels are drawn from their iterator batch by batch, after what is more urgent."""
        wire = Wire()
        wanted = {b"%d" % number: None for number in range(5 * BATCH)}
        wire.connection.resubscribe(name for name in list(wanted) if name in wanted)
        self.assertEqual(len(wire.written), IN_FLIGHT)
        del wanted[b"%d" % (5 * BATCH - 1)]
        wire.connection.subscribe([b"urgent"])
        wire.flush()
        self.assertEqual(wire.sent[IN_FLIGHT], [b"subscribe", b"urgent"])
        self.assertEqual(len(wire.told), 5 * BATCH)
        self.assertNotIn(b"%d" % (5 * BATCH - 1), wire.peer.subscribed)

    def test_resubscribe_iterator_raises(self):
        """An iterator that raises is a bug of its owner's; the connection goes on."""
        wire = Wire()

        def broken():
            yield b"a"
            raise ZeroDivisionError

        wire.connection.resubscribe(broken())
        wire.connection.subscribe([b"b"])
        wire.flush()
        self.assertIsInstance(wire.bugs[0], ZeroDivisionError)
        self.assertEqual(wire.told, [b"b"])


class RefusalTests(SynchronousTestCase):
    def test_acl(self):
        """Channels that ACLs forbid are told with the error; the others go on."""
        wire = Wire(
            {b"SUBSCRIBE": lambda command: NOPERM if b"a" in command else push(b"subscribe", command[1], 1)}
        )
        wire.connection.subscribe([b"a", b"b"])
        wire.connection.subscribe([b"c"])
        wire.flush()
        ((names, error), subscribed) = wire.told
        self.assertEqual((names, subscribed), ([b"a", b"b"], b"c"))
        self.assertIsInstance(error, CommandRefused)
        self.assertEqual(error.url, URL)

    def test_unsubscribe_refused(self):
        """A refused UNSUBSCRIBE or PING concerns nobody."""
        wire = Wire({b"UNSUBSCRIBE": NOPERM})
        wire.connection.unsubscribe([b"a"])
        wire.connection.ping()
        wire.flush()
        self.assertEqual(wire.told, [])
        wire.connection.ping()
        wire.connection.receive_data(NOPERM)
        self.assertEqual((wire.told, wire.connection.waiting), ([], False))

    def test_logged_out(self):
        """A user who lost the right to be here takes the connection down."""
        wire = Wire({b"SUBSCRIBE": b"-NOAUTH Authentication required.\r\n"})
        wire.connection.subscribe([b"a"])
        self.assertRaises(AuthenticationFailed, wire.flush)

    def test_farewell(self):
        """An error that nobody asked for is the server's farewell."""
        error = self.assertRaises(ConnectionLost, Wire().connection.receive_data, b"-ERR going down\r\n")
        self.assertIn("going down", str(error))


class LifeTests(SynchronousTestCase):
    def test_ping(self):
        """PING is answered in one way while subscribed, in another while not."""
        wire = Wire()
        for _ in range(2):
            wire.connection.ping()
            self.assertTrue(wire.connection.waiting)
            wire.flush()
            self.assertFalse(wire.connection.waiting)
            wire.connection.subscribe([b"a"])
            wire.flush()

    def test_error_in_a_callable(self):
        """A callable that raises is reported; the messages after it still come."""
        wire = Wire()
        wire.connection.on_message = lambda channel, payload: 1 / int(payload)
        wire.connection.receive_data(push(b"message", b"a", b"0") + push(b"pmessage", b"a", b"b", b"c"))
        self.assertIsInstance(wire.bugs[0], ZeroDivisionError)
        self.assertEqual(wire.told, [(b"a", b"b", b"c")])

    def test_lost(self):
        """A lost connection forgets what was wanted, and takes nothing more."""
        wire = Wire()
        wire.connection.subscribe([b"%d" % number for number in range(5 * BATCH)])
        wire.connection.resubscribe(iter([b"x"]))
        written = len(wire.written)
        wire.connection.connection_lost(ConnectionLost("cut"))
        wire.connection.subscribe([b"a"])
        wire.connection.resubscribe(iter([b"x"]))
        wire.connection.receive_data(push(b"message", b"a", b"text"))
        wire.connection.drain(ConnectionLost("closed"))
        self.assertEqual((len(wire.written), wire.told, wire.drained), (written, [], []))
        self.assertEqual((wire.connection.waiting, wire.connection.state), (False, State.CLOSED))

    def test_drain(self):
        """Nobody waits for an answer here: draining is over at once."""
        wire = Wire()
        wire.connection.subscribe([b"a"])
        reason = ConnectionLost("closed")
        wire.connection.drain(reason)
        self.assertEqual(wire.drained, [reason])

    def test_nobody_listens(self):
        """Without callables set, pushes are dropped."""
        hooks = {name: (lambda *_: None) for name in ("write", "opened", "ending", "drained", "bug")}
        connection = SubscriberConnection(ConnectionConfig(), **hooks)
        connection.start()
        connection.receive_data(b"+PONG\r\n" + push(b"message", b"a", b"b"))


class HostileTests(SynchronousTestCase):
    def test_unasked_pushes(self):
        """Pushes that no subscriber can get are protocol errors."""
        for push_ in (
            b"+OK\r\n", b":1\r\n", array(), push(b"message", b"a"), push(b"message", b"a", 1), push(b"subscribe", b"a", 1),
            push(b"pong", b""), b"+PONG\r\n", array(bulk(b"message"), b"$-1\r\n", b"$-1\r\n"),
        ):  # fmt: skip
            wire = Wire()
            error = self.assertRaises(RemoteProtocolError, wire.connection.receive_data, push_)
            self.assertEqual((error.url, wire.bugs), (URL, []))

    def test_wrong_acknowledgement(self):
        """An acknowledgement for another channel, or of another kind, is a protocol error."""
        for push_ in (
            push(b"subscribe", b"b", 1),
            push(b"psubscribe", b"a", 1),
            push(b"unsubscribe", b"a", 0),
        ):
            wire = Wire()
            wire.connection.subscribe([b"a"])
            self.assertRaises(RemoteProtocolError, wire.connection.receive_data, push_)
        wire = Wire()
        wire.connection.ping()
        self.assertRaises(RemoteProtocolError, wire.connection.receive_data, push(b"pong", b"a", 1))

    @given(
        st.lists(
            st.sampled_from([b"message", b"subscribe", b"unsubscribe", b"pong", b"PONG", b"a", b"b", 1, 0]),
            max_size=4,
        ),
        st.integers(1, 5),
    )
    @settings(max_examples=200, deadline=None)
    def test_nearly_pushes(self, items, step):
        """Whatever comes, cut however: a `ConnectionFailed` or nothing, never another error."""
        wire = Wire()
        wire.connection.subscribe([b"a", b"b"])
        wire.connection.ping()
        stream = array(*(b":%d\r\n" % item if isinstance(item, int) else bulk(item) for item in items)) * 2
        with contextlib.suppress(ConnectionFailed):
            for start in range(0, len(stream), step):
                wire.connection.receive_data(stream[start : start + step])
        self.assertEqual(wire.bugs, [])

    @given(st.integers(1, 9))
    def test_chunks_do_not_matter(self, step):
        """Pushes cut anywhere are the same pushes."""
        wire = Wire()
        wire.connection.subscribe([b"a", b"b"])
        stream = (
            push(b"subscribe", b"a", 1) + push(b"message", b"a", b"\r\n$3\r\n") + push(b"subscribe", b"b", 2)
        )
        for start in range(0, len(stream), step):
            wire.connection.receive_data(stream[start : start + step])
        self.assertEqual(wire.told, [b"a", (b"a", b"\r\n$3\r\n"), b"b"])
