"""Calls and results over RabbitMQ, on good days."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import amqp
from celery import chain, group, signals
from celery.exceptions import TaskRevokedError
from kombu.entity import Exchange, Queue
from twisted.internet import defer

from tests.integration._amqp import AMQPTestCase
from tests.integration._clients import outcomes
from tests.support import servers
from tests.support.servers import PROJECT, wait_for_file
from tests.support.tasks import CustomError
from tests.support.tasks import app as worker_app
from twistedcelery.errors import ResultNotKept, ResultTimeout, Stopped, Unroutable

PROGRAM = """
from celery import Celery
from twisted.internet import defer, task
from twistedcelery import TwistedCelery

app = Celery(broker='URL', backend='rpc')

@app.task
def my_task(a, b):
    return a + b

@defer.inlineCallbacks
def main(reactor):
    tx_app = TwistedCelery(app)
    result = yield tx_app.send_task('tests.add', args=(1, 2))
    print("{} + {} = {}".format(1, 2, result))

if __name__ == '__main__':
    task.react(main)
"""

THOUSAND = """
import sys
from celery import Celery
from twisted.internet import defer, task
from twistedcelery import TwistedCelery

app = Celery(broker='URL', backend='rpc')

def main(reactor):
    tx = TwistedCelery(app)
    for number in range(1000):
        tx.send_task('tests.record', args=(sys.argv[1], number))
    return defer.succeed(None)

task.react(main)
"""


class Programs(AMQPTestCase):
    """Whole programs, in a process of their own."""

    def run_program(self, text, *arguments):
        """Run a program; fires with what it has printed, and fails where it fails."""

        def run():
            program = text.replace("URL", self.server.url)
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
        """The README's program prints its sum, nothing else, and leaves no reply queue."""
        before = await self.queues()
        done = await self.run_program(PROGRAM)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "1 + 2 = 3\n", ""))
        self.assertEqual(await self.queues(), before)

    async def test_fire_and_return(self):
        """A script that fires 1,000 calls and returns at once loses none, says nothing and leaves no queue."""
        path = self.temporary()
        before = await self.queues()
        done = await self.run_program(THOUSAND, str(path))
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        lines = await self.in_thread(wait_for_file, path, 1000, 30.0)
        self.assertEqual(sorted(map(int, lines)), list(range(1000)))
        self.assertEqual(await self.queues(), before)


class Values(AMQPTestCase):
    """What the Deferred of a call fires with."""

    async def test_forms(self):
        """A task's name, a Task and any Signature can be called, awaited and yielded."""
        tx = self.client(worker_app_of(self))
        add = tx.app.tasks["tests.add"]
        self.assertEqual(await tx.send_task("tests.add", args=(1, 2)), 3)
        self.assertEqual(await tx.send_task("tests.add", (1,), {"y": 4}), 5)
        self.assertEqual(await tx.apply_async(add, (2, 2)), 4)
        self.assertEqual(await tx.apply_async("tests.add", (2, 3)), 5)
        self.assertEqual(await tx.apply_async(add.s(1), (8,)), 9)
        self.assertEqual(await tx.delay(add, 3, 4), 7)
        self.assertEqual(await tx.delay("tests.add", 3, 5), 8)
        self.assertEqual(await tx.delay(tx.app.signature("tests.add", (5,), immutable=False), 6), 11)

        @defer.inlineCallbacks
        def yielding():
            result = yield tx.delay(add, 10, 11)
            return result

        self.assertEqual(await yielding(), 21)
        await self.assert_nothing_left(tx)

    async def test_group(self):
        """A group gives the list of its members' values, in order; nested groups give nested lists."""
        tx = self.client()
        add = tx.app.signature("tests.add")
        self.assertEqual(
            await tx.delay(group(add.clone((i, i)) for i in range(20))), [2 * i for i in range(20)]
        )
        self.assertEqual(await tx.apply_async(group([])), [])
        calling = tx.delay(group(add.clone((1, 1)), add.clone((2, 2))))
        self.assertEqual(await calling, [2, 4])
        # What has come once can be asked for again.
        self.assertEqual(await calling.get(timeout=30), [2, 4])
        self.assertEqual(await calling.results[1].get(timeout=30), 4)
        self.assertEqual(await calling.completed_count(), 2)
        self.assertTrue(await calling.successful())
        await self.assert_nothing_left(tx)

    async def test_group_failure(self):
        """A group fails with its first failing member's exception; the others' replies leave nothing behind."""
        tx = self.client()
        signature = tx.app.signature
        calling = tx.delay(group(signature("tests.add", (1, 1)), signature("tests.fail", ("no",))))
        error = await self.failure_of(calling, ValueError)
        self.assertEqual(error.args, ("no",))
        await calling.when_sent()
        await self.assert_nothing_left(tx)

    async def test_chain(self):
        """A chain gives its last value; the parents are there to be asked."""
        tx = self.client()
        add = tx.app.signature("tests.add")
        calling = tx.delay(chain(add.clone((1, 1)), add.clone((10,)), add.clone((100,))))
        self.assertEqual(await calling, 112)
        self.assertEqual(await calling.parent.get(timeout=30), 12)
        self.assertEqual(await calling.parent.parent.get(timeout=30), 2)
        await self.assert_nothing_left(tx)

    async def test_chain_failure(self):
        """A failed link fails whoever waits for the end of the chain, at once."""
        tx = self.client()
        signature = tx.app.signature
        links = (
            signature("tests.fail", ("broken",)),
            signature("tests.add", (1,)),
            signature("tests.add", (2,)),
        )
        calling = tx.delay(chain(*links))
        error = await self.failure_of(calling, ValueError)
        self.assertEqual(error.args, ("broken",))
        await self.assert_nothing_left(tx)
        error = await self.failure_of(calling.get(timeout=30), ValueError)
        self.assertEqual(error.args, ("broken",))

    async def test_exceptions(self):
        """A task's exception comes as it is, class and arguments, with the worker's traceback as its cause."""
        tx = self.client()
        calling = tx.send_task("tests.custom_error", (7, "seven"))
        error = await self.failure_of(calling, CustomError)
        self.assertEqual((error.code, error.text), (7, "seven"))
        self.assertIn("raise CustomError(code, text)", str(error.__cause__))
        handle = calling.async_result
        self.assertIn("raise CustomError", await handle.traceback())
        self.assertEqual((await handle.state(), await handle.failed()), ("FAILURE", True))
        self.assertIsInstance(await handle.get(propagate=False), CustomError)
        self.assertIsInstance(await handle.info(), CustomError)

        unknown = await self.failure_of(tx.send_task("tests.raise_unpicklable"), Exception)
        self.assertIn("not picklable", str(unknown))
        await self.failure_of(tx.send_task("tests.return_unserializable"), Exception)
        await self.assert_nothing_left(tx)

    async def test_progress(self):
        """States come to ``on_message`` in order as they are sent, the final one last; only that one settles."""
        tx = self.client()
        calling = tx.send_task("tests.progress", (5,))
        seen = []
        value = await calling.get(on_message=lambda meta: seen.append((meta["status"], meta["result"])))
        self.assertEqual(value, 5)
        expected = [("PROGRESS", {"current": i, "total": 5}) for i in range(1, 6)] + [("SUCCESS", 5)]
        self.assertEqual(seen, expected)
        self.assertEqual(await calling, 5)
        retried = []
        # With a countdown, as the worker sends the state only after the next attempt's message.
        retrying = tx.send_task("tests.retry_then_succeed", (2, 0.2))
        self.assertEqual(await retrying.get(on_message=lambda meta: retried.append(meta["status"])), 2)
        self.assertEqual(retried, ["RETRY", "RETRY", "SUCCESS"])
        await self.assert_nothing_left(tx)

    async def test_on_message_error(self):
        """An error in ``on_message`` is logged; the result comes all the same."""
        tx = self.client()
        self.assertEqual(await tx.send_task("tests.progress", (1,)).get(on_message=lambda meta: 1 / 0), 1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)

    async def test_callback_error(self):
        """An error in a callback of one call's stays with that call."""
        tx = self.client()
        bad = tx.send_task("tests.add", (1, 1)).addCallback(lambda value: value / 0)
        good = tx.send_task("tests.add", (1, 2))
        await self.failure_of(bad, ZeroDivisionError)
        self.assertEqual(await good, 3)

    async def test_states(self):
        """The handle answers Celery's questions, before and after."""
        tx = self.client()
        gate = self.gate()
        calling = tx.send_task("tests.hold", (str(gate),))
        handle = calling.async_result
        self.assertEqual((handle.id, str(handle)), (calling.id, calling.id))
        self.assertEqual(await handle.state(), "PENDING")
        self.assertEqual([await handle.ready(), await handle.exists(), await handle.failed()], [False] * 3)
        with self.assertRaises(TypeError):
            bool(handle.ready().addErrback(lambda _: None))
        gate.unlink()
        await calling
        self.assertEqual(await handle.state(), "SUCCESS")
        self.assertEqual([await handle.ready(), await handle.exists(), await handle.successful()], [True] * 3)
        self.assertEqual(
            (await handle.info(), await handle.traceback(), await handle.children()), ("let go", None, [])
        )
        # A Deferred of the call answers as its handle does.
        self.assertEqual(await calling.state(), "SUCCESS")
        self.assertEqual(await tx.AsyncResult("no-such-task").state(), "PENDING")
        await handle.forget()
        self.assertEqual(await handle.state(), "PENDING")

    async def test_get_many(self):
        """Any number of callers get the value, each its own Deferred; cancelling one leaves the others."""
        tx = self.client()
        gate = self.gate()
        calling = tx.send_task("tests.hold", (str(gate),))
        gets = [calling.get() for _ in range(5)]
        gets[2].cancel()
        self.assertIsInstance(await self.failure_of(gets[2], defer.CancelledError), defer.CancelledError)
        gate.unlink()
        self.assertEqual(await outcomes(gets[:2] + gets[3:]), ["let go"] * 4)
        self.assertEqual(await calling, "let go")
        self.assertEqual(await calling.get(), "let go")

    async def test_ignore_result(self):
        """``ignore_result=True`` fires with None once the broker has confirmed, and has no result to ask for."""
        tx = self.client()
        path = self.temporary()
        calling = tx.send_task("tests.record", (str(path), "x"), ignore_result=True)
        self.assertIsNone(await calling)
        error = await self.failure_of(calling.get(), ResultNotKept)
        self.assertEqual(error.task_id, calling.id)
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), ["x"])
        await self.assert_nothing_left(tx)

    async def test_disabled_backend(self):
        """So do all calls of an app without a result backend."""
        tx = self.client(self.app(backend="disabled://"))
        path = self.temporary()
        calling = tx.send_task("tests.record", (str(path), "x"))
        self.assertIsNone(await calling)
        await self.failure_of(calling.get(), ResultNotKept)
        await self.failure_of(calling.async_result.state(), ResultNotKept)
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), ["x"])
        await self.assert_nothing_left(tx)

    async def test_when_sent(self):
        """``when_sent`` fires once the broker has the message, fresh per caller, long before the result."""
        tx = self.client()
        gate = self.gate()
        calling = tx.send_task("tests.hold", (str(gate),))
        first, second = calling.when_sent(), calling.when_sent()
        second.cancel()
        self.assertIsNone(await first)
        self.assertFalse(calling.called)
        self.assertIsNone(await calling.when_sent())
        await self.failure_of(second, defer.CancelledError)
        gate.unlink()
        self.assertEqual(await calling, "let go")

    async def test_timeouts(self):
        """``get(timeout=)``, ``addTimeout`` and ``result_timeout`` end a wait, and leave nothing behind."""
        tx = self.client(result_timeout=0.5)
        gate = str(self.gate())
        calling = tx.send_task("tests.hold", (gate,))
        waiting = calling.get(timeout=0.1)
        error = await self.failure_of(waiting, ResultTimeout)
        self.assertEqual(error.task_id, calling.id)
        other = tx.send_task("tests.hold", (gate,)).addTimeout(0.1, self.reactor)
        await self.failure_of(other, defer.TimeoutError)
        error = await self.failure_of(calling, ResultTimeout)
        self.assertIn("result_timeout", str(error))
        await self.assert_nothing_left(tx)

    async def test_late_reply(self):
        """A reply that comes after its wait has ended is kept for who asks later, a bounded number of them."""
        tx = self.client(unclaimed_limit=2)
        gate = self.gate()
        calls = [tx.send_task("tests.hold", (str(gate),)) for _ in range(4)]
        await defer.gatherResults([calling.when_sent() for calling in calls])
        for calling in calls:
            calling.cancel()
        await outcomes(calls)
        unclaimed = tx.engine.waiters.unclaimed
        self.assertEqual(len(tx.engine.waiters), 0)
        gate.unlink()
        await self.eventually(lambda: len(unclaimed) == 2)
        found = next(iter(unclaimed))
        self.assertEqual(await tx.AsyncResult(found).state(), "SUCCESS")
        self.assertEqual(await tx.AsyncResult(found).get(timeout=30), "let go")
        await self.assert_nothing_left(tx)

    async def test_dropped(self):
        """A TaskDeferred that is dropped leaves the table; one with anything attached survives the collector."""
        tx = self.client()
        got = []
        gate = self.gate()

        def hold():
            return tx.send_task("tests.hold", (str(gate),))

        async def awaiting():
            got.append(await hold())

        returned = defer.succeed(None).addCallback(lambda _: hold())
        returned.addCallback(got.append)
        hold().addCallback(got.append)
        coroutine = defer.ensureDeferred(awaiting())
        for _ in range(10):
            hold()
        await tx.send_task("tests.add", (1, 1)).when_sent()
        await self.sleep(0)
        gc.collect()
        tx.engine._drain()
        self.assertEqual(len(tx.engine.waiters), 3)
        gate.unlink()
        await coroutine
        await self.eventually(lambda: len(got) == 3)
        self.assertEqual(got, ["let go"] * 3)
        await self.assert_nothing_left(tx)


def worker_app_of(case):
    """Make an app that has `tests.add` as a task of its own."""
    app = case.app()
    app.task(name="tests.add")(worker_app.tasks["tests.add"].run)
    return app


class Options(AMQPTestCase):
    """Each option of ``apply_async`` has its effect."""

    async def dump(self, tx, **options):
        """Call `tests.header_dump`; returns what the worker saw."""
        return await tx.send_task("tests.header_dump", (1, 2), {"three": 3}, **options)

    async def test_headers(self):
        """What is given with a call reaches the worker's request."""
        tx = self.client()
        expires = datetime.now(timezone.utc) + timedelta(hours=1)
        seen = await self.dump(
            tx,
            task_id="my-id",
            headers={
                "mine": "yes",
                "numbers": [300, 240],
                "minus": -1,
                "float": 1.5,
                "table": {"a": [1, None]},
            },
            shadow="another.name",
            time_limit=20,
            soft_time_limit=10,
            priority=5,
            expires=expires,
            stamped_headers=["stamp"],
            stamp="value",
            correlation_id="my-id",
        )
        self.assertEqual((seen["id"], seen["shadow"], seen["timelimit"]), ("my-id", "another.name", [20, 10]))
        self.assertEqual(
            (seen["mine"], seen["numbers"], seen["minus"], seen["float"]), ("yes", [300, 240], -1, 1.5)
        )
        self.assertEqual(seen["table"], {"a": [1, None]})
        self.assertEqual(datetime.fromisoformat(seen["expires"]), expires)
        self.assertEqual((seen["stamps"], seen["stamped_headers"]), ({"stamp": "value"}, ["stamp"]))
        self.assertEqual(seen["delivery_info"]["priority"], 5)
        self.assertEqual(seen["reply_to"], tx.engine.reply_to)
        self.assertIsInstance(seen["argsrepr"], str)

    async def test_serializers(self):
        """Serializer and compression of a call are those that it was given."""
        tx = self.client()
        for options in ({"compression": "gzip"}, {"compression": "bzip2"}, {"serializer": "json"}):
            seen = await self.dump(tx, **options)
            self.assertEqual(seen["argsrepr"], "(1, 2)", options)
        self.assertEqual(await tx.send_task("tests.identity", ("ä€",), compression="zlib"), "ä€")

    async def test_protocol_1(self):
        """Message protocol 1 works as protocol 2 does."""
        tx = self.client(self.app(task_protocol=1))
        self.assertEqual(await tx.send_task("tests.add", (1, 2)), 3)
        seen = await self.dump(tx)
        self.assertEqual(seen["kwargs"], {"three": 3})

    async def test_countdown(self):
        """``countdown`` and ``eta`` keep the worker from running the task too early; ``expires`` from running it late."""
        tx = self.client()
        began = self.reactor.seconds()
        eta = datetime.now(timezone.utc) + timedelta(seconds=0.5)
        calls = [tx.send_task("tests.add", (1, 1), countdown=0.5), tx.send_task("tests.add", (1, 1), eta=eta)]
        self.assertEqual(await outcomes(calls), [2, 2])
        self.assertGreater(self.reactor.seconds() - began, 0.45)
        late = tx.send_task("tests.add", (1, 1), countdown=0.5, expires=0.1)
        await self.failure_of(late, TaskRevokedError)

    async def test_routing(self):
        """Queue, exchange, routing key, ``declare`` and task routes bring a message to its queue."""
        name = f"special-{id(self)}"
        worker = servers.Worker(self.server.url, "rpc://", queues=[name], concurrency=1)
        await self.in_thread(worker.start)
        self.addCleanup(self.in_thread, worker.stop)
        app = self.app(
            task_routes={"tests.echo": {"queue": name}},
            task_queues=[
                Queue("celery"),
                Queue(name, Exchange(f"{name}.topic", type="topic"), routing_key="#.it"),
            ],
        )
        tx = self.client(app)
        for options in (
            {"queue": name},
            {"exchange": f"{name}.topic", "routing_key": "this.is.it"},
            {"queue": app.amqp.queues[name]},
        ):
            seen = await self.dump(tx, **options)
            self.assertEqual(seen["hostname"], worker.hostname, options)
        self.assertEqual(await tx.send_task("tests.echo", (1,)), [[1], {}])
        await self.in_thread(self.server.delete_queue, name)

    async def test_links(self):
        """``link`` is called with the value, ``link_error`` with the failed task."""
        tx = self.client()
        path = self.temporary()
        record = tx.app.signature("tests.record", (str(path), "linked"), immutable=True)
        self.assertEqual(await tx.send_task("tests.identity", (1,), link=record), 1)
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), ["linked"])
        on_error = tx.app.signature("tests.record_error", kwargs={"path": str(path)})
        failing = tx.send_task("tests.fail", link_error=on_error)
        await self.failure_of(failing, ValueError)
        self.assertEqual(await self.in_thread(wait_for_file, path, 2), ["linked", failing.id])

    async def test_children(self):
        """The handles of what a task has called are its children."""
        tx = self.client()
        link = tx.app.signature("tests.add", (10,), task_id="the-child", reply_to=tx.engine.reply_to)
        calling = tx.send_task("tests.add", (1, 1), link=link)
        self.assertEqual(await calling, 2)
        (child,) = await calling.children()
        self.assertEqual(child.id, "the-child")
        self.assertEqual(await child.get(timeout=30), 12)

    async def test_reply_to(self):
        """``reply_to`` of the caller's sends the result elsewhere."""
        tx = self.client()
        seen = []
        elsewhere = self.client()
        await elsewhere.send_task("tests.add", (0, 0))
        calling = tx.send_task("tests.header_dump", reply_to=elsewhere.engine.reply_to)
        await self.eventually(lambda: calling.id in elsewhere.engine.waiters.unclaimed)
        seen.append(await elsewhere.AsyncResult(calling.id).get())
        self.assertEqual(seen[0]["reply_to"], elsewhere.engine.reply_to)
        calling.cancel()
        await self.failure_of(calling, defer.CancelledError)

    async def test_unencodable_header(self):
        """A header that AMQP cannot carry fails its call alone, before anything of it was written."""
        tx = self.client()
        good = [tx.send_task("tests.add", (i, 0)) for i in range(10)]
        bad = tx.send_task("tests.add", (1, 1), headers={"no": object()})
        huge = tx.send_task("tests.add", (1, 1), headers={"big": "x" * 200_000})
        more = [tx.send_task("tests.add", (i, 0)) for i in range(10)]
        error = await self.failure_of(bad, Exception)
        self.assertIn("no", str(error))
        self.assertEqual(error.task_id, bad.id)
        await self.failure_of(huge, Exception)
        self.assertEqual(await outcomes(good + more), list(range(10)) * 2)
        with self.assertRaises(Exception):  # noqa: B017  # a second time, on an open connection
            await tx.send_task("tests.add", (1, 1), headers={"no": object()})
        await self.assert_nothing_left(tx)

    async def test_signals(self):
        """``before_task_publish`` may change the message; ``after_task_publish`` comes after the confirm, not for a failure."""
        tx = self.client()
        after = []

        def before(sender, headers, **_):
            headers["added"] = "by a receiver"

        def sent(sender, headers, **_):
            after.append((headers["id"], calls[headers["id"]].when_sent().called))

        signals.before_task_publish.connect(before)
        signals.after_task_publish.connect(sent)
        self.addCleanup(signals.before_task_publish.disconnect, before)
        self.addCleanup(signals.after_task_publish.disconnect, sent)
        calls = {}
        calling = tx.send_task("tests.header_dump", task_id="signalled")
        calls["signalled"] = calling
        self.assertEqual(after, [])
        self.assertEqual((await calling)["added"], "by a receiver")
        await calling.when_sent()
        self.assertEqual([name for name, _ in after], ["signalled"])
        lost = tx.send_task("tests.add", (1, 1), exchange="amq.direct", routing_key="nowhere")
        calls[lost.id] = lost
        await self.failure_of(lost, Unroutable)
        self.assertEqual(len(after), 1)

    async def test_task_sent_event(self):
        """With ``task_send_sent_event``, the event reaches a listener on celeryev, after the message."""
        tx = self.client(self.app(task_send_sent_event=True))

        def listen():
            connection = amqp.Connection(f"127.0.0.1:{self.server.port}")
            connection.connect()
            channel = connection.channel()
            channel.exchange_declare("celeryev", "topic", durable=True, auto_delete=False)
            channel.queue_declare("listening", exclusive=True)
            channel.queue_bind("listening", "celeryev", "task.sent")
            return connection, channel

        connection, channel = await self.in_thread(listen)
        self.addCleanup(self.in_thread, connection.close)
        calling = tx.send_task("tests.add", (1, 2), queue="celery")
        self.assertEqual(await calling, 3)
        await calling.when_sent()
        await self.eventually(lambda: not tx.engine.outbox.count)
        message = await self.in_thread(channel.basic_get, "listening", no_ack=True)
        event = json.loads(message.body)
        self.assertEqual(
            (event["type"], event["uuid"], event["name"], event["queue"]),
            ("task-sent", calling.id, "tests.add", "celery"),
        )
        await self.assert_nothing_left(tx)


class Cancelling(AMQPTestCase):
    """Cancel, revoke and stop."""

    async def test_cancel_before(self):
        """A call cancelled before it left is withdrawn: its task never runs."""
        tx = self.client()
        path = self.temporary()
        calling = tx.send_task("tests.record", (str(path), "withdrawn"))
        calling.cancel()
        await self.failure_of(calling, defer.CancelledError)
        await self.failure_of(calling.when_sent(), defer.CancelledError)
        await self.assert_nothing_left(tx)
        self.assertEqual(await tx.send_task("tests.record", (str(path), "next")), "next")
        self.assertEqual(path.read_text(), "next\n")

    async def test_cancel_after(self):
        """A call cancelled after it left only stops waiting: its task runs."""
        tx = self.client()
        path = self.temporary()
        await tx.send_task("tests.add", (1, 1))
        calling = tx.send_task("tests.record", (str(path), "left"))
        calling.cancel()
        await self.failure_of(calling, defer.CancelledError)
        await calling.when_sent()
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), ["left"])
        await self.assert_nothing_left(tx)

    async def test_revoke(self):
        """``revoke`` and ``revoke_on_cancel`` keep a task from running that has not begun."""
        tx = self.client()
        path = self.temporary()
        revoked = tx.send_task("tests.record", (str(path), "revoked"), countdown=2)
        await revoked.when_sent()
        await revoked.revoke()
        self.assertIsInstance(await self.failure_of(revoked, TaskRevokedError), TaskRevokedError)
        cancelled = tx.send_task("tests.record", (str(path), "cancelled"), countdown=2, revoke_on_cancel=True)
        await cancelled.when_sent()
        cancelled.cancel()
        await self.failure_of(cancelled, defer.CancelledError)
        late = tx.send_task("tests.record", (str(path), "later"), countdown=2.5)
        self.assertEqual(await late, "later")
        self.assertEqual(path.read_text(), "later\n")
        await self.assert_nothing_left(tx)

    async def test_stop_with_pending(self):
        """A stop fails what is still waited for, deletes the reply queue, and takes no more calls."""
        tx = self.client()
        calling = tx.send_task("tests.hold", (str(self.gate()),))
        await calling.when_sent()
        self.assertIn(tx.engine.reply_to, await self.queues())
        reply_to = tx.engine.reply_to
        stopped = tx.stopService()
        with self.assertRaises(Stopped):
            tx.send_task("tests.add", (1, 1))
        await stopped
        await self.failure_of(calling, Stopped)
        self.assertNotIn(reply_to, await self.queues())
        await self.assert_nothing_left(tx)
        tx.startService()
        self.assertEqual(await tx.send_task("tests.add", (1, 2)), 3)

    async def test_stop_at_once(self):
        """A stop right after the calls flushes them first."""
        tx = self.client()
        path = self.temporary()
        calls = [tx.send_task("tests.record", (str(path), i), ignore_result=True) for i in range(100)]
        await tx.disconnect()
        self.assertEqual(await outcomes(calls), [None] * 100)
        lines = await self.in_thread(wait_for_file, path, 100)
        self.assertEqual(sorted(map(int, lines)), list(range(100)))

    async def test_stop_at_any_moment(self):
        """Whatever is under way, a stop ends it: while connecting, in the handshakes, while declaring."""
        before = await self.queues()
        for turns in range(0, 30, 2):
            tx = self.client()
            calling = tx.send_task("tests.add", (1, 2))
            for _ in range(turns):
                await self.sleep(0)
            await tx.stopService()
            (outcome,) = await outcomes([calling])
            self.assertTrue(outcome == 3 or isinstance(outcome, Stopped), outcome)
            await self.assert_nothing_left(tx)
        self.assertEqual(await self.queues() - before, set())
