"""The Celery app of the tests' workers: ``celery -A tests.support.tasks worker``.

Configured by the environment: ``BROKER`` and ``BACKEND`` (URLs), ``SETTINGS`` (Celery settings as JSON), ``READY`` (a
file that is made when the worker takes tasks).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from celery import Celery, Task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from . import ready  # noqa: F401  # it listens

__all__ = ["CustomError", "app"]

app = Celery("tests", broker=os.environ.get("BROKER"), backend=os.environ.get("BACKEND"))
app.conf.update(
    broker_connection_retry_on_startup=True,
    # The tests kill brokers.
    broker_connection_max_retries=None,
    # After a lost connection each acknowledgement would be followed by a basic.qos, from the thread of its task: two that wait
    # for their answers read each other's frames, and the worker hangs or loses a message (Celery 5.7.0, py-amqp 5.4.2).
    worker_enable_prefetch_count_reduction=False,
    worker_hijack_root_logger=False,
)
app.conf.update(json.loads(os.environ.get("SETTINGS", "{}")))


class CustomError(Exception):
    """An error with arguments of its own, rebuilt from them on the client's side."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text


class _UnpicklableError(Exception):
    """An error that neither JSON nor pickle takes: it holds a lambda and needs two arguments."""

    def __init__(self, first: object, second: object) -> None:
        super().__init__(f"{first} {second}")
        self.function = lambda: (first, second)


#: Seconds until a retry. Where another thread of the worker may run it at once, its state can be stored before that of the
#: attempt that asked for it, which then replaces it: with Redis, for good.
_SOON = 0.5


@app.task(name="tests.add")
def add(x, y):
    return x + y


@app.task(name="tests.mul")
def mul(x, y):
    return x * y


@app.task(name="tests.xsum")
def xsum(numbers):
    """The sum of a list, whose items may be lists."""
    return sum(sum(one) if isinstance(one, list | tuple) else one for one in numbers)


@app.task(name="tests.tsum")
def tsum(numbers):
    """The body of a chord."""
    return sum(numbers)


@app.task(name="tests.identity")
def identity(value):
    return value


@app.task(name="tests.echo")
def echo(*args, **kwargs):
    return [list(args), kwargs]


@app.task(name="tests.fail")
def fail(message="failed"):
    raise ValueError(message)


@app.task(name="tests.custom_error")
def custom_error(code, text):
    raise CustomError(code, text)


@app.task(name="tests.raise_unpicklable")
def raise_unpicklable():
    raise _UnpicklableError("not", "picklable")


@app.task(name="tests.return_unserializable")
def return_unserializable():
    """The worker cannot send this; its client gets the worker's EncodeError."""
    return object()


@app.task(name="tests.sleep")
def sleep(seconds):
    time.sleep(seconds)
    return seconds


@app.task(name="tests.hold")
def hold(path):
    """Run for as long as there is a file at ``path``."""
    while Path(path).exists():
        time.sleep(0.01)
    return "let go"


@app.task(name="tests.guarded_sleep")
def guarded_sleep(seconds):
    """Sleep, and give "limit" where the soft time limit ends it."""
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded:
        return "limit"
    return seconds


@app.task(name="tests.big_result")
def big_result(size):
    """A string of so many characters."""
    return "x" * size


@app.task(name="tests.ignore", ignore_result=True)
def ignore(path=None):
    """Its result is thrown away; that it ran can be seen by the line in ``path``."""
    if path is not None:
        _append(path, "ignore")
    return "never seen"


@app.task(name="tests.progress", bind=True)
def progress(self, count, interval=0.0):
    """Send ``count`` PROGRESS states, then the result."""
    for done in range(1, count + 1):
        self.update_state(state="PROGRESS", meta={"current": done, "total": count})
        time.sleep(interval)
    return count


@app.task(name="tests.retry_then_succeed", bind=True, max_retries=10)
def retry_then_succeed(self, failures=1, countdown=_SOON):
    """Ask to be tried again ``failures`` times; returns how often it was."""
    if self.request.retries < failures:
        raise self.retry(countdown=countdown, exc=ValueError("not yet"))
    return self.request.retries


@app.task(name="tests.retry_for_ever", bind=True, max_retries=1)
def retry_for_ever(self):
    """Fails with the error of its last attempt."""
    raise self.retry(countdown=_SOON, exc=ValueError("never"))


@app.task(name="tests.retry_unpicklable", bind=True)
def retry_unpicklable(self):
    """Asks to be tried again much later, for an error that cannot be sent."""
    raise self.retry(countdown=100, exc=_UnpicklableError("not", "picklable"))


class AutoRetry(Task):
    """A task that is a class, tried again by itself; returns how often it was."""

    name = "tests.auto_retry"
    autoretry_for = (ValueError,)
    max_retries = 3
    default_retry_delay = 0

    def run(self, failures=1):
        if self.request.retries < failures:
            raise ValueError("not yet")
        return self.request.retries


app.register_task(AutoRetry())


@app.task(name="tests.raise_ignore", bind=True)
def raise_ignore(self, state="CUSTOM"):
    """Sets its state by itself and has the worker store none."""
    self.update_state(state=state, meta={"by": "itself"})
    raise Ignore


@app.task(name="tests.raise_reject", acks_late=True)
def raise_reject(requeue=False):
    raise Reject("rejected by the task", requeue=requeue)


@app.task(name="tests.replace", bind=True)
def replace(self, x, y):
    """Another task takes its place and gives its result."""
    raise self.replace(add.s(x, y))


@app.task(name="tests.add_to_all", bind=True)
def add_to_all(self, numbers, value):
    """A group takes its place: each number plus the value."""
    from celery import group

    raise self.replace(group(add.s(number, value) for number in numbers))


@app.task(name="tests.replace_by_failure", bind=True)
def replace_by_failure(self, message="replaced"):
    """A chain takes its place, whose first task fails."""
    raise self.replace(fail.si(message) | identity.s())


@app.task(name="tests.replace_twice", bind=True)
def replace_twice(self, value):
    """Two tasks in a row take its place, the first of which is replaced as well."""
    raise self.replace(replace.si(value, 1) | add.s(1))


@app.task(name="tests.replace_by", bind=True)
def replace_by(self, *args):
    """Its last argument, a signature, takes its place; that one's first task gets the other arguments."""
    *before, instead = args
    instead = app.signature(instead)
    tasks = getattr(instead, "tasks", None) or [instead]
    tasks[0].args = (*before, *tasks[0].args)
    raise self.replace(instead)


@app.task(name="tests.add_to_chord", bind=True)
def add_to_chord(self, numbers, value):
    """Add more tasks to the header that it belongs to."""
    for number in numbers:
        self.add_to_chord(add.si(number, value))
    return 0


@app.task(name="tests.extend_chord", bind=True)
def extend_chord(self, more):
    """Add a signature to the header that it belongs to."""
    self.add_to_chord(app.signature(more))
    return 0


@app.task(name="tests.call_canvas")
def call_canvas(canvas):
    """Call a signature; returns Celery's result object, which the worker makes a tuple of."""
    return app.signature(canvas).apply_async()


@app.task(name="tests.spawn", bind=True)
def spawn(self, numbers, depth=1):
    """Call other tasks, which become its children; returns their ids."""
    if depth > 1:
        return [spawn.delay(numbers, depth - 1).id for _ in range(2)]
    return [identity.delay(number).id for number in numbers]


@app.task(name="tests.priority", bind=True)
def priority(self, _=None):
    return self.request.delivery_info["priority"]


@app.task(name="tests.ids", bind=True)
def ids(self, value=None):
    """Which ids the message gave: of the root, the parent and the task."""
    return [self.request.root_id, self.request.parent_id, self.request.id, value]


@app.task(name="tests.header_dump", bind=True)
def header_dump(self, *args, **kwargs):
    """All that the worker made of the message, as far as JSON can hold it.

    Celery spreads the headers over the request; ``properties`` holds what came as properties.
    """
    return _dump(self.request)


@app.task(name="tests.retry_then_dump", bind=True)
def retry_then_dump(self, *args, **kwargs):
    """The same of its second attempt's message."""
    if not self.request.retries:
        raise self.retry(countdown=_SOON)
    return _dump(self.request)


def _dump(request):
    defaults = {
        name: value
        for name, value in vars(type(request)).items()
        if not name.startswith("_") and not callable(value) and not isinstance(value, property)
    }
    return json.loads(json.dumps({**defaults, **vars(request)}, default=str))


def _append(path: str, line: str) -> None:
    """Append one line at once: lines of several workers do not mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


@app.task(name="tests.record", bind=True)
def record(self, path, key=None):
    """Append the key (or the task's id) to the file, so that a test can see how often the task ran."""
    key = self.request.id if key is None else key
    _append(path, str(key))
    return key


@app.task(name="tests.record_error", bind=True)
def record_error(self, request, exc=None, traceback=None, *, path=None, **_):
    """An error callback: append the failed task's id to the file."""
    task_id = request if isinstance(request, str) else request.id
    if path is not None:
        _append(path, task_id)
    return task_id


@app.task(name="tests.record_failure")
def record_failure(request, exc, traceback, *, path):
    """An error callback of the new style, called by the worker itself: append the failed task's id."""
    _append(path, request.id)


@app.task(name="tests.record_after_retry", bind=True)
def record_after_retry(self, path, key):
    """Append the key to the file, at the second attempt."""
    if not self.request.retries:
        raise self.retry(countdown=_SOON)
    _append(path, key)


@app.task(name="tests.record_request", bind=True)
def record_request(self, path, name):
    """Append one thing that the message has told, as JSON, to the file."""
    _append(path, json.dumps(getattr(self.request, name)))
