"""The client that calls with this library."""

from __future__ import annotations

import cProfile
import pstats
import time
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater, react

from benchmarks.measure import (
    ARGUMENTS,
    TASK,
    Order,
    Ticks,
    all_in_flight,
    best_of,
    make_app,
    report,
)
from twistedcelery import TwistedCelery

if TYPE_CHECKING:
    from collections.abc import Awaitable

#: Calls made in one turn of the reactor.
BATCH = 20


class Calls:
    """Calls in flight; ``done`` fires when every one has its result, ``failures`` counts those that failed."""

    def __init__(self, tx: TwistedCelery, reactor: Any) -> None:
        self.tx = tx
        self.reactor = reactor
        self.left = 0
        self.failures = 0
        self.done: Deferred[None] = Deferred()

    async def make(self, number: int, **options: Any) -> None:
        """Call so many times, and go on when the last call is made."""
        send_task, back, failed = self.tx.send_task, self._back, self._failed
        self.left += number
        for made in range(number):
            send_task(TASK, ARGUMENTS, **options).addCallbacks(back, failed)
            if made % BATCH == BATCH - 1:
                await deferLater(self.reactor, 0)

    def _back(self, _: object) -> None:
        self.left -= 1
        if not self.left:
            self.done.callback(None)

    def _failed(self, _: object) -> None:
        self.failures += 1
        self._back(None)


async def timed(work: Awaitable[None]) -> float:
    """CPU seconds of this process meanwhile."""
    began = time.process_time()
    await work
    return time.process_time() - began


async def send(tx: TwistedCelery, reactor: Any, number: int) -> None:
    """Call, and wait for the broker's confirms; results are ignored."""
    calls = Calls(tx, reactor)
    await calls.make(number, ignore_result=True)
    await calls.done
    assert not calls.failures


async def round_trip(tx: TwistedCelery, reactor: Any, order: Order, number: int) -> None:
    """Call, and wait for the results, which come when all are called."""
    calls = Calls(tx, reactor)
    with all_in_flight(order):
        await calls.make(number)
    await calls.done
    assert not calls.failures


async def main(reactor: Any) -> None:
    """Measure what the command line orders."""
    order = Order.read()
    tx = TwistedCelery(make_app(order, order.answered))
    silent = TwistedCelery(make_app(order, order.unanswered))
    await round_trip(tx, reactor, order, 10)
    await send(silent, reactor, 10)

    if order.profile:
        await profiled(tx, reactor, order)
        return

    ticks = Ticks(reactor)
    sends = [await timed(send(silent, reactor, order.calls)) for _ in range(order.rounds)]
    ticks.start()
    trips = [await timed(round_trip(tx, reactor, order, order.calls)) for _ in range(order.rounds)]
    ticks.stop()
    await tx.disconnect()
    await silent.disconnect()
    report(
        send=best_of(sends, order.calls),
        round_trip=best_of(trips, order.calls),
        **ticks.seen("flight"),
    )


async def profiled(tx: TwistedCelery, reactor: Any, order: Order) -> None:
    """Print where the time of a round trip goes."""
    profile = cProfile.Profile()
    profile.enable()
    await round_trip(tx, reactor, order, order.calls)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    report()


if __name__ == "__main__":
    react(main)
