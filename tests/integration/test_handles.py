"""Results that are kept: by whatever process asks, for whatever process called."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError
from kombu.utils.uuid import uuid
from twisted.internet.defer import CancelledError, Deferred

from tests.integration._clients import outcomes
from tests.integration._places import OverAMQP, OverRedis, RedisOverAMQP, Tasks
from tests.integration.canvas_cases import Stamp
from tests.support import servers
from tests.support.servers import Worker, wait_for_file
from tests.support.tasks import CustomError
from twistedcelery.errors import ResultNotKept, ResultTimeout

STOCK = """
import json, os, pickle, sys
from celery import Celery
from celery.result import result_from_tuple

broker, backend, written, pickled = sys.argv[1:]
app = Celery("elsewhere", broker=broker, backend=backend)
there = result_from_tuple(json.loads(written), app)
values = there.get(timeout=30), there.parent.get(timeout=30)
whole, handle, member = pickle.loads(bytes.fromhex(pickled))
kinds = [type(whole).__name__, type(member).__name__]
print(json.dumps([values, kinds, whole == handle == there, member.id, there.as_tuple()]), flush=True)
# The finalizers of Celery's results fail in an interpreter that is being taken apart.
os._exit(0)
"""


class _Kept:
    """Holds where a result backend keeps results."""

    def open(self: Any) -> tuple[Tasks, Any]:
        app = self.app()
        return Tasks(app), self.client(app)

    async def test_another_process(self: Any) -> None:
        """What stock Celery has called elsewhere can be waited for, asked about and followed here."""
        _, tx = self.open()

        def call(stock: Celery) -> list[str]:
            ids = [
                stock.send_task(name, args=args).id
                for name, args in (("tests.sleep", (0.3,)), ("tests.fail", ("no",)))
            ]
            canvas = chain(stock.signature("tests.add", (1, 1)), stock.signature("tests.add", (3,)))
            return [*ids, canvas.apply_async().id]

        slow, failing, linked = [tx.AsyncResult(task_id) for task_id in await self.elsewhere(call)]
        self.assertEqual(await slow.get(timeout=30), 0.3)
        self.assertEqual((await slow.state(), await slow.info()), ("SUCCESS", 0.3))
        error = await self.failure_of(failing.get(timeout=30), ValueError)
        self.assertEqual(str(error), "no")
        self.assertIsInstance(await failing.get(propagate=False), ValueError)
        self.assertEqual(await linked.get(timeout=30), 5)
        self.assertEqual((await slow.meta())["task_id"], slow.id)
        self.assertIn("date_done", await tx.AsyncResult(slow.id).meta())

    async def test_interchange(self: Any) -> None:
        """Handles become Celery's results and back, by ``as_tuple``, JSON and pickle, with parents and members."""
        tasks, tx = self.open()
        calling = tx.delay(tasks.add.s(1, 1) | group(tasks.add.s(1), tasks.add.s(2)))
        self.assertEqual(await calling, [3, 4])

        pickled = pickle.dumps([calling, calling.async_result, calling.results[0]])
        said = await self.program(
            STOCK, self.broker, self.backend, json.dumps(calling.as_tuple()), pickled.hex()
        )
        values, kinds, equal, member_id, written = json.loads(said)
        self.assertEqual((values, kinds, equal), ([[3, 4], 2], ["GroupResult", "AsyncResult"], True))
        self.assertEqual(member_id, calling.results[0].id)
        ours = tx.engine.handle_of_tuple(written)
        self.assertEqual(await ours.get(timeout=30), [3, 4])
        self.assertEqual(await ours.parent.get(timeout=30), 2)

    # Celery's own.
    @pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")
    async def test_saved_group(self: Any) -> None:
        """A group saved here is restored by stock Celery, and the other way; ``delete`` removes it."""
        tasks, tx = self.open()
        calling = tx.delay(group(tasks.add.s(i, i) for i in range(3)))
        await calling.save()
        restored = await self.elsewhere(
            lambda stock: stock.GroupResult.restore(calling.id, app=stock).get(timeout=30)
        )
        self.assertEqual(restored, [0, 2, 4])

        def save(stock: Celery) -> str:
            there = group(stock.signature("tests.add", (i, 1)) for i in range(3)).apply_async()
            there.save()
            return str(there.id)

        found = await tx.restore_group(await self.elsewhere(save))
        self.assertEqual(await found.get(timeout=30), [1, 2, 3])
        self.assertEqual((len(found), await found.completed_count()), (3, 3))
        await found.delete()
        self.assertIsNone(await tx.restore_group(found.id))
        self.assertIsNone(await tx.restore_group("never saved"))
        empty = tx.delay(group([]))
        await empty.save()
        self.assertEqual((await tx.restore_group(empty.id)).results, [])

    async def test_as_completed(self: Any) -> None:
        """Members come as they end, whether they have failed or not; who leaves early leaves nothing."""
        tasks, tx = self.open()
        third, last = self.gate(), self.gate()
        calling = tx.delay(
            group(
                tasks.hold.s(str(last)),
                tasks.fail.s("x"),
                tasks.hold.s(str(third)),
                chain(tasks.fail.si("y"), tasks.add.si(1, 1)),
            )
        )
        calling.addErrback(lambda _: None)
        seen, which = [], []
        async for result in calling.as_completed():
            which.append(calling.results.index(result))
            seen.append(await result.get(propagate=False))
            if len(seen) > 1:
                (third if len(seen) == 2 else last).unlink(missing_ok=True)
        self.assertEqual((which[2:], seen[2:]), ([2, 0], ["let go"] * 2))
        self.assertEqual({str(error) for error in seen[:2]}, {"x", "y"})
        again = tx.delay(group(tasks.hold.s(str(self.gate())), tasks.add.s(1, 1)))
        async for result in again.as_completed():
            self.assertEqual(await result.get(), 2)
            break
        again.cancel()
        await self.failure_of(again, CancelledError)
        await self.assert_empties(tx)

    async def test_group_questions(self: Any) -> None:
        """What a group can be asked, while it runs, when it is done, and by another process."""
        tasks, tx = self.open()
        gate = self.gate()
        calling = tx.delay(
            group(tasks.add.s(1, 1), tasks.hold.s(str(gate)), group(tasks.fail.s("x"), tasks.add.s(2, 2)))
        )
        handle = calling.async_result
        calling.addErrback(lambda _: None)
        await self.eventually_async(handle.completed_count, 2)
        self.assertEqual(
            [await handle.ready(), await handle.waiting(), await handle.successful()], [False, True, False]
        )
        gate.unlink()
        values = await handle.get(propagate=False, timeout=30)
        self.assertEqual((values[0], values[1], str(values[2]), values[3]), (2, "let go", "x", 4))
        other = self.client().engine.handle_of_tuple(handle.as_tuple())
        for one in (handle, other):
            answers = [await one.ready(), await one.waiting(), await one.successful(), await one.failed()]
            self.assertEqual(answers, [True, False, False, True])
            self.assertEqual(await one.completed_count(), 3)
            self.assertEqual(await one.children(), handle.results)
        self.assertRaises(TypeError, bool, handle.ready())
        await other.forget()
        self.assertEqual(await self.client().engine.handle_of_tuple(handle.as_tuple()).completed_count(), 0)

    async def eventually_async(self: Any, ask: Any, expected: object) -> None:
        for _ in range(1000):
            if await ask() == expected:
                return
            await self.sleep(0.02)
        self.fail(f"never {expected}")

    async def test_children(self: Any) -> None:
        """``children`` and ``collect`` follow what tasks have called, to the last."""
        tasks, tx = self.open()
        calling = tx.delay(tasks.spawn, [1, 2], 2)
        ids = await calling
        children = await calling.children()
        self.assertEqual([child.id for child in children], ids)
        seen = {node.id: value async for node, value in calling.collect(timeout=10)}
        self.assertEqual((len(seen), seen[calling.id]), (7, ids))
        self.assertEqual(sorted(value for value in seen.values() if isinstance(value, int)), [1, 1, 2, 2])
        foreign = {node.id: value async for node, value in self.client().AsyncResult(calling.id).collect()}
        self.assertEqual(foreign, seen)

    async def test_parents(self: Any) -> None:
        """A failed link fails whoever asks for the end, or is its value with ``propagate=False``."""
        tasks, tx = self.open()
        calling = tx.delay(chain(tasks.fail.si("link"), tasks.add.si(1, 1), tasks.add.s(1)))
        await self.failure_of(calling, ValueError)
        for handle in (calling.async_result, tx.engine.handle_of_tuple(calling.as_tuple())):
            await self.failure_of(handle.get(timeout=30), ValueError)
            await self.failure_of(handle.parent.get(timeout=30), ValueError)
            self.assertIsInstance(await handle.get(timeout=30, propagate=False), ValueError)
            await self.eventually_async(handle.state, "FAILURE")
            self.assertEqual(await handle.parent.parent.state(), "FAILURE")
        members = tx.engine.handle_of_tuple(
            tx.delay(group(tasks.add.s(1, 1), chain(tasks.fail.si("x"), tasks.add.si(1, 1))))
            .addErrback(lambda _: None)
            .as_tuple()
        )
        value, error = await members.get(timeout=30, propagate=False)
        self.assertEqual((value, str(error)), (2, "x"))
        await self.assert_empties(tx)

    async def test_progress(self: Any) -> None:
        """States come to every ``on_message`` in order, the final one last, whoever asks."""
        tasks, tx = self.open()
        calling = tx.delay(tasks.progress, 5, 0.05)
        other = self.client().AsyncResult(calling.id)
        seen: dict[str, list[Any]] = {"own": [], "other": []}

        def note(name: str) -> Any:
            return lambda meta: seen[name].append((meta["status"], meta["result"]))

        values = [calling.get(on_message=note("own")), other.get(timeout=30, on_message=note("other"))]
        self.assertEqual(await outcomes(values), [5, 5])
        states = [("PROGRESS", {"current": done, "total": 5}) for done in range(1, 6)] + [("SUCCESS", 5)]
        for one in seen.values():
            self.assertEqual(one, states[-len(one) :])
            self.assertGreaterEqual(len(one), 4)

    async def test_retry(self: Any) -> None:
        """A task that is to be tried again says so, and why, also for an error that cannot be sent."""
        tasks, tx = self.open()
        calling = tx.delay(tasks.retry_then_succeed, 1, 1.0)
        other = self.client().AsyncResult(calling.id)
        odd = tx.delay(tasks.retry_unpicklable)
        for handle in (calling.async_result, other):
            await self.eventually_async(handle.state, "RETRY")
            error = await handle.info()
            self.assertEqual((type(error), str(error)), (ValueError, "not yet"))
            self.assertIn("retry_then_succeed", await handle.traceback())
            self.assertEqual([await handle.ready(), await handle.failed()], [False, False])
        await self.eventually_async(odd.async_result.state, "RETRY")
        self.assertIn("not picklable", str(await odd.async_result.info()))
        odd.cancel()
        await self.failure_of(odd, CancelledError)
        await odd.revoke()
        self.assertEqual((await calling, await other.get(timeout=30)), (1, 1))
        self.assertEqual([await calling.state(), await other.state()], ["SUCCESS"] * 2)

    async def test_result_as_value(self: Any) -> None:
        """The result that a task returns of a canvas that it has called can be read and waited for."""
        tasks, tx = self.open()
        canvas = tasks.add.s(1, 1) | tasks.add.s(2) | group(tasks.add.s(3), tasks.add.s(4)) | tasks.add.s([5])
        value = await tx.delay(tasks.call_canvas, canvas)
        handle = tx.engine.handle_of_tuple(value)
        self.assertEqual(await handle.get(timeout=30), [7, 8, 5])
        self.assertEqual(await handle.parent.get(timeout=30), [7, 8])
        self.assertEqual(await handle.parent.parent.parent.get(timeout=30), 2)

    async def test_errbacks(self: Any) -> None:
        """The error callback of a chord is a child of its result, which says which task has failed."""
        tasks, tx = self.open()
        body = tasks.identity.s().on_error(tasks.record_error.s())
        calling = tx.delay(chord([tasks.add.s(1, 2), tasks.fail.s("no"), tasks.add.s(3, 4)], body))
        await self.failure_of(calling, ValueError)
        # The failure of the header may come before that of the body.
        await self.eventually_async(calling.state, "FAILURE")
        ((called,),) = [child.results for child in await calling.children()]
        self.assertEqual(await called.get(timeout=30), calling.id)
        other = self.client()
        found = await other.AsyncResult(calling.id).info()
        header = calling.parent
        failed = header.results[1]
        self.assertEqual(
            (type(found), str(found)), (ChordError, f"Dependency {failed.id} raised ValueError('no')")
        )
        self.assertEqual((await other.AsyncResult(failed.id).meta())["group_id"], header.id)
        self.assertEqual([await one.state() for one in header.results], ["SUCCESS", "FAILURE", "SUCCESS"])

    async def test_subscriptions(self: Any) -> None:
        """Redis is subscribed to for what is waited for: not for what has come, is forgotten or ignored."""
        tasks, tx = self.open()
        server = servers.redis()

        async def count(*ids: str) -> int:
            channels = [f"celery-task-meta-{task_id}" for task_id in ids]
            found = await self.in_thread(server.command, "PUBSUB", "NUMSUB", *channels)
            return sum(found[1::2])

        async def none_of(*ids: str) -> None:
            await self.eventually_async(lambda: Deferred.fromCoroutine(count(*ids)), 0)

        ignored = tx.delay(tasks.ignore)
        self.assertIsNone(await ignored)
        self.assertEqual(await count(ignored.id), 0)
        gate = self.gate()
        got = tx.delay(tasks.hold, str(gate))
        await self.eventually_async(lambda: Deferred.fromCoroutine(count(got.id)), 1)
        gate.unlink()
        await got
        await none_of(got.id)
        forgotten = tx.delay(tasks.hold, str(self.gate()))
        await self.eventually_async(lambda: Deferred.fromCoroutine(count(forgotten.id)), 1)
        await forgotten.forget()
        await self.failure_of(forgotten, ResultNotKept)
        await none_of(forgotten.id)
        chords = [tx.delay(chord([tasks.add.s(5, 6), tasks.add.s(6, 7)], tasks.tsum.s())) for _ in range(10)]
        ids = [one.id for calling in chords for one in (calling, *calling.parent.results)]
        self.assertEqual(await outcomes(chords), [24] * 10)
        await none_of(*ids)

    async def test_timeout(self: Any) -> None:
        """A wait that ends by its timeout says how much is missing, and can be begun again."""
        tasks, tx = self.open()
        gate = self.gate()
        calling = tx.delay(group(tasks.hold.s(str(gate)), tasks.add.s(1, 1)))
        self.assertEqual(await calling.results[1].get(), 2)
        error = await self.failure_of(calling.get(timeout=0.2), ResultTimeout)
        self.assertIn("1 of 2 tasks", str(error))
        gate.unlink()
        self.assertEqual(await calling.get(timeout=30), ["let go", 2])
        self.assertEqual(await calling, ["let go", 2])

    async def test_forget(self: Any) -> None:
        """A chain is forgotten with its parents, and what is forgotten may be called anew by the same id."""
        tasks, tx = self.open()
        calling = tx.delay(tasks.add.s(1, 1) | tasks.add.s(1))
        await calling
        # A worker calls the next task of a chain before it stores the result of this one.
        await calling.parent.get()
        other = self.client()
        found = [other.AsyncResult(calling.id), other.AsyncResult(calling.parent.id)]
        self.assertEqual([await one.exists() for one in found], [True, True])
        await calling.forget()
        self.assertEqual([await other.AsyncResult(one.id).exists() for one in found], [False, False])
        self.assertEqual(await tx.apply_async(tasks.add, (2, 2), task_id=calling.id), 4)

    async def test_extended(self: Any) -> None:
        """A task's own exception class is rebuilt for whoever asks."""
        tasks, tx = self.open()
        calling = tx.delay(tasks.custom_error, 7, "text")
        await self.failure_of(calling, CustomError)
        error = await self.failure_of(self.client().AsyncResult(calling.id).get(timeout=30), CustomError)
        self.assertEqual((error.code, error.text), (7, "text"))


class KeptInRedis(_Kept, OverRedis):
    """Redis and Redis."""


class KeptInRedisOverAMQP(_Kept, RedisOverAMQP):
    """RabbitMQ and Redis."""


class _Revoking:
    """Revoking, with a worker whose tasks are processes that can be killed."""

    worker: Any = None
    #: Whether the result backend can do chords.
    chords = True

    async def test_revoke(self: Any) -> None:
        """One task, many, a group, those with a stamp; before they run, or while, with a signal."""
        tasks = Tasks(self.app(task_default_queue="revoking"))
        tx = self.client(tasks._app)
        gate = self.gate()
        blocking = tx.delay(tasks.hold, str(gate))
        path = self.temporary()

        def record(key: str) -> Any:
            return tasks.record.si(str(path), key)

        one = tx.delay(record("one"))
        two, three = tx.delay(record("two")), tx.delay(record("three"))
        members = tx.delay(group(record("four"), record("five")))
        canvas = record("six")
        canvas.stamp(visitor=Stamp(monitoring="revoke me"))
        stamped = tx.delay(canvas)
        kept = tx.delay(record("kept"))
        await one.revoke()
        await tx.revoke([two.id, three.id])
        await members.async_result.revoke()
        await tx.revoke_by_stamped_headers({"monitoring": ["revoke me"]})
        # Once the worker has answered this, it knows of what came before.
        to = [self.worker.hostname]
        answers = await self.elsewhere(lambda stock: stock.control.ping(destination=to, timeout=30))
        self.assertEqual(len(answers), 1)
        gate.unlink()
        for calling in (one, two, three, members, stamped):
            await self.failure_of(calling, TaskRevokedError)
        self.assertEqual(await one.state(), "REVOKED")
        self.assertEqual(
            [await one.ready(), await one.failed(), await one.successful()], [True, False, False]
        )
        self.assertEqual((await blocking, await kept), ("let go", "kept"))
        self.assertEqual(await self.in_thread(wait_for_file, path, 1), ["kept"])

    async def test_revoke_in_canvas(self: Any) -> None:
        """A canvas fails with the task in it whose stamp is revoked; another stamp harms nothing."""
        tasks = Tasks(self.app(task_default_queue="revoking"))
        tx = self.client(tasks._app)
        stamp = uuid()

        def stamped(value: str = stamp) -> Any:
            canvas = tasks.identity.si(1)
            canvas.stamp(visitor=Stamp(monitoring=value))
            return canvas

        await tx.revoke_by_stamped_headers({"monitoring": [stamp, 1234]})
        add = tasks.add.si
        canvases = [
            group([stamped()]),
            chain(stamped()),
            group([add(1, 1), stamped(), add(1, 1)]),
            chain(add(1, 1), stamped()),
            chain(add(1, 1), stamped(), add(1, 1)),
            chain(add(1, 1), group([add(1, 1), stamped(), add(1, 1)])),
        ]
        headers = [
            chord(group([stamped()]), add(1, 1)),
            chord([add(1, 1), stamped()], add(1, 1)),
            chain(add(1, 1), group([add(1, 1), stamped()]), add(1, 1)),
        ]
        bodies = [
            chord(group([add(1, 1)]), stamped()),
            chain(add(1, 1), group([add(1, 1), add(1, 1)]), stamped()),
        ]
        if not self.chords:
            headers, bodies = [], []
        kept = tx.delay(stamped(uuid()))
        for calling in [tx.delay(canvas) for canvas in canvases + bodies]:
            await self.failure_of(calling, TaskRevokedError)
        for calling in [tx.delay(canvas) for canvas in headers]:
            await self.failure_of(calling, TaskRevokedError)
        self.assertEqual(await kept, 1)

    async def test_soft_time_limit(self: Any) -> None:
        """A task that survives its soft time limit gives its value, in a chord too."""
        tasks = Tasks(self.app(task_default_queue="revoking"))
        tx = self.client(tasks._app)
        limited = tasks.guarded_sleep.si(10).set(soft_time_limit=0.3)
        if not self.chords:
            self.assertEqual(await tx.delay(limited), "limit")
        else:
            calling = tx.delay(chord([tasks.identity.si("whole"), limited], tasks.identity.s()))
            self.assertEqual(await calling, ["whole", "limit"])

    async def test_terminate(self: Any) -> None:
        """A task that runs is killed, with the signal that was asked for."""
        tasks = Tasks(self.app(task_default_queue="revoking"))
        tx = self.client(tasks._app)
        for name in ("SIGTERM", "SIGKILL"):
            calling = tx.apply_async(tasks.progress, (1000, 0.02))
            started: Deferred[None] = Deferred()
            calling.get(
                on_message=lambda meta, first=started: first.called or first.callback(None)
            ).addErrback(lambda _: None)
            await started
            await calling.revoke(terminate=True, signal=name)
            await self.failure_of(calling, TaskRevokedError)
            self.assertEqual(await calling.state(), "REVOKED")
        # The pool works again.
        self.assertEqual(await tx.delay(tasks.add, 1, 1), 2)


class _Prefork:
    """A worker of its own, with processes."""

    def start_servers(self: Any) -> None:
        super().start_servers()  # type: ignore[misc]
        if type(self).worker is None:
            worker = Worker(self.broker, self.backend, pool="prefork", concurrency=1, queues=("revoking",))
            worker.start()
            type(self).worker = worker


class RevokingOverAMQP(_Prefork, _Revoking, OverAMQP):
    """RabbitMQ and rpc."""

    chords = False


class RevokingOverRedis(_Prefork, _Revoking, OverRedis):
    """Redis and Redis."""
