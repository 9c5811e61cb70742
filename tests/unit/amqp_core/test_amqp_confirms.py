"""Publisher confirms: which publish has which outcome."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery.amqp.codec import encode_properties
from twistedcelery.amqp.confirms import Confirms
from twistedcelery.amqp.events import Returned
from twistedcelery.errors import RemoteProtocolError, Unroutable


def returned(key, exchange="", code=312, text="NO_ROUTE", **properties):
    """A message that came back."""
    event = Returned(1, code, text, exchange, key)
    event.content = bytes(12) + encode_properties(properties, None)
    return event


class ConfirmsTests(SynchronousTestCase):
    def setUp(self):
        self.confirms = Confirms()

    def publish(self, *tokens):
        for token in tokens:
            self.confirms.published(token)

    def publish_mandatory(self, token, key="q", **properties):
        self.confirms.published_mandatory(token, "", key, properties)

    def settle(self, tag, multiple=False):
        """Settle, and return tokens in order, marked where they were returned."""
        outcome: list[Any] = self.confirms.settle(tag, multiple=multiple)
        return [token if reason is None else (token, reason.code) for token, reason in outcome]

    def assert_empty(self):
        for name in ("_outstanding", "_keys", "_by_key", "_returned"):
            self.assertFalse(getattr(self.confirms, name), name)
        self.assertEqual(len(self.confirms), 0)

    def test_one_by_one(self):
        """Single acks settle their own publish, in any order."""
        self.publish("a", "b", "c")
        self.assertEqual(len(self.confirms), 3)
        self.assertEqual([self.settle(2), self.settle(3), self.settle(1)], [["b"], ["c"], ["a"]])
        self.assert_empty()

    def test_multiple(self):
        """A multiple ack settles everything up to its number, in order; number 0 means all."""
        self.publish(*"abcde")
        self.settle(2)
        self.assertEqual(self.settle(3, multiple=True), ["a", "c"])
        self.assertEqual(self.settle(3, multiple=True), [])
        self.publish("f")
        self.assertEqual(self.settle(0, multiple=True), ["d", "e", "f"])
        self.assertEqual(self.settle(0, multiple=True), [])
        self.assert_empty()

    def test_not_outstanding(self):
        """An ack for what was not published, or was acked before, is an error of the peer's."""
        self.publish("a", "b")
        self.settle(1)
        for tag, multiple in ((1, False), (3, False), (0, False), (3, True), (2**63, True)):
            with self.subTest(tag=tag, multiple=multiple):
                self.assertRaises(RemoteProtocolError, self.settle, tag, multiple)
        self.assertEqual(self.settle(2), ["b"])

    def test_empty_ids(self):
        """Ids that are empty, whatever they are, are the same as none: they are written as nothing."""
        empty: Any
        for empty in ([], {}, "", None):
            self.publish_mandatory("m", message_id=empty, correlation_id=empty)
        self.assertTrue(self.confirms.returned(returned("q", message_id="", correlation_id=""), "amqp://"))
        self.assertEqual(self.settle(0, multiple=True), [("m", 312), "m", "m", "m"])
        self.assert_empty()

    def test_return_by_message_id(self):
        """A return finds its publish by the ids that it carries, whichever order they come in."""
        for number in range(3):
            self.publish_mandatory(number, message_id=f"m{number}", correlation_id="c")
        self.assertTrue(self.confirms.returned(returned("q", message_id="m2", correlation_id="c"), "url"))
        self.assertTrue(self.confirms.returned(returned("q", message_id="m0", correlation_id="c"), "url"))
        self.assertEqual(self.settle(3, multiple=True), [(0, 312), 1, (2, 312)])
        self.assert_empty()

    def test_outcome(self):
        """The outcome of a returned message says what was returned and why."""
        self.publish_mandatory("a", "nowhere", correlation_id="c")
        self.confirms.returned(
            returned("nowhere", code=313, text="NO_CONSUMERS", correlation_id="c"), "amqp://h"
        )
        ((_, error),) = self.confirms.settle(1, multiple=False)
        assert isinstance(error, Unroutable)
        self.assertEqual((error.code, error.exchange, error.routing_key), (313, "", "nowhere"))
        self.assertIn("NO_CONSUMERS", str(error))
        self.assertIn("amqp://h", str(error))

    def test_same_ids(self):
        """Of publishes with the same ids, a retried message for example, the oldest is taken."""
        for token in "abc":
            self.publish_mandatory(token, correlation_id="c")
        self.confirms.returned(returned("q", correlation_id="c"), "")
        self.confirms.returned(returned("q", correlation_id="c"), "")
        self.assertEqual(self.settle(3, multiple=True), [("a", 312), ("b", 312), "c"])
        self.assert_empty()

    def test_ids_that_the_server_changed(self):
        """Without a match by ids, the oldest mandatory publish to that exchange and routing key is taken."""
        self.publish_mandatory("other", "elsewhere", correlation_id="x")
        self.publish("not mandatory")
        self.publish_mandatory("a", correlation_id="x")
        self.publish_mandatory("b", correlation_id="y")
        self.assertTrue(self.confirms.returned(returned("q"), ""))
        self.assertEqual(self.settle(0, multiple=True), ["other", "not mandatory", ("a", 312), "b"])
        self.assert_empty()

    def test_nothing_to_return(self):
        """A return of what was not published as mandatory is nobody's."""
        self.publish("a")
        self.publish_mandatory("b", "elsewhere")
        self.assertFalse(self.confirms.returned(returned("q"), ""))
        self.settle(2)
        self.assertFalse(self.confirms.returned(returned("elsewhere"), ""))
        self.assertEqual(self.settle(1), ["a"])
        self.assert_empty()

    def test_clear(self):
        """What has no outcome is handed out in the order of publishing, and nothing is left."""
        self.publish("a")
        self.publish_mandatory("b", correlation_id="c")
        self.publish_mandatory("c", correlation_id="c")
        self.publish_mandatory("d")
        self.confirms.returned(returned("q", correlation_id="c"), "")
        self.settle(1)
        self.assertEqual(self.confirms.clear(), ["b", "c", "d"])
        self.assert_empty()

    @given(st.lists(st.tuples(st.sampled_from("pmsxr"), st.integers(0, 12)), max_size=60))
    def test_model(self, steps):
        """Whatever happens, every publish has exactly one outcome, and returns go to the right ones."""
        self.confirms = Confirms()
        pending: dict[int, bool] = {}
        settled: dict[int, bool] = {}
        tag = 0
        for step, number in steps:
            if step in "pm":
                tag += 1
                pending[tag] = False
                if step == "p":
                    self.publish(tag)
                else:
                    self.publish_mandatory(tag, message_id=str(tag))
            elif step == "r":
                known = self.confirms._keys.get(number)
                if known:
                    self.assertTrue(self.confirms.returned(returned("q", message_id=str(number)), ""))
                    pending[number] = True
            elif step == "s" and number in pending:
                ((token, why),) = self.confirms.settle(number, multiple=False)
                self.assertEqual((token, why is not None), (number, pending.pop(number)))
                settled[number] = True
            elif step == "x" and 0 < number <= tag:
                for token, why in self.confirms.settle(number, multiple=True):
                    assert isinstance(token, int)
                    self.assertLessEqual(token, number)
                    self.assertEqual(why is not None, pending.pop(token))
                    self.assertNotIn(token, settled)
                    settled[token] = True
            self.assertEqual(len(self.confirms), len(pending))
        self.assertEqual(self.confirms.clear(), list(pending))
        self.assert_empty()

    def test_cost_does_not_grow(self):
        """The tags looked at per multiple ack are those it covers, not all that were ever published."""
        looked = 0

        class Counting(dict[Any, Any]):
            def pop(self, *arguments):
                nonlocal looked
                looked += 1
                return super().pop(*arguments)

        self.confirms._outstanding = Counting()
        self.publish(*range(10000))
        for tag in range(10, 10001, 10):
            self.assertEqual(len(self.settle(tag, multiple=True)), 10)
        self.assertEqual(looked, 10000)
