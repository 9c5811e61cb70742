"""The results of the drop-in: Celery's own result classes that are Deferreds as well.

Celery's canvas makes result objects on its way, by ``app.AsyncResult`` and ``app.GroupResult``, most of which nobody will ever wait
for. So one of these does not fire before something is attached to it: until then it only remembers. Its Celery
names (``state``, ``ready()``, ``traceback`` ...) answer at once from what has arrived; ``get()`` returns a
Deferred; ``result`` is the Deferred's own attribute, not Celery's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import result as celery_result
from celery.states import PENDING, PROPAGATE_STATES
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ._ancestry import before
from ._waits import failure_of, nothing_of
from .errors import SendFailed
from .results import _CALLBACKS, CallWait, TaskDeferred, _Attachments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._engine import Engine
    from ._waits import Shape
    from .interfaces import Meta

__all__ = ["YieldableEagerResult", "YieldableGroupResult", "YieldableResult"]


class _FirstAttachment(_Attachments):
    """The callbacks of a yieldable result: the first one starts what was put off."""

    __slots__ = ("_result",)

    def __init__(self, result: _Yieldable) -> None:
        list.__init__(self)
        # A cycle until it fires, but only once something is attached, when it has to stay alive anyway.
        self._result: Callable[[], _Yieldable | None] = _weakly(result)

    def append(self, item: Any) -> None:
        list.append(self, item)
        result = self._result()
        if result is not None:
            result._attached()


def _weakly(result: Any) -> Any:
    from weakref import ref

    return ref(result)


class _Unset:
    """Stands in for Celery's property ``result``: a Deferred's attribute of that name is absent until it fires."""

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        raise AttributeError("result")


class _Yieldable(TaskDeferred):
    """What the yieldable results share."""

    result = _Unset()

    _log = Logger()
    #: What it will fire with: a value, or an error.
    _outcome: tuple[Any, BaseException | None] | None = None
    _is_attached = False
    #: What it has failed with, or would.
    _failed_with: BaseException | None = None
    #: The call could not be sent, and nobody has been told yet.
    _unseen: SendFailed | None = None
    parent: Any = None

    def __init__(self, engine: Engine, shape: Shape) -> None:
        TaskDeferred.__init__(self, engine, shape)
        setattr(self, _CALLBACKS, _FirstAttachment(self))

    def _followed(self) -> Iterator[YieldableResult]:
        """Yield the tasks before this one; where one fails, this one never runs."""
        return before(self, YieldableGroupResult)

    def _end(self, value: Any, error: BaseException | None) -> None:
        self._failed_with = error
        if self._is_attached:
            if isinstance(error, SendFailed):
                error.seen = True
            super()._end(value, error)
        else:
            self._outcome = (value, error)
            if isinstance(error, SendFailed):
                self._unseen = error

    def _fire(self) -> None:
        outcome, self._outcome = self._outcome, None
        if outcome is not None and not self.called:
            super()._end(*outcome)

    def _attached(self) -> None:
        if self._is_attached:
            return
        self._is_attached = True
        if self._outcome is None:
            self._begin()
        if self._outcome is not None:
            if self._unseen is not None:
                self._unseen.seen = True
            # Not now: Twisted is in the middle of attaching.
            self._engine.clock.callLater(0, self._fire)

    def _begin(self) -> None:
        raise AssertionError("only the classes below are made")

    def __del__(self) -> None:
        super().__del__()
        unseen = self._unseen
        if unseen is not None and not unseen.seen:
            # One log entry for all the results of a call.
            unseen.seen = True
            self._log.error("a call that nobody waited for failed: {error}", error=unseen)


class YieldableResult(_Yieldable, celery_result.AsyncResult):  # type: ignore[misc]  # untyped base
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
        _Yieldable.__init__(self, engine, id)
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
    def backend(self) -> Any:
        """The app's backend, as Celery's results have it."""
        return self.app.backend

    @property
    def _cache(self) -> Any:
        return self._meta

    def _begin(self) -> None:
        wait = self._wait
        if wait is None:
            if not self._waits and self._unit is None:
                # Nothing will come; it has been sent when the message of this id has.
                sender = self._engine.unsent.get(self.id)
                if sender is None:
                    self._outcome = (None, None)
                else:
                    sender.when_sent().addCallbacks(
                        lambda _: self._end(None, None), lambda failure: self._end(None, failure.value)
                    )
            return
        wait.hold()
        for node in self._followed():
            if node._failed_with is not None:
                wait.fail(node._failed_with)
                return
        wait.follow([node.id for node in self._followed() if node._wait is not None])

    def _sent(self, error: Exception | None) -> None:
        """The outbox is done with the message of this id; other results may stand for the same id."""
        self._tell_sent(error)
        engine = self._engine
        if error is not None:
            engine.waiters.fail(self.id, error)
        elif not self._waits and self.id in engine.waiters:
            engine.waiters.meta_received(nothing_of(self.id))
        if not self._waits and not self.called and self._outcome is None:
            self._end(None, error)

    def _tell_sent(self, error: Exception | None) -> None:
        self._engine.unsent.pop(self.id, None)
        super()._tell_sent(error)

    # Celery's names, from what is here

    def _get_task_meta(self) -> Meta:
        if self._meta is not None:
            return self._meta
        waiters = self._engine.waiters
        found = waiters.last_states.get(self.id) or waiters.unclaimed.get(self.id)
        return found or {"task_id": self.id, "status": PENDING, "result": None, "traceback": None}

    @property
    def children(self) -> list[Any]:
        """The handles of the tasks that this task has called; known once it has ended."""
        return [self._engine.handle_of_tuple(child) for child in self._get_task_meta().get("children") or ()]

    def then(self, callback: Any, on_error: Any = None, weak: bool = False) -> None:
        """Canvas ties its members together with vine promises; waiting is done elsewhere."""

    def exists(self) -> Any:
        """As `twistedcelery.AsyncResult.exists`."""
        return self.async_result.exists()

    def forget(self) -> Any:
        """As `twistedcelery.AsyncResult.forget`."""
        return self.async_result.forget()

    def collect(self, *args: Any, **kwargs: Any) -> Any:
        """As `twistedcelery.AsyncResult.collect`."""
        return self.async_result.collect()

    @property
    def async_result(self) -> Any:
        """The handle of this result, whose names all return Deferreds."""
        from .results import AsyncResult

        handle = AsyncResult(
            self._engine, self.id, self.parent.async_result if self.parent is not None else None
        )
        handle._meta = self._meta
        handle._ignored = bool(self._ignored)
        return handle


class YieldableGroupResult(_Yieldable, celery_result.GroupResult):  # type: ignore[misc]  # untyped base
    """A `celery.result.GroupResult` that can be yielded and awaited, for the list of its members' values."""

    def __init__(
        self,
        id: str | None = None,  # noqa: A002  # Celery's name
        results: Any = None,
        parent: Any = None,
        **kwargs: Any,
    ) -> None:
        _Yieldable.__init__(self, self.app.twisted.engine, [])
        self._group_id = id
        self.results = list(results or ())
        self.parent = parent

    @property
    def id(self) -> Any:
        """The id of the group."""
        return self._group_id

    @property
    def backend(self) -> Any:
        """The app's backend, as Celery's results have it."""
        return self.app.backend

    __iter__ = celery_result.GroupResult.__iter__
    __await__ = Deferred.__await__  # type: ignore[misc]  # a group iterates over its members

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
        self._shape = self._as_shape()
        early: dict[str, Meta] = {}
        followed: dict[str, YieldableResult] = {}
        followed.update((one.id, one) for one in self._followed())
        for node in self._nodes():
            if isinstance(node, celery_result.EagerResult):
                early[node.id] = _meta_of_eager(node)
                continue
            if self._fails_with(node):
                return
            # A member may stand at the end of a chain of its own.
            followed.update((one.id, one) for one in node._followed())
            if isinstance(node, YieldableGroupResult):
                continue
            if node._meta is not None:
                early[node.id] = node._meta
            elif not node._waits and node.id not in self._engine.unsent:
                early[node.id] = nothing_of(node.id)
        if any(self._fails_with(node) for node in followed.values()):
            return
        parents = [task_id for task_id, node in followed.items() if node._wait is not None]
        self._waits = True
        self._wait = wait = CallWait(self._engine.waiters, self._shape, parents=parents)
        wait.start(self, early=early)

    def _fails_with(self, node: _Yieldable) -> bool:
        """Whether a task of the group, or one before it, has failed; the group fails as it did."""
        error = node._failed_with
        if error is None:
            return False
        self._outcome = (None, error)
        if isinstance(error, SendFailed):
            self._unseen = error
        return True

    def _end(self, value: Any, error: BaseException | None) -> None:
        # Without a result backend nothing is known but that all is sent.
        super()._end(value if self._engine.source is not None else None, error)

    def then(self, callback: Any, on_error: Any = None, weak: bool = False) -> None:
        """See `YieldableResult.then`."""

    @property
    def async_result(self) -> Any:
        """The handle of this group, whose names all return Deferreds."""
        from .results import GroupResult

        parent = self.parent.async_result if self.parent is not None else None
        return GroupResult(self._engine, self.id, [member.async_result for member in self.results], parent)

    def save(self, backend: Any = None) -> Any:
        """As `twistedcelery.GroupResult.save`."""
        return self.async_result.save()

    def forget(self) -> Any:
        """As `twistedcelery.GroupResult.forget`."""
        return self.async_result.forget()

    def join(self, timeout: float | None = None, propagate: bool = True, **kwargs: Any) -> Any:
        """As `twistedcelery.GroupResult.join`."""
        return self.async_result.get(timeout, propagate, kwargs.get("on_message"))

    join_native = join

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id} [{', '.join(str(member.id) for member in self.results)}]>"


def _meta_of_eager(result: Any) -> Meta:
    return {
        "task_id": result.id,
        "status": result.state,
        "result": result._result,
        "traceback": result.traceback,
    }


class YieldableEagerResult(_Yieldable, celery_result.EagerResult):  # type: ignore[misc]  # untyped base
    """A `celery.result.EagerResult` (``task_always_eager``) that can be yielded and awaited. ``get()`` is Celery's."""

    def __init__(self, engine: Engine, result: Any) -> None:
        _Yieldable.__init__(self, engine, result.id)
        self._eager = result
        self._meta = meta = _meta_of_eager(result)
        self.on_ready = result.on_ready
        self._result, self._state, self._traceback, self._name = (
            result._result,
            result._state,
            result._traceback,
            result._name,
        )
        failed = meta["status"] in PROPAGATE_STATES
        self._outcome = (None, failure_of(meta)) if failed else (meta["result"], None)

    @property
    def id(self) -> str:
        """The id of the task."""
        return self._shape  # type: ignore[return-value]  # of a single task

    @property
    def _cache(self) -> Any:
        return self._eager._cache

    get = celery_result.EagerResult.get
    wait = get
    backend = None

    @property
    def async_result(self) -> Any:
        """The handle of this result, whose names all return Deferreds."""
        from .results import AsyncResult

        handle = AsyncResult(self._engine, self.id)
        handle._meta = self._meta
        return handle
