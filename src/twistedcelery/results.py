"""What a call returns: `TaskDeferred`, and the handles `AsyncResult` and `GroupResult`.

The names are those of Celery's results; each one that needs the network returns a Deferred, fresh per caller.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from twisted.internet.defer import CancelledError, Deferred, fail, maybeDeferred, succeed

from ._handles import AsyncResult, GroupResult, PredicateDeferred
from ._slices import in_slices
from ._waits import Shape, Wait, leaves, nothing_of
from .errors import NotSent, SendFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping

    from ._engine import Engine
    from ._unit import Unit
    from ._waits import Ancestors
    from .interfaces import Meta

__all__ = ["AsyncResult", "GroupResult", "PredicateDeferred", "TaskDeferred", "Untold"]

# Twisted keeps the callbacks of a Deferred in a list; its name has changed in 25.5.
_CALLBACKS = "_callbacks" if "_callbacks" in vars(Deferred()) else "callbacks"


class _Attachments(list[Any]):
    """The callbacks of a TaskDeferred. The first one, however it is attached, makes its wait hold it."""

    __slots__ = ("_wait",)

    def __init__(self, wait: Wait) -> None:
        super().__init__()
        self._wait = wait

    def append(self, item: Any) -> None:
        super().append(item)
        self._wait.hold()


class Untold:
    """The calls that have failed with nobody to take the error, each by its id and by its error.

    Twisted logs the error of a Deferred that is dropped with it. Where somebody asks in another way, and is told, it need not.
    """

    def __init__(self) -> None:
        self._calls: dict[object, list[ref[TaskDeferred]]] = {}

    def add(self, call: TaskDeferred, error: BaseException) -> None:
        """Remember a call until somebody is told, or nobody has it any more."""
        for key in (call.id, id(error)):
            self._calls.setdefault(key, []).append(ref(call, partial(self._dropped, key)))

    def _dropped(self, key: object, call: ref[TaskDeferred]) -> None:
        # In whatever thread the collector runs.
        calls = self._calls.get(key, [])
        if call in calls:
            calls.remove(call)
        if not calls:
            self._calls.pop(key, None)

    def told(self, task_id: str, outcome: object) -> None:
        """Somebody who asked for this task has been told this; which may be the error of a call that it belongs to."""
        if self._calls:
            for key in (task_id, id(outcome)):
                for found in self._calls.pop(key, ()):
                    call = found()
                    if call is not None:
                        call._is_told()
        if isinstance(outcome, SendFailed):
            outcome.seen = True


class CallWait(Wait):
    """The wait of a TaskDeferred, which it may hold weakly only."""

    __slots__ = ()

    def fail(self, error: BaseException) -> None:
        """As above; for those behind the call as well."""
        calling: Any = self.deferred
        if calling is not None:
            calling._given_up = error
        super().fail(error)

    def _deliver(
        self, deferred: Deferred[Any], meta: Meta | None, value: Any, error: BaseException | None
    ) -> None:
        assert isinstance(deferred, TaskDeferred)
        deferred._settled(meta)
        # A receiver of ``after_task_publish``, which a result may be the confirm for, may have cancelled it.
        if not deferred.called:
            deferred._end(value, error)

    def forget(self, task_id: str, error: Exception) -> None:
        calling: Any = self.deferred
        if calling is None or not self._is_own(task_id):
            super().forget(task_id, error)
        else:
            calling._forget(error)

    def _member_ended(self, meta: Meta) -> None:
        calling: Any = self.deferred
        if calling is not None:
            calling._member_ended(meta)


class TaskDeferred(Deferred[Any]):
    """A Deferred that fires with what the task returns, or fails with the task's own exception.

    For a group the value is the list of the members' values in order, for a chain or chord the last value.
    Cancelling withdraws a call of which no byte has left; later it only stops waiting (``revoke_on_cancel=True``
    revokes as well). Besides a Deferred's methods it has those of `AsyncResult`, its handle; a failure that one of these has told is
    not logged where the call is dropped. Where ``forget()`` is called before the result has come, it fails with `ResultNotKept`, once
    it is known that the call was sent.
    """

    #: Not yet known to be with the broker.
    _unit: Unit | None = None
    _error: Exception | None = None
    _async_result: AsyncResult | GroupResult | None = None
    _revoke_on_cancel = False
    #: Members of a group that answer nothing (``ignore_result``): their value is None once the group is sent.
    _silent: Collection[str | None] = ()
    #: Who waits for the call to be captured in a thread; None: it has been.
    _coming: list[Deferred[None]] | None = None
    _sent_waiters: list[Deferred[None]] | None = None
    #: Whether a result is expected at all, and the wait for it until it has ended.
    _waits = False
    _wait: Wait | None = None
    #: What `_start_waiting` is called with once the call is sent, where the result is known before that.
    _once_sent: tuple[Ancestors | None, Mapping[str, Meta]] | None = None
    #: What it fails with once the call is sent, since ``forget()`` was called.
    _forgotten: Exception | None = None
    #: The final state of a single task.
    _meta: Meta | None = None
    #: What it has failed with; in the drop-in, what it will fail with.
    _failed_with: BaseException | None = None
    #: Why its result can never be given, whatever the tasks do.
    _given_up: BaseException | None = None

    def __init__(self, engine: Engine, shape: Shape) -> None:
        super().__init__(type(self)._cancelled)  # type: ignore[arg-type]  # it is called with self
        self._engine = engine
        self._shape = shape

    def _start_waiting(
        self, parents: Ancestors | None = None, early: Mapping[str, Meta] | None = None
    ) -> None:
        """Enter the table of waits, before the call goes to the outbox; ``early`` has final states that are known already."""
        wait = CallWait(self._engine.waiters, self._shape, parents=parents)
        self._hold_by(wait)
        wait.start(self, weakly=not getattr(self, _CALLBACKS), early=early)
        if self._wait is not None:
            self._engine.bound(wait)

    def _start_waiting_in_slices(
        self, wait: CallWait, early: Mapping[str, Meta] | None = None
    ) -> Deferred[None]:
        """As `_start_waiting`, for many tasks; fires when all are in the table. Something holds this Deferred meanwhile."""
        self._hold_by(wait)
        ids = wait.begin(self, weakly=not getattr(self, _CALLBACKS))
        return in_slices(self._engine.clock, ids, wait.joining(early)).addCallback(
            lambda _: self._engine.bound(wait) if self._wait is not None else None
        )

    def _hold_by(self, wait: CallWait) -> None:
        """Have a wait hold this Deferred from the moment that something is attached to it."""
        self._waits = True
        self._wait = wait
        before: list[Any] = getattr(self, _CALLBACKS)
        attachments = _Attachments(wait)
        setattr(self, _CALLBACKS, attachments)
        # What was attached while the call was captured in a thread.
        list.extend(attachments, before)

    def _comes(self) -> None:
        """The call is being captured in a thread: what it stands for is not known yet."""
        self._coming = []

    def _has_come(self, error: Exception | None = None) -> None:
        """It has been captured, or will not be."""
        coming, self._coming = self._coming, None
        for waiter in coming or ():
            if error is None:
                waiter.callback(None)
            else:
                waiter.errback(error)

    def _when_come(self) -> Deferred[None]:
        if self._coming is None:
            return succeed(None)
        waiter: Deferred[None] = Deferred(self._coming.remove)
        self._coming.append(waiter)
        return waiter

    def _settled(self, meta: Meta | None) -> None:
        wait, self._wait = self._wait, None
        if wait is not None:
            self._engine.release(wait)
        if meta is not None:
            self._arrived()
        if meta is not None and self._async_result is not None:
            self._async_result._remember(meta)
        elif meta is not None:
            self._meta = meta

    def _end(self, value: Any, error: BaseException | None) -> None:
        if error is None:
            self.callback(value)
            return
        heard = bool(getattr(self, _CALLBACKS))
        self._fail(error)
        if error is self._forgotten and not heard:
            # Whoever has forgotten it wants to hear no more of it; what is attached later gets it all the same.
            self._is_told()

    def _forget(self, error: Exception) -> None:
        """The result is not wanted any more; whether the call is sent still is."""
        self._forgotten = error
        self._leave()
        if self._unit is None:
            self._end(None, error)

    def _fail(self, error: BaseException) -> None:
        self._failed_with = error
        self.errback(error)
        if self._unhandled() is not None:
            self._engine.untold.add(self, error)

    def _arrived(self) -> None:
        """A task of the call has run: whatever happens to the confirm, its message must not be sent again."""
        unit = self._unit
        if unit is not None:
            unit.settle()
            if unit.done:
                self._tell_sent(None)

    def _member_ended(self, meta: Meta) -> None:
        self._arrived()
        if self._async_result is not None:
            self._async_result._remember(meta)

    def _leave(self) -> None:
        """Stop waiting; nothing is left in any table."""
        wait, self._wait = self._wait, None
        if wait is not None:
            wait.leave()
            self._engine.release(wait)

    def __del__(self) -> None:
        # Dropped with nothing attached. The collector may run this in any thread and at any moment, so the
        # table is not touched here.
        if self._wait is not None:
            self._engine.abandon(self._wait)

    def _cancelled(self) -> None:
        self._engine.check_thread()
        unit = self._unit
        withdrawn = unit is not None and unit.withdraw()
        # Also where it is cancelled once more by whoever is told that it was.
        never_left = self._error is not None or (unit is not None and unit.never_left)
        self._leave()
        if withdrawn:
            error = NotSent("the call was cancelled before it left", task_id=self.id)
            self._never_left(error)
            self._has_come(error)
            self._tell_sent(CancelledError())
        if self._revoke_on_cancel and not never_left:
            self._revoke_cancelled()

    def _revoke_cancelled(self) -> None:
        # It raises where the service is being stopped, and this Deferred has to fire all the same.
        maybeDeferred(self.revoke).addErrback(self._engine.log_failure, f"revoking the cancelled {self.id}")

    def _sent(self, error: Exception | None) -> None:
        """The outbox is done with the call."""
        told = bool(self._sent_waiters or self._coming)
        if error is not None:
            self._leave()
            told = self._never_left(error) or told
            self._has_come(error)
        self._tell_sent(error)
        if error is None:
            self._tell_silent()
        if self.called:
            return
        if error is not None:
            self._fail(error)
            if told:
                self._is_told()
        elif self._forgotten is not None:
            self._end(None, self._forgotten)
        elif self._waits:
            return
        elif self._once_sent is not None:
            self._start_waiting(*self._once_sent)
        else:
            # ignore_result, or an app without a result backend: there is nothing more to wait for.
            self.callback(None)

    def _tell_silent(self) -> None:
        """The call is sent: the tasks that answer nothing are done as far as anybody will know."""
        waiters = self._engine.waiters
        for task_id in self._silent:
            if task_id is not None and task_id in waiters:
                waiters.meta_received(nothing_of(task_id))

    def _never_left(self, error: Exception) -> bool:
        """Fail whoever else waits for a result of this call, and return whether somebody does."""
        if self._async_result is not None:
            self._async_result._refuse(error)
        waiters = self._engine.waiters
        waited = [task_id for task_id in leaves(self._shape) if task_id in waiters]
        return sum(waiters.never_sent(task_id, error) for task_id in waited) > 0

    def _tell_sent(self, error: Exception | None) -> None:
        self._unit = None
        self._error = error
        waiters, self._sent_waiters = self._sent_waiters, None
        for waiter in waiters or ():
            if error is None:
                waiter.callback(None)
            else:
                waiter.errback(error)

    def _unhandled(self) -> Any:
        """Return what Twisted would log of the error that this has failed with; what a callback has made of it is another error."""
        found = self._debugInfo
        if found is None or found.failResult is None or found.failResult.value is not self._failed_with:
            return None
        return found

    def _is_told(self) -> None:
        """Somebody has been told why the call has failed: where this Deferred is dropped now, Twisted need not log that."""
        unhandled = self._unhandled()
        if unhandled is not None:
            unhandled.failResult = None

    def when_sent(self) -> Deferred[None]:
        """Return a fresh Deferred that fires with None once the broker has confirmed every message of the call.

        It fails as the call itself does where the call cannot be sent. Cancelling it only stops this waiting.
        """
        if self._error is not None:
            self._is_told()
            return fail(self._error)
        if self._unit is None:
            return succeed(None)
        waiters = self._sent_waiters = self._sent_waiters or []
        waiter: Deferred[None] = Deferred(waiters.remove)
        waiters.append(waiter)
        return waiter

    @property
    def id(self) -> str:
        """The id of the task, or of the group."""
        return self.async_result.id if not isinstance(self._shape, str) else self._shape

    @property
    def async_result(self) -> AsyncResult | GroupResult:
        """The handle of this call's result.

        While the call is being put together in a thread, it is one whose questions wait for that; what it would have to know at once
        (``results``, ``parent``, ``as_tuple()``) raises AttributeError then, until `when_sent` fires.
        """
        found = self._async_result
        if found is None and self._coming is not None:
            return ComingResult(self)  # type: ignore[return-value]  # it has their names
        if found is None:
            # Only ever missing for a single task: the handle of anything bigger is made with the call.
            assert isinstance(self._shape, str)
            found = self._async_result = AsyncResult(self._engine, self._shape)
            found._ignored = not self._waits
            if self._meta is not None:
                found._remember(self._meta)
            if self._error is not None:
                found._refuse(self._error)
        return found

    @property
    def task(self) -> AsyncResult | GroupResult:
        """As `async_result`: txCelery's name for it."""
        return self.async_result

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        on_message: Callable[[Meta], object] | None = None,
        follow_parents: bool = True,
    ) -> Deferred[Any]:
        """As `AsyncResult.get`."""
        return self.async_result.get(timeout, propagate, on_message, follow_parents)

    def __getattr__(self, name: str) -> Any:
        # Only for names that a Deferred has not; "result" is the Deferred's own, and absent until it fires.
        if name in _HANDLE_NAMES:
            return getattr(self.async_result, name)
        if name == "result":
            raise AttributeError(
                f"this {type(self).__name__} has no result: it is the Deferred's, there once that has fired; "
                "yield or await it, or ask for its info"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def revoke(self, terminate: bool = False, signal: str | None = None) -> Deferred[None]:
        """As `AsyncResult.revoke`."""
        return self.async_result.revoke(terminate=terminate, signal=signal)

    def __str__(self) -> str:
        return self.id

    def __reduce__(self) -> Any:
        return self.async_result.__reduce__()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {'fired' if self.called else 'waiting'}>"


class ComingResult:
    """The handle of a call that is being put together in a thread; see `TaskDeferred.async_result`.

    Once that is done, it is the call's handle by another name.
    """

    def __init__(self, calling: TaskDeferred) -> None:
        self._calling = calling

    @property
    def id(self) -> str:
        """The id of the task, or of the group."""
        return self._calling.id

    def __getattr__(self, name: str) -> Any:
        calling = self._calling
        if calling._coming is None:
            return getattr(calling.async_result, name)
        if name in _ITERATED:
            return partial(self._iterate, name)
        if name in _ASKED:
            return partial(self._ask, name)
        raise AttributeError(
            f"{name}: the call is still being put together in a thread; wait for its when_sent(), or make it with "
            "in_thread=False"
        )

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> Deferred[Any]:
        """Ask the handle once there is one."""
        coming = self._calling._when_come()
        answer: Deferred[Any] = (PredicateDeferred if name in _PREDICATES else Deferred)(
            lambda _: coming.cancel()
        )
        coming.addCallback(lambda _: getattr(self._calling.async_result, name)(*args, **kwargs))
        coming.addCallbacks(answer.callback, answer.errback)
        return answer

    async def _iterate(self, name: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        await self._calling._when_come()
        async for found in getattr(self._calling.async_result, name)(*args, **kwargs):
            yield found

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def __str__(self) -> str:
        return self.id


_ITERATED = frozenset({"as_completed", "collect"})
_PREDICATES = frozenset({"exists", "failed", "ready", "successful", "waiting"})
_ASKED = _PREDICATES | {
    "children", "completed_count", "delete", "forget", "get", "info", "join", "meta", "result", "revoke", "save",
    "state", "status", "traceback",
}  # fmt: skip

_HANDLE_NAMES = frozenset(
    {
        "as_completed", "as_tuple", "children", "collect", "completed_count", "delete", "exists", "failed", "forget",
        "info", "join", "meta", "parent", "ready", "results", "save", "state", "status", "successful", "traceback",
        "waiting",
    }
)  # fmt: skip
