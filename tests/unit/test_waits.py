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

from twistedcelery._ancestry import Header, Member, Stretch
from twistedcelery._waiters import Waiters
from twistedcelery._waits import Ancestors, EagerMeta, Wait, failure_of
from twistedcelery.errors import ResultLost, ResultNotKept, ResultTimeout


def meta(task_id, status="SUCCESS", result=None, **more):
    return {"task_id": task_id, "status": status, "result": result, "traceback": None, **more}


class _Waiting(SynchronousTestCase):
    """A table of waits, and what a source brings."""

    def setUp(self):
        self.watched: list[str] = []
        self.waiters = Waiters(self.watched.append, self.watched.remove)
        self.clock = Clock()

    def wait(self, shape, **settings):
        early = settings.pop("early", None)
        found = settings.pop("stretches", [])
        line = settings.pop("parents", ())
        if line:
            found = [Stretch([*line], None), *found]
        wait = Wait(self.waiters, shape, parents=Ancestors(self.clock, found), **settings)
        waiting: Deferred[Any] = Deferred(lambda _: wait.leave())
        wait.start(waiting, early=early)
        return wait, waiting

    def receive(self, *metas):
        for one in metas:
            self.waiters.meta_received(one)

    def assert_empty(self):
        self.assertEqual((len(self.waiters), self.watched, self.waiters.last_states), (0, [], {}))


class WaitTests(_Waiting):
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


def header(*members, chord="chord"):
    """The header of a chord: ids of tasks, or tuples of an id and what stands before it."""
    return Header(
        chord,
        [Member(one, []) if isinstance(one, str) else Member(one[0], list(one[1:])) for one in members],
    )


class HeaderTests(_Waiting):
    """A wait for what stands behind the header of a chord that fails."""

    def fail(self, *task_ids):
        """Each of these tasks fails with an exception that says its id."""
        self.receive(*(meta(task_id, "FAILURE", ValueError(task_id)) for task_id in task_ids))

    def fail_body(self, task_id="body"):
        """A worker stores why this task never runs."""
        self.receive(meta(task_id, "FAILURE", ChordError("Dependency x raised ValueError('x')")))

    def assert_fails(self, waiting, text, kind=ValueError):
        """It has failed with this error, and left nothing."""
        error = self.failureResultOf(waiting).value
        self.assertEqual((type(error), str(error)), (kind, text))
        self.assert_empty()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        return error

    def test_first_in_order(self):
        """The first member that has failed, by the header's order, once the body's final state has come; whatever came first."""
        for failing in (["h1"], ["h2"], ["h1", "h2"], ["h2", "h1"], ["h3", "h2"], ["h2", "h3", "h1"]):
            _, waiting = self.wait("body", parents=[header("h1", "h2", "h3")])
            self.fail(*failing)
            self.receive(*(meta(one) for one in ("h1", "h2", "h3") if one not in failing))
            self.assertNoResult(waiting)
            self.fail_body()
            self.assert_fails(waiting, min(failing))

    def test_asked_late(self):
        """It is the same where all has come before."""
        for known in (["h2", "h1", "body"], ["body", "h1", "h2"]):
            early = {
                name: meta(name, "FAILURE", ChordError("x") if name == "body" else ValueError(name))
                for name in known
            }
            _, waiting = self.wait("body", parents=[header("h1", "h2")], early=early)
            self.assert_fails(waiting, "h1")

    def test_note(self):
        """A note on the exception names the member and the chord; one exception has it once."""
        error = ValueError("no")
        for _ in range(2):
            _, waiting = self.wait("body", parents=[header("h1")])
            self.receive(meta("h1", "FAILURE", error))
            self.fail_body()
            self.assertIs(self.failureResultOf(waiting).value, error)
        if hasattr(error, "add_note"):
            self.assertEqual(vars(error)["__notes__"], ["Raised by task h1 in the header of chord chord."])

    def test_slow_member(self):
        """A member that has not ended may be the first that fails: it is waited for."""
        _, waiting = self.wait("body", parents=[header("slow", "quick")])
        self.fail("quick")
        self.clock.advance(100)
        self.assertNoResult(waiting)
        self.fail("slow")
        self.assertNoResult(waiting)
        self.fail_body()
        self.assert_fails(waiting, "slow")

    def test_no_state_of_the_body(self):
        """Not every body gets a state: the wait ends a moment after the first failure is certain; members behind that do not matter."""
        for ok, failing in ((["h1"], ["h2"]), (["h1", "h3"], ["h2"]), ([], ["h1"]), ([], ["h3", "h2", "h1"])):
            _, waiting = self.wait("body", parents=[header("h1", "h2", "h3")])
            self.fail(*failing)
            self.receive(*map(meta, ok))
            self.assertNoResult(waiting)
            self.clock.advance(1)
            self.assert_fails(waiting, min(failing))

    def test_body_before_its_header(self):
        """A body's state may overtake those of its header: they are waited for a moment."""
        _, waiting = self.wait("body", parents=[header("h1", "h2")])
        self.fail_body()
        self.fail("h2")
        self.assertNoResult(waiting)
        self.receive(meta("h1"))
        self.assert_fails(waiting, "h2")
        for failing in (["h2"], []):
            _, waiting = self.wait("body", parents=[header("h1", "h2")])
            self.fail_body()
            self.fail(*failing)
            self.clock.advance(1)
            if failing:
                self.assert_fails(waiting, "h2")
            else:
                self.assert_fails(waiting, "Dependency x raised ValueError('x')", ChordError)

    def test_failure_of_the_body(self):
        """A body that fails itself says so at once, as does one whose header has succeeded."""
        _, waiting = self.wait("body", parents=[header("h1", "h2")])
        self.fail("body")
        self.assert_fails(waiting, "body")
        _, waiting = self.wait("body", parents=[header("h1")])
        self.receive(meta("h1"), meta("body", "FAILURE", ChordError("Callback error: x")))
        self.assert_fails(waiting, "Callback error: x", ChordError)

    def test_value_of_the_body(self):
        """A body that has run all the same gives its value, also in the moment in which its failure is expected."""
        _, waiting = self.wait("body", parents=[header("h1")])
        self.fail("h1")
        self.receive(meta("body", result=5))
        self.assertEqual(self.successResultOf(waiting), 5)
        self.assert_empty()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_behind_the_body(self):
        """What stands behind a body fails as the body does; what stands before the chord fails first of all."""
        _, waiting = self.wait("last", parents=["first", header("h1", "h2"), "body", "next"])
        self.receive(meta("first"), meta("h1"))
        self.fail("h2")
        self.assertNoResult(waiting)
        self.fail_body()
        self.assert_fails(waiting, "h2")
        _, waiting = self.wait("last", parents=["first", header("h1", "h2"), "body"])
        self.fail("first")
        self.assert_fails(waiting, "first")
        _, waiting = self.wait("last", parents=[header("h1"), "body", header("h2")])
        self.receive(meta("h1"))
        self.fail("body")
        self.assert_fails(waiting, "body")

    def test_chain_in_a_header(self):
        """A member at the end of a chain has failed where a link has, before a worker has said so in its name."""
        _, waiting = self.wait("body", parents=[header("h1", ("h2", "link"))])
        self.receive(meta("h1"))
        self.fail("link")
        self.clock.advance(1)
        self.assert_fails(waiting, "link")
        # With the state of the member it is the member's.
        _, waiting = self.wait("body", parents=[header(("h1", "link"))])
        self.fail("link", "h1")
        self.fail_body()
        self.assert_fails(waiting, "h1")

    def test_chord_in_a_header(self):
        """A member that is the body of a chord has failed as workers store it: with ChordError."""
        _, waiting = self.wait("body", parents=[header("h1", ("h2", header("x1", "x2", chord="inner")))])
        self.receive(meta("h1"), meta("x1"))
        self.fail("x2")
        self.fail_body("h2")
        self.fail_body()
        self.assert_fails(waiting, "Dependency x raised ValueError('x')", ChordError)
        # Its state may never come.
        _, waiting = self.wait("body", parents=[header(("h1", header("x1", "x2", chord="inner")), "h2")])
        self.fail("h2", "x2")
        self.clock.advance(1)
        self.assertNoResult(waiting)
        self.fail("x1")
        self.clock.advance(1)
        error = self.assert_fails(waiting, "Dependency x1 raised ValueError('x1')", ChordError)
        self.assertEqual(repr(error.__cause__), "ValueError('x1')")

    def test_as_a_value(self):
        """``propagate=False`` gives what is stored in the body's name, or what would be."""
        _, waiting = self.wait("body", parents=[header("h1")], propagate=False)
        self.fail("h1")
        self.fail_body()
        self.assertEqual(repr(self.successResultOf(waiting))[:24], "ChordError('Dependency x")
        _, waiting = self.wait("body", parents=[header("h1")], propagate=False)
        self.fail("h1")
        self.clock.advance(1)
        error = self.successResultOf(waiting)
        self.assertEqual(repr(error), """ChordError("Dependency h1 raised ValueError('h1')")""")
        self.assertIsInstance(error.__cause__, ValueError)
        self.assert_empty()

    def test_group_as_a_body(self):
        """A body that is a group fails as another does, whether or not its members get states."""
        for states in (True, False):
            _, waiting = self.wait(["b1", "b2"], parents=[header("h1", "h2")])
            self.fail("h2")
            self.receive(meta("h1"))
            self.assertNoResult(waiting)
            if states:
                self.fail("b2")
            else:
                self.clock.advance(1)
            self.assert_fails(waiting, "h2")

    def test_group_as_a_body_and_as_a_value(self):
        """There ``propagate=False`` gives each member's exception, or that of the header for those that have none."""
        _, waiting = self.wait(["b1", ["b2"]], parents=[header("h1", "h2")], propagate=False)
        self.fail("b2", "h1")
        self.clock.advance(1)
        first, (second,) = self.successResultOf(waiting)
        self.assertEqual((str(first), str(second)), ("h1", "b2"))
        self.assert_empty()

    def test_chords_in_a_group(self):
        """A member of a group that stands behind a header of its own fails as workers store it, and only that member."""
        stretches = [Stretch([header("h1")], ["b"]), Stretch(["link"], ["c"])]
        _, waiting = self.wait(["a", "b", "c"], stretches=stretches)
        self.fail("h1")
        self.assertNoResult(waiting)
        self.fail_body("b")
        self.assert_fails(waiting, "Dependency x raised ValueError('x')", ChordError)
        stretches = [Stretch([header("h1")], ["b"]), Stretch(["link"], ["c"])]
        _, waiting = self.wait(["a", "b", "c"], stretches=stretches, propagate=False)
        self.fail("h1", "link")
        self.receive(meta("a", result=1))
        self.assertNoResult(waiting)
        self.clock.advance(1)
        value, first, second = self.successResultOf(waiting)
        self.assertEqual((value, type(first), str(second)), (1, ChordError, "link"))
        self.assert_empty()

    def test_ended_before(self):
        """Whoever cancels, or is late, in the moment in which the body's state is expected leaves no timer."""
        for cancelled in (True, False):
            wait, waiting = self.wait("body", parents=[header("h1")])
            wait.expire(self.clock, 0.5)
            self.fail("h1")
            if cancelled:
                waiting.cancel()
                self.failureResultOf(waiting)
            else:
                self.clock.advance(0.5)
                self.failureResultOf(waiting, ResultTimeout)
            self.assertEqual(self.clock.getDelayedCalls(), [])
            self.assert_empty()

    def test_large_header(self):
        """Each state of a large header costs the same, in whatever order they come."""
        self.waiters = Waiters(lambda _: None, lambda _: None)
        names = [f"h{number}" for number in range(20_000)]
        _, waiting = self.wait("body", parents=[header(*names)])
        self.fail(names[-1])
        self.receive(*map(meta, reversed(names[:-1])))
        self.fail_body()
        self.assert_fails(waiting, names[-1])


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
