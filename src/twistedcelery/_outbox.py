"""The outbox: carries the operations of each call out, in order, with confirms, retry, limits and one deadline.

A call is a `Unit`. Units leave in the order of the calls; the messages of one unit leave in the order of capture.
Messages are pipelined: the next leaves before the confirm of the one before it has come. Three things hold a unit,
and with it those behind it: no connection (or one that is blocked, or whose buffer is full), a declaration that is on its way, and a reply
queue that does not exist yet. A write to the result backend holds only its own unit, so that a dead result
backend delays nobody else; it is acknowledged before what follows it leaves.

How a unit ends
    done          every message confirmed, what follows a confirm (`Publish.after`) started
    NotSent       its patience is over and no byte of it has left
    OutcomeUnknown  bytes have left, the confirm did not come, and it may not be tried again
    Refused, Unroutable  the broker's word; what of the unit has not left stays

Patience is the app's retry policy read as one span of time, from the call, or from the moment at which the outage began
or the connection was lost under it. It is counted only against an outage that lasts: a unit fails when its patience is over *and*
every server of the list was tried in vain since, or when a connection is lost under it once more after its patience.
While the broker is connected but blocks (a memory alarm), units wait, bounded by ``timeout`` where one was given.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.logger import Logger

from ._operations import Publish
from ._slices import SLICE, in_slices
from ._unit import Unit, patience_of
from .errors import ConnectionLost, NotSent, OutboxFull, OutcomeUnknown, TwistedCeleryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

    from ._operations import Operation
    from .interfaces import Broker, ResultSource

__all__ = ["Outbox"]

log = Logger()

#: Seconds between two looks at whose patience is over, while there is no connection; and more for each call that is
#: looked at, so that looking takes a small part of the time however many wait.
_LOOK, _LOOK_EACH = 0.1, 2e-6

#: What a call's messages are told to have failed with where nobody waits for it any more.
_CANCELLED = "the call was cancelled before it was sent"

#: Messages of one unit that may leave between two looks at the clock.
_FEW = 10


class _Event:
    """The owner of a message that follows a confirm: a ``task-sent`` event. Stock Celery drops one that fails."""

    def _sent(self, error: Exception | None) -> None:
        if error is not None:
            log.warn("a task-sent event was not published: {error}", error=error)


class Outbox:
    """Everything that is on its way to the broker.

    ``limit`` bounds the number of messages that have no outcome yet, ``limit_bytes`` the sum of their bodies;
    past either, `submit` refuses with `OutboxFull`. ``outage_wait`` is the least patience, in seconds, of a call
    that may be retried; ``write_policy`` is the retry policy of writes to the result backend that belong to no message.
    """

    def __init__(
        self,
        clock: IReactorTime,
        broker: Broker,
        source: ResultSource | None,
        *,
        connect: Callable[[], None],
        limit: int,
        limit_bytes: int,
        outage_wait: float = 0.0,
        write_policy: Mapping[str, Any] | None = None,
    ) -> None:
        self._connect = connect
        self._clock = clock
        self._broker = broker
        self._source = source
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._outage_wait = outage_wait
        self._write_policy = write_policy
        #: Units that wait for their turn, in the order of the calls.
        self._queue: OrderedDict[Unit, None] = OrderedDict()
        #: Units whose connection was lost under them, as a heap of number and unit; some of them may be done.
        self._returned: list[tuple[int, Unit]] = []
        #: Units that wait for a write to the result backend.
        self._writing: dict[Unit, None] = {}
        self._inflight: dict[Unit, None] = {}
        self._numbers = 0
        self._halted: Unit | None = None
        self._pumping = False
        self._look: IDelayedCall | None = None
        self._again: IDelayedCall | None = None
        #: The look that is under way, and whether something has come to be known since it began.
        self._looking: Deferred[None] | None = None
        self._is_looking = self._is_overtaken = False
        self._last_reason: Exception | None = None
        #: When the present outage was noticed; None while the broker takes work or has not been heard of.
        self._down_since: float | None = None
        #: When every server was tried in vain, last.
        self._failed_round = -inf
        #: The last call that was there when no attempt could help; those up to it are over.
        self._hopeless = 0
        self._closed = False
        self._flushed: list[Deferred[None]] = []
        self._known_patience: tuple[Mapping[str, Any] | None, float] = (None, 0.0)
        self.count = 0
        self.bytes = 0
        broker.listen(self)

    # Taking

    def submit(self, unit: Unit) -> None:
        """Take a call. Its owner is told how it ended, maybe before this returns."""
        if self._admit(unit):
            self._dispatch(unit)

    def reserve(self, unit: Unit, label: str = "") -> None:
        """Keep a place in the order of calls for a unit whose operations are being captured in a thread.

        ``label`` is what it is called where it is never sent.
        """
        unit.outbox = self
        unit.label = label
        unit.captured = False
        self._numbers += 1
        unit.number = self._numbers
        unit.size = (0, 0)
        unit.task_id = None
        unit.since = unit.failed_at = self._clock.seconds()
        unit.retry = True
        unit.patience = unit.expires = inf
        self._queue[unit] = None
        if not self._broker.connected:
            self._want_connection(unit)

    def fill(self, unit: Unit, operations: list[Operation]) -> None:
        """Give a unit whose place is kept its operations. Nothing happens where it was withdrawn meanwhile."""
        if unit.done:
            self._fail_messages(operations, CancelledError(_CANCELLED))
            return
        unit.captured = True
        unit.operations = list(operations)
        if not self._admit(unit):
            self._flushed_perhaps()
        elif not self._broker.connected:
            self._want_connection(unit)
        self._pump()

    def finish(self, unit: Unit, error: Exception | None = None) -> None:
        """End a unit whose place is kept: its capture has raised, or there is nothing to send."""
        if not unit.done:
            self._finish(unit, error)
            self._pump()

    def _admit(self, unit: Unit) -> bool:
        """Count a unit in, and work out its patience; False where it has ended at once."""
        messages = size = 0
        first: Publish | None = None
        writes = False
        for operation in unit.operations:
            if isinstance(operation, Publish):
                first = first or operation
                messages += 1
                size += len(operation.body)
                operation.owner = unit
            else:
                writes = True
        if self.count and (self.count + messages > self._limit or self.bytes + size > self._limit_bytes):
            unit.done = True
            # There where its place was kept.
            self._queue.pop(unit, None)
            owner, unit.owner = unit.owner, None
            assert owner is not None
            full = OutboxFull(
                f"{self.count} messages of {self.bytes} bytes are waiting for the broker and its confirms, "
                f"the limit is {self._limit} messages or {self._limit_bytes} bytes (outbox_limit, outbox_bytes)",
                url=self._broker.url,
            )
            self._fail_messages(unit.operations, full)
            owner._sent(full)
            return False
        unit.outbox = self
        self.count += messages
        self.bytes += size
        if unit.captured is None:
            self._numbers += 1
            unit.number = self._numbers
        unit.size = (messages, size)
        unit.since = unit.failed_at = self._clock.seconds()
        unit.task_id = None if first is None else first.task_id
        unit.retry = first is None or first.retry
        unit.patience = self._patience(first) if unit.retry else 0.0
        if writes and first is not None and unit.retry:
            unit.patience = max(unit.patience, self._patience(None))
        unit.expires = unit.since + unit.patience
        if first is not None and first.timeout is not None:
            self._bound(unit, first.timeout, self._timed_out)
        if not unit.operations:
            self._finish(unit)
            return False
        return True

    def _dispatch(self, unit: Unit) -> None:
        """Hand a unit out now, or put it into the queue."""
        if (
            not self._queue
            and self._halted is None
            and not self._pumping
            and not self._returned
            and self._broker.ready
            and self._hand_out(unit)
        ):
            return
        if not unit.done and unit not in self._writing:
            self._queue[unit] = None
        if not self._broker.connected:
            self._want_connection(unit)

    def _want_connection(self, unit: Unit) -> None:
        if self._down_since is None:
            self._down_since = unit.since
        self._connect()

    def _patience(self, message: Publish | None) -> float:
        policy = self._write_policy if message is None else message.retry_policy
        known = self._known_patience
        # Every call of an app has an equal copy of the same policy.
        if policy != known[0]:
            self._known_patience = known = (policy, patience_of(policy))
        return max(known[1], self._outage_wait)

    def _bound(self, unit: Unit, timeout: float, late: Callable[[Unit, float], None]) -> None:
        # A write that is tried again and again would leave a timer behind for each time.
        unit.timers = [timer for timer in unit.timers or () if timer.active()]
        unit.timers.append(self._clock.callLater(timeout, late, unit, timeout))

    def _timed_out(self, unit: Unit, timeout: float) -> None:
        if unit.position == len(unit.operations) and unit.again is None:
            # It has left in time; if the connection is lost under it, it does not leave again.
            unit.late = True
        else:
            self._give_up(unit, f"not sent within timeout={timeout} s")

    def _confirm_timed_out(self, unit: Unit, timeout: float) -> None:
        if not unit.inflight:
            # Confirmed, or lost and waiting for its patience to end.
            return
        self._fail(
            unit,
            OutcomeUnknown(
                f"the broker has not confirmed the message within confirm_timeout={timeout} s",
                url=self._broker.url,
            ),
        )

    def waiting_tasks(self) -> list[str]:
        """Return what is in the queue: the name and the id of each task, and what else there is."""
        found = []
        for unit in self._queue:
            if unit.captured is False:
                found.append(unit.label)
            for operation in unit.operations:
                if not isinstance(operation, Publish):
                    continue
                if operation.task_id is None:
                    found.append(f"a message to exchange {operation.exchange!r}")
                else:
                    found.append(f"{operation.headers.get('task', 'task')}[{operation.task_id}]")
        return found

    # Handing out

    def _pump(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        end = self._clock.seconds() + SLICE
        try:
            queue, broker = self._queue, self._broker
            while (queue or self._returned) and self._halted is None and broker.ready:
                if self._returned:
                    self._requeue()
                    if not queue:
                        break
                unit = next(iter(queue))
                if not self._hand_out(unit):
                    break
                if unit.again is not None:
                    # It came back at once: not again in this turn.
                    break
                if self._clock.seconds() > end:
                    self._pump_soon(0)
                    break
        finally:
            self._pumping = False

    def _pump_soon(self, delay: float) -> None:
        if self._again is None and not self._closed:
            self._again = self._clock.callLater(delay, self._pump_again)

    def _pump_again(self) -> None:
        self._again = None
        if (self._queue or self._returned) and not self._broker.connected:
            # It may rest, as no attempt could help, since before these came back.
            self._connect()
        self._pump()

    def _requeue(self) -> None:
        """Put the first unit whose connection was lost under it back, if it is its turn in the order of the calls."""
        queue, returned = self._queue, self._returned
        while returned:
            number, unit = returned[0]
            if unit.done or unit.again is None or unit in self._writing:
                # Where a write has to be answered first, `_written` comes back to it.
                heappop(returned)
                continue
            if not queue or number <= next(iter(queue)).number:
                heappop(returned)
                unit.operations = [*unit.again, *unit.operations[unit.position :]]
                unit.position = 0
                unit.again = None
                unit.prepared = False
                if queue:
                    # What the broker has ready for it may go to this one.
                    next(iter(queue)).prepared = False
                queue[unit] = None
                queue.move_to_end(unit, last=False)
            return

    def _hand_out(self, unit: Unit) -> bool:
        """Hand out what can leave of a unit, for the time of a slice; tell whether the next one may follow."""
        if unit.captured is False:
            return False
        try:
            return self._hand_out_from(unit)
        except Exception as error:  # noqa: BLE001  # what the rooms below cannot make bytes of, a lone surrogate for example
            self._fail(unit, error)
            return True

    def _hand_out_from(self, unit: Unit) -> bool:
        broker = self._broker
        operations = unit.operations
        end = 0.0
        while unit.position < len(operations):
            operation = operations[unit.position]
            if isinstance(operation, Publish):
                if not broker.ready:
                    return False
                if unit.position % _FEW == 1:
                    # Not for the first one: nearly every unit has no other.
                    now = self._clock.seconds()
                    end = end or now + SLICE
                    if now > end:
                        self._pump_soon(0)
                        return False
                if not unit.prepared and not self._prepare(unit, operation):
                    return unit.done
                unit.prepared = False
                if unit.position:
                    # The broker's now: so the end of a large unit is not that of all its messages at once.
                    operations[unit.position] = None
                unit.position += 1
                unit.inflight += 1
                if operation.confirm_timeout is not None:
                    self._bound(unit, operation.confirm_timeout, self._confirm_timed_out)
                self._inflight[unit] = None
                try:
                    broker.publish(operation)
                except Exception:
                    # It is no bytes yet, so it is still ours.
                    unit.position -= 1
                    operations[unit.position] = operation
                    raise
                if unit.done:
                    break
            else:
                self._queue.pop(unit, None)
                self._writing[unit] = None
                assert self._source is not None
                assert operation is not None
                self._source.write(operation, lambda error: self._written(unit, error))
                return True
        if self._queue:
            self._queue.pop(unit, None)
        return True

    def _prepare(self, unit: Unit, message: Publish) -> bool:
        """See that a message may leave; where not, halt until `_prepared` is called, maybe at once."""
        self._halted = unit
        if (
            unit.expects_result
            and self._source is not None
            and not self._source.prepare(lambda error: self._prepared(unit, error, message, broker_next=True))
        ):
            return False
        return self._prepare_broker(unit, message)

    def _prepare_broker(self, unit: Unit, message: Publish) -> bool:
        if self._broker.prepare(
            message, lambda error: self._prepared(unit, error, message, broker_next=False)
        ):
            self._halted = None
            return True
        return False

    def _prepared(self, unit: Unit, error: Exception | None, message: Publish, *, broker_next: bool) -> None:
        if self._halted is unit:
            self._halted = None
        if error is None:
            if not broker_next:
                # Declared for this message; an entity that may vanish is declared for each.
                unit.prepared = True
        elif not isinstance(error, (ConnectionLost, NotSent)):
            if unit.has_left:
                # It left before, and that connection was lost under it.
                self._last_reason = error
                self._give_up(unit, str(error))
            else:
                self._fail(unit, error)
        elif not unit.retry or self._impatient(unit):
            self._last_reason = error
            self._give_up(unit, str(error))
        elif self._broker.ready:
            self._pump_soon(_LOOK)
            return
        self._pump_soon(0)

    def _written(self, unit: Unit, error: Exception | None) -> None:
        if unit.done or unit not in self._writing:
            return
        del self._writing[unit]
        if error is None:
            unit.position += 1
            if unit.complete:
                self._finish(unit)
                return
            if unit.again is None:
                self._queue[unit] = None
                self._queue.move_to_end(unit, last=False)
            else:
                heappush(self._returned, (unit.number, unit))
            self._pump_soon(0)
        elif isinstance(error, (ConnectionLost, NotSent)) and unit.retry and not self._impatient(unit):
            self._writing[unit] = None
            self._bound(unit, _LOOK, self._write_again)
        else:
            self._last_reason = error
            self._give_up(unit, f"the result backend could not be written to: {error}")

    def _write_again(self, unit: Unit, timeout: float) -> None:
        del self._writing[unit]
        self._hand_out(unit)

    # Outcomes, as a BrokerListener

    def published(self, message: Publish, error: Exception | None) -> None:
        """Take the outcome of a message."""
        unit: Unit = message.owner
        if unit.done:
            # The call has ended; its messages on the way have ends of their own.
            if error is None:
                self._follow(message)
            else:
                self._fail_messages([message], error)
            return
        unit.inflight -= 1
        if not unit.inflight:
            del self._inflight[unit]
        if not isinstance(error, NotSent):
            unit.left = True
        if error is None:
            if message.after or message.failed:
                self._follow(message)
            if unit.complete:
                self._finish(unit)
        elif not isinstance(error, (ConnectionLost, NotSent)):
            if isinstance(error, TwistedCeleryError):
                error.task_id = message.task_id
            self._fail(unit, error, message)
        elif (
            not unit.retry
            or unit.late
            or (unit.failed_at > unit.since and unit.again is None and self._impatient(unit))
        ):
            # Never twice; or too late; or a server that takes connections and drops them.
            self._last_reason = error
            self._give_up(unit, str(error), message)
        else:
            if unit.again is None:
                unit.again = []
                heappush(self._returned, (unit.number, unit))
                if unit.failed_at == unit.since:
                    unit.expires = self._clock.seconds() + unit.patience
                unit.failed_at = self._clock.seconds()
            unit.again.append(message)
            # A broker that gives it back although it says that it takes work is given a rest.
            self._pump_soon(_LOOK if isinstance(error, NotSent) and self._broker.ready else 0)

    def withdraw(self, unit: Unit) -> None:
        """Forget a unit of which nothing has left. Its owner knows."""
        unit.owner = None
        self._finish(unit, CancelledError(_CANCELLED))

    def settled(self, unit: Unit) -> None:
        """The only task of a unit has run, so its message has arrived. Its owner knows."""
        unit.owner = None
        message = unit.operations[0]
        if isinstance(message, Publish):
            self._follow(message)
        self._finish(unit)

    def _follow(self, message: Publish) -> None:
        """Do what follows a message that has arrived, once."""
        after, message.after, message.failed = message.after, None, None
        for operation in after or ():
            if isinstance(operation, Publish):
                if not self._closed:
                    self.submit(Unit([operation], _Event(), expects_result=False))
            else:
                try:
                    operation.run()
                except Exception:  # noqa: BLE001  # receivers are the user's code; the message is out all the same
                    log.failure("what follows a publish failed")

    def _fail_messages(self, messages: Iterable[Operation | None], error: Exception) -> None:
        """Tell of messages that are not sent any more."""

        def fail(message: Publish) -> None:
            try:
                message.fail(error)
            except Exception:  # noqa: BLE001  # receivers are the user's code
                log.failure("what follows a publish that failed has failed")

        listening = [one for one in messages if isinstance(one, Publish) and one.failed is not None]
        if listening:
            in_slices(self._clock, listening, fail)

    def broker_ready(self) -> None:
        """Go on."""
        self._stop_looking()
        if self._looking is not None:
            self._looking.cancel()
        self._down_since = self._last_reason = None
        self._failed_round, self._hopeless = -inf, 0
        if self._queue:
            # What was declared for it went with the connection, perhaps.
            next(iter(self._queue)).prepared = False
        self._pump()

    def broker_unavailable(self, reason: Exception) -> None:
        """Fail those whose patience is over; all, where no attempt can help."""
        self._last_reason = reason
        self._failed_round = self._clock.seconds()
        if self._down_since is None:
            self._down_since = self._failed_round
        # Of those that come back later, one that is not permanent says that there is hope again.
        self._hopeless = self._numbers if getattr(reason, "permanent", False) else 0
        self._stop_looking()
        self._look_now()

    def _look_now(self) -> None:
        """Fail those whose patience is over, in slices.

        A look that is under way goes on, as it takes its time where many wait; what has come to be known meanwhile holds for the
        rest of it, and is looked at again after it.
        """
        if self._is_looking:
            self._is_overtaken = True
            return
        self._is_looking = True
        looked_at = [*(unit for _, unit in self._returned), *self._queue]
        looking = self._looking = in_slices(self._clock, looked_at, self._give_up_if_over)
        looking.addBoth(self._looked, len(looked_at))

    def _looked(self, _: object, count: int) -> None:
        self._looking = None
        self._is_looking = False
        overtaken, self._is_overtaken = self._is_overtaken, False
        if all(unit.done for _, unit in self._returned):
            self._returned.clear()
        if (self._queue or self._returned) and not self._broker.connected and not self._closed:
            seconds = 0 if overtaken else _LOOK + count * _LOOK_EACH
            self._look = self._clock.callLater(seconds, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        if not self._broker.connected:
            self._look_now()

    def _give_up_if_over(self, unit: Unit) -> None:
        if unit.done:
            return
        if unit.number <= self._hopeless or (unit.failed_at <= self._failed_round and self._impatient(unit)):
            self._give_up(unit, str(self._last_reason))

    def _impatient(self, unit: Unit) -> bool:
        expires = unit.expires
        if self._down_since is not None:
            expires = max(expires, self._down_since + unit.patience)
        return expires <= self._clock.seconds()

    def _stop_looking(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None

    # Endings

    def _give_up(self, unit: Unit, why: str, message: Publish | None = None) -> None:
        error: TwistedCeleryError
        kind = OutcomeUnknown if unit.has_left else NotSent
        if unit.has_left:
            what = "the message left, but no confirm came; the task may run"
        else:
            what = "the message was not sent, the task will not run"
        if unit.operations and not unit.size[0]:
            # Nothing but a write.
            lost = isinstance(self._last_reason, ConnectionLost)
            kind = OutcomeUnknown if lost else NotSent
            what = "it was sent to the result backend, but no answer came" if lost else "it was not sent"
        error = kind(f"{what}: {why}", url=self._broker.url)
        error.__cause__ = self._last_reason
        self._fail(unit, error, message)

    def _fail(self, unit: Unit, error: Exception, message: Publish | None = None) -> None:
        if unit.done:
            return
        if isinstance(error, TwistedCeleryError) and error.task_id is None:
            error.task_id = unit.task_id
        self._finish(unit, error, message)

    def _finish(self, unit: Unit, error: Exception | None = None, message: Publish | None = None) -> None:
        """End a unit, with an error where its messages that have no outcome have failed, and ``message`` that had it just now."""
        owner = unit.owner
        unsent = () if error is None else [message, *unit.unsent]
        self._end(unit)
        if error is not None:
            self._fail_messages(unsent, error)
        if owner is not None:
            owner._sent(error)
            # Whoever waits for the flush stops what is waited for: nothing here must keep this call alive.
            owner = None
        if self._flushed:
            self._flushed_perhaps()

    def _end(self, unit: Unit) -> None:
        """Forget a unit; the one place where it leaves every table."""
        unit.done = True
        unit.owner = None
        if self._halted is unit:
            self._halted = None
            self._pump_soon(0)
        elif unit.captured is False:
            # It held those behind it.
            self._pump_soon(0)
        if self._queue:
            self._queue.pop(unit, None)
        if self._look is not None and not self._queue and not self._returned:
            self._stop_looking()
        if self._writing:
            self._writing.pop(unit, None)
        if unit.inflight:
            self._inflight.pop(unit, None)
        if unit.timers is not None:
            for timer in unit.timers:
                if timer.active():
                    timer.cancel()
            unit.timers = None
        self.count -= unit.size[0]
        self.bytes -= unit.size[1]
        # No cycle through the messages: the collector has nothing to do with calls that are over.
        unit.operations = []

    # Stopping

    @property
    def _is_empty(self) -> bool:
        """Whether nothing is on its way: no message, and no write of a call that has none."""
        return not self.count and not self._queue and not self._writing

    def flush(self, timeout: float) -> Deferred[None]:
        """Fire with None when everything has its outcome, at the latest after ``timeout`` seconds.

        What has none by then fails, as not sent or as unknown.
        """
        if self._is_empty:
            return succeed(None)
        flushed: Deferred[None] = Deferred()
        self._flushed.append(flushed)
        late = self._clock.callLater(timeout, self._abandon, timeout)

        def done(_: object) -> None:
            if late.active():
                late.cancel()

        return flushed.addBoth(done)

    def _flushed_perhaps(self) -> None:
        if self._is_empty:
            flushed, self._flushed = self._flushed, []
            for waiter in flushed:
                waiter.callback(None)

    def _abandon(self, timeout: float) -> None:
        def abandon(unit: Unit) -> None:
            if not unit.done:
                self._give_up(unit, f"stopped, and the outbox was not empty after {timeout:.3g} s")

        halted = [] if self._halted is None else [self._halted]
        returned = [unit for _, unit in self._returned]
        in_slices(self._clock, [*halted, *returned, *self._queue, *self._writing, *self._inflight], abandon)

    def close(self) -> None:
        """Drop the timers; after `flush`."""
        self._closed = True
        self._stop_looking()
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._looking is not None:
            self._looking.cancel()
