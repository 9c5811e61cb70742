"""The Redis broker: what a message's outcome is, whatever the server does."""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import replace
from unittest import mock

from kombu.connection import Connection
from twisted.trial.unittest import SynchronousTestCase

from tests.support.redis_peer import array
from tests.support.redis_wires import Store, Wires
from twistedcelery._operations import BindQueue, DeclareExchange, DeclareQueue, Entity, Publish
from twistedcelery.errors import (
    AuthenticationFailed,
    ConnectionLost,
    NotSent,
    Refused,
    ServerUnreachable,
    Unroutable,
)
from twistedcelery.redis import broker as redis_broker
from twistedcelery.redis.broker import RedisBroker
from twistedcelery.redis.protocol import CommandProtocol
from twistedcelery.redis.routing import Routing
from twistedcelery.redis.settings import broker_layout

SEP = "\x06\x16"
LAYOUT = broker_layout(Connection("redis://"), 0)

QUEUE = Entity((DeclareExchange("x"), DeclareQueue("q"), BindQueue("q", "x", "k")))


def expiring(name="e"):
    return Entity(
        (DeclareExchange("x"), DeclareQueue(name, arguments={"x-expires": 5000}), BindQueue(name, "x", name)),
        cacheable=False,
    )


def message(exchange="", routing_key="q", task_id="1", entities=(), headers=None, **options):
    return Publish(
        exchange, routing_key, b"[]", {"correlation_id": task_id}, headers or {}, entities, task_id=task_id, **options
    )  # fmt: skip


class Listener:
    """Takes everything down."""

    def __init__(self):
        self.outcomes = []
        self.ready = 0
        self.unavailable = []
        self.on_published = None

    def broker_ready(self):
        self.ready += 1

    def broker_unavailable(self, reason):
        self.unavailable.append(reason)

    def published(self, message, error):
        self.outcomes.append((message.task_id, error))
        if self.on_published:
            self.on_published(message)


class BrokerCase(SynchronousTestCase):
    def setUp(self):
        self.wires = Wires()
        self.store: Store = self.wires.store
        self.listener = Listener()
        self.known: dict[str, str] = {}
        self.broker = RedisBroker(
            self.wires.clock,
            self.wires.attempts(CommandProtocol),
            1,
            None,
            lambda failures: 0.2,
            routing=lambda db: Routing(LAYOUT, known_type=self.known.get),
        )
        self.broker.listen(self.listener)

    def connect(self):
        self.broker.connect()
        self.wires.flush()
        self.connection.commands  # noqa: B018  # the greeting is not looked at
        return self.connection

    @property
    def connection(self):
        return self.wires.of(CommandProtocol)

    def prepare(self, sent):
        """Prepare a message; returns the outcomes, or True where there was nothing to wait for."""
        outcomes: list[Exception | None] = []
        if self.broker.prepare(sent, outcomes.append):
            return True
        self.wires.flush()
        return outcomes

    def publish(self, *messages):
        for each in messages:
            self.broker.publish(each)

    def outcomes(self):
        self.wires.flush()
        return self.listener.outcomes

    def error(self):
        ((_, found),) = self.outcomes()
        return found

    def tearDown(self):
        self.broker.stop(1)
        self.wires.flush()
        self.assertEqual(self.wires.clock.getDelayedCalls(), [])


class PublishTests(BrokerCase):
    def test_default_exchange(self):
        """A message to the default exchange is confirmed when it stands in its queue."""
        self.connect()
        self.assertTrue(self.broker.ready)
        self.publish(message())
        self.assertEqual(self.listener.outcomes, [])
        self.assertEqual(self.outcomes(), [("1", None)])
        (found,) = self.store.lists[b"q"]
        self.assertEqual(
            json.loads(found)["properties"]["delivery_info"], {"exchange": "", "routing_key": "q"}
        )

    def test_routed(self):
        """A message goes to every queue that is bound, all or none of them."""
        self.connect()
        self.store.sets[b"_kombu.binding.x"] = [f"k{SEP}{SEP}{name}".encode() for name in "abc"]
        self.publish(message("x", "k"))
        self.assertEqual(self.outcomes(), [("1", None)])
        self.assertEqual(sorted(self.store.lists), [b"a", b"b", b"c"])
        names = [command[0] for command in self.connection.commands]
        self.assertEqual(names, [b"SMEMBERS", b"MULTI", b"LPUSH", b"LPUSH", b"LPUSH", b"EXEC"])

    def test_order(self):
        """What is published behind a message whose bindings are being read stays behind it."""
        self.connect()
        self.store.sets[b"_kombu.binding.x"] = [f"k{SEP}{SEP}q".encode()]
        self.publish(
            message("x", "k", "1"), message("", "q", "2"), message("x", "k", "3"), message("", "q", "4")
        )
        self.assertEqual([task_id for task_id, _ in self.outcomes()], ["1", "2", "3", "4"])
        arrived = [json.loads(each)["properties"]["correlation_id"] for each in self.store.lists[b"q"]]
        self.assertEqual(arrived, ["4", "3", "2", "1"])

    def test_unroutable(self):
        """A task's message that no queue takes is `Unroutable`; where nobody minds, it is gone as in kombu."""
        self.connect()
        self.publish(message("x", "k"))
        error = self.error()
        self.assertIsInstance(error, Unroutable)
        self.assertEqual((error.exchange, error.routing_key), ("x", "k"))
        self.listener.outcomes.clear()
        self.publish(message("x", "k", "1", mandatory=False), message("x", "k", None))
        self.assertEqual(self.outcomes(), [("1", None), (None, None)])

    def test_unreadable_bindings(self):
        """Bindings that are none fail the message alone."""
        self.connect()
        self.store.sets[b"_kombu.binding.x"] = [b"rubbish"]
        self.publish(message("x", "k", "1"), message())
        (_, error), (_, other) = self.outcomes()
        self.assertIsInstance(error, Refused)
        self.assertIsNone(other)

    def test_odd_routing_key(self):
        """A routing key that kombu's patterns cannot be asked about fails its own message, and those behind it go on."""
        self.connect()
        self.known["x"] = "topic"
        self.store.sets[b"_kombu.binding.x"] = [f"{SEP}^a${SEP}q".encode()]
        self.publish(message("x", 42, task_id="odd"), message("", "q", task_id="plain"))
        (odd, error), plain = self.outcomes()
        self.assertEqual((odd, type(error), plain), ("odd", Refused, ("plain", None)))
        self.assertIn("42", str(error))

    def test_nonsense(self):
        """Answers that no Redis gives end the connection; the messages are lost with it, and the next one serves."""
        for name, answers in (
            (b"SMEMBERS", (b":5\r\n", b"*1\r\n:5\r\n", b"$-1\r\n")),
            (b"LPUSH", (b"$-1\r\n", b"+OK\r\n")),
        ):
            for answer in answers:
                connection = self.connect()
                self.store.sets[b"_kombu.binding.x"] = [f"k{SEP}{SEP}q".encode()]
                connection.peer.answers[name] = answer
                self.publish(message("x", "k", task_id="routed"), message("", "q", task_id="plain"))
                outcomes = dict(self.outcomes())
                self.assertIsInstance(outcomes["routed"], ConnectionLost | NotSent)
                self.assertIsInstance(outcomes["plain"], ConnectionLost | NotSent)
                self.assertTrue(connection.lost)
                self.wires.pass_time(1)
                self.listener.outcomes.clear()
                self.publish(message("x", "k", task_id="routed"), message("", "q", task_id="plain"))
                self.assertEqual(self.outcomes(), [("routed", None), ("plain", None)])
                self.listener.outcomes.clear()
                self.connection.lose()

    def test_fanout(self):
        """A message to an exchange that the app knows as a fanout is published, and nobody has to hear it."""
        self.known["b"] = "fanout"
        self.connect()
        self.publish(message("b", "k"))
        self.assertEqual(self.outcomes(), [("1", None)])
        self.assertEqual([command[:2] for command in self.connection.commands], [[b"PUBLISH", b"/0.b/k"]])

    def test_fanout_that_has_to_be_heard(self):
        """With ``mandatory`` a broadcast that nobody heard is `Unroutable`."""
        self.known["b"] = "fanout"
        self.connect()
        self.publish(message("b", "k", mandatory=True))
        self.assertIsInstance(self.error(), Unroutable)
        self.listener.outcomes.clear()
        self.connection.peer.answers[b"PUBLISH"] = b":2\r\n"
        self.publish(message("b", "k", mandatory=True))
        self.assertEqual(self.outcomes(), [("1", None)])

    def test_large(self):
        """The envelope of a large body, made in pieces, is the same JSON."""
        self.connect()
        body = b"0123456789" * 100_000
        self.publish(Publish("", "q", body, {"content_type": "application/json"}, {"a": 1}, task_id="1"))
        self.assertEqual(self.outcomes(), [("1", None)])
        (found,) = self.store.lists[b"q"]
        envelope = json.loads(found)
        self.assertEqual(b64decode(envelope["body"]), body)
        self.assertEqual((envelope["headers"], envelope["content-type"]), ({"a": 1}, "application/json"))

    def test_not_json(self):
        """A header that JSON cannot hold fails the message, wherever it goes; nothing of it is sent."""

        class Bug:
            def __json__(self):
                raise RuntimeError("a bug")

        self.known["b"] = "fanout"
        self.connect()
        self.store.sets[b"_kombu.binding.x"] = [f"k{SEP}{SEP}q".encode()]
        for exchange in ("", "b", "x"):
            for header in (object(), Bug()):
                self.publish(message(exchange, "k", headers={"x": header}))
                self.assertIsInstance(self.error(), Refused)
                self.listener.outcomes.clear()
        self.assertEqual(self.store.lists, {})

    def test_unencodable_exchange(self):
        """An exchange whose name UTF-8 cannot hold fails its own message; those behind it go on."""
        self.connect()
        self.publish(message("\udc80", "k", "1"), message("", "q", "2"))
        ((first, refused), (second, sent)) = self.outcomes()
        self.assertEqual((first, type(refused), second, sent), ("1", Refused, "2", None))

    def test_published_from_within(self):
        """A message that is published while another one's outcome is told is sent too."""
        self.connect()

        def again(_):
            self.listener.on_published = None
            self.broker.publish(message(task_id="2"))

        self.listener.on_published = again
        self.publish(message("x", "k", "1"), message("x", "k", "3"))
        self.assertEqual([task_id for task_id, _ in self.outcomes()], ["1", "3", "2"])


class DeclareTests(BrokerCase):
    def test_once(self):
        """An entity is declared once by each connection, equal ones included."""
        self.connect()
        equal = Entity(QUEUE.declarations)
        self.assertEqual(self.prepare(message(entities=(QUEUE,))), [None])
        names = [command[0] for command in self.connection.commands]
        self.assertEqual(names, [b"MULTI", b"SADD", b"SADD", b"EXEC"])
        self.assertIs(self.prepare(message(entities=(QUEUE,))), True)
        self.assertIs(self.prepare(message(entities=(equal,))), True)
        self.assertEqual(self.connection.commands, [])
        self.connection.lose()
        self.wires.pass_time(0.5)
        self.connection.commands  # noqa: B018
        self.assertEqual(self.prepare(message(entities=(equal,))), [None])

    def test_nothing_to_write(self):
        """A queue without a binding leaves nothing in Redis, so nothing is waited for."""
        self.connect()
        self.assertIs(self.prepare(message(entities=(Entity((DeclareQueue("q"),)),))), True)
        self.assertEqual(self.connection.commands, [])

    def test_may_vanish(self):
        """What may vanish by itself is declared for each message, the first time alone waited for."""
        self.connect()
        entity = expiring()
        self.assertEqual(self.prepare(message(entities=(entity,))), [None])
        self.connection.commands  # noqa: B018
        self.assertIs(self.prepare(message(entities=(entity,))), True)
        self.wires.flush()
        self.assertEqual([command[0] for command in self.connection.commands], [b"EVAL"])
        self.publish(message("", "e"))
        self.outcomes()
        names = [command[0] for command in self.connection.commands]
        self.assertEqual(names, [b"MULTI", b"LPUSH", *[b"PEXPIRE"] * 4, b"EXEC"])

    def test_refused(self):
        """What kombu refuses to declare is refused, and so is what Redis refuses to write."""
        self.connect()
        self.assertEqual(self.prepare(message(entities=(QUEUE,))), [None])
        (error,) = self.prepare(message(entities=(Entity((DeclareExchange("x", "topic"),)),)))
        self.assertEqual((error.code, error.url), (406, "redis://10.0.0.1:6379/0"))
        self.connection.peer.answers[b"SADD"] = b"-WRONGTYPE not a set\r\n"
        (error,) = self.prepare(
            message(entities=(expiring(), Entity((*QUEUE.declarations, DeclareQueue("r")))))
        )
        self.assertIsInstance(error, Refused)
        self.assertIn("WRONGTYPE", str(error))

    def test_passive(self):
        """A passive declaration of a queue that is not there is refused with 404."""
        self.connect()
        passive = Entity((DeclareQueue("q", passive=True),))
        (error,) = self.prepare(message(entities=(passive,)))
        self.assertEqual(error.code, 404)
        self.store.lists[b"q"] = [b""]
        self.assertEqual(self.prepare(message(entities=(passive,))), [None])

    def test_lost(self):
        """A connection that ends under a declaration is `ConnectionLost`."""
        self.connect()
        outcomes: list[Exception | None] = []
        self.broker.prepare(message(entities=(QUEUE,)), outcomes.append)
        self.connection.lose()
        self.assertIsInstance(outcomes[0], ConnectionLost)

    def test_bounded(self):
        """What is remembered of many queues is bounded."""
        self.patch(redis_broker, "_ENTITIES", 10)
        self.connect()
        for number in range(100):
            self.prepare(message(entities=(Entity((DeclareQueue(f"q{number}"),)),)))
        self.assertLess(len(self.broker._entities), 13)


class OutcomeTests(BrokerCase):
    def test_lost_before_the_answer(self):
        """A connection that ends between LPUSH and its answer leaves the outcome open."""
        self.connect()
        self.publish(message())
        self.connection.peer.hold = True
        self.connection.flush()
        self.connection.lose()
        self.assertIsInstance(self.error(), ConnectionLost)
        self.assertFalse(self.broker.connected)

    def test_lost_before_the_bindings(self):
        """Where the connection ends before the bindings are known, no byte of the message has left."""
        self.connect()
        self.publish(message("x", "k", "1"), message("", "q", "2"))
        self.connection.lose()
        self.assertEqual([type(error) for _, error in self.outcomes()], [NotSent, NotSent])

    def test_garbage(self):
        """A server that answers nonsense leaves the outcome open, and the connection is dropped."""
        self.connect()
        self.publish(message())
        first = self.connection
        self.wires.store.answers[b"LPUSH"] = b":1\r\n"
        first.send(b"!nonsense\r\n")
        self.assertIsInstance(self.error(), ConnectionLost)
        self.wires.pass_time(0.5)
        self.assertIsNot(self.connection, first)
        self.assertTrue(self.broker.ready)

    def test_out_of_memory(self):
        """OOM is not final: nothing was sent, the server's words are told, and after a moment work is taken again."""
        self.connect()
        self.connection.peer.answers[b"LPUSH"] = (
            b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
        )
        self.publish(message(task_id="1"), message(task_id="2"))
        errors = [error for _, error in self.outcomes()]
        self.assertEqual([type(error) for error in errors], [NotSent, NotSent])
        self.assertIn("maxmemory", str(errors[0]))
        self.assertFalse(self.broker.ready)
        self.assertTrue(self.broker.connected)
        self.assertEqual([str(reason) for reason in self.listener.unavailable], [str(errors[0])])
        self.assertEqual(self.listener.ready, 1)
        self.wires.pass_time(0.2)
        self.assertTrue(self.broker.ready)
        self.assertEqual(self.listener.ready, 2)

    def test_loading(self):
        """LOADING and its like pass: wait, and send again."""
        self.connect()
        for text in (b"-LOADING Redis is loading\r\n", b"-BUSY a script runs\r\n", b"-MISCONF no disk\r\n"):
            self.connection.peer.answers[b"LPUSH"] = text
            self.publish(message())
            self.assertIsInstance(self.error(), NotSent)
            self.listener.outcomes.clear()
            self.wires.pass_time(0.2)
            self.assertTrue(self.broker.ready)

    def test_read_only(self):
        """READONLY is a failover: nothing was sent, and a new connection is made."""
        first = self.connect()
        first.peer.answers[b"LPUSH"] = b"-READONLY You can't write against a read only replica.\r\n"
        self.publish(message())
        self.assertIsInstance(self.error(), NotSent)
        self.assertEqual(len(self.listener.unavailable), 1)
        self.wires.pass_time(0.5)
        self.assertTrue(first.lost)
        self.assertTrue(self.broker.ready)
        self.assertIsNot(self.connection, first)

    def test_logged_out(self):
        """NOAUTH in the midst is `AuthenticationFailed`."""
        self.connect()
        self.connection.peer.answers[b"LPUSH"] = b"-NOAUTH Authentication required.\r\n"
        self.publish(message())
        self.assertIsInstance(self.error(), AuthenticationFailed)

    def test_refused(self):
        """WRONGTYPE and NOPERM are the server's final word, and fail one message alone."""
        self.connect()
        for text in (b"-WRONGTYPE Operation against a key\r\n", b"-NOPERM this user has no permissions\r\n"):
            self.connection.peer.answers[b"LPUSH"] = text
            self.publish(message())
            error = self.error()
            self.assertIsInstance(error, Refused)
            self.assertIn(text[1:9].decode(), str(error))
            self.listener.outcomes.clear()
            self.assertTrue(self.broker.ready)

    def test_bindings_not_now(self):
        """A server that cannot read the bindings now sends the message back."""
        self.connect()
        self.connection.peer.answers[b"SMEMBERS"] = b"-LOADING\r\n"
        self.publish(message("x", "k"))
        self.assertIsInstance(self.error(), NotSent)
        self.assertFalse(self.broker.ready)

    def test_closing(self):
        """What is handed over to a connection that is closing was not sent."""
        connection = self.connect()
        self.broker.stop(1)
        self.assertFalse(self.broker.ready)
        self.broker.publish(message())
        self.assertIsInstance(self.listener.outcomes[0][1], NotSent)
        connection.lose()

    def test_full(self):
        """While the transport is full no work is taken."""
        connection = self.connect()
        protocol = connection.protocol
        write = protocol.transport.write

        def write_and_pause(data):
            write(data)
            protocol.pauseProducing()

        with mock.patch.object(protocol.transport, "write", write_and_pause):
            self.publish(message())
        self.assertFalse(self.broker.ready)
        protocol.resumeProducing()
        self.assertTrue(self.broker.ready)
        self.assertEqual(self.listener.ready, 2)


class LifeTests(BrokerCase):
    def test_unreachable(self):
        """A round that failed is told."""
        self.wires.refusals.append(ServerUnreachable("no"))
        self.broker.connect()
        self.assertEqual(len(self.listener.unavailable), 1)
        self.assertFalse(self.broker.connected)
        self.wires.pass_time(0.5)
        self.assertTrue(self.broker.connected)
        self.assertEqual(self.broker.url, "redis://10.0.0.1:6379/0")

    def test_stop_waits_for_answers(self):
        """An orderly stop waits for the answers that are due."""
        self.connect()
        self.publish(message())
        stopped = self.broker.stop(5)
        self.assertNoResult(stopped)
        self.assertEqual(self.outcomes(), [("1", None)])
        self.successResultOf(stopped)

    def test_stop_in_a_pause(self):
        """Stopping while the server is given a rest leaves no timer, whatever answers come then."""
        self.connect()
        self.connection.peer.answers[b"LPUSH"] = b"-OOM\r\n"
        self.publish(message())
        self.wires.flush()
        self.publish(message())
        self.broker.stop(5)
        self.wires.flush()
        self.assertEqual(self.wires.clock.getDelayedCalls(), [])

    def test_lost_in_a_pause(self):
        """A connection that ends while the server is given a rest is replaced."""
        self.connect()
        self.connection.peer.answers[b"LPUSH"] = b"-OOM\r\n"
        self.publish(message())
        self.wires.flush()
        self.connection.lose()
        self.wires.pass_time(0.5)
        self.assertTrue(self.broker.ready)


class VanishedTests(BrokerCase):
    """Bindings are lost under a living connection: FLUSHDB, eviction, kombu's own sweep."""

    def setUp(self):
        super().setUp()
        self.connect()

    def send(self, sent):
        found = self.prepare(sent)
        if found is not True:
            self.assertEqual(found, [None])
        self.publish(sent)

    def arrived(self, name):
        return [json.loads(one)["properties"]["correlation_id"] for one in self.store.lists.get(name, ())]

    def test_declared_again(self):
        """A message whose binding is gone is declared for once more, and arrives, it and those behind it, in order."""
        names = [str(number) for number in range(5)]
        self.send(message("x", "k", "first", (QUEUE,)))
        self.wires.flush()
        self.store.sets.clear()
        self.store.lists.clear()
        for name in names:
            self.send(message("x", "k", name, (QUEUE,)))
        self.publish(message("", "q", "plain"))
        self.assertEqual(self.outcomes(), [(name, None) for name in ("first", *names, "plain")])
        self.assertEqual(self.arrived(b"q"), ["plain", *reversed(names)])
        for table in (b"_kombu.binding.x", b"_kombu.binding_permanent.x"):
            self.assertEqual(set(self.store.sets[table]), {f"k{SEP}{SEP}q".encode()})
        self.connection.commands  # noqa: B018  # what went before is not looked at
        self.send(message("x", "k", "later", (QUEUE,)))
        self.wires.flush()
        self.assertEqual([command[0] for command in self.connection.commands], [b"SMEMBERS", b"LPUSH"])

    def test_some_are_left(self):
        """Of a topic's bindings only ours are gone, and somebody else's would take the message: it goes to both."""
        topic = Entity((DeclareExchange("x", "topic"), DeclareQueue("q"), BindQueue("q", "x", "a.#")))
        self.prepare(message("x", "a.b", "1", (topic,)))
        ours = self.store.sets[b"_kombu.binding.x"]
        self.store.sets[b"_kombu.binding.x"] = [ours[0].replace(b"q", b"other")]
        self.send(message("x", "a.b", "1", (topic,)))
        self.assertEqual(self.outcomes(), [("1", None)])
        self.assertEqual((self.arrived(b"q"), self.arrived(b"other")), (["1"], ["1"]))

    def test_dead_letters(self):
        """A message does not become a dead letter because its binding was lost."""
        self.wires = Wires()
        self.store = self.wires.store
        layout = replace(LAYOUT, deadletter_queue="dead")
        self.broker = RedisBroker(
            self.wires.clock,
            self.wires.attempts(CommandProtocol),
            1,
            None,
            lambda failures: 0.2,
            routing=lambda db: Routing(layout),
        )
        self.broker.listen(self.listener)
        self.connect()
        self.prepare(message("x", "k", "1", (QUEUE,)))
        self.store.sets.clear()
        self.send(message("x", "k", "1", (QUEUE,)))
        self.assertEqual(self.outcomes(), [("1", None)])
        self.assertEqual((self.arrived(b"q"), self.arrived(b"dead")), (["1"], []))

    def test_not_ours(self):
        """What this side does not bind is not looked for, and a routing key that it binds nothing with is `Unroutable`."""
        self.prepare(message("x", "k", "1", (QUEUE,)))
        self.store.sets.clear()
        self.connection.commands  # noqa: B018  # what went before is not looked at
        self.publish(message("x", "k", "unbound"))
        self.wires.flush()
        self.assertEqual([command[0] for command in self.connection.commands], [b"SMEMBERS"])
        self.send(message("x", "elsewhere", "bound", (QUEUE,)))
        self.wires.flush()
        commands = [command[0] for command in self.connection.commands]
        self.assertEqual(commands, [b"SMEMBERS", b"MULTI", b"SADD", b"SADD", b"SMEMBERS", b"EXEC"])
        self.assertEqual([type(error) for _, error in self.outcomes()], [Unroutable, Unroutable])

    def test_once_only(self):
        """A server that forgets at once is asked once for each message."""
        self.store.answers[b"SMEMBERS"] = array()
        self.connection.peer.answers[b"SMEMBERS"] = array()
        self.send(message("x", "k", "1", (QUEUE,)))
        self.assertIsInstance(self.error(), Unroutable)
        self.assertEqual(len([one for one in self.connection.commands if one[0] == b"MULTI"]), 2)

    def test_expiring(self):
        """A queue that expires, too."""
        self.send(message("x", "e", "1", (expiring(),)))
        self.wires.flush()
        evals = [command for command in self.connection.commands if command[0] == b"EVAL"]
        self.assertEqual(len(evals), 2)  # declared, and once more, as this server's EVAL does nothing
        self.assertEqual(evals[0], evals[1])

    def test_cannot_be_declared(self):
        """Where it cannot be declared again, it is the server's word, and nothing stands in line for ever."""
        for answer, kind in (
            (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", NotSent),
            (b"-NOPERM this user has no permissions\r\n", Refused),
        ):
            self.prepare(message("x", "k", "1", (QUEUE,)))
            self.store.sets.clear()
            self.connection.peer.answers[b"SADD"] = answer
            self.publish(message("x", "k", "1", (QUEUE,)), message("", "q", "behind"))
            (name, error), behind = self.outcomes()
            self.assertEqual((name, behind), ("1", ("behind", None)))
            self.assertIsInstance(error, kind)
            self.listener.outcomes.clear()
            self.connection.peer.answers[b"SADD"] = self.store.do_sadd
            self.wires.pass_time(1)

    def test_lost_meanwhile(self):
        """The connection is lost while it is declared again: nothing of the message has left."""
        self.prepare(message("x", "k", "1", (QUEUE,)))
        self.store.sets.clear()
        connection = self.connection

        def cut(command):
            self.wires.clock.callLater(0, connection.lose)
            return b""

        connection.peer.answers[b"SADD"] = cut
        self.publish(message("x", "k", "1", (QUEUE,)))
        self.wires.flush()
        self.wires.clock.advance(0)
        self.assertIsInstance(self.error(), NotSent)

    def test_fanout(self):
        """A fanout exchange needs no binding to be published to, whatever is bound to it."""
        fanout = Entity((DeclareExchange("b", "fanout"), DeclareQueue("q"), BindQueue("q", "b", "")))
        self.prepare(message("b", "", "1", (fanout,)))
        self.store.sets.clear()
        self.send(message("b", "", "1", (fanout,)))
        self.assertEqual(self.outcomes(), [("1", None)])
        self.assertIn([b"PUBLISH", b"/0.b"], [command[:2] for command in self.connection.commands])
