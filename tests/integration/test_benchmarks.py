"""The benchmarks run to their end, whatever their numbers are."""

from __future__ import annotations

import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

from tests.support.servers import PROJECT


class Benchmarks(SynchronousTestCase):
    def run_with(self, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", *arguments],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    def assert_runs(self, server, title):
        done = self.run_with("--scale", "0.01", server)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        self.assertIn(f"\n{title}\n", done.stdout)
        for line in ["twistedcelery", "stock Celery, blocking", "thread pool, polled", "memory of each"]:
            self.assertRegex(done.stdout, rf"\n{line} .*\d\b")

    def test_amqp(self):
        """All ways are measured against RabbitMQ."""
        self.assert_runs("amqp", "RabbitMQ, results by rpc")

    def test_redis(self):
        """All ways are measured against Redis."""
        self.assert_runs("redis", "Redis, results by Redis")

    def test_profile(self):
        """With --profile it is told where the time goes."""
        done = self.run_with("--scale", "0.01", "--profile", "amqp")
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        self.assertIn("Ordered by: internal time", done.stdout)
        self.assertIn("/twistedcelery/", done.stdout)

    def test_unknown(self):
        """Another server's name is refused at once, with the names that there are."""
        done = self.run_with("kafka")
        self.assertEqual(done.returncode, 2)
        self.assertIn("amqp or redis, not kafka", done.stderr)
