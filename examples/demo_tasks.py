"""The tasks of the examples. A Celery module like any other, also for the worker: `celery -A demo_tasks worker`.

Celery's own variables CELERY_BROKER_URL and CELERY_RESULT_BACKEND replace the URLs, here as for any app.
"""

from __future__ import annotations

import time

from celery import Celery

app = Celery("demo", broker="amqp://guest:guest@127.0.0.1:5672//", backend="rpc://")


@app.task
def add(x, y):
    return x + y


@app.task
def total(numbers):
    return sum(numbers)


@app.task
def divide(x, y):
    return x / y


@app.task(bind=True)
def bake(self, loaves):
    """Say after each loaf how many are done."""
    for done in range(1, loaves + 1):
        time.sleep(0.06)
        self.update_state(state="PROGRESS", meta={"done": done, "of": loaves})
    return f"{loaves} loaves"


@app.task
def nap(seconds):
    time.sleep(seconds)
