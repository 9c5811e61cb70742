"""Captured operations equal what stock Celery hands to a broker, whatever the app and the call."""

from __future__ import annotations

import warnings

from hypothesis import HealthCheck, event, example, given, settings
from twisted.trial.unittest import SynchronousTestCase

from tests.unit.capture.oracle import captured, make_app, stock
from tests.unit.capture.recipes import apps, calls, configure, perform, register

BOUND = ("bound", None, "direct", "", {"bindings": [("other", "topic", "a.*")]})


class DifferentialTests(SynchronousTestCase):
    @settings(
        max_examples=1000,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(apps, calls)
    # A queue with bindings: it depends on the retry whether kombu declares its exchange too.
    @example(
        {"task_queues": [BOUND], "task_publish_retry": False},
        ("send_task", "add", [], {}, {"queue": "bound"}),
    )
    @example(
        {"task_queues": [BOUND], "task_publish_retry": True}, ("send_task", "add", [], {}, {"queue": "bound"})
    )
    # Two ways to stamp: the stamp whose list of names is replaced stays among the options.
    @example(
        {},
        (
            "signature",
            ("group", [("stamped", ("chunks", [], 1))]),
            [],
            {},
            {"stamped_headers": ["stamp"], "stamp": "value"},
        ),
    )
    def test_equal(self, conf, call):
        """Entities, messages and backend writes are those of stock Celery, in its order; so are ids and errors."""
        with warnings.catch_warnings():
            # Celery's, about options that it calls deprecated.
            warnings.simplefilter("ignore")
            expected = stock(make_app(configure(conf), register), lambda app: perform(app, call))
            got = captured(make_app(configure(conf), register), lambda app: perform(app, call))
        log, error, shape = expected
        event("raises" if error else f"{min(len(log), 10)} operations")
        if error is not None:
            self.assertEqual((type(error), str(error)), (type(got[1]), str(got[1])))
            return
        self.assertIsNone(got[1])
        self.assertEqual(log, got[0])
        self.assertEqual(shape, got[2])
