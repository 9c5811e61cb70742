"""Calls and results over Redis, on good days."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any
from unittest import skipIf
from uuid import uuid4

import celery
from kombu.common import Broadcast
from kombu.entity import Exchange, Queue

from tests.integration._clients import outcomes
from tests.integration._redis import RedisTestCase, contents
from tests.support import servers
from tests.support.servers import PROJECT, wait_for_file
from twistedcelery.errors import Refused, ResultNotKept, Unroutable

PROGRAM = """
from celery import Celery
from twisted.internet import defer, task
from twistedcelery import TwistedCelery

app = Celery(broker='URL', backend='URL')

@defer.inlineCallbacks
def main(reactor):
    tx_app = TwistedCelery(app)
    result = yield tx_app.send_task('tests.add', args=(1, 2))
    print("{} + {} = {}".format(1, 2, result))

task.react(main)
"""

THOUSAND = """
import sys
from celery import Celery
from twisted.internet import defer, task
from twistedcelery import TwistedCelery

app = Celery(broker='URL', backend='BACKEND')

def main(reactor):
    tx = TwistedCelery(app)
    for number in range(1000):
        tx.send_task('tests.record', args=(sys.argv[1], number))
    return defer.succeed(None)

task.react(main)
"""


class Programs(RedisTestCase):
    """Whole programs, in a process of their own."""

    def run_program(self, text, *arguments):
        def run():
            program = text.replace("URL", self.broker).replace("BACKEND", self.backend)
            return subprocess.run(
                [sys.executable, "-c", program, *arguments],
                capture_output=True,
                text=True,
                timeout=50,
                check=False,
                cwd=PROJECT,
            )

        return self.in_thread(run)

    async def test_readme(self):
        """A program with a Redis URL prints its sum and nothing else."""
        done = await self.run_program(PROGRAM)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "1 + 2 = 3\n", ""))

    async def test_fire_and_return(self):
        """A script that fires 1,000 calls and returns at once loses none and says nothing."""
        path = self.temporary()
        done = await self.run_program(THOUSAND, str(path))
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        lines = await self.in_thread(wait_for_file, path, 1000, 30.0)
        self.assertEqual(sorted(map(int, lines)), list(range(1000)))


@skipIf(celery.VERSION < (5, 7), "Celery before 5.7 compresses no results")
class Compressed(RedisTestCase):
    """Results that workers store with ``result_compression``."""

    async def test_result_compression(self):
        """They are decompressed, whatever the settings here, and one that is larger than ``inflate_limit`` fails its wait."""
        tx = self.client(self.app(), inflate_limit=5_000_000)
        sizes = [1_000, 4_000_000, 6_000_000]
        ids = [str(uuid4()) for _ in sizes]
        waiting = [tx.AsyncResult(task_id).get() for task_id in ids]

        def store():
            backend = self.app(result_compression="zlib").backend
            for task_id, size in zip(ids, sizes, strict=True):
                backend.store_result(task_id, "x" * size, "SUCCESS")

        await self.in_thread(store)
        self.flushWarnings()  # redis-py's, about Celery's calls
        self.assertEqual([len(await waiting[0]), len(await waiting[1])], sizes[:2])
        with self.assertRaises(ResultNotKept) as caught:
            await waiting[2]
        self.assertIn("inflate_limit", str(caught.exception))
        # The same for whoever asks later.
        self.assertEqual(len(await tx.AsyncResult(ids[1]).result()), sizes[1])
        with self.assertRaises(ResultNotKept):
            await tx.AsyncResult(ids[2]).state()


class Leftovers(RedisTestCase):
    """What is left when all is done."""

    async def test_subscriptions(self):
        """After a thousand results no channel is subscribed to, and after the stop no connection is there."""
        name = "leftovers"
        tx = self.client(self.app(redis_client_name=name, broker_transport_options={"client_name": name}))
        callings = [tx.send_task("tests.add", args=(1, number)) for number in range(1000)]
        ours = {f"celery-task-meta-{calling.id}".encode() for calling in callings}
        await outcomes(callings)
        # Channels are left in batches, each after the acknowledgement of the one before. Those of others are stock
        # Celery's, called by other tests of this run.
        left = ours
        for _ in range(300):
            left = ours & set(
                await self.in_thread(self.server.command, "PUBSUB", "CHANNELS", "celery-task-meta-*")
            )
            if not left:
                break
            await self.sleep(0.05)
        self.assertEqual(left, set())
        clients = await self.in_thread(self.server.command, "CLIENT", "LIST")
        self.assertEqual(str(clients).count(f"name={name}") or str(clients).count(f"'name': '{name}'"), 3)
        await tx.stopService()
        clients = await self.in_thread(self.server.command, "CLIENT", "LIST")
        self.assertNotIn(name, str(clients))

    async def test_reply_lists(self):
        """With rpc results the reply lists are gone after an orderly stop, and unread replies with them."""
        self.broker, self.backend = self.server.add_database(), "rpc://"
        await self.own_worker()
        tx = self.client()
        gate = self.gate()
        dropped = tx.send_task("tests.hold", args=(str(gate),))
        await dropped.when_sent()
        dropped.cancel()
        await self.failure_of(dropped, Exception)
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        reply_to = (tx.engine.reply_to or "").encode()
        # What comes from now on is read by nobody.
        await self.eventually(lambda: not tx.engine.source._busy)
        gate.unlink()
        for _ in range(300):
            if reply_to in await self.in_thread(contents, self.broker):
                break
            await self.sleep(0.05)
        self.assertIn(reply_to, await self.in_thread(contents, self.broker))
        await tx.stopService()
        left = await self.in_thread(contents, self.broker)
        self.assertFalse([key for key in left if key.startswith(b"twistedcelery")])


class Results(RedisTestCase):
    """Results in other shapes."""

    async def test_thirty_one_megabytes(self):
        """A result of 31 MB comes by itself, and others meanwhile."""
        tx = self.client()
        size = 31_000_000
        calling = tx.send_task("tests.big_result", args=(size,))
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        self.assertEqual(len(await calling), size)
        self.assertEqual(len(await tx.AsyncResult(calling.id).get(timeout=30)), size)
        await calling.async_result.forget()

    async def test_compressed_and_extended(self):
        """Compressed and extended results, stored in other serializations, are decoded by Celery's own backend."""
        self.broker = self.backend = self.server.add_database()
        settings: dict[str, Any] = {
            "result_compression": "gzip", "result_extended": True, "result_serializer": "pickle",
            "accept_content": ["json", "pickle"],
        }  # fmt: skip
        await self.own_worker(settings=settings)
        tx = self.client(self.app(**settings))
        calling = tx.send_task("tests.identity", args=("x" * 10_000,))
        seen: list[Any] = []
        self.assertEqual(await calling.get(on_message=seen.append), "x" * 10_000)
        self.assertEqual((seen[-1]["name"], seen[-1]["queue"]), ("tests.identity", "celery"))
        found = await self.in_thread(contents, self.broker)
        self.assertIn(b"celery-compressed", found[f"celery-task-meta-{calling.id}".encode()])
        error = await self.failure_of(tx.send_task("tests.fail", args=("pickled",)), ValueError)
        self.assertEqual(error.args, ("pickled",))

    async def test_prefixes(self):
        """Queues, keys and channels with ``global_keyprefix`` are found by a worker that has it too."""
        settings: dict[str, Any] = {
            "broker_transport_options": {"global_keyprefix": "mine:"},
            "result_backend_transport_options": {"global_keyprefix": "mine"},
        }
        self.broker = self.backend = self.server.add_database()
        await self.own_worker(settings=settings)
        tx = self.client(self.app(**settings))
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        calling = tx.send_task("tests.identity", args=(1,))
        await calling
        found = await self.in_thread(contents, self.broker)
        self.assertIn(f"mine_celery-task-meta-{calling.id}".encode(), found)
        self.assertTrue(all(key.startswith(b"mine") for key in found), found)

    async def test_not_a_result(self):
        """A value under the result key that is not a result fails the wait, and says so."""
        tx = self.client()
        await self.in_thread(self.server.command, "SET", "celery-task-meta-strange", "rubbish")
        error = await self.failure_of(tx.AsyncResult("strange").get(timeout=30), ResultNotKept)
        self.assertIn("not a result", str(error))
        await self.failure_of(tx.AsyncResult("strange").state(), ResultNotKept)
        await self.in_thread(self.server.command, "DEL", "celery-task-meta-strange")
        await self.in_thread(self.server.command, "LPUSH", "celery-task-meta-list", "1")
        error = await self.failure_of(tx.AsyncResult("list").state(), Refused)
        self.assertIn("WRONGTYPE", str(error))
        await self.in_thread(self.server.command, "DEL", "celery-task-meta-list")


class Routes(RedisTestCase):
    """Messages are taken by workers, whichever way they go."""

    def start_servers(self):
        self.server = servers.redis()
        self.broker = self.backend = servers.database("routes")
        servers.worker(self.broker, self.backend, queues=["celery", "d1", "t1", "e1", "dead"])

    async def test_exchanges(self):
        """Direct and topic exchanges, an expiring queue and the dead letter queue."""
        direct, topic = Exchange("dx"), Exchange("tx", type="topic")
        app = self.app(
            task_queues=[
                Queue("celery"),
                Queue("d1", direct, routing_key="d"),
                Queue("t1", topic, routing_key="t.#"),
                Queue("e1", Exchange("ex"), routing_key="e", expires=60.0),
            ]
        )
        tx = self.client(app)
        for options in (
            {"queue": "d1"},
            {"exchange": "dx", "routing_key": "d", "declare": [app.amqp.queues["d1"]]},
            {"queue": "t1", "routing_key": "t.one"},
            {"queue": "e1"},
            {"queue": "e1"},
        ):
            self.assertEqual(await tx.send_task("tests.add", args=(1, 2), **options).get(timeout=30), 3)
        nowhere = tx.send_task("tests.add", args=(1, 2), exchange="dx", routing_key="nowhere")
        error = await self.failure_of(nowhere, Unroutable)
        self.assertEqual(error.routing_key, "nowhere")
        app.conf.broker_transport_options = {"deadletter_queue": "dead"}
        tx = self.client(app)
        calling = tx.send_task("tests.add", args=(1, 2), exchange="dx", routing_key="nowhere")
        self.assertEqual(await calling.get(timeout=30), 3)

    async def test_broadcast(self):
        """A message to a Broadcast queue reaches every worker; stock Celery loses it."""
        self.broker = self.backend = self.server.add_database()
        for _ in range(2):
            await self.own_worker(queues=["celery", "everybody"], module="tests.support.broadcast_tasks")
        path = self.temporary()
        tx = self.client(self.app(task_queues=[Queue("celery"), Broadcast("everybody")]))
        calling = tx.send_task("tests.record", args=(str(path), "here"), queue="everybody")
        await calling.when_sent()
        self.assertEqual(await self.in_thread(wait_for_file, path, 2), ["here", "here"])
        await calling.get(timeout=30)

    async def test_priorities(self):
        """What is more urgent is taken first."""
        self.broker = self.backend = self.server.add_database()
        path = self.temporary()
        tx = self.client()
        sent = [
            tx.send_task("tests.record", args=(str(path), priority), priority=priority)
            for priority in (0, 0, 9, 3, 6, 0)
        ]
        for calling in sent:
            await calling.when_sent()
        await self.own_worker(pool="solo", concurrency=1, settings={"worker_prefetch_multiplier": 1})
        lines = await self.in_thread(wait_for_file, path, 6)
        # kombu's workers look at the lists of lower numbers first.
        self.assertEqual(lines, ["0", "0", "0", "3", "6", "9"])
        await outcomes(sent)

    async def test_order(self):
        """Calls run in their order, whatever exchanges they go through."""
        self.broker = self.backend = self.server.add_database()
        path = self.temporary()
        queue = Queue("celery", Exchange("dx2"), routing_key="k")
        tx = self.client(self.app(task_queues=[queue]))
        ways: list[dict[str, Any]] = [
            {"queue": "celery"},
            {"exchange": "dx2", "routing_key": "k", "declare": [queue]},
        ]
        sent = [
            tx.send_task("tests.record", args=(str(path), number), **ways[number % 2])
            for number in range(200)
        ]
        await self.own_worker(pool="solo", concurrency=1)
        await outcomes(sent)
        self.assertEqual(path.read_text().split(), [str(number) for number in range(200)])


class Pace(RedisTestCase):
    """The reactor goes on ticking."""

    async def test_tick(self):
        """With 2,000 calls in flight the worst tick is printed."""
        tx = self.client()
        await tx.send_task("tests.add", args=(1, 2))
        ticker = self.ticker()
        began = time.monotonic()
        callings = []
        for _ in range(100):
            callings += [tx.send_task("tests.add", args=(1, number)) for number in range(20)]
            await self.sleep(0)
        self.assertEqual(len(await outcomes(callings)), 2000)
        ticker.stop()
        seconds = time.monotonic() - began
        print(f"2,000 calls in {seconds:.1f} s, worst tick {ticker.worst * 1e3:.1f} ms late")
