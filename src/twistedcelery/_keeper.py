"""Keep one connection: connect, fail over, back off, connect again, and stop at any moment.

A keeper owns at most one connection and at most one timer. What it connects to, and how, is an iterator of
attempts (`Attempt`), one per server in turn; what becomes of the connection is told to three callables.
Twisted's ``ClientService`` lends its words and not its machine: a connection that is lost during its handshake
leaves that one stuck, it does not say why it fails, and it stops without a deadline.

States, and what each input does to them (anything else changes nothing)::

                 start         attempt opened   attempt failed         time is up     closed      stop
    IDLE         CONNECTING *                                                                     STOPPED
    CONNECTING                 CONNECTED        CONNECTING (next       attempt                    STOPPING
                                                server), WAITING, IDLE failed
    WAITING                                                            CONNECTING                 STOPPED
    CONNECTED                                                                         CONNECTING * STOPPING
    STOPPING     once stopped                                          abort          STOPPED     (joins in)
    STOPPED      CONNECTING *                                                                     at once

    * or WAITING, if the back-off says so

Rules:

- A *round* is one attempt at each server, without a pause between them. A round that fails is reported once
  (`on_round_failed`), and then the back-off follows. Its length grows with the rounds that failed in a row.
- A round in which *every* server failed permanently (wrong password, no such virtual host, TLS) is reported with
  ``permanent`` true, and the keeper goes IDLE: the same settings will fail again. The next `start`, which is the
  next call that wants a connection, tries again, yet no sooner than the back-off allows. A round in which
  only some failed permanently is reported with an error that is not permanent, and goes on.
- The back-off is worked off by living: a connection opens the account of the next back-off, and if it is lost
  after that time, the count is reset and the same server is tried again at once, for it holds our queues and was
  just good. If it is lost sooner, or dropped, the next server follows, after the rest of that time: a server that
  accepts and drops at once is met no more often than one that refuses.
- Siblings are keepers of one client. Where one of them is connected to a server that this one has tried, it is there again: this
  one waits no longer, once for each back-off, so that a server that accepts and drops all of them is met twice as often at most.
- ``on_connected`` and ``on_disconnected`` come in pairs, whatever ends the connection, `stop` included.
- An attempt that does not end when it is cancelled is left behind; if it brings a connection after all, that
  is aborted. `stop` waits for those too.
- An exception in a callable is a bug: it is logged, and the keeper goes on.
"""

from __future__ import annotations

import random
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from ._explain import explain
from .errors import ConnectionFailed, ConnectionLost, ServerUnreachable, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from twisted.internet.interfaces import IDelayedCall, IReactorTime

__all__ = ["Attempt", "Keepable", "Keeper", "quick_backoff"]


class Keepable(Protocol):
    """What a keeper asks of a connection."""

    def when_closed(self) -> Deferred[Exception]:
        """Fire with the reason once the connection is gone, at once if it is gone already."""

    def close(self, timeout: float) -> Deferred[None]:
        """Close in an orderly way, at the latest after ``timeout`` seconds."""

    def abort(self, reason: Exception) -> None:
        """Close now; ``reason`` is what `when_closed` then tells."""


P = TypeVar("P", bound=Keepable)


class Attempt(Protocol[P]):
    """One server, to be connected to now. The same object may be tried many times."""

    @property
    def url(self) -> str:
        """The server, without password."""

    def connect(self) -> Deferred[P]:
        """Connect and shake hands: fire with the open connection. Cancelling leaves nothing behind."""


def quick_backoff(failures: int) -> float:
    """Seconds to wait after so many failed rounds: 0.2, 0.36, 0.65 ... up to 10, each a quarter more or less."""
    delay = min(10.0, 0.2 * 1.8 ** min(failures - 1, 10))
    return delay * random.uniform(0.75, 1.25)  # noqa: S311  # spreads clients, guards nothing


def _place(url: str) -> str:
    """Where a server is, whoever logs in and to which of its virtual hosts or databases."""
    where = url.partition("://")[2].rpartition("@")[2]
    return where if where.startswith("/") else where.partition("/")[0]


class _State(Enum):
    IDLE = auto()
    CONNECTING = auto()
    WAITING = auto()
    CONNECTED = auto()
    STOPPING = auto()
    STOPPED = auto()


class Keeper(Generic[P]):
    """Keeps one connection, from `start` to `stop`. See the module for its rules.

    :param attempts: the servers in turn, without end.
    :param round_size: how many of them make a round.
    :param connect_timeout: seconds for one attempt, TCP, TLS and handshake together; None: no bound.
    :param retry_policy: seconds to wait, by the number of failures in a row.
    :param on_connected: a connection is open.
    :param on_disconnected: it is no longer, and why.
    :param on_round_failed: no server could be connected to, and why not.
    :param name: what the connection is for, in logs.
    :param siblings: the other keepers of this client; this one joins them.
    """

    log = Logger()

    def __init__(
        self,
        *,
        clock: IReactorTime,
        attempts: Iterator[Attempt[P]],
        round_size: int,
        connect_timeout: float | None,
        retry_policy: Callable[[int], float] = quick_backoff,
        on_connected: Callable[[P], object],
        on_disconnected: Callable[[Exception], object],
        on_round_failed: Callable[[ConnectionFailed], object],
        name: str,
        siblings: list[Keeper[Any]] | None = None,
    ) -> None:
        self._clock = clock
        self._attempts = attempts
        self._round_size = round_size
        self._connect_timeout = connect_timeout
        self._retry_policy = retry_policy
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_round_failed = on_round_failed
        self.name = name
        self._siblings: list[Keeper[Any]] = [] if siblings is None else siblings
        self._siblings.append(self)
        #: The open connection, or None.
        self.connection: P | None = None
        #: Why the last attempt failed or the last connection ended; None while all is well.
        self.last_error: Exception | None = None
        #: The server in use or tried last, without password.
        self.url: str | None = None

        self._state = _State.IDLE
        self._timer: IDelayedCall | None = None
        self._connecting: Deferred[P] | None = None
        #: Cancelled attempts that have not ended yet.
        self._left_behind: set[Deferred[P]] = set()
        self._target: Attempt[P] | None = None
        #: The server to try first in the next round, instead of the next one.
        self._again: Attempt[P] | None = None
        self._dropped = False
        #: Failed attempts of this round, and the error that its report will carry.
        self._tried = 0
        self._round_error: ConnectionFailed | None = None
        #: Failures in a row, and the time before which no new round begins.
        self._failures = 0
        self._not_before = 0.0
        #: The end of the last back-off that was cut short: before that no sibling cuts another one.
        self._unhurried_until = 0.0
        #: Where it has tried to connect.
        self._places: set[str] = set()
        self._waiters: dict[Deferred[P], int | None] = {}
        self._stop_waiters: list[Deferred[None]] = []
        self._start_again = False

    # What the owner calls

    def start(self) -> None:
        """Want a connection. Nothing happens if there is one, or one is under way."""
        if self._state is _State.STOPPING:
            self._start_again = True
        elif self._state in (_State.IDLE, _State.STOPPED):
            self._begin_round()

    def stop(self, timeout: float) -> Deferred[None]:
        """Want none any more: close in an orderly way, abort after ``timeout`` seconds.

        Fires when nothing is left open; `start` may be called again at any time.
        """
        self._start_again = False
        waiters, self._waiters = self._waiters, {}
        stopped: Deferred[None] = Deferred(self._stop_waiters.remove)
        self._stop_waiters.append(stopped)
        if self._state is not _State.STOPPING:
            before, self._state = self._state, _State.STOPPING
            self._cancel_timer()
            # A connection has the same deadline of its own; this one is for whatever does not keep it.
            self._timer = self._clock.callLater(max(0.0, timeout), self._stop_late)
            if before is _State.CONNECTING:
                self._leave_behind()
            elif before is _State.CONNECTED:
                self._close(timeout)
            self._stopped_perhaps()
        for waiter in waiters:
            if not waiter.called:
                waiter.errback(Stopped(f"the {self.name} connection is stopped", url=self.url))
        return stopped

    def drop(self, reason: Exception) -> None:
        """Abort the present connection and connect again, to the next server. Without one, do nothing."""
        if self._state is _State.CONNECTED and self.connection is not None and not self._dropped:
            self._dropped = True
            self._abort(self.connection, reason)

    def when_connected(self, failAfterFailures: int | None = None) -> Deferred[P]:
        """Give the connection, now or once there is one; it does not start the keeper.

        Fails with the error of the round after so many failed rounds, or with that of a permanently failed
        round, or with `Stopped`. Cancelling stops waiting.
        """
        if self._state is _State.CONNECTED and self.connection is not None and not self._dropped:
            return succeed(self.connection)
        if self._state is _State.STOPPED or (self._state is _State.STOPPING and not self._start_again):
            return fail(Stopped(f"the {self.name} connection is stopped", url=self.url))
        waiter: Deferred[P] = Deferred(self._forget)
        self._waiters[waiter] = failAfterFailures
        return waiter

    # Rounds and attempts

    def _begin_round(self) -> None:
        """Begin a round now, or when the back-off allows."""
        delay = self._not_before - self._clock.seconds()
        if delay > 0:
            self._wait(delay)
        else:
            self._first_of_round()

    def _wait(self, delay: float) -> None:
        self._state = _State.WAITING
        self._timer = self._clock.callLater(delay, self._first_of_round)
        if any(sibling.connection is not None and self._knows(sibling) for sibling in self._siblings):
            self._hasten()

    def _knows(self, sibling: Keeper[Any]) -> bool:
        """Whether a sibling uses a server of this one's."""
        return sibling.url is not None and _place(sibling.url) in self._places

    def _hasten(self) -> None:
        """Cut the back-off short: a sibling has found the server."""
        waiting = self._state is _State.WAITING and self._timer is not None
        if not (waiting or self._state is _State.IDLE):
            return
        now = self._clock.seconds()
        earliest = max(now, self._unhurried_until)
        if earliest < self._not_before:
            self._unhurried_until, self._not_before = self._not_before, earliest
            if self._timer is not None:
                self._timer.reset(earliest - now)

    def _first_of_round(self) -> None:
        self._tried = 0
        self._round_error = None
        self._connect()

    def _connect(self) -> None:
        self._state = _State.CONNECTING
        self._timer = None
        attempting = self._attempt()
        if self._state is not _State.CONNECTING or self._connecting is not None:
            # What connects has stopped the keeper, or stopped and started it.
            self._left_behind.add(attempting)
        else:
            self._connecting = attempting
            if self._connect_timeout is not None:
                self._timer = self._clock.callLater(self._connect_timeout, self._attempt_late)
        # The Deferred may have fired already: what follows may then run now.
        attempting.addCallbacks(
            self._opened,
            self._refused,
            callbackArgs=(attempting,),
            errbackArgs=(attempting,),
        )
        attempting.addErrback(self._bug)
        if attempting in self._left_behind:
            attempting.cancel()

    def _attempt(self) -> Deferred[P]:
        try:
            target = self._again or next(self._attempts)
            self._again = None
            self._target, self.url = target, target.url
            self._places.add(_place(target.url))
            return target.connect()
        except StopIteration:
            nowhere = ServerUnreachable(f"no server is given for the {self.name} connection")
            nowhere.permanent = True
            return fail(nowhere)
        except Exception:  # noqa: BLE001  # others' code: its error is this attempt's
            return fail(Failure())  # type: ignore[no-untyped-call]

    def _attempt_late(self) -> None:
        self._timer = None
        self._leave_behind()
        self._attempt_failed(
            ServerUnreachable(f"no connection within {self._connect_timeout:g} s", url=self.url)
        )

    def _leave_behind(self) -> None:
        """Cancel the present attempt; remember it until it has ended."""
        attempting, self._connecting = self._connecting, None
        if attempting is not None:
            self._left_behind.add(attempting)
            attempting.cancel()

    def _opened(self, connection: P, attempting: Deferred[P]) -> None:
        if attempting is not self._connecting:
            self._abort(connection, ConnectionLost("connected too late", url=self.url))
            connection.when_closed().addBoth(self._left_behind_ended, attempting)
            return
        self._connecting = None
        self._cancel_timer()
        self._state = _State.CONNECTED
        self._dropped = False
        self._not_before = self._clock.seconds() + self._delay(self._failures + 1)
        self.connection = connection
        self.last_error = None
        self.log.info("{name} connection to {url} is open", name=self.name, url=self.url)
        self._call(self._on_connected, connection)
        if self._state is _State.CONNECTED and not self._dropped:
            waiters, self._waiters = self._waiters, {}
            for waiter in waiters:
                if not waiter.called:
                    waiter.callback(connection)
        for sibling in self._siblings:
            if sibling._knows(self):
                sibling._hasten()
        # Last, so that a connection that is gone already is told of in order.
        connection.when_closed().addBoth(self._closed).addErrback(self._bug)

    def _refused(self, failure: Failure, attempting: Deferred[P]) -> None:
        if attempting is not self._connecting:
            self._left_behind_ended(None, attempting)
            return
        self._connecting = None
        self._cancel_timer()
        error = explain(failure, self.url)
        if type(error) is ConnectionFailed:
            # Nothing that a network does: most likely an exception in somebody's code.
            self.log.failure("unexpected error while connecting to {url}", failure, url=self.url)
        self._attempt_failed(error)

    def _left_behind_ended(self, _: object, attempting: Deferred[P]) -> None:
        self._left_behind.discard(attempting)
        self._stopped_perhaps()

    def _attempt_failed(self, error: ConnectionFailed) -> None:
        self.last_error = error
        self._tried += 1
        if self._round_error is None or self._round_error.permanent or not error.permanent:
            self._round_error = error
        if self._tried < self._round_size:
            self._connect()
        else:
            self._round_failed(self._round_error)

    def _round_failed(self, error: ConnectionFailed) -> None:
        self._failures += 1
        delay = self._delay(self._failures)
        self._not_before = self._clock.seconds() + delay
        # The next state first: whatever the callables do then, `stop` and `start` find it in order.
        if error.permanent:
            self._state = _State.IDLE
        else:
            self._wait(delay)
            delay = self._not_before - self._clock.seconds()
        self.log.warn(  # Twisted's logger
            "{name} connection failed: {error}; {what}",
            name=self.name,
            error=error,
            what="not tried again by itself" if error.permanent else f"next attempt in {delay:.1f} s",
        )
        failing = []
        for waiter, left in self._waiters.items():
            if error.permanent or (left is not None and left <= 1):
                failing.append(waiter)
            elif left is not None:
                self._waiters[waiter] = left - 1
        for waiter in failing:
            del self._waiters[waiter]
        self._call(self._on_round_failed, error)
        for waiter in failing:
            if not waiter.called:
                waiter.errback(error)

    def _delay(self, failures: int) -> float:
        try:
            return max(0.0, self._retry_policy(failures))
        except Exception:  # noqa: BLE001  # others' code; without its advice, go gently
            self.log.failure("bug in the retry policy of the {name} connection", name=self.name)
            return 10.0

    # The end of a connection

    def _closed(self, reason: object) -> None:
        """The connection is gone: start over, or be stopped."""
        if isinstance(reason, Failure):
            reason = reason.value
        if not isinstance(reason, Exception):
            reason = ConnectionLost("the connection was closed", url=self.url)
        self.connection = None
        stopping = self._state is _State.STOPPING
        if not stopping:
            self.last_error = reason
            self.log.warn(  # Twisted's logger
                "{name} connection to {url} is lost: {reason}", name=self.name, url=self.url, reason=reason
            )
            # As long as its owner is being told, a `start` finds nothing to do and a `stop` nothing to close.
            self._state = _State.WAITING
        self._call(self._on_disconnected, reason)
        if stopping:
            self._stopped_perhaps()
        elif self._state is _State.WAITING and self._timer is None:
            if self._clock.seconds() >= self._not_before:
                self._failures = 0
                self._again = None if self._dropped else self._target
            else:
                self._failures += 1
            self._begin_round()

    def _close(self, timeout: float) -> None:
        connection = self.connection
        assert connection is not None
        try:
            closing = connection.close(timeout)
        except Exception as error:  # noqa: BLE001  # others' code: the harder way remains
            self.log.failure("bug while closing the {name} connection", name=self.name)
            self._abort(connection, error)
        else:
            closing.addErrback(self._close_failed, connection)

    def _close_failed(self, failure: Failure, connection: P) -> None:
        if self.connection is connection:
            assert isinstance(failure.value, Exception)
            self._abort(connection, failure.value)

    def _abort(self, connection: P, reason: Exception) -> None:
        try:
            connection.abort(reason)
        except Exception:  # noqa: BLE001  # others' code
            self.log.failure("bug while aborting the {name} connection", name=self.name)

    def _stop_late(self) -> None:
        """The deadline of `stop`: abort what is still open, and wait no longer for attempts left behind."""
        self._timer = None
        self._left_behind.clear()
        if self.connection is not None:
            self._abort(self.connection, ConnectionLost("not closed in time", url=self.url))
        self._stopped_perhaps()

    def _is_over(self) -> bool:
        return self.connection is None and self._connecting is None and not self._left_behind

    def _stopped_perhaps(self) -> None:
        if self._state is not _State.STOPPING or not self._is_over():
            return
        self._cancel_timer()
        self._state = _State.STOPPED
        # To stop and start is somebody's decision, not a retry.
        self._failures = 0
        self._not_before = self._unhurried_until = 0.0
        self._again = None
        start_again, self._start_again = self._start_again, False
        waiters, self._stop_waiters = self._stop_waiters, []
        for waiter in tuple(waiters):
            if not waiter.called:
                waiter.callback(None)
        if start_again:
            self.start()

    # Helpers

    def _forget(self, waiter: Deferred[P]) -> None:
        self._waiters.pop(waiter, None)

    def _cancel_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()

    def _call(self, function: Callable[[Any], object], argument: object) -> None:
        try:
            function(argument)
        except Exception:  # noqa: BLE001  # others' code: it must not break the keeper
            self.log.failure("bug in a callback of the {name} connection", name=self.name)

    def _bug(self, failure: Failure) -> None:
        self.log.failure("bug in the keeper of the {name} connection", failure, name=self.name)
