"""The client that calls with stock Celery, and blocks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.measure import ARGUMENTS, TASK, Order, all_in_flight, best_of, make_app, report

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery import Celery


def timed(work: Callable[[], None]) -> float:
    """CPU seconds of this process meanwhile."""
    began = time.process_time()
    work()
    return time.process_time() - began


def send(app: Celery, number: int) -> None:
    """Call, results ignored."""
    for _ in range(number):
        app.send_task(TASK, ARGUMENTS, ignore_result=True)


def round_trip(app: Celery, order: Order, number: int) -> None:
    """Call all, then collect all."""
    with all_in_flight(order):
        results = [app.send_task(TASK, ARGUMENTS) for _ in range(number)]
    for result in results:
        result.get()


def main() -> None:
    """Measure what the command line orders."""
    order = Order.read()
    app = make_app(order, order.answered)
    silent = make_app(order, order.unanswered)
    confirming = make_app(order, order.unanswered, broker_transport_options={"confirm_publish": True})
    round_trip(app, order, 10)
    send(silent, 10)

    sends = [timed(lambda: send(silent, order.calls)) for _ in range(order.rounds)]
    confirmed = None
    if order.broker.startswith("amqp"):
        send(confirming, 10)
        rounds = [timed(lambda: send(confirming, order.calls)) for _ in range(order.rounds)]
        confirmed = best_of(rounds, order.calls)
    trips = [timed(lambda: round_trip(app, order, order.calls)) for _ in range(order.rounds)]
    report(
        send=best_of(sends, order.calls),
        send_confirmed=confirmed,
        round_trip=best_of(trips, order.calls),
    )


if __name__ == "__main__":
    main()
