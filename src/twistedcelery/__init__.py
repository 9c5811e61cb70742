"""Call Celery tasks from Twisted and get their results in Deferreds.

`TwistedCelery` is the front door; everything else is reached from it. A map of the package::

    app           TwistedCelery: calls and life cycle
    results       what a call returns: TaskDeferred, AsyncResult, GroupResult
    dropin        Celery, the drop-in
    calls         send_task() and DeferrableTask
    errors        every error, the tree drawn at the top
    signals       what is sent where Celery's own signals do not suffice
    interfaces    what a broker is, what a result source is: the extension points

    _engine       one app's rooms joined together, from the first call to the stop
    _calling      from a call to what waits for it
    _rooms        which room serves which URL
    _capture/     Celery's code in, operations out
    _operations   what a call is made of
    _outbox, _unit     operations in order, with confirms, retry, limits
    _waits, _waiters, _ancestry   who waits for which task id, and what stands before it
    _handles, _yieldable, _yieldable_results, _reactor_scope   the results, and where the drop-in's are Twisted's
    _weight       which calls are captured in a thread
    _keeper       keeps one connection
    _endpoints, _urls, _tls, _explain   from settings to endpoints, from failures to errors
    _pace, _outcomes, _slices, _steady   small steps, so that the reactor goes on ticking; time that does not go back
    _inflate, _undecodable, _limits   what comes in compressed, or cannot be decoded, and its bounds
    amqp/         AMQP 0-9-1: codec, connection, protocol; the broker; rpc results
    redis/        RESP: connection, protocol, Sentinel; the broker; results
"""

from __future__ import annotations

from .app import TwistedCelery
from .calls import DeferrableTask, send_task
from .dropin import Celery
from .results import AsyncResult, GroupResult, TaskDeferred

__all__ = [
    "AsyncResult",
    "Celery",
    "DeferrableTask",
    "GroupResult",
    "TaskDeferred",
    "TwistedCelery",
    "send_task",
]
