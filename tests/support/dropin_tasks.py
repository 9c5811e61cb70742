"""A module with the drop-in: a worker loads it unchanged, and so does whoever calls. ``python -m`` runs it as a program."""

from __future__ import annotations

import os

from celery.result import AsyncResult
from twisted.internet import defer, task

from twistedcelery import Celery, DeferrableTask, TwistedCelery, send_task
from twistedcelery.errors import WrongThread

from . import ready  # noqa: F401  # it listens

__all__ = ["app"]

app = Celery("tests.support.dropin_tasks", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.broker_connection_retry_on_startup = True


@app.task
def my_task(a, b):
    return a + b


deferrable = DeferrableTask(my_task)


@app.task
def call_inside():
    """Call tasks from inside of a task: stock Celery, and what is Twisted's own says that it is out of place."""
    results = [my_task.delay(1, 2), my_task.s(3, 4).apply_async(), deferrable.delay(5, 6)]
    return [
        [type(result).__mro__[1] is AsyncResult for result in results],
        [result.get(timeout=10, disable_sync_subtasks=False) for result in results],
        [_refused(TwistedCelery(app).delay, my_task, 1, 2), _refused(send_task, app, "x")],
    ]


def _refused(call, *args):
    try:
        call(*args)
    except WrongThread as error:
        return "call the task itself" in str(error)
    return False


@defer.inlineCallbacks
def main(reactor):
    result = yield my_task.delay(1, 2)
    print(f"{1} + {2} = {result}")
    found = yield call_inside.delay()
    print(found)


if __name__ == "__main__":
    task.react(main)
