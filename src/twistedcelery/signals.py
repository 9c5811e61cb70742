"""Signals beside Celery's own, of the same kind: ``connect`` works as there.

``before_task_publish`` and ``after_task_publish`` are Celery's, and are sent as Celery sends them: before a message is put together, and
after the broker has confirmed it. Where no confirm comes there is no ``after_task_publish``, so that what a receiver has begun before (a
span of a trace, for example) would have no end. `task_publish_failed` is that end.

Each message has a context (`contextvars`) of its own, a copy of the caller's. The three signals of a message are sent within it, with the
app current (``celery.current_app``).
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = ["task_publish_failed"]

#: Sent where ``before_task_publish`` was and ``after_task_publish`` will not be. Arguments: those of ``after_task_publish``
#: (``sender``, the task's name, ``body``, ``headers``, ``exchange``, ``routing_key``), ``task_id``, and ``exception``: what the call fails
#: with, or has been ended with (`twisted.internet.defer.CancelledError` where it was cancelled in time). With
#: `twistedcelery.errors.OutcomeUnknown` the message may have arrived. Receivers have to be connected when the call is made.
task_publish_failed = Signal(
    name="task_publish_failed",
    providing_args={"body", "headers", "exchange", "routing_key", "task_id", "exception"},
)
