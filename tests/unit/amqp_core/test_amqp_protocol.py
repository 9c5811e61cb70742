"""The connection on a transport: opening, heartbeats, backpressure, and every way to end."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectionAborted
from twisted.internet.error import ConnectionLost as TransportLost
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.test.iosim import FakeTransport, connect
from twisted.trial.unittest import SynchronousTestCase

from tests.support.amqp_peer import Peer, method, split
from twistedcelery.amqp import codec, config, confirms, connection, events, login, methods, protocol, tables
from twistedcelery.amqp.protocol import AMQPProtocol, ConnectionConfig
from twistedcelery.errors import (
    AuthenticationFailed,
    ConnectionLost,
    RemoteProtocolError,
    TLSFailed,
    VirtualHostNotFound,
)


class OpenTests(SynchronousTestCase):
    def test_open(self):
        """Whoever waits is told once the handshake is complete; later callers at once."""
        peer = Peer()
        waiting = [peer.protocol.when_open() for _ in range(2)]
        peer.start()
        peer.tune(frame_max=8192, heartbeat=30)
        self.assertNoResult(waiting[0])
        peer.send(0, "connection.open-ok")
        for deferred in (*waiting, peer.protocol.when_open()):
            self.assertIs(self.successResultOf(deferred), peer.protocol)
        self.assertEqual((peer.protocol.frame_max, peer.protocol.heartbeat), (8192, 30))
        self.assertEqual(peer.protocol.server_properties["product"], "a test")
        self.assertEqual(
            peer.names(),
            ["header", "connection.start-ok", "connection.tune-ok", "connection.open"],
        )

    def test_cancel(self):
        """Whoever stops waiting is forgotten; the others are not."""
        peer = Peer()
        one, two, three = (peer.protocol.when_open() for _ in range(3))
        gone, closed = peer.protocol.when_closed(), peer.protocol.when_closed()
        one.cancel()
        gone.cancel()
        self.failureResultOf(one, CancelledError)
        self.failureResultOf(gone, CancelledError)
        two.addCallback(lambda _: three.cancel())
        peer.open()
        self.successResultOf(two)
        self.failureResultOf(three, CancelledError)
        self.assertEqual(peer.protocol._when_open, [])
        peer.lose()
        self.successResultOf(closed)

    def test_cancelling_others_while_failing(self):
        """Whoever is told of a failure may cancel another one; the third is told all the same."""
        peer = Peer()
        peer.connect()
        one, two, three = (peer.protocol.when_open() for _ in range(3))
        one.addErrback(lambda _: two.cancel())
        peer.lose()
        self.successResultOf(one)
        self.failureResultOf(two, CancelledError)
        self.failureResultOf(three, ConnectionLost)

    def refused(self, peer, kind, text):
        opened = peer.protocol.when_open()
        self.assertTrue(peer.transport.disconnecting)
        self.assertNoResult(opened) if peer.protocol._reason is None else self.failureResultOf(opened, kind)
        peer.lose()
        error = self.failureResultOf(peer.protocol.when_open(), kind).value
        self.assertIs(self.successResultOf(peer.protocol.when_closed()), error)
        self.assertIn(text, str(error))
        self.assertIn("amqp://test", str(error))
        self.assertEqual(peer.clock.getDelayedCalls(), [])

    def test_wrong_password(self):
        """A refused login is AuthenticationFailed, and the close is answered."""
        peer = Peer()
        waiting = peer.protocol.when_open()
        peer.start()
        peer.read()
        peer.send(0, "connection.close", 403, "ACCESS_REFUSED - Login was refused", 0, 0)
        self.assertEqual(peer.names(), ["connection.close-ok"])
        self.assertIsNone(peer.transport.producer)
        self.assertNoResult(waiting)
        self.refused(peer, AuthenticationFailed, "403 ACCESS_REFUSED")
        self.failureResultOf(waiting, AuthenticationFailed)

    def test_wrong_virtual_host(self):
        """A refused virtual host is VirtualHostNotFound."""
        peer = Peer()
        peer.start()
        peer.tune()
        peer.send(0, "connection.close", 530, "NOT_ALLOWED - vhost x not found", 10, 40)
        self.refused(peer, VirtualHostNotFound, "530 NOT_ALLOWED - vhost x not found")

    def test_no_common_login(self):
        """Without a common login method the connection is dropped."""
        peer = Peer()
        peer.start("GSSAPI")
        self.refused(peer, AuthenticationFailed, "GSSAPI")

    def test_garbage(self):
        """What is no AMQP drops the connection."""
        peer = Peer()
        peer.connect()
        peer.protocol.dataReceived(b"HTTP/1.1 400 Bad Request\r\n")
        self.refused(peer, RemoteProtocolError, "does not speak AMQP")

    def test_lost_in_every_state(self):
        """A connection lost in any state says so to whoever waits, exactly once, and leaves no timer."""
        for steps in range(4):
            with self.subTest(steps=steps):
                peer = Peer()
                opened, closed = peer.protocol.when_open(), peer.protocol.when_closed()
                (peer.connect, peer.start, lambda p=peer: (p.start(), p.tune()), peer.open)[steps]()
                peer.lose(TransportLost("reset"))
                error = self.successResultOf(closed)
                self.assertIs(type(error), ConnectionLost)
                self.assertIn("reset", str(error))
                self.assertIsInstance(error.__cause__, TransportLost)
                if steps < 3:
                    self.assertIs(self.failureResultOf(opened).value, error)
                else:
                    self.successResultOf(opened)
                self.assertIs(self.failureResultOf(peer.protocol.when_open()).value, error)
                self.assertEqual(peer.clock.getDelayedCalls(), [])

    def test_closed_cleanly(self):
        """That the connection was closed cleanly explains nothing, and is left out."""
        peer = Peer()
        peer.open()
        peer.lose()
        error = self.successResultOf(peer.protocol.when_closed())
        self.assertEqual(str(error), "the connection ended [amqp://test]")

    def test_old_server(self):
        """A server that cannot say that the login failed ends the connection; that is what it means."""
        peer = Peer()
        peer.start(properties={})
        peer.lose()
        self.failureResultOf(peer.protocol.when_open(), AuthenticationFailed)

    def test_tls(self):
        """A TLS error is TLSFailed."""
        from OpenSSL.SSL import Error

        peer = Peer()
        peer.connect()
        peer.lose(Error([("SSL routines", "", "certificate verify failed")]))
        error = self.failureResultOf(peer.protocol.when_open(), TLSFailed).value
        self.assertIn("certificate verify failed", str(error))

    def test_against_a_server(self):
        """The handshake works over a pair of transports."""
        server_wrote = [
            method(0, "connection.start", 0, 9, {}, "PLAIN", "en_US"),
            method(0, "connection.tune", 0, 0, 0),
            method(0, "connection.open-ok"),
        ]

        class Server(Protocol):
            transport: Any

            def dataReceived(self, data):
                for name in ("header", "connection.start-ok", "connection.open"):
                    if any(seen.name == name for seen in split(data)):
                        self.transport.write(server_wrote.pop(0))

        peer = Peer()
        server = Server()
        pump = connect(
            server,
            FakeTransport(server, isServer=True),
            peer.protocol,
            FakeTransport(peer.protocol, isServer=False),
        )
        pump.flush()
        self.assertIs(self.successResultOf(peer.protocol.when_open()), peer.protocol)
        closing = peer.protocol.close(5)
        pump.flush()
        self.assertNoResult(closing)
        server.transport.write(method(0, "connection.close-ok"))
        pump.flush()
        self.successResultOf(closing)
        self.assertEqual(peer.clock.getDelayedCalls(), [])


class HeartbeatTests(SynchronousTestCase):
    def advance(self, peer, seconds, receive=False):
        """Let time pass second by second; return when heartbeats were written."""
        beats = []
        for second in range(1, seconds + 1):
            peer.clock.advance(1)
            if receive:
                peer.protocol.dataReceived(b"\x08\0\0\0\0\0\0\xce")
            if peer.names() == ["heartbeat"]:
                beats.append(second)
        return beats

    def test_sent(self):
        """A heartbeat is sent when nothing was written for half the interval, and goes on being sent."""
        peer = Peer()
        peer.open(heartbeat=60)
        self.assertEqual(self.advance(peer, 120, receive=True), [30, 60, 90, 120])

    def test_traffic_counts(self):
        """Whatever is written stands for a heartbeat."""
        peer = Peer()
        peer.open(heartbeat=60)
        channel = peer.open_channel()
        for _ in range(20):
            channel.publish("", "q", {}, None, b"")
            peer.read()
            self.assertEqual(self.advance(peer, 10, receive=True), [])

    def test_silent_peer(self):
        """A peer that says nothing for two intervals is given up, within a quarter of one."""
        peer = Peer()
        peer.open(heartbeat=60)
        channel = peer.open_channel()
        closed: list[Exception] = []
        channel.on_closed = closed.append
        self.advance(peer, 14)
        peer.protocol.dataReceived(b"\x08")
        self.advance(peer, 105)
        self.assertFalse(peer.transport.disconnecting)
        self.advance(peer, 31)
        self.assertTrue(peer.transport.disconnecting)
        self.assertFalse(channel.is_open)
        peer.lose(ConnectionAborted())
        error = self.successResultOf(peer.protocol.when_closed())
        self.assertIs(type(error), ConnectionLost)
        self.assertIn("silent for 120 seconds", str(error))
        self.assertEqual(closed, [error])
        self.assertEqual(peer.clock.getDelayedCalls(), [])

    def test_full_buffer(self):
        """A silent peer is aborted, not closed: what is in the buffer would keep it open for ever."""
        peer = Peer()
        aborted: list[float] = []
        self.patch(peer.transport, "abortConnection", lambda: aborted.append(peer.clock.seconds()))
        self.patch(peer.transport, "loseConnection", self.fail)
        peer.open(heartbeat=4)
        peer.protocol.pauseProducing()
        self.advance(peer, 20)
        self.assertEqual(aborted, [8.0])

    def test_any_byte_is_life(self):
        """A large message that trickles in keeps the connection alive."""
        peer = Peer()
        peer.open(heartbeat=4)
        peer.protocol.dataReceived(b"\x01\0\1\0\0\xff\xff")
        for _ in range(100):
            peer.protocol.dataReceived(b"\0")
            self.advance(peer, 5)
        self.assertFalse(peer.transport.disconnecting)

    def test_none(self):
        """Without heartbeats there is no timer."""
        peer = Peer(heartbeat=0)
        peer.open()
        self.assertEqual(peer.clock.getDelayedCalls(), [])

    def test_reactor_was_stopped(self):
        """After this process itself was stopped for long, the peer is heard before it is given up."""
        peer = Peer()
        peer.open(heartbeat=60)
        peer.clock.advance(3600)
        self.assertFalse(peer.transport.disconnecting)


class BackpressureTests(SynchronousTestCase):
    def setUp(self):
        self.peer = Peer()
        self.protocol = self.peer.open()
        self.told: list[str | None] = []
        self.protocol.on_writable = lambda: self.told.append("writable")
        self.protocol.on_blocked = self.told.append

    def test_transport(self):
        """The transport's pause and resume are told."""
        producer: Any = self.peer.transport.producer
        self.assertIs(producer, self.protocol)
        self.assertTrue(self.peer.transport.streaming)
        self.assertTrue(self.protocol.writable)
        producer.pauseProducing()
        self.assertFalse(self.protocol.writable)
        self.assertEqual(self.told, [])
        producer.resumeProducing()
        self.assertTrue(self.protocol.writable)
        self.assertEqual(self.told, ["writable"])
        producer.stopProducing()

    def test_blocked(self):
        """So are RabbitMQ's alarms, and writing goes on when neither hinders."""
        self.peer.send(0, "connection.blocked", "low on memory")
        self.assertEqual((self.protocol.blocked, self.told), ("low on memory", ["low on memory"]))
        self.protocol.pauseProducing()
        self.peer.send(0, "connection.unblocked")
        self.assertEqual((self.protocol.blocked, self.told), (None, ["low on memory", None]))
        self.peer.send(0, "connection.blocked", "")
        self.assertEqual(self.protocol.blocked, "")
        self.protocol.resumeProducing()
        self.peer.send(0, "connection.unblocked")
        self.assertEqual(self.told, ["low on memory", None, "", None, "writable"])

    def test_nobody_listens(self):
        """Nobody has to listen."""
        self.protocol.on_writable = self.protocol.on_blocked = None
        self.peer.send(0, "connection.blocked", "x")
        self.peer.send(0, "connection.unblocked")
        self.assertIsNone(self.protocol.blocked)

    def test_not_while_ending(self):
        """Nobody is invited to write to a connection that ends."""
        self.protocol.close(5)
        self.protocol.resumeProducing()
        self.assertEqual(self.told, [])

    def test_error_in_callback(self):
        """An error in a callback is logged, and costs nothing else."""
        self.protocol.on_writable = lambda: 1 / 0
        self.protocol.resumeProducing()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertFalse(self.peer.transport.disconnecting)


class CloseTests(SynchronousTestCase):
    def setUp(self):
        self.peer = Peer()
        self.protocol = self.peer.open()
        self.log: list[object] = []
        transport = self.peer.transport
        self.patch(transport, "loseConnection", lambda: self.log.append(("lose", transport.producer)))
        self.patch(transport, "abortConnection", lambda: self.log.append("abort"))

    def test_orderly(self):
        """Close, close-ok, and only then the transport, without its producer; fires when it is gone."""
        channel = self.peer.open_channel(confirm=True)
        outcomes: list[type] = []
        channel.on_outcomes = lambda told: outcomes.extend(type(error) for _, error in told)
        channel.publish("", "q", {}, None, b"")
        pending = channel.qos(1)
        self.peer.read()
        closing = [self.protocol.close(5), self.protocol.close(5)]
        self.assertEqual(self.peer.read(), [(0, "connection.close", [200, "", 0, 0])])
        self.assertFalse(channel.is_open)
        self.failureResultOf(channel.qos(1), ConnectionLost)
        self.failureResultOf(self.protocol.open_channel(), ConnectionLost)
        self.failureResultOf(self.protocol.when_open(), ConnectionLost)
        self.assertEqual(self.log, [])
        self.peer.send(0, "connection.close-ok")
        self.assertEqual(self.log, [("lose", None)])
        self.assertNoResult(closing[0])
        self.peer.lose()
        for deferred in (*closing, self.protocol.close(5)):
            self.assertIsNone(self.successResultOf(deferred))
        self.failureResultOf(pending, ConnectionLost)
        self.assertEqual(outcomes, [ConnectionLost])
        self.assertIn("closed by this side", str(self.successResultOf(self.protocol.when_closed())))
        self.assertEqual(self.peer.clock.getDelayedCalls(), [])

    def test_deadline(self):
        """A server that does not answer is left at the deadline; the earliest one counts."""
        closing = self.protocol.close(10)
        self.peer.clock.advance(1)
        self.protocol.close(3)
        self.protocol.close(5)
        self.peer.clock.advance(2)
        self.assertEqual(self.log, [])
        self.peer.clock.advance(1)
        self.assertEqual(self.log, ["abort"])
        self.peer.lose(ConnectionAborted())
        self.assertIsNone(self.successResultOf(closing))
        self.assertIn("closed by this side", str(self.successResultOf(self.protocol.when_closed())))
        self.assertEqual(self.peer.clock.getDelayedCalls(), [])

    def test_deadline_after_the_answer(self):
        """The deadline also holds for a transport that does not get rid of its buffer."""
        self.protocol.close(2)
        self.peer.send(0, "connection.close-ok")
        self.peer.clock.advance(2)
        self.assertEqual(self.log, [("lose", None), "abort"])

    def test_close_during_handshake(self):
        """A handshake is cut short."""
        peer = Peer()
        opened = peer.protocol.when_open()
        peer.start()
        closing = peer.protocol.close(5)
        self.assertTrue(peer.transport.disconnecting)
        peer.tune()
        peer.lose()
        self.failureResultOf(opened, ConnectionLost)
        self.assertIsNone(self.successResultOf(closing))

    def test_close_before_the_connection(self):
        """Closed before it was made, it ends at once, and hangs up if it is made after all."""
        peer = Peer()
        opened = peer.protocol.when_open()
        self.assertIsNone(self.successResultOf(peer.protocol.close(5)))
        self.failureResultOf(opened, ConnectionLost)
        peer.connect()
        self.assertTrue(peer.transport.disconnecting)
        self.assertEqual(peer.transport.value(), b"")
        peer.lose()

    def test_cancel(self):
        """Cancelling the close only stops waiting."""
        closing = self.protocol.close(5)
        closing.cancel()
        self.failureResultOf(closing, CancelledError)
        self.peer.send(0, "connection.close-ok")
        self.assertEqual(self.log, [("lose", None)])
        self.peer.lose()

    def test_closed_by_server(self):
        """A close of the server's is answered; if the transport hangs then, it is aborted."""
        self.peer.send(0, "connection.close", 320, "CONNECTION_FORCED - shutdown", 0, 0)
        self.assertEqual(self.peer.names(), ["connection.close-ok"])
        self.assertEqual(self.log, [("lose", None)])
        self.peer.clock.advance(5)
        self.assertEqual(self.log, [("lose", None), "abort"])
        closing = self.protocol.close(5)
        self.peer.lose(ConnectionAborted())
        self.successResultOf(closing)
        self.assertIn("320 CONNECTION_FORCED", str(self.successResultOf(self.protocol.when_closed())))
        self.assertEqual(self.peer.clock.getDelayedCalls(), [])

    def test_abort(self):
        """An abort drops the connection at once, with the reason given; the first reason counts."""
        reason = ConnectionLost("because")
        self.protocol.abort(reason)
        self.assertEqual(self.log, ["abort"])
        self.protocol.dataReceived(method(0, "connection.blocked", "x"))
        self.assertIsNone(self.protocol.blocked)
        self.protocol.abort(ConnectionLost("another"))
        self.peer.lose()
        self.protocol.abort(ConnectionLost("a third"))
        self.assertIs(self.successResultOf(self.protocol.when_closed()), reason)

    def test_abort_while_receiving(self):
        """After an abort from a callback, nothing of the bytes at hand is told."""
        told = []

        def on_blocked(reason):
            told.append(reason)
            self.protocol.abort(ConnectionLost("enough"))

        self.protocol.on_blocked = on_blocked
        self.protocol.dataReceived(method(0, "connection.blocked", "x") * 2)
        self.assertEqual(told, ["x"])

    def test_garbage_on_an_open_connection(self):
        """Garbage ends the connection with the peer's error; what was on its way on it is lost."""
        channel = self.peer.open_channel()
        pending = channel.declare_queue("q")
        self.protocol.dataReceived(b"\x05garbage")
        self.assertEqual(self.log, ["abort"])
        self.assertFalse(channel.is_open)
        closed = self.protocol.when_closed()
        self.peer.lose(ConnectionAborted())
        lost = self.failureResultOf(pending, ConnectionLost).value
        self.assertEqual(str(lost).count(self.protocol.config.url), 1)
        self.assertIs(lost.__cause__, self.successResultOf(closed))
        self.assertIsInstance(lost.__cause__, RemoteProtocolError)


class AnswerTests(SynchronousTestCase):
    """A server that gives signs of life, but no answers."""

    def setUp(self):
        self.peer = Peer(declare_timeout=20)
        self.peer.open(heartbeat=60)
        self.channel = self.peer.open_channel()

    def pass_time(self, seconds):
        """Let time pass, with heartbeats of the server's."""
        for _ in range(seconds):
            self.peer.clock.advance(1)
            self.peer.protocol.dataReceived(codec.HEARTBEAT)

    def assert_unanswered(self, method):
        """The connection is dropped within a fourth of the time more, and says why."""
        gone = self.peer.protocol.when_closed()
        self.pass_time(19)
        self.assertFalse(self.peer.transport.disconnected)
        self.pass_time(7)
        self.assertTrue(self.peer.transport.disconnected)
        self.peer.lose()
        reason = self.successResultOf(gone)
        self.assertIsInstance(reason, ConnectionLost)
        self.assertIn(f"no answer to {method} within 20 s", str(reason))
        self.assertEqual(self.peer.clock.getDelayedCalls(), [])

    def test_declaration(self):
        """Who waits for the answer to a declaration is told in time."""
        declaring = self.channel.declare_queue("q")
        self.assert_unanswered("queue.declare")
        self.failureResultOf(declaring, ConnectionLost)

    def test_opening(self):
        """The same holds for channels, with confirms and without, that are opened and closed."""
        for confirm in (False, True):
            self.setUp()
            opening = self.peer.protocol.open_channel(confirm=confirm)
            self.assert_unanswered("channel.open")
            self.failureResultOf(opening, ConnectionLost)
        self.setUp()
        closing = self.channel.close()
        self.assert_unanswered("channel.close")
        self.successResultOf(closing)

    def test_answers(self):
        """The time is that of each answer: many may take longer together, and none is waited for once all have come."""
        for _ in range(8):
            self.channel.bind_queue("q", "x").addErrback(lambda _: None)
        for _ in range(4):
            self.pass_time(15)
            self.peer.send(self.channel.number, "queue.bind-ok")
        self.assertFalse(self.peer.transport.disconnected)
        for _ in range(4):
            self.peer.send(self.channel.number, "queue.bind-ok")
        self.pass_time(100)
        self.assertFalse(self.peer.transport.disconnected)
        self.assertEqual(len(self.peer.clock.getDelayedCalls()), 1)
        self.channel.declare_queue("q").addErrback(lambda _: None)
        self.assert_unanswered("queue.declare")

    def test_blocked(self):
        """A server that has blocked the connection does not read what it is asked; nor has it been asked what has not left."""
        self.channel.declare_queue("q").addErrback(lambda _: None)
        self.peer.send(0, "connection.blocked", "low on memory")
        self.pass_time(1000)
        self.peer.send(0, "connection.unblocked")
        self.peer.protocol.pauseProducing()
        self.pass_time(1000)
        self.peer.protocol.resumeProducing()
        self.assert_unanswered("queue.declare")

    def test_stopped_reactor(self):
        """A reactor that was held up reads what has come meanwhile before it gives the server up."""
        self.channel.declare_queue("q").addErrback(lambda _: None)
        for _ in range(4):
            self.peer.clock.advance(3600)
        self.assertFalse(self.peer.transport.disconnected)
        self.peer.send(self.channel.number, "queue.declare-ok", "q", 0, 0)
        self.pass_time(100)
        self.assertFalse(self.peer.transport.disconnected)

    def test_for_ever(self):
        """0: an answer may take any time."""
        self.peer = Peer(declare_timeout=0)
        self.peer.open(heartbeat=60)
        self.peer.open_channel().declare_queue("q").addErrback(lambda _: None)
        self.pass_time(1000)
        self.assertFalse(self.peer.transport.disconnected)


class UnreadAnswersTests(SynchronousTestCase):
    """A server that has us write and does not read what we write."""

    #: Bytes; the real bound is a MiB.
    bound = 4096

    def setUp(self):
        self.patch(protocol, "_UNREAD", self.bound)
        self.peer = Peer()
        self.protocol = self.peer.open()
        self.channel = self.peer.open_channel()
        consuming = self.channel.consume("q", self.acknowledge, no_ack=False)
        self.peer.send(self.channel.number, "basic.consume-ok", "me")
        self.successResultOf(consuming)
        self.peer.read()
        self.protocol.pauseProducing()

    def acknowledge(self, delivery):
        self.channel.ack(delivery.delivery_tag)

    # What a server may have us write:

    def flow(self):
        self.peer.send(self.channel.number, "channel.flow", True)

    def cancel(self):
        self.peer.send(self.channel.number, "basic.cancel", "stranger", False)

    def deliver(self):
        self.peer.deliver(self.channel.number, 1, b"")

    def close(self):
        """A channel is closed, opened again by its owner, and closed again."""
        self.protocol.open_channel(confirm=True).addErrback(lambda _: None)
        self.peer.send(2, "channel.open-ok")
        self.peer.send(2, "confirm.select-ok")
        self.peer.send(2, "channel.close", 406, "no", 0, 0)

    def test_bounded(self):
        """What it is answered is bounded, whatever it says to have us write; then the connection is dropped."""
        for flood in ("flow", "cancel", "deliver", "close"):
            self.setUp()
            for _ in range(self.bound):
                getattr(self, flood)()
                if self.peer.transport.disconnecting:
                    break
            self.peer.lose(ConnectionAborted())
            error = self.successResultOf(self.protocol.when_closed())
            self.assertIsInstance(error, RemoteProtocolError, flood)
            self.assertIn("does not read", str(error))
            written = len(self.peer.transport.value())
            self.assertTrue(self.bound < written < self.bound + 100, written)

    def test_read_in_time(self):
        """A server that reads now and then may ask as much as it likes, and messages do not count."""
        for _ in range(10):
            for _ in range(self.bound // 14):
                self.flow()
            self.protocol.resumeProducing()
            self.protocol.pauseProducing()
        self.channel.publish("", "q", {}, None, b"x" * self.bound)
        self.flow()
        self.assertFalse(self.peer.transport.disconnecting)


class ImportTests(SynchronousTestCase):
    def test_no_reactor(self):
        """Importing the protocol installs no reactor."""
        code = "import sys, twistedcelery.amqp.protocol as p; sys.exit('twisted.internet.reactor' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_core_without_io(self):
        """What is below the channel and the protocol imports nothing of Twisted's."""
        for module in (codec, config, confirms, connection, events, login, methods, tables):
            assert module.__file__ is not None
            source = Path(module.__file__).read_text()
            imported = set()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Import):
                    imported |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module or "")
            with self.subTest(module=module.__name__):
                self.assertEqual([name for name in imported if name.startswith("twisted.")], [])

    def test_config(self):
        """Without arguments it is what RabbitMQ takes from localhost."""
        protocol = AMQPProtocol(ConnectionConfig(), Clock())
        self.assertEqual((protocol.config.username, protocol.config.virtual_host), ("guest", "/"))
