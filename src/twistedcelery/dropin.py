"""`Celery`: the drop-in. Change one import, and calls on the reactor thread return what Twisted can wait for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import celery
from celery.app.control import Control as CeleryControl
from celery.result import AsyncResult, EagerResult
from twisted.internet.defer import Deferred

from ._capture import recorder
from ._reactor_scope import on_reactor_thread
from ._yieldable_results import YieldableEagerResult, YieldableGroupResult, YieldableResult
from .app import TwistedCelery, refuse_connections
from .errors import WouldBlock

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Celery", "Control"]


class Control(CeleryControl):  # type: ignore[misc]  # untyped base
    """``app.control`` of the drop-in. On the reactor's thread its orders return Deferreds.

    What waits for answers (``inspect()``, ``ping()``, ``reply=True``) would stop the reactor and raises `WouldBlock` there.
    """

    def broadcast(
        self,
        command: str,
        arguments: Any = None,
        destination: Any = None,
        connection: Any = None,
        reply: bool = False,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Broadcast an order to the workers; in scope the Deferred fires once the broker has confirmed it."""
        send = super().broadcast
        if not self.app._calls_twisted():
            return send(command, arguments, destination, connection, reply, *rest, **options)
        if reply:
            raise WouldBlock(
                f"control command {command!r} would wait for the workers' answers and stop the reactor; call it in a thread: "
                "deferToThread(app.control.ping), for example"
            )
        refuse_connections({"connection": connection})
        order = self.app.twisted.engine.caller.order
        return order(send, command, arguments, destination, None, False, *rest, **options)

    def purge(self, connection: Any = None) -> Any:
        """Throw away all waiting tasks; refused in scope, as it waits for the broker."""
        if self.app._calls_twisted():
            raise WouldBlock(
                "purge() would wait for the broker and stop the reactor; use deferToThread(app.control.purge)"
            )
        return super().purge(connection)

    discard_all = purge


class Celery(celery.Celery):  # type: ignore[misc]  # untyped base
    """A `celery.Celery` whose calls can be yielded and awaited where Twisted's reactor runs.

    On the reactor's thread ``task.delay()``, ``apply_async``, ``send_task``, signatures and canvas return results that are
    Deferreds as well, and nothing blocks. Elsewhere (a worker, beat, another thread, a plain script) it is stock Celery.
    """

    #: True or False forces it one way in this process; None: `on_reactor_thread` decides at each call.
    twisted_calls: bool | None = None

    #: What is passed to `TwistedCelery` besides the app, as keyword arguments; set it before the first call.
    twisted_settings: Mapping[str, Any] = {}

    _twisted: TwistedCelery | None = None

    #: Celery's own setting of the class behind ``app.control``.
    control_cls = f"{__name__}:Control"

    @property
    def twisted(self) -> TwistedCelery:
        """The `TwistedCelery` that carries the calls."""
        if self._twisted is None:
            self._twisted = TwistedCelery(self, **self.twisted_settings)
        return self._twisted

    def _calls_twisted(self) -> bool:
        """Whether a call made here and now is ours: in scope, and not a part of one that is being captured."""
        if recorder(self) is not None:
            return False
        return on_reactor_thread() if self.twisted_calls is None else self.twisted_calls

    # The seams: each answers as stock Celery does out of scope.

    @property
    def backend(self) -> Any:
        """The result backend; in scope one that does no I/O."""
        if self._calls_twisted():
            return self.twisted.engine.backend
        return super().backend

    @property
    def thread_oid(self) -> Any:
        """Where replies go that signatures ask for; in scope our own reply queue."""
        if self._calls_twisted():
            reply_to = self.twisted.engine.reply_to
            if reply_to is not None:
                return reply_to
        return super().thread_oid

    def producer_or_acquire(self, producer: Any = None) -> AbstractContextManager[Any]:
        """A producer from the pool; in scope one that records."""
        if self._calls_twisted():
            return nullcontext(self.twisted.engine.caller.producer)
        found: AbstractContextManager[Any] = super().producer_or_acquire(producer)
        return found

    @property
    def AsyncResult(self) -> Any:  # Celery's name
        """The class of this app's results."""
        return self._result_class("AsyncResult", YieldableResult)

    @property
    def GroupResult(self) -> Any:  # Celery's name
        """The class of this app's group results."""
        return self._result_class("GroupResult", YieldableGroupResult)

    def _result_class(self, name: str, yieldable: type) -> Any:
        kept = self.__dict__
        if self._calls_twisted():
            found = kept.get("_Yieldable" + name)
            if found is None:
                found = kept["_Yieldable" + name] = self.subclass_with_self(yieldable, reverse=name)
        else:
            found = kept.get("_Stock" + name)
            if found is None:
                found = kept["_Stock" + name] = self.subclass_with_self("celery.result:" + name)
        return found

    def send_task(
        self,
        name: str,
        args: Any = None,
        kwargs: Any = None,
        countdown: float | None = None,
        eta: Any = None,
        task_id: Any = None,
        producer: Any = None,
        connection: Any = None,
        router: Any = None,
        result_cls: Any = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Call a task by its name; in scope the result can be yielded and awaited, unless ``result_cls`` makes another."""
        if not self._calls_twisted():
            given = (name, args, kwargs, countdown, eta, task_id, producer, connection, router, result_cls)
            return super().send_task(*given, *rest, **options)
        caller = self.twisted.engine.caller
        if producer is caller.producer:
            producer = None
        refuse_connections({"connection": connection, "producer": producer, **options})
        if isinstance(task_id, UUID):
            task_id = str(task_id)
        if result_cls is None or getattr(result_cls, "__func__", None) is celery.Task.AsyncResult:
            # The latter is what a task asks for that has none of its own.
            result_cls = self.AsyncResult
        given = (name, args, kwargs, countdown, eta, task_id, None, None, router, None)
        return caller.call_one(super().send_task, (*given, *rest), options, result_cls)

    # Eager calls run in Task.apply, which belongs to the task's own class; so may apply_async.

    def _task_from_fun(self, *args: Any, **kwargs: Any) -> Any:
        return self._yieldable_when_eager(super()._task_from_fun(*args, **kwargs))

    def register_task(self, task: Any, **options: Any) -> Any:
        """Register an instance of a task class."""
        return self._yieldable_when_eager(super().register_task(task, **options))

    def _yieldable_when_eager(self, task: Any) -> Any:
        if not isinstance(vars(task).get("apply"), partial):
            task.apply = partial(self._apply, task.apply)
            if type(task).apply_async is not celery.Task.apply_async:
                task.apply_async = partial(self._apply, task.apply_async)
        return task

    def _apply(self, apply: Any, *args: Any, **kwargs: Any) -> Any:
        result = apply(*args, **kwargs)
        if isinstance(result, Deferred) or not self._calls_twisted():
            return result
        if isinstance(result, EagerResult):
            return YieldableEagerResult(self.twisted.engine, result)
        if isinstance(result, AsyncResult) and result.id is not None:
            # One of stock Celery's, or of another app.
            return self.AsyncResult(str(result.id))
        return result
