"""From a call to what waits for it: captured here or in a thread, sent by the outbox, waited for by a `TaskDeferred`."""

from __future__ import annotations

from contextvars import copy_context
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from celery.result import EagerResult, ResultBase, ResultSet
from celery.states import SUCCESS
from kombu.utils.uuid import uuid
from twisted.internet.defer import Deferred, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from ._ancestry import whole
from ._capture import Capture, Pauses
from ._operations import not_sent
from ._unit import Unit
from ._waits import eager_meta, leaves
from .errors import OutcomeUnknown, Stopped
from .results import AsyncResult, CallWait, GroupResult, TaskDeferred

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._capture import Captured
    from ._engine import Engine
    from ._operations import Write
    from ._rooms import Rooms
    from ._waits import Ancestors, Shape
    from .interfaces import Meta

__all__ = ["Caller"]

log = Logger()

#: Calls of the drop-in that could not be sent, and are remembered for results that stand behind them.
_UNSENT = 10_000


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


class _Aside:
    """The owner of what nobody waits for."""

    def __init__(self, what: str) -> None:
        self._what = what

    def _sent(self, error: Exception | None) -> None:
        if error is not None:
            log.error("{what}: {error}", what=self._what, error=error)


class _Structure(NamedTuple):
    """What a call stands for that is more than one task, or has run already."""

    handle: AsyncResult | GroupResult
    parents: Ancestors | None
    #: The final states of tasks that have run already (``task_always_eager``), and what a task's own ``apply_async`` has given.
    early: dict[str, Meta]
    #: Whether that is all: nothing need be waited for.
    known: bool


class _Apart(NamedTuple):
    """What comes out of the thread that captures a big call."""

    captured: Captured
    structure: _Structure | None
    wait: CallWait
    #: Whether a result is expected.
    waits: bool


class Caller:
    """Makes the calls of an `Engine`."""

    def __init__(self, engine: Engine, rooms: Rooms) -> None:
        self._engine = engine
        self._capture = Capture(
            engine.app, backend=rooms.backend, reply_to=rooms.reply_to, properties=rooms.properties
        )
        self._threads: ThreadPool | None = None
        self._writes: list[Write] = []
        #: Results of the drop-in whose message has no outcome yet, by task id.
        self.unsent: dict[str, Any] = {}
        #: Why the messages of others could not be sent, by task id; the newest ones.
        self.unsendable: dict[str, Exception] = {}

    @property
    def producer(self) -> Any:
        """Kombu's producer, recording."""
        return self._capture.producer

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Captured:
        captured = self._capture.run(function, *args, **kwargs)
        if self._engine.stopped:
            # By a receiver of a signal.
            stopped = Stopped(
                "this TwistedCelery was stopped while the call was being put together; nothing was sent"
            )
            not_sent(captured.operations, stopped)
            raise stopped
        return captured

    # TwistedCelery's calls

    def call(
        self, function: Callable[..., Any], args: Any, kwargs: Any, *, revoke_on_cancel: bool
    ) -> TaskDeferred:
        """Capture one of Celery's calls, and send what it is made of."""
        engine = self._engine
        engine.check()
        captured = self._run(function, args, kwargs)
        if isinstance(captured.result, TaskDeferred) and not isinstance(captured.result, ResultBase):
            # The task's own apply_async has made the call with TwistedCelery.
            if revoke_on_cancel:
                captured.result._revoke_on_cancel = True
            self._send_aside(captured)
            return captured.result
        structure = self._structure_of(captured, kwargs)
        calling = TaskDeferred(engine, captured.result.id if structure is None else structure.handle._shape)
        if revoke_on_cancel:
            calling._revoke_on_cancel = True
        if structure is not None:
            self._adopt(calling, captured, structure)
            if self._is_there(captured, structure):
                calling._start_waiting(structure.parents, structure.early)
                self._send_aside(captured)
                return calling
        waits = self._waits(captured, structure)
        unit = Unit(captured.operations, calling, expects_result=waits)
        calling._unit = unit
        if waits:
            self._called(captured, calling._shape)
            if structure is None:
                calling._start_waiting()
            else:
                calling._start_waiting(structure.parents, structure.early)
        engine.come_by()
        engine.outbox.submit(unit)
        return calling

    def _called(self, captured: Captured, shape: Shape) -> None:
        waiters = self._engine.waiters
        # Where nothing is sent, the result is that of an earlier call.
        if waiters.unclaimed and captured.operations:
            for task_id in leaves(shape):
                waiters.called(task_id)

    def _waits(self, captured: Captured, structure: _Structure | None) -> bool:
        """Whether a result is expected."""
        result = captured.result
        if self._engine.source is None or getattr(result, "ignored", False):
            return False
        if structure is not None and structure.known:
            return False
        return not captured.ignored or getattr(result, "id", None) not in captured.ignored

    def _is_there(self, captured: Captured, structure: _Structure) -> bool:
        """Whether the result is there, and need not wait for what is sent: its tasks have run here, or nothing is sent."""
        if not structure.known:
            return False
        return not captured.operations or bool(self._engine.app.conf.task_always_eager)

    def _structure_of(self, captured: Captured, options: Any) -> _Structure | None:
        """Read the result of a call for its structure; None for a single task that is to run."""
        result = captured.result
        if not isinstance(result, ResultBase) or type(getattr(result, "id", None)) is not str:
            try:
                result = captured.result = _result_of(result, options.get("task_id") or uuid())
            except TypeError as error:
                not_sent(captured.operations, error)
                raise
        elif not isinstance(result, (EagerResult, ResultSet)) and result.parent is None:
            return None
        early: dict[str, Meta] = {}
        handle = self._engine.handle_of(result, captured.ignored, early)
        if isinstance(handle, GroupResult):
            handle._index()
        known = bool(early) and all(task_id in early for task_id in leaves(handle._shape))
        return _Structure(handle, handle._followed(), early, known)

    def _adopt(self, calling: TaskDeferred, captured: Captured, structure: _Structure) -> None:
        calling._async_result = structure.handle
        calling._silent = captured.ignored
        if structure.known:
            calling._once_sent = (structure.parents, structure.early)

    def _send_aside(self, captured: Captured) -> None:
        """Send what a result does not depend on that is there already: what tasks that ran here have called by their names."""
        if captured.operations:
            what = "a message that was sent on the way to a result that was there at once (task_always_eager)"
            self._engine.outbox.submit(Unit(captured.operations, _Aside(what)))

    def ran(self, result: EagerResult) -> TaskDeferred:
        """Give what waits for a task that has run here already."""
        engine = self._engine
        engine.check()
        calling = TaskDeferred(engine, result.id)
        calling._async_result = engine.handle_of(result)
        calling._start_waiting(early={result.id: eager_meta(result)})
        return calling

    def waiting_for(self, task_id: str) -> TaskDeferred:
        """Give what waits for a task that was called before."""
        engine = self._engine
        calling = TaskDeferred(engine, task_id)
        refusal = engine.refuse_waiting(calling)
        if refusal is not None:
            calling._fail(refusal)
        else:
            calling._start_waiting()
        return calling

    # In a thread

    def call_in_thread(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        *,
        name: str,
        revoke_on_cancel: bool,
    ) -> TaskDeferred:
        """As `call`, captured in a thread that shares the interpreter fairly; the order of calls is kept.

        ``kwargs`` has to name the ``task_id``; ``name`` is what the call is called where it is never sent. What the capture raises
        comes through the Deferred. The arguments must not be changed before `when_sent`.
        """
        engine = self._engine
        engine.check()
        calling = TaskDeferred(engine, kwargs["task_id"])
        calling._revoke_on_cancel = revoke_on_cancel
        calling._unit = unit = Unit([], calling)
        calling._comes()
        engine.outbox.reserve(unit, f"{name}[{calling.id}]")
        context = copy_context()
        deferToThreadPool(
            engine.clock,
            self._thread_pool(),
            context.run,
            partial(self._capture_apart, function, args, kwargs),
        ).addCallbacks(
            self._captured_apart,
            lambda failure: engine.outbox.finish(unit, failure.value),
            callbackArgs=(calling, unit),
        ).addErrback(engine.log_failure, "a call that was captured in a thread")
        return calling

    def _thread_pool(self) -> ThreadPool:
        """Give the thread that captures big calls.

        One of our own: those of the reactor's pool may all be waiting for such calls.
        """
        clock = self._engine.clock
        if self._engine.app.conf.task_always_eager:
            # It runs tasks, which may take their time, and wait for others.
            pool: ThreadPool = clock.getThreadPool()
            return pool
        threads: Any = self._threads
        if threads is None:
            self._threads = threads = ThreadPool(0, 1, "twistedcelery")
            # A program that ends without stopping the reactor is not held.
            threads.threadFactory = partial(Thread, daemon=True)
            clock.callWhenRunning(threads.start)
        found: ThreadPool = threads
        return found

    def _capture_apart(self, function: Callable[..., Any], args: Any, kwargs: Any) -> _Apart:
        """Do in a thread all that can be done there."""
        captured = self._capture.run_beside(function, *args, **kwargs)
        structure = self._structure_of(captured, kwargs)
        waiters = self._engine.waiters
        if structure is None:
            wait = CallWait(waiters, captured.result.id)
        else:
            wait = CallWait(waiters, structure.handle._shape, parents=structure.parents)
        waits = self._waits(captured, structure)
        result, captured.result = captured.result, None
        if captured.operations or self._engine.app.conf.task_always_eager:
            # Made by this call: else a task's own apply_async may have given one that somebody holds.
            _take_apart([result])
        return _Apart(captured, structure, wait, waits)

    def _captured_apart(self, done: _Apart, calling: TaskDeferred, unit: Unit) -> Deferred[None] | None:
        captured, structure, wait, waits = done
        outbox = self._engine.outbox
        if unit.done:
            # Cancelled, or stopped.
            outbox.fill(unit, captured.operations)
            return None
        calling._shape = wait.shape
        early = None
        if structure is not None:
            self._adopt(calling, captured, structure)
            early = structure.early
            if self._is_there(captured, structure):
                calling._has_come()
                self._send_aside(captured)
                joined = calling._start_waiting_in_slices(wait, early)
                outbox.finish(unit)
                return joined
        unit.expects_result = waits
        self._called(captured, wait.shape)
        joined = calling._start_waiting_in_slices(wait, early) if waits else succeed(None)
        calling._has_come()
        return joined.addCallback(lambda _: outbox.fill(unit, captured.operations))

    # The drop-in's calls

    def call_one(
        self, function: Callable[..., Any], args: Any, kwargs: Any, result_class: Callable[[str], Any]
    ) -> Any:
        """Capture and send one message of the drop-in; the result is made by ``result_class``."""
        engine = self._engine
        engine.check()
        captured = self._run(function, args, kwargs)
        operations = captured.operations
        engine.waiters.called(captured.result.id)
        try:
            given = result = result_class(captured.result.id)
            if not isinstance(given, TaskDeferred):
                # A class of the caller's. As Celery does, which has no argument for it.
                given.ignored = captured.result.ignored
                result = engine.app.AsyncResult(captured.result.id)
        except Exception as error:
            not_sent(operations, error)
            raise
        if self._writes:
            # A chord's size, for example: acknowledged before the message that depends on it leaves.
            operations[:0] = self._writes
            self._writes.clear()
        result.parent = captured.result.parent
        result._silent = captured.ignored
        if captured.result.ignored:
            result._ignored = True
            result._leave()
            result._waits = False
        unit = Unit(operations, result, expects_result=result._waits)
        result._unit = unit
        self.unsent[result.id] = result
        # Canvas has made others of the same id before.
        result._called = True
        for waiter in engine.waiters.of(result.id):
            other: Any = waiter.deferred if isinstance(waiter, CallWait) else None
            if other is not None:
                other._called = True
        self.unsendable.pop(result.id, None)
        engine.come_by()
        engine.outbox.submit(unit)
        return given

    def could_not_be_sent(self, task_id: str, error: Exception) -> None:
        """Remember why a message of the drop-in was not sent."""
        unsendable = self.unsendable
        unsendable[task_id] = error
        if len(unsendable) > _UNSENT:
            del unsendable[next(iter(unsendable))]

    def why_unsent(self, handle: Any) -> Exception | None:
        """Return why a message that a result needs was not sent, if one was not. One whose outcome is unknown may still bring it."""
        if not self.unsendable:
            return None
        errors = (self.unsendable.get(node.id) for node in whole(handle, GroupResult))
        return next((one for one in errors if one is not None and not isinstance(one, OutcomeUnknown)), None)

    def write_outside(self, write: Write) -> None:
        """Take a backend write that the drop-in's canvas makes between two messages: it precedes the next."""
        self._writes.append(write)
        if len(self._writes) == 1:
            self._engine.clock.callLater(0, self._write_alone)

    def _write_alone(self) -> None:
        """Send backend writes that no message has followed."""
        if self._writes:
            writes, self._writes = self._writes, []
            owner = _Aside("the result backend was not written to")
            self._engine.outbox.submit(Unit(writes, owner, expects_result=False))

    # Orders

    def order(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[None]:
        """Capture a call that no task answers, a broadcast for example; fires when the broker has confirmed."""
        self._engine.check()
        captured: Captured = self._run(function, args, kwargs)
        order = _Order()
        order.unit = Unit(captured.operations, order, expects_result=False)
        self._engine.outbox.submit(order.unit)
        return order.done

    # Stopping

    def stop(self) -> Deferred[None]:
        """End the thread; fires when it has, which it does once the capture is over that it is at."""
        threads: Any = self._threads
        if threads is None or not threads.started:
            return succeed(None)
        stopped: Deferred[None] = Deferred()

        def stop() -> None:
            threads.stop()
            self._engine.clock.callFromThread(stopped.callback, None)

        Thread(target=stop, daemon=True).start()
        return stopped


def _result_of(given: Any, task_id: str) -> Any:
    """Return what a call has given as one of Celery's results; a task's own ``apply_async`` may give anything.

    What is no result is the value, as of a task that has run; it gets the id, as does an EagerResult without one (celery-once's).

    :raises TypeError: for a Deferred.
    """
    if isinstance(given, EagerResult) and given.id is None:
        return EagerResult(task_id, given._result, given._state, given._traceback, name=given._name)
    if isinstance(given, ResultSet) or (
        isinstance(given, ResultBase) and getattr(given, "id", None) is not None
    ):
        return given
    if isinstance(given, Deferred):
        raise TypeError(
            f"the task's own apply_async has returned {given!r}; it can return what TwistedCelery's calls return on the reactor's "
            "thread, a result of Celery's, or a value, but no other Deferred"
        )
    return EagerResult(task_id, given, SUCCESS)


def _take_apart(results: list[Any]) -> None:
    """Free Celery's results one by one: all at once takes them 2 us each."""
    pause = Pauses()
    while results:
        result = results.pop()
        if isinstance(result, ResultSet):
            # Not +=: where a group came from a generator, the lists are of Celery's own kind, which makes it one of its own.
            results.extend(result.results)
            result.results = []
        if result.parent is not None:
            results.append(result.parent)
            result.parent = None
        pause()
