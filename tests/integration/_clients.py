"""What integration tests of calls share, whatever the broker and the result backend."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery
from twisted.internet.defer import Deferred, DeferredList

from tests.support.case import IntegrationTestCase
from twistedcelery import TwistedCelery

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["ClientTestCase", "outcomes", "patient"]


def outcomes(deferreds: Iterable[Deferred[Any]]) -> Deferred[list[Any]]:
    """Fire with the value or the exception of each, once all have fired."""
    return DeferredList(list(deferreds), consumeErrors=True).addCallback(
        lambda pairs: [value if ok else value.value for ok, value in pairs]
    )


def patient(app: Celery) -> Celery:
    """Have an app's calls wait for a broker that is away for longer than Celery's default 0.6 s."""
    app.conf.task_publish_retry_policy = {"max_retries": 100, "interval_start": 0.2, "interval_max": 0.2}
    return app


class ClientTestCase(IntegrationTestCase):
    """Tests that call tasks; ``broker`` and ``backend`` are the URLs that `start_servers` has to set."""

    # The first test of a run starts servers and workers.
    deadline = 120.0
    broker: str
    backend: str

    def setUp(self):
        super().setUp()
        return self.in_thread(self.start_servers)

    def start_servers(self):
        """Start what the tests of this class need; in a thread."""
        raise NotImplementedError

    def app(self, broker: str | None = None, backend: str | None = None, **settings: Any) -> Celery:
        """Make an app for these URLs, the shared servers' unless given."""
        app = Celery("client", broker=broker or self.broker, backend=backend or self.backend)
        app.conf.update(settings)
        return app

    def client(self, app: Celery | str | None = None, **options: Any) -> Any:
        """Make a TwistedCelery of an app, or a broker's URL; it is stopped with the test, and has nothing in its tables then."""
        tx = TwistedCelery(app if isinstance(app, Celery) else self.app(app), **options)
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
        # A result may come before the confirms of its call.
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
        self.assertEqual((engine.caller.unsent, engine.caller._writes), ({}, []))
        watched = getattr(engine.source, "_watched", None)
        self.assertFalse(watched, "the result source watches")

    def temporary(self) -> Path:
        """Make a path for `tests.record`, in a directory of its own."""
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        return Path(place.name, "record")

    def gate(self) -> Path:
        """Make a file for `tests.hold`, which goes on when the test unlinks it or ends."""
        path = self.temporary()
        path.touch()
        return path
