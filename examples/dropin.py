"""The drop-in: one import is changed, and what a call returns can be yielded.

Start a worker with `celery -A dropin worker`, then run `python dropin.py`, both in this directory and with a RabbitMQ on this machine;
for another broker set CELERY_BROKER_URL and CELERY_RESULT_BACKEND for both.
"""

from __future__ import annotations

from celery import group
from twisted.internet import defer, task

from twistedcelery import Celery  # instead of: from celery import Celery

app = Celery("dropin", broker="amqp://guest:guest@127.0.0.1:5672//", backend="rpc")


@app.task
def my_task(a, b):
    return a + b


@defer.inlineCallbacks
def main(reactor):
    result = yield my_task.delay(1, 2)
    print(f"1 + 2 = {result}")
    results = yield group(my_task.s(i, i) for i in range(5)).delay()
    print(results)


if __name__ == "__main__":
    task.react(main)
