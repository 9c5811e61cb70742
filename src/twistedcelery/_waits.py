"""One wait: from the states of one or many tasks to the one Deferred that somebody holds.

A wait is in the table of waits under each task id that it needs, and in no other place. It holds its
Deferred weakly while nothing hangs on it, so that a call whose Deferred is dropped costs nothing for long, and
strongly from the moment that something is attached, however that is done.
"""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import ref

from celery import exceptions as celery_exceptions
from celery.exceptions import ChordError, TaskRevokedError
from celery.states import PROPAGATE_STATES, READY_STATES, REVOKED, SUCCESS
from celery.utils.serialization import create_exception_cls
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from .errors import ResultTimeout, TwistedCeleryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from ._waiters import Waiters
    from .interfaces import Meta

__all__ = [
    "Before",
    "EagerMeta",
    "Parents",
    "RemoteTraceback",
    "Shape",
    "Wait",
    "eager_meta",
    "failure_of",
    "is_final",
    "leaves",
    "nothing_of",
    "tell",
    "value_of",
    "why_never",
]

log = Logger()

#: What a call gives: one task's id, or the list of what a group's members give.
Shape: TypeAlias = "str | list[Shape]"


class Before(NamedTuple):
    """What a task that stands before those of a shape means for them."""

    #: Those that never run if it fails; None: all.
    members: list[str] | None
    #: Whether it is in the header of a chord: then they fail with a ChordError.
    in_header: bool


#: The tasks that stand before those of a shape, by id.
Parents: TypeAlias = "dict[str, Before]"

#: Of nearly every wait; never changed.
_NO_PARENTS: Parents = {}


#: What steers generators, coroutines, Deferreds and processes. Two of them are private to Twisted: a version may come without.
_CONTROL_FLOW: tuple[type[BaseException], ...] = (
    GeneratorExit,
    KeyboardInterrupt,
    StopAsyncIteration,
    StopIteration,
    SystemExit,
    asyncio.CancelledError,
    defer.AlreadyCalledError,
    defer.CancelledError,
    defer.NotACoroutineError,
    *(
        getattr(defer, name)
        for name in ("_DefGen_Return", "_InternalInlineCallbacksCancelledError")
        if hasattr(defer, name)
    ),
)


def tell(on_message: Callable[[Meta], object], meta: Meta) -> None:
    """Call the caller's code with a state; its error must not stop others' results."""
    try:
        on_message(meta)
    except Exception:  # noqa: BLE001  # see above; it is logged
        log.failure("on_message failed for task {task_id}", task_id=meta["task_id"])


class RemoteTraceback(Exception):
    """The traceback of the worker, as text; the ``__cause__`` of the exception that a task failed with."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def failure_of(meta: Meta) -> BaseException:
    """Return the exception of a task that failed or was revoked, with the worker's traceback as its cause.

    Where a worker has stored what steers control flow (``StopIteration``, ``CancelledError`` ...), it is another class of that name,
    from now on in the state as well: the real one, raised by ``yield`` or ``await``, would do here what it is made for.
    """
    error = meta["result"]
    if isinstance(error, Failure):
        # An exception for Python, and so for Celery.
        error = error.value
    if isinstance(error, _CONTROL_FLOW):
        error = meta["result"] = _stand_in(error)
    if not isinstance(error, BaseException):
        error = TaskRevokedError(error) if meta["status"] == REVOKED else Exception(error)
    text = meta.get("traceback")
    if text and error.__cause__ is None:
        error.__cause__ = RemoteTraceback(str(text))
    failed: BaseException = error
    return failed


def _stand_in(error: BaseException) -> Exception:
    """Make an exception of the same name and message that means nothing to Python or Twisted."""
    # Where Celery puts the classes of exceptions that it cannot import.
    made = create_exception_cls(type(error).__name__, celery_exceptions.__name__)
    stand_in: Exception = made(*error.args)
    stand_in.__cause__ = error.__cause__
    return stand_in.with_traceback(error.__traceback__)


def why_never(before: Before, task_id: str, error: BaseException) -> BaseException:
    """Return what tasks fail with that never run because this one before them has failed."""
    if not before.in_header:
        return error
    # Celery's words.
    failure: BaseException = ChordError(f"Dependency {task_id} raised {error!r}")
    failure.__cause__ = error
    return failure


def nothing_of(task_id: str) -> Meta:
    """Make what stands for the result of a task that keeps none, among those of its group."""
    return {"task_id": task_id, "status": SUCCESS, "result": None, "traceback": None}


class EagerMeta(dict[str, Any]):
    """The state of a task that has run in this process (``task_always_eager``): its last one, whatever it is called.

    One that raised Ignore, Reject or Retry ends as IGNORED, REJECTED or RETRY, with the exception as its result.
    """


def eager_meta(result: Any) -> Meta:
    """Give the state of a task that has run already, Celery's EagerResult."""
    return EagerMeta(
        task_id=result.id, status=result.state, result=result._result, traceback=result.traceback
    )


def is_final(meta: Meta) -> bool:
    """Whether this is the last state of a task."""
    return meta["status"] in READY_STATES or isinstance(meta, EagerMeta)


def value_of(meta: Meta) -> Any:
    """Return what a task gives that has ended, and has not failed: None unless it has returned, as Celery's ``EagerResult.get``."""
    return meta["result"] if meta["status"] == SUCCESS else None


def leaves(shape: Shape) -> Iterator[str]:
    """Yield every task id of a shape, in order."""
    if isinstance(shape, str):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


def _arrange(shape: Shape, values: dict[str, Any]) -> Any:
    return values[shape] if isinstance(shape, str) else [_arrange(part, values) for part in shape]


class Wait:
    """Waits for the tasks of a shape, and for the failure of the tasks that stand before them.

    ``propagate=False`` gives exceptions as values, also that of a task before it. ``on_message`` gets every state of the shape's own tasks, the
    final one last. ``finished`` is told the final meta of each task of the shape, before the Deferred fires.
    """

    __slots__ = (
        "_deferred", "_finished", "_left", "_on_message", "_parents", "_propagate", "_timer", "_values", "_waiters",
        "shape",
    )  # fmt: skip

    def __init__(
        self,
        waiters: Waiters,
        shape: Shape,
        *,
        parents: Parents | None = None,
        propagate: bool = True,
        on_message: Callable[[Meta], object] | None = None,
        finished: Callable[[Meta], None] | None = None,
    ) -> None:
        self._waiters = waiters
        self.shape = shape
        self._parents = parents or _NO_PARENTS
        self._propagate = propagate
        self._on_message = on_message
        self._deferred: Deferred[Any] | ref[Deferred[Any]] | None = None
        self._finished = finished
        self._timer: IDelayedCall | None = None
        #: The values of many tasks, this wait itself where there is none yet.
        self._values: dict[str, Any] | None = None
        self._left = 1
        if not isinstance(shape, str):
            self._values = dict.fromkeys(leaves(shape), self)
            self._left = len(self._values)

    def start(
        self, deferred: Deferred[Any], *, weakly: bool = False, early: Mapping[str, Meta] | None = None
    ) -> None:
        """Enter the table; ``deferred`` fires with the value or the failure, maybe before this returns.

        ``early`` has the final states of tasks of the shape that are known already.
        """
        join = self.joining(early)
        for task_id in self.begin(deferred, weakly=weakly):
            join(task_id)

    def begin(self, deferred: Deferred[Any], *, weakly: bool = False) -> Iterable[str]:
        """Take the Deferred, and return the task ids that `join` has to be called with."""
        self._deferred = ref(deferred) if weakly else deferred
        if self._values is None:
            assert isinstance(self.shape, str)
            return (*self._parents, self.shape)
        if not self._left:
            self._end(None, _arrange(self.shape, self._values), None)
            return ()
        return chain(tuple(self._parents), self._values)

    def join(self, task_id: str) -> None:
        """Enter the table for one task, unless the wait has ended meanwhile."""
        if self._deferred is not None:
            self._waiters.add(task_id, self)

    def joining(self, early: Mapping[str, Meta] | None) -> Callable[[str], object]:
        """Give what is called with each of the ids: `join`, except for those whose final states are known already."""
        if not early:
            return self.join

        def join(task_id: str) -> None:
            if task_id in early:
                self.state_received(early[task_id])
            else:
                self.join(task_id)

        return join

    def follow(self, parents: Parents) -> None:
        """Fail also where one of these tasks fails; for a wait that has begun without any."""
        self._parents = parents
        for task_id in tuple(parents):
            self.join(task_id)

    def expire(self, clock: IReactorTime, timeout: float) -> None:
        """Fail with `ResultTimeout` after ``timeout`` seconds."""
        if self._deferred is not None:
            # A span that is used up already, as whoever subtracts gets it, is over now.
            self._timer = clock.callLater(max(0.0, timeout), self._expired, timeout)

    def _expired(self, timeout: float) -> None:
        self._timer = None
        missing = [task_id for task_id in self._ids() if task_id in self._waiters]
        self.fail(
            ResultTimeout(
                f"no result within {timeout} s"
                + (f", {self._left} of {len(self._values)} tasks are missing" if self._values else ""),
                task_id=missing[0] if missing else None,
            )
        )

    def hold(self) -> None:
        """Something hangs on the Deferred: keep it until it fires."""
        if isinstance(self._deferred, ref):
            self._deferred = self._deferred()

    @property
    def deferred(self) -> Deferred[Any] | None:
        """The Deferred, where it is still there."""
        deferred = self._deferred
        return deferred() if isinstance(deferred, ref) else deferred

    @property
    def held(self) -> bool:
        """Whether the Deferred is kept by this wait."""
        return isinstance(self._deferred, Deferred)

    def _ids(self) -> list[str]:
        return [*self._parents, *([self.shape] if isinstance(self.shape, str) else self._values or ())]

    def leave(self) -> None:
        """Leave the table without a result: cancelled, or nobody is there any more."""
        self._deferred = None
        self._free()

    def _free(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for task_id in self._parents:
            self._waiters.discard(task_id, self)
        if self._values is not None:
            for task_id, value in self._values.items():
                if value is self:
                    self._waiters.discard(task_id, self)
        elif isinstance(self.shape, str):
            self._waiters.discard(self.shape, self)

    # As a Waiter:

    def state_received(self, meta: Meta) -> None:
        """Take a state of one of the tasks."""
        if self._deferred is None:
            # Cancelled by another one that was told before.
            return
        task_id = meta["task_id"]
        own = self._is_own(task_id)
        if own and self._on_message is not None:
            tell(self._on_message, meta)
        if not is_final(meta) or self._deferred is None:
            return
        failed = meta["status"] in PROPAGATE_STATES
        if not own:
            self._member_ended(meta)
            self._parent_ended(task_id, failure_of(meta) if failed else None)
        elif failed and self._propagate:
            self._end(meta, None, failure_of(meta))
        elif self._values is None:
            self._end(meta, failure_of(meta) if failed else value_of(meta), None)
        else:
            self._values[task_id] = failure_of(meta) if failed else value_of(meta)
            self._left -= 1
            self._member_ended(meta)
            if not self._left:
                self._end(None, _arrange(self.shape, self._values), None)

    def _is_own(self, task_id: str) -> bool:
        """Whether this is a task of the shape, and not only one before it."""
        return task_id == self.shape or (self._values is not None and task_id in self._values)

    def _parent_ended(self, task_id: str, error: BaseException | None) -> None:
        """A task before those that are waited for has ended; with an error, they will never run."""
        before = self._parents.pop(task_id, None)
        if error is None or before is None:
            return
        error = why_never(before, task_id, error)
        if self._propagate or self._values is None:
            self._end(None, error, error if self._propagate else None)
            return
        for member in self._values if before.members is None else before.members:
            if self._values[member] is self:
                self._waiters.discard(member, self)
                self._values[member] = error
                self._left -= 1
        if not self._left:
            self._end(None, _arrange(self.shape, self._values), None)

    def _member_ended(self, meta: Meta) -> None:
        """A task of a group, or one before the task that is waited for, has ended."""
        if self._finished is not None:
            self._finished(meta)

    def wait_failed(self, task_id: str, error: Exception) -> None:
        """Fail, because the state of one of the tasks can never be given."""
        self.fail(error)

    def forget(self, task_id: str, error: Exception) -> None:
        """Fail where the result of this task is waited for."""
        if self._is_own(task_id):
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Fail the Deferred, whatever the tasks do."""
        if isinstance(error, TwistedCeleryError) and error.task_id is None and isinstance(self.shape, str):
            error.task_id = self.shape
        self._end(None, None, error)

    def lose(self, error: BaseException) -> None:
        """Fail, unless the message of the call that is waited for has not left yet."""
        unit = getattr(self.deferred, "_unit", None)
        if unit is None or unit.has_left:
            self.fail(error)

    def _end(self, meta: Meta | None, value: Any, error: BaseException | None) -> None:
        deferred, self._deferred = self._deferred, None
        if self._timer is not None or self._parents or self._values is not None or error is not None:
            self._free()
        if isinstance(deferred, ref):
            deferred = deferred()
        if deferred is None or deferred.called:
            return
        self._deliver(deferred, meta, value, error)

    def _deliver(
        self, deferred: Deferred[Any], meta: Meta | None, value: Any, error: BaseException | None
    ) -> None:
        """Fire the Deferred; ``meta`` is the final state of a single task."""
        if self._finished is not None and meta is not None:
            self._finished(meta)
        if error is not None:
            deferred.errback(error)
        else:
            deferred.callback(value)
