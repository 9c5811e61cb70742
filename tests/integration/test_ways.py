"""The other ways in which people call Celery from Twisted, by a change of import."""

from __future__ import annotations

from threading import get_ident

from celery.result import AsyncResult
from twisted.internet.defer import inlineCallbacks

from tests.integration._amqp import AMQPTestCase
from twistedcelery import Celery, DeferrableTask, TaskDeferred, send_task


def difference(a, b):
    """Stand for the worker's ``tests.add``; where it runs here, the answer tells."""
    return a - b


class Ways(AMQPTestCase):
    def dropin(self):
        """Make an app of the drop-in, stopped with the test."""
        app = Celery("client", broker=self.server.url, backend="rpc://")
        self.addCleanup(app.twisted.disconnect)
        return app

    @inlineCallbacks
    def test_send_task(self):
        """``yield send_task(app, name, args=...)`` gives the result, and one TwistedCelery serves all calls of an app."""
        app = self.app()
        calling = send_task(app, "tests.add", args=(1, 2))
        self.addCleanup(vars(app)["_twistedcelery"].disconnect)
        value = yield calling
        self.assertEqual(value, 3)
        self.assertIs(send_task(app, "tests.add", (3, 4))._engine, calling._engine)

    @inlineCallbacks
    def test_deferrable_task(self):
        """The decorator's calls are Deferreds with the names of Celery's results; the rest is the task's own."""
        app = self.app()
        task = DeferrableTask(app.task(name="tests.add", shared=False)(difference))
        calling = task.delay(1, 2)
        self.addCleanup(vars(app)["_twistedcelery"].disconnect)
        self.assertIsInstance(calling, TaskDeferred)
        value = yield calling
        self.assertEqual((value, task(1, 2), task.name), (3, -1, "tests.add"))
        state = yield calling.state()
        self.assertEqual(state, "SUCCESS")
        value = yield task.apply_async((3, 4))
        self.assertEqual(value, 7)

    @inlineCallbacks
    def test_dropin(self):
        """``yield my_task.delay(1, 2)`` and its relatives, with nothing changed but the import."""
        app = self.dropin()
        add = app.task(name="tests.add", shared=False)(difference)
        for calling in (
            add.delay(1, 2),
            add.apply_async((1, 2)),
            app.send_task("tests.add", (1, 2)),
            add.s(1, 2).delay(),
        ):
            self.assertIsInstance(calling, AsyncResult)
            value = yield calling
            self.assertEqual((value, calling.state, calling.ready()), (3, "SUCCESS", True))

    async def test_dropin_elsewhere(self):
        """In another thread the same app is stock Celery."""
        app = self.dropin()
        here = get_ident()

        def elsewhere():
            result = app.send_task("tests.add", (1, 2))
            return get_ident(), type(result).__mro__, app._calls_twisted()

        there, classes, calls_twisted = await self.in_thread(elsewhere)
        self.assertNotEqual(there, here)
        self.assertNotIn(TaskDeferred, classes)
        self.assertFalse(calls_twisted)
        app.pool.force_close_all()
