"""The base of tests that capture calls of a small app."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

from twisted.trial.unittest import SynchronousTestCase

from tests.unit.capture.oracle import capture_of, make_app


def register(app):
    """Give an app tasks."""

    @app.task(name="add", shared=False)
    def add(x, y):
        return x + y

    app.task(name="mul", shared=False)(add.run)


class CaptureTestCase(SynchronousTestCase):
    conf: ClassVar[dict[str, Any]] = {}

    def setUp(self):
        self.app = make_app(self.conf, register)
        self.capture = capture_of(self.app)

    def run_in(self, call, *args, **kwargs):
        return self.capture.run(call, *args, **kwargs)

    def receive(self, signal, receiver):
        signal.connect(receiver, weak=False)
        self.addCleanup(signal.disconnect, receiver)

    def thread(self, function):
        """Run a function in a thread of its own; return what it returned."""
        found = []
        thread = threading.Thread(target=lambda: found.append(function()))
        thread.start()
        thread.join()
        return found[0]
