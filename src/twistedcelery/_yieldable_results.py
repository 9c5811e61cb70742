"""The results of the drop-in, one class for each of Celery's: of a task, of a group, and of a task that has run in line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from celery import result as celery_result
from celery.states import PENDING, PROPAGATE_STATES
from kombu.utils.uuid import uuid
from twisted.internet.defer import Deferred, ensureDeferred, succeed

from ._ancestry import has_header, line_of
from ._waits import eager_meta, failure_of, nothing_of, value_of
from ._yieldable import Yieldable
from .errors import WouldBlock
from .results import AsyncResult, CallWait, GroupResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._engine import Engine
    from ._waits import Shape
    from .interfaces import Meta

__all__ = ["YieldableEagerResult", "YieldableGroupResult", "YieldableResult"]


class YieldableResult(Yieldable, celery_result.AsyncResult):  # type: ignore[misc]  # untyped base
    """A `celery.result.AsyncResult` that can be yielded and awaited."""

    def __init__(
        self,
        id: str,  # noqa: A002  # Celery's name
        backend: Any = None,
        task_name: str | None = None,
        app: Any = None,
        parent: Any = None,
    ) -> None:
        engine = (app or self.app).twisted.engine
        Yieldable.__init__(self, engine, id)
        self.parent = parent
        self._ignored = False
        if engine.source is not None:
            self._waits = True
            self._wait = wait = CallWait(engine.waiters, id)
            wait.start(self, weakly=True)
            if self._wait is not None:
                engine.bound(wait)

    @property
    def id(self) -> str:
        """The id of the task."""
        return self._shape  # type: ignore[return-value]  # of a single task

    @property
    def _cache(self) -> Any:
        return self._meta

    def _may_be_told_more(self) -> bool:
        return (
            self._meta is not None
            and self._meta["status"] in PROPAGATE_STATES
            and has_header(line_of(self, celery_result.GroupResult))
        )

    def _begin(self) -> None:
        wait = self._wait
        if wait is None and self._meta is not None:
            self._ask_what_is_before()
            return
        if wait is None:
            # Nothing will come. Where the message of this id is on its way, `_sent` says when it has left.
            if not self._waits and self._unit is None:
                self._wait_for_sending()
            return
        wait.hold()
        error = self._known_failure()
        if error is not None:
            wait.fail(error)
            return
        self._fail_if_not_sent()
        if self.parent is not None:
            ancestors, early = self._followed()
            if ancestors is not None:
                wait.follow(ancestors, early)

    def _ask_what_is_before(self) -> None:
        """This has failed before anybody asked; somebody does now."""
        ancestors, early = self._followed()
        self._outcome = None
        self._wait = wait = CallWait(self._engine.waiters, self.id, parents=ancestors)
        wait.start(self, early=early)

    def _sent(self, error: Exception | None) -> None:
        """The outbox is done with the message of this id; other results may stand for the same id."""
        if error is not None:
            self._engine.caller.could_not_be_sent(self.id, error)
        self._tell_sent(error)
        waiters = self._engine.waiters
        if error is not None:
            waiters.never_sent(self.id, error)
        else:
            self._tell_silent()
            if not self._waits and self.id in waiters:
                waiters.meta_received(nothing_of(self.id))
        if (not self._waits or self._forgotten is not None) and not self.called and self._outcome is None:
            self._end(None, error or self._forgotten)

    def _tell_sent(self, error: Exception | None) -> None:
        self._engine.caller.unsent.pop(self.id, None)
        super()._tell_sent(error)

    # Celery's names, from what is here

    def _get_task_meta(self) -> Meta:
        if self._meta is not None:
            return self._meta
        engine = self._engine
        found = engine.waiters.last_states.get(self.id) or engine.waiters.unclaimed.get(self.id)
        if found is None and engine.source is not None and not any(node._called for node in self._whole()):
            raise WouldBlock(
                "this result is not the one that the call returned, its task's state has to be asked for; "
                "write `yield result.async_result.state()`, or another of its names: `meta()` gives all that is kept",
                task_id=self.id,
            )
        return found or {"task_id": self.id, "status": PENDING, "result": None, "traceback": None}

    @property
    def children(self) -> list[Any]:
        """The results of the tasks that this task has called; known once it has ended."""
        found = self._get_task_meta().get("children") or ()
        return [celery_result.result_from_tuple(child, self.app) for child in found]

    def get_leaf(self) -> Any:
        """Fire with the value of the last task that was called, by way of the children."""
        return ensureDeferred(self._last_value())

    async def _last_value(self) -> Any:
        last = None
        async for _, value in self.async_result.collect():
            last = value
        return last

    def exists(self) -> Any:
        """As `twistedcelery.AsyncResult.exists`."""
        return self.async_result.exists()

    def collect(self, *args: Any, **kwargs: Any) -> Any:
        """As `twistedcelery.AsyncResult.collect`."""
        return self.async_result.collect()

    def _make_handle(self) -> AsyncResult:
        handle = AsyncResult(self._engine, self.id, self._parent_handle)
        handle._meta = self._meta
        handle._ignored = bool(self._ignored)
        return handle


class YieldableGroupResult(Yieldable, celery_result.GroupResult):  # type: ignore[misc]  # untyped base
    """A `celery.result.GroupResult` that can be yielded and awaited, for the list of its members' values."""

    #: Celery's barrier, which fires with the last member: waiting is done elsewhere.
    _on_full = None

    def __init__(
        self,
        id: str | None = None,  # noqa: A002  # Celery's name
        results: Any = None,
        parent: Any = None,
        **kwargs: Any,
    ) -> None:
        Yieldable.__init__(self, self.app.twisted.engine, [])
        self._group_id = id
        self.results = list(results or ())
        self.parent = parent

    @property
    def id(self) -> Any:
        """The id of the group."""
        return self._group_id

    __iter__ = celery_result.GroupResult.__iter__
    # Not Deferred's __await__, which asks for its iterator in some versions: a group iterates over its members.
    __await__ = Deferred.__iter__

    def _nodes(self) -> Iterator[Any]:
        """Yield all members, also those of groups within, and these groups."""
        for member in self.results:
            yield member
            if isinstance(member, YieldableGroupResult):
                yield from member._nodes()

    def _as_shape(self) -> Shape:
        return [
            member._as_shape() if isinstance(member, YieldableGroupResult) else member.id
            for member in self.results
        ]

    def _begin(self) -> None:
        if self._engine.source is None and not self._is_eager:
            # Nothing will be known but that all is sent.
            self._wait_for_sending()
            return
        self._shape = self._as_shape()
        forgotten = (node._forgotten for node in self._nodes() if isinstance(node, Yieldable))
        error = self._known_failure() or next((error for error in forgotten if error is not None), None)
        if error is not None:
            self._fail_soon(error)
            return
        ancestors, early = self._followed()
        self._waits = True
        self._wait = wait = CallWait(self._engine.waiters, self._shape, parents=ancestors)
        wait.start(self, early=early)
        if self._wait is not None:
            self._engine.bound(wait)
            self._fail_if_not_sent()

    @property
    def _is_eager(self) -> bool:
        """Whether every task has run already."""
        tasks = [node for node in self._nodes() if not isinstance(node, YieldableGroupResult)]
        if not tasks:
            return bool(self.app.conf.task_always_eager)
        return all(isinstance(task, celery_result.EagerResult) for task in tasks)

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """As `twistedcelery.GroupResult.get`; the list itself where every task has run already (``task_always_eager``)."""
        if self._is_eager:
            return [member.get(*args, **kwargs) for member in self.results]
        return super().get(*args, **kwargs)

    wait = get

    def join(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        callback: Callable[[str, Any], object] | None = None,
        no_ack: bool | None = None,
        on_message: Callable[[Meta], object] | None = None,
        disable_sync_subtasks: bool = True,
        on_interval: Callable[..., object] | None = None,
    ) -> Any:
        """As `twistedcelery.GroupResult.join`, with Celery's arguments in Celery's order."""
        return self.get(
            timeout,
            propagate,
            no_ack=no_ack,
            callback=callback,
            on_message=on_message,
            on_interval=on_interval,
        )

    join_native = join

    def iter_native(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it would wait."""
        raise WouldBlock(
            "iter_native() would wait and stop the reactor; write `async for member in group.async_result.as_completed()`",
            task_id=self.id,
        )

    def _call_back(self, value: Any, callback: Callable[[str, Any], object]) -> Any:
        for member, one in zip(self.results, value, strict=True):
            callback(member.id, one)
        # As Celery has it: either the one or the other.
        return []

    @property
    def async_result(self) -> Any:
        """The handle of the group, with the members that it has now."""
        handle: Any = self._async_result
        if handle is not None and handle.results != self.results:
            self._async_result = None
        return super().async_result

    def _make_handle(self) -> GroupResult:
        members = [member.async_result for member in self.results]
        return GroupResult(self._engine, self.id, members, self._parent_handle)

    def save(self, backend: Any = None) -> Any:
        """As `twistedcelery.GroupResult.save`."""
        return self.async_result.save()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id} [{', '.join(str(member.id) for member in self.results)}]>"


class _EagerValue:
    """Celery's ``result`` of a task that has run: there from the start, unlike a Deferred's.

    Not an exception, also not Ignore, Reject or Retry: Twisted would take it for the value. ``info`` has it.
    """

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if instance._failed_with is not None:
            raise AttributeError("result")
        return value_of(instance._meta)


class YieldableEagerResult(Yieldable, celery_result.EagerResult):  # type: ignore[misc]  # untyped base
    """A `celery.result.EagerResult` (``task_always_eager``) that can be yielded and awaited.

    ``get()`` gives the value itself, as Celery's does: canvas that runs in line (`chain.apply`, for example) calls it.
    """

    result = _EagerValue()

    def __init__(self, engine: Engine, result: Any) -> None:
        # One that a task's own apply_async has made may have none.
        Yieldable.__init__(self, engine, uuid() if result.id is None else str(result.id))
        self.on_ready = result.on_ready
        self._result, self._state, self._traceback, self._name = (
            result._result,
            result._state,
            result._traceback,
            result._name,
        )
        self._ran()

    def _ran(self) -> None:
        """Have the Deferred fire with what Celery's names say."""
        self._meta = meta = eager_meta(self)
        self._failed_with = failure_of(meta) if meta["status"] in PROPAGATE_STATES else None
        self._outcome = (None if self._failed_with is not None else value_of(meta), self._failed_with)

    @property
    def id(self) -> str:
        """The id of the task."""
        return self._shape  # type: ignore[return-value]  # of a single task

    _cache = celery_result.EagerResult._cache
    then = celery_result.EagerResult.then
    backend = None

    def revoke(self, *args: Any, **kwargs: Any) -> Deferred[None]:
        """As Celery's: the state is REVOKED from now on, although the task has run; a Deferred that has not fired fails."""
        celery_result.EagerResult.revoke(self, *args, **kwargs)
        self._ran()
        return succeed(None)

    def forget(self) -> Deferred[None]:
        """Do nothing, as Celery's: the value is kept nowhere else."""
        return succeed(None)

    def __reduce__(self) -> Any:
        # The connections stay here, the value goes along.
        return celery_result.EagerResult, self.__reduce_args__()

    __copy__ = celery_result.EagerResult.__copy__

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Return the value, or raise, at once."""
        # What the Deferred holds may have gone through callbacks by now.
        stock = celery_result.EagerResult(
            self.id, self._result, self._state, self._traceback, name=self._name
        )
        return stock.get(*args, **kwargs)

    wait = get

    def _make_handle(self) -> AsyncResult:
        handle = AsyncResult(self._engine, self.id, self._parent_handle)
        handle._meta = self._meta
        return handle
