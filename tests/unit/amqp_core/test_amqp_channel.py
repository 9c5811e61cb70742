"""Channels on a scripted server: declarations, consumers, publishing, and every way to end."""

from __future__ import annotations

import gc
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.trial.unittest import SynchronousTestCase

from tests.support.amqp_peer import Peer, content, method
from twistedcelery.amqp.protocol import Delivery, QueueState
from twistedcelery.errors import (
    ConnectionLost,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
    Unroutable,
)


class Case(SynchronousTestCase):
    confirm = False

    def setUp(self):
        self.peer = Peer()
        self.protocol = self.peer.open()
        self.channel = self.peer.open_channel(confirm=self.confirm)
        self.closed: list[Exception] = []
        self.channel.on_closed = self.closed.append

    def assert_dropped(self, text):
        """The connection was dropped, because of the peer's error."""
        self.assertTrue(self.peer.transport.disconnecting)
        self.peer.lose()
        error = self.successResultOf(self.protocol.when_closed())
        self.assertIs(type(error), RemoteProtocolError)
        self.assertIn(text, str(error))


class OpenTests(Case):
    def test_open(self):
        """A channel is there when the server says so."""
        opened = self.protocol.open_channel()
        self.assertEqual(self.peer.read(), [(2, "channel.open", [""])])
        self.assertNoResult(opened)
        self.peer.send(2, "channel.open-ok")
        channel = self.successResultOf(opened)
        self.assertEqual((channel.number, channel.is_open, channel.connection), (2, True, self.protocol))
        self.assertEqual((channel.outstanding, repr(channel)), (0, "<Channel 2 open>"))

    def test_open_with_confirms(self):
        """Confirms are asked for in the same breath, and waited for."""
        opened = self.protocol.open_channel(confirm=True)
        self.assertEqual(self.peer.read(), [(2, "channel.open", [""]), (2, "confirm.select", [False])])
        self.peer.send(2, "channel.open-ok")
        self.assertNoResult(opened)
        self.peer.send(2, "confirm.select-ok")
        self.assertTrue(self.successResultOf(opened).is_open)

    def test_refused(self):
        """A channel that the server refuses is refused."""
        opened = self.protocol.open_channel(confirm=True)
        self.peer.send(2, "channel.close", 504, "CHANNEL_ERROR", 20, 10)
        self.assertEqual(self.failureResultOf(opened, Refused).value.code, 504)

    def test_cancelled(self):
        """A channel that nobody waits for any more is closed as soon as it is open."""
        for confirm in (False, True):
            opened = self.protocol.open_channel(confirm=confirm)
            number = self.peer.read()[0].channel
            opened.cancel()
            self.failureResultOf(opened, CancelledError)
            self.peer.send(number, "channel.open-ok")
            if confirm:
                self.peer.send(number, "confirm.select-ok")
            self.assertEqual(self.peer.names(), ["channel.close"])
            self.peer.send(number, "channel.close-ok")
            self.assertEqual(list(self.protocol._channels), [1])

    def test_no_more_numbers(self):
        """A connection with as many channels as it may have refuses another one."""
        peer = Peer(channel_max=1)
        protocol = peer.open()
        peer.open_channel()
        self.failureResultOf(protocol.open_channel(), LocalProtocolError)

    def test_connection_lost(self):
        """A channel that was being opened fails with its connection."""
        opened = self.protocol.open_channel(confirm=True)
        self.peer.lose()
        self.failureResultOf(opened, ConnectionLost)
        self.failureResultOf(self.protocol.open_channel(), ConnectionLost)


class MethodTests(Case):
    def check(self, deferred, name, values, answer, *answered):
        """This is asked, and that is the result of the answer."""
        self.assertEqual(self.peer.read(), [(1, name, values)])
        self.assertNoResult(deferred)
        self.peer.send(1, answer, *answered)
        return self.successResultOf(deferred)

    def test_declarations(self):
        """Each method writes its arguments in AMQP's order and gives what the server answers."""
        channel, table = self.channel, {"x-max-priority": 9}
        self.assertIsNone(
            self.check(
                channel.declare_exchange("e", "topic", durable=True, internal=True, arguments=table),
                "exchange.declare",
                [0, "e", "topic", False, True, False, True, False, table],
                "exchange.declare-ok",
            )
        )
        self.assertIsNone(
            self.check(
                channel.declare_exchange("e", "topic", passive=True, auto_delete=True),
                "exchange.declare",
                [0, "e", "topic", True, False, True, False, False, {}],
                "exchange.declare-ok",
            )
        )
        self.assertEqual(
            self.check(
                channel.declare_queue("", exclusive=True, arguments=table),
                "queue.declare",
                [0, "", False, False, True, False, False, table],
                "queue.declare-ok",
                "amq.gen-1",
                5,
                2,
            ),
            QueueState("amq.gen-1", messages=5, consumers=2),
        )
        self.check(
            channel.declare_queue("q", passive=True, durable=True, auto_delete=True),
            "queue.declare",
            [0, "q", True, True, False, True, False, {}],
            "queue.declare-ok",
            "q",
            0,
            0,
        )
        self.check(channel.bind_queue("q", "e", "k", table), "queue.bind", [0, "q", "e", "k", False, table],
                   "queue.bind-ok")  # fmt: skip
        self.check(channel.unbind_queue("q", "e", "k", table), "queue.unbind", [0, "q", "e", "k", table],
                   "queue.unbind-ok")  # fmt: skip
        self.check(channel.bind_exchange("d", "s", "k"), "exchange.bind", [0, "d", "s", "k", False, {}],
                   "exchange.bind-ok")  # fmt: skip
        self.assertEqual(
            self.check(channel.purge_queue("q"), "queue.purge", [0, "q", False], "queue.purge-ok", 7), 7
        )
        self.assertEqual(
            self.check(channel.delete_queue("q", if_unused=True), "queue.delete",
                       [0, "q", True, False, False], "queue.delete-ok", 3), 3
        )  # fmt: skip
        self.check(channel.qos(50), "basic.qos", [0, 50, False], "basic.qos-ok")

    def test_order(self):
        """Answers belong to the calls in the order of calling."""
        one, two = self.channel.declare_queue("one"), self.channel.declare_queue("two")
        self.peer.send(1, "queue.declare-ok", "one", 1, 0)
        self.assertEqual(self.successResultOf(one).name, "one")
        self.assertNoResult(two)
        self.peer.send(1, "queue.declare-ok", "two", 1, 0)
        self.assertEqual(self.successResultOf(two).name, "two")

    def test_cancel(self):
        """A cancelled call still takes its answer, which then goes nowhere."""
        one, two = self.channel.purge_queue("one"), self.channel.purge_queue("two")
        one.cancel()
        self.failureResultOf(one, CancelledError)
        self.peer.send(1, "queue.purge-ok", 1)
        self.assertNoResult(two)
        self.peer.send(1, "queue.purge-ok", 2)
        self.assertEqual(self.successResultOf(two), 2)
        self.assertEqual(len(self.channel._calls), 0)

    def test_unencodable(self):
        """An argument that AMQP cannot carry fails its call alone; nothing is written."""
        self.peer.read()
        failed = self.channel.declare_queue("q", arguments={"x-key": object()})
        self.assertIn("x-key", str(self.failureResultOf(failed, LocalProtocolError).value))
        self.assertEqual(self.peer.read(), [])
        self.check(self.channel.qos(1), "basic.qos", [0, 1, False], "basic.qos-ok")

    def test_refused(self):
        """A channel error fails what is pending on the channel, and closes nothing else."""
        other = self.peer.open_channel()
        first, second = self.channel.declare_queue("q"), self.channel.qos(1)
        self.peer.read()
        self.peer.send(1, "channel.close", 406, "PRECONDITION_FAILED - inequivalent arg 'durable'", 50, 10)
        self.assertEqual(self.peer.read(), [(1, "channel.close-ok", [])])
        for deferred in (first, second):
            error = self.failureResultOf(deferred, Refused).value
            self.assertEqual(error.code, 406)
            self.assertIn("inequivalent arg 'durable'", str(error))
            self.assertIn("amqp://test", str(error))
        self.assertEqual([getattr(error, "code", None) for error in self.closed], [406])
        self.assertEqual((self.channel.is_open, other.is_open), (False, True))
        self.failureResultOf(self.channel.qos(1), Refused)
        again = self.peer.open_channel()
        self.assertEqual((again.number, again.is_open), (1, True))
        self.peer.lose()
        self.assertEqual(len(self.closed), 1)

    def test_unexpected_answers(self):
        """An answer to what was not asked is an error of the peer's."""
        self.peer.send(1, "queue.purge-ok", 1)
        self.assert_dropped("queue.purge-ok")

    def test_wrong_answers(self):
        """So is an answer of the wrong kind."""
        declared = self.channel.declare_queue("q")
        self.peer.send(1, "queue.purge-ok", 1)
        self.assert_dropped("queue.purge-ok")
        lost = self.failureResultOf(declared, ConnectionLost).value
        self.assertIsInstance(lost.__cause__, RemoteProtocolError)
        self.assertEqual(len(self.closed), 1)


class ConsumeTests(Case):
    def consume(self, **options):
        self.messages: list[Delivery] = []
        self.cancels: list[bool] = []
        consumed = self.channel.consume(
            "q", self.messages.append, no_ack=False, consumer_tag="me",
            on_cancel=lambda: self.cancels.append(True), **options,
        )  # fmt: skip
        self.peer.read()
        self.peer.send(1, "basic.consume-ok", "me")
        return self.successResultOf(consumed)

    def test_messages(self):
        """Messages go to their consumer, from the answer on."""
        consumed = self.channel.consume("q", print, no_ack=True, exclusive=True, arguments={"x-priority": 1})
        self.assertEqual(
            self.peer.read(),
            [(1, "basic.consume", [0, "q", "", False, True, True, False, {"x-priority": 1}])],
        )
        self.peer.send(1, "basic.consume-ok", "made-up")
        self.assertEqual(self.successResultOf(consumed), "made-up")
        self.consume()
        self.peer.deliver(1, 1, b"a", properties={"correlation_id": "c"})
        self.peer.deliver(1, 2, b"b" * 300000, headers={"h": 1})
        first, second = self.messages
        self.assertEqual(
            (first.delivery_tag, first.body, first.properties), (1, b"a", {"correlation_id": "c"})
        )
        self.assertEqual((second.body, second.headers), (b"b" * 300000, {"h": 1}))

    def test_answer_and_message_at_once(self):
        """A message that comes in one piece with the answer is delivered."""
        got: list[Delivery] = []
        consumed = self.channel.consume("q", got.append, no_ack=True)
        self.protocol.dataReceived(
            method(1, "basic.consume-ok", "t")
            + method(1, "basic.deliver", "t", 1, False, "", "q")
            + content(1, b"x")
        )
        self.assertEqual(self.successResultOf(consumed), "t")
        self.assertEqual([message.body for message in got], [b"x"])

    def test_acknowledging(self):
        """Ack, nack and reject are written; on a closed channel they are without effect."""
        for closed in (False, True):
            self.channel.ack(5)
            self.channel.ack(6, multiple=True)
            self.channel.nack(7)
            self.channel.nack(8, multiple=True, requeue=False)
            self.channel.reject(9)
            self.channel.reject(10, requeue=False)
            expected = [] if closed else [
                (1, "basic.ack", [5, False]),
                (1, "basic.ack", [6, True]),
                (1, "basic.nack", [7, False, True]),
                (1, "basic.nack", [8, True, False]),
                (1, "basic.reject", [9, True]),
                (1, "basic.reject", [10, False]),
            ]  # fmt: skip
            self.assertEqual(self.peer.read(), expected)
            self.peer.send(1, "channel.close", 404, "", 0, 0)
            self.peer.read()
            if closed:
                break

    def test_cancel(self):
        """After a cancel, messages on their way still come; after its answer none may."""
        self.consume()
        cancelled = self.channel.cancel("me")
        self.assertEqual(self.peer.read(), [(1, "basic.cancel", ["me", False])])
        self.peer.deliver(1, 1, b"late")
        self.assertEqual(len(self.messages), 1)
        self.peer.send(1, "basic.cancel-ok", "me")
        self.assertIsNone(self.successResultOf(cancelled))
        self.assertEqual(self.cancels, [])
        self.peer.deliver(1, 2, b"too late")
        self.assert_dropped("unknown consumer 'me'")

    def test_cancelled_by_server(self):
        """A cancel of the server's is told, and answered where an answer is wanted."""
        for no_wait, answer in ((True, []), (False, [(1, "basic.cancel-ok", ["me"])])):
            self.consume()
            self.peer.send(1, "basic.cancel", "me", no_wait)
            self.assertEqual(self.cancels, [True])
            self.assertEqual(self.peer.read(), answer)
        self.peer.send(1, "basic.cancel", "somebody else", True)
        self.channel.consume("q", print, no_ack=True)
        self.peer.send(1, "basic.consume-ok", "silent")
        self.peer.send(1, "basic.cancel", "silent", True)
        self.assertEqual(self.channel._consumers, {})

    def test_cancelled_deferred(self):
        """A consumer that nobody waits for any more is ended, and what came for it goes back."""
        for no_ack in (False, True):
            consumed = self.channel.consume("q", print, no_ack=no_ack)
            consumed.cancel()
            self.failureResultOf(consumed, CancelledError)
            self.peer.read()
            self.peer.send(1, "basic.consume-ok", "t")
            self.assertEqual(self.peer.read(), [(1, "basic.cancel", ["t", False])])
            self.peer.deliver(1, 4, b"x", consumer="t")
            self.assertEqual(self.peer.read(), [] if no_ack else [(1, "basic.reject", [4, True])])
            self.peer.send(1, "basic.cancel-ok", "t")
            self.assertEqual(self.channel._consumers, {})

    def test_cancelled_deferred_on_a_dying_channel(self):
        """If the channel ends first, there is nothing left to end, and nothing is logged."""
        consumed = self.channel.consume("q", print, no_ack=False)
        consumed.cancel()
        self.failureResultOf(consumed, CancelledError)
        self.peer.send(1, "basic.consume-ok", "t")
        self.peer.send(1, "channel.close", 404, "gone", 0, 0)
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_get(self):
        """One message, or none."""
        got = self.channel.get("q", no_ack=False)
        self.assertEqual(self.peer.read(), [(1, "basic.get", [0, "q", False])])
        self.protocol.dataReceived(method(1, "basic.get-ok", 3, True, "e", "k", 9) + content(1, b"x"))
        message = self.successResultOf(got)
        assert message is not None
        self.assertEqual((message.delivery_tag, message.redelivered, message.body), (3, True, b"x"))
        got = self.channel.get("q", no_ack=True)
        self.peer.send(1, "basic.get-empty")
        self.assertIsNone(self.successResultOf(got))

    def test_cancelled_get(self):
        """A message that nobody waits for any more goes back, if it can."""
        self.peer.read()
        for no_ack, found, written in ((False, True, ["basic.reject"]), (True, True, []), (False, False, [])):
            got = self.channel.get("q", no_ack=no_ack)
            got.cancel()
            self.failureResultOf(got, CancelledError)
            self.peer.read()
            if found:
                self.protocol.dataReceived(method(1, "basic.get-ok", 3, False, "", "q", 0) + content(1, b"x"))
            else:
                self.peer.send(1, "basic.get-empty")
            self.assertEqual(self.peer.names(), written)

    def test_error_in_callback(self):
        """An error in a consumer is logged, and costs nothing else."""
        self.channel.consume("q", lambda message: 1 / 0, no_ack=True)
        self.peer.send(1, "basic.consume-ok", "me")
        self.peer.deliver(1, 1, b"")
        self.peer.deliver(1, 2, b"")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)
        self.assertTrue(self.channel.is_open)

    def test_nonsense_in_headers(self):
        """Nonsense that a consumer finds in a message's headers ends the connection."""
        self.channel.consume("q", lambda message: message.headers, no_ack=True)
        self.peer.send(1, "basic.consume-ok", "me")
        bad = content(1, b"", headers={"k": 1}).replace(b"I\0\0\0\1", b"Z\0\0\0\1")
        self.protocol.dataReceived(method(1, "basic.deliver", "me", 1, False, "", "q") + bad)
        self.assert_dropped("malformed table")


class PublishTests(Case):
    def test_without_confirms(self):
        """A publish is written at once; a returned message is nobody's, a confirm would be an error."""
        self.channel.publish("e", "k", {"priority": 1}, {"h": 2}, b"body", mandatory=True)
        publish, head, body = self.peer.read()
        self.assertEqual(publish, (1, "basic.publish", [0, "e", "k", True, False]))
        self.assertEqual(head.values, [4, {"priority": 1}, {"h": 2}])
        self.assertEqual(body.values, [b"body"])
        self.protocol.dataReceived(method(1, "basic.return", 312, "NO_ROUTE", "e", "k") + content(1, b"body"))
        self.assertEqual(self.channel.outstanding, 0)
        self.peer.send(1, "basic.ack", 1, False)
        self.assert_dropped("confirm")

    def test_negotiated_frame_size(self):
        """Bodies are split for the frame size that was agreed upon."""
        peer = Peer()
        peer.open(frame_max=4096)
        channel = peer.open_channel()
        channel.publish("", "q", {}, None, b"x" * 5000)
        self.assertEqual([len(seen.values[0]) for seen in peer.read() if seen.name == "body"], [4088, 912])

    def test_unencodable(self):
        """A message that AMQP cannot carry is refused at once, and nothing is written."""
        self.peer.read()
        self.assertRaises(
            LocalProtocolError, self.channel.publish, "", "q", {}, {"k": object()}, b"x" * 300000
        )
        self.assertEqual(self.peer.read(), [])

    def test_closed(self):
        """Nothing is published on a closed channel."""
        self.peer.send(1, "channel.close", 404, "", 0, 0)
        self.assertRaises(LocalProtocolError, self.channel.publish, "", "q", {}, None, b"")


class ConfirmTests(Case):
    confirm = True

    def setUp(self):
        super().setUp()
        self.outcomes: list[Any] = []
        self.channel.on_outcomes = self.outcomes.extend

    def publish(self, *tokens, **options):
        for token in tokens:
            self.channel.publish("", "q", {"correlation_id": token}, None, b"", token=token, **options)

    def bring_back(self, token, code=312):
        self.protocol.dataReceived(
            method(1, "basic.return", code, "NO_ROUTE", "", "q") + content(1, b"", {"correlation_id": token})
        )

    def test_acks(self):
        """Acks, one or many, settle in order."""
        self.publish(*"abcd")
        self.assertEqual(self.channel.outstanding, 4)
        self.peer.send(1, "basic.ack", 2, False)
        self.peer.send(1, "basic.ack", 3, True)
        self.assertEqual(self.outcomes, [("b", None), ("a", None), ("c", None)])
        self.assertEqual(self.channel.outstanding, 1)

    def test_nacks(self):
        """A nack refuses, one or many."""
        self.publish(*"abc")
        self.peer.send(1, "basic.nack", 1, False, False)
        self.peer.send(1, "basic.nack", 0, True, False)
        self.assertEqual([token for token, _ in self.outcomes], ["a", "b", "c"])
        self.assertEqual({type(error) for _, error in self.outcomes}, {Refused})

    def test_returns(self):
        """A returned message is unroutable once its ack comes; its neighbours are not."""
        self.publish("a", "b", mandatory=True)
        self.publish("c", immediate=True)
        self.bring_back("b")
        self.bring_back("c", 313)
        self.assertEqual(self.outcomes, [])
        self.peer.send(1, "basic.ack", 3, True)
        (_, a), (_, b), (_, c) = self.outcomes
        self.assertIsNone(a)
        self.assertEqual((type(b), b.code, type(c), c.code), (Unroutable, 312, Unroutable, 313))

    def test_return_of_nothing(self):
        """A returned message that matches no publish is logged, and nothing else."""
        self.publish("a")
        self.bring_back("a")
        self.peer.send(1, "basic.ack", 1, False)
        self.assertEqual(self.outcomes, [("a", None)])

    def test_nobody_listens(self):
        """Confirms without anybody to tell are taken all the same."""
        self.channel.on_outcomes = None
        self.publish("a", "b")
        self.peer.send(1, "basic.ack", 1, False)
        self.assertEqual(self.channel.outstanding, 1)
        self.peer.lose()

    def test_unknown_tag(self):
        """A confirm for what was never published is an error of the peer's."""
        self.publish("a")
        self.peer.send(1, "basic.ack", 2, False)
        self.assert_dropped("not outstanding")
        self.assertEqual([type(error) for _, error in self.outcomes], [ConnectionLost])

    def test_channel_error(self):
        """A channel error is the outcome of everything outstanding, in order, after the end was told: whoever hears may go on elsewhere."""
        self.channel.on_closed = lambda error: self.outcomes.append(("closed", error))
        self.publish(*"abc")
        self.peer.send(1, "basic.ack", 2, False)
        self.peer.send(1, "channel.close", 404, "NOT_FOUND - no exchange 'x'", 60, 40)
        self.assertEqual([token for token, _ in self.outcomes], ["b", "closed", "a", "c"])
        self.assertEqual({error.code for _, error in self.outcomes[1:]}, {404})

    def test_connection_lost(self):
        """So is a lost connection."""
        self.publish(*"abc")
        self.peer.lose()
        self.assertEqual([token for token, _ in self.outcomes], ["a", "b", "c"])
        self.assertEqual({type(error) for _, error in self.outcomes}, {ConnectionLost})
        self.assertEqual(len(self.closed), 1)
        self.assertEqual(self.channel.outstanding, 0)

    def test_error_in_callback(self):
        """An error in the callback is logged, and costs nothing else."""

        def on_outcomes(outcomes):
            self.outcomes += [token for token, _ in outcomes]
            raise ValueError

        self.channel.on_outcomes = on_outcomes
        self.publish(*"abc")
        self.peer.send(1, "basic.ack", 2, True)
        self.peer.lose()
        self.assertEqual(self.outcomes, ["a", "b", "c"])
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 2)

    def test_publishing_from_the_callback(self):
        """A callback may publish, also while the channel is being lost."""
        refused = []

        def again(token):
            try:
                self.publish(token + "'")
            except LocalProtocolError:
                refused.append(token)

        self.channel.on_outcomes = lambda outcomes: [again(token) for token, _ in outcomes]
        self.publish("a", "b")
        self.peer.send(1, "basic.ack", 1, False)
        self.assertEqual(self.channel.outstanding, 2)
        self.peer.send(1, "channel.close", 404, "", 0, 0)
        self.assertEqual(refused, ["b", "a'"])

    def test_ack_and_channel_error_at_once(self):
        """What a callback publishes goes out before the answer to a close that came in the same piece."""
        self.channel.on_outcomes = lambda outcomes: outcomes[0][1] or self.publish("again")
        self.publish("a")
        self.peer.read()
        self.protocol.dataReceived(
            method(1, "basic.ack", 1, False) + method(1, "channel.close", 404, "gone", 0, 0)
        )
        self.assertEqual(self.peer.names(), ["basic.publish", "content", "channel.close-ok"])


class CloseTests(Case):
    confirm = True

    def test_close(self):
        """A close fires with its answer, for everybody who asked; what was pending ends at once."""
        outcomes: list[Any] = []
        self.channel.on_outcomes = lambda told: outcomes.extend((token, type(error)) for token, error in told)
        self.channel.publish("", "q", {}, None, b"", token="a")
        pending = self.channel.qos(1)
        self.peer.read()
        one, two = self.channel.close(), self.channel.close()
        self.assertEqual(self.peer.read(), [(1, "channel.close", [200, "", 0, 0])])
        self.failureResultOf(pending, ConnectionLost)
        self.assertEqual(outcomes, [("a", ConnectionLost)])
        self.assertFalse(self.channel.is_open)
        self.peer.send(1, "basic.ack", 1, False)
        self.assertNoResult(one)
        self.peer.send(1, "channel.close-ok")
        self.assertEqual((self.successResultOf(one), self.successResultOf(two)), (None, None))
        self.assertIsNone(self.successResultOf(self.channel.close()))
        self.assertEqual(self.closed, [])
        self.assertEqual(self.protocol._channels, {})

    def test_cancel(self):
        """A cancelled close only stops waiting."""
        one, two = self.channel.close(), self.channel.close()
        one.cancel()
        self.failureResultOf(one, CancelledError)
        self.peer.send(1, "channel.close-ok")
        self.successResultOf(two)

    def test_connection_lost(self):
        """A close is complete when the connection is gone."""
        closing = self.channel.close()
        self.peer.lose()
        self.assertIsNone(self.successResultOf(closing))
        self.assertEqual(self.closed, [])

    def test_server_closed_first(self):
        """Closing a channel that the server has closed is done already."""
        self.peer.send(1, "channel.close", 404, "", 0, 0)
        self.assertIsNone(self.successResultOf(self.channel.close()))

    def test_nothing_is_kept(self):
        """A closed channel leaves nothing in any table."""
        consumed = self.channel.consume("q", print, no_ack=True)
        self.peer.send(1, "basic.consume-ok", "t")
        self.successResultOf(consumed)
        self.channel.close()
        self.peer.send(1, "channel.close-ok")
        self.assertEqual((self.protocol._channels, self.protocol._core._channels), ({}, {}))
        self.assertEqual((self.channel._consumers, len(self.channel._calls)), ({}, 0))
