"""Corners: when, where and how often else a program may call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from celery import Celery, group
from twisted.application.internet import TimerService
from twisted.application.service import MultiService
from twisted.internet.defer import gatherResults
from twisted.internet.threads import blockingCallFromThread

from tests.integration._clients import outcomes
from tests.integration._places import OverAMQP, OverRedis, Tasks
from tests.support import servers
from tests.support.processes import wait_until
from tests.support.servers import PROJECT, Worker, wait_for_file
from twistedcelery import Celery as TwistedCeleryApp
from twistedcelery import errors

HEAD = """
import os, sys
from celery import Celery
from twistedcelery import Celery as Dropin, TwistedCelery
app = Celery("client", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
dropin = Dropin("client", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
tx = TwistedCelery(app)
"""

NEVER_RAN = (
    HEAD
    + """
tx.send_task("tests.add", (1, 2), task_id="one")
dropin.send_task("tests.add", (1, 2), task_id="two")
tx.send_task("tests.mul", (1, 2), task_id="three", in_thread=True)
"""
)

BEFORE = (
    HEAD
    + """
from twisted.internet import defer, reactor
calls = [
    tx.send_task("tests.add", (1, 2)),
    dropin.send_task("tests.add", (3, 4)),
    tx.send_task("tests.add", (5, 6), in_thread=True),
]
def done(values):
    print(values)
    reactor.stop()
defer.gatherResults(calls).addBoth(done)
reactor.run()
"""
)

ASYNCIO = (
    HEAD
    + """
from twisted.internet import asyncioreactor
asyncioreactor.install()
import asyncio
from twisted.internet import defer, task

async def main():
    loop = asyncio.get_running_loop()
    first = await tx.send_task("tests.add", (1, 2)).asFuture(loop)
    calls = tx.send_task("tests.add", (3, 4)), dropin.send_task("tests.add", (5, 6)), tx.AsyncResult("x").revoke()
    print([first, *await asyncio.gather(*(call.asFuture(loop) for call in calls))])
    waiting = tx.send_task("tests.sleep", (5,)).asFuture(loop)
    waiting.cancel()
    await asyncio.sleep(0)
    tx.engine._drain()
    print(len(tx.engine.waiters))

task.react(lambda reactor: defer.Deferred.fromFuture(asyncio.ensure_future(main())))
"""
)

FORK = (
    HEAD
    + """
from twisted.internet import defer, task
from twistedcelery.errors import WrongThread

async def main(reactor):
    await dropin.send_task("tests.add", (1, 2))
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), await dropin.send_task("tests.add", (3, 4)))
        return
    try:
        tx.send_task("tests.add", (1, 2))
    except WrongThread as error:
        assert "forked" in str(error)
        os._exit(dropin.send_task("tests.add", (30, 4)).get(timeout=30))

task.react(lambda reactor: defer.ensureDeferred(main(reactor)))
"""
)

PLAIN = """
from tests.support.dropin_tasks import my_task, deferrable
print([call.delay(1, 2).get(timeout=30) for call in (my_task, my_task.s(), deferrable)])
"""

DAEMON = (
    HEAD
    + """
from pathlib import Path
from twisted.application.service import Application
from twisted.internet import reactor

application = Application("caller")
tx.setServiceParent(application)

def note(value):
    path = Path(os.environ["NOTE"])
    path.with_suffix(".new").write_text(f"{value} {os.getppid()} {os.getpid()}")
    path.with_suffix(".new").rename(path)

# Before twistd becomes a daemon.
tx.send_task("tests.add", (1, 2)).addBoth(note)
"""
)


class Programs(OverRedis):
    """Whole programs, in processes of their own."""

    @property
    def environment(self) -> dict[str, str]:
        return {"BROKER": self.broker, "BACKEND": self.backend}

    async def output(self, text: str) -> str:
        """Run a program that has to end well; gives what it has printed."""
        return await self.program(text, **self.environment)

    async def test_never_ran(self):
        """Calls that were made for a reactor that never ran are named at the end."""
        done = await self.run_program(NEVER_RAN, **self.environment)
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        for text in ("tests.add[one]", "tests.add[two]", "tests.mul[three]", "the reactor never ran"):
            self.assertIn(text, done.stderr)
        self.assertNotIn("Traceback", done.stderr)

    async def test_before_the_reactor_runs(self):
        """Calls made before it runs are performed once it does."""
        self.assertEqual(await self.output(BEFORE), "[3, 7, 11]\n")

    async def test_asyncio(self):
        """On the asyncio reactor, ``asFuture`` gives what asyncio can wait for; cancelling that leaves nothing."""
        self.assertEqual(await self.output(ASYNCIO), "[3, 7, 11, None]\n0\n")

    async def test_fork(self):
        """In a forked process the drop-in is stock Celery, and a TwistedCelery says that it is out of place."""
        self.assertEqual(await self.output(FORK), "34 7\n")

    async def test_daemon(self):
        """Calls made in a ``.tac`` file, before twistd becomes a daemon, leave from the daemon."""
        place = self.temporary().parent
        note, pidfile = place / "note", place / "twistd.pid"
        (place / "service.tac").write_text(DAEMON)
        command = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
        command += [f"--pidfile={pidfile}", f"--logfile={place / 'log'}", f"--python={place / 'service.tac'}"]
        env = {**os.environ, **self.environment, "NOTE": str(note), "PYTHONPATH": str(PROJECT)}

        def run() -> tuple[list[str], int]:
            subprocess.run(command, check=True, timeout=30, env=env, cwd=place)
            wait_until(pidfile.exists, timeout=10, what="no daemon")
            daemon = int(pidfile.read_text())
            try:
                wait_until(note.exists, timeout=20, what="no value")
            finally:
                os.kill(daemon, signal.SIGTERM)
            wait_until(lambda: not pidfile.exists(), timeout=10, what="the daemon goes on")
            return note.read_text().split(), daemon

        said, daemon = await self.in_thread(run)
        self.assertEqual((said[0], int(said[2])), ("3", daemon))
        self.assertNotIn("Traceback", (place / "log").read_text())


TRIAL = """
import os
from celery import Celery
from twisted.trial.unittest import TestCase
from twistedcelery import Celery as Dropin, DeferrableTask, TwistedCelery

urls = {"broker": os.environ["BROKER"], "backend": os.environ["BACKEND"]}
dropin, other = Dropin("client", **urls), Celery("client", set_as_current=False, **urls)

@DeferrableTask
@dropin.task(name="tests.add")
def add(x, y): ...

class Tests(TestCase):
    def setUp(self):
        dropin.twisted.startService()
        self.addCleanup(dropin.twisted.disconnect)
        self.tx = TwistedCelery(other)
        self.addCleanup(self.tx.disconnect)

    async def test_1(self):
        self.assertEqual(await dropin.send_task("tests.add", (1, 2)), 3)
        self.assertEqual(await add.delay(1, 2), 3)
        self.assertEqual(await self.tx.send_task("tests.add", (1, 2)), 3)

    test_2 = test_1

    def test_3(self):
        return add.delay(1, 2).addCallback(self.assertEqual, 3)
"""


class UnderTrial(OverRedis):
    async def test_one_after_the_other(self):
        """Trial leaves the reactor after each test of a user's own, and runs it again: calls belong to it all the same."""
        place = self.temporary().parent
        env = {**os.environ, "BROKER": self.broker, "BACKEND": self.backend}

        def run() -> subprocess.CompletedProcess[str]:
            Path(place, "test_calls.py").write_text(TRIAL)
            command = [sys.executable, "-m", "twisted.trial", "test_calls"]
            return subprocess.run(
                command, check=False, timeout=50, env=env, cwd=place, capture_output=True, text=True
            )

        done = await self.in_thread(run)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("PASSED (successes=3)", done.stdout)


class OneModule(OverRedis):
    """The drop-in's module, unchanged, in a worker, a command of Celery's, a program of Twisted's and a plain script."""

    module = "tests.support.dropin_tasks"

    def start_servers(self):
        super().start_servers()
        self.broker = self.backend = servers.database("one module")

    async def run_module(self, *command: str) -> str:
        """Run ``python -m``; gives what it has printed."""
        env = {**os.environ, "BROKER": self.broker, "BACKEND": self.backend}

        def run() -> str:
            return subprocess.run(
                [sys.executable, *command],
                check=True, timeout=50, env=env, cwd=PROJECT, stdout=subprocess.PIPE, text=True,
            ).stdout  # fmt: skip

        return await self.in_thread(run)

    async def test_everywhere(self):
        """Each calls in its own way, and all get the value."""
        worker = Worker(self.broker, self.backend, module=self.module)
        self.addCleanup(self.in_thread, worker.kill)
        await self.in_thread(worker.start)
        lines = (await self.run_module("-m", self.module)).splitlines()
        self.assertEqual(lines[0], "1 + 2 = 3")
        self.assertEqual(lines[1], str([[True] * 3, [3, 7, 11], [True] * 2]))
        self.assertEqual(await self.run_module("-c", PLAIN), "[3, 3, 3]\n")
        celery = ["-m", "celery", "-A", self.module]
        task_id = (await self.run_module(*celery, "call", f"{self.module}.my_task", "--args=[1, 2]")).strip()
        tx = self.client()
        self.assertEqual(await tx.AsyncResult(task_id).get(timeout=30), 3)
        self.assertIn("3", await self.run_module(*celery, "result", task_id))


class Threads(OverRedis):
    async def test_none(self):
        """Calls take no thread."""
        tx, app = self.client(), self.dropin()
        await outcomes([tx.send_task("tests.add", (1, 1)), app.send_task("tests.add", (1, 1))])
        before = threading.active_count()
        callings = [
            *(tx.send_task("tests.add", (1, i)) for i in range(100)),
            app.send_task("tests.add", (1, 100)),
        ]
        self.assertEqual(await outcomes(callings), list(range(1, 102)))
        self.assertEqual(threading.active_count(), before)
        self.assertFalse([one for one in threading.enumerate() if one.name.startswith("twistedcelery")])

    async def test_from_a_full_pool(self):
        """Big calls are put together though every thread of the reactor's pool waits for one."""
        tx = self.client()
        count = self.reactor.getThreadPool().max

        def call(number: int) -> Any:
            many = group(tx.app.signature("tests.add", (number, i)) for i in range(60))
            return blockingCallFromThread(self.reactor, tx.delay, many)

        values = await gatherResults([self.in_thread(call, number) for number in range(count)])
        self.assertEqual(values, [[number + i for i in range(60)] for number in range(count)])

    async def test_wrong_thread(self):
        """Another thread is told what to do, whatever it calls; the drop-in is stock Celery there."""
        tx, app = self.client(), self.dropin()
        handle = tx.AsyncResult("x")
        for call in (
            lambda: tx.send_task("tests.add", (1, 2)),
            lambda: tx.send_task("tests.add", (1, 2), in_thread=True),
            lambda: tx.revoke("x"),
            lambda: tx.restore_group("x"),
            handle.get,
            handle.state,
            handle.forget,
        ):
            error = await self.failure_of(self.in_thread(call), errors.WrongThread)
            self.assertIn("callFromThread", str(error))
        await app.send_task("tests.add", (1, 2))

        def elsewhere() -> Any:
            value = app.send_task("tests.add", (1, 2)).get(timeout=30)
            app.backend.result_consumer.stop()
            app.backend.client.connection_pool.disconnect()
            app.pool.force_close_all()
            return value

        self.assertEqual(await self.in_thread(elsewhere), 3)


class Several(OverRedis):
    async def test_two_of_one_app(self):
        """Two of one app, and the drop-in's, go each its own way; the end of one is not that of the others."""
        app = self.dropin()
        first, second = self.client(app), self.client(app)
        ways = [
            lambda: first.send_task("tests.add", (1, 2)),
            lambda: second.send_task("tests.add", (1, 2)),
            lambda: app.send_task("tests.add", (1, 2)),
        ]
        self.assertEqual(await outcomes(way() for way in ways), [3] * 3)
        self.assertEqual(len({one.engine for one in (first, second, app.twisted)}), 3)
        await first.stopService()
        self.assertRaises(errors.Stopped, ways.pop(0))
        self.assertEqual(await outcomes(way() for way in ways), [3] * 2)
        await second.stopService()
        self.assertEqual(await ways[1](), 3)

    async def test_two_apps(self):
        """Apps of different brokers in one process do not mix, whichever is Celery's current one."""
        other = OverAMQP("start_servers")
        await self.in_thread(other.start_servers)
        apps = [
            Celery("redis", broker=self.broker, backend=self.backend),
            Celery("amqp", broker=other.broker, backend=other.backend),
            TwistedCeleryApp("dropin", broker=other.broker, backend=other.backend),
        ]
        self.addCleanup(self.stop_dropin, apps[2])
        txs = [self.client(app) for app in apps]
        for current in apps:
            current.set_current()
            callings = [tx.send_task("tests.add", (1, number)) for number in range(5) for tx in txs]
            callings += [apps[2].send_task("tests.add", (1, number)) for number in range(5)]
            self.assertEqual(
                await outcomes(callings), [n + 1 for n in range(5) for _ in txs] + [*range(1, 6)]
            )

    async def test_services(self):
        """A TimerService that calls stops with its parent, and so does the TwistedCelery."""
        parent = MultiService()
        tx = self.client()
        tx.setServiceParent(parent)
        path = self.temporary()
        numbers = iter(range(1000))

        def call():
            # The timer waits for what this returns. That the message is with the broker is all that a stop waits for.
            return tx.send_task("tests.record", (str(path), next(numbers)), ignore_result=True)

        timer = TimerService(0.02, call)
        timer.setServiceParent(parent)
        parent.startService()
        await self.in_thread(wait_for_file, path, 5)
        await parent.stopService()
        lines = await self.in_thread(wait_for_file, path, next(numbers))
        self.assertEqual(lines, [str(number) for number in range(len(lines))])
        self.assertRaises(errors.Stopped, tx.send_task, "tests.add")
        # Started again, it goes on.
        parent.startService()
        await self.in_thread(wait_for_file, path, len(lines) + 2)
        await parent.stopService()


class Closed(OverRedis):
    async def test_closed_app(self):
        """Closing the app closes kombu's pools, which nothing here uses: calls go on, as stock Celery's do."""
        stock, dropin = self.app(), self.dropin()
        for app, tx in [(stock, self.client(stock)), (dropin, dropin.twisted)]:
            self.assertEqual(await tx.send_task("tests.add", (1, 2)), 3)
            app.close()
            self.assertEqual(await tx.send_task("tests.add", (1, 2)), 3)
            self.assertEqual(await tx.delay(app.signature("tests.add", (1, 2))), 3)

    async def test_after_the_stop(self):
        """After ``stopService`` everything that would need the network says so; the rest answers."""
        app = self.dropin()
        tx = app.twisted
        tasks = Tasks(app)
        calling, yieldable = tx.delay(group(tasks.add.s(1, 1))), tasks.add.delay(1, 2)
        self.assertEqual((await calling, await yieldable), ([2], 3))
        handle = tx.AsyncResult("another")
        await tx.stopService()
        for call in (
            lambda: tx.send_task("tests.add", (1, 2)),
            lambda: tx.send_task("tests.add", (1, 2), in_thread=True),
            lambda: tx.revoke("x"),
            lambda: tx.restore_group("x"),
            lambda: tx.AsyncResult("x").get(),
            handle.get,
            handle.state,
            handle.forget,
            handle.revoke,
            calling.revoke,
            calling.save,
            tasks.add.delay,
            tasks.add.s(1, 1).delay,
            group(tasks.add.s(1, 1)).delay,
            yieldable.revoke,
        ):
            await self.failure_of(self.called(call), errors.Stopped)
        self.assertEqual((await calling.results[0].get(), await calling.results[0].state()), (2, "SUCCESS"))
        self.assertEqual((await yieldable.get(), yieldable.state), (3, "SUCCESS"))
        tx.startService()
        self.assertEqual(await tasks.add.delay(1, 2), 3)

    async def called(self, call: Any) -> Any:
        """Give what a call gives, whether it raises at once or later."""
        return await call()
