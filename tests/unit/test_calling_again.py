"""Whoever is told how a call ended may make the next one at once, whatever has just ended with it: that one is a call like any other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kombu.connection import Connection
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.support.amqp_peer import method
from tests.support.redis_wires import Wires
from tests.unit._scripted import Attempts
from twistedcelery._operations import DeclareExchange, DeclareQueue, Entity, Publish
from twistedcelery._outbox import Outbox
from twistedcelery._unit import Unit
from twistedcelery.amqp.broker import AMQPBroker
from twistedcelery.errors import NotSent, OutcomeUnknown, Refused
from twistedcelery.redis.broker import RedisBroker
from twistedcelery.redis.protocol import CommandProtocol
from twistedcelery.redis.routing import Routing
from twistedcelery.redis.settings import broker_layout

if TYPE_CHECKING:
    from twistedcelery.amqp.protocol import AMQPProtocol


class Owner:
    """Makes the next call as soon as it is told of the end of this one."""

    def __init__(self, outbox: Outbox, following: Publish | None = None) -> None:
        self.outbox = outbox
        self.following = following
        self.told: list[Exception | None] = []
        self.next: Owner | None = None

    def _sent(self, error: Exception | None) -> None:
        self.told.append(error)
        if self.following is not None:
            self.next = call(self.outbox, self.following)


def call(outbox: Outbox, message: Publish, following: Publish | None = None) -> Owner:
    owner = Owner(outbox, following)
    outbox.submit(Unit([message], owner))
    return owner


def message(name: str, exchange: str = "", **settings: Any) -> Publish:
    settings = {"task_id": name, "retry": True, "retry_policy": {"max_retries": None}, **settings}
    return Publish(exchange, "q", b"x", {}, {}, **settings)


def queue(name: str, *, cacheable: bool = True) -> Entity:
    return Entity((DeclareQueue(name),), cacheable=cacheable)


class AMQP(SynchronousTestCase):
    def setUp(self):
        self.clock = Clock()
        self.attempts: Any = Attempts(self.clock)
        self.broker = AMQPBroker(self.clock, self.attempts, 1, 4, lambda failures: 0.5)
        self.outbox = Outbox(
            self.clock, self.broker, None, connect=self.broker.connect, limit=100, limit_bytes=10_000
        )
        self.broker.connect()
        self.answer()

    @property
    def peer(self):
        return self.attempts.peer

    def answer(self):
        """Let everything be said that is to be said."""
        for _ in range(10):
            self.peer.answer()
            self.clock.advance(0)

    def confirm(self):
        """Confirm what has been published; returns the routing keys' task ids, as they went out."""
        published = [one for one in self.peer.said("basic.publish") if one.channel]
        counts: dict[int, int] = {}
        for one in published:
            counts[one.channel] = counts.get(one.channel, 0) + 1
        for channel, count in counts.items():
            self.peer.send(channel, "basic.ack", count, True)
        return len(published)

    def finish(self, owner: Owner) -> None:
        """See that the next call was made, and succeeds."""
        following = owner.next
        assert following is not None
        self.assertEqual(following.told, [])
        for _ in range(4):
            self.clock.advance(0.5)
            self.answer()
        self.assertEqual(self.confirm(), 1)
        self.assertEqual(following.told, [None])

    def refuse(self, name: str, text: str, code: int = 406) -> None:
        """The server refuses a method, and closes the channel."""
        self.answer()
        self.peer.silent.clear()
        for one in self.peer.said():
            if one.name == name:
                self.peer.send(one.channel, "channel.close", code, text, 50, 10)
        self.peer.answer()

    def test_refused_declaration(self):
        """Behind a declaration that was refused (406): with a declaration of its own, and without, also where it is not to be retried."""
        for retry in (True, False):
            for entities in ((), (queue("other"),)):
                self.setUp()
                self.peer.silent.add("queue.declare")
                following = message("b", entities=entities, retry=retry)
                owner = call(self.outbox, message("a", entities=(queue("q"),)), following)
                self.refuse("queue.declare", "PRECONDITION_FAILED")
                self.assertEqual([type(error) for error in owner.told], [Refused])
                self.finish(owner)

    def test_refused_message(self):
        """Behind a message whose exchange is gone (404)."""
        for retry in (True, False):
            self.setUp()
            exchange = Entity((DeclareExchange("x"),))
            following = message("b", entities=(queue("other"),), retry=retry)
            # One that may leave only once: another would declare its exchange again, and leave again.
            owner = call(self.outbox, message("a", "x", entities=(exchange,), retry=False), following)
            self.refuse("basic.publish", "NOT_FOUND - no exchange 'x' in vhost '/'", 404)
            self.assertEqual([type(error) for error in owner.told], [Refused])
            self.finish(owner)

    def test_closed_connection(self):
        """Behind a declaration for which the server closes the connection (503)."""
        for retry in (True, False):
            self.setUp()
            self.peer.silent.add("queue.declare")
            following = message("b", retry=retry)
            owner = call(self.outbox, message("a", entities=(queue("q"),)), following)
            self.peer.answer()
            self.peer.send(0, "connection.close", 503, "COMMAND_INVALID", 50, 10)
            self.assertEqual([type(error) for error in owner.told], [Refused])
            self.peer.lose()
            self.finish(owner)

    def test_lost_connection(self):
        """Behind a message whose connection was lost under it, and one that was garbled."""
        for end in (
            lambda protocol: self.peer.lose(),
            lambda protocol: protocol.dataReceived(b"garbage that is no frame at all"),
            lambda protocol: protocol.abort(ConnectionError()),
        ):
            for retry in (True, False):
                self.setUp()
                following = message("b", retry=retry)
                owner = call(self.outbox, message("a", retry=False), following)
                self.peer.answer()
                end(self.peer.protocol)
                self.peer.lose()
                self.assertEqual([type(error) for error in owner.told], [OutcomeUnknown])
                self.finish(owner)

    def test_in_between(self):
        """While a connection ends, and before it is lost, nobody is told that it takes work."""
        protocol: AMQPProtocol = self.peer.protocol
        self.assertTrue(self.broker.ready)
        protocol.dataReceived(method(0, "connection.close", 320, "CONNECTION_FORCED", 0, 0))
        self.assertFalse(self.broker.ready)
        owner = call(self.outbox, message("a", retry=False))
        self.assertEqual(owner.told, [])

    def test_unanswered(self):
        """A declaration that is never answered holds nobody for good: the others leave over the next connection."""
        self.peer.silent.add("queue.declare")
        first = call(self.outbox, message("a", entities=(queue("q"),), retry=False))
        others = [call(self.outbox, message("b")) for _ in range(3)]
        self.answer()
        held = self.peer
        for _ in range(80):
            self.clock.advance(0.5)
        self.assertTrue(held.transport.disconnected)
        held.lose()
        self.assertEqual([type(error) for error in first.told], [NotSent])
        self.assertIn("no answer to queue.declare within 30 s", str(first.told[0]))
        self.clock.advance(1)
        self.answer()
        self.assertEqual(self.confirm(), 3)
        self.assertEqual([other.told for other in others], [[None]] * 3)


class Redis(SynchronousTestCase):
    def setUp(self):
        self.wires = Wires()
        layout = broker_layout(Connection("redis://"), 0)
        self.broker = RedisBroker(
            self.wires.clock,
            self.wires.attempts(CommandProtocol),
            1,
            None,
            lambda failures: 0.2,
            routing=lambda db: Routing(layout),
        )
        self.outbox = Outbox(
            self.wires.clock, self.broker, None, connect=self.broker.connect, limit=100, limit_bytes=10_000
        )
        self.broker.connect()
        self.wires.flush()

    def finish(self, owner: Owner) -> None:
        """See that the next call was made, and succeeds."""
        following = owner.next
        assert following is not None
        self.assertEqual(following.told, [])
        self.wires.pass_time(1)
        self.assertEqual(following.told, [None])

    def test_refused(self):
        """Behind a message that a server refuses which wants another password from now on, or has become a replica."""
        for answer in (b"-NOAUTH Authentication required.\r\n", b"-READONLY\r\n"):
            for retry in (True, False):
                self.setUp()
                connection = self.wires.of(CommandProtocol)
                connection.peer.answers[b"LPUSH"] = answer
                owner = call(self.outbox, message("a", retry=False), message("b", retry=retry))
                self.wires.flush()
                self.assertEqual(len(owner.told), 1)
                self.assertIsNotNone(owner.told[0])
                if retry or answer.startswith(b"-NOAUTH"):
                    self.finish(owner)
                else:
                    # No server takes it: that is the truth.
                    assert owner.next is not None
                    self.assertEqual([type(error) for error in owner.next.told], [NotSent])

    def test_lost(self):
        """Behind a message for which no way could be found, as the connection was lost."""
        for retry in (True, False):
            self.setUp()
            connection = self.wires.of(CommandProtocol)
            connection.peer.hold = True
            owner = call(self.outbox, message("a", "x", retry=False), message("b", retry=retry))
            self.wires.flush()
            connection.lose()
            self.finish(owner)
