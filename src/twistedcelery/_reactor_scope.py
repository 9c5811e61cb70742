"""Whether this is the reactor's thread, of a process that runs Twisted and is no Celery worker."""

from __future__ import annotations

import sys
from threading import current_thread, get_ident, main_thread
from typing import Any

from celery import signals
from twisted.python import threadable

__all__ = ["is_celery_process", "on_reactor_thread"]

_celery_process = False


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
@signals.beat_init.connect  # type: ignore[untyped-decorator]
def _is_celery_process(**kwargs: Any) -> None:
    """A worker or beat starts in this process: its calls are stock Celery's."""
    global _celery_process  # noqa: PLW0603  # a fact about the process
    _celery_process = True


def is_celery_process() -> bool:
    """Whether this process is a Celery worker or beat."""
    return _celery_process


def on_reactor_thread() -> bool:
    """Whether calls made here and now belong to the reactor.

    True where a reactor is installed and this thread runs it, or is the main thread before it runs
    (`twisted.internet.task.react` calls its function then). False in a worker, in beat, in other threads, in a plain script, and once
    the reactor has ended.
    """
    reactor: Any = sys.modules.get("twisted.internet.reactor")
    if reactor is None or _celery_process:
        return False
    thread = threadable.ioThread
    if thread is None:
        return current_thread() is main_thread()
    return bool(thread == get_ident() and reactor.running)
