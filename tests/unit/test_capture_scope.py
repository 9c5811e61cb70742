"""The scope of a capture: within it nothing blocks, outside of it nothing has changed."""

from __future__ import annotations

import gc
from contextvars import copy_context
from threading import Thread
from typing import Any, ClassVar
from unittest import mock

from celery import Celery, Signature, chord, current_app, group, shared_task, signals
from celery.app.amqp import AMQP
from celery.backends.base import DisabledBackend
from celery.backends.redis import RedisBackend
from celery.exceptions import ImproperlyConfigured
from celery.result import EagerResult
from kombu.entity import Queue
from kombu.messaging import Producer
from twisted.trial.unittest import SynchronousTestCase

from tests.unit.capture.case import CaptureTestCase, register
from tests.unit.capture.oracle import OID, RecordingTransport, capture_of, captured, make_app, stock
from tests.unit.capture.own import (
    CachedAMQP,
    MethodAMQP,
    OwnAMQP,
    OwnPool,
    OwnPoolAMQP,
    OwnProducer,
    PatientCelery,
)
from twistedcelery._capture import recorder
from twistedcelery._capture._scope import Pauses
from twistedcelery._operations import Write
from twistedcelery.errors import ResultNotKept, WouldBlock


class OutsideTests(CaptureTestCase):
    def test_stock_afterwards(self):
        """After a capture the app sends as stock Celery, with its own backend, id and pools."""
        fresh = make_app(self.conf, register)
        expected = stock(fresh, lambda app: app.send_task("add", (1, 2)))
        self.capture.reply_to = "for the moment"
        (message,) = self.run_in(self.app.send_task, "add").operations
        self.assertEqual(message.properties["reply_to"], "for the moment")
        self.assertNotIn("backend", vars(self.app._local))
        self.assertEqual(self.app.thread_oid, OID)
        self.assertEqual(stock(self.app, lambda app: app.send_task("add", (1, 2))), expected)
        self.assertIsNot(self.app.backend, self.capture.backend)
        self.assertIs(self.app.backend, self.app.backend)

    def test_stock_pools(self):
        """The stock pools are those that the app had, and take settings as ever."""
        pool, producers = self.app.pool, self.app.amqp.producer_pool
        self.run_in(self.app.send_task, "add")
        self.assertIs(self.app.pool.stock, pool)
        self.assertIs(self.app.amqp.producer_pool.stock, producers)
        self.app.pool.limit = 7
        self.assertEqual(pool.limit, 7)
        with self.app.connection_or_acquire() as connection, self.app.producer_or_acquire() as producer:
            self.assertIn(connection, pool._dirty)
            self.assertIsNot(producer, self.capture.producer)

    def test_stock_pools_made_later(self):
        """Where the app had no pools yet it gets Celery's own."""
        self.run_in(self.app.send_task, "add")
        other = make_app(self.conf)
        self.assertIs(self.app.pool.stock, other.pool)
        self.assertIs(self.app.amqp.producer_pool.stock, other.amqp.producer_pool)
        self.assertEqual(self.app.pool.limit, other.pool.limit)

    def test_other_thread_meanwhile(self):
        """Another thread sees stock Celery while a capture is going on, also with the capture's context."""
        found = {}

        def look():
            with self.app.producer_or_acquire() as producer:
                return producer, self.app.backend, recorder(self.app) is not None, self.app.thread_oid

        def before(**kwargs):
            context = copy_context()
            found["fresh"] = self.thread(look)
            found["copied"] = self.thread(lambda: context.run(look))

        self.receive(signals.before_task_publish, before)
        self.run_in(self.app.send_task, "add")
        for producer, backend, inside, oid in found.values():
            self.assertIsNot(producer, self.capture.producer)
            self.assertIsNot(backend, self.capture.backend)
            self.assertEqual((inside, oid == OID), (False, False))

    def test_context_kept(self):
        """A context that was copied within a capture is out of scope once the call has returned."""
        kept = []
        self.receive(signals.before_task_publish, lambda **kwargs: kept.append(copy_context()))
        self.run_in(self.app.send_task, "add")
        self.assertIsNone(kept[0].run(recorder, self.app))

    def test_after_close_and_fork(self):
        """After app.close() and after a fork the pools are new, and captures go on."""
        self.run_in(self.app.send_task, "add")
        old = self.app.pool.stock
        for forget in (self.app._after_fork, self.app.close):
            forget()
            self.assertIs(self.app.pool, self.app.pool)
            self.assertEqual(len(self.run_in(self.app.send_task, "add").operations), 1)
        self.assertIsNotNone(old)

    def test_other_app(self):
        """Calls of another app within a capture are none of it."""
        other = make_app({})
        capture_of(other).run(other.send_task, "x")

        def call():
            with other.producer_or_acquire() as producer:
                return producer

        self.assertIsNot(self.run_in(call).result, self.capture.producer)

    def test_two_captures(self):
        """Two captures of one app share its seams and keep their backends and reply queues apart."""
        second = capture_of(self.app)
        second.reply_to = "second"
        self.run_in(self.app.send_task, "add")
        (message,) = second.run(self.app.send_task, "add").operations
        self.assertEqual(message.properties["reply_to"], "second")
        (message,) = self.run_in(self.app.send_task, "add").operations
        self.assertEqual(message.properties["reply_to"], OID)
        self.assertIsNot(
            second.run(lambda: self.app.backend).result, self.run_in(lambda: self.app.backend).result
        )

    def test_in_a_thread(self):
        """A capture works in any thread."""
        captured = self.thread(lambda: self.run_in(self.app.send_task, "add"))
        self.assertEqual(len(captured.operations), 1)

    def test_wrapped_sender_is_kept(self):
        """Who wraps send_task_message afterwards stays in the way of captures and of stock calls."""
        self.run_in(self.app.send_task, "add")
        inner, seen = self.app.amqp.send_task_message, []

        def wrapper(*args, **kwargs):
            seen.append(recorder(self.app) is not None)
            return inner(*args, **kwargs)

        self.app.amqp.send_task_message = wrapper
        self.run_in(self.app.send_task, "add")
        stock(self.app, lambda app: app.send_task("add"))
        self.assertEqual(seen, [True, False])


class BesideTests(CaptureTestCase):
    def test_pauses(self):
        """A capture beside the reactor sleeps between messages and results once it has run for a while; others do not."""
        calls = group([self.app.tasks["add"].s(1, 1)] * 3, app=self.app)
        with (
            mock.patch("twistedcelery._capture._scope.sleep") as sleep,
            mock.patch.object(Pauses, "every", 0),
        ):
            plain = self.run_in(calls.apply_async)
            self.assertEqual(sleep.call_count, 0)
            beside = self.capture.run_beside(calls.apply_async)
            self.assertGreaterEqual(sleep.call_count, 6)
        self.assertEqual(len(plain.operations), len(beside.operations))

    def test_seldom(self):
        """A short capture does not sleep."""
        with (
            mock.patch("twistedcelery._capture._scope.sleep") as sleep,
            mock.patch.object(Pauses, "every", 100),
        ):
            self.capture.run_beside(self.app.send_task, "add")
        self.assertEqual(sleep.call_count, 0)


class SharedBackendTests(CaptureTestCase):
    conf: ClassVar[dict[str, Any]] = {
        "result_backend_thread_safe": True,
        "result_backend": "redis://127.0.0.1:1/0",
    }

    def stock_backend(self):
        return self.app.backend._get_current_object()

    def test_inert_in_scope_stock_outside(self):
        """An app that shares one backend between its threads has the inert one in scope, and that one outside."""
        shared = self.app.backend
        self.assertIs(self.app._backend_cache, shared)
        self.assertIs(self.run_in(lambda: self.app.backend.client).result, self.capture.backend.client)
        self.assertIs(self.app.backend._get_current_object(), shared)
        self.assertIs(self.thread(self.stock_backend), shared)
        self.assertIsInstance(self.app.backend, RedisBackend)

    def test_made_later(self):
        """Where the shared backend was not made yet, the first who needs it makes it for all threads."""
        self.run_in(self.app.send_task, "add")
        made = self.thread(self.stock_backend)
        self.assertIs(self.app.backend._get_current_object(), made)
        self.assertIsNot(made, self.capture.backend)


class OwnBackendTests(CaptureTestCase):
    conf: ClassVar[dict[str, Any]] = {"result_backend": "redis://127.0.0.1:1/0"}

    def setUp(self):
        super().setUp()
        self.own = Untouchable(app=self.app, url="redis://127.0.0.1:1/9")
        self.own_task = self.app.task(name="own", shared=False, backend=self.own)(nothing)
        self.app.finalize()

    def test_refused(self):
        """A task whose results go elsewhere than to the app's backend is refused, and says why."""
        found = self.assertRaises(ImproperlyConfigured, self.run_in, self.own_task.delay)
        self.assertIn("task own has a backend= of its own", str(found))
        signature = chord([self.own_task.s()], self.own_task.s(), app=self.app)
        self.assertRaises(ImproperlyConfigured, self.run_in, signature.apply_async)

    def test_without_result(self):
        """Such a task can be called for no result, in a group too, and its backend is not asked for anything."""
        calls = group([self.own_task.s().set(ignore_result=True)] * 2, app=self.app)
        self.assertEqual(len(self.run_in(calls.apply_async).operations), 2)
        self.run_in(self.own_task.apply_async, ignore_result=True)
        gc.collect()

    def test_stock_outside(self):
        """Outside a capture the task's backend is what it was."""
        self.run_in(self.app.send_task, "add")
        self.assertRaises(AssertionError, self.own.on_task_call, None, "id")

    def test_same_backend(self):
        """A task that was given a backend like the app's own is called as any other."""
        own = RedisBackend(app=self.app, url="redis://127.0.0.1:1/0")
        task = self.app.task(name="same", shared=False, backend=own)(nothing)
        self.app.finalize()
        self.assertEqual(len(self.run_in(task.delay).operations), 1)


def nothing():
    """Do nothing."""


class Untouchable(RedisBackend):
    """A backend that may not be asked to subscribe."""

    def on_task_call(self, producer, task_id):
        raise AssertionError("asked to subscribe")

    def add_pending_result(self, result, weak=False):
        raise AssertionError("asked to subscribe")


class BlockingTests(CaptureTestCase):
    conf: ClassVar[dict[str, Any]] = {"result_backend": "redis://127.0.0.1:1/0"}

    def assertBlocks(self, words, call, *args, **kwargs):
        self.assertIn(words, str(self.assertRaises(WouldBlock, self.run_in, call, *args, **kwargs)))

    def test_results(self):
        """Reading one of Celery's results within a capture says what to use instead."""
        for habit in ("get", "ready", "successful", "state", "result", "children", "traceback", "info"):

            def call(habit=habit):
                found = getattr(self.app.send_task("add"), habit)
                return found() if callable(found) else found

            self.assertBlocks("AsyncResult", call)

    def test_group_results(self):
        """So do a group's results, and restoring one."""
        calls = group([self.app.tasks["add"].s(1, 1)] * 2, app=self.app)
        self.assertBlocks("AsyncResult", lambda: calls.apply_async().get())
        self.assertBlocks("AsyncResult", lambda: calls.apply_async().join())
        self.assertBlocks("restore_group", self.app.GroupResult.restore, "id")

    def test_results_later(self):
        """Celery's results that a capture made say the same after it."""
        result = self.run_in(self.app.send_task, "add").result
        self.assertRaises(WouldBlock, result.get)
        self.assertRaises(WouldBlock, result.forget)

    def test_backend_client(self):
        """Commands whose answer is needed are refused by name."""
        self.assertBlocks("MGET", lambda: self.app.backend.client.mget(["a"]))

    def test_channel(self):
        """A channel's or connection's methods that need the broker are refused by name."""

        def declare():
            with self.app.connection_or_acquire() as connection:
                Queue("q", channel=connection.default_channel).declare()

        def drain():
            with self.app.connection_or_acquire() as connection:
                connection.drain_events()

        def maybe_declare():
            with self.app.producer_or_acquire() as producer:
                producer.maybe_declare(Queue("q"))

        self.assertBlocks("channel.queue_declare", declare)
        self.assertBlocks("connection.drain_events", drain)
        self.assertBlocks("declare=[...]", maybe_declare)
        self.assertBlocks("channel.exchange_declare", self.app.control.broadcast, "ping", reply=True)

    def test_producer_kept(self):
        """The recording producer is of no use outside its call."""
        self.assertRaises(WouldBlock, self.capture.producer.publish, {}, routing_key="q")

    def test_never_subscribes(self):
        """Results made in a capture are not kept by any backend, nor do they tell it of their end."""
        calls = group([self.app.tasks["add"].s(1, 1)] * 2, app=self.app) | self.app.tasks["add"].s(1)
        captured = self.run_in(calls.apply_async)
        pending = self.capture.backend._pending_results
        self.assertEqual((len(pending.concrete), len(pending.weak)), (0, 0))
        del captured
        gc.collect()

    def test_forget(self):
        """Forgetting within a capture is a write, recorded."""
        captured = self.run_in(lambda: self.app.AsyncResult("some-id").forget())
        (write,) = captured.operations
        self.assertIsInstance(write, Write)
        self.assertEqual([command[0] for command in write.commands], ["DEL"])


class DisabledTests(CaptureTestCase):
    conf: ClassVar[dict[str, Any]] = {"result_backend": "disabled"}

    def test_reading(self):
        """Without a result backend there is nothing to read, and the error says what to set."""
        self.assertIsInstance(self.capture.backend, DisabledBackend)
        result = self.run_in(self.app.send_task, "add").result
        for read in (result.get, result.ready, lambda: result.state):
            self.assertIn("set result_backend", str(self.assertRaises(ResultNotKept, read)))


class CurrentAppTests(CaptureTestCase):
    def test_shared_task_and_unbound_signature(self):
        """Within a capture the app is current, whichever is current outside."""

        @shared_task(name="shared")
        def shared():
            pass

        other = make_app({})
        other.set_current()
        self.addCleanup(lambda: Celery("none").set_current())

        def call():
            return shared.delay()

        (message,) = self.run_in(call).operations
        self.assertEqual(message.properties["reply_to"], OID)
        self.assertIs(current_app._get_current_object(), other)
        unbound = Signature("add", (1, 2))
        found = self.run_in(unbound.apply_async)
        self.assertIs(found.result.app, self.app)
        found = self.run_in(lambda: self.app.signature(dict(unbound)).apply_async())
        self.assertEqual(found.operations[0].headers["task"], "add")


class EagerTests(CaptureTestCase):
    conf: ClassVar[dict[str, Any]] = {"task_always_eager": True}

    def test_eager(self):
        """An eager call runs the task and sends nothing."""
        captured = self.run_in(self.app.tasks["add"].delay, 1, 2)
        self.assertIsInstance(captured.result, EagerResult)
        self.assertEqual((captured.result.result, captured.operations), (3, []))


class TransportTests(SynchronousTestCase):
    def test_no_transport_is_made(self):
        """Neither a capture nor its making opens a connection or makes a transport."""
        made = []

        class Transport(RecordingTransport):
            def establish_connection(self):
                made.append(self)

        app = make_app({"broker_transport": Transport, "task_default_queue_type": "quorum"}, register)
        capture_of(app).run(app.send_task, "add", countdown=5)
        self.assertEqual(made, [])


class OwnTests(SynchronousTestCase):
    """An app's own code makes and sends the messages, in scope and out, whenever it was put there."""

    def make(self, conf=None, amqp=None):
        def setup(app):
            app.amqp_cls = amqp or app.amqp_cls
            register(app)

        app = make_app(conf or {}, setup)
        self.capture = capture_of(app)
        return app

    def call(self, app):
        return app.send_task("add", (1, 2))

    def stock(self, app):
        """Call as stock Celery; return what it did."""
        app._after_fork()  # the oracle closes the pools when it is done
        log, error, _ = stock(app, self.call)
        self.assertIsNone(error)
        return log

    def assert_same(self, app, fresh):
        """Stock Celery and captures send the same: before the first capture, in it, and after it."""
        expected = self.stock(fresh)
        self.assertEqual(captured(app, self.call)[0], expected)
        self.assertEqual(self.stock(app), expected)
        self.assertEqual(captured(app, self.call)[0], expected)
        return expected[-1]

    def test_own_class(self):
        """``Celery(amqp=...)``: what it overrides is called, whatever the protocol."""
        for protocol in (1, 2):
            conf = {"task_protocol": protocol}
            sent = self.assert_same(self.make(conf, OwnAMQP), self.make(conf, OwnAMQP))
            self.assertEqual([sent[5][name] for name in ("made", "sent")], ["own", "own"])

    def test_own_class_by_name(self):
        """It may be given by its name, as the documentation of Celery has it."""
        app = Celery("proj", broker="amqp://", amqp="tests.unit.capture.own:OwnAMQP", set_as_current=False)
        (message,) = capture_of(app).run(app.send_task, "add").operations
        self.assertEqual((message.headers["made"], message.headers["sent"]), ("own", "own"))
        self.assertIsInstance(app.amqp, OwnAMQP)
        self.assertEqual(repr(type(app.amqp)), repr(OwnAMQP))

    def test_own_attributes(self):
        """Its own cached properties are asked, and keep what they have made."""
        sent = self.assert_same(self.make(amqp=CachedAMQP), app := self.make(amqp=CachedAMQP))
        self.assertEqual([sent[5][name] for name in ("made", "sent")], ["own", "own"])
        self.assertIs(app.amqp.send_task_message, app.amqp.send_task_message)

    def test_own_method(self):
        """A method is called as Python would; one that calls Celery's goes the way that it goes in stock Celery."""
        ours, fresh = self.make(amqp=MethodAMQP), self.make(amqp=MethodAMQP)
        for _ in range(3):
            self.assertEqual(captured(ours, self.call)[0], self.stock(fresh))

    def wrap(self, app, name, seen):
        inner = getattr(app.amqp, name)

        def wrapper(*args, **options):
            seen.append((name, recorder(app) is not None))
            return inner(*args, **options)

        setattr(app.amqp, name, wrapper)
        return wrapper

    def test_wrappers(self):
        """A wrapper that was set before the first call, or later, is called in scope and out, and stays where it is."""
        for calls_before in (0, 1):
            app = self.make()
            for _ in range(calls_before):
                self.capture.run(self.call, app)
            seen: list[Any] = []
            names = ("create_task_message", "send_task_message")
            wrappers = [self.wrap(app, name, seen) for name in names]
            (message,) = self.capture.run(self.call, app).operations
            self.assertEqual(message.headers["task"], "add")
            self.assertEqual(seen, [(name, True) for name in names])
            del seen[:]
            thread = Thread(target=self.stock, args=(app,))
            thread.start()
            thread.join()
            self.assertEqual(seen, [(name, False) for name in names])
            self.assertEqual([getattr(app.amqp, name) for name in names], wrappers)
            for name in names:
                delattr(app.amqp, name)
            del seen[:]
            self.assert_same(app, self.make())
            self.assertEqual(seen, [])

    def test_wrapper_waits(self):
        """What a wrapper has kept of Celery's before the first call tells of the message after its confirm, all the same."""
        app = self.make({"task_send_sent_event": True})
        told = []
        for signal in (signals.after_task_publish, signals.task_sent):
            signal.connect(receiver := lambda **kwargs: told.append(kwargs["sender"]), weak=False)
            self.addCleanup(signal.disconnect, receiver)
        self.wrap(app, "send_task_message", [])
        with app.amqp._event_dispatcher.mutex:
            (message,) = self.capture.run(self.call, app).operations
        self.assertEqual(told, [])
        (*locals_, event) = message.after
        for local in locals_:
            local.run()
        self.assertEqual((told, event.exchange), (["add", "add"], "celeryev"))
        self.stock(app)
        self.assertEqual(told, ["add"] * 4)

    def test_wrapper_made_in_scope(self):
        """A wrapper that is set while a call is captured is called once for each call."""
        app = self.make()
        seen: list[Any] = []

        def call():
            self.wrap(app, "send_task_message", seen)
            return self.call(app)

        self.capture.run(call)
        (message,) = self.capture.run(self.call, app).operations
        self.assertEqual((message.headers["task"], len(seen)), ("add", 2))
        self.stock(app)
        self.assertEqual(len(seen), 3)

    def test_wrapper_that_sends_twice(self):
        """A wrapper may send more than one message, and others; each stands for itself."""
        app = self.make()
        inner = app.amqp.send_task_message

        def twice(producer, name, message, **options):
            inner(producer, name, message, **options)
            inner(producer, name, message, **{**options, "queue": "mirror"})
            producer.publish({}, exchange="audit", routing_key="sent")

        app.amqp.send_task_message = twice
        found = self.capture.run(self.call, app)
        self.assertEqual(
            [(one.exchange, one.routing_key, one.task_id) for one in found.operations],
            [("", "celery", found.result.id), ("", "mirror", found.result.id), ("audit", "sent", None)],
        )

    def test_wrapper_that_does_not_send(self):
        """A wrapper may keep a message back, or make another of it."""
        app = self.make()
        app.amqp.send_task_message = lambda *args, **options: None
        self.assertEqual(self.capture.run(self.call, app).operations, [])
        del app.amqp.send_task_message
        inner = app.amqp.send_task_message

        def other(producer, name, message, **options):
            copies = [dict(part) if isinstance(part, dict) else part for part in message]
            return inner(producer, name, tuple(copies), **options)

        app.amqp.send_task_message = other
        found = self.capture.run(self.call, app)
        self.assertEqual(found.operations[0].task_id, found.result.id)

    def test_own_app(self):
        """An app's own ``send_task`` and ``producer_or_acquire`` are called; that has the recording producer to lend."""
        app = PatientCelery("proj", broker="amqp://", set_as_current=False)
        register(app)
        capture = capture_of(app)
        (message,) = capture.run(app.tasks["add"].delay, 1, 2).operations
        self.assertEqual((message.headers["shadow"], capture.producer.seen), ("own", True))
        with app.connection_for_write() as connection:
            foreign = Producer(connection, auto_declare=False)
            found = self.assertRaises(TypeError, capture.run, app.send_task, "add", producer=foreign)
        self.assertIn("producer_or_acquire() has to lend", str(found))

    def test_own_pool(self):
        """The class of producers that an app's own pool lends is called; no producer of the pool is."""
        sent = self.assert_same(self.make(amqp=OwnPoolAMQP), app := self.make(amqp=OwnPoolAMQP))
        self.assertEqual(sent[5]["published"], "own")
        self.assertIsInstance(app.amqp.producer_pool, OwnPool)

    def test_own_producer(self):
        """``AMQP.Producer`` makes no producer of the pool: neither stock Celery nor a capture asks it."""
        classes = type("One", (AMQP,), {"Producer": OwnProducer})
        self.assertNotIn("published", self.assert_same(self.make(amqp=classes), self.make(amqp=classes))[5])

    def test_patched_publish(self):
        """A ``Producer.publish`` that somebody has patched may copy the headers, and the message is known all the same."""
        publish = Producer.publish

        def patched(producer, body, *args, **options):
            return publish(
                producer, body, *args, **{**options, "headers": dict(options["headers"], trace="x")}
            )

        self.patch(Producer, "publish", patched)
        app = self.make({"task_send_sent_event": True})
        found = self.capture.run(self.call, app)
        (message,) = found.operations
        self.assertEqual((message.headers["trace"], message.task_id), ("x", found.result.id))
        self.assertEqual([event.exchange for event in message.after], ["celeryev"])

    def test_correlation_id(self):
        """A message of another ``correlation_id``, by an option or a receiver, is known by that."""
        app = self.make()
        found = self.capture.run(app.send_task, "add", correlation_id="other")
        self.assertEqual(found.operations[0].task_id, found.result.id)
        signals.before_task_publish.connect(
            receiver := lambda properties, **kwargs: properties.update(correlation_id="third"), weak=False
        )
        self.addCleanup(signals.before_task_publish.disconnect, receiver)
        found = self.capture.run(self.call, app)
        (message,) = found.operations
        self.assertEqual((message.task_id, message.properties["correlation_id"]), (found.result.id, "third"))

    def test_patched_for_a_moment(self):
        """``unittest.mock`` replaces what it is told to, and puts it back."""
        app = self.make()
        self.capture.run(self.call, app)
        before = app.amqp.send_task_message
        with mock.patch.object(app.amqp, "send_task_message") as sender:
            self.assertEqual(self.capture.run(self.call, app).operations, [])
            self.assertEqual(sender.call_count, 1)
        self.assertIs(app.amqp.send_task_message, before)
        self.assertEqual(len(self.capture.run(self.call, app).operations), 1)
        self.assertRaises(AttributeError, delattr, self.make(amqp=MethodAMQP).amqp, "send_task_message")
