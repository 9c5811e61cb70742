"""Where calls belong to the reactor."""

from __future__ import annotations

import os
import sys
import warnings
from threading import Thread, get_ident
from types import SimpleNamespace
from typing import Any

from celery import signals
from twisted.python import threadable
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery import _reactor_scope
from twistedcelery._reactor_scope import is_celery_process, is_forked, on_reactor_thread


class ScopeTests(SynchronousTestCase):
    def reactor(self, *, running: bool = True, thread: int | None = None, **marks: bool) -> None:
        """Have a reactor installed, that a thread runs; None: it has not run yet. ``marks``: Twisted's own of it."""
        modules: dict[str, Any] = sys.modules
        before = modules.get("twisted.internet.reactor")
        modules["twisted.internet.reactor"] = SimpleNamespace(running=running, **marks)

        def restore() -> None:
            if before is None:
                modules.pop("twisted.internet.reactor", None)
            else:
                modules["twisted.internet.reactor"] = before

        self.addCleanup(restore)
        self.patch(threadable, "ioThread", thread)

    def elsewhere(self) -> bool:
        """Ask in another thread."""
        found = []
        thread = Thread(target=lambda: found.append(on_reactor_thread()))
        thread.start()
        thread.join()
        return found[0]

    def test_before_it_runs(self):
        """Before the reactor runs the main thread counts as its own."""
        self.reactor(running=False)
        self.assertEqual((on_reactor_thread(), self.elsewhere()), (True, False))

    def test_running(self):
        """Then it is the thread that runs it."""
        self.reactor(thread=get_ident())
        self.assertEqual((on_reactor_thread(), self.elsewhere()), (True, False))
        self.patch(threadable, "ioThread", -1)
        self.assertFalse(on_reactor_thread())

    def test_ended(self):
        """Once it has ended there is none."""
        for marks in ({}, {"_startedBefore": True}):
            self.reactor(running=False, thread=get_ident(), **marks)
            self.assertFalse(on_reactor_thread())

    def test_runs_again(self):
        """Trial leaves it after each test and runs it again: what is called in between belongs to it."""
        self.reactor(running=False, thread=get_ident(), _startedBefore=False)
        self.assertEqual((on_reactor_thread(), self.elsewhere()), (True, False))

    def test_no_reactor(self):
        """A program without a reactor has none, and gets none by being asked."""
        self.reactor()
        del sys.modules["twisted.internet.reactor"]
        self.assertFalse(on_reactor_thread())
        self.assertNotIn("twisted.internet.reactor", sys.modules)

    def test_worker(self):
        """A worker and beat are Celery's, unless a reactor runs beside them."""
        for signal in (signals.celeryd_init, signals.beat_init):
            self.patch(_reactor_scope, "_celery_process", False)
            self.reactor(running=False, _startedBefore=False)
            signal.send(sender="x", instance=None, conf=None, options=None)
            self.assertTrue(is_celery_process())
            self.assertFalse(on_reactor_thread())
            self.patch(threadable, "ioThread", get_ident())
            self.assertFalse(on_reactor_thread())
            vars(sys.modules["twisted.internet.reactor"])["running"] = True
            self.assertTrue(on_reactor_thread())

    def test_command(self):
        """So is any command of Celery's, while it runs."""
        from celery.bin.celery import celery

        self.reactor(running=False)
        found = []

        @celery.command("ask")
        def ask() -> None:
            found.append((is_celery_process(), on_reactor_thread()))

        self.addCleanup(celery.commands.pop, "ask")
        celery.main(["--quiet", "ask"], standalone_mode=False)
        self.assertEqual(found, [(True, False)])
        self.assertEqual((is_celery_process(), on_reactor_thread()), (False, True))

    def test_fork(self):
        """A process that is forked while the reactor runs has none; one that is forked before has."""
        for running in (True, False):
            self.reactor(running=running, thread=get_ident() if running else None)
            with warnings.catch_warnings():
                # Python 3.12 warns of threads, which a test run has; the child does nothing that could meet their locks.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if not child:
                # Nothing but the answer: this is a copy of the test run.
                os._exit(10 + 2 * is_forked() + on_reactor_thread())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            self.assertEqual(status, 12 if running else 11)
        self.assertFalse(is_forked())
