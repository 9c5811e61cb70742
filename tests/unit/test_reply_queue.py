"""The reply queue: declared, consumed from, acknowledged, lost and found; its server is a script."""

from __future__ import annotations

import json
import pickle
import zlib
from base64 import b64encode
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from tests.support.threads import ThreadedClock
from tests.unit._scripted import Attempts
from twistedcelery import _inflate
from twistedcelery._operations import Write
from twistedcelery.amqp.results import ReplyQueue
from twistedcelery.errors import AuthenticationFailed, ConnectionLost, Refused, ResultLost, ResultNotKept


class Listener:
    def __init__(self):
        self.metas: list[Any] = []
        self.sizes: list[int] = []
        self.failed: list[Any] = []
        self.lost: list[Exception] = []
        self.telling: Deferred[None] = succeed(None)

    def meta_received(self, meta, size=0):
        self.sizes.append(size)
        self.metas.append(meta)

    def result_failed(self, task_id, error):
        self.failed.append((task_id, error))

    def results_lost(self, error):
        self.lost.append(error)
        return self.telling


class ReplyQueueTests(SynchronousTestCase):
    expires = 60.0
    inflate_limit = 1_000_000

    def setUp(self):
        self.clock = ThreadedClock()
        self.patch(_inflate, "in_thread", self.clock.in_thread)
        self.attempts: Any = Attempts(self.clock)
        self.server = "amqp://test"
        self.publisher = object()
        self.told: list[Any] = []
        self.queue = self.make()

    def make(self):
        queue = ReplyQueue(
            self.clock,
            self.attempts,
            1,
            4,
            lambda failures: 1.0,
            server=lambda: self.server,
            publisher=lambda: self.publisher,
            queue="replies",
            expires=self.expires,
            accept={"application/json"},
            meta_from_decoded=lambda meta: meta,
            inflate_limit=self.inflate_limit,
        )
        self.listener = Listener()
        queue.listen(self.listener)
        return queue

    @property
    def peer(self):
        return self.attempts.peer

    def prepare(self):
        return self.queue.prepare(self.told.append)

    def connect(self):
        """Have the queue consumed from; what was said is forgotten."""
        self.prepare()
        self.peer.answer()
        self.assertEqual(self.told, [None])
        self.told.clear()
        (consume,) = self.peer.said("basic.consume")
        self.channel = consume.channel

    def reconnect(self):
        """Cut the connection; the next one is made by now."""
        self.peer.lose()
        self.clock.advance(1)

    def reply(self, tag, body, **message):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        message = {"content_type": "application/json", "content_encoding": "utf-8", **message}
        self.peer.reply(tag, data, channel=message.pop("channel", self.channel), **message)

    def acks(self):
        return [one.values for one in self.peer.said("basic.ack")]

    def test_opening(self):
        """The queue is durable, classic, not exclusive, not auto-delete and expires; calls wait until it is consumed from."""
        self.assertFalse(self.prepare())
        self.assertEqual(self.told, [])
        declare, consume = self.peer.said("queue.declare", "basic.consume")
        self.assertEqual(self.told, [None])
        self.assertEqual(
            [bool(flag) for flag in declare.values[2:6]],
            [False, True, False, False],
            "passive, durable, exclusive, auto",
        )
        self.assertEqual(declare.values[-1], {"x-queue-type": "classic", "x-expires": 60_000})
        self.assertFalse(consume.values[4], "no_ack")
        self.assertTrue(self.prepare())

    def test_expiry_within_bounds(self):
        """RabbitMQ takes an expiry of 1 to 2**32 - 1 milliseconds."""
        for seconds, milliseconds in ((1e9, 2**32 - 1), (0.0001, 1)):
            self.expires = seconds
            self.attempts = Attempts(self.clock)
            self.queue = self.make()
            self.prepare()
            (declare,) = self.peer.said("queue.declare")
            self.assertEqual(declare.values[-1]["x-expires"], milliseconds)

    def test_acknowledged_together(self):
        """Replies are handed over as they come, and acknowledged together in the next turn."""
        self.connect()
        for tag in (1, 2, 3):
            self.reply(tag, {"task_id": f"t{tag}", "status": "SUCCESS", "result": tag})
        self.assertEqual([meta["result"] for meta in self.listener.metas], [1, 2, 3])
        self.assertEqual(
            self.listener.sizes, [len('{"task_id": "t1", "status": "SUCCESS", "result": 1}')] * 3
        )
        self.assertEqual(self.acks(), [])
        self.clock.advance(0)
        self.assertEqual(self.acks(), [[3, True]])
        self.clock.advance(1)
        self.assertEqual(self.acks(), [])

    def test_compressed(self):
        """A compressed reply is read as kombu writes it."""
        self.connect()
        body = zlib.compress(json.dumps({"task_id": "t", "status": "SUCCESS", "result": 1}).encode())
        self.reply(1, body, headers={"compression": "application/x-gzip"})
        self.assertEqual(self.listener.metas[0]["task_id"], "t")
        self.assertEqual(self.listener.sizes, [len(zlib.decompress(body))])

    def big(self, tag, task_id, size=200_000, status="SUCCESS"):
        """Have a reply come that is large once it is decompressed."""
        body = json.dumps({"task_id": task_id, "status": status, "result": "x" * size}).encode()
        self.reply(
            tag, zlib.compress(body), headers={"compression": "application/x-gzip"}, correlation_id=task_id
        )

    def names(self):
        return [(meta["task_id"], meta["status"]) for meta in self.listener.metas]

    def test_inflated_in_a_thread(self):
        """What takes its time to decompress is not done here; all come in order, and none is acknowledged before that."""
        self.connect()
        self.reply(1, {"task_id": "a", "status": "SUCCESS", "result": 1})
        self.big(2, "b", status="PROGRESS")
        self.reply(3, {"task_id": "b", "status": "SUCCESS", "result": 1})
        self.reply(4, {"task_id": "c", "status": "SUCCESS", "result": 1})
        self.assertEqual(self.names(), [("a", "SUCCESS")])
        self.clock.advance(0)
        self.assertEqual(self.acks(), [[1, True]])
        self.clock.work()
        self.assertEqual(self.names()[1:], [("b", "PROGRESS"), ("b", "SUCCESS"), ("c", "SUCCESS")])
        self.clock.advance(0)
        self.assertEqual(self.acks(), [[4, True]])

    def test_inflate_limit(self):
        """A reply that is larger than ``inflate_limit`` fails its own task, and is acknowledged like any other."""
        self.connect()
        self.big(1, "b", 1_000_001)
        self.big(2, "c")
        self.clock.work()
        self.clock.work()
        ((name, error),) = self.listener.failed
        self.assertEqual((name, type(error)), ("b", ResultNotKept))
        self.assertIn("inflate_limit", str(error))
        self.assertEqual(self.names(), [("c", "SUCCESS")])
        self.clock.advance(0)
        self.assertEqual(self.acks(), [[2, True]])

    def test_lost_while_inflating(self):
        """What has come is handed over, though its connection is gone by then; it is acknowledged to nobody, and may come again."""
        self.connect()
        self.big(1, "b")
        self.reply(2, {"task_id": "c", "status": "SUCCESS", "result": 1})
        self.reconnect()
        self.channel = self.peer.said("basic.consume")[-1].channel
        self.big(1, "b")
        self.clock.work()
        self.assertEqual(self.names(), [("b", "SUCCESS"), ("c", "SUCCESS")])
        self.clock.advance(0)
        self.assertEqual(self.acks(), [])
        self.clock.work()
        self.assertEqual(self.names()[2:], [("b", "SUCCESS")])
        self.clock.advance(0)
        self.assertEqual(self.acks(), [[1, True]])

    def test_stop_while_inflating(self):
        """Before a stop what has come is handed over, if there is time; a stop leaves nothing behind, and ends on time."""
        for works in (True, False):
            self.attempts = Attempts(self.clock)
            self.queue = self.make()
            self.connect()
            self.big(1, "b")
            handing = self.queue.hand_over(2)
            self.assertNoResult(handing)
            if works:
                self.clock.work()
            else:
                self.clock.advance(2)
            self.successResultOf(handing)
            self.assertEqual(self.names(), [("b", "SUCCESS")] * works)
            stopped = self.queue.stop(5)
            said = [one.name for one in self.peer.said("basic.ack", "queue.delete")]
            self.assertEqual(said, ["basic.ack"] * works + ["queue.delete"])
            self.successResultOf(stopped)
            if not works:
                self.clock.work()
            self.assertEqual((self.names(), self.listener.failed), ([("b", "SUCCESS")] * works, []))
            self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_not_a_result(self):
        """What cannot be read as a result fails its task, if it names one, and is acknowledged like any other."""
        self.connect()
        self.reply(1, b"{nonsense", correlation_id="a")
        self.reply(2, {"no": "result"}, correlation_id="b")
        self.reply(3, {"task_id": 5, "status": "SUCCESS", "result": 1}, correlation_id="c")
        self.reply(4, {"task_id": "d"}, correlation_id="d")
        self.reply(
            5, b64encode(b"pickled"), content_type="application/x-python-serialize", correlation_id="e"
        )
        self.reply(6, [1], correlation_id="f")
        self.reply(7, {"task_id": "g", "status": "SUCCESS"}, correlation_id="g")
        self.reply(8, b"anonymous")
        self.assertEqual([name for name, _ in self.listener.failed], list("abcdefg"))
        self.assertTrue(all(isinstance(error, ResultNotKept) for _, error in self.listener.failed))
        self.assertEqual(self.listener.metas, [])
        self.clock.advance(0)
        self.assertEqual(self.acks(), [[8, True]])

    def test_undecodable_and_not_final(self):
        """A state that is not final and cannot be decoded is left out, and the first is logged; the final one decides."""
        logged: list[Any] = []
        observe: Any = logged.append
        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)
        self.connect()
        pickled = {"content_type": "application/x-python-serialize", "content_encoding": "binary"}
        states: list[Any] = [
            ({"task_id": "t", "status": "PROGRESS"}, {}),
            ({"task_id": "t", "status": "MINE", "result": {"__type__": "uuid", "__value__": "none"}}, {}),
            (pickle.dumps({"status": "PROGRESS", "result": 1, "task_id": "t"}), pickled),
        ]
        for tag, (body, message) in enumerate(states, 1):
            self.reply(tag, body, correlation_id="t", **message)
        self.assertEqual((self.listener.metas, self.listener.failed), ([], []))
        (event,) = [event for event in logged if "left out" in event["log_format"]]
        self.assertEqual(event["task_id"], "t")
        self.reply(4, {"task_id": "t", "status": "SUCCESS", "result": 1}, correlation_id="t")
        self.assertEqual([meta["status"] for meta in self.listener.metas], ["SUCCESS"])
        self.reply(5, pickle.dumps({"status": "FAILURE", "result": 1}), correlation_id="u", **pickled)
        self.assertEqual([name for name, _ in self.listener.failed], ["u"])
        self.clock.advance(0)
        self.assertEqual(self.acks(), [[5, True]])

    def test_unreadable_headers(self):
        """A reply whose headers are nonsense is dropped and acknowledged; it must not come again for ever."""
        from struct import pack

        from tests.support.amqp_peer import frame, method

        self.connect()
        table = pack(">I", 3) + b"\x01x?"
        header = pack(">HHQH", 60, 0, 0, 0x2000) + table
        self.peer.protocol.dataReceived(
            method(self.channel, "basic.deliver", "me", 1, False, "", "q") + frame(2, self.channel, header)
        )
        self.clock.advance(0)
        self.assertEqual(self.acks(), [[1, True]])
        self.assertEqual((self.listener.metas, self.listener.failed), ([], []))

    def test_lost_connection(self):
        """After a lost connection the queue is looked for, consumed from again, and nothing is lost; calls go on."""
        self.connect()
        self.reply(1, {"task_id": "t", "status": "SUCCESS", "result": 1})
        self.reconnect()
        # Messages may leave: the queue is there.
        self.assertTrue(self.prepare())
        said = self.peer.said("queue.declare", "basic.consume", "basic.ack")
        self.assertEqual([one.name for one in said], ["queue.declare", "queue.declare", "basic.consume"])
        self.assertTrue(said[0].values[2], "passive")
        self.assertEqual(self.listener.lost, [])
        # Tags begin anew with the channel.
        self.reply(1, {"task_id": "t", "status": "SUCCESS", "result": 1}, channel=said[-1].channel)
        self.clock.advance(0)
        self.assertEqual(self.acks(), [[1, True]])

    def test_both_connections_lost(self):
        """When the publishing connection was lost too, nothing leaves over the next one before the queue was found again."""
        self.connect()
        self.peer.lose()
        # Over the same one messages may leave.
        self.assertTrue(self.prepare())
        self.publisher = object()
        self.assertFalse(self.prepare())
        self.clock.advance(1)
        self.assertEqual(self.told, [])
        self.peer.answer()
        self.assertEqual(self.told, [None])
        # The queue was there after this connection had been made, or while messages were going over it.
        self.peer.lose()
        self.assertTrue(self.prepare())
        self.clock.advance(1)
        self.peer.answer()
        self.publisher = object()
        self.assertTrue(self.prepare())
        self.peer.lose()
        self.assertTrue(self.prepare())

    def test_oversize(self):
        """A reply larger than ``max_body_size`` fails its own task, and is acknowledged like any other."""
        self.attempts.settings["max_body_size"] = 1000
        self.connect()
        self.reply(1, {"task_id": "big", "status": "SUCCESS", "result": "x" * 1000}, correlation_id="big")
        self.reply(2, {"task_id": "small", "status": "SUCCESS", "result": 1}, correlation_id="small")
        ((name, error),) = self.listener.failed
        self.assertEqual(name, "big")
        self.assertIn("max_body_size", str(error))
        self.assertEqual([meta["task_id"] for meta in self.listener.metas], ["small"])
        self.clock.advance(0)
        self.assertEqual(self.acks(), [[2, True]])

    def lose_queue(self):
        """Answer the passive declare with 404, and the rest as ever."""
        self.peer.silent.add("queue.declare")
        (asked,) = self.peer.said("queue.declare")
        self.peer.silent.clear()
        self.peer.send(asked.channel, "channel.close", 404, "NOT_FOUND - no queue 'replies'", 50, 10)

    def test_vanished(self):
        """Where the queue is gone after a reconnect, what was pending is known to be lost; a new one is made."""
        self.connect()
        self.reconnect()
        self.lose_queue()
        self.assertIsInstance(self.listener.lost[0], ResultLost)
        # Not before the new queue is there.
        self.assertFalse(self.prepare())
        self.assertEqual(
            [one.name for one in self.peer.said("queue.declare", "basic.consume")][-1], "basic.consume"
        )
        self.assertEqual(self.told, [None])

    def test_vanished_slowly(self):
        """The new queue is not made before everybody has been told of the old one's loss."""
        self.connect()
        self.reconnect()
        self.listener.telling = Deferred()
        self.lose_queue()
        self.assertFalse(self.prepare())
        self.assertEqual(self.peer.said("queue.declare"), [])
        self.listener.telling.callback(None)
        self.peer.answer()
        self.assertEqual(self.told, [None])

    def test_deleted(self):
        """So it is where the server cancels the consumer, because somebody has deleted the queue."""
        self.connect()
        self.peer.send(self.channel, "basic.cancel", "me", True)
        self.lose_queue()
        self.assertEqual(len(self.listener.lost), 1)
        (consume,) = self.peer.said("basic.consume")
        self.reply(1, {"task_id": "t", "status": "SUCCESS", "result": 1}, channel=consume.channel)
        self.assertEqual(len(self.listener.metas), 1)

    def test_node_is_down(self):
        """A queue whose node is down is not lost: it is looked for again after a while."""
        self.connect()
        self.reconnect()
        self.peer.silent.add("queue.declare")
        (asked,) = self.peer.said("queue.declare")
        text = "NOT_FOUND - home node 'x' of durable queue 'replies' in vhost '/' is down or inaccessible"
        self.peer.send(asked.channel, "channel.close", 404, text, 50, 10)
        self.assertEqual(self.listener.lost, [])
        self.peer.silent.clear()
        self.clock.advance(10)
        self.assertEqual(len(self.peer.said("basic.consume")), 1)

    def test_refused(self):
        """A queue that may not be declared fails the calls that wait, with the server's words; the next call asks again."""
        self.prepare()
        self.peer.silent.add("queue.declare")
        (asked,) = self.peer.said("queue.declare")
        self.peer.send(asked.channel, "channel.close", 403, "ACCESS_REFUSED", 50, 10)
        self.assertIsInstance(self.told.pop(), Refused)
        self.peer.silent.clear()
        self.assertFalse(self.prepare())
        self.peer.answer()
        self.assertEqual(self.told, [None])

    def test_lost_while_opening(self):
        """A connection that is lost while the queue is opened fails nobody: the next one goes on."""
        self.prepare()
        self.peer.silent.add("basic.consume")
        self.peer.answer()
        self.reconnect()
        self.assertEqual(self.told, [])
        self.peer.answer()
        self.assertEqual(self.told, [None])

    def test_useless_connections(self):
        """Where connections are taken and end, time and again, those who wait are told, and may ask again."""
        self.prepare()
        self.peer.silent.add("basic.consume")
        self.peer.answer()
        self.reconnect()
        self.assertEqual(self.told, [])
        self.reconnect()
        self.assertIsInstance(self.told.pop(), ConnectionLost)
        self.prepare()
        self.clock.advance(60)
        self.peer.answer()
        self.assertEqual(self.told, [None])

    def test_unavailable(self):
        """Where no server can be reached, those who wait are told, and may ask again."""
        self.attempts.refuse()
        self.prepare()
        self.assertIsInstance(self.told.pop(), ConnectionLost)
        self.prepare()
        self.clock.advance(1)
        self.peer.answer()
        self.assertEqual(self.told, [None])

    def test_refused_login_later(self):
        """A login that worked before and is refused now is tried again slowly, and at once for a new call."""
        self.connect()
        self.attempts.errors = [AuthenticationFailed("no"), AuthenticationFailed("no")]
        self.reconnect()
        self.assertEqual(len(self.attempts.peers), 1)
        self.clock.advance(10)
        self.assertEqual(self.attempts.errors, [])
        self.assertTrue(self.prepare())
        self.clock.advance(1)
        self.assertEqual(len(self.attempts.peers), 2)

    def test_follows_the_broker(self):
        """Where the calls have gone to another server, replies are awaited there before the next call leaves."""
        self.attempts = Attempts(self.clock, "amqp://one", "amqp://two")
        self.queue = self.make()
        self.server = "amqp://one"
        self.connect()
        self.server = "amqp://two"
        self.assertFalse(self.prepare())
        self.peer.lose()
        self.clock.advance(1)
        self.assertEqual(self.queue.url, "amqp://two")
        self.lose_queue()
        self.peer.answer()
        self.assertEqual(self.told, [None])
        self.assertTrue(self.prepare())

    def test_stop(self):
        """A stop acknowledges what was handed over, deletes the queue, and leaves no timer."""
        self.connect()
        self.reply(1, {"task_id": "t", "status": "SUCCESS", "result": 1})
        stopped = self.queue.stop(5)
        said = self.peer.said("basic.ack", "queue.delete", "connection.close")
        self.assertEqual([one.name for one in said], ["basic.ack", "queue.delete", "connection.close"])
        self.successResultOf(stopped)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop_while_opening(self):
        """A stop while the queue is being opened deletes it, too."""
        self.prepare()
        self.peer.silent.add("basic.consume")
        self.peer.answer()
        stopped = self.queue.stop(5)
        self.peer.silent.clear()
        (asked,) = self.peer.said("basic.consume")
        self.peer.send(asked.channel, "basic.consume-ok", "me")
        self.assertEqual(len(self.peer.said("queue.delete")), 1)
        self.successResultOf(stopped)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop_unanswered(self):
        """A server that does not answer is left at the deadline, in whatever state it was."""
        for silent in ("queue.declare", "queue.delete", "connection.close"):
            self.attempts = Attempts(self.clock)
            self.queue = self.make()
            self.prepare()
            self.peer.silent.add(silent)
            self.peer.answer()
            stopped = self.queue.stop(5)
            self.peer.answer()
            self.clock.advance(5)
            self.peer.answer()
            self.clock.advance(0)
            self.peer.lose()
            self.successResultOf(stopped)
            self.assertEqual(self.clock.getDelayedCalls(), [], silent)

    def test_stop_before_anything(self):
        """A queue that was never asked for stops at once."""
        self.successResultOf(self.queue.stop(5))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_what_it_cannot_do(self):
        """A queue of replies knows no state, no group, and stores nothing."""
        self.assertIsNone(self.successResultOf(self.queue.fetch("t")))
        self.assertIsNone(self.successResultOf(self.queue.forget("t")))
        self.failureResultOf(self.queue.fetch_group("g"), ResultNotKept)
        self.queue.write(Write([("SET",)]), self.told.append)
        self.assertIsInstance(self.told[0], ResultNotKept)
        self.assertFalse(self.queue.rereadable)
