"""What holds for calls and results whatever carries them: mixins for `ClientTestCase`, run by ``test_contract.py``."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from celery import chain, chord, group
from kombu.exceptions import EncodeError
from twisted.internet.defer import CancelledError

from tests.integration._clients import ClientTestCase, outcomes
from tests.support.servers import wait_for_file
from tests.support.tasks import CustomError
from twistedcelery.errors import ResultNotKept, ResultTimeout

if TYPE_CHECKING:
    _Base = ClientTestCase
else:
    _Base = object


def _signature(app: Any, name: str, *args: Any) -> Any:
    return app.signature(f"tests.{name}", args=args)


def _recorded(app: Any, *args: Any) -> Any:
    return app.signature("tests.record", args=args, immutable=True)


__all__ = ["CallContract", "KeptResultContract"]


class CallContract(_Base):
    """Holds for every broker and every source of results."""

    async def test_call(self):
        """A call fires with its task's value."""
        tx = self.client()
        calling = tx.send_task("tests.add", args=(1, 2))
        await calling.when_sent()
        self.assertEqual(await calling, 3)
        handle: Any = calling.async_result
        self.assertEqual(await handle.state(), "SUCCESS")
        await self.assert_nothing_left(tx)

    async def test_many(self):
        """A thousand calls at once each give their own value."""
        tx = self.client()
        callings = [tx.send_task("tests.add", args=(number, number)) for number in range(1000)]
        self.assertEqual(await outcomes(callings), [2 * number for number in range(1000)])
        await self.assert_nothing_left(tx)

    async def test_calls_from_callbacks(self):
        """A callback may make the next call: two hundred threads of ten calls each come to their ends."""
        tx = self.client()

        def again(value: int) -> Any:
            return value if value == 10 else tx.send_task("tests.add", args=(value, 1)).addCallback(again)

        callings = [tx.send_task("tests.add", args=(0, 1)).addCallback(again) for _ in range(200)]
        self.assertEqual(await outcomes(callings), [10] * 200)
        await self.assert_nothing_left(tx)

    async def test_group_and_chain(self):
        """A group gives a list in order, a chain its last value, and a failed link fails the chain."""
        tx = self.client()
        self.assertEqual(
            await tx.delay(group(_signature(tx.app, "add", i, i) for i in range(10))), list(range(0, 20, 2))
        )
        self.assertEqual(
            await tx.delay(chain(_signature(tx.app, "add", 1, 2), _signature(tx.app, "add", 3))), 6
        )
        failing = tx.delay(chain(_signature(tx.app, "fail", "first"), _signature(tx.app, "add", 3)))
        error = await self.failure_of(failing, ValueError)
        self.assertEqual(str(error), "first")
        await self.assert_nothing_left(tx)

    async def test_exception(self):
        """A task's own exception comes, with the worker's traceback as its cause."""
        tx = self.client()
        error = await self.failure_of(tx.send_task("tests.custom_error", args=(7, "text")), CustomError)
        self.assertEqual((error.code, error.text), (7, "text"))
        self.assertIn("custom_error", str(error.__cause__))
        await self.assert_nothing_left(tx)

    async def test_wrong_arguments(self):
        """What cannot be sent is refused at once: nothing was sent, nothing is left."""
        tx = self.client()
        for error, options in (
            (EncodeError, {"args": (object(),)}),
            (TypeError, {"contdown": 60}),
            (TypeError, {"args": 1}),
            (TypeError, {"args": "text"}),
            (TypeError, {"kwargs": [1]}),
            (TypeError, {"connection": object()}),
        ):
            with self.assertRaises(error, msg=repr(options)):
                tx.send_task("tests.add", **options)
            await self.assert_nothing_left(tx)
        self.assertFalse(tx.engine.broker.connected)
        self.assertEqual(await tx.send_task("tests.add", (1, 2)), 3)

    async def test_progress(self):
        """Custom states come in order, once each, the final one last."""
        tx = self.client()
        seen: list[Any] = []
        calling = tx.send_task("tests.progress", args=(5, 0.02))
        value = await calling.get(on_message=lambda meta: seen.append((meta["status"], meta["result"])))
        self.assertEqual(value, 5)
        states = [("PROGRESS", {"current": done, "total": 5}) for done in range(1, 6)]
        # The first may be over before anybody looks.
        self.assertEqual(seen, [*states, ("SUCCESS", 5)][-len(seen) :])
        self.assertGreaterEqual(len(seen), 3)
        await self.assert_nothing_left(tx)

    async def test_links(self):
        """``link`` and ``link_error`` run after the task."""
        tx = self.client()
        path = self.temporary()
        await tx.send_task("tests.add", args=(1, 2), link=_recorded(tx.app, str(path), "linked"))
        await self.failure_of(
            tx.send_task(
                "tests.fail", link_error=_recorded(tx.app, str(path), "error")
            ),
            ValueError,
        )  # fmt: skip
        lines = await self.in_thread(wait_for_file, path, 2)
        self.assertEqual(sorted(lines), ["error", "linked"])

    async def test_ignored(self):
        """A call without a result fires with None once it is sent, and has nothing more to ask for."""
        tx = self.client()
        path = self.temporary()
        calling = tx.send_task("tests.record", args=(str(path), "here"), ignore_result=True)
        self.assertIsNone(await calling)
        await self.failure_of(calling.get(), ResultNotKept)
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), ["here"])
        await self.assert_nothing_left(tx)

    async def test_no_result_in_time(self):
        """A wait with a timeout ends by it, and leaves nothing behind; so does one that is cancelled."""
        tx = self.client()
        calling = tx.send_task("tests.hold", args=(str(self.gate()),))
        await self.failure_of(calling.get(timeout=0.05), ResultTimeout)
        calling.cancel()
        await self.failure_of(calling, CancelledError)
        await self.assert_nothing_left(tx)

    async def test_dropped(self):
        """A call whose Deferred is dropped is no longer waited for; one with a callback is kept."""
        tx = self.client()
        got: list[Any] = []
        tx.send_task("tests.add", args=(1, 1)).addCallback(got.append)
        tx.send_task("tests.hold", args=(str(self.gate()),))
        gc.collect()
        await self.eventually(lambda: got == [2], what="the value came")
        await tx.send_task("tests.add", args=(1, 1))

        def nobody_waits() -> bool:
            # With the next activity: the broker may have confirmed the dropped call after the last result came.
            tx.engine.come_by()
            return len(tx.engine.waiters) == 0

        await self.eventually(nobody_waits, what="nobody waits")

    async def test_big(self):
        """A value of two million characters, and an argument of as many."""
        tx = self.client()
        self.assertEqual(len(await tx.send_task("tests.big_result", args=(2_000_000,))), 2_000_000)
        self.assertEqual(len(await tx.send_task("tests.identity", args=("x" * 2_000_000,))), 2_000_000)

    async def test_stop_with_pending(self):
        """A stop sends what was called, and fails what is still waited for."""
        tx = self.client()
        path = self.temporary()
        callings = [tx.send_task("tests.record", args=(str(path), number)) for number in range(100)]
        ended = outcomes(callings)
        await tx.stopService()
        await ended
        self.assertEqual(len(await self.in_thread(wait_for_file, path, 100)), 100)


class KeptResultContract(_Base):
    """Holds where a result backend keeps results."""

    async def test_states_of_others(self):
        """Any task's state can be asked for, also of one that another process has called."""
        tx = self.client()
        stranger = self.client()
        calling = stranger.send_task("tests.add", args=(1, 2))
        await calling
        handle = tx.AsyncResult(calling.id)
        self.assertEqual(
            [await handle.state(), await handle.result(), await handle.ready(), await handle.successful()],
            ["SUCCESS", 3, True, True],
        )
        self.assertTrue(await handle.exists())
        self.assertEqual(await handle.get(timeout=30), 3)
        failing = stranger.send_task("tests.fail", args=("no",))
        await self.failure_of(failing, ValueError)
        other = tx.AsyncResult(failing.id)
        self.assertTrue(await other.failed())
        self.assertIn("ValueError", (await other.traceback()) or "")
        await self.failure_of(other.get(timeout=30), ValueError)
        unknown = tx.AsyncResult("unknown")
        self.assertEqual(await unknown.state(), "PENDING")
        self.assertFalse(await unknown.exists())
        await self.assert_nothing_left(tx)

    async def test_get_of_another(self):
        """A result that another process waits for too is pushed to both."""
        calling = self.client().send_task("tests.sleep", args=(0.3,))
        tx = self.client()
        self.assertEqual(await tx.AsyncResult(calling.id).get(timeout=30), 0.3)
        self.assertEqual(await calling, 0.3)

    async def test_forget(self):
        """What is forgotten is gone for everybody."""
        tx = self.client()
        calling = tx.send_task("tests.add", args=(1, 2))
        await calling
        stranger = self.client()
        self.assertTrue(await stranger.AsyncResult(calling.id).exists())
        await calling.async_result.forget()
        self.assertFalse(await stranger.AsyncResult(calling.id).exists())

    async def test_chords(self):
        """Chords, groups with a task behind them, and either within the other."""
        tx = self.client()
        adds = [_signature(tx.app, "add", i, i) for i in range(10)]
        self.assertEqual(await tx.delay(chord(adds, _signature(tx.app, "tsum"))), 90)
        self.assertEqual(await tx.delay(group(adds) | _signature(tx.app, "tsum")), 90)
        inner = group(adds[:3]) | _signature(tx.app, "tsum")
        self.assertEqual(
            await tx.delay(chord([inner, _signature(tx.app, "add", 1, 1)], _signature(tx.app, "tsum"))), 8
        )
        nested = chain(
            _signature(tx.app, "add", 1, 1),
            group(_signature(tx.app, "add", i) for i in range(3)),
            _signature(tx.app, "tsum"),
        )
        self.assertEqual(await tx.delay(nested), 9)
        self.assertEqual(await tx.delay(group([inner, inner.clone()])), [6, 6])
        await self.assert_nothing_left(tx)

    async def test_chord_failure(self):
        """A chord fails with its header, and says which of its tasks it was."""
        tx = self.client()
        failing = tx.delay(
            chord(
                [_signature(tx.app, "add", 1, 1), _signature(tx.app, "fail", "header")],
                _signature(tx.app, "tsum"),
            )
        )
        error = await self.failure_of(failing, Exception)
        self.assertIn("header", str(error))
        await self.assert_nothing_left(tx)

    async def test_saved_group(self):
        """A group can be saved here and restored elsewhere."""
        tx = self.client()
        calling = tx.delay(group(_signature(tx.app, "add", i, i) for i in range(3)))
        saved: Any = calling.async_result
        await saved.save()
        restored: Any = await self.client().restore_group(calling.id)
        self.assertEqual(await restored.get(timeout=30), [0, 2, 4])
        await restored.delete()
        self.assertIsNone(await tx.restore_group(calling.id))
