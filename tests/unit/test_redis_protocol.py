"""The Twisted shells of Redis connections: life, liveness, pace."""

from __future__ import annotations

import socket
from typing import Any
from unittest import mock

from twisted.internet import error
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import ITCPTransport
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import directlyProvides

from tests.support.redis_peer import RedisPeer, bulk
from twistedcelery._pace import WRITE as SLICE
from twistedcelery.errors import (
    AuthenticationFailed,
    ConnectionLost,
    NotSent,
    RemoteProtocolError,
    ServerUnreachable,
    TLSFailed,
)
from twistedcelery.redis.connection import ConnectionConfig
from twistedcelery.redis.protocol import CommandProtocol, RedisProtocol, SubscriberProtocol

URL = "redis://10.0.0.1:6379/0"
CONFIG = ConnectionConfig(url=URL, silence_timeout=30, ping_interval=20)


class Transport(StringTransport):
    """Remembers what became of it; the test says when the connection is gone."""

    def __init__(self):
        super().__init__()
        self.aborted = self.closed = False

    def abortConnection(self):
        self.aborted = True

    def loseConnection(self):
        assert self.producer is None, "TLS would not close with a producer"
        self.closed = True


class ProtocolCase(SynchronousTestCase):
    kind: type[RedisProtocol[Any]] = CommandProtocol

    def connect(self, config=CONFIG, answers=None, greet=True):
        self.clock = Clock()
        self.peer = RedisPeer(answers)
        self.transport = Transport()
        self.protocol: Any = self.kind(config, self.clock)
        self.protocol.makeConnection(self.transport)
        if greet:
            self.flush()
        return self.protocol

    def flush(self):
        """Carry bytes both ways until nobody says anything."""
        while data := self.transport.value():
            self.transport.clear()
            for answer in self.peer.receive(data):
                self.protocol.dataReceived(answer)

    def lose(self, why=None):
        self.protocol.connectionLost(Failure(why or error.ConnectionDone()))

    def pass_time(self, seconds):
        self.clock.pump([0.5] * int(seconds * 2))


class LifeTests(ProtocolCase):
    def test_open(self):
        """`when_open` fires with the protocol after the greeting, for early and late callers."""
        protocol = self.connect(greet=False)
        early = protocol.when_open()
        self.assertNoResult(early)
        self.assertFalse(protocol.writable)
        self.flush()
        self.assertIs(self.successResultOf(early), protocol)
        self.assertIs(self.successResultOf(protocol.when_open()), protocol)
        self.assertTrue(protocol.writable)

    def test_login_refused(self):
        """A refused login fails `when_open` with its own error, and drops the connection."""
        opening = self.connect(
            ConnectionConfig(url=URL, credentials=("x",)), {b"AUTH": b"-WRONGPASS no\r\n"}
        ).when_open()
        self.assertTrue(self.transport.aborted)
        self.assertNoResult(opening)
        self.lose(error.ConnectionAborted())
        self.failureResultOf(opening, AuthenticationFailed)
        self.failureResultOf(self.protocol.when_open(), AuthenticationFailed)
        self.assertIsInstance(self.successResultOf(self.protocol.when_closed()), AuthenticationFailed)

    def test_lost_in_the_greeting(self):
        """A connection cut during the greeting fails `when_open`, with the cause kept."""
        opening = self.connect(greet=False).when_open()
        self.lose()
        failure = self.failureResultOf(opening, ConnectionLost)
        self.assertIsInstance(failure.value.__cause__, error.ConnectionDone)
        self.assertEqual(failure.value.url, URL)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_tls_failed(self):
        """A TLS handshake that failed, which shows in connectionLost, is a `TLSFailed`."""
        from OpenSSL import SSL

        opening = self.connect(greet=False).when_open()
        self.lose(SSL.Error([("SSL routines", "", "certificate verify failed")]))
        self.failureResultOf(opening, TLSFailed)

    def test_lost(self):
        """A lost connection fails what was sent and has no answer, once, and leaves no timer."""
        protocol = self.connect()
        closed = protocol.when_closed()
        first, second = protocol.command("GET", "a"), protocol.command("GET", "b")
        self.transport.clear()
        protocol.dataReceived(bulk(b"x"))
        self.lose(error.ConnectionLost())
        self.assertEqual(self.successResultOf(first), b"x")
        reason = self.failureResultOf(second, ConnectionLost).value
        self.assertIs(self.successResultOf(closed), reason)
        self.assertEqual((protocol.writable, self.clock.getDelayedCalls()), (False, []))
        self.failureResultOf(protocol.command("GET", "a"), NotSent)

    def test_garbage(self):
        """Garbage drops the connection; what comes after it is not looked at."""
        protocol = self.connect()
        answer = protocol.command("GET", "a")
        protocol.dataReceived(b"HTTP/1.1 400\r\n")
        self.assertTrue(self.transport.aborted)
        protocol.dataReceived(bulk(b"x"))
        self.assertNoResult(answer)
        self.lose(error.ConnectionAborted())
        self.failureResultOf(answer, RemoteProtocolError)

    def test_cancelled_command(self):
        """Cancelling a command stops waiting; its reply is dropped when it comes, the others get theirs."""
        protocol = self.connect(answers={b"GET": lambda command: bulk(command[1])})
        first, second = protocol.command("GET", "a"), protocol.command("GET", "b")
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.flush()
        self.assertEqual(self.successResultOf(second), b"b")

    def test_cancelled_waiters(self):
        """A cancelled `when_open` or `when_closed` is forgotten, also by another one's callback."""
        protocol = self.connect(greet=False)
        first, second, third = (protocol.when_open() for _ in range(3))
        fired: list[Any] = []
        first.addCallback(lambda _: second.cancel())
        third.addCallback(fired.append)
        second.addErrback(lambda failure: failure.trap(CancelledError))
        self.flush()
        self.assertEqual(fired, [protocol])
        closed = protocol.when_closed()
        closed.cancel()
        self.failureResultOf(closed, CancelledError)
        self.lose()

    def test_error_in_a_callable(self):
        """A callable that raises is logged as a bug; the connection goes on."""
        protocol = self.connect()
        protocol.send([("GET", "a")], lambda _: 1 / 0)
        self.flush()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertFalse(self.transport.aborted)

    def test_became_a_replica(self):
        """READONLY closes the connection in an orderly way, with the reason."""
        protocol = self.connect(answers={b"SET": b"-READONLY You can't write.\r\n"})
        written = protocol.command("SET", "a", 1)
        protocol.command("GET", "a")
        self.flush()
        failure = self.failureResultOf(written, NotSent)
        self.assertTrue(self.transport.closed)
        self.assertFalse(protocol.writable)
        self.lose()
        self.assertIs(self.successResultOf(protocol.when_closed()), failure.value)

    def test_draining_takes_nothing(self):
        """While the last answers of a demoted server come, nothing counts as writable."""
        protocol = self.connect(answers={b"SET": b"-READONLY You can't write.\r\n"})
        protocol.command("SET", "a", 1).addErrback(lambda _: None)
        protocol.command("GET", "a")
        self.peer.hold = True
        self.flush()
        protocol.dataReceived(self.peer.release(1))
        self.assertEqual((protocol.writable, self.transport.closed), (False, False))


class CloseTests(ProtocolCase):
    def test_idle(self):
        """An idle connection closes at once, without a deadline left over."""
        closing = self.connect().close(5)
        self.assertTrue(self.transport.closed)
        self.assertNoResult(closing)
        self.lose()
        self.assertIsNone(self.successResultOf(closing))
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertIsNone(self.successResultOf(self.protocol.close(5)))

    def test_waits_for_answers(self):
        """Closing takes nothing more, and waits for the answers that are due."""
        protocol = self.connect()
        answer = protocol.command("GET", "a")
        protocol.close(5)
        self.assertEqual((protocol.writable, self.transport.closed), (False, False))
        self.failureResultOf(protocol.command("GET", "b"), NotSent)
        self.flush()
        self.assertEqual(self.successResultOf(answer), b"OK")
        self.assertTrue(self.transport.closed)

    def test_deadline(self):
        """What is not closed in time is aborted; a later call may set another deadline."""
        protocol = self.connect()
        answer = protocol.command("GET", "a")
        first, second = protocol.close(50), protocol.close(5)
        self.clock.advance(4)
        self.assertFalse(self.transport.aborted)
        self.clock.advance(1)
        self.assertTrue(self.transport.aborted)
        self.lose(error.ConnectionAborted())
        self.failureResultOf(answer, ConnectionLost)
        self.assertEqual([self.successResultOf(first), self.successResultOf(second)], [None, None])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_while_greeting(self):
        """A connection that is not open yet closes at once."""
        protocol = self.connect(greet=False)
        opening, closing = protocol.when_open(), protocol.close(5)
        self.assertTrue(self.transport.closed)
        self.lose()
        self.failureResultOf(opening, ConnectionLost)
        self.assertIsNone(self.successResultOf(closing))

    def test_before_it_is_made(self):
        """Closed or aborted before there is a transport, it is aborted when there is one."""
        for end in (
            lambda protocol: protocol.close(5),
            lambda protocol: protocol.abort(ConnectionLost("no")),
        ):
            protocol = CommandProtocol(CONFIG, Clock())
            end(protocol)
            transport = Transport()
            protocol.makeConnection(transport)
            self.assertEqual((transport.aborted, transport.value()), (True, b""))
            protocol.connectionLost(Failure(error.ConnectionAborted()))

    def test_abort(self):
        """`abort` gives its reason to everybody; the first reason stands."""
        protocol = self.connect()
        answer = protocol.command("GET", "a")
        reason = ServerUnreachable("enough")
        protocol.abort(reason)
        protocol.abort(ConnectionLost("again"))
        self.lose(error.ConnectionAborted())
        protocol.abort(ConnectionLost("too late"))
        self.assertIs(self.failureResultOf(answer).value, reason)


class LivenessTests(ProtocolCase):
    def test_quiet(self):
        """After ``ping_interval`` seconds without traffic there is a PING, and its answer is a sign of life."""
        self.connect()
        for _ in range(3):
            self.pass_time(35)
            self.flush()
        self.assertGreater(self.peer.commands.count([b"PING"]), 2)
        self.assertFalse(self.transport.aborted)

    def test_no_greeting(self):
        """A server that takes the connection and says nothing is given up, without anybody's timeout."""
        self.connect(greet=False)
        opening = self.protocol.when_open()
        self.pass_time(75)
        self.assertTrue(self.transport.aborted)
        self.lose(error.ConnectionAborted())
        self.failureResultOf(opening, ConnectionLost)

    def test_no_answer_to_ping(self):
        """A PING without an answer ends the connection."""
        self.connect()
        self.pass_time(75)
        self.assertTrue(self.transport.aborted)
        self.lose(error.ConnectionAborted())
        reason = self.successResultOf(self.protocol.when_closed())
        self.assertIsInstance(reason, ConnectionLost)
        self.assertIn("silent", str(reason))

    def test_no_answer_to_a_command(self):
        """An answer that is due for ``silence_timeout`` seconds, and no byte: the connection is given up."""
        self.connect()
        self.pass_time(1)
        self.protocol.command("GET", "a").addErrback(lambda _: None)
        self.pass_time(29)
        self.assertFalse(self.transport.aborted)
        self.pass_time(21)
        self.assertTrue(self.transport.aborted)

    def test_full_write_buffer(self):
        """A peer that takes nothing is given up too, although there is still something to write."""
        self.connect()
        self.protocol.pauseProducing()
        self.protocol.command("SET", "a", b"x" * (2 * SLICE)).addErrback(lambda _: None)
        self.pass_time(55)
        self.assertTrue(self.transport.aborted)
        self.lose(error.ConnectionAborted())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_bytes_are_life(self):
        """A long answer that trickles in keeps the connection."""
        self.connect()
        self.protocol.command("GET", "a").addErrback(lambda _: None)
        self.transport.clear()
        self.protocol.dataReceived(b"$1000\r\n")
        for _ in range(20):
            self.pass_time(10)
            self.protocol.dataReceived(b"x")
        self.assertFalse(self.transport.aborted)

    def test_taking_bytes_is_life(self):
        """A peer that takes a large body slowly is alive."""
        self.connect()
        self.protocol.pauseProducing()
        self.protocol.command("SET", "a", b"x" * (20 * SLICE)).addErrback(lambda _: None)
        for _ in range(18):
            self.pass_time(10)
            self.transport.clear()
            with mock.patch.object(self.transport, "write", self.full):
                self.protocol.resumeProducing()
        self.assertFalse(self.transport.aborted)

    def full(self, _data):
        """Be a transport's ``write`` that has enough with every slice."""
        self.protocol.pauseProducing()

    def test_no_pings(self):
        """With ``ping_interval`` 0 nothing is sent unasked, and idle connections live for ever."""
        self.connect(ConnectionConfig(url=URL, ping_interval=0, silence_timeout=10))
        self.pass_time(300)
        self.assertEqual((self.transport.value(), self.transport.aborted), (b"", False))
        self.protocol.command("GET", "a").addErrback(lambda _: None)
        self.pass_time(16)
        self.assertTrue(self.transport.aborted)


class PaceTests(ProtocolCase):
    def test_producer(self):
        """A transport that has enough makes the connection unwritable, and tells when it is writable again."""
        protocol = self.connect()
        self.assertIs(self.transport.producer, protocol)
        told = []
        protocol.on_writable = lambda: told.append(protocol.writable)
        protocol.pauseProducing()
        self.assertFalse(protocol.writable)
        protocol.resumeProducing()
        self.assertEqual((told, protocol.writable), ([True], True))
        protocol.on_writable = None
        protocol.resumeProducing()
        protocol.stopProducing()

    def test_paused_while_greeting(self):
        """A connection opened while the transport has enough is not writable before it resumes."""
        protocol = self.connect(greet=False)
        protocol.pauseProducing()
        self.flush()
        self.assertFalse(protocol.writable)
        protocol.resumeProducing()
        self.assertTrue(protocol.writable)

    def test_not_writable_when_it_ends(self):
        """A transport that resumes while the connection ends makes nothing writable."""
        protocol = self.connect()
        protocol.abort(ConnectionLost("no"))
        protocol.resumeProducing()
        self.assertFalse(protocol.writable)

    def test_large_body(self):
        """A large body goes out in slices, each when the one before has left, and what follows it waits its turn."""
        protocol = self.connect()
        sizes: list[int] = []
        stream: list[bytes] = []

        def write(data):
            sizes.append(len(data))
            stream.append(data)
            protocol.pauseProducing()

        body = bytes(range(256)) * 4096
        with mock.patch.object(self.transport, "write", write):
            protocol.send([("SET", "a", body)], lambda _: None)
            protocol.send([("GET", "a")], lambda _: None)
            self.assertEqual(len(sizes), 1)
            self.assertFalse(protocol.writable)
            while not protocol.writable and len(sizes) < 20:
                protocol.resumeProducing()
            protocol.resumeProducing()
        self.assertLessEqual(max(sizes), SLICE)
        self.peer.receive(b"".join(stream))
        self.assertEqual(self.peer.commands[1:], [[b"SET", b"a", body], [b"GET", b"a"]])

    def test_large_body_without_a_pause(self):
        """A transport that never has enough gets all slices at once."""
        protocol = self.connect(answers={b"SET": b"+OK\r\n"})
        answer = protocol.command("SET", "a", b"x" * (3 * SLICE))
        self.flush()
        self.assertEqual(self.successResultOf(answer), b"OK")
        self.assertTrue(protocol.writable)


class SocketTests(ProtocolCase):
    def options(self, transport, keepalive=True):
        config = ConnectionConfig(url=URL, keepalive=keepalive, keepalive_options={socket.TCP_KEEPCNT: 3})
        protocol = CommandProtocol(config, Clock())
        protocol.makeConnection(transport)

    def tcp(self, handle):
        transport = mock.Mock(**{"getHandle.return_value": handle})
        directlyProvides(transport, ITCPTransport)
        return transport

    def test_keepalive(self):
        """TCP_NODELAY always; SO_KEEPALIVE and its options where asked for."""
        with socket.socket() as handle:
            transport = self.tcp(handle)
            self.options(transport)
            self.assertEqual(handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 3)
        transport.setTcpNoDelay.assert_called_once_with(True)
        transport.setTcpKeepAlive.assert_called_once_with(True)

    def test_keepalive_under_tls(self):
        """The options reach the socket through TLS."""
        with socket.socket() as handle:
            outer = self.tcp(object())
            outer.transport = self.tcp(handle)
            self.options(outer)
            self.assertEqual(handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 3)

    def test_no_keepalive(self):
        """Not asked for, it stays off."""
        transport = self.tcp(object())
        self.options(transport, keepalive=False)
        transport.setTcpKeepAlive.assert_not_called()


class SubscriberTests(ProtocolCase):
    kind = SubscriberProtocol

    def test_messages(self):
        """Channels are subscribed, acknowledged, and their messages come."""
        protocol = self.connect()
        told: list[Any] = []
        protocol.connection.on_subscribed = told.append
        protocol.connection.on_message = lambda *message: told.append(message)
        protocol.subscribe([b"a"])
        protocol.resubscribe(iter([b"b"]))
        self.flush()
        protocol.dataReceived(b"*3\r\n" + bulk(b"message") + bulk(b"a") + bulk(b"x"))
        protocol.unsubscribe([b"a"])
        self.flush()
        self.assertEqual((told, list(self.peer.subscribed)), ([b"a", b"b", (b"a", b"x")], [b"b"]))

    def test_silent(self):
        """A subscription without an acknowledgement ends the connection."""
        self.connect().subscribe([b"a"])
        self.pass_time(50)
        self.assertTrue(self.transport.aborted)

    def test_close(self):
        """A subscriber closes at once."""
        protocol = self.connect()
        protocol.subscribe([b"a"])
        closing = protocol.close(5)
        self.lose()
        self.assertIsNone(self.successResultOf(closing))
