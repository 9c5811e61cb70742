"""One wait: from the states of one or many tasks to the one Deferred that somebody holds.

A wait is in the table of waits under each task id that it needs, and in no other place. It holds its
Deferred weakly while nothing hangs on it, so that a call whose Deferred is dropped costs nothing for long, and
strongly from the moment that something is attached, however that is done.
"""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import ref

from celery import exceptions as celery_exceptions
from celery.exceptions import ChordError, TaskRevokedError
from celery.states import PROPAGATE_STATES, READY_STATES, REVOKED, SUCCESS
from celery.utils.serialization import create_exception_cls
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ._ancestry import failed_step, first_failure, has_header, ids, is_settled, stored_failure
from .errors import ResultTimeout, TwistedCeleryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from ._ancestry import Known, Line, Stretch
    from ._waiters import Waiters
    from .interfaces import Meta

__all__ = [
    "Ancestors",
    "EagerMeta",
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
]

log = Logger()

#: Seconds for what a worker stores behind a failed header, and for states of the header that come after that: as often as stock
#: Celery's ``get()`` looks at what stands before.
_PATIENCE = 1.0

#: What a call gives: one task's id, or the list of what a group's members give.
Shape: TypeAlias = "str | list[Shape]"


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


def _noted(error: BaseException, note: str | None) -> BaseException:
    # Python 3.11 has notes. One exception goes to all who wait for it.
    add_note = getattr(error, "add_note", None)
    if note is not None and add_note is not None and note not in getattr(error, "__notes__", ()):
        add_note(note)
    return error


def _says_it_itself(error: BaseException, line: Line, known: Known) -> bool:
    """Whether what was stored behind a header of which not all is known says what has failed: it is no ChordError, and nothing else is known to have."""
    if isinstance(error, ChordError):
        return False
    found = first_failure(line, known)
    return found is None or found[0] is error


class Ancestors:
    """What stands before the tasks of a wait, and what has become of it."""

    __slots__ = ("_clock", "_impatient", "_of", "_timer", "failing", "known", "own", "root")

    def __init__(self, clock: IReactorTime, found: list[Stretch]) -> None:
        self._clock = clock
        #: What stands before the whole, where anything does.
        self.root = next((stretch for stretch in found if stretch.tasks is None), None)
        #: How tasks have ended, and whether one of them has failed.
        self.known: Known = {}
        self.failing = False
        #: The failure of a task that is waited for, while what stands before it may still say why.
        self.own: Meta | None = None
        self._of: dict[str, list[Stretch]] = {}
        if len(found) == 1:
            self._of = dict.fromkeys(ids(found[0].line), found)
        else:
            for stretch in found:
                for task_id in ids(stretch.line):
                    self._of.setdefault(task_id, []).append(stretch)
        #: In order.
        self._impatient: dict[Stretch, None] = {}
        self._timer: IDelayedCall | None = None

    @property
    def ids(self) -> list[str]:
        """The ids of all of these tasks, the first of all first."""
        return list(self._of)

    def ended(self, task_id: str, error: BaseException | None) -> list[Stretch]:
        """Take how a task has ended, and return those that may have failed by now."""
        if task_id not in self.known:
            self.known[task_id] = error
            self.failing = self.failing or error is not None
        return self._of.get(task_id, []) if self.failing else []

    def wait_for_more(self, stretch: Stretch, until: Callable[[], None]) -> None:
        """Call ``until`` after a moment, for `late`."""
        self._impatient[stretch] = None
        if self._timer is None:
            self._timer = self._clock.callLater(_PATIENCE, until)

    def late(self) -> list[Stretch]:
        """Return those that have waited long enough."""
        self._timer = None
        late = list(self._impatient)
        self._impatient.clear()
        return late

    def leave(self) -> None:
        """Wait no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Wait:
    """Waits for the tasks of a shape, and for the failure of the tasks that stand before them.

    Where the header of a chord fails, the outcome is the exception of its first member, in order, that has failed; as stock Celery's
    ``get()`` raises it once all states are there. It is the same whenever one asks, as no wait ends by a failure that another may
    precede: members before it that have not ended are waited for, as any task is. Once none is left, the wait ends with the final state of the
    body (of what stands behind the header). Workers do not store one for every body, so it is given a moment, no more. What
    ``propagate=False`` gives, and what fails a group of which one member is a chord, is what workers store: Celery's ChordError.

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
        parents: Ancestors | None = None,
        propagate: bool = True,
        on_message: Callable[[Meta], object] | None = None,
        finished: Callable[[Meta], None] | None = None,
    ) -> None:
        self._waiters = waiters
        self.shape = shape
        self._parents = parents
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
            return (*self._before(), self.shape)
        if not self._left:
            self._end(None, _arrange(self.shape, self._values), None)
            return ()
        return chain(self._before(), self._values)

    def _before(self) -> list[str]:
        return self._parents.ids if self._parents is not None else []

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

    def follow(self, parents: Ancestors, early: Mapping[str, Meta]) -> None:
        """Fail also where one of these tasks fails; for a wait that has begun without any."""
        self._parents = parents
        join = self.joining(early)
        for task_id in parents.ids:
            join(task_id)

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
        return [*self._before(), *([self.shape] if isinstance(self.shape, str) else self._values or ())]

    def leave(self) -> None:
        """Leave the table without a result: cancelled, or nobody is there any more."""
        self._deferred = None
        self._free()

    def _free(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._parents is not None:
            self._parents.leave()
            for task_id in self._parents.ids:
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
            self._ancestor_ended(task_id, failure_of(meta) if failed else None)
        elif failed and self._propagate:
            self._failed(meta)
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

    def _failed(self, meta: Meta) -> None:
        """A task that is waited for has failed; maybe because of a header before it."""
        parents = self._parents
        if parents is None or parents.root is None or not has_header(parents.root.line):
            self._end(meta, None, failure_of(meta))
        elif parents.own is None:
            parents.own = meta
            self._look(parents, parents.root)

    def _ancestor_ended(self, task_id: str, error: BaseException | None) -> None:
        """A task before those that are waited for has ended; with an error, some of these may never run."""
        parents = self._parents
        if parents is None:
            return
        for stretch in parents.ended(task_id, error):
            if self._deferred is not None and not stretch.done:
                self._look(parents, stretch)

    def _look(self, parents: Ancestors, stretch: Stretch) -> None:
        """See whether it is certain by now what the failure of a task before means for those behind; see the class."""
        line, known = stretch.line, parents.known
        settled = is_settled(line, known)
        # What was stored behind a header, if there is one.
        ending = failed_step(line, known)
        if not self._tells_first(stretch):
            over = ending is not None
        else:
            if ending is None and parents.own is not None:
                ending = failure_of(parents.own)
            over = ending is not None and (settled is not False or _says_it_itself(ending, line, known))
        if over:
            self._never_run(parents, stretch)
        elif settled or ending is not None:
            parents.wait_for_more(stretch, self._no_more)

    def _tells_first(self, stretch: Stretch) -> bool:
        """Whether the outcome is the exception of the task that has failed first, not what a worker stores in the name of one behind it."""
        return stretch.tasks is None and (self._propagate or self._values is not None)

    def _no_more(self) -> None:
        """What would have come to tell more has not."""
        parents = self._parents
        assert parents is not None
        for stretch in parents.late():
            if self._deferred is not None and not stretch.done:
                self._never_run(parents, stretch)

    def _never_run(self, parents: Ancestors, stretch: Stretch) -> None:
        """Fail those behind what has failed."""
        stretch.done = True
        own = parents.own
        if self._tells_first(stretch):
            found = first_failure(stretch.line, parents.known)
            error = _noted(*found) if found is not None else None
        else:
            error = stored_failure(stretch.line, parents.known)
        if error is None:
            assert own is not None
            error = failure_of(own)
        if self._propagate or self._values is None:
            self._end(own, error, error if self._propagate else None)
            return
        for member in self._values if stretch.tasks is None else stretch.tasks:
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

    def never_sent(self, task_id: str, error: Exception) -> bool:
        """Fail, unless the Deferred is that of another call with the same id, that is on its way."""
        unit = getattr(self.deferred, "_unit", None)
        if unit is not None and not unit.done:
            return False
        self.wait_failed(task_id, error)
        return True

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
        if (
            self._timer is not None
            or self._parents is not None
            or self._values is not None
            or error is not None
        ):
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
