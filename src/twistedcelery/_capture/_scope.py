"""The scope of a capture: who is recording, in this context and this thread."""

from __future__ import annotations

from contextvars import ContextVar
from threading import get_ident
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._operations import Local, Operation, Publish

__all__ = ["Pauses", "Recorder", "recorder", "reset_recorder", "set_recorder"]


class Recorder:
    """Takes down the operations of one call, in order."""

    __slots__ = (
        "app", "backend", "headers", "ignored", "operations", "pause", "producer", "redirect", "sent", "thread",
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
        #: The headers by which the message of the task that is being sent is known, and that message once it has come.
        self.headers: dict[str, Any] | None = None
        self.sent: Publish | None = None
        #: The queue that stock Celery would have replies sent to, and ours, where results come as replies.
        self.redirect: tuple[str, str] | None = None
        # A context is copied into threads that are started inside the capture; those are not in scope.
        self.thread = get_ident()

    def published(self, message: Publish) -> None:
        """Take down a message: the next of the call, or one that follows the confirm of the task being sent."""
        if self.pause is not None:
            self.pause()
        if self.sent is not None:
            self.follow(message)
        else:
            self.operations.append(message)
            if message.headers is self.headers:
                self.sent = message

    def follow(self, operation: Local | Publish) -> None:
        """Take down what belongs after the confirm of the task being sent."""
        sent = self.sent
        assert sent is not None
        if sent.after is None:
            sent.after = []
        sent.after.append(operation)

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


def recorder(app: Any) -> Recorder | None:
    """Return who is recording this app's calls here, or None outside a capture."""
    found = _recorder.get()
    if found is None or found.thread != get_ident() or found.app is not app:
        return None
    return found


set_recorder = _recorder.set
reset_recorder = _recorder.reset
