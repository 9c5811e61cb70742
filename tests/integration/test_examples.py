"""Every example runs, against real servers and a real worker, and says what it promises."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from twisted.trial.unittest import SynchronousTestCase

from examples._stage import DemoWorker, environment
from tests.support import processes, servers

if TYPE_CHECKING:
    Case = SynchronousTestCase
else:
    Case = object

EXAMPLES = servers.PROJECT / "examples"

TWISTD = [str(Path(sys.executable).with_name("twistd")), "--nodaemon", "--pidfile="]


@cache
def over_rabbitmq(app):
    """A worker of this app, in a virtual host of its own."""
    return start_worker(app, servers.vhost(app), "rpc://")


@cache
def over_redis(app):
    """The same in a database of its own."""
    url = servers.database(app)
    return start_worker(app, url, url)


def start_worker(app, broker, backend):
    worker = DemoWorker(broker, backend, app=app)
    worker.start()
    return environment(broker, backend)


def fetch(url):
    """Have a page; returns its status and its text."""
    try:
        with urllib.request.urlopen(url, timeout=30) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as page:
        with page:
            return page.code, page.read().decode()


class Program:
    """A Python program in a process of its own, which ends with the test at the latest."""

    def __init__(self, case, *command, env):
        path = processes.directory("example")
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **env}
        self.process = processes.Process(
            [sys.executable, *command], log=path / "output.log", env=env, cwd=EXAMPLES
        )
        case.addCleanup(self.process.kill)

    @property
    def output(self):
        return self.process.log.read_text()

    def wait_for(self, text):
        """Wait until it has printed this."""
        processes.wait_until(
            lambda: text in self.output, timeout=60, what=f"no {text!r}", process=self.process
        )

    def end(self):
        """Wait for its end; returns the exit code."""
        processes.wait_until(lambda: self.process.exit_code is not None, timeout=60, what="it goes on")
        return self.process.exit_code


class SmallPrograms(Case):
    """The examples that need a broker and a worker."""

    def environment(self, app="demo_tasks"):
        """Start a worker of this app; returns the variables that name its broker and backend."""
        raise NotImplementedError

    def test_first_call(self):
        """The first program prints what the worker has added up, and ends."""
        program = Program(self, "first_call.py", env=self.environment("first_call"))
        self.assertEqual(program.end(), 0, program.output)
        self.assertEqual(program.output, "1 + 2 = 3\n")

    def test_dropin(self):
        """The drop-in's program prints the same, and the values of a group."""
        program = Program(self, "dropin.py", env=self.environment("dropin"))
        self.assertEqual(program.end(), 0, program.output)
        self.assertEqual(program.output, "1 + 2 = 3\n[0, 2, 4, 6, 8]\n")

    def test_progress(self):
        """A bar grows with each state that the task sets; the value comes last."""
        program = Program(self, "progress.py", env=self.environment())
        self.assertEqual(program.end(), 0, program.output)
        self.assertIn("[##########..........] 10/20", program.output)
        self.assertTrue(program.output.endswith("20/20\nSUCCESS\nbaked: 20 loaves\n"), program.output)

    def test_web(self):
        """The web server answers with the task's value, and with a status of its own for each failure."""
        program = Program(self, "twisted_web.py", "tcp:0:interface=127.0.0.1", env=self.environment())
        program.wait_for("y=2\n")
        url = program.output.strip()
        self.assertEqual(fetch(url), (200, "0.5\n"))
        self.assertEqual(fetch(url.replace("y=2", "y=0")), (422, "float division by zero\n"))
        self.assertEqual(fetch(url.replace("y=2", "y=two")), (400, "say ?x=1&y=2\n"))
        program.process.signal(signal.SIGINT)
        self.assertEqual(program.end(), 0, program.output)

    def test_service(self):
        """Under twistd a TwistedCelery calls as long as the daemon runs, and stops with it, without an error."""
        program = Program(
            self, *TWISTD, "--python", "service.tac", env={**self.environment(), "PYTHONPATH": "."}
        )
        program.wait_for("1 + 2 = 3")
        program.process.signal(signal.SIGTERM)
        self.assertEqual(program.end(), 128 + signal.SIGTERM, program.output)
        self.assertIn("Server Shut Down", program.output)
        self.assertNotIn("Traceback", program.output)


class OverRabbitMQ(SmallPrograms, SynchronousTestCase):
    def environment(self, app="demo_tasks"):
        return over_rabbitmq(app)


class OverRedis(SmallPrograms, SynchronousTestCase):
    def environment(self, app="demo_tasks"):
        return over_redis(app)


class WithoutBroker(SynchronousTestCase):
    def test_web(self):
        """The web server tells its visitors that there is no broker, instead of letting them wait."""
        nobody = f"amqp://guest:guest@127.0.0.1:{processes.free_port()}//"
        program = Program(self, "twisted_web.py", "tcp:0:interface=127.0.0.1", env=environment(nobody, "rpc"))
        program.wait_for("y=2\n")
        code, text = fetch(program.output.strip())
        self.assertEqual(code, 503)
        self.assertIn("the broker cannot be reached", text)
        program.process.signal(signal.SIGINT)
        self.assertEqual(program.end(), 0, program.output)


class Demo(SynchronousTestCase):
    """The demo starts and ends its own servers. What it leaves behind would be in its directory, or name it."""

    def play(self, *command):
        self.place = processes.directory("demo")
        return Program(self, *command, env={"TMPDIR": str(self.place)})

    def assert_nothing_left(self):
        def left():
            running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
            return [*self.place.iterdir(), *(one for one in running if str(self.place).encode() in one)]

        with contextlib.suppress(FileNotFoundError):  # a process that has gone meanwhile
            processes.wait_until(lambda: not left(), timeout=10, what="something is left")

    def assert_told(self, broker):
        program = self.play("demo.py", broker)
        self.assertEqual(program.end(), 0, program.output)
        for line in [
            "1 + 2 = 3",
            "[0, 2, 4, 6, 8, 10, 12, 14, 16, 18]",
            "caught here: ZeroDivisionError('division by zero')",
            "    return x / y",
            "[##############################] 30/30",
            "baked: 30 loaves",
            "half a second is enough: cancelled",
            "and the worker stopped it: TaskRevokedError('terminated')",
            "1000 answers, the last one 1000",
        ]:
            self.assertIn(f"\n{line}\n", program.output)
        self.assertRegex(program.output, r"the reactor ticked \d+ times, every 10 ms")
        self.assert_nothing_left()
        return program.output

    def test_over_rabbitmq(self):
        """The story over RabbitMQ is told to its end, and nothing is left running."""
        self.assert_told("amqp")

    def test_over_redis(self):
        """The story over Redis has one chapter more, a chord."""
        self.assertIn("\ntwice the sum of 0 to 9: 90\n", self.assert_told("redis"))

    def story(self, chapter):
        """Write a demo of one chapter, for Redis."""
        path = processes.directory("story") / "story.py"
        path.write_text(
            f"""if True:
                import sys
                sys.path.insert(0, {str(EXAMPLES)!r})
                from _stage import play
                from demo_tasks import app
                from twisted.internet.defer import Deferred
                from twistedcelery import TwistedCelery

                async def chapter(tx, reactor):
                    "A chapter"
                    {chapter}

                sys.exit(play([chapter], TwistedCelery(app), "redis"))
            """
        )
        return str(path)

    def test_interrupted(self):
        """Ctrl-C in the middle of the story ends all that was started."""
        program = self.play(self.story("await Deferred()"))
        program.wait_for("   | await Deferred()")
        os.kill(program.process.pids()[0], signal.SIGINT)
        self.assertEqual(program.end(), 130, program.output)
        self.assertIn("Interrupted. Nothing is left running.", program.output)
        self.assert_nothing_left()

    def test_interrupted_early(self):
        """Ctrl-C while the servers start does the same."""
        program = self.play("demo.py", "amqp")
        program.wait_for("Starting RabbitMQ")
        os.kill(program.process.pids()[0], signal.SIGINT)
        self.assertEqual(program.end(), 130, program.output)
        self.assert_nothing_left()

    def test_failing(self):
        """A chapter that fails ends the story with its traceback, the worker's last words and exit code 1."""
        program = self.play(self.story("raise ValueError('out of flour')"))
        self.assertEqual(program.end(), 1, program.output)
        self.assertIn("ValueError: out of flour", program.output)
        self.assertIn(" ready.", program.output)
        self.assert_nothing_left()
