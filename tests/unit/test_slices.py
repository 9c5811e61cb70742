"""Long work in slices."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery._slices import in_slices


class SlicesTests(SynchronousTestCase):
    def setUp(self):
        self.clock = Clock()
        self.done = []

    def work(self, item):
        self.done.append(item)
        self.clock.rightNow += 0.0015

    def test_short_work_is_done_at_once(self):
        """What fits into one slice is done before the call returns."""
        finished = in_slices(self.clock, [1, 2], self.done.append)
        self.assertEqual(self.done, [1, 2])
        self.successResultOf(finished)

    def test_nothing_to_do(self):
        """No items: it fires at once."""
        self.successResultOf(in_slices(self.clock, [], self.done.append))

    def test_long_work_yields(self):
        """After a budget of time the reactor has its turn, and the work goes on after it."""
        finished = in_slices(self.clock, range(6), self.work, budget=0.002)
        self.assertEqual(self.done, [0, 1])
        self.assertNoResult(finished)
        self.clock.callLater(0, self.done.append, "another's turn")
        self.clock.advance(0)
        self.assertEqual(self.done, [0, 1, 2, 3, "another's turn", 4, 5])
        self.successResultOf(finished)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_cancel(self):
        """Cancelling stops before the next slice and leaves no timer."""
        finished = in_slices(self.clock, range(6), self.work, budget=0.002)
        finished.addErrback(lambda _: None)
        finished.cancel()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.done, [0, 1])

    def test_cancelled_by_the_work(self):
        """Work that cancels the rest of itself stops there."""
        waiting: list[Any] = []

        def work(item):
            self.done.append(item)
            if item == 1:
                waiting[0].cancel()
            self.clock.rightNow += 0.003

        waiting.append(in_slices(self.clock, range(6), work).addErrback(lambda _: None))
        self.clock.advance(0)
        self.assertEqual(self.done, [0, 1])
        self.assertEqual(self.clock.getDelayedCalls(), [])
