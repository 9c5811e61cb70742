"""What the integration tests over RabbitMQ share: an app, a TwistedCelery and how to see that nothing is left."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery
from twisted.internet.defer import Deferred, DeferredList

from tests.support import servers
from tests.support.case import IntegrationTestCase
from twistedcelery import TwistedCelery

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.rabbitmq import RabbitMQ

__all__ = ["AMQPTestCase", "outcomes", "slow_app"]


def outcomes(deferreds: Iterable[Deferred[Any]]) -> Deferred[list[Any]]:
    """Fire with the value or the exception of each, once all have fired."""
    return DeferredList(list(deferreds), consumeErrors=True).addCallback(
        lambda pairs: [value if ok else value.value for ok, value in pairs]
    )


def slow_app(app: Celery) -> Celery:
    """Have an app's calls wait for a broker that is away for longer than Celery's default 0.6 s."""
    app.conf.task_publish_retry_policy = {"max_retries": 100, "interval_start": 0.2, "interval_max": 0.2}
    return app


class AMQPTestCase(IntegrationTestCase):
    """Tests that call the tasks of the shared worker through the shared RabbitMQ."""

    # The first test of a run starts RabbitMQ and the worker.
    deadline = 60.0
    server: RabbitMQ

    def setUp(self):
        super().setUp()
        return self.in_thread(self.start_servers)

    def start_servers(self):
        """Start what the tests of this class need; in a thread."""
        self.server = servers.rabbitmq()
        servers.worker(self.server.url, "rpc://")

    def app(self, url: str | None = None, **settings: Any) -> Celery:
        """Make an app for a URL, the shared server's unless given, with the rpc backend unless set."""
        app = Celery(
            "client", broker=url or self.server.url, backend=settings.pop("result_backend", "rpc://")
        )
        app.conf.update(settings)
        return app

    def client(self, app: Celery | str | None = None, **options: Any) -> Any:
        """Make a TwistedCelery that is stopped with the test, and has nothing in its tables then."""
        if not isinstance(app, Celery):
            app = self.app(app)
        tx = TwistedCelery(app, **options)
        self.addCleanup(self.stop, tx)
        return tx

    async def stop(self, tx: TwistedCelery) -> None:
        """Stop, and see that nothing is left."""
        await tx.stopService()
        if tx._engine is not None:
            await self.assert_nothing_left(tx)

    async def assert_nothing_left(self, tx: TwistedCelery) -> None:
        """No call is on its way, none is waited for, in no table."""
        engine = tx.engine
        # A result may come before the confirm of its call.
        await self.eventually(lambda: not engine.outbox.count, what="something is on its way")
        engine._drain()
        outbox, waiters = engine.outbox, engine.waiters
        self.assertEqual(len(waiters), 0, "somebody waits")
        self.assertEqual(waiters.last_states, {})
        self.assertEqual((outbox.count, outbox.bytes), (0, 0))
        tables = {
            name: getattr(outbox, name) for name in ("_queue", "_inflight", "_writing", "_halted", "_look")
        }
        self.assertFalse(any(tables.values()), tables)
        self.assertFalse(engine._bounded)

    def temporary(self) -> Path:
        """Make a path for `tests.record`, in a directory of its own."""
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        return Path(place.name, "record")

    def queues(self, server: RabbitMQ | None = None) -> Deferred[set[str]]:
        """List the names of all queues."""
        listing = self.in_thread((server or self.server).ctl, "list_queues", "name")
        return listing.addCallback(lambda text: set(text.split()))
