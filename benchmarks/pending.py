"""The client that leaves results pending: what they cost in memory, and the calls beside them in time."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import deferLater, react

from benchmarks.measure import Order, Ticks, best_of, make_app, report, resident
from benchmarks.ours import Calls, round_trip, send, timed
from twistedcelery import TwistedCelery


async def main(reactor: Any) -> None:
    """Measure what the command line orders."""
    order = Order.read()
    tx = TwistedCelery(make_app(order, order.answered))
    silent = TwistedCelery(make_app(order, order.unanswered))
    await round_trip(tx, reactor, order, 10)
    await send(silent, reactor, 10)

    few, many = order.pending // 100, order.pending
    waiting = Calls(silent, reactor)
    numbers: dict[str, float] = {}
    ticks = Ticks(reactor)
    before = resident()
    for what, number in (("few", few), ("many", many - few)):
        ticks.start()
        await waiting.make(number)
        while silent.engine.outbox.count:
            await deferLater(reactor, 0.01)
        ticks.stop()
        if what == "many":
            numbers["bytes"] = (resident() - before) / many
            numbers |= ticks.seen("calling")
        ticks.start()
        trips = [await timed(round_trip(tx, reactor, order, order.calls)) for _ in range(order.rounds)]
        ticks.stop()
        numbers[what] = best_of(trips, order.calls)
        numbers |= ticks.seen(what)

    ticks.start()
    await silent.disconnect()
    ticks.stop()
    numbers |= ticks.seen("stopping")
    assert waiting.failures == many
    await tx.disconnect()
    report(**numbers)


if __name__ == "__main__":
    react(main)
