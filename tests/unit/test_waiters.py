"""The table of waits: who is told what, and that nothing is left behind."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from twistedcelery._waiters import Waiters


class Recording:
    """A waiter that remembers what it was told."""

    def __init__(self):
        self.states = []
        self.errors = []

    def state_received(self, meta):
        self.states.append(meta["status"])

    def wait_failed(self, task_id, error):
        self.errors.append((task_id, error))

    def never_sent(self, task_id, error):
        self.errors.append((task_id, error))
        return True

    def forget(self, task_id, error):
        self.errors.append((task_id, error))

    def fail(self, error):
        raise AssertionError("the table fails a wait by its id")

    lose = fail


def meta(status, task_id="t", result=None):
    return {"task_id": task_id, "status": status, "result": result}


class WaitersTests(SynchronousTestCase):
    def setUp(self):
        self.watched: list[tuple[str, str]] = []
        self.waiters = Waiters(
            lambda task_id: self.watched.append(("watch", task_id)),
            lambda task_id: self.watched.append(("unwatch", task_id)),
            unclaimed_limit=3,
        )

    def test_final_state_settles_and_removes(self):
        """A final state reaches the waiter, and the table is empty after it."""
        waiter = Recording()
        self.waiters.add("t", waiter)
        self.assertIn("t", self.waiters)
        self.waiters.meta_received(meta("SUCCESS"))
        self.assertEqual(waiter.states, ["SUCCESS"])
        self.assertEqual(len(self.waiters), 0)
        self.assertEqual(self.watched, [("watch", "t"), ("unwatch", "t")])

    def test_other_states_do_not_settle(self):
        """STARTED and custom states are handed on, the newest is remembered, and the wait goes on."""
        waiter = Recording()
        self.waiters.add("t", waiter)
        for status in ("STARTED", "PROGRESS", "RETRY"):
            self.waiters.meta_received(meta(status))
        self.assertEqual(waiter.states, ["STARTED", "PROGRESS", "RETRY"])
        self.assertEqual(self.waiters.last_states["t"]["status"], "RETRY")
        self.waiters.meta_received(meta("FAILURE"))
        self.assertEqual(waiter.states[-1], "FAILURE")
        self.assertEqual(self.waiters.last_states, {})

    def test_several_waiters_share_one_watch(self):
        """The source is asked once for an id, and let go when the last waiter has left."""
        first, second, third = Recording(), Recording(), Recording()
        for waiter in (first, second, third):
            self.waiters.add("t", waiter)
        self.assertEqual(list(self.waiters), ["t"])
        self.waiters.discard("t", second)
        self.waiters.meta_received(meta("STARTED"))
        self.waiters.discard("t", first)
        self.assertEqual(self.watched, [("watch", "t")])
        self.waiters.discard("t", third)
        self.assertEqual(self.watched, [("watch", "t"), ("unwatch", "t")])
        self.assertEqual((first.states, second.states, third.states), (["STARTED"], [], ["STARTED"]))
        self.assertEqual(self.waiters.last_states, {})

    def test_all_of_several_are_settled(self):
        """Each waiter of an id has its final state."""
        first, second = Recording(), Recording()
        self.waiters.add("t", first)
        self.waiters.add("t", second)
        self.waiters.meta_received(meta("SUCCESS"))
        self.assertEqual((first.states, second.states), (["SUCCESS"], ["SUCCESS"]))
        self.assertEqual(len(self.waiters), 0)

    def test_discarding_a_stranger_changes_nothing(self):
        """Discarding somebody who does not wait leaves the table as it is."""
        waiter = Recording()
        self.waiters.add("t", waiter)
        self.waiters.discard("t", Recording())
        self.waiters.discard("u", waiter)
        self.assertEqual(list(self.waiters), ["t"])

    def test_early_result_is_found(self):
        """A final state that came before anybody waited is handed over at once, without a watch."""
        self.waiters.meta_received(meta("SUCCESS"))
        waiter = Recording()
        self.waiters.add("t", waiter)
        self.assertEqual(waiter.states, ["SUCCESS"])
        self.assertEqual((len(self.waiters), self.watched, self.waiters.unclaimed), (0, [], {}))

    def test_early_progress_is_found(self):
        """A state that came early and is not final is handed over, and the wait begins."""
        self.waiters.meta_received(meta("STARTED"))
        waiter = Recording()
        self.waiters.add("t", waiter)
        self.assertEqual((waiter.states, list(self.waiters)), (["STARTED"], ["t"]))
        self.assertEqual(self.waiters.last_states["t"]["status"], "STARTED")

    def test_unclaimed_states_are_bounded(self):
        """The buffer for states that nobody waits for drops the oldest."""
        for number in range(5):
            self.waiters.meta_received(meta("SUCCESS", f"t{number}"))
        self.assertEqual(list(self.waiters.unclaimed), ["t2", "t3", "t4"])

    def test_unclaimed_states_are_bounded_in_bytes(self):
        """The sum of their sizes is bounded: the oldest go first, and one that is too large by itself costs no other its place."""
        self.waiters.unclaimed_bytes = 100
        for number, size in enumerate((40, 40, 30)):
            self.waiters.meta_received(meta("SUCCESS", f"t{number}"), size)
        self.assertEqual(list(self.waiters.unclaimed), ["t1", "t2"])
        self.waiters.meta_received(meta("SUCCESS", "large"), 101)
        self.assertEqual(list(self.waiters.unclaimed), ["t1", "t2"])
        self.waiters.meta_received(meta("SUCCESS", "all"), 100)
        self.assertEqual(list(self.waiters.unclaimed), ["all"])

    def test_room_is_free_again(self):
        """What was claimed, forgotten, replaced or dropped leaves its bytes to others."""
        self.waiters.unclaimed_bytes = 100
        for taken in (
            lambda: self.waiters.add("t", Recording()),
            lambda: self.waiters.called("t"),
            lambda: self.waiters.take_unclaimed("t"),
            lambda: self.waiters.meta_received(meta("SUCCESS"), 10),
            lambda: self.waiters.meta_received(meta("SUCCESS"), 101),
        ):
            self.waiters.meta_received(meta("STARTED"), 90)
            taken()
            self.waiters.meta_received(meta("SUCCESS", "u"), 90)
            self.assertIn("u", self.waiters.unclaimed)
            self.waiters.take_unclaimed("u")
            for left in list(self.waiters.unclaimed):
                self.waiters.take_unclaimed(left)
            self.assertEqual((self.waiters._size, self.waiters._sizes), (0, {}))
            self.setUp()
            self.waiters.unclaimed_bytes = 100

    def test_duplicate_keeps_its_size(self):
        """A final state that is kept against an older one is kept at its own size."""
        self.waiters.unclaimed_bytes = 100
        self.waiters.meta_received(meta("SUCCESS"), 60)
        self.waiters.meta_received(meta("STARTED"), 1)
        self.waiters.meta_received(meta("SUCCESS", "u"), 60)
        self.assertEqual(list(self.waiters.unclaimed), ["u"])

    def test_duplicate_does_not_replace_final(self):
        """A final state is kept when an older one is delivered after it."""
        self.waiters.meta_received(meta("SUCCESS"))
        self.waiters.meta_received(meta("STARTED"))
        self.assertEqual(self.waiters.unclaimed["t"]["status"], "SUCCESS")

    def test_fail(self):
        """A wait that cannot be settled fails each waiter and leaves nothing."""
        first, second = Recording(), Recording()
        self.waiters.add("t", first)
        self.waiters.add("t", second)
        error = ValueError("x")
        self.waiters.fail("t", error)
        self.waiters.fail("t", error)
        self.assertEqual((first.errors, second.errors), ([("t", error)], [("t", error)]))
        self.assertEqual(len(self.waiters), 0)

    def test_forget(self):
        """Everybody who waits for a task is told that its result is not wanted, and decides whether to leave."""
        one, two, other = Recording(), Recording(), Recording()
        for task_id, waiter in (("t", one), ("t", two), ("o", other)):
            self.waiters.add(task_id, waiter)
        error = ValueError("forgotten")
        self.waiters.forget("t", error)
        self.waiters.forget("nobody", error)
        self.assertEqual([one.errors, two.errors, other.errors], [[("t", error)], [("t", error)], []])
        self.assertEqual(self.waiters.of("t"), [one, two])
