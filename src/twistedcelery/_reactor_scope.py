"""Whether this is the reactor's thread, of a process that runs Twisted and is no Celery worker or command."""

from __future__ import annotations

import os
import sys
from threading import current_thread, get_ident, main_thread
from typing import Any

from celery import signals
from twisted.python import threadable

__all__ = ["is_celery_process", "is_forked", "on_reactor_thread"]

_celery_process = False
_forked = False


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
@signals.beat_init.connect  # type: ignore[untyped-decorator]
def _is_celery_process(**kwargs: Any) -> None:
    """A worker or beat starts in this process: its calls are stock Celery's."""
    global _celery_process  # noqa: PLW0603  # a fact about the process
    _celery_process = True


def _after_fork() -> None:
    """The child of a process whose reactor runs has a copy of it that nobody runs; twistd forks earlier."""
    global _forked  # noqa: PLW0603  # a fact about the process
    _forked = _forked or _running()


os.register_at_fork(after_in_child=_after_fork)


def _running() -> bool:
    reactor: Any = sys.modules.get("twisted.internet.reactor")
    return reactor is not None and bool(getattr(reactor, "running", True))


def _in_celery_command() -> bool:
    """Whether a command of Celery's runs here: ``celery call``, ``celery shell`` ..."""
    commands: Any = sys.modules.get("celery.bin.celery")
    if commands is None:
        return False
    from click import get_current_context  # Celery's own

    context = get_current_context(silent=True)
    return context is not None and context.find_root().command is commands.celery


def _runs_again(reactor: Any) -> bool:
    """Whether a reactor that does not run may: it was left with ``crash()``, and not ended with ``stop()``."""
    # Twisted's own mark of a reactor that is not restartable; one without it has ended.
    return not getattr(reactor, "_startedBefore", True) and not is_celery_process()


def is_celery_process() -> bool:
    """Whether this process is a Celery worker, beat, or another command of Celery's."""
    return _celery_process or _in_celery_command()


def is_forked() -> bool:
    """Whether this process was forked from one whose reactor runs: here nobody runs it."""
    return _forked


def on_reactor_thread() -> bool:
    """Whether calls made here and now belong to the reactor.

    True where a reactor is installed and this thread runs it, or is the main thread before it runs
    (`twisted.internet.task.react` calls its function then) or runs again (Trial runs it once for each test). False in a worker, in
    beat, in other commands of Celery's, in other threads, in a plain script, in a process forked from the reactor's, and once the
    reactor has ended.
    """
    reactor: Any = sys.modules.get("twisted.internet.reactor")
    if reactor is None or _forked:
        return False
    thread = threadable.ioThread
    if thread is not None:
        # Where it runs it counts, even if other threads of the process are a worker's or beat's.
        return thread == get_ident() and bool(reactor.running or _runs_again(reactor))
    return current_thread() is main_thread() and not is_celery_process()
