"""The AMQP broker: channels, declarations, who is to blame; its server is a script."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

from twisted.internet.defer import succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from tests.support.amqp_peer import content, method
from tests.unit._scripted import Attempts, Scripted
from twistedcelery._operations import BindQueue, DeclareExchange, DeclareQueue, Entity, Publish
from twistedcelery._outbox import Outbox
from twistedcelery._unit import Unit
from twistedcelery.amqp import broker as amqp_broker
from twistedcelery.amqp.broker import AMQPBroker
from twistedcelery.errors import (
    ConnectionLost,
    NotSent,
    OutcomeUnknown,
    Refused,
    RemoteProtocolError,
    ServerUnreachable,
    Unroutable,
)


class Listener:
    def __init__(self):
        self.ready = 0
        self.unavailable: list[Exception] = []
        self.outcomes: dict[str, list[Any]] = {}
        self.on_published: Any = None

    def broker_ready(self):
        self.ready += 1

    def broker_unavailable(self, reason):
        self.unavailable.append(reason)

    def published(self, message, error):
        self.outcomes.setdefault(message.task_id, []).append(error)
        if self.on_published is not None:
            self.on_published()


class BrokerTestCase(SynchronousTestCase):
    def setUp(self):
        self.clock = Clock()
        self.attempts: Any = Attempts(self.clock)
        self.broker = AMQPBroker(self.clock, self.attempts, 1, 4, lambda failures: 1.0)
        self.listener = Listener()
        self.broker.listen(self.listener)

    def connect(self):
        self.broker.connect()
        self.peer.answer()
        self.peer.said()

    @property
    def peer(self):
        return self.attempts.peer

    def message(self, name="t", exchange="", **settings):
        body, properties = settings.pop("body", b"x"), settings.pop("properties", {})
        headers = settings.pop("headers", {})
        return Publish(exchange, "q", body, properties, headers, task_id=name, **settings)

    def send(self, *messages):
        """Prepare and publish, as the outbox does; returns the errors of those that could not be prepared."""
        errors: list[Any] = []
        for message in messages:
            told: list[Any] = []
            if not self.broker.prepare(message, told.append):
                self.peer.answer()
                (error,) = told
                if error is not None:
                    errors.append(error)
                    continue
            self.broker.publish(message)
        self.peer.answer()
        return errors

    def published(self):
        return self.peer.said("basic.publish")

    def confirm(self, channel, tag, *, multiple=False):
        self.peer.send(channel, "basic.ack", tag, multiple)


class Channels(BrokerTestCase):
    def test_ready(self):
        """Work is taken once both channels are open, and said so once."""
        self.broker.connect()
        self.assertFalse(self.broker.ready)
        self.peer.answer()
        self.assertTrue(self.broker.ready and self.broker.connected)
        self.assertEqual(self.listener.ready, 1)

    def test_outcomes(self):
        """A confirm, a return and a nack reach the listener as nothing, Unroutable and Refused."""
        self.connect()
        self.send(self.message("a"), self.message("b", properties={"correlation_id": "b"}), self.message("c"))
        channel = self.published()[0].channel
        self.peer.protocol.dataReceived(
            method(channel, "basic.return", 312, "NO_ROUTE", "", "q")
            + content(channel, b"x", {"correlation_id": "b"})
        )
        self.confirm(channel, 2, multiple=True)
        self.peer.send(channel, "basic.nack", 3, False, False)
        self.assertEqual(self.listener.outcomes["a"], [None])
        self.assertIsInstance(self.listener.outcomes["b"][0], Unroutable)
        self.assertIsInstance(self.listener.outcomes["c"][0], Refused)

    def test_lost(self):
        """A lost connection loses what has no outcome; the next one is made and takes work."""
        self.connect()
        self.send(self.message("a"))
        self.peer.lose()
        self.assertIsInstance(self.listener.outcomes["a"][0], ConnectionLost)
        self.assertFalse(self.broker.ready or self.broker.connected)
        self.clock.advance(1)
        self.peer.answer()
        self.assertEqual((len(self.attempts.peers), self.listener.ready), (2, 2))

    def test_garbage(self):
        """It is the same where garbage ends the connection: the messages are lost, not refused."""
        self.connect()
        self.send(self.message("a"))
        self.peer.protocol.dataReceived(b"garbage that is no frame at all")
        self.peer.lose()
        (error,) = self.listener.outcomes["a"]
        self.assertIs(type(error), ConnectionLost)
        self.assertIsInstance(error.__cause__, RemoteProtocolError)

    def test_many_outcomes(self):
        """A confirm of many messages, and the end of many, are told in slices; work is taken when all is told."""
        self.connect()
        for number in range(1000):
            self.broker.publish(self.message(str(number)))
        channel = self.published()[0].channel
        self.listener.on_published = lambda: setattr(self.clock, "rightNow", self.clock.rightNow + 0.0001)
        self.confirm(channel, 500, multiple=True)
        self.assertLess(len(self.listener.outcomes), 30)
        self.peer.lose()
        for turn in range(1000):
            self.clock.advance(0)
            if self.broker.connected:
                self.peer.answer()
            self.assertEqual(self.broker.ready, len(self.listener.outcomes) == 1000 and self.broker.connected)
            if self.broker.ready:
                break
            if turn == 10:
                self.clock.advance(1)  # the next connection
        self.assertEqual(list(self.listener.outcomes), [str(number) for number in range(1000)])
        kinds = [type(outcome) for (outcome,) in self.listener.outcomes.values()]
        self.assertEqual(kinds, [type(None)] * 500 + [ConnectionLost] * 500)

    def test_stop_with_outcomes_untold(self):
        """A stop fires when the last outcome is told."""
        self.connect()
        for number in range(100):
            self.broker.publish(self.message(str(number)))
        self.listener.on_published = lambda: setattr(self.clock, "rightNow", self.clock.rightNow + 0.0001)
        stopped = self.broker.stop(5)
        self.peer.answer()
        self.assertNoResult(stopped)
        for _ in range(10):
            self.clock.advance(0)
        self.successResultOf(stopped)
        self.assertEqual(len(self.listener.outcomes), 100)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_bug_of_the_listener(self):
        """A bug in what follows an outcome is logged, and keeps no other from being told."""
        self.connect()
        self.send(self.message("a"), self.message("b"))
        self.listener.on_published = lambda: 1 / 0
        self.confirm(self.published()[0].channel, 2, multiple=True)
        self.assertEqual(list(self.listener.outcomes), ["a", "b"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)

    def test_unavailable(self):
        """A failed round is told, and does not end the attempts."""
        self.attempts.refuse()
        self.broker.connect()
        self.assertIsInstance(self.listener.unavailable[0], ServerUnreachable)
        self.clock.advance(1)
        self.peer.answer()
        self.assertTrue(self.broker.ready)

    def test_blocked(self):
        """A server that blocks, and a transport that is full, stop the work until they stop to."""
        self.connect()
        self.peer.send(0, "connection.blocked", "memory")
        self.assertFalse(self.broker.ready)
        self.assertTrue(self.broker.connected)
        self.peer.send(0, "connection.unblocked")
        self.assertTrue(self.broker.ready)
        # A transport may say so while it takes a write.
        self.peer.transport.write = lambda data: self.peer.protocol.pauseProducing()
        self.broker.publish(self.message("a"))
        self.assertFalse(self.broker.ready)
        del self.peer.transport.write
        self.peer.protocol.resumeProducing()
        self.assertTrue(self.broker.ready)
        self.assertEqual(self.listener.ready, 3)

    def test_ending_connection(self):
        """A message that comes while the connection is ending is not sent, and not lost either."""
        self.connect()
        self.peer.protocol.dataReceived(b"garbage that is no frame at all")
        self.assertFalse(self.broker.ready)
        self.broker.publish(self.message("a"))
        self.assertIs(type(self.listener.outcomes["a"][0]), NotSent)

    def test_no_channel(self):
        """A server that allows no channel is left."""
        self.broker.connect()
        self.peer.seen += self.peer.read()
        channel = self.peer.seen[0].channel
        self.peer.send(channel, "channel.close", 504, "CHANNEL_ERROR", 20, 10)
        self.assertTrue(self.peer.transport.disconnecting or self.peer.transport.aborting)

    def test_stop(self):
        """A stop says goodbye and leaves no timer."""
        self.connect()
        stopped = self.broker.stop(5)
        self.peer.answer()
        self.successResultOf(stopped)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop_unanswered(self):
        """A server that does not answer the goodbye is left after the deadline."""
        self.connect()
        stopped = self.broker.stop(5)
        self.clock.advance(5)
        self.peer.lose()
        self.successResultOf(stopped)
        self.assertEqual(self.clock.getDelayedCalls(), [])


class Declarations(BrokerTestCase):
    def entity(self, name="q", **settings):
        return Entity((DeclareExchange(name), DeclareQueue(name), BindQueue(name, name, name)), **settings)

    def declared(self):
        return [one.name for one in self.peer.said("exchange.declare", "queue.declare", "queue.bind")]

    def test_once_per_connection(self):
        """Equal entities are declared once per connection, those that may vanish before each message."""
        self.connect()
        all_three = ["exchange.declare", "queue.declare", "queue.bind"]
        self.send(self.message(entities=(self.entity(),), exchange="q"))
        self.assertEqual(self.declared(), all_three)
        self.send(self.message(entities=(self.entity(),), exchange="q"))
        self.assertEqual(self.declared(), [])
        for _ in range(2):
            self.send(self.message(entities=(self.entity("v", cacheable=False),), exchange="v"))
            self.assertEqual(self.declared(), all_three)
        self.peer.lose()
        self.clock.advance(1)
        self.peer.answer()
        self.send(self.message(entities=(self.entity(),), exchange="q"))
        self.assertEqual(self.declared(), all_three)

    def test_unknown_exchange(self):
        """An exchange that nobody has declared here is asked for before the first message to it."""
        self.connect()
        self.send(
            self.message(exchange="other"), self.message(exchange="other"), self.message(exchange="amq.topic")
        )
        (asked,) = self.peer.said("exchange.declare")
        self.assertEqual((asked.values[1], asked.values[3]), ("other", True))

    def test_refused(self):
        """A refused declaration is told with the server's words, and the control channel is opened again."""
        self.connect()
        self.peer.silent.add("exchange.declare")
        told: list[Any] = []
        self.assertFalse(self.broker.prepare(self.message(exchange="none"), told.append))
        (asked,) = self.peer.said("exchange.declare")
        self.peer.send(asked.channel, "channel.close", 404, "NOT_FOUND - no exchange 'none'", 40, 10)
        self.assertIsInstance(told[0], Refused)
        self.assertIn("no exchange 'none'", str(told[0]))
        self.peer.answer()
        self.assertTrue(self.broker.ready)
        self.assertEqual(len(self.attempts.peers), 1)

    def test_refused_with_the_connection(self):
        """A declaration for which the server closes the connection is refused; it would be so again."""
        self.connect()
        self.peer.silent.add("exchange.declare")
        told: list[Any] = []
        odd = Entity((DeclareExchange("odd", type="x-unknown"),))
        self.send(self.message("innocent"))
        self.broker.prepare(self.message(exchange="odd", entities=(odd,)), told.append)
        self.peer.said()
        self.peer.send(0, "connection.close", 503, "COMMAND_INVALID - unknown exchange type", 40, 10)
        self.peer.answer()
        self.peer.lose()
        (error,) = told
        self.assertEqual((type(error), error.code), (Refused, 503))
        self.assertIs(type(self.listener.outcomes["innocent"][0]), ConnectionLost)

    def test_declared_again_when_unroutable(self):
        """What a message needed that no queue took is declared again: somebody may have deleted it."""
        self.connect()
        message = self.message("a", entities=(self.entity(),), exchange="q")
        self.send(message)
        self.assertEqual(len(self.declared()), 3)
        self.send(message)
        self.assertEqual(self.declared(), [])
        channel = self.broker._publish.number  # type: ignore[union-attr]  # it is open
        self.peer.protocol.dataReceived(
            method(channel, "basic.return", 312, "NO_ROUTE", "q", "q") + content(channel, b"x", {})
        )
        self.confirm(channel, 2, multiple=True)
        self.assertIsInstance(self.listener.outcomes["a"][0], Unroutable)
        self.send(message)
        self.assertEqual(len(self.declared()), 3)

    def test_bounded(self):
        """However many queues a program uses, and however often their objects are made anew, memory is bounded."""
        self.patch(amqp_broker, "_ENTITIES", 10)
        self.connect()
        for number in range(50):
            self.send(self.message(entities=(self.entity(f"q{number % 7}"),), exchange=f"q{number % 7}"))
        self.assertLessEqual(len(self.broker._entities), 10)
        self.assertLessEqual(len(self.broker._entity_keys), 10)

    def test_lost_meanwhile(self):
        """A connection that ends during a declaration ends that as well."""
        self.connect()
        self.peer.silent.add("exchange.declare")
        told: list[Any] = []
        self.broker.prepare(self.message(exchange="other"), told.append)
        self.peer.lose()
        self.assertIsInstance(told[0], ConnectionLost)

    def test_mandatory(self):
        """Task messages to direct, topic and headers exchanges are mandatory; a fanout may have no listener."""
        self.connect()
        fanout = Entity((DeclareExchange("f", type="fanout"),))
        self.send(
            self.message(),
            self.message(exchange="amq.topic"),
            self.message(exchange="f", entities=(fanout,)),
            self.message(exchange="unknown"),
            self.message(None),
            self.message(mandatory=False),
            self.message(None, mandatory=True),
        )
        flags = [seen.values[3] for seen in self.published()]
        self.assertEqual([bool(flag) for flag in flags], [True, True, False, False, False, False, True])


class Blame(BrokerTestCase):
    def close_channel(self, code, text):
        (seen, *_) = self.published()
        self.peer.send(seen.channel, "channel.close", code, text, 60, 40)

    def test_named_exchange(self):
        """Where the server names the exchange, messages to that one are refused and the others lost, to be sent again."""
        self.connect()
        self.send(self.message("a"), self.message("b", exchange="gone"), self.message("c"))
        self.close_channel(404, "NOT_FOUND - no exchange 'gone' in vhost '/'")
        kinds = {name: type(outcome) for name, (outcome,) in self.listener.outcomes.items()}
        self.assertEqual(kinds, {"a": ConnectionLost, "b": Refused, "c": ConnectionLost})
        self.peer.answer()
        self.assertTrue(self.broker.ready)

    def test_several_to_the_named_exchange(self):
        """Where several messages go to that exchange, one of them is to blame: these go apart, and are found out one by one."""
        self.connect()
        messages = [self.message("a"), *(self.message(name, exchange="gone") for name in "bcd")]
        self.send(*messages)
        self.close_channel(404, "NOT_FOUND - no exchange 'gone' in vhost '/'")
        kinds = [type(outcome) for (outcome,) in self.listener.outcomes.values()]
        self.assertEqual(kinds, [ConnectionLost] * 4)
        self.peer.said()
        self.send(*messages)
        self.assertEqual(len({seen.channel for seen in self.published()}), 4)

    def test_named_topic(self):
        """Where it names a topic that the user may not write to, only the message with that routing key is refused."""
        self.connect()
        for name in ("good.1", "bad", "good.2"):
            self.send(Publish("amq.topic", name, b"x", {}, {}, task_id=name))
        self.close_channel(
            403,
            "ACCESS_REFUSED - access to topic 'bad' in exchange 'amq.topic' in vhost '/' refused for user 'u'",
        )
        kinds = {name: type(outcome) for name, (outcome,) in self.listener.outcomes.items()}
        self.assertEqual(kinds, {"good.1": ConnectionLost, "bad": Refused, "good.2": ConnectionLost})

    def test_unnamed_exchange(self):
        """The exchange without a name has one in RabbitMQ's texts."""
        self.connect()
        self.send(
            Publish("", "bad", b"x", {}, {}, task_id="bad"), self.message("good", exchange="amq.direct")
        )
        self.close_channel(
            403, "ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'u'"
        )
        kinds = {name: type(outcome) for name, (outcome,) in self.listener.outcomes.items()}
        self.assertEqual(kinds, {"bad": Refused, "good": ConnectionLost})

    def test_nobody_named(self):
        """Where it names none, each is tried again on a channel of its own: the guilty one is found, the others arrive."""
        self.connect()
        messages = [self.message(name) for name in "abc"]
        self.send(*messages)
        self.close_channel(406, "PRECONDITION_FAILED - something is wrong")
        self.assertEqual([type(one) for (one,) in self.listener.outcomes.values()], [ConnectionLost] * 3)
        self.listener.outcomes.clear()
        self.peer.said()
        self.send(*messages)
        seen = self.published()
        self.assertEqual(len({one.channel for one in seen}), 3)
        self.confirm(seen[0].channel, 1)
        self.peer.send(seen[1].channel, "channel.close", 406, "PRECONDITION_FAILED - this one", 60, 40)
        self.confirm(seen[2].channel, 1)
        kinds = {name: type(outcome) for name, (outcome,) in self.listener.outcomes.items()}
        self.assertEqual(kinds, {"a": type(None), "b": Refused, "c": type(None)})
        # And what has gone well is not suspected any more.
        self.send(self.message("d"), messages[0])
        self.assertEqual(len({one.channel for one in self.published()}), 1)

    def test_suspects_go_apart(self):
        """Large messages and those that RabbitMQ checks go apart, in order, on a few channels."""
        self.connect()
        ordinary = self.message("ordinary", properties={"expiration": "1000", "priority": 3})
        suspects = [
            self.message("large", body=b"x" * 2_000_000),
            self.message("user", properties={"user_id": "me"}),
            self.message("never", properties={"expiration": "-1"}),
            self.message("long", properties={"expiration": "99999999999"}),
            self.message("copy", headers={"CC": ["x"]}),
            self.message("mode", properties={"delivery_mode": 3}),
            self.message("direct", properties={"reply_to": "amq.rabbitmq.reply-to"}),
        ]
        self.send(ordinary, *suspects)
        channels = [one.channel for one in self.published()]
        self.assertEqual(len(set(channels)), 8)
        for channel in channels:
            self.confirm(channel, 1)
        self.assertEqual(set(map(str, chain.from_iterable(self.listener.outcomes.values()))), {"None"})
        # The channels are used again.
        self.send(*suspects)
        self.assertEqual({one.channel for one in self.published()}, set(channels[1:]))

    def test_few_channels(self):
        """When all of those channels are busy, the next suspect waits for a confirm, or for the end."""
        self.connect()
        self.send(*[self.message(f"m{i}", properties={"user_id": "me"}) for i in range(8)])
        channels = [one.channel for one in self.published()]
        told: list[Any] = []
        waiting = self.message("waiting", properties={"user_id": "me"})
        self.assertFalse(self.broker.prepare(waiting, told.append))
        self.assertEqual(told, [])
        self.confirm(channels[3], 1)
        self.assertEqual(told, [None])
        self.broker.publish(waiting)
        self.assertEqual(self.published()[0].channel, channels[3])
        more = self.message("more", properties={"user_id": "me"})
        self.broker.prepare(more, told.append)
        # One that is refused makes room as well.
        self.peer.send(channels[0], "channel.close", 406, "no", 60, 40)
        self.peer.answer()
        self.assertEqual(told, [None, None])
        self.broker.publish(more)
        self.broker.prepare(self.message("given up", properties={"user_id": "me"}), lambda error: None)
        self.broker.prepare(self.message("lost", properties={"user_id": "me"}), told.append)
        self.peer.lose()
        self.assertEqual([type(one) for one in told[2:]], [ConnectionLost])
        self.assertIsInstance(self.listener.outcomes["more"][0], ConnectionLost)

    def test_given_up(self):
        """A channel that was opened for, or becomes free for, a message that was given up is the next one's."""
        self.connect()
        suspects = [self.message(f"m{i}", properties={"user_id": "me"}) for i in range(10)]
        told: list[Any] = []
        self.broker.prepare(suspects[0], lambda _: None)
        self.broker.prepare(suspects[1], told.append)
        self.peer.answer()
        self.assertEqual(told, [None])
        self.broker.publish(suspects[1])
        self.send(*suspects[2:9])
        for given_up in suspects[:1] * 3:
            self.broker.prepare(given_up, lambda _: None)
        self.broker.prepare(suspects[9], told.append)
        self.assertEqual(told, [None])
        self.confirm(self.published()[0].channel, 1)
        self.assertEqual(told, [None, None])

    def test_channels_are_given_back(self):
        """Whatever a message cannot be written for, its channel is free for the next one."""
        self.connect()
        for number in range(10):
            body: Any = ("no bytes",)
            self.send(self.message(f"m{number}", properties={"user_id": "me"}, body=body))
            (error,) = self.listener.outcomes[f"m{number}"]
            self.assertIsInstance(error, Refused)
        self.send(self.message("good", properties={"user_id": "me"}))
        (seen,) = self.published()
        self.confirm(seen.channel, 1)
        self.assertEqual(self.listener.outcomes["good"], [None])

    def test_useless_connections(self):
        """Servers that take the connection and refuse channels are no brokers, which is said as of those that are away."""
        self.broker.connect()
        for told in (0, 1, 1, 2):
            self.peer.lose()
            self.assertEqual(len(self.listener.unavailable), told)
            self.clock.advance(60)
        self.peer.answer()
        self.assertTrue(self.broker.ready)
        for _ in range(4):
            self.peer.lose()
            self.clock.advance(60)
            self.peer.answer()
        self.assertEqual(len(self.listener.unavailable), 2)

    def test_cannot_be_encoded(self):
        """What AMQP cannot carry is refused before a byte of it is written; the channel stays."""
        self.connect()
        self.send(self.message("bad", headers={"x": object()}), self.message("good"))
        self.assertIn("x", str(self.listener.outcomes["bad"][0]))
        (seen,) = self.published()
        self.confirm(seen.channel, 1)
        self.assertEqual(self.listener.outcomes["good"], [None])
        # Apart as well: the channel is free again.
        bad = self.message("bad", headers={"x": object()}, properties={"user_id": "me"})
        for _ in range(9):
            self.send(bad)
        self.assertEqual(len(self.listener.outcomes["bad"]), 10)
        self.send(self.message("fine", properties={"user_id": "me"}))
        self.confirm(self.published()[0].channel, 1)
        self.assertEqual(self.listener.outcomes["fine"], [None])


class Gone(BrokerTestCase):
    """What this connection has declared is deleted under it: the message that finds out leaves once more, after declaring."""

    def setUp(self):
        super().setUp()
        self.queue = Entity((DeclareExchange("q"), DeclareQueue("q"), BindQueue("q", "q", "q")))
        self.connect()

    def declared(self):
        return [seen.name for seen in self.peer.said() if seen.name.endswith((".declare", ".bind"))]

    def vanish(self, how, channel, tag):
        if how == "queue":
            self.peer.protocol.dataReceived(
                method(channel, "basic.return", 312, "NO_ROUTE", "q", "q") + content(channel, b"x", {})
            )
            self.confirm(channel, tag)
        else:
            self.peer.send(channel, "channel.close", 404, "NOT_FOUND - no exchange 'q' in vhost '/'", 60, 40)
        self.peer.answer()

    def test_once_more(self):
        """For a queue (the message is returned) and for an exchange (its channel is closed); on every kind of channel."""
        for how in ("queue", "exchange"):
            for size in (1, 2_000_000):
                name = f"{how} {size}"
                message = self.message(
                    name, exchange="q", entities=(self.queue,), retry=True, body=b"x" * size
                )
                self.broker._forget()
                self.assertEqual(self.send(message), [])
                seen = self.peer.said()
                self.assertEqual(len([one for one in seen if one.name == "queue.declare"]), 1)
                (published,) = [one for one in seen if one.name == "basic.publish"]
                self.vanish(how, published.channel, self.tag(published.channel))
                (error,) = self.listener.outcomes.pop(name)
                self.assertIs(type(error), NotSent)
                self.assertIsInstance(error.__cause__, Unroutable if how == "queue" else Refused)
                self.assertEqual(self.send(message), [])
                seen = self.peer.said()
                self.assertEqual(len([one for one in seen if one.name == "queue.bind"]), 1)
                (published,) = [one for one in seen if one.name == "basic.publish"]
                self.confirm(published.channel, self.tag(published.channel))
                self.assertEqual(self.listener.outcomes.pop(name), [None])

    def tag(self, number):
        """The number of the newest message on a channel."""
        channel = self.peer.protocol._channels[number]
        return channel._confirms._next - 1

    def test_once_only(self):
        """Where that does not help, it is the server's word."""
        for how, kind in (("queue", Unroutable), ("exchange", Refused)):
            message = self.message(how, exchange="q", entities=(self.queue,), retry=True)
            for _ in range(2):
                self.send(message)
                (published,) = self.published()
                self.vanish(how, published.channel, self.tag(published.channel))
                self.peer.said()
            first, second = self.listener.outcomes[how]
            self.assertIs(type(first), NotSent)
            self.assertIs(type(second), kind)

    def test_not_ours(self):
        """What this side does not declare, and what may leave only once, is told at once; the next message declares again."""
        for settings in ({"retry": True}, {"entities": (self.queue,)}):
            self.send(self.message("declares", exchange="q", entities=(self.queue,)))
            (published,) = self.published()
            self.confirm(published.channel, self.tag(published.channel))
            message = self.message("late", exchange="q", **settings)
            self.send(message)
            (published,) = self.published()
            self.vanish("queue", published.channel, self.tag(published.channel))
            (error,) = self.listener.outcomes.pop("late")
            self.assertIs(type(error), Unroutable)

    def test_large_message_to_a_lost_exchange(self):
        """A channel apart that is closed with 404 makes the broker forget the exchange, too."""
        large = self.message("large", exchange="q", entities=(self.queue,), body=b"x" * 2_000_000)
        self.send(large)
        (published,) = self.published()
        self.vanish("exchange", published.channel, 1)
        self.assertIsInstance(self.listener.outcomes["large"][0], Refused)
        self.send(large)
        self.assertEqual(self.declared()[-1:], ["queue.bind"])

    def test_ended_meanwhile(self):
        """A message whose call does not wait any more is told the truth, and does not leave once more."""
        for over in ("done", "late"):
            unit = Unit([], Owner())
            setattr(unit, over, True)
            message = self.message("a", exchange="q", entities=(self.queue,), retry=True, owner=unit)
            self.send(message)
            (published,) = self.published()
            self.vanish("queue", published.channel, self.tag(published.channel))
            self.assertEqual([type(error) for error in self.listener.outcomes.pop("a")], [Unroutable])

    def test_both_channels_closed(self):
        """Both standing channels are closed before one is open again: each is opened once, and every message has its outcome."""
        self.send(self.message("a"))
        told: list[Any] = []
        self.assertFalse(self.broker.prepare(self.message("z", exchange="none"), told.append))
        self.peer.read()
        assert self.broker._publish is not None
        assert self.broker._control is not None
        numbers = self.broker._publish.number, self.broker._control.number
        self.peer.protocol.dataReceived(
            b"".join(method(number, "channel.close", 404, "NOT_FOUND", 60, 40) for number in numbers)
        )
        self.assertEqual(len(self.peer.said("channel.open")), 2)
        self.assertTrue(self.broker.ready)
        self.send(*map(self.message, "pqr"))
        self.assertEqual(self.broker._on_their_way(), 3)
        self.peer.send(0, "connection.close", 541, "INTERNAL_ERROR", 0, 0)
        self.peer.lose()
        self.assertEqual([type(self.listener.outcomes[name][0]) for name in "pqr"], [ConnectionLost] * 3)

    def test_not_ready_while_it_ends(self):
        """What is told in slices while a connection ends does not make it take work again."""
        messages = [self.message(str(number)) for number in range(200)]
        self.send(*messages)
        (channel,) = {one.channel for one in self.published()}

        def takes_its_time():
            self.clock.rightNow += 0.0005

        self.listener.on_published = takes_its_time
        self.peer.protocol.dataReceived(
            method(channel, "basic.ack", 200, True)
            + method(0, "connection.close", 320, "CONNECTION_FORCED", 0, 0)
        )
        for _ in range(100):
            self.clock.advance(0)
            self.assertFalse(self.broker.ready)
        self.assertEqual(len(self.listener.outcomes), 200)

    def test_channel_apart_closed(self):
        """A free channel apart that the server closes just then costs one message a moment, and the broker goes on taking work."""
        suspect = self.message("s", properties={"user_id": "u"})
        self.send(suspect)
        (published,) = self.published()
        self.confirm(published.channel, 1)
        self.assertTrue(self.broker.prepare(suspect, lambda error: None))
        self.peer.send(published.channel, "channel.close", 406, "PRECONDITION_FAILED", 60, 40)
        self.broker.publish(suspect)
        self.assertIs(type(self.listener.outcomes["s"][-1]), NotSent)
        self.assertTrue(self.broker.ready)


class Refusing(Scripted):
    """A server that confirms what it reads, one by one, and closes the connection when it reads a body that it does not like."""

    hated: frozenset[bytes] = frozenset()
    code = 541
    #: Confirms nothing while it is true.
    slow = False
    reads: list[bytes]

    def answer(self):
        super().answer()
        tags: dict[int, int] = self.__dict__.setdefault("tags", {})
        taken, self.seen = self.seen, []
        for one in taken:
            if self.protocol._lost:
                return
            if one.name == "basic.publish":
                tags[one.channel] = tags.get(one.channel, 0) + 1
            elif one.name == "body":
                body = bytes(one.values[0])
                if body in self.hated:
                    self.send(0, "connection.close", self.code, "INTERNAL_ERROR", 0, 0)
                    self.lose()
                    return
                self.reads.append(body)
                if not self.slow:
                    self.send(one.channel, "basic.ack", tags[one.channel], False)


class RefusingAttempts(Attempts):
    """Each connection leads to the same server."""

    def __init__(self, clock, **settings):
        super().__init__(clock)
        self.server = settings
        self.reads: list[bytes] = []

    def connect(self):
        peer = Refusing(self.clock, url=self.url, heartbeat=0)
        vars(peer).update(self.server, reads=self.reads)
        self.peers.append(peer)
        peer.open(heartbeat=0)
        return succeed(peer.protocol)


class Owner:
    """Takes down how a call ended."""

    def __init__(self):
        self.ended: list[Any] = []

    def _sent(self, error):
        self.ended.append(error)


class Trials(SynchronousTestCase):
    """One message makes the server close the connection: it is found and refused, the others arrive. With a real outbox."""

    def serve(self, **settings):
        self.clock = Clock()
        self.attempts: Any = RefusingAttempts(self.clock, **settings)
        self.broker = AMQPBroker(self.clock, self.attempts, 1, 4, lambda failures: 0.2 * 1.5**failures)
        self.outbox = Outbox(
            self.clock, self.broker, None, connect=self.broker.connect, limit=10_000, limit_bytes=10**9
        )
        self.owners: dict[bytes, Owner] = {}

    def call(self, body, **settings):
        owner = self.owners[body] = Owner()
        policy = {"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.2}
        settings = {"retry": True, "retry_policy": policy, **settings}
        properties = settings.pop("properties", {})
        message = Publish("", "q", body, properties, {}, task_id=body.decode(), **settings)
        self.outbox.submit(Unit([message], owner))

    def pass_time(self, seconds=20.0):
        for _ in range(int(seconds / 0.05)):
            if self.attempts.peers:
                self.attempts.peer.answer()
            self.clock.advance(0.05)

    def ended(self, body):
        (error,) = self.owners[body].ended
        return error

    def stop(self):
        self.outbox.close()
        self.broker.stop(1)
        self.attempts.peer.answer()
        self.clock.advance(2)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_one_of_many(self):
        """Wherever it stands among them, whichever code it is: two connections are lost, and no innocent runs more than twice."""
        for code in (501, 541):
            for place in (0, 1, 50, 99):
                bodies = [b"%d" % number for number in range(100)]
                guilty = bodies[place]
                self.serve(hated=frozenset({guilty}), code=code)
                for body in bodies:
                    self.call(body)
                self.pass_time()
                error = self.ended(guilty)
                self.assertIs(type(error), Refused)
                self.assertEqual((error.code, error.task_id), (code, guilty.decode()))
                self.assertIn("each time that it has read this message", str(error))
                self.assertEqual([self.ended(body) for body in bodies if body != guilty], [None] * 99)
                self.assertEqual(len(self.attempts.peers), 3)
                self.assertLessEqual(max(Counter(self.attempts.reads).values()), 2)
                self.stop()

    def test_several(self):
        """Each of several guilty ones is found; what is called meanwhile and afterwards arrives in its order."""
        hated = frozenset({b"3", b"30", b"31", b"large"})
        self.serve(hated=hated)
        bodies = [b"%d" % number for number in range(60)]
        for body in bodies[:50]:
            self.call(body)
        self.pass_time(0.5)
        for body in bodies[50:]:
            self.call(body)
        self.pass_time(60)
        self.call(b"late")
        self.pass_time(0.1)
        for body in (*bodies, b"late"):
            self.assertIs(type(self.ended(body)), Refused if body in hated else type(None), body)
        last = {body: at for at, body in enumerate(self.attempts.reads)}
        order = sorted(last, key=last.__getitem__)
        self.assertEqual(order, [body for body in (*bodies, b"late") if body not in hated])
        self.stop()

    def test_passing_trouble(self):
        """A server that has closed a connection in trouble of its own has nobody refused."""
        bodies = [b"%d" % number for number in range(20)]
        self.serve(hated=frozenset(bodies))
        for body in bodies:
            self.call(body)
        self.pass_time(0.05)
        (peer,) = self.attempts.peers
        self.assertTrue(peer.protocol._lost)
        self.attempts.server.clear()
        self.pass_time()
        self.assertEqual([self.ended(body) for body in bodies], [None] * 20)
        self.stop()

    def test_alone_twice(self):
        """One that is alone from the start is refused the second time; one that may leave once only is not sent again."""
        self.serve(hated=frozenset({b"a", b"b"}))
        self.call(b"a")
        self.pass_time()
        self.assertIs(type(self.ended(b"a")), Refused)
        self.assertEqual(len(self.attempts.peers), 3)
        self.call(b"b", retry=False)
        self.pass_time()
        self.assertIs(type(self.ended(b"b")), OutcomeUnknown)
        self.assertIn("541", str(self.ended(b"b")))
        self.stop()

    def test_other_reasons(self):
        """A connection that is closed by an operator, or for a declaration, accuses nobody."""
        for close in ((320, "CONNECTION_FORCED", 0, 0), (503, "unknown exchange type", 40, 10)):
            self.serve()
            self.attempts.server["slow"] = True
            for number in range(10):
                self.call(b"%d" % number)
            self.pass_time(0.1)
            self.assertEqual(len(self.attempts.reads), 10)
            self.attempts.reads.clear()
            self.attempts.server.clear()
            self.attempts.peer.send(0, "connection.close", *close)
            self.attempts.peer.lose()
            while not self.attempts.reads:
                self.pass_time(0.05)
            # All at once, not one by one.
            self.assertEqual(len(self.attempts.reads), 10)
            self.assertEqual([self.ended(b"%d" % number) for number in range(10)], [None] * 10)
            self.stop()

    def test_late_confirm(self):
        """A confirm that does not come holds up the others for a while only, those that are accused themselves as well."""
        self.serve(hated=frozenset({b"x"}))
        for body in (b"x", b"a", b"b"):
            self.call(body)
        self.attempts.server["slow"] = True
        self.pass_time(4)
        self.call(b"c")
        reads = self.attempts.reads
        self.assertIs(type(self.ended(b"x")), Refused)
        self.assertEqual(reads, [b"a"])
        self.pass_time(8)
        self.assertEqual(reads, [b"a"])
        self.pass_time(10)
        self.assertEqual(reads, [b"a", b"b"])
        self.pass_time(10)
        self.assertEqual(reads, [b"a", b"b", b"c"])
        self.attempts.server.clear()
        self.attempts.peer.lose()
        self.pass_time(3)
        self.assertEqual(reads[3:], [b"a", b"b", b"c"])
        self.assertEqual([self.ended(body) for body in (b"a", b"b", b"c")], [None] * 3)
        self.stop()

    def test_given_up_meanwhile(self):
        """Declarations of a call that has ended go on, and end when they like: who comes after it is not forgotten."""
        two = Entity((DeclareQueue("q2"), BindQueue("q2", "amq.direct", "k")))
        one = Entity((DeclareQueue("q"),))
        for settings in ({"properties": {"user_id": "u"}}, {"accused": True}):
            self.serve(slow="accused" in settings)
            self.call(b"first")
            self.pass_time(0.2)
            self.call(b"a", entities=(two,), timeout=0.01, **settings)
            self.clock.advance(0.02)
            self.call(b"b", entities=(one,), **settings)
            self.call(b"plain")
            self.pass_time(1)
            if self.attempts.peer.slow:
                self.attempts.peer.slow = False
                assert self.broker._publish is not None
                self.attempts.peer.send(self.broker._publish.number, "basic.ack", 1, False)
            self.pass_time(20)
            self.assertIs(type(self.ended(b"a")), NotSent)
            self.assertEqual([self.ended(name) for name in (b"first", b"b", b"plain")], [None] * 3)
            self.stop()

    def test_lost_without_a_word(self):
        """A close that is lost with its connection does not acquit: nobody but the guilty one pays."""
        self.serve(hated=frozenset({b"5"}))
        send, closes = Refusing.send, []

        def lossy(peer, number, name, *values):
            if name == "connection.close":
                closes.append(number)
                if len(closes) == 2:
                    return
            send(peer, number, name, *values)

        self.patch(Refusing, "send", lossy)
        for number in range(20):
            self.call(b"%d" % number)
        self.pass_time(60)
        self.assertIs(type(self.ended(b"5")), Refused)
        self.assertEqual([self.ended(name) for name in self.owners if name != b"5"], [None] * 19)
        self.assertEqual(len(self.attempts.peers), 4)
        self.stop()

    def test_overtaken(self):
        """A suspect message that is ready to leave, and has to wait behind one that comes back, still leaves apart."""
        self.serve(slow=True)
        self.call(b"early", entities=(Entity((DeclareQueue("q2"),)),))
        self.pass_time(0.1)
        self.call(b"suspect", properties={"user_id": "u"})
        peer = self.attempts.peer
        Scripted.answer(peer)
        assert self.broker._publish is not None
        channel = self.broker._publish.number
        # Its queue has been deleted.
        peer.protocol.dataReceived(
            method(channel, "basic.return", 312, "NO_ROUTE", "", "q")
            + content(channel, b"early", {})
            + method(channel, "basic.ack", 1, False)
        )
        peer.seen.clear()
        for _ in range(10):
            self.clock.advance(0.05)
            Scripted.answer(peer)
        published = [one.channel for one in peer.seen if one.name == "basic.publish"]
        self.assertEqual(published[0], channel)
        self.assertEqual(len(set(published)), 2)

    def test_lost_while_it_waits(self):
        """The connection is lost while an accused message waits to be alone: it leaves over the next one."""
        self.serve(hated=frozenset({b"x"}))
        for body in (b"x", b"a", b"b"):
            self.call(body)
        self.attempts.server["slow"] = True
        self.pass_time(13)
        self.assertEqual(self.attempts.reads, [b"a"])
        self.assertEqual(len(self.broker._trial._askers), 1)
        self.attempts.server.clear()
        self.attempts.peer.lose()
        self.pass_time(3)
        self.assertEqual([self.ended(body) for body in (b"a", b"b")], [None] * 2)
        self.stop()

    def test_confirmed_while_it_waits(self):
        """The late confirm comes: whoever waited to be alone leaves at once."""
        self.serve(hated=frozenset({b"x"}))
        for body in (b"x", b"a", b"b"):
            self.call(body)
        self.attempts.server["slow"] = True
        self.pass_time(13)
        peer = self.attempts.peer
        peer.slow = False
        peer.send(self.broker._publish.number, "basic.ack", 1, False)  # type: ignore[union-attr]  # it is open
        self.pass_time(0.2)
        self.assertEqual([self.ended(body) for body in (b"a", b"b")], [None] * 2)
        self.stop()
