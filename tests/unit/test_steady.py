"""A reactor's clock is set back: nothing of ours stands still for longer than it takes to notice."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock
from weakref import ref

from celery import Celery
from twisted.internet import reactor as global_reactor
from twisted.internet.base import ReactorBase
from twisted.internet.defer import Deferred
from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.interfaces import IReactorPluggableNameResolver, IReactorTCP, IReactorTime
from twisted.internet.protocol import ClientFactory
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python import runtime
from twisted.trial.unittest import SynchronousTestCase

from tests.support.amqp_peer import Peer, frame
from twistedcelery import TwistedCelery
from twistedcelery._keeper import Keeper
from twistedcelery._operations import Publish
from twistedcelery._outbox import Outbox
from twistedcelery._steady import SteadyClock, comparing, steady
from twistedcelery._unit import Unit
from twistedcelery.errors import NotSent, ServerUnreachable
from twistedcelery.redis.connection import ConnectionConfig
from twistedcelery.redis.protocol import CommandProtocol

HOUR = 3600.0


class WallClock(MemoryReactorClock):
    """A reactor on a wall clock that may be set; ``monotonic`` goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.monotonic = 100.0
        self.rightNow = 1_000_000.0

    def pass_time(self, seconds: float, slices: int = 1) -> None:
        for _ in range(slices):
            self.monotonic += seconds / slices
            self.advance(seconds / slices)

    def step(self, seconds: float) -> None:
        """Set the clock, forward or back. Calls keep the times that they have."""
        self.rightNow += seconds


class SteadyTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.wall = WallClock()
        self.clock: Any = SteadyClock(self.wall, lambda: self.wall.monotonic)
        self.made: list[object] = []

    def assert_made(self, *names: object) -> None:
        self.assertEqual(self.made, list(names))
        self.made.clear()


class ClockTests(SteadyTestCase):
    def test_steps_back(self) -> None:
        """What is pending is made when it is due, once somebody compares; steps add up."""
        for name, delay in (("a", 10), ("b", 20), ("c", 30)):
            self.clock.callLater(delay, self.made.append, name)
        self.wall.pass_time(5)
        for _ in range(2):
            self.wall.step(-HOUR)
        self.assertTrue(self.clock.compare())
        self.assertFalse(self.clock.compare())
        self.wall.pass_time(4.75)
        self.assert_made()
        self.wall.pass_time(0.25)
        self.assert_made("a")
        self.wall.step(-HOUR)
        self.wall.pass_time(12)
        self.assert_made()
        self.assertTrue(self.clock.compare())
        self.wall.advance(0)
        self.assert_made("b")
        self.wall.pass_time(8)
        self.assert_made("c")

    def test_noticed_by_the_next_call(self) -> None:
        """Whoever arms something compares, so that nothing is armed on two times."""
        self.clock.callLater(10, self.made.append, "before")
        self.wall.step(-HOUR)
        self.clock.callLater(20, self.made.append, "after")
        self.assertFalse(self.clock.compare())
        self.wall.pass_time(10)
        self.assert_made("before")
        self.wall.pass_time(9.75)
        self.assert_made()
        self.wall.pass_time(0.25)
        self.assert_made("after")

    def test_cancelled_and_made(self) -> None:
        """What was cancelled or made stays so."""
        self.clock.callLater(1, self.made.append, "made")
        cancelled = self.clock.callLater(2, self.made.append, "cancelled")
        self.wall.pass_time(1)
        cancelled.cancel()
        self.wall.step(-HOUR)
        self.clock.compare()
        self.wall.pass_time(HOUR)
        self.assert_made("made")

    def test_forward(self) -> None:
        """A step forward makes nothing early; a later one back is seen in full."""
        self.clock.callLater(2 * HOUR, self.made.append, "a")
        self.wall.step(3 * HOUR)
        self.wall.advance(0)
        self.assert_made()
        self.wall.step(-2 * HOUR)
        self.assertTrue(self.clock.compare())
        self.wall.pass_time(HOUR + HOUR / 2)
        self.wall.step(-HOUR)
        self.assertTrue(self.clock.compare())
        self.wall.pass_time(HOUR / 2)
        self.assert_made("a")

    def test_next_turn(self) -> None:
        """What is due in the reactor's next turn is so when the clock is set back just before it; it may be cancelled meanwhile."""
        self.clock.callLater(0, self.made.append, "made")
        self.wall.advance(0)
        calls = [self.clock.callLater(0, self.made.append, name) for name in "abc"]
        calls[1].cancel()
        self.wall.step(-HOUR)
        self.wall.advance(0)
        self.assert_made("made")
        self.assertTrue(self.clock.compare())
        self.wall.advance(0)
        self.assert_made("a", "c")
        del calls
        self.clock.callLater(0, int)
        self.assertEqual(len(self.clock._soon), 1)

    def test_order(self) -> None:
        """Calls are made in the order in which they are due, however they were moved; one that fails keeps no other from it."""

        def fail() -> None:
            raise ZeroDivisionError

        later = self.clock.callLater(1, self.made.append, "later")
        sooner = self.clock.callLater(9, self.made.append, "sooner")
        delayed = self.clock.callLater(3, self.made.append, "delayed")
        self.clock.callLater(4, fail)
        self.clock.callLater(4, self.made.append, "plain")
        later.reset(7)
        sooner.reset(2)
        delayed.delay(2)
        self.assertEqual(sooner.getTime(), self.clock.seconds() + 2)
        self.wall.pass_time(1)
        self.assert_made()
        self.wall.pass_time(7)
        self.assert_made("sooner", "plain", "delayed", "later")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.wall.getDelayedCalls(), [])

    def test_changed_meanwhile(self) -> None:
        """What a call cancels is not made, and what it adds or moves is made after those that are due already."""
        calls: list[Any] = []

        def first() -> None:
            cancelled, moved = calls
            cancelled.cancel()
            moved.reset(0)
            self.clock.callLater(0, self.made.append, "added")

        self.clock.callLater(1, first)
        calls += [self.clock.callLater(1, self.made.append, name) for name in ("cancelled", "moved")]
        self.clock.callLater(1, self.made.append, "due")
        self.wall.pass_time(1)
        self.assertEqual(self.made[0], "due")
        self.assertEqual(sorted(self.made[1:]), ["added", "moved"])

    def test_used_up(self) -> None:
        """A call that was made or cancelled says so, as the reactor's do."""
        made, cancelled = (self.clock.callLater(1, self.made.append, name) for name in "ab")
        self.assertTrue(made.active())
        cancelled.cancel()
        self.wall.pass_time(1)
        for call, error in ((made, AlreadyCalled), (cancelled, AlreadyCancelled)):
            self.assertFalse(call.active())
            self.assertRaises(error, call.cancel)
            self.assertRaises(error, call.reset, 1)
            self.assertRaises(error, call.delay, 1)
        self.assertRaises(AssertionError, self.clock.callLater, -1, self.made.append, "c")

    def test_many(self) -> None:
        """A step back costs no more with 100,000 pending; what was cancelled is not kept for long."""
        calls = [self.clock.callLater(10 + number % 7, int) for number in range(100_000)]
        self.wall.step(-HOUR)
        self.assertTrue(self.clock.compare())
        self.assertEqual(len(self.wall.getDelayedCalls()), 1)
        for call in calls[1:]:
            call.cancel()
        self.assertLess(len(self.clock._heap), 200)
        self.wall.pass_time(10)
        self.assertFalse(calls[0].active())
        self.assertEqual(self.wall.getDelayedCalls(), [])

    def test_drift(self) -> None:
        """A clock that is slewed is not a clock that was set."""
        self.clock.callLater(10, self.made.append, "a")
        (waking,) = self.wall.getDelayedCalls()
        self.wall.step(-0.4)
        self.assertFalse(self.clock.compare())
        self.assertEqual(self.wall.getDelayedCalls(), [waking])

    def test_stopped_while_reading(self) -> None:
        """A process that was stopped between the two readings has not seen a step."""
        self.clock.callLater(10, self.made.append, "a")
        (waking,) = self.wall.getDelayedCalls()
        times = iter([100.0, 160.0])
        self.clock.seconds = lambda: next(times)
        with mock.patch.object(self.wall, "rightNow", self.wall.rightNow - 60):
            self.assertFalse(self.clock.compare())
        self.assertEqual(self.wall.getDelayedCalls(), [waking])

    def test_seconds(self) -> None:
        """Its seconds never go back."""
        before = self.clock.seconds()
        self.wall.step(-HOUR)
        self.wall.pass_time(5)
        self.assertEqual(self.clock.seconds() - before, 5)

    def test_keeps_nothing(self) -> None:
        """A call that was made or cancelled is not kept, nor what it was to be made with."""

        class Thing:
            def use(self) -> None:
                pass

        things = [Thing(), Thing()]
        gone = [ref(thing) for thing in things]
        self.clock.callLater(1, things[0].use)
        self.clock.callLater(2, things[1].use).cancel()
        self.wall.pass_time(3)
        things.clear()
        gc.collect()
        self.assertEqual([one() for one in gone], [None, None])
        self.assertEqual(self.clock._heap, [])
        self.assertEqual(self.wall.getDelayedCalls(), [])

    def test_a_reactor(self) -> None:
        """It provides what the reactor provides, and is it, but for its time."""
        for interface in (IReactorTime, IReactorTCP):
            self.assertTrue(interface.providedBy(self.clock))
        self.clock.connectTCP("h", 1, ClientFactory())
        self.assertEqual(self.wall.tcpClients[0][:2], ("h", 1))
        real: Any = global_reactor
        self.assertTrue(IReactorPluggableNameResolver.providedBy(steady(real)))

    def test_which_reactors(self) -> None:
        """Only a reactor that runs on the wall clock needs it."""
        clock = Clock()
        self.assertIs(steady(clock), clock)
        self.assertIs(comparing(clock)(), False)
        real: Any = global_reactor
        self.assertIs(ReactorBase.seconds, runtime.seconds)
        self.assertIsInstance(steady(real), SteadyClock)

    def test_given_to_everything(self) -> None:
        """Every room, every connection and every endpoint of a client waits on it."""
        self.patch(WallClock, "seconds", runtime.seconds)
        for broker, backend in (("amqp://", "rpc://"), ("redis://", "redis://"), ("redis://", "rpc://")):
            app = Celery("client", broker=broker, backend=backend, set_as_current=False)
            engine: Any = TwistedCelery(app, reactor=WallClock()).engine
            self.assertIsInstance(engine.clock, SteadyClock)
            self.assertIs(engine.outbox._clock, engine.clock)
            self.assertIs(engine.source._clock, engine.clock)
            for keeper in engine.broker._keeper._siblings:
                self.assertIs(keeper._clock, engine.clock)
                self.assertIs(next(keeper._attempts)._reactor, engine.clock)


class WaitingTests(SteadyTestCase):
    """What stood still before."""

    def test_heartbeats(self) -> None:
        """AMQP: a heartbeat leaves when the server's arrives, and the next ones at their times; the server is not given up."""
        peer = Peer()
        peer.protocol._clock = self.clock
        peer.protocol._compare = comparing(self.clock)
        peer.open(heartbeat=60)
        self.wall.pass_time(20)
        self.wall.step(-HOUR)
        self.wall.pass_time(25)
        self.assertEqual(peer.names(), [])
        peer.protocol.dataReceived(frame(8, 0, b""))
        self.assertEqual(peer.names(), ["heartbeat"])
        for _ in range(20):
            self.wall.pass_time(30, slices=10)
            self.assertIn("heartbeat", peer.names())
            peer.protocol.dataReceived(frame(8, 0, b""))
        self.assertFalse(peer.transport.disconnecting)

    def test_without_heartbeats(self) -> None:
        """On an AMQP connection without heartbeats, none leaves."""
        peer = Peer(heartbeat=0)
        peer.protocol._compare = comparing(self.clock)
        peer.open(heartbeat=0)
        self.wall.step(-HOUR)
        peer.protocol.dataReceived(frame(8, 0, b""))
        self.assertEqual(peer.names(), [])

    def test_redis(self) -> None:
        """Redis: what arrives sets the looks at its life right again."""
        protocol = CommandProtocol(
            ConnectionConfig(url="redis://h", ping_interval=10, silence_timeout=20), self.clock
        )
        transport = StringTransport()
        protocol.makeConnection(transport)
        protocol.dataReceived(b"+PONG\r\n")
        transport.clear()
        answer = protocol.command("GET", "x")
        self.wall.step(-HOUR)
        protocol.dataReceived(b"$1\r\n1\r\n")
        self.assertEqual(self.successResultOf(answer), b"1")
        transport.clear()
        self.wall.pass_time(20, slices=8)
        self.assertIn(b"PING", transport.value())

    def test_backoff(self) -> None:
        """A keeper in its back-off tries in time, once anything at all is armed."""
        tries: list[Deferred[Any]] = []

        class Attempt:
            url = "amqp://h"

            def connect(self) -> Deferred[Any]:
                tries.append(Deferred())
                return tries[-1]

        attempt = Attempt()
        keeper: Keeper[Any] = Keeper(
            clock=self.clock,
            attempts=iter(lambda: attempt, None),
            round_size=1,
            connect_timeout=None,
            retry_policy=lambda failures: 10.0,
            on_connected=self.made.append,
            on_disconnected=self.made.append,
            on_round_failed=lambda _: None,
            name="test",
        )
        keeper.start()
        tries[0].errback(ServerUnreachable("no"))
        self.wall.step(-HOUR)
        self.clock.callLater(1, self.made.append, "anything")
        self.wall.pass_time(10)
        self.assertEqual(len(tries), 2)

    def test_outbox(self) -> None:
        """A call's timeout, and its patience, end in time."""

        class Broker:
            ready = connected = False
            url = "amqp://h"

            def listen(self, listener: Any) -> None:
                self.listener = listener

        broker: Any = Broker()
        outbox = Outbox(
            self.clock, broker, None, connect=lambda: None, limit=10, limit_bytes=1000, outage_wait=30
        )
        ends: dict[str, Any] = {}

        class Owner:
            def __init__(self, name: str) -> None:
                self.name = name

            def _sent(self, error: Exception | None) -> None:
                ends[self.name] = error

        for name, timeout in (("timeout", 5.0), ("patience", None)):
            message = Publish("", "q", b"", {}, {}, retry=True, timeout=timeout)
            outbox.submit(Unit([message], Owner(name)))
        broker.listener.broker_unavailable(ServerUnreachable("no"))
        self.wall.step(-HOUR)
        self.clock.compare()
        self.wall.pass_time(5)
        self.assertEqual({name: type(error) for name, error in ends.items()}, {"timeout": NotSent})
        broker.listener.broker_unavailable(ServerUnreachable("no"))
        self.wall.step(-HOUR)
        self.wall.pass_time(24)
        self.clock.compare()
        self.wall.pass_time(1.5, slices=15)
        broker.listener.broker_unavailable(ServerUnreachable("no"))
        self.assertEqual({type(error) for error in ends.values()}, {NotSent})
        self.assertEqual(len(ends), 2)
        outbox.close()
