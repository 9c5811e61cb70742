"""What a capture records: messages, what precedes and what follows them; and what it refuses."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, ClassVar

from celery import VERSION, current_app, group, signals
from kombu.entity import Exchange, Queue, binding
from kombu.exceptions import EncodeError, SerializerNotInstalled

from tests.unit.capture.case import CaptureTestCase
from tests.unit.capture.oracle import capture_of, make_app
from twistedcelery._capture import recorder
from twistedcelery._operations import BindQueue, Local, Publish


class SignalTests(CaptureTestCase):
    def test_before_changes_the_message(self):
        """A receiver of before_task_publish changes headers, properties, declarations and the retry policy."""
        extra = Queue("extra", Exchange("extra"), "extra")

        def before(headers, properties, declare, retry_policy, **kwargs):
            headers["trace"] = "abc"
            properties["message_id"] = "m"
            declare.append(extra)
            if VERSION >= (5, 7):
                retry_policy["max_retries"] = 99

        self.receive(signals.before_task_publish, before)
        (message,) = self.run_in(self.app.send_task, "add").operations
        self.assertEqual(message.headers["trace"], "abc")
        self.assertEqual(message.properties["message_id"], "m")
        self.assertEqual([entity.name for entity in message.entities], ["celery", "extra"])
        self.assertEqual(message.retry_policy["max_retries"], 99 if VERSION >= (5, 7) else 3)

    def test_id_survives_receivers(self):
        """The task id of a message is the call's, whatever a receiver does to the headers."""
        self.receive(signals.before_task_publish, lambda headers, **kwargs: headers.clear())
        captured = self.run_in(self.app.send_task, "add")
        self.assertEqual(captured.operations[0].task_id, captured.result.id)

    def test_after_waits(self):
        """after_task_publish and task_sent are recorded to follow the confirm, and get what Celery gives."""
        told = []
        self.receive(signals.after_task_publish, lambda sender, **kwargs: told.append((sender, kwargs)))
        self.receive(signals.task_sent, lambda sender, **kwargs: told.append((sender, kwargs)))
        (message,) = self.run_in(self.app.send_task, "add", (1, 2)).operations
        self.assertEqual(told, [])
        for local in message.after:
            self.assertIsInstance(local, Local)
            local.run()
        (sender, after), (_, sent) = told
        self.assertEqual((sender, after["routing_key"], after["exchange"]), ("add", "celery", ""))
        self.assertEqual(after["headers"]["id"], sent["task_id"])
        self.assertIs(after["signal"], signals.after_task_publish)

    def test_no_receiver_no_work(self):
        """Without receivers and events nothing follows a message."""
        (message,) = self.run_in(self.app.send_task, "add").operations
        self.assertIsNone(message.after)

    def test_context(self):
        """Context variables that a receiver sets before are there after, and nowhere else."""
        variable = ContextVar("variable", default="unset")
        seen = []
        self.receive(signals.before_task_publish, lambda **kwargs: variable.set("set"))
        self.receive(signals.after_task_publish, lambda **kwargs: seen.append(variable.get()))
        captured = self.run_in(self.app.send_task, "add")
        captured.operations[0].after[0].run()
        self.assertEqual((seen, variable.get()), (["set"], "unset"))

    def test_receiver_sends(self):
        """A call that a receiver makes is recorded before the message that it was told of."""

        def before(sender, **kwargs):
            if sender == "add":
                self.app.send_task("mul", (1, 2))

        self.receive(signals.before_task_publish, before)
        self.receive(signals.after_task_publish, lambda **kwargs: None)
        first, second = self.run_in(self.app.send_task, "add").operations
        self.assertEqual([first.headers["task"], second.headers["task"]], ["mul", "add"])
        self.assertEqual([len(first.after), len(second.after)], [1, 1])

    def test_receiver_publishes(self):
        """A message that is no task's, published by a receiver, is recorded as one that stands alone."""
        self.receive(signals.before_task_publish, lambda **kwargs: self.app.control.revoke("id"))
        self.receive(signals.after_task_publish, lambda **kwargs: None)
        control, message = self.run_in(self.app.send_task, "add").operations
        self.assertEqual((control.exchange, control.after), ("celery.pidbox", None))
        self.assertEqual((message.headers["task"], len(message.after)), ("add", 1))

    def test_receiver_captures(self):
        """A capture within a capture has operations of its own, and the outer one goes on."""
        inner = []

        def before(sender, **kwargs):
            if sender == "add":
                inner.append(self.run_in(self.app.send_task, "mul", (1, 2)))

        self.receive(signals.before_task_publish, before)
        (message,) = self.run_in(self.app.send_task, "add").operations
        self.assertEqual(message.headers["task"], "add")
        self.assertEqual([m.headers["task"] for m in inner[0].operations], ["mul"])
        self.assertFalse(recorder(self.app) is not None)


class EventTests(CaptureTestCase):
    conf: ClassVar[dict[str, Any]] = {"task_send_sent_event": True}

    def test_protocol_1(self):
        """In protocol 1 a message is known as the task's as well, and has its id."""
        app = make_app({**self.conf, "task_protocol": 1})
        captured = capture_of(app).run(app.send_task, "add")
        (message,) = captured.operations
        self.assertEqual((message.task_id, len(message.after)), (captured.result.id, 1))

    def test_sent_event(self):
        """The task-sent event follows the confirm, complete, and waits for no lock of the app's dispatcher."""
        with self.app.amqp._event_dispatcher.mutex:
            (message,) = self.run_in(self.app.send_task, "add", (1, 2)).operations
        (event,) = message.after
        self.assertIsInstance(event, Publish)
        self.assertEqual((event.exchange, event.routing_key), ("celeryev", "task.sent"))
        self.assertEqual([entity.name for entity in event.entities], ["celeryev"])
        self.assertEqual(event.properties["delivery_mode"], 1)
        self.assertIsNone(event.task_id)

    def test_bad_event(self):
        """An event that cannot be made fails the call; it is not kept for ever."""
        app = make_app({**self.conf, "event_serializer": "none-such"})
        self.assertRaises(SerializerNotInstalled, capture_of(app).run, app.send_task, "add")


class ErrorTests(CaptureTestCase):
    conf: ClassVar[dict[str, Any]] = {"task_create_missing_queues": False, "task_queues": [Queue("celery")]}

    def state(self):
        return dict(vars(self.app._local)), current_app._get_current_object(), recorder(self.app) is not None

    def assertRefused(self, error, words, *args, **kwargs):
        before = self.state()
        found = self.assertRaises(error, self.run_in, self.app.send_task, *args, **kwargs)
        self.assertIn(words, str(found))
        self.assertEqual(self.state(), before)
        self.assertEqual(len(self.run_in(self.app.send_task, "add").operations), 1)

    def test_unserialisable(self):
        """An argument that cannot be serialised is refused."""
        self.assertRefused(EncodeError, "not JSON serializable", "add", (object(),))

    def test_midway(self):
        """Where a member of a group is refused, nothing of the group is sent, and the next call is whole."""
        bad = group(self.app.tasks["add"].s(1, 1), self.app.tasks["add"].s(1, object()), app=self.app)
        self.assertRaises(EncodeError, self.run_in, bad.apply_async)
        (message,) = self.run_in(self.app.send_task, "mul").operations
        self.assertEqual(message.headers["task"], "mul")

    def test_unknown_option(self):
        """An option that neither Celery nor AMQP knows is refused by name."""
        self.assertRefused(TypeError, "'countdwon'", "add", countdwon=3)

    def test_unknown_retry_policy(self):
        """A retry policy of unknown keys is refused, as stock Celery does."""
        self.assertRefused(TypeError, "'max_retry'", "add", retry=True, retry_policy={"max_retry": 3})

    def test_wrong_arguments(self):
        """Arguments that are no list or tuple are refused."""
        self.assertRefused(TypeError, "task args must be a list or tuple", "add", "ab")

    def test_missing_queue(self):
        """A queue that the app does not have, and may not make, is refused."""
        self.assertRefused(Exception, "Queue 'nowhere' missing", "add", queue="nowhere")

    def test_nameless_queue(self):
        """A queue whose name the server would make is refused."""
        self.assertRefused(ValueError, "needs a name", "add", declare=[Queue("", Exchange("x"))])

    def test_connections(self):
        """Kombu's own connections and producers are refused."""
        with self.app.connection_for_write() as connection:
            self.assertRefused(TypeError, "leave them out", "add", connection=connection)
            producer = self.app.amqp.Producer(connection, auto_declare=False)
            self.assertRefused(TypeError, "leave them out", "add", producer=producer)


class MessageTests(CaptureTestCase):
    def publish(self, **options):
        (message,) = self.run_in(self.app.send_task, "add", **options).operations
        return message

    def test_mandatory(self):
        """``mandatory`` tells an explicit False from none."""
        self.assertEqual([self.publish(mandatory=value).mandatory for value in (True, False)], [True, False])
        self.assertIsNone(self.publish().mandatory)
        (message,) = self.run_in(self.app.tasks["add"].apply_async, (1, 2)).operations
        self.assertIsNone(message.mandatory)

    def test_times(self):
        """``timeout`` and ``confirm_timeout`` are the outbox's, with every Celery."""
        message = self.publish(timeout=3, confirm_timeout=4)
        self.assertEqual((message.timeout, message.confirm_timeout), (3, 4))
        self.assertNotIn("confirm_timeout", message.properties)

    def test_reply_to_queue(self):
        """A Queue as ``reply_to`` stands for its name."""
        self.assertEqual(self.publish(reply_to=Queue("mine")).properties["reply_to"], "mine")

    def test_explicit_declare(self):
        """``declare=`` is declared instead of the queue, in its order; an empty one declares nothing."""
        names = [entity.name for entity in self.publish(declare=[Exchange("e"), Queue("q")]).entities]
        self.assertEqual(names, ["e", "q"])
        self.assertEqual(self.publish(declare=[]).entities, ())

    def test_celery_names(self):
        """Options of Celery's own that it passes on to the message end where py-amqp would drop them."""
        self.assertNotIn("argsrepr", self.publish(argsrepr="hidden").properties)

    def test_other_brokers(self):
        """A broker whose wire format takes any property gets what Celery passes on; what nobody knows is refused there too."""
        self.assertNotIn("origin", self.publish(origin="me").properties)
        self.capture.producer.connection.properties = None
        self.assertEqual(self.publish(origin="me").properties["origin"], "me")
        self.assertRaises(TypeError, self.publish, anything=1)

    def test_encoding(self):
        """A body of text is encoded as its content_encoding says."""

        def call():
            with self.app.producer_or_acquire() as producer:
                return producer.channel.prepare_message("é", content_type="x", content_encoding="latin-1")

        self.assertEqual(self.run_in(call).result.body, b"\xe9")

    def test_broadcast(self):
        """A control command is one publish to the fanout, declared, of no task."""
        (message,) = self.run_in(self.app.control.revoke, "some-id").operations
        self.assertEqual((message.exchange, message.routing_key), ("celery.pidbox", ""))
        self.assertEqual(message.entities[0].declarations[0].type, "fanout")
        self.assertIsNone(message.task_id)


class EntityTests(CaptureTestCase):
    def entities(self, queue):
        (message,) = self.run_in(self.app.send_task, "add", declare=[queue]).operations
        return message.entities[0]

    def test_same_object(self):
        """A queue that has not changed is recorded once."""
        queue = Queue("q", Exchange("e"), "k", queue_arguments={"x": [1]})
        self.assertIs(self.entities(queue), self.entities(queue))

    def test_changes(self):
        """A queue, its exchange, its arguments or its bindings changed between two calls are recorded anew."""
        for change in (
            lambda queue: setattr(queue, "routing_key", "other"),
            lambda queue: setattr(queue, "durable", False),
            lambda queue: setattr(queue.exchange, "durable", False),
            lambda queue: queue.queue_arguments.update(y=1),
            lambda queue: queue.queue_arguments["x"].append(2),
        ):
            queue = Queue("q", Exchange("e"), "k", queue_arguments={"x": [1]})
            before = self.entities(queue)
            change(queue)
            after = self.entities(queue)
            self.assertNotEqual(before.key, after.key)
            self.assertIs(self.entities(queue), after)

    def test_bindings(self):
        """A queue of several bindings declares them all, and anew when one changes or is added."""
        first = binding(Exchange("e"), routing_key="a")
        queue = Queue("q", bindings=[first])
        before = self.entities(queue)
        self.assertIs(self.entities(queue), before)
        first.routing_key = "b"
        changed = self.entities(queue)
        self.assertEqual(changed.declarations[-1].routing_key, "b")
        queue.bindings.add(binding(Exchange("f"), routing_key="c"))
        self.assertEqual(
            {d.exchange for d in self.entities(queue).declarations if isinstance(d, BindQueue)}, {"e", "f"}
        )

    def test_cacheable(self):
        """Queues that may vanish by themselves are declared for every message."""
        self.assertTrue(self.entities(Queue("q")).cacheable)
        for queue in (
            Queue("q", auto_delete=True),
            Queue("q", exclusive=True),
            Queue("q", expires=5),
            Queue("q", queue_arguments={"x-expires": 5000}),
            Exchange("e", auto_delete=True),
        ):
            self.assertFalse(self.entities(queue).cacheable)

    def test_bounded(self):
        """However many queues are used, few are remembered."""
        entities = self.capture.producer._entities[True]
        entities.limit = 3
        for number in range(10):
            self.entities(Queue(f"q{number}"))
        self.assertLessEqual(len(entities._known), 3)

    def test_not_touched(self):
        """Recording leaves the queue unbound and tells nobody that it has been declared."""
        told = []
        queue = Queue("q", Exchange("e"), on_declared=lambda *args: told.append(args))
        self.entities(queue)
        self.assertEqual((queue.is_bound, queue.exchange.is_bound, told), (False, False, []))
