"""The outbox: order, patience, bounds, outcomes. The broker and the result source are in the test's hand."""

from __future__ import annotations

from math import inf
from typing import Any

from kombu.utils import functional
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from tests.unit._fakes import FakeBroker, FakeSource
from twistedcelery._operations import Local, Publish, Write
from twistedcelery._outbox import Outbox
from twistedcelery._unit import Unit, patience_of
from twistedcelery.errors import (
    AuthenticationFailed,
    ConnectionLost,
    NotSent,
    OutboxFull,
    OutcomeUnknown,
    Refused,
    ServerUnreachable,
)

POLICY = {"max_retries": 3, "interval_start": 1, "interval_step": 0, "interval_max": 1}  # patience: 3 s


class Owner:
    def __init__(self):
        self.told = []

    def _sent(self, error):
        self.told.append(error)

    @property
    def outcome(self):
        (error,) = self.told
        return error


class OutboxTestCase(SynchronousTestCase):
    limit = 10

    broker: Any
    source: Any

    def setUp(self):
        self.clock: Any = Clock()
        self.broker = FakeBroker()
        self.source = FakeSource()
        self.outbox = self.make()

    def make(self, **settings):
        settings = {"limit": self.limit, "limit_bytes": 1000, **settings}
        return Outbox(self.clock, self.broker, self.source, connect=self.broker.connect, **settings)

    def message(self, name, **settings):
        settings = {"retry": True, "retry_policy": POLICY, "body": b"x", "task_id": name, **settings}
        return Publish("", name, properties={}, headers={}, **settings)

    def submit(self, *names, **settings):
        """Submit a call of one or more messages; returns its owner."""
        owner: Any = Owner()
        operations = [self.message(one, **settings) if isinstance(one, str) else one for one in names]
        owner.unit = Unit(operations, owner)
        self.outbox.submit(owner.unit)
        return owner

    def turn(self, seconds=0.0):
        """Let what is due be done; calls that are due at once may ask for more of them."""
        self.clock.advance(seconds)
        for _ in range(3):
            self.clock.advance(0)

    def assert_empty(self):
        outbox = self.outbox
        returned = [unit for _, unit in outbox._returned if not unit.done]
        tables = (outbox._queue, outbox._inflight, outbox._writing, returned, outbox._halted)
        self.assertEqual([bool(table) for table in tables], [False] * 5)
        self.assertEqual((outbox.count, outbox.bytes), (0, 0))
        self.turn(0.2)
        self.assertEqual(self.clock.getDelayedCalls(), [])


class OrderTests(OutboxTestCase):
    def test_pipelined(self):
        """Messages leave in the order of the calls, the next before the confirm of the one before."""
        self.broker.up()
        owners = [self.submit(name) for name in "abc"]
        self.assertEqual(self.broker.names, ["a", "b", "c"])
        self.assertEqual([owner.told for owner in owners], [[], [], []])
        self.broker.confirm("b")
        self.assertEqual([owner.told for owner in owners], [[], [None], []])
        self.broker.confirm()
        self.assertEqual([owner.told for owner in owners], [[None]] * 3)
        self.assert_empty()

    def test_waits_for_the_connection(self):
        """Calls made without a connection ask for one and leave in order when it is there."""
        for name in "abc":
            self.submit(name)
        self.assertEqual((self.broker.names, bool(self.broker.connects)), ([], True))
        self.broker.up()
        self.assertEqual(self.broker.names, ["a", "b", "c"])

    def test_full_buffer(self):
        """Where the transport's buffer is full nothing more is written until it has room."""
        self.broker.up()
        self.broker.room = 2
        for name in "abcd":
            self.submit(name)
        self.assertEqual(self.broker.names, ["a", "b"])
        self.broker.up()
        self.assertEqual(self.broker.names, ["a", "b", "c", "d"])

    def test_large_call_in_slices(self):
        """A call of many messages leaves for 2 ms at a time; what is called meanwhile leaves behind it, in order."""
        self.outbox = self.make(limit=1000)
        self.broker.up()
        publish = self.broker.publish

        def take(message):
            self.clock.rightNow += 0.0001
            publish(message)

        self.broker.publish = take
        owner = self.submit(*[str(number) for number in range(100)])
        last = self.submit("last")
        self.assertLessEqual(len(self.broker.names), 40)
        self.assertGreaterEqual(len(self.broker.names), 20)
        for _ in range(5):
            self.clock.advance(0)
        self.assertEqual(self.broker.names, [*map(str, range(100)), "last"])
        self.broker.confirm()
        self.assertEqual((owner.outcome, last.outcome), (None, None))
        self.assert_empty()

    def test_large_call_cut_midway(self):
        """Where the connection is lost between two slices, the call begins again with what has no confirm."""
        self.outbox = self.make(limit=1000)
        self.broker.up()
        self.broker.room = 30
        owner = self.submit(*[str(number) for number in range(100)])
        self.broker.confirm(*map(str, range(10)))
        self.broker.lose()
        self.broker.up()
        for _ in range(5):
            self.clock.advance(0)
        self.assertEqual(self.broker.names, [str(number) for number in range(10, 100)])
        self.broker.confirm()
        self.assertIsNone(owner.outcome)
        self.assert_empty()

    def test_reserved(self):
        """A place that is kept holds those behind it until it is filled, or given up."""
        self.broker.up()
        kept: Any = Owner()
        unit = Unit([], kept)
        self.outbox.reserve(unit)
        last = self.submit("last")
        self.assertEqual(self.broker.names, [])
        self.outbox.fill(unit, [self.message("first")])
        self.assertEqual(self.broker.names, ["first", "last"])
        self.broker.confirm()
        unit = Unit([], kept)
        self.outbox.reserve(unit)
        last = self.submit("last")
        self.assertTrue(unit.withdraw())
        self.turn()
        self.assertEqual(self.broker.names, ["last"])
        self.broker.confirm()
        self.assertEqual((kept.told, last.outcome), ([None], None))
        self.outbox.fill(unit, [self.message("too late")])
        self.assert_empty()

    def test_declaration_holds_those_behind(self):
        """A declaration on its way holds the calls behind its own, as they might need the same."""
        self.broker.up()
        self.broker.undeclared.add("b")
        for name in "abc":
            self.submit(name)
        self.assertEqual(self.broker.names, ["a"])
        self.broker.declaring.pop()(None)
        self.turn()
        self.assertEqual(self.broker.names, ["a", "b", "c"])

    def test_refused_after_a_loss(self):
        """What has left once, and whose declaration is refused the next time, may have arrived."""
        self.broker.up()
        owner = self.submit("a")
        self.broker.lose()
        self.broker.undeclared.add("a")
        self.broker.up()
        self.turn()
        self.broker.declaring.pop()(Refused("404 gone", code=404))
        self.assertIsInstance(owner.outcome, OutcomeUnknown)
        self.assertIsInstance(owner.outcome.__cause__, Refused)
        self.assert_empty()

    def test_bug_below(self):
        """What a room below raises fails its own call; those behind it go on, and nothing is left."""
        for name in ("prepare", "publish"):
            self.broker.up()
            room = getattr(self.broker, name)

            def rough(message, *rest, room=room):
                if message.routing_key == "bad":
                    raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
                return room(message, *rest)

            setattr(self.broker, name, rough)
            owners = [self.submit(one) for one in ("a", "bad", "b")]
            self.turn()
            self.assertEqual(self.broker.names, ["a", "b"])
            self.broker.confirm()
            self.assertIsInstance(owners[1].outcome, UnicodeEncodeError)
            self.assertEqual((owners[0].outcome, owners[2].outcome), (None, None))
            self.assert_empty()

    def test_write_alone(self):
        """A write that belongs to no message is tried again by the policy for writes; when it is lost, nobody knows."""
        self.outbox = self.make(write_policy=POLICY)
        self.broker.up()
        owner = self.submit(Write([("SET", "a", "b")]))
        (_, done) = self.source.writes.pop()
        done(ConnectionLost("cut"))
        self.turn(0.2)
        (_, done) = self.source.writes.pop()
        done(None)
        self.assertIsNone(owner.outcome)
        owner = self.submit(Write([("SET", "a", "b")]))
        for _ in range(40):
            (_, done) = self.source.writes.pop()
            done(ConnectionLost("cut"))
            if owner.told:
                break
            self.turn(0.1)
        self.assertIsInstance(owner.outcome, OutcomeUnknown)
        self.assertNotIn("task", str(owner.outcome))
        self.assert_empty()

    def test_write_before_a_message(self):
        """A call that begins with a write has the patience of the more patient policy of the two."""
        self.outbox = self.make(write_policy=POLICY)
        owner = self.submit(Write([("SET", "a", "b")]), self.message("a", retry_policy={"max_retries": 0}))
        other = self.submit(self.message("b", retry_policy={"max_retries": 0}))
        self.broker.fail()
        self.turn(0.1)
        self.assertIsInstance(other.outcome, NotSent)
        self.assertEqual(owner.told, [])
        self.turn(4)
        self.broker.fail()
        self.turn(0.1)
        self.assertIsInstance(owner.outcome, NotSent)
        self.assert_empty()

    def test_refused_declaration(self):
        """A declaration that is refused fails its own call; the others go on, none twice."""
        self.broker.up()
        self.broker.undeclared.add("b")
        owners = [self.submit(name) for name in "abc"]
        self.broker.declaring.pop()(Refused("406 no", code=406))
        self.turn()
        self.assertIsInstance(owners[1].outcome, Refused)
        self.assertEqual(owners[1].outcome.task_id, "b")
        self.assertEqual(self.broker.names, ["a", "c"])

    def test_declared_again_after_a_reconnect(self):
        """What was declared on a connection that is lost before the message left is declared on the next."""
        self.broker.up()
        self.broker.undeclared.add("a")
        self.submit("a")
        self.broker.declaring.pop()(None)
        self.broker.lose()
        self.broker.up()
        self.turn()
        self.assertEqual((self.broker.names, len(self.broker.declaring)), ([], 1))

    def test_reply_queue_first(self):
        """A call that expects a result waits until its result can be received."""
        self.source.ready = False
        self.broker.up()
        self.submit("a")
        self.assertEqual(self.broker.names, [])
        self.source.ready = True
        self.source.waiting.pop()(None)
        self.turn()
        self.assertEqual(self.broker.names, ["a"])

    def test_order_after_a_loss(self):
        """Messages that a connection was lost under leave again before those that were called later."""
        self.broker.up()
        for name in "abc":
            self.submit(name)
        self.broker.confirm("b")
        self.broker.lose()
        self.submit("d")
        self.broker.up()
        self.submit("e")
        self.turn()
        self.assertEqual(self.broker.names, ["a", "c", "d", "e"])

    def test_group_in_one_piece(self):
        """The messages of a call leave together, and it is done with the last confirm; only lost ones leave again."""
        self.broker.up()
        owner = self.submit("a", "b", "c")
        self.broker.confirm("b")
        self.assertEqual(owner.told, [])
        self.broker.lose()
        self.broker.up()
        self.turn()
        self.assertEqual(self.broker.names, ["a", "c"])
        self.broker.confirm()
        self.assertEqual(owner.told, [None])
        self.assert_empty()

    def test_write_precedes(self):
        """A backend write is answered before the message behind it leaves; calls behind it do not wait."""
        self.broker.up()
        owner = self.submit(Write([("SET",)]), "a")
        self.submit("b")
        self.assertEqual(self.broker.names, ["b"])
        (_, done) = self.source.writes.pop()
        done(None)
        self.turn()
        self.assertEqual(self.broker.names, ["b", "a"])
        self.broker.confirm()
        self.assertEqual(owner.told, [None])
        self.assert_empty()

    def test_write_while_a_message_is_lost(self):
        """A message lost while a later write of its call is under way leaves again after that, once; the write too is done once."""
        self.broker.up()
        owner = self.submit("a", Write([("SET",)]), "b")
        self.assertEqual(self.broker.names, ["a"])
        self.broker.lose()
        self.broker.up()
        self.turn()
        self.assertEqual(self.broker.names, [])
        (_, done) = self.source.writes.pop()
        done(None)
        self.turn()
        self.assertEqual((self.broker.names, self.source.writes), (["a", "b"], []))
        self.broker.confirm()
        self.assertEqual(owner.told, [None])
        self.assert_empty()

    def test_write_fails(self):
        """A write that the backend refuses fails the call; one that was lost is tried again."""
        self.broker.up()
        owner = self.submit(Write([("SET",)]), "a")
        self.source.writes.pop()[1](ConnectionLost("cut"))
        self.turn(0.2)
        self.source.writes.pop()[1](Refused("OOM"))
        self.assertIsInstance(owner.outcome, NotSent)
        self.assertIn("OOM", str(owner.outcome))
        self.assert_empty()


class PatienceTests(OutboxTestCase):
    def test_patience_is_kombus(self):
        """The patience of a policy is the time that kombu's own retry sleeps with it."""
        for policy in (
            {"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 1},
            {"max_retries": 9, "interval_start": 0, "interval_step": 0.3, "interval_max": 1},
            {"max_retries": 1},
        ):
            slept: list[float] = []
            self.patch(functional, "sleep", slept.append)

            def fail():
                raise OSError

            arguments = {
                "interval_step": 0.2,
                "interval_max": 0.2,
                "interval_start": 0,
                "max_retries": 3,
                **policy,
            }
            with self.assertRaises(OSError):
                functional.retry_over_time(fail, OSError, **arguments)
            self.assertAlmostEqual(patience_of(policy), sum(slept))
        self.assertEqual(patience_of(None), 0)
        # Before 5.7 kombu's intervals went beyond interval_max by interval_start.
        self.assertEqual(patience_of({"max_retries": 4, "interval_start": 1, "interval_max": 1}), 4)
        self.assertEqual(patience_of({"max_retries": None}), inf)
        self.assertEqual(patience_of({"max_retries": 0}), 0)
        self.assertGreater(patience_of({"max_retries": 10**9}), 10**8)

    def test_not_sent(self):
        """A call fails when its patience is over and every server was tried in vain since, not earlier."""
        owner = self.submit("a")
        self.turn(2)
        self.broker.fail()
        self.turn(0.9)
        self.assertEqual(owner.told, [])
        self.turn(0.2)
        self.assertIsInstance(owner.outcome, NotSent)
        self.assertIsInstance(owner.outcome.__cause__, ServerUnreachable)
        self.assertEqual(owner.outcome.task_id, "a")
        self.assert_empty()

    def test_no_round_yet(self):
        """As long as no round of attempts has failed, a call waits, also past its patience."""
        owner = self.submit("a")
        self.turn(10)
        self.assertEqual(owner.told, [])
        self.broker.up()
        self.assertEqual(self.broker.names, ["a"])

    def test_outage_wait(self):
        """``outage_wait`` is the least patience, and none for a call that may not be retried."""
        self.outbox = self.make(outage_wait=60)
        patient, once = self.submit("a"), self.submit("b", retry=False)
        self.broker.fail()
        self.assertIsInstance(once.outcome, NotSent)
        self.turn(50)
        self.broker.fail()
        self.assertEqual(patient.told, [])
        self.turn(20)
        self.broker.fail()
        self.assertIsInstance(patient.outcome, NotSent)
        self.assert_empty()

    def test_permanent(self):
        """Where no attempt can help, all that wait fail at once, also while others are being looked at."""
        self.outbox = self.make(limit=10_000, limit_bytes=10**6)
        slow = [self.submit(f"m{number}", retry_policy={"max_retries": None}) for number in range(5)]
        # A clock that advances while the outbox looks, so that it looks in slices.
        now = self.clock.seconds

        def seconds():
            self.clock.rightNow += 0.003
            return now()

        self.clock.seconds = seconds
        self.broker.fail()
        self.broker.fail(AuthenticationFailed("wrong password"))
        del self.clock.seconds
        self.turn(0.1)
        self.turn(0.1)
        self.assertEqual([type(owner.outcome) for owner in slow], [NotSent] * 5)
        self.assertIsInstance(slow[0].outcome.__cause__, AuthenticationFailed)
        self.assert_empty()

    def test_every_round_counts(self):
        """A call that was made between two rounds fails when its patience is over, not at the round after that."""
        self.outbox = self.make(outage_wait=6)
        first = self.submit("first")
        self.broker.fail()
        self.turn(1)
        owner = self.submit("a")
        self.turn(4)
        self.broker.fail()
        self.turn(1.8)
        self.assertEqual((len(first.told), owner.told), (1, []))
        self.turn(0.3)
        self.assertIsInstance(owner.outcome, NotSent)
        self.assert_empty()

    def test_many(self):
        """However long it takes to tell all that wait, each is told, soon after its patience is over."""
        self.outbox = self.make(limit=10_000, limit_bytes=10**6)
        late = []

        class Slow(Owner):
            def __init__(self, clock, due):
                self.clock = clock
                self.due = due

            def _sent(self, error):
                self.clock.rightNow += 0.001
                late.append(self.clock.rightNow - self.due)

        # Called over ten seconds, three of patience; the broker is tried each half second, which is told in some slices.
        for tenth in range(100):
            for _ in range(40):
                owner: Any = Slow(self.clock, self.clock.rightNow + 3)
                self.outbox.submit(Unit([self.message("a")], owner))
            if tenth % 5 == 0:
                self.broker.fail()
            self.clock.advance(0.1)
        for _ in range(10):
            self.broker.fail()
            self.turn(0.5)
        self.assertEqual(len(late), 4000)
        self.assertLess(max(late), 1)
        self.assert_empty()

    def test_back_after_the_last_word(self):
        """What comes back when the broker rests, as no attempt could help, asks for another, and has its answer."""
        self.broker.up()
        for lost in (False, True):
            forever = {"max_retries": None}
            owner = self.submit(Write([("SET",)]), self.message("a", retry_policy=forever))
            other = self.submit("b", retry_policy=forever)
            self.broker.ready = self.broker.connected = False
            self.broker.fail(AuthenticationFailed("no"))
            self.turn(1)
            connects = self.broker.connects
            self.source.writes.pop()[1](None)
            if lost:
                self.broker.outcome(self.broker.published[-1], ConnectionLost("cut"))
            self.turn()
            self.assertEqual(self.broker.connects, connects + 1)
            self.broker.fail(AuthenticationFailed("no"))
            self.turn()
            self.assertIsInstance(owner.outcome, NotSent)
            if lost:
                self.assertIsInstance(other.outcome, OutcomeUnknown)
            else:
                self.broker.up()
                self.broker.confirm()
        self.assert_empty()

    def test_called_again_at_once(self):
        """A call that is made again as soon as it fails is looked at when its turn comes, not in the same turn for ever."""
        told = []

        class Again:
            def _sent(owner, error):  # noqa: N805  # the test is self
                told.append(error)
                if len(told) < 1000:
                    self.outbox.submit(Unit([self.message("a")], owner))

        # As where there is no way to reach the broker at all.
        self.broker.connect = lambda: self.broker.fail(AuthenticationFailed("no"))
        self.outbox = self.make()
        self.outbox.submit(Unit([self.message("a")], Again()))
        self.assertLess(len(told), 3)
        self.turn(1)
        self.assertEqual(len(told), 1000)
        self.assert_empty()

    def test_writes_leave_no_timers(self):
        """A write that is tried for a long time is one timer, not one for each time."""
        self.broker.up()
        owner = self.submit(Write([("SET",)]), self.message("a", retry_policy={"max_retries": None}))
        for _ in range(100):
            self.source.writes.pop()[1](ConnectionLost("cut"))
            self.turn(0.1)
        self.assertLess(len(owner.unit.timers), 3)
        owner.unit.withdraw()
        self.assert_empty()

    def test_sent_back(self):
        """A broker that takes work and gives it back at once is not asked again in the same turn, nor for ever."""
        self.broker.up()
        tries = []

        def give_back(message):
            tries.append(self.clock.rightNow)
            self.outbox.published(message, NotSent("not now"))

        self.broker.publish = give_back
        owner = self.submit("a")
        while not owner.told:
            before = len(tries)
            self.clock.advance(0.1)
            self.assertLess(len(tries) - before, 3)
        self.assertIsInstance(owner.outcome, NotSent)
        self.assertLess(self.clock.rightNow, 4)
        self.assert_empty()

    def test_outage_after_a_long_block(self):
        """A call that waited long behind a blocked broker has its whole patience when that goes away."""
        self.broker.connected = True
        owner = self.submit("a")
        self.turn(100)
        self.broker.connected = False
        self.broker.fail()
        self.assertEqual(owner.told, [])
        self.turn(2.9)
        self.assertEqual(owner.told, [])
        self.turn(0.2)
        self.assertIsInstance(owner.outcome, NotSent)
        self.assert_empty()

    def test_ready_ends_looking(self):
        """A broker that comes back saves all that have not failed by then."""
        owner = self.submit("a")
        self.turn(2.8)
        self.broker.fail()
        self.broker.up()
        self.turn(10)
        self.assertEqual((self.broker.names, owner.told), (["a"], []))

    def test_outcome_unknown(self):
        """A call that the connection was lost under and that cannot be tried again has an unknown outcome."""
        self.broker.up()
        owner = self.submit("a")
        self.broker.lose()
        self.turn(1)
        self.broker.fail()
        self.assertEqual(owner.told, [])
        self.turn(4)
        self.broker.fail()
        self.assertIsInstance(owner.outcome, OutcomeUnknown)
        self.assert_empty()

    def test_no_retry(self):
        """A call that may not be retried never leaves twice."""
        self.broker.up()
        owner = self.submit("a", retry=False)
        self.broker.lose()
        self.assertIsInstance(owner.outcome, OutcomeUnknown)
        self.broker.up()
        self.turn()
        self.assertEqual(self.broker.names, [])
        self.assert_empty()

    def test_nothing_left(self):
        """A message that the broker did not write is as good as new: not sent, not unknown."""
        self.broker.up()
        owner = self.submit("a", retry=False)
        self.broker.outcome(self.broker.published[0], NotSent("closing"))
        self.assertIs(type(owner.outcome), NotSent)
        self.assert_empty()

    def test_server_that_drops_connections(self):
        """A server that takes the connection and drops it under the message each time is not tried for ever."""
        owner = self.submit("a")
        losses = 0
        while not owner.told and losses < 100:
            self.broker.up()
            self.turn(0.5)
            self.broker.lose()
            losses += 1
        self.assertIsInstance(owner.outcome, OutcomeUnknown)
        self.assertLess(losses, 12)
        self.assert_empty()

    def test_source_is_away(self):
        """A result source that cannot be reached is asked again until the patience is over."""
        self.source.ready = False
        self.broker.up()
        owner = self.submit("a")
        asked = 0
        while not owner.told and asked < 100:
            self.source.waiting.pop()(ConnectionLost("no results"))
            self.turn(0.2)
            asked += 1
        self.assertIsInstance(owner.outcome, NotSent)
        self.assertIn("no results", str(owner.outcome))
        self.assertGreater(asked, 10)
        self.assert_empty()

    def test_timeout(self):
        """``timeout`` bounds the time until the message leaves, whatever holds it."""
        self.broker.connected = True
        owner = self.submit("a", timeout=5)
        self.turn(4.9)
        self.assertEqual(owner.told, [])
        self.turn(0.1)
        self.assertIs(type(owner.outcome), NotSent)
        self.assert_empty()

    def test_timeout_ends_a_halt(self):
        """A call that times out while its declaration is under way lets those behind it go."""
        self.broker.up()
        self.broker.undeclared.add("a")
        owner = self.submit("a", timeout=5)
        self.submit("b")
        self.turn(5)
        self.assertIs(type(owner.outcome), NotSent)
        self.assertEqual(self.broker.names, ["b"])
        self.broker.declaring.pop()(None)
        self.turn()
        self.assertEqual((self.broker.names, len(owner.told)), (["b"], 1))

    def test_timeout_after_it_left(self):
        """``timeout`` does not count once the message has left; ``confirm_timeout`` does."""
        self.broker.up()
        owner = self.submit("a", timeout=5, confirm_timeout=8)
        self.turn(7)
        self.assertEqual(owner.told, [])
        self.turn(1)
        self.assertIs(type(owner.outcome), OutcomeUnknown)
        self.broker.confirm()
        self.assertEqual(len(owner.told), 1)
        self.assert_empty()

    def test_timeout_of_a_group(self):
        """Where a part has left, what became of the call is unknown when its ``timeout`` is over."""
        self.broker.up()
        self.broker.room = 1
        owner = self.submit("a", "b", timeout=5)
        self.turn(5)
        self.assertIs(type(owner.outcome), OutcomeUnknown)
        self.broker.confirm()
        self.assert_empty()

    def test_timeout_before_a_loss(self):
        """A message that is lost after its ``timeout`` does not leave again."""
        self.broker.up()
        owner = self.submit("a", timeout=5, retry_policy={**POLICY, "max_retries": None})
        self.turn(5)
        self.assertEqual(owner.told, [])
        self.broker.lose()
        self.turn()
        self.assertIs(type(owner.outcome), OutcomeUnknown)
        self.broker.up()
        self.assertEqual(self.broker.names, [])
        self.assert_empty()

    def test_timeout_after_a_loss(self):
        """One that waits for its next turn when its ``timeout`` is over does not leave again either."""
        self.broker.up()
        owner = self.submit("a", timeout=5, retry_policy={**POLICY, "max_retries": None})
        self.broker.lose()
        self.turn(5)
        self.assertIs(type(owner.outcome), OutcomeUnknown)
        self.broker.up()
        self.assertEqual(self.broker.names, [])
        self.assert_empty()

    def test_confirm_timeout_of_a_group(self):
        """``confirm_timeout`` is each message's own: one that is confirmed in time does not fail a call that is blocked."""
        self.broker.up()
        self.broker.room = 1
        owner = self.submit("a", "b", confirm_timeout=8)
        self.broker.confirm("a")
        self.turn(9)
        self.assertEqual(owner.told, [])
        self.broker.up()
        self.turn(8)
        self.assertIs(type(owner.outcome), OutcomeUnknown)
        self.assert_empty()

    def test_confirm_in_time(self):
        """A confirm in time leaves no timer behind."""
        self.broker.up()
        owner = self.submit("a", timeout=5, confirm_timeout=8)
        self.broker.confirm()
        self.assertEqual(owner.told, [None])
        self.assert_empty()


class BoundTests(OutboxTestCase):
    def test_count(self):
        """Past the bound in messages a call is refused at once; a confirm makes room."""
        self.broker.up()
        owners = [self.submit(f"m{number}") for number in range(10)]
        refused = self.submit("over")
        self.assertIsInstance(refused.outcome, OutboxFull)
        self.assertIn("outbox_limit", str(refused.outcome))
        self.broker.confirm("m0")
        self.assertEqual(self.submit("again").told, [])
        self.assertEqual(owners[0].told, [None])

    def test_bytes(self):
        """So it is past the bound in bytes; but one that is alone is taken, however big."""
        big = self.submit("big", body=b"x" * 5000)
        self.assertIsInstance(self.submit("small").outcome, OutboxFull)
        big.unit.withdraw()
        self.assertEqual(self.submit("small").told, [])

    def test_withdraw(self):
        """A call of which nothing has left can be withdrawn; later it cannot."""
        owner = self.submit("a")
        self.assertTrue(owner.unit.withdraw())
        self.assertFalse(owner.unit.withdraw())
        self.assertEqual(owner.told, [])
        self.broker.up()
        self.assertEqual(self.broker.names, [])
        other = self.submit("b")
        self.assertFalse(other.unit.withdraw())
        self.broker.confirm()
        self.assert_empty()

    def test_withdraw_while_halted(self):
        """Withdrawing the call that holds the others lets them go."""
        self.broker.up()
        self.broker.undeclared.add("a")
        owner = self.submit("a")
        self.submit("b")
        self.assertTrue(owner.unit.withdraw())
        self.turn()
        self.assertEqual(self.broker.names, ["b"])

    def test_no_operations(self):
        """A call without messages, an empty group, is done at once."""
        self.assertEqual(self.submit().told, [None])
        self.assert_empty()


class AfterTests(OutboxTestCase):
    def test_after_the_confirm(self):
        """What follows a confirm runs after it; its event is published then."""
        ran = []
        event = self.message("event", task_id=None)
        message = self.message("a", after=[Local(lambda: ran.append("after")), event])
        self.broker.up()
        owner = self.submit(message)
        self.assertEqual(ran, [])
        self.broker.confirm("a")
        self.assertEqual((ran, owner.told, self.broker.names), (["after"], [None], ["event"]))
        self.broker.confirm()
        self.assert_empty()

    def test_not_after_a_failure(self):
        """Nothing follows a message that was refused."""
        ran = []
        self.broker.up()
        self.submit(self.message("a", after=[Local(lambda: ran.append("after"))]))
        self.broker.outcome(self.broker.published[0], Refused("no"))
        self.assertEqual(ran, [])

    def told(self):
        """Return messages that tell of their failures, and what they tell."""
        told: list[Any] = []
        messages = [
            self.message(name, failed=lambda exception, name=name: told.append((name, type(exception))))
            for name in "abc"
        ]
        return messages, told

    def test_failures(self):
        """Each message of a call that fails is told of once, those on the way when they have their own outcome."""
        messages, told = self.told()
        self.broker.up()
        self.broker.room = 2
        self.submit(*messages)
        self.broker.outcome(messages[0], None)
        self.broker.outcome(messages[1], Refused("no"))
        self.assertEqual(told, [("b", Refused), ("c", Refused)])
        messages, told = self.told()
        self.broker.up()
        self.submit(*messages)
        self.broker.outcome(messages[2], Refused("no"))
        self.broker.outcome(messages[0], None)
        self.broker.lose()
        self.assertEqual(told, [("c", Refused), ("b", ConnectionLost)])
        self.assert_empty()

    def test_bug_below_fails_messages(self):
        """A message that the room below raises for, and what stands behind it, are told of."""
        messages, told = self.told()
        self.broker.up()
        publish = self.broker.publish

        def rough(message):
            if message is messages[1]:
                raise UnicodeError
            publish(message)

        self.broker.publish = rough
        self.submit(*messages)
        self.assertEqual(told, [("b", UnicodeError), ("c", UnicodeError)])
        self.broker.confirm()
        self.assertEqual(len(told), 2)
        self.assert_empty()

    def test_refused_at_once(self):
        """A message that is refused while it is handed out is told of, and those behind it leave in the same turn."""
        messages, told = self.told()
        publish = self.broker.publish

        def picky(message):
            if message is messages[1]:
                self.outbox.published(message, Refused("no"))
            else:
                publish(message)

        self.broker.publish = picky
        for message in messages:
            self.submit(message)
        self.broker.up()
        self.assertEqual((self.broker.names, told), (["a", "c"], [("b", Refused)]))
        self.broker.confirm()
        self.assert_empty()

    def test_failures_lost_and_waiting(self):
        """What waits to be sent again, and what was never sent, are told of with what the call fails with; once."""
        messages, told = self.told()
        self.broker.up()
        self.broker.room = 2
        self.submit(*messages)
        self.broker.lose()
        self.broker.fail()
        self.turn(4)
        self.broker.fail()
        self.turn(1)
        self.assertEqual(sorted(told), [(name, OutcomeUnknown) for name in "abc"])
        self.assert_empty()

    def test_late_confirm(self):
        """A confirm that comes when its call has failed tells of its message all the same; its event is not sent once all is closed."""
        ran: list[Any] = []
        after: list[Any] = [Local(lambda: ran.append("after")), self.message("event", task_id=None)]
        for closed in (False, True):
            self.broker.up()
            owner = self.submit(self.message("a", confirm_timeout=1, after=[*after]))
            self.turn(1)
            self.assertIsInstance(owner.outcome, OutcomeUnknown)
            if closed:
                self.outbox.close()
            self.broker.confirm("a")
            self.assertEqual((ran.pop(), self.broker.names), ("after", [] if closed else ["event"]))
            self.broker.confirm()
        self.assert_empty()

    def test_failure_raises(self):
        """An error in what is told of a failure is logged, and nobody else misses anything."""
        message = self.message("a", failed=lambda exception: 1 / 0)
        self.broker.up()
        owner = self.submit(message)
        self.broker.outcome(message, Refused("no"))
        self.assertIsInstance(owner.outcome, Refused)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_large_failure_in_slices(self):
        """Of many messages that fail at once is told in slices."""
        self.outbox = self.make(limit=1000)
        told: list[Any] = []

        def failed(exception):
            told.append(exception)
            self.clock.rightNow += 0.001

        owner = self.submit(*[self.message(str(number), failed=failed) for number in range(100)])
        self.assertTrue(owner.unit.withdraw())
        self.assertLess(len(told), 10)
        for _ in range(50):
            self.clock.advance(0)
        self.assertEqual(len(told), 100)

    def test_receiver_raises(self):
        """An error in a receiver is logged; the call is sent all the same."""
        self.broker.up()
        owner = self.submit(self.message("a", after=[Local(lambda: 1 / 0)]))
        self.broker.confirm()
        self.assertEqual(owner.told, [None])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_lost_event(self):
        """An event that cannot be sent is logged and forgotten."""
        events: Any = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        self.broker.up()
        self.submit(self.message("a", after=[self.message("event", task_id=None)]))
        self.broker.confirm("a")
        self.broker.outcome(self.broker.published[0], Refused("no"))
        self.assertIn("task-sent", str([event["log_format"] for event in events]))
        self.assert_empty()

    def test_settled_by_its_result(self):
        """A task that has run has arrived: its message is not sent again, its owner not told, its confirm ignored."""
        ran = []
        self.broker.up()
        owner = self.submit(self.message("a", after=[Local(lambda: ran.append("after"))]))
        (message,) = self.broker.published
        owner.unit.settle()
        self.assertEqual((owner.told, ran), ([], ["after"]))
        self.broker.outcome(message, ConnectionLost("cut"))
        self.turn()
        self.assertEqual((self.broker.names, ran), ([], ["after"]))
        self.assert_empty()


class StopTests(OutboxTestCase):
    def test_flush(self):
        """A flush fires when everything has its outcome, after the owners were told."""
        order = []
        self.broker.up()
        owner = self.submit("a")
        owner._sent = lambda error: order.append("owner")
        self.outbox.flush(10).addCallback(lambda _: order.append("flushed"))
        self.assertEqual(order, [])
        self.broker.confirm()
        self.assertEqual(order, ["owner", "flushed"])
        self.outbox.close()
        self.assert_empty()

    def test_flush_of_nothing(self):
        """With nothing on its way a flush fires at once, also where units that are done wait to be put back."""
        self.successResultOf(self.outbox.flush(10))
        self.broker.up()
        owner = self.submit("a")
        unit = owner.unit
        self.broker.lose()
        unit.settle()
        self.successResultOf(self.outbox.flush(10))
        self.outbox.close()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_flush_late(self):
        """What has no outcome when a flush is over fails: not sent, or unknown."""
        self.broker.up()
        self.broker.room = 1
        owners = [self.submit("a"), self.submit("b")]
        flushed = self.outbox.flush(10)
        self.turn(10)
        self.successResultOf(flushed)
        self.assertEqual([type(owner.outcome) for owner in owners], [OutcomeUnknown, NotSent])
        self.outbox.close()
        self.assert_empty()

    def test_flush_late_with_many(self):
        """Many are given up in slices."""
        self.outbox = self.make(limit=1000)
        owners = [self.submit(str(number)) for number in range(100)]
        told = 0

        def tell(error):
            nonlocal told
            told += 1
            self.clock.rightNow += 0.0001

        for owner in owners:
            owner._sent = tell
        flushed = self.outbox.flush(10)
        turns = []
        call_later = self.clock.callLater

        def count(delay, *call):
            turns.append(told)
            return call_later(delay, *call)

        self.clock.callLater = count
        self.clock.advance(10)
        self.successResultOf(flushed)
        self.assertGreaterEqual(len(turns), 3)
        self.assertEqual(told, 100)
        self.outbox.close()
        self.assert_empty()

    def test_flush_with_a_withdrawal(self):
        """Withdrawing the last call ends a flush."""
        owner = self.submit("a")
        flushed = self.outbox.flush(10)
        owner.unit.withdraw()
        self.successResultOf(flushed)

    def test_closed(self):
        """After the close nothing is begun: no timer is left, whatever the connections say last."""
        self.broker.up()
        self.broker.undeclared.add("a")
        self.submit("a")
        self.outbox.flush(1)
        self.turn(1)
        self.outbox.close()
        self.broker.declaring.pop()(ConnectionLost("closed"))
        self.broker.fail()
        self.assertEqual(self.clock.getDelayedCalls(), [])
