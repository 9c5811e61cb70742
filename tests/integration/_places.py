"""Where tests that hold for several brokers and backends run: mixins for `ClientTestCase`, each with the run's shared worker."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from celery import Celery, _state
from kombu import pools

from tests.integration._clients import ClientTestCase
from tests.support import servers
from tests.support.servers import PROJECT
from tests.support.tasks import app as worker_app
from twistedcelery import Celery as TwistedCeleryApp

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.internet.defer import Deferred

    from twistedcelery import TwistedCelery

__all__ = ["OverAMQP", "OverRedis", "RedisOverAMQP", "Tasks"]


class Tasks:
    """The tests' tasks as an app's own: ``tasks.add`` is ``tests.add``. Their functions are the worker's."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def __getattr__(self, name: str) -> Any:
        stock = worker_app.tasks[f"tests.{name}"]
        options = {"typing": False, "ignore_result": stock.ignore_result}
        return self._app.task(
            stock.run if not hasattr(stock.run, "__func__") else stock.run.__func__,
            name=stock.name,
            bind=hasattr(stock.run, "__self__"),
            **options,
        )


class _Place(ClientTestCase):
    """What these share."""

    def dropin(self, **settings: Any) -> TwistedCeleryApp:
        """Make an app of the drop-in; its TwistedCelery ends with the test, and has nothing in its tables then."""
        app = TwistedCeleryApp("client", broker=self.broker, backend=self.backend)
        app.conf.update(settings)
        self.addCleanup(self.stop_dropin, app)
        return app

    def run_program(
        self, text: str, *arguments: str, **environment: str
    ) -> Deferred[subprocess.CompletedProcess[str]]:
        """Run a program in a process of its own; fires once it has ended."""

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-c", text, *arguments],
                capture_output=True,
                text=True,
                timeout=50,
                check=False,
                cwd=PROJECT,
                env={**os.environ, **environment},
            )

        return self.in_thread(run)

    async def program(self, text: str, *arguments: str, **environment: str) -> str:
        """Run a program in a process of its own; gives what it has printed, and fails where it fails or complains."""
        done = await self.run_program(text, *arguments, **environment)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        return done.stdout

    def elsewhere(self, function: Callable[[Celery], Any]) -> Deferred[Any]:
        """Call something with a stock app of the same broker and backend, in a thread; then close what it has opened."""

        def run() -> Any:
            app = Celery("elsewhere", broker=self.broker, backend=self.backend, set_as_current=False)
            before, _state._tls.current_app = _state._tls.current_app, app
            try:
                return function(app)
            finally:
                _state._tls.current_app = before
                backend = app.backend
                consumer = getattr(backend, "result_consumer", None)
                # That of rpc can be stopped only where it was started.
                if consumer is not None and getattr(consumer, "_consumer", consumer) is not None:
                    consumer.stop()
                if hasattr(type(backend), "client"):
                    backend.client.connection_pool.disconnect()
                pools.reset()

        return self.in_thread(run)

    async def assert_empties(self, tx: TwistedCelery) -> None:
        """Nothing is left, once nobody waits: one call may have many who do."""
        gc.collect()
        engine = tx.engine

        def is_empty() -> bool:
            engine._drain()
            return not len(engine.waiters)

        await self.eventually(is_empty, what="somebody waits")
        await self.assert_nothing_left(tx)

    async def stop_dropin(self, app: TwistedCeleryApp) -> None:
        """Stop, and see that nothing is left."""
        await self.stop(app.twisted)


class OverAMQP(_Place):
    """RabbitMQ, and replies through it."""

    def start_servers(self):
        self.broker, self.backend = servers.rabbitmq().url, "rpc://"
        servers.worker(self.broker, self.backend)


class OverRedis(_Place):
    """One Redis for messages and results."""

    def start_servers(self):
        self.broker = self.backend = servers.redis().url
        servers.worker(self.broker, self.backend)


class RedisOverAMQP(_Place):
    """RabbitMQ, and results in Redis."""

    def start_servers(self):
        self.broker, self.backend = servers.vhost("redis"), servers.database("results of AMQP")
        servers.worker(self.broker, self.backend)
