"""What can be known of a state that cannot be decoded."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from enum import Enum

from celery.states import ALL_STATES, READY_STATES
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from twistedcelery._undecodable import is_passing

JSON = "application/json"
PICKLE = "application/x-python-serialize"


class Status(Enum):
    status = "status"


class PassingTests(SynchronousTestCase):
    def test_statuses(self):
        """A status that is not final is found, whatever the result holds, in JSON and in every protocol of pickle."""
        for status in [*ALL_STATES, "MINE"]:
            meta = {"status": status, "result": {"status": "PROGRESS"}, "task_id": "t"}
            passing = status not in READY_STATES
            self.assertEqual(is_passing(json.dumps(meta), JSON), passing, status)
            self.assertEqual(is_passing(json.dumps(meta).encode(), JSON), passing, status)
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                for made in (meta, OrderedDict(meta)):
                    self.assertEqual(is_passing(pickle.dumps(made, protocol), PICKLE), passing, status)

    def test_unknown(self):
        """What has no status that can be read may be the final state."""
        for body, kind in (
            (b"rubbish", JSON),
            (b"[]", JSON),
            (b"3", JSON),
            (b"{}", JSON),
            (b'{"status": 3}', JSON),
            (b"[" * 100_000, JSON),
            (b"rubbish", PICKLE),
            ("text", PICKLE),
            (pickle.dumps({"status": 3, "result": "x"}), PICKLE),
            (pickle.dumps({"status": Status.status, "result": "x"}), PICKLE),
            (pickle.dumps(["status"]), PICKLE),
            (b'{"status": "PROGRESS"}', None),
            (b'{"status": "PROGRESS"}', "application/x-yaml"),
        ):
            self.assertFalse(is_passing(body, kind), (body[:20], kind))

    def test_nothing_runs(self):
        """Nothing that a pickle names is run; its status is read all the same."""
        made = pickle.dumps({"status": "PROGRESS", "result": Bomb()})
        self.assertTrue(is_passing(made, PICKLE))

    @given(st.binary(), st.sampled_from([JSON, PICKLE]))
    def test_whatever(self, body, kind):
        """Whatever bytes come, the answer is yes or no."""
        self.assertIn(is_passing(body, kind), (True, False))


def explode():
    raise AssertionError("it was run")


class Bomb:
    def __reduce__(self):
        return explode, ()
