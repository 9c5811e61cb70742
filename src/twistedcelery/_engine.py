"""The engine: one app's capture, outbox, waits, broker and result source, from the first call to the stop."""

from __future__ import annotations

import atexit
import sys
from collections import deque
from contextvars import copy_context
from functools import partial
from threading import Thread, current_thread, get_ident, main_thread
from typing import TYPE_CHECKING, Any, TypeAlias

from celery.result import EagerResult, result_from_tuple
from celery.result import GroupResult as CeleryGroupResult
from celery.states import PENDING
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python import threadable
from twisted.python.threadpool import ThreadPool

from ._capture import Capture
from ._operations import Publish
from ._outbox import Outbox
from ._reactor_scope import is_celery_process
from ._rooms import open_rooms
from ._slices import drained, in_slices
from ._unit import Unit
from ._waiters import Waiters
from .errors import ResultLost, ResultNotKept, ResultTimeout, Stopped, WrongThread
from .results import AsyncResult, CallWait, GroupResult, TaskDeferred

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure

    from ._capture import Captured
    from ._operations import Operation, Write
    from ._waits import Parents, Wait
    from .app import Settings
    from .interfaces import Meta

    _Structure: TypeAlias = tuple[AsyncResult | GroupResult, frozenset[str]]

__all__ = ["Engine"]

#: Seconds between two looks at whose ``result_timeout`` is over; a hundredth of it where that is less.
_LOOK = 1.0


class _Order:
    """The owner of a unit that is no task: its Deferred fires when the broker has confirmed."""

    def __init__(self) -> None:
        self.unit: Unit | None = None
        self.done: Deferred[None] = Deferred(self._cancelled)

    def _cancelled(self, _: object) -> None:
        if self.unit is not None:
            self.unit.withdraw()

    def _sent(self, error: Exception | None) -> None:
        if self.done.called:
            return
        if error is None:
            self.done.callback(None)
        else:
            self.done.errback(error)


class _Writing:
    """The owner of backend writes that nobody waits for."""

    def _sent(self, error: Exception | None) -> None:
        if error is not None:
            Engine.log.error("the result backend was not written to: {error}", error=error)


class Engine:
    """What works behind a `TwistedCelery`, from its first call until it is stopped."""

    log = Logger()

    def __init__(self, app: Any, reactor: Any, settings: Settings) -> None:
        self.app = app
        self.clock = reactor
        self._settings = settings
        rooms = open_rooms(
            app,
            reactor,
            retry_policy=settings.retry_policy,
            reply_queue_expires=settings.reply_queue_expires,
            outside=self.write_outside,
        )
        self.broker = rooms.broker
        self.source = rooms.source
        #: The app's own backend without its I/O, and kombu's producer that records.
        self.backend = rooms.backend
        #: The queue that replies go to, where results come as replies.
        self.reply_to = rooms.reply_to
        self._capture = Capture(
            app, backend=rooms.backend, reply_to=rooms.reply_to, properties=rooms.properties
        )
        if self.source is not None:
            self.source.listen(self)
            watch, unwatch = self.source.watch, self.source.unwatch
        else:
            watch = unwatch = _nothing
        self.waiters = Waiters(watch, unwatch, unclaimed_limit=settings.unclaimed_limit)
        self.outbox = Outbox(
            reactor,
            self.broker,
            self.source,
            connect=self._connect,
            limit=settings.outbox_limit,
            limit_bytes=settings.outbox_bytes,
            outage_wait=settings.outage_wait,
        )
        #: Results of the drop-in whose message has no outcome yet, by task id.
        self.unsent: dict[str, Any] = {}
        self._writes: list[Write] = []
        self._stopped = False
        self._connect_asked = False
        self._threads: ThreadPool | None = None
        #: Waits whose Deferred was dropped, to be taken from the table in this thread.
        self._abandoned: deque[Wait] = deque()
        #: Waits in the order in which ``result_timeout`` ends them, with the moment.
        self._bounded: dict[Wait, float] = {}
        self._bound: IDelayedCall | None = None

    @property
    def stopped(self) -> bool:
        """Whether it takes no more calls."""
        return self._stopped

    def _connect(self) -> None:
        if not self._connect_asked:
            self._connect_asked = True
            if not getattr(self.clock, "running", True):
                atexit.register(self._never_ran)
            self.clock.callWhenRunning(self._connect_now)

    def _never_ran(self) -> None:
        """Say at the end of the process which calls were made for a reactor that never ran."""
        names = [str(name) for name in self.outbox.waiting_tasks()]
        if names:
            shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
            sys.stderr.write(
                f"twistedcelery: {len(names)} calls were never sent, because the reactor never ran: {shown}\n"
            )

    def _connect_now(self) -> None:
        self._connect_asked = False
        atexit.unregister(self._never_ran)
        # A stop that came meanwhile waits for the outbox.
        if not self._stopped or self.outbox.count:
            self.broker.connect()

    def check(self) -> None:
        """Refuse calls from another thread than the reactor's, and calls after the stop."""
        thread = threadable.ioThread
        if thread is None:
            # The reactor has not run yet: its calls come from the main thread, as in task.react(main).
            if current_thread() is not main_thread():
                raise WrongThread(
                    "called from another thread than the main thread before the reactor runs; "
                    "use reactor.callFromThread or threads.blockingCallFromThread"
                )
        elif thread != get_ident():
            raise WrongThread(
                "twistedcelery belongs to the reactor thread and was called from another one; "
                "use reactor.callFromThread(tx.delay, ...) or threads.blockingCallFromThread(reactor, tx.delay, ...)"
            )
        if is_celery_process() and not getattr(self.clock, "running", True):
            raise WrongThread(
                "called in a Celery worker, where no reactor runs; call the task itself: task.delay(...)"
            )
        if self._stopped:
            raise Stopped("this TwistedCelery has been stopped; start it again with startService()")

    # Calls

    def call(
        self, function: Callable[..., Any], args: Any, kwargs: Any, *, revoke_on_cancel: bool
    ) -> TaskDeferred:
        """Capture one of Celery's calls, and send what it is made of."""
        self.check()
        captured = self._capture.run(function, *args, **kwargs)
        result = captured.result
        if isinstance(result, EagerResult):
            return self._eager(result)
        calling = TaskDeferred(self, result.id)
        parents: Parents | None = None
        if _has_structure(result):
            calling._async_result, calling._silent = handle, _ = self._structure_of(captured)
            calling._shape, parents = handle._shape, handle._followed()
        if revoke_on_cancel:
            calling._revoke_on_cancel = True
        waits = self.source is not None and not getattr(result, "ignored", False)
        unit = Unit(captured.operations, calling, context=captured.context, expects_result=waits)
        calling._unit = unit
        if waits:
            calling._start_waiting(parents)
        if self._abandoned:
            self._drain()
        self.outbox.submit(unit)
        return calling

    def call_in_thread(
        self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any], *, revoke_on_cancel: bool
    ) -> TaskDeferred:
        """As `call`, captured in a thread that shares the interpreter fairly; the order of calls is kept.

        ``kwargs`` has to name the ``task_id``. What the capture raises comes through the Deferred. The arguments must not be changed before `when_sent`.
        """
        self.check()
        calling = TaskDeferred(self, kwargs["task_id"])
        calling._revoke_on_cancel = revoke_on_cancel
        calling._unit = unit = Unit([], calling)
        self.outbox.reserve(unit)
        context = copy_context()
        deferToThreadPool(
            self.clock,
            self._thread_pool(),
            context.run,
            partial(self._capture_apart, function, args, kwargs),
        ).addCallbacks(
            self._captured_apart,
            lambda failure: self.outbox.finish(unit, failure.value),
            callbackArgs=(calling, unit),
        ).addErrback(self.log_failure, "a call that was captured in a thread")
        return calling

    def _thread_pool(self) -> ThreadPool:
        """Give the thread that captures big calls.

        One of our own: those of the reactor's pool may all be waiting for such calls.
        """
        if self.app.conf.task_always_eager:
            # It runs tasks, which may take their time, and wait for others.
            pool: ThreadPool = self.clock.getThreadPool()
            return pool
        threads: Any = self._threads
        if threads is None:
            self._threads = threads = ThreadPool(0, 1, "twistedcelery")
            # A program that ends without stopping the reactor is not held.
            threads.threadFactory = partial(Thread, daemon=True)
            self.clock.callWhenRunning(threads.start)
        found: ThreadPool = threads
        return found

    def _stop_threads(self, threads: Any) -> Deferred[None]:
        """End the thread; fires when it has, which it does once the capture is over that it is at."""
        stopped: Deferred[None] = Deferred()

        def stop() -> None:
            threads.stop()
            self.clock.callFromThread(stopped.callback, None)

        Thread(target=stop, daemon=True).start()
        return stopped

    def _capture_apart(
        self, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Captured, _Structure | None, CallWait]:
        """Do in a thread all that can be done there."""
        captured = self._capture.run_beside(function, *args, **kwargs)
        result = captured.result
        if isinstance(result, EagerResult) or not _has_structure(result):
            return captured, None, CallWait(self.waiters, result.id)
        handle, ignored = self._structure_of(captured)
        wait = CallWait(self.waiters, handle._shape, parents=handle._followed())
        return captured, (handle, ignored), wait

    def _captured_apart(
        self, done: tuple[Captured, _Structure | None, CallWait], calling: TaskDeferred, unit: Unit
    ) -> Deferred[None] | None:
        captured, structure, wait = done
        if unit.done:
            # Cancelled, or stopped.
            return None
        result = captured.result
        if isinstance(result, EagerResult):
            calling._start_waiting()
            self.outbox.finish(unit)
            self.waiters.meta_received(_meta_of(result))
            return None
        if structure is not None:
            calling._async_result, calling._silent = structure
            calling._shape = wait.shape
        unit.expects_result = self.source is not None and not getattr(result, "ignored", False)
        joined = calling._start_waiting_in_slices(wait) if unit.expects_result else succeed(None)
        return joined.addCallback(lambda _: self.outbox.fill(unit, captured.operations, captured.context))

    def _structure_of(self, captured: Captured) -> _Structure:
        """Give the handle of a call that has more than one task, and the ids of those that answer nothing."""
        ignored = _ignored_of(captured.operations)
        handle = self.handle_of(captured.result, ignored)
        if isinstance(handle, GroupResult):
            handle._index()
        return handle, ignored

    def call_one(
        self, function: Callable[..., Any], args: Any, kwargs: Any, result_class: Callable[[str], Any]
    ) -> Any:
        """Capture and send one message of the drop-in; the result is made by its own class."""
        self.check()
        captured = self._capture.run(function, *args, **kwargs)
        operations = captured.operations
        if self._writes:
            # A chord's size, for example: acknowledged before the message that depends on it leaves.
            operations[:0] = self._writes
            self._writes.clear()
        result = result_class(captured.result.id)
        result.parent = captured.result.parent
        if captured.result.ignored:
            result._ignored = True
            result._leave()
            result._waits = False
        unit = Unit(operations, result, context=captured.context, expects_result=result._waits)
        result._unit = unit
        self.unsent[result.id] = result
        if self._abandoned:
            self._drain()
        self.outbox.submit(unit)
        return result

    @property
    def producer(self) -> Any:
        """Kombu's producer, recording."""
        return self._capture.producer

    def write_outside(self, write: Write) -> None:
        """Take a backend write that the drop-in's canvas makes between two messages: it precedes the next."""
        self._writes.append(write)
        if len(self._writes) == 1:
            self.clock.callLater(0, self._write_alone)

    def _write_alone(self) -> None:
        """Send backend writes that no message has followed."""
        if self._writes:
            writes, self._writes = self._writes, []
            self.outbox.submit(Unit(list(writes), _Writing(), expects_result=False))

    def _eager(self, result: EagerResult) -> TaskDeferred:
        """``task_always_eager``: the task has run already."""
        calling = TaskDeferred(self, result.id)
        calling._start_waiting()
        self.waiters.meta_received(_meta_of(result))
        return calling

    def order(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[None]:
        """Capture a call that no task answers, a broadcast for example; fires when the broker has confirmed."""
        self.check()
        captured: Captured = self._capture.run(function, *args, **kwargs)
        order = _Order()
        order.unit = Unit(captured.operations, order, context=captured.context, expects_result=False)
        self.outbox.submit(order.unit)
        return order.done

    def revoke(self, task_ids: list[str], terminate: bool, signal: str | None) -> Deferred[None]:
        """Order the workers to revoke tasks."""
        options = {"terminate": terminate} if signal is None else {"terminate": terminate, "signal": signal}
        return self.order(self.app.control.revoke, task_ids, **options)

    def revoke_by_stamped_headers(
        self, headers: Mapping[str, Any], terminate: bool, signal: str | None
    ) -> Deferred[None]:
        """Order the workers to revoke the tasks that carry one of these stamps."""
        options = {"terminate": terminate} if signal is None else {"terminate": terminate, "signal": signal}
        return self.order(self.app.control.revoke_by_stamped_headers, dict(headers), **options)

    # Results

    def handle_of(self, result: Any, ignored: frozenset[str] = frozenset()) -> AsyncResult | GroupResult:
        """Read one of Celery's results for its structure."""
        parent = self.handle_of(result.parent, ignored) if result.parent is not None else None
        if isinstance(result, CeleryGroupResult):
            return GroupResult(
                self, result.id, [self.handle_of(member, ignored) for member in result.results], parent
            )
        handle = AsyncResult(self, result.id, parent)
        handle._ignored = result.id in ignored
        return handle

    def handle_of_tuple(self, stored: Any) -> AsyncResult | GroupResult:
        """Read what ``as_tuple`` gives, also after JSON."""
        node, members = stored
        task_id, parent = node if isinstance(node, (list, tuple)) else (node, None)
        before = self.handle_of_tuple(parent) if parent else None
        if members is None:
            return AsyncResult(self, task_id, before)
        return GroupResult(self, task_id, [self.handle_of_tuple(member) for member in members], before)

    def refuse_waiting(self, handle: object) -> Exception | None:
        """Return why there is nothing to wait for, or None."""
        self.check()
        task_id = getattr(handle, "id", None)
        if self.source is None:
            return ResultNotKept(
                "this app has no result backend, its results go nowhere; set result_backend", task_id=task_id
            )
        if getattr(handle, "_ignored", False):
            return ResultNotKept(
                "the task was called with ignore_result=True, its result goes nowhere", task_id=task_id
            )
        return None

    def current_state(self, task_id: str) -> Deferred[Meta]:
        """Fire with the newest state that can be known of a task."""
        meta = self.waiters.last_states.get(task_id) or self.waiters.unclaimed.get(task_id)
        if meta is not None:
            return succeed(meta)
        pending: Meta = {"task_id": task_id, "status": PENDING, "result": None, "traceback": None}
        assert self.source is not None
        if not self.source.rereadable:
            return succeed(pending)
        return self.source.fetch(task_id).addCallback(lambda meta: meta or pending)

    def forget(self, task_id: str) -> Deferred[None]:
        """Remove what is kept of a task's result, here and at the backend."""
        self.check()
        self.waiters.unclaimed.pop(task_id, None)
        if self.source is None:
            return succeed(None)
        return self.source.forget(task_id)

    def save_group(self, group: GroupResult) -> Deferred[None]:
        """Let Celery's backend write a group as it writes its own."""
        return self.order(self._save_group, group)

    def _save_group(self, group: GroupResult) -> None:
        self.backend.save_group(group.id, result_from_tuple(group.as_tuple(), self.app))

    def delete_group(self, group_id: str) -> Deferred[None]:
        """Remove a saved group."""
        return self.order(self.backend.delete_group, group_id)

    def restore_group(self, group_id: str) -> Deferred[GroupResult | None]:
        """Fire with the handle of a saved group, or None."""
        self.check()
        if self.source is None:
            return fail(ResultNotKept("this app has no result backend; set result_backend"))

        def restored(stored: Any) -> GroupResult | None:
            handle = None if stored is None else self.handle_of_tuple(stored)
            return handle if isinstance(handle, GroupResult) else None

        return self.source.fetch_group(group_id).addCallback(restored)

    def bound(self, wait: Wait) -> None:
        """End a wait after ``result_timeout``, if there is one."""
        timeout = self._settings.result_timeout
        if timeout is not None:
            self._bounded[wait] = self.clock.seconds() + timeout
            if self._bound is None:
                self._bound = self.clock.callLater(min(_LOOK, timeout / 100), self._end_late)

    def _end_late(self) -> None:
        self._bound = None
        timeout = self._settings.result_timeout
        assert timeout is not None
        now = self.clock.seconds()
        late = []
        for wait, end in self._bounded.items():
            if end > now:
                break
            late.append(wait)
        for wait in late:
            self._bounded.pop(wait, None)
        in_slices(
            self.clock,
            late,
            lambda wait: wait.fail(ResultTimeout(f"no result within result_timeout={timeout} s")),
        )
        if self._bounded:
            self._bound = self.clock.callLater(min(_LOOK, timeout / 100), self._end_late)

    def release(self, wait: Wait) -> None:
        """A wait has ended."""
        if self._bounded:
            self._bounded.pop(wait, None)

    def abandon(self, wait: Wait) -> None:
        """A Deferred was dropped, in whatever thread the collector ran; its wait goes when we come by."""
        self._abandoned.append(wait)

    def _drain(self) -> None:
        abandoned = self._abandoned
        while abandoned:
            wait = abandoned.popleft()
            self.release(wait)
            wait.leave()

    # As a ResultListener

    def meta_received(self, meta: Meta) -> None:
        """Hand a state to whoever waits for it."""
        if self._abandoned:
            self._drain()
        self.waiters.meta_received(meta)

    def result_failed(self, task_id: str, error: Exception) -> None:
        """Fail whoever waits for it."""
        self.waiters.fail(task_id, error)

    def results_lost(self, error: Exception) -> Deferred[None]:
        """Fail every wait whose call has left."""
        self.log.warn("{error}", error=error)
        text, url = getattr(error, "message", str(error)), getattr(error, "url", None)
        # An error of its own for each: it gets the task's id, and a traceback.
        return in_slices(
            self.clock,
            drained(self.waiters.waiting()),
            lambda waiter: waiter.lose(ResultLost(text, url=url)),
        )

    def log_failure(self, failure: Failure, what: str) -> None:
        """Log what nobody else is told."""
        self.log.failure("{what}", failure, what=what)

    # Stopping

    def stop(self, timeout: float) -> Deferred[None]:
        """Take no more calls, flush the outbox, close; fires when nothing is left. Waits that are pending fail."""
        if self._stopped:
            return succeed(None)
        self._stopped = True
        return Deferred.fromCoroutine(self._stop(timeout))

    async def _stop(self, timeout: float) -> None:
        end = self.clock.seconds() + timeout
        await self.outbox.flush(timeout)
        self.outbox.close()
        if self._bound is not None:
            self._bound.cancel()
            self._bound = None
        self._drain()
        await in_slices(
            self.clock,
            drained(self.waiters.waiting()),
            lambda waiter: waiter.fail(Stopped("stopped before the result came; the task may still run")),
        )
        # Both at once: each has until the deadline, and a second at least to say goodbye.
        closing = [self.broker.stop(max(1.0, end - self.clock.seconds()))]
        if self.source is not None:
            closing.append(self.source.stop(max(1.0, end - self.clock.seconds())))
        for closed in closing:
            await closed
        if self._threads is not None and self._threads.started:
            try:
                await self._stop_threads(self._threads).addTimeout(
                    max(0.0, end - self.clock.seconds()), self.clock
                )
            except DeferredTimeout:
                self.log.warn("a big call is still being put together in a thread; it will not be sent")


def _has_structure(result: Any) -> bool:
    """Whether one of Celery's results stands for more than one task."""
    return isinstance(result, CeleryGroupResult) or result.parent is not None


def _meta_of(result: EagerResult) -> Meta:
    return {
        "task_id": result.id,
        "status": result.state,
        "result": result.result,
        "traceback": result.traceback,
    }


def _nothing(task_id: str) -> None:
    """There is no result source."""


def _ignored_of(operations: list[Operation]) -> frozenset[str]:
    """Return the ids of tasks whose callers asked for no result."""
    return frozenset(
        operation.task_id
        for operation in operations
        if isinstance(operation, Publish)
        and operation.task_id is not None
        and operation.headers.get("ignore_result")
    )
