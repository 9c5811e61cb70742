"""Waits: from states of tasks to one Deferred, without leaving anything in the table."""

from __future__ import annotations

import asyncio
import gc
import pickle
from typing import Any

from celery import Celery
from celery.exceptions import ChordError, TaskRevokedError
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery._waiters import Waiters
from twistedcelery._waits import Before, EagerMeta, Wait, failure_of
from twistedcelery.errors import ResultLost, ResultNotKept, ResultTimeout


def meta(task_id, status="SUCCESS", result=None, **more):
    return {"task_id": task_id, "status": status, "result": result, "traceback": None, **more}


class WaitTests(SynchronousTestCase):
    def setUp(self):
        self.watched: list[str] = []
        self.waiters = Waiters(self.watched.append, self.watched.remove)

    def wait(self, shape, **settings):
        early = settings.pop("early", None)
        parents = {task_id: Before(None, False) for task_id in settings.pop("parents", ())}
        parents.update((task_id, Before(None, True)) for task_id in settings.pop("header", ()))
        wait = Wait(self.waiters, shape, parents=parents, **settings)
        waiting: Deferred[Any] = Deferred(lambda _: wait.leave())
        wait.start(waiting, early=early)
        return wait, waiting

    def receive(self, *metas):
        for one in metas:
            self.waiters.meta_received(one)

    def assert_empty(self):
        self.assertEqual((len(self.waiters), self.watched, self.waiters.last_states), (0, [], {}))

    def test_value(self):
        """A task's value fires the Deferred; other states do not."""
        _, waiting = self.wait("a")
        self.receive(meta("a", "STARTED"), meta("b", result=1))
        self.assertNoResult(waiting)
        self.receive(meta("a", result=2))
        self.assertEqual(self.successResultOf(waiting), 2)
        self.assert_empty()

    def test_failure(self):
        """A task's exception fails it, with the worker's traceback as its cause."""
        _, waiting = self.wait("a")
        self.receive(meta("a", "FAILURE", ValueError("no"), traceback="Traceback: here"))
        error = self.failureResultOf(waiting, ValueError).value
        self.assertIn("Traceback: here", str(error.__cause__))
        self.assert_empty()

    def test_revoked(self):
        """A revoked task fails it with TaskRevokedError, also where its result is only a text."""
        _, waiting = self.wait("a")
        self.receive(meta("a", "REVOKED", "terminated"))
        self.failureResultOf(waiting, TaskRevokedError)

    def test_odd_failure(self):
        """A failure whose result is no exception becomes one."""
        self.assertIsInstance(failure_of(meta("a", "FAILURE", "text")), Exception)

    def test_propagate(self):
        """``propagate=False`` gives exceptions as values, in a group at their places."""
        error = ValueError("no")
        _, waiting = self.wait(["a", ["b", "c"]], propagate=False)
        self.receive(meta("c", result=3), meta("b", "FAILURE", error), meta("a", result=1))
        self.assertEqual(self.successResultOf(waiting), [1, [error, 3]])
        self.assert_empty()

    def test_group(self):
        """A group's values come in the shape's order, whatever order they arrive in, duplicates ignored."""
        _, waiting = self.wait(["a", ["b", "a2"], []])
        self.receive(meta("a2", result=3), meta("a", result=1), meta("a", result=9))
        self.assertNoResult(waiting)
        self.receive(meta("b", result=2))
        self.assertEqual(self.successResultOf(waiting), [1, [2, 3], []])
        self.assert_empty()

    def test_group_failure(self):
        """The first failure fails a group and takes it from the table for all its members."""
        _, waiting = self.wait(["a", "b", "c"])
        self.receive(meta("a", result=1), meta("b", "FAILURE", ValueError("no")))
        self.failureResultOf(waiting, ValueError)
        self.assert_empty()

    def test_empty_group(self):
        """An empty group is an empty list at once."""
        _, waiting = self.wait([])
        self.assertEqual(self.successResultOf(waiting), [])

    def test_same_task_twice(self):
        """A task that stands twice in a shape gives both values."""
        _, waiting = self.wait(["a", "a"])
        self.receive(meta("a", result=1))
        self.assertEqual(self.successResultOf(waiting), [1, 1])
        self.assert_empty()

    def test_parents(self):
        """A failed parent fails the wait; a successful one does not settle it."""
        _, waiting = self.wait("c", parents=("b", "a"))
        self.receive(meta("a", result=1))
        self.assertNoResult(waiting)
        self.receive(meta("b", "FAILURE", ValueError("link")))
        self.assertEqual(self.failureResultOf(waiting, ValueError).value.args, ("link",))
        self.assert_empty()

    def test_header(self):
        """Where a task of a chord's header fails, what stands behind fails with Celery's ChordError, and that one as its cause."""
        _, waiting = self.wait("c", parents=("b",), header=("h",))
        self.receive(meta("h", "FAILURE", ValueError("no")))
        error = self.failureResultOf(waiting, ChordError).value
        self.assertEqual(str(error), "Dependency h raised ValueError('no')")
        self.assertIsInstance(error.__cause__, ValueError)
        self.assert_empty()

    def test_parents_after_the_value(self):
        """The value of the last task settles the wait, though a parent's reply has not come."""
        _, waiting = self.wait("b", parents=("a",))
        self.receive(meta("b", result=2))
        self.assertEqual(self.successResultOf(waiting), 2)
        self.assert_empty()

    def test_early(self):
        """States that came before are found: in the buffer of unclaimed ones, or handed in."""
        self.receive(meta("a", result=1), meta("p", "FAILURE", ValueError("early")))
        _, waiting = self.wait(["a", "b"], early={"b": meta("b", result=2)})
        self.assertEqual(self.successResultOf(waiting), [1, 2])
        _, failing = self.wait("x", parents=("p", "q"))
        self.failureResultOf(failing, ValueError)
        self.assert_empty()

    def test_on_message(self):
        """``on_message`` gets every state of its own tasks in order, the final one last, none of the parents'."""
        seen: list[str] = []
        _, waiting = self.wait("a", parents=("p",), on_message=lambda one: seen.append(one["status"]))
        self.receive(meta("p", "STARTED"), meta("a", "STARTED"), meta("a", "PROGRESS"), meta("p"), meta("a"))
        self.assertEqual(seen, ["STARTED", "PROGRESS", "SUCCESS"])
        self.successResultOf(waiting)
        self.assert_empty()

    def test_on_message_raises(self):
        """An error in ``on_message`` is logged and stops nothing."""
        _, waiting = self.wait("a", on_message=lambda one: 1 / 0)
        self.receive(meta("a", result=1))
        self.assertEqual(self.successResultOf(waiting), 1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_on_message_cancels(self):
        """``on_message`` may cancel its own wait."""
        holder: list[Deferred[Any]] = []
        _, waiting = self.wait("a", on_message=lambda one: holder[0].cancel())
        holder.append(waiting)
        self.receive(meta("a", "STARTED"))
        self.failureResultOf(waiting)
        self.receive(meta("a", result=1))
        self.assert_empty()

    def test_finished(self):
        """``finished`` is told each final state before the Deferred fires, those of parents too."""
        told: list[Any] = []
        _, waiting = self.wait(["a", "b"], parents=("p",), finished=lambda one: told.append(one["task_id"]))
        waiting.addCallback(told.append)
        self.receive(meta("p"), meta("a", result=1), meta("b", result=2))
        self.assertEqual(told, ["p", "a", "b", [1, 2]])

    def test_timeout(self):
        """A timeout fails with the missing task's id, and how many of a group are missing."""
        clock = Clock()
        wait, waiting = self.wait(["a", "b"])
        wait.expire(clock, 5)
        self.receive(meta("a", result=1))
        clock.advance(5)
        error = self.failureResultOf(waiting, ResultTimeout).value
        self.assertEqual(error.task_id, "b")
        self.assertIn("1 of 2", str(error))
        self.assert_empty()

    def test_in_time(self):
        """A value in time takes the timer away, as a cancellation does."""
        clock = Clock()
        for cancelled in (False, True):
            wait, waiting = self.wait("a")
            wait.expire(clock, 5)
            if cancelled:
                waiting.cancel()
            else:
                self.receive(meta("a", result=1))
            waiting.addErrback(lambda _: None)
            self.assertEqual(clock.getDelayedCalls(), [])
            self.assert_empty()

    def test_cancel(self):
        """A cancelled wait is in no table; others for the same task stay."""
        _, first = self.wait("a")
        _, second = self.wait(["a", "b"])
        second.cancel()
        self.failureResultOf(second)
        self.assertEqual(list(self.waiters), ["a"])
        self.receive(meta("a", result=1))
        self.assertEqual(self.successResultOf(first), 1)
        self.assert_empty()

    def test_can_never_be_given(self):
        """What the source says of a task that cannot be given fails all who wait for it."""
        _, one = self.wait("a")
        _, group = self.wait(["a", "b"])
        self.waiters.fail("a", ResultLost("gone"))
        self.failureResultOf(one, ResultLost)
        self.failureResultOf(group, ResultLost)
        self.assert_empty()

    def test_weakly(self):
        """A Deferred that is held weakly may go; once something holds it, it stays and fires."""
        wait = Wait(self.waiters, "a")
        waiting: Deferred[Any] = Deferred()
        wait.start(waiting, weakly=True)
        self.assertFalse(wait.held)
        del waiting
        gc.collect()
        self.receive(meta("a"))
        self.assert_empty()
        wait = Wait(self.waiters, "b")
        kept: Deferred[Any] = Deferred()
        wait.start(kept, weakly=True)
        got: list[int] = []
        kept.addCallback(got.append)
        wait.hold()
        del kept
        gc.collect()
        self.receive(meta("b", result=5))
        self.assertEqual(got, [5])
        self.assert_empty()

    def test_forget(self):
        """A wait for what is forgotten fails; one that only follows it goes on, and sees it fail."""
        _, own = self.wait("a")
        _, group = self.wait(["a", "b"])
        _, behind = self.wait("c", parents=["a"])
        error = ResultNotKept("forgotten")
        self.waiters.forget("a", error)
        for waiting in (own, group):
            self.assertIs(self.failureResultOf(waiting).value, error)
        self.assertEqual(sorted(self.waiters), ["a", "c"])
        self.receive(meta("a", "FAILURE", ValueError("no")))
        self.failureResultOf(behind, ValueError)
        self.assert_empty()

    def test_eager(self):
        """The state of a task that has run here is its last one, whatever it is called; its value is None unless it has returned."""
        error = KeyError("why")
        for state, value in (("SUCCESS", 5), ("IGNORED", None), ("REJECTED", None), ("RETRY", None)):
            early = {"a": EagerMeta(meta("a", state, 5 if value else error))}
            for shape, found in (("a", value), (["a"], [value])):
                _, waiting = self.wait(shape, early=early)
                self.assertEqual(self.successResultOf(waiting), found)
        self.assert_empty()


class ControlFlowTests(SynchronousTestCase):
    """What a worker has stored that steers generators, coroutines, Deferreds or processes: `failure_of` gives another class."""

    kinds: tuple[type[BaseException], ...] = (
        GeneratorExit,
        KeyboardInterrupt,
        StopAsyncIteration,
        StopIteration,
        SystemExit,
        asyncio.CancelledError,
        defer.AlreadyCalledError,
        defer.CancelledError,
        defer.NotACoroutineError,
        defer._DefGen_Return,
        defer._InternalInlineCallbacksCancelledError,
    )

    def assert_stands_in(self, kind, error):
        """It has the name and the message of the class that it stands for, and is an ordinary exception."""
        self.assertNotIsInstance(error, kind)
        self.assertIsInstance(error, Exception)
        self.assertEqual((type(error).__name__, str(error)), (kind.__name__, "why"))

    def test_by_name(self):
        """A name that a JSON backend looks up."""
        backend = Celery("client", backend="rpc://").backend
        for kind in self.kinds:
            stored = {"exc_type": kind.__name__, "exc_module": kind.__module__, "exc_message": ["why"]}
            decoded = backend.meta_from_decoded(meta("a", "FAILURE", stored, traceback="Traceback: here"))
            self.assertIs(type(decoded["result"]), kind)
            error = failure_of(decoded)
            self.assert_stands_in(kind, error)
            self.assertIn("Traceback: here", str(error.__cause__))

    def test_pickled(self):
        """The object itself, from a pickle backend."""
        for kind in self.kinds:
            decoded = meta("a", "FAILURE", pickle.loads(pickle.dumps(kind("why"))))
            self.assert_stands_in(kind, failure_of(decoded))

    def test_of_this_process(self):
        """Where the task has run here, where it was raised and why is kept."""
        try:
            raise defer.CancelledError("why") from KeyError("deeper")
        except defer.CancelledError as raised:
            error = failure_of(meta("a", "FAILURE", raised, traceback="text"))
            self.assertIs(error.__traceback__, raised.__traceback__)
        self.assertIsInstance(error.__cause__, KeyError)

    def test_the_same_again(self):
        """Whoever asks again has the same one; a subclass is no different, and others stay as they are."""

        class Own(StopIteration):
            pass

        state = meta("a", "FAILURE", Own("why"))
        error = failure_of(state)
        self.assert_stands_in(Own, error)
        self.assertIs(failure_of(state), error)
        other = ValueError("why")
        self.assertIs(failure_of(meta("a", "FAILURE", other)), other)

    def test_failure(self):
        """Twisted's Failure is an exception for Python too; what it holds is meant, whatever that is."""
        inner = ValueError("why")
        self.assertIs(failure_of(meta("a", "FAILURE", Failure(inner))), inner)
        # What a JSON backend makes, where Twisted takes a text for an exception.
        text = Failure(inner)
        text.value = "why"  # type: ignore[assignment]  # see above
        self.assertEqual(repr(failure_of(meta("a", "FAILURE", text))), "Exception('why')")
        error = failure_of(meta("a", "FAILURE", Failure(StopIteration("why"))))
        self.assert_stands_in(StopIteration, error)
