"""Redis on bad days: killed, cut, full, loading, read-only, talking nonsense. Every Deferred fires; what cannot be known is said."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import redis as redis_py
from kombu.entity import Exchange, Queue
from twisted.internet.defer import CancelledError

from tests.integration._clients import outcomes, patient
from tests.integration._redis import RedisTestCase, contents
from tests.support import servers
from tests.support.servers import wait_for_file
from twistedcelery import Celery as DropIn
from twistedcelery.errors import (
    ConnectionFailed,
    NotSent,
    OutcomeUnknown,
    Refused,
    ResultTimeout,
    TwistedCeleryError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class Proxied(RedisTestCase):
    """The shared server behind a proxy: one for messages, one for results."""

    async def proxied(self, **settings):
        """Make a client of both proxies, connected."""
        self.messages = await self.proxy(self.server.port)
        self.results = await self.proxy(self.server.port)
        app = self.app(
            f"redis://127.0.0.1:{self.messages.port}/0",
            f"redis://127.0.0.1:{self.results.port}/0",
            **settings,
        )
        tx = self.client(patient(app))
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        return tx

    async def test_cut_before_the_confirm(self):
        """A connection cut between LPUSH and its answer: sent again with the same task id, so it may run twice."""
        tx = await self.proxied()
        declared = tx.send_task("tests.add", queue="nobody's", ignore_result=True)
        await declared
        await self.in_thread(self.server.command, "DEL", "nobody's")
        self.messages.stall("down")
        calling = tx.send_task("tests.add", queue="nobody's")
        await self.eventually(lambda: self.server.command("EXISTS", "nobody's"))
        self.messages.cut()
        self.messages.resume()
        await calling.when_sent()
        found = (await self.in_thread(contents, self.broker))[b"nobody's"]
        properties = [json.loads(message)["properties"] for message in found]
        self.assertEqual([each["correlation_id"] for each in properties], [calling.id] * 2)
        self.assertEqual(len({each["delivery_tag"] for each in properties}), 2)
        calling.cancel()
        await self.failure_of(calling, CancelledError)
        await self.in_thread(self.server.command, "DEL", "nobody's")

    async def test_cut_and_run(self):
        """A message whose confirm was lost, and whose result has come, is not sent again."""
        tx = await self.proxied()
        path = self.temporary()
        self.messages.stall("down")
        calling = tx.send_task("tests.record", args=(str(path),))
        self.assertEqual(await calling, calling.id)
        self.messages.cut()
        self.messages.resume()
        await calling.when_sent()
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        self.assertEqual(path.read_text().split(), [calling.id])

    async def test_cut_and_not_sent_again(self):
        """With ``retry=False`` it is never sent twice: the outcome is unknown, and said to be."""
        tx = await self.proxied()
        path = self.temporary()
        self.messages.stall("down")
        calling = tx.send_task("tests.record", args=(str(path),), retry=False, ignore_result=True)
        await self.eventually(path.exists)
        self.messages.cut()
        self.messages.resume()
        await self.failure_of(calling, OutcomeUnknown)
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        self.assertEqual(await self.in_thread(wait_for_file, path, 2, 0.3), [calling.id])

    async def test_cut_before_the_subscription(self):
        """A connection cut between SUBSCRIBE and its answer loses no result."""
        tx = await self.proxied()
        self.results.stall("down")
        calling = tx.send_task("tests.add", args=(2, 2))
        await calling.when_sent()
        await self.sleep(0.2)
        self.results.cut()
        self.results.resume()
        self.assertEqual(await calling, 4)

    async def test_a_thousand_results_on_their_way(self):
        """Connections cut with 1,000 results on their way, again and again: none is lost, each task runs once."""
        tx = await self.proxied()
        path = self.temporary()
        callings = [tx.send_task("tests.record", args=(str(path), number)) for number in range(1000)]
        done = outcomes(callings)
        for calling in callings:
            await calling.when_sent()
        for _ in range(5):
            self.results.cut()
            await self.sleep(0.1)
        self.assertEqual(await done, list(range(1000)))
        counted = Counter(path.read_text().split())
        self.assertEqual((len(counted), set(counted.values())), (1000, {1}))
        await self.assert_nothing_left(tx)

    async def test_cut_while_sending(self):
        """Connections cut while 1,000 calls leave: each of them runs and gives its value."""
        tx = await self.proxied()
        callings = []
        for number in range(1000):
            callings.append(tx.send_task("tests.add", args=(number, 0)))
            if number % 200 == 100:
                await self.sleep(0)
                self.messages.cut()
        self.assertEqual(await outcomes(callings), list(range(1000)))
        await self.assert_nothing_left(tx)

    async def test_nonsense(self):
        """A server that answers nonsense is left and met again; nothing waits for ever."""
        tx = await self.proxied()
        for proxy in (self.messages, self.results):
            calling = tx.send_task("tests.sleep", args=(0.2,))
            proxy.garbage(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            self.assertEqual(await calling, 0.2)
            self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)

    async def test_silence(self):
        """A server that says nothing any more is noticed, and left."""
        options = {"socket_timeout": 1, "health_check_interval": 0.5}
        tx = await self.proxied(
            broker_transport_options=options, redis_socket_timeout=1, redis_backend_health_check_interval=0.5
        )
        accepted = self.messages.accepted, self.results.accepted
        self.messages.stall()
        self.results.stall()
        calling = tx.send_task("tests.add", args=(2, 2))
        await self.eventually(
            lambda: self.messages.accepted > accepted[0] and self.results.accepted > accepted[1] + 1,
            timeout=20,
        )
        self.messages.resume()
        self.results.resume()
        self.assertEqual(await calling.get(timeout=30), 4)

    async def test_dead_results(self):
        """A result backend that is away delays no message; a chord, whose size it has to hold, waits for it."""
        tx = await self.proxied()
        await self.results.refuse()
        self.results.cut()
        path = self.temporary()
        calling = tx.send_task("tests.record", args=(str(path), "ran"))
        await calling.when_sent()
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), ["ran"])
        add, total = tx.app.signature("tests.add"), tx.app.signature("tests.tsum")
        chord = tx.delay(_chord([add.clone((1, 1)), add.clone((2, 2))], total))
        await self.sleep(0.3)
        await self.results.accept()
        self.assertEqual(await calling, "ran")
        self.assertEqual(await chord, 6)

    async def test_stop_at_any_moment(self):
        """Stopped at any moment, with the server answering or not, nothing is left behind."""
        for delay in (None, 0, 0.001, 0.005, 0.02):
            for stalled in (False, True):
                messages, results = await self.proxy(self.server.port), await self.proxy(self.server.port)
                if stalled:
                    messages.stall("down")
                    results.stall("down")
                app = self.app(f"redis://127.0.0.1:{messages.port}/0", f"redis://127.0.0.1:{results.port}/0")
                tx = self.client(app, stop_timeout=0.2)
                ended = outcomes(tx.send_task("tests.add", args=(1, 2)) for _ in range(20))
                if delay is not None:
                    await self.sleep(delay)
                await tx.stopService()
                for outcome in await ended:
                    self.assertIsInstance(outcome, (int, TwistedCeleryError))
                await self.assert_nothing_left(tx)
                await self.eventually(lambda: messages.connections + results.connections == 0)  # noqa: B023


def _chord(header, body):
    from celery import chord

    return chord(header, body)


class Flushed(RedisTestCase):
    """A database of the test's own, which somebody empties."""

    async def test_bindings_lost(self):
        """FLUSHDB under living connections: calls through named exchanges arrive as before, the drop-in's too."""
        self.broker = self.server.add_database()
        await self.own_worker(queues=["celery", "flushed-d", "flushed-t"])
        direct = Queue("flushed-d", Exchange("flushed-dx"), routing_key="d")
        topic = Queue("flushed-t", Exchange("flushed-tx", type="topic"), routing_key="t.#")
        ways: list[dict[str, Any]] = [
            {"exchange": "flushed-dx", "routing_key": "d", "declare": [direct]},
            {"queue": "flushed-t", "routing_key": "t.one"},
            {"queue": "celery"},
        ]
        app = self.app(task_queues=[Queue("celery"), direct, topic])
        drop_in = DropIn("client", broker=self.broker, backend=self.backend)
        drop_in.conf.task_queues = [Queue("celery"), direct, topic]
        self.addCleanup(self.stop, drop_in.twisted)
        send = (self.client(app).send_task, drop_in.send_task)
        for _ in range(3):
            callings = [each("tests.add", args=(1, 2), **way) for each in send for way in ways]
            self.assertEqual([await calling.get(timeout=30) for calling in callings], [3] * 6)
            with redis_py.Redis.from_url(self.broker) as client:
                await self.in_thread(client.flushdb)


class Victims(RedisTestCase):
    """Servers of the tests' own."""

    def start_servers(self):
        """Each test has its own."""

    async def killed(self, **options):
        """Kill the server with 1,000 calls in flight, start it again; returns outcomes, confirmed, run, and how many a worker held."""
        server = await self.own_server(worker=False, **options)
        path = self.temporary()
        tx = self.client(patient(self.app()), outage_wait=30)
        callings = [tx.send_task("tests.record", args=(str(path), number)) for number in range(1000)]
        confirmed = []
        for number, calling in enumerate(callings):
            calling.when_sent().addCallbacks(
                lambda _, number=number: confirmed.append(number), lambda _: None
            )
        await callings[500].when_sent()
        early = await self.own_worker()
        await self.eventually(path.exists, timeout=20)
        await self.in_thread(server.kill)
        await self.in_thread(early.kill)
        await self.in_thread(server.restart)
        await self.own_worker()
        await self.eventually(
            lambda: not server.command("LLEN", "celery"), interval=0.1, what="messages are left"
        )
        # What the worker has taken runs now; the rest is gone, or held for the worker that was killed.
        found = await outcomes([calling.get(timeout=10) for calling in callings])
        for outcome, number in zip(found, range(1000), strict=True):
            self.assertIn(type(outcome), (int, ResultTimeout))
            if isinstance(outcome, int):
                self.assertEqual(outcome, number)
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)).get(timeout=30), 3)
        for calling in callings:
            calling.cancel()
            calling.addErrback(lambda _: None)
        await self.assert_nothing_left(tx)
        held = await self.in_thread(server.command, "HLEN", "unacked")
        return found, confirmed, {int(line) for line in path.read_text().split()}, held

    async def test_killed_with_persistence(self):
        """Killed and restarted with 1,000 calls in flight, with an append-only file: what was confirmed runs."""
        options = {"appendonly": "yes", "appendfsync": "always"}
        found, confirmed, ran, held = await self.killed(options=options)
        self.assertEqual(len(confirmed), 1000)
        # The worker that was killed with the server held some, which kombu gives back after an hour; the tasks of its
        # eight threads were acknowledged when they began, and kombu had one in its hand that it had not noted yet.
        with_worker = 9
        self.assertGreaterEqual(len(ran) + held, 1000 - with_worker)
        self.assertGreaterEqual(sum(isinstance(outcome, int) for outcome in found) + held, 1000 - with_worker)

    async def test_killed_without_persistence(self):
        """Without persistence what Redis held is gone, which nobody can know: those waits end by their timeout."""
        found, _, ran, _ = await self.killed()
        self.assertLessEqual(sum(isinstance(outcome, int) for outcome in found), len(ran))

    async def test_out_of_memory(self):
        """A server without memory: calls wait, fail with its words after the retry policy, and go on when there is some."""
        server = await self.own_server()
        tx = self.client()
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        await self.in_thread(server.command, "CONFIG", "SET", "maxmemory", "1")
        error = await self.failure_of(tx.send_task("tests.add"), NotSent)
        self.assertIn("maxmemory", str(error))
        waiting = self.client(patient(self.app())).send_task("tests.add", args=(1, 3))
        await self.sleep(0.5)
        await self.in_thread(server.command, "CONFIG", "SET", "maxmemory", "0")
        self.assertEqual(await waiting, 4)
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)

    async def test_read_only(self):
        """A master that becomes a replica, and master again: calls wait for it."""
        server = await self.own_server(worker=False)
        tx = self.client(patient(self.app()))
        await tx.send_task("tests.add", args=(1, 2)).when_sent()
        await self.in_thread(server.command, "REPLICAOF", "127.0.0.1", "1")
        calling = tx.send_task("tests.add", args=(1, 3))
        once = tx.send_task("tests.add", args=(1, 3), retry=False, ignore_result=True)
        await self.failure_of(once, NotSent)
        await self.in_thread(server.command, "REPLICAOF", "NO", "ONE")
        await self.own_worker()
        self.assertEqual(await calling.get(timeout=30), 4)

    async def test_loading(self):
        """A server that is loading its data when it is first called: calls wait for it."""
        options: dict[str, str | Sequence[str]] = {"appendonly": "yes"}
        server = await self.own_server(worker=False, options=options)
        with server.client() as client:
            for number in range(200):
                client.set(f"key{number}", "ballast")
        await self.in_thread(server.stop)
        # Microseconds for each key.
        options["key-load-delay"] = "10000"
        tx = self.client(self.app(), outage_wait=30)
        callings = [tx.send_task("tests.add", args=(1, number)) for number in range(10)]
        await self.in_thread(server.restart)
        await self.own_worker()
        self.assertEqual(await outcomes(callings), [1 + number for number in range(10)])

    async def test_wrong_type(self):
        """Another type under the queue's key: the server's words, for that call alone."""
        server = await self.own_server()
        await self.in_thread(server.command, "SET", "other", "not a list")
        tx = self.client()
        callings = [tx.send_task("tests.add", args=(1, number)) for number in range(50)]
        bad = tx.send_task("tests.add", queue="other")
        callings += [tx.send_task("tests.add", args=(1, number)) for number in range(50, 100)]
        error = await self.failure_of(bad, Refused)
        self.assertIn("WRONGTYPE", str(error))
        self.assertEqual(await outcomes(callings), list(range(1, 101)))

    async def test_push_too_large(self):
        """A result larger than Redis pushes is fetched; other results come meanwhile."""
        server = await self.own_server(options={"client-output-buffer-limit": "pubsub 1mb 1mb 60"})
        tx = self.client()
        big = tx.send_task("tests.big_result", args=(5_000_000,))
        small = [tx.send_task("tests.add", args=(1, number)) for number in range(100)]
        self.assertEqual(len(await big), 5_000_000)
        self.assertEqual(await outcomes(small), list(range(1, 101)))
        await self.eventually(lambda: server.command("PUBSUB", "CHANNELS", "celery-task-meta-*") == [])

    async def test_restarted_while_idle(self):
        """Restarted while nothing is called: the next call finds it."""
        server = await self.own_server()
        tx = self.client(self.app(), outage_wait=10)
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        await self.in_thread(server.restart)
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)).get(timeout=30), 3)

    async def test_comes_up_in_time(self):
        """A server that is down at the first call and comes up in time serves it, while the reactor ticks on."""
        server = await self.own_server(worker=False)
        await self.in_thread(server.kill)
        tx = self.client(self.app(), outage_wait=20)
        options = {"retry_policy": {"max_retries": 0}}
        quick = self.client(self.app(result_backend_transport_options=options))
        ticker = self.ticker()
        calling = tx.send_task("tests.add", args=(1, 2))
        await self.failure_of(quick.send_task("tests.add"), NotSent)
        await self.failure_of(quick.AsyncResult("x").state(), ConnectionFailed)
        ticker.stop()
        await self.in_thread(server.restart)
        await self.own_worker()
        self.assertEqual(await calling, 3)
        print(f"worst tick {ticker.worst * 1e3:.1f} ms late")

    async def test_failover_list(self):
        """The next server of the list is tried where one is down, and when one goes down."""
        results = servers.database("results of the failover list")
        first, second = [await self.own_server(worker=False) for _ in range(2)]
        for server in (first, second):
            await self.own_worker(server.url, results)
        app = self.app(f"redis://127.0.0.1:1/0;{first.url};{second.url}", results)
        tx = self.client(patient(app))
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        self.assertEqual(tx.engine.broker.url, first.url)
        await self.in_thread(first.kill)
        self.assertEqual(await tx.send_task("tests.add", args=(1, 3)), 4)
        self.assertEqual(tx.engine.broker.url, second.url)
