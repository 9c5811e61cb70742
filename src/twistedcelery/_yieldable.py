"""The results of the drop-in: Celery's own result classes that are Deferreds as well.

Celery's canvas makes result objects on its way, by ``app.AsyncResult`` and ``app.GroupResult``, most of which nobody will ever wait
for. So one of these does not fire before something is attached to it: until then it only remembers. Its Celery
names (``state``, ``ready()``, ``traceback`` ...) answer at once from what has arrived; ``get()`` returns a
Deferred; ``result`` is the Deferred's own attribute, not Celery's.

One call of the canvas is many messages, each sent by itself. What a result stands for is the tree of results that it leads to: the
members of a group, and what stands before it. Whatever of that has been handed to the outbox is found by its task ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn
from weakref import ref

from celery import result as celery_result
from celery.states import PENDING, PROPAGATE_STATES
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, fail, gatherResults, succeed
from twisted.logger import Logger
from vine.abstract import Thenable

from ._ancestry import before, whole
from ._waits import Before, eager_meta, failure_of, nothing_of, why_never
from .errors import NotSent, SendFailed, WouldBlock
from .results import _CALLBACKS, AsyncResult, CallWait, GroupResult, TaskDeferred, _Attachments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from twisted.python.failure import Failure

    from ._engine import Engine
    from ._waits import Parents, Shape
    from .interfaces import Meta

__all__ = ["YieldableEagerResult", "YieldableGroupResult", "YieldableResult"]


class _FirstAttachment(_Attachments):
    """The callbacks of a yieldable result: the first one starts what was put off."""

    __slots__ = ("_result",)

    def __init__(self, result: _Yieldable) -> None:
        list.__init__(self)
        # A cycle until it fires, but only once something is attached, when it has to stay alive anyway.
        self._result = ref(result)

    def append(self, item: Any) -> None:
        list.append(self, item)
        result = self._result()
        if result is not None:
            result._attached()


class _Unset:
    """Stands in for Celery's property ``result``: a Deferred's attribute of that name is absent until it fires."""

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        raise AttributeError("result")


class _Yieldable(TaskDeferred):
    """What the yieldable results share."""

    result: Any = _Unset()

    _log = Logger()
    #: What it will fire with: a value, or an error.
    _outcome: tuple[Any, BaseException | None] | None = None
    _is_begun = _is_attached = False
    #: What it has failed with, or would.
    _failed_with: BaseException | None = None
    #: The call could not be sent, and nobody has been told yet.
    _unseen: SendFailed | None = None
    #: Whether a message of this process calls its task.
    _called = False
    parent: Any = None

    def __init__(self, engine: Engine, shape: Shape) -> None:
        TaskDeferred.__init__(self, engine, shape)
        self._revoke_on_cancel = engine.revoke_on_cancel
        setattr(self, _CALLBACKS, _FirstAttachment(self))

    # What it stands for

    def _followed(self) -> Iterator[tuple[YieldableResult, bool]]:
        """Yield the tasks before this one, and whether in a header; where one fails, this one never runs."""
        return before(self, YieldableGroupResult)

    def _failure(self, in_header: bool) -> BaseException | None:
        """Return what this has failed with, as it is for those that stand behind it."""
        error = self._failed_with
        if error is None or isinstance(error, SendFailed):
            return error
        return why_never(Before(None, in_header), self.id, error)

    def _whole(self) -> Iterator[Any]:
        """Yield every result of the call: this one, members, and all that stands before."""
        return whole(self, YieldableGroupResult)

    def _leaving(self) -> list[YieldableResult]:
        """Return the results whose messages have no outcome yet."""
        unsent = self._engine.caller.unsent
        if not unsent:
            return []
        found = {node.id: unsent[node.id] for node in self._whole() if node.id in unsent}
        return list(found.values())

    def _send_failure(self) -> Exception | None:
        """Return why a message of the call could not be sent, if one could not."""
        if self._error is not None:
            return self._error
        unsendable = self._engine.caller.unsendable
        if not unsendable:
            return None
        return next((unsendable[node.id] for node in self._whole() if node.id in unsendable), None)

    # Firing

    def _end(self, value: Any, error: BaseException | None) -> None:
        self._failed_with = error
        if self._is_attached:
            if isinstance(error, SendFailed):
                error.seen = True
            if not self.called:
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
        if self._is_begun:
            return
        self._is_begun = True
        if self._outcome is None:
            self._begin()
        # Only now: Twisted is in the middle of attaching, and what has arrived already must not fire here.
        self._is_attached = True
        if self._outcome is not None:
            if self._unseen is not None:
                self._unseen.seen = True
            self._engine.clock.callLater(0, self._fire)

    def _begin(self) -> None:
        raise AssertionError("only the classes below are made")

    def _fail_soon(self, error: BaseException) -> None:
        """Fail with an error that was there before anything was attached."""
        self._outcome = (None, error)
        self._failed_with = error
        if isinstance(error, SendFailed):
            self._unseen = error

    def _wait_for_sending(self) -> None:
        """Have nothing to wait for but that everything is sent."""
        error = self._send_failure()
        if error is not None:
            self._fail_soon(error)
            return
        leaving = self._leaving()
        if leaving:
            self._all_sent(leaving).addCallbacks(
                lambda _: self._end(None, None), lambda failure: self._end(None, failure.value)
            )
        else:
            self._outcome = (None, None)

    def _fail_if_not_sent(self) -> None:
        """Fail where a message of the call cannot be sent, whatever stands between: its task will never run."""
        for result in self._leaving():
            if result is not self:
                TaskDeferred.when_sent(result).addErrback(self._not_sent)

    def _not_sent(self, failure: Failure) -> None:
        error = failure.value
        if self._wait is not None and error is not None:
            self._wait.fail(error)

    def __del__(self) -> None:
        super().__del__()
        unseen = self._unseen
        if unseen is not None and not unseen.seen:
            # One log entry for all the results of a call.
            unseen.seen = True
            self._log.error("a call that nobody waited for failed: {error}", error=unseen)

    # Sending

    def when_sent(self) -> Deferred[None]:
        """See `TaskDeferred.when_sent`: every message of the call, that of the first link or of each member."""
        error = self._send_failure()
        if error is not None:
            return fail(error)
        leaving = self._leaving()
        return self._all_sent(leaving) if leaving else succeed(None)

    @staticmethod
    def _all_sent(results: list[YieldableResult]) -> Deferred[None]:
        waiting = [TaskDeferred.when_sent(result) for result in results]
        all_sent: Deferred[None] = Deferred(lambda _: gathered.cancel())
        gathered = gatherResults(waiting, consumeErrors=True)
        # The error itself, not what gatherResults wraps it in.
        gathered.addCallbacks(
            lambda _: all_sent.callback(None), lambda failure: all_sent.errback(failure.value.subFailure)
        )
        return all_sent

    def _cancelled(self) -> None:
        leaving = self._leaving()
        withdrawn = bool(leaving) and all(
            result._unit is not None and result._unit.withdrawable for result in leaving
        )
        self._leave()
        if withdrawn:
            error = NotSent("the call was cancelled before it left", task_id=self.id)
            error.seen = True
            for result in leaving:
                assert result._unit is not None
                result._unit.withdraw()
                self._engine.caller.could_not_be_sent(result.id, error)
                result._never_left(error)
                result._tell_sent(CancelledError())
        elif self._revoke_on_cancel:
            self._revoke_cancelled()

    # Celery's names

    def get(  # type: ignore[override]  # Celery's arguments, in Celery's order
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        no_ack: bool | None = None,
        follow_parents: bool = True,
        callback: Callable[[str, Any], object] | None = None,
        on_message: Callable[[Meta], object] | None = None,
        on_interval: Callable[..., object] | None = None,
        disable_sync_subtasks: bool = True,
        **more: Any,
    ) -> Any:
        """As `twistedcelery.AsyncResult.get`; ``interval`` means nothing here, as results are pushed."""
        if no_ack is not None or on_interval is not None or more:
            # As a celery.result.ResultSet asks its members.
            names = ", ".join(["no_ack", "on_interval", *more])
            raise WouldBlock(
                f"get() of a result that is a Deferred returns a Deferred, and does not take {names}; for several results at once use "
                "a group, or gatherResults, instead of a ResultSet",
                task_id=self.id,
            )
        self._engine.check_thread()
        getting = self.async_result.get(timeout, propagate, on_message, follow_parents)
        return getting if callback is None else getting.addCallback(self._call_back, callback)

    wait = get

    def _call_back(self, value: Any, callback: Callable[[str, Any], object]) -> Any:
        callback(self.id, value)
        return value

    def then(self, callback: Any, on_error: Any = None, weak: bool = False) -> None:
        """Call ``callback`` with this result once it is ready.

        Canvas ties its own results together with vine's promises, weakly; they have nothing to do here: waiting is done elsewhere.
        """
        if not (isinstance(callback, Thenable) and (weak or self._engine.refuse_waiting(self) is not None)):
            self.async_result.get(propagate=False).addCallback(lambda _: callback(self)).addErrback(
                on_error
                or (
                    lambda failure: self._log.failure(
                        "what followed {result} failed", failure, result=self.id
                    )
                )
            )

    def throw(self, error: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise, for Celery's ``maybe_throw``.

        And for a coroutine that awaits this: with Twisted before 24 it throws class, error and traceback into the Deferred itself.
        """
        raise args[0] if args and isinstance(args[0], BaseException) else error

    def revoke(  # type: ignore[override]  # as above
        self,
        connection: Any = None,
        terminate: bool = False,
        signal: str | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> Deferred[None]:
        """As `twistedcelery.AsyncResult.revoke`. Workers' answers cannot be waited for: ``wait=True`` is refused."""
        if wait:
            raise WouldBlock("revoke(wait=True) would wait for the workers' answers; leave wait out")
        revoking: Deferred[None] = self.async_result.revoke(terminate=terminate, signal=signal)
        return revoking

    def revoke_by_stamped_headers(
        self,
        headers: Mapping[str, Any],
        connection: Any = None,
        terminate: bool = False,
        signal: str | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> Deferred[None]:
        """As `twistedcelery.TwistedCelery.revoke_by_stamped_headers`; see `revoke`."""
        if wait:
            raise WouldBlock("revoke_by_stamped_headers(wait=True) would wait for the workers' answers")
        return self._engine.revoke_by_stamped_headers(headers, terminate, signal)

    def forget(self) -> Any:
        """As `twistedcelery.AsyncResult.forget`."""
        return self.async_result.forget()

    @property
    def backend(self) -> Any:
        """The app's backend, as Celery's results have it."""
        return self.app.backend

    @property
    def async_result(self) -> Any:
        """The handle of this result, whose names all return Deferreds. What comes later, it learns too."""
        if self._async_result is None:
            # From the first link on: a chain may have more of them than Python allows calls within calls.
            line = []
            node: Any = self
            while node is not None and node._async_result is None:
                line.append(node)
                node = node.parent
            for node in reversed(line):
                node._async_result = node._make_handle()
        return self._async_result

    def _make_handle(self) -> AsyncResult | GroupResult:
        raise AssertionError("only the classes below are made")

    @property
    def _parent_handle(self) -> Any:
        return self.parent.async_result if self.parent is not None else None

    def _settled(self, meta: Meta | None) -> None:
        super()._settled(meta)
        if meta is not None and meta["task_id"] == self.id:
            self._meta = meta


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
    def _cache(self) -> Any:
        return self._meta

    def _begin(self) -> None:
        wait = self._wait
        if wait is None:
            # Nothing will come. Where the message of this id is on its way, `_sent` says when it has left.
            if not self._waits and self._unit is None:
                self._wait_for_sending()
            return
        wait.hold()
        parents: Parents = {}
        for node, in_header in self._followed():
            error = node._failure(in_header)
            if error is not None:
                wait.fail(error)
                return
            if node._wait is not None:
                parents[node.id] = Before(None, in_header)
        unsent = self._send_failure()
        if unsent is not None:
            wait.fail(unsent)
            return
        self._fail_if_not_sent()
        wait.follow(parents)

    def _sent(self, error: Exception | None) -> None:
        """The outbox is done with the message of this id; other results may stand for the same id."""
        if error is not None:
            self._engine.caller.could_not_be_sent(self.id, error)
        self._tell_sent(error)
        waiters = self._engine.waiters
        if error is not None:
            waiters.fail(self.id, error)
        else:
            self._tell_silent()
            if not self._waits and self.id in waiters:
                waiters.meta_received(nothing_of(self.id))
        if not self._waits and not self.called and self._outcome is None:
            self._end(None, error)

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
                "write `yield result.async_result.state()`, or another of its names",
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


class YieldableGroupResult(_Yieldable, celery_result.GroupResult):  # type: ignore[misc]  # untyped base
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
        _Yieldable.__init__(self, self.app.twisted.engine, [])
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
        early: dict[str, Meta] = {}
        followed: dict[str, tuple[YieldableResult, bool]] = {}
        followed.update((one.id, (one, in_header)) for one, in_header in self._followed())
        for node in self._nodes():
            if isinstance(node, celery_result.EagerResult):
                early[node.id] = eager_meta(node)
                continue
            if self._fails_with(node._failed_with):
                return
            # A member may stand at the end of a chain of its own.
            followed.update((one.id, (one, in_header)) for one, in_header in node._followed())
            if isinstance(node, YieldableGroupResult):
                continue
            if node._meta is not None:
                early[node.id] = node._meta
            elif not node._waits and node.id not in self._engine.caller.unsent:
                early[node.id] = nothing_of(node.id)
        if any(self._fails_with(node._failure(in_header)) for node, in_header in followed.values()):
            return
        if self._fails_with(self._send_failure()):
            return
        parents = {
            task_id: Before(None, in_header)
            for task_id, (node, in_header) in followed.items()
            if node._wait is not None
        }
        self._waits = True
        self._wait = wait = CallWait(self._engine.waiters, self._shape, parents=parents)
        wait.start(self, early=early)
        if self._wait is not None:
            self._engine.bound(wait)
            self._fail_if_not_sent()

    def _fails_with(self, error: BaseException | None) -> bool:
        """Whether there is an error already; the group fails with it."""
        if error is not None:
            self._fail_soon(error)
        return error is not None

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

    Not an exception: Twisted would take it for the value. ``info`` has it.
    """

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if instance._failed_with is not None:
            raise AttributeError("result")
        return instance._result


class YieldableEagerResult(_Yieldable, celery_result.EagerResult):  # type: ignore[misc]  # untyped base
    """A `celery.result.EagerResult` (``task_always_eager``) that can be yielded and awaited. ``get()`` is Celery's."""

    result = _EagerValue()

    def __init__(self, engine: Engine, result: Any) -> None:
        _Yieldable.__init__(self, engine, result.id)
        self._meta = meta = eager_meta(result)
        self.on_ready = result.on_ready
        self._result, self._state, self._traceback, self._name = (
            result._result,
            result._state,
            result._traceback,
            result._name,
        )
        self._failed_with = failure_of(meta) if meta["status"] in PROPAGATE_STATES else None
        self._outcome = (None if self._failed_with is not None else meta["result"], self._failed_with)

    @property
    def id(self) -> str:
        """The id of the task."""
        return self._shape  # type: ignore[return-value]  # of a single task

    _cache = celery_result.EagerResult._cache
    then = celery_result.EagerResult.then
    revoke = celery_result.EagerResult.revoke
    forget = celery_result.EagerResult.forget
    backend = None

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
