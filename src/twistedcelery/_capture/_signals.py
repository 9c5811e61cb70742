"""Celery's signals that tell of a message that was sent: of one that is being recorded they tell after its confirm.

Celery's sender keeps the ``send`` of a signal as it found it when it was made, and whoever wraps that sender keeps the sender. So it is the
signal itself that asks, each time, whether its message is being recorded.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from celery import _state, signals
from celery.utils.dispatch import Signal as CelerySignal

from .._operations import Local
from ..signals import task_publish_failed
from ._scope import current_recorder

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from ._scope import TaskMessage

__all__ = ["failing", "postpone_signals"]


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
        return [partial(_postpone, taking.app, message)]


def _postpone(app: Any, message: TaskMessage, signal: Any, sender: Any, **named: Any) -> None:
    message.follow(Local(partial(_tell, app, message.context, signal.send, sender=sender, **named)))


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
