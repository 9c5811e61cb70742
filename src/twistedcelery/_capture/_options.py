"""Which options are message properties, which are Celery's own, and which nobody knows."""

from __future__ import annotations

from functools import cache
from inspect import Parameter, signature

from celery import Celery, Task
from celery.app.amqp import AMQP
from celery.canvas import Signature, _chain, chord, group

__all__ = ["amqp_properties", "celery_options"]

#: The properties of a ``basic`` content header (AMQP 0-9-1, 1.8.1), by py-amqp's names; headers go separately.
amqp_properties = frozenset(
    {
        "app_id",
        "cluster_id",
        "content_encoding",
        "content_type",
        "correlation_id",
        "delivery_mode",
        "expiration",
        "message_id",
        "priority",
        "reply_to",
        "timestamp",
        "type",
        "user_id",
    }
)


@cache
def celery_options() -> frozenset[str]:
    """Return the options that this Celery has names for, of which it passes some on as message properties.

    ``argsrepr`` and ``origin`` for example, or ``interval`` and ``max_retries`` of a chord with an empty header. py-amqp
    leaves them out when it writes the message.
    """
    functions = (
        Celery.send_task,
        Task.apply_async,
        AMQP.as_task_v1,
        AMQP.as_task_v2,
        Signature.apply_async,
        _chain.apply_async,
        _chain.run,
        group.apply_async,
        chord.apply_async,
        chord.run,
    )
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return frozenset(
        parameter.name
        for function in functions
        for parameter in signature(function).parameters.values()
        if parameter.kind in named
    )
