"""The two ways that are kept alive: `DeferrableTask` and `send_task`."""

from __future__ import annotations

import copy
from typing import Any

from celery import Celery, Task, chain, shared_task
from celery.exceptions import Ignore
from celery.result import AsyncResult, EagerResult

from tests.unit._fakes import EngineTestCase
from twistedcelery import DeferrableTask, TaskDeferred, calls, send_task
from twistedcelery.errors import ResultNotKept


class WaysTestCase(EngineTestCase):
    """Tests in the reactor's thread, as long as ``in_scope`` is true."""

    in_scope = True

    def setUp(self):
        super().setUp()
        vars(self.app)["_twistedcelery"] = self.tx
        self.patch(calls, "on_reactor_thread", lambda: self.in_scope)

        @DeferrableTask
        @self.app.task(name="proj.add", shared=False)
        def add(x, y):
            """Add."""
            return x + y

        self.add: Any = add


class DeferrableTaskTests(WaysTestCase):
    def test_calls(self):
        """``delay`` and ``apply_async`` give Deferreds that have the names of Celery's results."""
        self.up()
        calling = self.add.delay(1, y=2)
        self.assertIsInstance(calling, TaskDeferred)
        self.assertEqual(calling.task.id, calling.id)
        other = self.add.apply_async((1, 2), {}, "an id", countdown=3)
        self.assertEqual(other.id, "an id")
        self.confirm()
        self.source.bring(calling.id, result=3)
        self.source.bring("an id", "FAILURE", ValueError("x"))
        self.assertEqual(self.successResultOf(calling), 3)
        self.failureResultOf(other, ValueError)
        self.assertEqual(self.successResultOf(other.state()), "FAILURE")
        self.assert_empty()

    def test_configured_later(self):
        """Decorating does not make the task yet: settings that come later count, as they do for the bare task."""
        app = Celery("later", set_as_current=False)

        @DeferrableTask
        @app.task
        def add(x, y):
            """Add."""

        app.config_from_object({"task_serializer": "yaml", "task_ignore_result": True})
        self.assertEqual((add.serializer, add.ignore_result, add.__name__), ("yaml", True, "add"))
        self.assertEqual(add.__doc__, "Add.")

        @DeferrableTask
        @shared_task(name="later.shared")
        def shared():
            pass

        self.assertEqual(shared.name, "later.shared")

    def test_the_task_itself(self):
        """Everything else is the task's own."""
        self.assertEqual(self.add(1, 2), 3)
        self.assertEqual((self.add.name, self.add.__name__, self.add.__doc__), ("proj.add", "add", "Add."))
        self.assertIn("proj.add", repr(self.add))
        self.assertEqual(self.add.s(1, 2).task, "proj.add")
        self.assertRaises(AttributeError, getattr, self.add, "nonsense")
        again = copy.copy(self.add)
        self.assertIs(again.task, self.add.task)

    def test_given_to_tx(self):
        """It may be given to a TwistedCelery, and its signatures be part of a canvas."""
        self.up()
        callings = [self.tx.delay(self.add, 1, 2), self.tx.delay(chain(self.add.s(1, 2), self.add.s(3)))]
        for calling in callings:
            self.confirm()
            self.source.bring(calling.id, result=3)
            self.assertEqual(self.successResultOf(calling), 3)
        del callings, calling

    def test_apply(self):
        """``apply`` runs the task here; the Deferred has fired."""
        self.assertEqual(self.successResultOf(self.add.apply((1, 2))), 3)
        failing = self.add.apply((1, "x"))
        self.failureResultOf(failing, TypeError)
        self.assertEqual(self.successResultOf(failing.state()), "FAILURE")

        @DeferrableTask
        @self.app.task(name="ignored", shared=False)
        def ignored():
            raise Ignore

        calling = ignored.apply()
        self.assertIsNone(self.successResultOf(calling))
        self.assertEqual(self.successResultOf(calling.state()), "IGNORED")
        self.assert_empty()

    def test_waiting(self):
        """``AsyncResult`` waits for a task that was called before."""
        waiting = self.add.AsyncResult("a")
        self.source.bring("a", result=3)
        self.assertEqual(self.successResultOf(waiting), 3)
        self.assert_empty()

    def test_no_task(self):
        """What is no task is refused, with a word about the order of the decorators."""
        error = self.assertRaises(TypeError, DeferrableTask, print)
        self.assertIn("above @app.task", str(error))

    def test_elsewhere(self):
        """Where the reactor does not run it is the task's own."""
        self.in_scope = False
        told: list[Any] = []
        self.patch(
            Task, "apply_async", lambda task, *args, **options: told.append((task.name, args, options))
        )
        self.add.delay(1, 2)
        self.add.apply_async((1, 2), {}, "an id", countdown=3)
        self.assertEqual(
            told,
            [
                ("proj.add", ((1, 2), {}, None), {}),
                ("proj.add", ((1, 2), {}, "an id"), {"countdown": 3}),
            ],
        )
        self.assertIs(type(self.add.apply((1, 2))), EagerResult)
        self.assertIsInstance(self.add.AsyncResult("a"), AsyncResult)


class SendTaskTests(WaysTestCase):
    def test_send_task(self):
        """It gives the value, with all of ``send_task``'s arguments, by the one TwistedCelery of an app."""
        self.up()
        calling = send_task(self.app, "t", (1,), {"y": 2}, 5, task_id="a")
        self.assertIs(calling._engine, self.engine)
        self.confirm()
        self.source.bring("a", result=3)
        self.assertEqual(self.successResultOf(calling), 3)
        self.assert_empty()


class WithoutBackend(WaysTestCase):
    with_source = False

    def test_waiting(self):
        """There is nothing to wait for."""
        self.failureResultOf(self.add.AsyncResult("a"), ResultNotKept)
