"""Long runs: nothing piles up. `make soak` runs them, `make test` leaves them out."""

from __future__ import annotations

import gc
import resource

import pytest
from twisted.internet.defer import gatherResults

from tests.integration._amqp import AMQPTestCase

CALLS = 1_000_000
ROUND = 10_000


def peak() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.soak
class Dropped(AMQPTestCase):
    deadline = 1800.0

    async def test_dropped_and_never_answered(self):
        """A million calls whose Deferred is dropped, and whose tasks never answer, leave memory flat."""
        # Nobody consumes from the queue, and it keeps one message only.
        app = self.app(task_default_queue="soak")
        app.amqp.queues["soak"].queue_arguments = {"x-max-length": 1}
        tx = self.client(app)
        after_first = 0
        for number in range(CALLS // ROUND):
            sent = []
            for _ in range(ROUND):
                sent.append(tx.send_task("tests.add", args=(1, 2)).when_sent())
                if len(sent) % 50 == 0:
                    await self.sleep(0)
            await gatherResults(sent, consumeErrors=True)
            del sent
            # What runs here was called by the last of them.
            await self.sleep(0)
            if number == 4:
                after_first = peak()
        gc.collect()
        tx.engine._drain()
        self.assertEqual((len(tx.engine.waiters), tx.engine.outbox.count), (0, 0))
        self.assertLess(peak() - after_first, 20 * 1024)
