"""The scope of a capture: who is recording, in this context and this thread."""

from __future__ import annotations

from contextvars import ContextVar
from threading import get_ident
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from .._operations import Local, Operation, Publish

__all__ = [
    "Pauses",
    "Recorder",
    "TaskMessage",
    "current_recorder",
    "recorder",
    "reset_recorder",
    "set_recorder",
]


class TaskMessage:
    """A task's message, while its sender runs."""

    __slots__ = ("context", "properties", "reached", "sent", "task_id")

    def __init__(self, properties: dict[str, Any], context: Context) -> None:
        #: Options and receivers of ``before_task_publish`` change them. Whatever copies are made of the message on its way, it is known by its
        #: ``correlation_id``, which both protocols set; other messages that are published meanwhile have none.
        self.properties = properties
        self.task_id: str | None = properties.get("correlation_id")
        #: In which its signals are sent.
        self.context = context
        #: Whether it has come to the producer, so that ``before_task_publish`` was sent.
        self.reached = False
        #: What was taken down of it.
        self.sent: Publish | None = None

    def follow(self, operation: Local | Publish) -> None:
        """Take down what belongs after the confirm; only for a message that was taken down."""
        sent = self.sent
        assert sent is not None
        if sent.after is None:
            sent.after = []
        sent.after.append(operation)


class Recorder:
    """Takes down the operations of one call, in order."""

    __slots__ = (
        "app", "backend", "ignored", "operations", "pause", "producer", "redirect", "task_message", "thread",
    )  # fmt: skip

    def __init__(
        self, app: Any, producer: Any, backend: Any, pause: Callable[[], None] | None = None
    ) -> None:
        #: Whose call it is; calls of another app are none of ours.
        self.app = app
        #: What is lent to Celery's code for the moment: a recording producer, an inert backend.
        self.producer = producer
        self.backend = backend
        self.operations: list[Operation] = []
        #: The ids of tasks of the call, also of those that follow, that answer nothing (``ignore_result``).
        self.ignored: set[str | None] = set()
        #: Called now and then, where the interpreter is shared with a reactor in another thread.
        self.pause = pause
        #: The innermost one whose sender runs.
        self.task_message: TaskMessage | None = None
        #: The queue that stock Celery would have replies sent to, and ours, where results come as replies.
        self.redirect: tuple[str, str] | None = None
        # A context is copied into threads that are started inside the capture; those are not in scope.
        self.thread = get_ident()

    def reached(self, correlation_id: str | None) -> TaskMessage | None:
        """Return whose message it is that has come to the producer with this ``correlation_id``; None where it is no task's."""
        found = self.task_message
        if found is None or found.properties.get("correlation_id") != correlation_id:
            return None
        found.reached = True
        return found

    def published(self, message: Publish, task_message: TaskMessage | None) -> None:
        """Take down a message: a task's or another, or the event that follows the confirm of the task's message."""
        if self.pause is not None:
            self.pause()
        outer = self.task_message
        if task_message is not None:
            task_message.sent = message
            message.task_id = task_message.task_id
        elif (
            outer is not None and outer.sent is not None and message.exchange == self.app.conf.event_exchange
        ):
            outer.follow(message)
            return
        self.operations.append(message)

    def close(self) -> None:
        """The call has returned; contexts that were copied from its own are out of scope from now on."""
        self.thread = 0


class Pauses:
    """Sleeps for a moment when it is called and has not slept for a while.

    A thread that computes without a pause keeps the interpreter from the reactor's thread for far longer than the switch interval: only
    one that really sleeps gives it up for certain.
    """

    #: Seconds between two pauses, and of each.
    every = 0.002
    length = 0.0003

    def __init__(self) -> None:
        self._due = perf_counter() + self.every

    def __call__(self) -> None:
        if perf_counter() >= self._due:
            sleep(self.length)
            self._due = perf_counter() + self.every


_recorder: ContextVar[Recorder | None] = ContextVar("twistedcelery_recorder", default=None)


def current_recorder() -> Recorder | None:
    """Return who is recording here, whatever the app, or None outside a capture."""
    found = _recorder.get()
    return None if found is None or found.thread != get_ident() else found


def recorder(app: Any) -> Recorder | None:
    """Return who is recording this app's calls here, or None outside a capture."""
    found = _recorder.get()
    if found is None or found.thread != get_ident() or found.app is not app:
        return None
    return found


set_recorder = _recorder.set
reset_recorder = _recorder.reset
