"""A short story: a Twisted program calls the tasks of a Celery app, and a real worker runs them.

`make demo` tells it over an embedded Valkey (Redis), `make demo BROKER=amqp` over RabbitMQ. Each chapter is shown as
it stands here, then run, with `tx = TwistedCelery(app)`. What sets the stage (servers, worker, clean-up) is `_stage.py`.
"""

from __future__ import annotations

import sys

from _stage import bar, play
from celery import chord, group
from celery.exceptions import TaskRevokedError
from demo_tasks import add, app, bake, divide, nap, total
from twisted.internet.defer import CancelledError, gatherResults
from twisted.internet.task import deferLater

from twistedcelery import TwistedCelery


async def one_call(tx, reactor):
    """One call: what comes back is a Deferred, here awaited"""
    answer = await tx.delay(add, 1, 2)
    print("1 + 2 =", answer)


async def a_group(tx, reactor):
    """A group: many tasks side by side, their values in order"""
    doubled = await tx.delay(group(add.s(n, n) for n in range(10)))
    print(doubled)


async def a_chord(tx, reactor):
    """A chord: a task that gets what a group returns"""
    answer = await tx.delay(chord((add.s(n, n) for n in range(10)), total.s()))
    print("twice the sum of 0 to 9:", answer)


async def a_failure(tx, reactor):
    """A failing task: its own exception, with the worker's traceback"""
    try:
        await tx.delay(divide, 1, 0)
    except ZeroDivisionError as error:
        print("caught here:", repr(error))
        print("raised there:", error.__cause__)


async def progress(tx, reactor):
    """Progress: every state that the task sets is pushed to us"""

    def show(meta):
        if meta["status"] == "PROGRESS":
            bar(meta["result"]["done"], meta["result"]["of"])

    answer = await tx.delay(bake, 30).get(on_message=show)
    print("baked:", answer)


async def second_thoughts(tx, reactor):
    """Second thoughts: cancel stops our waiting, revoke stops the task"""
    call = tx.delay(nap, 600)
    reactor.callLater(0.5, call.cancel)
    try:
        await call
    except CancelledError:
        print("half a second is enough: cancelled")

    await call.revoke(terminate=True)
    try:
        await call.get(timeout=10)
    except TaskRevokedError as error:
        print("and the worker stopped it:", repr(error))


async def a_thousand(tx, reactor):
    """A thousand calls in flight, and the reactor goes on ticking"""
    calls = []
    for n in range(1000):
        calls.append(tx.delay(add, n, 1))
        if n % 20 == 0:
            await deferLater(reactor, 0)  # let others have their turn

    answers = await gatherResults(calls)
    print(len(answers), "answers, the last one", answers[-1])


if __name__ == "__main__":
    broker = sys.argv[1] if len(sys.argv) > 1 else "redis"
    if broker not in ("amqp", "redis"):
        sys.exit("usage: demo.py [amqp|redis]")
    story = [one_call, a_group, a_failure, progress, second_thoughts, a_thousand]
    if broker == "redis":
        story.insert(2, a_chord)  # RabbitMQ's rpc backend has none: nobody would keep the members' values
    sys.exit(play(story, TwistedCelery(app), broker))
