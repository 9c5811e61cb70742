"""Brokers and backends that there is no room for are refused, with their name."""

from __future__ import annotations

import subprocess
import sys
import traceback

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

import twistedcelery
from twistedcelery import TwistedCelery
from twistedcelery._urls import check_urls


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


#: Passwords that end a URL's part where they should not; each holds "s3cr", or is a number that could be a port.
UNESCAPED = [
    "s3cr/t",
    "s3cr#t",
    "s3cr?t",
    "[s3cr",
    "s3cr]t",
    "/s3cr",
    "7788/9911",
    "7788#9911",
    "7788/9911@9",
    "s3cr\u2100t",
]


class SecretTests(SynchronousTestCase):
    """A URL that cannot be read is refused, and its password shows nowhere: not in the error, nor in what led to it."""

    def refusal(self, make=TwistedCelery, **conf):
        app = Celery("client", set_as_current=False)
        app.conf.update(conf)
        tx = make(app, reactor=MemoryReactorClock())
        error = self.assertRaises(ImproperlyConfigured, tx.send_task, "proj.add")
        told = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.assertIsNone(error.__cause__)
        self.assertIsNone(error.__context__)
        for secret in ("s3cr", "9911"):
            self.assertNotIn(secret, str(error))
            self.assertNotIn(secret, told)
        self.assertIn("/ as %2F", str(error))
        return str(error)

    def test_broker(self):
        """Every transport, the second server of a list, a list of Sentinels, and a user name that is not escaped."""
        for url, shown in (
            ("amqp://user:{}@h:5672//", "amqp://..."),
            ("amqps://user:{}@h//", "amqps://..."),
            ("pyamqp://user:{}@h//", "pyamqp://..."),
            ("redis://:{}@h:6379/1", "redis://..."),
            ("rediss://user:{}@h/1", "rediss://..."),
            ("redis+socket://user:{}@/run/redis.sock", "redis+socket://..."),
            ("sentinel://:ok@h;sentinel://:{}@h2", "sentinel://..."),
            ("amqp://user:ok@h;amqp://user:{}@h2", "amqp://..."),
            ("amqp://{}:s3cr@h", "amqp://..."),
            ("amqp:/user:{}@h", "..."),
        ):
            for password in UNESCAPED:
                for eager in (False, True):
                    given = url.format(password)
                    told = self.refusal(broker_url=given, task_always_eager=eager)
                    self.assertTrue(told.startswith(f"broker_url: {shown} cannot be read"), (given, told))
                    self.refusal(broker_url=["amqp://h", given])

    def test_semicolon(self):
        """A semicolon, which divides a list of servers."""
        for password in ("s3cr;t", "7788;9911"):
            self.refusal(broker_url=f"amqp://user:{password}@h")

    def test_backend(self):
        """The URL of the result backend, which Celery parses."""
        for url in (
            "redis://:{}@h:6379/1",
            "rediss://u:{}@h",
            "sentinel://:ok@h;sentinel://:{}@h2",
            "redis:{}@h",
        ):
            for password in UNESCAPED:
                told = self.refusal(broker_url="amqp://h", result_backend=url.format(password))
                self.assertTrue(told.startswith("result_backend: "), told)

    def test_other_transports(self):
        """Of a transport that is not carried, kombu's own error is not shown either, which quotes the password."""
        for eager in (False, True):
            self.refusal(broker_url="memory://key:s3cr/t@h", task_always_eager=eager)

    def test_drop_in(self):
        """The drop-in refuses alike."""
        app = twistedcelery.Celery("client", broker="redis://:s3cr#t@h", set_as_current=False)
        error = self.assertRaises(ImproperlyConfigured, app.twisted.send_task, "proj.add")
        self.assertNotIn("s3cr", str(error))

    def test_escaped(self):
        """What is escaped, and what needs no escaping, is taken."""
        for url in (
            "amqp://user:s3cr%2Ft%23%3F%3B@h:5672//",
            "amqp://user:a@b:c!$&'()*+,=%25@h/team@prod",
            "amqp://h/team@prod",
            "amqp://[::1]:5672//",
            "redis://:a;b@h/1",
            "rediss://h:6379/0?ssl_ca_certs=/etc/a@b.pem",
            "redis+socket:///run/redis@1.sock",
        ):
            check_urls("result_backend", url)
        check_urls("broker_url", None)
        check_urls("result_backend", "project.backends:Backend")

    def test_database(self):
        """A database of the result backend that is no number is told with its setting."""
        told = str(
            self.assertRaises(
                ImproperlyConfigured,
                TwistedCelery(
                    Celery("client", broker="amqp://", backend="redis://h/one"), reactor=MemoryReactorClock()
                ).send_task,
                "proj.add",
            )
        )
        self.assertIn("result_backend: ", told)
        self.assertIn("'one'", told)
