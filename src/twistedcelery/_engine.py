"""The engine: one app's capture, outbox, waits, broker and result source, from the first call to the stop."""

from __future__ import annotations

import atexit
import sys
from collections import deque
from threading import current_thread, get_ident, main_thread
from typing import TYPE_CHECKING, Any

from celery.result import EagerResult, ResultSet, result_from_tuple
from celery.states import PENDING
from kombu.utils.uuid import uuid
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.logger import Logger
from twisted.python import threadable

from ._calling import Caller
from ._limits import Limits
from ._outbox import Outbox
from ._reactor_scope import is_celery_process, is_forked
from ._rooms import open_rooms
from ._slices import drained, in_slices
from ._steady import steady
from ._waiters import Waiters
from ._waits import eager_meta
from .errors import ResultLost, ResultNotKept, ResultTimeout, Stopped, WrongThread
from .results import AsyncResult, GroupResult, Untold

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from twisted.internet.interfaces import IDelayedCall
    from twisted.python.failure import Failure

    from ._operations import Write
    from ._rooms import Rooms
    from ._waits import Wait
    from .app import Settings
    from .interfaces import Meta

__all__ = ["Engine"]

#: Seconds between two looks at whose ``result_timeout`` is over; a hundredth of it where that is less.
_LOOK = 1.0

#: Seconds of a stop's time that are kept for closing the connections; half of it where that is less.
_GOODBYE = 1.0


class Engine:
    """What works behind a `TwistedCelery`, from its first call until it is stopped."""

    log = Logger()

    def __init__(self, app: Any, reactor: Any, settings: Settings) -> None:
        self.app = app
        self._reactor = reactor
        #: The reactor, with a time that does not go back.
        self.clock = reactor = steady(reactor)
        self._settings = settings
        rooms = open_rooms(
            app,
            reactor,
            retry_policy=settings.retry_policy,
            reply_queue_expires=settings.reply_queue_expires,
            declare_timeout=settings.declare_timeout,
            limits=Limits(inflate=settings.inflate_limit, array=settings.array_limit),
            outside=self._write_outside,
        )
        self.broker = rooms.broker
        self.source = rooms.source
        #: The app's own backend without its I/O, and kombu's producer that records.
        self.backend = rooms.backend
        #: The queue that replies go to, where results come as replies.
        self.reply_to = rooms.reply_to
        if self.source is not None:
            self.source.listen(self)
            watch, unwatch = self.source.watch, self.source.unwatch
        else:
            watch = unwatch = _nothing
        self.waiters = Waiters(
            watch,
            unwatch,
            unclaimed_limit=settings.unclaimed_limit,
            unclaimed_bytes=settings.unclaimed_bytes,
        )
        self.outbox = Outbox(
            reactor,
            self.broker,
            self.source,
            connect=self._connect,
            limit=settings.outbox_limit,
            limit_bytes=settings.outbox_bytes,
            outage_wait=settings.outage_wait,
            write_policy=self._write_policy(rooms),
        )
        self.caller = Caller(self, rooms)
        self.untold = Untold()
        self._stopped = False
        self._connect_asked = False
        #: Waits whose Deferred was dropped, to be taken from the table in this thread.
        self._abandoned: deque[Wait] = deque()
        #: Waits in the order in which ``result_timeout`` ends them, with the moment.
        self._bounded: dict[Wait, float] = {}
        self._bound: IDelayedCall | None = None

    def _write_outside(self, write: Write) -> None:
        self.caller.write_outside(write)

    def _write_policy(self, rooms: Rooms) -> Any:
        """Give the retry policy of writes to the result backend: its own where the settings have one, or that of messages."""
        conf = self.app.conf
        if (conf.result_backend_transport_options or {}).get("retry_policy") and self.source is not None:
            return rooms.backend.retry_policy
        return conf.task_publish_retry_policy if conf.task_publish_retry else None

    @property
    def revoke_on_cancel(self) -> bool:
        """Whether cancelling a call revokes its task, where the call does not say."""
        return self._settings.revoke_on_cancel

    @property
    def stopped(self) -> bool:
        """Whether it takes no more calls."""
        return self._stopped

    def _connect(self) -> None:
        if not self._connect_asked:
            self._connect_asked = True
            if not getattr(self._reactor, "running", True):
                atexit.register(self._never_ran)
            self._reactor.callWhenRunning(self._connect_now)

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
        self.check_thread()
        if self._stopped:
            raise Stopped("this TwistedCelery has been stopped; start it again with startService()")

    def check_thread(self) -> None:
        """Refuse calls from another thread than the reactor's."""
        thread = threadable.ioThread
        if is_forked():
            raise WrongThread(
                "called in a process that was forked while the reactor ran, which does not run here; call the task itself: "
                "task.delay(...)"
            )
        if not getattr(self._reactor, "running", True) and is_celery_process():
            raise WrongThread(
                "called in a Celery worker or command, where no reactor runs; call the task itself: task.delay(...)"
            )
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

    def revoke(self, task_ids: list[str], terminate: bool, signal: str | None) -> Deferred[None]:
        """Order the workers to revoke tasks."""
        options = {"terminate": terminate} if signal is None else {"terminate": terminate, "signal": signal}
        return self.caller.order(self.app.control.revoke, task_ids, **options)

    def revoke_by_stamped_headers(
        self, headers: Mapping[str, Any], terminate: bool, signal: str | None
    ) -> Deferred[None]:
        """Order the workers to revoke the tasks that carry one of these stamps."""
        options = {"terminate": terminate} if signal is None else {"terminate": terminate, "signal": signal}
        return self.caller.order(self.app.control.revoke_by_stamped_headers, dict(headers), **options)

    # Results

    def handle_of(
        self, result: Any, ignored: Container[str | None] = (), early: dict[str, Meta] | None = None
    ) -> AsyncResult | GroupResult:
        """Read one of Celery's results for its structure; ``early`` gets the states of tasks that have run here."""
        # From the first link on: a chain may have more of them than Python allows calls within calls.
        line = [result]
        while line[-1].parent is not None:
            line.append(line[-1].parent)
        handle: AsyncResult | GroupResult | None = None
        for link in reversed(line):
            # What a task's own apply_async returns may have none, or a UUID.
            given = getattr(link, "id", None)
            link_id = uuid() if given is None else str(given)
            if isinstance(link, ResultSet):
                members = [self.handle_of(member, ignored, early) for member in link.results]
                handle = GroupResult(self, link_id, members, handle)
                continue
            handle = AsyncResult(self, link_id, handle)
            if isinstance(link, EagerResult):
                handle._meta = meta = eager_meta(link)
                meta["task_id"] = link_id
                if early is not None:
                    # Called with task_id=, all links of a chain have that id: what counts is the last one's.
                    early[link_id] = meta
            else:
                handle._ignored = link_id in ignored
        assert handle is not None
        return handle

    def handle_of_tuple(self, stored: Any) -> AsyncResult | GroupResult:
        """Read what ``as_tuple`` gives, also after JSON."""
        line = []
        while stored:
            node, members = stored
            task_id, stored = node if isinstance(node, (list, tuple)) else (node, None)
            line.append((task_id, members))
        handle: AsyncResult | GroupResult | None = None
        for task_id, members in reversed(line):
            if members is None:
                handle = AsyncResult(self, task_id, handle)
            else:
                handle = GroupResult(
                    self, task_id, [self.handle_of_tuple(member) for member in members], handle
                )
        assert handle is not None
        return handle

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
        """Remove what is kept of a task's result, here and at the backend; who waits for it fails."""
        self.check()
        self.waiters.take_unclaimed(task_id)
        if self.source is None:
            return succeed(None)
        forgetting = self.source.forget(task_id)
        error = ResultNotKept("forget() was called while the result was waited for", task_id=task_id)
        self.waiters.forget(task_id, error)
        return forgetting

    def save_group(self, group: GroupResult) -> Deferred[None]:
        """Let Celery's backend write a group as it writes its own."""
        return self.caller.order(self._save_group, group)

    def _save_group(self, group: GroupResult) -> None:
        self.backend.save_group(group.id, result_from_tuple(group.as_tuple(), self.app))

    def delete_group(self, group_id: str) -> Deferred[None]:
        """Remove a saved group."""
        return self.caller.order(self.backend.delete_group, group_id)

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

    def come_by(self) -> None:
        """Free what belongs to Deferreds that were dropped."""
        if self._abandoned:
            self._drain()

    def _drain(self) -> None:
        abandoned = self._abandoned
        while abandoned:
            wait = abandoned.popleft()
            self.release(wait)
            wait.leave()

    # As a ResultListener

    def meta_received(self, meta: Meta, size: int = 0) -> None:
        """Hand a state to whoever waits for it."""
        self.come_by()
        self.waiters.meta_received(meta, size)

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
        goodbye = end - min(_GOODBYE, timeout / 2)
        await self.outbox.flush(max(0.0, goodbye - self.clock.seconds()))
        self.outbox.close()
        if self.source is not None:
            await self.source.hand_over(max(0.0, goodbye - self.clock.seconds()))
        if self._bound is not None:
            self._bound.cancel()
            self._bound = None
        self._drain()
        # Both at once, until the deadline. A source that is being stopped need not be told that what it watches is of no interest
        # any more.
        left = max(0.0, end - self.clock.seconds())
        closing = [self.broker.stop(left)]
        if self.source is not None:
            closing.append(self.source.stop(left))
        await in_slices(
            self.clock,
            drained(self.waiters.waiting()),
            lambda waiter: waiter.fail(Stopped("stopped before the result came; the task may still run")),
        )
        for closed in closing:
            await closed
        try:
            await self.caller.stop().addTimeout(max(0.0, end - self.clock.seconds()), self.clock)
        except DeferredTimeout:
            self.log.warn("a big call is still being put together in a thread; it will not be sent")


def _nothing(task_id: str) -> None:
    """There is no result source."""
