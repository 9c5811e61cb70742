"""TaskDeferred and the handles, on a broker and a result source that are fakes."""

from __future__ import annotations

import gc
from typing import Any

from celery import Celery, chain, chord, group
from celery.exceptions import ChordError
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    _DefGen_Return,
    ensureDeferred,
    inlineCallbacks,
    succeed,
)
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.trial.unittest import SynchronousTestCase

from tests.unit._fakes import EngineTestCase
from twistedcelery.errors import (
    NotSent,
    OutcomeUnknown,
    Refused,
    ResultLost,
    ResultNotKept,
    ResultTimeout,
    ServerUnreachable,
    Stopped,
)
from twistedcelery.results import PredicateDeferred


class TaskDeferredTests(EngineTestCase):
    def call(self, **options):
        return self.tx.send_task("t", task_id="a", **options)

    def test_value(self):
        """A call fires with its value; its ``when_sent`` with the confirm."""
        self.up()
        calling = self.call()
        sent = calling.when_sent()
        self.assertNoResult(sent)
        self.confirm()
        self.assertIsNone(self.successResultOf(sent))
        self.assertNoResult(calling)
        self.source.bring("a", result=5)
        self.assertEqual(self.successResultOf(calling), 5)
        self.assert_empty()

    def test_result_before_the_confirm(self):
        """A result that comes before the confirm settles both; what the confirm says then does not matter."""
        self.up()
        calling = self.call()
        sent = calling.when_sent()
        self.source.bring("a", result=5)
        self.assertIsNone(self.successResultOf(sent))
        self.assertEqual(self.successResultOf(calling), 5)
        self.broker.lose()
        self.assert_empty()

    def test_send_failure(self):
        """A call that cannot be sent fails once, and so does whoever waits for its result otherwise, then and later."""
        calling = self.call()
        sent, getting = calling.when_sent(), calling.get()
        self.broker.fail()
        self.turn(1)
        self.turn(1)
        for failed in (
            sent,
            getting,
            calling,
            calling.when_sent(),
            calling.get(),
            calling.async_result.get(),
        ):
            self.failureResultOf(failed, NotSent)
        self.assert_empty()

    def test_outcome_unknown(self):
        """A call whose outcome is unknown fails; its result may be waited for all the same."""
        self.up()
        calling = self.call(retry=False)
        self.broker.lose()
        self.failureResultOf(calling, OutcomeUnknown)
        getting = calling.get()
        self.source.bring("a", result=5)
        self.assertEqual(self.successResultOf(getting), 5)

    def test_refused(self):
        """A call that the broker refuses fails with its words."""
        self.up()
        calling = self.call()
        self.broker.outcome(self.broker.published[0], Refused("406 no", code=406))
        self.assertEqual(self.failureResultOf(calling, Refused).value.task_id, "a")
        self.assert_empty()

    def test_cancel_before(self):
        """Cancelling withdraws a call that has not left; whoever else waits for it is told."""
        calling = self.call()
        sent, getting = calling.when_sent(), calling.get()
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        self.failureResultOf(sent, CancelledError)
        self.failureResultOf(getting, NotSent)
        self.up()
        self.assertEqual(self.broker.published, [])
        self.assert_empty()

    def test_cancel_after(self):
        """Cancelling only stops the waiting of a call that has left; other waits go on."""
        self.up()
        calling = self.call()
        getting = calling.get()
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        self.confirm()
        self.source.bring("a", result=5)
        self.assertEqual(self.successResultOf(getting), 5)
        self.assert_empty()

    def test_revoke_on_cancel(self):
        """``revoke_on_cancel`` revokes what has left, and nothing that has not."""
        withdrawn = self.call(revoke_on_cancel=True)
        withdrawn.cancel()
        self.failureResultOf(withdrawn, CancelledError)
        self.up()
        self.assertEqual(self.broker.published, [])
        calling = self.call(revoke_on_cancel=True)
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        self.turn()
        self.assertIn(b"revoke", self.broker.published[-1].body)
        self.confirm()
        self.assert_empty()

    def test_cancel_while_stopping(self):
        """A cancellation that would revoke fires the Deferred also while the service stops."""
        self.up()
        calling = self.call(revoke_on_cancel=True)
        stopping = self.tx.stopService()
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        self.assertEqual(len(self.flushLoggedErrors(Stopped)), 1)
        self.confirm()
        self.successResultOf(stopping)

    def test_add_timeout(self):
        """``addTimeout`` works as on any Deferred and leaves nothing."""
        self.up()
        calling = self.call().addTimeout(3, self.reactor)
        self.confirm()
        self.turn(3)
        self.failureResultOf(calling, DeferredTimeout)
        self.assert_empty()

    def test_when_sent_is_enough(self):
        """An error that ``when_sent`` has told is not logged once more where the call is dropped; else it is, once."""
        for early in (True, False):
            kept: list[Any] = []
            for _ in range(2):
                calling = self.tx.send_task("t", retry=False)
                sent = calling.when_sent() if early else None
                self.broker.fail()
                self.turn()
                self.failureResultOf(sent or calling.when_sent(), NotSent)
                kept.append(calling)
            # Whoever looks has it all the same.
            self.failureResultOf(kept.pop(), NotSent)
            del calling, sent, kept
            gc.collect()
            self.assertEqual(self.flushLoggedErrors(), [])
        # What becomes of it in a callback is another matter.
        calling = self.tx.send_task("t", retry=False)
        calling.addErrback(lambda _: 1 / 0)
        sent = calling.when_sent()
        self.broker.fail()
        self.turn()
        self.failureResultOf(sent, NotSent)
        self.failureResultOf(calling.when_sent(), NotSent)
        del calling, sent
        gc.collect()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.tx.send_task("t", retry=False)
        self.broker.fail()
        self.turn()
        gc.collect()
        self.assertEqual(len(self.flushLoggedErrors(NotSent)), 1)

    def test_when_sent_is_fresh(self):
        """Each ``when_sent`` is its own: one can be cancelled, also from a callback of another."""
        self.up()
        calling = self.call()
        waits = [calling.when_sent() for _ in range(3)]
        waits[0].addCallback(lambda _: waits[1].cancel())
        self.confirm()
        self.successResultOf(waits[0])
        self.failureResultOf(waits[1], CancelledError)
        self.successResultOf(waits[2])

    def test_ignored(self):
        """A call without a result fires with the confirm, and has none to ask for."""
        self.up()
        calling = self.call(ignore_result=True)
        self.assertEqual(self.source.watched, set())
        self.confirm()
        self.assertIsNone(self.successResultOf(calling))
        self.failureResultOf(calling.get(), ResultNotKept)
        self.assert_empty()

    def test_dropped(self):
        """A call that is dropped leaves the table when somebody comes by; not before it is sent."""
        self.call()
        gc.collect()
        self.engine._drain()
        self.assertEqual(len(self.engine.waiters), 1)
        self.up()
        self.confirm()
        gc.collect()
        self.source.bring("other")
        self.assert_empty()

    def test_kept(self):
        """Whatever is attached, and however, keeps a call until it fires."""
        self.up()
        got: list[Any] = []

        async def awaiting():
            got.append(await self.tx.send_task("t", task_id="awaited"))

        def attach():
            self.tx.send_task("t", task_id="callback").addCallback(got.append)
            self.tx.send_task("t", task_id="both").addBoth(got.append)
            self.tx.send_task("t", task_id="chained").chainDeferred(Deferred().addCallback(got.append))
            succeed(None).addCallback(lambda _: self.tx.send_task("t", task_id="returned")).addCallback(
                got.append
            )
            ensureDeferred(awaiting())
            self.tx.send_task("t", task_id="timed").addTimeout(60, self.reactor)

        attach()
        self.confirm()
        gc.collect()
        self.engine._drain()
        names = ["callback", "both", "chained", "returned", "awaited", "timed"]
        self.assertEqual(self.source.watched, set(names))
        for name in names:
            self.source.bring(name, result=name)
        self.assertEqual(got, names[:-1])
        self.assert_empty()

    def test_get(self):
        """``get`` on a call and on its handle: fresh, with timeout, without propagation; also once it has fired."""
        self.up()
        calling = self.call()
        self.confirm()
        late, plain, value = calling.get(timeout=1), calling.get(), calling.async_result.get(propagate=False)
        self.turn(1)
        self.failureResultOf(late, ResultTimeout)
        self.source.bring("a", "FAILURE", ValueError("no"), traceback="there")
        self.failureResultOf(calling, ValueError)
        self.failureResultOf(plain, ValueError)
        self.assertIsInstance(self.successResultOf(value), ValueError)
        self.failureResultOf(calling.get(), ValueError)
        self.assertEqual(self.successResultOf(calling.traceback()), "there")
        self.assert_empty()

    def test_attributes(self):
        """A call has its handle's names and no others."""
        calling = self.call()
        self.assertEqual((calling.id, self.successResultOf(calling.state())), ("a", "PENDING"))
        self.assertFalse(hasattr(calling, "result"))
        self.assertRaises(AttributeError, lambda: calling.no_such_name)
        self.assertIn("waiting", repr(calling))
        calling.cancel()
        self.failureResultOf(calling, CancelledError)

    def test_lost(self):
        """Lost results fail what has left, each with an error of its own; what has not left waits on."""
        self.up()
        left = [self.tx.send_task("t", task_id=name) for name in "ab"]
        self.broker.ready = False
        waiting = self.tx.send_task("t", task_id="c")
        self.engine.results_lost(ResultLost("gone", url="amqp://x"))
        errors = [self.failureResultOf(calling, ResultLost).value for calling in left]
        self.assertEqual([error.task_id for error in errors], ["a", "b"])
        self.assertNoResult(waiting)
        self.up()
        self.confirm()
        self.source.bring("c", result=1)
        self.assertEqual(self.successResultOf(waiting), 1)
        self.assert_empty()


class BiggerTests(EngineTestCase):
    def signature(self, name):
        return self.app.signature("t", task_id=name)

    def test_group(self):
        """A group gives its values, and remembers them with each member."""
        self.up()
        calling = self.tx.delay(group(self.signature("a"), self.signature("b")))
        self.assertEqual([member.id for member in calling.results], ["a", "b"])
        self.source.bring("b", result=2)
        self.assertEqual(self.successResultOf(calling.completed_count()), 1)
        self.assertEqual(self.successResultOf(calling.results[1].get()), 2)
        self.source.bring("a", result=1)
        self.assertEqual(self.successResultOf(calling), [1, 2])
        self.assertEqual(self.successResultOf(calling.get()), [1, 2])
        self.assertTrue(self.successResultOf(calling.ready()))
        self.confirm()
        self.assert_empty()

    def test_failing_group(self):
        """A group fails with its first failure, and is not taken as sent before its last message is."""
        self.up()
        calling = self.tx.delay(group(self.signature("a"), self.signature("b")))
        sent = calling.when_sent()
        self.source.bring("b", "FAILURE", ValueError("no"))
        self.failureResultOf(calling, ValueError)
        self.assertNoResult(sent)
        self.confirm()
        self.successResultOf(sent)
        self.assert_empty()

    def test_unsent_group(self):
        """A group that was not sent fails for its members too."""
        calling = self.tx.delay(group(self.signature("a"), self.signature("b")))
        waiting = calling.results[0].get()
        self.broker.fail(_permanent())
        for failed in (calling, waiting, calling.results[1].get(), calling.get()):
            self.failureResultOf(failed, NotSent)
        self.assert_empty()

    def test_group_with_ignored_members(self):
        """Members without a result count as None once the group is sent; there is nothing to ask each of them for."""
        self.up()
        quiet = [self.app.signature("t", task_id=name, ignore_result=True) for name in "bc"]
        mixed = self.tx.delay(group(self.signature("a"), quiet[0]))
        all_quiet = self.tx.delay(group(quiet[1], self.app.signature("t", task_id="d", ignore_result=True)))
        self.assertNoResult(all_quiet)
        self.confirm()
        self.assertEqual(self.successResultOf(all_quiet), [None, None])
        self.source.bring("a", result=1)
        self.assertEqual(self.successResultOf(mixed), [1, None])
        self.assertEqual(self.successResultOf(mixed.get()), [1, None])
        self.failureResultOf(mixed.results[1].get(), ResultNotKept)
        self.assert_empty()

    def test_empty_group(self):
        """An empty group is an empty list."""
        self.up()
        self.assertEqual(self.successResultOf(self.tx.delay(group([]))), [])
        self.assert_empty()

    def test_chain(self):
        """A chain gives its last value, and remembers those before it."""
        self.up()
        calling = self.tx.delay(chain(self.signature("a"), self.signature("b"), self.signature("c")))
        self.assertEqual((calling.id, calling.parent.id, calling.parent.parent.id), ("c", "b", "a"))
        for name in "abc":
            self.source.bring(name, result=name)
        self.assertEqual(self.successResultOf(calling), "c")
        self.assertEqual(self.successResultOf(calling.parent.get()), "b")
        self.assertEqual(self.successResultOf(calling.parent.parent.get()), "a")
        self.assertIsNone(self.successResultOf(calling.when_sent()))
        self.assert_empty()

    def test_failing_chain(self):
        """A failed link fails the chain, for ``get`` as well unless it does not follow the parents."""
        self.up()
        calling = self.tx.delay(chain(self.signature("a"), self.signature("b")))
        following, alone = calling.get(), calling.get(follow_parents=False)
        self.source.bring("a", "FAILURE", ValueError("link"))
        self.failureResultOf(calling, ValueError)
        self.failureResultOf(following, ValueError)
        self.assertNoResult(alone)
        self.failureResultOf(calling.parent.get(), ValueError)
        alone.cancel()
        self.failureResultOf(alone, CancelledError)
        self.assert_empty()

    def test_chain_arrived(self):
        """The first reply of a chain tells that its message has arrived: it is not sent again."""
        self.up()
        calling = self.tx.delay(chain(self.signature("a"), self.signature("b")))
        self.source.bring("a", result=1)
        self.broker.lose()
        self.up()
        self.turn()
        self.assertEqual(self.broker.published, [])
        self.source.bring("b", result=2)
        self.assertEqual(self.successResultOf(calling), 2)


class ToldTests(EngineTestCase):
    """A failure that somebody was told of in another way is not logged where the call is dropped."""

    def call(self, name="a"):
        calling = self.tx.send_task("t", task_id=name)
        self.confirm()
        return calling

    def fail_task(self, *names):
        for name in names:
            self.source.bring(name, "FAILURE", ValueError(name), traceback="there")

    def assert_logged(self, number):
        """So many failed calls were dropped with their errors."""
        gc.collect()
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), number)

    def test_questions(self):
        """The answers that say that the task has failed, whoever gives them."""
        self.up()
        asked: dict[str, Any] = {
            "get": lambda call: self.failureResultOf(call.get(), ValueError),
            "get, of the handle": lambda call: self.failureResultOf(call.async_result.get(), ValueError),
            "get, as a value": lambda call: self.successResultOf(call.get(propagate=False)),
            "failed": lambda call: self.assertTrue(self.successResultOf(call.failed())),
            "successful": lambda call: self.assertFalse(self.successResultOf(call.successful())),
            "info": lambda call: self.assertIsInstance(self.successResultOf(call.info()), ValueError),
            "state": lambda call: self.assertEqual(self.successResultOf(call.state()), "FAILURE"),
            "meta": lambda call: self.successResultOf(call.meta()),
            "traceback": lambda call: self.assertEqual(self.successResultOf(call.traceback()), "there"),
        }
        for name, ask in asked.items():
            calling = self.call(name)
            self.fail_task(name)
            ask(calling)
            del calling
            self.assert_logged(0)
        self.assert_empty()

    def test_asked_before(self):
        """Who waits already when the failure comes."""
        self.up()
        calling = self.call()
        waits = [calling.get(), calling.get(propagate=False)]
        self.fail_task("a")
        self.failureResultOf(waits[0], ValueError)
        self.successResultOf(waits[1])
        del calling, waits
        self.assert_logged(0)

    def test_nobody_is_told(self):
        """What does not say that the task has failed, and whoever asks too early or goes away."""
        self.up()
        calling = self.call()
        self.assertFalse(self.successResultOf(calling.failed()))
        late, gone = calling.get(timeout=1), calling.get()
        self.turn(1)
        gone.cancel()
        self.failureResultOf(late, ResultTimeout)
        self.failureResultOf(gone, CancelledError)
        self.fail_task("a")
        self.assertTrue(self.successResultOf(calling.ready()))
        self.assertTrue(self.successResultOf(calling.exists()))
        del calling
        self.assert_logged(1)
        # Nor is the error of an answer swallowed.
        calling = self.call()
        self.fail_task("a")
        calling.get()
        del calling
        self.assert_logged(1)

    def test_another_error(self):
        """What a callback has made of the failure is logged, and so is a failure that goes on through callbacks added later."""
        self.up()
        calling = self.call()
        calling.addErrback(lambda _: 1 / 0)
        self.fail_task("a")
        self.failureResultOf(calling.get(), ValueError)
        del calling
        gc.collect()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        calling = self.call()
        self.fail_task("a")
        self.failureResultOf(calling.get(), ValueError)
        calling.addCallback(str)
        del calling
        self.assert_logged(1)

    def test_group(self):
        """A group's failure can be told of the group or of the member that has failed."""
        self.up()
        asked: list[Any] = [
            lambda call: self.failureResultOf(call.get(), ValueError),
            lambda call: self.assertTrue(self.successResultOf(call.failed())),
            lambda call: self.failureResultOf(call.results[0].get(), ValueError),
            lambda call: self.successResultOf(ensureDeferred(self.members_of(call))),
        ]
        for number, ask in enumerate([*asked, lambda call: self.successResultOf(call.ready())]):
            names = [f"{number}{name}" for name in "ab"]
            calling = self.tx.delay(group(self.app.signature("t", task_id=name) for name in names))
            self.confirm()
            self.fail_task(names[0])
            self.source.bring(names[1], result=1)
            ask(calling)
            del calling
            self.assert_logged(0 if number < len(asked) else 1)
        self.assert_empty()

    async def members_of(self, calling):
        """Give the members as they end."""
        return [member async for member in calling.as_completed()]

    def test_lost(self):
        """A result that is lost has an error for each who waits; one of them told is enough."""
        self.up()
        for asked in (True, False):
            calling = self.call()
            getting = calling.get() if asked else None
            self.engine.results_lost(ResultLost("gone", url="amqp://x"))
            self.turn()
            if getting is not None:
                self.failureResultOf(getting, ResultLost)
            del calling, getting
            gc.collect()
            self.assertEqual(len(self.flushLoggedErrors(ResultLost)), 0 if asked else 1)
        self.assert_empty()

    def test_not_sent(self):
        """A call that could not be sent, asked before that and after."""
        for early in (True, False):
            calling = self.tx.send_task("t", retry=False)
            getting = calling.get() if early else None
            self.broker.fail()
            self.turn()
            self.failureResultOf(getting or calling.get(), NotSent)
            del calling, getting
            gc.collect()
            self.assertEqual(self.flushLoggedErrors(), [])
        self.assert_empty()

    def test_forgotten(self):
        """A failed call that is dropped leaves nothing behind, told or not."""
        self.up()
        for asked in (True, False):
            calling = self.call()
            self.fail_task("a")
            self.assertEqual(len(self.engine.untold._calls), 2)
            if asked:
                self.successResultOf(calling.info())
            del calling
            self.assert_logged(0 if asked else 1)
            self.assertEqual(self.engine.untold._calls, {})


class ChordTests(EngineTestCase):
    """Chords whose header fails, at every door."""

    def make_app(self) -> Any:
        return Celery("client", broker="amqp://", backend="redis://")

    def call(self, canvas):
        calling = self.tx.delay(canvas)
        while self.source.writes or self.broker.published:
            while self.source.writes:
                self.source.writes.pop()[1](None)
            self.turn()
            self.confirm()
        return calling

    def sign(self, *names):
        return [self.app.signature("t", task_id=name) for name in names]

    def fail_tasks(self, *names):
        for name in names:
            error = ValueError(name) if name.startswith("h") else ChordError("as stored")
            self.source.bring(name, "FAILURE", error, traceback="there")

    def assert_told(self, waiting, kind, text):
        error = self.failureResultOf(waiting).value
        self.assertEqual((type(error), str(error)), (kind, text))

    def test_doors(self):
        """The header is known to the call and its handles, unless they are not to look at what stands before; a bare id knows none."""
        self.up()
        for canvas in (
            chord(self.sign("h1", "h2", "h3"), *self.sign("body")),
            chain(
                *self.sign("a"), chord(self.sign("h1", "h2", "h3"), *self.sign("b")), *self.sign("c", "body")
            ),
        ):
            calling = self.call(canvas)
            handle = calling.async_result

            def ask(handle):
                return (
                    [handle.get()],
                    [handle.get(follow_parents=False), self.tx.AsyncResult("body").get()],
                    [handle.get(propagate=False), handle.get(propagate=False, follow_parents=False)],
                )

            early = ask(calling)
            self.source.bring("a", result=1)
            self.source.bring("h1", result=1)
            self.fail_tasks("h3", "h2")
            for waits in early:
                for waiting in waits:
                    self.assertNoResult(waiting)
            self.fail_tasks("b", "body")
            # Its state can be read again from this backend.
            late = ask(handle)
            self.fail_tasks("body")
            self.assert_told(calling, ValueError, "h2")
            for first, stored, values in (early, late):
                for waiting in first:
                    self.assert_told(waiting, ValueError, "h2")
                for waiting in stored:
                    self.assert_told(waiting, ChordError, "as stored")
                for waiting in values:
                    self.assertEqual(repr(self.successResultOf(waiting)), "ChordError('as stored')")
            self.assertEqual(self.successResultOf(handle.state()), "FAILURE")
            # The same ids again.
            self.engine.waiters.unclaimed.clear()
            self.assert_empty()

    def test_group_as_a_body(self):
        """A body that is a group: whether its members get states or not, early and late."""
        self.up()
        for states in (True, False):
            calling = self.call(chord(self.sign("h1", "h2"), group(self.sign("b1", "b2"))))
            early = [calling.get(), calling.async_result.get()]
            self.fail_tasks("h2", "h1")
            self.assertNoResult(calling)
            if states:
                self.source.bring("b1", "FAILURE", ValueError("h1"))
            else:
                self.turn(1)
            late = [calling.get(), calling.async_result.get()]
            self.turn(1)
            for waiting in [calling, *early, *late]:
                self.assert_told(waiting, ValueError, "h1")
        self.assert_empty()

    def test_group_of_chords(self):
        """A group gives what its members' workers store; the member itself is told more."""
        self.up()
        calling = self.call(group(*self.sign("a"), chord(self.sign("h1"), *self.sign("body"))))
        member = calling.results[1].get()
        self.fail_tasks("h1", "body")
        self.assert_told(calling, ChordError, "as stored")
        self.assert_told(member, ValueError, "h1")
        self.assert_told(calling.results[1].get(), ValueError, "h1")
        self.assert_empty()

    def test_ignored_member(self):
        """A member that keeps no result counts as one that has succeeded, and holds up nothing."""
        self.up()
        quiet = self.app.signature("t", task_id="h0", ignore_result=True)
        calling = self.call(chord([quiet, *self.sign("h1")], *self.sign("body")))
        waiting = calling.get()
        self.fail_tasks("h1")
        self.turn(1)
        for told in (calling, waiting):
            self.assert_told(told, ValueError, "h1")
        again = calling.get()
        self.turn(1)
        self.assert_told(again, ValueError, "h1")
        self.assert_empty()

    def test_no_state_of_the_body(self):
        """The body's state does not come: the call ends all the same, and tells the same later on."""
        self.up()
        calling = self.call(chord(self.sign("h1", "h2"), *self.sign("body")))
        value = calling.get(propagate=False)
        self.source.bring("h1")
        self.fail_tasks("h2")
        self.turn(1)
        self.assert_told(calling, ValueError, "h2")
        self.assertEqual(
            repr(self.successResultOf(value)), """ChordError("Dependency h2 raised ValueError('h2')")"""
        )
        again = calling.get()
        self.turn(1)
        self.assert_told(again, ValueError, "h2")
        self.assert_empty()


def _permanent():
    error = ServerUnreachable("no use")
    error.permanent = True
    return error


@inlineCallbacks
def yielding(waiting):
    try:
        yield waiting
    except Exception as error:  # noqa: BLE001  # whatever is raised there
        return error


async def awaiting(waiting):
    try:
        await waiting
    except Exception as error:  # noqa: BLE001  # as above
        return error


class ControlFlowTests(EngineTestCase):
    def test_raised_where_it_is_waited_for(self):
        """What would end a coroutine, or leave it waiting, is raised in it as another error of that name."""
        self.up()
        for stored in (StopIteration, _DefGen_Return, CancelledError, GeneratorExit):
            for wait in (yielding, lambda waiting: ensureDeferred(awaiting(waiting))):
                one = self.tx.send_task("t", task_id="a")
                both = self.tx.delay(group(self.app.signature("t", task_id=name) for name in "bc"))
                found = [wait(waiting) for waiting in (one.get(), one, both.get(), both)]
                for name in "abc":
                    self.source.bring(name, "FAILURE", stored("why"))
                found += [wait(one.get()), wait(both.get())]
                for waiting in found:
                    error = self.successResultOf(waiting)
                    self.assertEqual((type(error).__name__, str(error)), (stored.__name__, "why"))
                    self.assertNotIsInstance(error, stored)
        self.confirm()
        self.assert_empty()


class PredicateTests(SynchronousTestCase):
    def test_truth(self):
        """The Deferred of a question is no answer."""
        self.assertRaises(TypeError, bool, PredicateDeferred())


class ForgetTests(EngineTestCase):
    """What becomes of calls whose result is forgotten before it has come."""

    settings = {"result_timeout": 60.0}  # noqa: RUF012  # never changed

    def call(self, **options: Any) -> Any:
        return self.tx.send_task("t", task_id="a", **options)

    def test_pending(self):
        """A call that is forgotten fails, and whoever asks for its result; nothing of it is watched any more."""
        self.up()
        calling = self.call()
        self.confirm()
        getting, other = calling.get(), self.tx.AsyncResult("a").get()
        self.assertIsNone(self.successResultOf(calling.forget()))
        for failing in (calling, getting, other):
            error = self.failureResultOf(failing, ResultNotKept).value
            self.assertIn("forget()", str(error))
        self.assertEqual(self.source.forgotten, ["a"])
        self.assert_empty()
        # What comes late is somebody else's to take.
        again = calling.get()
        self.source.bring("a", result=5)
        self.assertEqual(self.successResultOf(again), 5)
        self.assert_empty()

    def test_before_it_is_sent(self):
        """Whether the call is sent comes first: it fails with that where it is not."""
        calling = self.call()
        self.successResultOf(calling.forget())
        self.assertNoResult(calling)
        self.assertEqual(self.source.watched, set())
        sent = calling.when_sent()
        self.up()
        self.confirm()
        self.assertIsNone(self.successResultOf(sent))
        self.failureResultOf(calling, ResultNotKept)
        calling = self.call()
        self.successResultOf(calling.async_result.forget())
        self.broker.outcome(self.broker.published[0], Refused("406 no"))
        self.failureResultOf(calling, Refused)
        calling = self.call()
        self.successResultOf(calling.forget())
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        self.confirm()
        self.assert_empty()

    def test_nothing_attached(self):
        """A call on which nothing hangs is not logged when it is dropped; what is attached before that gets the error."""
        self.up()
        for attach in (False, True):
            for sent_first in (False, True):
                calling = self.call()
                if sent_first:
                    self.confirm()
                self.successResultOf(calling.forget())
                self.confirm()
                if attach:
                    self.failureResultOf(calling, ResultNotKept)
                del calling
                gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])
        calling = self.call().addCallback(lambda _: None)
        self.confirm()
        self.successResultOf(calling.forget())
        del calling
        gc.collect()
        self.assertEqual(len(self.flushLoggedErrors(ResultNotKept)), 1)
        self.assert_empty()

    def test_bigger(self):
        """A group fails where a member of it is forgotten; a chain goes on where only a parent is, and sees that fail."""
        self.up()
        one = self.app.signature("t")
        for forget in (lambda calling: calling, lambda calling: calling.results[1]):
            calling = self.tx.delay(group(one, one, one))
            self.confirm()
            self.successResultOf(forget(calling).forget())
            self.failureResultOf(calling, ResultNotKept)
            self.assert_empty()
        calling = self.tx.delay(chain(one, one))
        self.confirm()
        parent = calling.parent
        self.successResultOf(parent.forget())
        self.assertNoResult(calling)
        self.source.bring(parent.id, "FAILURE", ValueError("no"))
        self.failureResultOf(calling, ValueError)
        calling = self.tx.delay(chain(one, one))
        self.confirm()
        self.successResultOf(calling.forget())
        self.failureResultOf(calling, ResultNotKept)
        self.assert_empty()
