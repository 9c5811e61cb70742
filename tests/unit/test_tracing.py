"""Traces, with the real OpenTelemetry and Sentry: spans begin, nest and end, whichever app is current."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from celery import Celery, group, signals
from kombu.exceptions import EncodeError
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from twisted.internet.defer import CancelledError
from twisted.trial.unittest import SynchronousTestCase

from tests.unit.test_calling import CallingTestCase
from tests.unit.test_dropin import DropinTestCase
from twistedcelery import Celery as DropIn
from twistedcelery.errors import NotSent, OutboxFull, OutcomeUnknown, Refused
from twistedcelery.signals import task_publish_failed

PROJECT = Path(__file__).parents[2]


def documented() -> dict[str, Any]:
    """Run what the README says about OpenTelemetry; return what it defines."""
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    (block,) = [one for one in blocks if "opentelemetry" in one]
    found: dict[str, Any] = {}
    exec(block, found)
    return found


class Traced(CallingTestCase):
    """Tests with a tracer, and another app that is current."""

    settings: dict[str, Any] = {"outbox_limit": 5}  # noqa: RUF012  # never changed

    def setUp(self):
        super().setUp()
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")
        instrumentor = CeleryInstrumentor()
        instrumentor.instrument(tracer_provider=provider)
        self.addCleanup(instrumentor.uninstrument)
        task_publish_failed.connect(end_span := documented()["end_span"], weak=False)
        self.addCleanup(task_publish_failed.disconnect, end_span)

        @self.app.task(name="t", shared=False)
        def t(*args):
            return args

        self.t: Any = t
        self.app.finalize()
        Celery("other").set_current()
        self.addCleanup(lambda: Celery("none").set_current())

    def spans(self) -> list[Any]:
        """Return the spans that have ended, but for the caller's."""
        return [span for span in self.exporter.get_finished_spans() if span.name != "caller"]

    def assert_no_span_left(self):
        """The instrumentation keeps a span until it has ended."""
        self.assertEqual(getattr(self.t, "__otel_task_span", {}), {})
        self.assertFalse(trace.get_current_span().get_span_context().is_valid)


class OpenTelemetryTests(Traced):
    def test_two_apps(self):
        """A span begins with the call and ends with the confirm, though another app is current; its id goes with the message."""
        self.up()
        with self.tracer.start_as_current_span("caller") as caller:
            self.tx.delay(self.t, 1)
            self.assertIs(trace.get_current_span(), caller)
        (message,) = self.broker.published
        self.assertEqual(self.spans(), [])
        self.confirm()
        (span,) = self.spans()
        self.assertEqual(span.name, "apply_async/t")
        self.assertEqual(span.parent.span_id, caller.get_span_context().span_id)
        self.assertIn(format(span.context.span_id, "016x"), message.headers["traceparent"])
        self.assertTrue(span.status.is_ok or span.status.is_unset)
        self.assert_no_span_left()

    def test_siblings(self):
        """The messages of a group are siblings, children of what was current where it was called."""
        self.up()
        with self.tracer.start_as_current_span("caller") as caller:
            self.tx.delay(group(self.t.s(1), group(self.t.s(2), self.t.s(3))))
            self.tx.delay(self.t, 4)
        self.confirm()
        self.assertEqual(
            [span.parent.span_id for span in self.spans()], [caller.get_span_context().span_id] * 4
        )
        self.assert_no_span_left()

    def test_in_a_thread(self):
        """So are those of a canvas that is captured in a thread."""
        self.up()
        with self.tracer.start_as_current_span("caller") as caller:
            self.tx.apply_async(group(self.t.s(1), self.t.s(2)), in_thread=True)
        self.threads.run()
        self.turn()
        self.confirm()
        self.assertEqual(
            [span.parent.span_id for span in self.spans()], [caller.get_span_context().span_id] * 2
        )
        self.assert_no_span_left()


class FailureTests(Traced):
    def assert_failed(self, *errors):
        """Every span has ended, with an error."""
        self.assertEqual(
            [span.events[0].attributes["exception.type"].rpartition(".")[2] for span in self.spans()],
            [error.__name__ for error in errors],
        )
        self.assertEqual({span.status.status_code for span in self.spans()}, {trace.StatusCode.ERROR})
        self.assert_no_span_left()

    def test_not_sent(self):
        """A call that is not sent ends its span."""
        calling = self.tx.delay(self.t, 1)
        self.turn(5)
        self.broker.fail()
        self.failureResultOf(calling, NotSent)
        self.assert_failed(NotSent)

    def test_refused(self):
        """A message that the broker refuses ends its span; the others of its call end with their own outcome."""
        self.up()
        calling = self.tx.delay(group(self.t.s(1), self.t.s(2), self.t.s(3)))
        first, second, third = self.broker.published
        self.broker.outcome(second, Refused("no"))
        self.failureResultOf(calling, Refused)
        self.assertEqual(len(self.spans()), 1)
        self.broker.outcome(first, None)
        self.broker.outcome(third, OutcomeUnknown("cut"))
        self.assertEqual(len(self.spans()), 3)
        self.assertEqual(
            [span.status.status_code is trace.StatusCode.ERROR for span in self.spans()], [True, False, True]
        )
        self.assert_no_span_left()

    def test_lost(self):
        """A call that may not be sent again ends its span when its connection is lost."""
        self.up()
        calling = self.tx.apply_async(self.t, (1,), retry=False)
        self.broker.lose()
        self.failureResultOf(calling, OutcomeUnknown)
        self.assert_failed(OutcomeUnknown)

    def test_unconfirmed(self):
        """A call whose confirm takes too long ends its span once; the confirm is too late for it."""
        self.up()
        calling = self.tx.apply_async(self.t, (1,), confirm_timeout=1)
        self.turn(1)
        self.failureResultOf(calling, OutcomeUnknown)
        self.confirm()
        self.assert_failed(OutcomeUnknown)

    def test_cancelled(self):
        """A call that is withdrawn ends its span."""
        calling = self.tx.delay(self.t, 1)
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        self.assert_failed(CancelledError)

    def test_cancelled_in_a_thread(self):
        """So does one that was withdrawn while it was put together."""
        calling = self.tx.apply_async(self.t, (1,), in_thread=True)
        calling.cancel()
        self.failureResultOf(calling, CancelledError)
        self.threads.run()
        self.turn()
        self.assert_failed(CancelledError)

    def test_outbox_full(self):
        """A call that finds the outbox full ends its span."""
        for number in range(5):
            self.tx.delay(self.t, number)
        calling = self.tx.delay(self.t, 5)
        self.failureResultOf(calling, OutboxFull)
        self.assertEqual([span.status.status_code for span in self.spans()], [trace.StatusCode.ERROR])

    def test_not_put_together(self):
        """A call that raises ends the spans of all of its messages."""
        self.assertRaises(EncodeError, self.tx.delay, self.t, object())
        self.assertRaises(EncodeError, self.tx.delay, group(self.t.s(1), self.t.s(object())))
        self.assert_failed(*[EncodeError] * 3)
        # Before it begins there is nothing to end.
        with self.tracer.start_as_current_span("caller") as caller:
            self.assertRaises(TypeError, self.tx.apply_async, self.t, "args")
            self.assertTrue(caller.is_recording())

    def test_stopped(self):
        """Stopping ends the spans of what could not be sent."""
        calling = self.tx.delay(self.t, 1)
        self.tx.stopService()
        self.turn(11)
        self.failureResultOf(calling)
        self.assertEqual([span.status.status_code for span in self.spans()], [trace.StatusCode.ERROR])

    def test_arguments(self):
        """The signal has what ``after_task_publish`` has, the task's id and the error."""
        told: list[Any] = []
        task_publish_failed.connect(receiver := lambda **kwargs: told.append(kwargs), weak=False)
        self.addCleanup(task_publish_failed.disconnect, receiver)
        sent: list[Any] = []
        signals.after_task_publish.connect(other := lambda **kwargs: sent.append(kwargs), weak=False)
        self.addCleanup(signals.after_task_publish.disconnect, other)
        self.up()
        calling = self.tx.apply_async(self.t, (1,), retry=False)
        self.broker.lose()
        self.up()
        self.tx.delay(self.t, 1)
        self.confirm()
        failure = self.failureResultOf(calling, OutcomeUnknown)
        (failed,), (after,) = told, sent
        self.assertEqual(failed.keys() - after.keys(), {"task_id", "exception"})
        self.assertEqual((failed["task_id"], failed["exception"]), (calling.id, failure.value))
        for name in ("sender", "exchange", "routing_key", "body"):
            self.assertEqual(failed[name], after[name])
        self.assertEqual(failed["headers"]["id"], calling.id)

    def test_receiver_raises(self):
        """A receiver that raises is logged by Celery, and the call fails as it would."""
        task_publish_failed.connect(receiver := lambda **kwargs: 1 / 0, weak=False)
        self.addCleanup(task_publish_failed.disconnect, receiver)
        self.up()
        calling = self.tx.apply_async(self.t, (1,), retry=False)
        with self.assertLogs("celery.utils.dispatch.signal"):
            self.broker.lose()
        self.failureResultOf(calling, OutcomeUnknown)


class DropInTests(DropinTestCase):
    def test_siblings(self):
        """The drop-in's calls are siblings, too, and their spans end."""
        exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        instrumentor = CeleryInstrumentor()
        instrumentor.instrument(tracer_provider=provider)
        self.addCleanup(instrumentor.uninstrument)
        self.assertIsInstance(self.app, DropIn)
        Celery("other").set_current()
        self.addCleanup(lambda: Celery("none").set_current())
        self.up()
        with provider.get_tracer("test").start_as_current_span("caller") as caller:
            calling = group(self.t.s(1), self.t.s(2)).apply_async()
        self.confirm()
        spans: list[Any] = [span for span in exporter.get_finished_spans() if span.name == "apply_async/t"]
        self.assertEqual([span.parent.span_id for span in spans], [caller.get_span_context().span_id] * 2)
        del calling
        gc.collect()


#: Sentry patches Celery and kombu for good, so it gets a process of its own.
SENTRY = """
import json, sentry_sdk
from celery import group
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.transport import Transport
from tests.unit._fakes import EngineTestCase

class Kept(Transport):
    events = []
    def capture_envelope(self, envelope):
        self.events += [item.payload.json for item in envelope.items if item.type == "transaction"]

sentry_sdk.init(
    "http://key@localhost/1", transport=Kept, traces_sample_rate=1.0, default_integrations=False, integrations=[CeleryIntegration()]
)

class Test(EngineTestCase):
    def runTest(self):
        @self.app.task(name="t", shared=False)
        def t(*args):
            return args
        self.up()
        with sentry_sdk.start_transaction(name="caller"):
            self.tx.delay(t, 1)
            self.tx.delay(group(t.s(2), t.s(3)))
        messages = list(self.broker.published)
        self.confirm()
        (event,) = Kept.events
        print(json.dumps({
            "spans": [span["op"] for span in event["spans"]],
            "trace": event["contexts"]["trace"]["trace_id"],
            "headers": [message.headers["sentry-trace"] for message in messages],
            "known": [message.task_id == message.headers["id"] for message in messages],
        }))

import unittest
result = unittest.TestResult()
Test().run(result)
assert result.wasSuccessful(), result.errors + result.failures
"""


class SentryTests(SynchronousTestCase):
    def test_traced(self):
        """Its spans stand in the caller's transaction, and its headers go with every message."""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", SENTRY],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        found = json.loads(done.stdout)
        self.assertEqual(found["spans"].count("queue.publish"), 3)
        self.assertEqual(len(found["headers"]), 3)
        for header in found["headers"]:
            self.assertTrue(header.startswith(found["trace"]), header)
        self.assertEqual(found["known"], [True] * 3)
