"""Calls that are captured in a thread: the order of calls, errors, cancelling, and what can be asked meanwhile."""

from __future__ import annotations

import gc
import io
import sys
from contextvars import ContextVar
from functools import partial
from typing import Any
from uuid import UUID

from celery import Celery, Task, chain, chord, group, signals, signature
from celery.result import AsyncResult, EagerResult
from celery.utils.functional import regen
from kombu.exceptions import EncodeError
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred

from tests.unit._fakes import EngineTestCase
from twistedcelery._ancestry import whole
from twistedcelery.errors import NotSent, OutboxFull, Stopped

WHO: ContextVar[str] = ContextVar("who")


class Threads:
    """A thread pool in the hand of a test."""

    started = False

    def __init__(self):
        self.jobs = []

    def callInThreadWithCallback(self, told: Any, function: Any, *args: Any, **kwargs: Any) -> None:
        """As a `twisted.python.threadpool.ThreadPool`."""
        self.jobs.append((told, function, args, kwargs))

    def run(self):
        """Do what was asked for."""
        jobs, self.jobs = self.jobs, []
        for told, function, args, kwargs in jobs:
            maybeDeferred(function, *args, **kwargs).addCallbacks(partial(told, True), partial(told, False))


class CallingTestCase(EngineTestCase):
    def setUp(self):
        super().setUp()
        self.threads = Threads()
        self.engine.caller._threads = self.threads

    def big(self, name: str = "big", **options: Any) -> Any:
        """Call a task in a thread; its id is its name."""
        return self.tx.send_task(name, task_id=name, in_thread=True, **options)

    def small(self, name: str) -> Any:
        return self.tx.send_task(name, task_id=name)

    @property
    def sent(self) -> list[str]:
        return [message.task_id for message in self.broker.published]

    def bring(self, *names: str) -> None:
        for name in names:
            self.source.bring(name, result=name)

    def members(self, count: int) -> Any:
        return group(signature("t", (number,), app=self.app) for number in range(count))


class Captures(CallingTestCase):
    def test_nothing_called(self):
        """What calls nothing fires with None, and holds nobody."""
        self.up()
        calling = self.tx.apply_async(chain(), in_thread=True)
        self.small("a")
        self.threads.run()
        self.turn()
        self.assertIsNone(self.successResultOf(calling))
        self.assertEqual(self.sent, ["a"])

    def test_order(self):
        """A call in a thread keeps its place among the others."""
        self.up()
        callings = [self.small("a"), self.big("b"), self.small("c"), self.big("d"), self.small("e")]
        self.assertEqual(self.sent, ["a"])
        self.threads.run()
        self.turn()
        self.assertEqual(self.sent, [*"abcde"])
        self.confirm()
        self.bring(*"abcde")
        self.assertEqual([self.successResultOf(calling) for calling in callings], [*"abcde"])
        self.assert_empty()

    def test_group(self):
        """A group fires with the list; its handle has its members once it was put together."""
        self.up()
        calling = self.tx.delay(self.members(60))
        handle = calling.async_result
        error = self.assertRaises(AttributeError, getattr, handle, "results")
        self.assertIn("when_sent", str(error))
        self.assertEqual(handle.id, calling.id)
        sent = calling.when_sent()
        self.threads.run()
        self.turn()
        self.assertEqual(len(self.broker.published), 60)
        self.confirm()
        self.successResultOf(sent)
        ids = [member.id for member in calling.results]
        self.assertEqual([member.id for member in handle.results], ids)
        for number, task_id in enumerate(ids):
            self.source.bring(task_id, result=number)
        self.assertEqual(self.successResultOf(calling), list(range(60)))
        del handle
        self.assert_empty()

    def test_choice(self):
        """The size of a call decides, unless the caller does."""
        self.up()
        items = ["x"] * 10_000
        decided = [
            (self.tx.send_task("t"), 0),
            (self.tx.send_task("t", ("x" * 600_000,)), 1),
            (self.tx.send_task("t", (), {"y": items}), 1),
            (self.tx.send_task("t", (items,), in_thread=False), 0),
            (self.tx.send_task("t", in_thread=True), 1),
            (self.tx.apply_async("t", (items,)), 1),
            (self.tx.delay("t", items), 1),
            (self.tx.delay(self.members(50)), 0),
            (self.tx.delay(self.members(51)), 1),
            (self.tx.apply_async(self.members(51), in_thread=False), 0),
        ]
        self.assertEqual(len(self.threads.jobs), sum(count for _, count in decided))
        self.threads.run()
        self.turn()
        self.confirm()

    def test_errors(self):
        """What the capture raises comes through the Deferred; those behind it go on."""
        self.up()
        callings = [self.big(args=(object(),)), self.big("b", nonsense=1)]
        behind = self.small("c")
        sent = callings[0].when_sent()
        asked = callings[0].async_result.get()
        self.assertEqual(self.sent, [])
        self.threads.run()
        self.turn()
        self.assertEqual(self.sent, ["c"])
        self.failureResultOf(callings[0], EncodeError)
        self.failureResultOf(callings[1], TypeError)
        self.failureResultOf(sent, EncodeError)
        self.failureResultOf(asked, EncodeError)
        self.confirm()
        self.bring("c")
        self.successResultOf(behind)
        self.assert_empty()

    def test_context(self):
        """It is captured in the context of the call."""
        seen = []

        def note(**_: Any) -> None:
            seen.append(WHO.get())

        from celery.signals import before_task_publish

        before_task_publish.connect(note)
        self.addCleanup(before_task_publish.disconnect, note)
        self.up()
        WHO.set("caller")
        calling = self.big()
        WHO.set("another")
        self.threads.run()
        self.assertEqual(seen, ["caller"])
        self.confirm()
        self.bring("big")
        self.successResultOf(calling)

    def test_own_id(self):
        """The id is known at once: that of the call, the signature's own, a chord's body's, or a new one."""

        def named(name: str) -> Any:
            return signature("t", app=self.app).set(task_id=name)

        def plain() -> Any:
            return signature("t", app=self.app)

        self.up()
        canvases = [(named("a"), "a"), (chain(plain(), named("b")), "b")]
        callings = [(self.tx.apply_async(canvas, in_thread=True), name) for canvas, name in canvases]
        callings.append((self.tx.apply_async(plain(), in_thread=True, task_id="d"), "d"))
        callings.append((self.tx.apply_async("t", in_thread=True, task_id=UUID(int=1)), str(UUID(int=1))))
        for calling, name in callings:
            self.assertEqual(calling.id, name)
        fresh = self.tx.apply_async(plain(), in_thread=True)
        first = fresh.id
        self.threads.run()
        self.turn()
        for calling, name in callings:
            self.assertEqual(calling.id, name)
        self.assertEqual(fresh.id, first)
        self.confirm()

    def test_own_results(self):
        """What a task's own ``apply_async`` returns is the value there too, or what is waited for; what somebody holds stays whole."""
        self.up()
        given: list[Any] = []

        class Own(Task):
            def apply_async(self, args=None, kwargs=None, **options):
                if options.get("priority"):
                    super().apply_async(args, kwargs, **options)
                return given[0]

        @self.app.task(name="own", base=Own, shared=False)
        def own():
            """Its calls are its own affair."""

        def call(what: Any, **options: Any) -> Any:
            given[:] = [what]
            calling = self.tx.apply_async(own, in_thread=True, task_id="own", **options)
            self.threads.run()
            self.turn()
            return calling

        for value, found in ((None, None), ({"a": 1}, {"a": 1}), (EagerResult(None, 5, "SUCCESS"), 5)):
            self.assertEqual(self.successResultOf(call(value)), found)
            calling = call(value, priority=1)
            self.assertNoResult(calling)
            self.confirm()
            self.assertEqual(self.successResultOf(calling), found)
            self.assertEqual(calling.id, "own")
        held = AsyncResult("b", app=self.app, parent=AsyncResult("a", app=self.app))
        calling = call(held)
        self.source.bring("b", result=2)
        self.assertEqual(self.successResultOf(calling), 2)
        self.assertEqual(held.parent.id, "a")
        error = self.failureResultOf(call(Deferred()), TypeError).value
        self.assertIn("own apply_async", str(error))
        self.assert_empty()

    def test_full(self):
        """A call for which there is no room fails once that is known."""
        self.engine.outbox._limit = 55
        self.small("a")
        calling = self.tx.delay(self.members(55))
        self.threads.run()
        self.failureResultOf(calling, OutboxFull)
        self.up()
        self.confirm()

    def test_no_backend(self):
        """Where nobody keeps results it fires with the confirm."""
        self.engine.source = None
        self.up()
        calling = self.big()
        self.threads.run()
        self.assertNoResult(calling)
        self.confirm()
        self.assertIsNone(self.successResultOf(calling))


class Meanwhile(CallingTestCase):
    def test_questions(self):
        """What is asked while a call is being captured is answered afterwards."""
        self.up()
        calling = self.big()
        handle = calling.async_result
        getting, state, ready = calling.get(), handle.state(), calling.ready()
        self.assertRaises(TypeError, bool, ready)
        self.assertEqual((str(handle), str(calling)), ("big", "big"))
        self.threads.run()
        self.assertEqual(self.successResultOf(state), "PENDING")
        self.assertFalse(self.successResultOf(ready))
        self.confirm()
        self.bring("big")
        self.assertEqual(self.successResultOf(getting), "big")
        self.assertEqual(self.successResultOf(calling), "big")
        self.assertEqual(self.successResultOf(handle.state()), "SUCCESS")
        self.assert_empty()

    def test_questions_cancelled(self):
        """A question may be cancelled."""
        self.up()
        calling = self.big()
        getting = calling.get()
        getting.cancel()
        self.failureResultOf(getting, CancelledError)
        self.threads.run()
        self.confirm()
        self.bring("big")
        self.assertEqual(self.successResultOf(calling), "big")

    def test_cancel(self):
        """A call that is cancelled lets those behind it go, and is not sent."""
        self.up()
        calling = self.big()
        sent, asked = calling.when_sent(), calling.async_result.get()
        behind = self.small("b")
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        self.failureResultOf(sent, CancelledError)
        self.failureResultOf(asked, NotSent)
        self.turn()
        self.assertEqual(self.sent, ["b"])
        self.threads.run()
        self.turn()
        self.assertEqual(self.sent, ["b"])
        self.confirm()
        self.bring("b")
        self.successResultOf(behind)
        self.assert_empty()

    def test_dropped(self):
        """One that nobody holds is sent, and not waited for; one with something attached is."""
        self.up()
        got: list[Any] = []
        self.big("dropped")
        self.big("held").addCallback(got.append)
        gc.collect()
        self.threads.run()
        gc.collect()
        self.turn()
        self.assertEqual(self.sent, ["dropped", "held"])
        self.confirm()
        self.engine.come_by()
        self.assertEqual(list(self.engine.waiters), ["held"])
        self.bring("held")
        self.assertEqual(got, ["held"])
        self.assert_empty()

    def test_stop(self):
        """A stop waits for it as for any call, ``stop_timeout`` at most."""
        self.up()
        calling = self.big()
        stopping = self.tx.stopService()
        self.assertNoResult(stopping)
        self.threads.run()
        self.turn()
        self.confirm()
        self.successResultOf(stopping)
        self.failureResultOf(calling, Stopped)
        self.assert_empty()

    def test_stop_late(self):
        """Then it is not sent."""
        self.up()
        calling = self.big()
        stopping = self.tx.stopService()
        self.turn(10)
        self.successResultOf(stopping)
        self.failureResultOf(calling, NotSent)
        self.threads.run()
        self.turn()
        self.assertEqual(self.sent, [])
        self.assert_empty()

    def test_never_ran(self):
        """Calls for a reactor that never ran are named at the end, those that were never captured too."""
        self.broker.lose()
        self.small("small")
        self.big("big")
        self.tx.delay(self.members(60))
        said = io.StringIO()
        self.patch(sys, "stderr", said)
        self.engine._never_ran()
        text = said.getvalue()
        self.assertIn("3 calls were never sent", text)
        self.assertIn("small[small]", text)
        self.assertIn("big[big]", text)
        self.assertIn("celery.group[", text)
        self.threads.run()
        self.up()
        self.confirm()


class Receivers(CallingTestCase):
    def test_cancels(self):
        """A result stands for the confirm: a receiver of after_task_publish that cancels the call then has cancelled it, and that is all."""
        self.up()
        calls: list[Any] = []

        def cancel(**named: Any) -> None:
            calls[-1].cancel()

        signals.after_task_publish.connect(cancel)
        self.addCleanup(signals.after_task_publish.disconnect, cancel)
        for call in (self.tx.send_task, lambda name: self.tx.delay(group(signature(name), signature(name)))):
            calls.append(call("t"))
            for message in list(self.broker.published):
                self.source.bring(message.task_id)
                self.broker.outcome(message, None)
            self.failureResultOf(calls[-1], CancelledError)
            self.assert_empty()


class Cancels(CallingTestCase):
    settings = {"revoke_on_cancel": True}  # noqa: RUF012  # never changed

    def test_revoke_on_cancel(self):
        """What a call says wins over what the service was told."""
        self.up()
        for in_thread in (False, True):
            for own, revoked in ((None, True), (True, True), (False, False)):
                calling = self.tx.send_task("t", task_id="a", in_thread=in_thread, revoke_on_cancel=own)
                self.threads.run()
                self.turn()
                self.confirm()
                calling.cancel()
                self.failureResultOf(calling, CancelledError)
                self.assertEqual(len(self.broker.published), revoked)
                self.confirm()
        self.assert_empty()


class Node:
    """A result as far as `whole` looks at it."""

    parent = None


class Group(Node):
    def __init__(self, results: Any):
        self.results = results


class Generators(CallingTestCase):
    """Groups made from generators, whose results Celery keeps in lists of its own kind."""

    def make_app(self) -> Any:
        return Celery("client", broker="amqp://", backend="redis://")

    def members(self, count: int) -> Any:
        return group(signature("t", (number,), app=self.app, immutable=True) for number in range(count))

    def bring_all(self, handle: Any) -> None:
        """Bring each member's number."""
        for number, member in enumerate(handle.results):
            if hasattr(member, "results"):
                self.bring_all(member)
            else:
                self.source.bring(member.id, result=number)

    def test_in_a_thread(self):
        """What leads to such a group, or consists of them, is captured in a thread as anything else is."""
        self.up()
        one = signature("t", app=self.app)
        for canvas, sent, value in (
            (self.members(60) | self.members(2), 60, [0, 1]),
            (chain(one, self.members(60)), 1, list(range(60))),
            (chord(self.members(60), self.members(3)), 60, [0, 1, 2]),
            (group(chain(one, self.members(10)) for _ in range(6)), 6, [list(range(10))] * 6),
        ):
            calling = self.tx.apply_async(canvas, in_thread=True)
            self.threads.run()
            self.turn()
            # A chord's size, which the last message of its header waits for.
            while self.source.writes:
                (_, done) = self.source.writes.pop()
                done(None)
                self.turn()
            self.assertEqual(len(self.broker.published), sent)
            self.confirm()
            self.bring_all(calling.async_result)
            self.assertEqual(self.successResultOf(calling), value)
            del calling
        self.assert_empty()

    def test_ancestry(self):
        """What stands before a result is found in such a list as in any other."""
        nodes = [Node(), Node()]
        inner = [Group(regen(iter([node]))) for node in nodes]
        top = Group(regen(iter(inner)))
        self.assertIsNot(type(top.results), list)
        self.assertEqual(set(whole(top, Group)), {top, *inner, *nodes})
