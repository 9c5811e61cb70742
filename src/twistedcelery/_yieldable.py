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
from twisted.internet.defer import CancelledError, Deferred, fail, gatherResults, succeed
from twisted.logger import Logger
from vine.abstract import Thenable

from ._ancestry import stretches, whole
from ._waits import Ancestors, eager_meta, nothing_of
from .errors import NotSent, SendFailed, WouldBlock
from .results import _CALLBACKS, AsyncResult, GroupResult, TaskDeferred, _Attachments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from twisted.python.failure import Failure

    from ._engine import Engine
    from ._waits import Shape
    from .interfaces import Meta

__all__ = ["Yieldable"]


class _FirstAttachment(_Attachments):
    """The callbacks of a yieldable result: the first one starts what was put off."""

    __slots__ = ("_result",)

    def __init__(self, result: Yieldable) -> None:
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


def _see(error: BaseException | None) -> None:
    """Somebody is told of this error: it need not be logged where its results are dropped."""
    if isinstance(error, SendFailed):
        error.seen = True


def _seen(failure: Failure) -> Failure:
    _see(failure.value)
    return failure


class Yieldable(TaskDeferred):
    """What the yieldable results share; see `_yieldable_results`."""

    result: Any = _Unset()

    _log = Logger()
    #: What it will fire with: a value, or an error.
    _outcome: tuple[Any, BaseException | None] | None = None
    _is_begun = _is_attached = False
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

    def _followed(self) -> tuple[Ancestors | None, dict[str, Meta]]:
        """Return what stands before this, if anything does, and the final states of the whole that are known already."""
        found = stretches(self, celery_result.GroupResult)
        known: dict[str, Meta] = {}
        for node in self._whole():
            if isinstance(node, celery_result.EagerResult):
                known[node.id] = eager_meta(node)
            elif not isinstance(node, Yieldable) or isinstance(node, celery_result.GroupResult):
                continue
            elif node._meta is not None:
                known[node.id] = node._meta
            elif not node._waits and node.id not in self._engine.caller.unsent:
                known[node.id] = nothing_of(node.id)
        return Ancestors(self._engine.clock, found) if found else None, known

    def _known_failure(self) -> BaseException | None:
        """Return why a part of the whole will never be known, if that is known already."""
        for node in self._whole():
            if isinstance(node, Yieldable) and node._given_up is not None:
                return node._given_up
        return self._send_failure()

    def _whole(self) -> Iterator[Any]:
        """Yield every result of the call: this one, members, and all that stands before."""
        return whole(self, celery_result.GroupResult)

    def _leaving(self) -> list[Yieldable]:
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
            _see(error)
            if not self.called:
                super()._end(value, error)
        else:
            self._outcome = (value, error)
            if isinstance(error, SendFailed):
                self._unseen = error

    def _forget(self, error: Exception) -> None:
        self._failed_with = error
        super()._forget(error)

    def _fire(self) -> None:
        outcome, self._outcome = self._outcome, None
        if outcome is not None and not self.called:
            super()._end(*outcome)

    def _attached(self) -> None:
        if self._is_begun:
            return
        self._is_begun = True
        if self._outcome is None or self._may_be_told_more():
            self._begin()
        # Only now: Twisted is in the middle of attaching, and what has arrived already must not fire here.
        self._is_attached = True
        if self._outcome is not None:
            _see(self._unseen)
            self._engine.clock.callLater(0, self._fire)

    def _may_be_told_more(self) -> bool:
        """Whether what stands before this may say more of its failure than its own state does."""
        return False

    def _begin(self) -> None:
        raise AssertionError("only the classes of _yieldable_results are made")

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
            _see(error)
            return fail(error)
        leaving = self._leaving()
        return self._all_sent(leaving) if leaving else succeed(None)

    @staticmethod
    def _all_sent(results: list[Yieldable]) -> Deferred[None]:
        waiting = [TaskDeferred.when_sent(result).addErrback(_seen) for result in results]
        all_sent: Deferred[None] = Deferred(lambda _: gathered.cancel())
        gathered = gatherResults(waiting, consumeErrors=True)
        # The error itself, not what gatherResults wraps it in.
        gathered.addCallbacks(
            lambda _: all_sent.callback(None), lambda failure: all_sent.errback(failure.value.subFailure)
        )
        return all_sent

    def _cancelled(self) -> None:
        self._engine.check_thread()
        leaving = self._leaving()
        withdrawn = bool(leaving) and all(
            result._unit is not None and result._unit.withdrawable for result in leaving
        )
        units = [result._unit for result in leaving if result._unit is not None]
        self._leave()
        if withdrawn:
            error = NotSent("the call was cancelled before it left", task_id=self.id)
            error.seen = True
            # All of them first: whoever is told may cancel others of them.
            for unit in units:
                unit.withdraw()
            for result in leaving:
                self._engine.caller.could_not_be_sent(result.id, error)
            for result in leaving:
                result._never_left(error)
                result._tell_sent(CancelledError())
        elif self._revoke_on_cancel and not (units and all(unit.never_left for unit in units)):
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
        raise AssertionError("only the classes of _yieldable_results are made")

    @property
    def _parent_handle(self) -> Any:
        return self.parent.async_result if self.parent is not None else None

    def _settled(self, meta: Meta | None) -> None:
        super()._settled(meta)
        if meta is not None and meta["task_id"] == self.id:
            self._meta = meta
