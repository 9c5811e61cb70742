"""The drop-in's results, on a broker and a result source that are fakes."""

from __future__ import annotations

import gc
import sys
from functools import reduce
from threading import Thread
from typing import Any

from celery import Celery as StockCelery
from celery import Task, chain, chord, group
from celery.app.control import Control as CeleryControl
from celery.backends.rpc import RPCBackend
from celery.exceptions import ChordError
from celery.result import AsyncResult, EagerResult, GroupResult, ResultSet
from kombu.messaging import Producer
from twisted.internet.defer import CancelledError, Deferred, _DefGen_Return, ensureDeferred, maybeDeferred
from twisted.logger import LogLevel, capturedLogs, formatEvent

from tests.unit._fakes import EngineTestCase
from twistedcelery import Celery
from twistedcelery._ancestry import line_of
from twistedcelery.errors import (
    NotSent,
    OutcomeUnknown,
    Refused,
    ResultNotKept,
    ResultTimeout,
    Stopped,
    WouldBlock,
    WrongThread,
)


class DropinTestCase(EngineTestCase):
    """Tests with an app of the drop-in; it has a task ``t``."""

    def make_app(self) -> Any:
        app = Celery("client", broker="amqp://", backend="rpc://" if self.with_source else None)
        app.twisted_calls = True
        return app

    def make_tx(self) -> Any:
        self.app.twisted_settings = {"reactor": self.reactor, **self.settings}

        @self.app.task(name="t", shared=False)
        def t(*args):
            return args

        self.t: Any = t
        return self.app.twisted

    def value_of(self, deferred: Any) -> Any:
        """Give the value of what has all that it needs: what hangs on it late fires a turn later."""
        found: list[Any] = []
        deferred.addBoth(found.append)
        self.turn()
        self.assertEqual(len(found), 1, f"{deferred!r} has not fired")
        return found[0]

    def error_of(self, deferred: Any, kind: type[BaseException]) -> Any:
        """Give the error of what has failed with it."""
        failure = self.value_of(deferred)
        failure.trap(kind)
        return failure.value

    def tidy(self) -> None:
        """Nothing is left, once nobody holds the results."""
        gc.collect()
        self.assert_empty()


class Results(DropinTestCase):
    def test_kinds(self):
        """Whatever calls gives a Deferred that is a result of Celery's as well."""
        self.up()
        canvases: list[Any] = [
            self.t.delay(),
            self.t.apply_async(),
            self.t.s(1).delay(),
            self.t.s(1).apply_async(),
            self.app.send_task("t"),
            chain(self.t.s(1), self.t.s()).delay(),
            (self.t.s(1) | self.t.s()).apply_async(),
            self.t.map([1, 2]).apply_async(),
        ]
        for calling in canvases:
            self.assertIsInstance(calling, Deferred)
            self.assertIsInstance(calling, AsyncResult)
        calling = group(self.t.s(1), self.t.s(2)).delay()
        self.assertIsInstance(calling, Deferred)
        self.assertIsInstance(calling, GroupResult)
        self.confirm()
        for task_id in list(self.source.watched):
            self.source.bring(task_id)
        del canvases, calling
        self.tidy()

    def test_value(self):
        """A result fires with its value, whether it comes before something is attached or after."""
        self.up()
        early, late = self.t.apply_async(task_id="early"), self.t.apply_async(task_id="late")
        self.confirm()
        self.source.bring("early", result=1)
        self.assertEqual(
            (early.state, early.ready(), late.state, late.ready()), ("SUCCESS", True, "PENDING", False)
        )
        self.assertEqual(self.value_of(early), 1)
        waiting: list[Any] = []
        late.addCallback(waiting.append)
        self.source.bring("late", "PROGRESS", {"done": 1})
        self.assertEqual((late.state, late.info), ("PROGRESS", {"done": 1}))
        self.source.bring("late", result=2, children=[[["child", None], None]])
        self.assertEqual(waiting, [2])
        self.assertEqual([child.id for child in late.children], ["child"])
        self.tidy()

    def test_awaited_late(self):
        """What has arrived by the time that a coroutine awaits it is what the coroutine gets."""

        async def value(awaited):
            return await awaited

        self.up()
        single = self.t.apply_async(task_id="a")
        many = group(self.t.s(1), self.t.s(2)).apply_async()
        chained = group(chain(self.t.s(1), self.t.s(2)), self.t.s(3)).apply_async()
        self.confirm()
        for task_id in list(self.source.watched):
            self.source.bring(task_id, result=task_id)
        empty = group([]).apply_async()
        ids = ["a", [one.id for one in many], [one.id for one in chained], []]
        calls = (single, many, chained, empty)
        self.assertEqual([self.value_of(ensureDeferred(value(one))) for one in calls], ids)
        del single, many, chained, empty, calls
        self.tidy()

    def test_attached_while_beginning(self):
        """A callback may be attached from within what attaching the first one sets off."""
        self.up()
        many = group(self.t.s(1), self.t.s(2)).apply_async()
        told: list[Any] = []

        def again(_):
            many.addCallback(told.append)

        many.when_sent().addCallback(again)
        many.addCallback(told.append)
        self.confirm()
        for task_id in list(self.source.watched):
            self.source.bring(task_id, result=1)
        self.turn()
        self.assertEqual(told, [[1, 1], None])

    def test_changed_group(self):
        """A group's names answer for the members that it has, also for one that has been added."""
        self.up()
        many = group(self.t.s(1), self.t.s(2)).apply_async()
        self.assertEqual(len(many.async_result.results), 2)
        same = many.async_result
        self.assertIs(many.async_result, same)
        many.add(self.t.apply_async(task_id="third"))
        getting = many.get()
        self.confirm()
        for task_id in list(self.source.watched):
            self.source.bring(task_id, result=1)
        self.assertEqual(self.value_of(getting), [1, 1, 1])
        many.clear()
        self.assertEqual(self.value_of(many.get()), [])
        self.assertIn("as_completed", str(self.assertRaises(WouldBlock, many.iter_native)))

    def test_children(self):
        """Children are results of the app, too; the last of them all has a value of its own."""
        self.up()
        calling = self.t.apply_async(task_id="a")
        leaf = calling.get_leaf()
        self.confirm()
        self.source.bring("a", result=1, children=[[["child", None], None]])
        (child,) = calling.children
        self.assertIsInstance(child, self.app.AsyncResult)
        self.assertRaises(WouldBlock, child.ready)
        self.source.bring("child", result=2)
        self.assertEqual((self.value_of(child), self.value_of(leaf)), (2, 2))
        del calling, child
        self.tidy()

    def test_long_chain(self):
        """A chain may have more links than Python allows calls within calls."""
        self.up()
        limit = sys.getrecursionlimit()
        last = reduce(
            lambda parent, number: self.app.AsyncResult(str(number), parent=parent), range(limit), None
        )
        handle = last.async_result
        self.assertEqual((handle.id, handle.parent.id), (str(limit - 1), str(limit - 2)))
        stored: Any = None
        for number in range(limit):
            stored = ((str(number), stored), None)
        for other in (self.tx.engine.handle_of(last), self.tx.engine.handle_of_tuple(stored)):
            self.assertEqual(len(line_of(other, GroupResult)), limit - 1)
            other._remember({"task_id": "0", "status": "SUCCESS", "result": 1, "traceback": None})
            self.assertEqual(self.successResultOf(other.forget()), None)
            other._refuse(NotSent("not"))

    def test_wrong_thread(self):
        """What a result would have to wait for is refused in other threads."""
        self.up()
        calling = self.t.apply_async(task_id="a")
        self.confirm()
        self.source.bring("a", result=1)
        waiting = self.t.apply_async(task_id="b")
        raised: list[Any] = []

        def call(ask):
            with self.assertRaises(WrongThread) as caught:
                ask()
            raised.append(caught.exception)

        for ask in (calling.get, waiting.get, waiting.cancel):
            thread = Thread(target=call, args=(ask,))
            thread.start()
            thread.join()
        self.assertEqual(len(raised), 3)
        self.confirm()
        self.source.bring("b", result=2)
        self.assertEqual(self.value_of(waiting), 2)

    def test_when_sent_is_enough(self):
        """An error that ``when_sent`` has told is not logged once more where the result is dropped; else it is, for each message."""
        for canvas, asked, logs in (
            (group(self.t.s(1), self.t.s(2)), "before", 0),
            (self.t.s(1), "before", 0),
            (self.t.s(1), "after", 0),
            (self.t.s(1), "never", 1),
            (group(self.t.s(1), self.t.s(2)), "never", 2),
        ):
            with capturedLogs() as logged:
                calling = canvas.apply_async(retry=False)
                sent = calling.when_sent() if asked == "before" else None
                self.broker.fail()
                self.turn()
                if asked == "after":
                    sent = calling.when_sent()
                if sent is not None:
                    self.failureResultOf(sent, NotSent)
                del calling, sent
                gc.collect()
            errors = [one for one in logged if one["log_level"] > LogLevel.warn]
            self.assertEqual(len(errors), logs, errors)

    def test_own_result(self):
        """``result`` is the Deferred's own attribute: absent until it fires."""
        self.up()
        calling = self.t.apply_async(task_id="a")
        self.assertFalse(hasattr(calling, "result"))
        error = self.assertRaises(AttributeError, lambda: calling.result)
        self.assertIn("info", str(error))
        calling.addCallback(lambda value: value + 1)
        self.source.bring("a", result=1)
        self.assertEqual(calling.result, 2)

    def test_state_of_others(self):
        """The state of a task that this process has not called would have to be asked for."""
        self.up()
        foreign = self.app.AsyncResult("foreign")
        for name in ("state", "info", "children", "traceback"):
            said = str(self.assertRaises(WouldBlock, getattr, foreign, name))
            self.assertIn("async_result", said)
        self.assertRaises(WouldBlock, foreign.ready)
        self.assertEqual(self.successResultOf(foreign.async_result.state()), "PENDING")
        # Of what it has called it knows.
        last = chain(self.t.s(1), self.t.s()).apply_async()
        self.assertEqual((last.state, last.parent.state), ("PENDING", "PENDING"))
        self.confirm()
        del foreign, last
        self.tidy()

    def test_get(self):
        """``get`` returns a Deferred and takes Celery's arguments in Celery's order, as far as they mean something here."""
        self.up()
        calling = self.t.apply_async(task_id="a")
        failing = self.t.apply_async(task_id="b")
        told: list[Any] = []
        getting = [
            calling.get(),
            calling.get(3, True, 0.1),
            calling.get(callback=lambda task_id, value: told.append((task_id, value))),
            failing.get(propagate=False),
            failing.wait(timeout=3),
        ]
        self.confirm()
        self.source.bring("a", result=1)
        self.source.bring("b", "FAILURE", ValueError("x"))
        values = [self.value_of(one) for one in getting]
        self.assertEqual((values[:3], told), ([1, 1, 1], [("a", 1)]))
        self.assertIsInstance(values[3], ValueError)
        values[4].trap(ValueError)
        for name in ("no_ack", "on_interval"):
            self.assertIn(name, str(self.assertRaises(WouldBlock, calling.get, **{name: print})))
        self.error_of(failing, ValueError)
        self.tidy()

    def test_result_set(self):
        """A ResultSet asks its members in a way that would block, which is said."""
        self.up()
        calling = self.t.apply_async(task_id="a")
        ignored = self.t.apply_async(ignore_result=True)
        several = ResultSet([calling, ignored], app=self.app)
        self.assertRaises(WouldBlock, several.get)
        several.discard(ignored)
        # Its then() is called.
        told: list[Any] = []
        kept = ResultSet([calling], app=self.app)
        kept.then(told.append)
        self.confirm()
        self.source.bring("a", result=1)
        self.assertEqual(told, [kept])

    def test_then(self):
        """``then`` is called with the result once it is ready; what it raises is logged, or given to ``on_error``."""
        self.up()
        told: list[Any] = []
        calling = self.t.apply_async(task_id="a")
        calling.then(lambda result: told.append((result.id, result.state)))
        calling.then(lambda _: 1 / 0)
        calling.then(lambda _: 1 / 0, on_error=told.append)
        self.confirm()
        self.source.bring("a", result=1)
        self.turn()
        self.assertEqual(told[0], ("a", "SUCCESS"))
        told[1].trap(ZeroDivisionError)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.tidy()

    def test_throw(self):
        """``throw`` raises what it is given, as Celery calls it and as a coroutine does."""
        self.up()
        calling = self.t.apply_async(task_id="a")
        error = ValueError("x")
        for arguments in ((error,), (error, "traceback"), (ValueError, error, None)):
            self.assertIs(self.assertRaises(ValueError, calling.throw, *arguments), error)
        self.assertRaises(ValueError, calling.throw, ValueError)

    def test_group(self):
        """A group fires with the list; ``join`` tells its callback of each member instead, as Celery has it."""
        self.up()
        calling = group(self.t.s(1), self.t.s(2)).apply_async()
        told: list[Any] = []
        joining = calling.join(callback=lambda task_id, value: told.append((task_id, value)))
        ids = [member.id for member in calling.results]
        self.confirm()
        for number, task_id in enumerate(ids):
            self.source.bring(task_id, result=number)
        self.assertEqual(self.value_of(joining), [])
        self.assertEqual(told, [(ids[0], 0), (ids[1], 1)])
        self.assertEqual(self.value_of(calling), [0, 1])
        self.assertEqual((calling.ready(), calling.completed_count()), (True, 2))
        del calling, joining
        self.tidy()

    def test_ignored(self):
        """A call that ignores its result fires with None once it is confirmed; there is nothing to get."""
        self.up()
        calling = self.t.apply_async(ignore_result=True)
        waiting: list[Any] = []
        calling.addCallback(waiting.append)
        self.turn()
        self.assertEqual(waiting, [])
        self.confirm()
        self.assertEqual(waiting, [None])
        self.failureResultOf(calling.get(), ResultNotKept)
        self.tidy()

    def test_same_id_again(self):
        """Whoever waits for an id hears of its result, however often canvas makes an object of it."""
        self.up()
        calling = self.t.apply_async(task_id="a")
        again = self.app.AsyncResult("a")
        self.confirm()
        self.source.bring("a", result=1)
        self.assertEqual((self.value_of(calling), self.value_of(again)), (1, 1))
        self.tidy()

    def test_own_apply_async(self):
        """Results that a task's own ``apply_async`` makes can be awaited as well; other values are what it returns."""
        given: list[Any] = []

        class Own(Task):
            def apply_async(self, *args, **kwargs):
                return given[0]

        @self.app.task(name="own", base=Own, shared=False)
        def own():
            """Its calls are its own affair."""

        # As celery-once gives it for a task that is under way.
        given[:] = [EagerResult(None, None, "REJECTED")]
        calling = own.delay()
        self.assertIsNone(self.value_of(calling))
        self.assertEqual((calling.state, str(calling)), ("REJECTED", calling.id))
        given[:] = [AsyncResult("a", app=StockCelery("other", backend="cache+memory://"))]
        for calling in (own.delay(), own.s().apply_async()):
            self.source.bring("a", result=5)
            self.assertEqual((calling.id, self.value_of(calling)), ("a", 5))
        given[:] = [{"a": 1}]
        self.assertEqual(own.delay(), {"a": 1})
        self.app.twisted_calls = False
        given[:] = [EagerResult(None, None, "REJECTED")]
        self.assertIs(own.delay(), given[0])
        self.app.twisted_calls = True
        del calling
        self.tidy()

    def test_result_class(self):
        """``result_cls`` makes the result, as in stock Celery, and so does a task's own ``AsyncResult``; the call is sent as any other."""
        self.up()
        stock, own = type("Stock", (AsyncResult,), {}), type("Own", (self.app.AsyncResult,), {})
        calling = self.app.send_task("t", task_id="a", result_cls=stock, ignore_result=True)
        self.assertEqual((type(calling), calling.id, calling.ignored), (stock, "a", True))
        positional = [None, None, "b", None, None, None, own]
        calling = self.app.send_task("t", (), {}, *positional)
        self.assertEqual((type(calling), calling.id), (own, "b"))
        self.confirm()
        self.source.bring("b", result=5)
        self.assertEqual(self.value_of(calling), 5)

        class Noted(Task):
            def AsyncResult(self, task_id: str, **kwargs: Any) -> Any:
                result = super().AsyncResult(task_id, **kwargs)
                result.note = "mine"
                return result

        @self.app.task(name="noted", base=Noted, shared=False)
        def noted():
            """Its results carry a note."""

        calling = noted.apply_async(task_id="c")
        self.confirm()
        self.source.bring("c", result=6)
        self.assertEqual((calling.note, self.value_of(calling)), ("mine", 6))
        del calling
        self.tidy()
        self.app.send_task("t", result_cls=stock)
        with capturedLogs() as logs:
            self.broker.outcome(self.broker.published[0], Refused("406 no"))
            gc.collect()
        self.assertEqual([event["log_level"] for event in logs], [LogLevel.error])
        # Connections are refused wherever they stand; out of scope everything reaches Celery.
        self.assertRaises(TypeError, self.app.send_task, "t", (), {}, None, None, None, None, 5)
        self.app.twisted_calls = False
        error = self.assertRaises(AttributeError, self.app.send_task, "t", result_cls=stock, router=6)
        self.assertIn("route", str(error))
        self.app.twisted_calls = True
        self.tidy()

    def test_forget(self):
        """A call that is forgotten while it is pending fails once it is sent; a chain goes on where only a parent is."""
        self.up()
        calling, waited = self.t.delay(), self.t.delay()
        found: list[Any] = []
        waited.addErrback(lambda failure: found.append(failure.value))
        for one in (calling, waited):
            self.successResultOf(one.forget())
        self.assertEqual((found, self.source.watched), ([], set()))
        self.confirm()
        self.assertIsInstance(found[0], ResultNotKept)
        self.error_of(calling, ResultNotKept)
        calling = self.t.delay()
        self.confirm()
        self.successResultOf(calling.forget())
        self.error_of(calling, ResultNotKept)
        for attached_first in (False, True):
            calling = chain(self.t.s(), self.t.s()).delay()
            self.confirm()
            if attached_first:
                calling.addErrback(found.append)
            self.successResultOf(calling.parent.forget())
            calling.addErrback(found.append)
            self.turn()
            self.source.bring(calling.parent.id, "FAILURE", ValueError("no"))
            self.turn()
            found.pop().trap(ValueError)
        calling = group(self.t.s(), self.t.s()).delay()
        self.confirm()
        self.successResultOf(calling.forget())
        self.error_of(calling, ResultNotKept)
        calling = self.t.delay()
        self.successResultOf(calling.forget())
        self.broker.outcome(self.broker.published[0], Refused("406 no"))
        self.error_of(calling, Refused)
        del calling, waited, one
        found.clear()
        self.tidy()


class ControlFlow(DropinTestCase):
    def test_raised_where_it_is_waited_for(self):
        """What would end a coroutine, or leave it waiting, is raised in it as another error of that name, early and late."""
        self.up()

        async def awaiting(waiting):
            try:
                await waiting
            except Exception as error:  # noqa: BLE001  # whatever is raised there
                return error

        for stored in (StopIteration, _DefGen_Return, CancelledError, GeneratorExit):
            for late in (False, True):
                one = self.t.apply_async(task_id="a")
                both = group(self.t.s().set(task_id="b"), self.t.s().set(task_id="c")).apply_async()
                found = [] if late else [ensureDeferred(awaiting(waiting)) for waiting in (one, both)]
                for name in "abc":
                    self.source.bring(name, "FAILURE", stored("why"))
                waits = [one, both] if late else [one.get(), both.get()]
                found += [ensureDeferred(awaiting(waiting)) for waiting in waits]
                for waiting in found:
                    error = self.value_of(waiting)
                    self.assertEqual((type(error).__name__, str(error)), (stored.__name__, "why"))
                error = self.failureResultOf(maybeDeferred(one.maybe_throw)).value
                self.assertEqual((type(error).__name__, str(error)), (stored.__name__, "why"))
        self.confirm()
        del one, both, found, waits, waiting, error
        self.tidy()


class Chords(DropinTestCase):
    """Chords whose header fails."""

    def make_app(self) -> Any:
        app = Celery("client", broker="amqp://", backend="redis://")
        app.twisted_calls = True
        return app

    def call(self, canvas):
        calling = canvas.apply_async()
        while self.source.writes or self.broker.published:
            while self.source.writes:
                self.source.writes.pop()[1](None)
            self.turn()
            self.confirm()
        return calling

    def sign(self, *names):
        return [self.t.s().set(task_id=name) for name in names]

    def bring(self, *names):
        """Bring what workers store for these: members of the header fail, and the body's with them, unless its states do not come."""
        for name in names:
            if name.startswith("h"):
                self.source.bring(name, "FAILURE", ValueError(name), traceback="there")
            else:
                error = ValueError("h1") if name.startswith("g") else ChordError("as stored")
                self.source.bring(name, "FAILURE", error)

    def test_whenever_awaited(self):
        """The outcome is the same whether it is awaited before the states have come, between, or after, or not all of them come."""
        self.up()
        for names, make in (
            (["b"], lambda: self.sign("b")[0]),
            (["b", "c"], lambda: chain(*self.sign("b", "c"))),
            (["g1", "g2"], lambda: group(*self.sign("g1", "g2"))),
        ):
            for stored in (names, []):
                states = ["h2", "h1", *stored]
                for moment in range(len(states) + 1):
                    calling = self.call(chord(self.sign("h1", "h2"), make()))
                    self.bring(*states[:moment])
                    waits = [ensureDeferred(_awaited(calling)), calling.get(), calling.async_result.get()]
                    self.bring(*states[moment:])
                    self.turn(1)
                    for waiting in [*waits, calling.get()]:
                        self.turn(1)
                        error = self.failureResultOf(waiting, ValueError).value
                        self.assertEqual(str(error), "h1", (names, stored, moment))
                    del calling, waits, waiting, error
                    gc.collect()
                    self.engine.waiters.unclaimed.clear()
        self.tidy()

    def test_ignored_member(self):
        """A member that keeps no result holds up nothing: it counts as one that has succeeded, whenever it is known to be sent."""
        self.up()
        for late in (False, True):
            quiet = self.t.s().set(task_id="h0", ignore_result=True)
            calling = self.call(chord([quiet, *self.sign("h1")], *self.sign("b")))
            waiting = None if late else ensureDeferred(_awaited(calling))
            self.bring("h1")
            waiting = waiting or ensureDeferred(_awaited(calling))
            self.turn(1)
            self.assertEqual(str(self.failureResultOf(waiting, ValueError).value), "h1")
            del calling, waiting
            gc.collect()
            self.engine.waiters.unclaimed.clear()
        self.tidy()

    def test_unreadable_member(self):
        """What cannot be read of a member is told of the whole, also where it came before anybody asked."""
        self.up()
        for make in (
            lambda: group(self.sign("x", "y")),
            lambda: chord(self.sign("x", "h1"), *self.sign("b")),
        ):
            for late in (False, True):
                calling = self.call(make())
                waiting = None if late else ensureDeferred(_awaited(calling))
                self.engine.result_failed("x", ValueError("no result"))
                waiting = waiting or ensureDeferred(_awaited(calling))
                self.turn()
                self.assertEqual(str(self.failureResultOf(waiting, ValueError).value), "no result")
                del calling, waiting
                gc.collect()
        self.tidy()

    def test_a_bare_id(self):
        """A result made from an id knows no header, and ``propagate=False`` gives what is stored."""
        self.up()
        calling = self.call(chord(self.sign("h1"), *self.sign("b")))
        bare = self.app.AsyncResult("b")
        value = calling.get(propagate=False)
        self.bring("h1", "b")
        self.error_of(bare, ChordError)
        self.assertIsInstance(self.value_of(value), ChordError)
        self.assertEqual(str(self.error_of(calling, ValueError)), "h1")
        self.assertEqual((calling.state, type(calling.info)), ("FAILURE", ChordError))
        del calling, bare, value
        self.tidy()


async def _awaited(waiting):
    return await waiting


class Sending(DropinTestCase):
    def test_when_sent(self):
        """It fires once all messages of a call are confirmed."""
        self.up()
        single, many = self.t.delay(), group(self.t.s(1), self.t.s(2)).apply_async()
        linked = chain(self.t.s(1), self.t.s()).apply_async()
        sent = [one.when_sent() for one in (single, many, linked)]
        published = list(self.broker.published)
        self.assertEqual(len(published), 4)
        for message in published[:2]:
            self.broker.outcome(message, None)
        self.assertIsNone(self.successResultOf(sent[0]))
        self.assertNoResult(sent[1])
        for message in published[2:]:
            self.broker.outcome(message, None)
        self.successResultOf(sent[1])
        self.successResultOf(sent[2])
        self.successResultOf(many.when_sent())
        del single, many, linked
        self.tidy()

    def test_not_sent(self):
        """What cannot be sent fails everything that stands for it, then and later."""
        single, many = self.t.delay(), group(self.t.s(1), self.t.s(2)).apply_async()
        linked = chain(self.t.s(1), self.t.s()).apply_async()
        early = [single.get(), many.when_sent(), linked.async_result.get()]
        self.broker.fail()
        self.turn(1)
        for deferred in (
            *early,
            single,
            many,
            linked,
            linked.parent,
            many.results[1],
            linked.get(),
            many.when_sent(),
        ):
            self.error_of(deferred, NotSent)
        self.tidy()

    def test_refused(self):
        """So does what the broker refuses, or what no bytes can be made of."""
        self.up()
        linked = chain(self.t.s(1), self.t.s()).apply_async()
        (message,) = self.broker.published
        self.broker.outcome(message, Refused("no"))
        self.error_of(linked.get(), Refused)
        self.error_of(linked.when_sent(), Refused)
        self.error_of(linked, Refused)
        self.patch(self.broker, "publish", lambda message: "\ud800".encode())
        odd = chain(self.t.s(1), self.t.s()).apply_async()
        self.error_of(odd.get(), UnicodeEncodeError)
        self.error_of(odd, UnicodeEncodeError)
        self.tidy()

    def test_unknown(self):
        """Where nobody knows whether a message has arrived, its result may still come for whoever asks."""
        self.up()
        linked = chain(self.t.s(1), self.t.s()).apply_async(retry=False)
        self.broker.lose()
        self.error_of(linked, OutcomeUnknown)
        getting = linked.get()
        self.source.bring(linked.id, result=1)
        self.assertEqual(self.value_of(getting), 1)
        self.tidy()

    def test_nobody_waited(self):
        """A failure that nobody has waited for is logged, once for each message."""
        with capturedLogs() as events:
            group(self.t.s(1), self.t.s(2)).apply_async()
            self.broker.fail()
            self.turn(1)
            gc.collect()
        said = [formatEvent(event) for event in events if event["log_level"] is LogLevel.error]
        self.assertEqual(len(said), 2)
        self.assertTrue(all("nobody waited for" in one for one in said), said)
        self.tidy()

    def test_told_by_get(self):
        """A failure that ``get()`` has told is not logged: of a call that was not sent, and of one with callbacks but no errback."""
        for early in (True, False):
            with capturedLogs() as events:
                calling = self.t.apply_async(retry=False)
                getting = calling.get() if early else None
                self.broker.fail()
                self.turn()
                self.error_of(getting or calling.get(), NotSent)
                del calling, getting
                gc.collect()
            self.assertEqual([event for event in events if event["log_level"] is LogLevel.error], [])
        self.up()
        calling = self.t.apply_async(task_id="a").addCallback(str)
        self.source.bring("a", "FAILURE", ValueError("no"))
        self.turn()
        self.error_of(calling.get(), ValueError)
        self.confirm()
        del calling
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])
        self.tidy()

    def test_cancel_before(self):
        """Cancelling takes back what has not left; all that it stands for fails."""
        many = group(self.t.s(1), self.t.s(2)).apply_async()
        linked = chain(self.t.s(1), self.t.s()).apply_async()
        sent = many.when_sent()
        for calling in (many, linked):
            calling.addErrback(lambda failure: failure.trap(CancelledError) and None)
            calling.cancel()
        self.failureResultOf(sent, CancelledError)
        self.up()
        self.assertEqual(self.broker.published, [])
        self.error_of(many.results[0], NotSent)
        self.error_of(linked.parent, NotSent)
        self.tidy()

    def test_cancel_after(self):
        """Cancelling what has left stops the waiting; another who waits goes on."""
        self.up()
        calling = self.t.apply_async(task_id="a")
        getting = calling.get()
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        self.confirm()
        self.source.bring("a", result=1)
        self.assertEqual(self.value_of(getting), 1)
        self.tidy()

    def test_order(self):
        """Messages leave in the order of the calls."""
        calls = [self.t.apply_async(args=(number,), task_id=str(number)) for number in range(5)]
        self.up()
        self.assertEqual([message.task_id for message in self.broker.published], [*"01234"])
        self.confirm()
        del calls

    def test_connections(self):
        """Kombu's connections are refused, as is a call after the stop."""
        self.assertRaises(TypeError, self.app.send_task, "t", connection=object())
        self.assertRaises(TypeError, self.app.send_task, "t", producer=object())
        self.successResultOf(self.tx.stopService())
        self.assertRaises(Stopped, self.t.delay)


class Settings(DropinTestCase):
    settings = {"result_timeout": 10, "revoke_on_cancel": True}  # noqa: RUF012  # never changed

    def test_result_timeout(self):
        """``result_timeout`` ends every wait, that of a group and of an end of a chain too."""
        self.up()
        callings = [
            self.t.delay(),
            group(self.t.s(1), self.t.s(2)).apply_async(),
            chain(self.t.s(1), self.t.s()).apply_async(),
        ]
        for calling in callings:
            calling.addErrback(lambda failure: failure.trap(ResultTimeout))
        self.confirm()
        self.turn(10.2)
        self.assertEqual([self.successResultOf(calling) for calling in callings], [ResultTimeout] * 3)
        del callings, calling
        self.tidy()

    def test_revoke_on_cancel(self):
        """Cancelling revokes what may run."""
        self.up()
        calling = self.t.apply_async(task_id="a")
        self.confirm()
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        (order,) = self.broker.published
        self.assertIn(b"revoke", order.body)
        self.assertIn(b'"a"', order.body)
        self.confirm()
        self.tidy()


class WithoutBackend(DropinTestCase):
    with_source = False

    def test_calls(self):
        """Without a result backend everything fires with None once it is sent, and fails where it is not."""
        callings = [
            self.t.delay(),
            chain(self.t.s(1), self.t.s()).apply_async(),
            group(self.t.s(1), self.t.s(2)).apply_async(),
        ]
        found: list[Any] = []
        for calling in callings:
            calling.addBoth(found.append)
        self.turn()
        self.assertEqual(found, [])
        self.up()
        self.confirm()
        self.turn()
        self.assertEqual(found, [None] * 3)
        self.broker.lose()
        last = chain(self.t.s(1), self.t.s()).apply_async()
        self.broker.fail()
        self.turn(1)
        self.error_of(last, NotSent)


class Orders(DropinTestCase):
    def test_revoke(self):
        """Orders return Deferreds that fire with the confirm."""
        self.up()
        calling = self.t.apply_async(task_id="a")
        self.confirm()
        for order, word in (
            (lambda: self.app.control.revoke("a"), b"revoke"),
            (lambda: self.app.control.terminate("a", signal="SIGKILL"), b"SIGKILL"),
            (self.app.control.shutdown, b"shutdown"),
            (lambda: self.app.control.add_consumer("q"), b"add_consumer"),
            (lambda: calling.revoke(terminate=True), b"terminate"),
            (lambda: calling.revoke_by_stamped_headers({"mark": "x"}), b"revoke_by_stamped_headers"),
        ):
            ordered = order()
            self.assertNoResult(ordered)
            self.assertIn(word, self.broker.published[0].body)
            self.confirm()
            self.assertIsNone(self.successResultOf(ordered))

    def test_answers(self):
        """What would wait for answers is refused, and nothing is sent."""
        self.up()
        control: Any = self.app.control
        calling = self.t.apply_async(task_id="a")
        self.confirm()
        for wrong in (
            control.ping,
            control.purge,
            control.discard_all,
            control.inspect().active,
            lambda: control.revoke("a", reply=True),
            lambda: calling.revoke(wait=True),
            lambda: calling.revoke_by_stamped_headers({"mark": "x"}, wait=True),
        ):
            self.assertRaises(WouldBlock, wrong)
        self.assertRaises(TypeError, control.broadcast, "x", connection=object())
        self.assertEqual(self.broker.published, [])


class OutOfScope(DropinTestCase):
    def test_stock(self):
        """Out of scope the app answers as stock Celery does, with the classes and the backend of its own."""
        self.app.twisted_calls = False
        self.assertIs(type(self.app.backend), RPCBackend)
        self.assertNotIsInstance(self.app.AsyncResult("a"), Deferred)
        self.assertNotIsInstance(self.app.GroupResult("a", []), Deferred)
        self.assertIsInstance(self.app.AsyncResult("a"), AsyncResult)
        self.assertNotEqual(self.app.thread_oid, self.engine.reply_to)
        with self.app.producer_or_acquire() as producer:
            self.assertIs(type(producer), self.app.amqp.Producer)
            self.assertIsInstance(producer, Producer)
        self.assertIsInstance(self.app.control, CeleryControl)
        self.app.pool.force_close_all()

    def test_back_and_forth(self):
        """Each scope has its own, at each call."""
        kinds = []
        for scope in (True, False, True):
            self.app.twisted_calls = scope
            kinds.append(
                (isinstance(self.app.AsyncResult("a"), Deferred), self.app.backend is self.engine.backend)
            )
        self.assertEqual(kinds, [(True, True), (False, False), (True, True)])
