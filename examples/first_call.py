"""The smallest program: call a task, wait for its result, print it.

Start a worker with `celery -A first_call worker`, then run `python first_call.py`, both in this directory and with a
RabbitMQ on this machine; for another broker set CELERY_BROKER_URL and CELERY_RESULT_BACKEND for both.
"""

from __future__ import annotations

from celery import Celery
from twisted.internet import defer, task

from twistedcelery import TwistedCelery

app = Celery(broker="amqp://guest:guest@127.0.0.1:5672//", backend="rpc")


@app.task(name="my_task")
def my_task(a, b):
    return a + b


@defer.inlineCallbacks
def main(reactor):
    tx_app = TwistedCelery(app)
    result = yield tx_app.send_task("my_task", args=(1, 2))
    print(f"1 + 2 = {result}")


if __name__ == "__main__":
    task.react(main)
