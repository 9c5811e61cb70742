"""The engine: from the first call to the stop, in the right thread, with nothing left."""

from __future__ import annotations

from threading import Thread
from typing import Any
from uuid import UUID

from celery import Celery, Task, chain
from celery.result import AsyncResult, EagerResult, GroupResult, ResultSet
from celery.signals import before_task_publish
from kombu.exceptions import EncodeError
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase

from tests.unit._fakes import EngineTestCase, Reactor
from twistedcelery import TwistedCelery
from twistedcelery._keeper import Keeper
from twistedcelery.errors import NotSent, Refused, ResultNotKept, ResultTimeout, Stopped, WrongThread


class Calls(EngineTestCase):
    def test_wrong_arguments(self):
        """What cannot be captured raises at once, connects nothing, and leaves nothing."""
        for error, arguments in (
            (EncodeError, {"args": (object(),)}),
            (TypeError, {"args": 5}),
            (TypeError, {"nonsense": 5}),
            (TypeError, {"link": "t"}),
            (ValueError, {"timeout": -1}),
            (TypeError, {"timeout": "5"}),
            (ValueError, {"confirm_timeout": float("nan")}),
            (TypeError, {"confirm_timeout": "x"}),
            (ValueError, {"timeout": float("inf")}),
            (TypeError, {"retry_policy": {"max_retries": "x"}}),
            (ValueError, {"retry_policy": {"interval_start": -1}}),
            (TypeError, {"retry_policy": {"interval_step": "0.2"}}),
        ):
            self.assertRaises(error, self.tx.send_task, "t", **arguments)
        self.assertRaises(TypeError, self.tx.delay, 5)
        self.assertRaises(TypeError, TwistedCelery, "app")
        self.assertEqual(self.broker.connects, 0)
        self.assert_empty()

    def test_result_class(self):
        """``result_cls`` is refused by name, wherever it is said."""
        for call in (
            lambda: self.tx.send_task("t", result_cls=AsyncResult),
            lambda: self.tx.apply_async("t", result_cls=AsyncResult),
            lambda: self.tx.apply_async(self.app.signature("t"), result_cls=AsyncResult, in_thread=True),
            lambda: self.tx.delay(self.app.signature("t").set(result_cls=AsyncResult)),
        ):
            error = self.assertRaises(TypeError, call)
            self.assertIn("result_cls=<class 'celery.result.AsyncResult'>", str(error))
        self.up()
        self.tx.send_task("t", result_cls=None, task_id="a")
        self.confirm()
        self.assert_empty()

    def test_id_again(self):
        """A call with the id of an earlier one is sent, and has its own result."""
        self.up()
        earlier = self.tx.send_task("t", task_id="a")
        self.confirm()
        earlier.cancel()
        self.failureResultOf(earlier, CancelledError)
        self.source.bring("a", result=1)
        again = self.tx.send_task("t", task_id="a")
        self.assertEqual(len(self.broker.published), 1)
        self.assertNoResult(again)
        self.confirm()
        self.source.bring("a", result=2)
        self.assertEqual(self.successResultOf(again), 2)
        self.assert_empty()

    def test_id_again_unsent(self):
        """A result that comes before its message has left is another call's: the message leaves all the same."""
        calling = self.tx.send_task("t", task_id="a")
        self.source.bring("a", result=1)
        self.assertEqual(self.successResultOf(calling), 1)
        self.assertEqual(self.broker.published, [])
        self.up()
        self.assertEqual(len(self.broker.published), 1)
        self.confirm()
        self.assert_empty()

    def test_stopped_by_a_signal(self):
        """A receiver of a signal may stop the service: the call that it was sent for is refused."""

        def stop(**_):
            self.tx.stopService()

        before_task_publish.connect(stop)
        self.addCleanup(before_task_publish.disconnect, stop)
        self.up()
        self.assertRaises(Stopped, self.tx.send_task, "t")
        self.assertEqual(self.broker.published, [])
        self.assert_empty()

    def test_settings(self):
        """Settings that make no sense are refused by name."""
        name: str
        value: Any
        for name, value in (
            ("outbox_limit", 0),
            ("outage_wait", -1),
            ("result_timeout", 0),
            ("inflate_limit", 0),
            ("array_limit", 0),
        ):
            with self.assertRaises(ValueError) as caught:
                TwistedCelery(self.app, **{name: value})
            self.assertIn(name, str(caught.exception))

    def test_wrong_thread(self):
        """Another thread is told what to use, also where there would be nothing to wait for; nothing happens."""
        self.up()
        calling = self.tx.send_task("t", task_id="a")
        self.confirm()
        self.source.bring("a", result=1)
        waiting = self.tx.send_task("t", task_id="b")
        self.confirm()
        told: list[str] = []

        def call(ask):
            with self.assertRaises(WrongThread) as caught:
                ask()
            told.append(str(caught.exception))

        asked = [
            lambda: self.tx.send_task("t"),
            self.tx.disconnect,
            self.tx.stopService,
            waiting.cancel,
            calling.get,
            calling.state,
            calling.meta,
        ]
        for ask in asked:
            thread = Thread(target=call, args=(ask,))
            thread.start()
            thread.join()
        self.assertEqual(len(told), len(asked))
        self.assertIn("callFromThread", told[0])
        self.assertEqual(self.successResultOf(calling), 1)
        self.source.bring("b", result=2)
        self.assertEqual(self.successResultOf(waiting), 2)

    def test_nothing_called(self):
        """What calls nothing, an empty chain for example, fires with None; what has been sent nonetheless is sent first."""

        class Silent(Task):
            def apply_async(self, *args, **kwargs):
                super().apply_async(*args, **kwargs)

        @self.app.task(name="silent", base=Silent, shared=False)
        def silent():
            """Its calls give nothing."""

        self.assertIsNone(self.successResultOf(self.tx.delay(chain())))
        calling = self.tx.delay(silent)
        self.up()
        self.assertNoResult(calling)
        self.confirm()
        self.assertIsNone(self.successResultOf(calling))
        self.assert_empty()

    def test_order(self):
        """A broadcast fires with the broker's confirm, can be withdrawn, and fails as any call."""
        ordering = self.tx.AsyncResult("x").revoke()
        ordering.cancel()
        self.failureResultOf(ordering, CancelledError)
        self.up()
        self.assertEqual(self.broker.published, [])
        ordering = self.tx.AsyncResult("x").revoke(terminate=True, signal="SIGKILL")
        self.assertIn(b"SIGKILL", self.broker.published[0].body)
        self.confirm()
        self.assertIsNone(self.successResultOf(ordering))
        self.assert_empty()

    def test_unclaimed(self):
        """States of tasks that nobody waits for are found later; ``forget`` removes them."""
        self.source.bring("early", result=1)
        handle = self.tx.AsyncResult("early")
        self.assertEqual(self.successResultOf(handle.state()), "SUCCESS")
        self.successResultOf(handle.forget())
        self.assertEqual(self.source.forgotten, ["early"])
        self.assertEqual(self.successResultOf(self.tx.AsyncResult("early").state()), "PENDING")

    def test_unclaimed_bytes(self):
        """What is kept of tasks that nobody waits for is bounded in bytes: 64 MiB, or ``unclaimed_bytes``."""
        for settings, size in (({}, 3_000_000), ({"unclaimed_bytes": 220}, 10)):
            self.settings = settings
            self.setUp()
            for number in range(300):
                meta = {"task_id": f"t{number}", "status": "SUCCESS", "result": number, "traceback": None}
                self.source.listener.meta_received(meta, size)
            kept = self.engine.waiters.unclaimed
            self.assertEqual(list(kept), [f"t{number}" for number in range(278, 300)])
            self.successResultOf(self.tx.AsyncResult("t299").forget())
            self.assertNotIn("t299", kept)
        self.assertRaises(ValueError, TwistedCelery, self.app, unclaimed_bytes=-1)

    def test_timeout_of_get(self):
        """A timeout that is no number of seconds is refused, and nothing waits; less than none is none."""
        handle = self.tx.AsyncResult("a")
        for error, timeout in ((TypeError, "5"), (ValueError, float("nan")), (ValueError, float("inf"))):
            self.assertRaises(error, handle.get, timeout)
        self.assert_empty()
        waiting = handle.get(-1)
        self.turn()
        self.failureResultOf(waiting, ResultTimeout)
        self.assert_empty()

    def test_cancelled_by_another(self):
        """Who is cancelled by somebody that is told of a state before is not told of it any more."""
        told: list[str] = []
        waiting: list[Any] = []

        def first(meta):
            told.append("first")
            waiting[1].cancel()

        handle = self.tx.AsyncResult("a")
        waiting.append(handle.get(on_message=first))
        waiting.append(handle.get(on_message=lambda meta: told.append("second")))
        self.source.bring("a", "PROGRESS", {})
        self.failureResultOf(waiting[1], CancelledError)
        self.assertEqual(told, ["first"])
        self.source.bring("a", result=1)
        self.assertEqual(self.successResultOf(waiting[0]), 1)
        self.assert_empty()

    def test_forget_fails(self):
        """What ``forget`` fails with is the error itself."""
        self.source.forget = lambda task_id: fail(NotSent("no"))
        handle = self.tx.AsyncResult("a")
        self.failureResultOf(handle.forget(), NotSent)
        chained = self.engine.handle_of_tuple((("b", (("a", None), None)), None))
        self.failureResultOf(chained.forget(), NotSent)

    def test_current_state(self):
        """The newest state of a task that is waited for can be asked for."""
        waiting = self.tx.AsyncResult("a").get()
        self.source.bring("a", "PROGRESS", {"done": 1})
        handle = self.tx.AsyncResult("a")
        self.assertEqual(self.successResultOf(handle.state()), "PROGRESS")
        self.assertEqual(self.successResultOf(handle.info()), {"done": 1})
        self.source.bring("a", result=1)
        self.successResultOf(waiting)
        self.assert_empty()


class NoBackend(EngineTestCase):
    with_source = False

    def test_no_result(self):
        """Without a result backend a call fires with None once it is confirmed, and there is nothing to ask for."""
        self.up()
        calling = self.tx.send_task("t")
        self.confirm()
        self.assertIsNone(self.successResultOf(calling))
        self.failureResultOf(calling.get(), ResultNotKept)
        self.failureResultOf(self.tx.AsyncResult("x").state(), ResultNotKept)


class ResultTimeouts(EngineTestCase):
    settings = {"result_timeout": 10}  # noqa: RUF012  # never changed

    def test_result_timeout(self):
        """Every call ends after ``result_timeout``; one that has its value in time costs no timer."""
        self.up()
        late = self.tx.send_task("t", task_id="late")
        self.turn(5)
        in_time = self.tx.send_task("t", task_id="in time")
        self.confirm()
        self.turn(5.2)
        error = self.failureResultOf(late, ResultTimeout).value
        self.assertEqual(error.task_id, "late")
        self.assertNoResult(in_time)
        self.source.bring("in time", result=1)
        self.assertEqual(self.successResultOf(in_time), 1)
        self.assert_empty()


class Stops(EngineTestCase):
    def test_stop(self):
        """A stop flushes, fails what is waited for, each with its own error, and stops the connections."""
        self.up()
        calls = [self.tx.send_task("t", task_id=name) for name in "ab"]
        stopping = self.tx.stopService()
        self.assertRaises(Stopped, self.tx.send_task, "t")
        self.assertNoResult(stopping)
        self.confirm()
        self.successResultOf(stopping)
        errors = [self.failureResultOf(calling, Stopped).value for calling in calls]
        self.assertEqual([error.task_id for error in errors], ["a", "b"])
        self.assertTrue(self.broker.stopped and self.source.stopped)
        self.assert_empty()

    def test_stop_before_the_reactor_runs(self):
        """Calls that were made before the reactor runs leave once it does, though the stop came first."""
        running: list[Any] = []
        self.reactor.callWhenRunning = running.append
        self.reactor.running = False
        calling = self.tx.send_task("t")
        stopping = self.tx.stopService()
        self.reactor.running = True
        running[0]()
        self.assertEqual(self.broker.connects, 1)
        self.up()
        self.confirm()
        self.successResultOf(stopping)
        self.failureResultOf(calling, Stopped)

    def test_stop_late(self):
        """What cannot be flushed within ``stop_timeout`` fails, and the stop goes on."""
        calling = self.tx.send_task("t")
        stopping = self.tx.stopService()
        self.turn(10)
        self.successResultOf(stopping)
        self.failureResultOf(calling, NotSent)
        self.assert_empty()

    def test_stop_is_within_its_time(self):
        """Servers that say nothing at all, neither to the calls nor to the goodbye, are left when ``stop_timeout`` is over."""
        for settings, flushing in (({}, 9.0), ({"stop_timeout": 0.5}, 0.25), ({"stop_timeout": 0}, 0.0)):
            self.settings = settings
            self.setUp()
            given: list[float] = []

            def stop(timeout, given=given):
                given.append(timeout)
                return deferLater(self.reactor, timeout)

            self.broker.stop = self.source.stop = stop
            calling = self.tx.send_task("t")
            stopping = self.tx.stopService()
            self.turn(flushing)
            self.failureResultOf(calling, NotSent)
            left = settings.get("stop_timeout", 10) - flushing
            self.assertEqual(given, [left, left])
            if left:
                self.assertNoResult(stopping)
            self.turn(left)
            self.successResultOf(stopping)

    def test_stop_hands_over(self):
        """What has come when the stop begins, and waits to be decompressed, is handed over before the waits are failed."""
        self.up()
        calls = [self.tx.send_task("t", task_id=name) for name in "ab"]
        self.confirm()
        handing: Deferred[None] = Deferred()
        given: list[float] = []

        def hand_over(timeout):
            given.append(timeout)
            return handing

        self.source.hand_over = hand_over
        stopping = self.tx.stopService()
        self.assertNoResult(calls[0])
        self.source.bring("a", result=1)
        handing.callback(None)
        self.assertEqual((self.successResultOf(calls[0]), given), (1, [9.0]))
        self.failureResultOf(calls[1], Stopped)
        self.successResultOf(stopping)

    def test_stop_twice(self):
        """Whoever stops it again waits for the same stop; a stop without calls is nothing."""
        self.up()
        self.tx.send_task("t").addErrback(lambda failure: failure.trap(Stopped) and None)
        first, second = self.tx.stopService(), self.tx.disconnect()
        self.assertNoResult(second)
        self.confirm()
        self.successResultOf(first)
        self.successResultOf(second)
        self.successResultOf(TwistedCelery(self.app, reactor=self.reactor).stopService())

    def test_start_again(self):
        """After a stop it can be started again, with an engine of its own."""
        self.successResultOf(self.tx.stopService())
        self.assertRaises(Stopped, self.tx.send_task, "t")
        self.tx.startService()
        calling = self.tx.send_task("t", task_id="a")
        self.up()
        self.confirm()
        self.source.bring("a", result=1)
        self.assertEqual(self.successResultOf(calling), 1)

    def test_with_the_reactor(self):
        """It stops itself before the reactor shuts down."""
        self.up()
        (trigger,) = self.reactor.triggers["before"]["shutdown"]
        calling = self.tx.send_task("t", ignore_result=True)
        function, args, kwargs = trigger
        stopping: Deferred[None] = function(*args, **kwargs)
        self.assertNoResult(stopping)
        self.confirm()
        self.successResultOf(stopping)
        self.assertIsNone(self.successResultOf(calling))


class OwnResults(EngineTestCase):
    """Tasks with an ``apply_async`` of their own, which may return anything."""

    def task(self, give, *, sends: bool = False) -> Any:
        """Make a task whose calls give what ``give`` returns, and are sent or not."""

        class Own(Task):
            def apply_async(self, *args, **kwargs):
                if sends:
                    super().apply_async(*args, **kwargs)
                return give()

        @self.app.task(name=f"own {len(self.app.tasks)}", base=Own, shared=False)
        def own():
            """Its calls are its own affair."""

        return own

    def test_values(self):
        """What is no result is the value; what was sent nonetheless is confirmed first, or the call fails."""
        self.up()
        for value in (None, {"id": "x"}, "text", 5, [1], object()):
            calling = self.tx.delay(self.task(lambda value=value: value))
            self.assertIs(self.successResultOf(calling), value)
            self.assertIs(self.successResultOf(calling.get()), value)
            self.assertEqual(self.successResultOf(calling.state()), "SUCCESS")
            calling = self.tx.apply_async(self.task(lambda value=value: value, sends=True), task_id="a")
            self.assertEqual((calling.id, len(self.broker.published)), ("a", 1))
            self.assertNoResult(calling)
            self.confirm()
            self.assertIs(self.successResultOf(calling), value)
            calling = self.tx.delay(self.task(lambda value=value: value, sends=True))
            self.broker.outcome(self.broker.published[0], Refused("406 no"))
            self.failureResultOf(calling, Refused)
        self.assert_empty()

    def test_without_an_id(self):
        """So does an EagerResult without an id, as celery-once gives for a task that is under way."""
        for state, value, found in (
            ("REJECTED", None, None),
            ("SUCCESS", 5, 5),
            ("REJECTED", ValueError("x"), None),
        ):
            task = self.task(lambda state=state, value=value: EagerResult(None, value, state))
            calling = self.tx.delay(task)
            self.assertEqual(self.successResultOf(calling), found)
            self.assertEqual(self.successResultOf(calling.state()), state)
            self.assertEqual(self.tx.apply_async(task.s(), task_id="a").id, "a")
        failing = self.tx.delay(self.task(lambda: EagerResult(None, ValueError("no"), "FAILURE")))
        self.failureResultOf(failing, ValueError)
        self.assert_empty()

    def test_results_of_others(self):
        """Another app's result is waited for by its id, and what has come in its name is not forgotten; so is a set of them."""
        self.up()
        other = Celery("other", backend="cache+memory://")
        one, two, number = (
            AsyncResult("a", app=other),
            AsyncResult("b", app=other),
            AsyncResult(UUID(int=1), app=other),
        )
        self.source.bring("a", result=1)
        first = self.tx.delay(self.task(lambda: one))
        self.assertEqual((first.id, self.successResultOf(first)), ("a", 1))
        calling = self.tx.delay(self.task(lambda: number))
        self.source.bring(str(UUID(int=1)), result=2)
        self.assertEqual(self.successResultOf(calling), 2)
        ran = EagerResult(None, 3, "SUCCESS")
        for many in (ResultSet([one, ran, two], app=other), GroupResult(None, [one, ran, two], app=other)):
            calling = self.tx.delay(self.task(lambda many=many: many, sends=True))
            self.assertIsInstance(calling.id, str)
            self.source.bring("b", result=4)
            self.assertNoResult(calling)
            self.confirm()
            self.source.bring("a", result=1)
            self.assertEqual(self.successResultOf(calling), [1, 3, 4])
        self.assert_empty()

    def test_deferreds(self):
        """A call made with TwistedCelery is that call; any other Deferred is refused by name."""
        self.up()
        calling = self.tx.delay(self.task(lambda: self.tx.send_task("t", task_id="a")), 1)
        self.assertEqual((calling.id, len(self.broker.published)), ("a", 1))
        self.confirm()
        self.source.bring("a", result=5)
        self.assertEqual(self.successResultOf(calling), 5)
        error = self.assertRaises(TypeError, self.tx.delay, self.task(lambda: succeed(5), sends=True))
        self.assertIn("own apply_async has returned <Deferred", str(error))
        self.assertEqual(self.broker.published, [])
        self.assert_empty()


class Limits(SynchronousTestCase):
    def test_given_to_those_who_receive(self):
        """``inflate_limit`` and ``array_limit`` reach whatever brings results, and every connection to Redis."""
        cases: list[tuple[dict[str, Any], int, int]] = [
            ({}, 256 * 1024 * 1024, 1_048_576),
            ({"inflate_limit": 5, "array_limit": 7}, 5, 7),
        ]
        for broker, backend in (("amqp://", "rpc://"), ("redis://", "rpc://"), ("redis://", "redis://")):
            for settings, inflate, array in cases:
                app = Celery(broker=broker, backend=backend, set_as_current=False)
                engine: Any = TwistedCelery(app, reactor=Reactor(), **settings).engine
                self.assertEqual(engine.source._inflating._limit, inflate)
                keepers: list[Any] = [
                    keeper
                    for room in (engine.broker, engine.source)
                    for keeper in vars(room).values()
                    if isinstance(keeper, Keeper)
                ]
                if broker == "redis://":
                    self.assertGreater(len(keepers), 1)
                    for keeper in keepers:
                        self.assertEqual(next(keeper._attempts).server.config.max_array_length, array)
