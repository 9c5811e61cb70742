"""The handles of results, `AsyncResult` and `GroupResult`, for tasks of this process and of others.

The names are those of Celery's results; each one that needs the network returns a Deferred, fresh per caller.
"""

from __future__ import annotations

from collections import deque
from math import isfinite
from typing import TYPE_CHECKING, Any, NoReturn

from celery.result import result_from_tuple
from celery.states import EXCEPTION_STATES, FAILURE, PENDING, PROPAGATE_STATES, SUCCESS
from twisted.internet.defer import Deferred, fail, gatherResults, succeed

from ._ancestry import has_header, line_of, stretches, whole
from ._slices import gather_in_slices, in_slices
from ._waits import Ancestors, EagerMeta, Shape, Wait, failure_of, is_final, nothing_of, tell, value_of
from .errors import NotSent, OutcomeUnknown, ResultTimeout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from ._engine import Engine
    from .interfaces import Meta

__all__ = ["AsyncResult", "GroupResult", "PredicateDeferred"]


def seconds_of(timeout: float) -> float:
    """Check a number of seconds; less than none is none."""
    if not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout is {timeout!r}; it has to be a number of seconds, or None")
    if not isfinite(timeout):
        raise ValueError(f"timeout is {timeout!r}; for no limit leave it out")
    return max(0.0, timeout)


class PredicateDeferred(Deferred[bool]):
    """The Deferred of a yes-or-no question. Asking it for its truth is an error: it is not the answer."""

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "this is a Deferred, not an answer: write `if (await result.ready()):`, or yield it, or addCallback"
        )


class _Asked(Wait):
    """The wait of somebody who asks a handle."""

    __slots__ = ("_handle",)

    def __init__(self, handle: _Handle, **settings: Any) -> None:
        super().__init__(handle._engine.waiters, handle._shape, finished=handle._remember, **settings)
        self._handle = handle

    def _deliver(
        self, deferred: Deferred[Any], meta: Meta | None, value: Any, error: BaseException | None
    ) -> None:
        # A timeout of its own says nothing of the task.
        if not isinstance(error, ResultTimeout):
            self._handle._told(value if error is None else error)
        super()._deliver(deferred, meta, value, error)


class _Handle:
    """What the handles of one task and of a group share."""

    __slots__ = ("__weakref__", "_engine", "_unsent", "id", "parent")

    def __init__(self, engine: Engine, id: str, parent: AsyncResult | GroupResult | None = None) -> None:  # noqa: A002  # Celery's name
        self._engine = engine
        self.id = id
        #: The handle of what stands before it in a chain.
        self.parent = parent
        #: Why the call was not sent; then there is nothing to wait for.
        self._unsent: Exception | None = None

    def _refuse(self, error: Exception) -> None:
        """The call has failed to be sent. One whose outcome is unknown may still be waited for."""
        if isinstance(error, OutcomeUnknown):
            return
        node: AsyncResult | GroupResult | None = self  # type: ignore[assignment]  # one of the two
        while node is not None:
            node._unsent = error
            node._refuse_members(error)
            node = node.parent

    def _refuse_members(self, error: Exception) -> None:
        """A single task has none."""

    def as_tuple(self) -> Any:
        raise AssertionError("only the two handles below are made")

    def __reduce__(self) -> Any:
        # The connections stay here: it is unpickled as Celery's own result, of the app that is current there.
        return result_from_tuple, (self.as_tuple(),)

    def _followed(self) -> Ancestors | None:
        """Return the tasks before this one, whose failure means that this one will never run."""
        found = stretches(self, GroupResult)
        return Ancestors(self._engine.clock, found) if found else None

    @property
    def _shape(self) -> Shape:
        raise AssertionError("only the two handles below are made")

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        on_message: Callable[[Meta], object] | None = None,
        follow_parents: bool = True,
    ) -> Deferred[Any]:
        """Wait for the value; fails with the task's own exception.

        ``timeout`` is in seconds and ends in `ResultTimeout`. ``propagate=False`` gives a task's exception as
        the value. ``on_message`` is called with the meta of every state. ``follow_parents=False`` does not fail
        when a task before this one in a chain fails. Cancelling stops this waiting only.

        Behind a chord whose header fails, it fails with the exception of the header's first task, in order, that has failed; a note on it
        (Python 3.11) names task and chord. What looks only at this task's own state gives what is stored there, Celery's ChordError:
        ``propagate=False``, ``follow_parents=False``, and the handle of a bare id, which knows no header.
        """
        if timeout is not None:
            timeout = seconds_of(timeout)
        refusal = self._unsent or self._engine.caller.why_unsent(self) or self._engine.refuse_waiting(self)
        if refusal is not None:
            self._told(refusal)
            return fail(refusal)
        parents = self._followed() if follow_parents else None
        wait = _Asked(self, parents=parents, propagate=propagate, on_message=on_message)
        waiting: Deferred[Any] = Deferred(lambda _: wait.leave())
        early = {meta["task_id"]: meta for meta in self._known()}
        if parents is not None:
            for node in whole(self, GroupResult):
                if isinstance(node, AsyncResult):
                    early.update((meta["task_id"], meta) for meta in node._known())
        in_slices(self._engine.clock, wait.begin(waiting), wait.joining(early))
        if timeout is not None:
            wait.expire(self._engine.clock, timeout)
        return waiting

    def _told(self, outcome: object) -> None:
        """Somebody is told what has become of this."""
        self._engine.untold.told(self.id, outcome)

    def _remember(self, meta: Meta) -> None:
        """A final state has come."""

    def _known(self) -> Iterator[Meta]:
        """Yield the final states that have come."""
        raise AssertionError("only the two handles below are made")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def __str__(self) -> str:
        return self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __eq__(self, other: object) -> bool:
        return self.id == getattr(other, "id", other)


class AsyncResult(_Handle):
    """The handle of one task's result, whoever sent it.

    With the rpc backend a result arrives once, at the TwistedCelery that called the task: nobody else can ask for it. For an id
    that it has not called, or whose result has gone to who waited for it, this handle answers PENDING, and `get` waits, as Celery's
    does; the call's own TaskDeferred, and its ``async_result``, go on answering.
    """

    __slots__ = ("_ignored", "_meta")

    def __init__(self, engine: Engine, id: str, parent: AsyncResult | GroupResult | None = None) -> None:  # noqa: A002  # Celery's name
        super().__init__(engine, id, parent)
        self._meta: Meta | None = None
        self._ignored = False

    @property
    def _shape(self) -> Shape:
        return self.id

    def _remember(self, meta: Meta) -> None:
        if not is_final(meta):
            return
        # A chain may have more links than Python allows calls within calls.
        node: AsyncResult | GroupResult | None = self
        while isinstance(node, AsyncResult) and node.id != meta["task_id"]:
            node = node.parent
        if isinstance(node, AsyncResult):
            node._meta = None if node._ignored else meta
        elif node is not None:
            node._remember(meta)

    def _known(self) -> Iterator[Meta]:
        if self._meta is not None:
            yield self._meta
        elif self._ignored:
            yield nothing_of(self.id)

    def get(  # the same docstring, set below
        self,
        timeout: float | None = None,
        propagate: bool = True,
        on_message: Callable[[Meta], object] | None = None,
        follow_parents: bool = True,
    ) -> Deferred[Any]:
        meta = self._meta
        follow = propagate and follow_parents and not self._engine.stopped
        if meta is None or self._unsent is not None or (follow and self._is_behind_the_failure(meta)):
            return super().get(timeout, propagate, on_message, follow_parents)
        self._engine.check_thread()
        if on_message is not None:
            tell(on_message, meta)
        if meta["status"] not in PROPAGATE_STATES:
            return succeed(value_of(meta))
        error = failure_of(meta)
        self._told(error)
        return fail(error) if propagate else succeed(error)

    get.__doc__ = _Handle.get.__doc__

    def _is_behind_the_failure(self, meta: Meta) -> bool:
        """Whether this has failed and stands behind a chord's header, where the failure may have come from."""
        return (
            meta["status"] in PROPAGATE_STATES
            and not isinstance(meta, EagerMeta)
            and self.parent is not None
            and has_header(line_of(self, GroupResult))
        )

    def _current(self) -> Deferred[Meta]:
        if self._meta is not None:
            self._engine.check_thread()
            # A value that is there, of a call that was to send something and could not.
            return succeed(self._meta) if self._unsent is None else fail(self._unsent)
        refusal = self._engine.refuse_waiting(self)
        if refusal is not None:
            return fail(refusal)
        return self._engine.current_state(self.id).addCallback(self._seen)

    def _seen(self, meta: Meta) -> Meta:
        self._remember(meta)
        return meta

    def _tell(self) -> Deferred[Meta]:
        """Fire with the present state, for somebody who is told by it where the task has failed."""
        return self._current().addCallback(self._telling)

    def _telling(self, meta: Meta) -> Meta:
        if meta["status"] in PROPAGATE_STATES:
            self._told(meta["result"])
        return meta

    def state(self) -> Deferred[str]:
        """Fire with the present state's name: PENDING where nothing is known of the task."""
        return self._tell().addCallback(lambda meta: str(meta["status"]))

    status = state

    def info(self) -> Deferred[Any]:
        """Fire with the result, the exception or, in other states, what the task said with ``update_state``."""
        return self._tell().addCallback(
            lambda meta: failure_of(meta) if meta["status"] in EXCEPTION_STATES else meta.get("result")
        )

    result = info

    def meta(self) -> Deferred[Meta]:
        """Fire with all that the backend keeps: ``date_done``, and with ``result_extended`` the task's name, arguments, worker ..."""
        return self._tell()

    def traceback(self) -> Deferred[str | None]:
        """Fire with the worker's traceback of a task that failed, as text."""
        return self._tell().addCallback(lambda meta: meta.get("traceback"))

    def children(self) -> Deferred[list[AsyncResult | GroupResult]]:
        """Fire with the handles of the tasks that this task has called."""
        return self._current().addCallback(
            lambda meta: [self._engine.handle_of_tuple(child) for child in meta.get("children") or ()]
        )

    def _asks(self, answer: Callable[[Meta], bool], *, telling: bool = False) -> PredicateDeferred:
        asking = self._tell() if telling else self._current()
        question = PredicateDeferred(lambda _: asking.cancel())
        asking.addCallback(answer).addCallbacks(question.callback, question.errback)
        return question

    def ready(self) -> PredicateDeferred:
        """Fire with whether the task has succeeded, failed or been revoked."""
        return self._asks(is_final)

    def successful(self) -> PredicateDeferred:
        """Fire with whether the task has returned."""
        return self._asks(lambda meta: meta["status"] == SUCCESS, telling=True)

    def failed(self) -> PredicateDeferred:
        """Fire with whether the task has raised."""
        return self._asks(lambda meta: meta["status"] == FAILURE, telling=True)

    def exists(self) -> PredicateDeferred:
        """Fire with whether anything is known of the task; False means the same as PENDING."""
        return self._asks(lambda meta: meta["status"] != PENDING)

    def forget(self) -> Deferred[None]:
        """Remove what is kept of this task's result, and of its parents'.

        A result that has not come yet is not waited for any more: the call, and every `get` of it, fails with `ResultNotKept`. The
        task runs all the same; a `get` that is begun later waits anew.
        """
        forgetting = []
        node: AsyncResult | GroupResult | None = self
        while isinstance(node, AsyncResult):
            # What has run here is kept nowhere else, and goes with this handle.
            if not isinstance(node._meta, EagerMeta):
                node._meta = None
                forgetting.append(self._engine.forget(node.id))
            node = node.parent
        if node is not None:
            forgetting.append(node.forget())
        done = gatherResults(forgetting, consumeErrors=True)
        # The error itself, not what gatherResults wraps it in.
        return done.addCallbacks(lambda _: None, lambda failure: failure.value.subFailure)

    def revoke(self, terminate: bool = False, signal: str | None = None) -> Deferred[None]:
        """Tell the workers not to run this task; ``terminate=True`` to kill it where it runs, with ``signal``.

        Fires with None once the broker has confirmed the order; workers do not answer it.
        """
        return self._engine.revoke([self.id], terminate, signal)

    async def collect(
        self, timeout: float | None = None, propagate: bool = True
    ) -> AsyncIterator[tuple[AsyncResult | GroupResult, Any]]:
        """Yield this task and all that it has called, down to the last, each with its value.

        ``timeout`` is for each one; ``propagate=False`` gives exceptions as values. With the rpc backend the results of what the
        task has called go to its worker, and are waited for in vain here.
        """
        waiting: deque[AsyncResult | GroupResult] = deque([self])
        while waiting:
            node = waiting.popleft()
            yield node, await node.get(timeout, propagate)
            waiting.extend(await node.children())

    def as_tuple(self) -> Any:
        """As Celery's ``AsyncResult.as_tuple``; ``celery.result.result_from_tuple`` reads it."""
        return (self.id, self.parent and self.parent.as_tuple()), None


class GroupResult(_Handle):
    """The handle of a group's results."""

    __slots__ = ("_members", "results")

    def __init__(
        self,
        engine: Engine,
        id: str,  # noqa: A002  # Celery's name
        results: Sequence[AsyncResult | GroupResult],
        parent: AsyncResult | GroupResult | None = None,
    ) -> None:
        super().__init__(engine, id, parent)
        #: The members' handles, in order.
        self.results = list(results)
        #: See `_index`.
        self._members: dict[str, AsyncResult] | None = None

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[AsyncResult | GroupResult]:
        return iter(self.results)

    def __getitem__(self, index: int) -> AsyncResult | GroupResult:
        return self.results[index]

    def __bool__(self) -> bool:
        # An empty group is still a handle.
        return True

    @property
    def _shape(self) -> Shape:
        return [member._shape for member in self.results]

    join = _Handle.get

    def _tasks(self) -> Iterator[AsyncResult]:
        for member in self.results:
            if isinstance(member, GroupResult):
                yield from member._tasks()
            else:
                yield member

    def _index(self) -> dict[str, AsyncResult]:
        """Give the handles of all tasks by id, those before the members too."""
        members = self._members
        if members is None:
            members = self._members = {}
            for task in self._tasks():
                node: AsyncResult | GroupResult | None = task
                while node is not None and node.id not in members:
                    if isinstance(node, AsyncResult):
                        members[node.id] = node
                    node = node.parent
        return members

    def _remember(self, meta: Meta) -> None:
        found = self._index().get(meta["task_id"])
        if found is not None:
            found._remember(meta)
        elif self.parent is not None:
            self.parent._remember(meta)

    def _refuse_members(self, error: Exception) -> None:
        if isinstance(error, NotSent):
            # Not one of them has left.
            for member in self.results:
                member._refuse(error)

    def _known(self) -> Iterator[Meta]:
        for task in self._tasks():
            yield from task._known()

    async def as_completed(self) -> AsyncIterator[AsyncResult | GroupResult]:
        """Yield each member's handle as it ends, whether it has succeeded or failed; ``get()`` of it fires at once.

        ::

            async for result in group.as_completed():
                print(result.id, await result.get(propagate=False))
        """
        ended: deque[AsyncResult | GroupResult] = deque()
        pending: list[Deferred[Any]] = []
        more: Deferred[None] | None = None

        def end(_: object, member: AsyncResult | GroupResult) -> None:
            nonlocal more
            ended.append(member)
            if more is not None:
                waiting, more = more, None
                waiting.callback(None)

        def begin(member: AsyncResult | GroupResult) -> None:
            pending.append(member.get(propagate=False).addBoth(end, member))

        beginning = in_slices(self._engine.clock, self.results, begin)
        beginning.addErrback(lambda _: None)
        try:
            for _ in self.results:
                if not ended:
                    more = Deferred()
                    await more
                yield ended.popleft()
        finally:
            # Left early: what is still pending is of no interest any more.
            more = None
            beginning.cancel()
            for waiting in pending:
                waiting.cancel()

    def save(self) -> Deferred[None]:
        """Keep the group at the result backend, for `TwistedCelery.restore_group`; refused by rpc, as in Celery."""
        return self._engine.save_group(self)

    def delete(self) -> Deferred[None]:
        """Remove what `save` has kept."""
        return self._engine.delete_group(self.id)

    def _metas(self) -> Deferred[list[Meta]]:
        """Fire with the present states of all tasks, also of those in groups within."""
        return gather_in_slices(self._engine.clock, self._tasks(), AsyncResult._current)

    def _telling(self, metas: list[Meta]) -> list[Meta]:
        if any(meta["status"] in PROPAGATE_STATES for meta in metas):
            self._told(metas)
        return metas

    def _asks(self, answer: Callable[[list[Meta]], bool], *, telling: bool = False) -> PredicateDeferred:
        asking = self._metas()
        if telling:
            asking.addCallback(self._telling)
        question = PredicateDeferred(lambda _: asking.cancel())
        asking.addCallback(answer).addCallbacks(question.callback, question.errback)
        return question

    def completed_count(self) -> Deferred[int]:
        """Fire with how many members have succeeded."""
        return self._metas().addCallback(lambda metas: sum(meta["status"] == SUCCESS for meta in metas))

    def ready(self) -> PredicateDeferred:
        """Fire with whether every member has succeeded, failed or been revoked."""
        return self._asks(lambda metas: all(map(is_final, metas)))

    def waiting(self) -> PredicateDeferred:
        """Fire with whether any member is not ready."""
        return self._asks(lambda metas: not all(map(is_final, metas)))

    def successful(self) -> PredicateDeferred:
        """Fire with whether every member has succeeded."""
        return self._asks(lambda metas: all(meta["status"] == SUCCESS for meta in metas), telling=True)

    def failed(self) -> PredicateDeferred:
        """Fire with whether any member has failed."""
        return self._asks(lambda metas: any(meta["status"] == FAILURE for meta in metas), telling=True)

    def children(self) -> Deferred[list[AsyncResult | GroupResult]]:
        """Fire with the members' handles."""
        return succeed(self.results)

    def forget(self) -> Deferred[None]:
        """Remove what is kept of the members' results, and of what stands before the group; see `AsyncResult.forget`."""
        forgotten = [*self.results] if self.parent is None else [*self.results, self.parent]
        forgetting = gather_in_slices(self._engine.clock, forgotten, lambda member: member.forget())
        return forgetting.addCallback(lambda _: None)

    def revoke(self, terminate: bool = False, signal: str | None = None) -> Deferred[None]:
        """Tell the workers not to run any member; see `AsyncResult.revoke`."""
        return self._engine.revoke([task.id for task in self._tasks()], terminate, signal)

    def as_tuple(self) -> Any:
        """As Celery's ``GroupResult.as_tuple``; ``celery.result.result_from_tuple`` reads it."""
        return (self.id, self.parent and self.parent.as_tuple()), [
            member.as_tuple() for member in self.results
        ]
