"""Captured operations equal what stock Celery hands to a broker, whatever the app and the call."""

from __future__ import annotations

import warnings

from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.unit.capture.oracle import captured, make_app, stock
from tests.unit.capture.own import CachedAMQP, OwnAMQP, OwnPoolAMQP, wrap
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

    @settings(
        max_examples=100,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(
        apps,
        calls.filter(lambda call: call[0] != "control"),
        st.sampled_from([OwnAMQP, CachedAMQP, OwnPoolAMQP, None]),
    )
    def test_equal_with_own_code(self, conf, call, amqp):
        """So are those of an app with an AMQP class of its own, or with wrappers around what Celery's does; and after a capture stock calls are."""

        def setup(app):
            app.amqp_cls = amqp or app.amqp_cls
            register(app)
            if amqp is None:
                wrap(app)

        def calling(app):
            return perform(app, call)

        # Message protocol 1 has no headers for CachedAMQP to mark.
        conf = {**conf, "task_protocol": 2} if amqp is CachedAMQP else conf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = stock(make_app(configure(conf), setup), calling)
            ours = make_app(configure(conf), setup)
            got = captured(ours, calling)
            # Events carry it.
            ours.clock.value = 0
            again = stock(ours, calling)
        for log, error, shape in (got, again):
            self.assertEqual((type(error), str(error)), (type(expected[1]), str(expected[1])))
            if error is None:
                self.assertEqual((log, shape), (expected[0], expected[2]))
