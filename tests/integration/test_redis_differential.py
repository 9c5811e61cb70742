"""What a call leaves in Redis equals what stock Celery and kombu leave there, key by key and message by message."""

from __future__ import annotations

import base64
import json
import re
import time
import warnings
from datetime import datetime, timezone

import kombu.pools
from celery import chain, chord, group
from kombu.entity import Exchange, Queue
from kombu.transport.virtual import UndeliverableWarning

from tests.integration._redis import RedisTestCase, contents
from tests.support.servers import Redis

STOCK, OURS = 8, 9
SEP = "\x06\x16"
DATABASE = re.compile(rb"^(.*?/\D?)\d\.")
UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def readable(message):
    """Decode an envelope, without what is new for each message."""
    if not message.startswith(b"{"):
        return message
    found = json.loads(message)
    if "properties" in found:
        properties = found["properties"]
        properties.pop("delivery_tag")
        if "expiration" in properties:
            properties["expiration"] = round(int(properties["expiration"]) / 60_000)
        if properties["body_encoding"] == "base64" and found["content-type"] == "application/json":
            found["body"] = base64.b64decode(found["body"]).decode("latin-1")
        for name in ("clock", "expires", "sent_at"):
            found["headers"].pop(name, None)
    # Ids that the call did not give: an app's own, to reply to, and what a canvas makes up.
    known = json.loads(UUID.sub("an id", json.dumps(found)))
    return list(found), list(found.get("properties", ())), known


def readable_contents(url):
    return {
        normal(key): list(map(readable, value)) if isinstance(value, list) else value
        for key, value in contents(url).items()
    }


def normal(key):
    """Give a key without the id that a canvas makes up."""
    return UUID.sub("an id", key.decode())


class Leftovers(RedisTestCase):
    """The same call through stock Celery into one database and through us into another."""

    # One for all tests, without workers: their heartbeats are published too.
    own: list[Redis] = []  # noqa: RUF012

    def start_servers(self):
        if not self.own:
            server = Redis()
            server.start()
            self.own.append(server)
        self.server = self.own[0]

    def url(self, db):
        return self.server.database_url(db)

    def apps(self, **settings):
        return [self.app(self.url(db), self.url(db), **settings) for db in (STOCK, OURS)]

    def clear(self):
        for db in (STOCK, OURS):
            with self.server.client(db=db) as client:
                client.flushdb()

    def listen(self, client):
        """Subscribe to everything; returns the connection, subscribed."""
        subscription = client.pubsub()
        subscription.psubscribe("*")
        subscription.get_message(timeout=5)
        return subscription

    def heard(self, subscription):
        """What was published, as channel without database, and message."""
        found = []
        while message := subscription.get_message(timeout=0.1):
            channel = DATABASE.sub(rb"\1DB.", message["channel"])
            found.append((channel, readable(message["data"])))
        return found

    async def compare(self, call, bind=(), send=None, expirations=False, **settings):
        """Make the call both ways; compare what is in Redis then, and what was published. Returns our contents.

        ``call`` gets an app and returns a function and its arguments, for ``app.send_task`` for example.
        """
        await self.in_thread(self.clear)
        await self.in_thread(kombu.pools.reset)
        stock, ours = self.apps(**settings)
        with self.server.client() as client:
            subscription = await self.in_thread(self.listen, client)

            def call_stock():
                kombu.pools.reset()
                with stock.connection_for_write() as connection:
                    for queue in bind:
                        queue(connection.default_channel).declare()
                function, args, kwargs = call(stock)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UndeliverableWarning)
                    function(*args, **kwargs)
                stock.close()
                # Which leaves these open.
                stock.backend.result_consumer.stop()
                stock.backend.client.close()

            await self.in_thread(call_stock)
            published = await self.in_thread(self.heard, subscription)
            expected = await self.in_thread(readable_contents, self.url(STOCK))
            if bind:

                def declare():
                    with ours.connection_for_write() as connection:
                        for queue in bind:
                            queue(connection.default_channel).declare()

                await self.in_thread(declare)
            tx = self.client(ours)
            function, args, kwargs = call(ours)
            calling = tx.engine.caller.call(function, args, kwargs, revoke_on_cancel=False)
            await calling.when_sent()
            calling.cancel()
            calling.addErrback(lambda _: None)
            await tx.stopService()
            found = await self.in_thread(readable_contents, self.url(OURS))
            self.assertEqual(found, expected)
            self.assertEqual(await self.in_thread(self.heard, subscription), published)
            subscription.close()
        self.assertTrue(found or published)
        if expirations:
            expected, left = [await self.in_thread(self.expirations, db) for db in (STOCK, OURS)]
            for key, milliseconds in expected.items():
                self.assertApproximates(left[key], milliseconds, 10_000, key)
        return found

    def expirations(self, db):
        with self.server.client(db=db) as client:
            return {normal(key): client.pttl(key) for key in client.scan_iter()}

    def send(self, *args, **options):
        """Give what `compare` takes: ``send_task`` with ids that are the same both ways."""
        options.setdefault("task_id", "the-id")
        options.setdefault("root_id", "the-root")
        return lambda app: (app.send_task, ("tests.add", *(args or ((1, 2),))), options)

    async def test_plain(self):
        """A call without options."""
        found = await self.compare(self.send())
        self.assertIn("celery", found)
        self.assertEqual(found["_kombu.binding_permanent.celery"], found["_kombu.binding.celery"])

    async def test_options(self):
        """Options that go into headers and properties."""
        when = datetime(2030, 1, 1, tzinfo=timezone.utc)
        for options in (
            {"eta": when, "expires": when},
            {"headers": {"a": 1, "b": [1.5, None, {"c": "ä"}]}, "priority": 4},
            {"reply_to": "me", "correlation_id": "you", "shadow": "other", "time_limit": 3},
            {"ignore_result": True, "delivery_mode": 1},
            {"serializer": "pickle"},
            {"compression": "gzip"},
            {
                "link": {
                    "task": "t",
                    "args": (),
                    "kwargs": {},
                    "options": {"task_id": "l"},
                    "subtask_type": None,
                }
            },
        ):
            await self.compare(self.send(**options))

    async def test_priorities(self):
        """Each priority goes to its list, whatever the steps and the separator."""
        for priority in (None, 0, 2, 3, 5, 9, 255):
            await self.compare(self.send(priority=priority))
        await self.compare(
            self.send(priority=5), broker_transport_options={"priority_steps": list(range(10)), "sep": ":"}
        )
        await self.compare(self.send(), broker_transport_options={"priority_steps": [1, 5]})

    async def test_prefix(self):
        """``global_keyprefix`` is in front of all keys."""
        found = await self.compare(
            self.send(priority=9), broker_transport_options={"global_keyprefix": "{p}:"}
        )
        self.assertTrue(all(key.startswith("{p}:") for key in found))

    async def test_body_encodings(self):
        """``body_encoding`` other than base64 leaves a text as it is."""
        for encoding in ("utf-8", None):
            for serializer in ("json", "pickle"):
                await self.compare(
                    self.send(serializer=serializer), broker_transport_options={"body_encoding": encoding}
                )

    async def test_protocol_1(self):
        """The older message protocol."""
        await self.compare(self.send(), task_protocol=1)

    async def test_direct(self):
        """A message to a direct exchange goes to every queue that is bound with its key."""
        exchange = Exchange("dx", type="direct")
        queues = [Queue("d1", exchange, routing_key="k"), Queue("d2", exchange, routing_key="k")]
        other = Queue("d3", exchange, routing_key="other")
        found = await self.compare(
            self.send(queue="d1", exchange="dx", routing_key="k"), bind=[queues[1], other], task_queues=queues
        )
        self.assertIn("d2", found)
        self.assertNotIn("d3", found)

    async def test_topic(self):
        """A message to a topic exchange goes where kombu's patterns say."""
        exchange = Exchange("tx", type="topic")
        queues = [Queue("t1", exchange, routing_key="a.#"), Queue("t2", exchange, routing_key="*.b.*")]
        found = await self.compare(
            self.send(queue="t1", routing_key="a.b.c", priority=3), bind=[queues[1]], task_queues=queues
        )
        self.assertIn(f"t1{SEP}3", found)
        self.assertIn(f"t2{SEP}3", found)

    async def test_dead_letters(self):
        """What a direct exchange cannot route goes to the dead letter queue."""
        exchange = Exchange("dx", type="direct")
        self.flushLoggedErrors()
        found = await self.compare(
            self.send(exchange="dx", routing_key="nobody", declare=[exchange]),
            broker_transport_options={"deadletter_queue": "dead"},
        )
        self.assertIn("dead", found)

    async def test_fanout(self):
        """A message to a fanout exchange is published, as the prefix and the patterns say."""
        queues = [Queue("f1", Exchange("fx", type="fanout"), routing_key="k.#")]
        for options in (
            {},
            {"fanout_patterns": False},
            {"fanout_prefix": False},
            {"fanout_prefix": "/x{db}."},
            {"global_keyprefix": "p_"},
        ):
            await self.compare(
                self.send(queue="f1", routing_key="k.1"), task_queues=queues, broker_transport_options=options
            )

    async def test_expiring(self):
        """A queue that expires is kept alive by each message, in every step; its binding has a deadline."""
        queues = [
            Queue("e1", Exchange("ex"), routing_key="e", queue_arguments={"x-expires": 60_000}),
            Queue("e2", Exchange("ey"), routing_key="e", expires=7200.0),
        ]
        for queue in queues:
            found = await self.compare(
                self.send(queue=queue.name, priority=9), expirations=True, task_queues=queues
            )
            self.assertEqual(found["_kombu.binding_deadlines"], [queue.exchange.name.encode()])
            deadlines = await self.in_thread(self.deadlines, queue.exchange.name)
            self.assertApproximates(deadlines[0], deadlines[1], 10_000)
            self.assertGreater(deadlines[1], time.time() * 1000)

    def deadlines(self, exchange):
        found = []
        for db in (STOCK, OURS):
            with self.server.client(db=db) as client:
                found.append(client.zscore("_kombu.binding_deadlines", exchange))
        return found

    async def test_canvas(self):
        """A chain, and a chord with what it writes to the result backend."""

        def chained(app):
            add = app.signature("tests.add")
            options = {"task_id": "b", "root_id": "r"}
            return (
                chain(add.clone((1, 2)).set(task_id="a"), add.clone((3,)).set(**options)).apply_async,
                (),
                {},
            )

        def chorded(app):
            add = app.signature("tests.add")
            header = group([add.clone((i, i)).set(task_id=f"h{i}") for i in range(3)], app=app, task_id="g")
            body = app.signature("tests.tsum").set(task_id="b")
            return chord(header, body, app=app).apply_async, (), {"task_id": "b"}

        await self.compare(chained)
        found = await self.compare(chorded, expirations=True)
        self.assertEqual(len(found["celery"]), 3)

    async def test_events(self):
        """``task-sent`` events are published."""

        def event(message):
            return message[1][2]["headers"], message[0]

        await self.in_thread(self.clear)
        await self.in_thread(kombu.pools.reset)
        stock, ours = self.apps(task_send_sent_event=True)
        with self.server.client() as client:
            subscription = await self.in_thread(self.listen, client)
            await self.in_thread(stock.send_task, "tests.add", (1, 2))
            (expected,) = await self.in_thread(self.heard, subscription)
            tx = self.client(ours)
            tx.send_task("tests.add", (1, 2), ignore_result=True)
            await tx.stopService()
            (found,) = await self.in_thread(self.heard, subscription)
            self.assertEqual(event(found), event(expected))
            self.assertEqual(found[0], b"/DB.celeryev/task.sent")
            subscription.close()
        stock.close()

    async def test_control(self):
        """A revoke is broadcast as stock Celery broadcasts it."""
        await self.in_thread(self.clear)
        await self.in_thread(kombu.pools.reset)
        stock, ours = self.apps()
        with self.server.client() as client:
            subscription = await self.in_thread(self.listen, client)
            await self.in_thread(stock.control.revoke, ["an-id"], terminate=False)
            expected = await self.in_thread(self.heard, subscription)
            await self.client(ours).AsyncResult("an-id").revoke()
            self.assertEqual(await self.in_thread(self.heard, subscription), expected)
            subscription.close()
        stock.close()
