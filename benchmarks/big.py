"""The client that makes big calls: a group of many tasks, and a call with a big argument, captured in a thread."""

from __future__ import annotations

import time
from json import JSONEncoder
from typing import Any

from celery import group
from twisted.internet.task import react

from benchmarks.measure import ARGUMENTS, TASK, Order, Ticks, make_app, report
from benchmarks.ours import round_trip, send
from twistedcelery import TwistedCelery


def longest_call(text: str) -> float:
    """Seconds of the longest call into C that such an argument needs, JSON's: it keeps every other thread from Python."""
    began = time.perf_counter()
    # What `json.dumps` calls.
    JSONEncoder().iterencode([text], _one_shot=True)
    return time.perf_counter() - began


async def main(reactor: Any) -> None:
    """Measure what the command line orders."""
    order = Order.read()
    tx = TwistedCelery(make_app(order, order.answered))
    silent = TwistedCelery(make_app(order, order.unanswered))
    await round_trip(tx, reactor, order, 10)
    await send(silent, reactor, 10)

    ticks = Ticks(reactor)
    numbers: dict[str, float] = {}
    # What the program itself makes is none of ours.
    many = group(tx.app.signature(TASK, ARGUMENTS) for _ in range(order.calls))
    ticks.start()
    assert len(await tx.delay(many)) == order.calls
    ticks.stop()
    numbers |= ticks.seen("group")

    text = "x" * order.size
    lengths = [longest_call(text) for _ in range(3)]
    ticks.start()
    await silent.send_task(TASK, (text,), ignore_result=True)
    ticks.stop()
    # It differs by a fifth from one time to the next, before and after.
    numbers["longest_call"] = max(*lengths, longest_call(text))
    numbers |= ticks.seen("argument")
    await tx.disconnect()
    await silent.disconnect()
    report(**numbers)


if __name__ == "__main__":
    react(main)
