"""Many more of the random runs of `tests/unit/test_state_fuzz.py`, from another start each time."""

from __future__ import annotations

import random

import pytest
from twisted.trial.unittest import SynchronousTestCase

from tests.support.fuzz import run_many
from tests.support.fuzz_amqp import AMQPWorld
from tests.support.fuzz_redis import RedisWorld

RUNS = 20_000


@pytest.mark.soak
class LongFuzz(SynchronousTestCase):
    def test_runs(self):
        """A failure names the run that repeats it."""
        start = random.randrange(10**9)
        for kind in (RedisWorld, AMQPWorld):
            run_many(kind, range(start, start + RUNS))
