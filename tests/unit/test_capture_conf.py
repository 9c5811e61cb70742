"""Faster settings answer exactly as Celery's do, whatever is changed where."""

from __future__ import annotations

import os
from types import SimpleNamespace
from unittest import mock

from celery import Celery
from celery.app.utils import Settings as CelerySettings
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery._capture._conf import Settings, quicken

names = st.sampled_from(
    [
        "task_always_eager",
        "task_default_queue",
        "task_default_exchange",
        "broker_url",
        "result_backend",
        "timezone",
        "made_up",
        "CELERY_DEFAULT_QUEUE",
        "broker_pool_limit",
    ]
)
values = st.sampled_from([None, True, False, "x", 1, "amqp://host//"])
changes = st.lists(
    st.one_of(
        st.tuples(st.just("set"), names, values),
        st.tuples(st.just("item"), names, values),
        st.tuples(st.just("update"), names, values),
        st.tuples(st.just("delete"), names),
        st.tuples(st.just("default"), names, values),
        st.tuples(st.just("map"), st.integers(0, 3), names, values),
        st.tuples(st.just("unmap"), st.integers(0, 3), names),
        st.tuples(st.just("module"), names, values),
        st.tuples(
            st.just("environment"), st.sampled_from(["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"]), values
        ),
        st.tuples(st.just("read"), names),
        st.tuples(st.just("clear")),
    ),
    max_size=12,
)


def change(conf, module, what, *rest):
    """Change settings in one of the ways that there are."""
    match what:
        case "set":
            setattr(conf, *rest)
        case "item":
            conf[rest[0]] = rest[1]
        case "update":
            conf.update({rest[0]: rest[1]})
        case "delete":
            conf.pop(rest[0], None) if rest[0] in conf.changes else None
        case "default":
            conf.add_defaults({rest[0]: rest[1]})
        case "map":
            conf.maps[rest[0] % len(conf.maps)][rest[1]] = rest[2]
        case "unmap":
            found = conf.maps[rest[0] % len(conf.maps)]
            if isinstance(found, dict):
                found.pop(rest[1], None)
        case "module":
            setattr(module, *rest)
        case "environment":
            os.environ[rest[0]] = str(rest[1] or "")
        case "read":
            read(conf, rest[0])
        case "clear":
            conf.clear()


def read(conf, name):
    try:
        return getattr(conf, name)
    except AttributeError as error:
        return str(error)


def made(source, namespace):
    """Make an app's settings, from a module (an object with attributes) or from keywords."""
    module = SimpleNamespace(task_default_queue="from-module", CELERY_TASK_DEFAULT_QUEUE="namespaced")
    app = Celery("proj", set_as_current=False)
    if source:
        app.config_from_object(module, namespace=namespace)
    app.conf.task_ignore_result = True
    assert app.conf.task_ignore_result
    return app.conf, module


class ConfTests(SynchronousTestCase):
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(changes, st.booleans(), st.sampled_from([None, "CELERY"]))
    def test_equal(self, changing, source, namespace):
        """After any sequence of changes each name has the value, or the error, that Celery's own settings have."""
        with mock.patch.dict(os.environ):
            plain, plain_module = made(source, namespace)
            quick, quick_module = made(source, namespace)
            quicken(quick)
            self.assertIs(type(quick), Settings)
            for one in [("read", "task_default_queue"), *changing]:
                change(plain, plain_module, *one)
                change(quick, quick_module, *one)
                for name in ("task_default_queue", "made_up", "task_default_exchange", "broker_url"):
                    self.assertEqual(read(quick, name), read(plain, name))
            self.assertEqual(list(quick), list(plain))

    def test_without_celery(self):
        """A name that was found once is not looked up by Celery again while nothing changes."""
        for source in (False, True):
            conf, _ = made(source, None)
            quicken(conf)
            conf.task_always_eager, conf.task_default_queue  # noqa: B018  # looked up
            with mock.patch.object(CelerySettings, "__getitem__", side_effect=AssertionError):
                self.assertEqual(conf.task_always_eager, False)
                self.assertEqual(conf.task_default_queue, "from-module" if source else "celery")

    def test_other_maps(self):
        """Settings over maps of a kind that is not known are Celery's affair."""

        class Odd(dict[str, str]):
            def __missing__(self, key):
                return "made for " + key

        conf, _ = made(False, None)
        conf.add_defaults(Odd())
        quicken(conf)
        self.assertEqual([conf.whatever, conf.whatever], ["made for whatever"] * 2)

    def test_appearance(self):
        """Quick settings show themselves and refuse as Celery's."""
        plain, quick = made(False, None)[0], made(False, None)[0]
        quicken(quick)
        self.assertEqual(repr(quick), repr(plain))
        self.assertEqual(read(quick, "nothing"), read(plain, "nothing"))
        self.assertIsInstance(quick, CelerySettings)

    def test_other_classes(self):
        """Settings of another class are left alone, and so are quick ones."""

        class Mine(CelerySettings):
            pass

        conf, _ = made(False, None)
        object.__setattr__(conf, "__class__", Mine)
        quicken(conf)
        self.assertIs(type(conf), Mine)
