"""kombu's virtual exchanges without I/O: what is declared, where messages go, what they look like."""

from __future__ import annotations

import base64
import datetime as dt
import json

from hypothesis import given
from hypothesis import strategies as st
from kombu.connection import Connection
from kombu.transport.redis import Channel
from kombu.transport.virtual.exchange import TopicExchange
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery._operations import BindExchange, BindQueue, DeclareExchange, DeclareQueue, Publish
from twistedcelery.errors import Refused
from twistedcelery.redis.routing import Routing
from twistedcelery.redis.settings import broker_layout

SEP = "\x06\x16"


def routing(known_type=lambda exchange: None, expiring=True, db=0, **options):
    layout = broker_layout(Connection("redis://", transport_options=options), db)
    return Routing(layout, known_type=known_type, expiring=expiring)


def message(exchange="", routing_key="q", body=b"[]", headers=None, **properties):
    return Publish(
        exchange,
        routing_key,
        body,
        {"content_type": "application/json", "content_encoding": "utf-8", **properties},
        headers or {},
    )


def member(routing_key, pattern, queue):
    return SEP.join([routing_key, pattern, queue])


class DeclareTests(SynchronousTestCase):
    def test_binding(self):
        """A binding stands in both sets: the one that all workers read, and the one that keeps it from being swept."""
        commands = routing().declare([DeclareExchange("x"), DeclareQueue("q"), BindQueue("q", "x", "k")])
        self.assertEqual(
            commands,
            [
                ("SADD", "_kombu.binding.x", member("k", "", "q")),
                ("SADD", "_kombu.binding_permanent.x", member("k", "", "q")),
            ],
        )

    def test_topic(self):
        """A binding to a topic exchange holds kombu's pattern."""
        (command, _) = routing().declare([DeclareExchange("x", "topic"), BindQueue("q", "x", "a.*.#")])
        self.assertEqual(command[2], member("a.*.#", TopicExchange(None).key_to_pattern("a.*.#"), "q"))

    def test_expiring(self):
        """A binding of a queue that expires has a deadline: twice its expiry, an hour at least."""
        for expiry, lifetime in ((1000, 3_600_000), (3_600_000, 7_200_000)):
            (command,) = routing(global_keyprefix="p").declare(
                [
                    DeclareExchange("x"),
                    DeclareQueue("q", arguments={"x-expires": expiry}),
                    BindQueue("q", "x", "k"),
                ]
            )
            self.assertEqual(command[0], "EVAL")
            self.assertEqual(
                command[2:],
                (
                    2,
                    "p_kombu.binding.x",
                    "p_kombu.binding_deadlines",
                    member("k", "", "q"),
                    "x",
                    lifetime,
                ),
            )

    def test_expiry_taken_back(self):
        """A queue that is declared anew without an expiry does not expire; nor does one whose expiry is no number."""
        made = routing()
        for arguments in (None, {"x-expires": "soon"}):
            made.declare([DeclareQueue("q", arguments={"x-expires": 1000})])
            self.assertEqual(len(made.push(message(), ["q"])), 5)
            made.declare([DeclareQueue("q", arguments=arguments)])
            self.assertEqual(len(made.push(message(), ["q"])), 1)

    def test_workers_without_expiry(self):
        """Where the installed kombu lets no queue expire, neither do we."""
        made = routing(expiring=False)
        made.declare([DeclareQueue("q", arguments={"x-expires": 1000})])
        self.assertEqual(len(made.push(message(), ["q"])), 1)

    def test_refusals(self):
        """What kombu's transport cannot declare is refused with AMQP's codes."""
        made = routing()
        made.declare([DeclareExchange("x")])
        for declaration, code in (
            (DeclareExchange("x", "topic"), 406),
            (DeclareExchange("h", "headers"), 503),
            (DeclareExchange("gone", passive=True), 404),
            (BindExchange("x", "y"), 540),
        ):
            error = self.assertRaises(Refused, made.declare, [declaration])
            self.assertEqual(error.code, code)
        made.declare([DeclareExchange("x"), DeclareExchange("x", passive=True)])

    def test_passive_queue(self):
        """A passive declaration asks whether one of the queue's lists is there."""
        (command,) = routing(priority_steps=[0, 5]).declare([DeclareQueue("q", passive=True)])
        self.assertEqual(command, ("EXISTS", "q", f"q{SEP}5"))

    def test_unnamed_exchange(self):
        """A binding to no exchange is one to amq.direct, as in kombu."""
        (command, _) = routing().declare([BindQueue("q", "", "k")])
        self.assertEqual(command[1], "_kombu.binding.amq.direct")


class LookupTests(SynchronousTestCase):
    def lookup(self, made, *bindings, exchange="x", routing_key="k"):
        return made.lookup(exchange, routing_key, [member(*binding).encode() for binding in bindings])

    def test_direct(self):
        """A direct exchange compares routing keys."""
        found = self.lookup(routing(), ("k", "", "b"), ("k", "", "a"), ("other", "", "c"))
        self.assertEqual(found, ["a", "b"])

    def test_topic(self):
        """A topic exchange matches kombu's patterns, and leaves the dead letter queue out."""
        made = routing(deadletter_queue="dead")
        made.declare([DeclareExchange("x", "topic")])
        found = self.lookup(made, ("#", "^.*?$", "q"), ("k", "^k$", "dead"), ("j", "^j$", "other"))
        self.assertEqual(found, ["q"])
        self.assertEqual(self.lookup(made), [])

    def test_dead_letters(self):
        """What no queue of a direct exchange takes goes to the dead letter queue, where there is one."""
        self.assertEqual(self.lookup(routing(deadletter_queue="dead")), ["dead"])
        self.assertEqual(self.lookup(routing()), [])

    def test_unreadable(self):
        """A set that holds no bindings, or a pattern that is none, is a ValueError."""
        made = routing()
        self.assertRaises(ValueError, made.lookup, "x", "k", [b"rubbish"])
        self.assertRaises(ValueError, made.lookup, "x", "k", [b"\xff"])
        made.declare([DeclareExchange("t", "topic")])
        self.assertRaises(ValueError, self.lookup, made, ("k", "(", "q"), exchange="t")

    def test_types(self):
        """An exchange's type is the declared one, else what the app knows, else direct."""
        made = routing(known_type={"b": "fanout", "h": "headers"}.get)
        made.declare([DeclareExchange("x", "topic")])
        self.assertEqual(
            [made.type_of(name) for name in ("", "x", "b", "h", "unknown")],
            ["", "topic", "fanout", "direct", "direct"],
        )

    def test_channels(self):
        """A fanout's channel has the database, the exchange and the routing key, as the options say."""
        self.assertEqual(routing(db=3).channels("x", "a.b"), ["/3.x/a.b"])
        self.assertEqual(routing().channels("x", ""), ["/0.x"])
        self.assertEqual(routing(fanout_patterns=False).channels("x", "k"), ["/0.x"])
        self.assertEqual(routing(fanout_prefix=False).channels("x", "k"), ["x/k"])
        self.assertEqual(routing(fanout_prefix="/f{db}.").channels("x", "k"), ["/f0.x/k"])
        self.assertEqual(routing(global_keyprefix="p_").channels("x", "k"), ["p_/0.x/k"])
        self.assertEqual(
            routing(sentinel_fanout_compat=True).channels("x", "k"), ["/0.x/k", "/{db}.x/k"]
        )  # fmt: skip


class PriorityTests(SynchronousTestCase):
    @given(
        st.lists(st.integers(0, 9), min_size=1, unique=True).map(sorted),
        st.one_of(st.none(), st.integers(-20, 20), st.just("7"), st.just("high")),
    )
    def test_as_kombu(self, steps, priority):
        """Any priority goes to the list that kombu would use, whatever the steps."""
        channel = Channel.__new__(Channel)
        channel.priority_steps, channel.closed, channel.connection = steps, True, None
        stock = {"properties": {"priority": priority}}
        expected = channel._q_for_pri("q", channel._get_message_priority(stock, reverse=False))
        self.assertEqual(routing(priority_steps=steps).key_of("q", priority), expected)

    def test_separator_and_prefix(self):
        """``sep`` and ``global_keyprefix`` are honoured."""
        made = routing(sep=":", global_keyprefix="p_")
        self.assertEqual(made.key_of("q", 9), "p_q:9")
        self.assertEqual(made.keys_of("q"), ["p_q", "p_q:3", "p_q:6", "p_q:9"])


class PushTests(SynchronousTestCase):
    def test_several(self):
        """A message for several queues is put into each, in one envelope; those that expire live on."""
        made = routing(priority_steps=[0, 5])
        made.declare([DeclareQueue("b", arguments={"x-expires": 7})])
        commands = made.push(message(priority=6), ["a", "b"])
        self.assertEqual(commands[0][2], commands[1][2])
        self.assertEqual(
            [command[:2] for command in commands],
            [
                ("LPUSH", f"a{SEP}5"),
                ("LPUSH", f"b{SEP}5"),
                ("PEXPIRE", "b"),
                ("PEXPIRE", f"b{SEP}5"),
            ],
        )


class EnvelopeTests(SynchronousTestCase):
    def test_envelope(self):
        """The envelope is what a virtual channel makes, in its order."""
        made = routing().envelope(
            message(
                "x",
                "k",
                b"[1]",
                {"id": "1", "when": dt.datetime(2026, 1, 1)},  # noqa: DTZ001
                correlation_id="1",
                priority=3,
                delivery_mode=2,
                own="any name is allowed",
            )
        )
        found = json.loads(made)
        tag = found["properties"].pop("delivery_tag")
        self.assertEqual(len(tag), 36)
        self.assertEqual(
            found,
            {
                "body": base64.b64encode(b"[1]").decode(),
                "content-encoding": "utf-8",
                "content-type": "application/json",
                "headers": {
                    "id": "1",
                    "when": {"__type__": "datetime", "__value__": "2026-01-01T00:00:00"},
                },
                "properties": {
                    "correlation_id": "1",
                    "delivery_mode": 2,
                    "own": "any name is allowed",
                    "delivery_info": {"exchange": "x", "routing_key": "k"},
                    "priority": 3,
                    "body_encoding": "base64",
                },
            },
        )
        self.assertEqual(list(found), ["body", "content-encoding", "content-type", "headers", "properties"])

    def test_fresh_tag(self):
        """A message that is sent again has another delivery tag."""
        again = message()
        made = routing()
        self.assertNotEqual(made.envelope(again), made.envelope(again))

    def test_body_encoding(self):
        """Without base64 a text stays text, and bytes are as kombu's JSON has them."""
        for option in (None, "", "utf-8"):
            made = routing(body_encoding=option)
            found = json.loads(made.envelope(message(body='["ä"]'.encode())))
            self.assertEqual((found["body"], found["properties"]["body_encoding"]), ('["ä"]', option))
            packed = json.loads(made.envelope(message(body=b"\xff", content_encoding="binary")))
            self.assertEqual(packed["body"], {"__type__": "base64", "__value__": "/w=="})
            zipped = json.loads(made.envelope(message(body=b"\xff")))
            self.assertEqual(zipped["body"], {"__type__": "base64", "__value__": "/w=="})

    def test_not_json(self):
        """A header that JSON cannot hold is a TypeError."""
        self.assertRaises(TypeError, routing().envelope, message(headers={"x": object()}))
