"""The keeper's state machine, on a clock that only the tests move."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from celery import Celery
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery import TwistedCelery
from twistedcelery._keeper import Keeper, quick_backoff
from twistedcelery.errors import (
    AuthenticationFailed,
    ConnectionLost,
    ServerUnreachable,
    Stopped,
    TLSFailed,
)


class FakeConnection:
    """A connection that does as it is told, and writes down what it was asked."""

    def __init__(self) -> None:
        self.waiting: list[Deferred[Exception]] = []
        self.gone: Exception | None = None
        self.calls: list[Any] = []
        self.close_raises: Exception | None = None
        self.abort_raises = False
        self.abort_is_prompt = False
        self.closing: Deferred[None] = Deferred()

    def when_closed(self) -> Deferred[Exception]:
        if self.gone is not None:
            return succeed(self.gone)
        self.waiting.append(Deferred())
        return self.waiting[-1]

    def close(self, timeout: float) -> Deferred[None]:
        self.calls.append(("close", timeout))
        if self.close_raises is not None:
            raise self.close_raises
        return self.closing

    def abort(self, reason: Exception) -> None:
        self.calls.append(("abort", reason))
        if self.abort_raises:
            raise RuntimeError("abort is broken")
        if self.abort_is_prompt:
            self.lose(reason)

    def lose(self, reason: Exception) -> None:
        self.gone = reason
        waiting, self.waiting = self.waiting, []
        for waiter in waiting:
            waiter.callback(reason)


class FakeAttempt:
    """A server: each `connect` is a Deferred in ``tries``."""

    def __init__(self, url: str, log: list[str]) -> None:
        self.url = url
        self.log = log
        self.tries: list[Deferred[FakeConnection]] = []
        self.cancelled = 0
        self.answer: Any = None

    def connect(self) -> Deferred[FakeConnection]:
        self.log.append(self.url)
        if self.answer is not None:
            answer: Deferred[FakeConnection] = self.answer()
            return answer
        self.tries.append(Deferred(self._cancel))
        return self.tries[-1]

    def _cancel(self, _: object) -> None:
        self.cancelled += 1

    def open(self) -> FakeConnection:
        connection = FakeConnection()
        self.tries[-1].callback(connection)
        return connection

    def refuse(self, error: Exception) -> None:
        self.tries[-1].errback(error)


class KeeperTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.tried: list[str] = []
        self.events: list[Any] = []
        self.servers = [FakeAttempt(name, self.tried) for name in "abc"]
        self.a, self.b, self.c = self.servers
        self.hooks: dict[str, Any] = {}

    def keeper(self, size: int = 1, **kwargs: Any) -> Keeper[FakeConnection]:
        def attempts():
            while True:
                yield from self.servers[:size]

        def note(kind: str):
            def call(what: object) -> None:
                self.events.append((kind, what))
                self.hooks.get(kind, lambda _: None)(what)

            return call

        kwargs.setdefault("attempts", attempts())
        self.kept = Keeper(
            clock=self.clock,
            round_size=size,
            connect_timeout=kwargs.pop("connect_timeout", 4.0),
            retry_policy=kwargs.pop("retry_policy", float),
            on_connected=note("up"),
            on_disconnected=note("down"),
            on_round_failed=note("failed"),
            name="test",
            **kwargs,
        )
        return self.kept

    def connected(self, size: int = 1) -> FakeConnection:
        self.keeper(size).start()
        connection = self.a.open()
        self.events.clear()
        return connection

    def assert_idle(self) -> None:
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.kept._left_behind, set())
        self.assertEqual(self.kept._waiters, {})
        self.assertEqual(self.kept._stop_waiters, [])

    # Start

    def test_lazy(self) -> None:
        """Nothing connects before start."""
        self.keeper()
        self.clock.advance(100)
        self.assertEqual(self.tried, [])

    def test_single_flight(self) -> None:
        """However often start is called, one attempt is made, and one connection kept."""
        keeper = self.keeper()
        keeper.start()
        keeper.start()
        connection = self.a.open()
        keeper.start()
        self.assertEqual(self.tried, ["a"])
        self.assertEqual(self.events, [("up", connection)])
        self.assertIs(keeper.connection, connection)
        self.assertEqual(keeper.url, "a")
        self.assertEqual(self.clock.getDelayedCalls(), [])

    # Rounds

    def test_round(self) -> None:
        """A round tries each server once without a pause, is reported once, then the back-off grows."""
        self.keeper(3).start()
        for server in self.servers:
            server.refuse(ServerUnreachable(server.url))
        self.assertEqual(self.tried, ["a", "b", "c"])
        self.assertEqual([kind for kind, _ in self.events], ["failed"])
        self.assertIsInstance(self.events[0][1], ServerUnreachable)
        self.assertIs(self.kept.last_error, self.events[0][1])
        self.clock.advance(0.9)
        self.kept.start()
        self.assertEqual(len(self.tried), 3)
        self.clock.advance(0.1)
        self.assertEqual(self.tried[3:], ["a"])
        for server in self.servers:
            server.refuse(ServerUnreachable(server.url))
        self.clock.advance(1.9)
        self.assertEqual(len(self.tried), 6)
        self.clock.advance(0.1)
        self.assertEqual(len(self.tried), 7)

    def test_failover_within_round(self) -> None:
        """A server that refuses is followed by the next, and no failure is reported if that one takes us."""
        self.keeper(2).start()
        self.a.refuse(ServerUnreachable("no"))
        connection = self.b.open()
        self.assertEqual(self.events, [("up", connection)])
        self.assertIsNone(self.kept.last_error)

    def test_deadline(self) -> None:
        """An attempt has one deadline; then it is cancelled, and the next server's turn comes."""
        self.keeper(2).start()
        self.clock.advance(3.9)
        self.assertEqual(self.tried, ["a"])
        self.clock.advance(0.1)
        self.assertEqual(self.a.cancelled, 1)
        self.assertEqual(self.tried, ["a", "b"])
        self.clock.advance(4)
        ((kind, error),) = self.events
        self.assertEqual(kind, "failed")
        self.assertIsInstance(error, ServerUnreachable)
        self.assertEqual(str(error), "no connection within 4 s [b]")

    def test_no_deadline(self) -> None:
        """Without a connect timeout an attempt may take for ever."""
        self.keeper(connect_timeout=None).start()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_late_connection(self) -> None:
        """A connection that comes up after its deadline is aborted, and never told of."""
        connection = FakeConnection()
        self.a.answer = lambda: Deferred(lambda d: d.callback(connection))
        self.keeper(2).start()
        self.clock.advance(4)
        self.assertEqual([call[0] for call in connection.calls], ["abort"])
        self.assertEqual(self.events, [])
        self.assertEqual(len(self.kept._left_behind), 1)
        connection.lose(ConnectionLost("gone"))
        self.assertEqual(self.kept._left_behind, set())

    def test_synchronous_failures(self) -> None:
        """Attempts that fail at once end in the back-off, each round reported."""
        for server in self.servers:
            server.answer = lambda: Deferred.fromCoroutine(self._refuse())
        self.keeper(3, retry_policy=lambda _: 0.1).start()
        self.assertEqual(len(self.events), 1)
        self.clock.pump([0.11] * 5)
        self.assertEqual(len(self.events), 6)
        self.successResultOf(self.kept.stop(1))
        self.assert_idle()

    async def _refuse(self) -> FakeConnection:
        raise ServerUnreachable("at once")

    def test_connect_raises(self) -> None:
        """An attempt that raises something unexpected counts as failed, and is logged as a bug."""

        def broken() -> None:
            raise KeyError("oops")

        self.a.answer = broken
        self.keeper().start()
        ((kind, error),) = self.events
        self.assertEqual(kind, "failed")
        self.assertIsInstance(error.__cause__, KeyError)
        self.clock.advance(1)
        self.assertEqual(self.tried, ["a", "a"])
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 2)

    def test_no_servers(self) -> None:
        """An empty list of servers is a permanent failure."""
        self.keeper(attempts=iter(())).start()
        ((_, error),) = self.events
        self.assertTrue(error.permanent)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    # Permanent errors

    def test_permanent(self) -> None:
        """When every server refuses for good, the keeper goes idle until start, and then keeps the back-off."""
        keeper = self.keeper(2)
        keeper.start()
        waiting = keeper.when_connected()
        self.a.refuse(AuthenticationFailed("wrong password"))
        self.assertEqual(self.events, [])
        self.b.refuse(TLSFailed("bad certificate"))
        self.assertTrue(self.events[0][1].permanent)
        self.failureResultOf(waiting, TLSFailed)
        self.clock.advance(0.4)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        keeper.start()
        keeper.start()
        self.assertEqual(len(self.tried), 2)
        self.clock.advance(0.6)
        self.assertEqual(self.tried, ["a", "b", "a"])
        self.a.refuse(AuthenticationFailed("wrong password"))
        self.b.refuse(AuthenticationFailed("wrong password"))
        self.clock.advance(50)
        self.assertEqual(len(self.tried), 4)
        keeper.start()
        self.assertEqual(len(self.tried), 5)

    def test_mixed_round(self) -> None:
        """A round in which only some failed for good is reported as passing, whichever came last, and goes on."""
        keeper = self.keeper(2)
        keeper.start()
        self.a.refuse(ServerUnreachable("down"))
        self.b.refuse(AuthenticationFailed("wrong password"))
        self.assertIsInstance(self.events[0][1], ServerUnreachable)
        self.assertIsInstance(keeper.last_error, AuthenticationFailed)
        self.clock.advance(1)
        self.a.refuse(AuthenticationFailed("wrong password"))
        self.b.refuse(ServerUnreachable("down"))
        self.assertIsInstance(self.events[1][1], ServerUnreachable)
        self.clock.advance(2)
        self.assertEqual(len(self.tried), 5)

    def test_start_in_permanent_report(self) -> None:
        """A start from within the report of a permanent failure waits for the back-off."""
        self.hooks["failed"] = lambda _: self.kept.start()
        self.keeper().start()
        self.a.refuse(AuthenticationFailed("no"))
        self.assertEqual(len(self.tried), 1)
        self.clock.advance(1)
        self.assertEqual(len(self.tried), 2)

    # A lost connection

    def test_lost_after_a_while(self) -> None:
        """A connection that has lived is made again at once, at the same server first, with a fresh back-off."""
        connection = self.connected(3)
        self.clock.advance(1.5)
        lost = ConnectionLost("cut")
        connection.lose(lost)
        self.assertEqual(self.events, [("down", lost)])
        self.assertIsNone(self.kept.connection)
        self.assertIs(self.kept.last_error, lost)
        self.assertEqual(self.tried, ["a", "a"])
        self.a.refuse(ServerUnreachable("down"))
        self.b.refuse(ServerUnreachable("down"))
        self.c.refuse(ServerUnreachable("down"))
        self.assertEqual(self.tried, ["a", "a", "b", "c"])
        self.clock.advance(1)
        self.assertEqual(self.tried[4:], ["a"])

    def test_lost_at_once(self) -> None:
        """A server that accepts and drops is met at the pace of the back-off, and the next one follows."""
        self.connected(2).lose(ConnectionLost("dropped"))
        self.assertEqual(self.tried, ["a"])
        self.clock.advance(1)
        self.assertEqual(self.tried, ["a", "b"])
        self.b.open().lose(ConnectionLost("dropped"))
        self.clock.advance(1.9)
        self.assertEqual(self.tried, ["a", "b"])
        self.clock.advance(0.1)
        self.assertEqual(self.tried, ["a", "b", "a"])
        # It lives for longer than the back-off that it would have earned: all is forgiven.
        connection = self.a.open()
        self.clock.advance(3)
        connection.lose(ConnectionLost("cut"))
        self.assertEqual(self.tried, ["a", "b", "a", "a"])
        self.a.open().lose(ConnectionLost("dropped"))
        self.clock.advance(1)
        self.assertEqual(len(self.tried), 5)

    def test_gone_before_it_was_told(self) -> None:
        """A connection that is lost the moment it opens is told of in order: up, then down."""
        connection = FakeConnection()
        connection.gone = ConnectionLost("already")
        self.a.answer = lambda: succeed(connection)
        self.keeper().start()
        self.assertEqual([kind for kind, _ in self.events], ["up", "down"])
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)

    def test_odd_reasons(self) -> None:
        """A connection that fails its when_closed, or gives no exception, is lost all the same."""
        self.connected().waiting.pop().errback(KeyError("odd"))
        self.assertIsInstance(self.events[0][1], KeyError)
        self.clock.advance(1)
        self.a.open().waiting.pop().callback(None)  # type: ignore[arg-type]
        self.assertIsInstance(self.events[-1][1], ConnectionLost)

    def test_drop(self) -> None:
        """Drop aborts the connection with the reason, and the next server follows."""
        connection = self.connected(2)
        self.clock.advance(5)
        reason = ConnectionLost("READONLY")
        self.kept.drop(reason)
        self.kept.drop(reason)
        self.assertEqual(connection.calls, [("abort", reason)])
        waiting = self.kept.when_connected()
        self.assertNoResult(waiting)
        connection.lose(reason)
        self.assertEqual(self.tried, ["a", "b"])
        other = self.b.open()
        self.assertIs(self.successResultOf(waiting), other)

    def test_drop_without_connection(self) -> None:
        """Without a connection, drop does nothing."""
        self.keeper().drop(ConnectionLost("nothing"))
        self.kept.start()
        self.kept.drop(ConnectionLost("nothing"))
        self.assertEqual(self.a.cancelled, 0)

    def test_drop_in_on_connected(self) -> None:
        """A connection dropped by whoever is told of it is not given to those who wait."""
        self.hooks["up"] = lambda _: self.kept.drop(ConnectionLost("not this one"))
        self.keeper().start()
        waiting = self.kept.when_connected()
        self.a.open()
        self.assertNoResult(waiting)

    # Stop

    def test_stop_idle(self) -> None:
        """Stop before start, and again after it, is done at once; the keeper can start afterwards."""
        self.keeper()
        self.successResultOf(self.kept.stop(5))
        self.successResultOf(self.kept.stop(5))
        self.assert_idle()
        self.kept.start()
        self.assertEqual(self.tried, ["a"])

    def test_stop_connecting(self) -> None:
        """Stop cancels the attempt under way, and nothing is left."""
        self.keeper().start()
        waiting = self.kept.when_connected()
        self.successResultOf(self.kept.stop(5))
        self.assertEqual(self.a.cancelled, 1)
        self.failureResultOf(waiting, Stopped)
        self.assert_idle()
        self.assertEqual(self.events, [])

    def test_stop_handshaking(self) -> None:
        """Stop waits for a cancelled attempt whose connection still has to close."""
        closing: Deferred[FakeConnection] = Deferred()
        outer: Deferred[FakeConnection] = Deferred()
        self.a.answer = lambda: outer
        outer.addCallback(lambda _: closing.addErrback(lambda _: closed))
        closed: Deferred[Any] = Deferred(lambda _: None)
        outer.callback(FakeConnection())
        self.keeper().start()
        stopped = self.kept.stop(5)
        self.assertNoResult(stopped)
        closed.errback(ConnectionLost("aborted"))
        self.successResultOf(stopped)
        self.assert_idle()

    def test_stop_gives_up_on_attempts(self) -> None:
        """At its deadline stop no longer waits for an attempt that does not end."""
        pending: Deferred[Any] = Deferred()
        inner: Deferred[Any] = Deferred().addErrback(lambda _: pending)
        outer: Deferred[Any] = succeed(None)
        outer.addCallback(lambda _: inner)
        self.a.answer = lambda: outer
        self.keeper().start()
        stopped = self.kept.stop(5)
        self.clock.advance(4.9)
        self.assertNoResult(stopped)
        self.clock.advance(0.1)
        self.successResultOf(stopped)
        self.assert_idle()
        late = FakeConnection()
        pending.callback(late)
        self.assertEqual([call[0] for call in late.calls], ["abort"])

    def test_stop_waiting(self) -> None:
        """Stop during the back-off cancels it, and a new start does not wait for it."""
        self.keeper().start()
        self.a.refuse(ServerUnreachable("no"))
        self.successResultOf(self.kept.stop(5))
        self.assert_idle()
        self.kept.start()
        self.assertEqual(len(self.tried), 2)

    def test_stop_connected(self) -> None:
        """Stop closes in an orderly way, is joined by later calls, and fires once the connection is gone."""
        connection = self.connected()
        first, second = self.kept.stop(5), self.kept.stop(1)
        self.assertEqual(connection.calls, [("close", 5)])
        self.failureResultOf(self.kept.when_connected(), Stopped)
        connection.closing.callback(None)
        self.assertNoResult(first)
        reason = ConnectionLost("closed")
        connection.lose(reason)
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertEqual(self.events, [("down", reason)])
        self.failureResultOf(self.kept.when_connected(), Stopped)
        self.assert_idle()

    def test_stop_deadline(self) -> None:
        """A connection that does not close in time is aborted."""
        connection = self.connected()
        stopped = self.kept.stop(5)
        self.clock.advance(5)
        self.assertEqual([call[0] for call in connection.calls], ["close", "abort"])
        self.assertNoResult(stopped)
        connection.lose(connection.calls[1][1])
        self.successResultOf(stopped)
        self.assert_idle()

    def test_close_is_broken(self) -> None:
        """A close that raises, or fails, is followed by abort."""
        connection = self.connected()
        connection.close_raises = KeyError("bug")
        connection.abort_is_prompt = True
        self.successResultOf(self.kept.stop(5))
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)
        self.kept.start()
        connection = self.a.open()
        connection.abort_is_prompt = True
        stopped = self.kept.stop(5)
        connection.closing.errback(RuntimeError("could not"))
        self.successResultOf(stopped)
        self.assert_idle()

    def test_close_fails_after_the_end(self) -> None:
        """A close that fails once the connection is gone is of no account."""
        connection = self.connected()
        stopped = self.kept.stop(5)
        connection.lose(ConnectionLost("closed"))
        connection.closing.errback(RuntimeError("late"))
        self.successResultOf(stopped)
        self.assertEqual([call[0] for call in connection.calls], ["close"])

    def test_abort_is_broken(self) -> None:
        """An abort that raises is logged, and the end still comes with the connection's."""
        connection = self.connected()
        connection.abort_raises = True
        stopped = self.kept.stop(5)
        self.clock.advance(5)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        connection.lose(ConnectionLost("closed"))
        self.successResultOf(stopped)

    def test_restart_while_stopping(self) -> None:
        """A start during a stop takes effect when the stop is done; a further stop takes it back."""
        connection = self.connected()
        stopped = self.kept.stop(5)
        self.kept.start()
        waiting = self.kept.when_connected()
        self.assertEqual(self.tried, ["a"])
        connection.lose(ConnectionLost("closed"))
        self.successResultOf(stopped)
        self.assertEqual(self.tried, ["a", "a"])
        other = self.a.open()
        self.assertIs(self.successResultOf(waiting), other)
        self.kept.stop(5)
        self.kept.start()
        waiting = self.kept.when_connected()
        self.kept.stop(5)
        self.failureResultOf(waiting, Stopped)
        other.lose(ConnectionLost("closed"))
        self.assertEqual(len(self.tried), 2)
        self.assert_idle()

    def test_stop_cancelled(self) -> None:
        """Cancelling a stop's Deferred stops waiting for it, not the stop."""
        connection = self.connected()
        first, second = self.kept.stop(5), self.kept.stop(5)
        first.addErrback(lambda _: None)
        second.addCallback(lambda _: None)
        first.cancel()
        connection.lose(ConnectionLost("closed"))
        self.successResultOf(first)
        self.successResultOf(second)
        self.assert_idle()

    # Callables that call back

    def test_stop_in_every_callable(self) -> None:
        """The keeper can be stopped from within each of its callables."""
        stopped: list[Deferred[None]] = []
        for kind in ("up", "down", "failed"):
            self.hooks = {kind: lambda _: stopped.append(self.kept.stop(5))}
            self.keeper().start()
            if kind == "failed":
                self.a.refuse(ServerUnreachable("no"))
            else:
                self.a.open().lose(ConnectionLost("cut"))
            self.successResultOf(stopped[-1])
            self.assert_idle()

    def test_restart_in_on_disconnected(self) -> None:
        """A stop and start from within on_disconnected leads to one attempt, not two."""

        def restart(_: object) -> None:
            self.kept.stop(5)
            self.kept.start()

        connection = self.connected()
        self.hooks["down"] = restart
        connection.lose(ConnectionLost("cut"))
        self.assertEqual(self.tried, ["a", "a"])
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)

    def test_restart_in_on_disconnected_refused(self) -> None:
        """If that attempt fails at once, there is one back-off, not two."""

        def restart(_: object) -> None:
            self.a.answer = lambda: Deferred.fromCoroutine(self._refuse())
            self.kept.stop(5)
            self.kept.start()

        connection = self.connected()
        self.clock.advance(5)
        self.hooks["down"] = restart
        connection.lose(ConnectionLost("cut"))
        self.assertEqual(self.tried, ["a", "a"])
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)

    def test_restart_within_stop(self) -> None:
        """A start from within on_disconnected of a stop that is done at once: stopped first, then started."""
        connection = self.connected()
        connection.close_raises = KeyError("bug")
        connection.abort_is_prompt = True
        self.hooks["down"] = lambda _: self.kept.start()
        self.successResultOf(self.kept.stop(5))
        self.assertEqual(self.tried, ["a", "a"])
        self.flushLoggedErrors(KeyError)

    def test_stop_within_connect(self) -> None:
        """An attempt that stops the keeper, or restarts it, is cancelled itself, and no other is harmed."""
        own: Deferred[FakeConnection] = Deferred()

        def stop() -> Deferred[FakeConnection]:
            self.a.answer = None
            self.successResultOf(self.kept.stop(5))
            if restart:
                self.kept.start()
            return own

        for restart in (False, True):
            own = Deferred()
            self.a.answer = stop
            self.keeper().start()
            self.assertTrue(own.called)
            if restart:
                connection = self.a.open()
                self.assertIs(self.kept.connection, connection)
            self.assert_idle()

    def test_bugs_in_callables(self) -> None:
        """An exception in a callable is logged, and the keeper goes on."""

        def broken(_: object) -> None:
            raise ZeroDivisionError

        self.hooks = dict.fromkeys(("up", "down", "failed"), broken)
        self.keeper().start()
        self.a.refuse(ServerUnreachable("no"))
        self.clock.advance(1)
        connection = self.a.open()
        self.clock.advance(10)
        connection.lose(ConnectionLost("cut"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 3)
        self.assertEqual(len(self.tried), 3)

    def test_bug_in_policy(self) -> None:
        """A retry policy that raises is logged, and ten seconds stand in for it."""

        def broken(_: int) -> float:
            raise ZeroDivisionError

        self.keeper(retry_policy=broken).start()
        self.a.refuse(ServerUnreachable("no"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.clock.advance(9.9)
        self.assertEqual(len(self.tried), 1)
        self.clock.advance(0.1)
        self.assertEqual(len(self.tried), 2)

    def test_bug_in_connection(self) -> None:
        """A connection whose when_closed raises is a bug that is logged, not lost in a Deferred."""
        connection = FakeConnection()
        connection.when_closed = None  # type: ignore[assignment,method-assign]
        self.keeper().start()
        self.a.tries[-1].callback(connection)
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)

    # when_connected

    def test_when_connected(self) -> None:
        """Each caller gets a Deferred of its own; one that is cancelled is forgotten at once."""
        keeper = self.keeper()
        first, second = keeper.when_connected(), keeper.when_connected()
        self.assertEqual(self.tried, [])
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.assertEqual(list(keeper._waiters), [second])
        keeper.start()
        connection = self.a.open()
        self.assertIs(self.successResultOf(second), connection)
        self.assertIs(self.successResultOf(keeper.when_connected()), connection)

    def test_fail_after_failures(self) -> None:
        """A caller who asks for it hears of the failure after so many rounds; others go on waiting."""
        keeper = self.keeper()
        keeper.start()
        one, two, ever = keeper.when_connected(0), keeper.when_connected(2), keeper.when_connected()
        self.a.refuse(ServerUnreachable("no"))
        self.failureResultOf(one, ServerUnreachable)
        self.assertNoResult(two)
        self.clock.advance(1)
        self.a.refuse(ServerUnreachable("no"))
        self.failureResultOf(two, ServerUnreachable)
        self.assertNoResult(ever)

    def test_waiters_cancel_each_other(self) -> None:
        """A waiter's callback may cancel other waiters, whatever it is that fires them."""

        def both(**kwargs: Any) -> list[Deferred[Any]]:
            first, second = (self.kept.when_connected(**kwargs) for _ in "12")
            first.addBoth(lambda _: second.cancel())
            second.addErrback(lambda _: None)
            return [first, second]

        self.keeper().start()
        pairs = [both(failAfterFailures=1)]
        self.a.refuse(ServerUnreachable("no"))
        self.clock.advance(1)
        pairs.append(both())
        connection = self.a.open()
        self.clock.advance(5)
        connection.lose(ConnectionLost("cut"))
        pairs.append(both())
        stopped = self.kept.stop(5)
        first, second = self.kept.stop(5), self.kept.stop(5)
        self.successResultOf(stopped)
        for pair in pairs:
            for waiter in pair:
                self.successResultOf(waiter)
        self.assert_idle()
        del first, second

    def test_stoppers_cancel_each_other(self) -> None:
        """A callback of one stop may cancel another stop's Deferred."""
        connection = self.connected()
        first, second = self.kept.stop(5), self.kept.stop(5)
        first.addBoth(lambda _: second.cancel())
        connection.lose(ConnectionLost("closed"))
        self.successResultOf(first)
        self.failureResultOf(second, CancelledError)
        self.assert_idle()

    def test_quick_backoff(self) -> None:
        """The default back-off begins near 0.2 s, grows, and stays near 10 s."""
        for failures, about in ((1, 0.2), (2, 0.36), (9, 10.0), (10_000, 10.0)):
            delay = quick_backoff(failures)
            self.assertTrue(0.75 * about <= delay <= 1.25 * about, (failures, delay))


class SiblingTests(SynchronousTestCase):
    """Several keepers of one client: where one has found the server, the others do not sit out their back-off."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.siblings: list[Keeper[Any]] = []
        self.tried: list[str] = []
        self.failed: list[Exception] = []

    def keeper(
        self, *urls: str, delay: Any = lambda failures: min(10.0, 2.0**failures)
    ) -> tuple[Keeper[FakeConnection], list[FakeAttempt]]:
        servers = [FakeAttempt(url, self.tried) for url in urls]
        keeper: Keeper[FakeConnection] = Keeper(
            clock=self.clock,
            attempts=cycle(servers),
            round_size=len(servers),
            connect_timeout=4.0,
            retry_policy=delay,
            on_connected=lambda _: None,
            on_disconnected=lambda _: None,
            on_round_failed=self.failed.append,
            name="test",
            siblings=self.siblings,
        )
        keeper.start()
        return keeper, servers

    def refuse(self, attempt: FakeAttempt, rounds: int) -> None:
        """Fail so many rounds, and stay in the back-off after the last."""
        for round_ in range(rounds):
            attempt.refuse(ServerUnreachable("no"))
            if round_ < rounds - 1:
                self.clock.advance(10)

    def test_woken(self) -> None:
        """The one that waits tries at once: whoever logs in there, and whichever database it wants."""
        for one, other in (
            ("amqp://u@h:5672//", "amqp://u@h:5672//"),
            ("redis://h:6379/0", "redis://u@h:6379/1"),
            ("redis+socket:///run/r.sock", "redis+socket://u@/run/r.sock"),
        ):
            self.setUp()
            _, [slow] = self.keeper(other)
            self.refuse(slow, 5)
            _, [quick] = self.keeper(one)
            self.assertEqual(len(slow.tries), 5)
            quick.open()
            self.clock.advance(0)
            self.assertEqual(len(slow.tries), 6)

    def test_other_server(self) -> None:
        """A server that it never tried says nothing."""
        _, [slow] = self.keeper("amqp://h:5672//")
        self.refuse(slow, 5)
        for other in ("amqp://h:5673//", "amqp://i:5672//", "redis+socket:///h:5672"):
            self.keeper(other)[1][0].open()
        self.clock.advance(9.9)
        self.assertEqual(len(slow.tries), 5)

    def test_failover(self) -> None:
        """One of several is enough."""
        _, [first, second] = self.keeper("amqp://h:1//", "amqp://h:2//")
        self.clock.advance(0)
        for attempt in (first, second):
            attempt.refuse(ServerUnreachable("no"))
        self.keeper("amqp://h:1//")[1][0].open()
        self.clock.advance(0)
        self.assertEqual((len(first.tries), len(second.tries)), (2, 1))

    def test_attempt_under_way(self) -> None:
        """An attempt that fails, or a connection that is lost, after a sibling has connected is made up for at once, once."""
        _, [slow] = self.keeper("amqp://h:1//")
        _, [quick] = self.keeper("amqp://h:1//")
        quick.open()
        slow.refuse(ServerUnreachable("no"))
        self.clock.advance(0)
        self.assertEqual(len(slow.tries), 2)
        slow.open().lose(ConnectionLost("cut"))
        self.clock.advance(0)
        self.assertEqual(len(slow.tries), 2)
        self.clock.advance(2)
        self.assertEqual(len(slow.tries), 3)

    def test_told_when(self) -> None:
        """What is logged of the next attempt is when it comes."""
        _, [slow] = self.keeper("amqp://h:1//")
        self.keeper("amqp://h:1//")[1][0].open()
        with capturedLogs() as logs:
            slow.refuse(ServerUnreachable("no"))
        self.assertIn("next attempt in 0.0 s", formatEvent(logs[0]))

    def test_permanent(self) -> None:
        """One that rests because of a wrong password may try when it is asked next."""
        keeper, [slow] = self.keeper("amqp://h:1//")
        slow.refuse(AuthenticationFailed("no"))
        self.keeper("amqp://h:1//")[1][0].open()
        self.assertEqual(len(slow.tries), 1)
        keeper.start()
        self.assertEqual(len(slow.tries), 2)

    def test_stopped(self) -> None:
        """One that is stopped is not woken."""
        keeper, [slow] = self.keeper("amqp://h:1//")
        self.refuse(slow, 2)
        self.successResultOf(keeper.stop(1))
        self.keeper("amqp://h:1//")[1][0].open()
        self.clock.advance(100)
        self.assertEqual(len(slow.tries), 2)

    def test_flapping(self) -> None:
        """Where a server accepts and drops at once, or refuses one of them for ever, siblings do not spur each other on."""

        def enough() -> bool:
            """Whether they have tried so often that it is time to end it."""
            return len(self.tried) > 10_000

        def drops() -> Deferred[FakeConnection]:
            if enough():
                return Deferred()
            connection = FakeConnection()
            self.clock.callLater(0.05, connection.lose, ConnectionLost("cut"))
            return succeed(connection)

        def refuses() -> Deferred[FakeConnection]:
            return Deferred() if enough() else fail(ServerUnreachable("no"))

        def accepts() -> Deferred[FakeConnection]:
            return succeed(FakeConnection())

        counts = {}
        for answers in ((drops,), (drops, drops), (drops, drops, drops), (accepts, refuses)):
            self.setUp()
            kept = []
            for answer in answers:
                _, [server] = self.keeper(
                    "amqp://h:1//", delay=lambda failures: min(10.0, 0.2 * 1.8 ** min(failures - 1, 10))
                )
                kept.append(server)
                server.answer = answer
            start = len(self.tried)
            # The first attempt of each is left hanging, and ends with its time.
            self.clock.pump([0.05] * 12_000)
            counts[answers] = (len(self.tried) - start) / len(answers)
        alone = counts.pop((drops,))
        self.assertGreater(alone, 50)
        for answers, count in counts.items():
            self.assertLessEqual(count, 2 * alone + 10, answers)

    def test_rooms(self) -> None:
        """All connections of a client are siblings, whatever they are for."""
        for broker, backend, count in (
            ("amqp://", "rpc://", 2),
            ("amqp://", None, 1),
            ("amqp://", "redis://", 3),
            ("redis://", "rpc://", 2),
            ("redis://", "redis://", 3),
            ("redis://", None, 1),
        ):
            app = Celery("client", broker=broker, backend=backend, set_as_current=False)
            engine: Any = TwistedCelery(app, reactor=MemoryReactorClock()).engine
            siblings = engine.broker._keeper._siblings
            self.assertEqual(len(siblings), count, (broker, backend))
            kept = [value for value in vars(engine.source or object).values() if isinstance(value, Keeper)]
            self.assertEqual(siblings[1:], kept)
