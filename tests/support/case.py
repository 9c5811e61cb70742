"""The base of tests that use the real reactor, real servers and real time."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from .proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["IntegrationTestCase", "Ticker"]

T = TypeVar("T")


class Ticker:
    """Ticks every 10 ms and remembers the worst lateness: how long the reactor was kept from other work.

    Attributes:
        worst: seconds by which the latest tick came too late.
        worst_collection: seconds of the longest pause of the garbage collector, which ``worst`` includes.
        ticks: how many there were.

    """

    interval = 0.01

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._call: Any = None
        self._due = 0.0
        self._began = 0.0
        self.worst = 0.0
        self.worst_collection = 0.0
        self.ticks = 0

    def start(self) -> Ticker:
        """Begin, or begin anew with everything at zero."""
        self.stop()
        self.worst = self.worst_collection = 0.0
        self.ticks = 0
        gc.callbacks.append(self._collecting)
        self._next()
        return self

    def stop(self) -> None:
        """End; a tick that is overdue by now counts."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
            gc.callbacks.remove(self._collecting)
            self.worst = max(self.worst, self._reactor.seconds() - self._due)

    def _next(self) -> None:
        self._due = self._reactor.seconds() + self.interval
        self._call = self._reactor.callLater(self.interval, self._tick)

    def _tick(self) -> None:
        self.worst = max(self.worst, self._reactor.seconds() - self._due)
        self.ticks += 1
        self._next()

    def _collecting(self, phase: str, info: dict[str, int]) -> None:
        now = self._reactor.seconds()
        if phase == "start":
            self._began = now
        else:
            self.worst_collection = max(self.worst_collection, now - self._began)


class IntegrationTestCase(TestCase):
    """Trial's TestCase with a deadline and what tests against real servers keep needing.

    Tests may be coroutines or return Deferreds. A Deferred that fails and that nobody looks at fails the test which
    dropped it, as does whatever is left in the reactor.
    """

    #: Seconds that a test, its ``setUp``, its ``tearDown`` and each clean-up may take.
    deadline: float = 60.0

    def setUp(self) -> None:
        """Import the reactor that is installed."""
        from twisted.internet import reactor

        self.reactor: Any = reactor

    def tearDown(self) -> None:
        """Have errors of dropped Deferreds logged now, within the test that they belong to."""
        gc.collect()

    def addCleanup(  # type: ignore[override]  # as Trial's own does
        self, f: Callable[..., object], *args: Any, **kwargs: Any
    ) -> None:
        """Trial's, for coroutines too, which it takes from Twisted 24 on."""
        super().addCleanup(maybeDeferred, f, *args, **kwargs)

    def getTimeout(self) -> float:
        """Trial's name for the deadline."""
        return self.deadline

    def in_thread(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> Deferred[T]:
        """Do something that blocks (starting, killing a server) while the reactor runs."""
        return deferToThread(function, *args, **kwargs)

    def sleep(self, seconds: float) -> Deferred[None]:
        """Fire after real time."""
        waiting: Deferred[None] = Deferred(lambda _: call.cancel())
        call = self.reactor.callLater(seconds, waiting.callback, None)
        return waiting

    def eventually(
        self,
        condition: Callable[[], object],
        *,
        timeout: float = 30.0,
        interval: float = 0.01,
        what: str = "",
    ) -> Deferred[None]:
        """Fire as soon as the condition is true; fail the test after ``timeout`` seconds."""
        give_up = self.reactor.seconds() + timeout

        def look() -> None:
            if condition():
                loop.stop()
            elif self.reactor.seconds() > give_up:
                raise self.failureException(f"not within {timeout} s: {what or condition}")

        loop = LoopingCall(look)
        loop.clock = self.reactor
        return loop.start(interval).addCallback(lambda _: None)

    async def proxy(self, target_port: int) -> FaultProxy:
        """Start a proxy in front of a server; it ends with the test."""
        proxy = FaultProxy(self.reactor, target_port)
        await proxy.start()
        self.addCleanup(proxy.stop)
        return proxy

    def ticker(self) -> Ticker:
        """Start a ticker; it ends with the test."""
        ticker = Ticker(self.reactor).start()
        self.addCleanup(ticker.stop)
        return ticker

    async def failure_of(self, awaitable: Awaitable[object], *errors: type[BaseException]) -> Any:
        """Wait for something that has to fail with one of these errors, and return the error."""
        try:
            result = await awaitable
        except errors as error:
            return error
        raise self.failureException(f"expected {errors}, got {result!r}")
