"""Replies in a list of Redis: taken in order, none lost with a connection, the list gone after an orderly stop."""

from __future__ import annotations

import base64
import json
import zlib
from itertools import product
from typing import Any

from celery import Celery
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from tests.support.redis_wires import Store, Wires
from tests.support.threads import ThreadedClock
from twistedcelery import _inflate
from twistedcelery._operations import Write
from twistedcelery.errors import AuthenticationFailed, Refused, ResultNotKept, ServerUnreachable
from twistedcelery.redis.protocol import CommandProtocol
from twistedcelery.redis.reply_list import ReplyList

URL = "redis://10.0.0.1:6379/0"
KEY = b"p_replies"
TAKEN = b"p_replies.taken"


def reply(task_id="1", status="SUCCESS", result=3, body=None, encoding="base64", **headers):
    meta = {"task_id": task_id, "status": status, "result": result, "traceback": None, "children": []}
    content = json.dumps(meta).encode() if body is None else body
    text = base64.b64encode(content).decode() if encoding == "base64" else content.decode()
    return json.dumps(
        {
            "body": text,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers,
            "properties": {"correlation_id": task_id, "body_encoding": encoding},
        }
    ).encode()


class Listener:
    def __init__(self):
        self.metas = []
        self.sizes = []
        self.failures = []
        self.lost = []

    def meta_received(self, meta, size=0):
        self.sizes.append(size)
        self.metas.append((meta["task_id"], meta["status"], meta["result"]))
        if meta["status"] == "SUCCESS":
            self.replies.unwatch(meta["task_id"])

    def result_failed(self, task_id, error):
        self.failures.append((task_id, error))
        self.replies.unwatch(task_id)

    def results_lost(self, error):
        self.lost.append(error)

    replies: ReplyList


NONSENSE = (b":5\r\n", b"*1\r\n:5\r\n")


class ReplyCase(SynchronousTestCase):
    def setUp(self):
        self.wires = Wires()
        self.clock = self.wires.clock = ThreadedClock()
        self.patch(_inflate, "in_thread", self.clock.in_thread)
        self.store: Store = self.wires.store
        self.server = URL
        app = Celery("proj", broker="redis://", backend="rpc://", set_as_current=False)
        self.listener = Listener()
        self.replies = ReplyList(
            self.wires.clock,
            self.wires.attempts(CommandProtocol),
            1,
            None,
            lambda failures: 0.2,
            server=lambda: self.server,
            queue="replies",
            key_of=lambda db, queue: f"p_{queue}",
            accept=app.backend.accept,
            meta_from_decoded=app.backend.meta_from_decoded,
            inflate_limit=1_000_000,
        )
        self.replies.listen(self.listener)
        self.listener.replies = self.replies
        # A blocking command is answered when the test says so.
        self.store.answers[b"BRPOPLPUSH"] = b""

    @property
    def connection(self):
        return self.wires.of(CommandProtocol)

    def watch(self, *task_ids):
        for task_id in task_ids:
            self.replies.watch(task_id)
        self.wires.flush()

    def arrive(self, *values):
        """Replies arrive: Redis answers the blocked command with the first, as far as there is one."""
        for value in values:
            self.store.lists.setdefault(KEY, []).insert(0, value)
        self.connection.send(self.store.do_brpoplpush([b"", KEY, TAKEN]))
        self.wires.flush()

    def names(self):
        return [b" ".join(command[:2]) for command in self.connection.commands]

    def tearDown(self):
        stopped = self.replies.stop(1)
        self.wires.flush()
        self.wires.pass_time(2)
        self.successResultOf(stopped)
        self.assertEqual(self.wires.clock.getDelayedCalls(), [])


class ReplyTests(ReplyCase):
    def test_waited_for(self):
        """A reply is handed over, then removed; with nobody waiting nothing more is asked."""
        self.assertTrue(self.replies.prepare(lambda _: None))
        self.watch("1")
        self.assertEqual(
            self.names(), [b"LRANGE " + TAKEN, b"DEL " + TAKEN, b"LRANGE " + KEY, b"BRPOPLPUSH " + KEY]
        )
        self.arrive(reply())
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])
        self.assertEqual(self.store.lists.get(TAKEN, []), [])
        self.assertEqual(self.names(), [b"DEL " + TAKEN, b"LRANGE " + KEY])
        self.watch("2")
        self.assertEqual(self.names(), [b"LRANGE " + KEY, b"BRPOPLPUSH " + KEY])
        self.arrive(reply("2"))

    def test_nonsense(self):
        """Answers that no Redis gives end the connection; the next one is read from."""
        for name, answer in product((b"LRANGE", b"BRPOPLPUSH"), NONSENSE):
            self.setUp()
            self.store.answers[name] = answer
            self.watch("1")
            connection = self.connection
            self.wires.flush()
            self.assertTrue(connection.lost)
            self.store.answers = {b"BRPOPLPUSH": b""}
            self.wires.pass_time(0.5)
            self.arrive(reply())
            self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])
            self.tearDown()

    def test_in_order(self):
        """Replies come in the order in which they were pushed, whether waited for or found."""
        self.watch("1", "2")
        self.arrive(*(reply("1", "PROGRESS", number) for number in range(100)), reply("1"), reply("2"))
        self.assertEqual([result for _, _, result in self.listener.metas], [*range(100), 3, 3])
        self.assertEqual(self.store.lists[KEY], [])

    def test_waited_for_from_within(self):
        """Who begins to wait while a reply is handed over joins in: nobody reads twice, so nothing is removed unread."""
        self.watch("1", "2")
        self.names()

        def received(meta, size):
            Listener.meta_received(self.listener, meta, size)
            if meta["task_id"] in "12":
                self.replies.watch(f"{meta['task_id']}0")

        self.patch(self.listener, "meta_received", received)
        self.arrive(reply("1"), reply("2"), reply("10"), reply("20"))
        self.assertEqual([task_id for task_id, _, _ in self.listener.metas], ["1", "2", "10", "20"])
        self.assertEqual(self.names().count(b"LTRIM " + KEY), 1)
        self.assertEqual(self.store.lists[KEY], [])

    def test_nothing_came(self):
        """After a while without a reply it is waited for anew, as long as somebody waits."""
        self.watch("1")
        self.names()
        self.arrive()
        self.assertEqual(self.names(), [b"LRANGE " + KEY, b"BRPOPLPUSH " + KEY])
        self.replies.unwatch("1")
        self.arrive()
        self.assertEqual(self.names(), [b"LRANGE " + KEY])

    def test_text_and_compression(self):
        """A body may be plain text, and may be compressed."""
        self.watch("1", "2")
        zipped = zlib.compress(json.dumps({"task_id": "2", "status": "SUCCESS", "result": 4}).encode())
        self.arrive(reply(encoding="utf-8"), reply("2", body=zipped, compression="application/x-gzip"))
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3), ("2", "SUCCESS", 4)])
        self.assertEqual(self.listener.sizes[1], len(zlib.decompress(zipped)))

    def test_not_a_result(self):
        """A reply that is no result fails the wait that it names, and no other."""
        logged: list[Any] = []
        observe: Any = logged.append
        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)
        self.watch("1", "2", "3", "4")
        half = reply("4", body=b'{"task_id": "4", "status": "SUCCESS"}')
        rubbish = (reply(body=b"rubbish"), b"rubbish", b"[]", reply("3", body=b'{"task_id": 7}'), half)
        self.arrive(*rubbish, reply("2"))
        self.assertEqual([task_id for task_id, _ in self.listener.failures], ["1", "3", "4"])
        self.assertIsInstance(self.listener.failures[0][1], ResultNotKept)
        self.assertEqual(self.listener.metas, [("2", "SUCCESS", 3)])
        dropped = [event for event in logged if "correlation id" in event["log_format"]]
        self.assertEqual(len(dropped), 2)

    def test_undecodable_and_not_final(self):
        """A state that is not final and cannot be decoded is left out; the final one decides."""
        self.watch("1")
        progress = json.dumps({"task_id": "1", "status": "RETRY", "result": {"no": "exception"}}).encode()
        self.arrive(reply(body=progress), reply(body=progress, encoding="utf-8"), reply())
        self.assertEqual((self.listener.metas, self.listener.failures), ([("1", "SUCCESS", 3)], []))


class ConnectionTests(ReplyCase):
    def test_lost_before_it_was_handed_over(self):
        """A reply that was on its way when the connection ended is found in the second list."""
        self.watch("1")
        self.store.lists[TAKEN] = [reply()]
        self.connection.lose()
        self.wires.pass_time(0.5)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])
        self.assertEqual(self.store.lists.get(TAKEN, []), [])

    def test_lost_before_it_was_removed(self):
        """What was handed over and not removed comes twice."""
        self.watch("1", "2")
        self.store.answers[b"LTRIM"] = b""
        self.store.lists[KEY] = [reply()]
        self.connection.lose()
        self.wires.pass_time(0.5)
        self.connection.lose()
        self.wires.pass_time(0.5)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)] * 2)

    def test_loading(self):
        """A server that cannot answer now is asked again."""
        self.store.answers[b"LRANGE"] = b"-LOADING\r\n"
        self.watch("1")
        self.store.lists[KEY] = [reply()]
        self.connection.peer.answers[b"LRANGE"] = self.store.do_lrange
        self.wires.pass_time(0.2)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_lost_in_a_pause(self):
        """A connection that ends while the server is given a rest is replaced, and there is one loop, not two."""
        self.store.answers[b"LRANGE"] = b"-LOADING\r\n"
        self.watch("1")
        del self.store.answers[b"LRANGE"]
        self.connection.lose()
        self.wires.pass_time(0.5)
        self.assertEqual(self.names().count(b"BRPOPLPUSH " + KEY), 1)

    def test_refused(self):
        """Where the server will not have it, those who wait are told; the next wait tries again."""
        self.store.answers[b"LRANGE"] = b"-NOPERM no permissions\r\n"
        self.watch("1")
        self.assertIsInstance(self.listener.lost[0], Refused)
        self.replies.unwatch("1")
        self.connection.peer.answers[b"LRANGE"] = self.store.do_lrange
        self.store.lists[KEY] = [reply("2")]
        self.watch("2")
        self.assertEqual(self.listener.metas, [("2", "SUCCESS", 3)])

    def test_refused_for_a_while(self):
        """What a server has refused is asked for again: a call that had not left by then waits on."""
        for name in (b"LRANGE", b"BRPOPLPUSH"):
            self.setUp()
            self.store.answers[name] = b"-NOPERM no permissions\r\n"
            self.watch("1")
            self.assertIsInstance(self.listener.lost.pop(), Refused)
            self.store.lists[KEY] = [reply()]
            self.connection.peer.answers[name] = getattr(self.store, f"do_{name.decode().lower()}")
            self.wires.pass_time(9)
            self.assertEqual((self.listener.metas, self.listener.lost), ([], []))
            self.wires.pass_time(2)
            self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_refused_and_left_alone(self):
        """With nobody waiting a server that has refused is not asked again; what is left there is read when somebody waits."""
        self.store.answers[b"LRANGE"] = b"-NOPERM no permissions\r\n"
        self.watch("1")
        self.replies.unwatch("1")
        self.names()
        self.wires.pass_time(20)
        self.assertEqual(self.names(), [])
        self.connection.peer.answers[b"LRANGE"] = self.store.do_lrange
        self.store.lists[TAKEN] = [reply("2")]
        self.watch("2")
        self.assertEqual(self.listener.metas, [("2", "SUCCESS", 3)])

    def test_shut_out_for_a_while(self):
        """A server that refuses the login is tried again in a while, as long as somebody waits."""
        self.wires.refusals.append(AuthenticationFailed("no"))
        self.watch("1")
        self.assertEqual(len(self.listener.lost), 1)
        self.store.lists[KEY] = [reply()]
        self.wires.pass_time(11)
        self.assertEqual(self.listener.metas, [("1", "SUCCESS", 3)])

    def test_rounds(self):
        """A server that is away is tried again; where no attempt can help, those who wait are told."""
        self.wires.refusals.append(ServerUnreachable("no"))
        self.watch("1")
        self.assertEqual(self.listener.lost, [])
        self.wires.refusals.append(AuthenticationFailed("no"))
        self.wires.pass_time(0.5)
        self.assertEqual(len(self.listener.lost), 1)

    def test_another_server(self):
        """When the broker has gone to another server, so do the replies."""
        self.watch("1")
        first = self.connection
        self.server = "redis://10.0.0.2:6379/0"
        self.assertTrue(self.replies.prepare(lambda _: None))
        self.wires.pass_time(0.5)
        self.assertTrue(first.lost)
        self.assertIsNot(self.connection, first)


class StopTests(ReplyCase):
    def test_deleted(self):
        """An orderly stop waits for the blocked command, and deletes both lists."""
        self.watch("1")
        self.names()
        stopped = self.replies.stop(5)
        self.wires.flush()
        self.assertNoResult(stopped)
        self.arrive()
        self.successResultOf(stopped)
        self.assertEqual(self.names()[-1], b"DEL " + KEY)
        self.watch("2")
        self.assertTrue(self.connection.lost)

    def test_nothing_to_wait_for(self):
        """Without a blocked command a stop is immediate, and without a connection too."""
        self.watch("1")
        self.arrive(reply())
        stopped = self.replies.stop(5)
        self.wires.flush()
        self.successResultOf(stopped)
        self.successResultOf(self.replies.stop(5))

    def test_silent_server(self):
        """A stop has its deadline."""
        self.watch("1")
        stopped = self.replies.stop(5)
        self.wires.pass_time(5.2)
        self.successResultOf(stopped)

    def test_lost(self):
        """A connection that ends during the stop ends it."""
        self.watch("1")
        stopped = self.replies.stop(5)
        self.connection.lose()
        self.wires.flush()
        self.successResultOf(stopped)

    def test_lost_without_room(self):
        """So does one that ends while a question waits for room."""
        self.watch("1")
        self.connection.protocol.pauseProducing()
        self.arrive(reply())
        stopped = self.replies.stop(5)
        self.assertNoResult(stopped)
        self.connection.lose()
        self.wires.flush()
        self.successResultOf(stopped)

    def test_in_a_pause(self):
        """A stop while the server is given a rest leaves no timer."""
        self.store.answers[b"LRANGE"] = b"-LOADING\r\n"
        self.watch("1")
        stopped = self.replies.stop(5)
        self.wires.flush()
        self.successResultOf(stopped)


class SizeTests(ReplyCase):
    """How many replies are read at once goes by their size: together they must not be more than one answer may have."""

    def counts(self):
        return [int(command[2]) for command in self.connection.commands if command[0:2] == [b"LRANGE", KEY]]

    def test_small(self):
        """Small ones are read in ever larger batches."""
        self.watch("1")
        self.counts()
        self.arrive(*(reply("1", "PROGRESS", number) for number in range(300)))
        self.assertEqual(self.counts(), [-8, -16, -32, -64, -64, -64, -64, -64])
        self.arrive(reply("1"))
        self.assertEqual(len(self.listener.metas), 301)

    def test_large(self):
        """After a batch that is large, fewer are read."""
        self.watch("1")
        self.counts()
        self.arrive(*(reply("1", "PROGRESS", "x" * 40_000) for number in range(20)), reply("1"))
        self.assertEqual(self.counts()[:5], [-8, -1, -2, -4, -8])
        self.assertEqual(len(self.listener.metas), 21)

    def test_too_large(self):
        """Where those of an answer are more than a connection takes, the next one reads them one by one, and none is stuck."""
        self.watch("1", "2")
        # The rest of it never comes.
        self.connection.peer.answers[b"LRANGE"] = b"*8\r\n"
        self.arrive(*(reply("1", "PROGRESS", "x" * 20_000) for number in range(10)), reply("1"), reply("2"))
        self.connection.lose()
        self.wires.pass_time(0.5)
        self.assertEqual(self.counts()[:2], [-1, -2])
        self.assertEqual(
            [status for _, status, _ in self.listener.metas], ["PROGRESS"] * 10 + ["SUCCESS"] * 2
        )


class UnreadTests(ReplyCase):
    """A server that answers what it has not read."""

    def test_not_asked_without_room(self):
        """While the transport has enough, nothing more is asked; when it has room again, it goes on."""
        self.watch("1")
        self.names()
        self.connection.protocol.pauseProducing()
        for _ in range(100):
            # To BRPOPLPUSH, LRANGE, BRPOPLPUSH ...: nothing there.
            self.connection.protocol.dataReceived(b"$-1\r\n*0\r\n")
            if self.connection.transport.disconnecting:
                break
        self.assertEqual(self.connection.transport.value(), b"")
        self.connection.lose()
        self.wires.pass_time(0.5)
        self.names()
        self.connection.protocol.pauseProducing()
        self.arrive(reply("1", "PROGRESS", 1))
        self.assertEqual(self.names(), [])
        self.connection.protocol.resumeProducing()
        self.wires.flush()
        self.assertEqual(self.names(), [b"DEL " + TAKEN, b"LRANGE " + KEY, b"BRPOPLPUSH " + KEY])
        self.assertEqual(self.listener.metas, [("1", "PROGRESS", 1)])
        self.arrive(reply("1"))

    def test_stop(self):
        """A stop meanwhile has its deadline, and a connection that ends leaves nothing."""
        for ends in (False, True):
            self.setUp()
            self.watch("1")
            self.connection.protocol.pauseProducing()
            self.arrive(reply("1", "PROGRESS", 1))
            stopped = self.replies.stop(5)
            if ends:
                self.connection.lose()
                self.wires.flush()
            self.wires.pass_time(5.2)
            self.successResultOf(stopped)


def big(task_id="1", status="SUCCESS", size=200_000):
    """Make a reply that is large once it is decompressed."""
    body = json.dumps({"task_id": task_id, "status": status, "result": "x" * size}).encode()
    return reply(task_id, body=zlib.compress(body), compression="application/x-gzip")


class InflatingTests(ReplyCase):
    def statuses(self):
        return [(task_id, status) for task_id, status, _ in self.listener.metas]

    def test_in_a_thread(self):
        """What takes its time to decompress is not done here; all come in order, and are removed after that."""
        self.watch("1", "2", "3")
        self.names()
        self.arrive(big(status="PROGRESS"), reply("1"), reply("2"))
        self.assertEqual((self.listener.metas, self.names()), ([], []))
        self.clock.work()
        self.wires.flush()
        self.assertEqual(self.statuses(), [("1", "PROGRESS"), ("1", "SUCCESS"), ("2", "SUCCESS")])
        self.assertEqual(
            self.names(),
            [b"DEL " + TAKEN, b"LRANGE " + KEY, b"LTRIM " + KEY, b"LRANGE " + KEY, b"BRPOPLPUSH " + KEY],
        )
        self.arrive(reply("3"), big("4"), reply("5"))
        self.assertEqual(self.names(), [b"DEL " + TAKEN, b"LRANGE " + KEY])
        self.clock.work()
        self.wires.flush()
        self.assertEqual(self.statuses()[3:], [("3", "SUCCESS"), ("4", "SUCCESS"), ("5", "SUCCESS")])
        self.assertEqual(self.store.lists[KEY], [])

    def test_limit(self):
        """A reply that is larger than ``inflate_limit`` fails the wait that it names, and no other; nonsense waits its turn."""
        self.watch("1", "2")
        self.arrive(big(size=1_000_000), reply(body=b"rubbish"), b"rubbish", reply("2"))
        self.assertEqual(self.listener.failures, [])
        self.clock.work()
        self.wires.flush()
        self.assertEqual([task_id for task_id, _ in self.listener.failures], ["1", "1"])
        self.assertIn("inflate_limit", str(self.listener.failures[0][1]))
        self.assertIn("JSON", repr(self.listener.failures[1][1]))
        self.assertEqual(self.statuses(), [("2", "SUCCESS")])
        self.replies.watch("1")

    def test_waited_for_from_within(self):
        """Who begins to wait meanwhile joins in: nobody reads twice."""
        self.watch("1")
        self.names()
        self.arrive(big())
        self.watch("2")
        self.assertEqual(self.names(), [])
        self.clock.work()
        self.wires.flush()
        self.assertEqual(self.names(), [b"DEL " + TAKEN, b"LRANGE " + KEY, b"BRPOPLPUSH " + KEY])

    def test_lost(self):
        """What has come is handed over, though its connection is gone; the next one brings it again, and removes it then."""
        self.watch("1", "2")
        self.arrive(big(), reply("2"))
        self.connection.lose()
        self.wires.pass_time(0.5)
        self.assertEqual(self.names(), [b"LRANGE " + TAKEN])
        self.clock.work()
        self.wires.flush()
        self.assertEqual(self.statuses(), [("1", "SUCCESS")])
        self.assertEqual(self.names(), [])
        self.clock.work()
        self.wires.flush()
        self.assertEqual(self.statuses(), [("1", "SUCCESS"), ("1", "SUCCESS"), ("2", "SUCCESS")])
        self.assertEqual((self.store.lists[KEY], self.store.lists.get(TAKEN, [])), ([], []))

    def test_stop(self):
        """Before a stop what has come is handed over, if there is time; a stop leaves nothing behind, and ends on time."""
        for works in (True, False):
            self.setUp()
            self.watch("1")
            self.arrive(big())
            handing = self.replies.hand_over(2)
            self.assertNoResult(handing)
            if works:
                self.clock.work()
                self.wires.flush()
            else:
                self.wires.pass_time(2.1)
            self.successResultOf(handing)
            self.assertEqual(self.statuses(), [("1", "SUCCESS")] * works)
            stopped = self.replies.stop(5)
            self.wires.flush()
            self.successResultOf(stopped)
            self.assertEqual(self.names()[-1], b"DEL " + KEY)
            if not works:
                self.clock.work()
            self.assertEqual((self.statuses(), self.listener.failures), ([("1", "SUCCESS")] * works, []))


class OtherTests(ReplyCase):
    def test_what_a_list_cannot_do(self):
        """Nothing is kept, so nothing can be read or written."""
        self.assertFalse(self.replies.rereadable)
        self.assertIsNone(self.successResultOf(self.replies.fetch("1")))
        self.failureResultOf(self.replies.fetch_group("1"), ResultNotKept)
        self.assertIsNone(self.successResultOf(self.replies.forget("1")))
        outcomes: list[Exception | None] = []
        self.replies.write(Write([("SET", "a", "b")]), outcomes.append)
        self.assertIsInstance(outcomes[0], ResultNotKept)
        self.assertEqual(self.replies.url, "")
