"""Celery's signals that tell of a message that was sent: of one that is being recorded they tell after its confirm.

Celery's sender keeps the ``send`` of a signal as it found it when it was made, and whoever wraps that sender keeps the sender. So it is the
signal itself that asks, each time, whether its message is being recorded.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from celery import _state, signals
from celery.utils.dispatch import Signal as CelerySignal
from twisted.logger import Logger

from .._operations import Local
from ..signals import task_publish_failed
from ._scope import current_recorder

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from ._scope import TaskMessage

__all__ = ["failing", "postpone_signals"]

log = Logger()


class Signal(CelerySignal):  # type: ignore[misc]  # untyped base
    """Celery's signal; a class of its own only to be asked first."""

    def _live_receivers(self, sender: Any) -> Any:
        receivers = super()._live_receivers(sender)
        taking = current_recorder()
        if taking is None or not receivers:
            return receivers
        message = taking.task_message
        if message is None or message.sent is None:
            # Another app's, or one that was sent without our producer.
            return receivers
        return [partial(_postpone, taking.app, message, receivers)]


def _postpone(app: Any, message: TaskMessage, receivers: Any, signal: Any, sender: Any, **named: Any) -> None:
    if _id_of(**named) == message.task_id:
        message.follow(Local(partial(_tell, app, message.context, signal.send, sender=sender, **named)))
        return
    # Another app's, sent by whoever wraps the sending of this one.
    for receiver in receivers:
        try:
            receiver(signal=signal, sender=sender, **named)
        except Exception:  # noqa: BLE001, PERF203  # as Celery's signals do: the others are told all the same
            log.failure("a receiver of {signal} failed", signal=signal)


def _id_of(task_id: Any = None, headers: Any = None, body: Any = None, **_: Any) -> Any:
    """Return the task's id in the arguments of ``task_sent`` or ``after_task_publish``, of either protocol."""
    for where in (headers, body):
        if task_id is None and isinstance(where, dict):
            task_id = where.get("id")
    return task_id


def _tell(app: Any, context: Context, send: Callable[..., object], /, **named: Any) -> None:
    """Send a signal of a message in the message's context, the app current: as ``before_task_publish`` was."""
    tls = _state._tls
    current = tls.current_app
    tls.current_app = app
    try:
        context.run(send, **named)
    finally:
        tls.current_app = current


def postpone_signals() -> None:
    """Have the signals ask. Does nothing to those that do, and to one of a class that is not Celery's."""
    for signal in (signals.after_task_publish, signals.task_sent):
        if type(signal) is CelerySignal:
            signal.__class__ = Signal


def failing(
    app: Any, name: str, body: Any, headers: Any, message: TaskMessage
) -> Callable[..., object] | None:
    """Return what sends ``task_publish_failed`` for a task's message; None where nobody listens."""
    if not task_publish_failed.receivers:
        return None
    sent = message.sent
    return partial(
        _tell,
        app,
        message.context,
        task_publish_failed.send,
        sender=name,
        body=body,
        headers=headers,
        exchange=None if sent is None else sent.exchange,
        routing_key=None if sent is None else sent.routing_key,
        task_id=message.task_id,
    )
