"""Brokers and backends that there is no room for are refused, with their name."""

from __future__ import annotations

import subprocess
import sys

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery import TwistedCelery


class Refusals(SynchronousTestCase):
    def refused(self, **urls):
        """Make a call of an app, and return what it is refused with."""
        tx = TwistedCelery(Celery("client", **urls), reactor=MemoryReactorClock())
        return str(self.assertRaises(ImproperlyConfigured, tx.send_task, "proj.add"))

    def test_broker(self):
        """Another broker is named by its transport."""
        self.assertIn("memory", self.refused(broker="memory://", backend="rpc://"))

    def test_backend(self):
        """Another result backend is named by its class."""
        self.assertIn("CacheBackend", self.refused(broker="amqp://", backend="cache+memory://"))

    def test_option(self):
        """An option that neither Celery nor a message has is named, whatever the broker."""
        for broker, backend in (
            ("amqp://", "rpc://"),
            ("redis://", "rpc://"),
            ("redis://", "redis://"),
            ("redis://", None),
        ):
            tx = TwistedCelery(Celery("client", broker=broker, backend=backend), reactor=MemoryReactorClock())
            error = self.assertRaises(TypeError, tx.send_task, "proj.add", contdown=60)
            self.assertIn("'contdown'", str(error))

    def test_not_installed(self):
        """One whose own module is missing is refused at once: nobody installs it first."""
        for urls, name in (
            (
                {"broker": "nonsense://", "backend": "rpc://"},
                "broker_url: there is no way yet to carry 'nonsense'",
            ),
            ({"broker": ["nonsense://", "amqp://"], "backend": "rpc://"}, "'nonsense'"),
            (
                {"broker": "amqp://", "backend": "nonsense://"},
                "result_backend: there is no way yet to carry 'nonsense'",
            ),
        ):
            self.assertIn(name, self.refused(**urls))

    def test_redis_not_installed(self):
        """Without redis-py or hiredis the error says what to install."""
        program = (
            "import sys\n"
            "sys.modules[sys.argv[1]] = None\n"
            "from celery import Celery\n"
            "from twistedcelery import TwistedCelery\n"
            "for urls in (('redis://', 'rpc://'), ('amqp://', 'redis://'), ('sentinel://h', 'sentinel://h')):\n"
            "    try:\n"
            "        TwistedCelery(Celery(broker=urls[0], backend=urls[1])).send_task('proj.add')\n"
            "    except Exception as error:\n"
            "        print(type(error).__name__, error)\n"
        )
        for name in ("redis", "hiredis"):
            done = subprocess.run(
                [sys.executable, "-c", program, name], capture_output=True, text=True, timeout=60, check=True
            )
            lines = done.stdout.splitlines()
            self.assertEqual(len(lines), 3, done)
            for line in lines:
                self.assertTrue(line.startswith("ImproperlyConfigured"), line)
                self.assertIn("pip install twistedcelery[redis]", line)
