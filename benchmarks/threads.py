"""The client that calls with stock Celery in the reactor's thread pool, and polls for the results."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater, react
from twisted.internet.threads import deferToThread

from benchmarks.measure import ARGUMENTS, TASK, Order, Ticks, all_in_flight, best_of, make_app, report

if TYPE_CHECKING:
    from celery import Celery

#: Seconds between two looks for one result, as txCelery has it.
POLL = 0.05


async def result_of(reactor: Any, result: Any) -> Any:
    """Ask for the state, in a thread, until there is a result."""
    while not await deferToThread(result.ready):
        await deferLater(reactor, POLL)
    return result.result


async def send(app: Celery, number: int) -> None:
    """Call, results ignored."""
    await gatherResults(
        [deferToThread(app.send_task, TASK, ARGUMENTS, ignore_result=True) for _ in range(number)]
    )


async def round_trip(reactor: Any, app: Celery, order: Order, number: int) -> None:
    """Call all, then poll for all."""
    with all_in_flight(order):
        results = await gatherResults([deferToThread(app.send_task, TASK, ARGUMENTS) for _ in range(number)])
    await gatherResults([Deferred.fromCoroutine(result_of(reactor, result)) for result in results])


async def main(reactor: Any) -> None:
    """Measure what the command line orders."""
    order = Order.read()
    app = make_app(order, order.answered)
    silent = make_app(order, order.unanswered)
    await round_trip(reactor, app, order, 10)
    await send(silent, 10)

    sends, trips = [], []
    for _ in range(order.rounds):
        began = time.process_time()
        await send(silent, order.calls)
        sends.append(time.process_time() - began)
    ticks = Ticks(reactor).start()
    for _ in range(order.rounds):
        began = time.process_time()
        await round_trip(reactor, app, order, order.calls)
        trips.append(time.process_time() - began)
    ticks.stop()
    report(send=best_of(sends, order.calls), round_trip=best_of(trips, order.calls), **ticks.seen("flight"))


if __name__ == "__main__":
    react(main)
