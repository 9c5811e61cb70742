"""Two things that happen at once: a result and a reconnect, a cancel within a cancel, two calls of one id, a stop without time."""

from __future__ import annotations

from typing import Any

import celery
from celery import Celery, Task, group, signals
from twisted.internet.defer import CancelledError, Deferred

from tests.unit._fakes import EngineTestCase
from tests.unit.test_dropin import DropinTestCase
from twistedcelery.errors import AuthenticationFailed, NotSent, OutboxFull
from twistedcelery.results import AsyncResult, GroupResult
from twistedcelery.signals import task_publish_failed


def heard(deferred: Deferred[Any]) -> list[Any]:
    """Take down what a Deferred fires with."""
    found: list[Any] = []
    deferred.addBoth(found.append)
    return found


class Groups(EngineTestCase):
    def test_result_before_the_last_message(self):
        """What one member has given says nothing of another's message, which was lost and leaves again."""
        self.up()
        found = heard(self.tx.delay(group(self.app.signature("t", (number,)) for number in range(3))))
        first, second, third = self.broker.published
        self.broker.outcome(first, None)
        self.broker.outcome(second, None)
        self.broker.lose()
        self.broker.undeclared.add(third.routing_key)
        self.broker.up()
        self.turn()
        self.source.bring(first.task_id, result=0)
        self.source.bring(second.task_id, result=1)
        (declared,) = self.broker.declaring
        declared(None)
        self.turn(1)
        self.assertEqual([message.task_id for message in self.broker.published], [third.task_id])
        self.source.bring(third.task_id, result=2)
        self.confirm()
        self.assertEqual(found, [[0, 1, 2]])
        self.assert_empty()


class SameId(EngineTestCase):
    settings = {"outbox_limit": 1}  # noqa: RUF012  # never changed

    def test_other_call(self):
        """A call that is cancelled, or refused, takes no other with it that has the same id and is on its way."""
        first = heard(self.tx.send_task("t", task_id="same"))
        second = self.tx.send_task("t", task_id="same")
        self.failureResultOf(second, OutboxFull)
        self.assertEqual((first, self.engine.outbox.count), ([], 1))
        self.up()
        self.source.bring("same", result=7)
        self.confirm()
        self.assertEqual(first, [7])
        self.assert_empty()

    def test_cancelled(self):
        """The same where the other is cancelled before it left."""
        self.engine.outbox._limit = 10
        first = heard(self.tx.send_task("t", task_id="same"))
        second = self.tx.send_task("t", task_id="same")
        second.cancel()
        self.failureResultOf(second, CancelledError)
        self.assertEqual(first, [])
        self.up()
        self.source.bring("same", result=7)
        self.confirm()
        self.assertEqual(first, [7])
        self.assert_empty()


class CancelledTwice(EngineTestCase):
    settings = {"revoke_on_cancel": True}  # noqa: RUF012  # never changed

    def test_no_order(self):
        """A call that has never left is not revoked, by whoever cancels it once more as he is told."""
        calling = self.tx.send_task("t")
        calling.when_sent().addErrback(lambda _: calling.cancel())
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        self.assertEqual(self.engine.outbox.count, 0)
        failing = self.tx.send_task("t")
        failing.get().addErrback(lambda _: failing.cancel())
        self.broker.fail(AuthenticationFailed("no"))
        self.turn()
        self.failureResultOf(failing, CancelledError, NotSent)
        self.assertEqual(self.engine.outbox.count, 0)
        self.assert_empty()


class CancelledInTheMiddle(DropinTestCase):
    def test_group(self):
        """Who is told that a member was cancelled may cancel another, or the group: all of them end."""
        for other in (lambda called: called.results[1].cancel(), lambda called: called.cancel()):
            called = group(self.t.s(number) for number in range(3)).apply_async()
            found = heard(called)
            called.results[1].addErrback(lambda _: None)
            called.results[2].when_sent().addErrback(lambda _, other=other, called=called: other(called))
            called.cancel()
            (failure,) = found
            failure.trap(CancelledError)
            self.assertEqual(self.engine.outbox.count, 0)
            del called, failure
            found.clear()
        self.tidy()


class NoTime(EngineTestCase):
    settings = {"stop_timeout": 0}  # noqa: RUF012  # never changed

    def test_stop(self):
        """A stop that may take no time stops all the same, on a clock that goes on."""
        self.broker.fail()
        calling = self.tx.send_task("t")
        seconds = self.reactor.seconds

        def ticking():
            self.reactor.rightNow += 1e-6
            return seconds()

        call_later = self.reactor.callLater

        def strictly(delay, *call):
            # As every reactor has it, but not this clock.
            self.assertGreaterEqual(delay, 0)
            return call_later(delay, *call)

        self.reactor.seconds, self.reactor.callLater = ticking, strictly
        stopped = self.tx.stopService()
        for _ in range(5):
            self.reactor.advance(0.1)
        self.successResultOf(stopped)
        self.failureResultOf(calling, NotSent)
        self.assertIsNotNone(self.broker.stopped)
        self.assertIsNotNone(self.source.stopped)


def nothing() -> None:
    """What a task does here."""


class Sends(Task):
    """A task whose own ``apply_async`` sends, and returns something else."""

    gives: Any

    def apply_async(self, *args: Any, **options: Any) -> Any:
        super().apply_async(*args, **options)
        return self.gives


class Told(EngineTestCase):
    """Each message has one end: it was sent, or it was not."""

    def setUp(self):
        super().setUp()
        self.ends: list[Any] = []

        def sent(sender=None, **named: Any) -> None:
            self.ends.append((sender, None))

        def failed(sender=None, exception=None, **named: Any) -> None:
            self.ends.append((sender, type(exception)))

        for signal, receiver in ((signals.after_task_publish, sent), (task_publish_failed, failed)):
            signal.connect(receiver, weak=False)
            self.addCleanup(signal.disconnect, receiver)

    def test_another_deferred(self):
        """A call that cannot be made because of what the task's own apply_async has returned."""
        task = self.app.task(name="t", base=Sends, shared=False)(nothing)
        task.gives = Deferred()
        self.assertRaises(TypeError, self.tx.delay, task)
        self.assertEqual(self.ends, [("t", TypeError)])

    def test_value_of_a_call_that_was_not_sent(self):
        """A value that was there is not given where the message could not be sent, by no name."""
        task = self.app.task(name="t", base=Sends, shared=False)(nothing)
        task.gives = {"value": 1}
        calling = self.tx.delay(task)
        self.broker.fail(AuthenticationFailed("no"))
        self.turn()
        for asked in (calling, calling.get(), calling.state()):
            self.failureResultOf(asked, NotSent)
        self.assertEqual(self.ends, [("t", NotSent)])

    def test_another_app(self):
        """A message of another app, which a wrapper sends meanwhile, is told of at once, whatever becomes of ours."""
        other = Celery("other", broker="memory://", set_as_current=False)
        send = self.app.amqp.send_task_message

        def wrapper(producer: Any, name: str, message: Any, **options: Any) -> Any:
            found = send(producer, name, message, **options)
            other.send_task("audit")
            return found

        self.app.amqp.send_task_message = wrapper
        calling = self.tx.send_task("t")
        self.assertEqual(self.ends, [("audit", None)])
        self.broker.fail(AuthenticationFailed("no"))
        self.turn()
        self.failureResultOf(calling, NotSent)
        self.assertEqual(self.ends, [("audit", None), ("t", NotSent)])


class ResultClass(DropinTestCase):
    def test_raises(self):
        """A ``result_cls`` that cannot make a result: nothing is sent, and whoever listens is told."""
        ends: list[Any] = []

        def failed(task_id=None, exception=None, **named: Any) -> None:
            ends.append(type(exception))

        task_publish_failed.connect(failed)
        self.addCleanup(task_publish_failed.disconnect, failed)
        self.assertRaises(AttributeError, self.app.send_task, "t", result_cls=lambda task_id: task_id)
        self.assertEqual(ends, [AttributeError])
        self.assertEqual(self.engine.outbox.count, 0)


class AfterTheStop(EngineTestCase):
    def test_known_failure(self):
        """A failure that is known is given after the stop, also behind a header that would be looked at before."""
        header = GroupResult(self.engine, "header", [AsyncResult(self.engine, "member")])
        body = AsyncResult(self.engine, "body", header)
        body._remember(
            {
                "task_id": "body",
                "status": celery.states.FAILURE,
                "result": ValueError("no"),
                "traceback": None,
            }
        )
        self.successResultOf(self.tx.stopService())
        self.failureResultOf(body.get(), ValueError)
