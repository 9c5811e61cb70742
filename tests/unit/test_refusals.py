"""Brokers and backends that there is no room for are refused, with their name."""

from __future__ import annotations

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
