"""Random runs of the state machines against servers that do what they like: nothing loops, hangs, lies or is left behind."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.support.fuzz import run_many
from tests.support.fuzz_amqp import AMQPWorld
from tests.support.fuzz_redis import RedisWorld


class OverRedis(SynchronousTestCase):
    def test_runs(self):
        """Broker, results and replies over Redis."""
        run_many(RedisWorld, range(500))


class OverAMQP(SynchronousTestCase):
    def test_runs(self):
        """Broker and replies over AMQP."""
        run_many(AMQPWorld, range(500))
