"""Time that does not go back, for everything here that waits.

A reactor's time is the wall clock's, its delayed calls too: where that is set back by an hour, whatever is pending stands still for
an hour, heartbeats first of all, for want of which RabbitMQ closes its connections. Nobody tells. So `SteadyClock` takes the
reactor's place: its ``seconds`` are monotonic, and it keeps what is to be called later by itself, with one call of the reactor's for the
first of them. Whenever it is used, and whenever bytes come (`comparing`), it compares the two clocks; after a step back that one call is armed again, however
many are pending. Servers of AMQP send heartbeats, so nothing is late there for longer than
one of their intervals. A Redis server says nothing by itself: on a connection without traffic
everything waits for the next call or answer.

It takes the reactor's place, and is not handed in beside it, as Twisted's endpoints and whatever else gets a reactor set timers, too.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any
from weakref import ref

from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python import runtime
from zope.interface import directlyProvides, implementer, providedBy

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SteadyClock", "comparing", "steady"]

#: Seconds that a wall clock may drift between two looks; what is less harms nobody.
_DRIFT = 0.5

#: Entries without a meaning that may stay in the heap, where they are not the greater part of it.
_FEW = 50

#: Seconds that reading two clocks may take; where it took longer, this process was stopped between them.
_READING = 0.05


def steady(reactor: Any) -> Any:
    """Give a reactor whose time does not go back: itself, where it does not run on the wall clock."""
    return SteadyClock(reactor, time.monotonic) if reactor.seconds is runtime.seconds else reactor


def comparing(clock: Any) -> Callable[[], bool]:
    """Give what a connection calls when bytes come; it tells whether time had been set back."""
    compare: Callable[[], bool] = getattr(clock, "compare", _never)
    return compare


def _never() -> bool:
    return False


@implementer(IDelayedCall)
class _Call:
    """What `SteadyClock.callLater` gives."""

    __slots__ = ("_cancelled", "args", "clock", "due", "function", "kw", "number")

    due: float
    #: Of its newest entry in the heap.
    number: int

    def __init__(
        self, clock: SteadyClock, function: Callable[..., Any], args: tuple[Any, ...], kw: dict[str, Any]
    ) -> None:
        self.clock = clock
        #: None once it was made or cancelled.
        self.function: Callable[..., Any] | None = function
        self.args = args
        self.kw = kw
        self._cancelled = False

    def getTime(self) -> float:
        """When it is due, in the seconds of its clock."""
        return self.due

    def active(self) -> bool:
        """Whether it is still to be made."""
        return self.function is not None

    def cancel(self) -> None:
        """Do not make it."""
        self._check()
        self._cancelled = True
        self.take()
        self.clock._left_behind()

    def reset(self, secondsFromNow: float) -> None:
        """Make it so many seconds from now."""
        self._move(self.clock.seconds() + secondsFromNow)

    def delay(self, secondsLater: float) -> None:
        """Make it so many seconds later than planned."""
        self._move(self.due + secondsLater)

    def _move(self, due: float) -> None:
        self._check()
        self.clock._push(self, due)
        self.clock._left_behind()

    def _check(self) -> None:
        if self._cancelled:
            raise AlreadyCancelled
        if self.function is None:
            raise AlreadyCalled

    def take(self) -> Any:
        """Give what is to be called, and keep nothing of it."""
        assert self.function is not None
        taken = partial(self.function, *self.args, **self.kw)
        self.function, self.args, self.kw = None, (), {}
        return taken


class SteadyClock:
    """A reactor, but for its time: of what it is given it keeps the order, and has the reactor wake it for the first.

    :param monotonic: seconds that never go back.
    """

    _log = Logger()

    def __init__(self, reactor: Any, monotonic: Callable[[], float]) -> None:
        directlyProvides(self, providedBy(reactor))
        self._reactor = reactor
        self.seconds = monotonic
        #: How far the reactor's time was ahead.
        self._ahead: float = reactor.seconds() - monotonic()
        #: When each call is due, and a number that tells which entry of a call is its newest.
        self._heap: list[tuple[float, int, _Call]] = []
        self._number = 0
        #: Entries of calls that were cancelled or moved.
        self._stale = 0
        #: Those that are due in the reactor's next turn.
        self._soon: deque[ref[IDelayedCall]] = deque()
        #: The reactor's call that wakes it, and for which time.
        self._waking: Any = None
        self._wakes_at = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def callLater(
        self,
        delay: float,
        callable: Callable[..., Any],  # noqa: A002  # Twisted's word
        *args: object,
        **kw: object,
    ) -> IDelayedCall:
        """See `IReactorTime`."""
        assert delay >= 0, f"{delay} is not greater than or equal to 0 seconds"
        if not delay:
            # The most frequent kind: the reactor's own, which are known for the case that the clock is set back just now.
            soon: IDelayedCall = self._reactor.callLater(0, callable, *args, **kw)
            self._forget_made()
            self._soon.append(ref(soon))
            return soon
        call = _Call(self, callable, args, kw)
        self._push(call, self.seconds() + delay)
        return call

    def _forget_made(self) -> None:
        soon = self._soon
        while soon and not ((call := soon[0]()) is not None and call.active()):
            soon.popleft()

    def _push(self, call: _Call, due: float) -> None:
        self.compare()
        self._number += 1
        call.due, call.number = due, self._number
        heappush(self._heap, (due, self._number, call))
        if self._waking is None or due < self._wakes_at:
            self._wake_at(due)

    def _wake_at(self, due: float) -> None:
        self._sleep()
        self._wakes_at = due
        self._waking = self._reactor.callLater(max(0.0, due - self.seconds()), self._run)

    def _sleep(self) -> None:
        waking, self._waking = self._waking, None
        if waking is not None:
            waking.cancel()

    def _left_behind(self) -> None:
        """An entry in the heap has no meaning any more."""
        self._stale += 1
        if self._stale == len(self._heap):
            self._heap.clear()
            self._stale = 0
            # A program that waits for nothing has nothing in its reactor either.
            self._sleep()
        elif self._stale > _FEW and self._stale > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if _is_newest(entry)]
            self._stale = 0
            heapify(self._heap)

    def _run(self) -> None:
        """Make the calls that are due; not those that they add."""
        self._waking = None
        self.compare()
        now, last = self.seconds(), self._number
        try:
            while self._heap and self._heap[0][0] <= now and self._heap[0][1] <= last:
                entry = heappop(self._heap)
                if not _is_newest(entry):
                    self._stale -= 1
                    continue
                call = entry[2].take()
                try:
                    call()
                except Exception:  # noqa: BLE001  # as a reactor does: the others are made all the same
                    self._log.failure("an error in a delayed call")
        finally:
            while self._heap and not _is_newest(self._heap[0]):
                heappop(self._heap)
                self._stale -= 1
            if self._heap and (self._waking is None or self._heap[0][0] < self._wakes_at):
                self._wake_at(self._heap[0][0])

    def compare(self) -> bool:
        """Look whether the reactor's time was set back; have it wake in time then, and tell so."""
        now = self.seconds()
        wall: float = self._reactor.seconds()
        step = wall - now - self._ahead
        if -_DRIFT < step < _DRIFT or self.seconds() - now > _READING:
            return False
        self._ahead += step
        if step > 0:
            # It wakes too early, and once more: nothing stands still.
            return False
        self._log.warn("the clock was set back by {seconds:.1f} s", seconds=-step)
        if self._waking is not None:
            self._wake_at(self._wakes_at)
        for known in tuple(self._soon):
            call = known()
            if call is not None and call.active():
                call.reset(0)
        return True


def _is_newest(entry: tuple[float, int, _Call]) -> bool:
    """Whether an entry stands for a call that is still to be made."""
    _, number, call = entry
    return call.number == number and call.function is not None
