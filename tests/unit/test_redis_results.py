"""Results in Redis: nothing is missed, nothing is left behind, and what cannot be known is said."""

from __future__ import annotations

import json
import zlib
from typing import Any
from unittest import skipIf

import celery
from celery.backends import base
from celery.exceptions import ImproperlyConfigured
from twisted.internet import error as internet_error
from twisted.internet.defer import CancelledError
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from tests.support.redis_peer import array, bulk, push
from tests.support.redis_wires import Store, Wires
from tests.support.threads import ThreadedClock
from twistedcelery import _inflate
from twistedcelery._operations import Write
from twistedcelery._rooms import backend_patience
from twistedcelery.errors import (
    AuthenticationFailed,
    ConnectionLost,
    NotSent,
    Refused,
    ResultNotKept,
    ServerUnreachable,
    Stopped,
)
from twistedcelery.redis.protocol import CommandProtocol, SubscriberProtocol
from twistedcelery.redis.replies import CommandRefused, NotMaster
from twistedcelery.redis.results import RedisResults

PREFIX = b"celery-task-meta-"
#: A retry policy of 0.4 s in all.
BRIEF = {"max_retries": 2, "interval_start": 0.2, "interval_step": 0, "interval_max": 0.2}
NOPERM = b"-NOPERM No permissions to access a channel\r\n"


def state(task_id="1", status="SUCCESS", result: Any = 3):
    return json.dumps({"status": status, "result": result, "traceback": None, "task_id": task_id}).encode()


class Listener:
    def __init__(self):
        self.metas: list[Any] = []
        self.failures: list[Any] = []
        self.lost: list[Exception] = []

    def meta_received(self, meta, size=0):
        self.metas.append((meta["task_id"], meta["status"], meta["result"]))
        if meta["status"] == "SUCCESS":
            self.results.unwatch(meta["task_id"])

    def result_failed(self, task_id, error):
        self.failures.append((task_id, error))
        self.results.unwatch(task_id)

    def results_lost(self, error):
        self.lost.append(error)

    results: RedisResults


class ResultsCase(SynchronousTestCase):
    def setUp(self):
        self.wires = Wires()
        self.clock = self.wires.clock = ThreadedClock()
        self.patch(_inflate, "in_thread", self.clock.in_thread)
        self.store: Store = self.wires.store
        self.make()
        self.logged: list[str] = []

        def take(event):
            if event["log_namespace"].startswith("twistedcelery.redis"):
                self.logged.append(event["log_format"])

        observe: Any = take
        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)

    def make(self, **conf):
        app = celery.Celery(
            "proj", broker="redis://10.0.0.1", backend="redis://10.0.0.1", set_as_current=False
        )
        app.conf.update(conf)
        self.listener = Listener()
        self.results = RedisResults(
            self.wires.clock,
            self.wires.attempts(CommandProtocol),
            self.wires.attempts(SubscriberProtocol),
            1,
            None,
            lambda failures: 0.2,
            backend=app.backend,
            patience=backend_patience(app.backend),
            inflate_limit=1_000_000,
        )
        self.results.listen(self.listener)
        self.listener.results = self.results

    @property
    def commands(self):
        return self.wires.of(CommandProtocol)

    @property
    def subscriber(self):
        return self.wires.of(SubscriberProtocol)

    def connect(self):
        """Have both connections open, with nothing waited for."""
        self.results.watch("0")
        self.wires.flush()
        self.results.unwatch("0")
        self.wires.flush()
        self.looked()

    def looked(self):
        """Forget what the server was asked up to now."""
        return self.commands.commands, self.subscriber.commands

    def tearDown(self):
        stopped = self.results.stop(1)
        self.wires.flush()
        self.successResultOf(stopped)
        self.assertEqual(self.wires.clock.getDelayedCalls(), [])
        for left in (
            self.results._watched,
            self.results._seen,
            self.results._pushed,
            self.results._asker._writes,
        ):
            if self.listener.lost == []:
                self.assertFalse(left)


class WatchTests(ResultsCase):
    def test_pushed(self):
        """The subscription comes first, then the key is read, then pushes bring what happens; then it ends."""
        self.results.watch("1")
        self.assertTrue(self.results.prepare(lambda _: None))
        self.wires.flush()
        commands, subscriber = self.looked()
        self.assertEqual(subscriber, [[b"SUBSCRIBE", PREFIX + b"1"]])
        self.assertEqual(commands, [[b"MGET", PREFIX + b"1"]])
        self.subscriber.publish(PREFIX + b"1", state())
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])
        self.wires.flush()
        self.assertEqual(self.looked(), ([], [[b"UNSUBSCRIBE", PREFIX + b"1"]]))
        self.assertEqual(self.subscriber.peer.subscribed, {})

    def test_stored_before(self):
        """A result that was there before the subscription is read."""
        self.store.strings[PREFIX + b"1"] = state()
        self.results.watch("1")
        self.wires.flush()
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_not_read_before_the_acknowledgement(self):
        """The key is read only when the server has acknowledged the subscription: before, a push might still be missed."""
        self.connect()
        self.subscriber.peer.hold = True
        self.results.watch("1")
        self.wires.flush()
        self.assertEqual(self.commands.commands, [])
        self.subscriber.peer.hold = False
        self.subscriber.send(self.subscriber.peer.release())
        self.wires.flush()
        self.assertEqual(self.commands.commands, [[b"MGET", PREFIX + b"1"]])
        self.results.unwatch("1")

    def test_many(self):
        """Many tasks are subscribed to and read by few commands."""
        self.connect()
        for number in range(1000):
            self.store.strings[PREFIX + b"%d" % number] = state(str(number), result=number)
        for number in range(1000):
            self.results.watch(str(number))
        self.wires.flush()
        commands, subscriber = self.looked()
        self.assertEqual(sorted(value for _, _, value in self.listener.metas), list(range(1000)))
        self.assertLess(len(commands), 40)
        self.assertEqual(max(len(command) for command in commands), 65)
        self.assertLess(sum(command[0] == b"SUBSCRIBE" for command in subscriber), 10)

    def test_prefix(self):
        """``global_keyprefix`` is in front of keys and channels."""
        self.make(result_backend_transport_options={"global_keyprefix": "p"})
        self.results.watch("1")
        self.wires.flush()
        key = b"p_" + PREFIX + b"1"
        self.assertEqual(self.looked(), ([[b"MGET", key]], [[b"SUBSCRIBE", key]]))
        self.subscriber.publish(key, state())
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_progress(self):
        """States that are not final come once each, in order, whether pushed or read."""
        self.store.strings[PREFIX + b"1"] = state(status="PROGRESS", result=1)
        self.results.watch("1")
        self.wires.flush()
        self.subscriber.publish(PREFIX + b"1", state(status="PROGRESS", result=1))
        self.subscriber.publish(PREFIX + b"1", state(status="PROGRESS", result=2))
        self.subscriber.publish(PREFIX + b"1", state())
        self.assertEqual(
            self.listener.metas, [("1", "PROGRESS", 1), ("1", "PROGRESS", 2), ("1", "SUCCESS", 3)]
        )

    def test_said_twice(self):
        """A worker that says the same twice is heard twice."""
        self.results.watch("1")
        self.wires.flush()
        for _ in range(2):
            self.subscriber.publish(PREFIX + b"1", state(status="PROGRESS", result=1))
        self.assertEqual(self.listener.metas, [("1", "PROGRESS", 1)] * 2)
        self.results.unwatch("1")

    def test_impossible_id(self):
        """A task id that no key can have fails its own wait."""
        self.connect()
        self.results.watch("\ud800")
        self.wires.flush()
        ((task_id, error),) = self.listener.failures
        self.assertEqual((task_id, type(error)), ("\ud800", ResultNotKept))

    def test_overtaken(self):
        """A state that was read before, and comes after, a newer one that was pushed is left out."""
        self.connect()
        self.commands.peer.hold = True
        self.store.strings[PREFIX + b"1"] = state(status="PROGRESS", result=1)
        self.results.watch("1")
        self.wires.flush()
        self.subscriber.publish(PREFIX + b"1", state(status="PROGRESS", result=2))
        self.commands.peer.hold = False
        self.commands.send(self.commands.peer.release())
        self.assertEqual(self.listener.metas, [("1", "PROGRESS", 2)])
        self.results.unwatch("1")

    def test_nobody_waits(self):
        """What is pushed, or read, for a task that nobody waits for any more is left alone."""
        self.connect()
        self.commands.peer.hold = True
        self.store.strings[PREFIX + b"1"] = state()
        self.results.watch("1")
        self.wires.flush()
        self.results.unwatch("1")
        self.results.unwatch("1")
        self.subscriber.publish(PREFIX + b"1", state())
        self.commands.peer.hold = False
        self.commands.send(self.commands.peer.release())
        self.assertEqual(self.listener.metas, [])

    def test_not_a_result(self):
        """What is no result fails the wait, pushed or read, with what Celery's decoder says."""
        for payload in (b"rubbish", b"[1]", b"3", b'"text"', b"{}", b'{"status": "SUCCESS"}', b"\xff"):
            self.results.watch("1")
            self.wires.flush()
            self.subscriber.publish(PREFIX + b"1", payload)
            ((task_id, failure),) = self.listener.failures
            self.assertEqual((task_id, type(failure)), ("1", ResultNotKept))
            self.assertIsNotNone(failure.__cause__)
            self.listener.failures.clear()
        self.store.strings[PREFIX + b"2"] = b"rubbish"
        self.results.watch("2")
        self.wires.flush()
        self.assertEqual(self.listener.failures[0][0], "2")

    def test_undecodable_and_not_final(self):
        """A state that is not final and cannot be decoded is left out, pushed or read; the final one decides."""
        undecodable = (
            state(status="RETRY", result={"no": "exception"}),
            state(status="RETRY", result={"exc_type": "system", "exc_module": "os", "exc_message": "x"}),
            state(status="PROGRESS", result={"__type__": "datetime", "__value__": "no date"}),
            b'{"status": "PROGRESS"}',
        )
        self.store.strings[PREFIX + b"1"] = undecodable[0]
        self.results.watch("1")
        self.wires.flush()
        for payload in undecodable:
            self.subscriber.publish(PREFIX + b"1", payload)
        self.wires.pass_time(61)
        self.assertEqual((self.listener.metas, self.listener.failures), ([], []))
        self.assertEqual(len([text for text in self.logged if "left out" in text]), 1)
        self.subscriber.publish(PREFIX + b"1", state(status="PROGRESS", result=1))
        self.subscriber.publish(PREFIX + b"1", state())
        self.assertEqual(self.listener.metas, [("1", "PROGRESS", 1), ("1", "SUCCESS", 3)])

    def test_may_not_be_read(self):
        """A user who may not read keys is told so, each wait by itself, however many there are."""
        self.connect()
        self.commands.peer.answers[b"MGET"] = self.commands.peer.answers[b"GET"] = NOPERM
        waited = [str(number) for number in range(300)]
        for task_id in waited:
            self.results.watch(task_id)
        self.wires.flush()
        self.assertEqual(sorted(task_id for task_id, _ in self.listener.failures), sorted(waited))
        self.assertEqual({type(error) for _, error in self.listener.failures}, {CommandRefused})

    def test_one_by_one(self):
        """A user who may not read many keys at once (ACL ``-mget``) has them read one by one; the others wait on."""
        self.connect()
        self.commands.peer.answers[b"MGET"] = NOPERM
        waited = [str(number) for number in range(300)]
        for task_id in waited[:150]:
            self.store.strings[PREFIX + task_id.encode()] = state(task_id)
        for task_id in waited:
            self.results.watch(task_id)
        self.wires.flush()
        self.assertEqual([task_id for task_id, _, _ in self.listener.metas], waited[:150])
        for task_id in waited[150:]:
            self.store.strings[PREFIX + task_id.encode()] = state(task_id)
        self.wires.pass_time(61)
        self.assertEqual(len(self.listener.metas), 300)
        self.assertEqual(self.listener.failures, [])

    def test_busy_for_one(self):
        """What cannot be read one by one for the moment is read in a moment."""
        self.connect()
        self.commands.peer.answers[b"MGET"] = NOPERM
        self.commands.peer.answers[b"GET"] = b"-BUSY Redis is busy running a script\r\n"
        self.store.strings[PREFIX + b"1"] = state()
        self.results.watch("1")
        self.wires.flush()
        self.commands.peer.answers[b"GET"] = self.store.do_get
        self.wires.pass_time(0.2)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_becomes_a_replica(self):
        """What is read behind the answer that ends a connection (READONLY) is asked of the next one, and not of this one for ever."""
        self.connect()
        first = self.commands
        first.peer.hold = True
        failed: list[Any] = []
        self.results.write(Write([("SET", "chord.s", "5")]), failed.append)
        for number in range(40):
            self.store.strings[PREFIX + b"%d" % number] = state(str(number))
            self.results.watch(str(number))
        self.wires.flush()
        self.assertTrue(first.protocol.writable)
        first.send(b"-READONLY x\r\n" + array(*[b"$-1\r\n"] * 8) + array(*[b"$-1\r\n"] * 16))
        self.assertEqual([type(error) for error in failed], [NotMaster])
        self.assertFalse(first.protocol.writable)
        first.flush()
        self.assertTrue(first.lost)
        self.wires.pass_time(1)
        self.assertEqual(len(self.listener.metas), 40)


class ReconnectTests(ResultsCase):
    def test_resubscribe_then_read(self):
        """After a reconnect all are subscribed to again, then read: what was pushed meanwhile is found."""
        self.results.watch("1")
        self.results.watch("2")
        self.wires.flush()
        self.looked()
        first = self.subscriber
        first.lose()
        self.store.strings[PREFIX + b"1"] = state()
        self.wires.pass_time(0.5)
        commands, subscriber = self.looked()
        self.assertIsNot(self.subscriber, first)
        self.assertEqual(subscriber[0][:3], [b"SUBSCRIBE", PREFIX + b"1", PREFIX + b"2"])
        self.assertEqual(commands, [[b"MGET", PREFIX + b"1", PREFIX + b"2"]])
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])
        self.results.unwatch("2")

    def test_lost_before_the_acknowledgement(self):
        """A connection cut between SUBSCRIBE and its answer loses nothing."""
        self.connect()
        self.subscriber.peer.hold = True
        self.results.watch("1")
        self.subscriber.flush()
        self.store.strings[PREFIX + b"1"] = state()
        self.subscriber.lose()
        self.wires.pass_time(0.5)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_lost_while_reading(self):
        """A connection cut between MGET and its answer: it is read over the next."""
        self.connect()
        self.commands.peer.hold = True
        self.store.strings[PREFIX + b"1"] = state()
        self.results.watch("1")
        self.wires.flush()
        self.commands.lose()
        self.assertEqual(self.listener.metas, [])
        self.wires.pass_time(0.5)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_another_server(self):
        """A new connection for commands may lead to another server: what is waited for is looked for there."""
        self.results.watch("1")
        self.wires.flush()
        self.store.strings[PREFIX + b"1"] = state()
        self.commands.lose()
        self.wires.pass_time(0.5)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_nonsense(self):
        """An answer that no Redis gives to MGET ends the connection, and the next one is asked."""
        self.store.strings[PREFIX + b"1"] = state()
        for answer in (b"+OK\r\n", b"*0\r\n", b"*1\r\n:5\r\n"):
            self.connect()
            connection = self.commands
            connection.peer.answers[b"MGET"] = answer
            self.results.watch("1")
            self.wires.pass_time(1)
            self.assertTrue(connection.lost)
            self.assertEqual(self.listener.metas.pop(), ("1", "SUCCESS", 3))
        self.assertEqual(self.listener.metas, [])

    def test_in_slices(self):
        """Decoding many states gives the reactor its turns; what is not wanted any more by then is left out."""
        self.connect()
        for number in range(8):
            self.store.strings[PREFIX + b"%d" % number] = state(str(number))
        decode, turns = self.results._decode, []

        def slow(payload):
            self.wires.clock.rightNow += 0.0015
            turns.append(len(self.wires.clock.getDelayedCalls()))
            if len(turns) == 1:
                self.results.unwatch("7")
            return decode(payload)

        self.results._decode = slow
        for number in range(8):
            self.results.watch(str(number))
        self.wires.flush()
        self.assertEqual([task_id for task_id, _, _ in self.listener.metas], list("0123456"))

    def test_stop_while_decoding(self):
        """A stop ends the handing over of what was read."""
        self.connect()
        for number in range(8):
            self.store.strings[PREFIX + b"%d" % number] = state(str(number), status="PROGRESS")
            self.results.watch(str(number))
        stopped: list[Any] = []

        def decode(payload):
            self.wires.clock.rightNow += 0.0025
            if not stopped:
                stopped.append(self.results.stop(1))
            return json.loads(payload)

        self.results._decode = decode
        self.wires.flush()
        self.assertLess(len(self.listener.metas), 8)
        for number in range(8):
            self.results.unwatch(str(number))

    def test_large_answers(self):
        """Large states are read one by one, and where the connection ends under an answer fewer are asked for."""
        for number in range(100):
            self.store.strings[PREFIX + b"%d" % number] = state(str(number), result="x" * 100_000)
            self.results.watch(str(number))
        self.wires.flush()
        sizes = [len(command) - 1 for command in self.commands.commands if command[0] == b"MGET"]
        self.assertEqual(len(self.listener.metas), 100)
        self.assertEqual(sizes[0], 8)
        self.assertGreater(len(sizes), 20)
        self.commands.peer.hold = True
        for number in range(100, 108):
            self.results.watch(str(number))
        self.wires.flush()
        self.commands.lose()
        self.wires.pass_time(0.5)
        self.assertEqual(len(self.commands.commands[0]), 2)
        for number in range(100, 108):
            self.results.unwatch(str(number))

    def test_loading(self):
        """A server that is loading is asked again."""
        self.connect()
        self.commands.peer.answers[b"MGET"] = b"-LOADING Redis is loading\r\n"
        self.store.strings[PREFIX + b"1"] = state()
        self.results.watch("1")
        self.wires.flush()
        self.commands.peer.answers[b"MGET"] = self.store.do_mget
        self.wires.pass_time(0.2)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_states_read_again(self):
        """A state that is read again after a reconnect is not told again."""
        self.results.watch("1")
        self.wires.flush()
        progress = state(status="PROGRESS", result=1)
        self.subscriber.publish(PREFIX + b"1", progress)
        self.store.strings[PREFIX + b"1"] = progress
        self.subscriber.lose()
        self.wires.pass_time(0.5)
        self.store.strings[PREFIX + b"1"] = state(status="PROGRESS", result=2)
        self.subscriber.lose()
        self.wires.pass_time(0.5)
        self.assertEqual(self.listener.metas, [("1", "PROGRESS", 1), ("1", "PROGRESS", 2)])
        self.results.unwatch("1")

    def test_large_push_cut(self):
        """A push that the server cut short is found by reading; it is said once why."""
        self.results.watch("1")
        self.results.watch("2")
        for task_id in (b"1", b"2"):
            self.wires.flush()
            self.store.strings[PREFIX + task_id] = state(task_id.decode(), result="x" * 2_000_000)
            cut = push(b"message", PREFIX + task_id, self.store.strings[PREFIX + task_id])[:1_900_000]
            for start in range(0, len(cut), 65536):
                self.subscriber.send(cut[start : start + 65536])
            self.subscriber.lose()
            self.wires.pass_time(0.5)
        self.assertEqual([task_id for task_id, _, _ in self.listener.metas], ["1", "2"])
        self.assertEqual(len(self.logged), 1)

    def test_unreachable(self):
        """While the server is away waits go on."""
        self.wires.refusals += [ServerUnreachable("no")] * 4
        self.results.watch("1")
        self.store.strings[PREFIX + b"1"] = state()
        self.wires.pass_time(1)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])
        self.assertEqual(self.listener.lost, [])

    def test_wrong_password(self):
        """Where no attempt can help, those who wait are told; and again while others wait, without hurry."""
        refused = AuthenticationFailed("WRONGPASS", url="redis://10.0.0.1")
        self.wires.refusals += [refused] * 1000
        self.results.watch("1")
        self.assertEqual(self.listener.lost, [refused, refused])
        self.wires.pass_time(5)
        self.assertGreater(len(self.listener.lost), 4)
        self.assertLess(len(self.listener.lost), 20)
        self.results.unwatch("1")
        told = len(self.listener.lost)
        self.wires.pass_time(60)
        self.assertEqual(len(self.listener.lost), told)


class PollTests(ResultsCase):
    def test_not_pushed(self):
        """What was not pushed, for whatever reason, is found by the poll; nobody else is read for it."""
        self.results.watch("1")
        self.wires.flush()
        self.store.strings[PREFIX + b"1"] = state()
        self.wires.pass_time(31)
        self.results.watch("2")
        self.wires.pass_time(28)
        self.assertEqual(self.listener.metas, [])
        self.looked()
        self.wires.pass_time(2)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])
        self.assertEqual(self.commands.commands, [[b"MGET", PREFIX + b"1"]])
        self.results.unwatch("2")

    def test_rest(self):
        """Where nobody waits nothing is asked, and no timer is left."""
        self.connect()
        self.wires.pass_time(100)
        self.assertEqual(self.looked(), ([], []))

    def test_forbidden(self):
        """A user who may not subscribe is served by reading, and it is said once."""
        self.store.answers[b"SUBSCRIBE"] = NOPERM
        self.results.watch("1")
        self.wires.flush()
        self.results.watch("2")
        self.wires.pass_time(0.5)
        self.store.strings[PREFIX + b"1"] = state()
        self.wires.pass_time(1.1)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])
        self.store.strings[PREFIX + b"2"] = state("2")
        self.wires.pass_time(1.1)
        self.assertEqual(len(self.listener.metas), 2)
        self.assertEqual(len(self.logged), 1)
        names = [command[0] for command in self.subscriber.commands]
        self.assertEqual(names, [b"SUBSCRIBE"])
        # The same after a time without anybody who waits.
        self.wires.pass_time(100)
        self.results.watch("3")
        self.wires.pass_time(0.5)
        self.store.strings[PREFIX + b"3"] = state("3")
        self.wires.pass_time(1.1)
        self.assertEqual(len(self.listener.metas), 3)

    def test_no_string(self):
        """Under the key stands something that is no string, which MGET passes over: the poll finds that out."""
        self.results.watch("1")
        self.results.watch("2")
        self.wires.flush()
        answers = self.commands.peer.answers
        answers[b"EXISTS"] = lambda command: b":1\r\n"
        stored = self.store.do_get
        answers[b"GET"] = lambda command: (
            b"-WRONGTYPE no string\r\n" if command[1] == PREFIX + b"1" else stored(command)
        )
        self.wires.pass_time(61)
        ((task_id, error),) = self.listener.failures
        self.assertEqual(task_id, "1")
        self.assertIsInstance(error, Refused)
        self.assertIn("WRONGTYPE", str(error))
        # What has come between the two questions is taken, and where the server does not say, nothing is known.
        self.store.strings[PREFIX + b"2"] = state("2")
        answers[b"MGET"] = lambda command: array(*[b"$-1\r\n" for _ in command[1:]])
        answers[b"EXISTS"] = NOPERM
        self.wires.pass_time(30)
        self.assertEqual(self.listener.metas, [])
        answers[b"EXISTS"] = b":1\r\n"
        self.wires.pass_time(30)
        self.assertEqual(self.listener.metas, [("2", "SUCCESS", 3)])

    def test_busy(self):
        """A server that is busy is asked for the subscription again, and pushes from then on."""
        self.connect()
        self.subscriber.peer.answers[b"SUBSCRIBE"] = b"-BUSY Redis is busy running a script\r\n"
        self.results.watch("1")
        self.wires.flush()
        del self.subscriber.peer.answers[b"SUBSCRIBE"]
        self.wires.pass_time(0.2)
        self.subscriber.publish(PREFIX + b"1", state())
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])
        self.assertEqual(self.logged, [])
        self.subscriber.peer.answers[b"SUBSCRIBE"] = b"-BUSY Redis is busy running a script\r\n"
        for number in range(2, 5):
            self.results.watch(str(number))
            self.wires.flush()
        del self.subscriber.peer.answers[b"SUBSCRIBE"]
        self.results.unwatch("2")
        self.wires.pass_time(0.2)
        self.assertEqual(set(self.subscriber.peer.subscribed), {PREFIX + b"3", PREFIX + b"4"})
        self.results.unwatch("3")
        self.results.unwatch("4")
        self.wires.flush()
        self.subscriber.peer.answers[b"SUBSCRIBE"] = b"-BUSY Redis is busy running a script\r\n"
        for number in range(5, 8):
            self.results.watch(str(number))
            self.wires.flush()
            self.results.unwatch(str(number))

    def test_busy_and_deaf(self):
        """A server that refuses what it has not read is not asked again before it reads."""
        self.connect()
        self.subscriber.peer.hold = True
        self.results.watch("1")
        self.wires.flush()
        self.subscriber.protocol.pauseProducing()
        self.subscriber.send(b"-BUSY Redis is busy running a script\r\n")
        self.wires.pass_time(5)
        self.assertEqual(self.looked()[1], [[b"SUBSCRIBE", PREFIX + b"1"]])
        self.subscriber.peer.hold = False
        self.subscriber.protocol.resumeProducing()
        self.wires.pass_time(0.2)
        self.subscriber.publish(PREFIX + b"1", state())
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_allowed_again(self):
        """After a reconnect it is tried again whether pushes are allowed."""
        self.store.answers[b"SUBSCRIBE"] = NOPERM
        self.results.watch("1")
        self.wires.flush()
        del self.store.answers[b"SUBSCRIBE"]
        self.subscriber.lose()
        self.wires.pass_time(0.5)
        self.subscriber.publish(PREFIX + b"1", state())
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])


class AskTests(ResultsCase):
    def ask(self, asking):
        self.wires.pass_time(0.1)
        return self.successResultOf(asking)

    def test_fetch(self):
        """Any task's state can be read; of a task without one nothing is known."""
        self.store.strings[PREFIX + b"1"] = state(status="STARTED", result={})
        self.assertEqual(self.ask(self.results.fetch("1"))["status"], "STARTED")
        self.assertIsNone(self.ask(self.results.fetch("2")))
        self.store.strings[PREFIX + b"3"] = b"rubbish"
        asking = self.results.fetch("3")
        self.wires.flush()
        self.assertEqual(self.failureResultOf(asking, ResultNotKept).value.task_id, "3")

    def test_exception(self):
        """A failed task's exception is rebuilt by the app's own backend."""
        self.store.strings[PREFIX + b"1"] = state(
            status="FAILURE", result={"exc_type": "KeyError", "exc_message": ["x"], "exc_module": "builtins"}
        )
        self.assertIsInstance(self.ask(self.results.fetch("1"))["result"], KeyError)

    def test_forget(self):
        """Forgetting deletes the state."""
        self.store.strings[PREFIX + b"1"] = state()
        self.assertIsNone(self.ask(self.results.forget("1")))
        self.assertEqual(self.store.strings, {})

    def test_fetch_group(self):
        """A saved group is read as its tuple."""
        key = b"celery-taskset-meta-g"
        self.store.strings[key] = b'{"result": [["g", null], [[["1", null], null]]]}'
        self.assertEqual(self.ask(self.results.fetch_group("g")), [["g", None], [[["1", None], None]]])
        self.assertIsNone(self.ask(self.results.fetch_group("h")))
        self.store.strings[key] = b"3"
        asking = self.results.fetch_group("g")
        self.wires.flush()
        self.failureResultOf(asking, ResultNotKept)

    def test_wrong_type(self):
        """Another type under the key is the server's clear error."""
        self.store.answers[b"GET"] = b"-WRONGTYPE Operation against a key\r\n"
        asking = self.results.fetch("1")
        self.wires.flush()
        self.assertIn("WRONGTYPE", str(self.failureResultOf(asking, Refused).value))

    def test_asked_again(self):
        """A connection that ends under a question, or a server that is loading, is asked again, not for ever."""
        self.make(result_backend_transport_options={"retry_policy": BRIEF})
        self.connect()
        self.store.strings[PREFIX + b"1"] = state()
        self.commands.peer.hold = True
        asking = self.results.fetch("1")
        self.wires.flush()
        self.commands.lose()
        self.wires.pass_time(0.5)
        self.assertEqual(self.ask(asking)["result"], 3)
        self.commands.peer.answers[b"GET"] = b"-LOADING\r\n"
        asking = self.results.fetch("1")
        self.wires.pass_time(0.5)
        self.failureResultOf(asking, NotSent)

    def test_unreachable(self):
        """A question fails where the server cannot be reached."""
        self.make(result_backend_transport_options={"retry_policy": BRIEF})
        self.wires.refusals += [ServerUnreachable("no")] * 10
        asking = self.results.fetch("1")
        self.wires.pass_time(1)
        self.failureResultOf(asking, ServerUnreachable)

    def test_cancel(self):
        """A question can be withdrawn, at any time."""
        asking = self.results.fetch("1")
        asking.cancel()
        self.failureResultOf(asking)
        self.wires.flush()
        asking = self.results.fetch("1")
        asking.cancel()
        self.failureResultOf(asking)
        self.commands.peer.answers[b"GET"] = b"-LOADING\r\n"
        asking = self.results.fetch("1")
        self.wires.flush()
        asking.cancel()
        self.failureResultOf(asking)

    def test_stopped(self):
        """A question after the stop fails."""
        self.results.stop(1)
        self.failureResultOf(self.results.fetch("1"), Stopped)


class WriteTests(ResultsCase):
    def write(self, *commands, transaction=False):
        outcomes: list[Exception | None] = []
        self.results.write(Write(list(commands), transaction=transaction), outcomes.append)
        return outcomes

    def test_written(self):
        """A write is carried out once there is a connection, and done when it is answered."""
        outcomes = self.write(("SET", "a", "1"))
        self.assertEqual(outcomes, [])
        self.wires.flush()
        self.assertEqual(outcomes, [None])
        self.commands.commands  # noqa: B018
        outcomes = self.write(("SET", "a", "2"), ("DEL", "b"), transaction=True)
        self.wires.flush()
        self.assertEqual(outcomes, [None])
        names = [command[0] for command in self.commands.commands]
        self.assertEqual(names, [b"MULTI", b"SET", b"DEL", b"EXEC"])
        self.assertEqual(self.store.strings, {b"a": b"2"})

    def test_errors(self):
        """What may pass is `NotSent`; the server's final word is `Refused`; a lost answer is `ConnectionLost`."""
        self.write(("SET", "a", "1"))
        self.wires.flush()
        for text, kind in (
            (b"-OOM no memory\r\n", NotSent),
            (b"-LOADING\r\n", NotSent),
            (b"-WRONGTYPE\r\n", Refused),
            (b"-NOPERM\r\n", Refused),
            (b"-READONLY\r\n", NotSent),
        ):
            self.commands.peer.answers[b"SET"] = text
            outcomes = self.write(("SET", "a", "1"))
            self.wires.flush()
            self.assertIsInstance(outcomes[0], kind)
        self.wires.pass_time(0.5)
        outcomes = self.write(("SET", "a", "1"))
        self.commands.lose(internet_error.ConnectionLost())
        self.assertIsInstance(outcomes[0], ConnectionLost)

    def test_unreachable(self):
        """A write that waits fails with the round: nothing was sent."""
        self.wires.refusals.append(ServerUnreachable("no"))
        outcomes = self.write(("SET", "a", "1"))
        self.assertIsInstance(outcomes[0], NotSent)
        self.wires.pass_time(0.5)
        self.wires.refusals += [AuthenticationFailed("no")] * 2
        self.commands.lose()
        outcomes = self.write(("SET", "a", "1"))
        self.wires.pass_time(0.5)
        self.assertIsInstance(outcomes[0], AuthenticationFailed)

    def test_stopped(self):
        """A write at or after the stop was not sent."""
        before = self.write(("SET", "a", "1"))
        self.results.stop(1)
        self.assertIsInstance(before[0], NotSent)
        self.assertIsInstance(self.write(("SET", "a", "1"))[0], NotSent)
        self.results.watch("1")
        self.wires.flush()
        self.assertEqual(self.wires.clock.getDelayedCalls(), [])
        self.results.unwatch("1")


class StopTests(ResultsCase):
    def test_answers_are_waited_for(self):
        """An orderly stop waits for what is due."""
        self.connect()
        outcomes: list[Any] = []
        self.results.write(Write([("SET", "a", "1")]), outcomes.append)
        stopped = self.results.stop(5)
        self.wires.flush()
        self.successResultOf(stopped)
        self.assertEqual(outcomes, [None])

    def test_silent_server(self):
        """A stop has its deadline."""
        self.connect()
        self.commands.peer.hold = True
        asking = self.results.fetch("1")
        self.wires.flush()
        stopped = self.results.stop(5)
        self.wires.flush()
        self.assertNoResult(stopped)
        self.wires.pass_time(5.1)
        self.successResultOf(stopped)
        self.failureResultOf(asking)

    def test_in_a_pause(self):
        """A question that would have been asked again fails with the stop, and leaves no timer."""
        self.connect()
        self.commands.peer.answers[b"GET"] = b"-LOADING\r\n"
        asking = self.results.fetch("1")
        self.wires.flush()
        self.assertNoResult(asking)
        self.results.stop(1)
        self.failureResultOf(asking, Stopped)

    def test_url(self):
        """The server can be named before there is one, and then."""
        self.assertEqual(self.results.url, "")
        self.connect()
        self.assertEqual(self.results.url, "redis://10.0.0.1:6379/0")
        self.assertEqual(bulk(b"x"), b"$1\r\nx\r\n")


def packed(*arguments, **more):
    """Make a state as a worker with ``result_compression = "zlib"`` stores it."""
    body = zlib.compress(state(*arguments, **more))
    return base.COMPRESSED_PAYLOAD_MAGIC + b"application/x-gzip\0" + body


BIG = "x" * 200_000


@skipIf(not hasattr(base, "COMPRESSED_PAYLOAD_MAGIC"), "Celery before 5.7 compresses no results")
class InflatingTests(ResultsCase):
    def watch(self, *task_ids):
        for task_id in task_ids:
            self.results.watch(task_id)
        self.wires.flush()
        self.looked()

    def publish(self, task_id, payload):
        self.subscriber.publish(PREFIX + task_id.encode(), payload)

    def statuses(self):
        return [(task_id, status) for task_id, status, _ in self.listener.metas]

    def test_small(self):
        """A small state is decompressed at once, whatever the settings of this side."""
        self.watch("1")
        self.publish("1", packed())
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_in_a_thread(self):
        """What takes its time to decompress is not done here, pushed or read; all come in order."""
        self.watch("1", "2")
        self.publish("1", packed(status="PROGRESS", result=BIG))
        self.publish("1", state())
        self.publish("2", state("2"))
        self.assertEqual(self.listener.metas, [])
        self.clock.work()
        self.wires.flush()
        self.assertEqual(self.statuses(), [("1", "PROGRESS"), ("1", "SUCCESS"), ("2", "SUCCESS")])
        self.store.strings[PREFIX + b"3"] = packed("3", result=BIG)
        self.results.watch("3")
        self.wires.flush()
        self.assertEqual(len(self.listener.metas), 3)
        self.clock.work()
        self.assertEqual(self.statuses()[3:], [("3", "SUCCESS")])

    def test_said_once(self):
        """A state that is read and pushed comes once, compressed or not; a push of a connection that is gone does not count as one."""
        self.store.strings[PREFIX + b"1"] = packed(status="PROGRESS", result=BIG)
        self.watch("1")
        self.publish("1", packed(status="PROGRESS", result=BIG))
        self.clock.work()
        self.clock.work()
        self.assertEqual(self.statuses(), [("1", "PROGRESS")])
        self.publish("1", packed(status="PROGRESS", result=BIG + "y"))
        self.store.strings[PREFIX + b"1"] = state(status="PROGRESS", result=5)
        self.subscriber.lose()
        self.clock.work()
        self.wires.pass_time(0.5)
        self.assertEqual([result for _, _, result in self.listener.metas][1:], [BIG + "y", 5])
        self.results.unwatch("1")

    def test_limit(self):
        """A state that is larger than ``inflate_limit`` once decompressed, or compressed twice, fails the wait."""
        twice = base.COMPRESSED_PAYLOAD_MAGIC + b"application/x-gzip\0" + zlib.compress(packed())
        unknown = base.COMPRESSED_PAYLOAD_MAGIC + b"application/x-nonsense\0x"
        endless = base.COMPRESSED_PAYLOAD_MAGIC + b"x" * 1000
        for payload, text in (
            (packed(result="x" * 1_000_000), "inflate_limit"),
            (twice, "twice"),
            (unknown, "nonsense"),
            (endless, "not registered"),
        ):
            self.watch("1")
            self.publish("1", payload)
            while self.clock.queued:
                self.clock.work()
            ((task_id, error),) = self.listener.failures
            self.assertEqual((task_id, type(error)), ("1", ResultNotKept))
            self.assertIn(text, str(error))
            self.assertLess(len(str(error)), 500)
            self.listener.failures.clear()
            # So it is for whoever asks.
            self.store.strings[PREFIX + b"1"] = payload
            asking = self.results.fetch("1")
            self.wires.flush()
            while self.clock.queued:
                self.clock.work()
            self.assertIn(text, str(self.failureResultOf(asking, ResultNotKept).value))
            del self.store.strings[PREFIX + b"1"]

    def test_nobody_waits(self):
        """Who has gone meanwhile is not told."""
        self.watch("1")
        self.publish("1", packed(result=BIG))
        self.results.unwatch("1")
        self.clock.work()
        self.assertEqual(self.listener.metas, [])

    def test_questions(self):
        """The answers to questions are decompressed in their turn; a group's, too."""
        self.store.strings[PREFIX + b"1"] = packed(result=BIG)
        group = json.dumps({"result": [["g", None], [], "x" * 100_000]}).encode()
        self.store.strings[b"celery-taskset-meta-g"] = (
            base.COMPRESSED_PAYLOAD_MAGIC + b"application/x-gzip\0" + zlib.compress(group)
        )
        asked: list[Any] = [self.results.fetch("1"), self.results.fetch_group("g")]
        self.wires.flush()
        self.clock.work()
        self.clock.work()
        self.assertEqual(self.successResultOf(asked[0])["result"], BIG)
        self.assertEqual(self.successResultOf(asked[1])[0], ["g", None])
        asked = [self.results.fetch("1"), self.results.fetch_group("g"), self.results.fetch("1")]
        self.wires.flush()
        asked[2].cancel()
        self.failureResultOf(asked[2], CancelledError)
        self.results.stop(1)
        for asking in asked[:2]:
            self.failureResultOf(asking, Stopped)
        self.clock.work()

    def test_too_many(self):
        """What there is no room for behind those that are being decompressed is read when they have been."""
        self.watch(*"123")
        self.publish("1", packed(result=BIG))
        self.publish("2", state("2", result="x" * 1_000_001))
        self.store.strings[PREFIX + b"3"] = state("3")
        self.publish("3", state("3"))
        self.assertEqual(self.results._inflating.bytes, len(state("2", result="x" * 1_000_001)))
        self.clock.work()
        self.assertEqual(self.statuses(), [("1", "SUCCESS"), ("2", "SUCCESS")])
        self.wires.flush()
        self.assertEqual(self.statuses()[2:], [("3", "SUCCESS")])

    def test_stop(self):
        """Before a stop what has come is handed over, if there is time; a stop leaves nothing behind."""
        for works in (True, False):
            self.setUp()
            self.watch("1")
            self.publish("1", packed(result=BIG))
            handing = self.results.hand_over(2)
            self.assertNoResult(handing)
            if works:
                self.clock.work()
            else:
                self.wires.pass_time(2.1)
            self.successResultOf(handing)
            stopped = self.results.stop(1)
            self.wires.flush()
            self.successResultOf(stopped)
            if not works:
                self.clock.work()
                self.results.unwatch("1")
            self.assertEqual((self.statuses(), self.listener.failures), ([("1", "SUCCESS")] * works, []))


class PatienceTests(ResultsCase):
    """Every question has one deadline, whatever keeps its answer from coming: the result backend's own retry policy."""

    questions = ("fetch", "forget", "fetch_group")

    def check_deadline(self, seconds, error):
        """Ask all questions; they fail when so many seconds have passed, and not before."""
        asked = [getattr(self.results, question)("1") for question in self.questions]
        self.wires.pass_time(seconds - 0.1)
        for asking in asked:
            self.assertNoResult(asking)
        self.wires.pass_time(0.3)
        return [self.failureResultOf(asking, error).value for asking in asked]

    def test_by_default(self):
        """Celery's own policy is 20 retries in 19 s."""
        self.wires.refusals += [ServerUnreachable("no")] * 1000
        self.check_deadline(19, ServerUnreachable)
        self.wires.refusals.clear()

    def test_settable(self):
        """``retry_policy`` in ``result_backend_transport_options`` says otherwise."""
        policy = {"max_retries": 3, "interval_start": 2, "interval_step": 0, "interval_max": 2}
        self.make(result_backend_transport_options={"retry_policy": policy})
        self.wires.refusals += [ServerUnreachable("no")] * 1000
        self.check_deadline(6, ServerUnreachable)
        self.wires.refusals.clear()

    def test_unanswered_attempt(self):
        """It holds while an attempt to connect has no end of its own; the error names the setting."""
        self.store.answers[b"PING"] = b""
        for error in self.check_deadline(19, ServerUnreachable):
            self.assertIn("retry_policy", str(error))

    def test_unanswered_question(self):
        """It holds where the server takes the question and does not answer."""
        self.store.answers.update({b"GET": b"", b"DEL": b""})
        for error in self.check_deadline(19, ConnectionLost):
            self.assertIn("retry_policy", str(error))
        self.commands.lose()

    def test_loading(self):
        """A server that cannot answer now is asked until then."""
        self.store.answers.update({b"GET": b"-LOADING\r\n", b"DEL": b"-LOADING\r\n"})
        self.check_deadline(18.9, NotSent)

    def test_without_retries(self):
        """Without retries the first round decides, and a server that is there is asked all the same."""
        self.make(result_backend_transport_options={"retry_policy": {"max_retries": 0}})
        self.wires.refusals += [ServerUnreachable("no")]
        asking = self.results.fetch("1")
        self.failureResultOf(asking, ServerUnreachable)
        self.store.strings[PREFIX + b"1"] = state()
        found: Any = self.results.fetch("1")
        self.wires.pass_time(0.5)
        self.assertEqual(self.successResultOf(found)["result"], 3)

    def test_for_ever(self):
        """``max_retries`` None asks until there is an answer."""
        self.make(result_backend_transport_options={"retry_policy": {"max_retries": None}})
        self.wires.refusals += [ServerUnreachable("no")] * 200
        asking = self.results.fetch("1")
        self.wires.pass_time(30)
        self.assertNoResult(asking)
        self.wires.pass_time(30)
        self.assertIsNone(self.successResultOf(asking))

    def test_permanent(self):
        """Where no attempt can help, the question fails at once."""
        self.wires.refusals += [AuthenticationFailed("no")]
        self.failureResultOf(self.results.fetch("1"), AuthenticationFailed)

    def test_policies(self):
        """What the policy leaves out is Celery's own; what is no policy is refused by name."""

        def patience(policy):
            return backend_patience(
                celery.Celery(
                    backend="redis://",
                    set_as_current=False,
                    result_backend_transport_options={"retry_policy": policy},
                ).backend
            )

        self.assertEqual((patience({}), patience({"max_retries": 3})), (19, 2))
        for policy in ({"max_retries": "x"}, {"interval_step": -1}, {"interval_max": float("nan")}, 5, "x"):
            error = self.assertRaises(ImproperlyConfigured, patience, policy)
            self.assertIn("result_backend_transport_options", str(error))
            self.assertIn(next(iter(policy)) if isinstance(policy, dict) else "dictionary", str(error))
