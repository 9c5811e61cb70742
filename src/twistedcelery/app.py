"""`TwistedCelery`: the front door."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery import Celery, Task
from celery.canvas import Signature, _chain, chord
from kombu.utils.uuid import uuid
from twisted.application.service import Service
from twisted.internet.defer import Deferred, succeed

from ._engine import Engine
from ._keeper import quick_backoff
from ._limits import Limits
from ._weight import is_big
from .errors import Stopped
from .results import AsyncResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .results import GroupResult, TaskDeferred

__all__ = ["Settings", "TwistedCelery"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What `TwistedCelery` takes besides the app; see there."""

    outage_wait: float = 0.0
    outbox_limit: int = 250_000
    outbox_bytes: int = 256 * 1024 * 1024
    result_timeout: float | None = None
    revoke_on_cancel: bool = False
    reply_queue_expires: float | None = None
    unclaimed_limit: int = 1000
    unclaimed_bytes: int = 64 * 1024 * 1024
    inflate_limit: int = Limits.inflate
    array_limit: int = Limits.array
    stop_timeout: float = 10.0
    declare_timeout: float = 30.0
    retry_policy: Callable[[int], float] = quick_backoff

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("outbox_limit", "outbox_bytes", "inflate_limit", "array_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be 1 at least")
        for name in ("outage_wait", "stop_timeout", "unclaimed_limit", "unclaimed_bytes", "declare_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it cannot be negative")
        for name in ("result_timeout", "reply_queue_expires"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value!r}; it must be more than 0, or None")


class TwistedCelery(Service):
    """Calls the tasks of a configured Celery app, with every byte carried by Twisted.

    Making one is cheap and connects nothing; the first call does, once the reactor runs. It is an `IService`; without a
    parent it stops itself, outbox flushed, when the reactor stops.

    :param app: the configured `celery.Celery`.
    :param reactor: the global one unless given.
    :param outage_wait: seconds for which calls that may be retried wait for a broker that is away, where the app's
        retry policy (``task_publish_retry_policy``) says less. Celery's default policy waits 0.6 s.
    :param outbox_limit: how many messages may be on their way to the broker; a call that would exceed it fails with
        `OutboxFull`, unless nothing else is on its way.
    :param outbox_bytes: the same for the sum of their bodies, in bytes.
    :param result_timeout: seconds after which any call fails with `ResultTimeout`; None: it waits as long as it takes.
    :param revoke_on_cancel: whether cancelling a call revokes its task; ``revoke_on_cancel=`` of a call wins.
    :param reply_queue_expires: seconds without a consumer after which RabbitMQ deletes the reply queue (``rpc``
        backend); ``result_expires`` unless given.
    :param unclaimed_limit: how many states are kept of tasks that nobody waits for (yet); the oldest go first.
    :param unclaimed_bytes: the same for the sum of their sizes, in bytes as they came, decompressed; one that is larger is not kept.
    :param inflate_limit: bytes that a compressed result may have once it is decompressed; the wait for one that has more fails with
        `ResultNotKept`. What takes long to decompress does so in a thread.
    :param array_limit: how many items an array in a reply of Redis's may have; a connection that brings a longer one is dropped.
    :param stop_timeout: seconds that `stopService` may take.
    :param declare_timeout: seconds that RabbitMQ may take to answer a declaration while it gives signs of life; then the connection is
        replaced. 0: any time. Over Redis, ``socket_timeout`` bounds every answer.
    :param retry_policy: seconds to wait before connecting again, by the number of failed rounds in a row.
    """

    name = "twistedcelery"

    def __init__(
        self,
        app: Celery,
        *,
        reactor: Any = None,
        outage_wait: float = 0.0,
        outbox_limit: int = 250_000,
        outbox_bytes: int = 256 * 1024 * 1024,
        result_timeout: float | None = None,
        revoke_on_cancel: bool = False,
        reply_queue_expires: float | None = None,
        unclaimed_limit: int = 1000,
        unclaimed_bytes: int = 64 * 1024 * 1024,
        inflate_limit: int = Limits.inflate,
        array_limit: int = Limits.array,
        stop_timeout: float = 10.0,
        declare_timeout: float = 30.0,
        retry_policy: Callable[[int], float] = quick_backoff,
    ) -> None:
        if not isinstance(app, Celery):
            raise TypeError(f"TwistedCelery takes a configured celery.Celery, not {app!r}")
        self.app = app
        self._reactor = reactor
        self._settings = Settings(
            outage_wait=outage_wait,
            outbox_limit=outbox_limit,
            outbox_bytes=outbox_bytes,
            result_timeout=result_timeout,
            revoke_on_cancel=revoke_on_cancel,
            reply_queue_expires=reply_queue_expires,
            unclaimed_limit=unclaimed_limit,
            unclaimed_bytes=unclaimed_bytes,
            inflate_limit=inflate_limit,
            array_limit=array_limit,
            stop_timeout=stop_timeout,
            declare_timeout=declare_timeout,
            retry_policy=retry_policy,
        )
        self._engine: Engine | None = None
        self._trigger: Any = None
        #: Set by the first stop; fires when nothing is left.
        self._stopped: Deferred[None] | None = None

    @property
    def engine(self) -> Engine:
        """What does the work; made by the first call."""
        engine = self._engine
        if engine is None:
            if self._stopped is not None:
                raise Stopped("this TwistedCelery has been stopped; start it again with startService()")
            if self._reactor is None:
                from twisted.internet import reactor

                self._reactor = reactor
            engine = self._engine = Engine(self.app, self._reactor, self._settings)
            self._trigger = self._reactor.addSystemEventTrigger("before", "shutdown", self._shutdown)
        return engine

    # Calls

    def send_task(
        self,
        name: str,
        args: Any = None,
        kwargs: Any = None,
        countdown: float | None = None,
        eta: Any = None,
        task_id: str | None = None,
        *,
        revoke_on_cancel: bool | None = None,
        in_thread: bool | None = None,
        **options: Any,
    ) -> TaskDeferred:
        """Call a task by its name, as `celery.Celery.send_task` does with the same arguments.

        Returns a `TaskDeferred`. Wrong arguments raise here: what the serializer refuses
        (kombu.exceptions.EncodeError), unknown options (TypeError). Everything else comes through the Deferred.

        ``in_thread``: whether to build the messages in a thread, so that a big canvas or big arguments do not stop the
        reactor; None decides by their size. In a thread, wrong arguments come through the Deferred too.

        ``result_cls`` is refused (TypeError): it would be no Deferred.
        """
        options.update(countdown=countdown, eta=eta, task_id=task_id)
        return self._call(
            self.app.send_task, (name, args, kwargs), options, None, revoke_on_cancel, in_thread
        )

    def apply_async(
        self,
        task: Task | Signature | str,
        args: Any = None,
        kwargs: Any = None,
        *,
        revoke_on_cancel: bool | None = None,
        in_thread: bool | None = None,
        **options: Any,
    ) -> TaskDeferred:
        """Call a task, a signature (group, chain, chord ...) or a task's name, with any option of ``apply_async``.

        Returns and raises as `send_task`. Where a task has an ``apply_async`` of its own, what that returns is what is waited for: one of
        Celery's results, by its id, or a TaskDeferred; anything else is the value, which comes once what was sent is confirmed.
        """
        if isinstance(task, str):
            return self._call(
                self.app.send_task, (task, args, kwargs), options, None, revoke_on_cancel, in_thread
            )
        if not isinstance(task, Signature | Task):
            task = _undecorated(task)
        if not isinstance(task, Signature | Task):
            raise TypeError(f"a task, a signature or a task's name can be called, not {task!r}")
        apply = partial(self._apply, task)
        return self._call(apply, (args, kwargs), options, task, revoke_on_cancel, in_thread)

    def delay(self, task: Task | Signature | str, /, *args: Any, **kwargs: Any) -> TaskDeferred:
        """Call a task with these arguments; see `apply_async`."""
        return self.apply_async(task, args, kwargs)

    def _call(
        self,
        function: Any,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        task: Any,
        revoke_on_cancel: bool | None,
        in_thread: bool | None,
    ) -> TaskDeferred:
        refuse_connections(options)
        result_class = options.pop("result_cls", None)
        if result_class is None and isinstance(task, Signature):
            result_class = (task.get("options") or {}).get("result_cls")
        if result_class is not None:
            raise TypeError(
                f"result_cls={result_class!r} cannot be: a call of TwistedCelery's returns a TaskDeferred; leave it out"
            )
        if in_thread is None:
            # An eager call runs the task: in line, unless asked otherwise.
            in_thread = not self.app.conf.task_always_eager and is_big(task, *arguments[-2:])
        if revoke_on_cancel is None:
            revoke_on_cancel = self._settings.revoke_on_cancel
        caller = self.engine.caller
        task_id = options.get("task_id")
        if isinstance(task_id, UUID):
            options["task_id"] = task_id = str(task_id)
        if not in_thread:
            return caller.call(function, arguments, options, revoke_on_cancel=revoke_on_cancel)
        options["task_id"] = task_id or _own_id(task) or uuid()
        name = str(
            arguments[0] if task is None else task.get("task") if isinstance(task, dict) else task.name
        )
        return caller.call_in_thread(
            function, arguments, options, name=name, revoke_on_cancel=revoke_on_cancel
        )

    def _apply(self, task: Any, args: Any, kwargs: Any, **options: Any) -> Any:
        """Call a task while the call is captured: what is bound to no app (shared tasks) belongs to ours then."""
        app = task._app if isinstance(task, Signature) else task.app
        if app is not None and app is not self.app:
            raise ValueError(
                f"{task!r} belongs to another app, {app!r}; call the task by its name, or with a TwistedCelery of its "
                "own app"
            )
        return task.apply_async(args, kwargs, **options)

    # Results

    def AsyncResult(self, task_id: str | UUID) -> AsyncResult:  # Celery's name
        """Return the handle of a task's result, whoever has called the task.

        With the ``rpc`` backend only of tasks that this TwistedCelery has called; see `twistedcelery.AsyncResult`.
        """
        if isinstance(task_id, UUID):
            task_id = str(task_id)
        if not isinstance(task_id, str):
            raise TypeError(f"a task's id is a str, not {task_id!r}")
        return AsyncResult(self.engine, task_id)

    def restore_group(self, group_id: str) -> Deferred[GroupResult | None]:
        """Fire with the handle of a group that `GroupResult.save` has kept, or None; rpc keeps none."""
        return self.engine.restore_group(group_id)

    def revoke(
        self, task_id: str | Iterable[str], terminate: bool = False, signal: str | None = None
    ) -> Deferred[None]:
        """Tell the workers not to run a task, or several; ``terminate=True`` to kill those that run, with ``signal``.

        Fires with None once the broker has confirmed the order; workers do not answer it.
        """
        ids = [task_id] if isinstance(task_id, str) else [str(one) for one in task_id]
        return self.engine.revoke(ids, terminate, signal)

    def revoke_by_stamped_headers(
        self, headers: Mapping[str, Any], terminate: bool = False, signal: str | None = None
    ) -> Deferred[None]:
        """Tell the workers not to run the tasks that carry one of these stamps; see `revoke`."""
        return self.engine.revoke_by_stamped_headers(headers, terminate, signal)

    # Life cycle

    def startService(self) -> None:
        """Be ready for calls (again); nothing connects before the first."""
        super().startService()  # type: ignore[no-untyped-call]
        self._stopped = None
        if self._engine is not None and self._engine.stopped:
            self._engine = None

    def stopService(self) -> Deferred[None]:
        """Take no more calls, wait for the confirms of those made, close the connections.

        Fires with None when nothing is left open, at the latest after ``stop_timeout`` seconds, the last of which (or half of them,
        if there are fewer than two) is for saying goodbye to the servers. Results still waited
        for fail with `Stopped`; calls that could not be sent fail with `NotSent` or `OutcomeUnknown`.

        Raises `WrongThread` where the reactor runs in another thread.
        """
        if self._engine is not None:
            self._engine.check_thread()
        super().stopService()  # type: ignore[no-untyped-call]
        trigger, self._trigger = self._trigger, None
        if trigger is not None:
            self._reactor.removeSystemEventTrigger(trigger)
        return self._stop()

    def disconnect(self) -> Deferred[None]:
        """The same as `stopService`."""
        return self.stopService()

    def _shutdown(self) -> Deferred[None]:
        """The reactor stops: its trigger is used up."""
        self._trigger = None
        return self._stop()

    def _stop(self) -> Deferred[None]:
        """Stop once; a fresh Deferred for everybody who asks."""
        if self._stopped is None:
            self._stopped = succeed(None)
            if self._engine is not None:
                self._stopped = self._engine.stop(self._settings.stop_timeout).addErrback(
                    self._engine.log_failure, "stopping"
                )
        waiting: Deferred[None] = Deferred()

        def stopped(nothing: None) -> None:
            if not waiting.called:
                waiting.callback(nothing)

        self._stopped.addCallback(stopped)
        return waiting


def _undecorated(task: Any) -> Any:
    """Return the task that a `DeferrableTask` decorates."""
    from .calls import DeferrableTask

    return task.task if isinstance(task, DeferrableTask) else task


def _own_id(task: Any) -> str | None:
    """Return the id that a signature has been given, by which its result is known; None for one that has none yet."""
    while isinstance(task, Signature):
        given: str | None = task.options.get("task_id")
        if given is not None:
            return given
        if isinstance(task, chord):
            task = task.body
        elif isinstance(task, _chain) and task.tasks:
            task = task.tasks[-1]
        else:
            break
    return None


def refuse_connections(options: dict[str, Any]) -> None:
    """Raise TypeError where a call is given a connection of kombu's."""
    for name in ("connection", "producer", "publisher"):
        if options.get(name) is not None:
            raise TypeError(
                f"{name}= is a connection of kombu's that blocks; twistedcelery has its own, leave it out"
            )
