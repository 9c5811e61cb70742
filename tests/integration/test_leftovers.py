"""Nothing piles up and nothing is dropped early, through either door and at every place."""

from __future__ import annotations

import gc
from typing import Any

from celery import chain, group
from celery.result import ResultBase
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, inlineCallbacks, succeed

from tests.integration._clients import outcomes
from tests.integration._places import OverAMQP, OverRedis, RedisOverAMQP, Tasks
from tests.support import servers
from twistedcelery.errors import ResultTimeout


class _Leftovers:
    """What holds through either door."""

    def open(self: Any) -> tuple[Tasks, Any]:
        """Give the tasks of a new app, and its TwistedCelery."""
        raise NotImplementedError

    def call(self, canvas: Any, *args: Any, **options: Any) -> Any:
        """Call a task or a canvas through this door."""
        raise NotImplementedError

    async def assert_bare(self: Any, tx: Any, timers: int) -> None:
        """No entry, no subscription and no timer more than there were."""
        await self.assert_empties(tx)
        left = self.subscriptions
        if left is not None:
            for _ in range(300):
                if not await self.in_thread(left):
                    break
                await self.sleep(0.05)
            self.assertEqual(await self.in_thread(left), 0)
        await self.eventually(
            lambda: len(self.reactor.getDelayedCalls()) <= timers, what=f"{self.reactor.getDelayedCalls()}"
        )

    settings: Any = {}  # noqa: RUF012  # never changed

    #: Counts what this client is subscribed to.
    subscriptions: Any = None

    async def test_waits_that_end(self: Any) -> None:
        """Waits that are cancelled, that time out or are dropped leave nothing: of tasks, groups, chains and handles."""
        tasks, tx = self.open()
        await self.call(tasks.add, (1, 1))
        await self.sleep(0.05)
        timers = len(self.reactor.getDelayedCalls())

        gate = self.gate()
        hold = tasks.hold.si(str(gate))

        def canvases() -> list[Any]:
            return [hold.clone(), group(hold.clone(), hold.clone()), chain(hold.clone(), tasks.add.si(1, 1))]

        callings = [self.call(canvas) for canvas in canvases()]
        for calling in callings:
            await self.failure_of(calling.get(timeout=0.01), ResultTimeout)
            await self.failure_of(calling.async_result.get(timeout=0.01), ResultTimeout)
            getting = calling.get(on_message=print)
            getting.cancel()
            await self.failure_of(getting, CancelledError)
        for calling in callings[:2]:
            calling.cancel()
        callings[2].addTimeout(0.01, self.reactor)
        await outcomes(callings)
        foreign = tx.AsyncResult("nobody has called it")
        await self.failure_of(foreign.get(timeout=0.01), ResultTimeout)
        for canvas in canvases():
            self.call(canvas)
            self.call(canvas.clone() if not isinstance(canvas, group) else group(canvas.tasks)).get()
        del callings, calling, getting, canvas
        # What `get` was asked for is kept until it comes; here nobody knows of it any more.
        await self.eventually(lambda: not tx.engine.outbox.count)
        gate.unlink()
        await self.assert_bare(tx, timers)

    async def test_survival(self: Any) -> None:
        """With anything attached, however that is done, a result survives the collector and fires."""
        tasks, tx = self.open()
        got: list[Any] = []

        def canvases() -> list[Any]:
            return [
                tasks.sleep.s(0.5),
                group(tasks.sleep.s(0.5), tasks.sleep.s(0.5)),
                chain(tasks.sleep.si(0.5), tasks.sleep.si(0.5)),
                group([tasks.sleep.s(0.5), *(tasks.add.s(0, number) for number in range(60))]),
            ]

        async def awaits(canvas: Any) -> None:
            got.append(await self.call(canvas))

        @inlineCallbacks
        def yields(canvas: Any) -> Any:
            value = yield self.call(canvas)
            got.append(value)

        waiting: list[Deferred[Any]] = []
        for canvas in canvases():
            self.call(canvas).addCallback(got.append)
            succeed(canvas).addCallback(self.call).addCallback(got.append)
            ensureDeferred(awaits(canvas.clone()))
            yields(canvas.clone())
            other: Deferred[Any] = Deferred()
            self.call(canvas.clone()).chainDeferred(other)
            waiting.append(other.addCallback(got.append))
        for _ in range(5):
            gc.collect()
            await self.sleep(0.05)
        await self.eventually(lambda: len(got) == 20, timeout=60, what="a result was dropped")
        self.assertEqual(got.count(0.5), 10)
        del waiting, other, canvas
        await self.assert_empties(tx)

    async def test_results_of_celery(self: Any) -> None:
        """A group of a thousand leaves no result of Celery's."""
        tasks, tx = self.open()
        await self.call(tasks.add, (1, 1))
        # Twisted remembers what was awaited last.
        await self.sleep(0)
        gc.collect()
        before = _results()
        calling = self.call(group(tasks.add.s(number, 1) for number in range(1000)))
        self.assertEqual(await calling, list(range(1, 1001)))
        del calling
        await self.sleep(0)
        gc.collect()
        self.assertEqual(_results() - before, 0)
        await self.assert_empties(tx)


def _results() -> int:
    """How many there are."""
    return sum(isinstance(found, ResultBase) for found in gc.get_objects())


class _ThroughTwistedCelery(_Leftovers):
    def open(self: Any) -> tuple[Tasks, Any]:
        app = self.app(**self.settings)
        self.tx = self.client(app)
        return Tasks(app), self.tx

    def call(self: Any, canvas: Any, *args: Any, **options: Any) -> Any:
        return self.tx.apply_async(canvas, *args, **options)


class _ThroughDropin(_Leftovers):
    def open(self: Any) -> tuple[Tasks, Any]:
        app = self.dropin(**self.settings)
        return Tasks(app), app.twisted

    def call(self: Any, canvas: Any, *args: Any, **options: Any) -> Any:
        return canvas.apply_async(*args, **options)


class _InRedis:
    """Where results are pushed by pub/sub."""

    def subscriptions(self: Any) -> int:
        """Count the channels that this client listens to."""
        with servers.redis().client() as client:
            found: Any = client.client_list()
        return sum(int(one["sub"]) for one in found if one["name"] == self.settings["redis_client_name"])

    @property
    def settings(self) -> dict[str, Any]:
        return {"redis_client_name": f"leftovers-{id(self)}"}


class TwistedCeleryOverAMQP(_ThroughTwistedCelery, OverAMQP):
    """RabbitMQ and rpc."""


class DropinOverAMQP(_ThroughDropin, OverAMQP):
    """RabbitMQ and rpc."""


class TwistedCeleryOverRedis(_InRedis, _ThroughTwistedCelery, OverRedis):
    """Redis and Redis."""


class DropinOverRedis(_InRedis, _ThroughDropin, OverRedis):
    """Redis and Redis."""


class TwistedCeleryRedisOverAMQP(_InRedis, _ThroughTwistedCelery, RedisOverAMQP):
    """RabbitMQ and Redis."""


class DropinRedisOverAMQP(_InRedis, _ThroughDropin, RedisOverAMQP):
    """RabbitMQ and Redis."""
